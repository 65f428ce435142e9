"""What happens to instances, and what they cost, as the real vastai package sees it."""

import time

import pytest
from vast_instance import wait_until
from vast_lab_helpers import buy, sdk, until_running, until_status
from vast_ledger import Ledger
from vast_rows import new_offer
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


# --- fates ---


def test_an_instance_takes_its_time(lab, vast):
    lab.behave(provision_s=0.3, load_s=0.2)
    number = buy(vast)
    assert vast.show_instance(number)["actual_status"] is None
    until_status(vast, number, "loading")
    until_running(vast, number)
    entry = lab.ledger()[0]
    assert 0.5 <= entry["running"] - entry["created"] < 2
    assert entry["states"] == ["created", "loading", "running"]


@pytest.mark.parametrize(("stuck", "status"), [("created", None), ("loading", "loading")])
def test_an_instance_can_be_stuck_until_the_test_says_go(lab, vast, stuck, status):
    lab.behave(stuck=stuck)
    number = buy(vast)
    time.sleep(0.1)
    assert vast.show_instance(number)["actual_status"] == status
    lab.act(id=number, what="run")
    until_running(vast, number)


@pytest.mark.parametrize("status", ["exited", "offline", "unknown"])
def test_an_instance_can_turn(lab, vast, status):
    lab.behave(turns=status, turns_after_s=0.1, recovers_after_s=0.3)
    number = buy(vast)
    until_running(vast, number)
    row = until_status(vast, number, status)
    assert row["ports"] is None
    if status != "exited":
        until_running(vast, number)


def test_a_label_and_a_row_can_be_late(lab, vast):
    lab.behave(label="slow", label_after_s=0.4)
    lab.behave(label="hidden", listed_after_s=0.4)
    slow, hidden = buy(vast, label="slow"), buy(vast, label="hidden")
    assert [(r["id"], r["label"]) for r in vast.show_instances()] == [(slow, None)]
    time.sleep(0.45)
    assert [(r["id"], r["label"]) for r in vast.show_instances()] == [
        (slow, "slow"), (hidden, "hidden")]  # fmt: skip


def test_an_outbid_instance_stops_and_returns(lab, vast):
    lab.behave(outbid_after_s=0.1, returns_after_s=0.3)
    number = buy(vast, bid_price=0.2)
    row = until_status(vast, number, "stopped")
    assert (row["intended_status"], row["is_bid"]) == ("running", True)
    assert row["min_bid"] == pytest.approx(0.25)
    until_running(vast, number)
    assert lab.ledger()[0]["states"] == [
        "created", "loading", "running", "stopped", "loading", "running"]  # fmt: skip


def test_a_higher_bid_brings_an_outbid_instance_back(lab, vast):
    number = buy(vast, bid_price=0.2)
    until_running(vast, number)
    lab.act(id=number, what="outbid")
    vast.change_bid(number, 0.21)
    assert vast.show_instance(number)["actual_status"] == "stopped"
    vast.change_bid(number, 0.3)
    assert until_running(vast, number)["dph_base"] == 0.3


def test_an_instance_vanishes_and_stops_costing(lab, vast):
    lab.behave(vanishes_after_s=0.15)
    number = buy(vast)
    wait_until(lambda: vast.show_instance(number) is None)
    assert (lab.live(), lab.ledger()[0]["how"]) == ([], "vanished")


def test_the_contract_ends_and_a_start_may_be_refused(lab, vast):
    lab.behave(ends_after_s=0.15, start_refused=True)
    number = buy(vast)
    row = until_status(vast, number, "stopped")
    assert row["end_date"] - row["start_date"] == pytest.approx(0.15, abs=0.01)
    vast.start_instance(number)
    assert vast.show_instance(number)["intended_status"] == "running"
    assert vast.show_instance(number)["actual_status"] == "stopped"


def test_an_offer_sold_twice_leaves_the_second_buyer_loading(lab, vast):
    lab.change_offer(id=101, sales=2)
    first, second = (vast.create_instance(101, image="a/b")["new_contract"] for _ in range(2))
    until_running(vast, first)
    time.sleep(0.1)
    assert vast.show_instance(second)["actual_status"] == "loading"


def test_the_latest_order_for_a_label_wins_and_lasts_as_long_as_it_says(lab, vast):
    lab.behave(stuck="loading")
    lab.behave(label="shard1", skip=1, times=1, stuck="created")
    numbers = [buy(vast, label=label) for label in ("shard1", "shard1", "shard2")]
    time.sleep(0.1)
    statuses = [vast.show_instance(number)["actual_status"] for number in numbers]
    assert statuses == ["loading", None, "loading"]


# --- the bill ---


@pytest.mark.parametrize("gpu_while_loading", [False, True])
def test_the_ledger_adds_up_as_documented(gpu_while_loading):
    now = [0.0]
    ledger = Ledger(gpu_while_loading, clock=lambda: now[0])
    offer = new_offer(101, storage_cost=0.72, inet_down_cost=0.01, inet_up_cost=0.02,
                      stopped_storage_factor=2.0)  # fmt: skip
    ledger.open(1, offer, "x", disk_gb=100.0, gpu_per_h=0.5)  # storage: 0.1 $/hour
    for hour, state, gpu in [
        (1, "loading", 0.5), (3, "running", 0.5), (7, "running", 0.6), (8, "stopped", 0.6),
        (10, "loading", 0.6), (11, "exited", 0.6),
    ]:  # fmt: skip
        now[0] = hour * 3600.0
        ledger.mark(1, state, gpu)
    ledger.tell(1, 10e9, 5e9)
    now[0] = 12 * 3600.0
    ledger.close(1, "destroyed")
    now[0] = 99 * 3600.0
    cost = ledger.cost(1)
    loading = 2 * 0.5 + 1 * 0.6
    assert cost["gpu"] == pytest.approx(4 * 0.5 + 1 * 0.6 + loading * gpu_while_loading)
    assert cost["disk"] == pytest.approx(0.1 * (10 + 2 * 2.0))
    assert (cost["bwd"], cost["bwu"]) == (pytest.approx(0.1), pytest.approx(0.1))
    assert ledger.total() == pytest.approx(sum(cost[k] for k in ("gpu", "disk", "bwd", "bwu")))


def test_the_bill_of_a_real_instance_meets_the_arithmetic(lab, vast):
    lab.change_offer(id=101, dph_base=360.0, storage_cost=7200.0)  # 0.1 $/s, and 0.0278 $/s of disk
    lab.behave(load_s=0.2)
    number = vast.create_instance(101, image="a/b", disk=10)["new_contract"]
    until_running(vast, number)
    time.sleep(0.3)
    vast.stop_instance(number)
    time.sleep(0.2)
    vast.destroy_instance(number)
    row = lab.ledger()[0]
    assert row["gpu"] == pytest.approx(0.1 * (row["stopped"] - row["running"]), rel=1e-3)
    assert row["disk"] == pytest.approx(100 / 3600 * (row["ended"] - row["created"]), rel=1e-3)
    assert lab.total() == row["gpu"] + row["disk"]
    time.sleep(0.05)
    assert lab.total() == row["total"]


def test_credit_falls_by_what_is_spent(lab, vast):
    lab.change_offer(id=101, dph_base=3600.0)
    until_running(vast, vast.create_instance(101, image="a/b")["new_contract"])
    time.sleep(0.1)
    assert vast.show_user()["credit"] == pytest.approx(5.0 - lab.total(), abs=0.05)
    assert lab.total() > 0.1
