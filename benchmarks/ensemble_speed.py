"""Speed of the dense engine of torch against a plain single-autoencoder loop, on this machine.

Prints SAE-steps/s of both, their ratio and the fraction of this machine's measured sgemm peak, for
17 values of l1_alpha at h = 256, batch 256, data excluded: medians over interleaved repeats. The
compiled kernels that a CPU really trains with are in toy_speed.py.

    python benchmarks/ensemble_speed.py --n-threads 2

Half a minute on two cores. Run it alone on a quiet machine.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from sparse_coding.config import parse_flags, run_as_script
from sparse_coding.ensemble import Ensemble
from sparse_coding.members import Member, initial_autoencoder
from sparse_coding.stack import DenseEngine

H, BATCH = 256, 256
L1_ALPHAS = [10 ** (e / 4) for e in range(-8, 9)]
FLOP_PER_FEATURE = 10 * BATCH * H  # five GEMMs of 2 · batch · h per feature and step


@dataclass(frozen=True)
class Config:
    n_threads: int = 2  # of torch
    n_repeats: int = 7  # interleaved; the median is printed
    seconds: float = 0.7  # of each repeat


class PlainSAE(torch.nn.Module):
    """What most people would write: autograd, torch.optim.Adam with its defaults."""

    def __init__(self, n_dict: int, l1: float):
        super().__init__()
        for name, tensor in initial_autoencoder(H, n_dict, 0).items():
            setattr(self, name, torch.nn.Parameter(tensor))
        self.l1 = l1
        self.adam = torch.optim.Adam(self.parameters(), lr=1e-3)

    def step_(self, x: torch.Tensor) -> None:
        codes = torch.relu(torch.nn.functional.linear(x, self.W_enc, self.b_enc))
        x_hat = codes @ self.W_dec
        loss = (x - x_hat).square().mean() + self.l1 * codes.sum(dim=1).mean()
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        with torch.no_grad():
            self.W_dec.copy_(torch.nn.functional.normalize(self.W_dec, dim=1))


def rate(step: Callable[[], None], seconds: float) -> float:
    """Calls per second."""
    step()
    n, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        step()
        n += 1
    return n / (time.perf_counter() - start)


def sgemm_peak(seconds: float) -> float:
    """FLOP/s of the best square GEMM."""
    found = []
    for size in (512, 1024, 2048):
        a, b, out = (torch.randn(size, size) for _ in range(3))
        gemm = lambda a=a, b=b, out=out: torch.mm(a, b, out=out)  # noqa: E731
        found.append(2 * size**3 * rate(gemm, seconds))
    return max(found)


def main(argv: list[str]) -> int:
    cfg = parse_flags(Config(), argv, description=__doc__.split("\n\n")[0])
    torch.set_num_threads(cfg.n_threads)
    peak = max(sgemm_peak(cfg.seconds / 3) for _ in range(3))
    print(
        f"torch {torch.__version__}, {cfg.n_threads} threads, sgemm peak {peak / 1e9:.0f} GFLOP/s"
    )
    print("n_dict  ensemble  plain loop  ratio (min-max)   of sgemm peak   [SAE-steps/s, medians]")
    x = torch.randn(BATCH, H)
    for n_dict in (64, 512, 2048):
        members = [Member(n_dict, alpha / n_dict, seed) for seed, alpha in enumerate(L1_ALPHAS)]
        ensemble = Ensemble(members, H, lr=1e-3, device=torch.device("cpu"))
        ensemble.engine = DenseEngine(ensemble.stacks)
        plain = PlainSAE(n_dict, members[8].l1)
        ours, theirs = [], []
        for _ in range(cfg.n_repeats):
            ours.append(len(members) * rate(lambda e=ensemble: e.step_(x), cfg.seconds))
            theirs.append(rate(lambda p=plain: p.step_(x), cfg.seconds))
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        median = statistics.median(ours)
        print(
            f"{n_dict:6d}  {median:8,.0f}  {statistics.median(theirs):10,.0f}  "
            f"{statistics.median(ratios):5.2f} ({min(ratios):.2f}-{max(ratios):.2f})  "
            f"{median * FLOP_PER_FEATURE * n_dict / peak:14.0%}"
        )
    return 0


if __name__ == "__main__":
    run_as_script(main)
