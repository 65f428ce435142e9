"""Speed of run.py's two halves on this machine: the harvest, and the sweep on what was harvested.

Harvest: tokens/s of writing a store, against the bare forward pass that stops at the site, on the
same tokens in the same batches. Sweep: SAE-steps/s of all cells on one read of the data, against
the cells one after another, each with its own read, by the same engine and by a plain autograd
loop (fused Adam, unit rows, no gradient projection). Medians over interleaved repeats.

    python benchmarks/activation_speed.py                        the demo: 90 s on two cores
    python benchmarks/activation_speed.py --model ID --dataset ID --layer 6
"""

import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import run
from sparse_coding.config import parse_flags, pick, run_as_script
from sparse_coding.lm.activations import Harvester, open_store
from sparse_coding.lm.model import activations
from sparse_coding.lm.recipe import Grid, LanguageRecipe
from sparse_coding.sae.batches import prefetched, step_ranges
from sparse_coding.sae.spec import initial_autoencoder
from sparse_coding.sweep.grid import Cell
from sparse_coding.sweep.hardware import describe, pick_device, set_precision
from sparse_coding.sweep.training import Task


@dataclass(frozen=True)
class Config:
    model: str = "demo"
    dataset: str = "stdlib"
    layer: int = 1
    context_length: int = 128
    n_tokens: int = 200_000  # harvested in each repeat
    n_steps: int = 30  # of each cell in each repeat
    n_repeats: int = 5  # interleaved; the median is printed


class PlainSAE(torch.nn.Module):
    """A single autoencoder in autograd, as most people would write it."""

    def __init__(self, width: int, cell: Cell):
        super().__init__()
        for name, tensor in initial_autoencoder(width, cell.n_dict, 0, tied=True).items():
            setattr(self, name, torch.nn.Parameter(tensor))
        self.b_dec = torch.nn.Parameter(torch.zeros(width))
        self.l1 = cell.l1_alpha
        self.adam = torch.optim.Adam(self.parameters(), lr=1e-3, fused=True)

    def step_(self, x: torch.Tensor) -> None:
        codes = torch.relu((x - self.b_dec) @ self.W_enc.T + self.b_enc)
        x_hat = codes @ self.W_dec + self.b_dec
        loss = (x - x_hat).square().mean() + self.l1 * codes.sum(dim=1).mean()
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        with torch.no_grad():
            self.W_dec.copy_(torch.nn.functional.normalize(self.W_dec, dim=1))


def seconds(work: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def bare_forward(harvester: Harvester) -> None:
    """The same rows of text in the same batches, activations thrown away."""
    for k in range(len(harvester.rows)):
        start, stop = harvester.span(k)
        for first in range(start, stop, harvester.lm_batch_size):
            ids = harvester.text.rows(first, min(first + harvester.lm_batch_size, stop))
            activations(harvester.lm, harvester.site, torch.from_numpy(ids))


def harvest(harvester: Harvester) -> None:
    with tempfile.TemporaryDirectory() as folder:
        open_store(Path(folder), harvester, metadata={})


def train(recipe: LanguageRecipe, groups: list[list[Cell]], n_steps: int) -> float:
    """Seconds of n_steps of every group, one group after the other, with its own reader."""
    total = 0.0
    for group in groups:
        task = recipe.prepare(group)
        task.ensemble.step_(task.batch_at(0))  # loads the first rows
        total += seconds(lambda t=task: train_ahead(t, n_steps))
        task.close()
    return total


def train_ahead(task: Task, n_steps: int) -> None:
    """Steps 1 to n_steps, as the training loop takes them."""
    length = task.ensemble.engine.steps_at_a_time
    steps = step_ranges(1, n_steps + 1, length=length, stop_every=n_steps + 1)
    for _, xs in prefetched(task.batch_at, steps):
        task.ensemble.steps_(xs)


def train_plain(recipe: LanguageRecipe, cells: list[Cell], n_steps: int) -> float:
    total = 0.0
    for cell in cells:
        task, plain = recipe.prepare([cell]), PlainSAE(recipe.width, cell).to(recipe.device)
        plain.step_(task.batch_at(0))
        total += seconds(
            lambda t=task, p=plain: [p.step_(t.batch_at(i)) for i in range(1, n_steps)]
        )
        task.close()
    return total * n_steps / (n_steps - 1)


def line(name: str, times: list[float], reference: list[float], work: float, unit: str) -> None:
    """Median rate, and median and range of the ratio to the reference, pair by pair."""
    ratios = [r / t for t, r in zip(times, reference, strict=True)]
    print(
        f"{name:46} {work / statistics.median(times):>10,.0f} {unit}   ratio "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    )


def compare_harvest(harvester: Harvester, n_repeats: int) -> None:
    harvest(harvester)  # warm
    bare, stored = [], []
    for _ in range(n_repeats):
        bare.append(seconds(lambda: bare_forward(harvester)))
        stored.append(seconds(lambda: harvest(harvester)))
    length = harvester.text.context_length
    n_tokens = sum(harvester.rows) * length / (length - 1)  # position 0 is read, but not stored
    line("bare forward pass, stopped at the site", bare, bare, n_tokens, "tokens/s")
    line("harvest to disk", stored, bare, n_tokens, "tokens/s")


def compare_training(recipe: LanguageRecipe, cells: list[Cell], cfg: Config) -> None:
    plain, alone, together = [], [], []
    for _ in range(cfg.n_repeats):
        plain.append(train_plain(recipe, cells, cfg.n_steps))
        alone.append(train(recipe, [[cell] for cell in cells], cfg.n_steps))
        together.append(train(recipe, [cells], cfg.n_steps))
    n_steps, unit = cfg.n_steps * len(cells), "SAE-steps/s"
    line(f"{len(cells)} cells one after another, plain autograd", plain, plain, n_steps, unit)
    line(f"{len(cells)} cells one after another, this engine", alone, plain, n_steps, unit)
    line(f"{len(cells)} cells together", together, plain, n_steps, unit)


def main(argv: list[str]) -> int:
    cfg = parse_flags(Config(), argv, description=__doc__.split("\n\n")[0])
    device = pick_device("auto")
    precision = set_precision("auto", device)
    of_run = {field.name for field in dataclasses.fields(run.Config)}
    shared = {k: v for k, v in dataclasses.asdict(cfg).items() if k in of_run}
    with tempfile.TemporaryDirectory() as folder:
        options = run.PRESETS["demo"] | shared | {"activations_dir": f"{folder}/activations"}
        settings = run.Config(**options)
        target, recipe = run.open_target_of(settings, device)
        print(f"{describe(device)}, {precision}, torch {torch.__version__}")
        compare_harvest(recipe.chunks, cfg.n_repeats)
        store = open_store(Path(folder) / "store", recipe.chunks, metadata={})
        recipe = dataclasses.replace(recipe, chunks=store)
        compare_training(recipe, pick(Grid, settings).cells(target.site.width), cfg)
    return 0


if __name__ == "__main__":
    run_as_script(main)
