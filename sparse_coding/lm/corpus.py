"""A text as token ids on disk.

Text is streamed once and ids are read through a memory map, so memory stays flat in the size of
the text but for 24 bytes a document. A folder of a corpus holds

    tokens.bin      ids of all documents, one after another: uint16, or uint32 above 65 536 ids
    documents.npy   (n_documents, 3) int64: offset and length in tokens, id of the document
    corpus.json     what it is made of, counts and the sha256 of both; written last

A corpus that is damaged is made again. nanoGPT's .bin files of token ids are a corpus too, and are
used where they lie.
"""

import array
import contextlib
import hashlib
import math
import mmap
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np

from sparse_coding.config import hash63, progress_bar, require
from sparse_coding.files import (
    Damaged,
    held,
    is_temporary,
    kept_sha256,
    read_record,
    require_free_disk,
    sha256,
    write_record,
    written_whole,
)
from sparse_coding.lm.documents import Documents, document_id, in_batches, in_pieces
from sparse_coding.lm.tokenizer import Tokenizer, read_bin_manifest

BATCH = 2**19  # characters encoded at once: some 30 MB in the tokenizers library
RECENT = 2**16  # document ids kept in a set before they are sorted in
CHECK_BYTES = 2**24  # written between two looks at the free space
PIECE = 8192  # tokens of a document of a .bin where no separator occurs; ours, not tuned
SCAN = 2**22  # tokens of a .bin read at once
T = TypeVar("T")


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
        "tokenizer_state": tokenizer.state,
        "dtype": "uint16" if tokenizer.vocab_size <= 2**16 else "uint32",
        "max_tokens": max_tokens,
    }
    path = folder / "tokens.bin"
    with alone(folder):
        there = partial(_open_folder, folder, path, must_match)
        if corpus := _unless_damaged(there, "the text is encoded again"):
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


def _unless_damaged(open_it: Callable[[], T], consequence: str) -> T | None:
    """What it gives; None where a file is damaged, which is said."""
    try:
        return open_it()
    except Damaged as error:
        error.warn(consequence)
        return None


def _open_folder(folder: Path, tokens_path: Path, must_match: dict) -> Corpus | None:
    """The corpus of the folder; None without one. Raises Damaged, UserError if it is another."""
    metadata, index_path = _stored(folder), folder / "documents.npy"
    if not metadata:
        return None
    _require_same(folder, metadata, must_match)
    if tokens_path.parent == folder:  # else it is known by its date: see open_bin
        _check(tokens_path, metadata.get("sha256"))
    _check(index_path, metadata.get("documents_sha256"))
    try:
        documents = np.load(index_path, allow_pickle=False)
        tokens = np.memmap(tokens_path, metadata["dtype"], mode="r")
        offsets, lengths, _ = documents.T
        sound = len(tokens) == metadata["n_tokens"] and len(offsets) == metadata["n_documents"]
        # that no document lies elsewhere matters where an older version left no checksum
        sound &= bool((offsets >= 0).all() and (lengths > 0).all())
        sound &= bool((offsets <= len(tokens) - lengths).all())
    except (EOFError, ValueError, KeyError, TypeError) as error:
        raise Damaged(index_path, error) from None
    if not sound:
        raise Damaged(index_path, "it does not fit the tokens")
    return Corpus(tokens, documents, metadata)


def _stored(folder: Path) -> dict:
    """The folder's corpus.json, {} if there is none. Raises Damaged."""
    path = folder / "corpus.json"
    return read_record(path) if path.exists() else {}


def _require_same(folder: Path, metadata: dict, must_match: dict) -> None:
    """Raises UserError if the corpus with the metadata is another."""
    for name, value in must_match.items():
        require(
            metadata.get(name) == value,
            f"{folder} holds a corpus with {name} {metadata.get(name)!r}, not {value!r}, says its "
            f"corpus.json: delete {folder} or choose another folder",
        )


def _check(path: Path, checksum: str | None) -> None:
    """Raises Damaged if the file is missing or has another sha256; None: it is not known."""
    if not path.exists():
        raise Damaged(path, "it is missing")
    if checksum not in (None, sha256(path)):
        raise Damaged(path, "its sha256 differs")


class _Hashing:
    """A file that is written, and its sha256. (No file to numpy, whose own way of writing to one
    does not say that the disk is full.)"""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)


def _write_index(folder: Path, index: array.array, metadata: dict) -> None:
    """documents.npy, then corpus.json, with which the corpus begins to count.

    Args:
        index: offset, length and id of each document, one after another
    """
    documents = np.array(index, dtype=np.int64).reshape(-1, 3)
    with written_whole(folder / "documents.npy") as path, open(path, "wb") as file:
        hashing = _Hashing(file)
        np.save(hashing, documents, allow_pickle=False)
    known = {"n_documents": len(documents), "documents_sha256": hashing.sha256.hexdigest()}
    write_record(folder / "corpus.json", metadata | known)


# --- text to tokens ---


def _encode(texts: list[str], tokenizer: Tokenizer, dtype: str) -> Iterator[Iterable[np.ndarray]]:
    """Ids of each text of a batch, in pieces. A long text is cut before spaces and encoded piece by
    piece, when they are asked for: some tokenizers, those of sentencepiece, make one token more at
    each cut."""
    if len(texts) == 1:
        pieces = in_pieces(texts[0], BATCH, longest=2 * BATCH, ends=((" ", 0),))
        yield (np.array(tokenizer.encode_batch([piece])[0], dtype) for piece in pieces)
        return
    for ids in tokenizer.encode_batch(texts):
        yield [np.array(ids, dtype)]


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
        for number, pieces in zip(new, encoded, strict=True):
            start = self.n_tokens
            for ids in pieces:
                self._write(ids[: min(len(ids), self.max_tokens - self.n_tokens)], file)
                if self.n_tokens == self.max_tokens:  # no more of a text that may be very long
                    break
            if self.n_tokens > start:
                self.index.extend((start, self.n_tokens - start, number))
        return self.n_tokens < self.max_tokens

    def _write(self, ids: np.ndarray, file: BinaryIO) -> None:
        if self.n_unchecked <= 0:
            require_free_disk(Path(file.name).parent, ids.nbytes + CHECK_BYTES)
            self.n_unchecked = CHECK_BYTES
        self.n_unchecked -= ids.nbytes
        file.write(ids.data)
        self.sha256.update(ids.data)
        self.n_tokens += len(ids)


# --- nanoGPT's .bin files ---


def open_bin(path: Path, tokenizer: Tokenizer, folder: Path) -> Corpus:
    """The corpus of a .bin (uint16 ids without a header); where its documents lie is kept in
    `folder`. It is scanned once, and again when its contents have changed.

    Documents are the stretches between separators, or pieces of PIECE tokens if none occurs. Equal
    ones are kept once. The id of a document is a hash of its tokens.

    Raises:
        UserError: no such file, empty, of an odd size, ids that the model lacks; the folder holds
            another corpus.
    """
    require(path.is_file(), f"--dataset {path}: no such file")
    size = path.stat().st_size
    require(size > 0, f"{path} is empty")
    require(size % 2 == 0, f"{path} has an odd number of bytes: no file of uint16 ids")
    must_match = {"fingerprint": tokenizer.fingerprint, "dtype": "uint16", "piece": PIECE}
    with alone(folder):
        again = f"{path} is scanned again"
        known = _unless_damaged(partial(_stored, folder), again)
        if known and known.get("sha256") == kept_sha256(path):
            there = partial(_open_folder, folder, path, must_match)
            if corpus := _unless_damaged(there, again):
                return corpus
        tokens = np.memmap(path, "uint16", mode="r")
        must_match["sha256"], starts, stops = _scan(tokens, tokenizer, path)
        _check_manifest(path, tokenizer, must_match["sha256"])
        if known:
            _require_same(folder, known, must_match)
        index = _index(tokens, starts, stops)
        require(len(index) > 0, f"{path} holds nothing but separators")
        counts = {
            "dataset": str(path), "tokenizer": tokenizer.name, "n_tokens": len(tokens),
            "n_duplicates": int((stops > starts).sum()) - len(index) // 3,
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
        tokenizer.name == "ids" or made_with["fingerprint"] == tokenizer.fingerprint,
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
