"""Whichever open, write, fsync or replace fails, of all that a run does."""

import pytest
from builders.faults import KINDS

PARTS = 6


@pytest.mark.long
@pytest.mark.share(2)
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("script", ["toy", "language"])
def test_whichever_write_fails_the_same_command_ends_with_the_same_bits(
    script, kind, part, request, tmp_path, record_property
):
    """Of the k-th operations, one in PARTS."""
    sweep = request.getfixturevalue(f"{script}_sweep")
    n = sweep.n_operations((kind,))
    assert n > 10
    which = range(1 + part, n + 1, PARTS)
    for k in which:
        sweep.assert_fails_and_goes_on(tmp_path / f"{kind}{k}", kind, k)
    record_property("write faults", len(which))
