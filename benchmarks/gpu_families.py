"""Speed of a training step of each family on a GPU, at the sizes that people train, against the
GPU's limits, dense steps of torch and the trainers of others on the same card.

    python benchmarks/gpu_families.py --output results/DATE_gpu_families.txt

After the GPU's limits (a copy; GEMMs in tf32 and bf16) a line for each measurement: us a step of
all autoencoders at once, SAE-steps/s, activations/s; GB and GFLOP that a step can't do without (see
least_work), as shares of what the limits would do in that time; the time that dense steps of torch
take for it; memory at most. Then the others, one autoencoder each, in the fastest of float32, bf16
autocast, and that compiled. All see the same random x of about length 1; biases of families without
a k are set so that l0 is what is asked for, and nothing moves: "start" is relu as it starts, with
half of its codes above 0. All features fire, in which a trained dictionary is cheaper.

Whoever isn't installed is left out, in a line; what takes longer than --limit-s or fails is a line,
too. Two minutes, as planned; --tiny --device cpu does all of it once on a CPU.
"""

import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from measuring import (
    OutOfTime,
    Report,
    at_most,
    command,
    conditions,
    copy_speed,
    gemm_speed,
    peak_memory,
    seconds_per_call,
    seconds_per_step,
    specs_of,
    still_ensemble,
)
from peers import FAMILIES_OF, FAULTS
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from sparse_coding.config import first_line, parse_flags, require, run_as_script
from sparse_coding.sae.engines.dense import DenseEngine
from sparse_coding.sae.families import FAMILIES
from sparse_coding.sweep.hardware import pick_device, set_precision
from sparse_coding.sweep.metrics import reconstruction

START = 0.0  # an l0: that of the start
GATHERED = 0.01  # share of codes above 0 up to which gathered rows beat dense GEMMs on an H200, as
# measured there (LOG.md, 2026-11-28)
ADAM = 2 * 2 * 3 * 4  # bytes a weight of a row: both matrices, read and written, with two moments


@dataclass(frozen=True)
class Shape:
    """What is trained.

    n_dicts: of a sweep's autoencoders
    l0s: to measure at, each a share of n_dict, or START
    copies: of the sweep, that are trained at once in turn
    """

    name: str
    width: int
    batch: int
    n_dicts: tuple[int, ...]
    l0s: tuple[float, ...]
    families: tuple[str, ...]
    copies: tuple[int, ...] = (1, 4)


KINDS = ("topk", "batchtopk", "relu", "jumprelu", "matryoshka")
SHAPES = (
    # gpt2-small's residual stream in the size that most publish; the k of Gao et al. 2024
    Shape("gpt2", 768, 2048, (24_576,), (32 / 24_576,), KINDS),
    # run.py --preset full on SmolLM2's mlp_act: seven of each size; the l0 after 250 steps there
    # was 140 of 3 584 (LOG.md, 2026-11-28), and a sparse end
    Shape("smollm2", 1536, 2048, (1536,) * 7 + (3072,) * 7 + (6144,) * 7,
          (140 / 3584, 16 / 6144, START), ("relu",), (1,)),
    Shape("smollm2-6144", 1536, 2048, (6144,), (16 / 6144,), ("relu", "batchtopk")),
    # the post's, and rows of its figure
    Shape("toy-512", 256, 256, (512,), (5 / 512,), ("relu",), (1, 4, 17)),
    Shape("toy-2048", 256, 256, (2048,), (5 / 2048, START), ("relu",), (1, 4, 17)),
)  # fmt: skip
EXPECTED = OutOfTime, *FAULTS
PEERS_AT = "gpt2"  # the shape of the comparison
TINY = 32  # times smaller with --tiny, at least 16


@dataclass(frozen=True)
class Config:
    device: str = "cuda"  # cpu: our CPU kernels, to try this script
    precision: tuple[str, ...] = ()  # of factors in GEMMs: (): tf32 and bf16, float32 on a CPU
    shapes: tuple[str, ...] = field(default=tuple(shape.name for shape in SHAPES))
    families: tuple[str, ...] = KINDS
    seconds: float = 0.4  # of a measurement
    limit_s: float = 25.0  # of one line: what it prepares, compiles and measures
    at_a_time: int = 16  # steps
    dense: bool = True  # dense steps of torch beside ours
    peers: bool = True
    compile_peers: bool = True  # try torch.compile on them, too
    copy_gb: float = 1.0  # of the measured copy
    gemm_size: int = 8192  # of the measured GEMMs
    tiny: bool = False  # everything 32 times smaller, for tests
    output: str = ""  # a text file of what is printed


@dataclass(frozen=True)
class Limits:
    """Measured: bytes/s of a copy, FLOP/s of GEMMs in the precision at hand."""

    bandwidth: float
    gemm: float


@dataclass(frozen=True)
class Work:
    """What a step of some autoencoders can't do without."""

    n_bytes: float
    flop: float

    def shares(self, limits: Limits, seconds: float) -> tuple[float, float]:
        """Of what the device's limits would do in so many seconds: bytes, FLOP."""
        return self.n_bytes / limits.bandwidth / seconds, self.flop / limits.gemm / seconds


def least_work(shape: Shape, n_dicts: tuple[int, ...], l0: float) -> Work:
    """Of autoencoders whose features all fire, l0 a share of n_dict, half of them at START.

    Bytes: W_enc once for its GEMM, both matrices and their moments by Adam, x once, codes as
    (feature, value) written and read. FLOP: the encoder's GEMM; and x_hat, its gradient's way to
    codes, and both weight gradients, for codes above 0 alone where these are less than GATHERED of
    all, else as GEMMs.
    """
    share, batch, h = l0 or 0.5, shape.batch, shape.width
    features = sum(n_dicts)
    codes = share * features * batch
    n_bytes = (4 + ADAM) * h * features + 4 * batch * h + 2 * 8 * codes
    rest = codes if share <= GATHERED else batch * features
    return Work(n_bytes, 2 * h * (batch * features + 4 * rest))


def shrunk(shape: Shape) -> Shape:
    """The shape for --tiny."""
    least = {"width": shape.width, "batch": shape.batch}
    smaller = {name: max(16, n // TINY) for name, n in least.items()}
    n_dicts = tuple(max(16, n // TINY) for n in shape.n_dicts)
    l0s = tuple(max(l0, 2 / min(n_dicts)) if l0 else l0 for l0 in shape.l0s)
    return replace(shape, **smaller, n_dicts=n_dicts, l0s=l0s)


def batches(cfg: Config, shape: Shape, device: torch.device) -> Tensor:
    rng = torch.Generator(device).manual_seed(0)
    size = (cfg.at_a_time, shape.batch, shape.width)
    return torch.randn(size, generator=rng, device=device) / shape.width**0.5


@dataclass(frozen=True)
class Bench:
    """What all measurements share."""

    cfg: Config
    device: torch.device
    limits: Limits
    say: Report

    failed: list[str] = field(default_factory=list)  # names of ours that did

    def guarded(self, name: str, measure: Callable[[], float], *, ours: bool) -> float:
        """Seconds that it measures; infinity, and a line, where it fails or takes too long. Of ours
        only what a device may refuse is caught: memory, a library's kernel."""
        try:
            with at_most(self.cfg.limit_s):
                return measure()
        except EXPECTED as error:
            if ours and not isinstance(error, (OutOfTime, RuntimeError)):
                raise
            self.say(f"{name}  FAILED: {type(error).__name__}: {first_line(error)}")
            if ours:
                self.failed.append(name)
            return math.inf


def head() -> str:
    return (
        f"{'shape':13} {'family':11} {'SAEs':>4} {'l0':>7}   {'us a step':>9} {'SAE-steps/s':>11} "
        f"{'activations/s':>13} {'GB':>6} {'GFLOP':>8}  of copy, GEMM   dense us (times ours)  "
        "peak GB"
    )


def measure_ours(bench: Bench, shape: Shape, arch: str, copies: int, l0: float) -> float:
    """Seconds a step of all at once; says its line."""
    cfg, xs = bench.cfg, batches(bench.cfg, shape, bench.device)
    n_dicts = shape.n_dicts * copies
    # k is a whole number of codes; at the start nothing is asked for
    asked = [(arch, n, max(1.0, float(round(l0 * n))) if l0 else START) for n in n_dicts]
    ensemble = still_ensemble(specs_of(asked), xs[0])
    with peak_memory(bench.device) as peak:
        seconds = seconds_per_step(ensemble, xs, cfg.seconds)
        peak_gb = peak()
    dense = ""
    if cfg.dense:
        ensemble.engine = DenseEngine(ensemble.stacks)
        of_dense = seconds_per_step(ensemble, xs, cfg.seconds)
        dense = f"{1e6 * of_dense:,.0f} ({of_dense / seconds:.2f})"
    found = reconstruction(ensemble, [xs[0]])["l0"]
    work = least_work(shape, n_dicts, l0)
    of_copy, of_gemm = work.shares(bench.limits, seconds)
    bench.say(
        f"{shape.name:13} {arch:11} {len(n_dicts):4} {sum(found) / len(found):7.1f}   "
        f"{1e6 * seconds:9,.0f} {len(n_dicts) / seconds:11,.0f} {shape.batch / seconds:13,.0f} "
        f"{work.n_bytes / 1e9:6.3f} {work.flop / 1e9:8.1f} {of_copy:8.0%} {of_gemm:5.0%} "
        f"{dense:>20} {peak_gb:8.2f}"
    )
    return seconds


def ours(bench: Bench, shape: Shape) -> dict[str, float]:
    """A line for each family, l0 and number of copies; by family, seconds a step of one
    autoencoder."""
    of_one = {}
    for arch in shape.families:
        for l0 in shape.l0s if arch in bench.cfg.families else ():
            if l0 == START and FAMILIES[arch].has_k:
                continue
            seconds = {}
            for copies in shape.copies:
                name = f"{shape.name:13} {arch:11} {copies * len(shape.n_dicts):4}"
                measure = partial(measure_ours, bench, shape, arch, copies, l0)
                seconds[copies] = bench.guarded(name, measure, ours=True)
            if len(seconds) > 1 and all(map(math.isfinite, seconds.values())):
                ratios = [f"{n} cost {seconds[n] / seconds[1]:.2f}" for n in shape.copies[1:]]
                bench.say(f"{shape.name:13} {arch:11} {', '.join(ratios)} times one")
            of_one.setdefault(arch, seconds[1])
    return of_one


def measure_peer(bench: Bench, shape: Shape, of: str, arch: str, how: str) -> float:
    """Seconds a step of one autoencoder of another library; how: "", bf16 or bf16 compiled."""
    (n_dict,), l0 = shape.n_dicts, shape.l0s[0]
    xs, count = batches(bench.cfg, shape, bench.device), iter(range(10**9))
    k = max(1, round(l0 * n_dict))
    with peak_memory(bench.device) as peak:
        make = FAMILIES_OF[of][arch]
        train = make(shape.width, n_dict, k, 0, bench.device, compiled="compiled" in how)

        def step() -> None:
            i = next(count)
            with torch.autocast(bench.device.type, torch.bfloat16, enabled="bf16" in how):
                train(i, xs[i % len(xs)])

        step()  # what is compiled may be compiled again for the second
        seconds = seconds_per_call(step, bench.device, bench.cfg.seconds)
        bench.say(
            f"{shape.name:13} {arch:11}    1 {f'{of} {how}':34} {1e6 * seconds:9,.0f} us "
            f"{shape.batch / seconds:11,.0f} activations/s {peak():8.2f} GB"
        )
    return seconds


def peers(bench: Bench, shape: Shape, of_one: dict[str, float]) -> None:
    """A line for each other, family and way; and how many times faster ours is than the best.

    of_one: seconds a step of one of ours, by family
    """
    ways = ["", "bf16", *["bf16 compiled"] * bench.cfg.compile_peers]
    for arch, of_ours in of_one.items():
        seconds = {}
        for of in FAMILIES_OF:
            if arch not in FAMILIES_OF[of] or not importlib.util.find_spec(of):
                continue
            for how in ways:
                name = f"{shape.name:13} {arch:11}    1 {f'{of} {how}':34}"
                measure = partial(measure_peer, bench, shape, of, arch, how)
                seconds[f"{of} {how}".strip()] = bench.guarded(name, measure, ours=False)
        best = min(seconds, key=seconds.get, default="")
        if best and math.isfinite(seconds[best]) and math.isfinite(of_ours):
            bench.say(
                f"{shape.name:13} {arch:11} ours {seconds[best] / of_ours:.2f} times the best "
                f"other, {best}"
            )


def set_up(cfg: Config, device: torch.device, flag: str, say: Report) -> Bench:
    """Sets a precision and measures the limits in it."""
    precision = set_precision(flag, device)
    bandwidth = copy_speed(device, cfg.copy_gb, cfg.seconds)
    dtype = torch.bfloat16 if precision == "bf16" and device.type == "cuda" else torch.float32
    gemm = gemm_speed(device, cfg.gemm_size, cfg.seconds, dtype)
    say(f"\n{precision}: copy {bandwidth / 1e9:,.0f} GB/s, GEMM {gemm / 1e12:,.2f} TFLOP/s")
    return Bench(cfg, device, Limits(bandwidth, gemm), say)


def main(argv: list[str]) -> int:
    cfg = parse_flags(Config(), argv, description=__doc__.split("\n\n")[0])
    device, say = pick_device(cfg.device), Report(cfg.output)
    known = {shape.name: shrunk(shape) if cfg.tiny else shape for shape in SHAPES}
    for name in cfg.shapes:
        require(name in known, f"--shapes {name}: there are {', '.join(known)}")
    if cfg.tiny:
        cfg = replace(cfg, gemm_size=cfg.gemm_size // TINY, copy_gb=cfg.copy_gb / TINY)
    say(f"{command('gpu_families.py')}\n{conditions(device)}")
    for of in FAMILIES_OF if cfg.peers else ():
        if not importlib.util.find_spec(of):
            say(f"{of} is not installed: left out")
    fastest: dict[str, float] = {}  # of gpt2's shape: seconds a step of one, by family
    for flag in cfg.precision or (("bf16", "tf32") if device.type == "cuda" else ("float32",)):
        bench = set_up(cfg, device, flag, say)
        say(head())
        for name in cfg.shapes:
            of_one = ours(bench, known[name])
            if name == PEERS_AT:
                fastest = {k: min(s, fastest.get(k, math.inf)) for k, s in of_one.items()}
    if cfg.peers and fastest and any(map(importlib.util.find_spec, FAMILIES_OF)):
        say("\nothers, against the faster of ours")
        peers(bench, known[PEERS_AT], fastest)
    return 1 if bench.failed else 0


if __name__ == "__main__":
    run_as_script(main)
