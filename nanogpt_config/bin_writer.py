"""nanoGPT's train.bin and val.bin (uint16 token ids), written as a stream, resumable.

Every document is followed by the end-of-text token; held-out documents go to val.bin. progress.json
says how much of the bins counts: a killed run loses what it wrote after it, and writes it again.
"""

import dataclasses
import math
import os
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sparse_coding.config import require
from sparse_coding.files import read_json, write_json
from sparse_coding.lm.documents import (
    PACKED,
    Documents,
    document_id,
    in_batches,
    is_held_out,
    local_files,
    opened_parquet,
    stdlib_files,
)
from sparse_coding.lm.tokenizer import MANIFEST, SPLIT, Tokenizer, check_fields

BATCH_CHARACTERS = 1_000_000  # tokenised at once: bounds the memory
SAVE_SECONDS = 5.0  # between saves of the progress, and lines about it
SPLITS = ("train", "val")
PROGRESS = {"constants": dict, "splits": dict.fromkeys(SPLITS, dict)}  # types of progress.json
# bytes of text, from the dataset's card on the hub
ON_THE_HUB = {"Skylion007/openwebtext": 39_769_491_688}
SAMPLE = 1000  # documents from which the tokens of all are estimated
MADE = ("train.bin", "val.bin", "tokenizer.json", "meta.pkl")


@dataclass
class Split:
    """What a bin holds so far."""

    documents: int = 0
    tokens: int = 0  # with the end-of-text tokens
    bytes: int = 0  # of the text in UTF-8: turns a loss per token into bits per byte

    def add(self, text: str, ids: list[int], file: BinaryIO) -> None:
        """Writes the ids of a document, its end included."""
        file.write(np.asarray(ids, np.uint16).data)  # tofile would not say that the disk is full
        self.documents += 1
        self.tokens += len(ids)
        self.bytes += len(text.encode())


def write_bins(
    documents: Documents,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    constants: dict,
    limit: float,
    expected: float,
) -> dict[str, Split]:
    """Appends to train.bin and val.bin from where progress.json stands, to the end of the text.

    Args:
        constants: kept in progress.json; the share that goes to val.bin is constants["held_out"]
        limit: writing stops with the document that gives train.bin so many tokens
        expected: tokens that train.bin will have, for the time left; infinite: not known
    """
    progress = read_made(folder / "progress.json")
    splits = {s: Split(**{k: progress["splits"][s][k] for k in SPLIT}) for s in SPLITS}
    files = {name: open_at(folder / f"{name}.bin", 2 * splits[name].tokens) for name in SPLITS}
    n_before, started = splits["train"].tokens, time.monotonic()
    saved = started
    n_read = sum(split.documents for split in splits.values())
    for batch in in_batches(islice(documents, n_read, None), BATCH_CHARACTERS):
        for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            if splits["train"].tokens >= limit:
                break
            name = "val" if is_held_out(document_id(text), constants["held_out"]) else "train"
            splits[name].add(text, [*ids, tokenizer.separator], files[name])
        now = time.monotonic()
        if now - saved > SAVE_SECONDS:
            save(folder, constants, splits, files)
            saved = now
            print_progress(splits, expected, (splits["train"].tokens - n_before) / (now - started))
        if splits["train"].tokens >= limit:
            break
    save(folder, constants, splits, files)
    for file in files.values():
        file.close()
    return splits


def is_written(folder: Path, constants: dict, *, limit: float) -> bool:
    """Whether the bins are there, with `limit` tokens in train.bin or all that there are.

    Raises:
        UserError: the folder holds the bins of other constants, or of another program.
    """
    remedy = "choose another --output-dir, or --fresh"
    for name in ("progress.json", "manifest.json"):
        if (folder / name).exists():
            made = read_made(folder / name)
            theirs = made["constants"]
            other = [k for k in constants | theirs if constants.get(k) != theirs.get(k)]
            require(not other, f"{folder} was made with another {', '.join(other)}: {remedy}")
            if name == "progress.json":
                return False
            return made["exhausted"] or made["train"]["tokens"] >= limit
    foreign = next((name for name in MADE if (folder / name).exists()), None)
    require(foreign is None, f"{folder} holds a {foreign} that is not of this script: {remedy}")
    return False


def read_made(path: Path) -> dict:
    """manifest.json or progress.json of a folder of bins. Raises UserError if it is damaged."""
    fields = MANIFEST if path.name == "manifest.json" else PROGRESS
    remedy = "choose another --output-dir, or --fresh"
    made = check_fields(read_json(path, remedy=remedy), fields, path, remedy)
    if path.name == "progress.json":
        for name, sizes in made["splits"].items():
            known = dataclasses.asdict(Split()) | sizes
            made["splits"][name] = check_fields(known, SPLIT, path, remedy)
    return made


def claim(folder: Path, constants: dict, *, fresh: bool) -> None:
    """Makes the folder ready for write_bins: with progress.json, which for bins that are finished,
    but to be added to, takes the place of their manifest. fresh: deletes what is there."""
    manifest, progress = folder / "manifest.json", folder / "progress.json"
    if fresh:
        for path in (manifest, progress, *(folder / name for name in MADE)):
            path.unlink(missing_ok=True)
    splits = {split: {} for split in SPLITS}
    if manifest.exists() and not progress.exists():
        made = read_made(manifest)
        splits = {s: {k: made[s][k] for k in SPLIT} for s in SPLITS}
    if not progress.exists():
        write_json(progress, {"constants": constants, "splits": splits})
    manifest.unlink(missing_ok=True)


def open_at(path: Path, n_bytes: int) -> BinaryIO:
    """The file, opened for writing after its first n_bytes; what a killed run wrote more is cut.
    Raises UserError if it has fewer."""
    there = path.stat().st_size if path.exists() else 0
    require(there >= n_bytes, f"{path} is damaged: {there:,} bytes, not {n_bytes:,}: use --fresh")
    file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
    file.truncate(n_bytes)
    file.seek(n_bytes)
    return file


def save(folder: Path, constants: dict, splits: dict[str, Split], files: dict) -> None:
    """First the bins reach the disk, then the file that says how long they are."""
    for file in files.values():
        file.flush()
        os.fsync(file.fileno())
    sizes = {name: dataclasses.asdict(split) for name, split in splits.items()}
    write_json(folder / "progress.json", {"constants": constants, "splits": sizes})


def print_progress(splits: dict[str, Split], expected: float, speed: float) -> None:
    """A line: what is written; speed in tokens/s, and the time left where that is known."""
    n_tokens = splits["train"].tokens
    n_documents = sum(split.documents for split in splits.values())
    line = f"{n_documents:,} documents, {n_tokens / 1e6:,.1f}M tokens, {speed / 1e6:.2f}M tokens/s"
    if speed > 0 and math.isfinite(expected):
        line += f", {max(expected - n_tokens, 0) / speed / 60:.1f} min left"
    print(line, flush=True)


def text_bytes(source: str, text_column: str) -> int | None:
    """Bytes of the source's text, with the marks between texts of .jsonl; None: not known.

    Args:
        source: as open_documents takes it
    Raises:
        UserError: a folder without a file that we can read.
    """
    if source in ON_THE_HUB:
        return ON_THE_HUB[source]
    if source == "stdlib":
        return sum(os.path.getsize(path) for path in stdlib_files())
    path = Path(source).expanduser()
    if not path.exists():
        return None
    files = local_files(path)
    if any(p.suffix in PACKED for p in files):
        return None
    return sum(
        _column_bytes(p, text_column) if p.suffix == ".parquet" else p.stat().st_size for p in files
    )


def _column_bytes(path: Path, column: str) -> int:
    """Of a column of a parquet file, uncompressed."""
    with opened_parquet(path) as file:
        metadata = file.metadata
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    columns = (group.column(i) for group in groups for i in range(group.num_columns))
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == column)


def expected_tokens(documents: Documents, tokenizer: Tokenizer, n_bytes: int) -> float:
    """Tokens of n_bytes of text, with one between documents, going by the first documents."""
    texts = list(islice(documents, SAMPLE))
    n_tokens = sum(len(ids) + 1 for ids in tokenizer.encode_batch(texts))
    return n_bytes * n_tokens / sum(len(text.encode()) for text in texts)
