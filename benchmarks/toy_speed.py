"""Speed of toy training: ours against the loop of June 2023, dictionary_learning and SAELens.

Part 1, SAE-steps/s, medians and ranges over interleaved repeats: the others train one autoencoder
of a middling l1_alpha; ours a row of the figure (17 l1_alphas) at its start, after --warm-steps,
and with every step dense. All on the same batches, made beforehand. Part 2, a row of the figure at
full length, our data generation included, against the time that the best of the others needs for as
many steps, extrapolated, its data given for free.

    make .venv-peers/installed
    .venv-peers/bin/python benchmarks/toy_speed.py --output-dir results/DATE_toy_speed

Whoever isn't installed is left out. 35 minutes on two cores; --row-sizes leaves out part 2. Run it
alone on a quiet machine. The others are faster with spinning threads (OMP_WAIT_POLICY unset) on a
quiet machine; what ours gets does not depend on it.
"""

import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from sparse_coding.batches import chunks, prefetched
from sparse_coding.config import parse_flags, run_as_script
from sparse_coding.cpu_engine import CpuEngine
from sparse_coding.ensemble import Ensemble
from sparse_coding.files import write_csv
from sparse_coding.hardware import describe, set_precision
from sparse_coding.sweep import make_grid
from sparse_coding.toy_cells import ToyRecipe
from sparse_coding.toy_data import ToyData
from sparse_coding.training import Task

H, BATCH = 256, 256
CPU = torch.device("cpu")
DATA = ToyData("post", H, 512, n_active=5, feature_prob_decay=0.99, noise_std=0.0, batch_size=BATCH)
MIDDLE = 10**-1.0  # l1_alpha of the others; what they do does not depend on how sparse it gets


@dataclass(frozen=True)
class Config:
    output_dir: str = "outputs/toy_speed"
    sizes: tuple[int, ...] = (64, 512, 2048)  # n_dict
    row_sizes: tuple[int, ...] = (512, 2048)  # n_dict of full-length rows
    n_steps: int = 20_000  # of a full-length row
    warm_steps: int = 3000  # of ours before the second measurement
    n_repeats: int = 5  # interleaved
    seconds: float = 2.0  # of each repeat


class Loop2023(nn.Module):
    """Per batch what the replication of June 2023 does: unit columns before the forward pass, an
    unfused Adam, two losses fetched as numbers."""

    def __init__(self, n_dict: int):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(H, n_dict), nn.ReLU())
        self.decode = nn.Linear(n_dict, H, bias=False)
        nn.init.orthogonal_(self.decode.weight)
        self.adam = torch.optim.Adam(self.parameters(), lr=1e-3)
        self.seen = 0.0

    def step_(self, x: Tensor) -> None:
        codes = self.encode(x)
        self.decode.weight.data = nn.functional.normalize(self.decode.weight.data, dim=0)
        mse = nn.functional.mse_loss(self.decode(codes), x)
        l1 = MIDDLE / codes.shape[1] * codes.abs().sum(dim=1).mean()
        self.adam.zero_grad()
        (mse + l1).backward()
        self.adam.step()
        self.seen += mse.item() + l1.item()


def loop_2023(n_dict: int, xs: Iterator[Tensor]) -> Callable[[int], None]:
    loop = Loop2023(n_dict)
    return lambda n: [loop.step_(next(xs)) for _ in range(n)]


def dictionary_learning(n_dict: int, xs: Iterator[Tensor]) -> Callable[[int], None]:
    from dictionary_learning.trainers.standard import StandardTrainer

    trainer = StandardTrainer(
        steps=10**6, activation_dim=H, dict_size=n_dict, layer=0, lm_name="toy", device="cpu"
    )
    count = iter(range(10**6))
    return lambda n: [trainer.update(next(count), next(xs)) for _ in range(n)]


def sae_lens(n_dict: int, xs: Iterator[Tensor]) -> Callable[[int], None]:
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training import sae_trainer

    sae_trainer.tqdm = lambda *args, **options: _Quiet()
    sae = StandardTrainingSAE(
        StandardTrainingSAEConfig(d_in=H, d_sae=n_dict, l1_coefficient=MIDDLE)
    )

    def run(n: int) -> None:
        settings = SAETrainerConfig(
            total_training_samples=n * BATCH,
            train_batch_size_samples=BATCH,
            lr=1e-3,
            lr_end=1e-4,
            logger=LoggingConfig(log_to_wandb=False),
        )
        sae_trainer.SAETrainer(settings, sae, xs).fit()

    return run


class _Quiet:
    """A progress bar that shows nothing."""

    def __getattr__(self, name: str) -> Callable:
        return lambda *args, **options: None


OTHERS = {"loop of 2023": loop_2023, "dictionary_learning": dictionary_learning,
          "sae_lens": sae_lens}  # fmt: skip


def row_of(n_dict: int, n_steps: int) -> Task:
    """A row of the figure, ready to train, as replicate_toy_models.py has it."""
    recipe = ToyRecipe(DATA, "per_feature", 1e-3, n_steps, CPU)
    return recipe.prepare(
        make_grid(n_dict, seeds=range(1), l1_exps=range(-8, 9), size_exps=range(1))
    )


def trainer_of(ensemble: Ensemble, xs: Tensor) -> Callable[[int], None]:
    """Steps of all 17 autoencoders, some at a time, as the training loop takes them."""

    def run(n: int) -> None:
        for steps in chunks(0, n, length=ensemble.engine.steps_at_a_time, stop_every=n):
            ensemble.steps_(xs[steps.start % len(xs) :][: len(steps)])

    return run


def rate(run: Callable[[int], None], seconds: float) -> float:
    """Steps per second, in runs of 16 (the steps that we take at a time)."""
    n, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        run(16)
        n += 16
    return n / (time.perf_counter() - start)


def contestants(n_dict: int, warm_steps: int, found: list[str]) -> dict:
    """name -> (run n steps, autoencoders that it steps), all of them warm."""
    task = row_of(n_dict, warm_steps)
    xs = torch.stack([task.batch_at(step) for step in range(256)])
    start, dense = task.ensemble, row_of(n_dict, 1).ensemble
    dense.engine = CpuEngine(dense.stacks, n_threads=torch.get_num_threads(), density=-1)
    warm = row_of(n_dict, warm_steps)
    for _, batch in prefetched(
        warm.batch_at, chunks(0, warm_steps, length=16, stop_every=warm_steps)
    ):
        warm.ensemble.steps_(batch)
    run = {name: (OTHERS[name](n_dict, cycle(xs)), 1) for name in found}
    run |= {
        "ours, every step dense": (trainer_of(dense, xs), 17),
        "ours, at the start": (trainer_of(start, xs), 17),
        f"ours, after {warm_steps} steps": (trainer_of(warm.ensemble, xs), 17),
    }
    for steps, _ in run.values():
        steps(16)
    return run


def compare(n_dict: int, cfg: Config, found: list[str]) -> list[dict]:
    """A row per contestant: median, least and most SAE-steps/s."""
    run = contestants(n_dict, cfg.warm_steps, found)
    rates: dict[str, list[float]] = {name: [] for name in run}
    for _ in range(cfg.n_repeats):
        for name, (steps, n_saes) in run.items():
            rates[name].append(n_saes * rate(steps, cfg.seconds))
    best = max(statistics.median(rates[name]) for name in found)
    table = []
    for name, of_one in rates.items():
        median = statistics.median(of_one)
        line = {"n_dict": n_dict, "who": name, "sae_steps_per_s": round(median, 1)}
        line |= {"least": round(min(of_one), 1), "most": round(max(of_one), 1)}
        table.append(line | {"to_the_best_of_the_others": round(median / best, 2)})
        print(
            f"{n_dict:6d}  {name:26} {median:8,.0f}  ({min(of_one):,.0f}-{max(of_one):,.0f})"
            f"  {median / best:5.2f}",
            flush=True,
        )
    return table


def full_row(n_dict: int, cfg: Config, found: list[str]) -> dict:
    """Time of a row at full length, and of the others by extrapolation: measured five times, while
    ours is stopped."""
    task = row_of(n_dict, cfg.n_steps)
    xs = torch.stack([task.batch_at(step) for step in range(64)])
    others = {name: OTHERS[name](n_dict, cycle(xs)) for name in found}
    rates: dict[str, list[float]] = {name: [] for name in found}
    length, part = task.ensemble.engine.steps_at_a_time, -(-cfg.n_steps // 5)
    seconds, series = 0.0, []
    for first in range(0, cfg.n_steps, part):
        for name, steps in others.items():
            rates[name].append(rate(steps, cfg.seconds))
        start, last = time.perf_counter(), min(first + part, cfg.n_steps)
        for _, batch in prefetched(
            task.batch_at, chunks(first, last, length=length, stop_every=cfg.n_steps)
        ):
            task.ensemble.steps_(batch)
        took = time.perf_counter() - start
        seconds += took
        series.append({"step": last, "sae_steps_per_s": round(17 * (last - first) / took, 1)})
        print(f"{n_dict:6d}  {last:6d} steps: {series[-1]['sae_steps_per_s']:,} SAE-steps/s")
    medians = {name: statistics.median(of_one) for name, of_one in rates.items()}
    best = max(medians, key=medians.get)
    theirs = 17 * cfg.n_steps / medians[best]
    print(
        f"{n_dict:6d}  row of 17 x {cfg.n_steps} steps: {seconds:.0f} s, data included; {best} "
        f"{theirs:.0f} s, data for free: {theirs / seconds:.2f} times\n",
        flush=True,
    )
    line = {"n_dict": n_dict, "seconds": round(seconds, 1), "best_of_the_others": best}
    line |= {"its_seconds": round(theirs), "times_faster": round(theirs / seconds, 2)}
    return {"line": line, "series": series, "others": medians}


def draw(table: list[dict], rows: dict[int, dict], path: Path) -> None:
    """Left: SAE-steps/s by size. Right: ours over full-length rows, the others as levels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for who in dict.fromkeys(line["who"] for line in table):
        lines = [line for line in table if line["who"] == who]
        median = [line["sae_steps_per_s"] for line in lines]
        spread = [
            [m - line["least"] for m, line in zip(median, lines, strict=True)],
            [line["most"] - m for m, line in zip(median, lines, strict=True)],
        ]
        sizes = [line["n_dict"] for line in lines]
        left.errorbar(sizes, median, spread, marker="o", capsize=3, label=who)
    left.set(xscale="log", yscale="log", xlabel="n_dict", ylabel="SAE-steps/s")
    left.set_title(f"h {H}, batch {BATCH}, float32, {describe(CPU)}")
    left.legend(fontsize=8)
    for i, (n_dict, row) in enumerate(rows.items()):
        at = [point["step"] for point in row["series"]]
        speed = [point["sae_steps_per_s"] for point in row["series"]]
        right.step(
            [0, *at], [speed[0], *speed], where="pre", color=f"C{i}", label=f"ours, {n_dict}"
        )
        best = max(row["others"], key=row["others"].get)
        label = f"{best}, {n_dict}, data for free"
        right.axhline(row["others"][best], color=f"C{i}", linestyle=":", label=label)
    right.set(yscale="log", xlabel="step", ylabel="SAE-steps/s, data included")
    right.set_title("a row of the figure at full length")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> int:
    cfg = parse_flags(Config(), argv, description=__doc__.split("\n\n")[0])
    set_precision("float32", CPU)
    module = {"loop of 2023": "torch"}
    found = [name for name in OTHERS if importlib.util.find_spec(module.get(name, name))]
    policy = os.environ.get("OMP_WAIT_POLICY", "unset")
    print(f"torch {torch.__version__}, {describe(CPU)}, OMP_WAIT_POLICY {policy}")
    for name in OTHERS.keys() - set(found):
        print(f"{name} is not installed, left out")
    print(
        "n_dict  who                        SAE-steps/s, median (range), to the best of the others"
    )
    table = [line for n_dict in cfg.sizes for line in compare(n_dict, cfg, found)]
    rows = {n_dict: full_row(n_dict, cfg, found) for n_dict in cfg.row_sizes}
    folder = Path(cfg.output_dir)
    for name, lines in (
        ("speed", table),
        ("rows", [row["line"] for row in rows.values()]),
        ("rows_over_steps", [{"n_dict": n} | p for n, row in rows.items() for p in row["series"]]),
    ):
        if lines:
            write_csv(folder / f"{name}.csv", lines)
    if table and rows:
        draw(table, rows, folder / "toy_speed.png")
    return 0


if __name__ == "__main__":
    run_as_script(main)
