"""The model of the package becomes a folder like any other, once; what is missing is said."""

from types import SimpleNamespace

import pytest
import torch
from builders.models import byte_level_bpe, random_model, save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_coding.config import UserError
from sparse_coding.lm.model import load_language_model, logits
from sparse_coding.lm.packaged import smollm2
from sparse_coding.lm.packaged.smollm2 import FOLDER, SEPARATOR, smollm2_folder
from sparse_coding.lm.tokenizer import load_tokenizer

IDS = torch.arange(6).reshape(1, 6)


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A small Llama as if it were the package's: the libraries' own reader is not tested here."""
    bpe = byte_level_bpe(special=[SEPARATOR, "<|im_end|>"])
    tokens = {"bos_token": "<|im_end|>", "eos_token": "<|im_end|>"}
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path / "tok", bpe, **tokens))
    model = random_model("llama", vocab_size=400, tie_word_embeddings=True)
    model.config.quantization_config = {"quant_method": "gguf"}
    asked = []

    def read(package, *, gguf_file, **_):
        asked.append((package / gguf_file).name)
        return tokenizer if len(asked) % 2 == 0 else model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", read)
    monkeypatch.setattr(smollm2, "NEEDED", ())
    monkeypatch.setattr(smollm2, "PACKAGE", "json")  # any that is there
    monkeypatch.chdir(tmp_path)
    return SimpleNamespace(model=model, asked=asked)


def test_it_is_converted_once_to_a_folder_that_gives_the_same_logits(packaged, monkeypatch, capsys):
    assert smollm2_folder() == FOLDER
    assert packaged.asked == [smollm2.FILE] * 2
    assert "converting" in capsys.readouterr().out
    assert smollm2_folder() == FOLDER
    assert len(packaged.asked) == 2
    assert capsys.readouterr().out == ""
    assert [p.name for p in FOLDER.parent.iterdir() if p.name[0] != "."] == [FOLDER.name]

    folder = str(FOLDER.absolute())
    monkeypatch.undo()  # the libraries as they are
    lm = load_language_model(folder, device=torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(logits(lm, IDS), packaged.model(IDS).logits)
    assert "quantization_config" not in lm.model.config.to_dict()
    assert load_tokenizer(folder, vocab_size=400).separator == 0  # <|endoftext|>


def test_what_a_killed_conversion_left_does_not_count(packaged):
    half_made = FOLDER.with_suffix(".part")
    half_made.mkdir(parents=True)
    (half_made / "config.json").write_text("{")
    (half_made / "stray").write_text("x")
    smollm2_folder()
    assert not half_made.exists()
    assert not (FOLDER / "stray").exists()


def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(smollm2, "NEEDED", ("json", "no_such_package", "nor_this"))
    monkeypatch.chdir(tmp_path)
    command = r"run `pip install --no-deps -r requirements-real\.txt`$"
    with pytest.raises(UserError, match=f"needs no_such_package, nor_this beside .*{command}"):
        smollm2_folder()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_whole_is_said(packaged, monkeypatch):
    def torn(*_, **__):
        raise ValueError("cannot reshape array\nof size 3")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", torn)
    with pytest.raises(UserError, match=r"\.gguf can't be read \(cannot .*array\).*--force-reinst"):
        smollm2_folder()
    assert not FOLDER.exists()
