"""The sandbox of one lab instance: a directory, an ssh port with a real sshd, and its processes.

The machine that vast.ai would rent out is played by a directory: HOME below it, an sshd of its own
with its own host key, and, where root may make namespaces, its own process numbers, /workspace and
/dev/shm. What is started in it (through ssh or by the onstart script) cannot outlive it.
"""

import contextlib
import getpass
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SYSTEM_PLACES = ("/usr/sbin", "/usr/local/sbin", "/usr/lib/openssh", "/usr/libexec/openssh",
                 "/usr/libexec", "/usr/lib/ssh")  # fmt: skip
FAKETIME_PLACES = ("/usr/lib/*/faketime/libfaketime.so.1", "/usr/local/lib/faketime/*.so.1",
                   "/usr/lib/faketime/libfaketime.so.1")  # fmt: skip
OWN = ("/workspace", "/dev/shm")  # each instance has its own, in namespaces
START_S = 10  # a supervisor that takes longer to come up is a broken lab

# The key exchange is a quick one: a login in half the time.
SSHD_CONFIG = """\
HostKey {dir}/etc/host_key
KexAlgorithms curve25519-sha256,ecdh-sha2-nistp256
AuthorizedKeysFile {dir}/etc/authorized_keys
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
UsePAM no
PidFile {dir}/sshd.pid
PermitRootLogin yes
PermitUserRC no
PrintMotd no
PrintLastLog no
Subsystem sftp {sftp}
ForceCommand {dir}/etc/enter
SetEnv {setenv}
"""

# What an ssh session sees: HOME, a minimal PATH, none of the container's variables.
ENTER = """\
#!/bin/bash
cd {home} || exit 1
keep=()
for name in SSH_CONNECTION SSH_CLIENT SSH_AUTH_SOCK SSH_TTY TERM; do
  [ -n "${{!name}}" ] && keep+=("$name=${{!name}}")
done
if [ -z "$SSH_ORIGINAL_COMMAND" ]; then set -- -l; else set -- -c "$SSH_ORIGINAL_COMMAND"; fi
exec env -i "${{keep[@]}}" {env} /bin/bash "$@"
"""

DATE = """\
#!/bin/bash
# A clock that is {skew} s wrong, for scripts that ask date what time it is.
for word in "$@"; do
  case "$word" in -d*|-r*|-f*|-s*|--date*|--ref*|--file*|--set*) exec /bin/date "$@" ;; esac
done
exec /bin/date -d "@$(( $(/bin/date +%s) + ({skew}) ))" "$@"
"""


@cache
def missing_tools() -> str:
    """What the sandbox needs and this machine lacks, as a reason to skip; empty if nothing."""
    lacking = [name for name in ("sshd", "ssh", "ssh-keygen", "rsync") if not tool(name)]
    return f"not installed: {', '.join(lacking)} (openssh-server, rsync)" if lacking else ""


@cache
def tool(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *SYSTEM_PLACES]))


@cache
def can_use_namespaces() -> bool:
    """Whether root and the kernel let us make PID and mount namespaces with a fresh /proc."""
    command = ["unshare", "-m", "-p", "-f", "--mount-proc", "true"]
    return os.geteuid() == 0 and bool(tool("unshare")) and not subprocess.call(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )  # fmt: skip


def no_small_disks() -> str:
    """Why a small disk (a tmpfs) cannot be mounted here; empty if it can."""
    if os.geteuid() != 0:
        return "small disks need root, to mount a tmpfs"
    return "" if can_use_namespaces() else "this machine forbids mount"


def ssh_user() -> str:
    """The only user whom an unprivileged sshd can let in; root on the real service."""
    return getpass.getuser()


@cache
def faketime_library() -> str | None:
    """Where libfaketime is, which also skews the clock of programs that do not ask `date`."""
    found = [str(p) for places in FAKETIME_PLACES for p in Path("/").glob(places.lstrip("/"))]
    return found[0] if found else None


class Sandbox:
    """One instance's files and processes. Started and stopped many times, removed once."""

    def __init__(self, lab: Path, number: int, *, namespaces: bool, disk_mb: float | None = None,
                 clock_skew_s: float = 0, own: tuple[str, ...] = OWN):  # fmt: skip
        self.dir, self.number, self.namespaces = lab / f"i{number}", number, namespaces
        self.home, self.own, self.disk_mb = self.dir / "home", own, disk_mb
        self.port, self.process, self.orders = 0, None, None
        self.skew = clock_skew_s
        for name in ("home", "etc", "bin", "tmp", *(p.strip("/").replace("/", "-") for p in own)):
            (self.dir / name).mkdir(parents=True)
        if disk_mb:
            size = f"size={int(disk_mb * 1024)}k,mode=755"
            subprocess.run(["mount", "-t", "tmpfs", "-o", size, "lab", self.home], check=True)
        self.marks = {"LAB_INSTANCE": str(number), "LAB_ROOT": str(lab), "PATH": PATH}
        self.base = self.marks | {
            "HOME": str(self.home), "USER": ssh_user(), "LOGNAME": ssh_user(), "SHELL": "/bin/bash",
            "PATH": f"{self.dir}/bin:{lab}/bin:{PATH}", "SHLVL": "1", "LANG": "C.UTF-8",
            "TMPDIR": f"{self.dir}/tmp", "TMUX_TMPDIR": f"{self.dir}/tmp",  # not one server for all
        }  # fmt: skip
        self._skew_the_clock()
        self._write_sshd_files()

    def _skew_the_clock(self) -> None:
        if not self.skew:
            return
        script(self.dir / "bin/date", DATE.format(skew=round(self.skew)))
        if library := faketime_library():
            self.base |= {"LD_PRELOAD": library, "FAKETIME": f"{self.skew:+}s"}

    def _write_sshd_files(self) -> None:
        etc = self.dir / "etc"
        self.new_host_key()
        (etc / "authorized_keys").touch(0o600)
        # SHLVL=1 and HOME keep bash from running the user's own .bashrc, as it does below sshd
        setenv = {"SHLVL": "1", "HOME": str(self.home), **self.marks}
        text = SSHD_CONFIG.format(
            dir=self.dir, sftp=tool("sftp-server"), setenv=" ".join(f"{k}={v}" for k, v in
            setenv.items()))  # fmt: skip
        (etc / "sshd_config").write_text(text)
        env = " ".join(shlex.quote(f"{k}={v}") for k, v in self.base.items())
        script(etc / "enter", ENTER.format(home=shlex.quote(str(self.home)), env=env))

    def new_host_key(self, name: str = "host_key") -> None:
        """Makes a host key; connections from now on see it."""
        fresh = self.dir / "etc/fresh"
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", fresh]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        fresh.rename(self.dir / "etc" / name)
        fresh.with_suffix(".pub").rename(self.dir / "etc" / f"{name}.pub")

    def authorize(self, public_keys: list[str]) -> None:
        """Sets the keys that may log in."""
        text = "".join(key.strip() + "\n" for key in public_keys)
        (self.dir / "etc/authorized_keys").write_text(text)

    def start(self, onstart: str | None, env: dict[str, str], *, ssh: str = "ok",
              cuts: list[int] = (), host_key_after: int | None = None) -> int:  # fmt: skip
        """Starts the container; returns its ssh port, which is new only if the old one is taken."""
        if "/dev/shm" in self.own:  # memory does not survive a stop
            shutil.rmtree(self.dir / "dev-shm")
            (self.dir / "dev-shm").mkdir(mode=0o777)
        if onstart:
            (self.home / "onstart.sh").write_text(onstart)
        if host_key_after is not None:
            self.new_host_key("host_key.next")
        own = {p: str(self.dir / p.strip("/").replace("/", "-")) for p in self.own}
        spec = {
            "dir": str(self.dir), "home": str(self.home), "namespaces": self.namespaces, "own": own,
            "sshd": tool("sshd"), "marks": self.marks, "env": self.base | env, "port": self.port,
            "onstart": bool(onstart), "ssh": ssh, "cuts": list(cuts),
            "host_key_after": host_key_after,
        }  # fmt: skip
        (self.dir / "spec.json").write_text(json.dumps(spec))
        with contextlib.suppress(PermissionError):  # where sshd, as root, wants its chroot
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        self.orders, theirs = socket.socketpair()
        self.orders.settimeout(START_S)
        with theirs, open(self.dir / "daemon.log", "a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-EsS", HERE / "vast_supervisor.py", self.dir / "spec.json"],
                stdin=theirs, stdout=log, stderr=log, env=self.marks, start_new_session=True,
            )  # fmt: skip
        self.port = self._answer()
        return self.port

    def _answer(self) -> int:
        line = self.orders.recv(4096)
        if not line:
            raise RuntimeError(f"supervisor died: {(self.dir / 'daemon.log').read_text()}")
        return json.loads(line)["port"]

    def order(self, **what) -> int:
        """Orders of the supervisor: ssh="silent", cut=True, cuts=[bytes, ...]."""
        self.orders.sendall(json.dumps(what).encode() + b"\n")
        self.port = self._answer()
        return self.port

    @property
    def running(self) -> bool:
        return self.process is not None

    def stop(self) -> None:
        """Ends every process of the instance; files stay."""
        if not self.process:
            return
        self.orders.close()
        try:
            self.process.wait(START_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def remove(self, *, keep_files: bool = False) -> None:
        """Ends the instance; mounts go, and files unless they are to be looked at."""
        self.stop()
        if self.disk_mb:
            subprocess.run(["umount", "-l", self.home], check=False)
        if not keep_files:
            shutil.rmtree(self.dir, ignore_errors=True)

    def traffic(self) -> tuple[int, int]:
        """Bytes (in, out) of all ssh connections so far."""
        if self.process:
            self.order(measure=True)  # writes of those that are open
        pairs = [(0, 0)]
        for name in ("traffic", "traffic.open") if self.process else ("traffic",):
            with contextlib.suppress(FileNotFoundError), open(self.dir / name) as file:
                pairs += [tuple(map(int, line.split())) for line in file]
        return sum(p[0] for p in pairs), sum(p[1] for p in pairs)

    def logs(self, daemon: bool = False) -> str:
        """The container's standard output, or what the host's daemon has to say."""
        path = self.dir / ("daemon.log" if daemon else "container.log")
        return path.read_text(errors="replace") if path.exists() else ""


def script(path: Path, text: str) -> Path:
    """Writes an executable file."""
    path.write_text(text)
    path.chmod(0o755)
    return path


def wait_until(condition: Callable[[], object], timeout_s: float = 10, every_s: float = 0.01):
    """Returns the condition's first true value, or raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s} s in vain")
        time.sleep(every_s)
    return value
