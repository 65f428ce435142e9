"""SIGKILL wherever it comes: the same command ends in the same bits, and leaves no litter."""

import random
import signal
import time

import pytest
from builders.language_sweep import HARVEST
from builders.scripts import TRAINING, Done

SCRIPTS = ["toy", "language"]
KILLED = -signal.SIGKILL


def is_killed(done: Done) -> bool:
    """Whether the signal came before the run ended, which it did well until then."""
    assert done.code in (0, KILLED), done.err
    assert done.err_lines == []
    return done.code == KILLED


def fresh_if(finished: bool) -> list[str]:
    """A run that has ended is begun again, so that there is something to kill."""
    return ["--fresh"] if finished else []


@pytest.mark.long
@pytest.mark.share(2)
@pytest.mark.parametrize("series", range(8))
@pytest.mark.parametrize("script", SCRIPTS)
def test_kills_inside_the_writers(script, series, two_groups, tmp_path, record_property):
    """Before an open, fsync, replace or unlink, and half way through a write."""
    sweep, rng, n_killed = two_groups(script), random.Random(f"{script} {series}"), 0
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    for _ in range(6):
        more = fresh_if((cwd / "run/DONE").exists())
        k = rng.randint(1, sweep.n_operations() // 2)
        done, _ = sweep.disturbed(*more, cwd=cwd, k=k, then="kills")
        n_killed += is_killed(done)
    sweep.finish(cwd=cwd)
    record_property("SIGKILLs", n_killed)


@pytest.mark.long
@pytest.mark.share(1)
@pytest.mark.parametrize("series", range(4))
@pytest.mark.parametrize("script", SCRIPTS)
def test_kills_at_any_moment(script, series, two_groups, tmp_path, record_property):
    sweep, rng, n_killed = two_groups(script), random.Random(f"{script} {series}"), 0
    for _ in range(5):
        more = fresh_if((tmp_path / "run/DONE").exists())
        process = sweep.start(*more, cwd=tmp_path)
        time.sleep(rng.uniform(0.0, 1.0))
        process.signal(signal.SIGKILL)
        n_killed += is_killed(process.wait())
    sweep.finish(cwd=tmp_path)
    record_property("SIGKILLs", n_killed)


END = [(f"sparse_coding.sweep.script.{name}", 1) for name in ("write_csv", "close_run_folder")]
POINTS = {  # in the order in which a run comes to them, calls counted from each start
    "toy": [
        ("sparse_coding.sweep.run_folder.write_record", 1),
        (TRAINING, 1), (TRAINING, 3),
        ("sparse_coding.toy.recipe.save_sae", 2),
        ("sparse_coding.sweep.training.mark_done", 2),
        (TRAINING, 2),
        ("sparse_coding.sweep.training.mark_done", 1),
        ("sparse_coding.toy.recipe.merged_rows", 1),
        *END,
    ],
    "language": [
        ("sparse_coding.lm.corpus._write_index", 1),
        (HARVEST, 1), (HARVEST, 2),
        (TRAINING, 1), (TRAINING, 4),
        ("sparse_coding.sweep.training.mark_done", 1),
        (TRAINING, 2),
        ("sparse_coding.lm.recipe.merged_rows", 1),
        ("sparse_coding.lm.show.write_pages", 1),
        ("sparse_coding.lm.show.draw_figures", 1),
        *END,
    ],
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("script", SCRIPTS)
def test_kills_in_each_phase(script, two_groups, tmp_path, record_property):
    sweep = two_groups(script)
    for point in POINTS[script]:
        process = sweep.start(cwd=tmp_path, pause_at=point)
        process.wait_until_paused()
        process.signal(signal.SIGKILL)
        assert is_killed(process.wait())
    sweep.finish(cwd=tmp_path)
    record_property("SIGKILLs", len(POINTS[script]))


@pytest.mark.long
@pytest.mark.share(1)
@pytest.mark.parametrize("series", range(3))
@pytest.mark.parametrize("script", SCRIPTS)
def test_kills_of_two_shards_at_once_and_of_their_merge(
    script, series, two_groups, tmp_path, record_property
):
    sweep, rng, n_killed = two_groups(script), random.Random(f"{script} {series}"), 0
    cwd, n = tmp_path / "cwd", sweep.n_operations()
    cwd.mkdir()
    for highest in (n // 3, n // 3, n):
        shards = []
        for shard in ("1/2", "2/2"):
            fault = {"kinds": ["open", "write", "fsync", "replace"], "below": str(cwd)}
            fault |= {"log": f"{cwd}-{shard[0]}.log", "k": rng.randint(1, highest)}
            before = ("inject", fault | {"then": "kills"})
            shards.append(sweep.start("--shard", shard, cwd=cwd, before=before))
        n_killed += sum([is_killed(shard.wait()) for shard in shards])
    for shard in ("1/2", "2/2"):
        assert not is_killed(sweep.run("--shard", shard, cwd=cwd))
    for _ in range(3):
        done, _ = sweep.disturbed(cwd=cwd, k=rng.randint(1, 20), then="kills")
        n_killed += is_killed(done)
    sweep.finish(cwd=cwd)
    record_property("SIGKILLs", n_killed)
