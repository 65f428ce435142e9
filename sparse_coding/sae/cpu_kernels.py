"""One training step of one autoencoder on the CPU, compiled by numba.

The encoder is a GEMM over all features. Where few codes are above 0, the rest walks these alone,
and Adam the rows of features that fired lately; else it is GEMMs too (formulas: stack.py).
Everything of a step stays in the cache of one core: gradients exist for TILE features at a time.

    encode   pre = x W_encᵀ + b_enc, codes = ReLU(pre); for each feature the samples it fires on
    choose   sparse or dense, from the share of codes above 0 in this very step; l1 if l0 is sought
    decode   g = 2/(batch · h) · (codes W_dec + b_dec − x), for blocks of samples
    update   gradients of the rows, Adam, length 1; for tiles of features
    finish   Adam of b_dec

Encode and update take a span of tiles, decode one of blocks, so that several threads may share an
autoencoder: no result depends on how the spans are cut.

Rows that have not fired for long are left alone: row_kernels.py.
"""

from typing import NamedTuple

import numpy as np
from numpy import ndarray

from sparse_coding.sae.row_kernels import (
    F0,
    L1_FACTOR,
    SEEKS_L0,
    adam_,
    add_,
    dot,
    fill_,
    fired,
    gemm,
    kernel,
    rest,
    sparse_gradients,
)
from sparse_coding.sae.spec import L0_CLAMP, L0_GAIN

TILE = 128  # features: a tile's codes and gradients (128 KB each at 256) stay in L2
BLOCK = 64  # samples decoded at a time where codes are dense
RUN = 32  # samples whose codes are tested together
ENCODE, CHOOSE, DECODE, UPDATE, FINISH = (2**i for i in range(5))  # phases of a step
ALL = 2**5 - 1


class Work(NamedTuple):
    """Scratch of one step of one autoencoder.

    sparse: whether this step is
    off: ∂b_dec, a part per tile
    start, feature, value: codes above 0 by sample; those of sample b at start[b] to start[b + 1]
    """

    codes: ndarray  # (n_dict, batch)
    where: ndarray  # (n_dict, batch): samples that a feature fires on, ascending
    count: ndarray  # (n_dict,) int32: how many
    listed: ndarray  # (n_dict,) bool: whether `where` has them
    sparse: ndarray  # (1,) bool
    g: ndarray  # (batch, h)
    off: ndarray  # (tiles, h)
    start: ndarray  # (batch + 2,) int64
    feature: ndarray  # (most codes of a sparse step,) int32
    value: ndarray  # the same, float32


class Gradients(NamedTuple):
    """Of a tile: scratch of one thread."""

    delta: ndarray  # (TILE, batch)
    b_enc: ndarray  # (TILE,)
    W_enc: ndarray  # (TILE, h)
    W_dec: ndarray  # (TILE, h)


@kernel
def relu_(codes, bias):
    """codes of a feature (batch,) = ReLU(codes + bias); how many are above 0 (or NaN)."""
    n = np.int32(0)
    for b in range(codes.shape[0]):
        c = codes[b] + bias
        c = F0 if c <= F0 else c
        codes[b] = c
        n += np.int32(c != F0)
    return n


@kernel
def list_(codes, where):
    """where = indices of codes that are not 0, ascending."""
    batch, k = codes.shape[0], 0
    runs = batch - batch % RUN
    for first in range(0, runs, RUN):
        run, n = codes[first : first + RUN], np.int32(0)
        for b in range(RUN):
            n += np.int32(run[b] != F0)
        if n:
            for b in range(RUN):
                where[k] = first + b
                k += np.int64(run[b] != F0)
    for b in range(runs, batch):
        if codes[b] != F0:
            where[k] = b
            k += 1


@kernel
def encode(sae, work, x, span):
    """Codes of a span of tiles."""
    n_dict, start, total = sae.b_enc.shape[0], span[0] * TILE, 0
    for t in range(start, min(span[1] * TILE, n_dict), TILE):
        e = min(t + TILE, n_dict)
        gemm(False, True, sae.W_enc[t:e], x, work.codes[t:e])
        for f in range(t, e):
            bias = sae.b_enc[f]
            if sae.b_dec.shape[0]:
                bias -= dot(sae.W_enc[f], sae.b_dec)
            work.count[f] = relu_(work.codes[f], bias)
            total += work.count[f]
            # listed while in the cache, but not where it looks as if the step will be dense
            work.listed[f] = total * n_dict <= work.value.shape[0] * (f - start + 1)
            if work.listed[f] and work.count[f]:
                list_(work.codes[f], work.where[f])


@kernel
def choose(sae, work, pace):
    """Whether this step is sparse: then codes are sorted by sample. Moves l1 where l0 is sought."""
    batch, total = work.codes.shape[1], 0
    for f in range(work.count.shape[0]):
        total += work.count[f]
    if pace[SEEKS_L0] and sae.target_l0[0] > 0:
        off = np.float32(total / batch) / sae.target_l0[0]
        off = min(max(off, np.float32(1 / L0_CLAMP)), np.float32(L0_CLAMP))
        sae.l1[0] *= off ** np.float32(L0_GAIN)
    if total > work.value.shape[0]:
        return False
    start = work.start
    fill_(start, 0)
    for f in range(work.count.shape[0]):
        if not work.listed[f]:
            list_(work.codes[f], work.where[f])
        for k in range(work.count[f]):
            start[work.where[f, k] + 2] += 1
    for b in range(2, batch + 2):
        start[b] += start[b - 1]
    for f in range(work.count.shape[0]):
        for k in range(work.count[f]):
            b = work.where[f, k]
            work.feature[start[b + 1]] = f
            work.value[start[b + 1]] = work.codes[f, b]
            start[b + 1] += 1
    return True


@kernel
def decode(sae, work, x, span):
    """g of a span of blocks."""
    batch, h = x.shape
    sparse = work.sparse[0]
    scale = np.float32(2.0 / (batch * h))
    for t in range(span[0] * BLOCK, min(span[1] * BLOCK, batch), BLOCK):
        e = min(t + BLOCK, batch)
        if not sparse:
            gemm(True, False, work.codes[:, t:e], sae.W_dec, work.g[t:e])
        for b in range(t, e):
            g, xb = work.g[b], x[b]
            if sparse:
                sum_rows_(g, sae.W_dec, work, b)
            for j in range(h):
                g[j] -= xb[j]
            if sae.b_dec.shape[0]:
                add_(g, sae.b_dec)
            for j in range(h):
                g[j] *= scale


@kernel
def sum_rows_(out, W, work, b):
    """out = Σ codes of sample b · rows of W, four at a time."""
    feature, value = work.feature, work.value
    p, end = work.start[b], work.start[b + 1]
    fill_(out, F0)
    while p + 4 <= end:
        c0, c1, c2, c3 = value[p], value[p + 1], value[p + 2], value[p + 3]
        r0, r1, r2, r3 = W[feature[p]], W[feature[p + 1]], W[feature[p + 2]], W[feature[p + 3]]
        for j in range(out.shape[0]):
            out[j] += (c0 * r0[j] + c1 * r1[j]) + (c2 * r2[j] + c3 * r3[j])
        p += 4
    for q in range(p, end):
        c0, r0 = value[q], W[feature[q]]
        for j in range(out.shape[0]):
            out[j] += c0 * r0[j]


@kernel
def update(sae, work, x, grads, pace, span):
    """Gradients and Adam of a span of tiles."""
    n_dict, sparse = sae.b_enc.shape[0], work.sparse[0]
    l1 = sae.l1[0] * pace[L1_FACTOR] / np.float32(x.shape[0])
    for tile in range(span[0], min(span[1], work.off.shape[0])):
        t, e = tile * TILE, min(tile * TILE + TILE, n_dict)
        off = work.off[tile]
        fill_(off, F0)
        if not sparse:
            dense_gradients(sae.W_dec[t:e], work.codes[t:e], work.g, x, grads, l1)
        for f in range(t, e):
            if work.count[f] == 0:
                rest(sae, f, pace)
                continue
            i = f - t if not sparse else 0  # one row only stays in L1
            d_bias, d_enc, d_dec = grads.b_enc[i : i + 1], grads.W_enc[i], grads.W_dec[i]
            if sparse:
                row = work.codes[f], work.where[f, : work.count[f]], sae.W_dec[f]
                d_bias[0] = sparse_gradients(row, work.g, x, d_enc, d_dec, l1)
            fired(sae, f, d_bias, d_enc, d_dec, off, pace)


@kernel
def dense_gradients(W_dec, codes, g, x, grads, l1):
    """Of a tile, by GEMMs: all that is in grads."""
    n = W_dec.shape[0]
    delta = grads.delta[:n]
    gemm(False, True, W_dec, g, delta)
    for f in range(n):
        d, c = delta[f], codes[f]
        d_bias = F0
        for b in range(d.shape[0]):
            d[b] = F0 if c[b] == F0 else d[b] + l1
            d_bias += d[b]
        grads.b_enc[f] = d_bias
    gemm(False, False, codes, g, grads.W_dec[:n])
    gemm(False, False, delta, x, grads.W_enc[:n])


@kernel
def finish(sae, work, pace):
    """Adam of b_dec, whose gradient the tiles have left in parts."""
    if sae.b_dec.shape[0]:
        grad = work.off[0]
        for t in range(1, work.off.shape[0]):
            add_(grad, work.off[t])
        for b in range(work.g.shape[0]):
            add_(grad, work.g[b])
        adam_(sae.b_dec, sae.b_dec_m, sae.b_dec_v, grad, pace)


@kernel
def steps(sae, work, grads, xs, paces, todo, span):
    """Steps on each x of xs (n, batch, h); paces: (n, 6), numbers of each.

    todo: which phases, a sum; span: first and end of the tiles or blocks. One function for threads
    that work alone or share, since code compiled twice may round in two ways.
    """
    for i in range(xs.shape[0]):
        x, pace = xs[i], paces[i]
        if todo & ENCODE:
            encode(sae, work, x, span)
        if todo & CHOOSE:
            work.sparse[0] = choose(sae, work, pace)
        if todo & DECODE:
            decode(sae, work, x, span)
        if todo & UPDATE:
            update(sae, work, x, grads, pace, span)
        if todo & FINISH:
            finish(sae, work, pace)
