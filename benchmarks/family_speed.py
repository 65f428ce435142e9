"""Speed of a training step of each family of autoencoders, against SAELens and dictionary_learning.

One interleaved run: ours, --n-saes autoencoders of a family at once, on as many threads as torch
has; the others one, in float32 and under bf16 autocast, on as many. Medians over repeats of ms per
step of one autoencoder, samples/s, how far the repeats lie apart, and ms of a core; beside it the
encoder's GEMM alone, the machine's sgemm peak, and how much of our step that GEMM is. All see the
same random x of about length 1. Biases of families without a k are set so that L0 is k, and the
learning rate is so small that it stays there. --n-dead: features that count as dead in all, so that
the auxiliary loss is at work (as far as they have one). "grid": four families at four l0 each, k/2
to 4 k, in one ensemble; beside it, the best others' times added up.

    make .venv-peers/installed
    .venv-peers/bin/python benchmarks/family_speed.py --output results/DATE_family_speed.txt

Whoever isn't installed is left out. Three minutes; run it alone on a quiet machine, else compare
with what relu takes in the same run.
"""

import contextlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from measuring import specs_of, still_ensemble
from peers import FAMILIES_OF
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from sparse_coding.config import parse_flags, run_as_script
from sparse_coding.files import write_atomic
from sparse_coding.sae.families import TRAINED
from sparse_coding.sweep.hardware import describe, set_precision

CPU = torch.device("cpu")
Step = Callable[[int], None]  # makes the i-th step
GRID, OF_GRID, SHARES = "grid", ("relu", "topk", "batchtopk", "matryoshka"), (0.5, 1, 2, 4)


@dataclass(frozen=True)
class Config:
    families: tuple[str, ...] = TRAINED
    width: int = 768
    n_dict: int = 4096
    batch: int = 1024
    k: int = 25
    n_saes: int = 2  # ours, at once
    n_dead: int = 0  # features
    n_repeats: int = 5  # interleaved
    seconds: float = 1.5  # of each repeat
    precision: str = "float32"  # of ours: of factors in GEMMs, or bf16, bf16x3
    peers: bool = True
    output: str = ""  # a text file of what is printed


def batches(cfg: Config) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(8, cfg.batch, cfg.width, generator=rng) / cfg.width**0.5


def ours(asked: list[tuple[str, int]], cfg: Config, xs: Tensor) -> Step:
    """Steps of all autoencoders asked for, (family, l0) of each, as many as there are batches."""
    ensemble = still_ensemble(specs_of([(arch, cfg.n_dict, l0) for arch, l0 in asked]), xs[0])

    def step(_: int) -> None:
        at_a_time = 1 if cfg.n_dead else len(xs)  # who fires is dead no longer
        for some in xs.split(at_a_time):
            for stack in ensemble.stacks:
                stack.silent[:, : cfg.n_dead] = 10**6
            ensemble.steps_(some)

    return step


def theirs(of: str, arch: str, cfg: Config, xs: Tensor, autocast: bool) -> Step:
    """Steps of one autoencoder, one at a time."""
    train = FAMILIES_OF[of][arch](cfg.width, cfg.n_dict, cfg.k, cfg.n_dead)

    def step(i: int) -> None:
        context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
        with context:
            train(i, xs[i % len(xs)])

    return step


def contestants(cfg: Config, xs: Tensor) -> dict[tuple[str, str], tuple[Step, int]]:
    """(who, family) -> (a function that steps, how many SAE-steps it makes)."""
    found = {}
    for arch in cfg.families:
        found["ours", arch] = ours([(arch, cfg.k)] * cfg.n_saes, cfg, xs), cfg.n_saes * len(xs)
        for of in FAMILIES_OF if cfg.peers else ():
            if importlib.util.find_spec(of) and arch in FAMILIES_OF[of]:
                for autocast in (False, True):
                    who = of + ", bf16" * autocast
                    found[who, arch] = theirs(of, arch, cfg, xs, autocast), 1
    if set(OF_GRID) <= set(cfg.families):
        asked = [(arch, int(share * cfg.k)) for arch in OF_GRID for share in SHARES]
        found["ours", GRID] = ours(asked, cfg, xs), len(asked) * len(xs)
    return found


def gemm(rows: int, inner: int, columns: int) -> tuple[Step, float]:
    """(a step that multiplies matrices, its GFLOP)."""
    a, b = torch.randn(rows, inner), torch.randn(columns, inner)
    out = torch.empty(rows, columns)
    return lambda _: torch.mm(a, b.T, out=out), 2e-9 * rows * inner * columns


def seconds_per_call(step: Step, at_least: float) -> tuple[float, float]:
    """On the clock, and of all cores."""
    n, start, cores = 0, time.perf_counter(), time.process_time()
    while n == 0 or time.perf_counter() - start < at_least:
        step(n)
        n += 1
    return (time.perf_counter() - start) / n, (time.process_time() - cores) / n


def measure(runs: dict, cfg: Config) -> dict[tuple, list[tuple[float, float]]]:
    """Seconds per SAE-step on the clock and of all cores, of each repeat; the first call of each
    compiles or allocates."""
    for step, _ in runs.values():
        step(0)
        step(1)
    seconds: dict[tuple, list] = {name: [] for name in runs}
    for _ in range(cfg.n_repeats):
        for name, (step, n) in runs.items():
            seconds[name].append([s / n for s in seconds_per_call(step, cfg.seconds)])
    return seconds


def best_others(median: dict, families: tuple[str, ...]) -> float | None:
    """Mean over the families of the seconds of the best other in float32, if all have one."""
    of_each = [
        [clock for (who, arch), (clock, _) in median.items() if arch == a and who in FAMILIES_OF]
        for a in families
    ]
    return statistics.fmean(map(min, of_each)) if all(of_each) else None


def report(seconds: dict, flops: dict, cfg: Config) -> list[str]:
    """Lines to print."""
    median = {
        name: [statistics.median(s) for s in zip(*of_run, strict=True)]
        for name, of_run in seconds.items()
    }
    lines = []
    for name, gflop in flops.items():
        clock, _ = median[name]
        lines.append(f"{name[1]:21} {1e3 * clock:7.1f} ms, {gflop / clock:.0f} GFLOP/s")
    share_of = median["", "the encoder's GEMM"][0]
    lines.append(
        f"{'family':14} {'who':28} {'ms':>7} {'(range)':>15} {'samples/s':>10} {'ms of core':>10}"
        "   to the best other in float32; GEMM's share"
    )
    for (who, arch), (clock, cores) in median.items():
        if not who:
            continue
        clocks = [1e3 * c for c, _ in seconds[who, arch]]
        spread = f"({min(clocks):.1f}-{max(clocks):.1f})"
        line = f"{arch:14} {who:28} {1e3 * clock:7.1f} {spread:>15} {cfg.batch / clock:10,.0f}"
        line += f" {1e3 * cores:10.1f}"
        if who == "ours":
            best = best_others(median, OF_GRID if arch == GRID else (arch,))
            line += f"   {best / clock:.1f} times" if best else " " * 12
            line += f"; {share_of / clock:.0%}"
        lines.append(line)
    return lines


def main(argv: list[str]) -> int:
    cfg = parse_flags(Config(), argv, description=__doc__.split("\n\n")[0])
    set_precision(cfg.precision, CPU)
    xs = batches(cfg)
    runs = contestants(cfg, xs)
    flops = {}
    for name, shape in (
        ("the encoder's GEMM", (cfg.n_dict, cfg.width, cfg.batch)),
        ("sgemm of 2048 cubed", (2048,) * 3),
    ):
        step, flops["", name] = gemm(*shape)
        runs["", name] = step, 1
    head = f"torch {torch.__version__}, {describe(CPU)}, {torch.get_num_threads()} threads, {cfg}"
    lines = [head, *report(measure(runs, cfg), flops, cfg)]
    print("\n".join(lines), flush=True)
    if cfg.output:
        write_atomic(Path(cfg.output), "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    run_as_script(main)
