"""What the compiled kernels of a CPU need: torch's sgemm, compiling once, scratch.

They need numba, and a torch built with MKL, whose sgemm they call: has_kernels() says so if not.
"""

import contextlib
import ctypes
import fcntl
import functools
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Share of codes above 0 up to which a step without the zeros is faster (LOG.md: 0.40 to 0.45)
DENSITY = 0.4
SAID_AFTER = 3.0  # seconds
ONE_THREAD = ("omp_set_num_threads", "MKL_Set_Num_Threads_Local")  # functions of libtorch


@functools.cache
def libtorch() -> ctypes.CDLL:
    end = "dylib" if sys.platform == "darwin" else "so"
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{end}"))


def one_thread_here() -> None:
    """Limits OpenMP and MKL to one thread in the calling thread, where torch is built with them;
    denormals are flushed in it."""
    torch.get_num_threads()  # torch's own start-up of a thread, which would undo the next lines
    for name in ONE_THREAD:
        if hasattr(libtorch(), name):
            libtorch()[name](1)
    torch.set_flush_denormal(True)


@functools.cache
def has_kernels() -> bool:
    """Whether what the kernels need is there; says so, once, if it isn't."""
    try:
        import llvmlite.binding

        from sparse_coding.sae import row_kernels

        needed = ("sgemm_", *ONE_THREAD)
        missing = [name for name in needed if not hasattr(libtorch(), name)]
    except (ImportError, OSError) as error:
        missing = [str(error)]
    if missing:
        _say_slow(", ".join(missing))
        return False
    sgemm = ctypes.cast(libtorch().sgemm_, ctypes.c_void_p).value
    llvmlite.binding.add_symbol(row_kernels.GEMM_SYMBOL, sgemm)
    return True


def _say_slow(reason: str) -> None:
    print(f"no compiled kernels, so a CPU trains several times slower: {reason}", flush=True)


@functools.cache
def kernels_compile() -> bool:
    """Compiles them, or loads what was compiled before. Says so, if it takes long or fails.

    Another process compiles, and this one loads: after compiling, a process goes on with the inner
    kernels as they were compiled alone, which round otherwise than those within what is kept, so a
    first run would differ from a second in the last bits.
    """
    from numba.core.errors import NumbaError

    try:
        with _said_if_slow("compiling the CPU kernels, once on this machine: some 15 s"):
            folder = kernels_missing_in()
            if folder:
                with open(folder / "lock", "w") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes one compiles
                    if kernels_missing_in():
                        _compile_elsewhere()
            step_of_zeros()
    except NumbaError as error:
        _say_slow(str(error).splitlines()[0])
        return False
    return True


def _compile_elsewhere() -> None:
    """In a process of its own; what fails there fails here too, and is said then."""
    code = f"from {__name__} import *; has_kernels() and step_of_zeros()"
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    command, root = [sys.executable, "-c", code], Path(__file__).parents[2]
    subprocess.run(command, cwd=root, **streams, start_new_session=True, check=False)


def step_of_zeros() -> None:
    """What makes numba compile or load the kernels."""
    from sparse_coding.sae.cpu_kernels import steps

    steps(*_zeros())


def kernels_missing_in() -> Path | None:
    """The folder where compiled kernels are kept, if it can be written and they are not there."""
    from numba import typeof

    from sparse_coding.sae.cpu_kernels import steps

    folder, types = steps.stats.cache_path, tuple(map(typeof, _zeros()))
    if folder is None or steps._cache.load_overload(types, steps.targetctx) is not None:
        return None
    return Path(folder)


def _zeros() -> tuple:
    """A smallest autoencoder and batch, as `steps` takes them."""
    from sparse_coding.sae.cpu_kernels import ALL
    from sparse_coding.sae.row_kernels import Sae

    W, b, none = np.zeros((8, 8), np.float32), np.zeros(8, np.float32), np.zeros(0, np.float32)
    idle, one = np.zeros(8, np.int32), np.zeros(1, np.float32)
    sae = Sae(W, b, W, none, W, W, b, b, W, W, none, none, idle, one, one)
    scratch, x = Scratch(8, 8, 8, density=DENSITY), np.zeros((1, 8, 8), np.float32)
    return sae, scratch.work(8), scratch.gradients, x, np.zeros((1, 6), np.float32), ALL, (0, 1)


@contextlib.contextmanager
def _said_if_slow(message: str) -> Iterator[None]:
    timer = threading.Timer(SAID_AFTER, print, [message], {"flush": True})
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def work_shapes(n_dict: int, batch: int, h: int, *, density: float) -> dict[str, tuple]:
    """(shape, dtype) of each field of Work."""
    from sparse_coding.sae.cpu_kernels import TILE

    f32, i32 = torch.float32, torch.int32
    sample = torch.uint16 if batch < 2**16 else i32
    most = int(max(density, 0) * n_dict * batch)
    return {
        "codes": ((n_dict, batch), f32),
        "where": ((n_dict, batch), sample),
        "count": ((n_dict,), i32),
        "listed": ((n_dict,), torch.bool),
        "sparse": ((1,), torch.bool),
        "g": ((batch, h), f32),
        "off": ((-(-n_dict // TILE), h), f32),
        "start": ((batch + 2,), torch.int64),
        "feature": ((most,), i32),
        "value": ((most,), f32),
    }


def gradient_shapes(batch: int, h: int) -> list[tuple]:
    """Shape of each field of Gradients."""
    from sparse_coding.sae.cpu_kernels import TILE

    return [(TILE, batch), (TILE,), (TILE, h), (TILE, h)]


class Scratch:
    """Work and Gradients of a thread, for dictionaries of up to n_dict features."""

    def __init__(self, n_dict: int, batch: int, h: int, *, density: float):
        from sparse_coding.sae import cpu_kernels

        self.kernels, self.batch, self.h, self.density = cpu_kernels, batch, h, density
        self.n_dict = n_dict
        self.flat: dict[str, Tensor] = {}
        self.gradients = cpu_kernels.Gradients(
            *(torch.empty(shape).numpy() for shape in gradient_shapes(batch, h))
        )
        self.of_size: dict[int, object] = {}

    @property
    def n_bytes(self) -> int:
        flat = sum(t.numel() * t.element_size() for t in self.flat.values())
        return flat + sum(array.nbytes for array in self.gradients)

    def work(self, n_dict: int) -> object:
        """The Work of a dictionary of that size; valid until the next one's."""
        if not self.flat:
            # torch's memory begins at multiples of 64 bytes, as fast vector loads want it
            largest = work_shapes(self.n_dict, self.batch, self.h, density=self.density)
            self.flat = {k: torch.empty(math.prod(s), dtype=t) for k, (s, t) in largest.items()}
        if n_dict not in self.of_size:
            shapes = work_shapes(n_dict, self.batch, self.h, density=self.density)
            self.of_size[n_dict] = self.kernels.Work(
                *(self.flat[k][: math.prod(s)].view(s).numpy() for k, (s, _) in shapes.items())
            )
        return self.of_size[n_dict]
