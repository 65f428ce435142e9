"""What a sweep on a language model studies: model, site, tokens, held-out documents.

The fields of the two choices have the names of run.py's flags.
"""

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from sparse_coding.config import fingerprint, require, require_flag
from sparse_coding.files import content_stamp
from sparse_coding.lm.activations import TEXT, check_manifest, claim_folder
from sparse_coding.lm.corpus import Corpus, build_corpus, open_bin
from sparse_coding.lm.documents import local_files, open_documents
from sparse_coding.lm.model import (
    LanguageModel,
    Site,
    find_site,
    load_language_model,
    logits,
    next_token_loss,
)
from sparse_coding.lm.packing import Packed, split
from sparse_coding.lm.tokenizer import Tokenizer, load_tokenizer
from sparse_coding.sae.saved import load_sae

CONTEXT = 256  # tokens of a row of text, if the model can take so many
DEMO_MODEL = Path(__file__).parents[2] / "assets" / "demo"
SANITY_TOKENS = 8192  # on which the model is compared with a unigram model
UNIGRAM_TOKENS = 2**20  # from which the unigram model is made


@dataclass(frozen=True)
class ModelChoice:
    """A model and a site in it.

    model: hub id, folder, nanoGPT checkpoint, or "demo", the small one in assets/
    layer: None: the middle one
    dtype: auto is float32 on the CPU, bfloat16 on CUDA
    store_dtype: of its activations on disk
    """

    model: str
    model_revision: str
    tokenizer: str
    layer: int | None
    site: str
    dtype: str
    store_dtype: str

    @property
    def path(self) -> str:
        """Where load_language_model finds it."""
        return str(DEMO_MODEL) if self.model == "demo" else self.model


@dataclass(frozen=True)
class TextChoice:
    """A text, and how it becomes rows of tokens.

    context_length: None: CONTEXT, or all that the model can take
    held_out: share of the documents that no autoencoder is trained on
    """

    dataset: str
    dataset_revision: str
    text_column: str
    context_length: int | None
    packing: Literal["packed", "documents"]
    held_out: float
    max_text_tokens: int

    def __post_init__(self) -> None:
        """Raises UserError for a constant out of its range."""
        require_flag(self, "held_out", 0 < self.held_out < 1, "above 0 and below 1")
        long_enough = self.context_length is None or self.context_length >= 2
        require_flag(self, "context_length", long_enough, "at least 2")
        require_flag(self, "max_text_tokens", self.max_text_tokens >= 1, "at least 1")


@dataclass(frozen=True)
class Target:
    """A model with its tokenizer, a site, a corpus packed to rows of one context each."""

    lm: LanguageModel
    site: Site
    tokenizer: Tokenizer
    corpus: Corpus
    train: Packed
    held_out: Packed
    model: ModelChoice
    text: TextChoice
    folder: Path  # of its tokens and activations

    @property
    def metadata(self) -> dict:
        """What activations of this depend on."""
        lm, corpus = self.lm, self.corpus.metadata
        return {
            "model": self.model.model,
            "weight_hash": lm.weight_hash,
            "model_dtype": str(lm.dtype).removeprefix("torch."),
            "layer": self.site.layer,
            "site": self.site.name,
            "tokenizer": self.tokenizer.name,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "dataset": self.text.dataset,
            "dataset_revision": corpus.get("revision"),
            "tokens_sha256": corpus["sha256"],
            "context_length": self.text.context_length,
            "packing": self.text.packing,
            "held_out": self.text.held_out,
            "dropped": "position 0, special tokens",
            "store_dtype": self.model.store_dtype,
        }

    @property
    def provenance(self) -> dict:
        """For saved autoencoders: the metadata, and the flags with which --evaluate opens this."""
        return self.metadata | {"flags": asdict(self.model) | asdict(self.text)}

    def introduction(self) -> str:
        """What the text is, and whether the model fits it: the cheapest sign of a wrong tokenizer
        or of wrong weights is a loss no better than that of token frequencies."""
        corpus = self.corpus.metadata
        revision = f" ({corpus['revision']})" if corpus.get("revision") else ""
        of_model, unigram = losses(self)
        warning = "" if of_model < unigram else "; WARNING: wrong tokenizer, or wrong weights?"
        return (
            f"text: {self.text.dataset}{revision}, {corpus['n_documents']:,} documents, "
            f"{corpus['n_tokens']:,} tokens; {len(self.held_out.documents):,} documents held out\n"
            f"model: next-token loss {of_model:.3f} nats on held-out text, token frequencies give "
            f"{unigram:.3f}{warning}\n"
            f"site: layer {self.site.layer} of 0 to {self.lm.n_layers - 1}, {self.site.name}, "
            f"width {self.site.width}"
        )


def open_target(
    model: ModelChoice, text: TextChoice, activations_dir: str, *, device: torch.device
) -> Target:
    """Loads the model; the text's tokens are encoded into activations_dir/text unless they are
    there. "": a folder named after the choices.

    Raises:
        UserError: no such model, tokenizer, layer, site, dataset or column; too little text; a
            context longer than the model's; a folder of something else.
    """
    lm = load_language_model(
        model.path,
        device=device,
        dtype=None if model.dtype == "auto" else getattr(torch, model.dtype),
        revision=model.model_revision,
    )
    longest = lm.max_context or CONTEXT
    if model.layer is None:
        model = replace(model, layer=lm.n_layers // 2)
    if text.context_length is None:
        text = replace(text, context_length=min(CONTEXT, longest))
    site = find_site(lm, model.layer, model.site)
    tokenizer = load_tokenizer(
        model.path,
        choice=model.tokenizer,
        vocab_size=lm.vocab_size,
        revision=model.model_revision,
        dataset=text.dataset,
    )
    require(
        lm.max_context is None or text.context_length <= longest,
        f"--context-length {text.context_length} must be at most {longest}, which the model has",
    )
    folder = Path(activations_dir or default_folder(model, text, device))
    claim_folder(folder)
    corpus = _open_corpus(text, tokenizer, folder / TEXT)
    train, held_out = _packed(corpus, text, tokenizer)
    target = Target(lm, site, tokenizer, corpus, train, held_out, model, text, folder)
    check_manifest(folder, target.metadata)
    return target


def _packed(corpus: Corpus, text: TextChoice, tokenizer: Tokenizer) -> Iterator[Packed]:
    """The training documents and the held-out ones."""
    for documents in split(corpus, held_out_share=text.held_out, seed=0):
        yield Packed(
            corpus,
            documents=documents,
            context_length=text.context_length,
            separator=tokenizer.separator,
            packing=text.packing,
            special_ids=tokenizer.special_ids,
        )


def _open_corpus(text: TextChoice, tokenizer: Tokenizer, folder: Path) -> Corpus:
    if text.dataset.endswith(".bin"):
        return open_bin(Path(text.dataset).expanduser(), tokenizer, folder)
    documents = open_documents(
        text.dataset, text_column=text.text_column, revision=text.dataset_revision
    )
    return build_corpus(folder, documents, tokenizer, max_tokens=text.max_text_tokens)


def default_folder(model: ModelChoice, text: TextChoice, device: torch.device) -> Path:
    """For the activations: named after what they depend on, so that sweeps on a site share them."""
    more = stamps(model, text) | {"device": device.type if model.dtype == "auto" else ""}
    if text.dataset == "stdlib":
        more["python"] = platform.python_version()
    hashed = fingerprint(asdict(model) | asdict(text) | more)
    return Path(f"activations/{Path(model.model).stem}-layer{model.layer}-{model.site}-{hashed}")


def stamps(model: ModelChoice, text: TextChoice) -> dict[str, str]:
    """Of the local files behind the choices: a model trained anew is another model."""
    path, dataset = Path(model.path).expanduser(), Path(text.dataset).expanduser()
    stamped = {}
    if model.model != "demo" and os.path.exists(path):
        files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
        stamped["model_files"] = content_stamp(files)
    if text.dataset != "stdlib" and os.path.exists(dataset):
        is_bin = dataset.suffix == ".bin" and dataset.is_file()  # else open_bin says what is wrong
        stamped["dataset_files"] = content_stamp([dataset] if is_bin else local_files(dataset))
    return stamped


def losses(target: Target) -> tuple[float, float]:
    """(model's, unigram model's) mean next-token loss in nats on a sample of the held-out text.

    The unigram model's frequencies are those of the corpus's first tokens, one added to each count.
    """
    lm, text = target.lm, target.held_out
    n_rows = min(text.n_rows, -(-SANITY_TOKENS // text.context_length))
    ids = torch.from_numpy(text.rows(0, n_rows))
    of_model = [float(next_token_loss(logits(lm, row), row).mean()) for row in ids.split(1)]
    first = np.asarray(target.corpus.tokens[:UNIGRAM_TOKENS]).astype(np.int64)
    counts = torch.bincount(torch.from_numpy(first), minlength=lm.vocab_size) + 1.0
    log_frequency = torch.log(counts / counts.sum())
    return sum(of_model) / len(of_model), -float(log_frequency[ids[:, 1:]].mean())


def flags_of(folder: Path) -> dict:
    """Flags for the target of a saved autoencoder, from its provenance; of a foreign one as far as
    it says."""
    known = load_sae(folder).metadata
    names = ("model", "layer", "site", "dataset", "context_length")
    flags = known.get("flags") or {name: known[name] for name in names if name in known}
    toy = f"{folder} is of toy data: python replicate_toy_models.py --evaluate {folder}"
    require("data_law" not in flags, toy)
    return flags | {name: known[name] for name in ("n_eval_tokens", "n_tokens") if name in known}
