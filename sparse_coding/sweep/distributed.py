"""Which part of a sweep this process trains, by --shard or by torchrun."""

import os
from dataclasses import dataclass
from datetime import timedelta

from sparse_coding.config import UserError, require


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`. `by_torchrun`: the other parts are ranks that we can wait for."""

    index: int = 0
    count: int = 1
    by_torchrun: bool = False

    @property
    def suffix(self) -> str:
        """For names of files that each shard writes for itself: "" if there is one shard only."""
        return "" if self.count == 1 else f"-shard-{self.index + 1}-of-{self.count}"


def find_shard(flag: str) -> Shard:
    """The shard of --shard i/N (i from 1), else of torchrun's environment, else the whole.

    Raises:
        UserError: not i/N with 1 <= i <= N, or both.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if not flag:
        rank = int(os.environ.get("RANK", 0))
        return Shard(rank, world_size, by_torchrun=True) if world_size > 1 else Shard()
    require(world_size == 1, f"--shard {flag} under torchrun, which shards by itself: use one")
    try:
        index, count = (int(part) for part in flag.split("/"))
    except ValueError:
        raise UserError(f"--shard {flag} must be i/N, for example 1/4") from None
    require(1 <= index <= count, f"--shard {flag} must be i/N with 1 <= i <= N, for example 1/4")
    return Shard(index - 1, count)


def wait_for_all_ranks() -> None:
    """Returns when every rank of torchrun has called it."""
    import torch.distributed as dist

    # a rank waits for the slowest one: days, not the default half hour
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    dist.barrier()
    dist.destroy_process_group()
