"""Fixtures of several test files. What builds things for tests is in builders/."""

import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from builders.rented import User, rental_server, renting
from builders.scripts import LOADED_LATE, NO_FIGURES, SMALL, Server, served
from builders.sweeps import Sweep

if not torch.cuda.is_available():
    # the kernels' tests have Triton interpret them, which must be said before it is loaded
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="with what takes minutes, marked long")
    parser.addoption("--torture", action="store_true", help="--long, and all cases of share(n)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is marked long, unless --long or --torture is given."""
    long = config.option.long or config.option.torture
    left_out = [i for i in items if i.get_closest_marker("long") and not long]
    if not config.option.torture:
        left_out += _beyond_the_share([item for item in items if item not in left_out])
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _beyond_the_share(items: list[pytest.Item]) -> list[pytest.Item]:
    """Cases of tests marked share(n) beyond the n, seeded, that are run without --torture."""
    cases: dict[object, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("share"):
            cases.setdefault(item.function, []).append(item)
    left_out = []
    for of_one in cases.values():
        (n,) = of_one[0].get_closest_marker("share").args
        kept = random.Random(0).sample(of_one, min(n, len(of_one)))
        left_out += [item for item in of_one if item not in kept]
    return left_out


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line that adds up what tests have counted with record_property."""
    counts: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        if report.when == "call":
            counts.update(dict(report.user_properties))
    if counts:
        terminalreporter.write_line("torture: " + ", ".join(f"{n} {k}" for k, n in counts.items()))


@pytest.fixture(scope="session")
def thorough(pytestconfig: pytest.Config) -> bool:
    """Whether tests/torture does all of its work, by --torture; else a seeded share of it."""
    return pytestconfig.option.torture


@pytest.fixture(scope="session")
def toy_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Forks replicate_toy_models.py: `toy_server.run("--n-steps", "40")`."""
    home = tmp_path_factory.mktemp("toy_server")
    with served("replicate_toy_models.py", home, patch=NO_FIGURES) as server:
        yield server


@pytest.fixture(scope="session")
def run_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Forks run.py: `run_server.run("--model", folder, "--dataset", file)`."""
    of = "transformers.models"
    modules = (
        *LOADED_LATE,
        *(f"{of}.{kind}.modeling_{kind}" for kind in ("gpt2", "gpt_neox", "llama")),
        f"{of}.auto.tokenization_auto",
        "pyarrow.parquet",
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
    )
    home = tmp_path_factory.mktemp("run_server")
    with served("run.py", home, patch=SMALL, modules=modules) as server:
        yield server


@pytest.fixture(scope="session")
def toy_sweep(toy_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Two cells of replicate_toy_models.py, without figures."""
    from builders.toy_sweep import COARSE, MINIMAL, OFTEN, TINY, assert_same_numbers

    def same(cwd: Path, finished: Path) -> None:
        assert_same_numbers(cwd / "run", finished / "run")

    finished = tmp_path_factory.mktemp("toy_sweep") / "cwd"
    return Sweep(toy_server, (*TINY, *MINIMAL), OFTEN | COARSE, same, finished).made_once()


@pytest.fixture(scope="session")
def minimal(toy_sweep: Sweep) -> Path:
    """The run folder of toy_sweep. Nobody may write to it."""
    return toy_sweep.finished / "run"


@pytest.fixture(scope="session")
def world(run_server: Server, tmp_path_factory: pytest.TempPathFactory):
    """Small language models, text, and the flags of a tiny sweep on them: a World."""
    from builders.language_sweep import make_world

    return make_world(tmp_path_factory.mktemp("models"), run_server)


@pytest.fixture(scope="session")
def language_sweep(world, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """One cell of run.py, three chunks, 80 documents."""
    from builders.language_sweep import OFTEN, PLACES, SMALLEST, assert_same_numbers

    few = ("--dataset", str(world.root / "few.parquet"))
    flags = (*world.flags(), *PLACES, *SMALLEST, *few)
    finished = tmp_path_factory.mktemp("language_sweep") / "cwd"
    return Sweep(world.server, flags, OFTEN, assert_same_numbers, finished).made_once()


@pytest.fixture(scope="session")
def vast_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Forks vastai_utils.py, for renting()."""
    with rental_server(tmp_path_factory.mktemp("vast_server")) as server:
        yield server


@pytest.fixture
def user(vast_server: Server, tmp_path: Path) -> Iterator[User]:
    """A checkout, and a market of the test's own to rent from."""
    with renting(tmp_path, vast_server) as user:
        yield user


@pytest.fixture(scope="module")
def quick_interpreter():
    """The interpreter patches Triton's whole language at each call of each function, though it is
    patched already: most of its time. (Before Triton 3.6 or so it did so in another way.)"""
    from triton import language
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        yield
        return

    def once(function, real=interpreter._patch_lang):
        known = (language, language.core)
        modules = [m for m in function.__globals__.values() if any(m is k for k in known)]
        patched = not any(language.core.is_builtin(module.load) for module in modules)
        return interpreter._LangPatchScope() if patched else real(function)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", once)
        yield
