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


def ignore_hangup() -> None:
    """As `nohup`."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def inject(kind: str, k: int, *, below: str, counts: str) -> None:
    """Makes the k-th operation of the kind fail on a file below the folder; 0: none.

    Args:
        counts: file that gets a byte for each operation of the kind
    """
    log = os.open(counts, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    n_happened = 0

    def happens(what: str, path: object, before: Callable[[], None] = lambda: None) -> None:
        nonlocal n_happened
        if what != kind or not os.path.abspath(os.fsdecode(path)).startswith(below):
            return
        n_happened += 1
        os.write(log, b".")
        if n_happened == k:
            before()
            number = ERRORS[k % len(ERRORS)]
            # what fails after open() does not know the file's name
            names = () if what in ("write", "fsync") else (os.fspath(path),)
            raise OSError(number, os.strerror(number), *names)

    real_open, real_fsync, real_replace = builtins.open, os.fsync, os.replace

    def opening(file: object, mode: str = "r", *args: object, **kwargs: object) -> object:
        if isinstance(file, int) or not set(mode) & set("wax+"):
            return real_open(file, mode, *args, **kwargs)
        happens("open", file)
        return Written(real_open(file, mode, *args, **kwargs), happens)

    def fsync(fd: int) -> None:
        happens("fsync", os.readlink(f"/proc/self/fd/{fd}"))
        real_fsync(fd)

    def replace(source: object, target: object) -> None:
        happens("replace", source)
        real_replace(source, target)

    builtins.open = io.open = opening
    os.fsync, os.replace = fsync, replace
