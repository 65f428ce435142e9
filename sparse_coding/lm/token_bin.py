"""nanoGPT's .bin files of token ids as a corpus, used where they lie."""

import array
import hashlib
import json
from pathlib import Path

import numpy as np

from sparse_coding.config import require
from sparse_coding.lm.corpus import (
    Corpus,
    Seen,
    alone,
    drop_pages,
    open_folder,
    with_bar,
    write_index,
)
from sparse_coding.lm.tokenizer import Tokenizer
from sparse_coding.lm.vocabulary import read_bin_manifest

PIECE = 8192  # tokens of a document where no separator occurs; ours, not tuned
SCAN = 2**22  # tokens read at once


def open_bin(path: Path, tokenizer: Tokenizer, folder: Path) -> Corpus:
    """The corpus of a .bin (uint16 ids without a header); where its documents lie is kept in
    `folder`. It is scanned once, and again when its size or date has changed.

    Documents are the stretches between separators, or pieces of PIECE tokens if none occurs. Equal
    ones are kept once. The id of a document is a hash of its tokens.

    Raises:
        UserError: no such file, empty, of an odd size, ids that the model lacks; the folder holds
            another corpus.
    """
    require(path.is_file(), f"--dataset {path}: no such file")
    stat = path.stat()
    require(stat.st_size > 0, f"{path} is empty")
    require(stat.st_size % 2 == 0, f"{path} has an odd number of bytes: no file of uint16 ids")
    must_match = {"fingerprint": tokenizer.fingerprint, "dtype": "uint16", "piece": PIECE}
    stamp = [stat.st_size, stat.st_mtime_ns]
    with alone(folder):
        if _stamp(folder) == stamp:
            return open_folder(folder, path, must_match)
        tokens = np.memmap(path, "uint16", mode="r")
        must_match["sha256"], starts, stops = _scan(tokens, tokenizer, path)
        _check_manifest(path, tokenizer, must_match["sha256"])
        open_folder(folder, path, must_match)  # refuses if another corpus is there
        index = _index(tokens, starts, stops)
        require(len(index) > 0, f"{path} holds nothing but separators")
        about = {
            "dataset": str(path), "tokenizer": tokenizer.name, "n_tokens": len(tokens),
            "n_duplicates": int((stops > starts).sum()) - len(index) // 3, "stamp": stamp,
        }  # fmt: skip
        write_index(folder, index, {**must_match, **about})
        return open_folder(folder, path, must_match)


def _scan(
    tokens: np.memmap, tokenizer: Tokenizer, path: Path
) -> tuple[str, np.ndarray, np.ndarray]:
    """(sha256 of the file, starts, stops of its documents)."""
    sha256, found = hashlib.sha256(), []
    for start in with_bar(range(0, len(tokens), SCAN), " blocks"):
        block = tokens[start : start + SCAN]
        largest = int(block.max())
        require(
            largest < tokenizer.vocab_size,
            f"{path} has the id {largest}, the model only {tokenizer.vocab_size} ids: "
            "choose the model that it was made for",
        )
        sha256.update(block)
        if tokenizer.separator is not None:
            found.append(np.flatnonzero(block == tokenizer.separator) + start)
        drop_pages(tokens)
    separators = np.concatenate([np.empty(0, np.int64), *found])
    if len(separators):
        return (
            sha256.hexdigest(), np.append(0, separators + 1), np.append(separators, len(tokens))
        )  # fmt: skip
    starts = np.arange(0, len(tokens), PIECE)
    return sha256.hexdigest(), starts, np.minimum(starts + PIECE, len(tokens))


def _check_manifest(path: Path, tokenizer: Tokenizer, sha256: str) -> None:
    """Raises UserError if prepare.py's manifest beside the .bin says that it is of another
    tokenizer, or was whole once."""
    about = read_bin_manifest(path.parent)
    if path.stem not in about:
        return
    made_with = about["tokenizer"]
    require(
        made_with["fingerprint"] == tokenizer.fingerprint,
        f"{path} was made with the tokenizer {made_with['name']}, not with {tokenizer.name} of the "
        "model: choose the model that it was made for, or its --tokenizer",
    )
    require(
        about[path.stem]["sha256"] == sha256,
        f"{path} is damaged: its sha256 is not that of manifest.json beside it; make it again with "
        "prepare.py --fresh",
    )


def _index(tokens: np.memmap, starts: np.ndarray, stops: np.ndarray) -> array.array:
    """Offset, length and id of each document that is not empty and not there before."""
    index, seen, n_read = array.array("q"), Seen(), 0
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        number = int.from_bytes(hashlib.sha256(tokens[start:stop]).digest()[:8], "little") >> 1
        if stop > start and seen.add(number):
            index.extend((start, stop - start, number))
        n_read += stop - start
        if n_read > SCAN:
            drop_pages(tokens)
            n_read = 0
    return index


def _stamp(folder: Path) -> list[int] | None:
    """Size and date of the file that the folder's corpus was made of, if it holds one."""
    try:
        return json.loads((folder / "corpus.json").read_text()).get("stamp")
    except (OSError, ValueError):
        return None
