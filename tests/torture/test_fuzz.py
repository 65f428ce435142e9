"""Every reader, on hundreds of files damaged by chance: a value, or one line that names the file.

Where a checksum covers the file, the value is that of the undamaged one. Nothing is executed,
nothing written elsewhere, no case takes 30 s or 1.5 GB (builders/confined.py).
"""

import random

import pytest
from builders.confined import faults, read_all
from builders.mutations import mutated
from builders.readers import READERS, Bench

pytestmark = pytest.mark.long
SEEDS, FEW = 250, 8
MENDED = {
    "tokens",
    "documents",
    "corpus.json",
    "chunk",
    "manifest of chunks",
    "checkpoint",
    "metrics.jsonl",
    "shown.json",
    "wandb_run.json",
}  # what is damaged there is made again


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_gives_the_undamaged_value_or_one_line(tmp_path, thorough, name):
    reader = READERS[name]

    def damage(content: bytes, seed: str) -> bytes:
        return mutated(content, random.Random(f"{name} {seed}"), kind=reader.kind)

    n = SEEDS if thorough else FEW
    seeds = [f"seed {seed}" for seed in range(n)]
    outcomes = read_all(seeds, Bench(reader, tmp_path, damage), tmp_path)
    assert not faults(outcomes), faults(outcomes)
    assert name in MENDED or any(outcome.kind == "refused" for outcome in outcomes)
