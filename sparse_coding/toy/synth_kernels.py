"""Samples of a synthetic world, compiled: what is on, and x.

**A Bernoulli costs no Φ.** u < Φ(z) is decided by a table of Φ at steps of 1/STEPS unless u lies
between two of its entries, which is when Φ is evaluated: the result is the same.

**Rare features are skipped over.** Of a group of features without a parent no Φ is larger than that
of the largest z. Candidates at that rate are found by one exponential number for each: hazards,
−log(1 − rate) of each feature, are passed until their sum exceeds it. A candidate is kept in
proportion to its own Φ (thinning: Lewis, Shedler 1979, https://doi.org/10.1002/nav.3800260304).

Random numbers: SplitMix64 (Steele, Lea, Flood 2014, https://doi.org/10.1145/2660193.2660195), each
sample from a state of its own; normals by a ziggurat (Marsaglia, Tsang 2000,
https://doi.org/10.18637/jss.v005.i08) whose layer and place in it come from different bits.
"""

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray
from torch.nn.functional import pad

from sparse_coding.sae.engines.cpu_blas import F0, add_, dot, float_gemm, kernel, sum_rows_
from sparse_coding.toy.synth_world import SynthWorld

BLOCK = 32  # samples, whose z are one GEMM
GROUP, ALIKE = 64, 4.0  # features that are skipped over together: at most, and p within this factor
LANES = 32  # rows of loadings are filled up to a multiple of: dot() is fast on whole vectors
SPAN, STEPS = 8, 64  # of the table: from -SPAN to SPAN
GOLDEN, MIX1, MIX2 = (
    np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
UNIT = 2.0**-53
LAYERS, TAIL = 256, 3.6541528853610088  # of the ziggurat; where its lowest layer ends


def ziggurat() -> tuple[ndarray, ndarray]:
    """(widths, heights) of LAYERS layers of equal area under exp(−x²/2), from the lowest up, then
    (0, 1), the top. The lowest one includes the tail, and its width is what a rectangle of its area
    would have."""
    height = math.exp(-0.5 * TAIL**2)
    area = TAIL * height + math.sqrt(math.pi / 2) * math.erfc(TAIL * math.sqrt(0.5))
    widths, heights = [area / height, TAIL], [0.0, height]
    while len(widths) < LAYERS:
        heights.append(heights[-1] + area / widths[-1])
        widths.append(math.sqrt(-2 * math.log(heights[-1])))
    return np.array([*widths, 0.0]), np.array([*heights, 1.0])


WIDTHS, HEIGHTS = ziggurat()


class KernelWorld(NamedTuple):
    """A SynthWorld as the kernels take it; z of a feature is its loadings · ε, of which one, −1,
    meets its threshold; zeros follow. All are over the diagonal."""

    features: ndarray  # (n, h)
    bias: ndarray  # (h,)
    top: ndarray  # (n_tops,) int64: features without a parent
    group: ndarray  # (n_groups + 1,) int64: into top, where groups begin
    top_loadings: ndarray  # (n_tops, columns)
    loadings: ndarray  # (n, columns)
    mean: ndarray  # (n,)
    std: ndarray  # (n,)
    first_child: ndarray  # (n + 1,) int64: into children
    children: ndarray  # (n_children,) int64
    table: ndarray  # (2 · SPAN · STEPS + 2,) float64: Φ
    hazard: ndarray  # the same: −log(1 − Φ)


def kernel_world(world: SynthWorld) -> KernelWorld:
    """Arrays of a world for draw()."""
    parent = world.parent.long()
    loadings = torch.cat((world.loadings, world.threshold[:, None]), 1) / world.diagonal[:, None]
    loadings = pad(loadings, (0, -loadings.shape[1] % LANES))
    top = (parent < 0).nonzero().flatten()
    order = parent.argsort(stable=True)
    counts = torch.bincount(parent[parent >= 0], minlength=len(parent))
    first = torch.zeros(len(parent) + 1, dtype=torch.int64)
    first[1:] = counts.cumsum(0)
    z = torch.arange(-SPAN * STEPS, SPAN * STEPS + 2, dtype=torch.float64) / STEPS
    tensors = (
        world.features, world.bias, top, torch.tensor(groups(world.probability[top].tolist())),
        loadings[top], loadings, world.mean, world.std, first, order[len(top) :],
        torch.special.ndtr(z), -torch.special.log_ndtr(-z),
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
    while True:
        bits = next_state(state)
        layer = np.int64(bits & np.uint64(LAYERS - 1))
        x = np.float64(np.int64(bits) >> 11) * (2 * UNIT) * WIDTHS[layer]
        if abs(x) < WIDTHS[layer + 1]:
            return np.float32(x)
        if layer == 0:
            return np.float32(math.copysign(beyond_tail(state), x))
        height = HEIGHTS[layer] + uniform(state) * (HEIGHTS[layer + 1] - HEIGHTS[layer])
        if height < math.exp(-0.5 * x * x):
            return np.float32(x)


@kernel
def beyond_tail(state):
    """A normal that is larger than TAIL."""
    while True:
        x = -math.log(uniform(state)) / TAIL
        if -2 * math.log(uniform(state)) > x * x:
            return TAIL + x


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
def largest_of_groups_(group, z, most):
    """most (n_groups, BLOCK) = the largest z (n_tops, BLOCK) of each group; four rows at a time, so
    that what is largest so far is fetched and stored less often."""
    for g in range(group.shape[0] - 1):
        first, last = group[g], group[g + 1] - 1
        for b in range(most.shape[1]):
            most[g, b] = z[first, b]
        for i in range(first, last + 1, 4):
            r0, r1, r2, r3 = z[i], z[min(i + 1, last)], z[min(i + 2, last)], z[min(i + 3, last)]
            for b in range(most.shape[1]):
                most[g, b] = max(most[g, b], max(max(r0[b], r1[b]), max(r2[b], r3[b])))


@kernel
def draw_tops(world, state, z, most, feature, value):
    """Features without a parent; how many are on."""
    n, left = 0, -math.log(uniform(state))  # of hazards before the next candidate
    for g in range(world.group.shape[0] - 1):
        i, end, cell = world.group[g], world.group[g + 1], cell_of(most[g]) + 1
        hazard = world.hazard[cell]
        while left < hazard * (end - i):
            i = min(i + int(left / hazard), end - 1)  # of a quotient that is rounded up
            if is_below(uniform(state) * world.table[cell], z[i], world.table):
                n = take(world, state, world.top[i], (feature, value, n))
            i, left = i + 1, -math.log(uniform(state))
        left -= hazard * (end - i)
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
    """x of a span of samples, and what is on in them; how many that is.

    scratch: states (BLOCK,) uint64; eps (BLOCK, columns), −1 and zeros but for its first columns,
        normals (BLOCK, rank); z (n_tops, BLOCK); most (n_groups, BLOCK); feature (n,) and value
        (n,) of a sample
    lists: counts (samples,), of all spans; feature, value of this one: what fits into them
    """
    states, eps, normals, z, most, feature, value = scratch
    counts, features, values = lists
    total = 0
    for first in range(span[0], span[1], BLOCK):
        n_samples = min(BLOCK, span[1] - first)
        for i in range(n_samples):
            state = states[i : i + 1]
            state[0] = seed + np.uint64(first + i) * MIX2
            state[0] = next_state(state)
            for j in range(normals.shape[1]):
                normals[i, j] = normal(state)
        float_gemm(False, True, world.top_loadings, eps, z)
        largest_of_groups_(world.group, z, most)
        for i in range(n_samples):
            state, b = states[i : i + 1], first + i
            n = draw_tops(world, state, z[:, i], most[:, i], feature, value)
            n = draw_children(world, state, eps[i], (feature, value), n, scaled)
            sum_rows_(x[b], world.features, feature, value, 0, n)
            add_(x[b], world.bias)
            counts[b] = n
            for k in range(min(n, features.shape[0] - total)):
                features[total + k], values[total + k] = feature[k], value[k]
            total += n
    return total
