"""Text becomes ids and back with each kind of tokenizer; hostile text and files change nothing."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import tiktoken
from builders.models import Bomb, byte_level_bpe, save_tokenizer, small_gpt2

from sparse_coding.config import UserError
from sparse_coding.lm.nanogpt import read_meta_pickle
from sparse_coding.lm.tokenizer import PROBE, Tokenizer, load_tokenizer

TEXT = "def f(x):\n\treturn naïve — <|endoftext|>  你好\x00\u00ad\u2028"


@pytest.fixture
def gpt2_like(tmp_path) -> str:
    return save_tokenizer(tmp_path / "tok", byte_level_bpe(special=["<|endoftext|>"]))


def joined(tokenizer: Tokenizer, text: str) -> str:
    """The text from the pieces of its ids."""
    (ids,) = tokenizer.encode_batch([text])
    return b"".join(tokenizer.pieces[i] for i in ids).decode()


def beside_checkpoint(folder: Path, name: str = "", content: bytes = b"") -> str:
    (folder / "ckpt.pt").write_bytes(b"not read here")
    if name:
        (folder / name).write_bytes(content)
    return str(folder / "ckpt.pt")


def test_a_model_folder_brings_its_own_tokenizer(gpt2_like):
    tokenizer = load_tokenizer(gpt2_like, vocab_size=320)
    assert tokenizer.name == f"hf:{Path(gpt2_like).name}"
    assert (tokenizer.vocab_size, tokenizer.separator) == (320, 0)
    assert tokenizer.special_ids == {0}
    assert joined(tokenizer, TEXT) == TEXT
    assert tokenizer.encode_batch(["the cat", ""])[1] == []


def test_its_ids_are_those_that_transformers_gives(gpt2_like):
    from transformers import AutoTokenizer

    texts = ["the cat\n\n  on the mat", "x" * 5000, " naïve — 你好"]
    theirs = AutoTokenizer.from_pretrained(gpt2_like)(texts, add_special_tokens=False)["input_ids"]
    assert load_tokenizer(gpt2_like, vocab_size=300).encode_batch(texts) == theirs


def test_text_can_not_forge_the_end_of_a_document(gpt2_like, tmp_path):
    ours = load_tokenizer(gpt2_like, vocab_size=300)
    (ids,) = ours.encode_batch(["a<|endoftext|>b"])
    assert ours.separator not in ids
    for kind in (257, 50304):
        tokenizer = load_tokenizer(beside_checkpoint(tmp_path), choice="bytes", vocab_size=kind)
        assert tokenizer.separator not in tokenizer.encode_batch(["<|endoftext|>"])[0]


def test_gpt2s_own_class_loads_from_vocabulary_and_merges(tmp_path):
    from transformers import GPT2TokenizerFast

    model = json.loads(byte_level_bpe(special=["<|endoftext|>"]).to_str())["model"]
    (tmp_path / "encoder.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "vocab.bpe").write_text("\n".join(["#version", *map(" ".join, model["merges"])]))
    files = dict(vocab=str(tmp_path / "encoder.json"), merges=str(tmp_path / "vocab.bpe"))
    GPT2TokenizerFast(**files).save_pretrained(tmp_path / "tok")
    tokenizer = load_tokenizer(str(tmp_path / "tok"), vocab_size=300)
    assert (joined(tokenizer, TEXT), tokenizer.separator) == (TEXT, 0)
    with pytest.raises(UserError, match=r"is no character: give a tokenizer\.json"):
        load_tokenizer("x", choice=files["vocab"], vocab_size=300)


def test_the_separator_is_bos_where_the_tokenizer_begins_texts_with_it_else_eos(tmp_path):
    from tokenizers.processors import TemplateProcessing

    bpe = byte_level_bpe(special=["<s>", "</s>", "<pad>"])
    tokens = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    plain = load_tokenizer(save_tokenizer(tmp_path / "plain", bpe, **tokens), vocab_size=300)
    bpe.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    with_bos = load_tokenizer(save_tokenizer(tmp_path / "bos", bpe, **tokens), vocab_size=300)
    assert (plain.separator, with_bos.separator) == (1, 0)
    assert with_bos.special_ids == plain.special_ids == {0, 1, 2}
    assert with_bos.encode_batch(["the"]) == plain.encode_batch(["the"])  # no <s> in it


def test_tokens_are_shown_as_text_with_spaces_and_broken_utf8(gpt2_like):
    tokenizer = load_tokenizer(gpt2_like, vocab_size=302)
    texts = tokenizer.token_texts()
    assert len(texts) == 302
    assert texts[0] == "<|endoftext|>"
    assert " the" in texts
    assert texts[301] == "[301]"
    (ids,) = tokenizer.encode_batch(["ï"])  # two bytes, of which each alone is no character
    assert [texts[i] for i in ids] == ["\\xc3", "\\xaf"]


def test_sentencepiece_marks_are_shown_as_spaces_and_bytes(tmp_path):
    from tokenizers import Tokenizer, decoders, models

    vocab = {"<unk>": 0, "<0x0A>": 1, "\u2581": 2, "\u2581a": 3, "a": 4}
    bpe = Tokenizer(models.BPE(vocab, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True))
    bpe.decoder = decoders.Metaspace()
    bpe.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer("x", choice=str(tmp_path / "tokenizer.json"), vocab_size=5)
    assert tokenizer.token_texts() == ["<unk>", "\n", " ", " a", "a"]
    assert (tokenizer.name, tokenizer.separator) == ("vocab:tokenizer.json", None)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(gpt2_like):
    n_ids = byte_level_bpe(special=["<|endoftext|>"]).get_vocab_size()
    assert load_tokenizer(gpt2_like, vocab_size=n_ids).vocab_size == n_ids
    with pytest.raises(UserError, match=f"has {n_ids} ids, the model {n_ids - 1}"):
        load_tokenizer(gpt2_like, vocab_size=n_ids - 1)


def test_special_ids_beyond_the_models_do_no_harm(tmp_path):
    bpe = byte_level_bpe(special=["<|endoftext|>"])
    n_ids = bpe.get_vocab_size()
    bpe.add_special_tokens(["<image>"])
    folder = save_tokenizer(tmp_path / "tok", bpe)
    assert load_tokenizer(folder, vocab_size=n_ids).special_ids == {0}
    assert load_tokenizer(folder, vocab_size=n_ids + 1).special_ids == {0, n_ids}


def test_a_checkpoint_takes_the_tokenizer_beside_it(tmp_path, gpt2_like):
    chars = {"a": 0, "b": 1}
    files = {
        "meta.pkl": pickle.dumps({"vocab_size": 2, "stoi": chars, "itos": {0: "a", 1: "b"}}),
        "meta.json": json.dumps({"stoi": chars}).encode(),
        "tokenizer.json": (Path(gpt2_like) / "tokenizer.json").read_bytes(),
    }
    for name, content in files.items():  # each next one goes before those that are there
        model = beside_checkpoint(tmp_path, name, content)
        tokenizer = load_tokenizer(model, vocab_size=300)
        assert tokenizer.name == f"vocab:{name}"
        assert joined(tokenizer, "abba") == "abba"
    assert tokenizer.separator == 0


def test_without_one_the_vocabulary_size_decides(tmp_path, monkeypatch):
    model = beside_checkpoint(tmp_path)
    monkeypatch.setattr(tiktoken, "get_encoding", small_gpt2)
    assert load_tokenizer(model, vocab_size=50304).name == "tiktoken:gpt2"
    assert load_tokenizer(model, vocab_size=257).separator == 256
    plain = load_tokenizer(model, vocab_size=256)
    assert (plain.name, plain.separator, plain.special_ids) == ("bytes", None, frozenset())
    assert plain.encode_batch(["é"]) == [[0xC3, 0xA9]]
    with pytest.raises(
        UserError, match=r"with 65 ids: put its tokenizer\.json.*--tokenizer.* ids$"
    ):
        load_tokenizer(model, vocab_size=65)


def test_ids_whose_tokenizer_is_not_known_are_shown_as_numbers(tmp_path):
    model = beside_checkpoint(tmp_path)
    tokenizer = load_tokenizer(model, choice="ids", vocab_size=65, dataset="data/val.bin")
    assert tokenizer.token_texts() == [f"{i} " for i in range(65)]
    assert (tokenizer.name, tokenizer.separator, tokenizer.special_ids) == ("ids", None, set())
    other = load_tokenizer(model, choice="ids", vocab_size=66, dataset="data/val.bin")
    assert other.fingerprint != tokenizer.fingerprint
    with pytest.raises(UserError, match=r"^--tokenizer ids is for a \.bin .* --dataset a\.txt"):
        load_tokenizer(model, choice="ids", vocab_size=65, dataset="a.txt")


def test_hub_ids_are_not_taken_for_the_names_of_choices(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", no_hub)
    with pytest.raises(UserError, match=r"gpt2 is no local folder .*`hf download gpt2`"):
        load_tokenizer("gpt2", vocab_size=50257)


def no_hub(where: str, **options) -> None:
    raise OSError("We couldn't connect to the hub\nand more")


def test_tiktoken_reads_special_tokens_as_text(monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", small_gpt2)
    tokenizer = load_tokenizer("ckpt.pt", choice="gpt2", vocab_size=50304)
    assert tokenizer.encode_batch(["the", "<|endoftext|>"])[0] == [256, ord("e")]
    assert joined(tokenizer, TEXT) == TEXT
    assert (tokenizer.separator, tokenizer.special_ids) == (257, {257})
    assert len(tokenizer.token_texts()) == 50304


def test_tiktoken_out_of_reach_says_how_to_fetch_it(monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", no_hub)
    with pytest.raises(UserError, match=r"TIKTOKEN_CACHE_DIR=D python -c"):
        load_tokenizer("ckpt.pt", choice="gpt2", vocab_size=50304)


def test_the_fingerprint_tells_tokenizers_apart_but_not_where_they_lie(tmp_path, gpt2_like):
    first = load_tokenizer(gpt2_like, vocab_size=300)
    again = load_tokenizer("x", choice=gpt2_like + "/tokenizer.json", vocab_size=304)
    assert first.fingerprint == again.fingerprint
    assert len(first.fingerprint) == 16
    bpe = byte_level_bpe(special=["<|endoftext|>"])
    from tokenizers import normalizers

    bpe.normalizer = normalizers.Lowercase()  # same vocabulary, other ids
    lower = load_tokenizer(save_tokenizer(tmp_path / "lower", bpe), vocab_size=300)
    assert PROBE.lower() != PROBE
    assert lower.fingerprint != first.fingerprint


def test_unknown_characters_are_an_error_or_the_unknown_entry(tmp_path):
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps({"a": 0, "b": 1, "<|endoftext|>": 2}))
    tokenizer = load_tokenizer("x", choice=str(path), vocab_size=3)
    assert (tokenizer.separator, tokenizer.special_ids) == (2, {2})
    with pytest.raises(UserError, match="character 'é' of the text is not among the 3 of"):
        tokenizer.encode_batch(["ab", "é"])
    path.write_text(json.dumps({"a": 0, "<unk>": 1}))
    assert load_tokenizer("x", choice=str(path), vocab_size=2).encode_batch(["aé"]) == [[0, 1]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("v.json", b'{"a": ', "is not JSON"),
        ("v.json", b"\xff\xfe", "is not JSON"),
        ("v.json", b"[" * 100_000, "is not JSON"),
        ("v.json", b"[1, 2]", "a list, not a JSON object"),
        ("v.json", b"{}", "is no vocabulary"),
        ("v.json", b'{"a": "0"}', "is no vocabulary"),
        ("v.json", b'{"a": 0, "b": 0}', "two characters share an id"),
        ("v.json", b'{"vocab_size": 65}', "is no character"),
        ("v.json", b'{"a": 0, "b": 9}', "has 10 ids, the model 4"),
        ("v.json", b'{"model": {}}', r"is no tokenizer\.json"),
        ("v.pkl", b"", "is no meta.pkl of nanoGPT"),
        ("v.pkl", b"garbage", "is no meta.pkl of nanoGPT"),
        ("v.pkl", pickle.dumps([1]), "it holds a list"),
    ],
)
def test_files_that_are_no_vocabulary_are_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer("x", choice=str(tmp_path / name), vocab_size=4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("files", [[], ["tokenizer.json"]], ids=["none", "torn"])
def test_a_model_folder_without_a_whole_tokenizer_is_refused(tmp_path, files):
    # without its files transformers 5 makes a GPT-2 tokenizer of one token
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    for name in files:
        (tmp_path / name).write_text('{"model": {}}')
    with pytest.raises(UserError, match=r"no tokenizer in|has no vocabulary"):
        load_tokenizer(str(tmp_path), vocab_size=50257)


TABLES = {"AAAA": "precompiled_charsmap is not whole", "/////w==": "charsmap is not whole",
          "????": "no tokenizer"}  # fmt: skip
HUGE = {"type": "BPE", "vocab": {"a": 2**31}, "merges": []}


@pytest.mark.parametrize("place", ["file", "folder"])
@pytest.mark.parametrize(("change", "message"), [
    ({"model": HUGE}, "its id 2147483648 is not below"),
    ({"model": HUGE | {"vocab": {"a": 10**400}}}, "its id 1000000000"),
    ({"added_tokens": [{"id": 2**31, "content": "x"}]}, "its id 2147483648 is not below"),
    *[({"normalizer": {"type": "Precompiled", "precompiled_charsmap": table}}, message)
      for table, message in TABLES.items()],
], ids=range(6))  # fmt: skip
def test_a_tokenizer_that_would_end_the_process_is_refused(
    tmp_path, gpt2_like, place, change, message
):
    shutil.copytree(gpt2_like, tmp_path / "odd")
    path = tmp_path / "odd/tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load_tokenizer(
            str(path.parent), choice=str(path) if place == "file" else "auto", vocab_size=300
        )


class Panic(BaseException):
    """As the Rust below the tokenizers library raises it."""

    __module__ = "pyo3_runtime"


@pytest.mark.parametrize("error", [Panic("index out of bounds\nat x"), Exception("no [UNK]")])
def test_what_the_library_raises_while_it_encodes_is_one_line(gpt2_like, monkeypatch, error):
    tokenizer = load_tokenizer(gpt2_like, vocab_size=300)
    (backend,) = [cell.cell_contents for cell in tokenizer.encode_batch.__closure__
                  if hasattr(cell.cell_contents, "encode_batch_fast")]  # fmt: skip

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(type(backend), "encode_batch_fast", fail, raising=False)
    with pytest.raises(UserError, match=r"can't encode this text \((index|no)[^\n]*give --tok"):
        tokenizer.encode_batch(["a"])


@pytest.mark.parametrize("token", [3, [], {"a": 1}], ids=repr)
def test_a_tokenizer_config_with_an_odd_bos_is_refused(tmp_path, gpt2_like, token):
    shutil.copytree(gpt2_like, tmp_path / "odd")
    path = tmp_path / "odd/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": token}))
    with pytest.raises(UserError, match="no tokenizer in"):
        load_tokenizer(str(path.parent), vocab_size=300)


def test_rows_can_begin_with_the_models_bos_or_else_with_its_separator(tmp_path, gpt2_like):
    assert load_tokenizer(gpt2_like, vocab_size=300).bos == 0
    bpe = byte_level_bpe(special=["<eos>", "<bos>"])
    folder = save_tokenizer(tmp_path / "both", bpe, eos_token="<eos>", bos_token="<bos>")
    both = load_tokenizer(folder, vocab_size=300)
    assert (both.separator, both.bos) == (0, 1)
    assert load_tokenizer("x", choice="bytes", vocab_size=256).bos is None


def test_a_choice_that_is_a_missing_file_is_not_sought_on_the_hub():
    for choice in ("./nothing", "vocab.json", "/nothing/here"):
        with pytest.raises(UserError, match=f"no tokenizer {choice}: choose gpt2, bytes"):
            load_tokenizer("x", choice=choice, vocab_size=9)


def test_a_pickle_bomb_never_runs(tmp_path):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        content = {"stoi": {"a": 0}, "itos": Bomb(tmp_path / "ran")}
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
        with pytest.raises(UserError, match=r"it asks for \w+\.mkdir.*save stoi as JSON"):
            read_meta_pickle(tmp_path / "meta.pkl")
    assert not (tmp_path / "ran").exists()


def test_a_pickle_that_wants_gigabytes_gets_none(tmp_path):
    # LONG_BINPUT with index 2³¹: the unpickler would make so many slots
    (tmp_path / "meta.pkl").write_bytes(b"\x80\x02}r\x00\x00\x00\x80.")
    with pytest.raises(UserError, match="memo index out of bounds"):
        read_meta_pickle(tmp_path / "meta.pkl")


def test_nanogpts_meta_comes_back_as_it_is(tmp_path):
    meta = {"vocab_size": 2, "itos": {0: "\n", 1: "é"}, "stoi": {"\n": 0, "é": 1}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    assert read_meta_pickle(tmp_path / "meta.pkl") == meta


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="GPT-2's files are not here")
def test_gpt2_by_tiktoken_gives_the_known_ids():
    tokenizer = load_tokenizer("ckpt.pt", choice="gpt2", vocab_size=50304)
    assert tokenizer.encode_batch(["Hello world"]) == [[15496, 995]]
    assert (tokenizer.separator, tokenizer.token_texts()[995]) == (50256, " world")
