"""ssh to the lab's instances, when it is late, dead, silent, cut, or somebody else."""

import subprocess
import time
from pathlib import Path

import pytest
from vast_instance import missing_tools, wait_until
from vast_lab_helpers import (
    SshClient,
    buy,
    clean_lab,
    have,
    need,
    port_of,
    ready,
    sdk,
    until_running,
)
from vast_server import FakeVast


@pytest.fixture(autouse=True)
def _tools(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    need(missing_tools())


@pytest.fixture
def client(tmp_path):
    need(missing_tools())
    return SshClient(tmp_path / "client")


@pytest.fixture
def any_lab(client):
    """The lab in the best mode that there is."""
    with clean_lab(client) as lab:
        yield lab


@pytest.mark.parametrize(("mode", "least_s"), [("refused", 0.0), ("hang", 0.8), ("silent", 0.8)])
def test_ssh_can_be_dead_in_three_ways_and_come_to_life(any_lab, client, mode, least_s):
    any_lab.behave(ssh=mode)
    number, port = ready(sdk(any_lab))
    client.patience_s, began = 1, time.monotonic()
    assert client.run(port, "true").returncode == 255
    assert least_s <= time.monotonic() - began < 3
    client.patience_s = 5
    any_lab.act(id=number, what="ssh", mode="ok")
    port = any_lab.instances()[0]["port"]
    assert client.run(port, "echo alive").stdout == "alive\n"


def test_ssh_can_come_later_than_running(any_lab, client):
    any_lab.behave(ssh_after_s=0.4)
    _, port = ready(sdk(any_lab))
    assert client.run(port, "true").returncode == 255
    wait_until(lambda: client.run(any_lab.instances()[0]["port"], "echo").returncode == 0)


@pytest.mark.parametrize("fate", [{"direct": False}, {"proxy": False}])
def test_an_instance_may_lack_a_direct_port_or_a_proxy(any_lab, client, fate):
    any_lab.behave(**fate)
    vast = sdk(any_lab)
    row = until_running(vast, buy(vast))
    assert (row["ports"] is None) == ("direct" in fate)
    assert client.run(row["ssh_port"], "true").returncode == (0 if "direct" in fate else 255)
    if "proxy" in fate:
        assert client.run(port_of(row), "true").returncode == 0


def test_the_port_may_change_at_a_start(any_lab, client):
    any_lab.behave(new_port=True)
    vast = sdk(any_lab)
    number, old = ready(vast)
    vast.stop_instance(number)
    vast.start_instance(number)
    new = port_of(until_running(vast, number))
    assert [client.run(port, "true").returncode for port in (old, new)] == [255, 0]


def test_a_key_is_refused_until_it_is_attached(any_lab, client):
    any_lab.behave(account_keys=False)
    vast = sdk(any_lab)
    number, port = ready(vast)
    result = client.run(port, "true")
    assert (result.returncode, "Permission denied (publickey)" in result.stderr) == (255, True)
    vast.attach_ssh(number, client.public)
    assert client.run(port, "echo in").stdout == "in\n"


def test_keys_of_the_account_reach_new_instances_only(client):
    with FakeVast(offers=[{}, {}]) as lab:
        vast = sdk(lab)
        _, old = ready(vast)
        vast.create_ssh_key(client.public)
        assert client.run(old, "true").returncode == 255
        _, new = ready(vast)
        assert client.run(new, "true").returncode == 0


@pytest.mark.parametrize("by", ["fate", "act"])
def test_a_changed_host_key_is_refused_by_the_client(any_lab, client, by):
    any_lab.behave(host_key_after=1 if by == "fate" else None)
    number, port = ready(sdk(any_lab))
    assert client.run(port, "true").returncode == 0
    if by == "act":
        any_lab.act(id=number, what="host_key")
    result = client.run(port, "true")
    assert result.returncode == 255
    assert "HOST IDENTIFICATION HAS CHANGED" in result.stderr or "Host key" in result.stderr


def test_a_transfer_is_cut_after_so_many_bytes_and_can_be_resumed(any_lab, client, tmp_path):
    any_lab.behave(cut_after_bytes=[300_000, 300_000])
    _, port = ready(sdk(any_lab))
    (tmp_path / "big").write_bytes(bytes(range(256)) * 4000)
    words = ["--partial-dir=.part", "--no-compress", "--whole-file", tmp_path / "big", "lab:"]
    codes = [client.rsync(port, *words).returncode for _ in range(3)]
    assert [code != 0 for code in codes] == [True, True, False], codes
    home = Path(any_lab.instances()[0]["home"])
    assert (home / "big").read_bytes() == (tmp_path / "big").read_bytes()


def test_the_sessions_of_an_instance_can_be_cut_now(any_lab, client):
    number, port = ready(sdk(any_lab))
    words = ["ssh", *client.options(port), "127.0.0.1", "echo on; sleep 60"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as session:
        assert session.stdout.readline() == b"on\n"
        any_lab.act(id=number, what="cut")
        assert session.wait(5) == 255
    assert client.run(port, "echo again").stdout == "again\n"


def test_a_host_that_is_offline_reaches_nobody_and_nobody_reaches_it(any_lab, client):
    need(have("curl"))
    url = "$VAST_URL/api/v0/instances/$CONTAINER_ID/"
    line = f'until [ -e go ]; do sleep 0.02; done; curl -s -X DELETE -H @h "{url}"; echo $? > code'
    vast = sdk(any_lab)
    number, port = ready(
        vast, onstart_cmd=f'echo "Authorization: Bearer $CONTAINER_API_KEY" > h; {line}; sleep 60'
    )
    any_lab.act(id=number, what="offline")
    home = Path(any_lab.instances()[0]["home"])
    (home / "go").touch()
    wait_until(lambda: (home / "code").exists() and (home / "code").read_text())
    assert (home / "code").read_text() == "52\n"  # curl: empty reply
    assert any_lab.live() == [number]
    client.patience_s, began = 1, time.monotonic()
    assert client.run(port, "true").returncode == 255
    assert time.monotonic() - began > 0.8
    client.patience_s = 5
    any_lab.act(id=number, what="recover")
    port = port_of(until_running(vast, number))
    assert client.run(port, "echo back").stdout == "back\n"
