"""Trains the stacks of an ensemble on a GPU with Triton kernels, replayed as a CUDA graph.

The stacks' tensors become parts of one matrix with a row per feature (gpu_kernels.py), so a step of
all autoencoders is six launches, or eight where b_dec is trained and rows don't fit a tile.

Kernels are tried once for each shape, against dense steps in float64. Where they don't
compile or give other numbers, training is dense, and a line says so.
"""

import functools
import math
import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_coding.config import first_line
from sparse_coding.sae.engines.cpu import step_numbers
from sparse_coding.sae.engines.dense import DenseEngine, Engine
from sparse_coding.sae.engines.gpu_gemm import precision
from sparse_coding.sae.spec import PLACE, Factors, SAESpec
from sparse_coding.sae.stack import Scratch, Stack

if TYPE_CHECKING:  # Triton may be missing
    from sparse_coding.sae.engines.gpu_kernels import Rows, Shape, Work

MOST_STEPS = 16  # at a time; their batches are made while others train
DOT = {"float32": "ieee", "tf32": "tf32", "bf16": "bf16", "fp16": "fp16"}  # Triton's names
# (warps, stages of the pipeline): no kernel spills registers at h 256 and
# 3 072 for compute capabilities 8.0, 8.6 and 9.0 (a test compiles them); not tuned
LAUNCH = {
    "encode": (8, 3),
    "choose": (8, 1),
    "decode": (8, 3),
    "backward": (4, 3),
    "update_encoder": (8, 3),
    "update_decoder": (8, 3),
    "normalise": (8, 1),
    "update_b_dec": (4, 1),
}
OLDEST_TRITON = (3, 4)  # 3.3 knows no fields of a constexpr tuple, 3.2 no tuples as arguments
TRIAL_ERROR = 0.1  # of a movement, relative; factors cut to tf32 give 0.02, to bf16 0.04 (LOG.md)


@functools.cache
def has_triton() -> bool:
    """Whether a Triton is there that can compile the kernels; says so, once, if it isn't."""
    try:
        import triton

        from sparse_coding.sae.engines import gpu_kernels  # noqa: F401
    except ImportError as error:
        _say_dense(str(error))
        return False
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version < OLDEST_TRITON:  # it ends in errors of any type
        oldest = ".".join(map(str, OLDEST_TRITON))
        _say_dense(f"Triton {triton.__version__} is older than {oldest}, which torch 2.8 brings")
    return version >= OLDEST_TRITON


def _say_dense(reason: str) -> None:
    print(f"Triton kernels can't be used, so the GPU trains densely, slower: {reason}", flush=True)


def shape_of(h: int, batch: int, *, b_dec: bool, project: bool, dot: str, **tiles: int) -> "Shape":
    """What kernels are compiled for; tiles are no larger than what they cover.

    tiles: other than those of gpu_kernels.Shape
    """
    from sparse_coding.sae.engines.gpu_kernels import Shape

    shape = Shape(h, batch, b_dec, project, dot)._replace(**tiles)
    cover = dict.fromkeys(("encode_k", "decode_h", "backward_k", "update_h"), h)
    cover |= dict.fromkeys(("encode_b", "decode_b", "backward_b", "update_k"), batch)
    # a tile has at least 16 rows, a power of two: what tensor cores multiply
    least = {name: max(16, 2 ** (n - 1).bit_length()) for name, n in cover.items()}
    return shape._replace(**{name: min(getattr(shape, name), n) for name, n in least.items()})


def work_shapes(sizes: list[int], shape: "Shape") -> dict[str, tuple]:
    """(shape, dtype) of each field of Work, for autoencoders of these sizes."""
    f32, i32 = torch.float32, torch.int32
    n, n_rows, h, batch = len(sizes), sum(sizes), shape.h, shape.batch
    of_encode, of_lists = (
        sum(-(-size // tile) for size in sizes) for tile in (shape.encode_f, shape.list_f)
    )
    return {
        "x": ((batch, h), f32),
        "numbers": ((len(PLACE),), f32),
        "saes": ((n, 3), i32),
        "encode_tiles": ((of_encode, 2), i32),
        "list_tiles": ((of_lists, 2), i32),
        "codes": ((n_rows, batch), f32),
        "count": ((n_rows, -(-batch // shape.encode_b)), i32),
        "feature": ((n_rows,), i32),
        "missed": ((n_rows,), i32),
        "n_fired": ((n,), i32),
        "n_resting": ((n,), i32),
        "r": ((n, batch, h), f32),
        "delta": ((n_rows, batch), f32),
        "bias_grad": ((n_rows,), f32),
        "along": ((n_rows,), f32),
        "off": ((of_lists, h) if shape.b_dec else (0,), f32),
        "norm": ((n_rows, -(-h // shape.update_h)), f32),
    }


def steps_at_a_time(h: int) -> int:
    """Steps whose batches are made while others train."""
    return max(1, min(MOST_STEPS, 2**14 // h))  # of 2 048 samples: 128 MB


def engine_bytes(n_dicts: list[int], h: int, batch: int) -> int:
    """Scratch of an engine, with the batches that are stepped, waiting and being made; at least
    what is held twice while one kind of parameter is being joined."""
    shape = shape_of(h, batch, b_dec=True, project=True, dot="tf32")
    work = sum(math.prod(s) * t.itemsize for s, t in work_shapes(n_dicts, shape).values())
    return max(work + 3 * steps_at_a_time(h) * 4 * batch * h, 4 * sum(n_dicts) * h)


def make_work(sizes: list[int], shape: "Shape", device: torch.device) -> "Work":
    """Scratch for autoencoders of these sizes, with its tables of tiles filled: largest first."""
    from sparse_coding.sae.engines.gpu_kernels import Work

    shapes = work_shapes(sizes, shape)
    work = Work(*(torch.empty(s, dtype=t, device=device) for s, t in shapes.values()))
    tables: dict[str, list] = {"saes": [None] * len(sizes), "encode_tiles": [], "list_tiles": []}
    for i in reversed(range(len(sizes))):
        first = sum(sizes[:i])
        tables["saes"][i] = (first, first + sizes[i], len(tables["list_tiles"]))
        for name, tile in (("encode_tiles", shape.encode_f), ("list_tiles", shape.list_f)):
            tables[name] += [(i, start) for start in range(0, sizes[i], tile)]
    for name, table in tables.items():
        getattr(work, name).copy_(torch.tensor(table, dtype=torch.int32))
    return work


def join_(tensors: list[Tensor], *row: int) -> Tensor:
    """One tensor (n, *row) of all of them, of which each becomes a part: they share memory."""
    whole = torch.cat([t.detach().reshape(-1, *row) for t in tensors])
    parts = whole.split([t.numel() // math.prod(row) for t in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.data = part.view(tensor.shape)
    return whole


def rows_of_(stacks: list[Stack]) -> "Rows":
    """The stacks' parameters and moments as the kernels take them."""
    from sparse_coding.sae.engines.gpu_kernels import Rows

    h, device = stacks[0].W_dec.shape[2], stacks[0].W_dec.device
    joined = {}
    for name, row in (("W_enc", (h,)), ("W_dec", (h,)), ("b_enc", ()), ("b_dec", (h,))):
        parameters = [s.parameters[name] for s in stacks if name in s.parameters]
        if not parameters:  # b_dec is fixed at 0
            joined |= {f"{name}{end}": torch.empty(0, device=device) for end in ("", "_m", "_v")}
            continue
        states = [s.adam.state[p] for s, p in zip(stacks, parameters, strict=True)]
        joined[name] = join_(parameters, *row)
        joined[f"{name}_m"] = join_([state["exp_avg"] for state in states], *row)
        joined[f"{name}_v"] = join_([state["exp_avg_sq"] for state in states], *row)
    for name in ("idle", "silent", "n_revived", "l1", "target_l0"):
        joined[name] = join_([getattr(stack, name) for stack in stacks])
    dead_steps = torch.tensor([stacks[0].dead_steps], dtype=torch.int32, device=device)
    return Rows(**joined, dead_steps=dead_steps)


def launcher(rows: "Rows", work: "Work", shape: "Shape") -> Callable[[], None]:
    """A function that launches the kernels of a step on the current stream."""
    from sparse_coding.sae.engines import gpu_kernels

    n_saes, n_lists = len(work.saes), len(work.list_tiles)
    chunks = -(-shape.h // shape.update_h)
    programs = {
        gpu_kernels.encode: len(work.encode_tiles) * -(-shape.batch // shape.encode_b),
        gpu_kernels.choose: n_saes,
        gpu_kernels.decode: n_saes
        * -(-shape.batch // shape.decode_b)
        * -(-shape.h // shape.decode_h),
        gpu_kernels.backward: n_lists,
        gpu_kernels.update_encoder: n_lists * chunks,
        gpu_kernels.update_decoder: n_lists * chunks,
        gpu_kernels.normalise: n_lists * chunks if chunks > 1 else 0,
        gpu_kernels.update_b_dec: n_saes * chunks if shape.b_dec else 0,
    }

    def launch() -> None:
        for kernel, n in programs.items():
            warps, stages = LAUNCH[kernel.__name__]
            if n:
                kernel[(n,)](rows, work, shape, num_warps=warps, num_stages=stages)

    return launch


class GpuEngine(Engine):
    """Steps the stacks of one ensemble, whose tensors become parts of larger ones.

    graph: whether steps are replayed as a CUDA graph
    tiles: other than those of gpu_kernels.Shape, for tests and measurements
    """

    def __init__(self, stacks: list[Stack], *, graph: bool = True, **tiles: int):
        self.stacks, self.tiles = stacks, tiles
        self.rows, self.dense = rows_of_(stacks), DenseEngine(stacks)
        self.graph = graph and self.rows.W_dec.is_cuda
        if self.rows.W_dec.is_cuda:
            torch.cuda.empty_cache()  # what the parts were in
        self.dot = DOT[precision.in_use()]
        self.sizes = [stack.n_dict for stack in stacks for _ in stack.specs]
        self.steps_at_a_time = steps_at_a_time(stacks[0].W_dec.shape[2])
        self.ready: tuple | None = None  # a shape, its Work, and a function that steps

    def steps_(self, xs: Tensor, *, n_done: int, factors: list[Factors]) -> None:
        """As many steps as xs (n, batch, h) has batches, of every autoencoder."""
        _, batch, h = xs.shape
        one = self.stacks[0]
        options = dict(b_dec=one.b_dec is not None, project=one.project, dot=self.dot)
        shape = shape_of(h, batch, **options, **self.tiles)
        if fault_of(shape, xs.device):
            self.dense.steps_(xs, n_done=n_done, factors=factors)
        else:
            self.run_(shape, xs, n_done=n_done, factors=factors)

    def run_(self, shape: "Shape", xs: Tensor, *, n_done: int, factors: list[Factors]) -> None:
        """The same with kernels for this shape, whatever they give."""
        if self.ready is None or self.ready[0] != shape:
            self.ready = None  # memory first
            work = make_work(self.sizes, shape, xs.device)
            launch = launcher(self.rows, work, shape)
            self.ready = shape, work, replayed(launch) if self.graph else launch
        _, work, step = self.ready
        of_steps = torch.from_numpy(step_numbers(self.stacks[0], n_done, factors))  # (n, numbers)
        if xs.is_cuda:  # no waiting for what the GPU has still to do
            of_steps = of_steps.pin_memory().to(xs.device, non_blocking=True)
        for x, numbers in zip(xs, of_steps, strict=True):
            work.x.copy_(x)
            work.numbers.copy_(numbers)
            step()
        counts = [state["step"] for stack in self.stacks for state in stack.adam.state.values()]
        torch._foreach_add_(counts, len(xs))


def replayed(launch: Callable[[], None]) -> Callable[[], None]:
    """launch as a CUDA graph, whose input is what stands in the tensors that it reads; itself where
    that can't be, said in a line."""
    try:
        graph = torch.cuda.CUDAGraph()
        # other threads may go on using the GPU meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            launch()
    except RuntimeError as error:
        print(f"no CUDA graph, so small grids train slower: {first_line(error)}", flush=True)
        return launch
    return graph.replay


@functools.cache
def fault_of(shape: "Shape", device: torch.device) -> str:
    """What is wrong with the kernels of this shape, or "". Says so, once."""
    return fault_in(lambda: trial_error(shape, device), TRIAL_ERROR)


def fault_in(trial: Callable[[], float], most_off: float) -> str:
    """What is wrong with kernels, by a trial that gives how far off they are, or ""; says so."""
    from triton.errors import TritonError

    try:
        error = trial()
        fault = "" if error <= most_off else f"they are off by {error:.0%}"  # NaN is a fault
    except TritonError as error:  # the lines before the last quote the kernel
        fault = f"{type(error).__name__}: {str(error).strip().splitlines()[-1].strip()}"
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        fault = f"{type(error).__name__}: {first_line(error)}"  # no compiler for the launch, ...
    if fault:
        _say_dense(fault)
    return fault


def trial_error(shape: "Shape", device: torch.device) -> float:
    """How far steps of the kernels are from dense ones in float64, see distance_of_steps."""

    def train_(stacks: list[Stack], xs: Tensor, factors: list[Factors]) -> None:
        GpuEngine(stacks, graph=False).run_(shape, xs, n_done=0, factors=factors)

    specs = [SAESpec(n, 1e-3, seed=n, tied=True) for n in (shape.encode_f + 8, shape.list_f + 8)]
    return distance_of_steps(
        specs, train_, (shape.batch, shape.h), b_dec=shape.b_dec, project=shape.project,
        device=device,
    )  # fmt: skip


def distance_of_steps(
    specs: list[SAESpec], train_: Callable[[list[Stack], Tensor, list[Factors]], None],
    size: tuple[int, int], *, b_dec: bool, project: bool, device: torch.device,
) -> float:  # fmt: skip
    """How far three steps of train_ are from dense ones in float64, relative; of the worst
    parameter.

    Adam with an eps of 1 takes steps in proportion to the gradient, which are compared as such.
    On the second batch, of one direction, half of the features rest; some count as dead.
    """
    (batch, h), factors = size, [Factors(1.0, 1.0, False)] * 3
    xs = torch.randn(3, batch, h, generator=torch.Generator().manual_seed(0))
    xs[1] = xs[1, 0] * torch.linspace(0.5, 1.5, batch)[:, None]  # no two codes are equal
    xs, moved = (xs * h**-0.5).to(device), []
    options = dict(lr=h / 4, eps=1.0, project=project, dead_steps=1)
    options |= dict(b_dec=xs[0, 0] / 4 if b_dec else None)
    for dtype in (torch.float32, torch.float64):
        scratch = Scratch(device, dtype)
        stacks = [Stack([spec], h, scratch=scratch, **options) for spec in specs]
        parameters = [p for stack in stacks for p in stack.parameters.values()]
        before = [p.clone() for p in parameters]
        if dtype == torch.float32:
            train_(stacks, xs, factors)
        else:
            DenseEngine(stacks).steps_(xs.double(), n_done=0, factors=factors)
        moved.append([(a - b).double() for a, b in zip(parameters, before, strict=True)])
    pairs = zip(*moved, strict=True)
    return max(float((ours - dense).norm() / dense.norm()) for ours, dense in pairs if dense.any())
