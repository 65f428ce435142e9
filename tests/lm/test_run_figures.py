"""The figures of run.py on disk, from rows of its results.csv."""

import csv

import numpy as np

from sparse_coding.lm.show import DENSITIES, FIGURES, FRONTIERS, draw_figures
from sparse_coding.sweep.grid import make_grid

COLUMNS = (
    *("seed", "l1_alpha", "expansion_factor", "n_dict", "n_tokens", "fvu", "l0", "mse"),
    *("dead_fraction", "ce_clean", "ce_spliced", "ce_zero", "ce_mean", "ce_recovered"),
    *("mmcs_with_larger", "n_matched_larger", "seconds"),
)


def sweep() -> list:
    return make_grid(16, seeds=range(1), l1_exps=range(-2, 1), size_exps=range(2))


def results() -> list[dict]:
    """Each column and row has a value of its own, so that a mix-up shows."""
    rows = []
    for i, cell in enumerate(sweep()):
        row = {name: (j + 1) / 100 + i / 1000 for j, name in enumerate(COLUMNS)}
        row |= {"seed": 0, "l1_alpha": cell.l1_alpha, "n_dict": cell.n_dict}
        row |= {"expansion_factor": cell.size_ratio}
        rows.append(row | ({"mmcs_with_larger": None} if cell.size_exp else {}))
    return rows


def test_every_figure_is_written_with_its_data_from_the_columns_of_results_csv(tmp_path):
    rows = results()
    density = {cell: np.full(cell.n_dict, 0.01) for cell in sweep()}
    paths = draw_figures(tmp_path, rows, density, n_tokens=1000, l1_note="sum")
    assert list(paths) == [spec.name for spec in (*FIGURES, *FRONTIERS, DENSITIES)]
    for spec in (*FIGURES, *FRONTIERS):
        with open(paths[spec.name].with_suffix(".csv"), newline="") as file:
            means = {float(line["mean"]) for line in csv.DictReader(file) if line["mean"]}
        assert means == {row[spec.column] for row in rows if row[spec.column] is not None}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths.values())


def test_no_two_figures_share_a_file_and_each_says_what_to_look_for():
    specs = (*FIGURES, *FRONTIERS, DENSITIES)
    assert len({spec.name for spec in specs}) == len(specs)
    assert all(len(spec.explanation.split(". ")) >= 2 for spec in specs)
