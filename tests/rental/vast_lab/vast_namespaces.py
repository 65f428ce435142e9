"""Part of vast_supervisor.py: an instance's own view of the machine, and the end of all in it.

Root may give each instance a PID namespace, which the kernel ends as one, and a root of its own in
which /proc, /workspace and /dev/shm are private. Elsewhere the supervisor is the sub-reaper of what
it starts, finds all of it by the parents' ids, and kills it.
"""

import contextlib
import ctypes
import os
import signal
import time

CLONE_NEWNS, CLONE_NEWPID = 0x00020000, 0x20000000
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LIBC = ctypes.CDLL(None, use_errno=True)


def libc(name: str, *args) -> None:
    """Calls a function of libc, strings as bytes, and raises OSError where it fails."""
    args = [a.encode() if isinstance(a, str) else a for a in args]
    if getattr(LIBC, name)(*args) != 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


# --- the instance's own view of the machine ---


def enter_namespaces(spec: dict) -> None:
    """Leaves the parent waiting outside and goes on as process 1 of fresh namespaces."""
    libc("unshare", CLONE_NEWNS | CLONE_NEWPID)
    child = os.fork()
    if child:
        os.close(0)  # only process 1 may hold the order line
        os.waitpid(child, 0)  # returns when the kernel has ended the whole namespace
        os._exit(0)
    libc("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc("mount", "none", "/", None, MS_REC | MS_PRIVATE, None)
    new_root = spec["dir"] + "/root"
    os.makedirs(new_root, exist_ok=True)
    libc("mount", "tmpfs", new_root, "tmpfs", 0, "size=1m,mode=755")
    for name in os.listdir("/"):
        mirror("/" + name, new_root + "/" + name)
    libc("mount", "proc", new_root + "/proc", "proc", 0, None)
    for path, source in spec["own"].items():  # /workspace, /dev/shm: this instance's alone
        os.makedirs(new_root + path, exist_ok=True)
        libc("mount", source, new_root + path, None, MS_BIND, None)
    os.chroot(new_root)
    os.chdir("/")


def mirror(path: str, to: str) -> None:
    """Shows a top-level entry of the machine at the same place below the new root."""
    if os.path.islink(path):
        os.symlink(os.readlink(path), to)
    elif os.path.isdir(path):
        os.mkdir(to)
        if path != "/proc":
            with contextlib.suppress(OSError):  # an odd mount; what matters would fail loudly
                libc("mount", path, to, None, MS_BIND | MS_REC, None)


# --- ending everything ---


def inherit_orphans() -> None:
    """Makes every orphan below this process its child, where there is no namespace to do it."""
    libc("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants() -> list[int]:
    """Every process below this one, by the parent's id in /proc/*/stat."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as stat:
            parent = int(stat.read().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(name))
    found, todo = [], [os.getpid()]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def end_everything() -> None:
    """Kills all that this process started, until nothing is left, and exits."""
    if os.getpid() == 1:
        os._exit(0)  # the kernel ends the namespace, and reports it only when all are gone
    deadline = time.monotonic() + 5
    while (alive := descendants()) and time.monotonic() < deadline:
        for pid in alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.002)
    os._exit(0)
