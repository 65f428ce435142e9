"""Whatever is damaged of what a run left behind, half way or finished, no number is ever another.

The same command makes it again, and says what was damaged where it had to read it, or refuses in
one line that names the file.
"""

import contextlib
import random
import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from builders.language_sweep import HARVEST
from builders.scripts import TRAINING, Done, assert_refused, temporaries

CELLS = ["run/cells/*.json", "run/saes/*/cfg.json", "run/saes/*/sae_weights.safetensors"]
SPARSITY = "run/saes/*/sparsity.safetensors"
CHECKPOINT = "run/checkpoints/*/step-*.safetensors"
BEGUN = ["run/config.json", "run/metrics.jsonl", "run/.run.lock"]
ENDED = ["run/DONE", "run/results.csv"]
ACTIVATIONS = ["acts/manifest.json", "acts/chunk-*.safetensors", "acts/text/tokens.bin",
               "acts/text/documents.npy", "acts/text/corpus.json", "acts/.harvest.lock",
               "acts/text/.corpus.lock"]  # fmt: skip
UNREAD = ["run/report.html", "run/features.html", "run/features/*.html", "run/figures/*.png",
          "run/figures/*.csv"]  # fmt: skip
# state -> (where the run is killed, all kinds of files that it leaves until then)
STATES = {
    "toy, training": ((TRAINING, 7), [*BEGUN, *CELLS, CHECKPOINT]),
    "toy, finished": (None, [*BEGUN, *CELLS, *ENDED, "run/world.safetensors", UNREAD[0]]),
    "language, harvest": ((HARVEST, 3), ["run/config.json", "run/.run.lock", *ACTIVATIONS]),
    "language, training": (
        (TRAINING, 10), [*BEGUN, *ACTIVATIONS, *CELLS, SPARSITY, CHECKPOINT],
    ),
    "language, finished": (
        None, [*BEGUN, *CELLS, SPARSITY, *ENDED, "run/shown.json", *UNREAD],
    ),
}  # fmt: skip
HARMS = ["one bit", "truncated", "emptied", "swapped", "directory", "removed"]
CASES = [(s, kind, harm) for s, (_, kinds) in STATES.items() for kind in kinds for harm in HARMS]
# nothing in them is a number, or they may be gone on without
SILENT = {*UNREAD, "run/metrics.jsonl", "run/.run.lock", "acts/.harvest.lock",
          "acts/text/.corpus.lock"}  # fmt: skip


@pytest.fixture(scope="session")
def left_behind(two_groups, tmp_path_factory) -> Callable[[str], Path]:
    """left_behind(state): where a run was killed, or ended. Nobody may write there."""

    @cache
    def made(state: str) -> Path:
        sweep, (point, _) = two_groups(state.split(",")[0]), STATES[state]
        if point is None:
            return sweep.finished
        cwd = tmp_path_factory.mktemp("left")
        process = sweep.start(cwd=cwd, pause_at=point)
        process.wait_until_paused()
        process.signal(signal.SIGKILL)
        process.wait()
        return cwd

    return made


def files_of(cwd: Path, kind: str) -> list[Path]:
    return sorted(path for path in cwd.glob(kind) if path.is_file())


@pytest.mark.long
@pytest.mark.parametrize("state", STATES)
def test_every_kind_of_file_is_damaged(state, left_behind):
    cwd, (_, kinds) = left_behind(state), STATES[state]
    assert [kind for kind in kinds if not files_of(cwd, kind)] == []
    known = {path for kind in kinds for path in files_of(cwd, kind)}
    known |= set((cwd / "acts").rglob("*")) if state == "language, finished" else set()
    left = [path for path in cwd.rglob("*") if path.is_file() and path not in known]
    assert [path for path in left if path.name not in temporaries(cwd)] == []


def damage(cwd: Path, kind: str, harm: str, rng: random.Random) -> list[Path]:
    """Damages a file of the kind; which ones were harmed."""
    path = rng.choice(files_of(cwd, kind))
    data = bytearray(path.read_bytes())
    if harm == "one bit" and data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    elif harm == "truncated":
        path.write_bytes(data[: rng.randrange(max(1, len(data)))])
    elif harm == "emptied":
        path.write_bytes(b"")
    elif harm == "swapped":
        return [path, swap(cwd, path, kind, rng)]
    elif harm in ("directory", "removed"):
        path.unlink()
        if harm == "directory":
            path.mkdir()
    return [path]


def swap(cwd: Path, path: Path, kind: str, rng: random.Random) -> Path:
    """With another file of the kind, or else of its suffix, or else with any."""
    for pattern in (kind, f"run/**/*{path.suffix}", f"acts/**/*{path.suffix}", "run/*"):
        if others := [other for other in files_of(cwd, pattern) if other != path]:
            other = rng.choice(others)
            mine, theirs = path.read_bytes(), other.read_bytes()
            path.write_bytes(theirs)
            other.write_bytes(mine)
            return other
    raise AssertionError(path)


def is_silent(kind: str, harm: str, path: Path, before: Path) -> bool:
    """Whether nothing need be said: the file is not read, or reads as if nothing had happened to it
    but that it was not there yet; or the bit may be one that counts for nothing."""
    if kind in SILENT or harm in ("one bit", "removed") or (kind, harm) == ("run/DONE", "emptied"):
        return True  # an empty DONE is that of an older version
    return kind == CHECKPOINT and path.name != files_of(before, kind)[-1].name


@pytest.mark.long
@pytest.mark.share(10)
@pytest.mark.parametrize(("state", "kind", "harm"), CASES)
def test_no_damage_changes_a_number(
    state, kind, harm, two_groups, left_behind, tmp_path, record_property
):
    sweep, cwd = two_groups(state.split(",")[0]), tmp_path / "cwd"
    shutil.copytree(left_behind(state), cwd)
    harmed = damage(cwd, kind, harm, random.Random(f"{state} {kind} {harm}"))
    done = sweep.run(cwd=cwd)
    said = any(path.name in done.err for path in harmed)
    warnings = done.err_lines[:-1] if done.code == 2 else done.err_lines
    assert all(line.startswith("warning: ") for line in warnings), done.err
    if done.code == 2:
        assert_refused(Done(2, "", done.err_lines[-1]))
        assert said, done.err
        for path in harmed:
            undamaged = left_behind(state) / path.relative_to(cwd)
            with contextlib.suppress(IsADirectoryError):
                path.unlink(missing_ok=True)
            if path.is_dir():
                path.rmdir()
            shutil.copy(undamaged, path)
        sweep.finish(cwd=cwd)
    else:
        assert done.code == 0, done.err
        sweep.assert_same(cwd)
        assert said or is_silent(kind, harm, harmed[0], left_behind(state)), harmed
    record_property("damaged files", 1)
