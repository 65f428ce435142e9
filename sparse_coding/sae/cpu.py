"""Trains stacks of autoencoders on the CPU with compiled kernels, one per thread.

A thread takes an autoencoder through several steps, alone: its weights and moments stay in that
core's cache, no thread waits for another at a barrier, and no number depends on how many threads
there are or which autoencoders share the ensemble. Where threads outnumber autoencoders, all share
one at a time; its bits stay the same (sparse_kernels.py).
"""

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from sparse_coding.sae.cpu_setup import (
    DENSITY,
    Scratch,
    gradient_shapes,
    one_thread_here,
    work_shapes,
)
from sparse_coding.sae.spec import BETAS, Factors

NO_END = 2**40  # of tiles
MOST_STEPS = 16  # at a time: so many batches of 256 x 256 are 4 MB, which L3 holds; not tuned
MOST_WEIGHTS = 1.5e8  # times steps, at a time: some seconds on two cores, then signals are seen


def engine_bytes(n_dicts: list[int], h: int, batch: int, *, n_threads: int) -> int:
    """Scratch of an engine's threads, each of which may step the largest autoencoder, and the
    batches that are stepped, waiting and being made."""
    work = work_shapes(max(n_dicts), batch, h, density=DENSITY).values()
    work = sum(math.prod(shape) * dtype.itemsize for shape, dtype in work)
    gradients = 4 * sum(map(math.prod, gradient_shapes(batch, h)))
    batches = 3 * steps_at_a_time(n_dicts, h) * 4 * batch * h
    return min(n_threads, len(n_dicts)) * (work + gradients) + batches


def steps_at_a_time(n_dicts: list[int], h: int) -> int:
    return int(max(1, min(MOST_STEPS, MOST_WEIGHTS / (sum(n_dicts) * h))))


class CpuEngine:
    """Steps the stacks of one ensemble, whose tensors stay where they are.

    density: share of codes above 0 up to which a step is sparse; 0 never, 1 always
    """

    def __init__(self, stacks: list, *, n_threads: int, density: float = DENSITY):
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
        pace, x = paces(self.stacks[0], n_done, factors), xs.numpy()
        if self.shared:
            for i in range(len(self.saes)):
                self._together(i, x, pace)
        else:
            order = sorted(range(len(self.saes)), key=lambda i: -self.seconds[i])  # ends even
            list(self.pool.map(lambda i: self._alone(i, x, pace), order))
        for stack in self.stacks:
            for state in stack.adam.state.values():
                state["step"] += len(xs)

    def _alone(self, i: int, xs: np.ndarray, pace: np.ndarray) -> None:
        """All steps of autoencoder i in this thread."""
        start, scratch, k = time.perf_counter(), self._scratch_for(xs), self.kernels
        work = scratch.work(self.sizes[i])
        k.steps(self.saes[i], work, scratch.gradients, xs, pace, k.ALL, (0, NO_END))
        self.seconds[i] = time.perf_counter() - start

    def _together(self, i: int, xs: np.ndarray, pace: np.ndarray) -> None:
        """All steps of autoencoder i by all threads, phase after phase."""
        k, work = self.kernels, self._scratch_for(xs).work(self.sizes[i])
        n_tiles, n_blocks = len(work.off), -(-xs.shape[1] // k.BLOCK)

        def run(step: int, todo: int, n: int) -> None:
            def share(span: tuple[int, int]) -> None:
                grads, now = self._scratch_for(xs).gradients, slice(step, step + 1)
                k.steps(self.saes[i], work, grads, xs[now], pace[now], todo, span)

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
        found = getattr(self.scratch, "value", None)
        if found is None or found.batch != batch:
            found = Scratch(max(self.sizes), batch, h, density=self.density)
            self.scratch.value = found
        return found


def views(stack: object) -> list:
    """A stack's autoencoders as the kernels take them: views, stepping one changes the stack."""
    from sparse_coding.sae.row_kernels import Sae

    none = torch.zeros(len(stack.members), 0)
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    state = [stack.adam.state.get(stack.parameters.get(name)) for name in names]
    tensors = [stack.parameters.get(name, none) for name in names]
    for of_one in state:
        tensors += [of_one[k] if of_one else none for k in ("exp_avg", "exp_avg_sq")]
    tensors += [stack.idle, stack.l1.flatten(1), stack.target_l0.flatten(1)]
    arrays = [t.detach().numpy() for t in tensors]
    return [Sae(*(a[i] for a in arrays)) for i in range(len(stack.members))]


def paces(stack: object, n_done: int, factors: list[Factors]) -> np.ndarray:
    """(n, 6) float32: for each step the numbers that row_kernels.py names."""
    group = stack.adam.param_groups[0]
    return np.array(
        [
            (
                stack.lr * f.lr / (1 - BETAS[0] ** t),
                (1 - BETAS[1] ** t) ** -0.5,
                group["eps"],
                f.l1,
                f.seek_l0,
                stack.project,
            )
            for t, f in enumerate(factors, start=n_done + 1)
        ],
        np.float32,
    )
