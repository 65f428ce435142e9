"""Which figures run.py draws, and what to look for in them.

`FIGURES` are heat-maps for report.write_figures (l1_alpha across, expansion_factor down);
`FRONTIERS` and `DENSITIES` are written by `write_more_figures`.
"""

from pathlib import Path

import numpy as np

from sparse_coding.figures.frontier import (
    FigureSpec,
    FrontierSpec,
    density_csv,
    draw_density_histograms,
    draw_frontier,
    frontier_csv,
)
from sparse_coding.figures.heatmap import HeatmapSpec, png_bytes
from sparse_coding.files import write_atomic
from sparse_coding.sweep.grid import Cell

FIGURES = (
    HeatmapSpec(
        name="fvu",
        column="fvu",
        title="What the autoencoders miss (FVU)",
        colour_label="fvu on held-out documents: 0 perfect, 1 as bad as the mean (log scale)",
        explanation="The share of the activations' variance that is not reconstructed. It rises "
        "with l1_alpha and falls with the size; read it together with l0, since it can always be "
        "bought with more active features. Above 0.3 little of what the model computes is left.",
        log_scale=True,
        value_format=".2g",
        cmap="cividis",
    ),
    HeatmapSpec(
        name="l0",
        column="l0",
        title="Active features per token (L0)",
        colour_label="l0 on held-out documents (log scale)",
        explanation="How many features one token needs. Look for the cells between about 10 and "
        "100: fewer lose too much, and with more a single feature stops meaning one thing. "
        "An l0 near n_dict / 2 means that l1_alpha does nothing yet.",
        log_scale=True,
        value_format=".3g",
    ),
    HeatmapSpec(
        name="dead_fraction",
        column="dead_fraction",
        title="Dead features",
        colour_label="dead_fraction: share of features that fire on no held-out token",
        explanation="Dead features cost memory and explain nothing. A few per cent are harmless; "
        "where the share grows with the size, the data or the training is too short for so large "
        "a dictionary, and where it grows to the right, l1_alpha is too strong.",
        vmin=0.0,
        vmax=1.0,
        cmap="magma",
    ),
    HeatmapSpec(
        name="ce_recovered",
        column="ce_recovered",
        title="How well the model still predicts (CE recovered)",
        colour_label="ce_recovered = (ce_zero − ce_spliced) / (ce_zero − ce_clean)",
        explanation="The reconstruction takes the place of the activations: 1 means that the "
        "model predicts the next token as well as before, 0 as badly as with zeros there. "
        "It says little where ce_zero − ce_clean is small (see the table).",
        vmin=0.0,
        vmax=1.0,
        value_format=".3f",
    ),
    HeatmapSpec(
        name="mmcs_with_larger",
        column="mmcs_with_larger",
        title="Agreement with larger dictionaries",
        colour_label="mmcs with the next two larger",
        explanation="No true features are known here; but those that dictionaries of several "
        "sizes find independently are likely to be real. Look for the l1_alpha where the agreement "
        "peaks. The largest dictionary has none to compare with.",
        vmin=0.0,
        vmax=1.0,
    ),
)
FRONTIERS = (
    FrontierSpec(
        name="frontier_fvu",
        title="Reconstruction against sparsity",
        explanation="Lower and further left is better: the same reconstruction from fewer active "
        "features. Choose a cell at the bend of a line, beyond which each further feature buys "
        "little; where the lines of two sizes meet, the larger one is not worth its cost.",
        alt="Lines of fvu over l0, one for each dictionary size",
        column="fvu",
        y_label="fvu on held-out documents",
        upwards=False,
    ),
    FrontierSpec(
        name="frontier_ce",
        title="What the model loses, against sparsity",
        explanation="Higher and further left is better. It checks the fvu: the little variance "
        "that is missing may be what the model needs most. Compare with the ablations above the "
        "axes: where they cost a few hundredths of a nat, ce_recovered tells nothing.",
        alt="Lines of ce_recovered over l0, one for each dictionary size",
        column="ce_recovered",
        y_label="ce_recovered = (ce_zero − ce_spliced) / (ce_zero − ce_clean)\n"
        "ablation: zeros in place of the activations",
        upwards=True,
    ),
)
DENSITIES = FigureSpec(
    name="densities",
    title="How often the features fire",
    explanation="Look for one hump between -5 and -1.5. Features right of -1 fire on every tenth "
    "token and are rarely about one thing: a larger l1_alpha helps. A second hump at the far left "
    "is of features that are dying, or too rare for this text to show what they mean.",
    alt="Histograms of log10 feature density, by dictionary size and l1_alpha",
)


def write_more_figures(
    folder: Path,
    rows: list[dict],
    densities: dict[Cell, np.ndarray],
    *,
    n_tokens: int,
    l1_note: str,
) -> dict[str, Path]:
    """Writes figures/<name>.png of FRONTIERS and DENSITIES, each with its csv; the png by name.

    Args:
        rows: of results.csv
        densities: (n_dict,) of each cell, the share of n_tokens tokens on which a feature fires
        l1_note: how the L1 term of the loss is normalised
    """
    drawn = {
        spec.name: (draw_frontier(rows, spec, l1_note=l1_note), frontier_csv(rows, spec.column))
        for spec in FRONTIERS
    }
    histograms = draw_density_histograms(densities, DENSITIES, n_tokens=n_tokens)
    drawn[DENSITIES.name] = (histograms, density_csv(densities, n_tokens=n_tokens))
    paths = {}
    for name, (figure, csv) in drawn.items():
        paths[name] = folder / "figures" / f"{name}.png"
        write_atomic(paths[name], png_bytes(figure))
        write_atomic(paths[name].with_suffix(".csv"), csv)
    return paths
