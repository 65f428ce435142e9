"""What the scripts that train sweeps share: from constants to a complete folder."""

import contextlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sparse_coding.config import fingerprint, require_flag
from sparse_coding.files import require_free_disk, write_csv
from sparse_coding.sweep.cells import saved_width
from sparse_coding.sweep.grid import Cell, Shard, plan_groups, split_by_cost
from sparse_coding.sweep.hardware import memory_budget
from sparse_coding.sweep.run_folder import (
    UNSET,
    close_run_folder,
    finished_rows,
    may_merge,
    opened_run_folder,
    provenance,
    run_folder_bytes,
)
from sparse_coding.sweep.tracking import Tracker
from sparse_coding.sweep.training import Recipe, train_missing_cells

PROJECT = "sparse_coding"  # of W&B


@dataclass(frozen=True)
class RunOptions:
    """Flags that all sweeps have: see the scripts."""

    log_every: int
    wandb_mode: str
    max_memory_gb: float

    def __post_init__(self) -> None:
        """Raises UserError for a constant out of its range."""
        require_flag(self, "log_every", self.log_every >= 1, "at least 1")
        rule = "at least 0 and finite"
        require_flag(self, "max_memory_gb", 0 <= self.max_memory_gb < math.inf, rule)


@dataclass(frozen=True)
class PlannedRun:
    """A run of a script, by its constants: where its results go, and what stands in config.json.

    constants: what the numbers depend on
    origin: command, versions, device, ...
    """

    folder: Path
    constants: dict
    origin: dict

    @property
    def exists(self) -> bool:
        """Whether a run with these constants was begun."""
        return os.path.exists(self.folder)

    @property
    def saved_width(self) -> int | None:
        """See cells.saved_width."""
        return saved_width(self.folder)

    def finished_rows(self) -> list[dict] | None:
        """See run_folder.finished_rows."""
        return finished_rows(self.folder)

    def opened(
        self, cells: list[Cell], shard: Shard, *, fresh: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        """See opened_run_folder."""
        return opened_run_folder(
            self.folder,
            constants=self.constants,
            origin=self.origin,
            fresh=fresh,
            cells=cells,
            shard=shard,
        )

    def require_room(
        self, recipe: Recipe, cells: list[Cell], *, fresh: bool, max_memory_gb: float
    ) -> None:
        """Refuses what can't fit into memory or onto the disk, before anything is written or
        deleted. Raises UserError."""
        if fresh or not self.exists:
            plan_groups(cells, memory_budget(max_memory_gb, recipe.device), recipe.memory)
            n_dicts = [cell.n_dict for cell in cells]
            require_free_disk(self.folder, run_folder_bytes(n_dicts, recipe.width))

    def tracker(self, mode: str, config: dict, shard: Shard) -> Tracker:
        """What writes the shard's time series. config: all constants, for W&B."""
        return Tracker(
            self.folder,
            mode=mode,
            project=PROJECT,
            run_name=self.origin["run_name"],
            config=config | self.origin,
            jsonl_name=f"metrics{shard.suffix}.jsonl",
        )


def plan_run(
    script: str, config: dict, *, not_identity: set[str], more: dict, device: str, suffix: str
) -> PlannedRun:
    """The run that a script's constants name.

    Args:
        not_identity: constants that change no number beyond rounding
        more: what else the numbers depend on (kind of device, precision, ...)
        device: in words; suffix: of this shard's files
    """
    left_out = not_identity | {k for k, v in UNSET.items() if config.get(k) == v}
    constants = {k: v for k, v in config.items() if k not in left_out} | more
    name = f"{script}-{config['preset']}-{fingerprint(constants)}"
    origin = {"run_name": name + suffix, **provenance(device)}
    return PlannedRun(Path(config["output_dir"] or f"outputs/{name}"), constants, origin)


def train_planned(
    recipe: Recipe,
    cells: list[Cell],
    planned: PlannedRun,
    *,
    shard: Shard,
    options: RunOptions,
    config: dict,
    present: Callable[[list[dict]], dict[str, Path]],
) -> list[dict]:
    """Trains what is missing of this shard's cells. Where then nothing is missing of the others',
    completes the folder and returns the rows of results.csv, else an empty list.

    Args:
        config: all constants, for W&B
        present: writes figures and reports from the rows; returns the png of each figure
    Raises:
        Interrupted: Ctrl-C or SIGTERM, after a checkpoint.
    """
    folder = planned.folder
    with contextlib.closing(planned.tracker(options.wandb_mode, config, shard)) as tracker:
        train_missing_cells(
            recipe,
            folder,
            cells=split_by_cost(cells, shard.count)[shard.index],
            budget=memory_budget(options.max_memory_gb, recipe.device),
            tracker=tracker,
            log_every=options.log_every,
        )
        if not may_merge(folder, cells, shard):
            tracker.finish(figures={}, table=[])
            return []
        rows = recipe.merged(folder, cells)
        write_csv(folder / "results.csv", rows)
        tracker.finish(figures=present(rows), table=rows)
        close_run_folder(folder)
        return rows
