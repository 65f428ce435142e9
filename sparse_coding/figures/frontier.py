"""Figures of a sweep on a real model: frontiers over L0, histograms of feature density.

Like heatmap.py: numbers in, a Figure out, its numbers as csv text beside it, no pyplot, the same
data gives the same PNG bytes. Which figures are drawn, and what they say, is in lm/show.py.
"""

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sparse_coding.figures.heatmap import DPI, GREY, WIDTH, number_labels, ratio_labels
from sparse_coding.files import csv_text
from sparse_coding.sae.families import FAMILIES, FROZEN, TRAINED
from sparse_coding.sweep.grid import Cell, on_grid

MAX_LABELLED = 6  # values of l1_alpha named in a frontier; more would touch
MAX_PANELS = 6  # rows and columns of histograms that are still readable at WIDTH
# of families, in the order of FAMILIES: Okabe and Ito's, which the colour-blind tell apart
COLOURS = ("#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#009E73", "#8C510A", "#CC79A7", "#000000")
MARKERS = "osD^vP"  # of sizes, where colours are of families
BIN = 0.25  # decades; in narrower bins the rare end (1, 2, 3 tokens) would have gaps


@dataclass(frozen=True)
class FigureSpec:
    """A figure that is no heat-map, as the report shows it."""

    name: str  # file stem: figures/<name>.png and figures/<name>.csv
    title: str
    explanation: str  # two sentences for the report: what to look for
    alt: str  # what is drawn, for those who don't see it


@dataclass(frozen=True)
class FrontierSpec(FigureSpec):
    """How one column of results.csv is drawn over l0."""

    column: str
    y_label: str
    upwards: bool  # better values are higher, and below 0 all is lost


def frontier_points(rows: list[dict], column: str, size: str = "expansion_factor") -> list[dict]:
    """Mean over seeds of l0 and of the column, a point per (family, size, what was asked:
    target_l0, or l1_alpha without one).

    size: the column with it, expansion_factor or dict_ratio

    By family, size, then l0. Rows without a finite value (a diverged cell) are left out. The spread
    is the sample standard deviation, None below two seeds.
    """
    cells = defaultdict(list)
    for row in rows:
        if is_finite(row["l0"]) and is_finite(row[column]):
            asked = row["target_l0"], None if row["target_l0"] else row["l1_alpha"]
            cells[row["arch"], row[size], row["n_dict"], *asked].append(row)
    points = [
        dict(zip(("arch", size, "n_dict", "target_l0", "l1_alpha"), key, strict=True))
        | {
            "l0": statistics.fmean(row["l0"] for row in same),
            "mean": statistics.fmean(row[column] for row in same),
            "std": statistics.stdev(row[column] for row in same) if same[1:] else None,
            "n_seeds": len(same),
        }
        for key, same in cells.items()
    ]
    families = list(FAMILIES)
    return sorted(points, key=lambda p: (families.index(p["arch"]), p[size], p["l0"]))


def frontier_csv(rows: list[dict], column: str, size: str = "expansion_factor") -> str:
    """The points of a frontier as text, all digits; an empty field where there is no spread, and
    for what was not asked."""
    columns = ("arch", size, "n_dict", "target_l0", "l1_alpha", "l0", "mean", "std", "n_seeds")
    return csv_text(frontier_points(rows, column, size), columns)


def draw_frontier(
    rows: list[dict], spec: FrontierSpec, *, l1_note: str, size: str = "expansion_factor"
) -> Figure:
    """spec.column over l0 (log scale), a line per family and dictionary size.

    One family alone: brighter the larger. Several: a colour for each, a marker for each size;
    dashed, where W_dec is frozen. Grey
    lines join points of one l1_alpha, which stands beside them. Points that have no place on the
    axes (l0 0, or worse than the worst ablation) are counted in the small print.

    size: the column with it, expansion_factor or dict_ratio
    """
    points = frontier_points(rows, spec.column, size)
    shown = [p for p in points if p["l0"] > 0 and not (spec.upwards and p["mean"] < 0)]
    figure = Figure((WIDTH, 4.8), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    if spec.upwards:
        axes.axhline(1, color="0.7", linewidth=0.8, linestyle=(0, (4, 3)))
    lines = defaultdict(list)
    for point in shown:
        lines[point["arch"], point[size], point["n_dict"]].append(point)
    of_grid = [line for line in lines.values() if on_grid(line[0])]
    _join_equal_l1_alphas(axes, of_grid, upwards=spec.upwards)
    _draw_lines(axes, lines, size)
    if shown:
        _scale_axes(axes, shown, logarithmic=not spec.upwards)
    axes.set_xlabel("l0: active features on average (log scale)", fontsize=8.5)
    scale = " (log scale)" if axes.get_yscale() == "log" else ""
    axes.set_ylabel(spec.y_label + scale, fontsize=8.5)
    notes = [_seeds_note(points, len(points) - len(shown))]
    notes += [f"grey lines: equal l1_alpha; {l1_note}"] if of_grid else []
    notes += [_ablation_note(rows)] if spec.column == "ce_recovered" else []
    head(axes, spec.title, notes)
    return figure


def _draw_lines(axes: Axes, lines: dict[tuple, list[dict]], size: str) -> None:
    """lines: points by (family, size, n_dict)."""
    sizes = sorted({key[1:] for key in lines})
    labels = ratio_labels(tuple(ratio for ratio, _ in sizes), [n_dict for _, n_dict in sizes])
    several = len({arch for arch, *_ in lines}) > 1
    for (arch, *of_size), line in lines.items():
        i, family = sizes.index(tuple(of_size)), TRAINED.index(arch.removesuffix(FROZEN))
        colour = COLOURS[family] if several else _colours(len(sizes))[i]
        axes.errorbar(
            [p["l0"] for p in line], [p["mean"] for p in line],
            yerr=[p["std"] or 0.0 for p in line] if any(p["std"] for p in line) else None,
            label=f"{arch}, {labels[i]}" if several else labels[i], color=colour,
            marker=MARKERS[i % len(MARKERS)] if several else "o", markersize=3.5, linewidth=1.4,
            linestyle=(0, (4, 2)) if FAMILIES[arch].frozen else "-", elinewidth=0.8, zorder=3,
        )  # fmt: skip
    if lines:
        title = "family, " * several + f"{size}\n(n_dict)"
        axes.legend(
            title=title, loc="center left", bbox_to_anchor=(1.0, 0.5),
            frameon=False, fontsize=7.5, title_fontsize=7.5,
            handlelength=3.5 if several else None,  # dashes are seen beside the marker
        )  # fmt: skip


def _join_equal_l1_alphas(axes: Axes, lines: list[list[dict]], *, upwards: bool) -> None:
    """Grey lines over the sizes, labelled at the largest, on the side where no line runs."""
    if not lines:
        return
    largest = lines[-1]
    for point in _spread_out(largest, MAX_LABELLED):
        l1_alpha = point["l1_alpha"]
        same = [p for line in lines for p in line if p["l1_alpha"] == l1_alpha]
        axes.plot([p["l0"] for p in same], [p["mean"] for p in same], color="0.75", linewidth=0.8)
        axes.annotate(
            _short(l1_alpha), (point["l0"], point["mean"]),
            (-3, 5 if upwards else -5), textcoords="offset points", fontsize=7.5, color=GREY,
            ha="right", va="bottom" if upwards else "top",
        )  # fmt: skip


def _scale_axes(axes: Axes, points: list[dict], *, logarithmic: bool) -> None:
    """l0 on a log scale; the y axis, too, where it spans over a decade."""
    scaled = {"x": [p["l0"] for p in points]}
    values = [p["mean"] for p in points]
    if logarithmic and 0 < 10 * min(values) < max(values):
        scaled["y"] = values
    for name, numbers in scaled.items():
        limits = min(numbers) / 1.4, max(numbers) * 1.2
        axes.set(**{f"{name}scale": "log", f"{name}lim": limits})
        axis, ticks = getattr(axes, f"{name}axis"), _round_numbers(*limits)
        axis.set_ticks(ticks, number_labels(tuple(ticks)))
        axis.set_ticks([], minor=True)
    axes.tick_params(labelsize=7.5)
    axes.grid(color="0.93", linewidth=0.6)
    axes.set_axisbelow(True)


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten in between; the ends if there are none.

    >>> _round_numbers(3.0, 25.0)
    [5.0, 10.0, 20.0]
    """
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**e for e in exponents for m in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high] or [low, high]


def _seeds_note(points: list[dict], n_hidden: int) -> str:
    counts = [p["n_seeds"] for p in points]
    text = "one seed" if counts else "no values"
    if max(counts, default=0) > 1:
        least, most = min(counts), max(counts)
        seeds = f"{most}" if least == most else f"{least} to {most}"
        text = f"mean of {seeds} seeds; bars: standard deviation"
    return text + (f"; {n_hidden} points lie beyond the axes (see the csv)" if n_hidden else "")


def _ablation_note(rows: list[dict]) -> str:
    """What zeros and the mean cost at this site: the scale on which ce_recovered is meant."""
    row = next((row for row in rows if is_finite(row["ce_clean"])), None)
    if row is None:
        return "cross-entropy was not measured"
    gaps = [f"+{row[c] - row['ce_clean']:.2f} ({c})" for c in ("ce_zero", "ce_mean")]
    return f"cross-entropy in nats: {row['ce_clean']:.2f} (ce_clean), {', '.join(gaps)}"


def density_counts(density: np.ndarray, *, n_tokens: int) -> tuple[int, np.ndarray, np.ndarray]:
    """(dead features, features per bin, edges of the bins in log10), bins of a quarter decade.

    Args:
        density: (n_dict,) share of n_tokens tokens on which the feature fires
    """
    lowest = math.floor(-math.log10(n_tokens) / BIN) * BIN
    edges = np.linspace(lowest, 0.0, round(-lowest / BIN) + 1)
    alive = np.log10(density[density > 0])
    # 1 / n_tokens may round to just below the first edge
    counts, _ = np.histogram(np.clip(alive, edges[0], edges[-1]), edges)
    return int((density == 0).sum()), counts, edges


def density_csv(densities: dict[Cell, np.ndarray], *, n_tokens: int) -> str:
    """Every cell's histogram, drawn or not; its dead features in a line without bin edges."""
    rows = []
    for cell, density in densities.items():
        dead, counts, edges = density_counts(density, n_tokens=n_tokens)
        asked = cell.arch, cell.target_l0 or None, None if cell.target_l0 else cell.l1_alpha
        bins = [(None, None, dead), *zip(edges[:-1], edges[1:], counts, strict=True)]
        rows += [(cell.name, *asked, cell.n_dict, *of_bin) for of_bin in bins]
    columns = (
        "cell", "arch", "target_l0", "l1_alpha", "n_dict", "log10_low", "log10_high", "n_features",
    )  # fmt: skip
    return csv_text([dict(zip(columns, row, strict=True)) for row in rows], columns)


def draw_density_histograms(
    densities: dict[Cell, np.ndarray], spec: FigureSpec, *, n_tokens: int
) -> Figure:
    """% of the features per quarter decade of density: sizes down, families, sparsities across.

    Of the first seed, without baselines. At most six sizes and six columns, evenly chosen: of
    sparsities with both ends, of each family the same number.
    """
    seed = min(cell.seed for cell in densities)
    places = {((c.size_ratio, c.n_dict), _column(c)): c for c in densities if c.seed == seed}
    sizes = _spread_out(sorted({size for size, _ in places}), MAX_PANELS)
    sparsities = _columns(list(places.values()))
    figure = Figure((WIDTH, 1.35 + 0.95 * len(sizes)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(sizes), len(sparsities), sharex=True, sharey=True, squeeze=False)
    labels = ratio_labels(tuple(ratio for ratio, _ in sizes), [n_dict for _, n_dict in sizes])
    for i, colour in enumerate(_colours(len(sizes))):
        panels[i, 0].set_ylabel(labels[i], fontsize=7.5)
        for j, sparsity in enumerate(sparsities):
            cell = places.get((sizes[i], sparsity))
            if cell is None:
                panels[i, j].set_facecolor("0.92")
                continue
            _draw_histogram(panels[i, j], densities[cell], n_tokens, colour)
    several = len({family for family, _ in sparsities}) > 1
    for axes, (family, (target_l0, l1_exp)) in zip(panels[0], sparsities, strict=True):
        text = f"l0 near {target_l0}" if target_l0 else f"l1_alpha {_short(10 ** (l1_exp / 4))}"
        text = f"{list(FAMILIES)[family]}\n{text}" if several else text
        axes.annotate(text, (0.5, 1), (0, 4), xycoords="axes fraction",
                      textcoords="offset points", fontsize=7.5, ha="center")  # fmt: skip
    panels[0, 0].set_ylim(0, 1.3 * panels[0, 0].get_ylim()[1])  # room for the number of dead ones
    figure.supxlabel("log10 of the share of tokens on which a feature fires", fontsize=8.5)
    figure.supylabel("% of the features", fontsize=8.5)
    dead = "dead features fire on none of them and are not in the bars"
    first = f"{n_tokens:,} held-out tokens, seed {seed}; {dead}"
    notes = [first, "left: expansion_factor (n_dict)", *[""] * (1 + several)]
    head(panels[0, 0], spec.title, notes)
    return figure


def _draw_histogram(axes: Axes, density: np.ndarray, n_tokens: int, colour: tuple) -> None:
    dead, counts, edges = density_counts(density, n_tokens=n_tokens)
    axes.stairs(100 * counts / len(density), edges, fill=True, color=colour)
    axes.set_xlim(edges[0], 0)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    text = f"{dead} dead ({100 * dead / len(density):.0f} %)" if dead else "none dead"
    axes.text(0.97, 0.95, text, transform=axes.transAxes, fontsize=6.5, color=GREY,
              ha="right", va="top")  # fmt: skip


def _column(cell: Cell) -> tuple[int, tuple[int, int]]:
    """What orders the columns: its family, then what was asked of it."""
    return list(FAMILIES).index(cell.arch), cell.sparsity


def _columns(cells: list[Cell]) -> list[tuple[int, tuple[int, int]]]:
    """The columns that are shown, in order."""
    asked: dict[int, set] = {}
    for cell in cells:
        if not FAMILIES[cell.arch].frozen:
            family, sparsity = _column(cell)
            asked.setdefault(family, set()).add((family, sparsity))
    families = _spread_out(sorted(asked), MAX_PANELS)
    of_each = MAX_PANELS // len(families)
    return [column for family in families for column in _spread_out(sorted(asked[family]), of_each)]


def _short(value: float) -> str:
    return number_labels((value,))[0]


def _spread_out(items: list, most: int) -> list:
    """At most `most` items, evenly chosen with the first and the last; of one, the middle."""
    if len(items) <= most:
        return items
    if most == 1:
        return [items[len(items) // 2]]
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _colours(n: int) -> list[tuple]:
    """viridis from dark to bright, short of the yellow that is lost on white."""
    return [colormaps["viridis"](0.88 * i / max(n - 1, 1)) for i in range(n)]


def head(axes: Axes, title: str, notes: list[str]) -> None:
    """Writes the title, and grey lines between it and the axes."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=9 + 11.5 * len(notes))
    small_print = axes.annotate(
        "\n".join(notes), (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points",
        fontsize=8, color=GREY,
    )  # fmt: skip
    small_print.set_in_layout(False)  # it may be wider than the first of several panels


def is_finite(value: float | str | None) -> bool:
    """Whether it is there, and neither nan nor infinite."""
    return value not in (None, "") and math.isfinite(float(value))
