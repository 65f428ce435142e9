"""Triton kernels of a training step on a GPU.

A step takes all autoencoders of an ensemble at once: their features are the rows of one matrix. The
encoder's GEMM takes all rows, everything else only those of features that fired on this batch,
gathered by lists (formulas: stack.py).

    encode          codes = ReLU(x W_encᵀ + b_enc), and on how many samples each feature fires
    choose          lists of features: who fired, who still moves; moves l1 where l0 is sought
    decode          r = codes W_dec + b_dec − x
    backward        δ = (r W_decᵀ + l1 · h/2) ∘ [codes > 0]; Adam of b_enc
    update_encoder  gradient of a tile of W_enc and its Adam at once: no gradient reaches memory
    update_decoder  the same for W_dec, and length 1 where a tile holds whole rows
    normalise       length 1, where it does not
    update_b_dec    Adam of b_dec

r and δ are in units of 2 / (batch · h), which 16 bits can hold. Every sum has a fixed order, there
are no atomics: the same GPU gives the same bits.

The kernels after `choose` take features by its lists, so rows that have not fired for long are left
alone, by the rule of cpu_kernels.py; a tile of which nothing moves ends at once.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from sparse_coding.sae import spec

DORMANT, REMAINING = tl.constexpr(spec.DORMANT), tl.constexpr(spec.REMAINING)
LAST = tl.constexpr(-1)  # a row makes all moves left without a gradient (cpu_adam.py)
L0_GAIN, L0_CLAMP = tl.constexpr(spec.L0_GAIN), tl.constexpr(spec.L0_CLAMP)
RATE, ROOT, EPS, L1_FACTOR, SEEKS_L0 = map(tl.constexpr, spec.PLACE[:5])


class Rows(NamedTuple):
    """Parameters with Adam's moments (_m, _v) of all autoencoders, one after the other."""

    W_enc: Tensor  # (n_rows, h)
    W_enc_m: Tensor
    W_enc_v: Tensor
    W_dec: Tensor  # (n_rows, h)
    W_dec_m: Tensor
    W_dec_v: Tensor
    b_enc: Tensor  # (n_rows,)
    b_enc_m: Tensor
    b_enc_v: Tensor
    b_dec: Tensor  # (n_saes, h); unused where it is fixed at 0
    b_dec_m: Tensor
    b_dec_v: Tensor
    idle: Tensor  # (n_rows,) int32: steps that a feature's moments are without a gradient
    silent: Tensor  # (n_rows,) int32: steps since it fired, or since the start
    n_revived: Tensor  # (n_saes,) int64: how often one that was dead fired
    dead_steps: Tensor  # (1,) int32: without firing, after which it counts as dead
    l1: Tensor  # (n_saes,)
    target_l0: Tensor  # (n_saes,), 0 where l1 stays


class Work(NamedTuple):
    """Input and scratch of a step.

    feature: of an autoencoder n_dict slots: features that fired from the front, ascending; from the
        back those at rest, whose moments still move them; what is between is left alone
    """

    x: Tensor  # (batch, h)
    numbers: Tensor  # StepNumbers
    saes: Tensor  # (n_saes, 3) int32: first row, end of rows, first tile of lists
    encode_tiles: Tensor  # (tiles, 2) int32: autoencoder, first feature
    list_tiles: Tensor  # (tiles, 2) int32: autoencoder, first slot
    codes: Tensor  # (n_rows, batch), written only where count is above 0
    count: Tensor  # (n_rows, blocks) int32: codes that are not 0 in a block of encode_b samples
    feature: Tensor  # (n_rows,) int32
    missed: Tensor  # (n_rows,) int32: steps of decay that v of a row is behind, or LAST
    n_fired: Tensor  # (n_saes,) int32
    n_resting: Tensor  # (n_saes,) int32
    r: Tensor  # (n_saes, batch, h)
    delta: Tensor  # (n_rows, batch), of features that fired
    bias_grad: Tensor  # (n_rows,): ∂b_enc of features that fired
    along: Tensor  # (n_rows,): length of ∂W_dec along the row
    off: Tensor  # (list tiles, h): Σ over a tile of ∂b_enc W_enc
    norm: Tensor  # (n_rows, chunks of h): squared length


class Shape(NamedTuple):
    """What the kernels are compiled for: sizes, flags, and tiles of features (f), samples (b),
    dimensions (h) and along the sum of a GEMM (k). Tiles of samples divide encode_b."""

    h: int
    batch: int
    b_dec: bool  # whether it is trained
    project: bool
    # precision of factors in GEMMs: ieee, tf32, tf32x3, bf16, fp16. Triton before 3.7 takes it as
    # an argument only from a constant of the kernel's own
    dot: str
    encode_f: int = 128
    encode_b: int = 128
    encode_k: int = 32
    choose_f: int = 4096
    list_f: int = 32
    decode_b: int = 64
    decode_h: int = 128
    decode_k: int = 32
    backward_b: int = 64
    backward_k: int = 32
    update_h: int = 256
    update_k: int = 32


@triton.jit
def matmul(a, b, acc, DOT: tl.constexpr):
    """acc + a b, with factors in the precision DOT."""
    if DOT == "bf16":
        acc = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    elif DOT == "fp16":
        acc = tl.dot(a.to(tl.float16), b.to(tl.float16), acc)
    else:
        acc = tl.dot(a, b, acc, input_precision=DOT)
    return acc


@triton.jit
def block(pointer, i, j, n: tl.constexpr, mask):
    """Rows i and columns j of a matrix (?, n); 0 beyond n and in rows that mask leaves out."""
    inside = mask[:, None] & (j < n)[None, :]
    return tl.load(pointer + i[:, None] * n + j[None, :], mask=inside, other=0.0)


@triton.jit
def encode(rows, work, S: tl.constexpr):
    """Codes of a tile of features (encode_f) for a block of samples (encode_b); their counts."""
    F: tl.constexpr = S.encode_f
    B: tl.constexpr = S.encode_b
    K: tl.constexpr = S.encode_k
    D: tl.constexpr = S.dot
    blocks: tl.constexpr = (S.batch + B - 1) // B
    t, of_b = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    s, start = tl.load(work.encode_tiles + 2 * t), tl.load(work.encode_tiles + 2 * t + 1)
    row = tl.load(work.saes + 3 * s) + start + tl.arange(0, F)
    there = row < tl.load(work.saes + 3 * s + 1)
    row, b = row.to(tl.int64), of_b * B + tl.arange(0, B)
    acc = tl.zeros([F, B], tl.float32)
    shift = tl.zeros([F, K], tl.float32)
    for start_k in range(0, S.h, K):
        k = start_k + tl.arange(0, K)
        W = block(rows.W_enc, row, k, S.h, there)
        acc = matmul(W, tl.trans(block(work.x, b, k, S.h, b < S.batch)), acc, D)
        if S.b_dec:
            shift += W * tl.load(rows.b_dec + s * S.h + k, mask=k < S.h, other=0.0)[None, :]
    bias = tl.load(rows.b_enc + row, mask=there, other=0.0)
    if S.b_dec:
        bias -= tl.sum(shift, 1)
    codes = acc + bias[:, None]
    inside = there[:, None] & (b < S.batch)[None, :]
    # NaN stays, but not where there is no feature or sample
    codes = tl.where((codes <= 0) | ~inside, 0.0, codes)
    count = tl.sum((codes != 0).to(tl.int32), 1)
    tl.store(work.count + row * blocks + of_b, count, mask=there)
    written = inside & (count > 0)[:, None]
    tl.store(work.codes + row[:, None] * S.batch + b[None, :], codes, mask=written)


@triton.jit
def choose(rows, work, S: tl.constexpr):
    """An autoencoder's lists of features, one program each; moves l1 where an l0 is sought."""
    F: tl.constexpr = S.choose_f
    blocks: tl.constexpr = (S.batch + S.encode_b - 1) // S.encode_b
    s = tl.num_programs(0) - 1 - tl.program_id(0)  # the largest first
    first, end = tl.load(work.saes + 3 * s), tl.load(work.saes + 3 * s + 1)
    n_fired, n_resting, n_codes, n_revived = 0, 0, 0, 0
    dead_steps = tl.load(rows.dead_steps)
    for start in range(first, end, F):
        row = start + tl.arange(0, F)
        there = row < end
        count = tl.zeros([F], tl.int32)
        for i in range(blocks):
            count += tl.load(work.count + row.to(tl.int64) * blocks + i, mask=there, other=0)
        idle = tl.load(rows.idle + row, mask=there, other=0)
        fired = count > 0
        resting = there & (count == 0) & (idle < DORMANT)
        tl.store(rows.idle + row, tl.where(fired, 0, idle + 1), mask=there)
        silent = tl.load(rows.silent + row, mask=there, other=0)
        tl.store(rows.silent + row, tl.where(fired, 0, silent + 1), mask=there)
        n_revived += tl.sum((fired & (silent >= dead_steps)).to(tl.int32), 0)
        tl.store(work.missed + row, tl.maximum(idle - DORMANT, 0), mask=fired)
        tl.store(work.missed + row, tl.where(idle == DORMANT - 1, LAST, 0), mask=resting)
        front = first + n_fired + tl.cumsum(fired.to(tl.int32), 0) - 1
        back = end - n_resting - tl.cumsum(resting.to(tl.int32), 0)
        tl.store(work.feature + front, row - first, mask=fired)
        tl.store(work.feature + back, row - first, mask=resting)
        n_fired += tl.sum(fired.to(tl.int32), 0)
        n_resting += tl.sum(resting.to(tl.int32), 0)
        n_codes += tl.sum(count, 0)
    tl.store(work.n_fired + s, n_fired)
    tl.store(work.n_resting + s, n_resting)
    tl.store(rows.n_revived + s, tl.load(rows.n_revived + s) + n_revived)
    target = tl.load(rows.target_l0 + s)
    if (target > 0) & (tl.load(work.numbers + SEEKS_L0) > 0):
        off = n_codes.to(tl.float32) / S.batch / target
        off = tl.minimum(tl.maximum(off, 1 / L0_CLAMP), L0_CLAMP)
        tl.store(rows.l1 + s, tl.load(rows.l1 + s) * tl.exp2(tl.log2(off) * L0_GAIN))


@triton.jit
def codes_of(work, row, start, B: tl.constexpr, fired, S: tl.constexpr):
    """Codes of rows that fired, for B samples from start on."""
    blocks: tl.constexpr = (S.batch + S.encode_b - 1) // S.encode_b
    count = tl.load(work.count + row * blocks + start // S.encode_b, mask=fired, other=0)
    return block(work.codes, row, start + tl.arange(0, B), S.batch, count > 0)


@triton.jit
def decode(rows, work, S: tl.constexpr):
    """r of a tile of samples (decode_b) and dimensions (decode_h), from features that fired."""
    B: tl.constexpr = S.decode_b
    H: tl.constexpr = S.decode_h
    K: tl.constexpr = S.decode_k
    D: tl.constexpr = S.dot
    blocks: tl.constexpr = (S.batch + B - 1) // B
    chunks: tl.constexpr = (S.h + H - 1) // H
    s = (tl.num_programs(0) - 1 - tl.program_id(0)) // (blocks * chunks)  # the largest first
    start_b = tl.program_id(0) // chunks % blocks * B
    b, j = start_b + tl.arange(0, B), tl.program_id(0) % chunks * H + tl.arange(0, H)
    first, n_fired = tl.load(work.saes + 3 * s), tl.load(work.n_fired + s)
    acc = tl.zeros([B, H], tl.float32)
    for start in range(0, n_fired, K):
        slot = start + tl.arange(0, K)
        fired = slot < n_fired
        row = first + tl.load(work.feature + first + slot, mask=fired, other=0).to(tl.int64)
        codes = codes_of(work, row, start_b, B, fired, S)
        acc = matmul(tl.trans(codes), block(rows.W_dec, row, j, S.h, fired), acc, D)
    acc -= block(work.x, b, j, S.h, b < S.batch)
    if S.b_dec:
        acc += tl.load(rows.b_dec + s * S.h + j, mask=j < S.h, other=0.0)[None, :]
    at = (s.to(tl.int64) * S.batch + b)[:, None] * S.h + j[None, :]
    inside = (b < S.batch)[:, None] & (j < S.h)[None, :]
    tl.store(work.r + at, acc, mask=inside)


BETA1, BETA2 = (tl.constexpr(beta) for beta in spec.BETAS)
LOG2_BETA2 = tl.constexpr(math.log2(spec.BETAS[1]))


@triton.jit
def listed(work, t, S: tl.constexpr):
    """What a tile of lists stands for: autoencoder, rows, which of them fired, which move."""
    s, start = tl.load(work.list_tiles + 2 * t), tl.load(work.list_tiles + 2 * t + 1)
    first, end = tl.load(work.saes + 3 * s), tl.load(work.saes + 3 * s + 1)
    slot = first + start + tl.arange(0, S.list_f)
    fired = slot < first + tl.load(work.n_fired + s)
    moves = fired | ((slot >= end - tl.load(work.n_resting + s)) & (slot < end))
    row = first + tl.load(work.feature + slot, mask=moves, other=0).to(tl.int64)
    return s, row, fired, moves


@triton.jit
def any_of(mask):
    """Whether any of a mask is set."""
    return tl.max(mask.to(tl.int32), 0) > 0


@triton.jit
def adam(p, m, v, at, mask, grad, missed, numbers):
    """Parameters after a step of Adam, not stored; their moments are, v after what it missed."""
    last = missed == LAST
    decay = tl.exp2(tl.where(last, 0.0, missed) * LOG2_BETA2)
    m_new = tl.load(m + at, mask=mask, other=0.0) * BETA1 + grad * (1 - BETA1)
    v_new = tl.load(v + at, mask=mask, other=0.0) * decay * BETA2 + grad * grad * (1 - BETA2)
    tl.store(m + at, tl.where(last, 0.0, m_new), mask=mask)
    tl.store(v + at, v_new, mask=mask)
    rate = tl.load(numbers + RATE) * tl.where(last, REMAINING, 1.0)
    root = tl.sqrt(v_new) * tl.load(numbers + ROOT) + tl.load(numbers + EPS)
    return tl.load(p + at, mask=mask, other=0.0) - rate * m_new / root


@triton.jit
def backward(rows, work, S: tl.constexpr):
    """δ and its sums for a tile of listed features (list_f); Adam of b_enc."""
    unit: tl.constexpr = 2.0 / (S.batch * S.h)
    F: tl.constexpr = S.list_f
    B: tl.constexpr = S.backward_b
    K: tl.constexpr = S.backward_k
    D: tl.constexpr = S.dot
    s, row, fired, moves = listed(work, tl.program_id(0), S)
    if any_of(moves):
        r = work.r + s.to(tl.int64) * S.batch * S.h
        l1 = tl.load(rows.l1 + s) * tl.load(work.numbers + L1_FACTOR) * (S.h / 2)
        bias_grad, along = tl.zeros([F], tl.float32), tl.zeros([F], tl.float32)
        for start in range(0, tl.where(any_of(fired), S.batch, 0), B):
            b = start + tl.arange(0, B)
            acc = tl.zeros([F, B], tl.float32)
            for start_k in range(0, S.h, K):
                k = start_k + tl.arange(0, K)
                W = block(rows.W_dec, row, k, S.h, fired)
                acc = matmul(W, tl.trans(block(r, b, k, S.h, b < S.batch)), acc, D)
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
            rows.b_enc, rows.b_enc_m, rows.b_enc_v, row, moves, bias_grad * unit, missed,
            work.numbers,
        )  # fmt: skip
        tl.store(rows.b_enc + row, b_enc, mask=moves)


@triton.jit
def update_encoder(rows, work, S: tl.constexpr):
    """Gradient and Adam of a tile of W_enc: listed features (list_f) by dimensions (update_h)."""
    unit: tl.constexpr = 2.0 / (S.batch * S.h)
    F: tl.constexpr = S.list_f
    H: tl.constexpr = S.update_h
    D: tl.constexpr = S.dot
    chunks: tl.constexpr = (S.h + H - 1) // H
    t, j = tl.program_id(0) // chunks, tl.program_id(0) % chunks * H + tl.arange(0, H)
    s, row, fired, moves = listed(work, t, S)
    if any_of(moves):
        grad = tl.zeros([F, H], tl.float32)
        for start in range(0, tl.where(any_of(fired), S.batch, 0), S.update_k):
            b = start + tl.arange(0, S.update_k)
            delta = block(work.delta, row, b, S.batch, fired)
            grad = matmul(delta, block(work.x, b, j, S.h, b < S.batch), grad, D)
        if S.b_dec:
            bias_grad = tl.load(work.bias_grad + row, mask=fired, other=0.0)
            through = bias_grad[:, None] * block(rows.W_enc, row, j, S.h, fired)
            tl.store(work.off + t * S.h + j, tl.sum(through, 0), mask=j < S.h)
            b_dec = tl.load(rows.b_dec + s * S.h + j, mask=j < S.h, other=0.0)
            grad -= bias_grad[:, None] * b_dec[None, :]
        at, mask = row[:, None] * S.h + j[None, :], moves[:, None] & (j < S.h)[None, :]
        missed = tl.load(work.missed + row, mask=moves, other=0).to(tl.float32)[:, None]
        W = adam(
            rows.W_enc, rows.W_enc_m, rows.W_enc_v, at, mask, grad * unit, missed, work.numbers
        )
        tl.store(rows.W_enc + at, W, mask=mask)


@triton.jit
def update_decoder(rows, work, S: tl.constexpr):
    """The same of W_dec; rows of length 1, or their lengths for normalise."""
    unit: tl.constexpr = 2.0 / (S.batch * S.h)
    F: tl.constexpr = S.list_f
    H: tl.constexpr = S.update_h
    D: tl.constexpr = S.dot
    chunks: tl.constexpr = (S.h + H - 1) // H
    chunk = tl.program_id(0) % chunks
    s, row, fired, moves = listed(work, tl.program_id(0) // chunks, S)
    if any_of(moves):
        j = chunk * H + tl.arange(0, H)
        r = work.r + s.to(tl.int64) * S.batch * S.h
        grad = tl.zeros([F, H], tl.float32)
        for start in range(0, tl.where(any_of(fired), S.batch, 0), S.update_k):
            b = start + tl.arange(0, S.update_k)
            codes = codes_of(work, row, start, S.update_k, fired, S)
            grad = matmul(codes, block(r, b, j, S.h, b < S.batch), grad, D)
        if S.project:
            along = tl.load(work.along + row, mask=fired, other=0.0)
            grad -= along[:, None] * block(rows.W_dec, row, j, S.h, fired)
        at, mask = row[:, None] * S.h + j[None, :], moves[:, None] & (j < S.h)[None, :]
        missed = tl.load(work.missed + row, mask=moves, other=0).to(tl.float32)[:, None]
        W = adam(
            rows.W_dec, rows.W_dec_m, rows.W_dec_v, at, mask, grad * unit, missed, work.numbers
        )
        norm = tl.where(moves, tl.sum(W * W, 1), 1.0)
        if chunks == 1:
            W /= tl.sqrt(norm)[:, None]
        else:
            tl.store(work.norm + row * chunks + chunk, norm, mask=moves)
        tl.store(rows.W_dec + at, W, mask=mask)


@triton.jit
def normalise(rows, work, S: tl.constexpr):
    """Length 1 for rows of W_dec that do not fit a tile."""
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
    """Gradient and Adam of b_dec, one program for each autoencoder and update_h dimensions."""
    unit: tl.constexpr = 2.0 / (S.batch * S.h)
    H: tl.constexpr = S.update_h
    chunks: tl.constexpr = (S.h + H - 1) // H
    s, j = tl.program_id(0) // chunks, tl.program_id(0) % chunks * H + tl.arange(0, H)
    grad = tl.zeros([16, H], tl.float32)
    for start in range(0, S.batch, 16):
        b = start + tl.arange(0, 16)
        grad += block(work.r + s.to(tl.int64) * S.batch * S.h, b, j, S.h, b < S.batch)
    first, tiles = tl.load(work.saes + 3 * s + 2), tl.cdiv(tl.load(work.n_fired + s), S.list_f)
    for start in range(first, first + tiles, 16):
        t = start + tl.arange(0, 16)
        grad -= block(work.off, t, j, S.h, t < first + tiles)
    at, mask = s * S.h + j, j < S.h
    grad = tl.sum(grad, 0)
    b_dec = adam(rows.b_dec, rows.b_dec_m, rows.b_dec_v, at, mask, grad * unit, 0.0, work.numbers)
    tl.store(rows.b_dec + at, b_dec, mask=mask)
