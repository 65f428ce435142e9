"""Two processes in one folder: one is refused in a line, or both end; the bits are the same."""

import random
import time
from pathlib import Path

import pytest
from builders.scripts import Done, assert_done, assert_refused


def assert_ended_or_refused(done: Done) -> None:
    """Refused only because of the other one."""
    if done.code == 2:
        assert_refused(done, "another process is running in run")
    else:
        assert_done(done)


@pytest.mark.long
@pytest.mark.share(2)
@pytest.mark.parametrize("pair", range(12))
@pytest.mark.parametrize("script", ["toy", "language"])
def test_of_two_at_once_one_is_refused_or_both_end(
    script, pair, two_groups, tmp_path, record_property
):
    """The second comes while the first stands still at one of its operations on files; the first
    goes on some time later."""
    sweep, rng, cwd = two_groups(script), random.Random(f"{script} {pair}"), tmp_path / "cwd"
    cwd.mkdir()
    log = f"{cwd}.log"
    fault = {"kinds": ["open", "write", "fsync", "replace"], "below": str(cwd), "log": log}
    fault |= {"k": rng.randint(1, sweep.n_operations(fault["kinds"])), "then": "pauses"}
    fresh = [["--fresh"] if rng.random() < 0.4 else [] for _ in range(2)]
    first = sweep.start(*fresh[0], cwd=cwd, before=("inject", fault))
    first.wait_until(Path(f"{log}.paused").exists)
    second = sweep.start(*fresh[1], cwd=cwd)
    time.sleep(rng.uniform(0.0, 1.0))
    Path(f"{log}.resumed").touch()
    both = [process.wait() for process in (first, second)]
    for done in both:
        assert_ended_or_refused(done)
    assert any(done.code == 0 for done in both)
    sweep.finish(cwd=cwd)
    record_property("pairs of processes", 1)
