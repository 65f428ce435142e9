"""What the kernels are made of: how they are compiled, torch's GEMMs, sums and rows."""

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
# bound to torch's sgemm, and to its gemm_bf16bf16f32, by cpu_compile.py
GEMM_SYMBOL, BF16_SYMBOL = "sparse_coding_sgemm", "sparse_coding_bf16_gemm"
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


def _blas(symbol):
    """Fortran's gemm of that name, of column-major matrices, out = beta · out + b a: all arguments
    by reference; integers of 64 bits, of which a BLAS of 32 bits reads the lower half."""

    @intrinsic
    def function(context, letters, shape, b, a, beta, out, strides):
        signature = types.void(letters, shape, b, a, beta, out, strides)

        def generate(context, builder, signature, arguments):
            reference = partial(cgutils.alloca_once_value, builder)
            unpacked = (cgutils.unpack_tuple(builder, arguments[i]) for i in (0, 1, 6))
            letters, shape, strides = (list(map(reference, values)) for values in unpacked)
            one, beta = reference(ir.Constant(ir.FloatType(), 1)), reference(arguments[4])
            b, a, out = (builder.inttoptr(arguments[i], cgutils.voidptr_t) for i in (2, 3, 5))
            call = [*letters, *shape, one, b, strides[0], a, strides[1], beta, out, strides[2]]
            kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in call])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, symbol), call)
            return context.get_dummy_value()

        return signature, generate

    return function


_sgemm, _bf16_gemm = _blas(GEMM_SYMBOL), _blas(BF16_SYMBOL)


@kernel
def float_gemm(a_transposed, b_transposed, a, b, out):
    """out = a b or its transposed variants; rows contiguous. To column-major BLAS it is b a."""
    k = a.shape[0] if a_transposed else a.shape[1]
    letters = np.uint8(T if b_transposed else N), np.uint8(T if a_transposed else N)
    shape = out.shape[1], out.shape[0], k
    strides = b.strides[0] // 4, a.strides[0] // 4, out.strides[0] // 4  # of 4 bytes
    _sgemm(letters, shape, b.ctypes.data, a.ctypes.data, F0, out.ctypes.data, strides)


@kernel
def gemm(a_transposed, b_transposed, a, b, out):
    """The same in the precision of factors.

    a, b: each a float32 matrix, and what stands for it (rows, parts, columns) where factors are
    bf16 (cpu_bf16.py)
    """
    (of_a, parts_a), (of_b, parts_b), n_parts = a, b, a[1].shape[1]
    if n_parts == 0:
        float_gemm(a_transposed, b_transposed, of_a, of_b, out)
        return
    letters = np.uint8(T if b_transposed else N), np.uint8(T if a_transposed else N)
    shape = out.shape[1], out.shape[0], of_a.shape[0] if a_transposed else of_a.shape[1]
    strides = parts_b.strides[0] // 2, parts_a.strides[0] // 2, out.strides[0] // 4
    high_a, high_b, to = parts_a.ctypes.data, parts_b.ctypes.data, out.ctypes.data
    if n_parts == 2:  # the small ones first
        _bf16_gemm(letters, shape, high_b + parts_b.strides[1], high_a, F0, to, strides)
        _bf16_gemm(letters, shape, high_b, high_a + parts_a.strides[1], F1, to, strides)
    _bf16_gemm(letters, shape, high_b, high_a, F1 if n_parts == 2 else F0, to, strides)


I16, I32 = ir.IntType(16), ir.IntType(32)


@intrinsic
def bf16(context, number):
    """Bits of the bf16 number that is nearest to a float32 one; of two that are as near, of the
    even one. In 32 bits throughout, which numba's integers would not be, nor as fast."""

    def generate(context, builder, signature, arguments):
        bits = builder.bitcast(arguments[0], I32)
        odd = builder.and_(builder.lshr(bits, I32(16)), I32(1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, I32(0x7FFF))), I32(16))
        no_number = builder.fcmp_unordered("uno", arguments[0], arguments[0])
        return builder.select(no_number, I16(0x7FC0), builder.trunc(rounded, I16))

    return types.uint16(types.float32), generate


@intrinsic
def float_of(context, bits):
    """The float32 number that a bf16 one is."""

    def generate(context, builder, signature, arguments):
        high = builder.shl(builder.zext(arguments[0], I32), I32(16))
        return builder.bitcast(high, ir.FloatType())

    return types.float32(types.uint16), generate


@kernel
def split_(row, parts, first):
    """What stands for a row of a factor, into its parts (parts, n) from place `first` on."""
    n, n_parts = row.shape[0], parts.shape[0]
    if n_parts == 0:
        return
    high = parts[0][first : first + n]
    for j in range(n):
        high[j] = bf16(row[j])
    if n_parts == 2:
        low = parts[1][first : first + n]
        for j in range(n):
            low[j] = bf16(row[j] - float_of(high[j]))


RUN = 32  # samples that are compared together, each of which gives a bit


def _vector_at(builder, kind, address):
    vector = ir.VectorType(kind, RUN)
    return builder.load(builder.inttoptr(address, vector.as_pointer()), align=4)


def _as_mask(builder, holds):
    return builder.zext(builder.bitcast(holds, ir.IntType(RUN)), ir.IntType(64))


@intrinsic
def mask_of_codes(context, address):
    """Which of RUN codes are not 0."""

    def generate(context, builder, signature, arguments):
        codes = _vector_at(builder, ir.FloatType(), arguments[0])
        zeros = ir.Constant(codes.type, [0.0] * RUN)
        return _as_mask(builder, builder.fcmp_unordered("!=", codes, zeros))

    return types.uint64(types.uintp), generate


@intrinsic
def mask_of_keys(context, address, least):
    """Which of RUN codes have keys, their bits without the sign, that reach those at `least`."""

    def generate(context, builder, signature, arguments):
        bits, least = (_vector_at(builder, I32, argument) for argument in arguments)
        keys = builder.and_(bits, ir.Constant(bits.type, [2**31 - 1] * RUN))
        return _as_mask(builder, builder.icmp_signed(">=", keys, least))

    return types.uint64(types.uintp, types.uintp), generate


@intrinsic
def lowest(context, mask):
    """The place of the lowest bit that is set."""

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.IntType(1)(1))

    return types.int64(types.uint64), generate


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
