"""The lab itself: that its faults, fates, bills and instances are what a test takes them for."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders.vast.instance import missing_tools, script, ssh_user
from builders.vast.market import Behaviour, Contract
from builders.vast.server import FakeVast

requests = pytest.importorskip("requests")
VastAI = pytest.importorskip("vastai").VastAI
OFFERS = [{"dph_base": 0.1 * n, "min_bid": 0.05 * n} for n in (3, 1, 2)]


def wait_until(condition: Callable, timeout_s: float = 10) -> Any:
    """The condition's first true value."""
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {timeout_s} s in vain"
        time.sleep(0.01)
    return value


class Account:
    """The real SDK, pointed at a lab, and ssh to its instances."""

    def __init__(self, lab: FakeVast, folder: Path):
        self.lab, self.folder = lab, folder
        self.sdk = VastAI(api_key=lab.api_key, server_url=lab.url, retry=1)

    def buy(self, **request) -> int:
        offer = self.sdk.search_offers({}, order="dph_total")[0]["id"]
        request = {"image": "lab/image", "disk": 10, "ssh": True, "direct": True, **request}
        return self.sdk.create_instance(offer, **request)["new_contract"]

    def until(self, number: int, status: str | None) -> dict:
        """The instance's row, once it has this status."""

        def row() -> dict | None:
            found = self.sdk.show_instance(number)
            return found if found and found["actual_status"] == status else None

        return wait_until(row)

    def ready(self, **request) -> int:
        """A new instance that runs, with our key attached."""
        key = self.folder / "id"
        if not key.exists():
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        number = self.buy(**request)
        self.sdk.attach_ssh(number, key.with_suffix(".pub").read_text())
        self.until(number, "running")
        return number

    def ssh(
        self, number: int, command: str, *, direct: bool = True, seconds: int = 5
    ) -> subprocess.CompletedProcess:
        """A command there, as of subprocess.run, with text."""
        row = self.sdk.show_instance(number)
        port = row["ports"]["22/tcp"][0]["HostPort"] if direct else row["ssh_port"]
        settings = {"Port": port, "User": ssh_user(), "BatchMode": "yes", "IdentitiesOnly": "yes",
                    "StrictHostKeyChecking": "accept-new", "HostKeyAlias": f"lab-{number}",
                    "UserKnownHostsFile": self.folder / "known_hosts", "LogLevel": "ERROR",
                    "ConnectTimeout": seconds}  # fmt: skip
        options = [word for k, v in settings.items() for word in ("-o", f"{k}={v}")]
        words = ["ssh", "-F", "none", "-i", self.folder / "id", *options, "127.0.0.1", command]
        return subprocess.run(words, capture_output=True, text=True, timeout=30)


@pytest.fixture
def api(monkeypatch, tmp_path):
    """The API alone: no processes, quick."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with FakeVast(tmp_path / "lab", offers=OFFERS, sandboxes=False) as lab:
        yield Account(lab, tmp_path)


@pytest.fixture
def tester(monkeypatch, tmp_path):
    """With instances that are real."""
    if reason := missing_tools():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with FakeVast(tmp_path / "lab", offers=OFFERS) as lab:
        yield Account(lab, tmp_path)


def refused(call, *args, **kwargs) -> tuple[int, str]:
    """(status, error) of a call that the service refuses."""
    with pytest.raises(requests.HTTPError) as caught:
        call(*args, **kwargs)
    answer = caught.value.response
    is_json = answer.headers["Content-Type"] == "application/json"
    return answer.status_code, answer.json()["error"] if is_json else answer.text


# --- the API ---


def test_a_search_filters_orders_limits_and_prices_as_asked(api):
    assert [row["id"] for row in api.sdk.search_offers({}, order="dph_total")] == [102, 103, 101]
    query = {"gpu_name": {"in": ["RTX 4090"]}, "dph_total": {"gte": 0.15}}
    (row,) = api.sdk.search_offers(query, order="dph_total", limit=1, storage=72)
    assert (row["id"], row["dph_total"]) == (103, pytest.approx(0.2 + 0.15 * 72 / 720))
    assert api.sdk.search_offers({"id": {"eq": 102}}, type="bid")[0]["dph_base"] == 0.05
    assert refused(api.sdk.search_offers, {"gpu_colour": {"eq": "red"}}) == (400, "invalid_request")


def test_buying_takes_the_offer_off_the_market_until_the_end(api):
    number = api.sdk.create_instance(102, image="a/b", disk=20, label="x")["new_contract"]
    assert 102 not in [row["id"] for row in api.sdk.search_offers({})]
    assert refused(api.sdk.create_instance, 102, image="a/b") == (404, "no_such_ask")
    api.sdk.destroy_instance(number)
    assert 102 in [row["id"] for row in api.sdk.search_offers({})]
    assert api.sdk.show_instance(number) is None
    assert refused(api.sdk.destroy_instance, number)[0] == 404


def test_a_key_opens_what_it_may(api):
    answer = api.sdk.create_instance(102, image="a/b")
    other = api.buy()
    api.sdk.client.api_key = "wrong"
    assert refused(api.sdk.show_user) == (404, "auth_error")
    api.sdk.client.api_key = answer["instance_api_key"]
    assert refused(api.sdk.destroy_instance, other) == (403, "not_authorized")
    assert refused(api.sdk.show_user) == (403, "not_authorized")
    api.sdk.destroy_instance(answer["new_contract"])
    assert [row["how"] for row in api.lab.ledger()] == ["by itself", None]
    assert requests.get(f"{api.lab.url}/api/v1/instances/", timeout=9).status_code == 403


def test_documented_intervals_are_enforced_when_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with FakeVast(tmp_path / "lab", offers=OFFERS, sandboxes=False, rate_limits=0.1) as lab:
        sdk = Account(lab, tmp_path).sdk
        sdk.create_instance(101, image="a/b")  # 0.45 s apart, and 1.2 s after a violation
        assert refused(sdk.create_instance, 102, image="a/b")[0] == 429
        time.sleep(0.5)
        assert refused(sdk.create_instance, 102, image="a/b")[0] == 429
        time.sleep(1.25)
        sdk.create_instance(102, image="a/b")


# --- faults ---


def test_answers_are_late_or_break_off(api):
    api.lab.fault(path="/users/", action="delay:0.2", nth=1)
    began = time.monotonic()
    api.sdk.show_user()
    assert time.monotonic() - began >= 0.2
    api.lab.fault(path="/users/", action="short", nth=1)
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        api.sdk.show_user()


@pytest.mark.parametrize(("which", "expected"), [
    ({"nth": 2}, [0, 1, 0]), ({"nth": [1, 3]}, [1, 0, 1]), ({"every": 2}, [0, 1, 0, 1]),
    ({"first": 2}, [1, 1, 0]), ({"caller": "instance"}, [0, 0]), ({"method": "PUT"}, [0]),
    ({"probability": 0.5, "seed": 3}, [1, 0, 1, 0, 0, 1]),
])  # fmt: skip
def test_rules_choose_requests_by_number_caller_and_chance(api, which, expected):
    api.lab.fault(path="/users/", action="500", **which)
    for wrong in expected:
        assert refused(api.sdk.show_user)[0] == 500 if wrong else api.sdk.show_user()
    assert api.lab.fired() == [sum(expected)]


CALLER = """
import signal, sys
from vastai import VastAI
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
vast = VastAI(api_key=sys.argv[2], server_url=sys.argv[1], retry=1)
try:
    vast.show_user()
    vast.create_instance(101, image="a/b")
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.long
@pytest.mark.parametrize(("action", "code", "bought"), [
    ("signal:KILL", -signal.SIGKILL, 0), ("act+signal:KILL", -signal.SIGKILL, 1),
    ("act+signal:INT", 0, 1),
])  # fmt: skip
def test_a_caller_is_signalled_at_its_kth_call(api, action, code, bought):
    api.lab.fault(path="", caller="account", nth=2, action=action)
    command = [sys.executable, "-c", CALLER, api.lab.url, api.lab.api_key]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert result.returncode == code, result.stderr
    assert len(api.lab.live()) == bought
    assert ("interrupted" in result.stdout) == action.endswith("INT")


# --- fates, and the bill ---


@pytest.mark.parametrize(("fate", "statuses"), [
    ({"load_s": 0.1}, ["loading", "running"]), ({"stuck": "created"}, [None]),
    ({"stuck": "loading"}, ["loading"]),
    ({"turns": "exited", "turns_after_s": 0.1}, ["running", "exited"]),
    ({"turns": "offline", "turns_after_s": 0.1, "recovers_after_s": 0.1}, ["offline", "running"]),
    ({"outbid_after_s": 0.1}, ["running", "stopped"]),
])  # fmt: skip
def test_an_instance_meets_its_fate_and_only_the_one_that_is_meant(api, fate, statuses):
    api.lab.behave(skip=1, times=1, **fate)
    first, second, third = api.buy(), api.buy(), api.buy()
    for status in statuses:
        api.until(second, status)
    for number in (first, third):
        api.until(number, "running")


def test_a_row_a_label_and_an_end_can_be_late(api):
    api.lab.behave(listed_after_s=0.3, label_after_s=0.6, lingers_s=0.3)
    number = api.buy(label="x")
    assert api.sdk.show_instance(number) is None
    assert wait_until(lambda: api.sdk.show_instance(number))["label"] is None
    wait_until(lambda: api.sdk.show_instance(number)["label"] == "x")
    api.sdk.destroy_instance(number)
    assert api.lab.live() == []
    assert api.sdk.show_instance(number)
    wait_until(lambda: api.sdk.show_instance(number) is None)


def test_the_bill_adds_up_as_documented():
    offer = {"id": 101, "dph_base": 0.5, "storage_cost": 0.72, "inet_down_cost": 0.01,
             "inet_up_cost": 0.02}  # fmt: skip
    contract = Contract(1, offer, {"disk": 100, "label": "x"}, Behaviour(price_factor=1.2))
    contract.created, hour = 0.0, 3600.0
    contract.marks = [(0.0, "created"), (hour, "loading"), (3 * hour, "running"),
                      (8 * hour, "stopped"), (10 * hour, "running")]  # fmt: skip
    contract.ended, contract.bytes = 12 * hour, (10e9, 5e9)
    row = contract.entry(99 * hour)
    assert row["gpu"] == pytest.approx((5 + 2) * 0.6)
    assert row["disk"] == pytest.approx(0.1 * 12)  # $/GB/month, 30 days
    assert (row["down"], row["up"]) == (pytest.approx(0.1), pytest.approx(0.1))
    assert row["total"] == pytest.approx(4.2 + 1.2 + 0.2)


# --- instances ---

LONG = pytest.mark.long


@LONG
def test_a_session_and_the_onstart_script_see_what_the_real_ones_do(tester):
    script(tester.lab.root / "bin/nvidia-smi", "#!/bin/sh\necho lab gpu\n")
    tester.lab.behave(clock_skew_s=-3600)
    number = tester.ready(onstart_cmd="env > env.txt; date +%s > now; echo started; sleep 60")
    home = tester.lab.home(number)
    told = tester.ssh(number, "pwd; echo $HOME; nvidia-smi; env | cut -d= -f1").stdout.splitlines()
    assert told[:3] == [str(home), str(home), "lab gpu"]
    assert not {"CONTAINER_ID", "CONTAINER_API_KEY", "VAST_URL"} & set(told)
    log = home.parent / "container.log"
    wait_until(lambda: log.read_text() == "started\n")
    assert f"CONTAINER_ID={number}\n" in (home / "env.txt").read_text()
    assert int((home / "now").read_text()) == pytest.approx(time.time() - 3600, abs=20)


@LONG
def test_the_bill_counts_the_bytes_of_connections_that_are_open_over_or_cut(tester):
    number = tester.ready()
    tester.ssh(number, "head -c 500000 /dev/zero")
    wait_until(lambda: tester.lab.ledger()[0]["bytes"][1] > 500_000)
    tester.sdk.destroy_instance(number)
    assert 500_000 < tester.lab.ledger()[0]["bytes"][1] < 530_000


@LONG
def test_a_line_a_key_an_address_and_a_host_can_be_wrong(tester):
    tester.lab.behave(cut_after_bytes=[3000], times=1)
    number = tester.ready()
    assert tester.ssh(number, "head -c 9000 /dev/zero").returncode == 255
    assert tester.ssh(number, "echo on").stdout == "on\n"
    tester.lab.behave(host_key_after=1, direct=False, times=1)
    number = tester.ready()
    assert tester.ssh(number, "true").returncode == 255
    assert tester.ssh(number, "true", direct=False).returncode == 0
    result = tester.ssh(number, "true", direct=False)
    assert "HOST IDENTIFICATION HAS CHANGED" in result.stderr
    number = tester.buy()
    tester.until(number, "running")
    assert "Permission denied (publickey)" in tester.ssh(number, "true").stderr


@LONG
def test_a_host_that_is_offline_reaches_nobody_and_comes_back_elsewhere(tester):
    line = 'curl -s -X DELETE -H @h "$VAST_URL/api/v0/instances/$CONTAINER_ID/"; echo $? > code'
    onstart = (
        f'echo "Authorization: Bearer $CONTAINER_API_KEY" > h; until [ -e go ]; do :; done; {line}'
    )
    number = tester.ready(onstart_cmd=onstart)
    port = tester.sdk.show_instance(number)["ssh_port"]
    tester.lab.act(number, "offline")
    (tester.lab.home(number) / "go").touch()
    code = tester.lab.home(number) / "code"
    wait_until(lambda: code.exists() and code.read_text())
    assert code.read_text() == "52\n"  # curl: empty reply
    assert tester.lab.live() == [number]
    tester.lab.act(number, "recover")
    assert tester.ssh(number, "echo back").stdout == "back\n"
    assert tester.sdk.show_instance(number)["ssh_port"] != port


# --- nothing survives ---

STUBBORN = """
setsid sleep 100{n}1 &
(setsid nohup sleep 100{n}2 >/dev/null 2>&1 &)
setsid env -i /bin/bash -c 'trap "" TERM HUP INT; while :; do /bin/sleep 100{n}3; done' &
wait
"""


def running(text: str) -> list[str]:
    """Command lines on this machine in which the text occurs."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = Path("/proc", name, "cmdline").read_text(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if text in line:
            found.append(line)
    return found


@LONG
@pytest.mark.parametrize("how", ["destroy", "outbid", "vanish", "exited"])
def test_the_end_of_an_instance_is_the_end_of_all_its_processes(tester, how):
    n = os.getpid()
    number = tester.ready(onstart_cmd=STUBBORN.format(n=n))
    wait_until(lambda: all(running(f"sleep 100{n}{k}") for k in (1, 2, 3)))
    if how == "destroy":
        tester.sdk.destroy_instance(number)
    else:
        tester.lab.act(number, how)
    assert running(f"sleep 100{n}") == []
