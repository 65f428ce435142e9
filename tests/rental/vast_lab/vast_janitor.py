"""Cleans up after a lab, however it ended: run as `python -I -S vast_janitor.py folder`.

It waits until its standard input closes, which the death of the lab's process does too, or until
its parent is another process; then it kills what is left of the lab's instances, takes down its
mounts and removes its folder.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time


def wait_for_the_end(parent: int) -> None:
    """Also looks at the parent: a process forked from it may hold the pipe open."""
    while os.getppid() == parent:
        readable, _, _ = select.select([0], [], [], 0.5)
        if readable and not os.read(0, 1):
            return


def marked(root: str) -> list[int]:
    """Processes that an instance of this lab started, by a variable in their environment."""
    mark, found = f"LAB_ROOT={root}".encode(), []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as environ:
            if mark in environ.read().split(b"\0"):
                found.append(int(name))
    return found


def main() -> None:
    root = sys.argv[1]
    wait_for_the_end(os.getppid())
    deadline = time.monotonic() + 5
    while (alive := marked(root)) and time.monotonic() < deadline:
        for pid in alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    with open("/proc/self/mounts") as mounts:
        for place in [line.split()[1] for line in mounts]:
            if place.startswith(root + "/"):
                subprocess.run(["umount", "-l", place], check=False)
    shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
