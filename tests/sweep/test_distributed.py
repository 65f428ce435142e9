"""Which shard this process is. The ranks of torchrun are run in test_replicate_toy_models.py."""

import pytest

from sparse_coding.config import UserError
from sparse_coding.sweep.grid import Shard, find_shard


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_without_flag_and_torchrun_the_process_is_the_whole():
    assert find_shard("") == Shard(0, 1)
    assert Shard().suffix == ""


def test_a_flag_counts_from_one():
    assert find_shard("2/3") == Shard(1, 3)
    assert find_shard("2/3").suffix == "-shard-2-of-3"


@pytest.mark.parametrize("flag", ["0/2", "3/2", "1", "a/b", "1/2/3", "-1/2"])
def test_a_flag_that_is_no_part_is_refused_with_an_example(flag):
    with pytest.raises(UserError, match="for example 1/4"):
        find_shard(flag)


def test_a_rank_of_torchrun_is_a_shard_and_no_flag_may_contradict_it(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert find_shard("") == Shard(1, 4, by_torchrun=True)
    with pytest.raises(UserError, match="torchrun"):
        find_shard("1/2")
