"""Samples of a synthetic world, top-down: a child is drawn where its parent is on, no other.

Given ε the features of a sample are independent, a candidate with probability
Φ((loadings · ε − threshold) / diagonal), and siblings of whom none has a parent that is on change
nothing. So a sample costs its roots, its free features and the children of some thirty features,
and gives what drawing all of them would.

On a CPU with compiled kernels (synth_kernels.py), else with torch's operations; the random numbers
of the two differ, as those of devices do.
"""

import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparse_coding.config import named_seed
from sparse_coding.sae.engines.cpu_compile import compiles, has_kernels, one_thread_here
from sparse_coding.toy.synth_world import SynthWorld, make_synth_world

SPANS = 2  # of a batch, for each thread; no number depends on them


class Active(NamedTuple):
    """Which features of a batch are on, by sample: those of sample b at start[b] to start[b + 1].

    start: (batch + 1,) int64; feature: (n,) int64; value: (n,)
    """

    start: Tensor
    feature: Tensor
    value: Tensor

    @property
    def sample(self) -> Tensor:
        """(n,) int64, of each feature in the list."""
        samples = torch.arange(len(self.start) - 1, device=self.start.device)
        return torch.repeat_interleave(samples, self.start.diff())

    def dense(self, n_features: int) -> Tensor:
        """(batch, n_features)."""
        out = torch.zeros(len(self.start) - 1, n_features, device=self.value.device)
        out[self.sample, self.feature] = self.value
        return out


class SynthStream:
    """Batches of a world: batch(step) is a pure function of (world, batch seed, step) on a device.

    scaled: whether a child's magnitude is times its parent's over the parent's mean
    """

    def __init__(
        self,
        world: SynthWorld,
        *,
        batch_size: int,
        batch_seed: int,
        device: torch.device,
        scaled: bool = True,
    ):
        self.batch_size, self.batch_seed, self.device = batch_size, batch_seed, device
        self.features = world.features.to(device)
        compiled = device.type == "cpu" and draw_compiles()
        self.sampler = (CompiledSampler if compiled else TorchSampler)(world, device, scaled)

    def batch(self, step: int) -> Tensor:
        """x of one step, (batch_size, activation_dim)."""
        return self.sampler.x(named_seed(self.batch_seed, step), self.batch_size)

    def with_active(self, step: int) -> tuple[Tensor, Active]:
        """The same, and which features are on in it."""
        return self.sampler.with_active(named_seed(self.batch_seed, step), self.batch_size)

    def with_truth(self, step: int) -> tuple[Tensor, Tensor]:
        """The same as a matrix, (batch_size, n_features) bool; in memory it has a row for each
        feature, of which metrics fetch some."""
        x, active = self.with_active(step)
        on = torch.zeros(len(self.features), len(x), dtype=torch.bool, device=x.device)
        on[active.feature, active.sample] = True  # all values are above 0
        return x, on.T


@functools.cache
def draw_compiles() -> bool:
    """Whether there are compiled kernels, or can be."""
    return has_kernels() and compiles(smallest_draw, "the sampler, once on this machine")


def smallest_draw() -> tuple:
    """`draw` and its arguments for a smallest world."""
    from sparse_coding.toy.synth_kernels import draw

    world = make_synth_world(1, 1, 0, n_steps=0)
    sampler, x = CompiledSampler(world, torch.device("cpu"), True), np.empty((1, 1), np.float32)
    return draw, sampler.arguments(0, (0, 1), x, (np.empty(1, np.int64), *new_lists(0)))


class TorchSampler:
    """With torch's operations, on any device."""

    def __init__(self, world: SynthWorld, device: torch.device, scaled: bool):
        self.scaled = scaled
        self.features, self.bias = world.features.to(device), world.bias.to(device)
        self.mean, self.std = world.mean.to(device), world.std.to(device)
        self.loadings = (world.loadings / world.diagonal[:, None]).to(device)
        self.threshold = (world.threshold / world.diagonal).to(device)
        self.tops = (world.parent < 0).nonzero().flatten().to(device)
        self.children = world.children.to(device)
        self.rng = torch.Generator(device)

    def x(self, seed: int, n: int) -> Tensor:
        """(n, activation_dim)."""
        return self.with_active(seed, n)[0]

    def with_active(self, seed: int, n: int) -> tuple[Tensor, Active]:
        """x and what is on in it."""
        self.rng.manual_seed(seed)
        eps = self._normal(n, self.loadings.shape[1])
        z = eps @ self.loadings[self.tops].T - self.threshold[self.tops]
        sample, place = (self._uniform(*z.shape) < torch.special.ndtr(z)).nonzero(as_tuple=True)
        feature = self.tops[place]
        value = self._magnitudes(feature)
        on = value > 0
        levels = [(sample[on], feature[on], value[on])]
        while len(levels[-1][0]) and self.children.shape[1]:
            levels.append(self._below(eps, *levels[-1]))
        sample, feature, value = (torch.cat(parts) for parts in zip(*levels, strict=True))
        order = (sample * len(self.features) + feature).argsort()
        start = torch.zeros(n + 1, dtype=torch.int64, device=eps.device)
        start[1:] = torch.bincount(sample, minlength=n).cumsum(0)
        active = Active(start, feature[order], value[order])
        return self._sum(active), active

    def _below(self, eps: Tensor, sample: Tensor, feature: Tensor, value: Tensor) -> tuple:
        """Children that are on: their samples, features, values."""
        children = self.children[feature]  # (n_on, most children)
        there, child = children >= 0, children.clamp(min=0)
        z = torch.einsum("ncr,nr->nc", self.loadings[child], eps[sample]) - self.threshold[child]
        candidate = there & (self._uniform(*z.shape) < torch.special.ndtr(z))
        magnitude = self._magnitudes(child)
        on = candidate & (magnitude > 0)
        lot = torch.where(on, self._uniform(*z.shape), -1.0)
        chosen = lot.argmax(dim=1, keepdim=True)
        some = on.any(dim=1)
        child, magnitude = (t.gather(1, chosen)[some, 0] for t in (child, magnitude))
        if self.scaled:
            magnitude = magnitude * (value / self.mean[feature])[some]
        positive = magnitude > 0  # but for underflow all are
        return sample[some][positive], child[positive], magnitude[positive]

    def _magnitudes(self, feature: Tensor) -> Tensor:
        normal = torch.randn(feature.shape, generator=self.rng, device=feature.device)
        return (self.mean[feature] + self.std[feature] * normal).relu()

    def _sum(self, active: Active) -> Tensor:
        """x; sums without atomic additions, so the bits are the same every time."""
        out = torch.nn.functional.embedding_bag(
            active.feature,
            self.features,
            active.start[:-1],
            mode="sum",
            per_sample_weights=active.value,
        )
        return out + self.bias

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.rng, device=self.features.device)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.rng, device=self.features.device)


class CompiledSampler:
    """With kernels for spans of samples, each sample with random numbers of its own."""

    def __init__(self, world: SynthWorld, device: torch.device, scaled: bool):
        from sparse_coding.toy import synth_kernels

        self.kernels, self.scaled = synth_kernels, scaled
        self.world, self.rank = synth_kernels.kernel_world(world), world.loadings.shape[1]
        self.n_spans, self.scratch = SPANS * torch.get_num_threads(), threading.local()
        self.pool = ThreadPoolExecutor(torch.get_num_threads(), initializer=one_thread_here)
        self.room = 0  # in lists, for each sample: as much as was needed so far

    def x(self, seed: int, n: int) -> Tensor:
        """(n, activation_dim)."""
        return self._draw(seed, n, listed=False)[0]

    def with_active(self, seed: int, n: int) -> tuple[Tensor, Active]:
        """x and what is on in it."""
        x, counts, lists = self._draw(seed, n, listed=True)
        start = np.zeros(n + 1, np.int64)
        counts.cumsum(out=start[1:])
        feature, value = map(np.concatenate, zip(*lists, strict=True))
        return x, Active(*map(torch.from_numpy, (start, feature, value)))

    def arguments(self, seed: int, span: tuple[int, int], x: np.ndarray, lists: tuple) -> tuple:
        """Of `draw`, with this thread's scratch."""
        if not hasattr(self.scratch, "of_thread"):
            self.scratch.of_thread = self._new_scratch()
        scratch = self.scratch.of_thread
        return self.world, np.uint64(seed), span, scratch, x, lists, self.scaled

    def _new_scratch(self) -> tuple:
        block, (n_tops, columns) = self.kernels.BLOCK, self.world.top_loadings.shape
        eps = np.zeros((block, columns), np.float32)
        eps[:, self.rank] = -1
        z, most = (np.empty((k, block), np.float32) for k in (n_tops, len(self.world.group) - 1))
        feature, value = new_lists(len(self.world.features))
        return np.empty(block, np.uint64), eps, eps[:, : self.rank], z, most, feature, value

    def _draw(self, seed: int, n: int, *, listed: bool) -> tuple[Tensor, np.ndarray, list]:
        """x, how many features are on in each sample, and these, in lists of consecutive spans."""
        x, counts = np.empty((n, self.world.features.shape[1]), np.float32), np.empty(n, np.int64)
        block = self.kernels.BLOCK  # whole ones: bits of z may depend on a sample's place in it
        size = -(-n // (self.n_spans * block)) * block

        def share(start: int) -> tuple[np.ndarray, ...]:
            span = start, min(start + size, n)
            lists = new_lists(self.room * size if listed else 0)
            total = self.kernels.draw(*self.arguments(seed, span, x, (counts, *lists)))
            if listed and total > len(lists[0]):  # again, with room
                self.room = max(self.room, 1 + 5 * total // (4 * size))
                return share(start)
            return tuple(of_span[:total] for of_span in lists)

        lists = list(self.pool.map(share, range(0, n, size)))
        return torch.from_numpy(x), counts, lists


def new_lists(room: int) -> tuple[np.ndarray, np.ndarray]:
    """For features and their values."""
    return np.empty(room, np.int64), np.empty(room, np.float32)
