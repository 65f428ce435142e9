"""What the speed scripts share: times, what a device can do at most, reports, autoencoders whose
sparsity stays where it is asked for."""

import contextlib
import datetime
import importlib.metadata
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from sparse_coding.files import write_atomic
from sparse_coding.sae.ensemble import Ensemble
from sparse_coding.sae.families import FAMILIES
from sparse_coding.sae.spec import SAESpec, Schedule
from sparse_coding.sae.stack import Stack
from sparse_coding.sweep.hardware import describe

# lr rises so slowly, and l0 is sought so late, that nothing moves in this time
STILL = Schedule(10**6, lr_warmup=10**6, l1_warmup=10**6, anneal=range(0, 10**6))


class Report:
    """Prints lines, and writes them to a file if there is a path."""

    def __init__(self, path: str):
        self.path, self.lines = path, []

    def __call__(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(line)
        if self.path:
            write_atomic(Path(self.path), "\n".join(self.lines) + "\n")


def conditions(device: torch.device) -> str:
    """On what this ran: date, device, driver and versions."""
    driver = "none"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    python = ".".join(map(str, sys.version_info[:3]))
    versions = ", ".join(f"{name} {version_of(name)}" for name in ("torch", "triton", "numba"))
    cuda = f"driver {driver}, CUDA {torch.version.cuda}"
    return f"{datetime.date.today()}, {describe(device)}, {cuda}, python {python}, {versions}"


def version_of(package: str) -> str:
    """Of an installed package, or "none"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def command(script: str) -> str:
    """The line with which it was started."""
    return shlex.join(["python", f"benchmarks/{script}", *sys.argv[1:]])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_call(run: Callable[[], object], device: torch.device, at_least: float) -> float:
    """After a first one, which compiles."""
    run()
    synchronize(device)
    n, start = 0, time.perf_counter()
    while n == 0 or time.perf_counter() - start < at_least:
        run()
        n += 1
        synchronize(device)
    return (time.perf_counter() - start) / n


def seconds_per_step(ensemble: Ensemble, xs: Tensor, at_least: float) -> float:
    return seconds_per_call(lambda: ensemble.steps_(xs), xs.device, at_least) / len(xs)


def copy_speed(device: torch.device, gigabytes: float, seconds: float) -> float:
    """Measured bytes/s, read and written, of a copy within the device's memory."""
    source = torch.zeros(int(gigabytes * 2.5e8), device=device)
    target = torch.empty_like(source)
    of_one = seconds_per_call(lambda: target.copy_(source), device, seconds)
    return 2 * 4 * source.numel() / of_one


def gemm_speed(device: torch.device, size: int, seconds: float, dtype: torch.dtype) -> float:
    """Measured FLOP/s of a square GEMM; of float32 in the precision that is set."""
    a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    return 2 * size**3 / seconds_per_call(lambda: torch.mm(a, b, out=out), device, seconds)


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], float]]:
    """A function that says how many GB were taken at most inside: by tensors of a GPU; on a CPU by
    the process, since its start."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)

    def peak() -> float:
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device) / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    yield peak


class OutOfTime(Exception):
    """A part took longer than it may."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises OutOfTime inside after so many seconds, as soon as Python is at work again: after the
    call of torch, or the compiler, that is under way."""

    def stop(*_: object) -> None:
        raise OutOfTime(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def still_ensemble(specs: list[SAESpec], x: Tensor) -> Ensemble:
    """Autoencoders that stay as they start. Those without a k get biases that give them target_l0
    on x (batch, width); with a target_l0 of 0 they keep those of their start."""
    width = x.shape[1]
    ensemble = Ensemble(
        specs,
        width,
        lr=3e-4,
        device=x.device,
        b_dec=torch.zeros(width, device=x.device),
        project=True,
        schedule=STILL,
    )
    for stack in ensemble.stacks:
        if not stack.family.has_k and stack.specs[0].target_l0:
            set_biases_(stack, x)
    ensemble.scratch.flat.clear()  # what setting biases took is no part of a step
    return ensemble


def specs_of(asked: list[tuple[str, int, float]]) -> list[SAESpec]:
    """asked: (family, n_dict, target_l0) of each autoencoder."""
    return [
        SAESpec(
            n_dict, 0.0 if FAMILIES[arch].has_k else 1e-6, seed, tied=True, target_l0=l0, arch=arch
        )
        for seed, (arch, n_dict, l0) in enumerate(asked)
    ]


def set_biases_(stack: Stack, x: Tensor) -> None:
    """So that each has the l0 that is asked of it."""
    for pre, b_enc, spec in zip(stack.encode(x), stack.b_enc, stack.specs, strict=True):
        smallest = pre.flatten().topk(int(spec.target_l0 * len(x))).values[-1]
        b_enc.fill_(-smallest if stack.threshold is None else stack.threshold[0, 0] - smallest)
