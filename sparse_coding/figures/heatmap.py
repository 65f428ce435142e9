"""Heat-maps of a sweep: rows of results.csv in, a matplotlib Figure out.

`pivot` averages one column over seeds, `draw_heatmap` draws it (l1_alpha across, dict_ratio down),
`heatmap_csv` writes the same numbers as text. Colours may be capped with `vmin` and `vmax`; the
numbers in the cells and in the csv never are. Figures are built without pyplot, so nothing here
touches global state, and the same data gives the same PNG bytes.
"""

import io
import math
import statistics
import textwrap
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from sparse_coding.files import csv_text

DPI = 200
WIDTH = 8.5  # inches: 1700 px at 200 dpi, twice the ~850 px a README gives a figure
MAX_ANNOTATED = (9, 17)  # rows, columns: a larger grid has no room for a number in each cell
GREY = "0.35"  # secondary text: dark enough to read on white (contrast 7:1)


@dataclass(frozen=True)
class HeatmapSpec:
    """How one column of results.csv is drawn."""

    name: str  # file stem: figures/<name>.png and figures/<name>.csv
    column: str  # column of results.csv
    title: str
    colour_label: str  # what the colour bar measures, with its unit
    explanation: str  # two sentences for the report: what to look for
    vmin: float | None = None  # ends of the colour scale; None takes the data's own
    vmax: float | None = None
    log_scale: bool = False
    value_format: str = ".2f"  # format spec of the number in a cell; a leading zero is dropped
    cmap: str = "viridis"  # keep it perceptually uniform: viridis, magma, cividis

    @property
    def alt(self) -> str:
        """What is drawn, for those who don't see it."""
        return f"Heat-map: {self.title}; colour shows {self.colour_label}"


@dataclass(frozen=True)
class Heatmap:
    """One column over the grid. The arrays are (n_rows, n_columns), with nan where empty."""

    row_key: str
    column_key: str
    row_values: tuple[float, ...]  # ascending
    column_values: tuple[float, ...]  # ascending
    mean: np.ndarray  # over seeds
    std: np.ndarray  # sample standard deviation over seeds; nan below two seeds
    n_seeds: np.ndarray  # seeds with a value, 0 in an empty cell


def pivot(rows: list[dict], column: str, *, row_key: str, column_key: str) -> Heatmap:
    """Mean and spread of `column` over seeds for each (row_key, column_key).

    The grid has exactly the values present in the rows. Grid values are matched by equality, which
    is safe here because csv keeps all digits and every seed computes them by the same expression.
    """
    if not rows:
        raise ValueError(f"no rows to pivot {column!r} from: has any cell of the sweep finished?")
    for key in (column, row_key, column_key):
        if key not in rows[0]:
            raise KeyError(f"no column {key!r} in the results; they have {', '.join(rows[0])}")
    row_values = sorted({row[row_key] for row in rows})
    column_values = sorted({row[column_key] for row in rows})
    cells = defaultdict(list)
    for row in rows:
        if not _is_empty(row[column]):
            cells[row[row_key], row[column_key]].append(float(row[column]))
    grid = [[cells[r, c] for c in column_values] for r in row_values]
    return Heatmap(
        row_key=row_key,
        column_key=column_key,
        row_values=tuple(row_values),
        column_values=tuple(column_values),
        mean=np.array([[statistics.fmean(v) if v else math.nan for v in line] for line in grid]),
        std=np.array([[statistics.stdev(v) if v[1:] else math.nan for v in line] for line in grid]),
        n_seeds=np.array([[len(v) for v in line] for line in grid]),
    )


def heatmap_csv(heatmap: Heatmap) -> str:
    """The heat-map as text, one line per cell, all digits, never capped; empty where nan."""
    rows = []
    for j, column_value in enumerate(heatmap.column_values):
        for i, row_value in enumerate(heatmap.row_values):
            numbers = {"mean": float(heatmap.mean[i, j]), "std": float(heatmap.std[i, j])}
            rows.append(
                {heatmap.column_key: column_value, heatmap.row_key: row_value}
                | {name: None if math.isnan(number) else number for name, number in numbers.items()}
                | {"n_seeds": heatmap.n_seeds[i, j]}
            )
    return csv_text(rows)


def draw_heatmap(
    heatmap: Heatmap,
    spec: HeatmapSpec,
    *,
    x_label: str,
    y_label: str,
    row_labels: list[str] | None = None,
    row_notes: list[str] | None = None,
) -> Figure:
    """One heat-map: columns ascend to the right, rows ascend downwards.

    `row_labels` replaces the tick labels at the left ("1/8 (64)"), `row_notes` stands at the right
    of each row ("chance .15, max .25"). Empty cells are hatched.
    """
    n_rows, n_columns = heatmap.mean.shape
    row_height = min(max(0.36, 1.5 / n_rows), 4.5 / n_rows)  # inches: 9 rows 3.2, 1 row 1.5
    figure = Figure((WIDTH, 1.75 + n_rows * row_height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    norm = _norm(heatmap, spec)
    # A log scale has no colour for 0: such a cell takes the lowest colour, its text stays 0.
    colours = np.maximum(heatmap.mean, norm.vmin) if spec.log_scale else heatmap.mean
    image = axes.imshow(np.ma.masked_invalid(colours), norm=norm, cmap=spec.cmap, aspect="auto")
    axes.patch.set(facecolor="0.92", edgecolor="0.72", hatch="////")
    if n_rows <= MAX_ANNOTATED[0] and n_columns <= MAX_ANNOTATED[1]:
        _annotate(axes, image, heatmap, spec.value_format)
    _label_axes(axes, heatmap, row_labels or ratio_labels(heatmap.row_values), row_notes)
    axes.set_xlabel(textwrap.fill(x_label, 105), fontsize=8.5)
    # A character is 0.07 inches wide; the label must not be longer than the map is high.
    y_label = textwrap.fill(y_label, round(n_rows * row_height / 0.07))
    axes.set_ylabel(f"{y_label}\nincreasing downwards", fontsize=8.5)
    axes.set_title(spec.title, loc="left", fontsize=11, fontweight="bold", pad=19)
    _small_print(axes, subtitle(heatmap))
    _add_colour_bar(figure, image, heatmap, spec)
    return figure


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG file, without the date and version that would change its bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def subtitle(heatmap: Heatmap) -> str:
    """How many seeds the figure averages, how much they scatter, and what hatching means."""
    counts = heatmap.n_seeds[heatmap.n_seeds > 0]
    least, most = (int(counts.min()), int(counts.max())) if counts.size else (0, 0)
    text = "one seed" if most else "no values"
    if most > 1:
        seeds = f"{most}" if least == most else f"{least} to {most}"
        typical, worst = (format_value(f(heatmap.std), ".2g") for f in (np.nanmedian, np.nanmax))
        text = f"mean of {seeds} seeds; standard deviation {typical} (median), {worst} (largest)"
    return text + ("; hatched: no value" if (heatmap.n_seeds == 0).any() else "")


def number_labels(values: tuple[float, ...]) -> list[str]:
    """Short labels, all distinct: two significant digits, more only where two would collide.

    >>> number_labels((0.001, 0.01778, 1.0, 562.3))
    ['1e-3', '0.018', '1', '560']
    """
    for digits in range(2, 17):
        labels = [_significant(value, digits) for value in values]
        if len(set(labels)) == len(set(values)):
            break
    return labels


def ratio_labels(values: tuple[float, ...], sizes: list[int] | None = None) -> list[str]:
    """Labels for ratios, unit fractions written as such, with each dictionary size if given.

    >>> ratio_labels((0.125, 2.0), [64, 1024])
    ['1/8 (64)', '2 (1024)']
    """
    labels = number_labels(values)
    for i, value in enumerate(map(float, values)):
        if value.is_integer():
            labels[i] = f"{value:.0f}"  # 128, where two digits would say 130
        elif 0 < value < 1 and (1 / value).is_integer():
            labels[i] = f"1/{1 / value:.0f}"
    return [f"{label} ({n})" for label, n in zip(labels, sizes, strict=True)] if sizes else labels


def format_value(value: float, value_format: str) -> str:
    """A number as short as a cell needs: .97 for 0.97, 1.6e-4 for 1.6e-04."""
    text = format(value, value_format)
    if "e" in text:
        mantissa, exponent = text.split("e")
        return f"{mantissa}e{int(exponent)}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def _is_empty(value: float | str | None) -> bool:
    return value is None or value == "" or math.isnan(float(value))


def _significant(value: float, digits: int) -> str:
    """Positional from 0.01 to 99999, else scientific, so that no label reads 0.00."""
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    if value == 0 or -2 <= int(exponent) < 5:
        rounded = float(f"{mantissa}e{exponent}")
        decimals = max(digits - 1 - int(exponent), 0)
        text = f"{rounded:.{decimals}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(exponent)}"


def _norm(heatmap: Heatmap, spec: HeatmapSpec) -> Normalize:
    """The colour scale: the ends the spec gives, else the data's own."""
    usable = heatmap.mean[np.isfinite(heatmap.mean)]
    if spec.log_scale:
        usable = usable[usable > 0]
    low, high = (usable.min(), usable.max()) if usable.size else (0.1, 1.0)
    vmin = min(low, spec.vmax if spec.vmax is not None else low) if spec.vmin is None else spec.vmin
    vmax = max(high, vmin) if spec.vmax is None else spec.vmax
    return (LogNorm if spec.log_scale else Normalize)(vmin, vmax)


def _annotate(axes: Axes, image: AxesImage, heatmap: Heatmap, value_format: str) -> None:
    """Each cell's number, black or white by the brightness of the colour below it."""
    cells = [(i, j, value) for (i, j), value in np.ndenumerate(heatmap.mean) if value == value]
    texts = [format_value(value, value_format) for _, _, value in cells]
    # Points per cell / points per character, where a digit of DejaVu Sans is 0.64 em wide.
    room = (WIDTH - 2.2) * 72 / heatmap.mean.shape[1]
    size = min(max(room / (0.64 * max(map(len, texts), default=1)), 5.5), 9)
    rgba = image.to_rgba(image.get_array())
    for (i, j, _), text in zip(cells, texts, strict=True):
        colour = "black" if _luminance(rgba[i, j]) > 0.18 else "white"
        axes.text(j, i, text, ha="center", va="center", fontsize=size, color=colour)


def _luminance(rgba: np.ndarray) -> float:
    """Relative luminance (WCAG 2.1); at 0.18 black and white text contrast equally."""
    srgb = np.asarray(rgba[:3])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def _label_axes(
    axes: Axes, heatmap: Heatmap, row_labels: list[str], row_notes: list[str] | None
) -> None:
    """Tick labels, notes at the right, white lines between the cells."""
    n_rows, n_columns = heatmap.mean.shape
    every = math.ceil(n_columns / MAX_ANNOTATED[1])  # 17 labels fit across, not more
    axes.set_xticks(range(n_columns)[::every], number_labels(heatmap.column_values)[::every])
    every = math.ceil(n_rows / 24)
    axes.set_yticks(range(n_rows)[::every], row_labels[::every])
    axes.tick_params(length=0, labelsize=7.5)
    axes.set_xticks(np.arange(n_columns - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(n_rows - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    if row_notes:
        notes = axes.secondary_yaxis("right")
        notes.set_yticks(range(n_rows), row_notes)
        notes.tick_params(length=0, labelsize=7, labelcolor=GREY)
        notes.spines[:].set_visible(False)


def _add_colour_bar(figure: Figure, image: AxesImage, heatmap: Heatmap, spec: HeatmapSpec) -> None:
    """Below the map, with pointed ends where values lie beyond the scale."""
    below = bool((heatmap.mean < image.norm.vmin).any())
    above = bool((heatmap.mean > image.norm.vmax).any())
    extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[below, above]
    bar = figure.colorbar(
        image, location="bottom", extend=extend, fraction=0.05, aspect=45, shrink=0.75
    )
    bar.set_label(spec.colour_label, fontsize=8.5)
    bar.ax.tick_params(labelsize=7.5)
    bar.outline.set_visible(False)


def _small_print(axes: Axes, text: str) -> None:
    """A grey line between the title and the map."""
    axes.annotate(
        text, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points",
        fontsize=8, color=GREY,
    )  # fmt: skip
