"""Speed of the full toy figure on a GPU, against the GPU's limits and the loop of June 2023.

    python benchmarks/gpu_speed.py --full --output results/DATE_gpu_speed.txt

In this order: kernels against dense steps in float64; the GPU's measured limits (a copy, a GEMM of
the precision at hand); the whole grid at once, its data included: with --full to the end, else
--warm-steps, and the rest at the speed of the last of them; time per step of a row of the figure at
each size, with kernels at its start and after --warm-steps, and dense; the loop of 2023 there.

Ten minutes with --full. Exit code 2 without a GPU, 1 where numbers disagree.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from measuring import (
    Report,
    command,
    conditions,
    copy_speed,
    gemm_speed,
    seconds_per_call,
    seconds_per_step,
    synchronize,
)
from peers import BATCH, H, Loop2023
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from sparse_coding.config import parse_flags, require, run_as_script
from sparse_coding.sae.batches import ahead_on, step_ranges
from sparse_coding.sae.engines import gpu
from sparse_coding.sae.engines.dense import DenseEngine
from sparse_coding.sae.ensemble import Ensemble
from sparse_coding.sae.spec import SAESpec
from sparse_coding.sweep.grid import make_grid
from sparse_coding.sweep.hardware import set_precision
from sparse_coding.sweep.training import Task
from sparse_coding.toy.data import ToyData
from sparse_coding.toy.recipe import ToyRecipe

DATA = ToyData("post", H, 512, n_active=5, feature_prob_decay=0.99, noise_std=0.0, batch_size=BATCH)
# Relative distance from float64 after 50 steps: some times what shorter factors cause (LOG.md). A
# step that is wrong in any part moves parameters by 0.1 and more
MOST_OFF = {"float32": 2e-3, "tf32": 0.02, "bf16": 0.04}
TILES = (  # other than the default ones, for --tune
    dict(encode_b=256), dict(encode_f=64), dict(encode_k=64), dict(decode_b=128, decode_h=64),
    dict(decode_k=64), dict(list_f=16), dict(list_f=64, update_h=128), dict(backward_b=128),
    dict(update_k=16),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    device: str = "cuda"  # cpu: kernels are interpreted, for a test of this script
    precision: str = "auto"  # float32, tf32, bf16; auto: tf32
    output: str = ""  # a text file of what is printed
    full: bool = False  # train the whole grid to the end
    tune: bool = False  # also measure other tiles
    n_steps: int = 20_000  # of the figure
    warm_steps: int = 3000
    check_steps: int = 50  # of the comparison with float64
    loop_steps: int = 1000  # of the loop of 2023, at each size
    seconds: float = 1.0  # of a measurement
    at_a_time: int = 16  # steps
    check_dict: int = 512  # features of the autoencoders that are compared with float64
    copy_gb: float = 1.0  # of the measured copy
    gemm_size: int = 8192  # of the measured GEMM
    l1_exp_low: int = -8
    l1_exp_high: int = 9
    dict_ratio_exp_low: int = -3
    dict_ratio_exp_high: int = 6


def print_conditions(cfg: Config, device: torch.device, precision: str, say: Report) -> None:
    """What this ran on."""
    say(command("gpu_speed.py"))
    say(conditions(device))
    say(f"h {H}, batch {BATCH}, {precision} factors in GEMMs, state and sums in float32\n")


def limits(cfg: Config, device: torch.device, say: Report) -> tuple[float, float]:
    """Measured bytes/s of a copy and FLOP/s of a square GEMM."""
    bandwidth = copy_speed(device, cfg.copy_gb, cfg.seconds)
    gemm = gemm_speed(device, cfg.gemm_size, cfg.seconds, torch.float32)
    say(f"limits: copy {bandwidth / 1e9:,.0f} GB/s, torch's GEMM {gemm / 1e12:,.1f} TFLOP/s\n")
    return bandwidth, gemm


def task_of(cfg: Config, ratios: range, device: torch.device) -> Task:
    """A part of the figure as replicate_toy_models.py trains it."""
    axes = dict(l1_exps=range(cfg.l1_exp_low, cfg.l1_exp_high), size_exps=ratios)
    cells = make_grid(DATA.n_true_features, seeds=range(1), **axes)
    task = ToyRecipe(DATA, "per_feature", 1e-3, cfg.n_steps, device).prepare(cells)
    if device.type == "cpu":
        task.ensemble.engine = gpu.GpuEngine(task.ensemble.stacks)
    return task


def all_sizes(cfg: Config) -> range:
    return range(cfg.dict_ratio_exp_low, cfg.dict_ratio_exp_high)


def batches(task: Task, n: int) -> Tensor:
    return torch.stack([task.batch_at(step) for step in range(n)])


def check(cfg: Config, device: torch.device, precision: str, say: Report) -> bool:
    """Whether kernels give the numbers of dense steps in float64."""
    n = cfg.check_dict
    specs = [SAESpec(n, 10**e / n, seed=i) for i, e in enumerate((-1.5, -0.5, 0.5))]
    xs = batches(task_of(cfg, range(1), device), cfg.check_steps)
    engines, trained = (DenseEngine, DenseEngine, gpu.GpuEngine), []
    for engine, dtype in zip(engines, (torch.float64, torch.float32, torch.float32), strict=True):
        ensemble = Ensemble(specs, H, lr=1e-3, device=device, dtype=dtype)
        ensemble.engine = engine(ensemble.stacks)
        ensemble.steps_(xs.to(dtype))
        trained.append([p.double() for p in ensemble.stacks[0].parameters.values()])
    if ensemble.engine.ready is None:
        return False  # a line has said why
    say(f"distance from float64 after {cfg.check_steps} steps, relative, W_enc b_enc W_dec:")
    for name, values in zip(("torch", "kernels"), trained[1:], strict=True):
        pairs = zip(values, trained[0], strict=True)
        off = [float((a - b).norm() / b.norm()) for a, b in pairs]
        say(f"  {name:8}" + "".join(f"  {value:.1e}" for value in off))
    agrees = all(value <= MOST_OFF[precision] for value in off)  # of the kernels
    say(f"kernels {'agree' if agrees else 'DISAGREE'}\n")
    return agrees


def needs(ensemble: Ensemble) -> tuple[float, float]:
    """Bytes and FLOP of the last step: W_enc, six matrices read and written where rows moved, codes
    and δ written and read where features fired."""
    _, work, _ = ensemble.engine.ready
    n = sum(ensemble.engine.sizes)
    fired, resting = int(work.n_fired.sum()), int(work.n_resting.sum())
    n_bytes = 4 * H * n + 2 * 6 * 4 * H * (fired + resting) + 4 * 4 * BATCH * fired
    return n_bytes, 2 * BATCH * H * (n + 4 * fired)


def train(task: Task, steps: range, device: torch.device) -> float:
    """Seconds of these steps, data included."""
    ensemble, start = task.ensemble, time.perf_counter()
    length = ensemble.engine.steps_at_a_time
    ranges = step_ranges(steps.start, steps.stop, length=length, stop_every=steps.stop)
    for _, xs in ahead_on(device)(task.batch_at, ranges):
        ensemble.steps_(xs)
    synchronize(device)
    return time.perf_counter() - start


def loop_of_2023(n_dict: int, cfg: Config, xs: Tensor) -> float:
    """Seconds per step."""
    loop = Loop2023(n_dict).to(xs.device)

    def run() -> None:
        for i in range(cfg.loop_steps):
            loop.step_(xs[i % len(xs)])

    return seconds_per_call(run, xs.device, 0.0) / cfg.loop_steps


def rows(cfg: Config, device: torch.device, say: Report) -> float:
    """A line per size; returns the seconds of the loop of 2023 for the whole figure."""
    say("a row of the figure, us per step of all its SAEs; one SAE of the loop of 2023:")
    say("  n_dict   start    warm   dense   loop of 2023   row, warm: times faster, ns a feature")
    total = 0.0
    for ratio in all_sizes(cfg):
        task = task_of(cfg, range(ratio, ratio + 1), device)
        n_saes, n_dict = len(task.ensemble.specs), task.ensemble.specs[0].n_dict
        xs = batches(task, cfg.at_a_time)
        times = [seconds_per_step(task.ensemble, xs, cfg.seconds)]
        train(task, range(cfg.warm_steps), device)
        times.append(seconds_per_step(task.ensemble, xs, cfg.seconds))
        task.ensemble.engine = DenseEngine(task.ensemble.stacks)
        times.append(seconds_per_step(task.ensemble, xs, cfg.seconds))
        loop = loop_of_2023(n_dict, cfg, xs)
        total += n_saes * cfg.n_steps * loop
        line = f"  {n_dict:6}" + "".join(f"{1e6 * t:8,.0f}" for t in times)
        line += f"{1e6 * loop:15,.0f}{n_saes * loop / times[1]:26,.1f}"
        say(f"{line}{1e9 * times[1] / (n_saes * n_dict):14.2f}")
    say(f"the loop of 2023 takes {total:,.0f} s for the figure\n")
    return total


def grid(cfg: Config, device: torch.device, say: Report, peak: tuple[float, float]) -> float:
    """The whole grid at once; returns the seconds of the figure, data included."""
    task = task_of(cfg, all_sizes(cfg), device)
    say(f"the grid: {len(task.ensemble.specs)} SAEs")
    say("    step  us a step   GB  GFLOP  of the copy's GB/s, of the GEMM's FLOP/s")
    last = cfg.n_steps if cfg.full else cfg.warm_steps
    part, seconds = -(-last // 10), 0.0
    for first in range(0, last, part):
        steps = range(first, min(first + part, last))
        took = train(task, steps, device)
        seconds += took
        each, (n_bytes, flop) = took / len(steps), needs(task.ensemble)
        say(f"{steps.stop:8}{1e6 * each:11,.0f}{n_bytes / 1e9:6.2f}{flop / 1e9:7.1f}"
            f"{n_bytes / each / peak[0]:12.0%}{flop / each / peak[1]:20.0%}")  # fmt: skip
    seconds += (cfg.n_steps - last) * each
    how = "measured" if cfg.full else f"extrapolated from {last} steps"
    say(f"the figure: {seconds:.1f} s, {how}, data included, evaluation and drawing not")
    if device.type == "cuda":
        recipe = ToyRecipe(DATA, "per_feature", 1e-3, cfg.n_steps, device)
        planned = recipe.memory([(m.arch, m.n_dict) for m in task.ensemble.specs])
        taken = torch.cuda.max_memory_allocated(device) / 1e9
        say(f"memory: {taken:.2f} GB taken at most, {planned / 1e9:.2f} GB planned")
    return seconds


def tune(cfg: Config, device: torch.device, say: Report) -> None:
    """The grid after warm_steps: time of each kernel, then of a step with other tiles, one change
    a line."""
    task = task_of(cfg, all_sizes(cfg), device)
    train(task, range(cfg.warm_steps), device)
    xs, ensemble = batches(task, cfg.at_a_time), task.ensemble
    if device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            ensemble.steps_(xs)
            synchronize(device)
        for event in profile.key_averages():
            say(f"{event.device_time_total / len(xs):9,.0f} us a step: {event.key}")
    for tiles in ({}, *TILES, {}):
        ensemble.engine = gpu.GpuEngine(ensemble.stacks, **tiles)
        each = seconds_per_step(ensemble, xs, cfg.seconds)
        how = tiles or "default tiles" if ensemble.engine.ready else f"dense, for {tiles} fail"
        say(f"{1e6 * each:9,.0f} us a step: {how}")


def main(argv: list[str]) -> int:
    cfg = parse_flags(Config(), argv, description=__doc__.split("\n\n")[0])
    device = torch.device(cfg.device)
    there = device.type == "cpu" or torch.cuda.is_available()
    require(there, "no usable CUDA GPU is seen by torch: nothing to measure")
    require(gpu.has_triton(), "Triton is not there: nothing to measure")
    precision = set_precision(cfg.precision, device)
    say = Report(cfg.output)
    print_conditions(cfg, device, precision, say)
    if not check(cfg, device, precision, say):
        return 1
    peak = limits(cfg, device, say)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    ours = grid(cfg, device, say, peak)
    theirs = rows(cfg, device, say)
    say(f"{theirs / ours:,.0f} times as fast as the loop of 2023")
    if cfg.tune:
        tune(cfg, device, say)
    return 0


if __name__ == "__main__":
    run_as_script(main)
