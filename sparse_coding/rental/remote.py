"""One rented machine over ssh and rsync: commands, files out, verified results back.

The other side belongs to a stranger: nothing of it is executed here, links and devices are not
taken, its host key is kept per instance, and one that changed ends the connection for good. What
comes back counts only once every file matches the sums that were taken there; the last such state
is kept whole beside the next one, and from it a shard goes on elsewhere when its machine is lost.
"""

import contextlib
import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import BinaryIO

from sparse_coding.config import require
from sparse_coding.files import require_private, sha256, write_atomic
from sparse_coding.rental.records import RentalError, printable
from sparse_coding.rental.remote_job import SUMS

USER = "root"  # in vast.ai's containers
REMOTE_DIR = "sparse_coding"  # below the login directory; never that itself, which ssh guards
JOB = f"cd {REMOTE_DIR} && sh sparse_coding/rental/remote.sh"
REPULLS = 3  # of files whose sum is wrong, before the machine counts as broken
# socket, protocol, partial, vanished, timeout, ssh: what may pass by
RSYNC_RETRY = {10, 12, 23, 24, 30, 255}
RSYNC_TRIES, PAUSE = 4, 2.0  # seconds before the second try, doubled before each further one
TAIL = 400  # characters of stderr in messages
MOST_SAID = 2**22  # bytes that a command there may say: answers are a few kB
ANSWERS = {  # of remote_job.py there: it may be another program by now
    "check": {"python": str, "gpu": str, "free_gb": (int, float), "missing": dict,
              "problems": list},
    "status": {"running": bool, "exit": (int, NoneType), "line": str, "tail": str},
    "snapshot": {"state": str}, "install": {}, "submit": {},
}  # fmt: skip
SUM_LINE = re.compile(r"([0-9a-f]{64})  ([^\0]+)")
MOST_SUMS = 50e6  # bytes of SHA256SUMS: of half a million files


class Stopped(Exception):
    """By a signal."""


class RemoteError(RentalError):
    """A command or transfer that failed.

    kind: unreachable, denied (our key), host_key (changed), failed, cut (a transfer), disk (full
    there)
    """

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclass
class Remote:
    """An instance that runs.

    folder: of the run, for known_hosts and the ssh_config; endpoints: (host, port), tried in turn
    stop: when set, whatever runs is ended, and Stopped raised; scale: times the waits between tries
    up, down: bytes that rsync moved, from here: vast.ai bills them
    """

    instance: int
    endpoints: tuple[tuple[str, int], ...]
    folder: Path
    key: Path
    stop: threading.Event
    scale: float = 1.0
    endpoint: int = 0
    up: int = 0
    down: int = 0

    @property
    def alias(self) -> str:
        """Name of the machine in its ssh_config."""
        return f"vast-{self.instance}"

    @property
    def config(self) -> Path:
        """Where its ssh_config is."""
        return self.folder / f"ssh_config-{self.instance}"

    def write_config(self) -> None:
        """The ssh_config of the instance. HostKeyAlias: its ports and proxies serve others later,
        so their keys are nobody's; that of the instance must not change."""
        host, port = self.endpoints[self.endpoint % len(self.endpoints)]
        lines = {
            "HostName": host, "Port": port, "User": USER, "IdentityFile": f'"{self.key}"',
            "IdentitiesOnly": "yes", "BatchMode": "yes",
            "ConnectTimeout": max(2, round(10 * self.scale)),
            "ConnectionAttempts": 1, "ServerAliveInterval": 15, "ServerAliveCountMax": 3,
            "StrictHostKeyChecking": "accept-new", "HostKeyAlias": self.alias,
            "UserKnownHostsFile": f'"{self.folder / "known_hosts"}"', "ForwardAgent": "no",
            "LogLevel": "ERROR",
        }  # fmt: skip
        text = f"Host {self.alias}\n" + "".join(f"  {k} {v}\n" for k, v in lines.items())
        write_atomic(self.config, text)

    def other_endpoint(self) -> None:
        """The next connection goes the other way: directly, or through vast.ai's proxy."""
        self.endpoint += 1
        self.write_config()

    def ssh_command(self, *command: str) -> list[str]:
        """The ssh command line that runs a command there; without one, a shell."""
        return ["ssh", "-F", str(self.config), self.alias, *command]

    def run(self, command: str, *, stdin: bytes = b"", timeout: float = 60.0) -> str:
        """Standard output of a command, run by the shell there in the login directory. Raises
        RemoteError if it can't be reached, or the command fails or takes longer than timeout."""
        code, out, err = self._finish(self.ssh_command(command), stdin, timeout)
        if code == 0:
            return out
        raise RemoteError(_ssh_kind(code, err), _last(err) or _last(out) or f"exit {code}")

    def ask(self, verb: str, *, stdin: bytes = b"", timeout: float = 120.0) -> dict:
        """The answer of remote_job.py there, with fields as in ANSWERS. Raises RemoteError as run
        does, and if it is another answer."""
        text = self.run(f"{JOB} {verb}", stdin=stdin, timeout=timeout)
        try:
            answer = json.loads(text)
            kinds = ANSWERS[verb.split()[0]]
            good = all(_is_kind(answer[name], kind) for name, kind in kinds.items())
        except (KeyError, RecursionError, TypeError, ValueError):
            good = False
        if not good:
            raise RemoteError("failed", f"no answer to {verb}, but {_last(text)}")
        return answer

    def push(self, root: Path, files: Iterable[str]) -> None:
        """Copies files, named relative to root, and removes those that root no longer has."""
        names = os.fsencode("\0".join(files))
        options = ["--relative", "--from0", "--files-from=-", "--delete-missing-args", "--perms",
                   "--links"]  # fmt: skip
        self._rsync([*options, f"{root}/", f"{self.alias}:{REMOTE_DIR}/"], stdin=names)

    def push_folder(self, folder: Path, to: str) -> None:
        """Copies what is in a folder of ours into one there, but over nothing newer."""
        self.run(f"mkdir -p {shlex.quote(to)}")
        self._rsync(["--update", f"{folder}/", f"{self.alias}:{to}/"])

    def pull_folder(self, source: str, folder: Path, *, known: Path | None = None) -> None:
        """Makes a folder of ours the copy of one there.

        known: an earlier copy: what is in it unchanged is linked, not sent again
        """
        folder.mkdir(parents=True, exist_ok=True)
        options = ["--delete", "--partial-dir=.rsync-partial", "--no-links", "--no-devices",
                   "--no-specials"]  # fmt: skip
        if known is not None and known.exists():
            options.append(f"--link-dest={known.resolve()}")
        self._rsync([*options, f"{self.alias}:{source}/", f"{folder}/"], into=folder)

    def _rsync(self, arguments: list[str], *, stdin: bytes = b"", into: Path | None = None) -> None:
        """Tries again after cuts, going on where it was.

        into: of ours, where files come in
        """
        shell = shlex.join(["ssh", "-F", str(self.config)])
        command = ["rsync", "-rt", "--timeout=60", "--stats", "-e", shell, *arguments]
        for attempt in range(RSYNC_TRIES):
            code, out, err = self._finish(command, stdin, timeout=None)
            self.up += _bytes(out, "sent")
            self.down += _bytes(out, "received")
            if code == 0:
                return
            _check_disk(code, err, into)
            if code not in RSYNC_RETRY or _ssh_kind(code, err) in ("denied", "host_key"):
                break
            self.stop.wait(PAUSE * 2**attempt * self.scale)
            if _ssh_kind(code, err) == "unreachable":
                self.other_endpoint()
        kind = _ssh_kind(code, err)
        raise RemoteError("cut" if kind == "failed" else kind, f"rsync {code}: {_last(err)}")

    def _finish(
        self, command: list[str], stdin: bytes, timeout: float | None
    ) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) of a process of ours, which ends when `stop` is set."""
        end = time.monotonic() + (timeout or float("inf"))
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is ours to act on, not ssh's
        ) as process:  # fmt: skip
            talk = _Talk(process, stdin)
            while not (over := talk.over(0.2)) or talk.too_long:
                if talk.too_long or self.stop.is_set() or time.monotonic() > end:
                    os.killpg(process.pid, signal.SIGKILL)
                    break
            code = process.wait()
        if talk.too_long:
            raise RemoteError("failed", f"{command[0]} is told more than {MOST_SAID >> 20} MB")
        if self.stop.is_set():  # whatever came of it: else what is quick would never heed it
            raise Stopped
        if over:
            return code, talk.out.decode(errors="replace"), talk.err.decode(errors="replace")
        raise RemoteError("unreachable", f"{command[0]} did not end in {timeout:.0f} s")


def _is_kind(value: object, kind: type | tuple) -> bool:
    """An integer must be one that can become a float."""
    return isinstance(value, kind) and not (type(value) is int and abs(value) >= 2**63)


class _Talk:
    """With a process: what it says is kept up to MOST_SAID, beyond which it is not listened to."""

    def __init__(self, process: subprocess.Popen, stdin: bytes):
        self.out, self.err = bytearray(), bytearray()
        work = [(_hear, process.stdout, self.out), (_hear, process.stderr, self.err)]
        work.append((_tell, process.stdin, stdin))
        self.threads = [threading.Thread(target=w[0], args=w[1:], daemon=True) for w in work]
        for thread in self.threads:
            thread.start()

    @property
    def too_long(self) -> bool:
        """Whether it says more than anybody has to say."""
        return len(self.out) > MOST_SAID or len(self.err) > MOST_SAID

    def over(self, seconds: float) -> bool:
        """Whether it has ended, in so many seconds at most."""
        end = time.monotonic() + seconds
        for thread in self.threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self.threads)


def _hear(pipe: BinaryIO, said: bytearray) -> None:
    while len(said) <= MOST_SAID and (data := pipe.read1(2**16)):
        said += data


def _tell(pipe: BinaryIO, text: bytes) -> None:
    with contextlib.suppress(BrokenPipeError), pipe:
        pipe.write(text)


def _bytes(out: str, name: str) -> int:
    """Sent or received, of rsync's --stats."""
    match = re.search(rf"Total bytes {name}: ([\d,.]+)", out)
    return int(re.sub(r"\D", "", match[1])) if match else 0


def _ssh_kind(code: int, err: str) -> str:
    """What an exit code of ssh, or of rsync over it, means."""
    if "HOST IDENTIFICATION HAS CHANGED" in err or "Host key verification failed" in err:
        return "host_key"
    if "Permission denied (publickey" in err or "Too many authentication failures" in err:
        return "denied"
    return "unreachable" if code in (255, 30) else "failed"


def _check_disk(code: int, err: str, into: Path | None) -> None:
    """Raises OSError (ENOSPC) where our disk is full, RemoteError where theirs is."""
    if code != 11 and "No space left on device" not in err:
        return
    if into is not None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(into))
    raise RemoteError("disk", f"the instance's disk is full: {_last(err)}")


def _last(text: str) -> str:
    """The last lines, as one."""
    return printable(text[-TAIL:], TAIL)


class Results:
    """The results of one shard as far as they have been fetched.

    folder: of the run; `verified` below it is the last whole state
    """

    def __init__(self, folder: Path, shard: int):
        self.verified = folder / f"results-{shard}"
        self.incoming = folder / f"incoming-{shard}"
        self.old = folder / f"old-{shard}"
        self.state = ""  # of `verified`: sha256 of its sums
        if self.old.exists() and not self.verified.exists():  # killed between two renames
            self.old.rename(self.verified)
        if (self.verified / SUMS).exists():
            self.state = sha256(self.verified / SUMS)

    def pull(self, remote: Remote) -> bool:
        """Fetches the present state and verifies it; whether it is another one than before. Raises
        RemoteError if it does not become what its sums say, OSError if our disk is full."""
        state = remote.ask("snapshot", timeout=600)["state"]
        if state == self.state:
            return False
        for _ in range(REPULLS):
            remote.pull_folder(".sae/snapshot", self.incoming, known=self.verified)
            wrong = wrong_files(self.incoming)
            if not wrong and sha256(self.incoming / SUMS) == state:
                self._accept(state)
                return True
            for path in filter(os.path.isfile, [*wrong, self.incoming / SUMS]):
                path.unlink()
        names = printable(", ".join(path.name for path in wrong[:3]))
        raise RemoteError("cut", f"fetched {REPULLS} times, and still not what it was: {names}")

    def _accept(self, state: str) -> None:
        shutil.rmtree(self.old, ignore_errors=True)
        if self.verified.exists():
            self.verified.rename(self.old)
        self.incoming.rename(self.verified)
        shutil.rmtree(self.old, ignore_errors=True)
        self.state = state


def wrong_files(folder: Path) -> list[Path]:
    """Files that are missing or not what SHA256SUMS says, and files that it does not name; that
    file itself where it is none, or names what is not below the folder."""
    sums = folder / SUMS
    if not sums.is_file() or sums.stat().st_size > MOST_SUMS:
        return [sums]
    lines = sums.read_bytes().decode(errors="replace").split("\n")[:-1]
    named = {}
    for match in (SUM_LINE.fullmatch(line) for line in lines):
        if match is None or {"", ".", ".."} & set(match[2].split("/")):
            return [sums]
        named[folder / match[2]] = match[1]
    present = {path for path in folder.rglob("*") if path.is_file()} - {sums}
    # not Path.is_file, which raises for a name that is too long
    wrong = [p for p, digest in named.items() if not os.path.isfile(p) or sha256(p) != digest]
    return wrong + sorted(present - named.keys())


def make_key(path: Path) -> None:
    """Makes the project's ssh key when there is none. Raises UserError if others may read it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "sparse_coding", "-f"]
        subprocess.run([*command, str(path)], check=True, stdin=subprocess.DEVNULL)
    require_private(path)
    public = path.with_name(path.name + ".pub")
    require(public.exists(), f"{public} is missing: remove {path}, a new pair is made")
