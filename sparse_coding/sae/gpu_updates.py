"""Triton kernels of a training step on a GPU: from g to new parameters.

What they are, and what they share with the others: gpu_kernels.py. They take features by the lists
that `choose` made, so rows that have not fired for long are left alone, by the rule of
row_kernels.py; a tile of which nothing moves ends at once.
"""

import math

import triton
import triton.language as tl

from sparse_coding.sae import spec
from sparse_coding.sae.gpu_kernels import block, codes_of, matmul

BETA1, BETA2 = (tl.constexpr(beta) for beta in spec.BETAS)
LOG2_BETA1, LOG2_BETA2 = (tl.constexpr(math.log2(beta)) for beta in spec.BETAS)
RATE, ROOT, EPS, L1_FACTOR = (tl.constexpr(i) for i in range(4))  # places in cpu_engine.paces


@triton.jit
def listed(work, t, S: tl.constexpr):
    """Of a tile of lists: autoencoder, rows, which of them fired, which move."""
    s, start = tl.load(work.list_tiles + 2 * t), tl.load(work.list_tiles + 2 * t + 1)
    first, end = tl.load(work.saes + 3 * s), tl.load(work.saes + 3 * s + 1)
    slot = first + start + tl.arange(0, S.list_f)
    fired = slot < first + tl.load(work.n_fired + s)
    moves = fired | ((slot >= end - tl.load(work.n_resting + s)) & (slot < end))
    row = first + tl.load(work.feature + slot, mask=moves, other=0).to(tl.int64)
    return s, row, fired, moves


@triton.jit
def any_of(mask):
    return tl.max(mask.to(tl.int32), 0) > 0


@triton.jit
def adam(p, m, v, at, mask, grad, missed, pace):
    """Parameters after a step of Adam, not stored; their moments are, after what they missed."""
    decay_m, decay_v = tl.exp2(missed * LOG2_BETA1), tl.exp2(missed * LOG2_BETA2)
    m_new = tl.load(m + at, mask=mask, other=0.0) * decay_m * BETA1 + grad * (1 - BETA1)
    v_new = tl.load(v + at, mask=mask, other=0.0) * decay_v * BETA2 + grad * grad * (1 - BETA2)
    tl.store(m + at, m_new, mask=mask)
    tl.store(v + at, v_new, mask=mask)
    root = tl.sqrt(v_new) * tl.load(pace + ROOT) + tl.load(pace + EPS)
    return tl.load(p + at, mask=mask, other=0.0) - tl.load(pace + RATE) * m_new / root


@triton.jit
def backward(rows, work, S: tl.constexpr):
    F: tl.constexpr = S.list_f
    B: tl.constexpr = S.backward_b
    K: tl.constexpr = S.backward_k
    s, row, fired, moves = listed(work, tl.program_id(0), S)
    if any_of(moves):
        g = work.g + s.to(tl.int64) * S.batch * S.h
        l1 = tl.load(rows.l1 + s) * tl.load(work.pace + L1_FACTOR) / S.batch
        bias_grad, along = tl.zeros([F], tl.float32), tl.zeros([F], tl.float32)
        for start in range(0, tl.where(any_of(fired), S.batch, 0), B):
            b = start + tl.arange(0, B)
            acc = tl.zeros([F, B], tl.float32)
            for start_k in range(0, S.h, K):
                k = start_k + tl.arange(0, K)
                W = block(rows.W_dec, row, k, S.h, fired)
                acc = matmul(W, tl.trans(block(g, b, k, S.h, b < S.batch)), acc, S.dot)
            codes = codes_of(work, row, start, B, fired, S)
            delta = tl.where(codes != 0, acc + l1, 0.0)
            inside = fired[:, None] & (b < S.batch)[None, :]
            tl.store(work.delta + row[:, None] * S.batch + b[None, :], delta, mask=inside)
            bias_grad += tl.sum(delta, 1)
            along += tl.sum(codes * acc, 1)  # Σ over h of ∂W_dec W_dec
        tl.store(work.bias_grad + row, bias_grad, mask=fired)
        tl.store(work.along + row, along, mask=fired)
        missed = tl.load(work.missed + row, mask=moves, other=0).to(tl.float32)
        b_enc = adam(
            rows.b_enc, rows.b_enc_m, rows.b_enc_v, row, moves, bias_grad, missed, work.pace
        )
        tl.store(rows.b_enc + row, b_enc, mask=moves)


@triton.jit
def update_encoder(rows, work, S: tl.constexpr):
    F: tl.constexpr = S.list_f
    H: tl.constexpr = S.update_h
    chunks: tl.constexpr = (S.h + H - 1) // H
    t, j = tl.program_id(0) // chunks, tl.program_id(0) % chunks * H + tl.arange(0, H)
    s, row, fired, moves = listed(work, t, S)
    if any_of(moves):
        grad = tl.zeros([F, H], tl.float32)
        for start in range(0, tl.where(any_of(fired), S.batch, 0), S.update_k):
            b = start + tl.arange(0, S.update_k)
            delta = block(work.delta, row, b, S.batch, fired)
            grad = matmul(delta, block(work.x, b, j, S.h, b < S.batch), grad, S.dot)
        if S.b_dec:
            bias_grad = tl.load(work.bias_grad + row, mask=fired, other=0.0)
            through = bias_grad[:, None] * block(rows.W_enc, row, j, S.h, fired)
            tl.store(work.off + t * S.h + j, tl.sum(through, 0), mask=j < S.h)
            b_dec = tl.load(rows.b_dec + s * S.h + j, mask=j < S.h, other=0.0)
            grad -= bias_grad[:, None] * b_dec[None, :]
        at, mask = row[:, None] * S.h + j[None, :], moves[:, None] & (j < S.h)[None, :]
        missed = tl.load(work.missed + row, mask=moves, other=0).to(tl.float32)[:, None]
        W = adam(rows.W_enc, rows.W_enc_m, rows.W_enc_v, at, mask, grad, missed, work.pace)
        tl.store(rows.W_enc + at, W, mask=mask)


@triton.jit
def update_decoder(rows, work, S: tl.constexpr):
    F: tl.constexpr = S.list_f
    H: tl.constexpr = S.update_h
    chunks: tl.constexpr = (S.h + H - 1) // H
    chunk = tl.program_id(0) % chunks
    s, row, fired, moves = listed(work, tl.program_id(0) // chunks, S)
    if any_of(moves):
        j = chunk * H + tl.arange(0, H)
        g = work.g + s.to(tl.int64) * S.batch * S.h
        grad = tl.zeros([F, H], tl.float32)
        for start in range(0, tl.where(any_of(fired), S.batch, 0), S.update_k):
            b = start + tl.arange(0, S.update_k)
            codes = codes_of(work, row, start, S.update_k, fired, S)
            grad = matmul(codes, block(g, b, j, S.h, b < S.batch), grad, S.dot)
        if S.project:
            along = tl.load(work.along + row, mask=fired, other=0.0)
            grad -= along[:, None] * block(rows.W_dec, row, j, S.h, fired)
        at, mask = row[:, None] * S.h + j[None, :], moves[:, None] & (j < S.h)[None, :]
        missed = tl.load(work.missed + row, mask=moves, other=0).to(tl.float32)[:, None]
        W = adam(rows.W_dec, rows.W_dec_m, rows.W_dec_v, at, mask, grad, missed, work.pace)
        norm = tl.where(moves, tl.sum(W * W, 1), 1.0)
        if chunks == 1:
            W /= tl.sqrt(norm)[:, None]
        else:
            tl.store(work.norm + row * chunks + chunk, norm, mask=moves)
        tl.store(rows.W_dec + at, W, mask=mask)


@triton.jit
def normalise(rows, work, S: tl.constexpr):
    F: tl.constexpr = S.list_f
    H: tl.constexpr = S.update_h
    chunks: tl.constexpr = (S.h + H - 1) // H
    t, j = tl.program_id(0) // chunks, tl.program_id(0) % chunks * H + tl.arange(0, H)
    _, row, _, moves = listed(work, t, S)
    if any_of(moves):
        norm = tl.zeros([F], tl.float32)
        for chunk in range(chunks):
            norm += tl.load(work.norm + row * chunks + chunk, mask=moves, other=1.0)
        W = block(rows.W_dec, row, j, S.h, moves) / tl.sqrt(norm)[:, None]
        mask = moves[:, None] & (j < S.h)[None, :]
        tl.store(rows.W_dec + row[:, None] * S.h + j[None, :], W, mask=mask)


@triton.jit
def update_b_dec(rows, work, S: tl.constexpr):
    H: tl.constexpr = S.update_h
    chunks: tl.constexpr = (S.h + H - 1) // H
    s, j = tl.program_id(0) // chunks, tl.program_id(0) % chunks * H + tl.arange(0, H)
    grad = tl.zeros([16, H], tl.float32)
    for start in range(0, S.batch, 16):
        b = start + tl.arange(0, 16)
        grad += block(work.g + s.to(tl.int64) * S.batch * S.h, b, j, S.h, b < S.batch)
    first, tiles = tl.load(work.saes + 3 * s + 2), tl.cdiv(tl.load(work.n_fired + s), S.list_f)
    for start in range(first, first + tiles, 16):
        t = start + tl.arange(0, 16)
        grad -= block(work.off, t, j, S.h, t < first + tiles)
    at, mask = s * S.h + j, j < S.h
    b_dec = adam(rows.b_dec, rows.b_dec_m, rows.b_dec_v, at, mask, tl.sum(grad, 0), 0.0, work.pace)
    tl.store(rows.b_dec + at, b_dec, mask=mask)
