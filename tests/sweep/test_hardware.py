"""Device, precision and memory."""

import pytest
import torch

from sparse_coding.config import UserError
from sparse_coding.sae.engines import cpu_bf16
from sparse_coding.sae.engines.gpu_gemm import precision
from sparse_coding.sweep.hardware import (
    default_dtype,
    free_memory,
    pick_device,
    set_precision,
)

CPU = torch.device("cpu")


def test_precision_is_float32_on_the_cpu_and_tf32_by_default_on_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert set_precision("auto", CPU) == "float32"
    assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(
        UserError, match="tf32 is not for the CPU: use one of float32, bf16, bf16x3"
    ):
        set_precision("tf32", CPU)
    with pytest.raises(UserError, match="bf16x3 is not for CUDA: use one of float32, tf32, bf16"):
        set_precision("bf16x3", torch.device("cuda"))
    try:
        for flag, name in (("auto", "tf32"), ("tf32", "tf32"), ("bf16", "bf16")):
            assert set_precision(flag, torch.device("cuda")) == name
            assert precision.in_use() == name
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        precision.use("float32", (9, 0))
        set_precision("float32", CPU)


def test_bf16_on_the_cpu_is_the_kernels_alone_or_refused(monkeypatch):
    """torch's own precision rounds models and data as well."""
    monkeypatch.setattr(cpu_bf16, "missing", lambda: "")
    try:
        for flag in ("bf16", "bf16x3"):
            assert set_precision(flag, CPU) == cpu_bf16.in_use() == flag
            assert torch.get_float32_matmul_precision() == "highest"
    finally:
        assert set_precision("auto", CPU) == cpu_bf16.in_use() == "float32"
    monkeypatch.setattr(cpu_bf16, "missing", lambda: "this CPU lacks it")
    with pytest.raises(UserError, match="--precision bf16x3: this CPU lacks it: use float32"):
        set_precision("bf16x3", CPU)
    assert cpu_bf16.in_use() == "float32"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_refused_where_there_is_none():
    assert pick_device("auto") == pick_device("cpu") == CPU
    with pytest.raises(UserError, match="use --device cpu"):
        pick_device("cuda")


def test_ranks_of_one_host_share_its_memory(monkeypatch):
    alone = free_memory(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(CPU) == pytest.approx(alone / 4, rel=0.1)


def test_a_model_is_in_bfloat16_where_a_gpu_computes_in_it(monkeypatch):
    for capability, wanted in (((7, 5), torch.float32), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert default_dtype(torch.device("cuda", 0)) == wanted
        assert default_dtype(torch.device("cpu")) == torch.float32
