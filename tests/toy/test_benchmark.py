"""Ours beside the numbers of others, and the spread of worlds, on planted tables."""

import json
from statistics import fmean, stdev

import pytest
import torch

from sparse_coding.toy import benchmark
from sparse_coding.toy.benchmark import (
    METRICS,
    comparison,
    print_comparisons,
    references,
    spread,
    verdict,
)
from sparse_coding.toy.data import ToyData
from sparse_coding.toy.laws import SynthData

BIG = SynthData("synth", 768, 16384, batch_size=1024)
SAMPLES = 195_312 * 1024


def row(arch="batchtopk", *, seed=0, world=42, by_batch=True, **values) -> dict:
    known = dict.fromkeys((*METRICS, "fvu"), 0.5) | values
    trained = {f"{name}_trained": None for name in (*METRICS, "fvu")}
    if by_batch:  # saved ones are not what is compared
        trained = {f"{name}_trained": known[name] for name in ("f1", "fvu")}
        known |= {"f1": 0.0, "fvu": 9.0}
    cell = {"arch": arch, "seed": seed, "world": world, "n_dict": 4096, "target_l0": 25}
    return cell | {"l1_alpha": None} | known | trained


def published(arch: str) -> dict:
    (table,) = references([row()], BIG, SAMPLES)
    return next(r for r in table["rows"] if (r["arch"], r["target_l0"]) == (arch, 25))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_published_numbers_are_those_of_the_benchmark():
    assert published("matryoshka")["f1"] == [0.8793, 0.0021]
    assert published("batchtopk")["mcc"] == [0.7574, 0.0003]
    assert published("relu")["uniqueness"] == [0.8976, 0.0021]
    assert published("jumprelu")["explained_variance"] == [0.7951, 0.0004]


@pytest.mark.parametrize(
    ("data", "samples"),
    [
        (SynthData("synth_v1", 768, 16384, batch_size=1024), SAMPLES),
        (SynthData("synth", 512, 16384, batch_size=1024), SAMPLES),
        (BIG, SAMPLES // 2),
        (ToyData("post", 768, 16384, 3, 0.9, 0.0, 1024), SAMPLES),
    ],
)
def test_other_laws_sizes_and_lengths_have_no_reference(data, samples):
    assert references([row()], data, samples) == []
    assert len(references([row()], BIG, SAMPLES)) == 1
    assert references([row() | {"n_dict": 2048}], BIG, SAMPLES) == []


def test_the_small_worlds_reference_is_for_the_world_that_it_was_measured_on():
    of_a_world = [t for t in json.loads(benchmark.REFERENCES.read_text())["tables"] if t["world"]]
    small = SynthData("synth", 96, 1024, batch_size=1024)
    for table in of_a_world:
        assert references([row() | {"n_dict": table["n_dict"]}], small, table["n_samples"]) == []
    assert all(t["n_runs"] == 5 and t["tolerance"] is None for t in of_a_world)


@pytest.mark.parametrize(("off", "verdicts"), [(0.004, "pass"), (-0.006, "FAIL")])
def test_numbers_pass_within_the_tolerance_as_trained(off, verdicts, capsys):
    ours = {name: published("jumprelu")[name][0] + off for name in METRICS}
    exact = {name: published("batchtopk")[name][0] for name in METRICS}
    rows = [
        row("jumprelu", by_batch=False, fvu=1 - ours["explained_variance"], **ours),
        row(fvu=1 - exact["explained_variance"], **exact),
    ]
    print_comparisons(rows, references(rows, BIG, SAMPLES))
    lines = capsys.readouterr().out.splitlines()
    of_jump = [line for line in lines if line.startswith("jumprelu")]
    of_batch = [line for line in lines if line.startswith("batchtopk")]
    assert (len(of_jump), len(of_batch)) == (4, 4)
    assert all(verdicts in line for line in of_jump)
    assert all("pass" in line and "+0.0000" in line for line in of_batch)


def test_without_a_tolerance_two_standard_errors_of_the_difference_count():
    table = {
        "n_dict": 4096, "n_runs": 4, "tolerance": None,
        "rows": [{"arch": "batchtopk", "target_l0": 25} | {m: [0.5, 0.04] for m in METRICS}],
    }  # fmt: skip
    rows = [row(seed=seed, mcc=0.5 + 0.03 * seed) for seed in range(3)]
    found = {metric: allowed for _, metric, _, allowed in comparison(rows, table)}
    assert found["mcc"] == pytest.approx(2 * (0.03**2 / 3 + 0.04**2 / 4) ** 0.5)
    assert found["f1"] == pytest.approx(2 * 0.04 / 4**0.5)  # ours do not vary
    alone = {metric: allowed for _, metric, _, allowed in comparison(rows[:1], table)}
    assert alone["mcc"] == pytest.approx(2 * (0.04**2 + 0.04**2 / 4) ** 0.5)  # as theirs do


def test_the_spread_of_worlds_is_what_is_left_beside_that_of_seeds():
    """300 worlds of sd .03 with two seeds of sd .01 each."""
    rng = torch.Generator().manual_seed(0)
    worlds = 0.5 + 0.03 * torch.randn(300, 1, generator=rng)
    values = (worlds + 0.01 * torch.randn(300, 2, generator=rng)).tolist()
    rows = [
        row(seed=seed, world=world, mcc=mcc)
        for world, of_world in enumerate(values)
        for seed, mcc in enumerate(of_world)
    ]
    found = {metric: numbers for _, metric, *numbers in spread(rows)}
    mean, between, within = found["mcc"]
    assert mean == pytest.approx(fmean(map(fmean, values)))
    assert between == pytest.approx(0.03, rel=0.15)
    assert within == pytest.approx(0.01, rel=0.15)
    assert found["f1"] == [0.5, 0.0, 0.0]


def test_seeds_alone_give_worlds_no_spread_and_one_world_has_none():
    values = {(0, 0): 0.4, (0, 1): 0.6, (1, 0): 0.6, (1, 1): 0.4}  # the means are equal
    rows = [row(world=w, seed=s, mcc=v) for (w, s), v in values.items()]
    found = {metric: numbers for _, metric, *numbers in spread(rows)}
    assert found["mcc"] == pytest.approx([0.5, 0.0, stdev([0.4, 0.6])])
    assert list(spread(rows[:2])) == []
    assert list(spread(rows[::2])) == []  # one seed of each


# --- the verdict ---


def test_the_verdict_names_what_finds_the_features_and_what_reconstructs():
    rows = [row(seed=seed, f1=0.5 + 0.1 * seed, mcc=0.7, fvu=0.15, mse=1.0) for seed in (0, 1)]
    rows += [row("relu", by_batch=False, f1=0.6, mcc=0.8, fvu=0.25, mse=1.0)]
    text = verdict(rows, BIG)
    assert "found best by relu, l0 25 (f1 0.600, mcc 0.800, explained variance 0.750)" in text
    assert "reconstructed best by batchtopk, l0 25 (f1 0.550, mcc 0.700" in text
    assert "found best, and x is reconstructed best, by relu" in verdict(rows[2:], BIG)
    assert "diverged" in verdict([row(mse=float("nan"))], BIG)


def test_the_verdict_of_sparse_but_wrong_is_the_l0_of_the_least_projection():
    data = SynthData("correlated", 60, 50, batch_size=64)
    rows = [
        row(seed=seed, world=42, mse=1.0, s_dec=abs(k - 11) + seed, mcc=1 - k / 100)
        | {"target_l0": k}
        for k in (9, 11, 13)
        for seed in (0, 1)
    ]
    text = verdict(rows, data)
    assert "least at batchtopk, l0 11: there rows match" in text
    assert "(mcc) of 0.890" in text
    assert "On average 10.95 features are on." in text
