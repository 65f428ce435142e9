"""A disk that fails once: the k-th open, write, fsync or replace of a script, and no other.

For the server of scripts.py, whose forks call one of these functions before the script starts.
"""

import builtins
import errno
import io
import os
import resource
import signal
from collections.abc import Callable, Iterator

KINDS = ("open", "write", "fsync", "replace")
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)


class Written:
    """A file opened for writing, of which a write may fail half way."""

    def __init__(self, file: io.IOBase, happens: Callable[[str, object], None]):
        self.__dict__.update(file=file, happens=happens)

    def write(self, data: object) -> int:
        def fail_half_way() -> None:
            self.file.write(data[: len(data) // 2])
            self.file.flush()

        self.happens("write", self.file.name, before=fail_half_way)
        return self.file.write(data)

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)

    def __enter__(self) -> "Written":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __iter__(self) -> Iterator:
        return iter(self.file)


def limit_file_size(n_bytes: int) -> None:
    """As `ulimit -f`: a write beyond it fails with EFBIG."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))





def limit_data(n_bytes: int) -> None:
    """Memory beyond it is refused: a script that takes in whatever comes ends."""
    resource.setrlimit(resource.RLIMIT_DATA, (n_bytes, n_bytes))
