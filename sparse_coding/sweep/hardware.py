"""Device, precision and free memory of the machine at hand."""

import os

import psutil
import torch

from sparse_coding.config import require
from sparse_coding.sae.engines import cpu_bf16
from sparse_coding.sae.engines.gpu_gemm import precision as gpu_precision

MEMORY_SHARE = 0.8  # of the free memory may be planned for; ours, leaves room for copies


def pick_device(flag: str) -> torch.device:
    """The device of --device auto|cpu|cuda; under torchrun each rank its own GPU.

    Raises:
        UserError: cuda is asked for and there is none.
    """
    cuda = torch.cuda.is_available()
    require(
        flag != "cuda" or cuda,
        "--device cuda: no usable CUDA GPU is seen by torch (check nvidia-smi and that torch "
        "is a CUDA build), or use --device cpu",
    )
    if flag == "cpu" or not cuda:
        return torch.device("cpu")
    rank, n_gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()  # of torchrun
    require(rank < n_gpus, f"no GPU for rank {rank} of this host: use --nproc_per_node={n_gpus}")
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    return device


def set_precision(flag: str, device: torch.device) -> str:
    """Sets and returns the precision of float32 GEMMs: float32, tf32, bf16 or fp16 on CUDA (auto:
    tf32, or where the GPU lacks it what comes closest, said in a line), float32, bf16 or bf16x3 on
    a CPU (auto: float32).

    It is that of their factors; sums and what is kept are float32. Those of 16 bits are for the
    kernels: on CUDA torch takes tf32 in place of bf16, and float32 in place of fp16, on a CPU
    float32. To be called before the first parallel region of the process.

    Raises:
        UserError: a precision that the device doesn't have.
    """
    on_gpu = device.type == "cuda"
    has, where = (gpu_precision.FACTORS, "CUDA") if on_gpu else (cpu_bf16.N_PARTS, "the CPU")
    require(
        flag == "auto" or flag in has,
        f"--precision {flag} is not for {where}: use one of {', '.join(has)} there",
    )
    if on_gpu:
        precision = gpu_precision.use(flag, torch.cuda.get_device_capability(device))
    else:
        precision = cpu_bf16.use(flag)
        torch.set_float32_matmul_precision("highest")
    # Adam's moments of dead features decay into denormals, on which a CPU is many times slower.
    # Zero in their place changes no parameter (LOG.md). Threads made later inherit it.
    torch.set_flush_denormal(True)
    return precision


def free_memory(device: torch.device) -> float:
    """Bytes of memory that this process may plan for."""
    if device.type == "cuda":
        return MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of torchrun
    return MEMORY_SHARE * psutil.virtual_memory().available / ranks_here


def memory_budget(max_memory_gb: float, device: torch.device) -> float:
    """Bytes of memory for training: --max-memory-gb, or what is free where that is 0."""
    return max_memory_gb * 1e9 or free_memory(device)


def describe(device: torch.device) -> str:
    """For the screen and config.json."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on GPUs that compute in it, from compute capability 8.0 on; float32 elsewhere."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    return torch.float32
