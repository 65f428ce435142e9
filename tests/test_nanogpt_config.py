"""The override files have nanoGPT's keys and types; a checkpoint becomes a folder that loads."""

import gzip
import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from sparse_coding.config import UserError
from sparse_coding.nanogpt import load_nanogpt

# what nanoGPT's train.py lets a config file override, at commit 3adf61e1 (2025-11-12)
KEYS = {
    str: "out_dir init_from wandb_project wandb_run_name dataset backend device dtype",
    int: "eval_interval log_interval eval_iters gradient_accumulation_steps batch_size block_size "
    "n_layer n_head n_embd max_iters warmup_iters lr_decay_iters",
    float: "dropout learning_rate weight_decay beta1 beta2 grad_clip min_lr",
    bool: "eval_only always_save_checkpoint wandb_log bias decay_lr compile",
}
TYPE_OF = {name: kind for kind, names in KEYS.items() for name in names.split()}
OVERRIDES = sorted(
    path
    for path in (ROOT / "nanogpt_config").glob("*.py")
    if path.stem not in ("prepare", "convert")
)


def values_of(path: Path) -> dict:
    """What the file assigns, run as nanoGPT's configurator runs it."""
    values = {}
    exec(path.read_text(), values)
    return {k: v for k, v in values.items() if not k.startswith("__") and type(v) in KEYS}


@pytest.mark.parametrize("path", OVERRIDES, ids=lambda p: p.stem)
def test_an_override_file_has_keys_and_types_of_nanogpt(path):
    values = values_of(path)
    assert {name: type(value) for name, value in values.items()} == {
        name: TYPE_OF.get(name) for name in values
    }
    assert values["n_embd"] % values["n_head"] == 0
    assert values["lr_decay_iters"] == values["max_iters"]
    assert values["max_iters"] % values["eval_interval"] == 0  # else the last steps are not saved


def test_the_demo_model_has_the_settings_that_its_comments_count_with():
    demo = values_of(ROOT / "nanogpt_config" / "demo_cpu.py")
    tokens = demo["batch_size"] * demo["block_size"] * demo["gradient_accumulation_steps"]
    assert (tokens, round(tokens * demo["max_iters"] / 1e6, 1)) == (1536, 13.8)
    config = json.loads((ROOT / "assets" / "demo" / "config.json").read_text())
    for theirs, ours in (("n_positions", "block_size"), ("n_layer",) * 2, ("n_embd",) * 2):
        assert config[theirs] == demo[ours]


def test_the_demo_model_is_small_and_loads_with_its_tokenizer_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ROOT / "assets" / "demo"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2e6
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert (model.config.activation_function, model.config.vocab_size) == ("gelu", len(tokenizer))
    text = "class Reader:\n    def __init__(self, path):\n        self.path = path\n\n    def"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert tokenizer.decode(ids[0]) == text
    with torch.no_grad():
        losses = model(ids, labels=ids).loss
        following = model(ids).logits[0, -1].argmax()
    assert losses < 3.5  # nats per token; 6.9 for knowing nothing
    assert tokenizer.decode(following).startswith(" ")


@pytest.fixture(scope="module")
def convert():
    spec = importlib.util.spec_from_file_location("convert", ROOT / "nanogpt_config/convert.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["convert"] = module
    spec.loader.exec_module(module)
    return module


def write_checkpoint(path: Path, *, scale: float) -> None:
    """As nanoGPT's train.py saves it, with random weights of this size."""
    args = dict(n_layer=2, n_head=2, n_embd=8, block_size=16, bias=False, vocab_size=257)
    rng, d = torch.Generator().manual_seed(0), args["n_embd"]

    def randn(*shape: int) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=rng)

    wte = randn(257, d)
    model = {"transformer.wte.weight": wte, "lm_head.weight": wte}
    model |= {"transformer.wpe.weight": randn(16, d), "transformer.ln_f.weight": torch.ones(d)}
    for i in range(2):
        h = f"transformer.h.{i}."
        shapes = {"attn.c_attn": (3 * d, d), "attn.c_proj": (d, d)}
        shapes |= {"mlp.c_fc": (4 * d, d), "mlp.c_proj": (d, 4 * d)}
        model |= {f"{h}{name}.weight": randn(*shape) for name, shape in shapes.items()}
        model |= {f"{h}ln_{j}.weight": torch.ones(d) for j in (1, 2)}
    torch.save({"model": model, "model_args": args | {"dropout": 0.0}, "config": {}}, path)


def write_data(folder: Path, texts: dict[str, bytes]) -> None:
    """Bins of bytes as prepare.py writes them."""
    for name, text in texts.items():
        np.array([*text, 256], np.uint16).tofile(folder / f"{name}.bin")
    about = {"constants": {"tokenizer": "bytes"}, "vocab_size": 257, "end_of_text": 256}
    (folder / "manifest.json").write_text(json.dumps(about))


def test_a_checkpoint_becomes_a_folder_with_the_same_logits(tmp_path, convert):
    from transformers import AutoModelForCausalLM

    write_checkpoint(tmp_path / "ckpt.pt", scale=0.5)
    folder = tmp_path / "model"
    argv = ["--checkpoint", str(tmp_path / "ckpt.pt"), "--output-dir", str(folder)]
    ids = torch.arange(16)[None] * 7
    for dtype, tolerance in (("float32", 0.0), ("float16", 0.02)):
        assert convert.main([*argv, "--dtype", dtype]) == 0
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        wanted = load_nanogpt(tmp_path / "ckpt.pt")(ids).logits
        assert torch.allclose(loaded(ids).logits, wanted, rtol=0, atol=tolerance)


def test_a_model_that_knows_nothing_is_worth_eight_bits_and_its_mlps_nothing(
    tmp_path, convert, capsys
):
    write_checkpoint(tmp_path / "ckpt.pt", scale=0.0)  # all 257 tokens are equally likely
    text = b"aaab" * 500
    write_data(tmp_path, {"train": b"ab" * 1000, "val": text})
    convert.main(["--checkpoint", str(tmp_path / "ckpt.pt"), "--data", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    # windows of 16 that overlap by one: 133 * 15 tokens are predicted of 2001, the first is not
    assert lines[0].startswith("on 1,995 held-out tokens of 1,995 bytes")
    figures = {line.rsplit("  ", 1)[0][:18].strip(): line for line in lines[1:]}
    assert f"{math.log2(257):.3f}" in figures["model"]
    assert f"{math.log(257):.3f} nats" in figures["model"]
    gzip_bits = 8 * len(gzip.compress(text[1:1996], 9)) / 1995
    assert f"{gzip_bits:.3f}" in figures["gzip -9"]
    # 997 a and 998 b in training and one more of each of 256 bytes; here 1 496 a and 499 b
    bits = -(1496 * math.log2(998 / 2251) + 499 * math.log2(999 / 2251)) / 1995
    assert f"{bits:.3f}" in figures["byte unigrams"]
    assert [line.split() for line in lines[-2:]] == [
        ["0", "0.000", "0.000"],
        ["1", "0.000", "0.000"],
    ]


def test_what_an_mlp_is_worth_is_the_loss_without_its_activations(tmp_path, convert, capsys):
    write_checkpoint(tmp_path / "ckpt.pt", scale=1.0)
    text = bytes(range(32, 127)) * 20
    write_data(tmp_path, {"train": text, "val": text})
    convert.main(["--checkpoint", str(tmp_path / "ckpt.pt"), "--data", str(tmp_path)])
    zero = [float(line.split()[2]) for line in capsys.readouterr().out.splitlines()[-2:]]

    ids = torch.tensor(list(text))[: 126 * 15 + 1].unfold(0, 16, 15)
    model = load_nanogpt(tmp_path / "ckpt.pt")
    with torch.no_grad():
        clean = model(ids, labels=ids).loss
        for layer in (0, 1):
            without = load_nanogpt(tmp_path / "ckpt.pt")
            without.transformer.h[layer].mlp.c_proj.weight.zero_()  # biases are 0: nothing is left
            lost = float(without(ids, labels=ids).loss - clean)
            assert zero[layer] == pytest.approx(lost, abs=1e-3)


def test_convert_refuses_what_is_no_checkpoint_or_no_data(tmp_path, convert):
    (tmp_path / "ckpt.pt").write_text("no checkpoint")
    for argv, reason in (
        (["--checkpoint", str(tmp_path / "no.pt"), "--output-dir", str(tmp_path)], "no such file"),
        (["--checkpoint", str(tmp_path / "ckpt.pt"), "--output-dir", str(tmp_path)], "nanoGPT"),
        (["--data", str(tmp_path)], "has no manifest.json: give a folder of prepare.py"),
    ):
        with pytest.raises(UserError, match=reason):
            convert.main(argv)
