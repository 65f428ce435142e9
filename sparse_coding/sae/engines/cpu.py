"""Trains stacks of autoencoders on the CPU with compiled kernels, one per thread.

A thread takes an autoencoder through several steps, alone: its weights and moments stay in that
core's cache, no thread waits for another at a barrier, and no number depends on how many threads
there are or which autoencoders share the ensemble. Where threads outnumber autoencoders, all share
one at a time; its bits stay the same (cpu_kernels.py).

The kernels need numba, and a torch built with MKL (cpu_compile.py).
"""

import functools
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from sparse_coding.sae.batches import inputs_and_targets
from sparse_coding.sae.engines import cpu_bf16
from sparse_coding.sae.engines.cpu_compile import compiles, one_thread_here
from sparse_coding.sae.engines.cpu_scratch import (
    BLOCK,
    TILE,
    Scratch,
    gradient_shapes,
    largest_work,
    step_numbers,
    views,
)
from sparse_coding.sae.engines.dense import Engine
from sparse_coding.sae.families import Kind
from sparse_coding.sae.spec import PLACE, Factors, SAESpec
from sparse_coding.sae.stack import Scratch as StackScratch
from sparse_coding.sae.stack import Stack

Data = tuple[np.ndarray, np.ndarray, np.ndarray]  # xs, their parts, ys: see cpu_kernels.steps
NO_END = 2**40  # of tiles
MOST_STEPS = 16  # at a time: so many batches of 256 x 256 are 4 MB, which L3 holds; not tuned
MOST_WEIGHTS = 1.5e8  # times steps, at a time: some seconds on two cores, then signals are seen
# Share of codes above 0 up to which a step without the zeros is never slower on any machine
# measured (they cross from 0.21 to 0.45: LOG.md)
DENSITY = 0.2
OF_PARTS = {0: DENSITY, 1: 0.1, 2: 0.25}  # the same where factors have so many bf16 parts


@functools.cache
def kernels_compile() -> bool:
    """Whether what steps autoencoders compiles; says so, if it takes long or fails."""
    return compiles(smallest_step, "the CPU kernels, once on this machine: some 35 s")


def smallest_step() -> tuple:
    """`steps` and its arguments for a smallest autoencoder and batch."""
    from sparse_coding.sae.engines.cpu_kernels import ALL, steps

    stack_scratch = StackScratch(torch.device("cpu"), torch.float32)
    (sae,) = views(Stack([SAESpec(8, 0.0, 0)], 8, lr=0.0, scratch=stack_scratch))
    scratch, x = Scratch([("relu", 8)], 8, 8, density=DENSITY), np.zeros((1, 8, 8), np.float32)
    numbers = np.zeros((1, len(PLACE)), np.float32)
    works, parts = scratch.works(("relu", 8)), np.zeros((1, 8, 0, 8), np.uint16)
    return steps, (sae, works, scratch.gradients, (x, parts, x), numbers, ALL, (0, 1))


def engine_bytes(
    kinds: list[Kind], h: int, batch: int, *, n_threads: int, transcodes: bool = False
) -> int:
    """Scratch of an engine's threads, each of which may step the largest autoencoder, the batches
    that are stepped, waiting and being made, and what stands for weights and batches in GEMMs."""
    n_parts = cpu_bf16.N_PARTS[cpu_bf16.in_use()]
    sizes = dict(density=OF_PARTS[n_parts], n_parts=n_parts, skip=transcodes)
    works = [largest_work(kinds, batch, h, **sizes, place=place) for place in (0, 1)]
    work = sum(n * dtype.itemsize for work in works for n, dtype in work.values())
    shapes = gradient_shapes(batch, h, n_parts).values()
    gradients = sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)
    n_steps = steps_at_a_time([n for _, n in kinds], h)
    batches = (3 * 4 * (1 + transcodes) + 2 * n_parts) * n_steps * batch * h
    weights = 2 * n_parts * sum(n * h for _, n in kinds)
    return min(n_threads, len(kinds)) * (work + gradients) + batches + weights


def steps_at_a_time(n_dicts: list[int], h: int) -> int:
    """Steps between two looks at signals and checkpoints."""
    return int(max(1, min(MOST_STEPS, MOST_WEIGHTS / (sum(n_dicts) * h))))


class CpuEngine(Engine):
    """Steps the stacks of one ensemble, whose tensors stay where they are.

    density: share of codes above 0 up to which a step is sparse; 0 never, 1 always; None: that of
        OF_PARTS
    precision: of factors in GEMMs, of cpu_bf16.N_PARTS; "": that in use
    """

    def __init__(
        self,
        stacks: list[Stack],
        *,
        n_threads: int,
        density: float | None = None,
        precision: str = "",
    ):
        from sparse_coding.sae.engines import cpu_kernels

        self.kernels, self.stacks = cpu_kernels, stacks
        self.n_parts = cpu_bf16.N_PARTS[precision or cpu_bf16.in_use()]
        self.density = OF_PARTS[self.n_parts] if density is None else density
        self.saes = [sae for stack in stacks for sae in views(stack, self.n_parts)]
        self.versions: list[int] = []  # of each W_enc when its parts were last taken
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
        xs, ys = inputs_and_targets(xs)
        of_stacks = [step_numbers(stack, n_done, factors) for stack in self.stacks]
        numbers = [of_stacks[k] for k, stack in enumerate(self.stacks) for _ in stack.specs]
        self._split_weights()
        data = xs.numpy(), cpu_bf16.parts_of(xs, self.n_parts).numpy(), ys.numpy()
        if self.shared:
            for i in range(len(self.saes)):
                self._together(i, data, numbers[i])
        else:
            order = sorted(range(len(self.saes)), key=lambda i: -self.seconds[i])  # ends even
            list(self.pool.map(lambda i: self._alone(i, data, numbers[i]), order))
        for stack in self.stacks:
            for state in stack.adam.state.values():
                state["step"] += len(xs)

    def _split_weights(self) -> None:
        """Takes the parts of W_enc anew where others than the kernels have written it."""
        versions = [stack.W_enc._version for stack in self.stacks]  # counts torch's writes
        if not self.n_parts or versions == self.versions:
            return
        self.versions, rows = versions, [row for stack in self.stacks for row in stack.W_enc]
        for sae, W_enc in zip(self.saes, rows, strict=True):
            sae.W_enc_parts[:] = cpu_bf16.parts_of(W_enc, self.n_parts)

    def _alone(self, i: int, data: Data, numbers: np.ndarray) -> None:
        """All steps of autoencoder i in this thread."""
        start, scratch, k = time.perf_counter(), self._scratch_for(data[0]), self.kernels
        works = scratch.works(self.kinds[i])
        k.steps(self.saes[i], works, scratch.gradients, data, numbers, k.ALL, (0, NO_END))
        self.seconds[i] = time.perf_counter() - start

    def _together(self, i: int, data: Data, numbers: np.ndarray) -> None:
        """All steps of autoencoder i by all threads, phase after phase."""
        xs, k = data[0], self.kernels
        works = self._scratch_for(xs).works(self.kinds[i])
        n_tiles, n_blocks = len(works[0].off), -(-xs.shape[1] // BLOCK)

        def run(step: int, todo: int, n: int) -> None:
            def share(span: tuple[int, int]) -> None:
                grads, now = self._scratch_for(xs).gradients, slice(step, step + 1)
                of_step = tuple(array[now] for array in data), numbers[now]
                k.steps(self.saes[i], works, grads, *of_step, todo, span)

            n_shares = min(n, self.n_threads)
            ends = [n * j // n_shares for j in range(n_shares + 1)]
            list(self.pool.map(share, pairwise(ends)))

        sae = self.saes[i]
        for step in range(len(xs)):
            for place in (1, 0) if sae.refined else (0,):
                of = place * k.OF_FIRST
                run(step, k.ENCODE << of, n_tiles)
                if sae.selection == k.TOPK:  # each sample has a bound of its own
                    run(step, k.BOUND << of, 1)
                    run(step, k.LIST << of, n_tiles)
                run(step, k.CHOOSE << of, 1)
                if place:
                    run(step, k.REFINE, n_blocks)
            run(step, k.DECODE, n_blocks)
            if sae.refined:
                run(step, k.TILT, 1)
                run(step, k.PULL_BACK, n_blocks)
            if works[0].n_dead[0]:
                run(step, k.AUXILIARY, -(-int(works[0].n_dead[0]) // TILE))
            run(step, k.UPDATE, n_tiles)
            run(step, k.FINISH, 1)

    def _scratch_for(self, xs: np.ndarray) -> Scratch:
        """This thread's, allocated at its first steps and when the batch size changes."""
        _, batch, h = xs.shape
        scratch = getattr(self.scratch, "of_thread", None)
        if scratch is None or scratch.batch != batch:
            skip = any(stack.W_skip is not None for stack in self.stacks)
            sizes = dict(density=self.density, n_parts=self.n_parts, skip=skip)
            scratch = Scratch(self.kinds, batch, h, **sizes)
            self.scratch.of_thread = scratch
        return scratch
