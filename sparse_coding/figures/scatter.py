"""A point for each autoencoder of a table: one column over another, a colour for each family."""

from dataclasses import dataclass

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sparse_coding.figures.frontier import COLOURS, FigureSpec, head, is_finite
from sparse_coding.figures.heatmap import DPI, WIDTH
from sparse_coding.files import csv_text
from sparse_coding.sae.families import FAMILIES, FROZEN, TRAINED


@dataclass(frozen=True)
class ScatterSpec(FigureSpec):
    """Which columns of results.csv are drawn."""

    x: str
    y: str
    x_label: str
    y_label: str


def scatter_csv(rows: list[dict], spec: ScatterSpec) -> str:
    """The points as text, all digits."""
    columns = ("arch", "seed", "world", "n_dict", "target_l0", "l1_alpha", spec.x, spec.y)
    return csv_text([{name: row[name] for name in columns} for row in rows], columns)


def draw_scatter(rows: list[dict], spec: ScatterSpec) -> Figure:
    """spec.y over spec.x; baselines are hollow. Rows without finite values are left out."""
    shown = [row for row in rows if is_finite(row[spec.x]) and is_finite(row[spec.y])]
    figure = Figure((WIDTH, 4.8), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    for arch in FAMILIES:
        same = [row for row in shown if row["arch"] == arch]
        if same:
            colour = COLOURS[TRAINED.index(arch.removesuffix(FROZEN))]
            axes.scatter(
                [row[spec.x] for row in same], [row[spec.y] for row in same], s=28, zorder=3,
                label=arch, edgecolors=colour,
                facecolors="none" if FAMILIES[arch].frozen else colour, linewidths=1.2, alpha=0.85,
            )  # fmt: skip
    axes.set_xlabel(spec.x_label, fontsize=8.5)
    axes.set_ylabel(spec.y_label, fontsize=8.5)
    axes.tick_params(labelsize=7.5)
    axes.grid(color="0.93", linewidth=0.6)
    axes.set_axisbelow(True)
    if shown:
        axes.legend(title="family", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False,
                    fontsize=7.5, title_fontsize=7.5)  # fmt: skip
    left_out = len(rows) - len(shown)
    note = "a point for each autoencoder" + (f"; {left_out} diverged" if left_out else "")
    head(axes, spec.title, [note])
    return figure
