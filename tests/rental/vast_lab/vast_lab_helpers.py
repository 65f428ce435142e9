"""What the lab's own tests share: the SDK, an ssh client, the hunt for left-over processes."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from vast_instance import no_small_disks, ssh_user, wait_until
from vast_server import FakeVast


def need(lacking: str) -> None:
    """Skips for want of something, but never in CI, where everything must be there."""
    if lacking and os.environ.get("CI"):
        pytest.fail(f"in CI nothing may be skipped: {lacking}")
    if lacking:
        pytest.skip(lacking, allow_module_level=True)


try:
    import requests
    from requests import HTTPError
    from requests.exceptions import ChunkedEncodingError, JSONDecodeError, ReadTimeout
    from requests.exceptions import ConnectionError as Lost
    from vastai import VastAI
except ImportError as error:  # then every module that imports this one is skipped
    need(f"not installed: {error.name} (pip install vastai)")


def sdk(lab, retry: int = 1, key: str | None = None) -> VastAI:
    """The real client, pointed at the lab."""
    return VastAI(api_key=key or lab.api_key, server_url=lab.url, retry=retry)


def buy(vast: VastAI, **request) -> int:
    """Buys the first offer that is left and returns the instance's id."""
    offer = vast.search_offers({}, order="dph_total")[0]["id"]
    arguments = {"image": "lab/image", "disk": 10, "ssh": True, "direct": True, **request}
    return vast.create_instance(offer, **arguments)["new_contract"]


def until_running(vast: VastAI, number: int) -> dict:
    """The instance's row, once it runs."""
    return until_status(vast, number, "running")


def until_status(vast: VastAI, number: int, status: str) -> dict:
    def row():
        found = vast.show_instance(number)
        return found if found and found["actual_status"] == status else None

    return wait_until(row, every_s=0.03)


def refused(call, *args, **kwargs) -> tuple[int, str]:
    """(status, error) of a call that the service refuses."""
    with pytest.raises(HTTPError) as caught:
        call(*args, **kwargs)
    answer = caught.value.response
    is_json = answer.headers["Content-Type"] == "application/json"
    return answer.status_code, answer.json()["error"] if is_json else answer.text


def call(lab, method: str, path: str, *, key: str | None = None) -> requests.Response:
    """A bare request, for what the SDK does not send."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return requests.request(method, lab.url + path, headers=headers, timeout=10)


class SshClient:
    """ssh and rsync as a careful controller calls them."""

    def __init__(self, folder: Path):
        folder.mkdir(exist_ok=True)
        self.folder, self.key = folder, folder / "id"
        self.patience_s = 5  # for a connection, banner included
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.key]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        self.public = self.key.with_suffix(".pub").read_text()

    def options(self, port: int) -> list[str]:
        settings = {
            "IdentitiesOnly": "yes", "BatchMode": "yes", "Port": str(port), "User": ssh_user(),
            "ConnectTimeout": str(self.patience_s),
            "StrictHostKeyChecking": "accept-new", "HostKeyAlias": f"lab-{port}",
            "UserKnownHostsFile": str(self.folder / "known_hosts"), "LogLevel": "ERROR",
        }  # fmt: skip
        pairs = [word for k, v in settings.items() for word in ("-o", f"{k}={v}")]
        return ["-F", "none", "-i", str(self.key), *pairs]

    def run(self, port: int, command: str, **arguments):
        """A command on the instance; the result as of subprocess.run, with text."""
        words = ["ssh", *self.options(port), "127.0.0.1", command]
        return subprocess.run(words, capture_output=True, text=True, timeout=30, **arguments)

    def rsync(self, port: int, *words):
        """rsync; the instance's side is written lab:path."""
        shell = " ".join(["ssh", *self.options(port)])
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


@contextlib.contextmanager
def clean_lab(client: SshClient, **config) -> Iterator[FakeVast]:
    """A lab with two offers and the client's key, of which nothing may be left afterwards."""
    with FakeVast(offers=[{}, {}], ssh_keys=[client.public], **config) as lab:
        yield lab
    assert left_over(lab.root) == []


def ready(vast: VastAI, **request) -> tuple[int, int]:
    """(instance, ssh port) of a new instance that runs."""
    number = buy(vast, **request)
    return number, port_of(until_running(vast, number))


def port_of(row: dict) -> int:
    """The direct ssh port of a running instance's row."""
    return int(row["ports"]["22/tcp"][0]["HostPort"])


def skip_without_small_disks() -> None:
    """Also in CI, which may not be root."""
    if reason := no_small_disks():
        pytest.skip(reason)


def have(program: str) -> str:
    """Why to skip for want of a program; empty if it is there."""
    return "" if shutil.which(program) else f"{program} is not installed"


__all__ = [
    "ChunkedEncodingError", "HTTPError", "JSONDecodeError", "Lost", "ReadTimeout", "SshClient",
    "buy", "call", "clean_lab", "have", "left_over", "need", "port_of", "processes_naming", "ready",
    "refused", "sdk", "skip_without_small_disks", "until_running", "until_status",
]  # fmt: skip
