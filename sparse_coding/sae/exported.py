"""Saved autoencoders in the formats of dictionary_learning 0.1 and sparsify 1.3, transcoders in
those of sparsify and circuit-tracer 0.5."""

import io
import json
from pathlib import Path

import torch
from torch import Tensor

from sparse_coding.config import require
from sparse_coding.files import require_free_disk, write_atomic, write_json, write_tensors
from sparse_coding.sae.families import FAMILIES, PREFIXES, bands
from sparse_coding.sae.saelens import CONFIG
from sparse_coding.sae.saved import SparseAutoencoder, with_unit_rows


def export_dictionary_learning(folder: Path, sae: SparseAutoencoder, *, metadata: dict) -> None:
    """Writes ae.pt and config.json for `dictionary_learning.utils.load_dictionary`.

    x_hat is the same. The class is AutoEncoder, for which rows of W_dec get length 1, as it would
    otherwise make them on loading; AutoEncoderTopK; with a threshold JumpReluAutoEncoder, or, where
    metadata name a family that chose by batch (arch) and its k (target_l0) and the threshold is one
    for all, BatchTopKSAE or MatryoshkaBatchTopKSAE.

    metadata: as in save_sae. ae.pt is torch's own format, loadable with weights_only=True.

    Raises:
        UserError: it refines its codes, is a transcoder, or would not fit on the disk.
    """
    require(not sae.transcodes, f"{folder.name}: dictionary_learning has no transcoders")
    refines = sae.first_threshold is not None
    require(not refines, f"{folder.name}: dictionary_learning has no SAE that refines its codes")
    dict_class, state = _as_dictionary(sae.to("cpu", torch.float32), metadata)
    buffer = io.BytesIO()
    torch.save({name: t.contiguous() for name, t in state.items()}, buffer)
    require_free_disk(folder, buffer.tell())
    write_atomic(folder / "ae.pt", buffer.getvalue())
    trainer = {
        "dict_class": dict_class,
        "trainer_class": "sparse_coding",
        "activation_dim": sae.activation_dim,
        "dict_size": sae.n_dict,
        "l1_penalty": metadata.get("l1_alpha"),
        "layer": metadata.get("layer"),
        "lm_name": metadata.get("model"),
        "submodule_name": metadata.get("site"),
    }
    if "k" in state:
        trainer["k"] = int(state["k"])
    sizes = {"d_submodule": sae.activation_dim, "ctx_len": metadata.get("context_length")}
    write_json(
        folder / "config.json", {"trainer": trainer, "buffer": sizes, "sparse_coding": metadata}
    )


def _as_dictionary(sae: SparseAutoencoder, metadata: dict) -> tuple[str, dict[str, Tensor]]:
    """(class of dictionary_learning, its state)"""
    if sae.threshold is None and sae.top_k is None:
        tensors = sae.tensors | with_unit_rows(sae.tensors)
        return "AutoEncoder", {"bias": tensors["b_dec"]} | _linear(tensors)
    with_b_dec = _linear(sae.tensors) | {"b_dec": sae.b_dec}
    if sae.top_k is not None:
        unset = torch.tensor(-1.0)  # a threshold is for those who ask for it
        return "AutoEncoderTopK", with_b_dec | {"k": _k(sae.top_k), "threshold": unset}
    family, k = FAMILIES.get(metadata.get("arch")), round(metadata.get("target_l0") or 0)
    by_batch = family is not None and family.selection == "batchtopk"
    if not by_batch or k < 1 or len(sae.threshold.unique()) > 1:
        # it does not take b_dec off its input
        b_enc = sae.b_enc.double() - sae.b_dec.double() @ sae.W_enc.double()
        more = {"b_enc": b_enc.float(), "threshold": sae.threshold}
        return "JumpReluAutoEncoder", sae.tensors | more
    known = {"k": _k(k), "threshold": sae.threshold[0].clone()}
    if not family.nested:
        return "BatchTopKSAE", with_b_dec | known
    of_prefixes = bands(sae.n_dict, tuple(metadata.get("prefixes", PREFIXES)))
    sizes = torch.tensor([end - first for first, end in of_prefixes])
    return "MatryoshkaBatchTopKSAE", sae.tensors | known | {"group_sizes": sizes}


def _k(k: int) -> Tensor:
    return torch.tensor(k, dtype=torch.int32)


def _linear(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Encoder and decoder as weights of a torch.nn.Linear: (out, in)."""
    return {
        "encoder.weight": tensors["W_enc"].T,
        "encoder.bias": tensors["b_enc"],
        "decoder.weight": tensors["W_dec"].T,
    }


def export_sparsify(folder: Path, sae: SparseAutoencoder, *, metadata: dict) -> None:
    """Writes sae.safetensors, then cfg.json, for `sparsify.Sae.load_from_disk`.

    Raises:
        UserError: it is no topk SAE, or it would not fit on the disk.
    """
    require(sae.top_k is not None, f"{folder.name}: sparsify has topk SAEs alone")
    sae = sae.to("cpu", torch.float32)
    tensors = {
        "encoder.weight": sae.W_enc.T,  # of a torch.nn.Linear: (out, in)
        "encoder.bias": sae.b_enc,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
    }
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip
    (folder / CONFIG).unlink(missing_ok=True)  # old constants beside new weights would be a lie
    write_tensors(folder / "sae.safetensors", tensors)
    config = {
        "activation": "topk",
        "expansion_factor": sae.n_dict // sae.activation_dim,  # num_latents has precedence
        "normalize_decoder": True,
        "num_latents": sae.n_dict,
        "k": sae.top_k,
        "multi_topk": False,
        "skip_connection": sae.W_skip is not None,
        "transcode": sae.transcodes,
        "d_in": sae.activation_dim,
    }
    write_json(folder / CONFIG, config | {"sparse_coding": metadata})


def export_circuit_tracer(folder: Path, sae: SparseAutoencoder, *, metadata: dict) -> None:
    """Writes layer_<i>.safetensors, as circuit_tracer's load_relu_transcoder reads it, and
    config.yaml, as its load_transcoder_from_hub does. A set of it has a file of every layer, from 0
    on, of one n_dict: files of several runs, put into one folder.

    metadata: with model and layer
    Raises:
        UserError: it is no transcoder, or a topk one, or it would not fit on the disk.
    """
    known = sae.transcodes and sae.top_k is None
    require(known, f"{folder.name}: circuit_tracer has relu and jumprelu transcoders alone")
    sae = sae.to("cpu", torch.float32)
    tensors = sae.tensors | {"W_enc": sae.W_enc.T}
    if sae.threshold is not None:
        tensors["activation_function.threshold"] = sae.threshold
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip
    config = {
        "model_kind": "transcoder_set",
        "model_name": metadata.get("model"),
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out",
        "scan": folder.name,
    }
    write_tensors(folder / f"layer_{metadata['layer']}.safetensors", tensors)
    lines = [f"{name}: {json.dumps(value)}\n" for name, value in config.items()]  # JSON is YAML
    write_atomic(folder / "config.yaml", "".join(lines))


# flag of run.py, and folder beside saes/ -> what writes a cell
EXPORTERS = {
    "dictionary_learning": export_dictionary_learning,
    "sparsify": export_sparsify,
    "circuit_tracer": export_circuit_tracer,
}
