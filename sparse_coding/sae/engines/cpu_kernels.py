"""One training step of one autoencoder on the CPU, compiled by numba.

The encoder is a GEMM over all features. Where few codes are above 0, the rest walks these alone,
and Adam the rows of features that had a gradient lately; else it is GEMMs too (formulas: stack.py).
Everything of a step stays in the cache of one core: gradients exist for TILE features at a time.

    encode, bound, list: cpu_codes.py
    choose      sparse or dense, from the share of codes above 0 in this very step; l1 and silence
    decode      g = 2/(batch · h) · (codes W_dec + b_dec − x) of each prefix, summed over those with
                a band of features, for blocks of samples; and of the auxiliary loss
    auxiliary   gradients of dead features, by GEMMs of these alone, for tiles of them
    update      gradients of the rows, Adam, length 1; for tiles of features
    finish      Adam of b_dec

What goes through tiles or blocks takes a span of them, so that several threads may share an
autoencoder: no result depends on how the spans are cut.

**Dormant rows.** After DORMANT steps without firing a row is left alone. Its gradient is 0, so
dense Adam would only decay its moments, which is made up for at once (m β₁^k, v β₂^k) when it fires
again, and would move it by less than float32 can show: a single gradient leaves m̂/√v̂ ≤
(1 − β₁)/√(1 − β₂) = 3.2, a steady one 1; the ratio falls by β₁/√β₂ = 0.9005 a step, so all movement
after 200 steps is below lr · 3.2 · 0.9005^200 / (1 − 0.9005) = 3e-8 lr, that is 3e-11 at an lr of
1e-3, where half a float32 step of an entry of 1/16 is 4e-9.
"""

import numpy as np

from sparse_coding.sae.engines.cpu_codes import (
    BATCHTOPK,
    F0,
    F1,
    JUMP,
    L0_STEP,
    L0_TANH,
    L1,
    LP,
    TILE,
    TOPK,
    bound,
    choose_auxiliary,
    dot,
    encode,
    fill_,
    gemm,
    kernel,
    list_,
    list_bounded,
    note_silence,
    select,
    track_smallest,
)
from sparse_coding.sae.families import AUX, BANDWIDTH, LP_EPS, SLOPE
from sparse_coding.sae.spec import BETAS, DORMANT, L0_CLAMP, L0_GAIN, PLACE

RATE, ROOT, EPS, L1_FACTOR, SEEKS_L0, PROJECT, P, P_BEFORE = PLACE
BETA1, BETA2 = BETAS
BLOCK = 64  # samples decoded at a time where codes are dense
# Phases of a step
ENCODE, BOUND, LIST, CHOOSE, DECODE, AUXILIARY, UPDATE, FINISH = (2**i for i in range(8))
ALL = 2**8 - 1


@kernel
def add_(a, b):
    """a += b."""
    for j in range(a.shape[0]):
        a[j] += b[j]


@kernel
def scale_(a, factor):
    """a *= factor."""
    for j in range(a.shape[0]):
        a[j] *= factor


@kernel
def slope(sae, code, l1, numbers):
    """What the penalty adds to δ of a code."""
    if sae.penalty == L1 or (sae.penalty == LP and numbers[P] == F1):
        return l1
    if sae.penalty == LP:
        return l1 * numbers[P] * (code + np.float32(LP_EPS)) ** (numbers[P] - F1)
    if sae.penalty == L0_TANH:
        steepness = np.float32(SLOPE * sae.W_dec.shape[1] ** 0.5)
        t = np.float32(np.tanh(steepness * code))
        return l1 * steepness * (F1 - t * t)
    return F0


@kernel
def sparse_gradients(row, g, x, d_enc, d_dec, slopes):
    """∂W_enc and ∂W_dec of a feature from the samples it fires on, four at a time; returns ∂b_enc.

    row: its codes (batch,), the samples, its row of W_dec
    slopes: of the penalty, for each of the samples
    """
    codes, where, W = row
    h, n, d_bias = W.shape[0], where.shape[0], F0
    fill_(d_enc, F0)
    fill_(d_dec, F0)
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
def adam_(p, m, v, grad, numbers):
    """A step of Adam for parameters p with moments m and v (Kingma, Ba 2015, arXiv 1412.6980)."""
    rate, root, eps = numbers[RATE], numbers[ROOT], numbers[EPS]
    for j in range(p.shape[0]):
        m[j] = np.float32(BETA1) * m[j] + np.float32(1 - BETA1) * grad[j]
        v[j] = np.float32(BETA2) * v[j] + np.float32(1 - BETA2) * grad[j] * grad[j]
        p[j] -= rate * m[j] / (np.sqrt(v[j]) * root + eps)


@kernel
def adam_without_gradient_(p, m, v, numbers):
    """The same where the gradient is 0."""
    rate, root, eps = numbers[RATE], numbers[ROOT], numbers[EPS]
    for j in range(p.shape[0]):
        m[j] *= np.float32(BETA1)
        v[j] *= np.float32(BETA2)
        p[j] -= rate * m[j] / (np.sqrt(v[j]) * root + eps)


@kernel
def rest(sae, f, numbers):
    """A feature without a gradient: its moments still carry it on, until it is dormant."""
    sae.idle[f] += 1
    if sae.idle[f] > DORMANT:
        return
    s = slice(f, f + 1)
    adam_without_gradient_(sae.b_enc[s], sae.b_enc_m[s], sae.b_enc_v[s], numbers)
    if sae.threshold.shape[0]:
        adam_without_gradient_(sae.threshold[s], sae.threshold_m[s], sae.threshold_v[s], numbers)
        sae.threshold[f] = F0 if sae.threshold[f] < F0 else sae.threshold[f]
    adam_without_gradient_(sae.W_enc[f], sae.W_enc_m[f], sae.W_enc_v[f], numbers)
    if not sae.frozen:
        adam_without_gradient_(sae.W_dec[f], sae.W_dec_m[f], sae.W_dec_v[f], numbers)
        scale_(sae.W_dec[f], F1 / np.sqrt(dot(sae.W_dec[f], sae.W_dec[f])))


@kernel
def catch_up(sae, f):
    """Decays the moments of a feature for the steps that it was left alone."""
    missed = sae.idle[f] - DORMANT
    if missed > 0:
        m, v = np.float32(BETA1**missed), np.float32(BETA2**missed)
        sae.b_enc_m[f] *= m
        sae.b_enc_v[f] *= v
        if sae.threshold.shape[0]:
            sae.threshold_m[f] *= m
            sae.threshold_v[f] *= v
        scale_(sae.W_enc_m[f], m)
        scale_(sae.W_enc_v[f], v)
        scale_(sae.W_dec_m[f], m)
        scale_(sae.W_dec_v[f], v)
    sae.idle[f] = 0


@kernel
def fired(sae, f, d_biases, d_enc, d_dec, off, numbers):
    """Adam of a feature's row, and its part of ∂b_dec into off.

    d_biases: ∂b_enc and ∂threshold, arrays of one number
    """
    catch_up(sae, f)
    d_bias, d_threshold = d_biases
    W_enc, W_dec = sae.W_enc[f], sae.W_dec[f]
    if sae.b_dec.shape[0]:
        for j in range(off.shape[0]):
            off[j] -= d_bias[0] * W_enc[j]
            d_enc[j] -= d_bias[0] * sae.b_dec[j]
    if numbers[PROJECT]:
        along = dot(d_dec, W_dec)
        for j in range(d_dec.shape[0]):
            d_dec[j] -= along * W_dec[j]
    s = slice(f, f + 1)
    adam_(sae.b_enc[s], sae.b_enc_m[s], sae.b_enc_v[s], d_bias, numbers)
    if sae.threshold.shape[0]:
        adam_(sae.threshold[s], sae.threshold_m[s], sae.threshold_v[s], d_threshold, numbers)
        sae.threshold[f] = F0 if sae.threshold[f] < F0 else sae.threshold[f]
    adam_(W_enc, sae.W_enc_m[f], sae.W_enc_v[f], d_enc, numbers)
    if not sae.frozen:
        adam_(W_dec, sae.W_dec_m[f], sae.W_dec_v[f], d_dec, numbers)
        scale_(W_dec, F1 / np.sqrt(dot(W_dec, W_dec)))


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
    if numbers[SEEKS_L0] and sae.target_l0[0] > 0:
        off = np.float32(total / work.codes.shape[1]) / sae.target_l0[0]
        off = min(max(off, np.float32(1 / L0_CLAMP)), np.float32(L0_CLAMP))
        sae.l1[0] *= off ** np.float32(L0_GAIN)


@kernel
def choose(sae, work, numbers):
    """Whether this step is sparse: then codes are sorted by sample."""
    batch, total = work.codes.shape[1], np.int64(0)
    work.n_dead[0] = 0
    if sae.selection == TOPK or sae.selection == BATCHTOPK:
        select(sae, work)
    if sae.selection == BATCHTOPK:
        track_smallest(sae, work)
    if sae.aux:
        choose_auxiliary(sae, work)
    for f in range(work.count.shape[0]):
        total += work.count[f]
    note_silence(sae, work)
    adapt_l1(sae, work, numbers, total)
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
    """g of each band and g_aux, for a span of blocks."""
    batch, h = x.shape
    sparse, n_bands, scale = work.sparse[0], sae.bands.shape[0], np.float32(2.0 / (batch * h))
    for t in range(span[0] * BLOCK, min(span[1] * BLOCK, batch), BLOCK):
        e, first = min(t + BLOCK, batch), 0
        for band in range(0 if sparse else n_bands):
            end = sae.bands[band]
            codes, W_dec = work.codes[first:end, t:e], sae.W_dec[first:end]
            gemm(True, False, codes, W_dec, work.g[band, t:e])
            first = end
        for b in range(t, e):
            xb, p = x[b], work.start[b]
            for band in range(n_bands):  # x_hat of each prefix
                g = work.g[band, b]
                if sparse:
                    ends = work.start[b + 1], sae.bands[band]
                    p = sum_rows_(g, sae.W_dec, work.feature, work.value, p, ends)
                if band:
                    add_(g, work.g[band - 1, b])
                    continue
                for j in range(h):
                    g[j] -= xb[j]
                if sae.b_dec.shape[0]:
                    add_(g, sae.b_dec)
            for band in range(n_bands):
                scale_(work.g[band, b], scale)
            for band in range(n_bands - 2, -1, -1):
                add_(work.g[band, b], work.g[band + 1, b])
        if work.n_dead[0]:
            decode_dead(work, n_bands, (t, e), scale)


@kernel
def decode_dead(work, n_bands, span, scale):
    """g_aux of a block of samples: what the dead leave of −e = g · batch · h/2."""
    (t, e), n, g, g_aux = span, work.n_dead[0], work.g[n_bands - 1], work.g_aux
    gemm(True, False, work.aux[:n, t:e], work.aux_dec[:n], g_aux[t:e])
    for b in range(t, e):
        for j in range(g.shape[1]):
            g_aux[b, j] = np.float32(AUX) * (g_aux[b, j] * scale + g[b, j])


@kernel
def sum_rows_(out, W, feature, value, p, ends):
    """out = Σ value · rows of W for the features of a sample from place p on, four at a time, as
    far as they are of a band; returns where that is. ends: of the sample, and of the band."""
    end = ends[0]
    if ends[1] < W.shape[0]:
        end = p
        while end < ends[0] and feature[end] < ends[1]:
            end += 1
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
    return end


@kernel
def auxiliary(work, x, grads, span):
    """Gradients of the auxiliary loss, for a span of tiles of dead features."""
    n_dead = work.n_dead[0]
    for t in range(span[0] * TILE, min(span[1] * TILE, n_dead), TILE):
        e = min(t + TILE, n_dead)
        codes, rows, delta = work.aux[t:e], work.aux_dec[t:e], grads.delta[: e - t]
        gemm(False, True, rows, work.g_aux, delta)
        for i in range(e - t):
            work.aux_bias[t + i] = masked_sum_(delta[i], codes[i], F0)
        gemm(False, False, codes, work.g_aux, rows)
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
def update(sae, work, x, grads, numbers, span):
    """Gradients and Adam of a span of tiles, whose parts in different bands have different g."""
    n_dict = sae.b_enc.shape[0]
    for tile in range(span[0], min(span[1], work.off.shape[0])):
        t, e, first = tile * TILE, min(tile * TILE + TILE, n_dict), 0
        fill_(work.off[tile], F0)
        for level in range(sae.bands.shape[0]):
            part = max(t, first), min(e, sae.bands[level])
            if part[0] < part[1]:
                update_part(sae, work, work.g[level], x, grads, numbers, part)
            first = sae.bands[level]


@kernel
def update_part(sae, work, g, x, grads, numbers, part):
    """The same of some features that have this g."""
    sparse, off = work.sparse[0], work.off[part[0] // TILE]
    l1 = sae.l1[0] * numbers[L1_FACTOR] / np.float32(x.shape[0])
    if not sparse:
        dense_gradients(sae, work, g, x, grads, (l1, numbers), part)
    for f in range(part[0], part[1]):
        n_window = work.n_window[f] if sae.selection == JUMP else 0
        d = work.dead_row[f] if sae.aux else -1
        if d >= 0 and work.aux_count[d] == 0:
            d = -1
        if work.count[f] == 0 and n_window == 0 and d < 0:
            rest(sae, f, numbers)
            continue
        i = f - part[0] if not sparse else 0  # one row only stays in L1
        d_bias, d_enc, d_dec = grads.b_enc[i : i + 1], grads.W_enc[i], grads.W_dec[i]
        d_biases = d_bias, grads.threshold[i : i + 1]
        if sparse:
            where = work.where[f, : work.count[f]]
            slopes = grads.slope
            for k in range(where.shape[0]):
                slopes[k] = slope(sae, work.codes[f, where[k]], l1, numbers)
            row = work.codes[f], where, sae.W_dec[f]
            d_bias[0] = sparse_gradients(row, g, x, d_enc, d_dec, slopes)
            grads.threshold[0] = F0
            if n_window:
                window_gradients(sae, work, f, g, x, grads, (l1, numbers))
        if d >= 0:
            d_bias[0] += work.aux_bias[d]
            add_(d_enc, work.aux_enc[d])
            add_(d_dec, work.aux_dec[d])
        fired(sae, f, d_biases, d_enc, d_dec, off, numbers)


@kernel
def pull(sae, f, delta, l1):
    """What a sample in a threshold's window takes off its gradient; delta: δ before its mask."""
    step = l1 if sae.penalty == L0_STEP else F0
    return (sae.threshold[f] * delta + step) * np.float32(1 / BANDWIDTH)


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
    """Gradients of some features, by GEMMs, into grads."""
    n, codes, W_dec = part[1] - part[0], work.codes[part[0] : part[1]], sae.W_dec[part[0] : part[1]]
    delta, pulls, (l1, numbers) = grads.delta[:n], grads.slope, weights
    depends, n_window = sae.penalty == LP or sae.penalty == L0_TANH, 0  # a slope on the code
    same = F0 if depends else slope(sae, F0, l1, numbers)
    gemm(False, True, W_dec, g, delta)
    for i in range(n):
        d, c, f = delta[i], codes[i], part[0] + i
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
    gemm(False, False, codes, g, grads.W_dec[:n])
    gemm(False, False, delta, x, grads.W_enc[:n])


@kernel
def finish(sae, work, numbers):
    """Adam of b_dec, whose gradient the tiles have left in parts."""
    if sae.b_dec.shape[0]:
        grad, g = work.off[0], work.g[0]
        for t in range(1, work.off.shape[0]):
            add_(grad, work.off[t])
        for b in range(g.shape[0]):
            add_(grad, g[b])
        adam_(sae.b_dec, sae.b_dec_m, sae.b_dec_v, grad, numbers)


@kernel
def steps(sae, work, grads, xs, of_steps, todo, span):
    """Steps on each x of xs (n, batch, h); of_steps: (n, numbers), StepNumbers of each.

    todo: which phases, a sum; span: first and end of the tiles or blocks. One function for threads
    that work alone or share, since code compiled twice may round in two ways.
    """
    for i in range(xs.shape[0]):
        x, numbers = xs[i], of_steps[i]
        if todo & ENCODE:
            encode(sae, work, x, span)
        if todo & BOUND and sae.selection == TOPK:
            bound(sae, work)
        if todo & LIST and sae.selection == TOPK:
            list_bounded(sae, work, span)
        if todo & CHOOSE:
            work.sparse[0] = choose(sae, work, numbers)
        if todo & DECODE:
            decode(sae, work, x, span)
        if todo & AUXILIARY:
            auxiliary(work, x, grads, span)
        if todo & UPDATE:
            update(sae, work, x, grads, numbers, span)
        if todo & FINISH:
            finish(sae, work, numbers)
