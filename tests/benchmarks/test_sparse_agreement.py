"""The comparison of benchmarks/sparse_agreement.py, on planted runs."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_coding.config import UserError

PAIR = ("dense", "sparse")
PATH = Path(__file__).parents[2] / "benchmarks" / "sparse_agreement.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("sparse_agreement", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def runs(mmcs_of_sparse: list[float], dead_of_sparse: list[int]) -> list[dict]:
    """Two seeds of dense runs with mmcs .80 and .84, 10 and 20 dead; sparse ones as given."""
    cell = {"n_dict": 512, "l1_exp": -2}
    dense = [(0.80, 10), (0.84, 20)]
    sparse = zip(mmcs_of_sparse, dead_of_sparse, strict=True)
    return [
        {"way": way, "seed": seed, **cell, "mmcs": mmcs, "n_dead": dead}
        for way, values in zip(PAIR, (dense, sparse), strict=True)
        for seed, (mmcs, dead) in enumerate(values)
    ]


def test_means_differences_and_standard_errors_are_those_of_pairs(script):
    (line,) = script.compare(runs([0.81, 0.87], [12, 20]), PAIR)
    assert line["mmcs_dense"] == pytest.approx(0.82)
    assert line["mmcs_sparse"] == pytest.approx(0.84)
    assert line["mmcs_difference"] == pytest.approx(0.02)
    assert line["mmcs_standard_error"] == pytest.approx(0.01)  # of .01 and .03
    assert (line["n_dead_difference"], line["n_dead_standard_error"]) == pytest.approx((1, 1))


@pytest.mark.parametrize(
    ("mmcs", "dead", "agrees"),
    [
        ([0.805, 0.837], [12, 19], True),
        ([0.806, 0.847], [12, 19], False),  # 13 standard errors of mmcs
        ([0.79, 0.84 - 0.013], [12, 19], False),  # beyond .01 of mmcs
        ([0.805, 0.837], [20, 31], False),  # dead features
        ([0.80, 0.84], [10, 20], True),  # the same bits: a standard error of 0
    ],
)
def test_what_agrees(script, mmcs, dead, agrees):
    assert script.agrees(script.compare(runs(mmcs, dead), PAIR)[0]) == agrees


def test_an_unknown_way_is_refused_and_nothing_written(script, tmp_path):
    with pytest.raises(UserError, match="--pair sparze is not one of dense, sparse, float32, bf16"):
        script.main(["--pair", "dense", "sparze", "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_two_ways_are_two_runs_of_each_seed_and_a_table(tmp_path):
    """Sparse steps are those in float32, which any machine has."""
    flags = ["--pair", "float32", "sparse", "--n-seeds", "2", "--n-steps", "20"]
    command = [sys.executable, PATH, *flags, "--output-dir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    table = [line.split() for line in done.stdout.splitlines() if "±" in line]
    assert (done.returncode, len(table)) == (0, 6), done.stderr
    for _, _, first, second, difference, _, error, *_ in table:
        assert (first, difference, error) == (second, "+0.0000", "0.0000")
    assert len(list((tmp_path / "runs").glob("float32-seed*.csv"))) == 2
