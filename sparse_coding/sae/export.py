"""Autoencoders in the formats of other libraries."""

import io
from pathlib import Path

import torch

from sparse_coding.config import require
from sparse_coding.files import require_free_disk, write_atomic, write_json
from sparse_coding.sae.saved import SparseAutoencoder, with_unit_rows


def export_dictionary_learning(folder: Path, sae: SparseAutoencoder, *, about: dict) -> None:
    """Writes ae.pt and config.json for `dictionary_learning.AutoEncoder.from_pretrained`.

    x_hat is the same; rows of W_dec get length 1, as it would otherwise make them on loading.
    about: as in save_sae. ae.pt is torch's own format, loadable with weights_only=True.

    Raises:
        UserError: a jumprelu or topk SAE, or it would not fit on the disk.
    """
    require(
        sae.threshold is None and sae.top_k is None,
        "only SAEs with a plain ReLU can be exported to dictionary_learning",
    )
    tensors = sae.tensors | with_unit_rows(sae.tensors)
    state = {
        "bias": tensors["b_dec"],
        "encoder.weight": tensors["W_enc"].T,  # of a torch.nn.Linear: (out, in)
        "encoder.bias": tensors["b_enc"],
        "decoder.weight": tensors["W_dec"].T,
    }
    buffer = io.BytesIO()
    torch.save({name: t.float().cpu().contiguous() for name, t in state.items()}, buffer)
    require_free_disk(folder, buffer.tell())
    write_atomic(folder / "ae.pt", buffer.getvalue())
    trainer = {
        "dict_class": "AutoEncoder",
        "trainer_class": "sparse_coding",
        "activation_dim": sae.activation_dim,
        "dict_size": sae.n_dict,
        "l1_penalty": about.get("l1_alpha"),
        "layer": about.get("layer"),
        "lm_name": about.get("model"),
        "submodule_name": about.get("site"),
    }
    sizes = {"d_submodule": sae.activation_dim, "ctx_len": about.get("context_length")}
    write_json(
        folder / "config.json", {"trainer": trainer, "buffer": sizes, "sparse_coding": about}
    )
