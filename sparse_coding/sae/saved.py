"""A trained sparse autoencoder and its files: raw activations in, raw activations out.

A saved one is a SAELens-6 folder: sae_weights.safetensors, then cfg.json. Those of sae_lens 6 load
as well, if their architecture is standard, jumprelu or topk; others have parts that the formulas
here lack, so they are refused by name. Formats of other libraries are written by exported.py.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sparse_coding.config import UserError, require
from sparse_coding.files import Damaged, read_tensors, write_record, write_tensors
from sparse_coding.sae.families import REFINEMENT
from sparse_coding.sae.saelens import (
    AGAIN,
    CONFIG,
    HOOKS,
    REFINED,
    UNPROCESSED,
    WEIGHTS,
    architecture_of,
    foreign_metadata,
    kind_of,
    read_config,
)

THRESHOLDS = ("threshold", "first_threshold")
FORMAT_VERSION = "6.0.0"  # of SAELens: the first whose folders look like this


@dataclass(frozen=True, eq=False)
class SparseAutoencoder:
    """codes = ReLU((x − b_dec) W_enc + b_enc), x_hat = codes W_dec + b_dec.

    A jumprelu one zeroes pre-activations that do not exceed `threshold`, a topk one all but the
    `top_k` largest. Rows of W_dec are the features.

    A transcoder's x_hat is of another site's y, as wide, and may have a skip connection:
    codes = ReLU(x W_enc + b_enc), x_hat = codes W_dec + b_dec + x W_skipᵀ.
    """

    W_enc: Tensor  # (activation_dim, n_dict)
    b_enc: Tensor  # (n_dict,)
    W_dec: Tensor  # (n_dict, activation_dim)
    b_dec: Tensor  # (activation_dim,)
    metadata: dict  # where it comes from: model, layer, site, ... as far as its folder says
    threshold: Tensor | None = None  # (n_dict,)
    first_threshold: Tensor | None = None  # (n_dict,), of a refined one: see stack.py
    top_k: int | None = None
    W_skip: Tensor | None = None  # (activation_dim, activation_dim)
    transcodes: bool = False

    @property
    def activation_dim(self) -> int:
        """Width of x."""
        return self.W_enc.shape[0]

    @property
    def n_dict(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """W_enc, b_enc, W_dec, b_dec by name."""
        return {name: getattr(self, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}

    def encode(self, x: Tensor) -> Tensor:
        """x (..., activation_dim) -> codes (..., n_dict)"""
        pre = (x if self.transcodes else x - self.b_dec) @ self.W_enc + self.b_enc
        if self.first_threshold is not None:
            first = pre.relu() * (pre > self.first_threshold)
            pre = pre + REFINEMENT * (x - self.decode(first)) @ self.W_enc
        codes = pre.relu()
        if self.threshold is not None:
            codes = codes * (pre > self.threshold)
        if self.top_k is not None:
            largest = codes.topk(self.top_k, dim=-1)
            codes = torch.zeros_like(codes).scatter(-1, largest.indices, largest.values)
        return codes

    def decode(self, codes: Tensor, x: Tensor | None = None) -> Tensor:
        """codes (..., n_dict) -> x_hat (..., activation_dim); x: for a skip connection"""
        x_hat = codes @ self.W_dec + self.b_dec
        return x_hat if self.W_skip is None else x_hat + x @ self.W_skip.T

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "SparseAutoencoder":
        """The same autoencoder elsewhere."""
        moved = {name: t.to(device=device, dtype=dtype) for name, t in self.tensors.items()}
        for name in (*THRESHOLDS, "W_skip"):
            if (tensor := getattr(self, name)) is not None:
                moved[name] = tensor.to(device=device, dtype=dtype)
        return replace(self, **moved)


def save_sae(
    folder: Path,
    tensors: dict[str, Tensor],
    *,
    metadata: dict,
    top_k: int | None = None,
    transcodes: bool = False,
) -> None:
    """Writes a folder that `sae_lens.SAE.load_from_disk` and `load_sae` read; cfg.json last.

    Args:
        tensors: W_enc, b_enc, W_dec, b_dec for raw activations: any scaling is folded in; and
            threshold, in the same units, of a jumprelu SAE, or one that chose by batch; and
            first_threshold of a refined one, whose folder sae_lens can't read; and W_skip of a
            transcoder with a skip connection
        transcodes: whether it is a transcoder; sae_lens can't read one that is topk
        top_k: of a topk SAE, whose rows of W_dec have length 1
        metadata: where it comes from, kept whole in metadata.sparse_coding of cfg.json. SAELens's
            own fields are filled from model, layer, site, context_length, dataset and prepend_bos,
            where present
    Raises:
        UserError: it would not fit on the disk.
    """
    metadata = {k: None if _is_nan(v) else v for k, v in metadata.items()}  # NaN is no JSON
    (folder / CONFIG).unlink(missing_ok=True)  # old constants beside new weights would be a lie
    more = [name for name in (*THRESHOLDS, "W_skip") if name in tensors]
    names = ("W_enc", "b_enc", "W_dec", "b_dec", *more)
    write_tensors(folder / WEIGHTS, {name: tensors[name].float() for name in names})
    config = {
        **_described(tensors, top_k, transcodes),
        "dtype": "float32",
        "device": "cpu",
        # false where it is fixed at 0
        "apply_b_dec_to_input": bool(tensors["b_dec"].any()) and not transcodes,
        "normalize_activations": "none",
        # hook_z has a dimension for the heads, which SAELens then flattens
        "reshape_activations": "hook_z" if metadata.get("site") == "attn_concat" else "none",
        "metadata": _saelens_metadata(metadata),
    }
    write_record(folder / CONFIG, config)  # SAELens leaves out the checksum when it saves it again


def _described(tensors: dict[str, Tensor], top_k: int | None, transcodes: bool) -> dict:
    """What of cfg.json depends on the kind and the size of the autoencoder."""
    activation_dim, n_dict = tensors["W_enc"].shape
    n_thresholds = len(tensors.keys() & set(THRESHOLDS))
    assert not (top_k and n_thresholds)
    chosen = ("topk" if top_k else "standard", "jumprelu", REFINED)[n_thresholds]
    of_topk = {"k": top_k, "rescale_acts_by_decoder_norm": False}
    own = {"topk": of_topk, REFINED: {"refinement": REFINEMENT}}.get(chosen, {})
    return {
        "architecture": architecture_of((chosen, transcodes, "W_skip" in tensors)),
        "d_in": activation_dim,
        "d_sae": n_dict,
        **({"d_out": activation_dim} if transcodes else {}),
        **own,
    }


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _saelens_metadata(metadata: dict) -> dict:
    """SAELens's names for what is known, and all of `metadata` under sparse_coding."""
    site, layer = metadata.get("site"), metadata.get("layer")

    def hook(at: str | None) -> str | None:
        return HOOKS[at].format(layer) if at in HOOKS and layer is not None else None

    known = {
        "model_name": metadata.get("model"),
        # None: TransformerLens has none there
        "hook_name": metadata.get("hook_name", hook(site)),
        "hook_name_out": metadata.get("hook_name_out", hook(metadata.get("target_site"))),
        "context_size": metadata.get("context_length"),
        "dataset_path": metadata.get("dataset"),
        "prepend_bos": metadata.get("prepend_bos"),
        "model_from_pretrained_kwargs": UNPROCESSED
        if site in HOOKS and site != "mlp_act"
        else None,
    }
    versions = {"sae_lens_version": FORMAT_VERSION, "sae_lens_training_version": None}
    return (
        versions | {k: v for k, v in known.items() if v is not None} | {"sparse_coding": metadata}
    )


def load_sae(folder: Path) -> SparseAutoencoder:
    """The autoencoder of a folder of `save_sae` or of sae_lens 6, in float32 on the CPU.

    Where apply_b_dec_to_input is false, b_dec is folded into b_enc, so that the formulas hold.

    Raises:
        UserError: no such folder, no SAELens-6 folder, another architecture, a setting that can't
            be honoured, tensors that are missing, unknown, torn, not finite or of a wrong shape.
    """
    config = read_config(folder)
    top_k, (architecture, transcodes, skip) = config.get("k"), kind_of(config["architecture"])
    parameters = ["W_enc", "b_enc", "W_dec", "b_dec"]
    parameters += THRESHOLDS[: {"jumprelu": 1, REFINED: 2}.get(architecture, 0)]
    parameters += ["W_skip"] * skip
    tensors = _read_weights(folder / WEIGHTS, parameters, config)
    if architecture == "topk":
        require(
            type(top_k) is int and 0 < top_k <= config["d_sae"],
            f"{folder / CONFIG}: k {top_k!r} of a topk SAE must be 1 to d_sae {config['d_sae']}",
        )
        if config.get("rescale_acts_by_decoder_norm"):
            tensors |= with_unit_rows(tensors)
    if not config.get("apply_b_dec_to_input", True) and not transcodes:
        shift = tensors["b_dec"].double() @ tensors["W_enc"].double()
        tensors["b_enc"] = (tensors["b_enc"].double() + shift).float()
    ours = config["metadata"].get("sparse_coding")
    metadata = ours if isinstance(ours, dict) else foreign_metadata(folder, config["metadata"])
    top_k = top_k if architecture == "topk" else None
    return SparseAutoencoder(**tensors, metadata=metadata, top_k=top_k, transcodes=transcodes)


def _read_weights(path: Path, parameters: list[str], config: dict) -> dict[str, Tensor]:
    """The named tensors in float32, checked against d_in and d_sae."""
    try:
        tensors, _ = read_tensors(path)
    except Damaged as error:
        raise UserError(f"{error.what}: {AGAIN}") from None
    for names, what in (
        (set(parameters) - set(tensors), "lacks"),
        (set(tensors) - set(parameters), f"is of a {config['architecture']} SAE, but also has"),
    ):
        require(not names, f"{path} {what} {', '.join(sorted(names))}: write or fetch it again")
    width, n_dict = config["d_in"], config["d_sae"]
    shapes = {"W_enc": (width, n_dict), "W_dec": (n_dict, width), "b_dec": (width,)}
    shapes["W_skip"] = (width, width)
    for name in parameters:
        shape = shapes.get(name, (n_dict,))
        require(
            tuple(tensors[name].shape) == shape,
            f"{path}: {name} has shape {tuple(tensors[name].shape)}, but d_in {width} and d_sae "
            f"{n_dict} of {CONFIG} want {shape}",
        )
        require(
            tensors[name].dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16),
            f"{path}: {name} is of {tensors[name].dtype}: save it in float32",
        )
        require(
            bool(tensors[name].isfinite().all()),
            f"{path}: {name} holds NaN or inf: this SAE diverged, choose another",
        )
    return {name: tensors[name].float() for name in parameters}


def with_unit_rows(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """W_dec, W_enc and b_enc of the same x_hat with rows of W_dec of length 1.

    The codes take up the lengths; a row of zeros gets any direction and a code that is always 0.
    """
    lengths = tensors["W_dec"].double().norm(dim=1)
    rows = tensors["W_dec"].double() / lengths.clamp_min(1e-30)[:, None]
    rows[lengths == 0, 0] = 1.0
    scaled = {"W_enc": tensors["W_enc"] * lengths, "b_enc": tensors["b_enc"] * lengths}
    return {name: t.float() for name, t in ({"W_dec": rows} | scaled).items()}


def unscaled(
    tensors: dict[str, Tensor], scale: float, y_scale: float | None = None
) -> dict[str, Tensor]:
    """The same autoencoder for x instead of scale · x: by ReLU's homogeneity only biases and
    thresholds change, and codes are in the units of x. Of a transcoder, to y instead of
    y_scale · y, codes are in the units of y, and what multiplies x changes, too."""
    names = tensors.keys() & {"b_enc", "b_dec", "threshold", "first_threshold"}
    of_y = scale if y_scale is None else y_scale
    found = tensors | {name: tensors[name] / of_y for name in names}
    if y_scale is None:
        return found
    of_x = tensors.keys() & {"W_enc", "W_skip"}
    return found | {name: tensors[name] * (scale / y_scale) for name in of_x}
