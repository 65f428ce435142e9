"""What a training step of refined families has beyond the others, compiled (formulas: stack.py).

    first       codes of x, by the kernels of cpu_codes.py
    refine      x + REFINEMENT · r, whose pre-activations are pre₂: it is encoded in place of x
    rank        features by how often they fire: which band each is in
    tilt        how much the error of each sample weighs
    pull_back   g of each band, and −u: what goes back to r, for blocks of samples

Steps are always sparse.
"""

import numpy as np

from sparse_coding.sae.engines.cpu_blas import (
    F0,
    add_,
    dot,
    fill_,
    kernel,
    scale_,
    split_,
    subtract_,
    sum_rows_,
)
from sparse_coding.sae.engines.cpu_scratch import BLOCK
from sparse_coding.sae.families import RATE_EMA, REFINEMENT, TILT

SHARE = np.float32(REFINEMENT)


@kernel
def refine(sae, work, first, x, span):
    """work.x = x + REFINEMENT · r, for a span of blocks."""
    for b in range(span[0] * BLOCK, min(span[1] * BLOCK, x.shape[0])):
        row, xb = work.x[b], x[b]
        ends = first.start[b], first.start[b + 1]
        sum_rows_(row, sae.W_dec, first.feature, first.value, ends[0], ends[1])
        if sae.b_dec.shape[0]:
            add_(row, sae.b_dec)
        for j in range(row.shape[0]):
            row[j] = xb[j] + SHARE * (xb[j] - row[j])
        split_(row, work.x_parts[b], 0)


@kernel
def rank(sae, work):
    """Running means of how often features fire; their order, and the band of each."""
    rate, order, batch = sae.rate, sae.order, np.float32(work.codes.shape[1])
    for f in range(rate.shape[0]):
        rate[f] += np.float32(RATE_EMA) * (np.float32(work.count[f]) / batch - rate[f])
    for i in range(1, order.shape[0]):  # by insertion: the order is nearly that of the last step
        f, j = order[i], i
        while j > 0 and _before(rate, f, order[j - 1]):
            order[j] = order[j - 1]
            j -= 1
        order[j] = f
    band = 0
    for i in range(order.shape[0]):
        band += i == sae.bands[band]
        work.band[order[i]] = band


@kernel
def _before(rate, f, other):
    """Whether feature f comes before another one: it fires more often, or is the lower of two."""
    return rate[f] > rate[other] or (rate[f] == rate[other] and f < other)


@kernel
def decode_by_rank(sae, work, x, span, scale):
    """Error of each prefix, for a span of samples, whose codes are sorted by band; and the sum of
    its squares."""
    for b in range(span[0], span[1]):
        p, end, xb = work.start[b], work.start[b + 1], x[b]
        for band in range(sae.bands.shape[0]):
            g, first = work.g[band, b], p
            while p < end and work.band[work.feature[p]] == band:
                p += 1
            sum_rows_(g, sae.W_dec, work.feature, work.value, first, p)
            if band:
                add_(g, work.g[band - 1, b])
                continue
            subtract_(g, xb)
            if sae.b_dec.shape[0]:
                add_(g, sae.b_dec)
        for band in range(sae.bands.shape[0]):
            scale_(work.g[band, b], scale)
            work.error[band, b] = dot(work.g[band, b], work.g[band, b])


@kernel
def tilt(sae, work):
    """work.error: of each prefix batch · softmax(TILT · error / mean error), over samples."""
    for band in range(sae.bands.shape[0]):
        error, mean, total = work.error[band], 0.0, 0.0
        most, batch = error[0], error.shape[0]
        for b in range(batch):
            mean += error[b] / batch
            most = max(most, error[b])
        for b in range(batch):
            error[b] = np.exp(TILT * (error[b] - most) / mean)
            total += error[b]
        scale_(error, np.float32(batch / total))


@kernel
def pull_back(sae, work, span):
    """g of each band, and work.back = −u, for a span of blocks."""
    outermost = sae.bands.shape[0] - 1
    start, end = span[0] * BLOCK, min(span[1] * BLOCK, work.back.shape[0])
    for b in range(start, end):
        back = work.back[b]
        for band in range(outermost, -1, -1):
            scale_(work.g[band, b], work.error[band, b])
            if band < outermost:
                add_(work.g[band, b], work.g[outermost, b])
        fill_(back, F0)
        for p in range(work.start[b], work.start[b + 1]):
            f = work.feature[p]
            add_part_(back, sae.W_enc[f], dot(sae.W_dec[f], work.g[work.band[f], b]))
    for f in range(work.dead_row.shape[0] if work.n_dead[0] else 0):
        d = work.dead_row[f]
        for b in range(start, end if d >= 0 else start):
            if work.aux[d, b] != F0:
                add_part_(work.back[b], sae.W_enc[f], dot(work.aux_dec[d], work.g_aux[b]))


@kernel
def add_part_(back, row, delta):
    """back −= REFINEMENT · δ of a code · its row of W_enc."""
    for j in range(row.shape[0]):
        back[j] -= SHARE * delta * row[j]
