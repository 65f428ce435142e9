"""What the full figure costs on this machine: seconds, dollars, and how near that is to the floor.

For each size of the grid the 17 autoencoders of a row, or fewer large ones, are stepped with every
step dense and with 1 % of the codes above 0, their weights held (lr 0), on the same batches:
seconds per step, which should grow linearly with the number of features, and the memory that was
planned and taken. From these the 153 x 20 000 steps of the figure: an upper bound (all dense), a
lower one (all sparse; training moves from the first toward the second), and the floors that the
measured speed of this machine's GEMM sets: five GEMMs a step for dense training, and the encoder's
alone, which all codes need.

    python benchmarks/figure_cost.py --gpu-price 0.10

Three minutes on two cores.
"""

import resource
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from replicate_toy_models import PRESETS, grid
from replicate_toy_models import Config as ToyConfig
from sparse_coding.config import parse_flags, run_as_script
from sparse_coding.files import write_csv
from sparse_coding.sae.engines.dense import DenseEngine
from sparse_coding.sae.ensemble import Ensemble, ensemble_bytes
from sparse_coding.sae.spec import SAESpec
from sparse_coding.sweep.hardware import describe, pick_device, set_precision

H, BATCH = 256, 256
FLOP_PER_FEATURE = 2 * BATCH * H  # of one GEMM
SPARSE = 0.01  # share of codes above 0 in the sparse measurement
ROW, MOST_FEATURES = 17, 2**15  # autoencoders of a row of the figure; fewer where all have more


@dataclass(frozen=True)
class Config:
    device: str = "auto"  # auto, cpu, cuda
    gpu_price: float = 0.0  # dollars per hour of this machine, GPU or not
    sizes: tuple[int, ...] = tuple(2**e for e in range(6, 17))  # n_dict, ascending
    seconds: float = 1.0  # of each of five measurements
    output: str = ""  # a csv of the table


def ensemble_of(n_dict: int, device: torch.device, *, dense: bool) -> Ensemble:
    """A row of autoencoders that learn nothing; of large ones two, on a CPU one per thread."""
    least = 2 if device.type == "cuda" else max(2, torch.get_num_threads())
    n = max(least, min(ROW, MOST_FEATURES // n_dict))
    specs = [SAESpec(n_dict, 1e-3, seed) for seed in range(n)]
    ensemble = Ensemble(specs, H, lr=0.0, device=device)
    if dense and not isinstance(ensemble.engine, DenseEngine):
        ensemble.engine.density = -1.0
    return ensemble


def make_sparse_(ensemble: Ensemble, x: Tensor) -> None:
    """Lowers the biases until SPARSE of the codes are above 0."""
    for stack in ensemble.stacks:
        for i in range(len(stack.specs)):
            pre = x[:16] @ stack.W_enc[i].T
            some = pre.flatten()[:: max(1, pre.numel() // 10**6)]
            stack.b_enc[i] = -some.quantile(1 - SPARSE)


def step_seconds(ensemble: Ensemble, xs: Tensor, seconds: float) -> float:
    """Per step of all autoencoders; median of five.

    On a CPU: seconds of all cores over the number of threads, which other work changes less than
    the clock; there are as many autoencoders at least, so none need wait for another.
    """
    on_gpu, n_threads = xs.device.type == "cuda", torch.get_num_threads()
    clock, n_cores = (time.perf_counter, 1) if on_gpu else (time.process_time, n_threads)
    per_step = []
    for _ in range(6):
        n, start = 0, clock()
        while n == 0 or clock() - start < seconds * n_cores:
            ensemble.steps_(xs)
            n += len(xs)
            if on_gpu:
                torch.cuda.synchronize()
        per_step.append((clock() - start) / n / n_cores)
    return statistics.median(per_step[1:])  # the first is warming up


def peak_flops(device: torch.device) -> float:
    """FLOP/s of the encoder's GEMM; on a CPU that of one core times the cores."""
    on_gpu, n_threads = device.type == "cuda", torch.get_num_threads()
    torch.set_num_threads(1)
    W_enc, x = torch.randn(512, H, device=device), torch.randn(BATCH, H, device=device)
    clock, seconds = time.perf_counter if on_gpu else time.process_time, []
    for _ in range(20):
        start = clock()
        for _ in range(50):
            W_enc @ x.T
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append((clock() - start) / 50)
    torch.set_num_threads(n_threads)
    return (1 if on_gpu else n_threads) * 512 * FLOP_PER_FEATURE / min(seconds)


def rough_time(seconds: float) -> str:
    """40 s, 3 min or 1.5 h."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def peak_memory(device: torch.device) -> int:
    """Bytes, so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(cfg: Config, device: torch.device) -> list[dict]:
    """A row per size."""
    x = torch.randn(BATCH, H, generator=torch.Generator().manual_seed(0)).to(device)
    table, before = [], None
    for n_dict in cfg.sizes:
        line: dict = {"n_dict": n_dict}
        for kind in ("dense", "sparse"):
            ensemble = ensemble_of(n_dict, device, dense=kind == "dense")
            if kind == "sparse":
                make_sparse_(ensemble, x)
            n_steps = ensemble.engine.steps_at_a_time
            seconds = step_seconds(ensemble, x.expand(n_steps, -1, -1).contiguous(), cfg.seconds)
            n_features = n_dict * len(ensemble.specs)
            line |= {f"{kind}_ns_per_feature": round(1e9 * seconds / n_features, 1)}
            if before is None:
                before = peak_memory(device)
            if kind == "sparse":  # as an evaluation does
                ensemble.stacks[0].forward(x)
            sizes = [n_dict] * len(ensemble.specs)
            del ensemble
        kinds = [("relu", n_dict) for n_dict in sizes]
        line["planned_mb"] = round(ensemble_bytes(kinds, H, BATCH, device) / 1e6, 1)
        line["taken_mb"] = round((peak_memory(device) - before) / 1e6, 1)
        table.append(line)
        print("  ".join(f"{value:>13,}" for value in line.values()), flush=True)
    return table


def cost(table: list[dict], cfg: Config, device: torch.device) -> None:
    """Prints what the whole figure takes by these numbers."""
    full = ToyConfig(**PRESETS["full"])
    n_features = sum(cell.n_dict for cell in grid(full))
    flops = peak_flops(device)

    def report(what: str, seconds: float, floor: float) -> None:
        dollars = f", ${seconds / 3600 * cfg.gpu_price:.2f}" if cfg.gpu_price else ""
        print(f"{what}: {rough_time(seconds)}{dollars}; floor {rough_time(floor)}, "
              f"{floor / seconds:.0%} of its speed")  # fmt: skip

    gemm = full.n_steps * n_features * FLOP_PER_FEATURE / flops
    print(f"the figure: {n_features:,} features x {full.n_steps:,} steps; GEMM {flops / 1e9:,.0f} "
          "GFLOP/s")  # fmt: skip
    for kind, n_gemms in (("dense", 5), ("sparse", 1)):
        of_size = {line["n_dict"]: line[f"{kind}_ns_per_feature"] for line in table}
        default = statistics.median(of_size.values())
        seconds = full.n_steps * sum(
            1e-9 * cell.n_dict * of_size.get(cell.n_dict, default) for cell in grid(full)
        )
        report(f"all steps {kind}", seconds, n_gemms * gemm)


def main(argv: list[str]) -> int:
    cfg = parse_flags(Config(), argv, description=__doc__.split("\n\n")[0])
    device = pick_device(cfg.device)
    precision = set_precision("auto", device)
    print(f"torch {torch.__version__}, {describe(device)}, {precision}, h {H}, batch {BATCH}")
    print("       n_dict   dense, ns per feature  sparse  memory planned  taken, MB")
    table = measure(cfg, device)
    for kind in ("dense", "sparse"):
        values = [line[f"{kind}_ns_per_feature"] for line in table]
        middle = statistics.median(values)
        spread = f"{min(values) / middle - 1:+.0%} to {max(values) / middle - 1:+.0%}"
        print(f"{kind}: {middle:.0f} ns per feature and step, {spread}")
    cost(table, cfg, device)
    if cfg.output:
        write_csv(Path(cfg.output), table)
    return 0


if __name__ == "__main__":
    run_as_script(main)
