"""Factors of GEMMs in bf16 on the CPU: where that is possible, and how numbers are taken apart.

A factor is one bf16 number (bf16), or the sum of two (bf16x3), high and low: then a product is
high · high + high · low + low · high, what is left out being 2^-16 of it at most, as in Henry,
Tang, Heinecke 2019, https://arxiv.org/abs/1904.06376. Sums are float32, and so is all that is
kept. MKL multiplies, several times faster than in float32 on a CPU with AMX or AVX512_BF16.
"""

import ctypes

import torch
from torch import Tensor

from sparse_coding.config import require
from sparse_coding.sae.engines.cpu_compile import BF16_GEMM, has_kernels, libtorch

N_PARTS = {"float32": 0, "bf16": 1, "bf16x3": 2}  # bf16 numbers that stand for one of a factor
NEEDED = "amx_bf16", "avx512_bf16"  # one of these, as torch names what a CPU has
_of_process = {"precision": "float32"}


def use(flag: str) -> str:
    """Sets and returns the precision of factors in this process; auto: float32.

    torch's own setting is left alone, since it would round text models and data as well.

    Raises:
        UserError: this machine doesn't have it.
    """
    precision = "float32" if flag == "auto" else flag
    reason = missing() if N_PARTS[precision] else ""
    require(not reason, f"--precision {precision}: {reason}: use float32 on this machine")
    _of_process["precision"] = precision
    return precision


def in_use() -> str:
    """The precision of factors in this process."""
    return _of_process["precision"]


def missing() -> str:
    """What bf16 needs and this machine lacks, in words; empty if it lacks nothing."""
    has = torch.cpu.get_capabilities()
    if not any(has.get(name) for name in NEEDED):
        return "this CPU has neither AMX nor AVX512_BF16"
    if not has_kernels():
        return "it needs numba, and a torch built with MKL"
    if not hasattr(libtorch(), BF16_GEMM):
        return f"torch's library has no {BF16_GEMM} of MKL"
    return "" if _multiplies() else f"{BF16_GEMM} of torch's library gives wrong products here"


def _multiplies() -> bool:
    """Whether MKL's product of two small matrices is the right one: exact in float32, but neither
    with sums in bf16 nor with integers of another length."""
    n = 32
    a = 1 + torch.arange(n * n, dtype=torch.float32).view(n, n) % 113 / 128
    out = torch.full((n, n), torch.nan)
    one, zero, size = ctypes.c_float(1), ctypes.c_float(0), ctypes.c_int64(n)
    factor = a.bfloat16()
    address, no = ctypes.c_void_p(factor.data_ptr()), ctypes.c_char(b"N")
    numbers = [*map(ctypes.byref, (no, no, size, size, size, one)), address, ctypes.byref(size)]
    numbers += [address, *map(ctypes.byref, (size, zero)), ctypes.c_void_p(out.data_ptr())]
    libtorch()[BF16_GEMM](*numbers, ctypes.byref(size))
    return torch.equal(out, (a.double() @ a.double()).float())


def parts_of(factor: Tensor, n_parts: int) -> Tensor:
    """Bits (..., rows, n_parts, columns) of the bf16 numbers that stand for those of a factor
    (..., rows, columns)."""
    shape = (*factor.shape[:-1], n_parts, factor.shape[-1])
    parts = factor.new_empty(shape, dtype=torch.bfloat16)
    if n_parts:
        parts[..., 0, :] = factor
    if n_parts == 2:
        parts[..., 1, :] = factor - parts[..., 0, :].float()
    return parts.view(torch.uint16)
