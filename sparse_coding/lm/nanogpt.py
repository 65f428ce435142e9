"""A checkpoint of nanoGPT's train.py as a transformers GPT-2.

nanoGPT (github.com/karpathy/nanoGPT) keeps GPT-2's names, so this is a table of shapes: the weights
of its Linear layers are transposed, biases that it leaves out are zeros, and the GELU is the exact
one (before May 2023 it was the tanh approximation: activation "gelu_new"; a checkpoint doesn't say
which). The logits are then those of nanoGPT's own model (bit for bit in float32 on the CPU).
"""

import io
import pickle
import pickletools
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
META_BYTES = 2**26  # a character vocabulary of more than 64 MB is none
PICKLE_BYTES = 4 * 2**20  # of the part of a checkpoint that names its tensors: 200 kB for GPT-2 XL


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
    config = _config(checkpoint["model_args"], state, activation, path)
    with torch.device("meta"):  # nothing is allocated before all shapes are known to be right
        described = GPT2LMHeadModel(config)
    weights = _as_gpt2(state, {name: w.shape for name, w in described.state_dict().items()}, path)
    model = GPT2LMHeadModel(config)
    model.load_state_dict(weights)
    return model.eval()


def _read(path: Path) -> dict:
    """The checkpoint with dicts `model` (of tensors) and `model_args`; tensors stay on disk."""
    require(path.is_file(), f"no such file: {path}")
    refusal = f"{path} is no checkpoint of nanoGPT"
    try:
        with path.open("rb") as file:
            whole = zipfile.is_zipfile(file)  # its directory is at the end
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    require(whole, f"{refusal}: no file of torch.save, or truncated")
    try:
        require_stored(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except Exception as error:  # a foreign file makes the unpickler raise anything
        raise UserError(f"{refusal}: {_why(error)}") from error
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
    _require_real(holds["model"], path)
    return checkpoint


def require_stored(path: Path) -> None:
    """Raises UserError for a file of torch.save that unpacks to more than it holds.

    Raises:
        zipfile.BadZipFile: it is damaged
    """
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    plain = all(part.compress_type == zipfile.ZIP_STORED for part in parts)
    require(
        plain and sum(part.file_size for part in parts) <= path.stat().st_size,
        f"{path} is compressed, which torch.save does not do: unpacked it may fill the memory",
    )
    pickles = [p.file_size for p in parts if p.filename.rpartition("/")[2] == "data.pkl"]
    require(
        max(pickles, default=0) <= PICKLE_BYTES,
        f"{path}: its data.pkl is larger than {PICKLE_BYTES >> 20} MB, too large for names alone",
    )


def _require_real(state: dict[str, Tensor], path: Path) -> None:
    """Raises UserError unless all are plain tensors of numbers that the file holds."""
    n_bytes = 0
    for name, w in state.items():
        plain = w.layout == torch.strided and w.device.type == "cpu" and not w.is_quantized
        require(
            plain and (w.is_floating_point() or name.endswith(MASK)),
            f"{path} is not nanoGPT's: {name} is a {w.dtype} {w.layout} tensor on {w.device}",
        )
        n_bytes += w.numel() * w.element_size()
    # lm_head.weight and wte.weight are one tensor, listed twice
    require(
        n_bytes <= 2 * path.stat().st_size,
        f"{path} is not nanoGPT's: its tensors have {n_bytes:,} bytes, more than the file",
    )


def _why(error: Exception) -> str:
    """torch.load's reason in one line, without its advice to load the file unsafely."""
    text = " ".join(str(error).split())
    if asked := re.search(r"global ([\w.]+)", text, re.IGNORECASE):
        return f"it holds more than tensors and plain values ({asked[1]}), which could run code"
    return f"it is damaged ({type(error).__name__}: {text[:100]})"


def _config(args: dict, state: dict, activation: str, path: Path) -> "GPT2Config":
    from transformers import GPT2Config

    for name in SIZES:
        size = args.get(name)
        good = type(size) is int and 0 < size < 2**31
        shown = "huge" if type(size) is int and size.bit_length() > 64 else str(size)[:60]
        require(good, f"{path} is not nanoGPT's: model_args[{name!r}] is {shown}, not a size")
    n_head, n_embd = args["n_head"], args["n_embd"]
    require(n_embd % n_head == 0, f"{path}: n_head={n_head} must divide n_embd={n_embd}")
    layers = {match[1] for name in state if (match := re.match(r"transformer\.h\.(\d+)\.", name))}
    require(
        args["n_layer"] <= 2 * len(layers),  # which differ is said later
        f"{path} is not nanoGPT's: model_args['n_layer'] is {args['n_layer']}, `model` has "
        f"{len(layers)} layers",
    )
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
    without = not any(name.endswith(".bias") for name in state)  # bias=False
    zeros = {k: s for k, s in shapes.items() if without and k.endswith(".bias")}
    shapes = {k: s for k, s in shapes.items() if k not in zeros}
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
    return weights | {name: torch.zeros(shape) for name, shape in zeros.items()}


# --- meta.pkl, a character vocabulary beside a checkpoint ---


class _PlainUnpickler(pickle.Unpickler):
    """Makes numbers, strings and containers. Whatever else is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> type:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_meta_pickle(path: Path) -> dict:
    """The dict of nanoGPT's meta.pkl (vocab_size, stoi, itos), without running anything in it.

    Raises:
        UserError: not a pickle, one that asks for more than plain containers, or no dict.
    """
    refusal = f"{path} is no meta.pkl of nanoGPT"
    require(path.is_file(), f"{path}: no such file")
    require(path.stat().st_size <= META_BYTES, f"{refusal}: larger than {META_BYTES >> 20} MB")
    data = path.read_bytes()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            # the C unpickler allocates as many slots as the largest number says
            if "PUT" in opcode.name and argument is not None and int(argument) > len(data):
                raise pickle.UnpicklingError("a memo index out of bounds")
        content = _PlainUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # the pickle module raises nearly any, says its manual
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{refusal} ({reason}): save stoi as JSON instead") from None
    require(isinstance(content, dict), f"{refusal}: it holds a {type(content).__name__}")
    return content
