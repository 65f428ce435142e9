"""Where activations are kept for a run: on disk, in memory, or nowhere, computed as they are read.

Wherever they are, their bits are the same.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sparse_coding.config import UserError, require_flag
from sparse_coding.files import DISK_RESERVE, existing
from sparse_coding.lm.activations.chunks import Chunks
from sparse_coding.lm.activations.harvest import Harvester, harvest
from sparse_coding.lm.activations.store import missing_chunks, open_store
from sparse_coding.sweep.hardware import free_memory

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Place:
    """Where activations are kept; the fields are flags of run.py."""

    activations_in: Literal["disk", "memory"]
    max_disk_gb: float

    def __post_init__(self) -> None:
        """Raises UserError for a flag out of its range."""
        require_flag(self, "max_disk_gb", self.max_disk_gb >= 0, "at least 0")

    @property
    def in_memory(self) -> bool:
        """Whether they are kept in memory, and nothing of them on disk."""
        return self.activations_in == "memory"


class InMemory:
    """All chunks of a harvester, computed once.

    device: of the rows
    """

    def __init__(self, harvester: Harvester, device: torch.device):
        self.rows, self._chunks = harvester.rows, {}
        harvest(harvester, list(range(len(self.rows))), self._keep, to=device)

    def _keep(self, k: int, rows: Tensor, norms: Tensor) -> None:
        self._chunks[k] = rows

    def load(self, k: int) -> Tensor:
        """Chunk k, (rows[k], width), which nobody may change."""
        return self._chunks[k]


def device_with_room(harvester: Harvester, *, training: float) -> torch.device:
    """In whose memory all activations fit: the model's, beside training, else the CPU.

    training: bytes that it needs on the model's device
    Raises:
        UserError: they fit into neither.
    """
    needed, of_model = harvester.n_bytes, harvester.lm.device
    free = {of_model: max(0.0, free_memory(of_model) - training)}
    free.setdefault(CPU, free_memory(CPU))
    for device, n_bytes in free.items():
        if needed <= n_bytes:
            return device
    shown = ", ".join(f"{n / 1e9:.2f} GB of the {device.type}" for device, n in free.items())
    raise UserError(
        f"--activations-in memory: {sum(harvester.rows):,} activations need {needed / 1e9:.2f} GB, "
        f"free beside training are {shown}: use --activations-in disk or fewer --n-tokens"
    )


def in_memory(harvester: Harvester, device: torch.device) -> InMemory:
    """The harvester's chunks in the device's memory, harvested now."""
    print(f"{_size(harvester)} in the memory of the {device.type}", flush=True)
    return InMemory(harvester, device)


def on_disk(
    harvester: Harvester, folder: Path, metadata: dict, *, max_bytes: float, reserve: float = 0.0
) -> Chunks:
    """The harvester's chunks on disk, harvested now if need be; where they need more than
    max_bytes, or than is free beside `reserve`, the harvester itself, which computes each chunk as
    it is read."""
    size, n_bytes = _size(harvester), harvester.n_bytes
    have = sum(path.stat().st_size for path in folder.glob("chunk-*"))
    free = shutil.disk_usage(existing(folder)).free - DISK_RESERVE - reserve + have
    if n_bytes > min(max_bytes, free) and missing_chunks(folder, harvester):
        over = f"over --max-disk-gb {max_bytes / 1e9:g}"
        reason = over if n_bytes > max_bytes else f"{free / 1e9:.2f} GB free"
        print(f"{size}, {reason}: computed as they are read")
        return harvester if harvester.chunks_at_once == 1 else replace(harvester, chunks_at_once=1)
    print(f"{size} in {folder}", flush=True)
    return open_store(folder, harvester, metadata=metadata)


def _size(harvester: Harvester) -> str:
    """Of all activations, in words. Says so if there are fewer than asked for."""
    n_rows = sum(harvester.rows)
    if n_rows < harvester.n_tokens:
        asked, epochs = f"{harvester.n_tokens:,} tokens requested", harvester.n_tokens / n_rows
        print(f"{asked}, {n_rows:,} available = {epochs:.1f} epochs")
    return f"{n_rows:,} activations, {harvester.n_bytes / 1e6:,.0f} MB"
