"""Compiled kernels of the CPU: what they need, and where they come from.

They need numba, and a torch built with MKL, whose sgemm they call: has_kernels() says so if one is
missing.
"""

import contextlib
import ctypes
import functools
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from sparse_coding.config import first_line
from sparse_coding.files import held

SAID_AFTER = 6.0  # seconds; loading them takes two
BF16_GEMM = "gemm_bf16bf16f32_"  # of MKL: factors in bf16, sums in float32
ONE_THREAD = ("omp_set_num_threads", "MKL_Set_Num_Threads_Local")  # functions of libtorch


@functools.cache
def libtorch() -> ctypes.CDLL:
    """torch's own library, whose sgemm the kernels call."""
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

        from sparse_coding.sae.engines import cpu_blas

        needed = ("sgemm_", *ONE_THREAD)
        missing = [name for name in needed if not hasattr(libtorch(), name)]
    except (ImportError, OSError) as error:
        missing = [str(error)]
    if missing:
        _say_slow(", ".join(missing))
        return False
    for name, symbol in ((BF16_GEMM, cpu_blas.BF16_SYMBOL), ("sgemm_", cpu_blas.GEMM_SYMBOL)):
        # a library without the first one gives its name to the other, and nothing calls it
        function = getattr(libtorch(), name, libtorch().sgemm_)
        llvmlite.binding.add_symbol(symbol, ctypes.cast(function, ctypes.c_void_p).value)
    return True


def _say_slow(reason: str) -> None:
    print(f"no compiled kernels, so a CPU trains several times slower: {reason}", flush=True)


@contextlib.contextmanager
def _said_if_slow(message: str) -> Iterator[None]:
    timer = threading.Timer(SAID_AFTER, print, [message], {"flush": True})
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def compiles(smallest: Callable[[], tuple], what: str) -> bool:
    """Whether a kernel compiles, or was compiled before and loads. Says so, if it takes long or
    fails.

    Another process compiles, and this one loads: after compiling, a process goes on with the inner
    kernels as they were compiled alone, which round otherwise than those within what is kept, so a
    first run would differ from a second in the last bits.

    Args:
        smallest: a function of a module, by whose name another process finds it; gives a kernel
            that Python calls, and arguments that make it work as little as possible
        what: is compiled, in words
    """
    from numba.core.errors import NumbaError

    try:
        with _said_if_slow(f"compiling {what}"):
            folder = missing_in(smallest)
            if folder:
                with held(folder / "lock"):  # of several processes one compiles
                    if missing_in(smallest):
                        _compile_elsewhere(smallest)
            kernel, arguments = smallest()
            kernel(*arguments)
    except NumbaError as error:
        _say_slow(first_line(error))
        return False
    return True


def _compile_elsewhere(smallest: Callable[[], tuple]) -> None:
    """In a process of its own; what fails there fails here too, and is said then."""
    code = (
        f"from {__name__} import has_kernels; "
        f"from {smallest.__module__} import {smallest.__name__} as smallest; "
        "has_kernels(); kernel, arguments = smallest(); kernel(*arguments)"
    )
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    command, root = [sys.executable, "-c", code], Path(__file__).parents[3]
    subprocess.run(command, cwd=root, **streams, start_new_session=True, check=False)


def missing_in(smallest: Callable[[], tuple]) -> Path | None:
    """The folder where the compiled kernel is kept, if it can be written and it is not there."""
    from numba import typeof

    kernel, arguments = smallest()
    folder, types = kernel.stats.cache_path, tuple(map(typeof, arguments))
    if folder is None or kernel._cache.load_overload(types, kernel.targetctx) is not None:
        return None
    return Path(folder)
