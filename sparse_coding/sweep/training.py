"""The training loop, with checkpoints, resume, progress and clean stops. The only loop there is.

A sweep is trained in groups of cells that fit into memory together, one group after the other.
"""

import contextlib
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sparse_coding.config import Interrupted, progress_bar
from sparse_coding.sae.batches import ahead_on, step_ranges
from sparse_coding.sae.ensemble import Ensemble
from sparse_coding.sae.families import Kind
from sparse_coding.sweep.cells import mark_done
from sparse_coding.sweep.grid import Cell
from sparse_coding.sweep.run_folder import (
    CheckpointStore,
    checkpoints_of,
    group_id,
    groups_to_train,
)
from sparse_coding.sweep.tracking import Tracker

CHECKPOINT_SECONDS = 10.0  # a SIGKILL loses at most this; ours, not tuned
CHECKPOINT_SHARE = 0.05  # of the time may go into writing checkpoints: large ones come less often


@dataclass(frozen=True)
class Task:
    """A group of cells, ready to train. Values per cell are in the order of the group.

    batch_at: x of a step, (batch_size, activation_dim)
    measure: x of the last step -> what is logged while training
    evaluate: per cell what goes into results.csv, and the autoencoder to save
    close: ends threads of the task, also after an exception
    """

    ensemble: Ensemble
    batch_at: Callable[[int], Tensor]
    measure: Callable[[Tensor], dict[str, list[float]]]
    evaluate: Callable[[], list[tuple[dict, dict[str, Tensor]]]]
    close: Callable[[], None] = lambda: None


class Recipe(Protocol):
    """What a script brings to the training of its cells.

    device: that they are trained on
    width: of the activations
    n_steps: of every cell
    headline: (key of Task.measure, max or min) whose best value the progress bar shows
    """

    device: torch.device
    width: int
    n_steps: int
    headline: tuple[str, Callable]

    def memory(self, kinds: list[Kind]) -> int:
        """Bytes that an ensemble of these kinds of cells needs."""

    def prepare(self, group: list[Cell]) -> Task:
        """Cells of one seed, ready to train."""

    def save(self, folder: Path, cell: Cell, tensors: dict[str, Tensor], row: dict) -> None:
        """Writes the autoencoder of a cell, with what Task.evaluate gave for it."""

    def merged(self, folder: Path, cells: list[Cell]) -> list[dict]:
        """Rows of results.csv, from what was saved."""


class StopSignal:
    """While entered, Ctrl-C and SIGTERM are noted instead of raised; the second one is not held."""

    def __enter__(self) -> "StopSignal":
        self.signum: int | None = None
        self.previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: object) -> None:
        self.signum = signum
        signal.signal(signum, self.previous[signum])


class CheckpointClock:
    """Says when a checkpoint is due, so that writing takes at most its share of the time."""

    def __init__(self) -> None:
        self.last, self.interval = time.monotonic(), CHECKPOINT_SECONDS

    def due(self) -> bool:
        """Whether one is to be written now."""
        return time.monotonic() - self.last >= self.interval

    def written(self, seconds: float) -> None:
        """Notes that one was written, and how long that took."""
        self.interval = max(CHECKPOINT_SECONDS, seconds / CHECKPOINT_SHARE)
        self.last = time.monotonic()


class Progress:
    """One bar over all groups of a sweep, and a record to the tracker every log_every steps.

    Args:
        n_steps: of each group
        headline: (key, max or min): whose best value over all cells the bar shows
    """

    def __init__(
        self,
        tracker: Tracker,
        *,
        n_groups: int,
        n_steps: int,
        log_every: int,
        headline: tuple[str, Callable],
    ):
        self.bar = progress_bar(total=n_groups * n_steps, unit="step")
        self.tracker, self.log_every, self.n_steps = tracker, log_every, n_steps
        self.headline = headline
        self.best = math.nan

    def start_group(
        self, cells: list[str], *, info: dict, measure: Callable[[Tensor], dict[str, list[float]]]
    ) -> None:
        """info: put into every record; measure: x -> values per key, in the order of cells."""
        self.cells, self.info, self.measure = cells, info, measure

    def end_group(self) -> None:
        """Lets go of the group: what measures it holds its ensemble."""
        self.measure = None

    def resumed(self, step: int) -> None:
        """Called once per group with the steps already done: later records are forgotten."""
        self.tracker.rewind(
            lambda r: any(r.get(k) != v for k, v in self.info.items()) or r["step"] <= step
        )
        # what was done before, or took no steps, says nothing of how long the rest will take
        self.bar.n += step
        self.bar.initial, self.bar.last_print_n = self.bar.n, self.bar.n
        self.bar.unpause()
        self.since, self.since_step = time.monotonic(), step

    def log(self, done: int, x: Tensor) -> None:
        """Measures on x and writes the record of `done` steps."""
        values = self.measure(x)
        seconds = max(time.monotonic() - self.since, 1e-9)
        rate = (done - self.since_step) * len(self.cells) / seconds
        key, better = self.headline
        finite = [v for v in (*values[key], self.best) if math.isfinite(v)]
        self.best = better(finite, default=math.nan)
        per_cell = {
            f"{k}/{c}": v for k, vs in values.items() for c, v in zip(self.cells, vs, strict=True)
        }
        self.tracker.log({"step": done, **self.info, "perf/sae_steps_per_s": rate, **per_cell})
        name = key.split("/")[-1]
        postfix = f"{rate:,.0f} SAE-steps/s, best {name} {self.best:.3f}"
        self.bar.set_postfix_str(postfix, refresh=False)  # shown when mininterval allows
        self.since, self.since_step = time.monotonic(), done


def train_missing_cells(
    recipe: Recipe,
    folder: Path,
    *,
    cells: list[Cell],
    budget: float,
    tracker: Tracker,
    log_every: int,
) -> None:
    """Trains those of the cells that have no results in the folder yet, and writes theirs.

    Prints the plan first. Groups that were begun before go on from their newest checkpoint.

    Args:
        budget: bytes of memory
    Raises:
        Interrupted: Ctrl-C or SIGTERM, after a checkpoint.
    """
    groups = groups_to_train(folder, cells, budget=budget, memory_of=recipe.memory)
    if not groups:
        return
    n_cells = sum(map(len, groups))
    print(f"to train: {n_cells} SAEs x {recipe.n_steps:,} steps; the bar says how long")
    peak = max(recipe.memory([cell.kind for cell in group]) for group in groups)
    split = "" if len(groups) == 1 else f", in {len(groups)} groups one after the other"
    print(f"memory: {peak / 1e9:.2f} of {budget / 1e9:.1f} GB free{split}")
    print(f"results go to {folder}; the same command resumes", flush=True)
    progress = Progress(
        tracker,
        n_groups=len(groups),
        n_steps=recipe.n_steps,
        log_every=log_every,
        headline=recipe.headline,
    )
    with StopSignal() as stop, contextlib.closing(progress.bar):
        for group in groups:
            _train_group(recipe, folder, group=group, progress=progress, stop=stop)
            if stop.signum:  # it came while results were written
                raise Interrupted(stop.signum, "stopped, all saved: the same command goes on")


def _train_group(
    recipe: Recipe, folder: Path, *, group: list[Cell], progress: Progress, stop: StopSignal
) -> None:
    """Trains one group and writes the results of its cells."""
    task = recipe.prepare(group)
    names = [cell.name for cell in group]
    info = {"seed": group[0].seed, "group": group_id(group)}
    progress.start_group(names, info=info, measure=task.measure)
    checkpoints = checkpoints_of(folder, group)
    with contextlib.closing(task):
        seconds = train_(
            task.ensemble,
            task.batch_at,
            n_steps=recipe.n_steps,
            checkpoints=checkpoints,
            info={"cells": names},
            progress=progress,
            stop=stop,
        )
    per_feature = seconds / sum(cell.n_dict for cell in group)
    for cell, (row, tensors) in zip(group, task.evaluate(), strict=True):
        row["seconds"] = round(per_feature * cell.n_dict, 3)
        recipe.save(folder, cell, tensors, row)
        mark_done(folder, cell, row)
    progress.end_group()
    checkpoints.remove()


def train_(
    ensemble: Ensemble,
    batch_at: Callable[[int], Tensor],
    *,
    n_steps: int,
    checkpoints: CheckpointStore,
    info: dict,
    progress: Progress,
    stop: StopSignal,
) -> float:
    """Trains the ensemble in place from its newest checkpoint, if any, to n_steps.

    Args:
        info: kept in the checkpoints
    Returns:
        seconds of training, those before a resume included
    Raises:
        Interrupted: a signal came; a checkpoint was written.
    """
    first, seconds_before = _restore_(ensemble, checkpoints, info)
    progress.resumed(first)
    started, clock = time.monotonic(), CheckpointClock()
    length = ensemble.engine.steps_at_a_time
    ranges = step_ranges(first, n_steps, length=length, stop_every=progress.log_every)
    batches = ahead_on(ensemble.scratch.device)(batch_at, ranges)
    with contextlib.closing(batches):
        for steps, xs in batches:
            ensemble.steps_(xs)
            done = steps.stop
            progress.bar.update(len(steps))
            if done % progress.log_every == 0 or done == n_steps:
                progress.log(done, xs[-1])
            if stop.signum or clock.due() or done == n_steps:
                seconds = seconds_before + time.monotonic() - started
                began = time.monotonic()
                checkpoints.save(done, ensemble.state(), info={**info, "seconds": seconds})
                clock.written(time.monotonic() - began)
            if stop.signum:
                message = f"stopped and saved at step {done} of {n_steps}: the same command goes on"
                raise Interrupted(stop.signum, message)
    return seconds_before + time.monotonic() - started


def _restore_(ensemble: Ensemble, checkpoints: CheckpointStore, info: dict) -> tuple[int, float]:
    """(steps done, seconds they took) of the newest checkpoint of this info, loaded; (0, 0.0)
    without one."""
    checkpoint = checkpoints.load(info)
    if checkpoint is None:
        return 0, 0.0
    tensors, info = checkpoint
    ensemble.load_state_(tensors)
    return info["step"], info["seconds"]
