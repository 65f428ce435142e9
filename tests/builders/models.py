"""Small models, tokenizers and files of text that tests put on disk."""

import json
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import tiktoken
import torch
from torch.nn.functional import gelu, layer_norm, linear
from transformers import AutoConfig, AutoModelForCausalLM

# the sizes of random_model
VOCAB, D, WIDTH, N_LAYERS = 50, 16, 40, 3
GPT2_NAMES = dict(n_embd=D, n_layer=N_LAYERS, n_head=2, n_inner=WIDTH, n_positions=32)
LLAMA_NAMES = dict(hidden_size=D, intermediate_size=WIDTH, num_hidden_layers=N_LAYERS,
                   num_attention_heads=2, num_key_value_heads=1,
                   max_position_embeddings=32)  # fmt: skip
NEO_NAMES = dict(hidden_size=D, num_layers=N_LAYERS, num_heads=2, intermediate_size=WIDTH,
                 attention_types=[[["global", "local", "global"], 1]],
                 max_position_embeddings=32, window_size=4)  # fmt: skip
NO_TOKENS = dict(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, pad_token_id=3)
CONFIGS = {
    "gpt2": GPT2_NAMES,
    "gptj": GPT2_NAMES | {"rotary_dim": 4},
    "gpt_neo": NEO_NAMES,
    "gpt_neox": LLAMA_NAMES,
    "opt": LLAMA_NAMES | {"ffn_dim": WIDTH, "word_embed_proj_dim": D},
    "phi": LLAMA_NAMES,
    "llama": LLAMA_NAMES,
    "mistral": LLAMA_NAMES | {"sliding_window": 4},
    "qwen2": LLAMA_NAMES,
    "gemma2": LLAMA_NAMES | {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 4},
}
# paths of the layers, and in one of them the down projection, the output projection and the MLP,
# and of the final norm: written down again from transformers' code
PATHS = {
    "gpt2": "transformer.h mlp.c_proj attn.c_proj mlp transformer.ln_f",
    "gptj": "transformer.h mlp.fc_out attn.out_proj mlp transformer.ln_f",
    "gpt_neo": "transformer.h mlp.c_proj attn.attention.out_proj mlp transformer.ln_f",
    "gpt_neox": "gpt_neox.layers mlp.dense_4h_to_h attention.dense mlp gpt_neox.final_layer_norm",
    "opt": "model.decoder.layers fc2 self_attn.out_proj fc2 model.decoder.final_layer_norm",
    "phi": "model.layers mlp.fc2 self_attn.dense mlp model.final_layernorm",
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "gemma2"),
        "model.layers mlp.down_proj self_attn.o_proj mlp model.norm",
    ),
}
PATHS = {kind: paths.split() for kind, paths in PATHS.items()}


def random_model(kind: str, *, seed: int = 0, noise: float = 0.3, **changes):
    """Weights large enough that no nonlinearity is nearly linear and no gain or bias trivial."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **(CONFIGS[kind] | NO_TOKENS | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += noise * torch.randn_like(weight)
    return model


def module_at(model, kind: str, layer: int, site: str) -> tuple[torch.nn.Module, bool]:
    """(module, whether it's the module's input) where the activations of a site are."""
    layers, down, heads, mlp, _ = PATHS[kind]
    path = {"mlp_act": down, "attn_concat": heads, "mlp_out": mlp, "resid_post": ""}
    path["mlp_in"] = "fc1" if kind == "opt" else mlp
    module = model.get_submodule(f"{layers}.{layer}").get_submodule(path[site])
    return module, site in ("mlp_in", "mlp_act", "attn_concat")


@torch.no_grad()
def hooked(
    model, kind: str, layer: int, site: str, ids: torch.Tensor, *, new=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(activations (batch, context, width), logits) of one whole forward pass, by a hook of the
    tests' own; new(x) takes the place of the activations x."""
    module, at_input = module_at(model, kind, layer, site)
    seen = []

    def see(x):
        seen.append(x.clone().reshape(*ids.shape, -1))  # OPT's MLP flattens batch and context
        return x if new is None else new(seen[0]).reshape(x.shape)

    def before(_, args):
        return (see(args[0]), *args[1:])

    def after(_, args, out):
        return (see(out[0]), *out[1:]) if isinstance(out, tuple) else see(out)

    if at_input:
        handle = module.register_forward_pre_hook(before)
    else:
        handle = module.register_forward_hook(after)
    logits = model(ids).logits
    handle.remove()
    return seen[0], logits


BPE_TEXT = ("the cat and the hat on the mat, def f(x): return x",) * 9


def byte_level_bpe(*, special: list[str], vocab_size: int = 300, texts: Iterable[str] = BPE_TEXT):
    """A tokenizer of the tokenizers library, trained here; the special tokens come first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    return bpe


def save_tokenizer(folder: Path, bpe, **tokens: str) -> str:
    """As transformers keeps it; without tokens given, <|endoftext|> begins and ends texts."""
    from transformers import PreTrainedTokenizerFast

    tokens = tokens or dict(eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    PreTrainedTokenizerFast(tokenizer_object=bpe, **tokens).save_pretrained(folder)
    return str(folder)


def small_gpt2(name: str):
    """An encoding of the same kind: bytes, one merge, <|endoftext|>."""
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256}
    return tiktoken.Encoding(
        name, pat_str=r"\w+|\W+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 257}
    )


def write_parquet(path: Path, texts: list[str], column: str = "text") -> str:
    """A parquet file with the columns of Pile10k."""
    table = pyarrow.table({column: texts, "meta": [{"pile_set_name": "x"}] * len(texts)})
    pyarrow.parquet.write_table(table, path)
    return str(path)


def write_jsonl(path: Path, texts: list[str]) -> str:
    """A .jsonl file with the texts in the column "text"."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def bin_manifest(folder: Path, **changes) -> Path:
    """manifest.json as prepare.py writes it beside bins of bytes, with these changes."""
    split = {"documents": 3, "tokens": 1000, "bytes": 997, "sha256": "0" * 64}
    made = {"constants": {"tokenizer": "bytes"}, "vocab_size": 257, "end_of_text": 256,
            "tokenizer": {"name": "bytes", "fingerprint": "f" * 16}, "dtype": "uint16",
            "exhausted": True, "train": split, "val": split}  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(made | changes))
    return folder / "manifest.json"


ARGS = dict(n_layer=2, n_head=4, n_embd=16, block_size=24, vocab_size=65, dropout=0.1, bias=False)
MATRICES = {"attn.c_attn": (3, 1), "attn.c_proj": (1, 1), "mlp.c_fc": (4, 1), "mlp.c_proj": (1, 4)}


def nanogpt_state(args: dict, *, scale: float = 0.4) -> dict[str, torch.Tensor]:
    """Weights by nanoGPT's names; large, so that the kind of GELU shows in the logits."""
    d, rng = args["n_embd"], torch.Generator().manual_seed(args["vocab_size"] + args["bias"])

    def randn(*shape: int) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=rng)

    wte = randn(args["vocab_size"], d)
    state = {"transformer.wte.weight": wte, "transformer.wpe.weight": randn(args["block_size"], d)}
    norms = ["transformer.ln_f"]
    for i in range(args["n_layer"]):
        h = f"transformer.h.{i}."
        norms += [h + "ln_1", h + "ln_2"]
        for name, (n_out, n_in) in MATRICES.items():
            state[f"{h}{name}.weight"] = randn(n_out * d, n_in * d)
            if args["bias"]:
                state[f"{h}{name}.bias"] = randn(n_out * d)
    for name in norms:
        state[f"{name}.weight"] = 1 + randn(d)
        if args["bias"]:
            state[f"{name}.bias"] = randn(d)
    return state | {"lm_head.weight": wte}


def nanogpt_logits(state: dict, args: dict, ids: torch.Tensor, act=gelu) -> torch.Tensor:
    """nanoGPT's forward pass as its readme's formulas have it: pre-norm blocks, causal softmax."""
    n_head, (batch, context) = args["n_head"], ids.shape

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        gain, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
        return layer_norm(x, gain.shape, gain, bias, 1e-5)

    def matrix(x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    x = state["transformer.wte.weight"][ids] + state["transformer.wpe.weight"][:context]
    later = torch.ones(context, context, dtype=torch.bool).triu(1)
    for i in range(args["n_layer"]):
        h = f"transformer.h.{i}."
        q, k, v = (
            t.reshape(batch, context, n_head, -1).transpose(1, 2)
            for t in matrix(norm(x, h + "ln_1"), h + "attn.c_attn").chunk(3, dim=2)
        )
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(later, -torch.inf)
        heads = (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
        x = x + matrix(heads, h + "attn.c_proj")
        x = x + matrix(act(matrix(norm(x, h + "ln_2"), h + "mlp.c_fc")), h + "mlp.c_proj")
    return norm(x, "transformer.ln_f") @ state["lm_head.weight"].T


def save_checkpoint(path, args: dict = ARGS, state: dict | None = None, **more):
    """A checkpoint as nanoGPT's train.py writes it."""
    checkpoint = {
        "model": state or nanogpt_state(args),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]},
        "model_args": args,
        "iter_num": 30,
        "best_val_loss": torch.tensor(2.5),
        "config": {"dataset": "shakespeare_char", "compile": False, "learning_rate": 1e-3},
    }
    torch.save(checkpoint | more, path)
    return path


def deflated(path: Path, target: Path) -> Path:
    """A copy of a file of torch.save with its parts compressed, as torch never writes it."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return target


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)
