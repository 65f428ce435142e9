"""Text to token ids: a model's own tokenizer, GPT-2's, bytes, or a character vocabulary; or none at
all, for text that is ids already.

Whatever the kind, text is text: a document that contains "<|endoftext|>" gets the ordinary tokens
of these characters, so that no corpus can forge the end of a document.
"""

import base64
import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_coding.config import UserError, first_line, require
from sparse_coding.files import JSON_BYTES, read_json
from sparse_coding.lm.model import SIZES, hub_commit
from sparse_coding.lm.nanogpt import read_meta_pickle

if TYPE_CHECKING:
    import tokenizers

# what the token between documents is called in vocabularies that don't say which it is
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<s>", "<bos>")
UNKNOWN = ("<unk>", "<|unk|>", "[UNK]")
# encoded once for the fingerprint: tells apart equal vocabularies that split text differently
PROBE = "def f(x): # It's  naïve\n\treturn 3.14159 * x\n\n\u2014 <|endoftext|> \u4f60\u597d\r\n"
GPT2_IDS = range(50257, 50305)  # vocab_size of models on GPT-2's BPE, nanoGPT's padding included
BESIDE = ("tokenizer.json", "meta.json", "meta.pkl")  # looked for beside a checkpoint or a bin
# names of a folder's files that AutoTokenizer may read
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "special_tokens_map.json",
                   "added_tokens.json", "config.json", "*.model", "*.tiktoken")  # fmt: skip
MOST = 2**53  # of documents, tokens or bytes: sums and doubles of such numbers are numbers, too
WITH_IDS = ("vocab", "added_tokens", "added_tokens_decoder")  # fields of a tokenizer's JSON
ID_FILES = ("vocab.json", "added_tokens.json")  # its files that are nothing but text -> id
MAY_LACK = {"_raise_exceptions_for_missing_entries": False,
            "_raise_exceptions_for_connection_errors": False}  # fmt: skip
SPLIT = {"documents": int, "tokens": int, "bytes": int}
MANIFEST = {  # fields of prepare.py's manifest.json
    "constants": {"tokenizer": ("bpe", "bytes", "gpt2")},
    "tokenizer": {"name": str, "fingerprint": str},
    "vocab_size": int,
    "end_of_text": int,
    "exhausted": bool,
    "train": SPLIT | {"sha256": str},
    "val": SPLIT | {"sha256": str},
}
NAMED = ("auto", "gpt2", "bytes", "ids")  # --tokenizer's that are no files
CHOICES = (
    "gpt2, bytes, a tokenizer.json, a JSON vocabulary, nanoGPT's meta.pkl, a folder, a hub id, "
    "or of a .bin ids"
)


@dataclass(frozen=True)
class Tokenizer:
    """Encodes text and shows tokens. Made by load_tokenizer."""

    name: str  # for the manifest: "hf:gpt2", "tiktoken:gpt2", "bytes", "vocab:meta.pkl", "ids"
    fingerprint: str  # 16 hex digits of the vocabulary and of how a sample of text is cut
    state: str  # 16 hex digits of all of it, as far as it is known: of how any text is cut
    vocab_size: int  # ids that the model has; the tokenizer may have fewer (padded vocabularies)
    separator: int | None  # id put between documents, as the model was trained; None: there is none
    special_ids: frozenset[int]  # bos, eos, padding, ...: no tokens of text
    # ids of each text; no special token is added or read. Raises UserError for a character that a
    # character vocabulary lacks
    encode_batch: Callable[[list[str]], list[list[int]]] = field(repr=False, compare=False)
    pieces: dict[int, bytes] = field(repr=False, compare=False)  # id -> the text it stands for
    bos: int | None = None  # id at the start of a row, where rows are to begin with one

    def token_texts(self) -> list[str]:
        """Display text of each of the vocab_size ids: leading spaces kept, bytes that are no UTF-8
        as \\xNN, ids that the tokenizer lacks as [id]. Not escaped for HTML."""
        return [
            self.pieces[i].decode("utf-8", "backslashreplace") if i in self.pieces else f"[{i}]"
            for i in range(self.vocab_size)
        ]


def load_tokenizer(
    model: str, *, choice: str = "auto", vocab_size: int, revision: str = "", dataset: str = ""
) -> Tokenizer:
    """The tokenizer of a model.

    Args:
        model: hub id, local folder, or nanoGPT checkpoint (a file)
        choice: "auto" (the model's own; for a checkpoint see _choice_for_checkpoint), or one of
            CHOICES
        vocab_size: ids that the model has
        revision: of the hub repository `model`
        dataset: the text that is to be encoded; if a .bin of nanoGPT, it tells a checkpoint's
    Raises:
        UserError: none found, not readable, or with more ids than the model.
    """
    if choice == "auto":
        if not Path(model).is_file():
            return _from_transformers(model, vocab_size, revision=revision)
        choice = _choice_for_checkpoint(Path(model), vocab_size, dataset)
        require(
            choice != "",
            f"no tokenizer for {model} with {vocab_size} ids: put its {', '.join(BESIDE[:-1])} or "
            f"{BESIDE[-1]} beside it, or give --tokenizer: {CHOICES}",
        )
    if choice == "gpt2":
        return _tiktoken_gpt2(vocab_size)
    if choice == "bytes":
        return _bytes(vocab_size)
    if choice == "ids":
        return _ids(vocab_size, dataset)
    path = Path(choice).expanduser()
    if path.is_file():
        return _from_file(path, vocab_size)
    found = path.is_dir() or is_hub_id(choice)
    require(found, f"no tokenizer {choice}: choose {CHOICES}")
    return _from_transformers(str(path), vocab_size)


def is_hub_id(choice: str) -> bool:
    """Whether a --tokenizer means one of the hub."""
    looks_like_path = choice.endswith((".json", ".pkl")) or choice.startswith((".", "/", "~"))
    return not (choice in NAMED or looks_like_path or os.path.exists(choice))


def tokenizer_files(model: str, choice: str, dataset: str) -> list[Path]:
    """The local files, besides those of the model's folder, on which load_tokenizer's answer may
    depend: see there."""
    if choice == "auto":
        folders = _folders(Path(model), dataset) if Path(model).is_file() else []
        beside = [folder / name for folder in folders for name in ("manifest.json", *BESIDE)]
        return [path for path in beside if path.is_file()]
    path = Path(choice).expanduser()
    if choice in NAMED or not os.path.exists(path):
        return []
    return files_like(path, TOKENIZER_FILES) if path.is_dir() else [path]


def files_like(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files in the folder whose names are like one of the patterns, sorted."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def _choice_for_checkpoint(model: Path, vocab_size: int, dataset: str) -> str:
    """The --tokenizer of a nanoGPT checkpoint: a file beside it, or beside the .bin `dataset`; else
    what its vocab_size says: gpt2 or bytes; "" if that is neither's."""
    for folder in _folders(model, dataset):
        kind = read_bin_manifest(folder).get("constants", {}).get("tokenizer")
        if kind in ("gpt2", "bytes"):
            return kind
        for name in BESIDE:
            if (folder / name).is_file():
                return str(folder / name)
    if vocab_size in GPT2_IDS:
        return "gpt2"
    return "bytes" if vocab_size in (256, 257) else ""


def _folders(model: Path, dataset: str) -> list[Path]:
    """Where a checkpoint's tokenizer is looked for, in this order."""
    is_bin = dataset.endswith(".bin")
    return [model.parent, *([Path(dataset).expanduser().parent] if is_bin else [])]


def read_bin_manifest(folder: Path) -> dict:
    """What prepare.py wrote beside its bins; {} if there is none, or one of another program.

    Raises:
        UserError: it is damaged, or has other fields than prepare.py's.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        return {}
    remedy = "remove it, or make the bins again with prepare.py --fresh"
    manifest = read_json(path, remedy=remedy)
    return check_fields(manifest, MANIFEST, path, remedy) if "end_of_text" in manifest else {}


def check_fields(content: dict, fields: dict, path: Path, remedy: str) -> dict:
    """The content of a file of prepare.py, if its fields are of these types.

    fields: type by name, or the values that it may have; of an object, its fields in turn
    Raises:
        UserError: one is missing or of another type.
    """
    for name, kind in fields.items():
        value = content.get(name)
        if isinstance(kind, dict) and isinstance(value, dict):
            check_fields(value, kind, path, remedy)
            continue
        good = value in kind if isinstance(kind, tuple) else type(value) is kind
        if not good or (kind is int and not 0 <= value <= MOST):
            raise UserError(f"{path}: {name} {str(value)[:60]} is not of prepare.py: {remedy}")
    return content


# --- bytes, GPT-2, character vocabularies ---


def _bytes(vocab_size: int) -> Tokenizer:
    """Ids 0-255 are the bytes of UTF-8; a 257th parts documents."""
    separator = 256 if vocab_size == 257 else None
    pieces = {i: bytes([i]) for i in range(256)}
    return _make(
        "bytes",
        pieces if separator is None else pieces | {separator: b"<|endoftext|>"},
        encode=lambda texts: [list(text.encode()) for text in texts],
        vocab_size=vocab_size,
        separator=separator,
        special=set() if separator is None else {separator},
    )


def _ids(vocab_size: int, dataset: str) -> Tokenizer:
    """Of a .bin whose tokenizer is not known: a token's text is its number."""
    require(
        dataset.endswith(".bin"),
        f"--tokenizer ids is for a .bin of token ids, not for the text of --dataset {dataset}: use "
        f"{CHOICES}",
    )
    numbers = {i: b"%d " % i for i in range(vocab_size)}
    return _make(
        "ids",
        numbers,
        encode=lambda texts: [[] for _ in texts],  # there is no text
        vocab_size=vocab_size,
        separator=None,
        special=set(),
        probe="",
    )


def _tiktoken_gpt2(vocab_size: int) -> Tokenizer:
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; a torn file
        raise UserError(
            f"tiktoken can't fetch gpt2 ({type(error).__name__}): where there is network, run "
            "`TIKTOKEN_CACHE_DIR=D python -c \"import tiktoken; tiktoken.get_encoding('gpt2')\"`, "
            "copy D and set TIKTOKEN_CACHE_DIR to it; or give --tokenizer FOLDER with GPT-2's"
        ) from None
    return _make(
        "tiktoken:gpt2",
        {i: encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)},
        encode=encoding.encode_ordinary_batch,
        vocab_size=vocab_size,
        separator=encoding.eot_token,
        special={encoding.eot_token},
    )


def _characters(name: str, stoi: object, *, vocab_size: int) -> Tokenizer:
    """A vocabulary character -> id, as in nanoGPT's data/shakespeare_char.

    Longer entries must be special ("<|endoftext|>"): text never makes them. A character that is
    missing becomes the <unk> entry if there is one, else it is an error.
    """
    plain = isinstance(stoi, dict) and all(
        isinstance(text, str) and text and type(i) is int and i >= 0 for text, i in stoi.items()
    )
    require(plain and bool(stoi), f"{name} is no vocabulary: expected character -> id, or stoi")
    require(len(set(stoi.values())) == len(stoi), f"{name}: two characters share an id")
    special = {text: i for text, i in stoi.items() if len(text) > 1}
    longer = next((text for text in special if not re.fullmatch(r"<.+>|\[.+\]", text)), None)
    require(longer is None, f"{name}: {longer!r} is no character: give a tokenizer.json instead")
    unknown = next((special[text] for text in UNKNOWN if text in special), None)

    def encode(texts: list[str]) -> list[list[int]]:
        try:
            return [
                [stoi[c] if unknown is None else stoi.get(c, unknown) for c in t] for t in texts
            ]
        except KeyError as error:
            raise UserError(
                f"character {error} of the text is not among the {len(stoi)} of {name}: choose the "
                "text that the model was trained on, or another --tokenizer"
            ) from None

    return _make(
        name,
        {i: text.encode("utf-8", "replace") for text, i in stoi.items()},
        encode=encode,
        vocab_size=vocab_size,
        separator=next((special[text] for text in SEPARATORS if text in special), None),
        special=set(special.values()) - {unknown},  # an unknown character is text
        probe="",
    )


def _from_file(path: Path, vocab_size: int) -> Tokenizer:
    """A tokenizer.json of the tokenizers library, a JSON vocabulary or a meta.pkl."""
    if path.suffix == ".pkl":
        content = read_meta_pickle(path)
    else:
        content = read_json(path, remedy=f"choose {CHOICES}")
    if isinstance(content.get("model"), dict):
        return _from_tokenizer_json(path, content, vocab_size=vocab_size)
    stoi = content.get("stoi", content)
    return _characters(f"vocab:{path.name}", stoi, vocab_size=vocab_size)


# --- the tokenizers and transformers libraries ---


@contextlib.contextmanager
def _of_library(failure: str, remedy: str) -> Iterator[None]:
    """Turns what they raise into one line: Exception itself, or for a panic in their Rust a
    PanicException, which is none."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        raise UserError(f"{failure} ({first_line(error)}): {remedy}") from None


def _require_bounded(path: Path, content: dict) -> None:
    """Raises UserError for a tokenizer's JSON of which the library would take memory without bounds
    and be ended by the system: for all ids below the largest, and for the length that a table of
    sentencepiece says it has."""
    most, parts = SIZES["vocab_size"], [content, content.get("model")]
    held = [part.get(name) for part in parts if isinstance(part, dict) for name in WITH_IDS]
    for id in _inner([content] if path.name in ID_FILES else held):
        require(
            type(id) is not int or id < most,
            f"{path} is no tokenizer's: its id {str(id)[:40]} is not below {most:,}",
        )
    for part in _inner([content.get("normalizer"), content.get("pre_tokenizer")]):
        table = part.get("precompiled_charsmap") if isinstance(part, dict) else None
        if isinstance(table, str):
            data = base64.b64decode(table, validate=True)  # ValueError: said by _of_library
            size = int.from_bytes(data[:4], "little")
            whole = len(data) >= 4 + size and size % 4 == 0
            require(whole, f"{path} is damaged: its precompiled_charsmap is not whole")


def _inner(parts: list) -> Iterator[object]:
    """All that is in them, at any depth, and they themselves."""
    todo = list(parts)
    while todo:
        part = todo.pop()
        yield part
        if isinstance(part, (dict, list)):
            todo += part.values() if isinstance(part, dict) else part


def _from_tokenizer_json(path: Path, content: dict, *, vocab_size: int) -> Tokenizer:
    import tokenizers

    with _of_library(f"{path} is no tokenizer.json", f"choose {CHOICES}"):
        _require_bounded(path, content)
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        ids = backend.get_vocab(with_added_tokens=True)
    separator = next((ids[text] for text in SEPARATORS if text in ids), None)
    return _from_backend(f"vocab:{path.name}", backend, vocab_size=vocab_size, separator=separator)


def _from_transformers(where: str, vocab_size: int, *, revision: str = "") -> Tokenizer:
    """The tokenizer of a hub id or folder, by AutoTokenizer; from the cache if it is there."""
    from transformers import AutoTokenizer
    from transformers.utils import cached_file

    options = dict(revision=hub_commit(where, revision) or "main")
    for path in Path(where).glob("*.json") if Path(where).is_dir() else ():
        too_large = f"{path} is larger than {JSON_BYTES >> 20} MB: no tokenizer's; remove it"
        require(path.stat().st_size <= JSON_BYTES, too_large)
    remedy = f"`hf download {where}` where there is network puts it into the cache"
    if Path(where).is_dir():
        remedy = "save it there with tokenizer.save_pretrained"
    with _of_library(f"no tokenizer in {where}", f"{remedy}; or give --tokenizer"):
        for file in ("tokenizer.json", "tokenizer_config.json", *ID_FILES):
            if found := cached_file(where, file, **options, **MAY_LACK):
                _require_bounded(Path(found), read_json(Path(found), remedy=remedy))
        own = AutoTokenizer.from_pretrained(where, trust_remote_code=False, **options)
        first = own("a")["input_ids"][:1]
        bos, eos, special = own.bos_token_id, own.eos_token_id, set(own.all_special_ids) - {None}
        if any(type(i) is not int for i in special | {bos, eos} - {None}):
            raise ValueError("a special token has no number")
    backend = getattr(own, "backend_tokenizer", None)
    require(backend is not None, f"{where} has no fast tokenizer: give --tokenizer tokenizer.json")
    begins = bos is not None and first == [bos]  # texts with bos: the model was trained so
    separator = bos if begins or eos is None else eos
    name = Path(where).name if Path(where).is_dir() else where  # the same on every machine
    tokenizer = _from_backend(
        f"hf:{name}", backend, vocab_size=vocab_size, separator=separator,
        special=special,
    )  # fmt: skip
    return tokenizer if bos is None or bos >= vocab_size else replace(tokenizer, bos=bos)


def _from_backend(
    name: str,
    backend: "tokenizers.Tokenizer",
    *,
    vocab_size: int,
    separator: int | None,
    special: Iterable[int] = (),
) -> Tokenizer:
    """Changes the backend's settings."""
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # text that looks like a special token is text
    added = backend.get_added_tokens_decoder()
    special = set(special) | {i for i, token in added.items() if token.special}
    special |= set() if separator is None else {separator}

    def encode(texts: list[str]) -> list[list[int]]:
        with _of_library(f"{name} can't encode this text", f"give --tokenizer: {CHOICES}"):
            return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]

    with _of_library(f"{name} is damaged", f"give --tokenizer: {CHOICES}"):
        whole = backend.to_str()
    byte_level = "ByteLevel" in str(json.loads(whole)["decoder"])
    pieces = {
        i: text.encode() if i in added else _piece_bytes(text, byte_level=byte_level)
        for text, i in backend.get_vocab(with_added_tokens=True).items()
    }
    made = _make(
        name, pieces, encode=encode, vocab_size=vocab_size, separator=separator, special=special
    )
    return replace(made, state=hashlib.sha256(whole.encode()).hexdigest()[:16])


@functools.cache
def bytes_by_name() -> dict[str, int]:
    """GPT-2's names of the bytes in vocab files: printable ones stand for themselves, the others
    are the characters from U+0100 on (openai/gpt-2, src/encoder.py, bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def _piece_bytes(text: str, *, byte_level: bool) -> bytes:
    """The bytes that an entry of a vocabulary stands for."""
    if byte_level:
        byte_of = bytes_by_name()
        known = all(c in byte_of for c in text)
        return bytes(byte_of[c] for c in text) if known else text.encode()
    if re.fullmatch(r"<0x[0-9A-F]{2}>", text):  # byte fallback of sentencepiece
        return bytes([int(text[3:5], 16)])
    return text.replace("\u2581", " ").encode()  # sentencepiece's mark of a space


# --- all kinds ---


def _make(
    name: str,
    pieces: dict[int, bytes],
    *,
    encode: Callable[[list[str]], list[list[int]]],
    vocab_size: int,
    separator: int | None,
    special: set[int],
    probe: str = PROBE,
) -> Tokenizer:
    """Checks the ids against the model's and takes the fingerprint."""
    ordinary = pieces.keys() - special
    require(bool(ordinary), f"{name} has no vocabulary: give --tokenizer: {CHOICES}")
    # special ids beyond the model's are harmless: Gemma 3 has one, and text never makes them
    require(
        max(ordinary) < vocab_size,
        f"{name} has {max(ordinary) + 1} ids, the model {vocab_size}: it is another model's; "
        f"give --tokenizer: {CHOICES}",
    )
    content = hashlib.sha256(repr(encode([probe])[0]).encode())
    for i in sorted(pieces):
        content.update(b"%d:%d:" % (i, len(pieces[i])) + pieces[i])
    fingerprint = content.hexdigest()[:16]
    return Tokenizer(
        name=name,
        fingerprint=fingerprint,
        state=fingerprint,
        vocab_size=vocab_size,
        separator=separator if separator is not None and separator < vocab_size else None,
        special_ids=frozenset(i for i in special if i < vocab_size),
        encode_batch=encode,
        pieces=pieces,
        bos=separator if separator is not None and separator < vocab_size else None,
    )
