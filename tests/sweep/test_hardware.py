"""Device, precision and memory."""

import pytest
import torch

from sparse_coding.config import UserError
from sparse_coding.sae.engines.gpu import DOT
from sparse_coding.sweep.hardware import (
    free_memory,
    pick_device,
    set_precision,
)

CPU = torch.device("cpu")


def test_precision_is_float32_on_the_cpu_and_tf32_by_default_on_cuda():
    assert set_precision("auto", CPU) == "float32"
    assert torch.get_float32_matmul_precision() == "highest"
    for flag in ("tf32", "bf16"):
        with pytest.raises(UserError, match=f"{flag} needs CUDA"):
            set_precision(flag, CPU)
    try:
        for flag, name in (("auto", "tf32"), ("tf32", "tf32"), ("bf16", "bf16")):
            assert set_precision(flag, torch.device("cuda")) == name
            assert DOT[torch.get_float32_matmul_precision()] == name
    finally:
        set_precision("float32", CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_refused_where_there_is_none():
    assert pick_device("auto") == pick_device("cpu") == CPU
    with pytest.raises(UserError, match="use --device cpu"):
        pick_device("cuda")


def test_ranks_of_one_host_share_its_memory(monkeypatch):
    alone = free_memory(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(CPU) == pytest.approx(alone / 4, rel=0.1)
