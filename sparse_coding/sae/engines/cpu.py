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
from typing import NamedTuple, get_args

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from sparse_coding.config import first_line
from sparse_coding.files import held
from sparse_coding.sae.families import FAMILIES, MOST_PREFIXES, Kind, Penalty, Selection
from sparse_coding.sae.spec import BETAS, PLACE, Factors, SAESpec, StepNumbers
from sparse_coding.sae.stack import Scratch as StackScratch
from sparse_coding.sae.stack import Stack

NO_END = 2**40  # of tiles
MOST_STEPS = 16  # at a time: so many batches of 256 x 256 are 4 MB, which L3 holds; not tuned
MOST_WEIGHTS = 1.5e8  # times steps, at a time: some seconds on two cores, then signals are seen
# Share of codes above 0 up to which a step without the zeros is faster (LOG.md: 0.40 to 0.45)
DENSITY = 0.4
SAID_AFTER = 6.0  # seconds; loading them takes two
ONE_THREAD = ("omp_set_num_threads", "MKL_Set_Num_Threads_Local")  # functions of libtorch
TILE = 128  # features: a tile's codes and gradients (128 KB each at 256) stay in L2
GROUP = 4  # least number of features of which topk keeps a maximum
CANDIDATES = 1 / 4  # share of the codes among which the k largest are sought


class Sae(NamedTuple):
    """An autoencoder's parameters with Adam's moments (_m, _v), views of a Stack's tensors, and
    what its family chooses. What a family lacks has a length of 0.

    idle: steps since a feature had a gradient; beyond DORMANT its row waits for what it missed
    hint: below what a batch will select; no state, since no result depends on it
    """

    W_enc: ndarray  # (n_dict, h)
    b_enc: ndarray  # (n_dict,)
    W_dec: ndarray  # (n_dict, h)
    b_dec: ndarray  # (h,), or (0,) where it is fixed at 0
    threshold: ndarray  # (n_dict,)
    W_enc_m: ndarray
    W_enc_v: ndarray
    b_enc_m: ndarray
    b_enc_v: ndarray
    W_dec_m: ndarray
    W_dec_v: ndarray
    b_dec_m: ndarray
    b_dec_v: ndarray
    threshold_m: ndarray
    threshold_v: ndarray
    idle: ndarray  # (n_dict,) int32
    silent: ndarray  # (n_dict,) int32
    n_revived: ndarray  # (1,) int64
    l1: ndarray  # (1,)
    target_l0: ndarray  # (1,), 0 where l1 stays
    smallest: ndarray  # (1,)
    hint: ndarray  # (1,)
    bands: ndarray  # ends of the bands of features, int64
    selection: int
    penalty: int
    through_input: bool
    frozen: bool
    aux: bool
    k: float  # per sample
    dead_steps: int


class Work(NamedTuple):
    """Scratch of one step of one autoencoder. What its family lacks has a length of 0.

    sparse: whether this step is
    off: ∂b_dec, a part per tile
    start, feature, value: codes above 0 by sample; those of sample b at start[b] to start[b + 1]
    limit: of each sample the smallest code that is selected, as bits
    room: how many of those equal to the limit are; for batchtopk the first number alone
    """

    codes: ndarray  # (n_dict, batch)
    bits: ndarray  # (n_dict * batch,) int32: the same memory
    where: ndarray  # (n_dict, batch): samples that a feature fires on, ascending
    count: ndarray  # (n_dict,) int32: how many
    listed: ndarray  # (n_dict,) bool: whether `where` has them
    sparse: ndarray  # (1,) bool
    g: ndarray  # (bands, batch, h)
    off: ndarray  # (tiles, h)
    start: ndarray  # (batch + 2,) int64
    feature: ndarray  # (most codes of a sparse step,) int32
    value: ndarray  # the same, float32
    window: ndarray  # (n_dict, batch): samples within the threshold's window, ascending
    n_window: ndarray  # (n_dict,) int32
    maxima: ndarray  # (groups * batch,) int32: keys of the largest codes
    keys: ndarray  # (most candidates,) int32
    limit: ndarray  # (batch,) int32
    limit_value: ndarray  # (batch,) float32: the same memory
    room: ndarray  # (batch,) int32
    low: ndarray  # (batch,) int32, of bisection
    high: ndarray  # (batch,) int32
    aux: ndarray  # (n_dict, batch): ReLU(pre) of dead features, of which the largest stay
    aux_bits: ndarray  # (n_dict * batch,) int32: the same memory
    n_dead: ndarray  # (1,) int64
    dead_row: ndarray  # (n_dict,) int32: where a feature stands among the dead, or -1
    aux_count: ndarray  # (dead,) int32: codes above 0
    g_aux: ndarray  # (batch, h)
    aux_dec: ndarray  # (dead, h): rows of W_dec, later ∂W_dec
    aux_enc: ndarray  # (dead, h): ∂W_enc
    aux_bias: ndarray  # (dead,)


class Gradients(NamedTuple):
    """Gradients of a tile: scratch of one thread."""

    delta: ndarray  # (TILE, batch)
    b_enc: ndarray  # (TILE,)
    threshold: ndarray  # (TILE,)
    W_enc: ndarray  # (TILE, h)
    W_dec: ndarray  # (TILE, h)
    slope: ndarray  # (batch,), of a feature's penalty


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

        from sparse_coding.sae.engines import cpu_codes

        needed = ("sgemm_", *ONE_THREAD)
        missing = [name for name in needed if not hasattr(libtorch(), name)]
    except (ImportError, OSError) as error:
        missing = [str(error)]
    if missing:
        _say_slow(", ".join(missing))
        return False
    sgemm = ctypes.cast(libtorch().sgemm_, ctypes.c_void_p).value
    llvmlite.binding.add_symbol(cpu_codes.GEMM_SYMBOL, sgemm)
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
        with _said_if_slow("compiling the CPU kernels, once on this machine: some 45 s"):
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
    command, root = [sys.executable, "-c", code], Path(__file__).parents[3]
    subprocess.run(command, cwd=root, **streams, start_new_session=True, check=False)


def step_of_zeros() -> None:
    """What makes numba compile or load the kernels."""
    from sparse_coding.sae.engines.cpu_kernels import steps

    steps(*_zeros())


def kernels_missing_in() -> Path | None:
    """The folder where compiled kernels are kept, if it can be written and they are not there."""
    from numba import typeof

    from sparse_coding.sae.engines.cpu_kernels import steps

    folder, types = steps.stats.cache_path, tuple(map(typeof, _zeros()))
    if folder is None or steps._cache.load_overload(types, steps.targetctx) is not None:
        return None
    return Path(folder)


def _zeros() -> tuple:
    """A smallest autoencoder and batch, as `steps` takes them."""
    from sparse_coding.sae.engines.cpu_kernels import ALL

    stack_scratch = StackScratch(torch.device("cpu"), torch.float32)
    (sae,) = views(Stack([SAESpec(8, 0.0, 0)], 8, lr=0.0, scratch=stack_scratch))
    scratch, x = Scratch([("relu", 8)], 8, 8, density=DENSITY), np.zeros((1, 8, 8), np.float32)
    numbers = np.zeros((1, len(PLACE)), np.float32)
    return sae, scratch.work(("relu", 8)), scratch.gradients, x, numbers, ALL, (0, 1)


@contextlib.contextmanager
def _said_if_slow(message: str) -> Iterator[None]:
    timer = threading.Timer(SAID_AFTER, print, [message], {"flush": True})
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def work_shapes(kind: Kind, batch: int, h: int, *, density: float) -> dict[str, tuple]:
    """(shape, dtype) of each field of Work that has memory of its own."""
    (arch, n), f32, i32 = kind, torch.float32, torch.int32
    family, sample = FAMILIES[arch], torch.uint16 if batch < 2**16 else i32
    most = int(max(density, 0) * n * batch)
    jump, topk = (n * (family.selection == name) for name in ("jump", "topk"))
    chosen, dead = n * family.has_k, n * family.aux
    of_batch = batch * (family.has_k or family.aux)
    return {
        "codes": ((n, batch), f32),
        "where": ((n, batch), sample),
        "count": ((n,), i32),
        "listed": ((n,), torch.bool),
        "sparse": ((1,), torch.bool),
        "g": ((MOST_PREFIXES if family.nested else 1, batch, h), f32),
        "off": ((-(-n // TILE), h), f32),
        "start": ((batch + 2,), torch.int64),
        "feature": ((most,), i32),
        "value": ((most,), f32),
        "window": ((jump, batch), sample),
        "n_window": ((jump,), i32),
        "maxima": ((-(-topk // GROUP) * batch,), i32),
        "keys": ((int(CANDIDATES * chosen) * batch,), i32),
        **dict.fromkeys(("limit", "room", "low", "high"), ((of_batch,), i32)),
        "aux": ((dead, batch), f32),
        "n_dead": ((1,), torch.int64),
        "dead_row": ((dead,), i32),
        "aux_count": ((dead,), i32),
        "g_aux": ((batch if dead else 0, h), f32),
        "aux_dec": ((dead, h), f32),
        "aux_enc": ((dead, h), f32),
        "aux_bias": ((dead,), f32),
    }


def gradient_shapes(batch: int, h: int) -> list[tuple]:
    """Shape of each field of Gradients."""
    return [(TILE, batch), (TILE,), (TILE,), (TILE, h), (TILE, h), (batch,)]


def largest_work(kinds: list[Kind], batch: int, h: int, *, density: float) -> dict[str, tuple]:
    """(numbers, dtype) of each field of Work with memory for autoencoders of any of these kinds."""
    shapes = [work_shapes(kind, batch, h, density=density) for kind in set(kinds)]
    return {
        name: (max(math.prod(of_kind[name][0]) for of_kind in shapes), dtype)
        for name, (_, dtype) in shapes[0].items()
    }


class Scratch:
    """Work and Gradients of a thread, for autoencoders of these kinds."""

    def __init__(self, kinds: list[Kind], batch: int, h: int, *, density: float):
        self.kinds, self.batch, self.h, self.density = kinds, batch, h, density
        self.flat: dict[str, Tensor] = {}
        self.gradients = Gradients(
            *(torch.empty(shape).numpy() for shape in gradient_shapes(batch, h))
        )
        self.of_kind: dict[Kind, Work] = {}

    @property
    def n_bytes(self) -> int:
        """Memory that is held."""
        flat = sum(t.numel() * t.element_size() for t in self.flat.values())
        return flat + sum(array.nbytes for array in self.gradients)

    def work(self, kind: Kind) -> Work:
        """The Work of an autoencoder of that kind; valid until the next one's."""
        if not self.flat:
            # torch's memory begins at multiples of 64 bytes, as fast vector loads want it
            largest = largest_work(self.kinds, self.batch, self.h, density=self.density)
            self.flat = {name: torch.empty(n, dtype=dtype) for name, (n, dtype) in largest.items()}
        if kind not in self.of_kind:
            shapes = work_shapes(kind, self.batch, self.h, density=self.density)
            arrays = {
                name: self.flat[name][: math.prod(shape)].view(shape).numpy()
                for name, (shape, _) in shapes.items()
            }
            arrays["bits"] = arrays["codes"].reshape(-1).view(np.int32)
            arrays["aux_bits"] = arrays["aux"].reshape(-1).view(np.int32)
            arrays["limit_value"] = arrays["limit"].view(np.float32)
            self.of_kind[kind] = Work(**arrays)
        return self.of_kind[kind]


def engine_bytes(kinds: list[Kind], h: int, batch: int, *, n_threads: int) -> int:
    """Scratch of an engine's threads, each of which may step the largest autoencoder, and the
    batches that are stepped, waiting and being made."""
    work = largest_work(kinds, batch, h, density=DENSITY).values()
    work = sum(n * dtype.itemsize for n, dtype in work)
    gradients = 4 * sum(map(math.prod, gradient_shapes(batch, h)))
    batches = 3 * steps_at_a_time([n for _, n in kinds], h) * 4 * batch * h
    return min(n_threads, len(kinds)) * (work + gradients) + batches


def steps_at_a_time(n_dicts: list[int], h: int) -> int:
    """Steps between two looks at signals and checkpoints."""
    return int(max(1, min(MOST_STEPS, MOST_WEIGHTS / (sum(n_dicts) * h))))


class CpuEngine:
    """Steps the stacks of one ensemble, whose tensors stay where they are.

    density: share of codes above 0 up to which a step is sparse; 0 never, 1 always
    """

    def __init__(self, stacks: list[Stack], *, n_threads: int, density: float = DENSITY):
        from sparse_coding.sae.engines import cpu_kernels

        self.kernels, self.stacks, self.density = cpu_kernels, stacks, density
        self.saes = [sae for stack in stacks for sae in views(stack)]
        self.kinds = [(spec.arch, spec.n_dict) for stack in stacks for spec in stack.specs]
        self.sizes = [n_dict for _, n_dict in self.kinds]
        n_tiles = max(self.sizes) / TILE
        self.shared = min(n_threads, n_tiles) > len(self.saes)
        self.n_threads = n_threads if self.shared else min(n_threads, len(self.saes))
        self.steps_at_a_time = steps_at_a_time(self.sizes, stacks[0].W_dec.shape[2])
        self.pool = ThreadPoolExecutor(self.n_threads, initializer=one_thread_here)
        self.scratch = threading.local()
        self.seconds = [float(n) for n in self.sizes]  # of the last steps; at first by size

    def steps_(self, xs: Tensor, *, n_done: int, factors: list[Factors]) -> None:
        """As many steps as xs (n, batch, h) has batches, of every autoencoder."""
        of_stacks = [step_numbers(stack, n_done, factors) for stack in self.stacks]
        numbers = [of_stacks[k] for k, stack in enumerate(self.stacks) for _ in stack.specs]
        x = xs.numpy()
        if self.shared:
            for i in range(len(self.saes)):
                self._together(i, x, numbers[i])
        else:
            order = sorted(range(len(self.saes)), key=lambda i: -self.seconds[i])  # ends even
            list(self.pool.map(lambda i: self._alone(i, x, numbers[i]), order))
        for stack in self.stacks:
            for state in stack.adam.state.values():
                state["step"] += len(xs)

    def _alone(self, i: int, xs: np.ndarray, numbers: np.ndarray) -> None:
        """All steps of autoencoder i in this thread."""
        start, scratch, k = time.perf_counter(), self._scratch_for(xs), self.kernels
        work = scratch.work(self.kinds[i])
        k.steps(self.saes[i], work, scratch.gradients, xs, numbers, k.ALL, (0, NO_END))
        self.seconds[i] = time.perf_counter() - start

    def _together(self, i: int, xs: np.ndarray, numbers: np.ndarray) -> None:
        """All steps of autoencoder i by all threads, phase after phase."""
        k, work = self.kernels, self._scratch_for(xs).work(self.kinds[i])
        n_tiles, n_blocks = len(work.off), -(-xs.shape[1] // k.BLOCK)

        def run(step: int, todo: int, n: int) -> None:
            def share(span: tuple[int, int]) -> None:
                grads, now = self._scratch_for(xs).gradients, slice(step, step + 1)
                k.steps(self.saes[i], work, grads, xs[now], numbers[now], todo, span)

            n_shares = min(n, self.n_threads)
            ends = [n * j // n_shares for j in range(n_shares + 1)]
            list(self.pool.map(share, pairwise(ends)))

        chosen_alone = self.saes[i].selection == k.TOPK  # each sample has a bound of its own
        for step in range(len(xs)):
            run(step, k.ENCODE, n_tiles)
            if chosen_alone:
                run(step, k.BOUND, 1)
                run(step, k.LIST, n_tiles)
            run(step, k.CHOOSE, 1)
            run(step, k.DECODE, n_blocks)
            if work.n_dead[0]:
                run(step, k.AUXILIARY, -(-int(work.n_dead[0]) // TILE))
            run(step, k.UPDATE, n_tiles)
            run(step, k.FINISH, 1)

    def _scratch_for(self, xs: np.ndarray) -> Scratch:
        """This thread's, allocated at its first steps and when the batch size changes."""
        _, batch, h = xs.shape
        scratch = getattr(self.scratch, "of_thread", None)
        if scratch is None or scratch.batch != batch:
            scratch = Scratch(self.kinds, batch, h, density=self.density)
            self.scratch.of_thread = scratch
        return scratch


def views(stack: Stack) -> list[Sae]:
    """A stack's autoencoders as the kernels take them: views, stepping one changes the stack."""
    n_saes, family, none = len(stack.specs), stack.family, torch.zeros(len(stack.specs), 0)
    tensors = {}
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
        parameter = stack.parameters.get(name)
        state = stack.adam.state.get(parameter, {})
        tensors[name] = none if parameter is None else parameter
        tensors[f"{name}_m"] = state.get("exp_avg", none)
        tensors[f"{name}_v"] = state.get("exp_avg_sq", none)
    for name in ("idle", "silent", "n_revived", "l1", "target_l0", "smallest"):
        tensors[name] = getattr(stack, name).view(n_saes, -1)
    tensors["hint"] = torch.zeros(n_saes, 1)
    arrays = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    same = dict(
        bands=np.array([end for _, end in stack.bands], np.int64),
        selection=get_args(Selection).index(family.selection),
        penalty=get_args(Penalty).index(family.penalty),
        through_input=family.through_input,
        frozen=family.frozen,
        aux=family.aux,
        dead_steps=stack.dead_steps,
    )
    return [
        Sae(**{name: array[i] for name, array in arrays.items()}, k=float(spec.target_l0), **same)
        for i, spec in enumerate(stack.specs)
    ]


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
