"""A grid of all families at once: the same bits however it is stopped, split or threaded."""

from pathlib import Path

import pytest
from builders.scripts import ROOT, TRAINING, Server, assert_done, run_script, table
from builders.toy_sweep import OFTEN, TINY, assert_same_numbers

from sparse_coding.sae.families import TRAINED

# 7 families x 2 sizes x 2 sparsities x 2 seeds
MIXED = (*TINY, "--arch", *TRAINED, "--target-l0", "2", "4", "--dict-ratio-exp-low", "0",
         "--n-steps", "120", "--output-dir", "run")  # fmt: skip


@pytest.fixture(scope="module")
def mixed(toy_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the mixed grid, run once. Nobody may write to it."""
    cwd = tmp_path_factory.mktemp("mixed")
    assert_done(toy_server.run(*MIXED, cwd=cwd, patch=OFTEN))
    return cwd / "run"


def test_a_grid_of_all_families_has_a_row_for_each(mixed: Path):
    rows = table(mixed)
    asked = [(r["seed"], r["n_dict"], r["arch"], r["target_l0"]) for r in rows]
    sizes = ("16", "32")
    assert asked == [(s, n, a, k) for s in "01" for n in sizes for a in TRAINED for k in "24"]
    for row in rows:
        assert 0 < float(row["fvu"]) < 1.2, row  # b_dec is fixed at 0
        if row["arch"] == "topk":
            assert float(row["l0"]) <= int(row["target_l0"])
        if row["l0_trained"]:
            assert float(row["l0_trained"]) == pytest.approx(int(row["target_l0"]), abs=0.01)


@pytest.mark.long
def test_killed_ten_times_it_ends_with_the_same_bits(
    mixed: Path, toy_server: Server, tmp_path: Path
):
    for call in (2, 3, 1, 2, 3, 2, 2, 1, 3, 2):  # of this start; 24 in all
        process = toy_server.start(*MIXED, cwd=tmp_path, patch=OFTEN, pause_at=(TRAINING, call))
        process.wait_until_paused()
        process.kill()
    assert_done(toy_server.run(*MIXED, cwd=tmp_path, patch=OFTEN))
    assert_same_numbers(tmp_path / "run", mixed)


@pytest.mark.long
@pytest.mark.parametrize("n_threads", ["1", "2"])
def test_three_shards_of_any_number_of_threads_have_the_same_bits(
    mixed: Path, toy_server: Server, tmp_path: Path, n_threads: str
):
    command = [ROOT / "replicate_toy_models.py", *MIXED]
    for shard in ("1/3", "2/3", "3/3"):
        done = run_script(
            [*command, "--shard", shard],
            cwd=tmp_path,
            more_environment={"OMP_NUM_THREADS": n_threads},
        )
        assert_done(done)
    assert_done(toy_server.run(*MIXED, cwd=tmp_path, patch=OFTEN))
    assert_same_numbers(tmp_path / "run", mixed)
