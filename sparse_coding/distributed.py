"""Which part of a sweep this process trains, by --shard or by torchrun. Floor 1."""

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from sparse_coding.config import UserError, require
from sparse_coding.files import write_atomic


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


def collect_at_rank_0(folder: Path, names: list[str]) -> None:
    """Waits for all ranks; then rank 0 has every named file, also those of other hosts.

    Args:
        folder: run folder of this rank; on one host, or on a shared disk, the same for all
        names: files relative to the folder; each must exist on at least one rank
    """
    import torch.distributed as dist

    # a rank waits for the slowest one: days, not the default half hour
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        wanted = [[name for name in names if not (folder / name).exists()]]
        dist.barrier()  # all ranks are done writing
        if dist.get_rank() == 0:
            wanted = [[name for name in names if not (folder / name).exists()]]
        dist.broadcast_object_list(wanted, src=0)
        mine = {n: (folder / n).read_bytes() for n in wanted[0] if (folder / n).exists()}
        everyones = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(mine, everyones, dst=0)
        for files in everyones or []:
            for name, data in files.items():
                write_atomic(folder / name, data)
        dist.barrier()
    finally:
        dist.destroy_process_group()
