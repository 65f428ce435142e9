"""Fixtures of several test files. What builds things for tests is in builders/."""

import os
from collections.abc import Iterator

import pytest
import torch
from builders.scripts import LOADED_LATE, NO_FIGURES, SMALL, Server, served

if not torch.cuda.is_available():
    # the kernels' tests have Triton interpret them, which must be said before it is loaded
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="with what takes minutes, marked long")
    parser.addoption("--torture", action="store_true", help="--long, and all of tests/torture")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is marked long, unless --long or --torture is given."""
    long = config.option.long or config.option.torture
    left_out = [i for i in items if i.get_closest_marker("long") and not long]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


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
