"""What files beside nanoGPT's checkpoints and bins say about its tokens."""

import functools
import io
import json
import pickle
import pickletools
import re
from pathlib import Path

from sparse_coding.config import UserError, require

GPT2_IDS = range(50257, 50305)  # vocab_size of models on GPT-2's BPE, nanoGPT's padding included
BESIDE = ("tokenizer.json", "meta.json", "meta.pkl")  # looked for beside a checkpoint or a bin
META_BYTES = 2**26  # a character vocabulary of more than 64 MB is none


def choice_for_checkpoint(model: Path, vocab_size: int, dataset: str) -> str:
    """The --tokenizer of a nanoGPT checkpoint: a file beside it, or beside the .bin `dataset`; else
    what its vocab_size says: gpt2 or bytes; "" if that is neither's."""
    folders = [model.parent]
    if dataset.endswith(".bin"):
        folders.append(Path(dataset).expanduser().parent)
    for folder in folders:
        kind = read_bin_manifest(folder).get("constants", {}).get("tokenizer")
        if kind in ("gpt2", "bytes"):
            return kind
        for name in BESIDE:
            if (folder / name).is_file():
                return str(folder / name)
    if vocab_size in GPT2_IDS:
        return "gpt2"
    return "bytes" if vocab_size in (256, 257) else ""


def read_bin_manifest(folder: Path) -> dict:
    """What prepare.py wrote beside its bins; {} if there is none, or one of another program."""
    try:
        about = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) and "end_of_text" in about else {}


class _PlainUnpickler(pickle.Unpickler):
    """Makes numbers, strings and containers. Whatever else is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> type:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_meta_pickle(path: Path) -> dict:
    """The dict of nanoGPT's meta.pkl (vocab_size, stoi, itos), without running anything in it.

    Raises:
        UserError: not a pickle, one that asks for more than plain containers, or no dict.
    """
    refusal = f"{path} is no meta.pkl of nanoGPT"
    require(path.is_file(), f"{path}: no such file")
    require(path.stat().st_size <= META_BYTES, f"{refusal}: larger than {META_BYTES >> 20} MB")
    data = path.read_bytes()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            # the C unpickler allocates as many slots as the largest number says
            if "PUT" in opcode.name and argument is not None and int(argument) > len(data):
                raise pickle.UnpicklingError("a memo index out of bounds")
        content = _PlainUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # the pickle module raises nearly any, says its manual
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{refusal} ({reason}): save stoi as JSON instead") from None
    require(isinstance(content, dict), f"{refusal}: it holds a {type(content).__name__}")
    return content


@functools.cache
def byte_names() -> dict[int, str]:
    """GPT-2's names for bytes in vocab files: printable ones stand for themselves, the others for
    the characters from U+0100 on (openai/gpt-2, src/encoder.py, bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


@functools.cache
def _byte_of_character() -> dict[str, int]:
    return {name: byte for byte, name in byte_names().items()}


def piece_bytes(text: str, byte_level: bool) -> bytes:
    """The bytes that an entry of a vocabulary stands for."""
    if byte_level:
        byte_of = _byte_of_character()
        known = all(c in byte_of for c in text)
        return bytes(byte_of[c] for c in text) if known else text.encode()
    if re.fullmatch(r"<0x[0-9A-F]{2}>", text):  # byte fallback of sentencepiece
        return bytes([int(text[3:5], 16)])
    return text.replace("\u2581", " ").encode()  # sentencepiece's mark of a space
