"""Turns a nanoGPT checkpoint into a folder that transformers loads, and says what it is worth.

    python nanogpt_config/convert.py --checkpoint nanoGPT/out/ckpt.pt --data data/stdlib-bpe \\
        --output-dir models/demo

--data is the folder of prepare.py that the model was trained on. Printed are bits per byte of its
val.bin beside gzip's and a byte-unigram model's, and what each layer's MLP is worth: the loss with
its activations set to their mean, or to zero. A sparse autoencoder of a layer whose MLP is worth
nothing recovers the loss whatever it learnt.
"""

import base64
import gzip
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory

import numpy as np
import torch
from torch import Tensor

from sparse_coding.config import parse_flags, require, require_flag, run_as_script
from sparse_coding.files import write_atomic, write_json
from sparse_coding.lm.documents import END_OF_TEXT
from sparse_coding.lm.model import (
    LanguageModel,
    Site,
    activations,
    find_site,
    load_language_model,
    logits,
    next_token_loss,
)
from sparse_coding.lm.nanogpt import load_nanogpt
from sparse_coding.lm.tokenizer import Tokenizer, bytes_by_name, load_tokenizer, read_bin_manifest
from sparse_coding.sweep.hardware import pick_device

if TYPE_CHECKING:
    import tokenizers

DESCRIPTION = __doc__.split("\n\n")[0]
BATCH_TOKENS, BATCH_LOGITS = 8192, 2**26  # of a forward pass, at most


@dataclass(frozen=True)
class Config:
    """The constants: each is a flag."""

    checkpoint: str = "out/ckpt.pt"  # of nanoGPT's train.py
    data: str = ""  # folder of prepare.py: the model is measured on its val.bin
    output_dir: str = ""  # the folder to write; default: only measure
    dtype: Literal["float16", "float32"] = "float16"  # of the weights on disk
    activation: Literal["gelu", "gelu_new"] = "gelu"  # gelu_new: nanoGPT before May 2023
    eval_tokens: int = 500_000  # of val.bin, at most
    device: Literal["auto", "cpu", "cuda"] = "auto"  # that measures; auto: CUDA if there is any


def main(argv: list[str]) -> int:
    """Runs the command line `argv`; the exit code."""
    cfg = parse_flags(Config(), argv, description=DESCRIPTION)
    require_flag(cfg, "eval_tokens", cfg.eval_tokens >= 1000, "at least 1000")
    manifest = read_bin_manifest(Path(cfg.data)) if cfg.data else {}
    require(
        bool(manifest or not cfg.data),
        f"--data {cfg.data} has no manifest.json: give a folder of prepare.py",
    )
    where = cfg.checkpoint
    if cfg.output_dir:
        where = cfg.output_dir
        convert(cfg, Path(where), manifest)
        print(f"written: {where}, {folder_size(Path(where)) / 1e3:,.0f} kB")
    if manifest:
        device = pick_device(cfg.device)
        lm = load_language_model(
            where, device=device, dtype=torch.float32, activation=cfg.activation
        )
        report(lm, Path(cfg.data), manifest, cfg.eval_tokens)
    return 0


def convert(cfg: Config, folder: Path, manifest: dict) -> None:
    """config.json, model.safetensors and, if there is one, the tokenizer."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = load_nanogpt(Path(cfg.checkpoint), activation=cfg.activation)
    if manifest:
        model.config.bos_token_id = model.config.eos_token_id = manifest["end_of_text"]
        model.generation_config.bos_token_id = manifest["end_of_text"]
        model.generation_config.eos_token_id = manifest["end_of_text"]
    model.to(getattr(torch, cfg.dtype)).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it 0600
    if manifest:
        write_atomic(folder / "tokenizer.json", tokenizer_json(Path(cfg.data), manifest))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "model_max_length": model.config.n_positions,
            "clean_up_tokenization_spaces": False,
        }
        write_json(folder / "tokenizer_config.json", settings)


def tokenizer_json(data: Path, manifest: dict) -> str:
    """The tokenizer of the bins for the tokenizers library, and so for transformers."""
    kind = manifest["constants"]["tokenizer"]
    if kind != "bpe":
        return {"gpt2": gpt2_tokenizer, "bytes": byte_tokenizer}[kind]().to_str()
    load_tokenizer("", choice=str(data / "tokenizer.json"), vocab_size=manifest["vocab_size"])
    return (data / "tokenizer.json").read_text()


def gpt2_tokenizer() -> "tokenizers.Tokenizer":
    """tiktoken's gpt2."""
    import tiktoken
    from transformers.convert_slow_tokenizer import TikTokenConverter

    gpt2 = tiktoken.get_encoding("gpt2")
    with tempfile.TemporaryDirectory() as folder:  # the converter takes a file: base64 and rank
        path = Path(folder, "gpt2.tiktoken")
        ranks = gpt2._mergeable_ranks.items()
        path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % rank for t, rank in ranks))
        special = gpt2._special_tokens
        return TikTokenConverter(str(path), gpt2._pat_str, extra_special_tokens=special).converted()


def byte_tokenizer() -> "tokenizers.Tokenizer":
    """Ids 0 to 255 are bytes, 256 is end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=bytes_by_name(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def folder_size(folder: Path) -> int:
    """Bytes of its files."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


# --- what the model is worth ---


def report(lm: LanguageModel, data: Path, manifest: dict, n_tokens: int) -> None:
    """Prints the two tables."""
    kind = manifest["constants"]["tokenizer"]
    choice = str(data / "tokenizer.json") if kind == "bpe" else kind
    tokenizer = load_tokenizer("", choice=choice, vocab_size=manifest["vocab_size"])
    require(
        tokenizer.vocab_size <= lm.vocab_size,
        f"--data {data} has {tokenizer.vocab_size} ids, the model {lm.vocab_size}: give the folder "
        "that it was trained on",
    )
    ids, train_ids = (
        read_windows(data / f"{split}.bin", n_tokens, lm.max_context, tokenizer)
        for split in ("val", "train")
    )
    text = decode(ids[:, 1:], tokenizer)
    per_byte = ids[:, 1:].numel() / math.log(2) / len(text)  # nats/token -> bits/byte
    clean = mean_loss(lm, ids)
    train_text = decode(train_ids[:, 1:], tokenizer)
    print(f"on {ids[:, 1:].numel():,} held-out tokens of {len(text):,} bytes, bits per byte:")
    print(f"  model           {clean * per_byte:.3f}   ({clean:.3f} nats per token)")
    print(f"  gzip -9         {8 * len(gzip.compress(text, 9)) / len(text):.3f}")
    print(f"  byte unigrams   {unigram_bits(train_text, text):.3f}   (frequencies of train.bin)")
    print("what each layer's MLP is worth, nats per token lost when its activations are")
    print("  layer   their mean   zero")
    for layer in range(lm.n_layers):
        site = find_site(lm, layer, "mlp_act")
        mean = mean_activation(lm, site, ids)
        lost = [mean_loss(lm, ids, site, constant) - clean for constant in (mean, 0 * mean)]
        print(f"  {layer:<8}{lost[0]:<13.3f}{lost[1]:.3f}")


def read_windows(path: Path, n_tokens: int, context: int, tokenizer: Tokenizer) -> Tensor:
    """(n, context) ids from the start of a bin. Windows overlap by one token, so that every token
    but the first is predicted once.

    Raises:
        UserError: no such file, too short, ids that the tokenizer lacks, nothing but separators.
    """
    require(path.is_file(), f"{path} is missing: make it with prepare.py")
    tokens = np.fromfile(path, np.uint16, n_tokens).astype(np.int64)
    require(len(tokens) >= context, f"{path} is shorter than the model's context of {context}")
    found, has_text = set(tokens.tolist()), bool((tokens[1:] != tokenizer.separator).any())
    require(
        found <= tokenizer.pieces.keys() and has_text,
        f"{path} is damaged: it has no text, or ids that {tokenizer.name} lacks: make it again "
        "with prepare.py --fresh",
    )
    return torch.from_numpy(tokens).unfold(0, context, context - 1)


def decode(ids: Tensor, tokenizer: Tokenizer) -> bytes:
    """The text without end-of-text tokens."""
    kept = (i for i in ids.flatten().tolist() if i != tokenizer.separator)
    return b"".join(tokenizer.pieces[i] for i in kept)


def batches(lm: LanguageModel, ids: Tensor) -> tuple[Tensor, ...]:
    """ids (n, context), as many rows at a time as a forward pass may have."""
    n_tokens = min(BATCH_TOKENS, BATCH_LOGITS // lm.vocab_size)
    return ids.split(max(1, n_tokens // ids.shape[1]))


def mean_loss(
    lm: LanguageModel, ids: Tensor, site: Site | None = None, constant: Tensor | None = None
) -> float:
    """Nats per token; with the activations at the site replaced by a constant (width,)."""
    total = 0.0
    for batch in batches(lm, ids):
        replaced = logits(lm, batch, site=site, replace=lambda x: constant.expand_as(x))
        total += float(next_token_loss(replaced, batch).sum(dtype=torch.float64))
    return total / ids[:, 1:].numel()


def mean_activation(lm: LanguageModel, site: Site, ids: Tensor) -> Tensor:
    """(width,) mean of the activations at the site."""
    total = torch.zeros(site.width, dtype=torch.float64)
    for batch in batches(lm, ids):
        total += activations(lm, site, batch).sum(dim=(0, 1), dtype=torch.float64).cpu()
    return (total / ids.numel()).to(lm.device, lm.dtype)


def unigram_bits(train: bytes, text: bytes) -> float:
    """Bits per byte of `text` if bytes are drawn with their frequencies in `train` (plus one)."""
    counts = [np.bincount(np.frombuffer(t, np.uint8), minlength=256) for t in (train, text)]
    share = (counts[0] + 1) / (counts[0] + 1).sum()
    return float(-(counts[1] * np.log2(share)).sum() / counts[1].sum())


if __name__ == "__main__":
    run_as_script(main)
