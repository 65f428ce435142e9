"""Trains stacks of autoencoders on the CPU with compiled kernels, one per thread.

A thread takes an autoencoder through several steps, alone: its weights and moments stay in that
core's cache, no thread waits for another at a barrier, and no number depends on how many threads
there are or which autoencoders share the ensemble. Where threads outnumber autoencoders, all share
one at a time; its bits stay the same (cpu_kernels.py).

The kernels need numba, and a torch built with MKL, whose sgemm they call: has_kernels() says so if
one is missing.
"""

import contextlib
import ctypes
import functools
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sparse_coding.config import first_line
from sparse_coding.files import held
from sparse_coding.sae.spec import BETAS, PLACE, Factors, StepNumbers
from sparse_coding.sae.stack import Stack

if TYPE_CHECKING:
    from sparse_coding.sae.cpu_kernels import Sae, Work

NO_END = 2**40  # of tiles
MOST_STEPS = 16  # at a time: so many batches of 256 x 256 are 4 MB, which L3 holds; not tuned
MOST_WEIGHTS = 1.5e8  # times steps, at a time: some seconds on two cores, then signals are seen
# Share of codes above 0 up to which a step without the zeros is faster (LOG.md: 0.40 to 0.45)
DENSITY = 0.4
SAID_AFTER = 3.0  # seconds
ONE_THREAD = ("omp_set_num_threads", "MKL_Set_Num_Threads_Local")  # functions of libtorch


@functools.cache
def libtorch() -> ctypes.CDLL:
    """torch's own library, whose sgemm the kernels call."""
    end = "dylib" if sys.platform == "darwin" else "so"
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{end}"))


def one_thread_here() -> None:
    """Limits OpenMP and MKL to one thread in the calling thread, where torch is built with them;
    denormals are flushed in it."""
    torch.get_num_threads()  # torch's own start-up of a thread, which would undo the next lines
    for name in ONE_THREAD:
        if hasattr(libtorch(), name):
            libtorch()[name](1)
    torch.set_flush_denormal(True)


@functools.cache
def has_kernels() -> bool:
    """Whether what the kernels need is there; says so, once, if it isn't."""
    try:
        import llvmlite.binding

        from sparse_coding.sae import cpu_kernels

        needed = ("sgemm_", *ONE_THREAD)
        missing = [name for name in needed if not hasattr(libtorch(), name)]
    except (ImportError, OSError) as error:
        missing = [str(error)]
    if missing:
        _say_slow(", ".join(missing))
        return False
    sgemm = ctypes.cast(libtorch().sgemm_, ctypes.c_void_p).value
    llvmlite.binding.add_symbol(cpu_kernels.GEMM_SYMBOL, sgemm)
    return True


def _say_slow(reason: str) -> None:
    print(f"no compiled kernels, so a CPU trains several times slower: {reason}", flush=True)


@functools.cache
def kernels_compile() -> bool:
    """Compiles them, or loads what was compiled before. Says so, if it takes long or fails.

    Another process compiles, and this one loads: after compiling, a process goes on with the inner
    kernels as they were compiled alone, which round otherwise than those within what is kept, so a
    first run would differ from a second in the last bits.
    """
    from numba.core.errors import NumbaError

    try:
        with _said_if_slow("compiling the CPU kernels, once on this machine: some 15 s"):
            folder = kernels_missing_in()
            if folder:
                with held(folder / "lock"):  # of several processes one compiles
                    if kernels_missing_in():
                        _compile_elsewhere()
            step_of_zeros()
    except NumbaError as error:
        _say_slow(first_line(error))
        return False
    return True


def _compile_elsewhere() -> None:
    """In a process of its own; what fails there fails here too, and is said then."""
    code = f"from {__name__} import *; has_kernels() and step_of_zeros()"
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    command, root = [sys.executable, "-c", code], Path(__file__).parents[2]
    subprocess.run(command, cwd=root, **streams, start_new_session=True, check=False)


def step_of_zeros() -> None:
    """What makes numba compile or load the kernels."""
    from sparse_coding.sae.cpu_kernels import steps

    steps(*_zeros())


def kernels_missing_in() -> Path | None:
    """The folder where compiled kernels are kept, if it can be written and they are not there."""
    from numba import typeof

    from sparse_coding.sae.cpu_kernels import steps

    folder, types = steps.stats.cache_path, tuple(map(typeof, _zeros()))
    if folder is None or steps._cache.load_overload(types, steps.targetctx) is not None:
        return None
    return Path(folder)


def _zeros() -> tuple:
    """A smallest autoencoder and batch, as `steps` takes them."""
    from sparse_coding.sae.cpu_kernels import ALL, Sae

    W, b, none = np.zeros((8, 8), np.float32), np.zeros(8, np.float32), np.zeros(0, np.float32)
    idle, one = np.zeros(8, np.int32), np.zeros(1, np.float32)
    sae = Sae(W, b, W, none, W, W, b, b, W, W, none, none, idle, one, one)
    scratch, x = Scratch(8, 8, 8, density=DENSITY), np.zeros((1, 8, 8), np.float32)
    numbers = np.zeros((1, len(PLACE)), np.float32)
    return sae, scratch.work(8), scratch.gradients, x, numbers, ALL, (0, 1)


@contextlib.contextmanager
def _said_if_slow(message: str) -> Iterator[None]:
    timer = threading.Timer(SAID_AFTER, print, [message], {"flush": True})
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def work_shapes(n_dict: int, batch: int, h: int, *, density: float) -> dict[str, tuple]:
    """(shape, dtype) of each field of Work."""
    from sparse_coding.sae.cpu_kernels import TILE

    f32, i32 = torch.float32, torch.int32
    sample = torch.uint16 if batch < 2**16 else i32
    most = int(max(density, 0) * n_dict * batch)
    return {
        "codes": ((n_dict, batch), f32),
        "where": ((n_dict, batch), sample),
        "count": ((n_dict,), i32),
        "listed": ((n_dict,), torch.bool),
        "sparse": ((1,), torch.bool),
        "g": ((batch, h), f32),
        "off": ((-(-n_dict // TILE), h), f32),
        "start": ((batch + 2,), torch.int64),
        "feature": ((most,), i32),
        "value": ((most,), f32),
    }


def gradient_shapes(batch: int, h: int) -> list[tuple]:
    """Shape of each field of Gradients."""
    from sparse_coding.sae.cpu_kernels import TILE

    return [(TILE, batch), (TILE,), (TILE, h), (TILE, h)]


class Scratch:
    """Work and Gradients of a thread, for dictionaries of up to n_dict features."""

    def __init__(self, n_dict: int, batch: int, h: int, *, density: float):
        from sparse_coding.sae import cpu_kernels

        self.kernels, self.batch, self.h, self.density = cpu_kernels, batch, h, density
        self.n_dict = n_dict
        self.flat: dict[str, Tensor] = {}
        self.gradients = cpu_kernels.Gradients(
            *(torch.empty(shape).numpy() for shape in gradient_shapes(batch, h))
        )
        self.of_size: dict[int, Work] = {}

    @property
    def n_bytes(self) -> int:
        """Memory that is held."""
        flat = sum(t.numel() * t.element_size() for t in self.flat.values())
        return flat + sum(array.nbytes for array in self.gradients)

    def work(self, n_dict: int) -> "Work":
        """The Work of a dictionary of that size; valid until the next one's."""
        if not self.flat:
            # torch's memory begins at multiples of 64 bytes, as fast vector loads want it
            largest = work_shapes(self.n_dict, self.batch, self.h, density=self.density)
            self.flat = {k: torch.empty(math.prod(s), dtype=t) for k, (s, t) in largest.items()}
        if n_dict not in self.of_size:
            shapes = work_shapes(n_dict, self.batch, self.h, density=self.density)
            self.of_size[n_dict] = self.kernels.Work(
                *(self.flat[k][: math.prod(s)].view(s).numpy() for k, (s, _) in shapes.items())
            )
        return self.of_size[n_dict]


def engine_bytes(n_dicts: list[int], h: int, batch: int, *, n_threads: int) -> int:
    """Scratch of an engine's threads, each of which may step the largest autoencoder, and the
    batches that are stepped, waiting and being made."""
    work = work_shapes(max(n_dicts), batch, h, density=DENSITY).values()
    work = sum(math.prod(shape) * dtype.itemsize for shape, dtype in work)
    gradients = 4 * sum(map(math.prod, gradient_shapes(batch, h)))
    batches = 3 * steps_at_a_time(n_dicts, h) * 4 * batch * h
    return min(n_threads, len(n_dicts)) * (work + gradients) + batches


def steps_at_a_time(n_dicts: list[int], h: int) -> int:
    """Steps between two looks at signals and checkpoints."""
    return int(max(1, min(MOST_STEPS, MOST_WEIGHTS / (sum(n_dicts) * h))))


class CpuEngine:
    """Steps the stacks of one ensemble, whose tensors stay where they are.

    density: share of codes above 0 up to which a step is sparse; 0 never, 1 always
    """

    def __init__(self, stacks: list[Stack], *, n_threads: int, density: float = DENSITY):
        from sparse_coding.sae import cpu_kernels

        self.kernels, self.stacks, self.density = cpu_kernels, stacks, density
        self.saes = [sae for stack in stacks for sae in views(stack)]
        self.sizes = [len(sae.b_enc) for sae in self.saes]
        n_tiles = max(self.sizes) / cpu_kernels.TILE
        self.shared = min(n_threads, n_tiles) > len(self.saes)
        self.n_threads = n_threads if self.shared else min(n_threads, len(self.saes))
        self.steps_at_a_time = steps_at_a_time(self.sizes, stacks[0].W_dec.shape[2])
        self.pool = ThreadPoolExecutor(self.n_threads, initializer=one_thread_here)
        self.scratch = threading.local()
        self.seconds = [float(n) for n in self.sizes]  # of the last steps; at first by size

    def steps_(self, xs: Tensor, *, n_done: int, factors: list[Factors]) -> None:
        """As many steps as xs (n, batch, h) has batches, of every autoencoder."""
        numbers, x = step_numbers(self.stacks[0], n_done, factors), xs.numpy()
        if self.shared:
            for i in range(len(self.saes)):
                self._together(i, x, numbers)
        else:
            order = sorted(range(len(self.saes)), key=lambda i: -self.seconds[i])  # ends even
            list(self.pool.map(lambda i: self._alone(i, x, numbers), order))
        for stack in self.stacks:
            for state in stack.adam.state.values():
                state["step"] += len(xs)

    def _alone(self, i: int, xs: np.ndarray, numbers: np.ndarray) -> None:
        """All steps of autoencoder i in this thread."""
        start, scratch, k = time.perf_counter(), self._scratch_for(xs), self.kernels
        work = scratch.work(self.sizes[i])
        k.steps(self.saes[i], work, scratch.gradients, xs, numbers, k.ALL, (0, NO_END))
        self.seconds[i] = time.perf_counter() - start

    def _together(self, i: int, xs: np.ndarray, numbers: np.ndarray) -> None:
        """All steps of autoencoder i by all threads, phase after phase."""
        k, work = self.kernels, self._scratch_for(xs).work(self.sizes[i])
        n_tiles, n_blocks = len(work.off), -(-xs.shape[1] // k.BLOCK)

        def run(step: int, todo: int, n: int) -> None:
            def share(span: tuple[int, int]) -> None:
                grads, now = self._scratch_for(xs).gradients, slice(step, step + 1)
                k.steps(self.saes[i], work, grads, xs[now], numbers[now], todo, span)

            n_shares = min(n, self.n_threads)
            ends = [n * j // n_shares for j in range(n_shares + 1)]
            list(self.pool.map(share, pairwise(ends)))

        for step in range(len(xs)):
            for todo, n in (
                (k.ENCODE, n_tiles),
                (k.CHOOSE, 1),
                (k.DECODE, n_blocks),
                (k.UPDATE, n_tiles),
                (k.FINISH, 1),
            ):
                run(step, todo, n)

    def _scratch_for(self, xs: np.ndarray) -> Scratch:
        """This thread's, allocated at its first steps and when the batch size changes."""
        _, batch, h = xs.shape
        scratch = getattr(self.scratch, "of_thread", None)
        if scratch is None or scratch.batch != batch:
            scratch = Scratch(max(self.sizes), batch, h, density=self.density)
            self.scratch.of_thread = scratch
        return scratch


def views(stack: Stack) -> "list[Sae]":
    """A stack's autoencoders as the kernels take them: views, stepping one changes the stack."""
    from sparse_coding.sae.cpu_kernels import Sae

    none = torch.zeros(len(stack.specs), 0)
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    state = [stack.adam.state.get(stack.parameters.get(name)) for name in names]
    tensors = [stack.parameters.get(name, none) for name in names]
    for of_one in state:
        tensors += [of_one[k] if of_one else none for k in ("exp_avg", "exp_avg_sq")]
    tensors += [stack.idle, stack.l1.flatten(1), stack.target_l0.flatten(1)]
    arrays = [t.detach().numpy() for t in tensors]
    return [Sae(*(a[i] for a in arrays)) for i in range(len(stack.specs))]


def step_numbers(stack: Stack, n_done: int, factors: list[Factors]) -> np.ndarray:
    """StepNumbers of each step, (n, numbers) float32."""
    numbers = [
        StepNumbers(
            rate=stack.lr * f.lr / (1 - BETAS[0] ** t),
            root=(1 - BETAS[1] ** t) ** -0.5,
            eps=stack.adam.param_groups[0]["eps"],
            l1_factor=f.l1,
            seeks_l0=f.seek_l0,
            project=stack.project,
            p=f.p,
            p_before=f.p_before,
        )
        for t, f in enumerate(factors, start=n_done + 1)
    ]
    return np.array(numbers, np.float32)
