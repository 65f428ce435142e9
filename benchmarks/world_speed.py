"""Samples of SynthSAEBench's worlds per second, against SAELens, which defines them.

One interleaved run, both on as many threads as torch has, batches of 1 024: x, which is what an
autoencoder trains on. The worlds have the published constants, but their features are not made
orthogonal, which takes minutes and changes no time of a sample.

    make .venv-peers/installed
    .venv-peers/bin/python benchmarks/world_speed.py --output results/DATE_world_speed.txt

SAELens is left out if it isn't installed. Two minutes; run it alone on a quiet machine.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peers import world_of_sae_lens

sys.path.insert(0, str(Path(__file__).parent.parent))
from sparse_coding.config import parse_flags, run_as_script
from sparse_coding.files import write_atomic
from sparse_coding.sweep.hardware import describe
from sparse_coding.toy.synth_stream import SynthStream
from sparse_coding.toy.synth_world import FEATURES_PER_ROOT, make_synth_world

CPU = torch.device("cpu")
WIDTHS = {1024: 96, 16384: 768}
BATCH = 1024
Draw = Callable[[int], None]


@dataclass(frozen=True)
class Config:
    sizes: tuple[int, ...] = tuple(WIDTHS)
    n_repeats: int = 7  # interleaved
    seconds: float = 2.0  # of each repeat
    peers: bool = True
    output: str = ""  # a text file of what is printed


def ours(n: int) -> Draw:
    world = make_synth_world(n, WIDTHS[n], 42, n_steps=0)
    return SynthStream(world, batch_size=BATCH, batch_seed=0, device=CPU).batch


def sae_lens(n: int) -> Draw | None:
    try:
        model = world_of_sae_lens(n, WIDTHS[n], n // FEATURES_PER_ROOT)
    except ImportError:
        return None
    return lambda step: model.feature_dict(model.activation_generator.sample(BATCH))


def rate(draw: Draw, seconds: float) -> float:
    """Samples per second."""
    start, n = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < seconds:
        draw(n)
        n += 1
    return n * BATCH / passed


@torch.no_grad()
def main(argv: list[str]) -> int:
    cfg = parse_flags(Config(), argv, description=__doc__.split("\n\n")[0])
    lines = [f"torch {torch.__version__}, {describe(CPU)}, {cfg}"]
    for n in cfg.sizes:
        draws = {"ours": ours(n), "sae_lens": sae_lens(n) if cfg.peers else None}
        draws = {who: draw for who, draw in draws.items() if draw}
        rates: dict[str, list[float]] = {who: [] for who in draws}
        for repeat in range(1 + cfg.n_repeats):
            for who, draw in draws.items():
                found = rate(draw, cfg.seconds)
                if repeat:  # the first one warms up
                    rates[who].append(found)
        median = {who: statistics.median(found) for who, found in rates.items()}
        for who, found in rates.items():
            times = f"; {median['ours'] / median[who]:.1f} times" if who != "ours" else ""
            lines.append(
                f"{n:6} features  {who:9} {median[who]:11,.0f} samples/s "
                f"({min(found):,.0f}-{max(found):,.0f}){times}"
            )
    text = "\n".join(lines)
    print(text)
    if cfg.output:
        write_atomic(Path(cfg.output), text + "\n")
    return 0


if __name__ == "__main__":
    run_as_script(main)
