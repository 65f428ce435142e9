"""One training step of one autoencoder on the CPU, compiled by numba.

The encoder is a GEMM over all features. Where few codes are above 0, the rest walks these alone,
and Adam the rows of features that had a gradient lately; else it is GEMMs too (formulas: stack.py).
Everything of a step stays in the cache of one core: gradients exist for TILE features at a time.

    encode, bound, list: cpu_codes.py; codes that are chosen twice: cpu_refined.py
    choose      sparse or dense, from the share of codes above 0 in this very step; l1 and silence
    decode      g = 2/(batch · h) · (codes W_dec + b_dec − x) of each prefix, summed over those with
                a band of features, for blocks of samples; and of the auxiliary loss
    auxiliary   gradients of dead features, by GEMMs of these alone, for tiles of them
    update      gradients of the rows, then cpu_adam.py; for tiles of features
    finish      Adam of b_dec and of W_skip

What goes through tiles or blocks takes a span of them, so that several threads may share an
autoencoder: no result depends on how the spans are cut.
"""

from functools import partial

import numpy as np

from sparse_coding.sae.engines.cpu_adam import adam_, fired, rest
from sparse_coding.sae.engines.cpu_blas import (
    F0,
    add_,
    dot,
    fill_,
    float_gemm,
    gemm,
    kernel,
    scale_,
    split_,
    subtract_,
    sum_rows_,
)
from sparse_coding.sae.engines.cpu_codes import (
    BATCHTOPK,
    JUMP,
    L0_STEP,
    L0_TANH,
    LP,
    TOPK,
    bound,
    choose_auxiliary,
    encode,
    list_,
    list_bounded,
    note_silence,
    select,
    slope,
    track_smallest,
)
from sparse_coding.sae.engines.cpu_refined import (
    decode_by_rank,
    pull_back,
    rank,
    refine,
    tilt,
)
from sparse_coding.sae.engines.cpu_scratch import BLOCK, TILE
from sparse_coding.sae.families import AUX, LP_EPS
from sparse_coding.sae.spec import L0_CLAMP, L0_GAIN, PLACE

P, P_BEFORE, K_FACTOR = PLACE.p, PLACE.p_before, PLACE.k_factor
# Phases of a step. The first four, times 2**OF_FIRST, are of the first codes of refined families
OF_FIRST = 4
ENCODE, BOUND, LIST, CHOOSE = (2**i for i in range(OF_FIRST))
REFINE, DECODE, TILT, PULL_BACK, AUXILIARY, UPDATE, FINISH = (2**i for i in range(8, 15))
ALL = 2**15 - 1


@kernel
def sparse_gradients(row, g, x, d_enc, d_dec, slopes):
    """Adds to ∂W_enc and ∂W_dec of a feature what comes from the samples it fires on, four at a
    time; returns what does to ∂b_enc.

    row: its codes (batch,), the samples, its row of W_dec
    slopes: of the penalty, for each of the samples
    """
    codes, where, W = row
    h, n, d_bias = W.shape[0], where.shape[0], F0
    for k in range(0, n - n % 4, 4):
        b0, b1, b2, b3 = where[k], where[k + 1], where[k + 2], where[k + 3]
        g0, g1, g2, g3 = g[b0], g[b1], g[b2], g[b3]
        e0, e1, e2, e3 = slopes[k], slopes[k + 1], slopes[k + 2], slopes[k + 3]  # becomes δ
        for j in range(h):
            e0 += W[j] * g0[j]
            e1 += W[j] * g1[j]
            e2 += W[j] * g2[j]
            e3 += W[j] * g3[j]
        c0, c1, c2, c3 = codes[b0], codes[b1], codes[b2], codes[b3]
        for j in range(h):
            d_dec[j] += (c0 * g0[j] + c1 * g1[j]) + (c2 * g2[j] + c3 * g3[j])
        x0, x1, x2, x3 = x[b0], x[b1], x[b2], x[b3]
        for j in range(h):
            d_enc[j] += (e0 * x0[j] + e1 * x1[j]) + (e2 * x2[j] + e3 * x3[j])
        d_bias += (e0 + e1) + (e2 + e3)
    for k in range(n - n % 4, n):
        g0, x0, c0 = g[where[k]], x[where[k]], codes[where[k]]
        e0 = dot(W, g0) + slopes[k]
        for j in range(h):
            d_dec[j] += c0 * g0[j]
            d_enc[j] += e0 * x0[j]
        d_bias += e0
    return d_bias


@kernel
def adapt_l1(sae, work, numbers, total):
    """Moves l1 with the p of p-annealing, and toward the target l0."""
    if sae.penalty == LP and numbers[P] != numbers[P_BEFORE]:
        before, now = 0.0, 0.0
        for f in range(work.count.shape[0]):
            codes, listed = work.codes[f], work.listed[f]
            for i in range(work.count[f] if listed else codes.shape[0]):
                c = codes[work.where[f, i]] if listed else codes[i]
                if c > F0:
                    before += (c + np.float32(LP_EPS)) ** numbers[P_BEFORE]
                    now += (c + np.float32(LP_EPS)) ** numbers[P]
        if now > 0:
            sae.l1[0] *= np.float32(before / now)
    if numbers[PLACE.seeks_l0] and sae.target_l0[0] > 0:
        off = np.float32(total / work.codes.shape[1]) / sae.target_l0[0]
        off = min(max(off, np.float32(1 / L0_CLAMP)), np.float32(L0_CLAMP))
        sae.l1[0] *= off ** np.float32(L0_GAIN)


@kernel
def choose(sae, work, numbers):
    """Whether this step is sparse: then codes are sorted by sample."""
    total = np.int64(0)
    if sae.selection == TOPK or sae.selection == BATCHTOPK:
        select(sae, work, sae.k * numbers[K_FACTOR])
    if sae.selection == BATCHTOPK:
        track_smallest(sae, work)
    for f in range(work.count.shape[0]):
        total += work.count[f]
    if not work.place:
        work.n_dead[0] = 0
        if sae.aux:
            choose_auxiliary(sae, work)
        note_silence(sae, work)
        adapt_l1(sae, work, numbers, total)
        if sae.refined:
            rank(sae, work)
    if total > work.value.shape[0]:
        for f in range(work.count.shape[0]):
            split_(sae.W_dec[f], work.W_dec_parts[f], 0)
        return False
    sort_by_sample(sae, work)
    return True


@kernel
def sort_by_sample(sae, work):
    """Codes by sample; those of one ascend by feature, or by rank where bands are cut along it."""
    start, by_rank = work.start, sae.refined and not work.place
    fill_(start, 0)
    for f in range(work.count.shape[0]):
        if not work.listed[f]:
            list_(work.codes[f], work.where[f])
        for k in range(work.count[f]):
            start[work.where[f, k] + 2] += 1
    for b in range(2, start.shape[0]):
        start[b] += start[b - 1]
    for i in range(work.count.shape[0]):
        f = sae.order[i] if by_rank else i
        for k in range(work.count[f]):
            b = work.where[f, k]
            work.feature[start[b + 1]] = f
            work.value[start[b + 1]] = work.codes[f, b]
            start[b + 1] += 1


@kernel
def decode(sae, work, x, y, span):
    """g of each band and g_aux, for a span of blocks; y: what x_hat is of."""
    batch, h = x.shape
    scale = np.float32(2.0 / (batch * h))
    target = work.target if sae.W_skip.shape[0] else y
    for t in range(span[0] * BLOCK, min(span[1] * BLOCK, batch), BLOCK):
        block = t, min(t + BLOCK, batch)
        if sae.W_skip.shape[0]:
            leave_to_codes(sae, work, x, y, block)
        if sae.refined:
            decode_by_rank(sae, work, target, block, scale)
        else:
            decode_block(sae, work, target, block, scale)
        if work.n_dead[0]:
            decode_dead(work, sae.bands.shape[0], block, scale)


@kernel
def leave_to_codes(sae, work, x, y, block):
    """work.target = y − x W_skipᵀ of a block of samples, in float32 in any precision."""
    t, e = block
    float_gemm(False, True, x[t:e], sae.W_skip, work.target[t:e])
    for b in range(t, e):
        target, yb = work.target[b], y[b]
        for j in range(target.shape[0]):
            target[j] = yb[j] - target[j]


@kernel
def decode_block(sae, work, x, block, scale):
    """g of each band, for a block of samples."""
    (t, e), sparse, n_bands, first = block, work.sparse[0], sae.bands.shape[0], 0
    for f in range(0 if sparse else work.count.shape[0]):
        split_(work.codes[f][t:e], work.codes_parts[f], t)
    for band in range(0 if sparse else n_bands):
        end = sae.bands[band]
        codes = work.codes[first:end, t:e], work.codes_parts[first:end, :, t:e]
        rows = sae.W_dec[first:end], work.W_dec_parts[first:end]
        gemm(True, False, codes, rows, work.g[band, t:e])
        first = end
    for b in range(t, e):
        xb, p = x[b], work.start[b]
        for band in range(n_bands):  # x_hat of each prefix
            g = work.g[band, b]
            if sparse:
                end = end_of_band(work.feature, p, work.start[b + 1], sae, band)
                sum_rows_(g, sae.W_dec, work.feature, work.value, p, end)
                p = end
            if band:
                add_(g, work.g[band - 1, b])
                continue
            subtract_(g, xb)
            if sae.b_dec.shape[0]:
                add_(g, sae.b_dec)
        for band in range(n_bands):
            scale_(work.g[band, b], scale)
        for band in range(n_bands - 2, -1, -1):
            add_(work.g[band, b], work.g[band + 1, b])
        for band in range(0 if sparse else n_bands):
            split_(work.g[band, b], work.g_parts[band, b], 0)


@kernel
def end_of_band(feature, p, end, sae, band):
    """Where the features of a sample, from place p on, are no longer of a band."""
    if band + 1 < sae.bands.shape[0]:
        while p < end and feature[p] < sae.bands[band]:
            p += 1
        return p
    return end


@kernel
def decode_dead(work, n_bands, span, scale):
    """g_aux of a block of samples: what the dead leave of −e = g · batch · h/2."""
    (t, e), n, g, g_aux = span, work.n_dead[0], work.g[n_bands - 1], work.g_aux
    for d in range(n):
        split_(work.aux[d][t:e], work.aux_parts[d], t)
    codes = work.aux[:n, t:e], work.aux_parts[:n, :, t:e]
    gemm(True, False, codes, (work.aux_dec[:n], work.aux_dec_parts[:n]), g_aux[t:e])
    for b in range(t, e):
        for j in range(g.shape[1]):
            g_aux[b, j] = np.float32(AUX) * (g_aux[b, j] * scale + g[b, j])
        split_(g_aux[b], work.g_aux_parts[b], 0)


@kernel
def auxiliary(work, x, grads, span):
    """Gradients of the auxiliary loss, for a span of tiles of dead features; x: with its parts."""
    n_dead = work.n_dead[0]
    for t in range(span[0] * TILE, min(span[1] * TILE, n_dead), TILE):
        e = min(t + TILE, n_dead)
        codes, g = (work.aux[t:e], work.aux_parts[t:e]), (work.g_aux, work.g_aux_parts)
        rows, delta = work.aux_dec[t:e], (grads.delta[: e - t], grads.delta_parts[: e - t])
        gemm(False, True, (rows, work.aux_dec_parts[t:e]), g, delta[0])
        for i in range(e - t):
            work.aux_bias[t + i] = masked_sum_(delta[0][i], codes[0][i], F0)
            split_(delta[0][i], delta[1][i], 0)
        gemm(False, False, codes, g, rows)
        gemm(False, False, delta, x, work.aux_enc[t:e])


@kernel
def masked_sum_(delta, codes, slope):
    """δ of a feature += slope where codes are above 0, else = 0; its sum."""
    total = F0
    for b in range(delta.shape[0]):
        delta[b] = F0 if codes[b] == F0 else delta[b] + slope
        total += delta[b]
    return total


@kernel
def update(sae, work, first, x, grads, numbers, span):
    """Gradients and Adam of a span of tiles, whose parts in different bands have different g.

    x: with its parts
    """
    n_dict = sae.b_enc.shape[0]
    n_bands = 1 if sae.refined else sae.bands.shape[0]  # those of refined families are scattered
    for tile in range(span[0], min(span[1], work.off.shape[0])):
        t, e, begin = tile * TILE, min(tile * TILE + TILE, n_dict), 0
        fill_(work.off[tile], F0)
        for band in range(n_bands):
            end = n_dict if sae.refined else sae.bands[band]
            part = max(t, begin), min(e, end)
            if part[0] < part[1]:
                update_part(sae, work, first, x, grads, numbers, (part[0], part[1], band))
            begin = end


@kernel
def update_part(sae, work, first, x, grads, numbers, part):
    """The same of the features from part[0] to part[1], of the band part[2]."""
    (start, end, band), sparse, off = part, work.sparse[0], work.off[part[0] // TILE]
    l1 = penalty_weight(sae, numbers, x[0])
    if not sparse:
        g = work.g[band], work.g_parts[band]
        dense_gradients(sae, work, g, x, grads, (l1, numbers), (start, end))
    for f in range(start, end):
        n_window = work.n_window[f] if sae.selection == JUMP else 0
        n_first = first.count[f] if sae.refined else 0
        d = work.dead_row[f] if sae.aux else -1
        if d >= 0 and work.aux_count[d] == 0:
            d = -1
        if work.count[f] == 0 and n_window == 0 and n_first == 0 and d < 0:
            rest(sae, f, numbers)
            continue
        i = f - start if not sparse else 0  # one row only stays in L1
        d_bias, d_enc, d_dec = grads.b_enc[i : i + 1], grads.W_enc[i], grads.W_dec[i]
        d_biases = d_bias, grads.threshold[i : i + 1]
        if sparse:
            g = work.g[work.band[f]] if sae.refined else work.g[band]
            row_gradients(sae, work, f, (g, x[0]), grads, (l1, numbers))
            if n_window:
                window_gradients(sae, work, f, g, x[0], grads, (l1, numbers))
        if n_first:
            first_gradients(sae, work, first, f, x[0], grads)
        if d >= 0:
            d_bias[0] += work.aux_bias[d]
            add_(d_enc, work.aux_enc[d])
            add_(d_dec, work.aux_dec[d])
        fired(sae, f, d_biases, d_enc, d_dec, off, numbers)


@kernel
def penalty_weight(sae, numbers, x):
    """l1 of this step, for a mean over samples."""
    return sae.l1[0] * numbers[PLACE.l1_factor] / np.float32(x.shape[0])


@kernel
def row_gradients(sae, work, f, given, grads, weights):
    """Gradients of a feature from its codes, into row 0 of grads; given: g, x."""
    (g, x), (l1, numbers), slopes = given, weights, grads.slope
    where = work.where[f, : work.count[f]]
    for k in range(where.shape[0]):
        slopes[k] = slope(sae, work.codes[f, where[k]], l1, numbers)
    d_enc, d_dec = grads.W_enc[0], grads.W_dec[0]
    fill_(d_enc, F0)
    fill_(d_dec, F0)
    row, inputs = (work.codes[f], where, sae.W_dec[f]), work.x if sae.refined else x
    grads.b_enc[0] = sparse_gradients(row, g, inputs, d_enc, d_dec, slopes)
    grads.threshold[0] = F0


@kernel
def first_gradients(sae, work, first, f, x, grads):
    """Adds to them what goes through its first codes."""
    where, slopes = first.where[f, : first.count[f]], grads.slope
    fill_(slopes, F0)
    row, d_enc, d_dec = (first.codes[f], where, sae.W_dec[f]), grads.W_enc[0], grads.W_dec[0]
    grads.b_enc[0] += sparse_gradients(row, work.back, x, d_enc, d_dec, slopes)


@kernel
def pull(sae, f, delta, l1):
    """What a sample in a threshold's window takes off its gradient; delta: δ before its mask."""
    step = l1 if sae.penalty == L0_STEP else F0
    return (sae.threshold[f] * delta + step) * np.float32(1 / sae.bandwidth)


@kernel
def window_gradients(sae, work, f, g, x, grads, weights):
    """∂threshold of a feature, and what of it goes through the input added to ∂W_enc and ∂b_enc."""
    l1, numbers = weights
    d_enc, total = grads.W_enc[0], F0
    for k in range(work.n_window[f]):
        b = work.window[f, k]
        delta = dot(sae.W_dec[f], g[b]) + slope(sae, work.codes[f, b], l1, numbers)
        pulled, xb = pull(sae, f, delta, l1), x[b]
        total -= pulled
        if sae.through_input:
            grads.b_enc[0] += pulled
            for j in range(d_enc.shape[0]):
                d_enc[j] += pulled * xb[j]
    grads.threshold[0] = total


@kernel
def dense_gradients(sae, work, g, x, grads, weights, part):
    """Gradients of some features, by GEMMs, into grads; g, x: with their parts."""
    (start, end), (l1, numbers), n = part, weights, part[1] - part[0]
    codes, rows = work.codes[start:end], (sae.W_dec[start:end], work.W_dec_parts[start:end])
    delta, delta_parts, pulls = grads.delta[:n], grads.delta_parts[:n], grads.slope
    depends, n_window = sae.penalty == LP or sae.penalty == L0_TANH, 0  # a slope on the code
    same = F0 if depends else slope(sae, F0, l1, numbers)
    gemm(False, True, rows, g, delta)
    for i in range(n):
        d, c, f = delta[i], codes[i], start + i
        for b in range(d.shape[0] if depends else 0):
            if c[b] != F0 or sae.selection == JUMP:  # whose window has codes of 0, too
                d[b] += slope(sae, c[b], l1, numbers)
        grads.threshold[i] = F0
        if sae.selection == JUMP:
            n_window = work.n_window[f]
            for k in range(n_window):
                pulls[k] = pull(sae, f, d[work.window[f, k]] + same, l1)
                grads.threshold[i] -= pulls[k]
        grads.b_enc[i] = masked_sum_(d, c, same)
        for k in range(n_window if sae.through_input else 0):
            d[work.window[f, k]] += pulls[k]
            grads.b_enc[i] += pulls[k]
        split_(d, delta_parts[i], 0)
    gemm(False, False, (codes, work.codes_parts[start:end]), g, grads.W_dec[:n])
    gemm(False, False, (delta, delta_parts), x, grads.W_enc[:n])


@kernel
def finish(sae, work, x, numbers):
    """Adam of b_dec, whose gradient the tiles have left in parts, and of W_skip."""
    if sae.W_skip.shape[0]:
        of_skip = work.target[: x.shape[1]]
        float_gemm(True, False, work.g[0], x, of_skip)
        for i in range(of_skip.shape[0]):
            adam_(sae.W_skip[i], sae.W_skip_m[i], sae.W_skip_v[i], of_skip[i], numbers)
    if sae.b_dec.shape[0]:
        grad, g = work.off[0], work.g[0]
        for t in range(1, work.off.shape[0]):
            add_(grad, work.off[t])
        for b in range(g.shape[0]):
            add_(grad, g[b])
        for b in range(work.back.shape[0]):
            add_(grad, work.back[b])
        adam_(sae.b_dec, sae.b_dec_m, sae.b_dec_v, grad, numbers)


@partial(kernel, entry=True)
def steps(sae, works, grads, data, of_steps, todo, span):
    """Steps on each x of data: xs (n, batch, h), xs_parts (n, batch, parts, h), and ys, what x_hat
    is of: xs but of transcoders; of_steps: (n, numbers), StepNumbers of each.

    works: of the codes, and of the first codes of refined families
    todo: which phases, a sum; span: first and end of the tiles or blocks. One function for threads
    that work alone or share, since code compiled twice may round in two ways.
    """
    (work, first), (xs, xs_parts, ys) = works, data
    for i in range(xs.shape[0]):
        x, numbers, with_parts = xs[i], of_steps[i], (xs[i], xs_parts[i])
        encoded = (work.x, work.x_parts) if sae.refined else with_parts
        for place in range(np.int64(sae.refined), -1, -1):
            now, of = todo >> place * OF_FIRST, works[place]
            if now & ENCODE:
                encode(sae, of, with_parts if place else encoded, span)
            if now & BOUND and sae.selection == TOPK:
                bound(sae, of, sae.k * numbers[K_FACTOR])
            if now & LIST and sae.selection == TOPK:
                list_bounded(sae, of, span)
            if now & CHOOSE:
                of.sparse[0] = choose(sae, of, numbers)
            if place and todo & REFINE:
                refine(sae, work, first, x, span)
        if todo & DECODE:
            decode(sae, work, x, ys[i], span)
        if sae.refined and todo & TILT:
            tilt(sae, work)
        if sae.refined and todo & PULL_BACK:
            pull_back(sae, work, span)
        if todo & AUXILIARY:
            auxiliary(work, encoded, grads, span)
        if todo & UPDATE:
            update(sae, work, first, with_parts, grads, numbers, span)
        if todo & FINISH:
            finish(sae, work, x, numbers)
