"""What the lab's own tests share: the SDK, an ssh client, the hunt for left-over processes."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from vast_instance import ssh_user, wait_until


def need(lacking: str) -> None:
    """Skips for want of something, but never in CI, where everything must be there."""
    if lacking and os.environ.get("CI"):
        pytest.fail(f"in CI nothing may be skipped: {lacking}")
    if lacking:
        pytest.skip(lacking)


def sdk(lab, retry: int = 1, key: str | None = None):
    """The real client, pointed at the lab."""
    try:
        from vastai import VastAI
    except ImportError:
        need("the vastai package is not installed")
    return VastAI(api_key=key or lab.api_key, server_url=lab.url, retry=retry)


def buy(vast, **request) -> int:
    """Buys the first offer that is left and returns the instance's id."""
    offer = vast.search_offers({}, order="dph_total")[0]["id"]
    arguments = {"image": "lab/image", "disk": 10, "ssh": True, "direct": True, **request}
    return vast.create_instance(offer, **arguments)["new_contract"]


def until_running(vast, number: int) -> dict:
    """The instance's row, once it runs."""
    return until_status(vast, number, "running")


def until_status(vast, number: int, status: str) -> dict:
    def row():
        found = vast.show_instance(number)
        return found if found and found["actual_status"] == status else None

    return wait_until(row)


class SshClient:
    """ssh and rsync as a careful controller calls them."""

    def __init__(self, folder: Path):
        self.folder, self.key = folder, folder / "id"
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.key]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        self.public = self.key.with_suffix(".pub").read_text()

    def options(self, port: int, alias: str) -> list[str]:
        settings = {
            "IdentitiesOnly": "yes", "BatchMode": "yes", "ConnectTimeout": "2", "Port": str(port),
            "StrictHostKeyChecking": "accept-new", "HostKeyAlias": alias, "User": ssh_user(),
            "UserKnownHostsFile": str(self.folder / "known_hosts"), "LogLevel": "ERROR",
        }  # fmt: skip
        pairs = [word for k, v in settings.items() for word in ("-o", f"{k}={v}")]
        return ["-F", "none", "-i", str(self.key), *pairs]

    def run(self, port: int, command: str, *, alias: str = "lab", **arguments):
        """A command on the instance; the result as of subprocess.run, with text."""
        words = ["ssh", *self.options(port, alias), "127.0.0.1", command]
        return subprocess.run(words, capture_output=True, text=True, timeout=30, **arguments)

    def rsync(self, port: int, *words, alias: str = "lab"):
        """rsync; the instance's side is written lab:path."""
        shell = " ".join(["ssh", *self.options(port, alias)])
        names = [str(w).replace("lab:", "127.0.0.1:") for w in words]
        command = ["rsync", "-a", "-e", shell, *names]
        return subprocess.run(command, capture_output=True, text=True, timeout=30)


def processes_naming(text: str) -> list[str]:
    """Command lines and environments on this machine in which the text occurs."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        if int(folder.name) == os.getpid():
            continue
        try:
            data = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
        except OSError:
            continue
        if text.encode() in data:
            found.append(data.replace(b"\0", b" ").decode(errors="replace")[:200])
    return found


def mounts_below(folder: Path) -> list[str]:
    return [line for line in Path("/proc/self/mounts").read_text().splitlines()
            if f" {folder}/" in line]  # fmt: skip


def left_over(root: Path) -> list[str]:
    """Everything of a lab that should be gone with it."""
    folder = [str(root)] if root.exists() else []
    return folder + mounts_below(root) + processes_naming(str(root))


def have(program: str) -> str:
    """Why to skip for want of a program; empty if it is there."""
    return "" if shutil.which(program) else f"{program} is not installed"
