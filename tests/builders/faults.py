"""A disk that fails once, a SIGKILL or a pause: at the k-th open, write, fsync or replace.

For the server of scripts.py, whose forks call one of these functions before the script starts.
"""

import builtins
import errno
import io
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator

KINDS = ("open", "write", "fsync", "replace")
ANY = (*KINDS, "unlink")
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


def inject(
    kinds: list[str], k: int, *, below: str, log: str, then: str = "fails", patience_s: float = 60
) -> None:
    """What happens at the k-th operation of the kinds on a file below the folder; 0: nothing.

    Args:
        log: file that gets the first letter of each operation of the kinds
        then: the operation "fails"; "kills": SIGKILL, before the operation or half way through a
            write; "pauses": <log>.paused appears, and it goes on when <log>.resumed does
    """
    log_fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    n_happened = 0

    def happens(what: str, path: object, before: Callable[[], None] = lambda: None) -> None:
        nonlocal n_happened
        if what not in kinds or not os.path.abspath(os.fsdecode(path)).startswith(below):
            return
        n_happened += 1
        os.write(log_fd, what[:1].encode())
        if n_happened != k:
            return
        if then == "pauses":
            os.close(os.open(f"{log}.paused", os.O_CREAT))
            end = time.monotonic() + patience_s
            while not os.path.exists(f"{log}.resumed") and time.monotonic() < end:
                time.sleep(0.005)
            return
        before()
        if then == "kills":
            os.kill(os.getpid(), signal.SIGKILL)
        number = ERRORS[k % len(ERRORS)]
        # what fails after open() does not know the file's name
        names = () if what in ("write", "fsync") else (os.fspath(path),)
        raise OSError(number, os.strerror(number), *names)

    real_open, real_fsync, real_replace = builtins.open, os.fsync, os.replace
    real_unlink = os.unlink

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

    def unlink(path: object, *, dir_fd: int | None = None) -> None:
        folder = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        happens("unlink", os.path.join(folder, os.fsdecode(path)))
        real_unlink(path, dir_fd=dir_fd)

    builtins.open = io.open = opening
    os.fsync, os.replace, os.unlink = fsync, replace, unlink
