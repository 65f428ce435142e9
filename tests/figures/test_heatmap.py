"""Heat-maps: the averages over seeds, the text in cells and labels, colours against numbers."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from sparse_coding.figures import heatmap
from sparse_coding.figures.heatmap import HeatmapSpec, draw_heatmap, heatmap_csv, pivot, png_bytes

# Two seeds at dict_ratio 1, one at 2; at (2, 0.1) nothing ran, at (2, 1.0) the value is empty.
ROWS = [
    {"seed": 0, "l1_alpha": 1.0, "dict_ratio": 2.0, "n_dead": None},
    {"seed": 1, "l1_alpha": 0.1, "dict_ratio": 1.0, "n_dead": 350},
    {"seed": 0, "l1_alpha": 0.1, "dict_ratio": 1.0, "n_dead": 300},
    {"seed": 0, "l1_alpha": 1.0, "dict_ratio": 1.0, "n_dead": 7},
]
LABELS = {"x_label": "l1_alpha (L1 divided by n_dict)", "y_label": "dict_ratio"}


def dead_spec(**changes) -> HeatmapSpec:
    """The figure of dead features: counts, colour capped at 100."""
    return HeatmapSpec(
        **{
            "name": "dead_features",
            "column": "n_dead",
            "title": "Dead features",
            "colour_label": "n_dead",
            "explanation": "Features die as l1_alpha grows. The colour stops at 100.",
            "vmin": 0,
            "vmax": 100,
            "value_format": ".0f",
            **changes,
        }
    )


def grid_rows(n_columns: int, n_rows: int, value: float = 1.6e-4) -> list[dict]:
    """One seed on l1_alpha = 10^(e/4), e from -8, and dict_ratio = 2^e, e from -3."""
    return [
        {"l1_alpha": 10 ** (i / 4 - 2), "dict_ratio": 2.0 ** (j - 3), "mse": value * (i + 1)}
        for i in range(n_columns)
        for j in range(n_rows)
    ]


def pivot_grid(rows: list[dict], column: str) -> heatmap.Heatmap:
    return pivot(rows, column, row_key="dict_ratio", column_key="l1_alpha")


def texts(figure: Figure) -> list[str]:
    figure.canvas.draw()
    return [t.get_text() for t in figure.findobj(Text) if t.get_text() and t.get_visible()]


def test_the_pivot_averages_over_seeds_and_leaves_empty_cells_nan():
    heatmap = pivot_grid(ROWS, "n_dead")
    assert heatmap.row_values == (1.0, 2.0)
    assert heatmap.column_values == (0.1, 1.0)
    np.testing.assert_array_equal(heatmap.mean, [[325, 7], [math.nan, math.nan]])
    np.testing.assert_array_equal(heatmap.n_seeds, [[2, 1], [0, 0]])


def test_the_spread_is_the_sample_standard_deviation_and_needs_two_seeds():
    std = pivot_grid(ROWS, "n_dead").std
    assert std[0, 0] == pytest.approx(50 / math.sqrt(2))  # of 300 and 350, divided by n - 1
    assert np.isnan(std).sum() == 3


def test_the_pivot_does_not_depend_on_the_order_of_the_rows():
    forward, backward = pivot_grid(ROWS, "n_dead"), pivot_grid(ROWS[::-1], "n_dead")
    np.testing.assert_array_equal(forward.mean, backward.mean)
    np.testing.assert_array_equal(forward.std, backward.std)


@pytest.mark.parametrize("empty", [None, "", math.nan])
def test_every_form_of_an_empty_value_counts_as_no_seed(empty):
    heatmap = pivot_grid([{**ROWS[1], "n_dead": empty}, ROWS[2]], "n_dead")
    assert heatmap.mean.tolist() == [[300]]
    assert heatmap.n_seeds.tolist() == [[1]]


def test_a_missing_column_is_named_with_those_that_exist():
    with pytest.raises(KeyError, match=r"no column 'mmcs'.*n_dead"):
        pivot_grid(ROWS, "mmcs")
    with pytest.raises(ValueError, match="no rows"):
        pivot_grid([], "n_dead")


def test_the_csv_has_every_cell_and_all_digits():
    assert heatmap_csv(pivot_grid(ROWS, "n_dead")) == (
        "l1_alpha,dict_ratio,mean,std,n_seeds\n"
        "0.1,1.0,325.0,35.35533905932738,2\n"
        "0.1,2.0,,,0\n"
        "1.0,1.0,7.0,,1\n"
        "1.0,2.0,,,0\n"
    )


def test_the_colour_is_capped_but_neither_the_csv_nor_the_text_is():
    heatmap = pivot_grid(ROWS, "n_dead")
    figure = draw_heatmap(heatmap, dead_spec(), **LABELS)
    image = figure.axes[0].images[0]
    assert image.norm.vmax == 100
    np.testing.assert_array_equal(image.to_rgba(325.0), image.to_rgba(np.float64(10_000)))
    assert "325" in texts(figure)
    assert "325.0" in heatmap_csv(heatmap)


@pytest.mark.parametrize(
    ("limits", "extend"),
    [((0, 100), "max"), ((0, 325), "neither"), ((100, 400), "min"), ((50, 100), "both")],
)
def test_the_colour_bar_is_pointed_where_values_lie_beyond_it(limits, extend):
    spec = dead_spec(vmin=limits[0], vmax=limits[1])
    figure = draw_heatmap(pivot_grid(ROWS, "n_dead"), spec, **LABELS)
    assert figure.axes[0].images[0].colorbar.extend == extend


def test_the_figure_says_what_its_axes_and_colours_mean():
    notes = ["chance .19", "chance .20"]
    heatmap = pivot_grid(ROWS, "n_dead")
    seen = texts(draw_heatmap(heatmap, dead_spec(), row_notes=notes, **LABELS))
    wanted = {"Dead features", "n_dead", LABELS["x_label"], "dict_ratio\nincreasing downwards"}
    assert wanted | set(notes) <= set(seen)


def test_the_smallest_ratio_is_the_top_row_and_the_smallest_l1_alpha_the_left_column():
    axes = draw_heatmap(pivot_grid(grid_rows(3, 2), "mse"), dead_spec(), **LABELS).axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0.01", "0.018", "0.032"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["1/8", "1/4"]
    assert axes.yaxis_inverted()
    assert not axes.xaxis_inverted()


def test_labels_over_the_full_range_are_distinct_and_never_print_0_00():
    labels = heatmap.number_labels(tuple(10 ** (e / 4) for e in range(-24, 17)))
    assert len(set(labels)) == len(labels)
    assert not any("0.00" in label for label in labels)
    assert labels[:2] == ["1e-6", "1.8e-6"]
    assert labels[16:21] == ["0.01", "0.018", "0.032", "0.056", "0.1"]
    assert labels[24:34] == ["1", "1.8", "3.2", "5.6", "10", "18", "32", "56", "100", "180"]


def test_labels_that_would_collide_get_more_digits():
    assert heatmap.number_labels((0.0, 1.001, 1.002)) == ["0", "1.001", "1.002"]


def test_ratios_are_written_as_fractions_and_whole_numbers():
    ratios = (0.125, 0.5, 1.0, 1.5, 32.0, 128.0)
    assert heatmap.ratio_labels(ratios) == ["1/8", "1/2", "1", "1.5", "32", "128"]
    assert heatmap.ratio_labels((0.125, 32.0), [64, 16384]) == ["1/8 (64)", "32 (16384)"]


@pytest.mark.parametrize(
    ("value", "value_format", "text"),
    [
        (0.974, ".2f", ".97"),
        (1.0, ".2f", "1.00"),
        (-0.05, ".2f", "-.05"),
        (10.04, ".2f", "10.04"),
        (16384.0, ".0f", "16384"),
        (0.0, ".0f", "0"),
        (1.62e-4, ".1e", "1.6e-4"),
    ],
)
def test_numbers_in_cells_are_short(value, value_format, text):
    assert heatmap.format_value(value, value_format) == text


def test_text_is_dark_on_bright_cells_and_bright_on_dark_ones():
    figure = draw_heatmap(pivot_grid(ROWS, "n_dead"), dead_spec(cmap="magma"), **LABELS)
    colours = {text.get_text(): text.get_color() for text in figure.axes[0].texts}
    assert (colours["325"], colours["7"]) == ("black", "white")


def test_a_grid_too_large_for_numbers_has_none_and_thins_its_labels():
    figure = draw_heatmap(pivot_grid(grid_rows(18, 2), "mse"), dead_spec(), **LABELS)
    assert [t.get_text() for t in figure.axes[0].texts] == ["one seed"]
    assert len(figure.axes[0].get_xticklabels()) == 9


def test_the_title_says_how_many_seeds_and_what_hatching_means():
    assert heatmap.subtitle(pivot_grid(ROWS[3:], "n_dead")) == "one seed"
    assert heatmap.subtitle(pivot_grid(ROWS[1:3], "n_dead")) == (
        "mean of 2 seeds; standard deviation 35 (median), 35 (largest)"
    )
    assert heatmap.subtitle(pivot_grid(ROWS, "n_dead")) == (
        "mean of 1 to 2 seeds; standard deviation 35 (median), 35 (largest); hatched: no value"
    )
    assert heatmap.subtitle(pivot_grid(ROWS[:1], "n_dead")) == "no values; hatched: no value"


@pytest.mark.parametrize("value", [0.0, 3.0, None])
@pytest.mark.parametrize("log_scale", [False, True])
@pytest.mark.filterwarnings("error")
def test_a_single_cell_can_be_drawn_whatever_is_in_it(value, log_scale):
    heatmap = pivot_grid([{"l1_alpha": 1, "dict_ratio": 1, "n_dead": value}], "n_dead")
    spec = dead_spec(vmin=None, vmax=None, log_scale=log_scale)
    figure = draw_heatmap(heatmap, spec, **LABELS)
    in_cell = [t.get_text() for t in figure.axes[0].texts if t.get_position() == (0, 0)]
    assert in_cell == ([] if value is None else [f"{value:.0f}"])
    assert png_bytes(figure).startswith(b"\x89PNG")


def test_the_png_has_the_same_bytes_twice_and_fits_a_readme():
    heatmap = pivot_grid(grid_rows(17, 9), "mse")
    spec = dead_spec(vmin=None, vmax=None, log_scale=True, value_format=".1e")
    png, again = (png_bytes(draw_heatmap(heatmap, spec, **LABELS)) for _ in range(2))
    assert png == again
    assert b"Software" not in png  # the version of matplotlib
    assert int.from_bytes(png[16:20], "big") == 1700  # width, from the PNG header
    assert len(png) < 300_000
