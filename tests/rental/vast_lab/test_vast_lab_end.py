"""The end of the lab's instances and of the lab: nothing survives, whoever dies first."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from vast_instance import can_use_namespaces, missing_tools, wait_until
from vast_lab_helpers import (
    SshClient,
    buy,
    clean_lab,
    have,
    left_over,
    need,
    processes_naming,
    ready,
    sdk,
    skip_without_small_disks,
    until_status,
)
from vast_server import lab_process

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _tools(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    need(missing_tools())


@pytest.fixture
def client(tmp_path):
    need(missing_tools())
    return SshClient(tmp_path / "client")


@pytest.fixture(params=["namespaces", "plain"])
def lab(request, client):
    """A lab as it is on a developer's machine as root, and as on one that forbids namespaces."""
    namespaces = request.param == "namespaces"
    if namespaces and not can_use_namespaces():
        pytest.skip("namespaces need root and a kernel that allows them")
    with clean_lab(client, namespaces=namespaces) as lab:
        yield lab


@pytest.fixture
def any_lab(client):
    """The lab in the best mode that there is."""
    with clean_lab(client) as lab:
        yield lab


# --- nothing survives ---

STUBBORN = """
setsid sleep 1001 &
(setsid nohup sleep 1002 >/dev/null 2>&1 &)
setsid env -i /bin/bash -c 'trap "" TERM HUP INT; while :; do /bin/sleep 1003; done' &
wait
"""


@pytest.mark.parametrize("how", ["destroy", "stop"])
def test_the_end_of_an_instance_is_the_end_of_all_its_processes(lab, client, how):
    check_that_all_ends(lab, client, how)


@pytest.mark.parametrize("how", ["outbid", "vanish", "exited"])
def test_so_is_every_other_end(any_lab, client, how):
    check_that_all_ends(any_lab, client, how)


def check_that_all_ends(lab, client, how: str) -> None:
    """Starts what can be started in the most stubborn ways, ends the instance, and looks."""
    vast = sdk(lab)
    number, port = ready(vast, onstart_cmd=STUBBORN)
    client.run(port, "setsid sleep 1004 >/dev/null 2>&1 < /dev/null & disown")
    words = ["ssh", *client.options(port), "127.0.0.1", "sleep 1005"]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as session:
        names = [f"sleep\x00100{n}" for n in range(1, 6)]
        wait_until(lambda: all(processes_naming(name) for name in names))
        if how == "destroy":
            vast.destroy_instance(number)
        else:
            lab.act(id=number, what=how)
        left = [p for name in names for p in processes_naming(name) if not p.startswith("ssh ")]
        assert left == []
        assert session.wait(5) == 255
    assert client.run(port, "true").returncode == 255


def test_an_instance_destroys_itself_through_the_api_in_spite_of_errors(lab, client):
    need(have("curl"))
    lab.fault(method="DELETE", path="/instances/", caller="instance", action="502", first=2)
    script_ = """
    echo "Authorization: Bearer $CONTAINER_API_KEY" > .header
    until curl -sf -X DELETE -H @.header "$VAST_URL/api/v0/instances/$CONTAINER_ID/"; do
      sleep 0.05
    done
    """
    buy(sdk(lab), onstart_cmd=script_)
    wait_until(lambda: lab.ledger()[0]["how"] == "by itself")
    assert lab.live() == []
    own = [entry for entry in lab.requests() if entry["caller"] == "instance"]
    wait_until(lambda: [entry["status"] for entry in own] == [502, 502, 200])


# --- quick, and without a trace ---


def test_an_instance_with_sshd_is_there_in_less_than_300_ms(any_lab, client):
    vast, times = sdk(any_lab), []
    for _ in range(3):
        began = time.monotonic()
        number, _ = ready(vast)
        times.append(time.monotonic() - began)
        vast.destroy_instance(number)
    assert min(times) < 0.3, times


OWNER = """
import os, sys
from vast_instance import wait_until
from vast_server import FakeVast
lab = FakeVast(offers=[{}], behaviour={"disk_mb": 1} if sys.argv[1] == "disk" else {})
lab.market.create(101, {"onstart": "setsid sleep 1006 & sleep 1007"})
wait_until(lambda: lab.instances()[0]["status"] == "running")
if sys.argv[1] == "fork" and not os.fork():
    import time
    time.sleep(5)  # holds every pipe of its parent open
    os._exit(0)
print(lab.root, flush=True)
if sys.argv[1] == "raise":
    with lab:
        raise ZeroDivisionError
sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["kill", "disk", "fork", "raise", "interrupt"])
def test_a_lab_leaves_nothing_when_its_process_dies(how):
    if how == "disk":
        skip_without_small_disks()
    owner = subprocess.Popen([sys.executable, "-c", OWNER, how], cwd=HERE, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL)  # fmt: skip
    root = Path(owner.stdout.readline().strip())
    assert root.name.startswith("vastlab-")
    if how == "interrupt":
        owner.send_signal(signal.SIGINT)
    elif how != "raise":
        owner.kill()
    owner.wait(10)
    owner.stdin.close()
    owner.stdout.close()
    wait_until(lambda: not left_over(root))


def test_a_lab_in_its_own_process_is_controlled_and_ends_with_its_block(client):
    config = {"offers": [{"id": 7, "dph_base": 0.1}], "ssh_keys": [client.public], "api_key": "k"}
    with lab_process(config) as lab:
        lab.add_offer(id=8)
        lab.behave(label="x", load_s=0.1)
        lab.fault(path="/users/", action="500", first=1)
        vast = sdk(lab)
        _, port = ready(vast, label="x")
        assert client.run(port, "echo hi").stdout == "hi\n"
        assert lab.live() == [1001]
        assert lab.ledger()[0]["offer"] == 7
        assert lab.requests()[0]["path"] == "/api/v0/bundles/"
        with pytest.raises(ValueError, match="no act_up"):
            lab.act_up()
        lab.act(id=1001, what="outbid")
        until_status(vast, 1001, "stopped")
    assert left_over(lab.root) == []


PROCESS_OWNER = """
import sys, urllib.request
from vast_instance import wait_until
from vast_server import lab_process
with lab_process({"offers": [{}]}) as lab:
    request = urllib.request.Request(
        f"{lab.url}/api/v0/asks/101/", b'{"image": "a/b", "onstart": "sleep 1008"}',
        {"Authorization": f"Bearer {lab.api_key}"}, method="PUT")
    urllib.request.urlopen(request).read()
    wait_until(lambda: lab.instances()[0]["status"] == "running")
    print(lab.root, lab.pid, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("victim", ["server", "parent"])
def test_a_lab_process_leaves_nothing_when_killed(victim):
    owner = subprocess.Popen([sys.executable, "-c", PROCESS_OWNER], cwd=HERE, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    root, pid = owner.stdout.readline().split()
    if victim == "parent":
        owner.kill()
    else:
        subprocess.run(["kill", "-KILL", pid], check=True)
    wait_until(lambda: not left_over(Path(root)))
    owner.communicate()


def test_nothing_is_skipped_in_ci(monkeypatch):
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="sshd"):
        need("not installed: sshd")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception):
        need("not installed: sshd")
