"""Faults of the service, each as the real vastai package meets it."""

import os
import signal
import subprocess
import sys
import time

import pytest
from vast_lab_helpers import (
    ChunkedEncodingError,
    HTTPError,
    JSONDecodeError,
    Lost,
    ReadTimeout,
    buy,
    sdk,
)
from vast_server import FakeVast


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def lab():
    with FakeVast(sandboxes=False, offers=[{}, {}, {}]) as lab:
        yield lab


@pytest.fixture
def vast(lab):
    return sdk(lab)


# --- what an answer can be instead of an answer ---


@pytest.mark.parametrize("action", ["429", "500", "502", "503", "504", "410"])
def test_a_status_comes_before_anything_is_done_unless_told_otherwise(lab, vast, action):
    for prefix, bought in (("", 0), ("act+", 1)):
        lab.clear_faults()
        lab.fault(method="PUT", path="/asks/", action=prefix + action)
        with pytest.raises(HTTPError) as caught:
            vast.create_instance(101, image="a/b")
        assert caught.value.response.status_code == int(action)
        assert len(lab.live()) == bought


@pytest.mark.parametrize("action", ["drop", "close"])
def test_a_connection_can_break_before_or_after_the_purchase(lab, vast, action):
    for prefix, bought in (("", 0), ("act+", 1)):
        lab.clear_faults()
        lab.fault(path="/asks/", action=prefix + action)
        with pytest.raises(Lost):
            vast.create_instance(101, image="a/b")
        assert len(lab.live()) == bought


def test_a_request_may_never_be_answered(lab, vast):
    lab.fault(path="/asks/", action="act+hang")
    vast.client.timeout = 0.2
    with pytest.raises(ReadTimeout):
        vast.create_instance(101, image="a/b")
    assert len(lab.live()) == 1


@pytest.mark.parametrize(("action", "error"), [
    ("html", JSONDecodeError), ("empty", JSONDecodeError), ("truncated", JSONDecodeError),
    ("null", AttributeError), ("null-fields", TypeError),
])  # fmt: skip
def test_shapes_that_break_the_sdks_list(lab, vast, action, error):
    buy(vast)
    lab.fault(path="/api/v1/instances/", action=action)
    with pytest.raises(error):
        vast.show_instances()


def test_an_answer_that_breaks_off_is_lost_and_not_retried(lab):
    lab.fault(path="/asks/", action="short")
    with pytest.raises(ChunkedEncodingError):
        sdk(lab, retry=3).create_instance(101, image="a/b")
    assert len(lab.live()) == len(lab.requests()) == 1


def test_an_empty_object_reads_as_no_instances_in_the_sdk(lab, vast):
    buy(vast)
    lab.fault(path="/api/v1/instances/", action="object")
    assert vast.show_instances() == []  # the trap: it must not be believed


def test_null_fields_break_the_flat_list_and_not_the_paged_one(lab, vast):
    number = buy(vast)
    lab.fault(path="instances/", method="GET", action="null-fields:start_date,extra_env")
    with pytest.raises(TypeError):
        vast.show_instances()
    with pytest.raises(TypeError):
        vast.show_instance(number)
    row = vast.show_instances_v1({})["instances"][0]
    assert (row["id"], row["start_date"], row["extra_env"]) == (number, None, None)


def test_an_answer_can_be_late_and_can_be_worded_by_the_test(lab, vast):
    lab.fault(path="/users/", action="delay:0.2", first=1)
    began = time.monotonic()
    vast.show_user()
    assert 0.2 <= time.monotonic() - began < 3
    lab.fault(path="/users/", action="400", body='{"error": "missing_billing"}')
    with pytest.raises(HTTPError) as caught:
        vast.show_user()
    assert caught.value.response.json() == {"error": "missing_billing"}


def test_rules_choose_requests_by_number_caller_and_chance(lab, vast):
    def statuses(n: int) -> list:
        lab.clear_requests()
        for _ in range(n):
            try:
                vast.show_user()
            except HTTPError:
                continue
        return [entry["status"] for entry in lab.requests()]

    for which, expected in [
        ({"nth": 2}, [200, 500, 200]), ({"nth": [1, 3]}, [500, 200, 500]),
        ({"every": 2}, [200, 500, 200, 500]), ({"first": 2}, [500, 500, 200]),
        ({"caller": "instance"}, [200, 200]), ({"method": "PUT"}, [200]),
    ]:  # fmt: skip
        lab.clear_faults()
        lab.fault(path="/users/", action="500", **which)
        assert statuses(len(expected)) == expected
    lab.clear_faults()
    lab.fault(path="/users/", action="500", probability=0.5, seed=3)
    first = statuses(20)
    lab.clear_faults()
    lab.fault(path="/users/", action="500", probability=0.5, seed=3)
    assert first == statuses(20)
    assert 4 < first.count(500) < 16
    assert lab.faults_fired()[0]["fired"] == first.count(500)


# --- what the package does about them (why it must not buy with its default) ---


@pytest.mark.parametrize("action", ["act+504", "act+502", "act+drop"])
def test_the_default_client_buys_twice_when_an_answer_is_lost(lab, action):
    lab.change_offer(id=101, sales=2)
    lab.fault(method="PUT", path="/asks/", action=action, nth=1)
    told = sdk(lab, retry=3).create_instance(101, image="a/b", label="x")["new_contract"]
    assert len(lab.live()) == 2
    assert told == lab.live()[1]  # nobody was told of the first


def test_the_default_client_sees_404_when_the_lost_purchase_took_the_offer(lab):
    lab.fault(method="PUT", path="/asks/", action="act+504", nth=1)
    with pytest.raises(HTTPError, match="404"):
        sdk(lab, retry=3).create_instance(101, image="a/b", label="x")
    assert len(lab.live()) == 1


def test_a_client_without_retries_buys_once_and_finds_it_by_its_label(lab, vast):
    lab.fault(method="PUT", path="/asks/", action="act+504", nth=1)
    with pytest.raises(HTTPError, match="504"):
        vast.create_instance(101, image="a/b", label="x")
    rows = vast.show_instances_v1({"select_filters": {"label": {"eq": "x"}}})["instances"]
    assert [row["id"] for row in rows] == lab.live()


def test_the_default_client_tries_three_times_and_500_only_once(lab):
    vast = sdk(lab, retry=3)
    for action, tries in (("429", 3), ("503", 3), ("500", 1), ("drop", 3)):
        lab.clear_faults()
        lab.clear_requests()
        lab.fault(path="/users/", action=action)
        began = time.monotonic()
        with pytest.raises((HTTPError, Lost)):
            vast.show_user()
        assert len(lab.requests()) == tries
        assert (time.monotonic() - began > 0.37) == (tries == 3)


def test_the_default_client_waits_as_long_as_it_is_told(lab):
    lab.fault(path="/users/", action="429", first=1, headers={"Retry-After": "0.6"})
    began = time.monotonic()
    sdk(lab, retry=3).show_user()
    assert 0.6 <= time.monotonic() - began < 2


def test_retry_0_crashes_the_client(lab):
    with pytest.raises(AttributeError):
        sdk(lab, retry=0).show_user()


def test_the_command_line_says_0_when_it_fails(lab, tmp_path):
    env = os.environ | {"HOME": str(tmp_path), "VAST_URL": lab.url, "VASTAI_NO_UPDATE_CHECK": "1"}
    main = "import sys; from vastai.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", main, "destroy", "instance", "99", "-y"]
    command += ["--api-key", lab.api_key]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
    assert result.returncode == 0, result.stderr
    assert [(e["method"], e["status"]) for e in lab.requests()][-1] == ("DELETE", 404)


# --- killing the caller ---

CALLER = """
import sys
from vastai import VastAI
vast = VastAI(api_key=sys.argv[2], server_url=sys.argv[1], retry=1)
try:
    vast.show_user()
    vast.create_instance(101, image="a/b")
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize(("action", "code", "bought"), [
    ("signal:KILL", -signal.SIGKILL, 0), ("act+signal:KILL", -signal.SIGKILL, 1),
    ("act+signal:INT", 0, 1), ("signal:INT", 0, 0),
])  # fmt: skip
def test_a_caller_is_signalled_at_its_kth_call(lab, action, code, bought):
    lab.fault(path="", caller="account", nth=2, action=action)
    command = [sys.executable, "-c", CALLER, lab.url, lab.api_key]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert result.returncode == code, result.stderr
    assert len(lab.live()) == bought
    assert len(lab.requests()) == 2
    assert ("interrupted" in result.stdout) == action.endswith("INT")
