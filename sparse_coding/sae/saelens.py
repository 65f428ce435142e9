"""cfg.json of sae_lens 6 as strangers write it: what it says of the activations an SAE is for.

What changes them is honoured here or refused by its name. sae_lens itself loads the model with
TransformerLens's `from_pretrained_no_processing(model_name, **model_from_pretrained_kwargs)` and
begins each row of context_size tokens with the bos token if prepend_bos.
"""

import re
from collections.abc import Callable
from pathlib import Path

from sparse_coding.config import require
from sparse_coding.files import CHECKSUM, Damaged, read_json, record_checksum
from sparse_coding.sae.families import REFINEMENT

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
AGAIN = "write or fetch the SAE again"  # where its files are damaged
REFINED = "matryoshka_refined"  # ours: no class of sae_lens refines codes
# ours again where codes are topk: sae_lens has no such transcoder
TRANSCODERS = (
    "transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder",
    "topk_transcoder", "topk_skip_transcoder",
)  # fmt: skip
ARCHITECTURES = ("standard", "jumprelu", "topk", REFINED, *TRANSCODERS)
HOOKS = {  # site -> TransformerLens's name of it
    "mlp_in": "blocks.{}.mlp.hook_in",  # of TransformerLens 3's bridge, as in circuit-tracer
    "mlp_act": "blocks.{}.mlp.hook_post",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "resid_post": "blocks.{}.hook_resid_post",
    "attn_concat": "blocks.{}.attn.hook_z",
}
RESID_PRE = "blocks.{}.hook_resid_pre"  # the residual stream after the layer before
# TransformerLens changes what flows through these sites unless told not to (mlp_act stays)
UNPROCESSED = {"center_writing_weights": False, "fold_value_biases": False}
DTYPES = ("float32", "float64", "float16", "bfloat16")
# options of from_pretrained that change no activation of our sites beyond rounding (fold_ln folds a
# norm's gain into the matrix behind it; center_unembed moves all logits alike)
HARMLESS = {
    "fold_ln", "center_unembed", "device", "n_devices", "device_map", "move_to_device",
    "default_padding_side", "default_prepend_bos", "low_cpu_mem_usage", "attn_implementation",
    "trust_remote_code", "local_files_only", "token", "cache_dir",
}  # fmt: skip
AT_HEADS = {"fold_value_biases", "refactor_factored_attn_matrices"}  # elsewhere harmless too


def kind_of(architecture: str) -> tuple[str, bool, bool]:
    """(how codes are chosen: standard, jumprelu, topk or REFINED; whether it is a transcoder;
    whether that has a skip connection)."""
    if architecture not in TRANSCODERS:
        return architecture, False, False
    chosen = architecture.split("_")[0]
    return chosen if chosen in ("jumprelu", "topk") else "standard", True, "skip" in architecture


def architecture_of(kind: tuple[str, bool, bool]) -> str:
    """The name of what kind_of gives."""
    return next(name for name in ARCHITECTURES if kind_of(name) == kind)


def read_config(folder: Path) -> dict:
    """cfg.json, if it describes an SAE that our formulas can express.

    Raises:
        UserError: it is missing, no JSON, damaged, not of SAELens 6, of another architecture, or
            has a setting or a type that is not known.
    """
    require(folder.is_dir(), f"no such folder: {folder}: give the folder that holds {CONFIG}")
    for name in (CONFIG, WEIGHTS):
        require(
            (folder / name).is_file(),
            f"{folder} is no saved SAE: it has no {name}; wanted is a folder of saes/ or one "
            "written by sae_lens 6",
        )
    path = folder / CONFIG
    config = read_json(path, remedy=AGAIN)
    if config.pop(CHECKSUM, None) not in (None, record_checksum(config)):  # only ours have one
        raise Damaged(path, "its checksum differs", AGAIN)
    require(
        {"architecture", "d_in", "d_sae"} <= config.keys()
        and isinstance(config.get("metadata"), dict),
        f"{path} is not of SAELens 6 (architecture, d_in, d_sae, metadata): load an "
        "older one with sae_lens 6 and save it again",
    )
    _require_expressible(path, config)
    return config


def _require_expressible(path: Path, config: dict) -> None:
    """Raises UserError for what our formulas can't express, or a type that is not known."""
    architecture, normalised = config["architecture"], config.get("normalize_activations")
    require(
        architecture in ARCHITECTURES,
        f"{path.parent} is a {architecture} SAE; only {', '.join(ARCHITECTURES)} can be read",
    )
    require(
        normalised in (None, "none"),
        f"{path.parent} wants normalize_activations {normalised}: fold it into the weights with "
        "sae_lens and save it again",
    )
    transcodes = kind_of(architecture)[1]
    require(
        not transcodes or config.get("d_out") == config["d_in"],
        f"{path.parent} predicts activations of width {str(config.get('d_out'))[:60]} from such of "
        f"{config['d_in']}; only equal ones can be read",
    )
    flags = (*["apply_b_dec_to_input"] * (not transcodes), "rescale_acts_by_decoder_norm")
    known = {
        "d_in": _is_size(config["d_in"]),
        "d_sae": _is_size(config["d_sae"]),
        "dtype": config.get("dtype") is None or _dtype(config["dtype"]) in DTYPES,
        "reshape_activations": config.get("reshape_activations") in (None, "none", "hook_z"),
        "activation_fn": config.get("activation_fn") in (None, "relu", architecture),
        "apply_b_dec_to_input": not transcodes or not config.get("apply_b_dec_to_input"),
        "refinement": architecture != REFINED or config.get("refinement") == REFINEMENT,
    } | {name: config.get(name) in (None, True, False) for name in flags}
    _require_all(path, known, config)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value < 2**31


def _dtype(value: object) -> str:
    return str(value).removeprefix("torch.")


def _require_all(path: Path, known: dict[str, bool], settings: dict) -> None:
    """Raises UserError with the first setting that is not known."""
    for name, good in known.items():
        value = str(settings.get(name))[:60]
        require(good, f"{path}: {name} {value} can't be honoured here: evaluate it with sae_lens")


def foreign_metadata(folder: Path, metadata: dict) -> dict:
    """What the metadata of sae_lens tell, by our names: model, model_revision, dtype, hook_name,
    site and layer (where the hook is one of ours), context_length, dataset, and, where they are
    true, prepend_bos and center_writing_weights.

    Raises:
        UserError: a setting that changes the activations and can't be honoured.
    """
    path = folder / CONFIG
    options = metadata.get("model_from_pretrained_kwargs") or {}
    require(isinstance(options, dict), f"{path}: model_from_pretrained_kwargs is no object")
    context, hook = metadata.get("context_size"), metadata.get("hook_name")
    texts = ("model_name", "hook_name", "dataset_path", "model_class_name")
    slice_ = metadata.get("seqpos_slice")
    known = {
        "context_size": context is None or _is_size(context),
        "prepend_bos": metadata.get("prepend_bos") in (None, True, False),
        "hook_head_index": metadata.get("hook_head_index") is None,
        # position 0 is left out here anyway
        "seqpos_slice": slice_ in (None, [None], [None, None], [1, None], [0, None]),
        "use_chat_formatting": not metadata.get("use_chat_formatting"),
    } | {name: isinstance(metadata.get(name), (str, type(None))) for name in texts}
    _require_all(path, known, metadata)
    site, layer = site_of(hook)
    target, of_target = site_of(metadata.get("hook_name_out"))
    told = {
        "model": metadata.get("model_name"),
        "hook_name": hook,
        "site": site,
        "layer": layer,
        "target_site": target if of_target == layer else None,
        "context_length": context,
        "dataset": metadata.get("dataset_path"),
        "prepend_bos": metadata.get("prepend_bos") or None,
    } | _model_options(path, options, site)
    return {name: value for name, value in told.items() if value is not None}


def site_of(hook: str | None) -> tuple[str | None, int | None]:
    """(site, layer) of TransformerLens's hook; (None, None) if it is at none of our sites."""
    for site, name in (*HOOKS.items(), ("resid_post", RESID_PRE)):
        match = re.fullmatch(re.escape(name).replace(r"\{\}", r"(\d{1,6})"), hook or "")
        layer = int(match[1]) - (name == RESID_PRE) if match else -1
        if layer >= 0:
            return site, layer
    return None, None


def _model_options(path: Path, options: dict, site: str | None) -> dict:
    """What options of from_pretrained come to, for an SAE on the site, which may be unknown."""
    harmless = HARMLESS if site in (None, "attn_concat") else HARMLESS | AT_HEADS
    harmless = harmless - {"fold_ln"} if site == "mlp_in" else harmless  # behind a norm's gain
    dtype = options.get("dtype", options.get("torch_dtype"))
    centred = options.get("center_writing_weights")
    known: dict[str, Callable[[object], bool]] = {
        "center_writing_weights": lambda value: type(value) is bool,
        "revision": lambda value: isinstance(value, str),
        "dtype": lambda value: _dtype(value) in ("float32", "bfloat16", "auto"),
    }
    known["torch_dtype"] = known["dtype"]
    for name, value in options.items():
        off = value is None or value is False
        good = name in harmless or off or (name in known and known[name](value))
        require(
            good,
            f"{path}: model_from_pretrained_kwargs has {name} {str(value)[:60]}, which can't be "
            "honoured here: evaluate it with sae_lens",
        )
    return {
        "center_writing_weights": True if centred else None,
        "model_revision": options.get("revision") or None,
        "dtype": _dtype(dtype) if dtype else None,
    }


def wanted_of_model(metadata: dict) -> dict[str, bool]:
    """prepend_bos and centred: how the model's rows and activations must be for the SAE."""
    names = {"prepend_bos": "prepend_bos", "centred": "center_writing_weights"}
    return {ours: bool(metadata.get(theirs)) for ours, theirs in names.items()}


def saved_flags(folder: Path, flags: object, names: tuple[str, ...]) -> list[str]:
    """The flags of these names that cfg.json records, as arguments of a command line: whoever wrote
    the file chooses what is read, and never where anything is written.

    flags: value by name; others than of these names, and None, are left out
    Raises:
        UserError: they are no object, or a value is no number or text.
    """
    path = folder / CONFIG
    require(isinstance(flags, (dict, type(None))), f"{path}: flags is no object")
    known = {name: flags[name] for name in names if (flags or {}).get(name) is not None}
    for name, value in known.items():
        plain = type(value) in (str, int, float)
        require(plain, f"{path}: {name} {str(value)[:60]} is no number or text")
    return [f"--{name.replace('_', '-')}={value}" for name, value in known.items()]
