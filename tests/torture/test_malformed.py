"""Malformed files by hand, reader by reader: each is refused in one line that names it, or read.

What is read in spite of the damage stands in READ, with the reason. The cases of other tests that
run the same code (tests/lm/test_documents.py, test_nanogpt.py, test_model.py, tests/test_files.py,
tests/sae/test_saelens.py, tests/rental/test_market.py, some 200) are not repeated here.
"""

import gzip
import io
import json
import pickle
import random
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import check
import convert
import pytest
import torch
from builders.confined import faults, read_all
from builders.models import ARGS, Bomb, nanogpt_state
from builders.mutations import dumped
from builders.readers import READERS, Bench
from builders.scripts import Done, assert_refused

import run
from sparse_coding.config import UserError, run_as_script

pytestmark = pytest.mark.long
Damage = Callable[[bytes], bytes] | bytes | dict

HTML = b"<!DOCTYPE html>\n<html><head><title>404</title></head><body>Not Found</body></html>\n"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 548105171\n" % (b"0" * 64)
DEEP, DIGITS, LONG = "@deep@", "@5000 digits@", "x" * 300_000
NAN, INF = float("nan"), float("inf")


def in_zip(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", content)
    return buffer.getvalue()


def in_tar(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("a")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


# what happens to files of every kind
ANY: dict[str, Damage] = {
    "empty": b"",
    "its first byte": lambda c: c[:1],
    "half": lambda c: c[: len(c) // 2],
    "without its last byte": lambda c: c[:-1],
    "zeros of its size": lambda c: bytes(len(c)),
    "a page that says 404": HTML,
    "a pointer of git-lfs": LFS,
    "gzipped": gzip.compress,
    "in a zip": in_zip,
    "in a tar": in_tar,
    "a PNG": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)) * 8,
    "a pickle that runs code": lambda c: pickle.dumps(Bomb(Path.cwd().parent / "exploded")),
    "twice": lambda c: c + c,
    "zeros behind it": lambda c: c + bytes(4096),
}
# what happens to JSON
OF_JSON: dict[str, Damage] = {
    "null": b"null", "a number": b"7", "a string": b'"x"', "a list": b"[1]", "true": b"true",
    "nothing but space": b" \n", "NaN": b"NaN", "an empty object": b"{}",
    "nested too deep": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "never closed": b'{"a":' * 100_000, "5 000 digits": b'{"a": ' + b"7" * 5000 + b"}",
    "a comma too many": lambda c: c.rstrip()[:-1] + b",}",
    "single quotes": lambda c: c.replace(b'"', b"'"),
    "with a comment": lambda c: b"// ours\n" + c,
    "two objects": lambda c: c + b"\n{}",
    "latin-1": lambda c: c.replace(b"{", '{"ß": 1, '.encode("latin-1"), 1),
    "a backslash": lambda c: c.replace(b'"', b'"\\x', 1),
    "a raw line break": lambda c: c.replace(b'"', b'"\n', 1),
}  # fmt: skip
OBJECTS = ("record", "json", "manifest of a bin", "progress of a bin", "corpus.json",
           "manifest of chunks", "config of gpt2", "tokenizer.json", "vocabulary", "cfg.json",
           "config of a run", "plan", "shard")  # fmt: skip


def changes(*given: dict) -> dict[str, Damage]:
    """Fields of a JSON object that are others."""
    return {str(change)[:70]: change for change in given}


def values(name: str, *given: object) -> dict[str, Damage]:
    return changes(*({name: value} for value in given))


def of_header(header: object, data: bytes = bytes(36)) -> bytes:
    text = header if isinstance(header, bytes) else dumped(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(dtype: object, shape: object, offsets: object) -> dict:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


SAFETENSORS: dict[str, Damage] = {
    "a header of 2^63 bytes": (2**63).to_bytes(8, "little") + b"{}",
    "a header of 2^64 - 1 bytes": bytes([255]) * 8 + b"{}",
    "a header of 100 MB": (10**8).to_bytes(8, "little") + b"{}",
    "no header": bytes(8),
    "a header that is a list": of_header([]),
    "a header that is null": of_header(b"null"),
    "a header nested too deep": of_header(b'{"a":' * 50_000),
    "a header of 5 000 digits": of_header(tensor("F32", [DIGITS], [0, 4])),
    "a header that is no UTF-8": of_header(b'{"\xff": 1}'),
    "an unknown type": of_header(tensor("F33", [1], [0, 4])),
    "a type that is a number": of_header(tensor(3, [1], [0, 4])),
    "a shape of 2^62": of_header(tensor("F32", [2**62], [0, 4])),
    "a shape whose product overflows": of_header(tensor("F32", [2**33, 2**33], [0, 4])),
    "a negative shape": of_header(tensor("F32", [-1], [0, 4])),
    "a shape that is text": of_header(tensor("F32", "1", [0, 4])),
    "a shape of fractions": of_header(tensor("F32", [1.5], [0, 4])),
    "a shape for fewer bytes": of_header(tensor("F32", [1], [0, 8])),
    "offsets beyond the file": of_header(tensor("F32", [10**6], [0, 4 * 10**6])),
    "offsets that go back": of_header(tensor("F32", [1], [4, 0])),
    "negative offsets": of_header(tensor("F32", [1], [-4, 0])),
    "one offset": of_header(tensor("F32", [9], [36])),
    "no offsets": of_header({"a": {"dtype": "F32", "shape": [9]}}),
    "metadata that are a list": of_header({"__metadata__": []} | tensor("F32", [9], [0, 36])),
    "metadata of numbers": of_header({"__metadata__": {"x": 1}} | tensor("F32", [9], [0, 36])),
    "info that is no JSON": of_header(
        {"__metadata__": {"info": "{"}} | tensor("F32", [9], [0, 36])
    ),
    "info nested too deep": of_header(
        {"__metadata__": {"info": "[" * 50_000}} | tensor("F32", [9], [0, 36])
    ),
    "info that is a list": of_header(
        {"__metadata__": {"info": "[]"}} | tensor("F32", [9], [0, 36])
    ),
    "info of 5 000 digits": of_header(
        {"__metadata__": {"info": '{"a": ' + "7" * 5000 + "}"}} | tensor("F32", [9], [0, 36])
    ),
}


def npy(header: str, data: bytes = bytes(240)) -> bytes:
    text = header.encode("latin-1") + b"\n"
    return b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text + data


NPY: dict[str, Damage] = {
    "an npy of objects": npy("{'descr': '|O', 'fortran_order': False, 'shape': (10,), }"),
    "an npy of 2^62 rows": npy(
        f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({2**62}, 3)}}"
    ),
    "an npy of -1 rows": npy("{'descr': '<i8', 'fortran_order': False, 'shape': (-1, 3), }"),
    "an npy without a shape": npy("{'descr': '<i8', 'fortran_order': False}"),
    "an npy with code for a header": npy("__import__('os').mkdir('exploded')"),
    "an npy of unknown type": npy("{'descr': '<z8', 'fortran_order': False, 'shape': (10, 3), }"),
    "an npy of version 9": b"\x93NUMPY\x09\0" + bytes(200),
    "an npy nested too deep": npy("[" * 60_000),
}


def checkpoint(**change: object) -> bytes:
    buffer = io.BytesIO()
    known = {"model": nanogpt_state(ARGS), "model_args": ARGS, "iter_num": 3}
    torch.save(known | change, buffer)
    return buffer.getvalue()


NANOGPT: dict[str, Damage] = {
    f"model_args {change}": (lambda c, change=change: checkpoint(model_args=ARGS | change))
    for change in (
        {"n_layer": 0}, {"n_layer": -1}, {"n_layer": "2"}, {"n_layer": [2]}, {"n_layer": True},
        {"n_head": 0}, {"n_head": 17}, {"n_embd": 0}, {"n_embd": 10**12}, {"n_embd": NAN},
        {"block_size": 0}, {"block_size": 2**40}, {"vocab_size": 0}, {"vocab_size": 2**31},
        {"vocab_size": None}, {"n_head": 10**400},
    )
} | {
    "a list": lambda c: checkpoint(model=[1]),
    "tensors that are lists": lambda c: checkpoint(model={"a": [1]}),
    "names that are numbers": lambda c: checkpoint(model={1: torch.ones(1)}),
    "model_args that are a list": lambda c: checkpoint(model_args=[1]),
    "empty weights": lambda c: checkpoint(model={}),
    "another weight": lambda c: checkpoint(model=nanogpt_state(ARGS) | {"x" * 3000: torch.ones(1)}),
    "a bomb inside": lambda c: checkpoint(config=Bomb(Path.cwd().parent / "exploded")),
}  # fmt: skip

META: dict[str, Damage] = {
    f"stoi {stoi}"[:60]: pickle.dumps({"vocab_size": 3, "stoi": stoi})
    for stoi in (None, [], {}, {"a": "0"}, {"a": -1}, {"a": 10**30}, {"a": 0, "b": 0}, {1: 0},
                 {"": 0}, {"ab": 0}, {"a": 0.5}, {"a": 300}, {"a": True}, "a", {b"a": 0})
} | {
    "a memo of 2^31": b"\x80\x02r\xff\xff\xff\x7f.",
    "a string of 2^31": b"\x80\x02X\xff\xff\xff\x7f.",
    "bytes of 2^62": b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b".",
    "a frame of 2^62": b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b".",
    "an integer of many bytes": b"\x80\x02\x8b" + (2**31 - 1).to_bytes(4, "little") + b".",
    "lists in lists": b"\x80\x02" + b"(" * 200_000 + b"l" * 200_000 + b".",
    "a number of 5 000 digits": b"I" + b"7" * 5000 + b"\n.",
}  # fmt: skip

CFG = {
    **values("architecture", None, 3, [], {}, "gated", "TopK", LONG, DEEP),
    **values("d_in", None, "4", 4.0, 0, -4, 2**31, 10**30, [4], True, DIGITS),
    **values("d_sae", None, 0, 7, "6", 2**40),
    **values("dtype", "float99", 3, [], "torch.int8"),
    **values("normalize_activations", "layer_norm", 1, [], {}, LONG),
    **values("apply_b_dec_to_input", "false", 2, [], {}, "x"),
    **values("reshape_activations", "x", 1, []),
    **values("activation_fn", "gelu", 3, []),
    **values("metadata", None, [], "x", 3, {"hook_name": 3}, {"context_size": "64"},
             {"context_size": -1}, {"context_size": 2**40}, {"prepend_bos": "yes"},
             {"hook_head_index": 3}, {"seqpos_slice": [2, None]}, {"model_name": []},
             {"model_from_pretrained_kwargs": []}, {"model_from_pretrained_kwargs": {"x": DEEP}},
             {"model_from_pretrained_kwargs": {"fold": 1}}, {"dataset_path": {}},
             {"model_from_pretrained_kwargs": {"center_writing_weights": "yes"}},
             {"model_from_pretrained_kwargs": {"dtype": LONG}},
             {"hook_name": "blocks.7.hook_resid_pre" + LONG}, {"hook_name": "\n\x1b[2J"}),
}  # fmt: skip
FLAGS = {
    str(flags)[:70]: {"metadata": {"sparse_coding": {"flags": flags}}}
    for flags in (
        [], "x", 3, {"model": []}, {"model": {"a": 1}}, {"model": True, "layer": 1, "site": "x"},
        {"model": "demo", "layer": "one", "site": "mlp_act"},
        {"model": "demo", "layer": NAN, "site": "mlp_act"},
        {"model": "demo", "layer": 1, "site": "--output-dir=/tmp/x"},
        {"model": "demo", "layer": 1, "site": "mlp_act", "held_out": 7},
        {"model": "demo", "layer": 1, "site": "mlp_act", "held_out": NAN},
        {"model": "demo", "layer": 1, "site": "mlp_act", "context_length": -1},
        {"model": "demo", "layer": 1, "site": "mlp_act", "max_text_tokens": 0},
        {"model": "demo", "layer": 1, "site": "mlp_act", "packing": "x"},
        {"model": "demo", "layer": 10**400, "site": "mlp_act"}, {"data_law": "x"}, {},
    )
}  # fmt: skip

LLAMA = {
    **values("num_attention_heads", None, 0, -1, "2", 2.0, 3, 2**31, []),
    **values("num_key_value_heads", 0, -1, "1", 3, [], 2**31),
    **values("hidden_act", None, 3, [], "nonsense", LONG),
    **values("rms_norm_eps", None, "x", [], {}),
    **values("head_dim", 0, -2, "8", 2**31, 7),
    **values("intermediate_size", None, 0, -1, "40", 10**12),
    **values("rope_parameters", [], "x", 3, {"rope_type": "nonsense"}, {"rope_theta": "x"},
             {"rope_type": "yarn"}, {"rope_type": "linear"}, {"rope_type": "dynamic", "factor": "x"}
             ),
    **values("layer_types", ["x"], "x", [], 3),
    **values("tie_word_embeddings", "x", []),
    **values("model_type", None, 3, {}, "bert", "../x", LONG),
    **values("architectures", 3, [3], {}),
    **values("dtype", 3, "int8", [], "complex64"),
    **values("quantization_config", {"quant_method": "gptq"}, {"quant_method": "x"}, 3, []),
    **values("vocab_size", 0, 49, 51, 10**7), **values("num_hidden_layers", 2, 4, "3", 501),
}  # fmt: skip
GEMMA = {
    **values("sliding_window", None, 0, -1, "4", [], 2**62),
    **values("query_pre_attn_scalar", None, 0, "12", -1, []),
    **values("final_logit_softcapping", "x", [], {}),
    **values("attn_logit_softcapping", "x", []),
    **values("hidden_activation", None, 3, "nonsense"),
    **values("layer_types", ["full_attention"], ["x", "x", "x"], 3),
}

MANIFEST = {
    **values("constants", None, [], {}, {"tokenizer": 3}, {"tokenizer": None}),
    **values("tokenizer", None, "x", {"name": 1, "fingerprint": "x"}, {"fingerprint": "x"}),
    **values("vocab_size", None, "257", -1, 2**63, True, 0.5),
    **values("end_of_text", None, "256", -1, []), **values("exhausted", None, 1, "yes"),
    **values("train", None, [], {"tokens": 3}, {"documents": 3, "tokens": -1, "bytes": 3,
                                                "sha256": "0"}),
    **values("val", None, 7, {}),
}  # fmt: skip
PROGRESS = {
    **values("constants", None, [], "x", {}), **values("splits", None, [], {}, {"train": {}}),
    **values("splits",
             *({"train": {"tokens": n}, "val": {}} for n in (-1, 10**6, 2**62, "1", None)),
             *({"train": {"documents": n}, "val": {"documents": n}} for n in (-1, 2**62, 0.5))),
}  # fmt: skip
PLAN = {
    **values("command", None, "python run.py", [3], {}, 7, [None]),
    **values("instances", None, 0, -1, 10_000, "2", 2.0, True, [], DIGITS),
}
RATES = {"gpu": 1.0, "disk": 0.1, "up": 0.1, "down": 0.1}
ATTEMPT = {"number": 1, "machine_id": 7, "gpu_name": "x", "rates": RATES, "ordered": 1.0,
           "expires": 9.0}  # fmt: skip
SHARD = {
    **values("shard", None, 2, "1", 1.0, []), **values("done", None, 1, "yes", []),
    **values("avoid", None, 3, "x", [None], ["x"], {}),
    **values("attempts", None, {}, "x", [3], [{}]),
    **values("more", 1),
    **{f"attempt {change}"[:70]: {"attempts": [ATTEMPT | change]} for change in (
        {"rates": None}, {"rates": {}}, {"rates": RATES | {"gpu": "x"}},
        {"rates": RATES | {"x": 1}},
        {"rates": RATES | {"disk": NAN}}, {"rates": RATES | {"gpu": None}}, {"number": "1"},
        {"ordered": None}, {"expires": "x"}, {"expires": INF}, {"gone": "x"}, {"gone": NAN},
        {"running": None}, {"running": {}}, {"running": [1]}, {"running": [[1]]},
        {"running": [[None, 2]]}, {"running": [[1, "x"]]}, {"id": "4"}, {"gb_up": None},
        {"planned_up": "x"}, {"gpu_name": None}, {"why": []}, {"machine_id": []}, {"else": 1},
    )},
}  # fmt: skip
SECRETS = {
    **values("HF_TOKEN", 3, [], {}, True, "two\nlines", "nul\0", "\x1b[2J", "\u2028"),
    "missing": b'{"other": "y"}',
}
TOKENIZER = {
    **values("model", None, [], {}, "x", {"type": "BPE"}, {"type": "x", "vocab": {}},
             {"type": "BPE", "vocab": [], "merges": []},
             {"type": "BPE", "vocab": {"a": -1}, "merges": []},
             {"type": "BPE", "vocab": {"a": 2**40}, "merges": []},
             {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]},
             {"type": "BPE", "vocab": {"a": 0, "b": 9999}, "merges": []},
             {"type": "Unigram", "vocab": [], "unk_id": 0},
             {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7},
             {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "x",
              "continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
             {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "x"}),
    **values("pre_tokenizer", 3, {"type": "x"}, {"type": "Split"},
             {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
    **values("normalizer", 3, {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
             {"type": "Precompiled", "precompiled_charsmap": "/////w=="},
             {"type": "Replace", "pattern": {"Regex": "["}, "content": ""}),
    **values("decoder", 3, {"type": "x"}, []), **values("post_processor", 3, {"type": "x"}),
    **values("added_tokens", 3, [3], [{"id": -1, "content": "x"}], None),
    **values("version", 3), **values("truncation", 3, {"max_length": -1}),
    **values("padding", 3, []),
}  # fmt: skip
TOKENIZER_CONFIG = {
    **values("tokenizer_class", 3, [], "NoSuchTokenizer", "../x", None),
    **values("bos_token", 3, [], {"a": 1}, {"__type": "AddedToken"}),
    **values("eos_token", [], {"content": 3}),
    **values("model_max_length", "x", []),
    **values("auto_map", {"AutoTokenizer": ["x.Y", None]}, 3),
    **values("added_tokens_decoder", {"x": {}}, {"0": 3}, [], 3),
    **values("extra_special_tokens", 3, {"a": 3}),
    **values("chat_template", [3], 3),
}
VOCABULARY = {
    **values("stoi", None, [], {}, "ab", 3, {"a": None}, {"a": -1}, {"a": 0.0}, {"a": True},
             {"a": 2**70}, {"a": 300}, {"a": 0, "b": 0}, {"ab": 0}, {"": 0}, {"a": DIGITS}),
}  # fmt: skip

NAMES = {
    **values("cell", None, 3, [], "", "seed0_b", "../saes/seed0_a", "seed0_a/", "a\0b", LONG),
    **values("checksum", None, 3, [], "", "0" * 64, LONG),
    **values("names", None, 3, [], ["a"], {"6": "a"}, {"-1": "a"}, {"00": "a"}, {"1.0": "a"},
             {"": "a"}, {LONG: "a"}, {"0": None}, {"0": 3}, {"0": []}, {"0": {}}, {"0": ""},
             {"0": "\n"}, {"0": LONG}, {"0": DEEP}, {"0": DIGITS}),
}  # fmt: skip

LINES: dict[str, Damage] = {
    name: (lambda c, line=line: c + line + b"\n")
    for name, line in {
        "a list": b"[1]", "a number": b"7", "a string": b'"x"', "null": b"null", "no text": b"{}",
        "text that is null": b'{"text": null}', "a number for a text": b'{"text": 3}',
        "a list for a text": b'{"text": ["a"]}', "an object for a text": b'{"text": {}}',
        "text that is false": b'{"text": false}', "NaN for a text": b'{"text": NaN}',
        "a torn line": b'{"text": "a', "two objects": b'{"text": "a"}{"text": "b"}',
        "deep": b'{"text": ' + b"[" * 50_000, "digits": b'{"text": ' + b"7" * 5000 + b"}",
        "half a surrogate": b'{"text": "\\ud800 a"}', "a NUL": b'{"text": "\\u0000a"}',
        "a raw NUL": b'{"text": "\0"}', "Text in capitals": b'{"Text": "a"}',
    }.items()
}  # fmt: skip
ALL_TEXT: dict[str, Damage] = {
    "nothing but spaces": b" \n\t" * 300,
    "latin-1": "zwölf Boxkämpfer\n".encode("latin-1") * 50,
    "UTF-16 without a mark": "zwölf Boxkämpfer\n".encode("utf-16-le") * 50,
    "UTF-16 that ends in half a character": lambda c: c.decode().encode("utf-16")[:-1],
    "UTF-32 that ends in half a character": lambda c: c.decode().encode("utf-32")[:-1],
    "nothing but a mark": b"\xef\xbb\xbf", "nothing but a mark of UTF-16": b"\xff\xfe",
    "nothing but ends of text": b"<|endoftext|>" * 9,
    "a line of 40 MB": b"x" * 4 * 10**7,
}  # fmt: skip
TABLE: dict[str, Damage] = {
    "a column too many": b"n,x\n1,2,3\n", "a column too few": b"n,x\n1\n", "a word": b"n\nx\n",
    "no UTF-8": b"n\n\xff\n", "an open quote": b'n\n"1\n', "a NUL in it": b"n\n1\0\n",
    "a field of 1 MB": b"n\n" + b"1" * 2**20 + b"\n", "an empty name": b",x\n1,x\n",
    "a quote inside": b'n\n1"2\n',
}  # fmt: skip
DONE: dict[str, Damage] = {
    "another table": b"0" * 64 + b"  results.csv\n", "another name": b"0" * 64 + b"  ../x\n",
    "no sum": b"done\n", "no UTF-8 there": b"\xff\n", "two lines": lambda c: c + c,
}  # fmt: skip
OF_SUMS: dict[str, Damage] = {
    name: (lambda c, line=line: c + line)
    for name, line in {
        "an absolute name": b"0" * 64 + b"  /etc/passwd\n", "a name that climbs":
        b"0" * 64 + b"  ../../x\n", "a name that climbs inside": b"0" * 64 + b"  cells/../../x\n",
        "no name": b"0" * 64 + b"  \n", "a short sum": b"00  a\n", "a sum in capitals":
        b"A" * 64 + b"  a\n", "one space": b"0" * 64 + b" a\n", "a name of 5 000": b"0" * 64 + b"  "
        + b"a" * 5000 + b"\n", "a NUL": b"0" * 64 + b"  a\0b\n", "no UTF-8": b"0" * 64 +
        b"  \xff\n", "an empty line": b"\n", "a file that is not there": b"0" * 64 + b"  cells/c\n",
        "a folder": b"0" * 64 + b"  cells\n", "itself": b"0" * 64 + b"  SHA256SUMS\n",
        "the place itself": b"0" * 64 + b"  .\n",
        "a double slash": b"0" * 64 + b"  cells//a.json\n",
        "a carriage return": b"0" * 64 + b"  cells/a.json\r\n", "a BOM": b"\xef\xbb\xbf\n",
    }.items()
}  # fmt: skip

HAND: dict[str, dict[str, Damage]] = {
    "tensors": ANY | SAFETENSORS, "tensors of others": ANY | SAFETENSORS,
    "record": ANY, "json": ANY, "table": ANY | TABLE, "results.csv": ANY | TABLE,
    "DONE": ANY | DONE, "text": ANY | ALL_TEXT, "jsonl": ANY | LINES, "parquet": ANY, "bin": ANY,
    "manifest of a bin": ANY | MANIFEST, "progress of a bin": ANY | PROGRESS, "tokens": ANY,
    "documents": ANY | NPY, "corpus.json": ANY, "chunk": ANY | SAFETENSORS,
    "manifest of chunks": ANY, "nanoGPT": ANY | NANOGPT, "config of gpt2": ANY,
    "config of llama": LLAMA, "config of gemma2": GEMMA, "weights": ANY | SAFETENSORS,
    "tokenizer.json": ANY | TOKENIZER, "tokenizer of a folder": ANY | TOKENIZER,
    "tokenizer_config.json": ANY | TOKENIZER_CONFIG, "vocabulary": ANY | VOCABULARY,
    "meta.pkl": ANY | META, "cfg.json": ANY | CFG, "cfg.json with flags": FLAGS,
    "sae_weights": ANY | SAFETENSORS, "checkpoint": ANY | SAFETENSORS, "config of a run": ANY,
    "row of a cell": ANY | OF_JSON, "metrics.jsonl": ANY, "shown.json": ANY | OF_JSON,
    "names": ANY | OF_JSON | NAMES,
    "SHA256SUMS": ANY | OF_SUMS, "plan": ANY | PLAN, "shard": ANY | SHARD,
    "secrets": ANY | OF_JSON | SECRETS,
}  # fmt: skip
HAND |= {name: HAND[name] | OF_JSON for name in OBJECTS}


def damaged(content: bytes, damage: Damage) -> bytes:
    """The content after the damage: another one, what a function makes of it, changed fields."""
    if isinstance(damage, dict):
        return dumped(json.loads(content) | damage).encode()
    return damage if isinstance(damage, bytes) else damage(content)


NO_BREAK = "without its last byte"  # of JSON: the line break at its end
MADE_AGAIN = set(ANY) | set(OF_JSON)
READ = {  # what is read in spite of the damage
    "tokens": set(ANY), "documents": set(HAND["documents"]), "corpus.json": MADE_AGAIN,
    "chunk": set(HAND["chunk"]), "checkpoint": set(HAND["checkpoint"]),
    "metrics.jsonl": set(ANY), "shown.json": set(HAND["shown.json"]),
    # these are JSON, of another program or an older version
    "record": {NO_BREAK}, "manifest of chunks": {NO_BREAK}, "config of a run": {NO_BREAK},
    "row of a cell": {NO_BREAK}, "shard": {NO_BREAK}, "progress of a bin": {NO_BREAK},
    "config of gpt2": {NO_BREAK}, "json": {NO_BREAK, "an empty object"},
    "manifest of a bin": {"an empty object"}, "DONE": {"empty"},
    # tables without a checksum: of nothing, of one word, of no rows
    "table": {"empty", "its first byte", NO_BREAK, "zeros of its size"},
    # what is text is text
    "text": {"a page that says 404", "a pointer of git-lfs", "half", "its first byte", "twice",
             NO_BREAK, "a line of 40 MB", "UTF-16 that ends in half a character",
             "UTF-32 that ends in half a character"},
    "jsonl": {"a NUL", "half a surrogate", "text that is null", "twice", NO_BREAK},
    # the libraries read the first, or the last, of what is there twice, and nothing behind it
    "parquet": {"twice"}, "nanoGPT": {"twice", "zeros behind it"},
    "meta.pkl": {"twice", "zeros behind it"}, "SHA256SUMS": {"twice", "zeros behind it"},
    # fields that choose nothing, or a smaller model of the same weights
    "config of llama": {"{'architectures': 3}", "{'architectures': [3]}", "{'architectures': {}}",
                        "{'num_hidden_layers': 2}", "{'quantization_config': {'quant_method': 'x'}}"
                        },
    "config of gemma2": {"{'query_pre_attn_scalar': -1}", "{'sliding_window': 0}",
                         f"{{'sliding_window': {2**62}}}"},
    "tokenizer_config.json": {
        NO_BREAK, "{'auto_map': {'AutoTokenizer': ['x.Y', None]}}",
        "{'bos_token': {'__type': 'AddedToken'}}", "{'chat_template': 3}",
        "{'tokenizer_class': '../x'}", "{'tokenizer_class': 'NoSuchTokenizer'}",
        "{'tokenizer_class': None}",
    },
    # a layer that no model has, which is said once the model is loaded
    "cfg.json with flags": {f"{{'model': 'demo', 'layer': {10**400}"[:70]},
}  # fmt: skip


@pytest.mark.parametrize("name", HAND)
def test_a_malformed_file_is_one_line_or_read_for_a_reason(tmp_path, thorough, name):
    cases = list(HAND[name])
    cases = cases if thorough else random.Random(name).sample(cases, len(cases) // 2)
    bench = Bench(READERS[name], tmp_path, lambda content, case: damaged(content, HAND[name][case]))
    outcomes = read_all(cases, bench, tmp_path)
    assert not faults(outcomes), faults(outcomes)
    assert not (tmp_path.parent / "exploded").exists()
    read = {outcome.name for outcome in outcomes if outcome.kind == "value"}
    assert read == READ.get(name, set()) & set(cases)


def of_run(*flags: str) -> tuple[Callable, Callable]:
    """run.py with these flags, in which {} is the folder."""
    return run.main, lambda folder: [flag.replace("{}", str(folder)) for flag in flags]


TEXT = ("--dataset", "stdlib", "--max-text-tokens", "20000")
COMMANDS = {
    "text": of_run("--model", "demo", "--dataset", "{}/a.txt"),
    "jsonl": of_run("--model", "demo", "--dataset", "{}/a.jsonl"),
    "parquet": of_run("--model", "demo", "--dataset", "{}/a.parquet"),
    "config of gpt2": of_run("--model", "{}", *TEXT),
    "config of llama": of_run("--model", "{}", *TEXT),
    "config of gemma2": of_run("--model", "{}", *TEXT),
    "weights": of_run("--model", "{}", *TEXT),
    "nanoGPT": (convert.main, lambda f: ["--checkpoint", f"{f}/ckpt.pt", "--output-dir", f"{f}/o"]),
    "tokenizer.json": of_run("--model", "demo", "--tokenizer", "{}/tokenizer.json", *TEXT),
    "vocabulary": of_run("--model", "demo", "--tokenizer", "{}/v.json", *TEXT),
    "meta.pkl": of_run("--model", "demo", "--tokenizer", "{}/meta.pkl", *TEXT),
    "cfg.json": of_run("--model", "demo", "--evaluate", "{}"),
    "cfg.json with flags": of_run("--evaluate", "{}"),
    "sae_weights": of_run("--evaluate", "{}"),
    "manifest of a bin": (check.main, lambda f: ["--", f"--dataset={f}", "--device=cpu"]),
}  # fmt: skip


def refused_by(main: Callable, argv: Callable) -> Callable[[Path], object]:
    """Reads a folder as the script does, which must refuse it as a script should."""

    def read(folder: Path) -> object:
        before = Path("stderr").stat().st_size
        sys.argv = [f"{main.__module__}.py", *argv(folder)]
        try:
            run_as_script(main)
        except SystemExit as stop:
            said = Path("stderr").read_bytes()[before:].decode()
            assert_refused(Done(stop.code, "", said))
            raise UserError(said) from None

    return read


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line_refuses_it_in_one_line_with_exit_code_2(tmp_path, thorough, name):
    cases = [case for case in HAND[name] if case not in READ.get(name, ())]
    cases = cases if thorough else random.Random(name).sample(cases, 2)
    reader = replace(READERS[name], read=refused_by(*COMMANDS[name]), checked=False)
    bench = Bench(reader, tmp_path, lambda content, case: damaged(content, HAND[name][case]))
    outcomes = read_all(cases, bench, tmp_path)
    assert not faults(outcomes), faults(outcomes)
    assert {outcome.kind for outcome in outcomes} == {"refused"}
