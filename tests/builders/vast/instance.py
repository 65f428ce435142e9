"""The sandbox of one lab instance: a directory, an ssh port with a real sshd, and its processes.

The machine that vast.ai would rent out is played by a directory: HOME below it, an sshd of its own
with its own host key. What is started in it (through ssh or by the onstart script) cannot outlive
it: supervisor.py sees to that.
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
from functools import cache
from pathlib import Path

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SYSTEM_PLACES = ("/usr/sbin", "/usr/local/sbin", "/usr/lib/openssh", "/usr/libexec")
START_S = 60  # a supervisor that takes longer to come up is a broken lab

# The key exchange is a quick one: a login in half the time. SHLVL and HOME keep the bash that sshd
# starts from running the developer's own .bashrc.
SSHD_CONFIG = """\
HostKey {dir}/etc/host_key
KexAlgorithms curve25519-sha256,ecdh-sha2-nistp256
AuthorizedKeysFile {dir}/etc/authorized_keys
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
UsePAM no
PidFile none
PermitRootLogin yes
PermitUserRC no
PrintMotd no
PrintLastLog no
ForceCommand {dir}/etc/enter
SetEnv SHLVL=1 HOME={dir}/home
"""

# What an ssh session sees: HOME, a minimal PATH, none of the container's variables.
ENTER = """\
#!/bin/bash
cd {home} || exit 1
if [ -z "$SSH_ORIGINAL_COMMAND" ]; then set -- -l; else set -- -c "$SSH_ORIGINAL_COMMAND"; fi
exec env -i {env} /bin/bash "$@"
"""

DATE = """\
#!/bin/bash
# A clock that is {skew} s wrong, for scripts that ask date what time it is.
exec /bin/date -d "@$(( $(/bin/date +%s) + ({skew}) ))" "$@"
"""


@cache
def missing_tools() -> str:
    """What the sandbox needs and this machine lacks, as a reason to skip; empty if nothing."""
    lacking = [name for name in ("sshd", "ssh", "ssh-keygen", "rsync") if not tool(name)]
    return f"not installed: {', '.join(lacking)} (openssh-server, rsync)" if lacking else ""


@cache
def tool(name: str) -> str | None:
    """Where a program is; sshd is often not on the PATH."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *SYSTEM_PLACES]))


def ssh_user() -> str:
    """The only user whom an unprivileged sshd can let in; root on the real service."""
    return getpass.getuser()


class Sandbox:
    """One instance's files and processes, from its start to its end."""

    def __init__(self, folder: Path, *, disk_mb: float | None, clock_skew_s: float):
        self.dir, self.home, self.disk_mb = folder, folder / "home", disk_mb
        self.port, self.process, self.orders = 0, None, None
        self.bytes = (0, 0)
        for name in ("home", "etc", "bin", "tmp"):
            (folder / name).mkdir(parents=True)
        if disk_mb:
            size = f"size={int(disk_mb * 1024)}k,mode=755"
            subprocess.run(["mount", "-t", "tmpfs", "-o", size, "lab", self.home], check=True)
        self.env = {
            "HOME": str(self.home), "USER": ssh_user(), "LOGNAME": ssh_user(), "SHELL": "/bin/bash",
            "PATH": f"{folder}/bin:{folder.parent}/bin:{PATH}", "LANG": "C.UTF-8",
            "TMPDIR": f"{folder}/tmp",
        }  # fmt: skip
        if clock_skew_s:
            script(folder / "bin/date", DATE.format(skew=round(clock_skew_s)))
        self.new_host_key("host_key")
        (folder / "etc/sshd_config").write_text(SSHD_CONFIG.format(dir=folder))
        env = " ".join(shlex.quote(f"{k}={v}") for k, v in self.env.items())
        script(folder / "etc/enter", ENTER.format(home=shlex.quote(str(self.home)), env=env))

    def new_host_key(self, name: str) -> None:
        """Makes a host key in etc/."""
        path = self.dir / "etc" / name
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", path]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)

    def authorize(self, public_keys: list[str]) -> None:
        """Sets the keys that may log in."""
        text = "".join(key.strip() + "\n" for key in public_keys)
        (self.dir / "etc/authorized_keys").write_text(text)

    def start(self, onstart: str, env: dict[str, str], *, ssh: str, cuts: tuple[int, ...],
              host_key_after: int | None) -> None:  # fmt: skip
        """Starts the container: its ssh, in the given mode, and the onstart script."""
        (self.home / "onstart.sh").write_text(onstart)
        if host_key_after is not None:
            self.new_host_key("host_key.next")
        spec = {
            "dir": str(self.dir), "home": str(self.home), "sshd": tool("sshd"), "ssh": ssh,
            "env": self.env | env, "cuts": list(cuts), "host_key_after": host_key_after,
        }  # fmt: skip
        (self.dir / "spec.json").write_text(json.dumps(spec))
        with contextlib.suppress(PermissionError):  # where sshd, as root, wants its chroot
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        self.orders, theirs = socket.socketpair()
        self.orders.settimeout(START_S)
        with theirs, open(self.dir / "daemon.log", "a") as log:
            program = Path(__file__).with_name("supervisor.py")
            self.process = subprocess.Popen(
                [sys.executable, "-EsS", program, self.dir / "spec.json"],
                stdin=theirs, stdout=log, stderr=log, env={"PATH": PATH}, start_new_session=True,
            )  # fmt: skip
        self._read_answer()

    def _read_answer(self) -> None:
        line = self.orders.recv(4096)
        if not line:
            raise RuntimeError(f"supervisor died: {(self.dir / 'daemon.log').read_text()}")
        answer = json.loads(line)
        self.port, self.bytes = answer["port"], tuple(answer["bytes"])

    def order(self, **what) -> None:
        """Orders of the supervisor: ssh="silent", port=0 (another one), cut=True."""
        self.orders.sendall(json.dumps(what).encode() + b"\n")
        self._read_answer()

    @property
    def running(self) -> bool:
        return self.process is not None

    def traffic(self) -> tuple[int, int]:
        """Bytes (in, out) of all ssh connections so far."""
        self.order()
        return self.bytes

    def stop(self) -> None:
        """Ends every process of the instance; files stay."""
        if self.process:
            self.orders.close()
            self.process.wait(START_S)
            self.process = None

    def unmount(self) -> None:
        if self.disk_mb:
            subprocess.run(["umount", "-l", self.home], check=False)
            self.disk_mb = None


def script(path: Path, text: str) -> Path:
    """Writes an executable file."""
    path.write_text(text)
    path.chmod(0o755)
    return path
