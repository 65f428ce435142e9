"""What accompanies a long training: signals, checkpoint times, progress, records."""

import math
import signal
import sys
import time
from collections.abc import Callable

from torch import Tensor
from tqdm import tqdm

from sparse_coding.sweep.tracking import Tracker

CHECKPOINT_SECONDS = 10.0  # a SIGKILL loses at most this; ours, not tuned
CHECKPOINT_SHARE = 0.05  # of the time may go into writing checkpoints: large ones come less often


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
        return time.monotonic() - self.last >= self.interval

    def written(self, seconds: float) -> None:
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
        # 30 s where nobody watches: a log file is not filled with bars
        interval = 0.1 if sys.stderr and sys.stderr.isatty() else 30.0
        total = n_groups * n_steps
        self.bar = tqdm(total=total, unit="step", mininterval=interval, dynamic_ncols=True,
                        disable=sys.stderr is None)  # fmt: skip
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
        self.bar.update(step)
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
