"""Do two ways to train on a CPU find the same? Whole runs, over several seeds, in pairs.

By default dense and sparse steps; with --pair float32 bf16 (or bf16x3), sparse steps in these
precisions of factors, where the CPU has them. Both train the same autoencoders (same world, batches
and starts) of the june2023 law. Rounding alone makes a single run scatter by about 0.009 of mmcs,
so only means over seeds can be compared: for each cell the mean difference (second - first) of mmcs
and of dead features, with its standard error over the seeds. Exit code 1 where a mean is further
than two standard errors from 0, or mmcs further than 0.01.

    python benchmarks/sparse_agreement.py --output-dir results/DATE_sparse_agreement

Each run is kept in the folder, so the same command goes on. 40 minutes on two quiet cores, 20
without the dense half.
"""

import dataclasses
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from replicate_toy_models import Config as ToyConfig
from replicate_toy_models import recipe_of
from sparse_coding.config import parse_flags, require, run_as_script
from sparse_coding.files import read_csv, write_csv
from sparse_coding.sae.batches import stacked, step_ranges
from sparse_coding.sae.engines.cpu_bf16 import N_PARTS
from sparse_coding.sae.engines.dense import DenseEngine
from sparse_coding.sweep.grid import Cell
from sparse_coding.sweep.hardware import set_precision

WAYS = ("dense", "sparse", *N_PARTS)
L1_EXPS, SIZE_EXPS = (-4, -2, -1), (0, 1)  # l1_alpha = 10^(e/4), dict_ratio = 2^e
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Config:
    output_dir: str = "outputs/sparse_agreement"
    pair: tuple[str, str] = ("dense", "sparse")  # or precisions: float32, bf16, bf16x3
    n_seeds: int = 8
    n_steps: int = 10_000
    n_processes: int = 2  # each with one thread


def cells_of(seed: int, n_true: int) -> list[Cell]:
    return [Cell(seed, l1, size, n_true * 2**size) for size in SIZE_EXPS for l1 in L1_EXPS]


def train(way: str, seed: int, n_steps: int) -> list[dict]:
    """Rows of one seed's cells, all trained in one way."""
    set_precision(way if way in N_PARTS else "float32", CPU)
    settings = dataclasses.replace(ToyConfig(), data_law="june2023", n_steps=n_steps)
    cells, start = cells_of(seed, settings.n_true_features), time.monotonic()
    task = recipe_of(settings, CPU).prepare(cells)
    if way == "dense":
        task.ensemble.engine = DenseEngine(task.ensemble.stacks)
    for _, xs in stacked(task.batch_at, step_ranges(0, n_steps, length=16, stop_every=n_steps)):
        task.ensemble.steps_(xs)
    seconds = round(time.monotonic() - start)
    kept = ("n_dict", "l1_alpha", "mmcs", "n_dead", "l0", "mse")
    return [
        {"seed": seed, "l1_exp": cell.l1_exp, "seconds_all_cells": seconds}
        | {name: row[name] for name in kept}
        for cell, (row, _) in zip(cells, task.evaluate(), strict=True)
    ]


def run_missing(folder: Path, cfg: Config) -> list[dict]:
    """All rows; each finished run is a file of its own."""
    runs = {
        (way, seed): folder / "runs" / f"{way}-seed{seed}.csv"
        for seed in range(cfg.n_seeds)
        for way in cfg.pair
    }
    missing = [run for run, path in runs.items() if not path.exists()]
    one_thread = dict(initializer=torch.set_num_threads, initargs=(1,))
    with ProcessPoolExecutor(
        cfg.n_processes, mp_context=get_context("spawn"), **one_thread
    ) as pool:
        futures = {pool.submit(train, *run, cfg.n_steps): run for run in missing}
        for future in as_completed(futures):
            write_csv(runs[futures[future]], future.result())
            print(f"{futures[future]} done", flush=True)
    return [{"way": run[0]} | row for run, path in runs.items() for row in read_csv(path)]


def compare(rows: list[dict], pair: tuple[str, str]) -> list[dict]:
    """A row per cell: means of both, mean difference and its standard error."""
    table = []
    for n_dict, l1_exp in sorted({(r["n_dict"], r["l1_exp"]) for r in rows}):
        line: dict = {"n_dict": n_dict, "l1_exp": l1_exp}
        for name in ("mmcs", "n_dead"):
            value = {
                (r["way"], r["seed"]): r[name]
                for r in rows
                if (r["n_dict"], r["l1_exp"]) == (n_dict, l1_exp)
            }
            seeds = sorted({seed for _, seed in value})
            first, second = ([value[way, s] for s in seeds] for way in pair)
            difference = [b - a for a, b in zip(first, second, strict=True)]
            line |= {
                f"{name}_{pair[0]}": statistics.mean(first),
                f"{name}_{pair[1]}": statistics.mean(second),
                f"{name}_difference": statistics.mean(difference),
                f"{name}_standard_error": statistics.stdev(difference) / len(seeds) ** 0.5,
            }
        table.append(line)
    return table


def agrees(line: dict) -> bool:
    within = all(
        abs(line[f"{name}_difference"]) <= 2 * line[f"{name}_standard_error"]
        for name in ("mmcs", "n_dead")
    )
    return within and abs(line["mmcs_difference"]) < 0.01


def main(argv: list[str]) -> int:
    cfg = parse_flags(Config(), argv, description=__doc__.split("\n\n")[0])
    for way in cfg.pair:
        require(way in WAYS, f"--pair {way} is not one of {', '.join(WAYS)}")
        if way in N_PARTS:
            set_precision(way, CPU)  # or a line why this machine lacks it
    folder, (a, b) = Path(cfg.output_dir), cfg.pair
    table = compare(run_missing(folder, cfg), cfg.pair)
    write_csv(folder / "agreement.csv", table)
    print(f"torch {torch.__version__}, {cfg.n_seeds} seeds, {cfg.n_steps} steps, june2023 law")
    print(f"n_dict   e   mmcs {a}  {b}  difference          dead {a}  {b}  difference")
    for line in table:
        print(
            f"{line['n_dict']:6d} {line['l1_exp']:3d}   {line[f'mmcs_{a}']:10.4f}  "
            f"{line[f'mmcs_{b}']:.4f}  {line['mmcs_difference']:+.4f} ± "
            f"{line['mmcs_standard_error']:.4f}  {line[f'n_dead_{a}']:12.1f} "
            f"{line[f'n_dead_{b}']:7.1f}  {line['n_dead_difference']:+6.2f} ± "
            f"{line['n_dead_standard_error']:.2f}  {'' if agrees(line) else 'DIFFERS'}"
        )
    return 0 if all(map(agrees, table)) else 1


if __name__ == "__main__":
    run_as_script(main)
