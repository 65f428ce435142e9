"""The lab's instances: real sshd, rsync and bash, each in a place of its own."""

import re
import subprocess
import time
from pathlib import Path

import pytest
from vast_instance import can_use_namespaces, missing_tools, script, wait_until
from vast_lab_helpers import (
    SshClient,
    clean_lab,
    need,
    port_of,
    ready,
    sdk,
    skip_without_small_disks,
    until_running,
)


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


# --- what a session sees ---


def test_a_session_is_in_its_home_with_a_minimal_path_and_no_container_variables(lab, client):
    script(lab.root / "bin/nvidia-smi", "#!/bin/sh\necho lab gpu\n")
    _, port = ready(sdk(lab), env={"SHOWN": "1"}, onstart_cmd="sleep 60")
    told = client.run(port, "pwd; echo $HOME; nvidia-smi; env | cut -d= -f1").stdout.splitlines()
    home = lab.instances()[0]["home"]
    assert told[:3] == [home, home, "lab gpu"]
    assert not {"CONTAINER_ID", "CONTAINER_API_KEY", "VAST_URL", "SHOWN"} & set(told)
    login = subprocess.run(
        ["ssh", *client.options(port), "127.0.0.1"], text=True, capture_output=True, timeout=30,
        input="shopt -q login_shell && echo login; exit 3\n",
    )  # fmt: skip
    assert (login.returncode, login.stdout) == (3, "login\n")


def test_the_onstart_script_sees_them_and_runs_at_each_start(lab, client):
    vast = sdk(lab)
    onstart = "env >> env.txt; echo started; sleep 60"
    number, _ = ready(vast, env={"SHOWN": "yes"}, onstart_cmd=onstart)
    home = Path(lab.instances()[0]["home"])
    wait_until(lambda: vast.logs(number) == "started\n")
    told = dict(line.split("=", 1) for line in (home / "env.txt").read_text().splitlines())
    assert told["CONTAINER_ID"] == str(number)
    assert told["CONTAINER_API_KEY"] == lab.instances()[0]["key"]
    assert told["VAST_CONTAINERLABEL"] == f"C.{number}"
    assert (told["SHOWN"], told["GPU_COUNT"], told["PUBLIC_IPADDR"]) == ("yes", "1", "127.0.0.1")
    assert told["VAST_TCP_PORT_22"] == str(lab.instances()[0]["port"])
    vast.stop_instance(number)
    vast.start_instance(number)
    until_running(vast, number)
    wait_until(lambda: (home / "env.txt").read_text().count("CONTAINER_ID=") == 2)
    wait_until(lambda: vast.logs(number) == "started\nstarted\n")
    assert vast.logs(number, tail=1) == "started\n"


def test_rsync_and_scp_go_both_ways_and_the_bill_counts_the_bytes(lab, client, tmp_path):
    number, port = ready(sdk(lab))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a").write_bytes(b"x" * 100_000)
    assert client.rsync(port, f"{tmp_path}/out/", "lab:work/").returncode == 0
    assert client.rsync(port, "lab:work/a", tmp_path / "back").returncode == 0
    assert (tmp_path / "back").read_bytes() == b"x" * 100_000
    options = ["User" if w == "-p" else w for w in client.options(port)]
    command = ["scp", *options, f"{tmp_path}/back", "127.0.0.1:copy"]
    assert subprocess.run(command, capture_output=True, timeout=30).returncode == 0
    assert (Path(lab.instances()[0]["home"]) / "copy").stat().st_size == 100_000
    wait_until(lambda: lab.ledger()[0]["down_bytes"] > 200_000)
    row = lab.ledger()[0]
    assert 100_000 < row["up_bytes"] < 130_000
    assert row["bwd"] == pytest.approx(row["down_bytes"] / 1e9 * 0.003)
    assert row["id"] == number


def test_the_bill_counts_connections_that_are_open_or_were_killed(any_lab, client):
    vast = sdk(any_lab)
    number, port = ready(vast)
    words = ["ssh", *client.options(port), "127.0.0.1", "head -c 500000 /dev/zero; sleep 60"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as session:
        session.stdout.read(500_000)
        wait_until(lambda: any_lab.ledger()[0]["up_bytes"] > 500_000)
        vast.destroy_instance(number)
        assert session.wait(5) == 255
    assert 500_000 < any_lab.ledger()[0]["up_bytes"] < 520_000


def test_two_instances_do_not_see_each_other(lab, client):
    vast = sdk(lab)
    (_, one), (_, two) = ready(vast), ready(vast)
    client.run(one, "echo secret > mine; sleep 55 >/dev/null 2>&1 &")
    told = client.run(two, "ls; pgrep -x sleep; cat /dev/shm/x /workspace/x").stdout
    if lab.market.namespaces:
        assert told == ""
        client.run(one, "echo x > /dev/shm/x; echo x > /workspace/x; echo $$")
        assert client.run(two, "cat /dev/shm/x /workspace/x").stdout == ""
        assert client.run(one, "cat /dev/shm/x /workspace/x").stdout == "x\nx\n"
    homes = [Path(row["home"]) for row in lab.instances()]
    assert [(home / "mine").exists() for home in homes] == [True, False]


def test_a_stop_keeps_files_and_forgets_memory(any_lab, client):
    vast = sdk(any_lab)
    number, port = ready(vast)
    where = "/dev/shm" if any_lab.market.namespaces else "."
    client.run(port, f"echo 1 > file; echo 2 > {where}/memory")
    vast.stop_instance(number)
    assert client.run(port, "true").returncode == 255
    vast.start_instance(number)
    port = port_of(until_running(vast, number))
    told = client.run(port, f"cat file; cat {where}/memory").stdout
    assert told == ("1\n" if any_lab.market.namespaces else "1\n2\n")


# --- disk and clock ---


def test_a_small_disk_is_full_and_keeps_its_files_over_a_stop(any_lab, client, tmp_path):
    skip_without_small_disks()
    any_lab.behave(disk_mb=1)
    vast = sdk(any_lab)
    number, port = ready(vast)
    client.run(port, "echo kept > kept")
    (tmp_path / "big").write_bytes(b"x" * 2_000_000)
    # the code is sure, the words are not: they may be lost with the connection
    assert client.rsync(port, tmp_path / "big", "lab:").returncode == 11
    vast.stop_instance(number)
    vast.start_instance(number)
    port = port_of(until_running(vast, number))
    assert client.run(port, "cat kept").stdout == "kept\n"


def test_the_clock_of_an_instance_can_be_wrong(any_lab, client):
    any_lab.behave(clock_skew_s=-3600)
    _, port = ready(sdk(any_lab), onstart_cmd="date +%s > now; sleep 60")
    told = int(client.run(port, "date +%s").stdout)
    assert told == pytest.approx(time.time() - 3600, abs=5)
    home = Path(any_lab.instances()[0]["home"])
    assert int(wait_until((home / "now").read_text)) == pytest.approx(told, abs=5)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d\n", client.run(port, "date +%Y-%m-%d").stdout)
