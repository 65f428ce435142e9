"""train_supertiny.py: from text to a folder that loads, with a stand-in for nanoGPT's train.py."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_supertiny
from builders.lm import texts
from builders.models import nanogpt_state, save_checkpoint, write_jsonl
from builders.scripts import ROOT, Done, assert_done, clean_environment, run_script

from sparse_coding.config import UserError

SCRIPT = ROOT / "nanogpt_config" / "train_supertiny.py"
VOCAB = 300
ON_CPU = ["--", "--device=cpu", "--compile=False", "--batch_size=2", "--block_size=32",
          "--gradient_accumulation_steps=1", "--eval_iters=2"]  # fmt: skip
# prints as nanoGPT does, and is killed once after its first checkpoint
TRAIN_PY = """
import pathlib, shutil, sys
options = dict(a.removeprefix("--").split("=", 1) for a in sys.argv[1:] if a.startswith("--"))
out = pathlib.Path(options["out_dir"])
out.mkdir(parents=True, exist_ok=True)
with open(pathlib.Path(__file__).parent / "calls", "a") as calls:
    print(*sys.argv[1:], file=calls)
for i in range(int(options["max_iters"]) + 1):
    print(f"iter {i}: loss 5.0000, time {900 if i < 3 else 50}.00ms, mfu -100.00%")
if out.name == "run":
    shutil.copy(pathlib.Path(__file__).parent / "ckpt.pt", out)
    if not (out / "once").exists():
        (out / "once").touch()
        sys.exit("killed after an evaluation")
"""


@pytest.fixture
def nanogpt(tmp_path) -> Path:
    """A folder that takes the place of a checkout."""
    folder = tmp_path / "nanoGPT"
    folder.mkdir()
    (folder / "train.py").write_text(TRAIN_PY)
    args = dict(n_layer=6, n_head=8, n_embd=16, block_size=32, bias=False, dropout=0.0)
    args["vocab_size"] = VOCAB
    save_checkpoint(folder / "ckpt.pt", args, nanogpt_state(args, scale=0.2))
    return folder


def command(tmp_path: Path, *flags: str, options: list[str] = ON_CPU) -> list[str]:
    """Arguments of a run on a small text; those of `flags` win."""
    text = tmp_path / "text.jsonl"
    if not text.exists():
        write_jsonl(text, texts(400))
    constants = ["--text", text, "--tokenizer", "bpe", "--vocab-size", VOCAB, "--eval-tokens",
                 1000, "--work-dir", tmp_path / "work"]  # fmt: skip
    return [*map(str, constants), *flags, *options]


def run(tmp_path: Path, *flags: str, **settings: str) -> Done:
    """As a user does."""
    environment = {"NANOGPT": str(tmp_path / "nanoGPT")} | settings
    argv = command(tmp_path, *flags)
    return run_script([SCRIPT, *argv], cwd=tmp_path, more_environment=environment)


@pytest.mark.long
def test_text_becomes_a_folder_that_loads_with_its_card_and_a_killed_run_goes_on(tmp_path, nanogpt):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    killed = run(tmp_path, "--minutes", "60", "--tokens", "6400")
    assert killed.code == 2
    assert "killed after an evaluation" in killed.err
    assert killed.err_lines[-1].startswith("train_supertiny.py: error: train.sh ended with 1")
    folder = tmp_path / "work/hf"
    assert not folder.exists()
    done = run(tmp_path, "--minutes", "60", "--tokens", "6400")
    assert_done(done)
    calls = (nanogpt / "calls").read_text().splitlines()
    of_run = "--max_iters=100 --lr_decay_iters=100 --eval_interval=10 --warmup_iters=2"  # 64 a step
    assert "--max_iters=20" in calls[0]
    assert of_run in calls[1]
    assert calls[2] == calls[1] + " --init_from=resume"

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float16
    assert (model.config.n_layer, model.config.n_embd, model.config.n_head) == (6, 16, 8)
    assert AutoTokenizer.from_pretrained(folder).decode([0]) == "<|endoftext|>"
    card = (folder / "README.md").read_text()
    model_loss, unigram = map(float, re.findall(r"\| \**(\d\.\d{3})\**", card))
    assert f"{model_loss:.3f} nats a token, token frequencies {unigram:.3f}" in done.out
    assert 2 < unigram < model_loss  # a model of random weights knows less than frequencies
    assert "the model saw 6,400, " in card
    assert "| text.jsonl | as given | its own | 400 | " in card
    assert "python nanogpt_config/train_supertiny.py --text" in card
    assert "done before: " in run(tmp_path, "--minutes", "60", "--tokens", "6400").out
    assert len((nanogpt / "calls").read_text().splitlines()) == 3


@pytest.mark.long
def test_run_py_takes_the_folder(tmp_path, nanogpt):
    run(tmp_path, "--steps", "10")
    assert_done(run(tmp_path, "--steps", "10"))
    few = ["--n-tokens", "1000", "--batch-size", "64", "--n-eval-tokens", "300", "--held-out",
           "0.2", "--n-page-tokens", "300", "--expansion-exp-high", "1", "--device", "cpu",
           "--wandb-mode", "disabled", "--arch", "topk", "--target-l0", "8"]  # fmt: skip
    model = ["--model", tmp_path / "work/hf", "--dataset", tmp_path / "text.jsonl"]
    out = ["--output-dir", "run"]
    done = run_script([ROOT / "run.py", *model, *few, *out], cwd=tmp_path)
    assert done.code == 0, done.err
    saved = json.loads(next((tmp_path / "run/saes").glob("*/cfg.json")).read_text())
    assert saved["d_in"] == 64  # the MLPs'
    assert (tmp_path / "run/features.html").is_file()


@pytest.mark.skipif("NANOGPT" not in os.environ, reason="NANOGPT names no checkout of nanoGPT")
def test_with_the_real_nanogpt_the_loss_falls(tmp_path):
    """NANOGPT=folder, a checkout of karpathy/nanoGPT."""
    done = run(tmp_path, "--steps", "50", NANOGPT=os.environ["NANOGPT"])
    assert done.code == 0, done.err
    card = (tmp_path / "work/hf/README.md").read_text()
    model_loss, _ = map(float, re.findall(r"\| \**(\d\.\d{3})\**", card))
    start = float(re.search(r"step 0: train loss \S+ val loss (\S+)", done.out)[1])
    assert model_loss < start - 0.5


@pytest.mark.parametrize(
    ("flags", "options", "words"),
    [
        (["--steps", "15"], ON_CPU, ["--steps 15 must be a multiple of 10"]),
        (["--minutes", "0"], ON_CPU, ["--minutes 0.0 must be above 0"]),
        (["--tokens", "all"], ON_CPU, ["--tokens all", "500M"]),
        (["--text", "nowhere"], ON_CPU, ["--text nowhere: no such file"]),
        (["--steps", "10"], [*ON_CPU, "--max_iters=3"], ["--max_iters after --", "--steps"]),
        (["--steps", "10"], [*ON_CPU, "--n_head=3"], ["n_head=3 must divide n_embd=16"]),
        (["--tokenizer", "gpt2"], ON_CPU, ["--tokenizer gpt2 is out of reach", "--tokenizer bpe"]),
        (["--steps", "10"], [], ["CUDA GPUs are asked for", "--device=cpu"]),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(
    tmp_path, nanogpt, monkeypatch, flags, options, words
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(UserError) as refused:
        train_supertiny.main(command(tmp_path, *flags, options=options))
    assert [word for word in words if word not in str(refused.value)] == []
    assert not (tmp_path / "work").exists()


def test_what_fails_later_is_refused_too(tmp_path, nanogpt, monkeypatch):
    monkeypatch.setenv("NANOGPT", str(nanogpt))
    with pytest.raises(UserError, match=r"--minutes 0\.5, of which .* 0\.05 s, so 0 fit"):
        train_supertiny.main(command(tmp_path, "--minutes", "0.5"))
    (nanogpt / "train.py").write_text("raise ValueError('Unknown config key: x')")
    with pytest.raises(UserError, match=r"train\.py fails: ValueError: Unknown config key: x$"):
        train_supertiny.main(command(tmp_path))
    shutil.rmtree(nanogpt)
    with pytest.raises(UserError, match=r"^NANOGPT=.* holds no train\.py: give a checkout"):
        train_supertiny.main(command(tmp_path))


def test_the_steps_are_those_of_the_tokens_or_of_the_time_whichever_are_fewer(capsys):
    values = dict(gradient_accumulation_steps=8, batch_size=64, block_size=256, eval_iters=50)
    cfg = train_supertiny.Config()
    began = train_supertiny.time.monotonic()
    quick = train_supertiny.steps_that_fit(cfg, 0.1, 30.0, values=values, began=began)
    assert quick == 3810  # 500M tokens are 3814 steps of 131 072
    slow = train_supertiny.steps_that_fit(cfg, 1.0, 30.0, values=values, began=began)
    # 720 s less 30 before the first step, 90 afterwards, 1 100 forward passes of a 24th of a step
    assert slow == 550
    with pytest.raises(UserError, match=r"a step takes 100\.00 s, so 6 fit, of 3814"):
        train_supertiny.steps_that_fit(
            train_supertiny.Config(minutes=90), 100.0, 30.0, values=values, began=began
        )


def test_the_weights_of_the_published_shape_have_less_than_two_megabytes():
    values = train_supertiny.check.NANOGPT | train_supertiny.check.read_overrides(
        train_supertiny.check.find("supertiny")
    )
    width, n_vocab = values["n_embd"], train_supertiny.check.PADDED_GPT2
    n_weights = (n_vocab + values["block_size"] + 12 * values["n_layer"] * width) * width
    assert 1.6e6 < 2 * n_weights < 2e6


def test_get_nanogpt_prints_a_folder_or_says_in_a_line_that_there_is_none(tmp_path, nanogpt):
    script = ["bash", ROOT / "nanogpt_config/get_nanogpt.sh"]
    options = dict(capture_output=True, text=True, stdin=subprocess.DEVNULL)
    environment = clean_environment(tmp_path) | {"NANOGPT": str(nanogpt)}
    assert subprocess.run(script, env=environment, **options).stdout == f"{nanogpt}\n"
    environment["NANOGPT"] = sys.prefix
    none = subprocess.run(script, env=environment, **options)
    assert (none.returncode, none.stdout) == (2, "")
    assert none.stderr.startswith("get_nanogpt.sh: error: NANOGPT=")
