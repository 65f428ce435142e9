"""Writes nanoGPT's train.bin and val.bin from any text, as a stream, with little disk.

    python nanogpt_config/prepare.py                        the demo model's data
    python nanogpt_config/prepare.py --source openwebtext   the small transformer's: 1 GB of disk
    python nanogpt_config/prepare.py --source openwebtext --tokens all             18 GB of disk
    python nanogpt_config/prepare.py --source my_texts/ --tokenizer bytes --output-dir data/mine

Into --output-dir go
    train.bin, val.bin   token ids, uint16; every document is followed by the end-of-text token
    tokenizer.json       of bpe
    meta.pkl             of bpe and bytes, for nanoGPT, which reads its vocabulary size there
    manifest.json        source and revision, tokenizer, sizes in tokens and bytes, sha256

The same command resumes; with more --tokens it adds to the bins. Held-out documents (val.bin) are
chosen by a hash of their text, so run.py, with the same share, holds out the same. 6 s for the
standard library (12 MB); 110 s of CPU time and at most 320 MB of memory for 206 MB.
"""

import dataclasses
import math
import pickle
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory

from bin_writer import Split, claim, expected_tokens, is_written, text_bytes, write_bins

from sparse_coding.config import parse_flags, require, require_flag, run_as_script
from sparse_coding.files import require_free_disk, sha256, write_atomic, write_json
from sparse_coding.lm.documents import (
    END_OF_TEXT,
    Documents,
    document_id,
    is_held_out,
    open_documents,
)
from sparse_coding.lm.tokenizer import Tokenizer, load_tokenizer

DESCRIPTION = __doc__.split("\n\n")[0]
GPT2_TOKENS = 50_257
OPENWEBTEXT = "Skylion007/openwebtext"  # the parquet copy
BPE_CHARACTERS = 50_000_000  # a vocabulary of a thousand tokens needs no more to be learnt; ours


@dataclass(frozen=True)
class Config:
    """The constants: each is a flag."""

    # stdlib: the standard library's .py files; openwebtext; a file, a folder, a hub dataset
    source: str = "stdlib"
    text_column: str = "text"  # of .jsonl, .parquet and hub datasets
    revision: str = ""  # of a hub dataset; default: the one that we pin, else main
    # bpe: learnt on this text (byte-level); gpt2: by tiktoken; auto: gpt2 for openwebtext, else bpe
    tokenizer: Literal["auto", "bpe", "bytes", "gpt2"] = "auto"
    vocab_size: int = 1024  # of bpe: 256 bytes, end of text, and merges
    held_out: float = 0.05  # share of the documents that goes to val.bin
    # stop when train.bin has so many: 500M, 2B, 100000, all; auto: 500M of openwebtext, else all
    tokens: str = "auto"
    output_dir: str = ""  # default: data/<source>-<tokenizer>
    fresh: bool = False  # start again, whatever --output-dir holds


def main(argv: list[str]) -> int:
    """Runs the command line `argv`; the exit code."""
    cfg = parse_flags(Config(), argv, description=DESCRIPTION)
    require_flag(cfg, "vocab_size", 257 <= cfg.vocab_size <= 65_535, "between 257 and 65535")
    require_flag(cfg, "held_out", 0 < cfg.held_out < 1, "between 0 and 1")
    cfg = resolved(cfg)
    limit = read_count(cfg.tokens)
    name = re.sub(r"[^\w.-]+", "-", f"{cfg.source}-{cfg.tokenizer}").strip("-.")
    folder = Path(cfg.output_dir or f"data/{name}")
    require_free_disk(folder, 2 * limit if limit < math.inf else 0)
    source = OPENWEBTEXT if cfg.source == "openwebtext" else cfg.source
    documents = open_documents(source, text_column=cfg.text_column, revision=cfg.revision)

    constants = constants_of(cfg, documents)
    if not cfg.fresh and is_written(folder, constants, limit=limit):
        print(f"done before: {folder} (--fresh starts again)")
        return 0
    learnt = learnt_bpe(cfg, documents, folder) if cfg.tokenizer == "bpe" else ""
    tokenizer = open_tokenizer(cfg, learnt)
    n_train = plan(cfg, documents, tokenizer, folder, limit=limit)
    claim(folder, constants, fresh=cfg.fresh)
    if learnt:
        write_atomic(folder / "tokenizer.json", learnt)
    splits = write_bins(
        documents, tokenizer, folder, constants=constants, limit=limit, expected=n_train
    )
    finish(folder, constants, tokenizer, splits, exhausted=splits["train"].tokens < limit)
    return 0


def resolved(cfg: Config) -> Config:
    """With what "auto" stands for."""
    owt = cfg.source in ("openwebtext", OPENWEBTEXT)
    auto = {"tokenizer": "gpt2" if owt else "bpe", "tokens": "500M" if owt else "all"}
    return dataclasses.replace(cfg, **{k: v for k, v in auto.items() if getattr(cfg, k) == "auto"})


def read_count(text: str) -> float:
    """500M -> 500_000_000; all -> infinity."""
    if text == "all":
        return math.inf
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.upper())
    require(bool(match), f"--tokens {text} must be all or a number like 100000, 500M, 2B")
    count = int(float(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}[match[2]])
    require(count > 0, f"--tokens {text} must be above 0")
    return count


def constants_of(cfg: Config, documents: Documents) -> dict:
    """What decides the contents of the bins, up to where they end."""
    opened = {"source": documents.name, "revision": documents.revision}
    elsewhere = {"output_dir", "fresh", "tokens"}
    elsewhere |= {"vocab_size"} if cfg.tokenizer != "bpe" else set()
    constants = dataclasses.asdict(cfg) | opened
    return {name: value for name, value in constants.items() if name not in elsewhere}


def plan(
    cfg: Config, documents: Documents, tokenizer: Tokenizer, folder: Path, *, limit: float
) -> float:
    """Prints what the bins will take; tokens that train.bin will have, infinite if not known.

    Raises:
        UserError: that is more than the disk has free.
    """
    n_bytes = text_bytes(documents.name, cfg.text_column)
    n_train = limit
    if n_bytes is not None:
        every = expected_tokens(documents, tokenizer, n_bytes)
        n_train = min(limit, every * (1 - cfg.held_out))
    if n_train == math.inf:
        print(f"{documents.name} does not say how much text it has: the bins grow to its end")
        return n_train
    size = 2 * n_train / (1 - cfg.held_out)
    print(f"the bins will take about {size / 1e6:,.0f} MB in {folder}", flush=True)
    require_free_disk(folder, int(size) - sum(f.stat().st_size for f in folder.glob("*.bin")))
    return n_train


# --- the tokenizer ---


def learnt_bpe(cfg: Config, documents: Documents, folder: Path) -> str:
    """tokenizer.json of the folder if it is there, else learnt on the documents for train.bin."""
    path = folder / "tokenizer.json"
    if path.exists() and not cfg.fresh:
        load_tokenizer("", choice=str(path), vocab_size=cfg.vocab_size)  # raises where it is none
        return path.read_text()
    print(f"learning a BPE of {cfg.vocab_size} tokens", flush=True)
    texts = (text for text in documents if not is_held_out(document_id(text), cfg.held_out))
    return learn_bpe(texts, cfg.vocab_size)


def open_tokenizer(cfg: Config, learnt: str) -> Tokenizer:
    """Of --tokenizer; learnt: tokenizer.json of a bpe."""
    if cfg.tokenizer == "gpt2":
        return load_tokenizer("", choice="gpt2", vocab_size=GPT2_TOKENS)
    if cfg.tokenizer == "bytes":
        return load_tokenizer("", choice="bytes", vocab_size=257)  # 256: end of text
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokenizer.json")
        path.write_text(learnt)
        tokenizer = load_tokenizer("", choice=str(path), vocab_size=cfg.vocab_size)
    # a small text has fewer pairs to merge than were asked for
    return dataclasses.replace(tokenizer, vocab_size=len(tokenizer.pieces))


def learn_bpe(texts: Iterable[str], vocab_size: int) -> str:
    """The tokenizer.json of a byte-level BPE that cuts text into words as GPT-2's does.

    Id 0 is end of text, then come the 256 bytes, then the merges.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(first_characters(texts, BPE_CHARACTERS), trainer)
    return tokenizer.to_str(pretty=True)


def first_characters(texts: Iterable[str], n_characters: int) -> Iterator[str]:
    """Texts until they have so many characters together."""
    for text in texts:
        if n_characters <= 0:
            return
        n_characters -= len(text)
        yield text


def finish(
    folder: Path,
    constants: dict,
    tokenizer: Tokenizer,
    splits: dict[str, Split],
    *,
    exhausted: bool,
) -> None:
    """meta.pkl for nanoGPT, then the manifest, with which the bins begin to count."""
    for name, split in splits.items():
        require(
            split.documents > 0,
            f"no document fell to {name}.bin of {sum(s.documents for s in splits.values())}: "
            "give more documents, or another --held-out and --fresh",
        )
    if constants["tokenizer"] != "gpt2":  # without meta.pkl nanoGPT takes GPT-2's vocabulary size
        # for train.py vocab_size; for sample.py the others. Its format, so the one pickle of ours
        itos = dict(enumerate(tokenizer.token_texts()))
        stoi = {text: i for i, text in itos.items()}
        meta = {"vocab_size": tokenizer.vocab_size, "itos": itos, "stoi": stoi}
        write_atomic(folder / "meta.pkl", pickle.dumps(meta))
    manifest = {
        "constants": constants,
        "tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint},
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.separator,
        "dtype": "uint16",
        "exhausted": exhausted,  # the source has no more
    }
    for name, split in splits.items():
        manifest[name] = dataclasses.asdict(split) | {"sha256": sha256(folder / f"{name}.bin")}
        per_token = split.bytes / split.tokens
        print(f"{name}.bin: {split.documents:,} documents, {split.tokens:,} tokens "
              f"of {per_token:.2f} bytes")  # fmt: skip
    write_json(folder / "manifest.json", manifest)
    (folder / "progress.json").unlink()
    print(f"in nanoGPT's folder: python train.py OVERRIDES.py --dataset={folder.resolve()}")


if __name__ == "__main__":
    run_as_script(main)
