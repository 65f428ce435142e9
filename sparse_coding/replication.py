"""What a toy run says about the post: figures, verdict, check against the record. Floor 2."""

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from torch import Tensor

from sparse_coding.metrics import ceiling_mmcs, chance_mmcs
from sparse_coding.plotting import HeatmapSpec
from sparse_coding.sweep import Cell
from sparse_coding.toy_data import World

RECORD = Path(__file__).parent.parent / "results" / "june2023_reference.json"


FIGURES = (
    HeatmapSpec(
        name="mmcs",
        column="mmcs",
        title="How well the true features are found",
        colour_label="MMCS with the true features",
        explanation="Near 1, every true feature has a dictionary feature that points its way; near "
        "chance, the autoencoder learned nothing. Look for a ridge: at the right l1_alpha all "
        "dictionaries with dict_ratio 1 or more should reach it.",
        vmin=0.0,
        vmax=1.0,
    ),
    HeatmapSpec(
        name="dead_features",
        column="n_dead",
        title="Dead features",
        colour_label="dead features (colour capped at 100)",
        explanation="Features that are 0 on all fresh samples, out of n_dict. They rise with "
        "l1_alpha until every feature is dead: the right l1_alpha lies left of that edge.",
        vmin=0,
        vmax=100,
        value_format=".0f",
        cmap="magma",
    ),
    HeatmapSpec(
        name="mmcs_with_larger",
        column="mmcs_with_larger",
        title="Agreement with larger dictionaries",
        colour_label="MMCS with the next two larger dictionaries",
        explanation="A signal that needs no ground truth: features that larger dictionaries of the "
        "same l1_alpha find too are likely real. It should peak where the first figure does.",
        vmin=0.0,
        vmax=1.0,
    ),
    HeatmapSpec(
        name="reconstruction_loss",
        column="mse",
        title="Reconstruction loss",
        colour_label="mean squared error per dimension (log scale)",
        explanation="It rises with l1_alpha, up to the variance of the data once all features are "
        "dead. The smallest loss is not where the features are found: compare with the first "
        "figure.",
        log_scale=True,
        value_format=".0e",
        cmap="cividis",
    ),
)
X_LABELS = {
    "per_feature": "l1_alpha (L1 term: l1_alpha · mean Σ codes / n_dict)",
    "sum": "l1_alpha (L1 term: l1_alpha · mean Σ codes)",
}


def world_tensors(worlds: dict[int, World]) -> dict[str, Tensor]:
    """The true features F and Σ of every seed, for world.safetensors."""
    return {
        f"seed{seed}.{name}": tensor
        for seed, world in worlds.items()
        for name, tensor in (("features", world.features), ("covariance", world.covariance))
    }


def chance_and_ceiling(features: Tensor, n_dicts: list[int]) -> list[str]:
    """A note per size: mmcs of a random dictionary, and of one whose rows are true features."""

    def note(n_dict: int) -> str:
        chance, most = chance_mmcs(features, n_dict), ceiling_mmcs(features, n_dict)
        return f"chance {chance:.2f}, max {most:.2f}".replace(" 0.", " .").replace("1.00", "1")

    return [note(n) for n in n_dicts]


def verdict(rows: list[dict]) -> str:
    """One paragraph: the best cell, and whether mmcs_with_larger points at the same l1_alpha."""
    best = max(rows, key=lambda r: r["mmcs"])
    text = (
        f"Best mmcs {best['mmcs']:.3f} at l1_alpha {best['l1_alpha']:.3g}, dict_ratio "
        f"{best['dict_ratio']:g} (n_dict {best['n_dict']}): {best['n_recovered']} true features "
        f"recovered (cosine similarity above 0.9), {best['n_dead']} dead, l0 {best['l0']:.1f}."
    )
    steps = dict(_grid_steps_between_peaks(rows))
    if steps:
        listed = ", ".join(f"{n} at dict_ratio {ratio:g}" for ratio, n in steps.items())
        points = "points" if all(n <= 1 for n in steps.values()) else "does not point"
        text += (
            f" Without ground truth, mmcs_with_larger {points} at the same l1_alpha within one "
            f"grid step (distance in steps: {listed})."
        )
    return text


def _grid_steps_between_peaks(rows: list[dict]) -> Iterator[tuple[float, int]]:
    """(dict_ratio, grid steps in l1_alpha between the peaks of mmcs and of mmcs_with_larger).

    For the dict_ratios 1 and 2, where all features could be found; means over seeds.
    """
    for ratio in (1.0, 2.0):
        alphas = sorted({r["l1_alpha"] for r in rows if r["dict_ratio"] == ratio})
        here = [
            [r for r in rows if r["dict_ratio"] == ratio and r["l1_alpha"] == a] for a in alphas
        ]
        if len(here) < 3 or any(r["mmcs_with_larger"] is None for cell in here for r in cell):
            continue
        peaks = [
            max(range(len(here)), key=lambda i: fmean(r[column] for r in here[i]))
            for column in ("mmcs", "mmcs_with_larger")
        ]
        yield ratio, abs(peaks[0] - peaks[1])


def record_of_june2023() -> dict:
    """n_steps, tolerance and the cells of the record; its source is named in the file."""
    return json.loads(RECORD.read_text())


def record_cells(seeds: range, n_true_features: int) -> list[Cell]:
    """The cells of the record, for each seed."""
    return [
        Cell(seed, c["l1_exp"], c["size_exp"], int(n_true_features * 2.0 ** c["size_exp"]))
        for seed in seeds
        for c in record_of_june2023()["cells"]
    ]


def compare_with_record(rows: list[dict]) -> bool:
    """Prints mmcs of the rows (mean over seeds) against the record; True if all cells agree."""
    record = record_of_june2023()
    n_seeds = len({row["seed"] for row in rows})
    print(f"mmcs after {record['n_steps']} steps, law june2023, ours over {n_seeds} seeds")
    print("dict_ratio  l1_alpha   ours  record  difference")
    agreed = True
    for cell in record["cells"]:
        ratio, l1_alpha = 2.0 ** cell["size_exp"], 10 ** (cell["l1_exp"] / 4)
        ours = fmean(
            r["mmcs"] for r in rows if r["dict_ratio"] == ratio and r["l1_alpha"] == l1_alpha
        )
        difference = ours - fmean(cell["mmcs"])
        ok = abs(difference) <= record["tolerance"]
        agreed &= ok
        print(
            f"{ratio:10g}  {l1_alpha:8.3g}  {ours:.3f}   {fmean(cell['mmcs']):.3f}"
            f"  {difference:+10.3f}  {'pass' if ok else 'FAIL'}"
        )
    print(f"{'all' if agreed else 'NOT all'} within ±{record['tolerance']} of the record")
    return agreed
