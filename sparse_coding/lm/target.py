"""What a sweep on a language model studies: model, site, tokens, held-out documents.

The fields of the two choices have the names of run.py's flags.
"""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from sparse_coding.config import fingerprint, given_flags, require, require_flag
from sparse_coding.files import content_stamp
from sparse_coding.lm.activations.store import TEXT, check_manifest, claim_folder
from sparse_coding.lm.corpus import Corpus, build_corpus, open_bin
from sparse_coding.lm.documents import (
    OF_PYTHON,
    dataset_commit,
    local_files,
    open_documents,
    stdlib_files,
)
from sparse_coding.lm.model import (
    FAMILIES,
    SITES,
    LanguageModel,
    Site,
    hub_commit,
    load_language_model,
    logits,
    next_token_loss,
)
from sparse_coding.lm.packaged.smollm2 import FOLDER, smollm2_folder
from sparse_coding.lm.packing import Packed, split
from sparse_coding.lm.tokenizer import (
    TOKENIZER_FILES,
    Tokenizer,
    files_like,
    is_hub_id,
    load_tokenizer,
    tokenizer_files,
)
from sparse_coding.lm.transcoding import find_sites
from sparse_coding.sae.saelens import CONFIG, saved_flags
from sparse_coding.sae.saved import load_sae

CONTEXT = 256  # tokens of a row of text, if the model can take so many
DEMO_MODEL = Path(__file__).parents[2] / "assets" / "demo"
# names of a folder's files that AutoModel may read, beside TOKENIZER_FILES with their config.json
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.index.json", "adapter_config.json")
SANITY_TOKENS = 8192  # on which the model is compared with a unigram model
UNIGRAM_TOKENS = 2**20  # from which the unigram model is made


@dataclass(frozen=True)
class ModelChoice:
    """A model and a site in it.

    model: hub id, folder, nanoGPT checkpoint, "demo", the small one in assets/, or "smollm2", which
        `commits` makes, see packaged/smollm2.py
    layer: None: the middle one
    dtype: auto is that of default_dtype
    store_dtype: of its activations on disk
    target_site: of transcoders, whose activations are predicted; else ""
    """

    model: str
    model_revision: str
    tokenizer: str
    layer: int | None
    site: str
    dtype: str
    store_dtype: str
    target_site: str = ""

    @property
    def known(self) -> dict:
        """The fields by name; without target_site where there is none, as it was before."""
        return {k: v for k, v in asdict(self).items() if k != "target_site" or v}

    @property
    def path(self) -> str:
        """Where load_language_model finds it."""
        return str({"demo": DEMO_MODEL, "smollm2": FOLDER}.get(self.model, self.model))


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
    files: dict[str, str]  # see stamps; taken after the model was loaded and the text read

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
            **({"target_site": self.site.target.name} if self.site.target else {}),
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
            "model_revision": self.model.model_revision or None,
            **self.files,
        }

    @property
    def provenance(self) -> dict:
        """For saved autoencoders: the metadata, and the flags with which --evaluate opens this."""
        known = self.metadata | {"flags": self.model.known | asdict(self.text)}
        behind = "hook_name_out" if self.site.target else "hook_name"
        return known | {behind: None} if self.before_norm else known

    @property
    def before_norm(self) -> bool:
        """Whether a norm follows the site, behind which TransformerLens has its hook_mlp_out."""
        post_norm = FAMILIES[self.lm.model.config.model_type].post_norm
        return post_norm and (self.site.target or self.site).name == "mlp_out"

    def require_same_files(self, files: dict[str, str]) -> None:
        """Raises UserError if the files were written to since `files` were their stamps."""
        changed = [name for name in files if files[name] != self.files.get(name)]
        require(
            not changed,
            f"{' and '.join(changed)} changed while they were read: run it again when nothing "
            f"writes to {self.model.model} and {self.text.dataset}",
        )

    def introduction(self) -> str:
        """What the text is, and whether the model fits it: the cheapest sign of a wrong tokenizer
        or of wrong weights is a loss no better than that of token frequencies."""
        corpus = self.corpus.metadata
        revision = f" ({corpus['revision']})" if corpus.get("revision") else ""
        n_copies = corpus.get("n_duplicates") or 0
        copies = f" ({n_copies:,} duplicates left out)" * (n_copies > 0)
        of_model, unigram = losses(self)
        target = f", to predict {self.site.target.name}" if self.site.target else ""
        centred = ", its mean taken out (center_writing_weights)" * self.site.centred
        bos = ", rows begin with bos (prepend_bos)" * (self.held_out.first is not None)
        warning = "" if of_model < unigram else "; WARNING: wrong tokenizer, or wrong weights?"
        return (
            f"text: {self.text.dataset}{revision}, {corpus['n_documents']:,} documents{copies}, "
            f"{corpus['n_tokens']:,} tokens; {len(self.held_out.documents):,} documents held out\n"
            f"model: next-token loss {of_model:.3f} nats on held-out text, token frequencies give "
            f"{unigram:.3f}{warning}\n"
            f"site: layer {self.site.layer} of 0 to {self.lm.n_layers - 1}, {self.site.name}, "
            f"width {self.site.width}{target}{centred}{bos}"
        )


def open_target(
    model: ModelChoice,
    text: TextChoice,
    activations_dir: str,
    *,
    device: torch.device,
    prepend_bos: bool = False,
    centred: bool = False,
) -> Target:
    """Loads the model; encodes the text's tokens into activations_dir/text unless they are there.
    "": a folder named after the choices. prepend_bos: rows begin with bos; centred: see find_site.

    Raises:
        UserError: no such model, tokenizer, layer, site, dataset or column; too little text; a
            context longer than the model's; a folder of something else; a tokenizer without bos.
    """
    lm = _load_model(model, device)
    longest = lm.max_context or CONTEXT
    if model.layer is None:
        model = replace(model, layer=lm.n_layers // 2)
    if text.context_length is None:
        text = replace(text, context_length=min(CONTEXT, longest))
    site = find_sites(lm, model.layer, model.site, model.target_site, centred=centred)
    require(
        lm.max_context is None or text.context_length <= longest,
        f"--context-length {text.context_length} must be at most {longest}, which the model has",
    )
    tokenizer = _open_tokenizer(model, text.dataset, lm.vocab_size, prepend_bos=prepend_bos)
    folder = Path(activations_dir or default_folder(model, text, stamps(model, text), device))
    claim_folder(folder)
    corpus = _open_corpus(text, tokenizer, folder / TEXT)
    train, held_out = _packed(corpus, text, tokenizer, tokenizer.bos if prepend_bos else None)
    files = stamps(model, text)
    target = Target(lm, site, tokenizer, corpus, train, held_out, model, text, folder, files)
    check_manifest(folder, target.metadata)
    return target


def _load_model(model: ModelChoice, device: torch.device) -> LanguageModel:
    dtype = None if model.dtype == "auto" else getattr(torch, model.dtype)
    return load_language_model(
        model.path, device=device, dtype=dtype, revision=model.model_revision
    )


def _open_tokenizer(
    model: ModelChoice, dataset: str, vocab_size: int, *, prepend_bos: bool
) -> Tokenizer:
    tokenizer = load_tokenizer(
        model.path,
        choice=model.tokenizer,
        vocab_size=vocab_size,
        revision=model.model_revision,
        dataset=dataset,
    )
    require(
        not prepend_bos or tokenizer.bos is not None,
        f"prepend_bos can't be honoured: {tokenizer.name} has no bos token",
    )
    return tokenizer


def _packed(
    corpus: Corpus, text: TextChoice, tokenizer: Tokenizer, first: int | None
) -> Iterator[Packed]:
    """The training documents and the held-out ones. first: see Packed."""
    for documents in split(corpus, held_out_share=text.held_out, seed=0):
        yield Packed(
            corpus,
            documents=documents,
            context_length=text.context_length,
            separator=tokenizer.separator,
            packing=text.packing,
            special_ids=tokenizer.special_ids,
            first=first,
        )


def _open_corpus(text: TextChoice, tokenizer: Tokenizer, folder: Path) -> Corpus:
    if text.dataset.endswith(".bin"):
        return open_bin(Path(text.dataset).expanduser(), tokenizer, folder)
    documents = open_documents(
        text.dataset, text_column=text.text_column, revision=text.dataset_revision
    )
    return build_corpus(folder, documents, tokenizer, max_tokens=text.max_text_tokens)


def default_folder(
    model: ModelChoice, text: TextChoice, files: dict[str, str], device: torch.device
) -> Path:
    """For the activations: named after what they depend on, so that sweeps on a site share them.

    files: see stamps
    """
    more = files | {"device": device.type if model.dtype == "auto" else ""}
    hashed = fingerprint(model.known | asdict(text) | more)
    sites = "-".join(filter(None, (model.site, model.target_site)))
    return Path(f"activations/{Path(model.model).stem}-layer{model.layer}-{sites}-{hashed}")


def commits(model: ModelChoice, text: TextChoice) -> dict[str, str]:
    """model_revision and dataset_revision with the commits that hub ids stand for now.

    The folder of the model smollm2 is made, if it is not there.

    Raises:
        UserError: not on the hub, or the hub out of reach; those of smollm2_folder.
    """
    if model.model == "smollm2":
        smollm2_folder()
    is_checkpoint = Path(model.model).suffix in (".pt", ".pth")
    revision = model.model_revision
    return {
        "model_revision": revision if is_checkpoint else hub_commit(model.path, revision),
        "dataset_revision": dataset_commit(text.dataset, text.dataset_revision),
    }


def stamps(model: ModelChoice, text: TextChoice) -> dict[str, str]:
    """What identifies the files behind the choices, by their contents: a model trained anew is
    another model. Files beside them that are not read do not count."""
    path, dataset = Path(model.path).expanduser(), Path(text.dataset).expanduser()
    files: dict[str, list[Path]] = {}
    if os.path.exists(path):
        in_folder = files_like(path, (*WEIGHTS, *TOKENIZER_FILES)) if path.is_dir() else [path]
        files["model_files"] = in_folder
    files["tokenizer_files"] = tokenizer_files(model.path, model.tokenizer, text.dataset)
    if text.dataset in OF_PYTHON:
        files["stdlib_files"] = stdlib_files()
    elif os.path.exists(dataset):
        is_bin = dataset.suffix == ".bin" and dataset.is_file()  # else open_bin says what is wrong
        files["dataset_files"] = [dataset] if is_bin else local_files(dataset)
    stamped = {name: content_stamp(paths) for name, paths in files.items() if paths}
    if is_hub_id(model.tokenizer):
        stamped["tokenizer_commit"] = hub_commit(model.tokenizer)
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


FLAGS = tuple(f.name for choice in (ModelChoice, TextChoice) for f in fields(choice))
COUNTS = ("n_eval_tokens", "n_tokens", "max_norm_multiple")


def flags_of(folder: Path, argv: list[str]) -> list[str]:
    """Flags for the target of a saved autoencoder, from its provenance; of a foreign one as far as
    it says.

    argv: the command line, whose flags win
    Raises:
        UserError: it is of toy data; neither it nor the command line says model, layer
            and site.
    """
    known = load_sae(folder).metadata
    flags = known.get("flags") or known
    require(isinstance(flags, dict), f"{folder / CONFIG}: flags is no object")
    toy = f"{folder} is of toy data: python replicate_toy_models.py --evaluate {folder}"
    require("data_law" not in flags, toy)
    silent = {name for name in ("model", "layer", "site") if flags.get(name) is None}
    silent -= given_flags(argv)
    at = known.get("hook_name")
    hook = f" (its hook {at} is at none of {', '.join(SITES)})" * bool(at)
    require(
        not silent,
        f"{folder / CONFIG} does not say {', '.join(sorted(silent))} of the activations that it "
        f"takes{hook * ('site' in silent)}: give {' and '.join(f'--{n}' for n in sorted(silent))}",
    )
    older = {"max_norm_multiple": 0.0} if "flags" in known else {}  # ours, of before that flag
    return saved_flags(folder, flags, FLAGS) + saved_flags(folder, older | known, COUNTS)
