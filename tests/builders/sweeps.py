"""A small sweep of a script, whichever it is, as tests disturb it: fixtures toy_sweep and
language_sweep."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from builders.faults import ANY
from builders.scripts import Done, Process, Server, assert_done, assert_refused, temporaries


def n_features(kinds: list[tuple[str, int]]) -> int:
    """Of cells of these kinds: a simple measure of the memory that they need."""
    return sum(n_dict for _, n_dict in kinds)


@dataclass(frozen=True)
class Sweep:
    """Runs in cwd, where it writes run/ and, on a language model, acts/.

    patch: see Server.start; checkpoints come at fixed steps, so operations on files can be counted
    same: (cwd, finished): fails the test unless all tables and tensors there have the same bits
    finished: cwd of a run that nothing disturbed. Nobody may write to it
    """

    server: Server
    flags: tuple[str, ...]
    patch: dict
    same: Callable[[Path, Path], None]
    finished: Path

    def start(self, *more: str, cwd: Path, **options: object) -> Process:
        """more: flags; options: of Server.start."""
        return self.server.start(*self.flags, *more, cwd=cwd, patch=self.patch, **options)

    def run(self, *more: str, cwd: Path, **options: object) -> Done:
        """As start, to its end."""
        return self.start(*more, cwd=cwd, **options).wait()

    def finish(self, *more: str, cwd: Path) -> Done:
        """A run that must end well, in the same bits as the undisturbed one, without litter."""
        done = self.run(*more, cwd=cwd)
        assert_done(done)
        self.assert_same(cwd)
        return done

    def assert_same(self, cwd: Path) -> None:
        """What stands there is what an undisturbed run writes, and nothing half written."""
        self.same(cwd, self.finished)
        assert temporaries(cwd) == []

    def made_once(self) -> "Sweep":
        """Itself, once its undisturbed run has ended."""
        self.finished.mkdir(parents=True)
        assert_done(self.disturbed(cwd=self.finished, k=0)[0])
        return self

    def with_flags(self, *more: str, finished: Path) -> "Sweep":
        """Another one, with these flags too."""
        return replace(self, flags=(*self.flags, *more), finished=finished).made_once()

    def disturbed(
        self, *more: str, cwd: Path, k: int, kinds: Sequence[str] = ANY, then: str = "fails"
    ) -> tuple[Done, str]:
        """A run at whose k-th operation of the kinds something happens, see faults.inject, and the
        first letters of those operations, in order."""
        fault = {"kinds": kinds, "k": k, "below": str(cwd), "log": f"{cwd}.log", "then": then}
        done = self.run(*more, cwd=cwd, before=("inject", fault))
        return done, Path(fault["log"]).read_text()

    def n_operations(self, kinds: Sequence[str] = ANY) -> int:
        """Of the undisturbed run."""
        log = Path(f"{self.finished}.log").read_text()
        return sum(log.count(kind[0]) for kind in kinds)

    def assert_fails_and_goes_on(self, cwd: Path, kind: str, k: int) -> None:
        """The k-th operation of the kind fails: one line, and the same command ends well."""
        cwd.mkdir()
        done, happened = self.disturbed(cwd=cwd, k=k, kinds=(kind,))
        assert len(happened) >= k
        assert_refused(done, "then run it again")
        assert temporaries(cwd) == []
        self.finish(cwd=cwd)
        shutil.rmtree(cwd)
