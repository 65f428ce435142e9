"""What the kernels are made of: how they are compiled, torch's sgemm, sums and rows."""

from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
from llvmlite import ir
from numba import config, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from sparse_coding.sae import families, spec

F0, F1 = np.float32(0), np.float32(1)
# Sums may be reordered, as in any GEMM; NaN and infinities keep their meaning
FAST = {"reassoc", "contract", "nsz", "arcp"}
GEMM_SYMBOL = "sparse_coding_sgemm"  # bound to torch's sgemm by cpu.py
N, T = 78, 84  # the letters that it knows


def _cache_folder() -> str:
    """One for each state of the source: numba looks for changes in one file alone, but kernels of
    the others and constants of two more are compiled in too."""
    here = Path(__file__).parent
    files = (*sorted(here.glob("cpu*.py")), spec.__file__, families.__file__)
    digest = sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:8]
    return str(
        Path(config.CACHE_DIR or Path(__file__).parent / "__pycache__") / f"kernels-{digest}"
    )


CACHE_FOLDER = _cache_folder()


def kernel(function, *, entry=False):
    """Compiled at the first call, within the one kernel that Python calls, which is kept on disk:
    a wrapper of each other for calls from Python would double the time. Without the GIL, and
    without numba's counting of references, a fifth of the time of a row: so kernels allocate
    nothing."""
    options = dict(nogil=True, _nrt=False, fastmath=FAST, error_model="numpy")
    if not entry:
        return njit(**options, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)
    before, config.CACHE_DIR = config.CACHE_DIR, CACHE_FOLDER
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # numba finds no folder it may write to
        return njit(**options)(function)
    finally:
        config.CACHE_DIR = before


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
def subtract_(a, b):
    """a -= b."""
    for j in range(a.shape[0]):
        a[j] -= b[j]


@kernel
def scale_(a, factor):
    """a *= factor."""
    for j in range(a.shape[0]):
        a[j] *= factor


@kernel
def sum_rows_(out, W, feature, value, p, end):
    """out = Σ value · rows of W for the features of a sample from place p to end, four at a
    time."""
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
