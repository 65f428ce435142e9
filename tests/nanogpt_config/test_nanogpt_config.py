"""The override files have nanoGPT's keys and types; a checkpoint becomes a folder that loads."""

import gzip
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from builders.models import small_gpt2
from builders.scripts import ROOT, clean_environment

from sparse_coding.config import UserError
from sparse_coding.lm.nanogpt import load_nanogpt
from sparse_coding.lm.tokenizer import load_tokenizer


def script(name: str):
    """A script of nanogpt_config/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"nanogpt_config/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def check():
    return script("check")


OVERRIDES = ("demo_cpu", "supertiny", "supertiny_2023")


@pytest.mark.parametrize("name", OVERRIDES)
def test_an_override_file_has_keys_and_types_of_nanogpt(check, name):
    values = check.read_overrides(check.find(name))  # refuses other keys and types
    assert len(values) >= 15
    assert values["n_embd"] % values["n_head"] == 0
    assert values["lr_decay_iters"] == values["max_iters"]
    assert values["max_iters"] % values["eval_interval"] == 0  # else the last steps are not saved


@pytest.mark.skipif("NANOGPT" not in os.environ, reason="NANOGPT names no checkout of nanoGPT")
def test_the_list_of_keys_is_that_of_the_real_nanogpt(check):
    """NANOGPT=folder, a checkout of karpathy/nanoGPT."""
    source = (Path(os.environ["NANOGPT"]) / "train.py").read_text()
    start, end = source.index("out_dir ="), source.index("config_keys =")
    values = {"torch": torch}
    exec(source[start:end], values)
    found = {k: v for k, v in values.items() if isinstance(v, (int, float, bool, str))}
    found["dtype"] = "bfloat16"  # it hangs on the machine
    assert found == check.NANOGPT


@pytest.mark.parametrize("name", ["supertiny", "supertiny_2023"])
def test_the_very_small_transformer_is_the_published_one(check, name):
    values = check.read_overrides(check.find(name))
    shape = {k: values[k] for k in ("n_layer", "n_embd", "n_head", "block_size", "batch_size")}
    assert shape == dict(n_layer=6, n_embd=16, n_head=8, block_size=256, batch_size=64)
    assert values["wandb_project"] == "sparsecode"
    assert values["wandb_run_name"].startswith("supertiny-")
    assert values["dropout"] == (0.2 if name == "supertiny_2023" else 0.0)
    for gpus in (1, 2, 4, 8):  # nanoGPT asserts it, and divides: the tokens of a step stay
        assert values["gradient_accumulation_steps"] % gpus == 0


def test_the_small_transformer_has_the_sizes_that_its_comments_count_with(check):
    values = check.NANOGPT | check.read_overrides(check.find("supertiny"))
    about = {"constants": {"tokenizer": "gpt2"}, "vocab_size": 50_257}
    about |= {split: {"tokens": 500_000_000} for split in ("train", "val")}
    lines = check.summary(values, about)
    assert "vocabulary 50,304: 827,600 weights, 18,640 of them in the layers" in lines
    assert "8,000 steps of 131,072 tokens = 1,049M tokens, 2.1 times the text" in lines
    assert "logits take 9.9 GB" in lines
    check.check(values, about, gpus=8)


def test_the_demo_model_has_the_settings_that_its_comments_count_with(check):
    demo = check.NANOGPT | check.read_overrides(check.find("demo_cpu"))
    about = {"constants": {"tokenizer": "bpe"}, "vocab_size": 1024}
    about |= {split: {"tokens": 4_385_132} for split in ("train", "val")}
    lines = check.summary(demo, about)
    assert "172,352 weights" in lines
    assert "9,000 steps of 1,536 tokens = 14M tokens, 3.2 times the text" in lines
    config = json.loads((ROOT / "assets" / "demo" / "config.json").read_text())
    for theirs, ours in (("n_positions", "block_size"), ("n_layer",) * 2, ("n_embd",) * 2):
        assert config[theirs] == demo[ours]


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ("--overrides tiny", "no overrides tiny: choose demo_cpu, supertiny, supertiny_2023"),
        ("--gpus 3", "3 GPUs must divide gradient_accumulation_steps=8"),
        ("--gpus 2 -- --device=cpu", "torchrun on CUDA only"),
        ("-- --dropout=0", "dropout must be float, 0 is int: write 0.0"),
        ("-- --drop_out=0.1", "nanoGPT has no drop_out; it has out_dir"),
        ("-- --compile=0", "compile must be bool, 0 is int"),
        ("-- --out_dir=a=b", "an option of train.py is --name=value, with no other ="),
        ("-- --n_head=3", "n_head=3 must divide n_embd=16"),
        ("-- --n_head=0", "n_head=0 must be at least 1"),
        ("-- --max_iters=250", "max_iters=250 must be a multiple of eval_interval=500"),
        ("--overrides {tmp}/bad.py", "bad.py: nanoGPT has no n_heads; it has"),
        ("--overrides {tmp}/torn.py", "torn.py fails: SyntaxError"),
        ("-- --device=cuda --dataset=none", "1 CUDA GPUs are asked for, torch sees 0: on a CPU"),
        ("-- --dataset={tmp}", r"val\.bin has 100 tokens, a block 256: give more text, or"),
    ],
)
def test_settings_with_which_nanogpt_would_stop_are_refused(
    check, tmp_path, monkeypatch, argv, reason
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (tmp_path / "bad.py").write_text("n_heads = 8\n")
    (tmp_path / "torn.py").write_text("n_head = \n")
    about = {"end_of_text": 0, "train": {"tokens": 1000}, "val": {"tokens": 100}}
    (tmp_path / "manifest.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=reason):
        check.main(argv.format(tmp=tmp_path).split())


@pytest.fixture(scope="module")
def convert():
    return script("convert")


def write_checkpoint(path: Path, *, scale: float, vocab_size: int = 257, context=16) -> None:
    """As nanoGPT's train.py saves it, with random weights of this size."""
    args = dict(n_layer=2, n_head=2, n_embd=8, block_size=context, bias=False)
    args["vocab_size"] = vocab_size
    rng, d = torch.Generator().manual_seed(0), args["n_embd"]

    def randn(*shape: int) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=rng)

    wte = randn(vocab_size, d)
    model = {"transformer.wte.weight": wte, "lm_head.weight": wte}
    model |= {"transformer.wpe.weight": randn(context, d), "transformer.ln_f.weight": torch.ones(d)}
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


@pytest.mark.parametrize("kind", ["gpt2", "bytes", "bpe"])
def test_the_converted_folder_has_the_tokenizer_of_the_bins(tmp_path, convert, monkeypatch, kind):
    monkeypatch.setattr(tiktoken, "get_encoding", small_gpt2)
    texts = [f"{i} the thing <|endoftext|> ß €\n" for i in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    data, folder = tmp_path / "data", tmp_path / "model"
    argv = ["--source", str(tmp_path / "a.jsonl"), "--tokenizer", kind, "--vocab-size", "260"]
    assert script("prepare").main([*argv, "--output-dir", str(data)]) == 0
    about = json.loads((data / "manifest.json").read_text())
    write_checkpoint(tmp_path / "ckpt.pt", scale=0.5, vocab_size=50304 if kind == "gpt2" else 260)
    argv = ["--checkpoint", str(tmp_path / "ckpt.pt"), "--data", str(data), "--eval-tokens", "1000"]
    assert convert.main([*argv, "--output-dir", str(folder)]) == 0

    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(folder)
    assert (own.eos_token_id, own.eos_token) == (about["end_of_text"], "<|endoftext|>")
    assert own.decode(own("the ß €")["input_ids"]) == "the ß €"
    tokenizer = load_tokenizer(str(folder), vocab_size=50304 if kind == "gpt2" else 260)
    assert tokenizer.fingerprint == about["tokenizer"]["fingerprint"]


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


TRAIN_PY = """
import pathlib, shutil, sys
out = next(pathlib.Path(a.removeprefix("--out_dir=")) for a in sys.argv if "--out_dir=" in a)
out.mkdir(parents=True, exist_ok=True)
with open(out / "calls", "a") as calls:
    print(*sys.argv[1:], file=calls)
shutil.copy("ckpt.pt", out)
if not (out / "once").exists():
    (out / "once").touch()
    sys.exit("killed after an evaluation")
"""


def test_train_sh_prepares_trains_resumes_and_leaves_a_checkpoint_that_opens(tmp_path):
    """With a train.py that only notes how it is called: nanoGPT is not part of the project."""
    shutil.copytree(ROOT / "nanogpt_config", tmp_path / "ours" / "nanogpt_config")
    (tmp_path / "ours" / "sparse_coding").symlink_to(ROOT / "sparse_coding")
    nanogpt = tmp_path / "nanoGPT"
    nanogpt.mkdir()
    (nanogpt / "train.py").write_text(TRAIN_PY)
    write_checkpoint(nanogpt / "ckpt.pt", scale=0.1, vocab_size=1024, context=128)
    command = ["bash", "ours/nanogpt_config/train.sh", "demo_cpu", "--eval_iters=7"]
    settings = {"PY": sys.executable, "NANOGPT": "nanoGPT"}

    def run() -> subprocess.CompletedProcess:
        environment = clean_environment(tmp_path) | settings
        options = dict(cwd=tmp_path, env=environment, capture_output=True, text=True)
        return subprocess.run(command, **options)

    killed = run()
    assert killed.returncode == 1
    assert "killed after an evaluation" in killed.stderr
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    assert "done before: " in done.stdout  # the text, by prepare.py
    assert "model: 2 layers, width 64, 2 heads, context 128, vocabulary 1,024" in done.stdout
    assert "what each layer's MLP is worth" in done.stdout
    out = tmp_path / "ours" / "models" / "demo_cpu"
    data = tmp_path / "ours" / "data" / "stdlib-bpe"
    first, second = (out / "run" / "calls").read_text().splitlines()
    overrides = tmp_path / "ours" / "nanogpt_config" / "demo_cpu.py"
    assert first == f"{overrides} --dataset={data} --out_dir={out}/run --eval_iters=7"
    assert second == first + " --init_from=resume"
    tokenizer = load_tokenizer(str(out / "ckpt.pt"), vocab_size=1024)  # with no other file
    manifest = json.loads((data / "manifest.json").read_text())
    assert tokenizer.fingerprint == manifest["tokenizer"]["fingerprint"]
    again = run()
    assert again.stdout.startswith("done before: models/demo_cpu/ckpt.pt")
    assert len((out / "run" / "calls").read_text().splitlines()) == 2
