"""Readers of hostile files, in forked children: bounded in time and memory, watched, and judged.

A child reads one case after the other, as a script would. Its memory is limited; whatever it writes
outside its folder, starts or connects to is noted by an audit hook. What a reader may do with a
hostile file: give a value, or say in one line what is wrong with which file.
"""

import contextlib
import errno
import faulthandler
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from sparse_coding.config import UserError, one_line
from sparse_coding.rental.records import RentalError

SECONDS = 30.0  # for one case
MEMORY = 1.5e9  # bytes that a case may need beside what the child has
LONGEST = 2000  # characters of a message: a line that can be read
CHANGES = {  # audit events of changes to files -> which of their arguments are paths
    "os.mkdir": (0,), "os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,), "os.link": (1,),
    "os.symlink": (1,), "os.truncate": (0,), "os.chmod": (0,), "os.chown": (0,),
}  # fmt: skip
CODE = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect",
        "pickle.find_class")  # fmt: skip
HARMLESS = {
    "git",
    "uname",
    "rsync",
    "ssh",
    "ssh-keygen",
    "lscpu",
    "ldconfig",
}  # programs that scripts ask
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS)


@dataclass(frozen=True)
class Outcome:
    """Of one case. kind: value, refused, fault; text: the refusal, or what is wrong"""

    name: str
    kind: str
    text: str = ""


def read_all(
    names: list[str], read: Callable[[str], object], folder: Path, *, seconds: float = SECONDS
) -> list[Outcome]:
    """What becomes of each case: read(name) is called in a child whose working and temporary folder
    is `folder`. One that dies, hangs or takes too much memory costs its case alone."""
    outcomes: list[Outcome] = []
    while len(outcomes) < len(names):
        outcomes += _batch(names[len(outcomes) :], read, folder, seconds)
    return outcomes


def _batch(
    names: list[str], read: Callable[[str], object], folder: Path, seconds: float
) -> list[Outcome]:
    """Of the cases up to the first that ends the child."""
    here, there = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(here)
        _in_child(names, read, folder, there)
    os.close(there)
    outcomes, rest, end = [], b"", time.monotonic() + 2 * seconds  # the first one may load modules
    with open(here, "rb", buffering=0) as pipe:
        while len(outcomes) < len(names):
            ready, _, _ = select.select([pipe], [], [], max(0.0, end - time.monotonic()))
            data = pipe.read(2**16) if ready else b""
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            outcomes += [Outcome(*json.loads(line)) for line in lines]
            end = time.monotonic() + seconds
    late = len(outcomes) < len(names) and time.monotonic() >= end
    if len(outcomes) < len(names):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if len(outcomes) < len(names):
        why = f"no end after {seconds:g} s" if late else f"ended with {status}: {_tail(folder)}"
        outcomes.append(Outcome(names[len(outcomes)], "fault", why))
    return outcomes


def _tail(folder: Path) -> str:
    return (folder / "stderr").read_text(errors="replace")[-500:]


def _in_child(names: list[str], read: Callable, folder: Path, pipe: int) -> None:
    """Reads the cases; never returns."""
    code = 1
    try:
        faulthandler.disable()
        folder.mkdir(exist_ok=True)
        os.chdir(folder)
        for fd in (1, 2):
            name = {1: "stdout", 2: "stderr"}[fd]
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
        here = str(folder)
        os.environ |= {"TMPDIR": here, "XDG_CACHE_HOME": here, "TOKENIZERS_PARALLELISM": "false"}
        os.environ |= {"HF_HUB_OFFLINE": "1", "HOME": here, "WANDB_MODE": "disabled"}
        tempfile.tempdir = here
        limit = _data_bytes() + int(MEMORY)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        seen = watched(folder)
        for name in names:
            outcome = judged(name, read, seen)
            os.write(pipe, json.dumps(outcome).encode() + b"\n")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _data_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmData:")[2].split()[0])


def judged(name: str, read: Callable[[str], object], seen: list[str]) -> tuple[str, str, str]:
    """(name, kind, text) of an Outcome. seen: what the audit hook notes"""
    before = _peak_bytes()
    kind, text = "value", ""
    try:
        read(name)
    except (UserError, RentalError) as error:
        kind, text = "refused", one_line(error)
    except OSError as error:
        kind, text = "refused", str(error)
        if error.errno not in DISK:
            kind, text = "fault", traceback.format_exc()[-1500:]
    except BaseException:
        kind, text = "fault", traceback.format_exc()[-1500:]
    if kind == "refused" and not (0 < len(text) <= LONGEST):
        kind, text = "fault", f"a line of {len(text)} characters: {text[:200]}"
    if seen:
        kind, text = "fault", f"it did {seen[:3]}"
        seen.clear()
    if _peak_bytes() - before > MEMORY:
        kind, text = "fault", f"it took {(_peak_bytes() - before) / 1e9:.1f} GB"
    return name, kind, text


def _peak_bytes() -> float:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def watched(folder: Path) -> list[str]:
    """A list to which everything is added that this process does outside the folder from now on, or
    that could run somebody's code. It can't be switched off: for children."""
    seen: list[str] = []
    inside = (os.path.realpath(folder) + os.sep, "/dev/", "/proc/")

    def is_outside(path: object) -> bool:
        if isinstance(path, int) or path is None:
            return False
        return not (os.path.abspath(os.fsdecode(path)) + os.sep).startswith(inside)

    def look(event: str, args: tuple) -> None:
        if event == "open":
            writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            if args[2] & writes and is_outside(args[0]):
                seen.append(f"open {args[0]}")
        elif event in CHANGES:
            if any(is_outside(args[i]) for i in CHANGES[event]):
                seen.append(f"{event} {args}")
        elif event in CODE:
            starts, connects = event == "subprocess.Popen", event == "socket.connect"
            of_ours = starts and os.path.basename(os.fspath(args[1][0])) in HARMLESS
            here = connects and (not isinstance(args[1], tuple) or args[1][0] == "127.0.0.1")
            if not (of_ours or here):
                seen.append(f"{event} {args}"[:300])

    sys.addaudithook(look)
    return seen


def faults(outcomes: Iterable[Outcome]) -> str:
    """Those of the outcomes, in words; "" without any."""
    wrong = [o for o in outcomes if o.kind == "fault"]
    shown = "\n".join(f"--- {o.name}\n{o.text}" for o in wrong[:8])
    return f"{len(wrong)} faults\n{shown}" if wrong else ""
