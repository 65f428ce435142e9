"""Kernels that move parameters: Adam of a feature's rows, from gradients that are given (dense
steps) or summed on the spot (sparse ones), so that no gradient reaches memory there."""

import triton
import triton.language as tl

from sparse_coding.sae.engines.gpu_gemm.codes import band_of
from sparse_coding.sae.engines.gpu_gemm.parts import ASLEEP, JUMP, pre_at, selected
from sparse_coding.sae.engines.gpu_kernels import adam


@triton.jit
def gathered(rows, work, n, s, f, S: tl.constexpr):
    """Gradients of a feature's rows of W_enc and W_dec, from the samples that it is listed of."""
    H: tl.constexpr = S.block_h
    E: tl.constexpr = S.row_e
    j = tl.arange(0, S.block_h)
    grad_enc = tl.zeros([H], tl.float32)
    grad_dec = tl.zeros([H], tl.float32)
    n_listed = tl.load(work.n_of_feature + s * n + f)
    n_samples = tl.num_programs(0) // n * S.batch
    of_band = band_of(rows, f, True, S) * n_samples + s * S.batch
    for start in range(0, n_listed, E):
        i = start + tl.arange(0, E)
        mask = i < n_listed
        b = tl.load(work.by_feature + (s * n + f).to(tl.int64) * S.batch + i, mask=mask, other=0)
        fs = f + 0 * b
        pre = pre_at(rows, work, n, s, b, fs, mask, S)
        if S.selection == JUMP:
            pre = tl.where(selected(rows, work, n, (s, b, fs), pre, mask, S), pre, 0.0)
        at = (s * S.batch + b).to(tl.int64)
        delta = tl.load(work.raw + at * n + f, mask=mask, other=0.0)
        inside = mask[:, None] & (j < S.h)[None, :]
        x = tl.load(work.centred + at[:, None] * S.h + j[None, :], mask=inside, other=0.0)
        at = (of_band + b).to(tl.int64)
        r = tl.load(work.r_factor + at[:, None] * S.h + j[None, :], mask=inside, other=0.0)
        grad_enc += tl.sum(delta[:, None] * x.to(tl.float32), 0)
        grad_dec += tl.sum(pre[:, None] * r.to(tl.float32), 0)
    return grad_enc, grad_dec


@triton.jit
def move_biases(rows, work, at, missed, S: tl.constexpr):
    """Adam of a feature's b_enc and threshold."""
    unit: tl.constexpr = 2.0 / (S.batch * S.h)
    grad = tl.load(work.bias_grad + at) * unit
    b_enc = adam(rows.b_enc, rows.b_enc_m, rows.b_enc_v, at, at >= 0, grad, missed, work.numbers)
    tl.store(rows.b_enc + at, b_enc)
    if S.selection == JUMP:
        grad = tl.load(work.threshold_grad + at) * unit
        m, v = rows.threshold_m, rows.threshold_v
        threshold = adam(rows.threshold, m, v, at, at >= 0, grad, missed, work.numbers)
        tl.store(rows.threshold + at, tl.maximum(threshold, 0.0))


@triton.jit
def update(rows, work, n, S: tl.constexpr):
    """Adam of a feature, one program: rows of W_enc and W_dec, b_enc, threshold."""
    unit: tl.constexpr = 2.0 / (S.batch * S.h)
    of_feature, j = tl.program_id(0), tl.arange(0, S.block_h)
    if tl.load(work.state + of_feature) != ASLEEP:
        at, mask = of_feature.to(tl.int64) * S.h + j, j < S.h
        if S.sparse:
            s, f = of_feature // n, of_feature % n
            grad_enc, grad_dec = gathered(rows, work, n, s, f, S)
        else:
            grad_enc = tl.load(work.W_enc_grad + at, mask=mask, other=0.0)
            grad_dec = tl.load(work.W_dec_grad + at, mask=mask, other=0.0)
        if S.aux:
            slot = tl.load(work.aux_slot + of_feature)
            near, added = slot.to(tl.int64) * S.h + j, mask & (slot >= 0)
            grad_enc += tl.load(work.aux_enc + near, mask=added, other=0.0)
            grad_dec += tl.load(work.aux_dec + near, mask=added, other=0.0)
        missed = tl.load(work.missed + of_feature).to(tl.float32)
        W_dec = tl.load(rows.W_dec + at, mask=mask, other=0.0)
        if S.project:
            grad_dec -= tl.sum(grad_dec * W_dec, 0) * W_dec
        m, v = rows.W_enc_m, rows.W_enc_v
        W = adam(rows.W_enc, m, v, at, mask, grad_enc * unit, missed, work.numbers)
        tl.store(rows.W_enc + at, W, mask=mask)
        if S.half:
            tl.store(rows.W_enc_factor + at, W, mask=mask)
        if not S.frozen:
            m, v = rows.W_dec_m, rows.W_dec_v
            W = adam(rows.W_dec, m, v, at, mask, grad_dec * unit, missed, work.numbers)
            if S.unit_rows:
                W /= tl.sqrt(tl.sum(tl.where(mask, W * W, 0.0), 0))
            tl.store(rows.W_dec + at, W, mask=mask)
            if S.half:
                tl.store(rows.W_dec_factor + at, W, mask=mask)
        move_biases(rows, work, of_feature, missed, S)


@triton.jit
def update_b_dec(rows, work, n, S: tl.constexpr):
    """Adam of b_dec, one program for each autoencoder."""
    unit: tl.constexpr = 2.0 / (S.batch * S.h)
    j = tl.arange(0, S.block_h)
    at, mask = tl.program_id(0) * S.h + j, j < S.h
    grad = tl.load(work.b_dec_grad + at, mask=mask, other=0.0) * unit
    b_dec = adam(rows.b_dec, rows.b_dec_m, rows.b_dec_v, at, mask, grad, 0.0, work.numbers)
    tl.store(rows.b_dec + at, b_dec, mask=mask)
