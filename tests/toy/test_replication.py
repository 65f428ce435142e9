"""Verdict and comparison with the record, on planted tables."""

import pytest

from sparse_coding.toy import replication
from sparse_coding.toy.replication import (
    compare_with_record,
    record_cells,
    record_of_june2023,
    verdict,
)


def row(alpha: float, ratio: float, mmcs: float, larger: float | None, seed: int = 0) -> dict:
    return {
        "seed": seed,
        "arch": "relu",
        "target_l0": None,
        "l1_alpha": alpha,
        "dict_ratio": ratio,
        "n_dict": int(8 * ratio),
        "mmcs": mmcs,
        "mmcs_with_larger": larger,
        "n_recovered": 3,
        "n_dead": 1,
        "l0": 2.5,
        "mse": 0.1,
    }


def table(shift: int) -> list[dict]:
    """mmcs peaks at the middle of five alphas, mmcs_with_larger `shift` steps further right."""
    peak = [0.2, 0.5, 0.9, 0.4, 0.3]
    return [
        row(10**i, ratio, peak[i], peak[i - shift] if ratio < 4 else None)
        for ratio in (1.0, 2.0, 4.0)
        for i in range(5)
    ]


def test_verdict_names_the_best_cell_and_says_whether_the_peaks_agree():
    assert "Best mmcs 0.900 at relu, l1_alpha 100, dict_ratio 1" in verdict(table(0))
    assert "mmcs_with_larger points at" in verdict(table(1))
    assert "1 at dict_ratio 1, 1 at dict_ratio 2" in verdict(table(1))
    assert "mmcs_with_larger does not point at" in verdict(table(2))


def test_verdict_leaves_out_diverged_cells_and_counts_them():
    rows = table(0)
    rows[0] |= {"mmcs": float("nan"), "mse": float("nan")}
    assert "1 cells diverged" in verdict(rows)
    assert "Best mmcs 0.900" in verdict(rows)
    nothing = [row | {"mse": float("nan")} for row in rows]
    assert "All 15 cells diverged" in verdict(nothing)


def test_verdict_says_nothing_about_peaks_where_there_is_nothing_to_compare():
    rows = [r for r in table(0) if r["dict_ratio"] == 4]
    assert "mmcs_with_larger" not in verdict(rows)


def test_record_holds_the_tabulated_cells_and_names_its_source():
    record = record_of_june2023()
    assert record["n_steps"] == 5000
    assert record["tolerance"] == 0.03
    assert "HoagyC/sparse_coding" in record["source"]
    sizes = [(cell.n_dict, cell.l1_exp) for cell in record_cells(range(1), 512)]
    assert sizes == [(512, -2), (512, 0), (256, -2)]
    assert len(record_cells(range(3), 512)) == 9


@pytest.mark.parametrize(("off", "agrees"), [(0.02, True), (-0.02, True), (0.05, False)])
def test_comparison_passes_within_the_tolerance_of_the_mean_over_seeds(capsys, off, agrees):
    means = [0.81, 0.195, 0.314]  # of the record
    rows = [
        row(cell.l1_alpha, cell.size_ratio, mean + off + wobble, None, seed)
        for seed, wobble in ((0, -0.04), (1, 0.04))
        for cell, mean in zip(replication.record_cells(range(1), 512), means, strict=True)
    ]
    assert compare_with_record(rows) is agrees
    assert capsys.readouterr().out.count("pass" if agrees else "FAIL") == 3
