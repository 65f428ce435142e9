"""Fixtures of the tests of language models."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from builders.browser import CHROMIUM, Browser

from sparse_coding.lm.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tiny_target and demo_target keep what they open."""
    return tmp_path_factory.mktemp("targets")


@pytest.fixture(scope="module")
def byte_ids() -> Tokenizer:
    """Bytes, and 256 between documents."""
    return load_tokenizer("x", choice="bytes", vocab_size=257)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Headless Chromium."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()
