"""Trains stacks of autoencoders on a GPU: GEMMs by the library, Triton kernels for the rest.

For each autoencoder a step is dense or sparse. Both encode with a GEMM. A dense step has four more,
between which kernels select codes, form δ and apply Adam. A sparse step has none: kernels gather
the rows that are listed, and sum a feature's gradient where they move it. Which is faster follows
from the share of codes above 0 (SPARSE_SHARE): of a k it is known, else it is looked at every
CHECK_EVERY steps, at which features are also found that may be dead before the next look. What was
decided is part of a checkpoint, so a resumed run has the same bits.

Steps are replayed as a CUDA graph until such a decision changes.
"""

import functools
import math
from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_coding.sae.engines.cpu import step_numbers
from sparse_coding.sae.engines.dense import DenseEngine, Engine
from sparse_coding.sae.engines.gpu import (
    distance_of_steps,
    fault_in,
    replayed,
    steps_at_a_time,
)
from sparse_coding.sae.engines.gpu_gemm import precision
from sparse_coding.sae.engines.gpu_gemm.parts import Rows, Work
from sparse_coding.sae.engines.gpu_gemm.precision import FACTORS
from sparse_coding.sae.engines.gpu_gemm.step import Slice, Step, shape_of, work_shapes
from sparse_coding.sae.families import FAMILIES, Family
from sparse_coding.sae.families import Rows as RowsKind
from sparse_coding.sae.spec import PLACE, Factors, SAESpec
from sparse_coding.sae.stack import PARAMETERS, Stack

CHECK_EVERY = 64  # steps
# Share of codes above 0 up to which a sparse step is expected to be faster: a listed code moves
# 12 bytes per dimension where a dense one costs 8 FLOP; at 4 TB/s, and 60, 400 and 700 TFLOP/s
SPARSE_SHARE = {"float32": 0.04, "tf32": 0.007, "bf16": 0.004, "fp16": 0.004}
MOST_SCRATCH = 2e9  # bytes of one slice, if it has more than one autoencoder
LEAST_NEAR = 64  # features that may soon be dead are taken in powers of two from here on
# Of a movement, relative: rounded factors change it, and which codes a k selects
MOST_OFF = {"float32": 0.1, "tf32": 0.2, "bf16": 0.4, "fp16": 0.2}
SIZES = 72, 136  # features of the autoencoders that are tried: more than a tile, no multiple of it


def most_together(n: int, batch: int) -> int:
    """Autoencoders of a slice: so many that scratch stays in bounds, at least one."""
    return max(1, int(MOST_SCRATCH / (24 * batch * n)))


def engine_bytes(kinds: list[tuple[Family, int, int]], h: int, batch: int) -> int:
    """Scratch of an engine for stacks of (family, n_dict, n_saes), with 16-bit factors of weights,
    batches that are stepped, waiting and being made, and the auxiliary loss of all features."""
    most = 0
    for family, n, n_saes in kinds:
        together = min(n_saes, most_together(n, batch))
        of_codes = 4 * together * batch * n
        of_bands = 10 * (8 if family.nested else 1) * together * batch * h
        aux = 4 * of_codes + 4 * 4 * together * n * h if family.aux else 0
        most = max(most, 6 * of_codes + of_bands + 8 * together * n * h + aux)
    factors = sum(4 * n * h * n_saes for _, n, n_saes in kinds)
    return most + factors + 3 * steps_at_a_time(h) * 4 * batch * h


class Buffers:
    """Scratch that all slices share, since one is stepped at a time; by name and dtype."""

    def __init__(self, device: torch.device):
        self.device, self.flat = device, {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        n, key = math.prod(shape), (name, dtype)
        if key not in self.flat or self.flat[key].numel() < n:
            self.flat[key] = torch.empty(n, dtype=dtype, device=self.device)
        return self.flat[key][:n].view(shape)


class Choices:
    """What an engine keeps of a stack beside its parameters, and what it decides.

    sparse: (n_saes,) bool, whether the next steps are
    near_dead: (n_saes, n_dict) bool, which features may be dead at the next steps
    """

    def __init__(self, stack: Stack, factor: torch.dtype):
        n_saes, n, _ = stack.W_dec.shape
        to = {"device": stack.W_dec.device}
        ints, flags = {"dtype": torch.int32, **to}, {"dtype": torch.bool, **to}
        self.stack, wide = stack, factor == torch.float32
        weights = stack.W_enc.data, stack.W_dec.data
        self.factors = [w if wide else w.to(factor) for w in weights]  # as they stand in GEMMs
        self.versions = self._versions()
        self.hint = torch.zeros(n_saes, **to)  # in no checkpoint: it changes no result
        self.k, self.n_codes = (torch.zeros(n_saes, **ints) for _ in range(2))
        self.ends = torch.tensor([end for _, end in stack.bands], **ints)
        self.sparse = torch.zeros(n_saes, **flags)
        self.near_dead = torch.zeros(n_saes, n, **flags)
        self.look(share=0.0, batch=1, at_counts=False)

    def _versions(self) -> list[int]:
        """Of the weights: they count what torch writes."""
        return [w._version for w in (self.stack.W_enc, self.stack.W_dec)]

    def refresh(self) -> bool:
        """Whether others than the kernels have written weights, whose factors are taken anew."""
        written = self.versions != self._versions()
        if written:
            self.versions = self._versions()
            for factor, w in zip(self.factors, (self.stack.W_enc, self.stack.W_dec), strict=True):
                if factor.dtype != w.dtype:
                    factor.copy_(w)
        return written

    def look(self, *, share: float, batch: int, at_counts: bool = True) -> None:
        """Decides on the next CHECK_EVERY steps; at_counts: whether there was a batch."""
        stack, n = self.stack, self.stack.n_dict
        if stack.family.has_k:
            few = [spec.target_l0 <= share * n for spec in stack.specs]
            self.sparse.copy_(torch.tensor(few))
        elif at_counts:
            self.sparse.copy_(self.n_codes <= share * n * batch)
        else:
            self.sparse.fill_(share >= 1)
        if stack.family.aux:
            self.near_dead.copy_(stack.silent > stack.dead_steps - CHECK_EVERY)

    def candidates(self) -> Tensor:
        """(n_saes, n_near) int64: those that may be dead, and others, up to a power of two."""
        n = int(self.near_dead.sum(dim=1).max())
        size = min(max(LEAST_NEAR, 2 ** (n - 1).bit_length()), self.stack.n_dict) if n else 0
        order = self.near_dead.int().argsort(dim=1, descending=True, stable=True)
        return order[:, :size].sort(dim=1).values

    def rows(self, first: int, end: int) -> Rows:
        """Views of some of the stack's autoencoders."""
        stack, of, values = self.stack, slice(first, end), {}
        none = self.hint[:0]
        for name in (*PARAMETERS, "b_dec", "threshold"):
            parameter = stack.parameters.get(name)
            state = {} if parameter is None else stack.adam.state[parameter]
            values[name] = none if parameter is None else parameter.data[of]
            values[f"{name}_m"] = state["exp_avg"][of] if state else none
            values[f"{name}_v"] = state["exp_avg_sq"][of] if state else none
        for name in ("idle", "silent", "n_revived", "smallest"):
            values[name] = getattr(stack, name)[of]
        for name in ("l1", "target_l0"):
            values[name] = getattr(stack, name)[of].view(-1)
        for name in ("hint", "k", "n_codes"):
            values[name] = getattr(self, name)[of]
        for name, factor in zip(("W_enc", "W_dec"), self.factors, strict=True):
            values[f"{name}_factor"] = factor[of]
        return Rows(**values, ends=self.ends)


class GemmEngine(Engine):
    """Steps the stacks of one ensemble, whose tensors stay where they are.

    graph: whether steps are replayed as a CUDA graph
    factor: a name of FACTORS; "": the one in use
    share: of codes above 0 up to which a step is sparse; 0 never, 1 always; None: that of
        SPARSE_SHARE
    """

    def __init__(
        self,
        stacks: list[Stack],
        *,
        graph: bool = True,
        factor: str = "",
        share: float | None = None,
    ):
        self.name, self.stacks = factor or precision.in_use(), stacks
        self.factor = FACTORS[self.name]
        self.share = SPARSE_SHARE[self.name] if share is None else share
        self.dense = DenseEngine(stacks)
        self.device = stacks[0].W_dec.device
        self.graph = graph and self.device.type == "cuda"
        self.choices = [Choices(stack, self.factor) for stack in stacks]
        self.buffers = Buffers(self.device)
        self.plan: tuple | None = None  # slices and batch size that `run` steps
        self.steps_at_a_time = steps_at_a_time(stacks[0].W_dec.shape[2])
        self.batch = 0

    def state(self) -> dict[str, Tensor]:
        """What was decided on the next steps, by name, not copied: for a checkpoint."""
        tensors = {}
        for i, choice in enumerate(self.choices):
            tensors |= {f"{i}.sparse": choice.sparse, f"{i}.near_dead": choice.near_dead}
        return tensors

    def steps_(self, xs: Tensor, *, n_done: int, factors: list[Factors]) -> None:
        """As many steps as xs (n, batch, h) has batches, of every autoencoder."""
        options = xs.shape[1], self.name, self.share
        tried = [tried_for(stack, *options) for stack in self.stacks]
        if any(fault_of(of, self.device) for of in tried):
            self.dense.steps_(xs, n_done=n_done, factors=factors)
        else:
            self.run_(xs, n_done=n_done, factors=factors)

    def run_(self, xs: Tensor, *, n_done: int, factors: list[Factors]) -> None:
        """The same with kernels, whatever they give."""
        written = [choice.refresh() for choice in self.choices]
        if any(written) or self.batch != xs.shape[1]:
            self._begin(xs.shape[1], first=n_done == 0)
        numbers = torch.stack(
            [torch.from_numpy(step_numbers(stack, n_done, factors)) for stack in self.stacks], dim=1
        )  # (n, stacks, numbers)
        if self.device.type == "cuda":  # no waiting for what the GPU has still to do
            numbers = numbers.pin_memory().to(self.device, non_blocking=True)
        for i, x in enumerate(xs):
            self.x.copy_(x)
            self.numbers.copy_(numbers[i])
            self.run()
            if (n_done + i + 1) % CHECK_EVERY == 0:
                for choice in self.choices:
                    choice.look(share=self.share, batch=self.batch)
                self._prepare()
        for stack in self.stacks:
            counts = [state["step"] for state in stack.adam.state.values()]
            torch._foreach_add_(counts, len(xs))

    def _begin(self, batch: int, *, first: bool) -> None:
        """Before the first steps, and after a checkpoint was read."""
        self.batch, self.plan = batch, None
        h = self.stacks[0].W_dec.shape[2]
        self.x = self.buffers("x", (batch, h), torch.float32)
        self.numbers = self.buffers("numbers", (len(self.stacks), len(PLACE)), torch.float32)
        for choice in self.choices:
            of_batch = batch if choice.stack.family.selection == "batchtopk" else 1
            ks = [int(spec.target_l0 * of_batch) for spec in choice.stack.specs]
            choice.k.copy_(torch.tensor(ks))
            if first:
                choice.look(share=self.share, batch=batch, at_counts=False)
        self._prepare()

    def _prepare(self) -> None:
        """Makes `run` step what was decided, if that is new; waits for the GPU."""
        near = [choice.candidates() for choice in self.choices]
        slices = []
        for i, choice in enumerate(self.choices):
            most, at = most_together(choice.stack.n_dict, self.batch), 0
            for sparse, group in groupby(choice.sparse.tolist()):
                end = at + len(list(group))
                for first in range(at, end, most):
                    slices.append(Slice(i, first, min(first + most, end), sparse, near[i].shape[1]))
                at = end
        if self.plan != (slices, self.batch):
            self.plan, self.near = (slices, self.batch), near
            self.steps = self._steps(slices)
            self.run = self._recorded()
        for kept, new in zip(self.near, near, strict=True):
            kept.copy_(new)  # where a graph reads it

    def _steps(self, slices: list[Slice]) -> list[Step]:
        """What steps each slice, in scratch that all share."""
        steps = []
        size = [self.stacks[of.stack].n_dict * (of.end - of.first) for of in slices]
        for _, of in sorted(zip(size, slices, strict=True), reverse=True):  # the largest allocates
            choice, stack = self.choices[of.stack], self.stacks[of.stack]
            shape = shape_of(stack, self.batch, of, self.factor)
            shapes = work_shapes(shape, stack.n_dict, of, self.factor)
            work = {name: self.buffers(name, *kind) for name, kind in shapes.items()}
            work = Work(x=self.x, numbers=self.numbers[of.stack], **work)
            values, near = choice.rows(of.first, of.end), self.near[of.stack][of.first : of.end]
            steps.append(Step(stack, values, work, shape, near))
        return steps

    def _recorded(self) -> Callable[[], None]:
        """A function that steps all slices: launched at first, which compiles what is new, then as
        a CUDA graph."""

        def launch() -> None:
            for step in self.steps:
                step()

        def run() -> None:
            launch()
            if self.graph:
                self.run = replayed(launch)

        return run


class Tried(NamedTuple):
    """What kernels are tried for."""

    arch: str
    rows: RowsKind
    h: int
    batch: int
    b_dec: bool
    project: bool
    factor: str  # a name of precision.FACTORS
    modes: tuple[float, ...] = (0.0, 1.0)  # shares, as GemmEngine takes: 0 is dense, 1 sparse


def tried_for(stack: Stack, batch: int, factor: str, share: float) -> Tried:
    """What is to be tried for a stack and batches of this size."""
    (spec, *_), h, modes = stack.specs, stack.W_dec.shape[2], {0.0, 1.0}
    if stack.family.has_k:  # known beforehand
        modes = {float(spec.target_l0 <= share * stack.n_dict) for spec in stack.specs}
    options = (stack.b_dec is not None, stack.project, factor, tuple(sorted(modes)))
    return Tried(spec.arch, spec.rows, h, batch, *options)


@functools.cache
def fault_of(of: Tried, device: torch.device) -> str:
    """What is wrong with the kernels, or "". Says so, once."""
    trial = functools.partial(trial_error, of, device)
    return fault_in(lambda: max(trial(share=share) for share in of.modes), MOST_OFF[of.factor])


def trial_error(of: Tried, device: torch.device, *, share: float) -> float:
    """Distance of the kernels' steps from dense ones in float64, relative; of the worst parameter.

    share: 0 tries dense steps, 1 sparse ones
    """

    def train_(stacks: list[Stack], xs: Tensor, factors: list[Factors]) -> None:
        engine = GemmEngine(stacks, graph=False, factor=of.factor, share=share)
        engine.run_(xs, n_done=0, factors=factors)

    k = 4.0 if FAMILIES[of.arch].has_k else 0.0
    specs = [SAESpec(n, 1e-3, n, tied=True, target_l0=k, arch=of.arch, rows=of.rows) for n in SIZES]
    options = dict(b_dec=of.b_dec, project=of.project, device=device)
    return distance_of_steps(specs, train_, (of.batch, of.h), **options)
