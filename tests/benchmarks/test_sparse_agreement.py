"""The comparison of benchmarks/sparse_agreement.py, on planted runs."""

import importlib.util
from pathlib import Path

import pytest

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
        {"engine": engine, "seed": seed, **cell, "mmcs": mmcs, "n_dead": dead}
        for engine, values in (("dense", dense), ("sparse", sparse))
        for seed, (mmcs, dead) in enumerate(values)
    ]


def test_means_differences_and_standard_errors_are_those_of_pairs(script):
    (line,) = script.compare(runs([0.81, 0.87], [12, 20]))
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
    assert script.agrees(script.compare(runs(mmcs, dead))[0]) == agrees
