"""Signals are noted, checkpoints keep their share of the time, records are whole."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch

from sparse_coding.sae.ensemble import Ensemble
from sparse_coding.sae.spec import SAESpec
from sparse_coding.sweep import training
from sparse_coding.sweep.run_folder import CheckpointStore
from sparse_coding.sweep.tracking import Tracker
from sparse_coding.sweep.training import CheckpointClock, Progress, StopSignal, train_


class Time:
    """A clock that is set by hand."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch) -> Time:
    clock = Time()
    monkeypatch.setattr(training, "time", clock)
    return clock


@pytest.fixture
def tracker(tmp_path):
    one = Tracker(tmp_path, mode="disabled", project="p", run_name="r", config={})
    yield one
    one.close()


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def started(tracker, *, better=min, values=None) -> Progress:
    progress = Progress(tracker, n_groups=2, n_steps=100, log_every=10,
                        headline=("train/fvu", better))  # fmt: skip
    values = values or {"train/fvu": [0.5, 0.25], "train/l0": [3.0, 4.0]}
    progress.start_group(["a", "b"], info={"seed": 7, "group": "g"}, measure=lambda x: values)
    progress.resumed(0)
    return progress


# --- signals ---


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_acts(signum):
    received = []
    before = signal.signal(signum, lambda number, frame: received.append(number))
    try:
        with StopSignal() as stop:
            assert stop.signum is None
            os.kill(os.getpid(), signum)
            assert (stop.signum, received) == (signum, [])
            os.kill(os.getpid(), signum)
            assert received == [signum]
        os.kill(os.getpid(), signum)
        assert received == [signum, signum]
    finally:
        signal.signal(signum, before)


def test_handlers_are_as_before_afterwards_also_after_an_exception():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ValueError, match="x"), StopSignal():
        raise ValueError("x")
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


# --- checkpoints ---


def test_a_checkpoint_is_due_every_ten_seconds_where_writing_is_quick(time):
    clock = CheckpointClock()
    for wait, due in ((9.9, False), (10.0, True)):
        time.now = 1000 + wait
        assert clock.due() is due
    clock.written(0.4)  # 4 %
    for wait, due in ((9.9, False), (10.0, True)):
        time.now = 1010 + wait
        assert clock.due() is due


def test_slow_checkpoints_come_so_rarely_that_they_take_a_twentieth_of_the_time(time):
    clock = CheckpointClock()
    clock.written(3.0)
    for wait, due in ((59.9, False), (60.0, True)):
        time.now = 1000 + wait
        assert clock.due() is due
    clock.written(0.1)  # quick again
    time.now += 10
    assert clock.due()


# --- the loop ---


def test_a_batch_is_made_by_one_thread_however_few_steps_are_taken_at_a_time(tmp_path, tracker):
    """Or its last bits could depend on OMP_NUM_THREADS."""
    ensemble = Ensemble([SAESpec(8, 1e-3, 0)], 8, lr=1e-3, device=torch.device("cpu"))
    ensemble.engine.steps_at_a_time = 1  # as in grids of many weights
    n_threads, makers = torch.get_num_threads(), []

    def batch_at(step: int) -> torch.Tensor:
        makers.append(torch.get_num_threads())
        return torch.zeros(4, 8)

    torch.set_num_threads(2)
    try:
        options = dict(n_steps=3, checkpoints=CheckpointStore(tmp_path / "c"), info={})
        with StopSignal() as stop:
            train_(ensemble, batch_at, progress=started(tracker), stop=stop, **options)
    finally:
        torch.set_num_threads(n_threads)
    assert makers == [1, 1, 1]


# --- records ---


def test_a_record_has_every_value_of_every_cell_and_the_speed(tracker, tmp_path, time):
    progress = started(tracker)
    time.now += 4
    progress.log(10, torch.zeros(1))
    time.now += 2
    progress.log(20, torch.zeros(1))
    first, second = records(tmp_path)
    assert first == {
        "step": 10, "seed": 7, "group": "g", "perf/sae_steps_per_s": 5.0,  # 10 · 2 / 4 s
        "train/fvu/a": 0.5, "train/fvu/b": 0.25, "train/l0/a": 3.0, "train/l0/b": 4.0,
    }  # fmt: skip
    assert (second["step"], second["perf/sae_steps_per_s"]) == (20, 10.0)


def test_measures_on_the_batch_it_is_given(tracker):
    progress, seen = started(tracker), []
    progress.measure = lambda x: seen.append(x) or {"train/fvu": [0.1, 0.2]}
    x = torch.arange(3)
    progress.log(10, x)
    assert seen == [x]


@pytest.mark.parametrize(("better", "best"), [(min, 0.25), (max, 0.5)])
def test_the_bar_shows_the_best_cell_so_far(tracker, better, best):
    progress = started(tracker, better=better)
    progress.log(10, torch.zeros(1))
    assert progress.best == best
    assert progress.bar.postfix.endswith(f"best fvu {best:.3f}")
    progress.measure = lambda x: {"train/fvu": [0.4, 0.3]}  # no better
    progress.log(20, torch.zeros(1))
    assert progress.best == best


def test_a_diverged_cell_is_not_the_best_and_is_null_in_the_record(tracker, tmp_path):
    values = {"train/fvu": [math.nan, math.inf]}
    progress = started(tracker, values=values)
    progress.log(10, torch.zeros(1))
    assert math.isnan(progress.best)
    values["train/fvu"] = [math.nan, 0.75]
    progress.log(20, torch.zeros(1))
    assert progress.best == 0.75
    assert [r["train/fvu/a"] for r in records(tmp_path)] == [None, None]


def test_a_resume_forgets_this_groups_later_records_only(tracker, tmp_path):
    for seed, step in ((7, 10), (8, 50), (7, 20), (7, 30)):
        tracker.log({"step": step, "seed": seed, "group": "g" if seed == 7 else "other"})
    progress = started(tracker)  # from the start: none of its own is left
    assert [(r["seed"], r["step"]) for r in records(tmp_path)] == [(8, 50)]
    for step in (10, 20, 30):
        progress.log(step, torch.zeros(1))
    progress.resumed(20)
    found = [(r["seed"], r["step"]) for r in records(tmp_path)]
    assert found == [(8, 50), (7, 10), (7, 20)]
    assert progress.bar.n == 20
    assert progress.bar.total == 200


def test_the_speed_after_a_resume_counts_only_what_was_done_since(tracker, tmp_path, time):
    progress = started(tracker)
    progress.resumed(90)
    time.now += 2
    progress.log(100, torch.zeros(1))
    assert records(tmp_path)[-1]["perf/sae_steps_per_s"] == 10.0  # 10 · 2 / 2 s
