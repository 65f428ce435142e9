"""A language model's activations: load it, read and replace them at a site, its losses.

Plain forward hooks on transformers models. A site is named by its layer and one of SITES:

- attn_concat: the heads' outputs side by side, which the output projection gets
- mlp_in: what the MLP gets, behind the norm and its gain, (..., d_model)
- mlp_act: what the MLP's down projection gets (of a gated MLP: gate x up), (..., MLP width)
- mlp_out: what the MLP adds to the residual stream, (..., d_model); where a norm comes between
  (Gemma 2), before it
- resid_post: the residual stream after the layer, (..., d_model); of the last layer before the
  final norm

Models come from a local folder, the cache or the hub. Nothing of a model's own code is run and
nothing is unpickled; weights that are missing or misshapen are an error, where transformers would
fill in random ones with a warning.
"""

import contextlib
import hashlib
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparse_coding.config import UserError, first_line, one_line, require
from sparse_coding.files import read_json
from sparse_coding.lm.documents import hub_errors
from sparse_coding.lm.nanogpt import load_nanogpt, require_stored
from sparse_coding.sweep.hardware import default_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SITES = ("attn_concat", "mlp_in", "mlp_act", "mlp_out", "resid_post")  # as they are computed
SIZES = {  # of a config.json, at most; ours, beyond every model of these families
    "num_hidden_layers": 500,
    "hidden_size": 2**17,
    "vocab_size": 2**22,
    "max_position_embeddings": 2**24,
}
BUFFER_BYTES = 2**28  # of a model beside its weights: twice what GPT-Neo 2.7B has
LOSS_CHUNK = 2**24  # logits whose float32 copy is made at once: 64 MB


@dataclass(frozen=True)
class Family:
    """Where an architecture keeps its parts: names below base_model, and below a layer."""

    layers: str
    down: str  # the MLP's down projection
    mlp: str
    heads: str  # the attention's output projection
    norm: str  # the final norm
    up: str = ""  # what gets the MLP's input, if it is not the MLP
    gain_offset: float = 0.0  # the norm multiplies by weight + this
    post_norm: bool = False  # a norm stands between MLP or attention and the residual stream


LLAMA = Family("layers", "mlp.down_proj", "mlp", "self_attn.o_proj", "norm")
FAMILIES = {  # by config.model_type
    "gpt2": Family("h", "mlp.c_proj", "mlp", "attn.c_proj", "ln_f"),
    "gpt_neo": Family("h", "mlp.c_proj", "mlp", "attn.attention.out_proj", "ln_f"),
    "gptj": Family("h", "mlp.fc_out", "mlp", "attn.out_proj", "ln_f"),
    "gpt_neox": Family(
        "layers", "mlp.dense_4h_to_h", "mlp", "attention.dense", "final_layer_norm"
    ),
    "opt": Family(
        "decoder.layers", "fc2", "fc2", "self_attn.out_proj", "decoder.final_layer_norm", "fc1"
    ),
    "phi": Family("layers", "mlp.fc2", "mlp", "self_attn.dense", "final_layernorm"),
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "gemma2": Family(
        "layers", "mlp.down_proj", "mlp", "self_attn.o_proj", "norm", "", 1.0, post_norm=True
    ),
}  # fmt: skip


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model in eval mode, none of whose weights wants a gradient."""

    model: "PreTrainedModel"
    name: str  # as the user gave it
    weight_hash: str  # 16 hex digits, the same in float32 on the CPU and in bfloat16 on CUDA
    n_layers: int
    d_model: int
    vocab_size: int
    max_context: int | None  # positions that the model has
    device: torch.device
    dtype: torch.dtype

    @property
    def layers(self) -> nn.ModuleList:
        """From the first to the last; the output of each is what the next one takes."""
        return _part(self.model, "layers")

    @property
    def widest(self) -> int:
        """Of what its layers' weights read or write."""
        return max(max(weight.shape) for weight in self.layers.parameters())


@dataclass(frozen=True)
class Site:
    """Where activations are read and replaced: the input or the output of a module."""

    layer: int
    name: str
    width: int
    module: nn.Module = field(repr=False, compare=False)
    at_input: bool
    centred: bool = False  # without x's mean over its width, which is put back where x is replaced
    target: "Site | None" = None  # of transcoders: the later site, as wide, that is predicted

    @property
    def stored_width(self) -> int:
        """Of its activations and those of its target, side by side."""
        return self.width * (2 if self.target else 1)


def load_language_model(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    revision: str = "",
    activation: str = "gelu",
) -> LanguageModel:
    """The model of a hub id, of a local folder or of a nanoGPT checkpoint (a .pt or .pth file).

    A hub id is looked up in the local cache first, then downloaded.

    Args:
        dtype: None: that of default_dtype
        revision: commit, tag or branch of a hub id; "": main
        activation: of a nanoGPT checkpoint, see load_nanogpt
    Raises:
        UserError: no such model, hub out of reach, a folder or file that holds no complete model,
            an architecture that is not in FAMILIES.
    """
    path = Path(name).expanduser()
    dtype = dtype or default_dtype(device)
    if path.suffix in (".pt", ".pth"):
        require(not revision, f"revision {revision} is for a hub id, but {name} is a file")
        model = load_nanogpt(path, activation=activation).to(dtype)
    else:
        model = _load_pretrained(name, dtype, revision)
    model = model.to(device).eval().requires_grad_(False)
    return LanguageModel(
        model=model,
        name=name,
        weight_hash=_weight_hash(model),
        n_layers=len(_part(model, "layers")),
        d_model=model.config.hidden_size,
        vocab_size=model.get_input_embeddings().num_embeddings,
        max_context=getattr(model.config, "max_position_embeddings", None),
        device=device,
        dtype=dtype,
    )


def _weight_hash(model: nn.Module) -> str:
    """sha256 over sorted names, shapes and the values in bfloat16."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        bits = weight.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16)
        bits = bits.masked_fill(bits & 0x7F80 == 0, 0)  # denormals: some devices make them 0
        digest.update(f"{name} {list(weight.shape)}".encode())
        digest.update(bits.numpy())
    return digest.hexdigest()[:16]


def _part(model: "PreTrainedModel", part: str) -> nn.Module:
    """The module that the model's family keeps under `part`."""
    return model.base_model.get_submodule(getattr(FAMILIES[model.config.model_type], part))


# --- files and the hub ---


def _load_pretrained(name: str, dtype: torch.dtype, revision: str) -> "PreTrainedModel":
    """The model of a folder of save_pretrained or of a hub id, on the CPU."""
    path = Path(name).expanduser()
    require(not path.is_file(), f"{name} is a file, but no .pt of nanoGPT: give the model's folder")
    with quiet():
        if not path.is_dir():
            return _from_hub(name, dtype, revision or "main")
        require(not revision, f"revision {revision} is for a hub id, but {name} is a local folder")
        require(
            (path / "config.json").is_file(),
            f"{name} has no config.json: give a folder of save_pretrained, a nanoGPT ckpt.pt or a "
            "hub id",
        )
        try:
            return _load(str(path), dtype, local_files_only=True)
        except OSError as error:
            raise UserError(f"{name} can't be loaded: {first_line(error)}") from error


def _from_hub(name: str, dtype: torch.dtype, revision: str) -> "PreTrainedModel":
    """From the cache, without a request; else downloaded."""
    commit = hub_commit(name, revision)
    with contextlib.suppress(OSError):  # not in the cache, or not whole
        return _load(name, dtype, revision=commit, local_files_only=True)
    _ask_hub(name, revision)
    try:
        return _load(name, dtype, revision=commit)
    except OSError as error:
        raise UserError(f"{name} can't be loaded from the hub: {first_line(error)}") from error


def _load(name: str, dtype: torch.dtype, **where: str | bool) -> "PreTrainedModel":
    """Raises OSError if files are missing, UserError if they are no model for us.

    where: options of from_pretrained
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
    from transformers.utils import cached_file

    # else the hub's bot is asked, in a thread, to add safetensors to repositories without
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    options = dict(trust_remote_code=False, **where)
    try:
        path = Path(cached_file(name, "config.json", **where))
        read_json(path, remedy="save or fetch the model again")  # what a stranger's may not be
        config = AutoConfig.from_pretrained(name, **options)
        _check_config(config, name)
        MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # imports its class: torch 2.6 can't on "meta"
        with torch.device("meta"):  # nothing is allocated yet
            described = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        _require_held(described, path.parent, name)
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            ignore_mismatched_sizes=True,  # refused below
            output_loading_info=True,
            **options,
        )
        wrong = sorted(str(key) for key in (*info["missing_keys"], *info["mismatched_keys"]))
        require(not wrong, f"{name}: {len(wrong)} weights are missing or misshapen, as {wrong[:1]}")
        with torch.no_grad():
            model.eval()(torch.zeros(1, 2, dtype=torch.int64))  # a setting that only fails now
    except (OSError, UserError):
        raise
    except Exception as error:  # a foreign config.json or weight makes transformers raise anything
        raise UserError(f"{name} can't be loaded: {one_line(first_line(error))}") from error
    return model


def _check_config(config: "PreTrainedConfig", name: str) -> None:
    """Raises UserError for an architecture or a size that can't be."""
    kind, known = config.model_type, ", ".join(FAMILIES)
    require(kind in FAMILIES, f"{name}: architecture {kind} is not one of {known}")
    for field_, most in SIZES.items():
        size = getattr(config, field_, None)
        optional = field_ == "max_position_embeddings" and size is None
        require(
            optional or (type(size) is int and 1 <= size <= most),
            f"{name} can't be loaded: {field_} {str(size)[:60]} in its config.json is no size up "
            f"to {most:,}",
        )


def _require_held(described: "PreTrainedModel", folder: Path, name: str) -> None:
    """Raises UserError if the files of the folder can't hold the model that is described, or
    unpack to more than they are."""
    files = [p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin") and p.is_file()]
    n_bytes = sum(path.stat().st_size for path in files)
    n_weights = sum(weight.numel() for weight in described.parameters())
    require(
        not files or n_weights <= n_bytes,  # without files another error follows
        f"{name} can't be loaded: its config.json describes {n_weights:,} weights, but its files "
        f"hold {n_bytes:,} bytes",
    )
    n_beside = sum(buffer.numel() * buffer.element_size() for buffer in described.buffers())
    require(
        n_beside <= BUFFER_BYTES,
        f"{name} can't be loaded: by its config.json it wants {n_beside:,} bytes of masks and "
        f"positions, more than {BUFFER_BYTES:,}",
    )
    for path in files:
        if path.suffix == ".bin" and zipfile.is_zipfile(path):
            require_stored(path)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No loading bar and no report of transformers: what matters in it is checked here."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    hook = logging.set_tqdm_hook(lambda _, args, kwargs: logging.EmptyTqdm(*args, **kwargs))
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(verbosity)
        logging.set_tqdm_hook(hook)


def hub_commit(name: str, revision: str = "") -> str:
    """The commit that the revision of a hub model stands for now (of "": main), from the cache if
    it is there, else asked of the hub; revision itself where `name` is a local path.

    Raises:
        UserError: no such model or revision, the hub out of reach.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if os.path.exists(Path(name).expanduser()):
        return revision
    revision = revision or "main"
    try:  # the folder of a snapshot has the name of its commit
        return Path(snapshot_download(name, revision=revision, local_files_only=True)).name
    except (HFValidationError, LocalEntryNotFoundError):
        return _ask_hub(name, revision)


def _ask_hub(name: str, revision: str) -> str:
    """The commit. One request, so that a hub out of reach is said at once (downloads retry for
    23 s)."""
    from huggingface_hub import HfApi

    with hub_errors(name, revision, what="model"):
        return HfApi().model_info(name, revision=revision, timeout=10).sha


# --- sites ---


def find_site(lm: LanguageModel, layer: int, site: str, *, centred: bool = False) -> Site:
    """The site of SITES in a layer, counted from 0. Raises UserError if there is none such.

    centred: as in TransformerLens's models with center_writing_weights: what is written to the
        residual stream has a mean of 0, if the model's norms are LayerNorms, which don't see it
    """
    require(site in SITES, f"no such site: {site}: use {', '.join(SITES)}")
    require(
        0 <= layer < lm.n_layers,
        f"no such layer: {layer}: {lm.name} has layers 0 to {lm.n_layers - 1}",
    )
    family = FAMILIES[lm.model.config.model_type]
    block = lm.layers[layer]
    at_input = site in ("mlp_in", "mlp_act", "attn_concat")
    path = {"mlp_act": family.down, "mlp_out": family.mlp, "attn_concat": family.heads}
    module = block.get_submodule((path | {"mlp_in": family.up or family.mlp}).get(site, ""))
    width = len(_matrix(module)) if at_input and site != "mlp_in" else lm.d_model
    centred = centred and not at_input and isinstance(_part(lm.model, "norm"), nn.LayerNorm)
    norm_first = getattr(lm.model.config, "do_layer_norm_before", True)  # OPT
    require(
        norm_first or not centred,
        f"center_writing_weights can't be honoured on {lm.name}: its norms come after its layers",
    )
    return Site(layer, site, width, module=module, at_input=at_input, centred=centred)


def _matrix(projection: nn.Module) -> Tensor:
    """The weight as (in, out), which is how transformers' Conv1D keeps it."""
    return projection.weight.mT if isinstance(projection, nn.Linear) else projection.weight


@contextlib.contextmanager
def _tapped(site: Site, see: Callable[[Tensor], Tensor | None], shape: torch.Size) -> Iterator:
    """Inside, see() gets the site's x (batch, context, width) of each forward pass. What it
    returns takes x's place, unless None. shape: (batch, context), as OPT's MLP flattens them."""

    def new_value(x: Tensor) -> Tensor:
        if site.centred:
            mean = x.mean(dim=-1, keepdim=True)
            new = see((x - mean).reshape(*shape, site.width))
            return x if new is None else new.reshape(x.shape) + mean
        new = see(x.reshape(*shape, site.width))
        return x if new is None else new.reshape(x.shape)

    def before(_: nn.Module, args: tuple) -> tuple:
        return (new_value(args[0]), *args[1:])

    def after(_: nn.Module, args: tuple, out: Tensor | tuple) -> Tensor | tuple:
        return (new_value(out[0]), *out[1:]) if isinstance(out, tuple) else new_value(out)

    if site.at_input:
        handle = site.module.register_forward_pre_hook(before)
    else:
        handle = site.module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


class _Stop(Exception):
    """Ends a forward pass once its activations are read."""


@torch.no_grad()
def activations(lm: LanguageModel, site: Site, input_ids: Tensor) -> Tensor:
    """The activations at the site, beside them those at its target, if it has one: (batch, context,
    site.stored_width) in the model's dtype. What comes after in the model is not computed.

    input_ids: (batch, context) token ids, rows without padding
    """
    seen, sites = [], [site, site.target] if site.target else [site]

    def keep(x: Tensor) -> None:
        seen.append(x)
        if len(seen) == len(sites):
            raise _Stop

    with contextlib.suppress(_Stop), contextlib.ExitStack() as taps:
        for one in sites:
            taps.enter_context(_tapped(one, keep, input_ids.shape))
        lm.model.base_model(input_ids.to(lm.device), use_cache=False)
    return torch.cat(seen, dim=-1) if site.target else seen[0]


@torch.no_grad()
def logits(
    lm: LanguageModel,
    input_ids: Tensor,
    *,
    site: Site | None = None,
    replace: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The model's logits, with replace(x) in place of the activations x at the site.

    Args:
        input_ids: (batch, context) token ids, rows without padding
        replace: (batch, context, site.width) -> the same, in the model's dtype
    Returns:
        (batch, context, vocab) in the model's dtype
    """
    spliced = contextlib.nullcontext()
    if site is not None and replace is not None:
        spliced = _tapped(site, replace, input_ids.shape)
    with spliced:
        return lm.model(input_ids.to(lm.device), use_cache=False).logits


def next_token_loss(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Cross-entropy in nats of each token given those before it, (batch, context - 1), float32.

    The float32 copy of the logits (batch, context, vocab) is made piece by piece.
    """
    rows = max(1, LOSS_CHUNK // logits.shape[-1])
    ids = input_ids.to(logits.device).long()
    losses = torch.empty(ids[:, 1:].shape, device=logits.device)
    for loss, logit, target in zip(losses, logits[:, :-1], ids[:, 1:], strict=True):
        for start in range(0, len(loss), rows):
            piece = slice(start, start + rows)
            loss[piece] = cross_entropy(logit[piece].float(), target[piece], reduction="none")
    return losses


@torch.no_grad()
def direct_logits(lm: LanguageModel, site: Site, directions: Tensor) -> Tensor | None:
    """What each direction at the site adds to the logits by the direct path alone.

    That path is the site's projection, if it has one (mlp_act: down, attn_concat: output), then the
    final norm with its scale set to 1 (its gain applied; a LayerNorm also subtracts the mean over
    d_model), then the unembedding. Later layers are left out, so only the order of the tokens
    means something. The mean over the vocabulary is subtracted, which no softmax sees. This is
    direct logit attribution (Elhage et al. 2021, "A Mathematical Framework for Transformer
    Circuits"), the logit lens (nostalgebraist 2020) of a direction. A soft cap comes after it.

    Args:
        directions: (n, site.width), any dtype
    Returns:
        (n, vocab) float32 on the model's device; None where norms stand in the path (Gemma 2 but
        for resid_post, OPT with norms after its layers), or the MLP (mlp_in)
    """
    config = lm.model.config
    family = FAMILIES[config.model_type]
    norm_first = getattr(config, "do_layer_norm_before", True)  # OPT
    embed_dim = getattr(config, "word_embed_proj_dim", lm.d_model)  # OPT
    through_norm = family.post_norm and site.name != "resid_post"
    if through_norm or site.name == "mlp_in" or not norm_first or embed_dim != lm.d_model:
        return None
    effect = directions.to(lm.device, torch.float32)  # (n, width), then (n, d_model)
    if site.at_input:
        effect = effect @ _matrix(site.module).float()
    norm = _part(lm.model, "norm")
    if isinstance(norm, nn.LayerNorm):
        effect = effect - effect.mean(dim=1, keepdim=True)
    if norm.weight is not None:
        effect = effect * (norm.weight.float() + family.gain_offset)
    effect = effect @ lm.model.get_output_embeddings().weight.float().mT  # (n, vocab)
    return effect - effect.mean(dim=1, keepdim=True)
