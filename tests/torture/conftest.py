"""Sweeps that are killed, damaged and run twice at once.

Without --torture a seeded share of the cases is run: @pytest.mark.share.
"""

import functools
from collections.abc import Callable

import pytest
from builders.sweeps import Sweep


@pytest.fixture(scope="session")
def two_groups(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Sweep]:
    """two_groups("toy") and two_groups("language"): the sweeps of these names with two seeds, which
    train one after the other, so that one may be there while the other is not."""

    @functools.cache
    def sweep(script: str) -> Sweep:
        one = request.getfixturevalue(f"{script}_sweep")
        finished = tmp_path_factory.mktemp(f"two_{script}") / "cwd"
        return one.with_flags("--n-seeds", "2", finished=finished)

    return sweep
