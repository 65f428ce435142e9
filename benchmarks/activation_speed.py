"""Speed of run.py's two halves on this machine: the harvest, and the sweep on what was harvested.

Harvest: tokens/s of writing a store and of filling memory, against the bare forward pass that stops
at the site, on the same tokens in the same batches and in others, and against the disk alone.
Sweep: SAE-steps/s of all cells on one read of the data, against the cells one after another, each
with its own read, by the same engine and by a plain autograd loop (fused Adam, unit rows, no
gradient projection). Medians over interleaved repeats.

    python benchmarks/activation_speed.py                        the demo: 2 min on two cores
    python benchmarks/activation_speed.py --model smollm2-135m --device cuda --n-tokens 2000000
    python benchmarks/activation_speed.py --model ID --dataset ID --layer 6
"""

import dataclasses
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import run
from sparse_coding.config import parse_flags, run_as_script
from sparse_coding.files import written_whole
from sparse_coding.lm.activations.harvest import THREADS, Harvester, sent
from sparse_coding.lm.activations.places import InMemory
from sparse_coding.lm.activations.store import open_store
from sparse_coding.lm.model import activations
from sparse_coding.lm.recipe import LanguageRecipe
from sparse_coding.lm.target import DEMO_MODEL
from sparse_coding.sae.batches import ahead_on, step_ranges
from sparse_coding.sae.spec import initial_autoencoder
from sparse_coding.sweep.grid import Cell
from sparse_coding.sweep.hardware import describe, pick_device, set_precision
from sparse_coding.sweep.training import Task

# Models of these shapes are made with random weights and the demo's tokenizer; sizes by the
# config.json of EleutherAI/pythia-70m and of HuggingFaceTB/SmolLM2-135M.
SHAPES = {
    "pythia-70m": ("gpt_neox", dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=6,
                                    num_attention_heads=8, vocab_size=50_304)),
    "smollm2-135m": ("llama", dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                                   num_attention_heads=9, num_key_value_heads=3,
                                   vocab_size=49_152, tie_word_embeddings=True)),
    "tiny": ("llama", dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, vocab_size=2048)),
}  # fmt: skip
BATCH_SIZES = {"cpu": (8, 16, 32), "cuda": (16, 64, 256, 512)}


@dataclass(frozen=True)
class Config:
    model: str = "demo"  # demo, as run.py's --model, or a shape with random weights: see SHAPES
    dataset: str = "stdlib"
    layer: int | None = None  # the middle one
    context_length: int | None = None  # of the demo 128, else 256
    n_tokens: int = 200_000  # harvested in each repeat, fewer where --seconds would not do
    lm_batch_size: int = 0  # of the harvest, as in run.py
    batch_sizes: tuple[int, ...] = ()  # of the bare forward pass; default: see BATCH_SIZES
    n_steps: int = 30  # of each cell in each repeat
    n_repeats: int = 5  # interleaved, fewer where --seconds are over; the median is printed
    seconds: float = 120.0  # for each half, about
    training: bool = True  # the sweep, too
    device: str = "auto"
    folder: str = ""  # on the disk to be measured; default: the system's for temporary files


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
    for k in range(0, len(harvester.rows), harvester.chunks_at_once):
        stretch = harvester.span(k, harvester.chunks_at_once)
        for ids, _ in harvester.text.batches(*stretch, size=harvester.lm_batch_size):
            activations(harvester.lm, harvester.site, sent(ids, harvester.lm.device))


def harvest(harvester: Harvester, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as new:
        open_store(Path(new), harvester, metadata={})


def write_only(harvester: Harvester, folder: Path, content: memoryview) -> None:
    """As many bytes as a store has, in files of the same sizes, each synced, by as many threads."""
    width = harvester.site.width * harvester.store_dtype.itemsize
    n_threads = THREADS[harvester.lm.device.type]
    with tempfile.TemporaryDirectory(dir=folder) as new, ThreadPoolExecutor(n_threads) as pool:

        def write(k: int) -> None:
            with written_whole(Path(new) / f"{k}") as path:
                path.write_bytes(content[: harvester.rows[k] * width])

        list(pool.map(write, range(len(harvester.rows))))


def train(recipe: LanguageRecipe, groups: list[list[Cell]], n_steps: int) -> float:
    """Seconds of n_steps of every group, one group after the other, with its own reader."""
    total = 0.0
    for group in groups:
        task = recipe.prepare(group)
        task.ensemble.step_(task.batch_at(0))  # loads the first rows
        total += seconds(lambda t=task: train_ahead(t, n_steps, recipe.device))
        task.close()
    return total


def train_ahead(task: Task, n_steps: int, device: torch.device) -> None:
    """Steps 1 to n_steps, as the training loop takes them."""
    length = task.ensemble.engine.steps_at_a_time
    steps = step_ranges(1, n_steps + 1, length=length, stop_every=n_steps + 1)
    for _, xs in ahead_on(device)(task.batch_at, steps):
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


def repeated(works: dict[str, Callable[[], float]], n: int, limit: float) -> dict[str, list[float]]:
    """Seconds that each says it took, n times in turn, fewer (but once) when the limit is over."""
    found: dict[str, list[float]] = {name: [] for name in works}
    end = time.monotonic() + limit
    for i in range(n):
        if i and time.monotonic() > end:
            print(f"{i} of {n} repeats in {limit:g} s")
            break
        for name, work in works.items():
            found[name].append(work())
    return found


def line(
    name: str, times: list[float], references: list[list[float]], amount: float, unit: str
) -> None:
    """Median rate; median and range of the ratio to each reference, pair by pair."""
    shown = f"{name:46} {amount / statistics.median(times):>10,.0f} {unit}   ratio "
    ratios = [[r / t for t, r in zip(times, of, strict=True)] for of in references]
    each = [f"{statistics.median(r):.2f} ({min(r):.2f}-{max(r):.2f})" for r in ratios]
    print(shown + ", ".join(each), flush=True)


def with_batches(harvester: Harvester, n: int) -> Harvester:
    """n rows of text per forward pass, of several chunks if need be."""
    at_once = max(1, n // harvester.texts_per_chunk)
    return dataclasses.replace(harvester, lm_batch_size=n, chunks_at_once=at_once)


def shortened(harvester: Harvester, cfg: Config, n_works: int) -> Harvester:
    """Of as many tokens as the time is enough for, by a first look at the forward pass."""
    one = dataclasses.replace(harvester, n_tokens=1)
    bare_forward(one)  # warm
    rate = one.rows[0] * one.chunks_at_once / seconds(lambda: bare_forward(one))
    enough = int(rate * cfg.seconds / (n_works * cfg.n_repeats))
    return dataclasses.replace(harvester, n_tokens=max(1, min(cfg.n_tokens, enough)))


def compare_harvest(harvester: Harvester, cfg: Config, folder: Path) -> Harvester:
    """Prints the harvest's half; the harvester, of as many tokens as there was time for."""
    device, n = harvester.lm.device, harvester.lm_batch_size
    sizes = sorted({n, *(cfg.batch_sizes or BATCH_SIZES[device.type])})
    harvester = shortened(harvester, cfg, len(sizes) + 3)
    bare = {size: f"bare forward pass, {size} rows of text" for size in sizes}
    # what the harvest does itself stands for its own number of rows
    passes = {s: harvester if s == n else with_batches(harvester, s) for s in sizes}
    alone, disk = "the disk alone, files synced", f"harvest to disk, {n} rows of text"
    memory = f"harvest into memory ({device.type}), {n} rows of text"
    works = {name: partial(bare_forward, passes[size]) for size, name in bare.items()}
    largest = max(harvester.rows) * harvester.n_bytes // sum(harvester.rows)
    content = memoryview(os.urandom(largest))  # no file system makes it smaller
    works |= {
        disk: lambda: harvest(harvester, folder),
        memory: lambda: InMemory(harvester, device),
        alone: partial(write_only, harvester, folder, content),
    }
    harvest(harvester, folder)  # warm
    timed = {name: partial(seconds, work) for name, work in works.items()}
    found = repeated(timed, cfg.n_repeats, cfg.seconds)
    length = harvester.text.context_length
    n_tokens = sum(harvester.rows) * length / (length - 1)  # position 0 is read, but not stored
    best = min((found[name] for name in bare.values()), key=statistics.median)
    own, rate = found[bare[n]], (n_tokens, "tokens/s")
    print(
        f"{sum(harvester.rows):,} activations, {harvester.n_bytes / 1e6:,.0f} MB. Ratios are to "
        "the fastest bare pass;\nof a harvest also to that of as many rows, to disk, to the disk"
    )
    for name in bare.values():
        line(name, found[name], [best], *rate)
    line(disk, found[disk], [best, own, found[alone]], *rate)
    line(memory, found[memory], [best, own], *rate)
    line(alone, found[alone], [best], *rate)
    print(f"{'':46} {harvester.n_bytes / 1e6 / statistics.median(found[alone]):>10,.0f} MB/s")
    return harvester


def compare_training(recipe: LanguageRecipe, cells: list[Cell], cfg: Config) -> None:
    n_steps, unit = cfg.n_steps * len(cells), "SAE-steps/s"
    works = {
        f"{len(cells)} cells one after another, plain autograd": (train_plain, cells),
        f"{len(cells)} cells one after another, this engine": (train, [[cell] for cell in cells]),
        f"{len(cells)} cells together": (train, [cells]),
    }
    timed = {name: partial(f, recipe, of, cfg.n_steps) for name, (f, of) in works.items()}
    found = repeated(timed, cfg.n_repeats, cfg.seconds)
    plain = next(iter(found.values()))
    for name, times in found.items():
        line(name, times, [plain], n_steps, unit)


def random_model(shape: str, folder: Path) -> str:
    """A model of the shape with random weights, in a folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, sizes = SHAPES[shape]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, max_position_embeddings=2048, **sizes)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, folder)
    return str(folder)


def settings_of(cfg: Config, folder: Path) -> run.Config:
    """Those of run.py: the demo's constants where no flag says otherwise, relu's grid alone."""
    of_run = {field.name for field in dataclasses.fields(run.Config)}
    given = {k: v for k, v in dataclasses.asdict(cfg).items() if k in of_run and v is not None}
    preset = dict(run.PRESETS["demo"])
    if cfg.model != "demo":
        del preset["layer"], preset["context_length"]
    if cfg.model in SHAPES:
        given["model"] = random_model(cfg.model, folder / "model")
    given |= {"activations_dir": str(folder / "activations"), "arch": ("relu",)}
    return run.Config(**preset | given)


def main(argv: list[str]) -> int:
    cfg = parse_flags(Config(), argv, description=__doc__.split("\n\n")[0])
    device = pick_device(cfg.device)
    precision = set_precision("auto", device)
    with tempfile.TemporaryDirectory(dir=cfg.folder or None) as name:
        folder = Path(name)
        settings = settings_of(cfg, folder)
        target, recipe = run.open_target_of(settings, device)
        print(f"{describe(device)}, {precision}, torch {torch.__version__}")
        harvester = compare_harvest(recipe.chunks, cfg, folder)
        if cfg.training:
            store = open_store(folder / "store", harvester, metadata={})
            recipe = dataclasses.replace(recipe, chunks=store)
            compare_training(recipe, run.grid_of(settings).cells(target.site.width), cfg)
    return 0


if __name__ == "__main__":
    run_as_script(main)
