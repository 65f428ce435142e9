"""Frontiers and density histograms: means, what is drawn where, notes, csv, the same bytes."""

import math
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from sparse_coding.figures import frontier
from sparse_coding.figures.frontier import (
    density_counts,
    density_csv,
    draw_density_histograms,
    draw_frontier,
    frontier_csv,
    frontier_points,
)
from sparse_coding.figures.heatmap import png_bytes
from sparse_coding.lm.show import DENSITIES, FRONTIERS
from sparse_coding.sae.families import TRAINED
from sparse_coding.sweep.grid import Cell, make_grid

FVU, CE = FRONTIERS
L1_NOTE = "L1 term of the loss: l1_alpha · mean Σ codes"


def row(l1_alpha: float, expansion_factor: float, l0: float, fvu: float | None, **more) -> dict:
    """A row of results.csv, as far as the figures look."""
    common = {"arch": "relu", "target_l0": None}
    common |= {"seed": 0, "n_dict": int(64 * expansion_factor), "ce_recovered": 0.9}
    losses = {"ce_clean": 2.8, "ce_zero": 4.3, "ce_mean": 3.7}
    cell = {"l1_alpha": l1_alpha, "expansion_factor": expansion_factor, "l0": l0, "fvu": fvu}
    return common | losses | cell | more


ROWS = [
    row(0.1, 2.0, 20.0, 0.02),
    row(1.0, 1.0, 4.0, 0.4),
    row(0.1, 1.0, 15.0, 0.03),
    row(0.1, 1.0, 17.0, 0.05, seed=1),
    row(1.0, 2.0, 5.0, None),
]


def texts(figure: Figure) -> list[str]:
    figure.canvas.draw()
    return [t.get_text() for t in figure.findobj(Text) if t.get_text() and t.get_visible()]


def draw(rows: list[dict], spec=FVU) -> Figure:
    return draw_frontier(rows, spec, l1_note=L1_NOTE)


def drawn_lines(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    """The points of each labelled line."""
    bars = figure.axes[0].containers
    return {bar.get_label(): [tuple(p) for p in bar.lines[0].get_xydata()] for bar in bars}


def test_a_point_is_the_mean_over_seeds_and_lines_go_by_size_then_l0():
    points = frontier_points(ROWS, "fvu")
    assert [(p["expansion_factor"], p["l1_alpha"], p["l0"]) for p in points] == [
        (1.0, 1.0, 4.0),
        (1.0, 0.1, 16.0),
        (2.0, 0.1, 20.0),
    ]
    assert points[1]["mean"] == pytest.approx(0.04)
    assert points[1]["std"] == pytest.approx(0.02 / math.sqrt(2))  # of 0.03, 0.05 by n - 1
    assert [p["n_seeds"] for p in points] == [1, 2, 1]
    assert frontier_points(ROWS[::-1], "fvu") == points


@pytest.mark.parametrize("value", [None, "", math.nan, math.inf])
def test_a_diverged_cell_is_no_point(value):
    assert frontier_points([ROWS[0] | {"fvu": value}], "fvu") == []
    assert frontier_points([ROWS[0] | {"l0": value}], "fvu") == []


def test_the_csv_of_a_frontier_has_all_digits():
    assert frontier_csv(ROWS[:2], "fvu") == (
        "arch,expansion_factor,n_dict,target_l0,l1_alpha,l0,mean,std,n_seeds\n"
        "relu,1.0,64,,1.0,4.0,0.4,,1\n"
        "relu,2.0,128,,0.1,20.0,0.02,,1\n"
    )


def asked(arch: str, target_l0: int, ratio: float, l0: float, fvu: float, **more) -> dict:
    """A row of a cell that was asked for an l0."""
    l1_alpha = 0.1 + l0 if arch == "relu" else None  # what its controller found
    return row(l1_alpha, ratio, l0, fvu, arch=arch, target_l0=target_l0, **more)


FAMILIES = [
    asked("batchtopk", 16, 1.0, 15.5, 0.02),
    asked("batchtopk", 32, 1.0, 31.0, 0.01),
    asked("relu", 16, 1.0, 16.5, 0.05),
    asked("relu", 16, 1.0, 15.5, 0.07, seed=1),
    asked("relu", 16, 2.0, 16.0, 0.04),
    row(0.1, 1.0, 20.0, 0.05),
]


def test_a_point_is_of_one_family_and_of_what_was_asked_not_of_what_was_found():
    points = frontier_points(FAMILIES, "fvu")
    assert [(p["arch"], p["target_l0"], p["l1_alpha"], p["l0"]) for p in points] == [
        ("relu", 16, None, 16.0),
        ("relu", None, 0.1, 20.0),
        ("relu", 16, None, 16.0),
        ("batchtopk", 16, None, 15.5),
        ("batchtopk", 32, None, 31.0),
    ]
    assert points[0]["mean"] == pytest.approx(0.06)


def test_families_have_a_colour_each_and_sizes_a_marker():
    figure = draw(FAMILIES)
    assert list(drawn_lines(figure)) == ["relu, 1 (64)", "relu, 2 (128)", "batchtopk, 1 (64)"]
    bars = [bar.lines[0] for bar in figure.axes[0].containers]
    colours, markers = ([get(bar) for bar in bars] for get in (Line2D.get_color, Line2D.get_marker))
    assert colours[0] == colours[1] != colours[2]
    assert markers[0] == markers[2] != markers[1]
    assert "grey lines" not in "\n".join(texts(draw(FAMILIES[:5])))  # of l1_alpha: none


def test_a_frozen_decoder_has_the_colour_of_its_family_dashed():
    rows = [asked("topk", 16, 1.0, 16.0, 0.02), asked("topk_frozen", 16, 1.0, 16.0, 0.3)]
    bars = [bar.lines[0] for bar in draw(rows).axes[0].containers]
    assert bars[0].get_color() == bars[1].get_color()
    assert [bar.get_linestyle() for bar in bars] == ["-", "--"]


def test_the_size_of_a_toy_run_is_the_dict_ratio():
    rows = [r | {"dict_ratio": r["expansion_factor"], "expansion_factor": None} for r in ROWS]
    assert frontier_csv(rows, "fvu", "dict_ratio").startswith("arch,dict_ratio,n_dict")
    figure = draw_frontier(rows, FVU, l1_note=L1_NOTE, size="dict_ratio")
    assert list(drawn_lines(figure)) == ["1 (64)", "2 (128)"]
    assert "dict_ratio\n(n_dict)" in texts(figure)


def test_there_is_one_line_per_size_named_by_it_and_brighter_the_larger():
    figure = draw(ROWS)
    lines = drawn_lines(figure)
    assert list(lines) == ["1 (64)", "2 (128)"]
    np.testing.assert_allclose(lines["1 (64)"], [(4.0, 0.4), (16.0, 0.04)])
    colours = [bar.lines[0].get_color() for bar in figure.axes[0].containers]
    assert sum(colours[0][:3]) < sum(colours[1][:3])


def test_the_figure_says_what_its_axes_mean_and_which_ablation_was_used():
    seen = "\n".join(texts(draw(ROWS, CE)))
    wanted = (
        "l0: active features on average (log scale)",
        "ce_zero − ce_spliced",
        "ablation: zero",
    )
    wanted += (L1_NOTE, "mean of 1 to 2 seeds; bars: standard deviation")
    wanted += ("2.80 (ce_clean), +1.50 (ce_zero), +0.90 (ce_mean)",)
    assert [text for text in wanted if text not in seen] == []


@pytest.mark.parametrize(
    ("worst", "scale", "label"),
    [(0.21, "log", "fvu on held-out documents (log scale)"), (0.19, "linear", FVU.y_label)],
)
def test_fvu_is_on_a_log_scale_only_where_it_spans_over_a_decade(worst, scale, label):
    axes = draw([row(0.1, 1.0, 15.0, 0.02), row(1.0, 1.0, 4.0, worst)]).axes[0]
    assert axes.get_xscale() == "log"
    assert (axes.get_yscale(), axes.get_ylabel()) == (scale, label)


def test_l1_alpha_is_written_beside_few_points_of_the_largest_size():
    rows = [row(10 ** (e / 4), ratio, 50.0 - 3 * e, 0.1) for ratio in (1.0, 2.0) for e in range(13)]
    *labels, _notes = [t.get_text() for t in draw(rows).axes[0].texts]
    assert labels == ["1000", "320", "56", "18", "3.2", "1"]  # l0 ascends, so l1_alpha falls


def test_points_without_a_place_on_the_axes_are_counted_and_kept_in_the_csv():
    rows = [row(0.1, 1.0, 15.0, 0.5), row(10.0, 1.0, 0.0, 1.0, ce_recovered=-0.5)]
    for spec in FRONTIERS:
        figure = draw(rows, spec)
        assert len(drawn_lines(figure)["1 (64)"]) == 1
        assert any("1 points lie beyond the axes" in text for text in texts(figure))
        assert len(frontier_csv(rows, spec.column).splitlines()) == 3


@pytest.mark.parametrize("spec", FRONTIERS)
@pytest.mark.parametrize("rows", [ROWS[:1], [], [row(1.0, 1.0, 0.0, None, ce_recovered=None)]])
@pytest.mark.filterwarnings("error")
def test_a_frontier_of_one_cell_or_none_can_be_drawn(rows, spec):
    assert png_bytes(draw(rows, spec)).startswith(b"\x89PNG")


def test_a_sweep_whose_losses_were_not_measured_says_so():
    rows = [ROWS[0] | {"ce_clean": None, "ce_recovered": None}]
    assert any("cross-entropy was not measured" in text for text in texts(draw(rows, CE)))


def test_round_numbers_lie_within_the_limits():
    assert frontier._round_numbers(0.4, 130.0) == [0.5, 1, 2, 5, 10, 20, 50, 100]
    assert frontier._round_numbers(21.0, 24.0) == [21.0, 24.0]


def test_features_are_counted_by_quarter_decades_and_dead_ones_apart():
    density = np.array([0, 0, 1e-3, 1.5e-3, 2e-3, 0.05, 1.0])  # log10: -3, -2.82, -2.70, -1.30, 0
    dead, counts, edges = density_counts(density, n_tokens=1000)
    assert dead == 2
    np.testing.assert_allclose(edges, np.arange(-3, 0.01, 0.25))
    assert counts.tolist() == [2, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("n_tokens", [1000, 3, 2**20, 999_999])
def test_the_rarest_and_the_most_frequent_feature_are_in_the_histogram(n_tokens):
    density = np.array([1, 2, n_tokens], dtype=np.float32) / n_tokens
    dead, counts, _ = density_counts(density, n_tokens=n_tokens)
    assert (dead, counts.sum()) == (0, 3)


def densities(n_seeds: int = 1, **changes) -> dict[Cell, np.ndarray]:
    grid = dict(seeds=range(n_seeds), l1_exps=range(-2, 1), size_exps=range(2)) | changes
    rng = np.random.default_rng(0)
    return {cell: rng.integers(0, 50, cell.n_dict) / 1000 for cell in make_grid(64, **grid)}


def test_histograms_show_each_trained_family_equally_often_and_no_baseline():
    def shown(*families: str) -> list[str]:
        found = {
            replace(cell, arch=arch, target_l0=target_l0): density
            for cell, density in densities().items()
            for arch in families
            for target_l0 in (4, 8, 16, 32)
        }
        figure = draw_density_histograms(found, DENSITIES, n_tokens=1000)
        return [
            text.get_text()
            for axes in figure.axes
            for text in axes.texts
            if "l0 near" in text.get_text()
        ]

    assert shown("relu") == [f"l0 near {n}" for n in (4, 8, 16, 32)]
    of_two = [f"{arch}\nl0 near {n}" for arch in ("relu", "topk") for n in (4, 16, 32)]
    assert shown("relu", "relu_frozen", "topk") == of_two
    all_trained = shown(*TRAINED, "topk_frozen")
    assert len(all_trained) == 6
    assert {text.split("\n")[1] for text in all_trained} == {"l0 near 16"}


def test_the_csv_of_the_densities_has_every_feature_of_every_cell():
    cells = densities(n_seeds=2)
    lines = [line.split(",") for line in density_csv(cells, n_tokens=1000).splitlines()]
    assert ",".join(lines[0]) == (
        "cell,arch,target_l0,l1_alpha,n_dict,log10_low,log10_high,n_features"
    )
    for cell, density in cells.items():
        own = [line for line in lines[1:] if line[0] == cell.name]
        assert len(own) == 1 + 12
        assert own[0][5:] == ["", "", str((density == 0).sum())]
        assert sum(int(line[7]) for line in own) == cell.n_dict


def test_panels_are_sizes_down_and_l1_alphas_across_with_their_dead_features():
    cells = densities()
    cells[min(cells, key=lambda c: (c.n_dict, c.l1_exp))][:] = 0.0
    figure = draw_density_histograms(cells, DENSITIES, n_tokens=1000)
    seen = texts(figure)
    assert len(figure.axes) == 6
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == ["1 (64)", "2 (128)"]
    assert [t for t in seen if t.startswith("l1_alpha")] == [
        "l1_alpha 0.32",
        "l1_alpha 0.56",
        "l1_alpha 1",
    ]
    assert "64 dead (100 %)" in seen
    assert any("1,000 held-out tokens, seed 0" in text for text in seen)


def test_bars_are_per_cent_of_all_features_of_the_dictionary():
    cell = Cell(seed=0, l1_exp=0, size_exp=0, n_dict=4)
    figure = draw_density_histograms({cell: np.array([0, 0.5, 0.5, 0.01])}, DENSITIES, n_tokens=100)
    values = figure.axes[0].patches[0].get_data().values
    assert values.tolist() == [25, 0, 0, 0, 0, 0, 50, 0]


def test_of_several_seeds_the_first_is_shown():
    cells = {cell: d * (cell.seed == 0) for cell, d in densities(n_seeds=2).items()}
    seen = texts(draw_density_histograms(cells, DENSITIES, n_tokens=1000))
    assert not any("100 %" in text for text in seen)
    assert any("seed 0" in text for text in seen)


def test_a_large_grid_shows_at_most_six_by_six_with_both_ends():
    cells = densities(l1_exps=range(-8, 9), size_exps=range(-4, 5))
    figure = draw_density_histograms(cells, DENSITIES, n_tokens=1000)
    assert len(figure.axes) == 36
    labels = [axes.get_ylabel() for axes in figure.axes[::6]]
    assert (labels[0], labels[-1]) == ("1/16 (4)", "16 (1024)")


@pytest.mark.filterwarnings("error")
def test_a_missing_cell_is_a_grey_panel_and_target_l0s_are_columns_too():
    cells = {Cell(0, -4, size, 64 * 2**size, target_l0=l0): np.full(64 * 2**size, 0.01)
             for size, l0 in ((0, 16), (1, 16), (0, 32))}  # fmt: skip
    figure = draw_density_histograms(cells, DENSITIES, n_tokens=1000)
    assert {"l0 near 16", "l0 near 32"} <= set(texts(figure))
    assert figure.axes[3].get_facecolor()[:3] == (0.92, 0.92, 0.92)
    assert not figure.axes[3].patches


def test_the_same_numbers_give_the_same_bytes_that_fit_a_readme():
    for make in (
        lambda: draw(ROWS),
        lambda: draw_density_histograms(densities(), DENSITIES, n_tokens=1000),
    ):
        png, again = png_bytes(make()), png_bytes(make())
        assert png == again
        assert int.from_bytes(png[16:20], "big") == 1700  # width, from the PNG header
        assert len(png) < 300_000
