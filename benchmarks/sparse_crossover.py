"""From which share of codes above 0 on is a dense step faster than a sparse one?

For each n_dict and share, one autoencoder per thread at h = 256, batch 256, its weights held (lr 0)
and its biases set so that this share of the codes is above 0: microseconds of a core (other work on
the machine counts little) for a step with only sparse and with only dense kernels, and as it
chooses by itself (cpu.DENSITY), interleaved, medians. The last column, how much longer than a
dense step that takes, must stay below 1.05.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/sparse_crossover.py

Two minutes on two cores with --sizes 64 512 2048.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from sparse_coding.config import parse_flags, run_as_script
from sparse_coding.sae.engines.cpu import DENSITY, CpuEngine
from sparse_coding.sae.ensemble import Ensemble
from sparse_coding.sae.spec import SAESpec
from sparse_coding.sweep.hardware import describe, set_precision

H, BATCH, N_STEPS = 256, 256, 4
CPU = torch.device("cpu")
SHARES = (0.0, 0.001, 0.01, 0.03, 0.1, 0.2, 0.3, 0.34, 0.36, 0.4, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Config:
    sizes: tuple[int, ...] = (64, 512, 2048, 16384)  # n_dict
    n_repeats: int = 7  # interleaved
    n_steps: int = 0  # of each repeat; 0: some 0.1 s


def with_share_(ensemble: Ensemble, x: Tensor, share: float) -> None:
    """Sets the biases so that this share of the codes of x is above 0."""
    (stack,) = ensemble.stacks
    for i in range(len(stack.specs)):
        pre = (x @ stack.W_enc[i].T).flatten()
        some = pre[:: max(1, len(pre) // 10**6)]
        stack.b_enc[i] = -some.quantile(1 - share) - (1.0 if share == 0 else 0.0)


def seconds(ensemble: Ensemble, engine: CpuEngine, xs: Tensor, n: int) -> float:
    """Of a core, per step of one autoencoder."""
    ensemble.engine = engine
    start = time.process_time()
    for _ in range(n):
        ensemble.steps_(xs)
    return (time.process_time() - start) / (n * len(xs) * len(ensemble.specs))


def main(argv: list[str]) -> int:
    cfg = parse_flags(Config(), argv, description=__doc__.split("\n\n")[0])
    set_precision("float32", CPU)
    n_threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {describe(CPU)}, sparse up to {DENSITY:.0%}")
    print("n_dict  share    sparse     dense      auto   auto / the better   auto / dense")
    x = torch.randn(BATCH, H, generator=torch.Generator().manual_seed(0))
    xs = x.expand(N_STEPS, -1, -1).contiguous()
    for n_dict in cfg.sizes:
        specs = [SAESpec(n_dict, 1e-3, seed) for seed in range(n_threads)]
        ensemble = Ensemble(specs, H, lr=0.0, device=CPU)
        engines = [
            CpuEngine(ensemble.stacks, n_threads=n_threads, density=density)
            for density in (1.0, -1.0, DENSITY)
        ]
        n = cfg.n_steps or max(1, round(2e4 / n_dict / N_STEPS))
        for share in SHARES:
            with_share_(ensemble, x, share)
            times = [
                [seconds(ensemble, engine, xs, n) for engine in engines]
                for _ in range(cfg.n_repeats + 1)
            ][1:]  # the first warms up
            sparse, dense, auto = (1e6 * statistics.median(t) for t in zip(*times, strict=True))
            to_dense = statistics.median(t[2] / t[1] for t in times)
            to_better = statistics.median(t[2] / min(t[:2]) for t in times)
            print(
                f"{n_dict:6d}  {share:5.1%}  {sparse:8.0f}  {dense:8.0f}  {auto:8.0f}   "
                f"{to_better:17.2f}   {to_dense:12.2f}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    run_as_script(main)
