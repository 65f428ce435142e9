"""The precision of factors in GEMMs on a GPU; sums and what is kept are float32."""

import torch
from torch import Tensor

from sparse_coding.config import require

FACTORS = {
    "float32": torch.float32,
    "tf32": torch.float32,  # which tensor cores round
    "bf16": torch.bfloat16,
    "fp16": torch.float16,  # 11 bits like TF32; gradients are in units that it can hold
}
_of_process = {"precision": "float32"}


def use(flag: str, capability: tuple[int, int]) -> str:
    """Sets and returns the precision of factors in this process, for a GPU of this compute
    capability; torch's own GEMMs take float32 or TF32.

    TF32 and bf16 came with 8.0; auto is tf32, before that fp16, which rounds factors alike.

    Raises:
        UserError: this GPU doesn't have it.
    """
    modern = capability >= (8, 0)
    precision = ("tf32" if modern else "fp16") if flag == "auto" else flag
    has = [name for name in FACTORS if modern or name not in ("tf32", "bf16")]
    require(
        precision in has,
        f"--precision {flag}: a GPU of compute capability {'.'.join(map(str, capability))} lacks "
        f"it: use {' or '.join(has)}",
    )
    if flag == "auto" and not modern:
        print("this GPU has no TF32, so factors in GEMMs are fp16 (--precision float32: exact)")
    torch.set_float32_matmul_precision("high" if precision in ("tf32", "bf16") else "highest")
    _of_process["precision"] = precision
    return precision


def in_use() -> str:
    """The precision of factors in this process."""
    return _of_process["precision"]


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out (n, i, j) float32 = a (n, i, k) @ b (n, k, j), factors of one dtype; sums are float32.

    Before torch 2.8 products of 16 bits are rounded to 16 bits.
    """
    if a.dtype == torch.float32:
        return torch.bmm(a, b, out=out)
    if not a.is_cuda:  # torch has it for CUDA alone
        return torch.bmm(a.float(), b.float(), out=out)
    if hasattr(torch.ops.aten.bmm, "dtype_out"):
        return torch.ops.aten.bmm.dtype_out(a, b, torch.float32, out=out)
    return out.copy_(torch.bmm(a, b))
