"""Samples of a synthetic world, compiled: what is on, and x.

**A Bernoulli costs no Φ.** u < Φ(z) is decided by a table of Φ at steps of 1/STEPS unless u lies
between two of its entries, which is when Φ is evaluated: the result is the same.

**Rare features are skipped over.** Of a group of features without a parent no Φ is larger than that
of the largest z; gaps between candidates at that rate are geometric, and a candidate is kept in
proportion to its own Φ (thinning: Lewis, Shedler 1979, https://doi.org/10.1002/nav.3800260304).
The largest z is found among integers that are ordered as the floats of the same bits: on such the
compiler uses vectors.

Random numbers: SplitMix64 (Steele, Lea, Flood 2014, https://doi.org/10.1145/2660193.2660195), each
sample from a state of its own; normals by Box and Muller (1958).
"""

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray

from sparse_coding.sae.engines.cpu_blas import F0, add_, dot, gemm, kernel, sum_rows_
from sparse_coding.toy.synth_world import SynthWorld

BLOCK = 32  # samples, whose z are one GEMM
GROUP, ALIKE = 64, 4.0  # features that are skipped over together: at most, and p within this factor
DIRECT = 0.2  # above this bound each of a group is drawn
SPAN, STEPS = 8, 64  # of the table: from -SPAN to SPAN
GOLDEN, MIX1, MIX2 = (
    np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
TWO_PI = 2 * math.pi
UNIT = 2.0**-53


class KernelWorld(NamedTuple):
    """A SynthWorld as the kernels take it; z of a feature is its loadings · ε, of which the last
    one, −1, meets its threshold. All are over the diagonal."""

    features: ndarray  # (n, h)
    bias: ndarray  # (h,)
    top: ndarray  # (n_tops,) int64: features without a parent
    group: ndarray  # (n_groups + 1,) int64: into top, where groups begin
    top_loadings: ndarray  # (n_tops, rank + 1)
    loadings: ndarray  # (n, rank + 1)
    mean: ndarray  # (n,)
    std: ndarray  # (n,)
    first_child: ndarray  # (n + 1,) int64: into children
    children: ndarray  # (n_children,) int64
    table: ndarray  # (2 · SPAN · STEPS + 2,) float64: Φ
    rate: ndarray  # the same: 1 / log(1 − Φ)
    none: ndarray  # the same: (1 − Φ)^GROUP


def kernel_world(world: SynthWorld) -> KernelWorld:
    """Arrays of a world for draw()."""
    parent = world.parent.long()
    loadings = torch.cat((world.loadings, world.threshold[:, None]), 1) / world.diagonal[:, None]
    top = (parent < 0).nonzero().flatten()
    order = parent.argsort(stable=True)
    counts = torch.bincount(parent[parent >= 0], minlength=len(parent))
    first = torch.zeros(len(parent) + 1, dtype=torch.int64)
    first[1:] = counts.cumsum(0)
    table = torch.special.ndtr(
        torch.arange(-SPAN * STEPS, SPAN * STEPS + 2, dtype=torch.float64) / STEPS
    )
    tensors = (
        world.features, world.bias, top, torch.tensor(groups(world.probability[top].tolist())),
        loadings[top], loadings, world.mean, world.std, first, order[len(top) :], table,
        1 / torch.log1p(-table.clamp(max=0.5)), (1 - table) ** GROUP,
    )  # fmt: skip
    return KernelWorld(*(tensor.contiguous().numpy() for tensor in tensors))


def groups(probability: list[float]) -> list[int]:
    """Where groups of like probabilities begin, and the end."""
    starts = [0]
    for i, p in enumerate(probability):
        first = probability[starts[-1]]
        alike = first / ALIKE <= p <= first * ALIKE
        if i - starts[-1] == GROUP or not alike:
            starts.append(i)
    return [*starts, len(probability)]


@kernel
def next_state(state):
    """The next 64 random bits from state[0], a uint64, which moves on."""
    state[0] += GOLDEN
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * MIX1
    z = (z ^ (z >> np.uint64(27))) * MIX2
    return z ^ (z >> np.uint64(31))


@kernel
def uniform(state):
    """In (0, 1), float64, never 0."""
    return (np.float64(next_state(state) >> np.uint64(11)) + 0.5) * UNIT


@kernel
def normal(state):
    """A standard normal, float32."""
    radius = math.sqrt(-2.0 * math.log(uniform(state)))
    return np.float32(radius * math.cos(TWO_PI * uniform(state)))


@kernel
def fill_normals(state, out):
    """Standard normals, float32; two from each pair of random numbers."""
    for j in range(0, out.shape[0], 2):
        radius = math.sqrt(-2.0 * math.log(uniform(state)))
        angle = TWO_PI * uniform(state)
        out[j] = radius * math.cos(angle)
        if j + 1 < out.shape[0]:
            out[j + 1] = radius * math.sin(angle)


@kernel
def cell_of(z):
    """Place in the table of the last entry at or below z."""
    return int(min(max(math.floor((z + SPAN) * STEPS), 0), 2 * SPAN * STEPS))


@kernel
def is_below(u, z, table):
    """Whether u < Φ(z)."""
    cell = cell_of(z)
    if u < table[cell]:
        return True
    if u >= table[cell + 1] and cell < 2 * SPAN * STEPS:
        return False
    return u < 0.5 * math.erfc(-z * math.sqrt(0.5))


@kernel
def take(world, state, f, on):
    """Appends feature f with a magnitude of its own, if that is above 0; how many there are then.

    on: features, their values, how many
    """
    feature, value, n = on
    magnitude = world.mean[f] + world.std[f] * normal(state)
    if magnitude <= F0:
        return n
    feature[n], value[n] = f, magnitude
    return n + 1


@kernel
def key_of(bits):
    """An integer that is ordered as the float of these bits; and back."""
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@kernel
def largest(bits, start, end, one):
    """Of floats, given as their bits; one: a float32 and the same memory as int32."""
    most = key_of(bits[start])
    for i in range(start, end):
        key = key_of(bits[i])
        most = key if key > most else most
    one[1][0] = key_of(most)
    return one[0][0]


@kernel
def draw_tops(world, state, z, bits, one, feature, value):
    """Features without a parent; how many are on. bits: those of z; one: for largest()."""
    n = 0
    for g in range(world.group.shape[0] - 1):
        start, end = world.group[g], world.group[g + 1]
        cell = cell_of(largest(bits, start, end, one)) + 1
        bound = world.table[cell]
        if bound > DIRECT:
            for i in range(start, end):
                if is_below(uniform(state), z[i], world.table):
                    n = take(world, state, world.top[i], (feature, value, n))
            continue
        rate, i = world.rate[cell], start
        u = uniform(state)
        if end - start == GROUP and u <= world.none[cell]:
            continue
        while True:
            gap = math.log(u) * rate
            if gap >= end - i:
                break
            i += int(gap)
            if is_below(uniform(state) * bound, z[i], world.table):
                n = take(world, state, world.top[i], (feature, value, n))
            i += 1
            u = uniform(state)
    return n


@kernel
def draw_children(world, state, eps, lists, n, scaled):
    """Appends what is on below the n features in the lists; how many there are then."""
    feature, value = lists
    parent = 0
    while parent < n:
        f, n_on, n_before = feature[parent], 0, n
        for k in range(world.first_child[f], world.first_child[f + 1]):
            child = world.children[k]
            z = dot(world.loadings[child], eps)
            if is_below(uniform(state), z, world.table):
                n_after = take(world, state, child, (feature, value, n))
                if n_after > n:  # of those on until now each is as likely to stay
                    n_on += 1
                    if n_on > 1 and uniform(state) * n_on < 1:
                        feature[n_before], value[n_before] = feature[n], value[n]
                    n = n_before + 1
        if n_on and scaled:
            value[n_before] *= value[parent] / world.mean[f]
        parent += 1
    return n


@partial(kernel, entry=True)
def draw(world, seed, span, scratch, x, lists, scaled):
    """x of a span of samples, and what is on in them.

    scratch: states (BLOCK,) uint64, eps (BLOCK, rank + 1), z (BLOCK, n_tops) and its bits,
        one (see largest), and feature (n,) and value (n,) of a sample
    lists: start (samples + 1,), feature, value, as in Active. Without room for features, start[b +
        1] becomes how many sample b has; without room for that nothing is listed
    """
    states, eps, z, bits, one, feature, value = scratch
    start, features, values = lists
    for first in range(span[0], span[1], BLOCK):
        n_samples = min(BLOCK, span[1] - first)
        for i in range(n_samples):
            state = states[i : i + 1]
            state[0] = seed + np.uint64(first + i) * MIX2
            state[0] = next_state(state)
            fill_normals(state, eps[i, :-1])
            eps[i, -1] = -1
        gemm(False, True, eps[:n_samples], world.top_loadings, z[:n_samples])
        for i in range(n_samples):
            state, b = states[i : i + 1], first + i
            n = draw_tops(world, state, z[i], bits[i], one, feature, value)
            n = draw_children(world, state, eps[i], (feature, value), n, scaled)
            if features.shape[0]:
                for k in range(n):
                    features[start[b] + k], values[start[b] + k] = feature[k], value[k]
            elif start.shape[0]:
                start[b + 1] = n
            sum_rows_(x[b], world.features, feature, value, 0, n)
            add_(x[b], world.bias)
