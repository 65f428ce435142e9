"""A checkpoint of nanoGPT's train.py as a transformers GPT-2.

nanoGPT (github.com/karpathy/nanoGPT) keeps GPT-2's names, so this is a table of shapes: the weights
of its Linear layers are transposed, biases that it leaves out are zeros, and the GELU is the exact
one (before May 2023 it was the tanh approximation: activation "gelu_new"; a checkpoint doesn't say
which). The logits are then those of nanoGPT's own model (bit for bit in float32 on the CPU).
"""

import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_coding.config import UserError, require

if TYPE_CHECKING:
    from transformers import GPT2Config, GPT2LMHeadModel

ACTIVATIONS = ("gelu", "gelu_new")
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MASK = ".attn.bias"  # a causal mask, no weight; only in checkpoints made without flash attention
COMPILED = "_orig_mod."  # prefix of the names in a checkpoint of torch.compile


def load_nanogpt(path: Path, *, activation: str = "gelu") -> "GPT2LMHeadModel":
    """The model of a nanoGPT ckpt.pt in float32 on the CPU, in eval mode.

    vocab_size stays as in the checkpoint: 50304 where nanoGPT padded GPT-2's 50257 tokens.

    Args:
        activation: gelu (exact) or gelu_new (tanh)
    Raises:
        UserError: no such file, no PyTorch checkpoint (or truncated), one that would run code,
            or not nanoGPT's: other contents, names or shapes.
    """
    from transformers import GPT2LMHeadModel

    require(
        activation in ACTIVATIONS,
        f"activation {activation} must be one of {', '.join(ACTIVATIONS)}",
    )
    checkpoint = _read(path)
    state = _without_prefix_and_masks(checkpoint["model"])
    model = GPT2LMHeadModel(_config(checkpoint["model_args"], activation, path))
    weights = _as_gpt2(state, {name: w.shape for name, w in model.state_dict().items()}, path)
    model.load_state_dict(weights)
    return model.eval()


def _read(path: Path) -> dict:
    """The checkpoint with dicts `model` (of tensors) and `model_args`; tensors stay on disk."""
    require(path.is_file(), f"no such file: {path}")
    try:
        with path.open("rb") as file:
            whole = zipfile.is_zipfile(file)  # its directory is at the end
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    require(whole, f"{path} is no checkpoint of nanoGPT: no file of torch.save, or truncated")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a foreign file makes the unpickler raise anything
        raise UserError(f"{path} is no checkpoint of nanoGPT: {_why(error)}") from error
    holds = checkpoint if isinstance(checkpoint, dict) else {}
    require(
        isinstance(holds.get("model"), dict) and isinstance(holds.get("model_args"), dict),
        f"{path} is not nanoGPT's: it must be a dict with `model` and `model_args`, as its "
        "train.py saves it",
    )
    require(
        all(isinstance(k, str) and isinstance(w, Tensor) for k, w in holds["model"].items()),
        f"{path} is not nanoGPT's: `model` must hold tensors by name",
    )
    return checkpoint


def _why(error: Exception) -> str:
    """torch.load's reason in one line, without its advice to load the file unsafely."""
    text = " ".join(str(error).split())
    if asked := re.search(r"global ([\w.]+)", text, re.IGNORECASE):
        return f"it holds more than tensors and plain values ({asked[1]}), which could run code"
    return f"it is damaged ({type(error).__name__}: {text[:100]})"


def _config(args: dict, activation: str, path: Path) -> "GPT2Config":
    from transformers import GPT2Config

    for name in SIZES:
        size = args.get(name)
        good = isinstance(size, int) and not isinstance(size, bool) and size > 0
        require(good, f"{path} is not nanoGPT's: model_args[{name!r}] is {size}, not a size")
    n_head, n_embd = args["n_head"], args["n_embd"]
    require(n_embd % n_head == 0, f"{path}: n_head={n_head} must divide n_embd={n_embd}")
    return GPT2Config(
        vocab_size=args["vocab_size"],
        n_positions=args["block_size"],
        n_embd=n_embd,
        n_layer=args["n_layer"],
        n_head=n_head,
        activation_function=activation,
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,  # the default, 50256, is no token of a small vocabulary
        eos_token_id=None,
    )


def _without_prefix_and_masks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {name.removeprefix(COMPILED): weight for name, weight in state.items()}
    return {name: weight for name, weight in state.items() if not name.endswith(MASK)}


def _as_gpt2(state: dict, shapes: dict[str, torch.Size], path: Path) -> dict[str, Tensor]:
    """The weights under GPT-2's names and in its shapes. Raises UserError if they differ."""
    wrong = f"{path} is not nanoGPT's: `model` "
    if not any(name.endswith(".bias") for name in state):  # bias=False
        state |= {k: torch.zeros(s) for k, s in shapes.items() if k.endswith(".bias")}
    missing, unknown = sorted(shapes.keys() - state.keys()), sorted(state.keys() - shapes.keys())
    require(not missing, f"{wrong}lacks {len(missing)} tensors, as {missing[:1]}")
    require(not unknown, f"{wrong}has {len(unknown)} tensors that GPT-2 has not, as {unknown[:1]}")
    weights = {k: w.mT if k.endswith(TRANSPOSED) and w.ndim == 2 else w for k, w in state.items()}
    for name, shape in shapes.items():
        require(
            weights[name].shape == shape,
            f"{wrong}and model_args disagree: {name} is {list(state[name].shape)}, which does "
            f"not give GPT-2's {list(shape)}",
        )
    tied = torch.equal(state["lm_head.weight"], state["transformer.wte.weight"])
    require(tied, f"{wrong}has an lm_head.weight of its own; nanoGPT's is transformer.wte.weight")
    return weights
