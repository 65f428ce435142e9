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

**Dormant rows.** After DORMANT steps without firing a row is left alone. Its gradient is 0, so
dense Adam would only decay its moments, which is made up for at once (m β₁^k, v β₂^k) when it fires
again, and would move it by less than float32 can show: a single gradient leaves m̂/√v̂ ≤
(1 − β₁)/√(1 − β₂) = 3.2, a steady one 1; the ratio falls by β₁/√β₂ = 0.9005 a step, so all movement
after 200 steps is below lr · 3.2 · 0.9005^200 / (1 − 0.9005) = 3e-8 lr, that is 3e-11 at an lr of
1e-3, where half a float32 step of an entry of 1/16 is 4e-9.
"""

from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import config, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy import ndarray

from sparse_coding.sae import spec
from sparse_coding.sae.spec import BETAS, DORMANT, L0_CLAMP, L0_GAIN, PLACE

RATE, ROOT, EPS, L1_FACTOR, SEEKS_L0, PROJECT, P, P_BEFORE = PLACE
BETA1, BETA2 = BETAS
F0, F1 = np.float32(0), np.float32(1)
# Sums may be reordered, as in any GEMM; NaN and infinities keep their meaning
FAST = {"reassoc", "contract", "nsz", "arcp"}
GEMM_SYMBOL = "sparse_coding_sgemm"  # bound to torch's sgemm by cpu.py
N, T = 78, 84  # the letters that it knows


def _cache_folder() -> str:
    """One for each state of the source: numba looks for changes in this file alone, but the
    constants of spec.py are compiled in too."""
    here = Path(__file__).parent
    sources = [Path(file).read_bytes() for file in (__file__, spec.__file__)]
    digest = sha256(b"".join(sources)).hexdigest()[:8]
    return str(Path(config.CACHE_DIR or here / "__pycache__") / f"kernels-{digest}")


CACHE_FOLDER = _cache_folder()


def kernel(function):
    """Compiled at the first call and kept on disk. Without the GIL, and without numba's counting of
    references, a fifth of the time of a row: so kernels allocate nothing."""
    options = dict(nogil=True, _nrt=False, fastmath=FAST, error_model="numpy")
    before, config.CACHE_DIR = config.CACHE_DIR, CACHE_FOLDER
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # numba finds no folder it may write to
        return njit(**options)(function)
    finally:
        config.CACHE_DIR = before


class Sae(NamedTuple):
    """An autoencoder's parameters with Adam's moments (_m, _v), views of a Stack's tensors.

    idle: steps since a feature fired; beyond DORMANT its row waits for what it missed
    """

    W_enc: ndarray  # (n_dict, h)
    b_enc: ndarray  # (n_dict,)
    W_dec: ndarray  # (n_dict, h)
    b_dec: ndarray  # (h,), or (0,) where it is fixed at 0
    W_enc_m: ndarray
    W_enc_v: ndarray
    b_enc_m: ndarray
    b_enc_v: ndarray
    W_dec_m: ndarray
    W_dec_v: ndarray
    b_dec_m: ndarray
    b_dec_v: ndarray
    idle: ndarray  # (n_dict,) int32
    l1: ndarray  # (1,)
    target_l0: ndarray  # (1,), 0 where l1 stays


@intrinsic
def _sgemm(context, letters, shape, b, a, out, strides):
    """Fortran's sgemm of column-major matrices, out = b a: all arguments by reference; integers of
    64 bits, of which a BLAS of 32 bits reads the lower half."""
    signature = types.void(letters, shape, b, a, out, strides)

    def generate(context, builder, signature, arguments):
        reference = partial(cgutils.alloca_once_value, builder)
        unpacked = (cgutils.unpack_tuple(builder, arguments[i]) for i in (0, 1, 5))
        letters, shape, strides = (list(map(reference, values)) for values in unpacked)
        one, zero = (reference(ir.Constant(ir.FloatType(), value)) for value in (1, 0))
        b, a, out = (builder.inttoptr(address, cgutils.voidptr_t) for address in arguments[2:5])
        call = [*letters, *shape, one, b, strides[0], a, strides[1], zero, out, strides[2]]
        kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in call])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, GEMM_SYMBOL), call)
        return context.get_dummy_value()

    return signature, generate


@kernel
def gemm(a_transposed, b_transposed, a, b, out):
    """out = a b or its transposed variants; rows contiguous. To column-major BLAS it is b a."""
    k = a.shape[0] if a_transposed else a.shape[1]
    letters = np.uint8(T if b_transposed else N), np.uint8(T if a_transposed else N)
    shape = out.shape[1], out.shape[0], k
    strides = b.strides[0] // 4, a.strides[0] // 4, out.strides[0] // 4  # of 4 bytes
    _sgemm(letters, shape, b.ctypes.data, a.ctypes.data, out.ctypes.data, strides)


@kernel
def dot(a, b):
    """Σ a b."""
    total = F0
    for j in range(a.shape[0]):
        total += a[j] * b[j]
    return total


@kernel
def fill_(a, value):
    """a = value."""
    for j in range(a.shape[0]):
        a[j] = value


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
def sparse_gradients(row, g, x, d_enc, d_dec, l1):
    """∂W_enc and ∂W_dec of a feature from the samples it fires on, four at a time; returns ∂b_enc.

    row: its codes (batch,), the samples, its row of W_dec
    """
    codes, where, W = row
    h, n, d_bias = W.shape[0], where.shape[0], F0
    fill_(d_enc, F0)
    fill_(d_dec, F0)
    for k in range(0, n - n % 4, 4):
        b0, b1, b2, b3 = where[k], where[k + 1], where[k + 2], where[k + 3]
        g0, g1, g2, g3 = g[b0], g[b1], g[b2], g[b3]
        e0, e1, e2, e3 = l1, l1, l1, l1  # becomes δ
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
        e0 = dot(W, g0) + l1
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
    """A feature that did not fire: its moments still carry it on, until it is dormant."""
    sae.idle[f] += 1
    if sae.idle[f] > DORMANT:
        return
    s = slice(f, f + 1)
    adam_without_gradient_(sae.b_enc[s], sae.b_enc_m[s], sae.b_enc_v[s], numbers)
    adam_without_gradient_(sae.W_enc[f], sae.W_enc_m[f], sae.W_enc_v[f], numbers)
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
        scale_(sae.W_enc_m[f], m)
        scale_(sae.W_enc_v[f], v)
        scale_(sae.W_dec_m[f], m)
        scale_(sae.W_dec_v[f], v)
    sae.idle[f] = 0


@kernel
def fired(sae, f, d_bias, d_enc, d_dec, off, numbers):
    """Adam of a feature's row, and its part of ∂b_dec into off."""
    catch_up(sae, f)
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
    adam_(W_enc, sae.W_enc_m[f], sae.W_enc_v[f], d_enc, numbers)
    adam_(W_dec, sae.W_dec_m[f], sae.W_dec_v[f], d_dec, numbers)
    scale_(W_dec, F1 / np.sqrt(dot(W_dec, W_dec)))


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
    """Gradients of a tile: scratch of one thread."""

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
def choose(sae, work, numbers):
    """Whether this step is sparse: then codes are sorted by sample. Moves l1 where l0 is sought."""
    batch, total = work.codes.shape[1], 0
    for f in range(work.count.shape[0]):
        total += work.count[f]
    if numbers[SEEKS_L0] and sae.target_l0[0] > 0:
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
def update(sae, work, x, grads, numbers, span):
    """Gradients and Adam of a span of tiles."""
    n_dict, sparse = sae.b_enc.shape[0], work.sparse[0]
    l1 = sae.l1[0] * numbers[L1_FACTOR] / np.float32(x.shape[0])
    for tile in range(span[0], min(span[1], work.off.shape[0])):
        t, e = tile * TILE, min(tile * TILE + TILE, n_dict)
        off = work.off[tile]
        fill_(off, F0)
        if not sparse:
            dense_gradients(sae.W_dec[t:e], work.codes[t:e], work.g, x, grads, l1)
        for f in range(t, e):
            if work.count[f] == 0:
                rest(sae, f, numbers)
                continue
            i = f - t if not sparse else 0  # one row only stays in L1
            d_bias, d_enc, d_dec = grads.b_enc[i : i + 1], grads.W_enc[i], grads.W_dec[i]
            if sparse:
                row = work.codes[f], work.where[f, : work.count[f]], sae.W_dec[f]
                d_bias[0] = sparse_gradients(row, work.g, x, d_enc, d_dec, l1)
            fired(sae, f, d_bias, d_enc, d_dec, off, numbers)


@kernel
def dense_gradients(W_dec, codes, g, x, grads, l1):
    """Gradients of a tile, by GEMMs, into grads."""
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
def finish(sae, work, numbers):
    """Adam of b_dec, whose gradient the tiles have left in parts."""
    if sae.b_dec.shape[0]:
        grad = work.off[0]
        for t in range(1, work.off.shape[0]):
            add_(grad, work.off[t])
        for b in range(work.g.shape[0]):
            add_(grad, work.g[b])
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
        if todo & CHOOSE:
            work.sparse[0] = choose(sae, work, numbers)
        if todo & DECODE:
            decode(sae, work, x, span)
        if todo & UPDATE:
            update(sae, work, x, grads, numbers, span)
        if todo & FINISH:
            finish(sae, work, numbers)
