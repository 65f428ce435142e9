"""Labels, prices and budgets, computed by hand."""

import json

import pytest

from sparse_coding.rental.market import BadAnswer, Instance, Label, Offer
from sparse_coding.rental.records import (
    Attempt,
    Budget,
    Cost,
    OverBudget,
    Rates,
    Records,
    ShardRecord,
    spent,
)

RATES = Rates(gpu=0.4, disk=0.1, up=0.02, down=0.01)
OFFER = {"id": 5, "machine_id": 7, "gpu_name": "RTX 3090", "num_gpus": 1, "dph_total": 0.25,
         "storage_cost": 0.36, "inet_up_cost": 0.02, "inet_down_cost": 0.01, "min_bid": 0.1,
         "duration": 86400 * 3}  # fmt: skip


def rental(**changes) -> Attempt:
    known = dict(number=1, machine_id=7, gpu_name="RTX 3090", rates=RATES, ordered=1000.0)
    return Attempt(**known | dict(expires=1000.0 + 2 * 3600) | changes)


# --- labels ---


def test_a_label_is_read_back_as_it_was_written():
    label = Label("replicate-1a2b", 3, 2, 1790000000)
    assert str(label) == "sae1/replicate-1a2b/3/a2/exp=1790000000"
    assert Label.parse(str(label)) == label
    assert len(str(label)) < 256


@pytest.mark.parametrize("text", [None, "", "mine", "sae1/x", "sae2/x/1/a1/exp=1", "sae1/x/1/a1/"])
def test_other_labels_are_none_of_ours(text):
    assert Label.parse(text) is None


# --- offers and instances ---


def test_the_disk_is_priced_by_the_month_and_taken_out_of_the_total():
    offer = Offer.of_row(OFFER, disk_gb=40, interruptible=False)
    assert offer.rates.disk == pytest.approx(0.36 * 40 / 720)  # $/GB/month, 30 days
    assert offer.rates.gpu == pytest.approx(0.25 - 0.02)
    assert offer.rates.hourly == pytest.approx(0.25)
    assert offer.days_left == 3


def test_an_interruptible_offer_costs_its_bid_and_the_disk():
    offer = Offer.of_row(OFFER, disk_gb=40, interruptible=True)
    assert offer.rates.hourly == pytest.approx(1.2 * 0.1 + 0.02)


@pytest.mark.parametrize("name", ["id", "dph_total", "storage_cost", "inet_up_cost", "gpu_name"])
def test_an_offer_without_its_price_is_refused(name):
    with pytest.raises(BadAnswer, match=name):
        Offer.of_row({k: v for k, v in OFFER.items() if k != name}, disk_gb=9, interruptible=False)


def test_an_instance_of_nulls_is_one_that_is_being_made():
    instance = Instance.of_row({"id": 3, "label": None, "actual_status": None, "ports": None})
    assert (instance.status, instance.endpoints, instance.label) == ("created", (), None)


def test_ssh_is_tried_directly_first_then_through_the_proxy():
    row = {"id": 3, "public_ipaddr": " 1.2.3.4", "ports": {"22/tcp": [{"HostPort": "40022"}]},
           "ssh_host": "ssh5.vast.ai", "ssh_port": 10022}  # fmt: skip
    assert Instance.of_row(row).endpoints == (("1.2.3.4", 40022), ("ssh5.vast.ai", 10022))


# --- costs ---


def test_a_cost_is_hours_and_gigabytes_times_their_rates():
    cost = RATES.cost(running_h=2, existing_h=3, gb_up=5, gb_down=10)
    assert (cost.gpu, cost.disk, cost.traffic) == pytest.approx((0.8, 0.3, 0.2))
    assert cost.total == pytest.approx(1.3)
    assert str(Cost(0.05, 0.01, 0.01)) == "$0.070 (GPU 0.050, disk 0.010, traffic 0.010)"
    assert str(Cost(2, 0.5, 0)) == "$2.50 (GPU 2.00, disk 0.50, traffic 0.00)"


def test_the_gpu_is_charged_while_it_runs_and_the_disk_from_the_order_on():
    machine = rental()
    machine.seen("loading", 1100)
    machine.seen("running", 1600)
    machine.seen("running", 1700)
    machine.seen("stopped", 3400)  # outbid: half an hour
    machine.seen("running", 4600)
    assert machine.cost(5200).gpu == pytest.approx(0.4 * (1800 + 600) / 3600)
    assert machine.cost(5200).disk == pytest.approx(0.1 * 4200 / 3600)
    machine.ended(6400, "done")
    assert machine.cost(9999).gpu == pytest.approx(0.4 * (1800 + 1800) / 3600)
    assert machine.cost(9999).disk == pytest.approx(0.1 * 5400 / 3600)


def test_what_nobody_saw_end_is_charged_to_its_deadline_running():
    machine = rental(id=4)
    machine.seen("running", 2000)
    machine.vanished(1e9)
    assert machine.gone == 1000 + 7200
    assert machine.cost(2e9).gpu == pytest.approx(0.4 * (7200 - 1000) / 3600)


def test_an_order_that_was_never_made_costs_nothing_and_one_that_appears_late_does():
    machine = rental(planned=(0.0, 4.0), gb_down=4.0)
    machine.not_made("lost")
    assert machine.cost(9e9).total == 0
    machine.made_late(12, 2800)
    assert machine.cost(9e9).gpu == pytest.approx(0.4 * 1800 / 3600)
    assert machine.cost(9e9).traffic == pytest.approx(0.04)


# --- the budget ---


def test_a_machine_counts_with_its_worst_until_it_is_gone():
    first, second = rental(planned=(1.0, 4.0)), rental()
    record = ShardRecord(1)
    worst = 0.5 * (2 + 2 / 60) + 0.02 * 1 + 0.01 * 4
    budget = Budget(worst + 1.1, [record])
    budget.enter(record, first)
    assert budget.committed() == pytest.approx(worst)
    budget.enter(record, second)
    with pytest.raises(OverBudget):
        budget.enter(record, rental())
    assert len(record.attempts) == 2
    first.ended(1000 + 360, "done")  # cost 0.1 h of disk
    assert budget.committed() == pytest.approx(0.01 + 0.5 * (2 + 2 / 60))
    assert budget.hours_left(RATES, traffic=0.0) > 2
    budget.enter(record, rental())


def test_what_is_left_is_said_in_hours():
    budget = Budget(1.0, [ShardRecord(1)])
    assert budget.hours_left(RATES, traffic=0.25) == pytest.approx(0.75 / 0.5 - 2 / 60)
    assert budget.hours_left(Rates(0, 0, 0, 0), traffic=0.0) == float("inf")


def test_records_come_back_from_disk_as_they_were(tmp_path):
    records = Records(tmp_path / "run")
    records.folder.mkdir()
    record = ShardRecord(2, [rental(id=4)], avoid=[7, 9])
    record.attempts[0].seen("running", 1200.0)
    records.save(record)
    again = records.load(2)
    assert again.attempts[0].rates == RATES
    assert json.dumps(again.cost(5000.0).total) == json.dumps(record.cost(5000.0).total)
    assert (again.avoid, again.done, again.current.id) == ([7, 9], False, 4)
    assert records.load(1) == ShardRecord(1)
    assert spent([again]).disk > 0
