"""Kernels from codes to gradients of biases: what stands between the GEMMs of a step.

    spread     codes as a factor of GEMMs (dense steps) or lists of each feature (sparse ones)
    adapt      what follows from counts: l1, silence, who moves
    decode     sums of rows of W_dec (sparse steps), for each band
    residual   r = x_hat − x of each band
    pull       r W_decᵀ where codes are listed (sparse steps)
    slopes     δ, and gradients of biases and thresholds

All gradients are in units of 2 / (batch · h), so that 16 bits can hold them: r and not g, and δ
likewise (formulas: stack.py).
"""

import triton
import triton.language as tl

from sparse_coding.sae import families, spec
from sparse_coding.sae.engines.gpu_gemm.parts import (
    ASLEEP,
    BATCHTOPK,
    JUMP,
    L0_STEP,
    L0_TANH,
    L1,
    LP,
    LP_EPS,
    MOVES,
    RESTS,
    in_window,
    pre_at,
    selected,
)
from sparse_coding.sae.engines.gpu_kernels import DORMANT, LAST

EMA = tl.constexpr(families.EMA)
L0_GAIN, L0_CLAMP = tl.constexpr(spec.L0_GAIN), tl.constexpr(spec.L0_CLAMP)
L1_FACTOR, SEEKS_L0 = tl.constexpr(spec.PLACE.l1_factor), tl.constexpr(spec.PLACE.seeks_l0)
P, P_BEFORE = tl.constexpr(spec.PLACE.p), tl.constexpr(spec.PLACE.p_before)
HINT = tl.constexpr(0.85)  # a batch's smallest code is hardly ever less than this times the last's


@triton.jit
def power(codes, p):
    """(codes + LP_EPS)^p"""
    return tl.exp2(tl.log2(codes + LP_EPS) * p)


@triton.jit
def spread(rows, work, n, S: tl.constexpr):
    """Of a tile of features, for all samples: how many codes are above 0, and either a list of the
    samples of each feature or the codes as a factor."""
    F: tl.constexpr = S.tile_f
    B: tl.constexpr = S.tile_b
    n_tiles = tl.cdiv(n, F)
    s, t = tl.program_id(0) // n_tiles, tl.program_id(0) % n_tiles
    f = t * F + tl.arange(0, F)
    count, n_listed = tl.zeros([F], tl.int32), tl.zeros([F], tl.int32)
    before, after = tl.zeros([F], tl.float32), tl.zeros([F], tl.float32)
    for start in range(0, S.batch, B):
        b = start + tl.arange(0, B)
        mask = (b < S.batch)[:, None] & (f < n)[None, :]
        bs, fs = b[:, None] + 0 * f[None, :], f[None, :] + 0 * b[:, None]
        pre = pre_at(rows, work, n, s, bs, fs, mask, S)
        on = selected(rows, work, n, (s, bs, fs), pre, mask, S)
        count += tl.sum(on.to(tl.int32), 0)
        if S.penalty == LP:
            codes = tl.where(on, pre, 0.0)
            before += tl.sum(tl.where(on, power(codes, tl.load(work.numbers + P_BEFORE)), 0.0), 0)
            after += tl.sum(tl.where(on, power(codes, tl.load(work.numbers + P)), 0.0), 0)
        if S.sparse:
            listed = on
            if S.selection == JUMP:
                listed = on | in_window(rows, n, s, fs, pre, mask, S)
            place = n_listed[None, :] + tl.cumsum(listed.to(tl.int32), 0) - 1
            at = (s * n + fs).to(tl.int64) * S.batch + place
            tl.store(work.by_feature + at, bs, mask=listed)
            n_listed += tl.sum(listed.to(tl.int32), 0)
        else:
            at = (s * S.batch + bs).to(tl.int64) * n + fs
            tl.store(work.codes + at, tl.where(on, pre, 0.0), mask=mask)
    tl.store(work.count + s * n + f, count, mask=f < n)
    if S.sparse:
        tl.store(work.n_of_feature + s * n + f, n_listed, mask=f < n)
    if S.penalty == LP:
        at = (s * n_tiles + t) * 2
        tl.store(work.powers + at, tl.sum(before, 0))
        tl.store(work.powers + at + 1, tl.sum(after, 0))


@triton.jit
def adapt(rows, work, n, S: tl.constexpr):
    """What follows from the counts of a batch, one program for each autoencoder."""
    N: tl.constexpr = S.block_n
    s, n_codes, n_revived = tl.program_id(0), 0, 0
    for start in range(0, n, N):
        f = start + tl.arange(0, N)
        there, at = f < n, s * n + f
        count = tl.load(work.count + at, mask=there, other=0)
        silent = tl.load(rows.silent + at, mask=there, other=0)
        idle = tl.load(rows.idle + at, mask=there, other=0)
        fired, dead = count > 0, silent >= S.dead_steps
        moves = fired
        if S.sparse and S.selection == JUMP:
            moves = tl.load(work.n_of_feature + at, mask=there, other=0) > 0
        if not S.sparse and S.selection == JUMP:
            moves = there  # thresholds may learn from codes that are none
        if S.aux:
            moves = moves | dead
        tl.store(work.dead + at, dead.to(tl.int32), mask=there)
        tl.store(rows.silent + at, tl.where(fired, 0, silent + 1), mask=there)
        tl.store(rows.idle + at, tl.where(moves, 0, idle + 1), mask=there)
        last = tl.where(idle == DORMANT - 1, LAST, 0)
        tl.store(work.missed + at, tl.where(moves, tl.maximum(idle - DORMANT, 0), last), mask=there)
        state = tl.where(moves, MOVES, tl.where(idle < DORMANT, RESTS, ASLEEP))
        tl.store(work.state + at, state, mask=there)
        n_codes += tl.sum(count, 0)
        n_revived += tl.sum((fired & dead).to(tl.int32), 0)
    tl.store(rows.n_codes + s, n_codes)
    tl.store(rows.n_revived + s, tl.load(rows.n_revived + s) + n_revived)
    if S.selection == BATCHTOPK:
        track(rows, work, s, S)
    l1 = tl.load(rows.l1 + s)
    if S.penalty == LP:
        l1 *= change_of_power(work, n, s, S)
    target = tl.load(rows.target_l0 + s)
    if (target > 0) & (tl.load(work.numbers + SEEKS_L0) > 0):
        off = n_codes.to(tl.float32) / S.batch / target
        off = tl.minimum(tl.maximum(off, 1 / L0_CLAMP), L0_CLAMP)
        l1 *= tl.exp2(tl.log2(off) * L0_GAIN)
    tl.store(rows.l1 + s, l1)


@triton.jit
def track(rows, work, s, S: tl.constexpr):
    """Moves the running mean of the smallest code that is selected; the hint for the next batch."""
    least = float("inf")
    for start in range(0, S.batch, 1024):
        b = start + tl.arange(0, 1024)
        of_samples = tl.load(work.least + s * S.batch + b, mask=b < S.batch, other=float("inf"))
        least = tl.minimum(least, tl.min(of_samples, 0))
    if least < float("inf"):
        smallest = tl.load(rows.smallest + s)
        smallest = tl.where(smallest == 0, least, smallest)
        tl.store(rows.smallest + s, smallest + EMA * (least - smallest))
        tl.store(rows.hint + s, least * HINT)


@triton.jit
def change_of_power(work, n, s, S: tl.constexpr):
    """By which l1 keeps the penalty's value where p has changed."""
    n_tiles = tl.cdiv(n, S.tile_f)
    before, after = 0.0, 0.0
    for start in range(0, n_tiles, 128):
        t = start + tl.arange(0, 128)
        at = (s * n_tiles + t) * 2
        before += tl.sum(tl.load(work.powers + at, mask=t < n_tiles, other=0.0), 0)
        after += tl.sum(tl.load(work.powers + at + 1, mask=t < n_tiles, other=0.0), 0)
    changed = tl.load(work.numbers + P) != tl.load(work.numbers + P_BEFORE)
    return tl.where(changed & (after > 0), before / tl.where(after > 0, after, 1.0), 1.0)


@triton.jit
def decode(rows, work, n, S: tl.constexpr):
    """Of a sample and a band, one program: the sum of its codes times rows of W_dec."""
    E: tl.constexpr = S.gather_e
    H: tl.constexpr = S.gather_h
    band, of_sample = tl.program_id(0) % S.n_bands, tl.program_id(0) // S.n_bands
    s, b, n_saes = of_sample // S.batch, of_sample % S.batch, tl.num_programs(0) // S.n_bands
    first = 0
    if band > 0:
        first = tl.load(rows.ends + band - 1)
    end, n_listed = tl.load(rows.ends + band), tl.load(work.n_of_sample + of_sample)
    for start_h in range(0, S.h, H):
        j = start_h + tl.arange(0, H)
        acc = tl.zeros([H], tl.float32)
        for start in range(0, n_listed, E):
            i = start + tl.arange(0, E)
            at = of_sample.to(tl.int64) * n + i
            f = tl.load(work.by_sample + at, mask=i < n_listed, other=0)
            mask = (i < n_listed) & (f >= first) & (f < end)
            pre = pre_at(rows, work, n, s, b, f, mask, S)
            if S.selection == JUMP:  # lists have windows, too
                pre = tl.where(selected(rows, work, n, (s, b, f), pre, mask, S), pre, 0.0)
            at = (s * n + f).to(tl.int64)[:, None] * S.h + j[None, :]
            W = tl.load(rows.W_dec_factor + at, mask=mask[:, None] & (j < S.h)[None, :], other=0.0)
            acc += tl.sum(pre[:, None] * W.to(tl.float32), 0)
        at = (band * n_saes + of_sample).to(tl.int64) * S.h + j
        tl.store(work.sums + at, acc, mask=j < S.h)


@triton.jit
def residual(rows, work, n, S: tl.constexpr):
    """r of a sample, one program, from the sums of its bands."""
    H: tl.constexpr = S.block_h
    BANDS: tl.constexpr = S.n_bands
    of_sample, n_samples, j = tl.program_id(0), tl.num_programs(0), tl.arange(0, S.block_h)
    s, b, mask = of_sample // S.batch, of_sample % S.batch, j < S.h
    r = -tl.load(work.x + b * S.h + j, mask=mask, other=0.0)
    if S.b_dec:
        r += tl.load(rows.b_dec + s * S.h + j, mask=mask, other=0.0)
    for band in tl.static_range(BANDS):
        at = (band * n_samples + of_sample).to(tl.int64) * S.h + j
        r += tl.load(work.sums + at, mask=mask, other=0.0)
        tl.store(work.r + at, r, mask=mask)
    r = tl.zeros([H], tl.float32)
    for back in tl.static_range(BANDS):
        at = ((BANDS - 1 - back) * n_samples + of_sample).to(tl.int64) * S.h + j
        r += tl.load(work.r + at, mask=mask, other=0.0)
        tl.store(work.r + at, r, mask=mask)
        tl.store(work.r_factor + at, r, mask=mask)


@triton.jit
def band_of(rows, f, mask, S: tl.constexpr):
    """In which band features are."""
    BANDS: tl.constexpr = S.n_bands
    band = 0 * f
    for i in tl.static_range(BANDS - 1):
        band += (f >= tl.load(rows.ends + i)).to(tl.int32)
    return tl.where(mask, band, 0)


@triton.jit
def pull(rows, work, n, S: tl.constexpr):
    """r W_decᵀ of the codes that are listed of a sample, one program."""
    E: tl.constexpr = S.gather_e
    H: tl.constexpr = S.gather_h
    of_sample, n_samples = tl.program_id(0), tl.num_programs(0)
    s, n_listed = of_sample // S.batch, tl.load(work.n_of_sample + of_sample)
    for start in range(0, n_listed, E):
        i = start + tl.arange(0, E)
        mask, first = i < n_listed, of_sample.to(tl.int64) * n
        f = tl.load(work.by_sample + first + i, mask=mask, other=0)
        of_band = (band_of(rows, f, mask, S) * n_samples + of_sample).to(tl.int64) * S.h
        acc = tl.zeros([E], tl.float32)
        for start_h in range(0, S.h, H):
            j = start_h + tl.arange(0, H)
            inside = mask[:, None] & (j < S.h)[None, :]
            at = (s * n + f).to(tl.int64)[:, None] * S.h + j[None, :]
            W = tl.load(rows.W_dec_factor + at, mask=inside, other=0.0).to(tl.float32)
            r = tl.load(work.r_factor + of_band[:, None] + j[None, :], mask=inside, other=0.0)
            acc += tl.sum(W * r.to(tl.float32), 1)
        tl.store(work.raw + first + f, acc, mask=mask)


@triton.jit
def weight_of(rows, work, s, S: tl.constexpr):
    """What a code's penalty weighs, in the units of r."""
    return tl.load(rows.l1 + s) * tl.load(work.numbers + L1_FACTOR) * (S.h / 2)


@triton.jit
def with_penalty(work, codes, raw, weight, S: tl.constexpr):
    """δ before its mask."""
    if S.penalty == L1:
        raw += weight
    if S.penalty == LP:
        p = tl.load(work.numbers + P)
        raw += weight * p * power(codes, p - 1)
    if S.penalty == L0_TANH:
        e = tl.exp(-2 * S.slope * codes)
        raw += weight * S.slope * 4 * e / ((1 + e) * (1 + e))  # 1 − tanh²
    return raw


@triton.jit
def delta_of(rows, work, n, place, pre, raw, mask, S: tl.constexpr):
    """(δ, what thresholds are pulled by)"""
    s, _, f = place
    on = selected(rows, work, n, place, pre, mask, S)
    weight = weight_of(rows, work, s, S)
    raw = with_penalty(work, tl.where(on, pre, 0.0), raw, weight, S)
    delta, pulls = tl.where(on, raw, 0.0), 0.0 * raw
    if S.selection == JUMP:
        pulls = raw * tl.load(rows.threshold + s * n + f, mask=mask, other=0.0)
        if S.penalty == L0_STEP:
            pulls += weight
        pulls = tl.where(in_window(rows, n, s, f, pre, mask, S), pulls / S.bandwidth, 0.0)
        if S.through_input:
            delta += pulls
    return delta, pulls


@triton.jit
def slopes(rows, work, n, S: tl.constexpr):
    """δ of a tile of features, one program, and its sums over samples."""
    F: tl.constexpr = S.tile_f
    B: tl.constexpr = S.tile_b
    n_tiles = tl.cdiv(n, F)
    s, f = tl.program_id(0) // n_tiles, tl.program_id(0) % n_tiles * F + tl.arange(0, F)
    bias_grad, threshold_grad = tl.zeros([F], tl.float32), tl.zeros([F], tl.float32)
    end, n_listed = S.batch, tl.zeros([F], tl.int32)
    if S.sparse:
        n_listed = tl.load(work.n_of_feature + s * n + f, mask=f < n, other=0)
        end = tl.max(n_listed, 0)
    for start in range(0, end, B):
        b = (start + tl.arange(0, B))[:, None] + 0 * f[None, :]
        fs = f[None, :] + 0 * b
        if S.sparse:
            mask = b < n_listed[None, :]
            at = (s * n + fs).to(tl.int64) * S.batch + b
            b = tl.load(work.by_feature + at, mask=mask, other=0)
        else:
            mask = (b < S.batch) & (fs < n)
        pre = pre_at(rows, work, n, s, b, fs, mask, S)
        at = (s * S.batch + b).to(tl.int64) * n + fs
        raw = tl.load(work.raw + at, mask=mask, other=0.0)
        delta, pulls = delta_of(rows, work, n, (s, b, fs), pre, raw, mask, S)
        if S.sparse:
            tl.store(work.raw + at, delta, mask=mask)
        else:
            tl.store(work.delta + at, delta, mask=mask)
        bias_grad += tl.sum(delta, 0)
        threshold_grad -= tl.sum(pulls, 0)
    tl.store(work.bias_grad + s * n + f, bias_grad, mask=f < n)
    if S.selection == JUMP:
        tl.store(work.threshold_grad + s * n + f, threshold_grad, mask=f < n)
