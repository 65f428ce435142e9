"""Does training with factors in bf16 find what training in tf32 finds? Over several seeds.

The same autoencoders on the same batches, first in one precision, then in another: relu and
batchtopk at the sizes that run.py takes on an MLP of width 1 536, on x of many sparse directions,
as run.py trains them; and cells of the toy figure. For each cell the mean over seeds of fvu and l0,
of the toy also mmcs, in both, and the difference, of fvu and l0 relative to the first. The noise of
a difference is what other starts make: the standard deviation over seeds, pooled over the cells of
a family and over both precisions, times the root of 2 / seeds. A family agrees in a metric if the
mean of its cells' differences is within twice that, or .001. Exit code 1 where one does not.

    python benchmarks/precision_agreement.py
    python benchmarks/precision_agreement.py --runs FOLDER FOLDER   finished runs of either script

A minute of a GPU, as planned.
"""

import dataclasses
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import replicate_toy_models as toy
import run
from sparse_coding.config import parse_flags, passing_bar, require, run_as_script
from sparse_coding.files import read_csv, read_record
from sparse_coding.lm.recipe import Optimisation
from sparse_coding.sae.batches import stacked, step_ranges
from sparse_coding.sae.ensemble import Ensemble
from sparse_coding.sweep.grid import Cell, asked_of, specs_of
from sparse_coding.sweep.hardware import pick_device, set_precision
from sparse_coding.sweep.metrics import full_float32, reconstruction
from sparse_coding.sweep.run_folder import TEXTS
from sparse_coding.toy.data import ToyData, ToyStream, make_world

ABSOLUTE = ("mmcs",)  # its differences are not relative
METRICS = ("fvu", "l0", *ABSOLUTE)
TWICE = 2.0  # of the noise
NOTHING = 1e-3  # a difference below which nobody would choose; k codes of a batch have no noise


@dataclass(frozen=True)
class Config:
    device: str = "auto"
    # the first is what the second is compared with; (): tf32 and bf16, on a CPU float32 and bf16
    precisions: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()  # two run folders, in the place of training
    n_seeds: int = 3
    n_steps: int = 500  # at run.py's sizes
    toy_steps: int = 3000
    batch_size: int = 2048
    width: int = 1536
    n_directions: int = 4096  # of which x at run.py's sizes is a sparse sum
    n_active: float = 30.0  # of them, on average
    k: int = 32  # of batchtopk there
    expansion_exp_high: int = 3
    n_eval_batches: int = 8
    tiny: bool = False  # small sizes, for tests


TINY = dict(n_steps=30, toy_steps=60, batch_size=32, width=32, n_directions=64, n_active=4.0, k=4,
            expansion_exp_high=1, n_eval_batches=2)  # fmt: skip
SMALL_TOY = dict(activation_dim=32, n_true_features=64, n_active=3.0, dict_ratio_exp_high=1)


class Row(NamedTuple):
    """What one autoencoder found; cell: its family and what else is the same for all seeds."""

    arch: str
    cell: str
    seed: int
    values: dict[str, float]


class Agreement(NamedTuple):
    """Of one family in one metric: the mean over cells of the differences, and their noise."""

    arch: str
    metric: str
    difference: float
    noise: float

    @property
    def holds(self) -> bool:
        return abs(self.difference) <= max(TWICE * self.noise, NOTHING)


# --- what is trained ---


def like_run(cfg: Config, device: torch.device) -> list[Row]:
    """Trained as by run.py, on synthetic x of mean square norm 1; starts differ by seed."""
    settings = run.Config(
        arch=("relu",),
        l1_exp_low=-20,
        l1_exp_high=-18,
        expansion_exp_high=cfg.expansion_exp_high,
        n_seeds=cfg.n_seeds,
        batch_size=cfg.batch_size,
        n_tokens=cfg.n_steps * cfg.batch_size,
    )
    chosen = dict(arch=("batchtopk",), target_l0=(cfg.k,), l1_exp_low=None, l1_exp_high=None)
    both = (settings, dataclasses.replace(settings, **chosen))
    cells = [cell for each in both for cell in run.grid_of(each).cells(cfg.width)]
    data = ToyData(
        "post",
        cfg.width,
        cfg.n_directions,
        n_active=cfg.n_active,
        feature_prob_decay=1 - 4 / cfg.n_directions,
        noise_std=0.0,
        batch_size=cfg.batch_size,
    )
    world = make_world(data, 0)
    train, fresh = (ToyStream(data, world, batch_seed=i, device=device) for i in (1, 2))
    sample = train.batch(0)
    scale = sample.square().sum(dim=1).mean().rsqrt()
    ensemble = ensemble_as_by_run(settings, cells, sample * scale)
    train_(ensemble, lambda step: train.batch(step) * scale, cfg.n_steps)
    with full_float32():
        held_out = (fresh.batch(step) * scale for step in range(cfg.n_eval_batches))
        found = reconstruction(ensemble, held_out)
    return [row_of(cell, {m: found[m][i] for m in ("fvu", "l0")}) for i, cell in enumerate(cells)]


def ensemble_as_by_run(settings: run.Config, cells: list[Cell], x: Tensor) -> Ensemble:
    """x (batch, width), whose mean b_dec starts from."""
    fields = {f.name for f in dataclasses.fields(Optimisation)}
    known = {k: v for k, v in dataclasses.asdict(settings).items() if k in fields}
    return Ensemble(
        specs_of(cells, settings.l1_normalisation, tied=True, prefixes=settings.prefixes),
        x.shape[1],
        lr=settings.lr,
        device=x.device,
        b_dec=x.mean(dim=0),
        project=True,
        schedule=Optimisation(**known).schedule(x.shape[1]),
    )


def train_(ensemble: Ensemble, batch_at, n_steps: int) -> None:
    length = ensemble.engine.steps_at_a_time
    ranges = step_ranges(0, n_steps, length=length, stop_every=n_steps)
    for _, xs in passing_bar(stacked(batch_at, ranges), desc="training", unit="group"):
        ensemble.steps_(xs)


def like_the_toy(cfg: Config, device: torch.device) -> list[Row]:
    """Cells of the post's figure, each seed with its own world."""
    sizes = SMALL_TOY if cfg.tiny else dict(dict_ratio_exp_high=4)
    settings = toy.Config(
        l1_exp_low=-1,
        l1_exp_high=1,
        dict_ratio_exp_low=0,
        n_steps=cfg.toy_steps,
        n_seeds=cfg.n_seeds,
        **sizes,
    )
    recipe, cells = toy.recipe_of(settings, device), toy.grid(settings)
    rows = []
    for seed in range(cfg.n_seeds):
        group = [cell for cell in cells if cell.seed == seed]
        task = recipe.prepare(group)
        train_(task.ensemble, task.batch_at, cfg.toy_steps)
        for cell, (found, _) in zip(group, task.evaluate(), strict=True):
            rows.append(row_of(cell, {m: found[m] for m in METRICS}, "toy "))
    return rows


def row_of(cell: Cell, values: dict[str, float], of: str = "") -> Row:
    asked = f"l0 {cell.target_l0}" if cell.target_l0 else f"l1exp {cell.l1_exp}"
    return Row(f"{of}{cell.arch}", f"n_dict {cell.n_dict}, {asked}", cell.seed, values)


# --- runs that are there ---


def rows_of_run(folder: Path) -> list[Row]:
    """Of a run folder's results.csv."""
    require((folder / "results.csv").exists(), f"--runs {folder}: it has no results.csv")
    rows = []
    for row in read_csv(folder / "results.csv", texts=TEXTS):
        values = {m: float(row[m]) for m in METRICS if row.get(m) is not None}
        cell = f"n_dict {row['n_dict']}, {asked_of(row)}"
        rows.append(Row(row["arch"], cell, int(row["seed"]), values))
    return rows


def precision_of_run(folder: Path) -> str:
    return read_record(folder / "config.json")["constants"]["precision"]


# --- the comparison ---


def by_cell(rows: list[Row], metric: str) -> dict[tuple[str, str], dict[int, float]]:
    """(family, cell) -> seed -> value"""
    found: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        if metric in row.values:
            found[row.arch, row.cell][row.seed] = row.values[metric]
    return found


def compare(first: list[Row], second: list[Row]) -> Iterator[tuple[list[str], Agreement]]:
    """For each family and metric a line for each cell, and the verdict.

    Cells that are 0 or without a number in one of them, as where all features died, have no
    relative difference, and are left out.
    """
    for metric in METRICS:
        ours, theirs = by_cell(first, metric), by_cell(second, metric)
        for arch in dict.fromkeys(arch for arch, _ in ours):
            lines, differences, variances, n_seeds = [], [], [], 1
            for kind in (k for k in ours if k[0] == arch and k in theirs):
                seeds = sorted(ours[kind].keys() & theirs[kind].keys())
                pair = [[values[kind][seed] for seed in seeds] for values in (ours, theirs)]
                a, b = map(statistics.fmean, pair)
                unit = 1.0 if metric in ABSOLUTE else a
                if len(seeds) < 2 or not a > 0 or not b > 0:
                    continue
                n_seeds = len(seeds)
                differences.append((b - a) / unit)
                variances += [statistics.variance(values) / unit**2 for values in pair]
                lines.append(
                    f"{arch:14} {kind[1]:26} {metric:5} {a:9.4f} {b:9.4f} {(b - a) / unit:+9.4f}"
                )
            if differences:
                noise = (2 / n_seeds * statistics.fmean(variances)) ** 0.5
                yield lines, Agreement(arch, metric, statistics.fmean(differences), noise)


def report(first: list[Row], second: list[Row], names: tuple[str, str]) -> bool:
    """Prints it; whether all agree."""
    a, b = names
    print(f"{'family':14} {'cell':26} {'':5} {a:>9} {b:>9}  difference (mmcs: as it is)")
    agreements = []
    for lines, agreement in compare(first, second):
        verdict = "agrees" if agreement.holds else "DIFFERS"
        print(
            *lines,
            f"{agreement.arch:14} {'mean':26} {agreement.metric:5} {'':19} "
            f"{agreement.difference:+9.4f}, noise {agreement.noise:.4f}: {verdict}",
            sep="\n",
        )
        agreements.append(agreement)
    require(bool(agreements), "nothing to compare: no cell is in both with two seeds or more")
    off = [f"{one.arch} {one.metric}" for one in agreements if not one.holds]
    largest = max(abs(one.difference) for one in agreements)
    if off:
        print(f"{b} DIFFERS from {a} in {', '.join(off)}")
    else:
        print(f"{b} agrees with {a} within noise; largest mean difference {largest:.2%}")
    return not off


def main(argv: list[str]) -> int:
    cfg = parse_flags(Config(), argv, description=__doc__.split("\n\n")[0])
    if cfg.tiny:
        cfg = dataclasses.replace(cfg, **TINY)
    if cfg.runs:
        require(len(cfg.runs) == 2, f"--runs takes two folders, not {len(cfg.runs)}")
        folders = [Path(name) for name in cfg.runs]
        first, second = map(rows_of_run, folders)
        names = tuple(map(precision_of_run, folders))
        return 0 if report(first, second, names) else 1
    device = pick_device(cfg.device)
    names = cfg.precisions or ("tf32" if device.type == "cuda" else "float32", "bf16")
    require(len(names) == 2, f"--precisions takes two, not {len(names)}")
    for name in names:  # refused before anything is trained
        set_precision(name, device)
    found = []
    for name in names:
        set_precision(name, device)
        found.append([*like_run(cfg, device), *like_the_toy(cfg, device)])
    return 0 if report(*found, names) else 1


if __name__ == "__main__":
    run_as_script(main)
