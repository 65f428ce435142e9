"""Costs and budgets, computed by hand."""

import pytest

from sparse_coding.rental.records import (
    Attempt,
    Cost,
    Ledger,
    OverBudget,
    Rates,
    ShardRecord,
    printable,
)

RATES = Rates(gpu=0.4, disk=0.1, up=0.02, down=0.01)


def attempt(**changes) -> Attempt:
    known = dict(number=1, machine_id=7, gpu_name="RTX 3090", rates=RATES, ordered=1000.0)
    return Attempt(**known | dict(expires=1000.0 + 2 * 3600) | changes)


def test_a_strangers_text_is_one_line_without_control_characters_and_not_too_long():
    assert printable("  a\x1b[2J\tb\r\nc  ") == "a [2J b c"
    assert printable("x" * 300) == "x" * 200
    assert printable(1.5, 2) == "1."


# --- costs ---


def test_a_cost_is_hours_and_gigabytes_times_their_rates():
    cost = RATES.cost(running_h=2, existing_h=3, gb_up=5, gb_down=10)
    assert (cost.gpu, cost.disk, cost.traffic) == pytest.approx((0.8, 0.3, 0.2))
    assert cost.total == pytest.approx(1.3)
    assert Cost(1, 2, 3) + Cost(10, 20, 30) == Cost(11, 22, 33)
    assert str(Cost(0.05, 0.01, 0.01)) == "$0.070 (GPU 0.050, disk 0.010, traffic 0.010)"
    assert str(Cost(2, 0.5, 0)) == "$2.50 (GPU 2.00, disk 0.50, traffic 0.00)"


def test_the_gpu_is_charged_while_it_runs_and_the_disk_from_the_order_on():
    machine = attempt()
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
    machine = attempt(id=4)
    machine.seen("running", 2000)
    machine.vanished(1e9)
    assert machine.gone == 1000 + 7200
    assert machine.cost(2e9).gpu == pytest.approx(0.4 * (7200 - 1000) / 3600)
    late = attempt(id=4)
    late.ended(1e9, "done")  # a killed command's, found gone days later: it ended itself
    assert late.gone == 1000 + 7200 + 120


def test_an_order_that_was_never_made_costs_nothing_and_one_that_appears_late_does():
    machine = attempt(planned_down=4.0, gb_down=4.0)
    machine.not_made("lost")
    assert machine.cost(9e9).total == 0
    machine.made_late(12, 2800)
    assert machine.cost(9e9).gpu == pytest.approx(0.4 * 1800 / 3600)
    assert machine.cost(9e9).traffic == pytest.approx(0.04)


# --- the budget ---


def test_a_machine_counts_with_its_worst_until_it_is_gone(tmp_path):
    first, second = attempt(planned_up=1.0, planned_down=4.0), attempt()
    worst = 0.5 * (2 + 2 / 60) + 0.02 * 1 + 0.01 * 4
    ledger = Ledger(tmp_path, 1, worst + 1.1)
    (record,) = ledger.shards
    ledger.enter(record, first)
    assert ledger.committed() == pytest.approx(worst)
    ledger.enter(record, second)
    with pytest.raises(OverBudget):
        ledger.enter(record, attempt())
    assert len(record.attempts) == 2
    first.ended(1000 + 360, "done")  # cost 0.1 h of disk
    assert ledger.committed() == pytest.approx(0.01 + 0.5 * (2 + 2 / 60))
    assert ledger.hours_left(RATES, traffic=0.0) > 2
    ledger.enter(record, attempt())


def test_what_is_left_is_said_in_hours(tmp_path):
    ledger = Ledger(tmp_path, 1, 1.0)
    assert ledger.hours_left(RATES, traffic=0.25) == pytest.approx(0.75 / 0.5 - 2 / 60)
    assert ledger.hours_left(Rates(0, 0, 0, 0), traffic=0.0) == float("inf")


def test_records_come_back_from_disk_as_they_were(tmp_path):
    ledger = Ledger(tmp_path, 2)
    record = ledger.shards[1]
    record.avoid = [7, 9]
    ledger.enter(record, attempt(id=4))
    record.attempts[0].seen("running", 1200.0)
    ledger.save(record)
    first, again = Ledger(tmp_path, 2).shards
    assert again == record
    assert again.attempts[0].rates == RATES
    assert (again.done, again.current.id) == (False, 4)
    assert first == ShardRecord(1)
    assert Ledger(tmp_path, 2).spent().disk > 0
