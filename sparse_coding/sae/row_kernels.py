"""Kernels for rows of an autoencoder: gradients of a feature, Adam, length 1.

What a step does with them: sparse_kernels.py. Formulas: stack.py.

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

from sparse_coding.sae.spec import BETAS, DORMANT

# Numbers of a step, in an array: lr / (1 − β₁^t), 1/√(1 − β₂^t), ...; the last two are 0 or 1
RATE, ROOT, EPS, L1_FACTOR, SEEKS_L0, PROJECT = range(6)
BETA1, BETA2 = BETAS
F0, F1 = np.float32(0), np.float32(1)
# Sums may be reordered, as in any GEMM; NaN and infinities keep their meaning
FAST = {"reassoc", "contract", "nsz", "arcp"}
GEMM_SYMBOL = "sparse_coding_sgemm"  # bound to torch's sgemm by cpu_setup
N, T = 78, 84  # the letters that it knows


def _cache_folder() -> str:
    """Of this very source: numba looks for changes only in the file of the outermost kernel."""
    here = Path(__file__).parent
    sources = [path.read_bytes() for path in sorted(here.glob("*_kernels.py"))]
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
    total = F0
    for j in range(a.shape[0]):
        total += a[j] * b[j]
    return total


@kernel
def fill_(a, value):
    for j in range(a.shape[0]):
        a[j] = value


@kernel
def add_(a, b):
    for j in range(a.shape[0]):
        a[j] += b[j]


@kernel
def scale_(a, factor):
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
def adam_(p, m, v, grad, pace):
    rate, root, eps = pace[RATE], pace[ROOT], pace[EPS]
    for j in range(p.shape[0]):
        m[j] = np.float32(BETA1) * m[j] + np.float32(1 - BETA1) * grad[j]
        v[j] = np.float32(BETA2) * v[j] + np.float32(1 - BETA2) * grad[j] * grad[j]
        p[j] -= rate * m[j] / (np.sqrt(v[j]) * root + eps)


@kernel
def adam_without_gradient_(p, m, v, pace):
    rate, root, eps = pace[RATE], pace[ROOT], pace[EPS]
    for j in range(p.shape[0]):
        m[j] *= np.float32(BETA1)
        v[j] *= np.float32(BETA2)
        p[j] -= rate * m[j] / (np.sqrt(v[j]) * root + eps)


@kernel
def rest(sae, f, pace):
    """A feature that did not fire: its moments still carry it on, until it is dormant."""
    sae.idle[f] += 1
    if sae.idle[f] > DORMANT:
        return
    s = slice(f, f + 1)
    adam_without_gradient_(sae.b_enc[s], sae.b_enc_m[s], sae.b_enc_v[s], pace)
    adam_without_gradient_(sae.W_enc[f], sae.W_enc_m[f], sae.W_enc_v[f], pace)
    adam_without_gradient_(sae.W_dec[f], sae.W_dec_m[f], sae.W_dec_v[f], pace)
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
def fired(sae, f, d_bias, d_enc, d_dec, off, pace):
    """Adam of a feature's row, and its part of ∂b_dec into off."""
    catch_up(sae, f)
    W_enc, W_dec = sae.W_enc[f], sae.W_dec[f]
    if sae.b_dec.shape[0]:
        for j in range(off.shape[0]):
            off[j] -= d_bias[0] * W_enc[j]
            d_enc[j] -= d_bias[0] * sae.b_dec[j]
    if pace[PROJECT]:
        along = dot(d_dec, W_dec)
        for j in range(d_dec.shape[0]):
            d_dec[j] -= along * W_dec[j]
    s = slice(f, f + 1)
    adam_(sae.b_enc[s], sae.b_enc_m[s], sae.b_enc_v[s], d_bias, pace)
    adam_(W_enc, sae.W_enc_m[f], sae.W_enc_v[f], d_enc, pace)
    adam_(W_dec, sae.W_dec_m[f], sae.W_dec_v[f], d_dec, pace)
    scale_(W_dec, F1 / np.sqrt(dot(W_dec, W_dec)))
