"""What a toy run says about the post: figures, verdict, check against the record."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from torch import Tensor

from sparse_coding.figures.frontier import FrontierSpec, draw_frontier, frontier_csv
from sparse_coding.figures.heatmap import HeatmapSpec
from sparse_coding.figures.report import write_figure, write_figures, write_report
from sparse_coding.figures.scatter import ScatterSpec, draw_scatter, scatter_csv
from sparse_coding.files import Damaged
from sparse_coding.sweep.grid import L1_TERMS, Cell, asked_of, gap, on_grid
from sparse_coding.sweep.metrics import ceiling_mmcs, chance_mmcs
from sparse_coding.toy import benchmark
from sparse_coding.toy.data import WorldFile
from sparse_coding.toy.laws import Data, SynthData
from sparse_coding.toy.recipe import ToyRecipe

RECORD = Path(__file__).parents[2] / "results" / "june2023_reference.json"


FIGURES = (
    HeatmapSpec(
        name="mmcs",
        column="mmcs",
        title="True features found (MMCS)",
        colour_label="mmcs with the true features",
        explanation="Look for a bright band from dict_ratio 1 down: there mmcs nears 1, nearly "
        "every true feature is a row of the dictionary. Beside it, and in dictionaries too small "
        "to hold all features, it falls toward the chance level of random dictionaries (given at "
        "the right, beside the value if every row were a true feature).",
        vmin=0.0,
        vmax=1.0,
    ),
    HeatmapSpec(
        name="dead_features",
        column="n_dead",
        title="Dead features",
        colour_label="n_dead: 0 on all fresh samples (colour capped at 100)",
        explanation="Features die as l1_alpha grows, until the whole dictionary is dead (the "
        "number in the cell reaches n_dict). The band of high mmcs lies left of that edge, so "
        "this count bounds l1_alpha without knowing the true features.",
        vmin=0.0,
        vmax=100.0,
        value_format=".0f",
        cmap="magma",
    ),
    HeatmapSpec(
        name="mmcs_with_larger",
        column="mmcs_with_larger",
        title="Agreement with larger dictionaries",
        colour_label="mmcs with the next two larger",
        explanation="This needs no ground truth, so it is the score that one has on a real model: "
        "dictionaries of different sizes that agree have found the same features. It should peak "
        "at about the l1_alpha where mmcs does; the largest dictionary has none to compare with.",
        vmin=0.0,
        vmax=1.0,
    ),
    HeatmapSpec(
        name="reconstruction_loss",
        column="mse",
        title="Reconstruction loss",
        colour_label="mse per dimension (log scale)",
        explanation="The loss rises with l1_alpha, up to the loss of an autoencoder that outputs "
        "0. It has no minimum where mmcs has its peak, so reconstruction alone cannot choose "
        "l1_alpha.",
        log_scale=True,
        value_format=".0e",
        cmap="cividis",
    ),
)
FRONTIERS = (  # where an l0 was asked of some cells
    FrontierSpec(
        name="frontier_mmcs",
        title="True features found, against sparsity",
        explanation="Higher is better: which family finds the true features, at which l0. The data "
        "have n_active features on in a sample, on average; fewer codes must mix features, and "
        "more have nothing left to be.",
        alt="Lines of mmcs over l0, one for each family and dictionary size",
        column="mmcs",
        y_label="mmcs with the true features",
        upwards=True,
    ),
)
TITLE = "Toy models: features taken out of superposition"


def write_worlds(folder: Path, data: Data, cells: list[Cell]) -> None:
    """The worlds of the cells, below the run folder."""
    for name, file in _worlds(data, cells).items():
        file.write(folder / name)


def _worlds(data: Data, cells: list[Cell]) -> dict[str, WorldFile]:
    return data.worlds(list(dict.fromkeys(map(data.world_of, cells))))


def mend_worlds(folder: Path, data: Data, cells: list[Cell]) -> None:
    """Writes worlds of a finished run again where they are damaged, and says so."""
    for name, file in _worlds(data, cells).items():
        path = folder / name
        try:
            if not path.exists():
                raise Damaged(path, "it is missing")
            file.check(path)
        except Damaged as error:
            error.warn("it is made again")
            file.write(path)


def draw(
    folder: Path,
    rows: list[dict],
    *,
    data: Data,
    world: int | None,
    l1_normalisation: str,
    context: dict,
) -> dict[str, Path]:
    """Writes the figures and report.html; returns the png of each figure.

    world: whose chance level stands beside the heat-map
    context: what was run, for the report
    """
    of_grid = [row for row in rows if on_grid(row)]
    sizes = sorted({row["n_dict"] for row in of_grid})
    maps = FIGURES if of_grid else ()
    l1_note = f"L1 term of the loss: {L1_TERMS[l1_normalisation]}"
    figures = write_figures(
        folder,
        of_grid,
        maps,
        x_label=f"l1_alpha; {l1_note}",
        y_label="dict_ratio",
        row_key="dict_ratio",
        column_key="l1_alpha",
        row_notes={"mmcs": _chance_and_ceiling(data.features(world), sizes)},
    )
    others = _frontiers(data, rows) if len(of_grid) < len(rows) else ()
    for spec in others:
        if isinstance(spec, ScatterSpec):
            figure, csv = draw_scatter(rows, spec), scatter_csv(rows, spec)
        else:
            figure = draw_frontier(rows, spec, l1_note=l1_note, size="dict_ratio")
            csv = frontier_csv(rows, spec.column, "dict_ratio")
        figures[spec.name] = write_figure(folder, spec.name, figure, csv=csv)
    specs, text = (*maps, *others), _verdict(rows, data)
    write_report(folder, title=TITLE, verdict=text, rows=rows, specs=specs, context=context)
    return figures


def _frontiers(data: Data, rows: list[dict]) -> tuple[FrontierSpec | ScatterSpec, ...]:
    """Figures of cells that were asked for an l0."""
    if data.n_projection:
        return benchmark.SPARSE_BUT_WRONG
    if isinstance(data, SynthData):
        several = len({row["target_l0"] for row in rows}) > 1
        return (benchmark.TRUTH, *((benchmark.FIND, *FRONTIERS) if several else ()))
    return FRONTIERS


def _chance_and_ceiling(features: Tensor, n_dicts: list[int]) -> list[str]:
    """A note per size: mmcs of a random dictionary, and of one whose rows are true features."""

    def note(n_dict: int) -> str:
        chance, most = chance_mmcs(features, n_dict), ceiling_mmcs(features, n_dict)
        text = f"chance {chance:.2f}, true rows {most:.2f}"
        return text.replace(" 0.", " .").replace("1.00", "1")

    return [note(n) for n in n_dicts]


def verdict(rows: list[dict]) -> str:
    """One paragraph: the best cell, and whether mmcs_with_larger points at the same l1_alpha."""
    diverged = [row for row in rows if not math.isfinite(row["mse"])]
    rows = [row for row in rows if math.isfinite(row["mse"])]
    if not rows:
        return f"All {len(diverged)} cells diverged: lower the learning rate."
    best = max(rows, key=lambda r: r["mmcs"])
    text = f"{len(diverged)} cells diverged and are left out of this line. " if diverged else ""
    text += (
        f"Best mmcs {best['mmcs']:.3f} at {asked_of(best)}, dict_ratio "
        f"{best['dict_ratio']:g} (n_dict {best['n_dict']}): {best['n_recovered']} true features "
        f"recovered (cosine similarity above 0.9), {best['n_dead']} dead, l0 {best['l0']:.1f}."
    )
    steps = dict(_grid_steps_between_peaks([row for row in rows if on_grid(row)]))
    if steps:
        listed = ", ".join(f"{n} at dict_ratio {ratio:g}" for ratio, n in steps.items())
        points = "points" if all(n <= 1 for n in steps.values()) else "does not point"
        text += (
            f" Without ground truth, mmcs_with_larger {points} at the same l1_alpha within one "
            f"grid step (distance in steps: {listed})."
        )
    return f"{text} {gap(rows)}".rstrip()


def _verdict(rows: list[dict], data: Data) -> str:
    """That of the post, or of a synthetic world."""
    if not isinstance(data, SynthData):
        return verdict(rows)
    return f"{benchmark.verdict(rows, data)} {gap(rows)}".rstrip()


def last_lines(rows: list[dict], folder: Path, recipe: ToyRecipe, *, verify: bool) -> int:
    """Prints what came out, beside the numbers of others where there are such, and where it is;
    the exit code."""
    if verify:
        return 0 if compare_with_record(rows) else 1
    n_samples = recipe.n_steps * recipe.data.batch_size
    benchmark.print_comparisons(rows, benchmark.references(rows, recipe.data, n_samples))
    benchmark.print_spread(rows)
    print(f"{_verdict(rows, recipe.data)}\ndone: {folder / 'report.html'} (--fresh starts again)")
    return 0


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
