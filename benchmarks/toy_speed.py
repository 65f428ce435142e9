"""Speed of toy training: ours against the loop of June 2023, dictionary_learning and SAELens.

Part 1, SAE-steps/s, medians and ranges over interleaved repeats: the others train one autoencoder
of a middling l1_alpha; ours a row of the figure (17 l1_alphas) at its start, after --warm-steps,
and with every step dense. All on the same batches, made beforehand. Part 2, a row of the figure at
full length, our data generation included, against the time that the best of the others needs for as
many steps, extrapolated, its data given for free.

    make .venv-peers/installed
    .venv-peers/bin/python benchmarks/toy_speed.py --output-dir results/DATE_toy_speed

Whoever isn't installed is left out. Half an hour on two cores; --row-sizes leaves out part 2. Run
it alone on a quiet machine: the others are faster with spinning threads there (OMP_WAIT_POLICY
unset), ours doesn't depend on it. Where other work can't be kept away, set OMP_WAIT_POLICY=PASSIVE
and look at the times per core-second: what the work costs, as if the others' threads never waited.
"""

import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from peers import BATCH, OTHERS, H
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from sparse_coding.config import parse_flags, run_as_script
from sparse_coding.files import write_csv
from sparse_coding.sae.batches import prefetched, step_ranges
from sparse_coding.sae.engines.cpu import CpuEngine
from sparse_coding.sae.ensemble import Ensemble
from sparse_coding.sweep.grid import make_grid
from sparse_coding.sweep.hardware import describe, set_precision
from sparse_coding.sweep.training import Task
from sparse_coding.toy.data import ToyData
from sparse_coding.toy.recipe import ToyRecipe

CPU = torch.device("cpu")
DATA = ToyData("post", H, 512, n_active=5, feature_prob_decay=0.99, noise_std=0.0, batch_size=BATCH)


@dataclass(frozen=True)
class Config:
    output_dir: str = "outputs/toy_speed"
    sizes: tuple[int, ...] = (64, 512, 2048)  # n_dict
    row_sizes: tuple[int, ...] = (512, 2048)  # n_dict of full-length rows
    n_steps: int = 20_000  # of a full-length row
    warm_steps: int = 3000  # of ours before the second measurement
    n_repeats: int = 5  # interleaved
    seconds: float = 2.0  # of each repeat
    precision: str = "float32"  # of ours: of factors in GEMMs, or bf16, bf16x3


def row_of(n_dict: int, n_steps: int) -> Task:
    """A row of the figure, ready to train, as replicate_toy_models.py has it."""
    recipe = ToyRecipe(DATA, "per_feature", 1e-3, n_steps, CPU)
    return recipe.prepare(
        make_grid(n_dict, seeds=range(1), l1_exps=range(-8, 9), size_exps=range(1))
    )


def trainer_of(ensemble: Ensemble, xs: Tensor) -> Callable[[int], None]:
    """Steps of all 17 autoencoders, some at a time, as the training loop takes them."""

    def run(n: int) -> None:
        for steps in step_ranges(0, n, length=ensemble.engine.steps_at_a_time, stop_every=n):
            ensemble.steps_(xs[steps.start % len(xs) :][: len(steps)])

    return run


class Stopwatch:
    """Adds up seconds on the clock and seconds of all cores while it is entered."""

    def __init__(self) -> None:
        self.clock = self.cores = 0.0

    def __enter__(self) -> "Stopwatch":
        self.started = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *exc: object) -> None:
        self.clock += time.perf_counter() - self.started[0]
        self.cores += time.process_time() - self.started[1]


def rates_of(run: Callable[[int], None], seconds: float) -> tuple[float, float]:
    """Steps per second and per second of a core, in runs of 16 (what we take at a time)."""
    n, watch = 0, Stopwatch()
    while watch.clock < seconds:
        with watch:
            run(16)
        n += 16
    return n / watch.clock, n / watch.cores


def contestants(n_dict: int, warm_steps: int, installed: list[str]) -> dict:
    """name -> (run n steps, autoencoders that it steps), all of them warm."""
    task = row_of(n_dict, warm_steps)
    xs = torch.stack([task.batch_at(step) for step in range(256)])
    start, dense = task.ensemble, row_of(n_dict, 1).ensemble
    dense.engine = CpuEngine(dense.stacks, n_threads=torch.get_num_threads(), density=-1)
    warm = row_of(n_dict, warm_steps)
    for _, batch in prefetched(
        warm.batch_at, step_ranges(0, warm_steps, length=16, stop_every=warm_steps)
    ):
        warm.ensemble.steps_(batch)
    run = {name: (OTHERS[name](n_dict, cycle(xs)), 1) for name in installed}
    run |= {
        "ours, every step dense": (trainer_of(dense, xs), 17),
        "ours, at the start": (trainer_of(start, xs), 17),
        f"ours, after {warm_steps} steps": (trainer_of(warm.ensemble, xs), 17),
    }
    for steps, _ in run.values():
        steps(16)
    return run


def compare(n_dict: int, cfg: Config, installed: list[str]) -> list[dict]:
    """A row per contestant: median, least and most SAE-steps/s, and the median per core."""
    run = contestants(n_dict, cfg.warm_steps, installed)
    rates: dict[str, list] = {name: [] for name in run}
    for _ in range(cfg.n_repeats):
        for name, (steps, n_saes) in run.items():
            rates[name].append([n_saes * r for r in rates_of(steps, cfg.seconds)])
    medians = {
        name: list(map(statistics.median, zip(*r, strict=True))) for name, r in rates.items()
    }
    best = [max(medians[name][i] for name in installed) for i in (0, 1)]
    table = []
    for name, (per_second, per_core) in medians.items():
        clock = [r for r, _ in rates[name]]
        line = {"n_dict": n_dict, "who": name, "sae_steps_per_s": round(per_second, 1)}
        line |= {"least": round(min(clock), 1), "most": round(max(clock), 1)}
        line |= {"to_the_best_other": round(per_second / best[0], 2)}
        line |= {"per_core_second": round(per_core, 1)}
        table.append(line | {"to_the_best_other_per_core": round(per_core / best[1], 2)})
        print(
            f"{n_dict:6d}  {name:24} {per_second:8,.0f}  ({min(clock):,.0f}-{max(clock):,.0f})"
            f"  {per_second / best[0]:5.2f}   {per_core:8,.0f}  {per_core / best[1]:5.2f}",
            flush=True,
        )
    return table


def full_row(n_dict: int, cfg: Config, installed: list[str]) -> dict:
    """Time of a row at full length, and of the others by extrapolation: measured five times, while
    ours is stopped."""
    task = row_of(n_dict, cfg.n_steps)
    xs = torch.stack([task.batch_at(step) for step in range(64)])
    others = {name: OTHERS[name](n_dict, cycle(xs)) for name in installed}
    rates: dict[str, list] = {name: [] for name in installed}
    length, part = task.ensemble.engine.steps_at_a_time, -(-cfg.n_steps // 5)
    watch, series = Stopwatch(), []
    for first in range(0, cfg.n_steps, part):
        for name, steps in others.items():
            rates[name].append(rates_of(steps, cfg.seconds))
        before, last = watch.clock, min(first + part, cfg.n_steps)
        with watch:
            for _, batch in prefetched(
                task.batch_at, step_ranges(first, last, length=length, stop_every=cfg.n_steps)
            ):
                task.ensemble.steps_(batch)
        speed = 17 * (last - first) / (watch.clock - before)
        series.append({"step": last, "sae_steps_per_s": round(speed, 1)})
        print(f"{n_dict:6d}  {last:6d} steps: {speed:,.0f} SAE-steps/s", flush=True)
    medians = {
        name: list(map(statistics.median, zip(*r, strict=True))) for name, r in rates.items()
    }
    line: dict = {"n_dict": n_dict, "n_steps": cfg.n_steps}
    for i, (unit, ours) in enumerate((("seconds", watch.clock), ("core_seconds", watch.cores))):
        best = max(installed, key=lambda name, i=i: medians[name][i])
        theirs = 17 * cfg.n_steps / medians[best][i]
        line |= {unit: round(ours, 1), f"best_other_by_{unit}": best}
        line |= {f"its_{unit}": round(theirs, 1), f"times_fewer_{unit}": round(theirs / ours, 2)}
        print(
            f"{n_dict:6d}  row of 17 x {cfg.n_steps} steps: {ours:.0f} {unit}, data included; "
            f"{best} {theirs:.0f}, data for free: {theirs / ours:.2f} times",
            flush=True,
        )
    return {"line": line, "series": series, "others": {k: m[0] for k, m in medians.items()}}


def draw(table: list[dict], rows: dict[int, dict], path: Path, precision: str) -> None:
    """Left: SAE-steps/s by size. Right: ours over full-length rows, the others as levels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for who in dict.fromkeys(line["who"] for line in table):
        lines = [line for line in table if line["who"] == who]
        median = [line["sae_steps_per_s"] for line in lines]
        spread = [
            [m - line["least"] for m, line in zip(median, lines, strict=True)],
            [line["most"] - m for m, line in zip(median, lines, strict=True)],
        ]
        sizes = [line["n_dict"] for line in lines]
        left.errorbar(sizes, median, spread, marker="o", capsize=3, label=who)
    left.set(xscale="log", yscale="log", xlabel="n_dict", ylabel="SAE-steps/s")
    left.set_xticks(sizes, sizes)
    left.minorticks_off()
    left.set_title(f"h {H}, batch {BATCH}, ours in {precision}, {describe(CPU)}")
    left.legend(fontsize=8)
    for i, (n_dict, row) in enumerate(rows.items()):
        at = [point["step"] for point in row["series"]]
        speed = [point["sae_steps_per_s"] for point in row["series"]]
        right.step(
            [0, *at], [speed[0], *speed], where="pre", color=f"C{i}", label=f"ours, {n_dict}"
        )
        best = max(row["others"], key=row["others"].get)
        label = f"{best}, {n_dict}, data for free"
        right.axhline(row["others"][best], color=f"C{i}", linestyle=":", label=label)
    right.set(yscale="log", xlabel="step", ylabel="SAE-steps/s, data included")
    right.set_ylim(bottom=right.get_ylim()[0] / 4)  # room for the legend
    right.set_title("a row of the figure at full length")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> int:
    cfg = parse_flags(Config(), argv, description=__doc__.split("\n\n")[0])
    set_precision(cfg.precision, CPU)
    module = {"loop of 2023": "torch"}
    installed = [name for name in OTHERS if importlib.util.find_spec(module.get(name, name))]
    policy = os.environ.get("OMP_WAIT_POLICY", "unset")
    print(f"torch {torch.__version__}, {describe(CPU)}, {cfg.precision}, OMP_WAIT_POLICY {policy}")
    for name in OTHERS.keys() - set(installed):
        print(f"{name} is not installed, left out")
    print(
        "n_dict  who                        SAE-steps/s, median (range), to the best of the others"
    )
    table = [line for n_dict in cfg.sizes for line in compare(n_dict, cfg, installed)]
    rows = {n_dict: full_row(n_dict, cfg, installed) for n_dict in cfg.row_sizes}
    folder = Path(cfg.output_dir)
    for name, lines in (
        ("speed", table),
        ("rows", [row["line"] for row in rows.values()]),
        ("rows_over_steps", [{"n_dict": n} | p for n, row in rows.items() for p in row["series"]]),
    ):
        if lines:
            write_csv(folder / f"{name}.csv", lines)
    if table and rows:
        draw(table, rows, folder / "toy_speed.png", cfg.precision)
    return 0


if __name__ == "__main__":
    run_as_script(main)
