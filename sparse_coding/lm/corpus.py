"""A text as token ids on disk.

Text is streamed once and ids are read through a memory map, so memory stays flat in the size of
the text but for 24 bytes a document. A folder of a corpus holds

    tokens.bin      ids of all documents, one after another: uint16, or uint32 above 65 536 ids
    documents.npy   (n_documents, 3) int64: offset and length in tokens, id of the document
    corpus.json     what it is made of, counts and the sha256 of the tokens; written last

nanoGPT's .bin files of token ids are a corpus too, and are used where they lie.
"""

import array
import contextlib
import hashlib
import json
import math
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sparse_coding.config import UserError, hash63, progress_bar, require
from sparse_coding.files import held, is_temporary, require_free_disk, write_json, written_whole
from sparse_coding.lm.documents import Documents, document_id, in_batches, in_pieces
from sparse_coding.lm.tokenizer import Tokenizer, read_bin_manifest

BATCH = 2**19  # characters encoded at once: some 30 MB in the tokenizers library
RECENT = 2**16  # document ids kept in a set before they are sorted in
CHECK_BYTES = 2**24  # written between two looks at the free space
PIECE = 8192  # tokens of a document of a .bin where no separator occurs; ours, not tuned
SCAN = 2**22  # tokens of a .bin read at once


class Corpus:
    """Token ids and where the documents lie. Made by build_corpus or open_bin.

    Attributes:
        tokens: (n_tokens,) memory map of the ids
        offsets, lengths, ids: (n_documents,) int64; no document is empty or there twice
        metadata: corpus.json
    """

    def __init__(self, tokens: np.memmap, documents: np.ndarray, metadata: dict):
        self.tokens, self.metadata = tokens, metadata
        self.offsets, self.lengths, self.ids = np.ascontiguousarray(documents.T)

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """A copy of the tokens at the indices."""
        ids = np.asarray(self.tokens[indices])
        _drop_pages(self.tokens)
        return ids


def _drop_pages(tokens: np.memmap) -> None:
    """What was read of the file no longer counts as our memory; it stays in the system's cache."""
    tokens.base.madvise(mmap.MADV_DONTNEED)


def build_corpus(
    folder: Path, documents: Documents, tokenizer: Tokenizer, *, max_tokens: int | None = None
) -> Corpus:
    """The corpus in `folder`, encoded now unless it is there. Equal documents are kept once.

    Args:
        max_tokens: encoding stops there, if need be within a document
    Raises:
        UserError: the folder holds another corpus, the disk is too small, no tokens.
    """
    must_match = {
        "dataset": documents.name,
        "revision": documents.revision,
        "fingerprint": tokenizer.fingerprint,
        "dtype": "uint16" if tokenizer.vocab_size <= 2**16 else "uint32",
        "max_tokens": max_tokens,
    }
    path = folder / "tokens.bin"
    with alone(folder):
        if (corpus := _open_folder(folder, path, must_match)) is not None:
            return corpus
        writer = _Writer(must_match["dtype"], max_tokens)
        with written_whole(path) as temporary, open(temporary, "wb") as file:
            bar = progress_bar(documents, desc="token ids", unit=" documents")
            for batch in in_batches(bar, BATCH):
                if not writer.add(batch, tokenizer, file):
                    break
            require(writer.n_tokens > 0, f"{documents.name} has no token: choose another --dataset")
        metadata = {
            **must_match,
            "tokenizer": tokenizer.name,
            "n_tokens": writer.n_tokens,
            "n_duplicates": writer.n_duplicates,
            "sha256": writer.sha256.hexdigest(),
        }
        _write_index(folder, writer.index, metadata)
        return _open_folder(folder, path, must_match)


# --- the folder ---


@contextlib.contextmanager
def alone(
    folder: Path, *, lock: str = ".corpus.lock", when_busy: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Makes the folder, waits for another process that builds there, then removes what a killed
    one left half written.

    when_busy: called before waiting
    """
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder / lock, when_busy=when_busy):
        for path in folder.iterdir():
            if is_temporary(path):
                path.unlink()
        yield


def _open_folder(folder: Path, tokens_path: Path, must_match: dict) -> Corpus | None:
    """The corpus of the folder; None without one. Raises UserError if it is another or damaged."""
    remedy = f"delete {folder} or choose another folder"
    if not (folder / "corpus.json").exists():
        return None
    try:
        metadata = json.loads((folder / "corpus.json").read_text())
        documents = np.load(folder / "documents.npy", allow_pickle=False)
        n_bytes = metadata["n_tokens"] * np.dtype(metadata["dtype"]).itemsize
        whole = tokens_path.stat().st_size == n_bytes
        whole &= documents.shape == (metadata["n_documents"], 3)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the corpus in {folder} is damaged ({error}): {remedy}") from None
    for name, value in must_match.items():
        message = f"{folder} holds a corpus with {name} {metadata.get(name)!r}, not {value!r}"
        require(metadata.get(name) == value, f"{message}: {remedy}")
    require(whole, f"the corpus in {folder} is damaged (a file is too short or long): {remedy}")
    return Corpus(np.memmap(tokens_path, metadata["dtype"], mode="r"), documents, metadata)


def _write_index(folder: Path, index: array.array, metadata: dict) -> None:
    """documents.npy, then corpus.json, with which the corpus begins to count.

    Args:
        index: offset, length and id of each document, one after another
    """
    documents = np.array(index, dtype=np.int64).reshape(-1, 3)
    with written_whole(folder / "documents.npy") as path, open(path, "wb") as file:
        np.save(file, documents, allow_pickle=False)
    write_json(folder / "corpus.json", {**metadata, "n_documents": len(documents)})


# --- text to tokens ---


def _encode(texts: list[str], tokenizer: Tokenizer, dtype: str) -> list[np.ndarray]:
    """Ids of each text of a batch. A long text is cut before spaces and encoded piece by piece:
    some tokenizers, those of sentencepiece, make one token more at each cut."""
    if len(texts) == 1:
        pieces = in_pieces(texts[0], BATCH, longest=2 * BATCH, ends=((" ", 0),))
        encoded = (tokenizer.encode_batch([piece])[0] for piece in pieces)
        return [np.concatenate([np.array(ids, dtype) for ids in encoded])]
    return [np.array(ids, dtype) for ids in tokenizer.encode_batch(texts)]


class Seen:
    """Document ids met so far, at 8 bytes each: a Python set takes ten times that."""

    def __init__(self):
        self.sorted, self.recent = np.empty(0, dtype=np.int64), set()

    def add(self, number: int) -> bool:
        """Whether the id is new."""
        at = np.searchsorted(self.sorted, number)
        if number in self.recent or (at < len(self.sorted) and self.sorted[at] == number):
            return False
        self.recent.add(number)
        if len(self.recent) == RECENT:
            recent = np.fromiter(self.recent, dtype=np.int64, count=RECENT)
            self.sorted = np.union1d(self.sorted, recent)
            self.recent = set()
        return True


class _Writer:
    """Appends documents to tokens.bin and counts."""

    def __init__(self, dtype: str, max_tokens: int | None):
        self.dtype = dtype
        self.max_tokens = math.inf if max_tokens is None else max_tokens
        self.index, self.seen, self.sha256 = array.array("q"), Seen(), hashlib.sha256()
        self.n_tokens = self.n_duplicates = 0
        self.n_unchecked = 0  # bytes that may be written before the free space is looked at again

    def add(self, texts: list[str], tokenizer: Tokenizer, file: BinaryIO) -> bool:
        """Encodes and writes the texts that are new; False when max_tokens are there."""
        new = {number: text for text in texts if self.seen.add(number := document_id(text))}
        self.n_duplicates += len(texts) - len(new)
        encoded = _encode(list(new.values()), tokenizer, self.dtype)
        for number, ids in zip(new, encoded, strict=True):
            ids = ids[: min(len(ids), self.max_tokens - self.n_tokens)]
            if len(ids):
                self._write(number, ids, file)
        return self.n_tokens < self.max_tokens

    def _write(self, number: int, ids: np.ndarray, file: BinaryIO) -> None:
        if self.n_unchecked <= 0:
            require_free_disk(Path(file.name).parent, ids.nbytes + CHECK_BYTES)
            self.n_unchecked = CHECK_BYTES
        self.n_unchecked -= ids.nbytes
        file.write(ids.data)
        self.sha256.update(ids.data)
        self.index.extend((self.n_tokens, len(ids), number))
        self.n_tokens += len(ids)


# --- nanoGPT's .bin files ---


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
            return _open_folder(folder, path, must_match)
        tokens = np.memmap(path, "uint16", mode="r")
        must_match["sha256"], starts, stops = _scan(tokens, tokenizer, path)
        _check_manifest(path, tokenizer, must_match["sha256"])
        _open_folder(folder, path, must_match)  # refuses if another corpus is there
        index = _index(tokens, starts, stops)
        require(len(index) > 0, f"{path} holds nothing but separators")
        counts = {
            "dataset": str(path), "tokenizer": tokenizer.name, "n_tokens": len(tokens),
            "n_duplicates": int((stops > starts).sum()) - len(index) // 3, "stamp": stamp,
        }  # fmt: skip
        _write_index(folder, index, {**must_match, **counts})
        return _open_folder(folder, path, must_match)


def _scan(
    tokens: np.memmap, tokenizer: Tokenizer, path: Path
) -> tuple[str, np.ndarray, np.ndarray]:
    """(sha256 of the file, starts, stops of its documents)."""
    sha256, separators = hashlib.sha256(), [np.empty(0, np.int64)]
    for start in progress_bar(range(0, len(tokens), SCAN), desc="token ids", unit=" blocks"):
        block = tokens[start : start + SCAN]
        largest = int(block.max())
        require(
            largest < tokenizer.vocab_size,
            f"{path} has the id {largest}, the model only {tokenizer.vocab_size} ids: "
            "choose the model that it was made for",
        )
        sha256.update(block)
        if tokenizer.separator is not None:
            separators.append(np.flatnonzero(block == tokenizer.separator) + start)
        _drop_pages(tokens)
    ends = np.concatenate(separators)
    if len(ends):
        return sha256.hexdigest(), np.append(0, ends + 1), np.append(ends, len(tokens))
    starts = np.arange(0, len(tokens), PIECE)
    return sha256.hexdigest(), starts, np.minimum(starts + PIECE, len(tokens))


def _check_manifest(path: Path, tokenizer: Tokenizer, sha256: str) -> None:
    """Raises UserError if prepare.py's manifest beside the .bin says that it is of another
    tokenizer, or was whole once."""
    manifest = read_bin_manifest(path.parent)
    if path.stem not in manifest:
        return
    made_with = manifest["tokenizer"]
    require(
        made_with["fingerprint"] == tokenizer.fingerprint,
        f"{path} was made with the tokenizer {made_with['name']}, not with {tokenizer.name} of the "
        "model: choose the model that it was made for, or its --tokenizer",
    )
    require(
        manifest[path.stem]["sha256"] == sha256,
        f"{path} is damaged: its sha256 is not that of manifest.json beside it; make it again with "
        "prepare.py --fresh",
    )


def _index(tokens: np.memmap, starts: np.ndarray, stops: np.ndarray) -> array.array:
    """Offset, length and id of each document that is not empty and not there before."""
    index, seen, n_read = array.array("q"), Seen(), 0
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        number = hash63(tokens[start:stop])
        if stop > start and seen.add(number):
            index.extend((start, stop - start, number))
        n_read += stop - start
        if n_read > SCAN:
            _drop_pages(tokens)
            n_read = 0
    return index


def _stamp(folder: Path) -> list[int] | None:
    """Size and date of the file that the folder's corpus was made of, if it holds one."""
    try:
        return json.loads((folder / "corpus.json").read_text()).get("stamp")
    except (OSError, ValueError):
        return None
