"""Every reader of files that somebody else may have written or damaged, as the scripts call it.

For the tests of torture: each makes a valid folder, names the file of it that is to be damaged, and
reads the folder. Used by children of confined.py.
"""

import contextlib
import hashlib
import json
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import convert
import numpy as np
import pyarrow.parquet  # noqa: F401  loaded once, before children are forked
import torch
import transformers.models.gemma2.modeling_gemma2
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama  # noqa: F401
from bin_writer import claim, is_written, write_bins
from builders.lm import all_rows, harvester_of, texts, tiny_target
from builders.models import (
    ARGS,
    bin_manifest,
    byte_level_bpe,
    nanogpt_state,
    random_model,
    save_checkpoint,
    save_tokenizer,
    write_jsonl,
    write_parquet,
)

import run
from sparse_coding.config import UserError
from sparse_coding.files import (
    CHECKSUM,
    read_csv,
    read_json,
    read_record,
    read_tensors,
    sha256,
    tensors_checksum,
    write_csv,
    write_record,
    write_tensors,
)
from sparse_coding.lm import show
from sparse_coding.lm.activations.store import open_store
from sparse_coding.lm.corpus import build_corpus, open_bin
from sparse_coding.lm.documents import Documents, open_documents
from sparse_coding.lm.features.names import read_names
from sparse_coding.lm.model import SITES, activations, find_site, load_language_model, logits
from sparse_coding.lm.nanogpt import load_nanogpt
from sparse_coding.lm.target import flags_of
from sparse_coding.lm.tokenizer import Tokenizer, load_tokenizer
from sparse_coding.rental.commands import _status_line
from sparse_coding.rental.controller import Controller, Job
from sparse_coding.rental.market import Market, Terms
from sparse_coding.rental.preflight import secrets_for
from sparse_coding.rental.provisioner import Provisioner
from sparse_coding.rental.records import Attempt, Ledger, Rates, read_plan
from sparse_coding.rental.remote import JOB, Remote, Results
from sparse_coding.rental.run import merge
from sparse_coding.sae.saelens import wanted_of_model
from sparse_coding.sae.saved import load_sae, save_sae
from sparse_coding.sweep.cells import mark_done, merged_rows, missing_cells, row_path, sae_folder
from sparse_coding.sweep.grid import Shard, make_grid
from sparse_coding.sweep.run_folder import (
    CheckpointStore,
    close_run_folder,
    finished_rows,
    opened_run_folder,
    unfinished_groups,
)
from sparse_coding.sweep.tracking import Tracker
from sparse_coding.toy.synth_stream import SynthStream, draw_compiles
from sparse_coding.toy.synth_world import make_synth_world, read_world, write_world

with contextlib.suppress(ImportError):  # what needs it is skipped
    import vastai  # noqa: F401

draw_compiles()  # what is compiled is written into a cache, which children must not
CPU = torch.device("cpu")
AGAIN = "is made again"  # of what the reader makes again, said on stderr, where a run goes on


@dataclass(frozen=True)
class Reader:
    """make writes a valid folder; file: in it, to be damaged; read gives what it holds.

    kind: of mutations.mutated; checked: a checksum covers the file, so a value is that of the
        undamaged one; names: whether a refusal names the file or its folder
    """

    make: Callable[[Path], None]
    file: str
    read: Callable[[Path], object]
    kind: str = "bytes"
    checked: bool = False
    names: bool = True


def plain(tensors: dict) -> dict:
    """Tensors as something that can be compared."""
    return {k: (str(t.dtype), list(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes())
            for k, t in tensors.items() if t.ndim}  # fmt: skip


def remade(path: Path, condition: bool) -> None:
    """The reader does without the file, and has said so."""
    if condition:
        raise UserError(f"{path} {AGAIN}")


# --- files of any kind ---


def make_tensors(folder: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(3)}
    write_tensors(folder / "t.safetensors", tensors, info={"step": 7, "cells": ["x", "y"]})


def make_foreign_tensors(folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(3).half()}
    save_file(tensors, folder / "t.safetensors", metadata={"info": '{"step": 7}'})


def tensors_of(folder: Path) -> object:
    tensors, info = read_tensors(folder / "t.safetensors")
    return {"tensors": plain(tensors), "info": info}


RECORD = {"l0": 3.5, "nothing": None, "names": ["a", "b"], "n": 2, "in": {"x": {"y": 1e-9}}}
ROWS = [{"n": 3, "x": 0.1, "larger": None}, {"n": 4, "x": 1e-30, "larger": 0.5}]


def make_finished(folder: Path) -> None:
    write_csv(folder / "results.csv", ROWS)
    close_run_folder(folder)


def finished(folder: Path) -> object:
    rows = finished_rows(folder)
    remade(folder, rows is None)
    return rows


# --- texts ---

TEXTS = ["zwölf Boxkämpfer\n\njagen Viktor", "def f(x):\n    return x", "\u4f60\u597d " * 40]


def texts_of(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        found = list(open_documents(str(folder / name)))
        assert all(isinstance(text, str) and text for text in found)
        "".join(found).encode()
        return len(found)

    return read


def byte_ids() -> Tokenizer:
    return load_tokenizer("", choice="bytes", vocab_size=257)


def make_bins(folder: Path) -> None:
    ids = np.array([*b"one text", 256, *b"another text", 256, *b"x", 256], np.uint16)
    ids.tofile(folder / "train.bin")
    split = {
        "documents": 3,
        "tokens": len(ids),
        "bytes": 21,
        "sha256": sha256(folder / "train.bin"),
    }
    made_with = {"name": "bytes", "fingerprint": byte_ids().fingerprint}
    bin_manifest(folder, train=split, tokenizer=made_with)


def ids_of_bin(folder: Path) -> object:
    corpus = open_bin(folder / "train.bin", byte_ids(), folder / "index")
    return np.asarray(corpus.tokens).tolist(), corpus.offsets.tolist(), corpus.lengths.tolist()


def make_data(folder: Path) -> None:
    """A checkpoint on bytes and the bins that it was trained on."""
    args = ARGS | {"vocab_size": 257}
    save_checkpoint(folder / "ckpt.pt", args, nanogpt_state(args))
    for name in ("train", "val"):
        ids = np.array([*b"some text of this split ", 256] * 8, np.uint16)
        ids.tofile(folder / f"{name}.bin")
    bin_manifest(folder)


def measured(folder: Path) -> object:
    """As convert.py does."""
    argv = ["--checkpoint", folder / "ckpt.pt", "--data", folder, "--output-dir", folder / "out"]
    convert.main([*map(str, argv), "--eval-tokens", "1000", "--device", "cpu"])
    return None


CONSTANTS = {"tokenizer": "bytes", "held_out": 0.3}


def some_documents() -> Documents:
    return Documents("here", "", lambda: iter(texts(12)))


def make_progress(folder: Path) -> None:
    claim(folder, CONSTANTS, fresh=False)
    write_bins(some_documents(), byte_ids(), folder, constants=CONSTANTS, limit=30,
               expected=30)  # fmt: skip


def go_on_with_bins(folder: Path) -> object:
    is_written(folder, CONSTANTS, limit=60)
    claim(folder, CONSTANTS, fresh=False)
    write_bins(some_documents(), byte_ids(), folder, constants=CONSTANTS, limit=60,
               expected=60)  # fmt: skip
    return None


def make_corpus(folder: Path) -> None:
    build_corpus(folder / "text", some_documents(), byte_ids())


def corpus_of(folder: Path) -> object:
    corpus = build_corpus(folder / "text", some_documents(), byte_ids())
    return np.asarray(corpus.tokens).tolist(), corpus.offsets.tolist(), corpus.ids.tolist()


@cache
def target_and_harvester() -> tuple:
    folder = Path("target")
    target = tiny_target(folder, n_documents=60)
    return target, harvester_of(target, n_tokens=600)


def make_store(folder: Path) -> None:
    open_store(folder / "store", target_and_harvester()[1], metadata={"model": "x", "layer": 1})


def store_of(folder: Path) -> object:
    harvester = target_and_harvester()[1]
    store = open_store(folder / "store", harvester, metadata={"model": "x", "layer": 1})
    return plain({"rows": all_rows(store)})


# --- models, tokenizers, autoencoders ---


def make_model(kind: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        random_model(kind).save_pretrained(folder)

    return make


def use_model(folder: Path) -> object:
    lm = load_language_model(str(folder), device=CPU)
    ids = (torch.arange(16) % lm.vocab_size)[None, : lm.max_context]
    for site in SITES:
        activations(lm, find_site(lm, lm.n_layers - 1, site), ids)
    logits(lm, ids)
    return None


def use_nanogpt(folder: Path) -> object:
    model = load_nanogpt(folder / "ckpt.pt")
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.int64))
    return None


def make_tokenizer(folder: Path) -> None:
    save_tokenizer(folder, byte_level_bpe(special=["<|endoftext|>"]))


def make_unigram(folder: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    pieces = [("<unk>", 0.0), ("\u2581", -2.0), *((c, -3.0) for c in "abcdefth"), ("the", -2.5)]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    unigram.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(" ", "\u2581")]
    )
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.save(str(folder / "tokenizer.json"))


def use_tokenizer(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        options = dict(choice=str(folder / name)) if name else {}
        tokenizer = load_tokenizer(str(folder), vocab_size=300, **options)
        for ids in tokenizer.encode_batch(["the cat <|endoftext|> é \x00 <unk>", "", "a" * 3000]):
            assert all(0 <= i < 300 for i in ids), ids
        assert len(tokenizer.token_texts()) == 300
        return None

    return read


VOCABULARY = json.dumps({"stoi": {"a": 0, "b": 1, "<unk>": 2}})
META = pickle.dumps({"vocab_size": 3, "stoi": {"a": 0, "b": 1, "c": 2}, "itos": {0: "a"}})


def use_vocabulary(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        tokenizer = load_tokenizer("", choice=str(folder / name), vocab_size=300)
        assert all(0 <= i < 300 for i in tokenizer.encode_batch(["abba"])[0])
        return tokenizer.token_texts()[:3] and None

    return read


def make_sae(folder: Path, **metadata: object) -> None:
    rng = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (4, 6), "b_enc": (6,), "W_dec": (6, 4), "b_dec": (4,)}
    tensors = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    about = {"model": "demo", "layer": 1, "site": "mlp_act", "dataset": "stdlib"} | metadata
    save_sae(folder, tensors, metadata=about)


def make_names(folder: Path) -> None:
    make_sae(folder / "saes" / "seed0_a")
    checksum = tensors_checksum(folder / "saes" / "seed0_a" / "sae_weights.safetensors")
    content = {"cell": "seed0_a", "checksum": checksum, "names": {"0": "a name", "5": "another"}}
    (folder / "named_features.json").write_text(json.dumps(content))


def names_of(folder: Path) -> object:
    names = read_names([str(folder / "named_features.json")], folder / "saes")
    assert all(0 < len(name) <= 200 for name in names["seed0_a"].values())
    return None


def make_foreign_sae(folder: Path) -> None:
    make_sae(folder)
    path = folder / "cfg.json"
    config = json.loads(path.read_text())
    del config[CHECKSUM], config["metadata"]["sparse_coding"]
    config["metadata"] |= {"model_name": "gpt2", "context_size": 64, "prepend_bos": True,
                           "hook_name": "blocks.7.hook_resid_post"}  # fmt: skip
    path.write_text(json.dumps(config))


def make_sae_with_flags(folder: Path) -> None:
    flags = {"model": "demo", "layer": 1, "site": "mlp_act", "dataset": "stdlib", "held_out": 0.05}
    make_sae(folder, flags=flags, n_eval_tokens=1000)
    path = folder / "cfg.json"
    config = json.loads(path.read_text())
    del config[CHECKSUM]
    path.write_text(json.dumps(config))


def use_sae(folder: Path) -> object:
    sae = load_sae(folder)
    wanted_of_model(sae.metadata)
    argv = ["--model", "demo", "--evaluate", str(folder)]
    flags_of(folder, argv)
    run.with_preset(replace(run.Config(), evaluate=str(folder)), argv, on_gpu=False)
    return {"tensors": plain(sae.tensors)}


# --- runs ---

CELLS = make_grid(4, seeds=range(1), l1_exps=range(-3, -1), size_exps=range(1))
COLUMNS = ("n_dict", "fvu")


def make_checkpoints(folder: Path) -> None:
    store = CheckpointStore(folder / "checkpoints" / "a")
    for step in (5, 9):
        info = {"cells": [cell.name for cell in CELLS], "position": step}
        store.save(step, {"w": torch.full((20,), float(step))}, info=info)


def checkpoint_of(folder: Path) -> object:
    unfinished_groups(folder, CELLS)
    found = CheckpointStore(folder / "checkpoints" / "a").load()
    remade(folder, found is None)
    tensors, info = found
    assert info["step"] in (5, 9)
    assert plain(tensors) == plain({"w": torch.full((20,), float(info["step"]))})
    return None


def opened(folder: Path) -> object:
    constants, origin = {"lr": 0.1, "seeds": [0, 1]}, {"git_commit": "a", "versions": {"x": "1"}}
    return opened_run_folder(folder, constants=constants, origin=origin, fresh=False, cells=CELLS,
                             shard=Shard(0, 1))  # fmt: skip


def make_run(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    with opened(folder / "run"):
        for cell in CELLS:
            make_sae(sae_folder(folder / "run", cell))
            mark_done(folder / "run", cell, {"n_dict": cell.n_dict, "fvu": 0.25})


def rows_of_run(folder: Path) -> object:
    folder = folder / "run"
    with opened(folder):
        remade(folder, bool(missing_cells(folder, CELLS)))
        compare = {"mmcs": lambda W_dec, larger: float(W_dec.sum())}
        return merged_rows(folder, CELLS, columns=COLUMNS, compare=compare, device=CPU)


def make_series(folder: Path) -> None:
    rows = [{"step": step, "seed": 0, "loss/a": 0.5} for step in range(6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def tracker_of(folder: Path) -> Tracker:
    return Tracker(folder, mode="disabled", project="p", run_name="r", config={})


def rewound(folder: Path) -> object:
    tracker = tracker_of(folder)
    tracker.rewind(lambda r: any(r.get(k) != v for k, v in {"seed": 0}.items()) or r["step"] <= 3)
    tracker.log({"step": 4})
    tracker.close()
    return None


def wandb_id(folder: Path) -> object:
    return tracker_of(folder)._run_id()


CHOICE = show.ShowChoice(page_l0=32.0, n_page_tokens=100, pages="all", names=(), export="none")


# --- rented machines ---


class There:
    """Stands for Remote: a snapshot in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def ask(self, verb: str, **options: object) -> dict:
        return {"state": sha256(self.folder / "SHA256SUMS")}

    def pull_folder(self, source: str, folder: Path, *, known: Path | None) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder, folder)


def make_snapshot(folder: Path) -> None:
    lines = []
    for name in ("cells/a.json", "cells/b.json", "metrics.jsonl"):
        path = folder / "there" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        lines.append(f"{hashlib.sha256(name.encode()).hexdigest()}  {name}\n")
    (folder / "there" / "SHA256SUMS").write_text("".join(lines))


def fetched(folder: Path) -> object:
    results = Results(folder / "rentals", 1)
    results.pull(There(folder / "there"))
    merge([results], folder / "outputs")
    return None


def make_plan(folder: Path) -> None:
    (folder / "rentals" / "r").mkdir(parents=True)
    plan = {"command": ["python", "run.py"], "instances": 2, "began": 1.5, "git_commit": None}
    (folder / "rentals" / "r" / "plan.json").write_text(json.dumps(plan))


def plan_of(folder: Path) -> object:
    plan = read_plan(folder / "rentals" / "r")
    assert all(isinstance(word, str) for word in plan["command"])
    assert 0 < plan["instances"] < 10_000
    return None


def make_shard(folder: Path) -> None:
    ledger = Ledger(folder, 1)
    (record,) = ledger.shards
    rates = Rates(0.4, 0.1, 0.02, 0.01)
    attempt = Attempt(number=1, machine_id=7, gpu_name="RTX 3090", rates=rates, ordered=1000.0,
                      expires=9000.0, id=4)  # fmt: skip
    record.avoid = [3]
    ledger.enter(record, attempt)
    attempt.seen("running", 1200.0)
    ledger.save(record)


def shard_of(folder: Path) -> object:
    ledger = Ledger(folder, 1)
    (record,) = ledger.shards
    str(ledger.spent()), ledger.committed(), ledger.hours_left(Rates(1, 1, 1, 1), 0.1)
    _ = record.current, [a.machine_id for a in record.attempts], set(record.avoid)
    for attempt in record.attempts:
        attempt.seen("running", 2000.0)
        attempt.seen("stopped", 3000.0)
        attempt.ended(4000.0, "done")
        attempt.gb_up += 0.1
    ledger.save(record)
    return None


def make_secrets(folder: Path) -> None:
    (folder / "secrets.json").write_text(json.dumps({"HF_TOKEN": "hf_x", "other": "y"}))


def secrets_of(folder: Path) -> object:
    (folder / "secrets.json").chmod(0o600)
    lines = secrets_for(("HF_TOKEN", "OTHER"), folder)
    assert lines.count(b"\n") == 2
    return None


OFFER = {"id": 5, "machine_id": 7, "gpu_name": "RTX 3090", "num_gpus": 1, "dph_total": 0.25,
         "storage_cost": 0.36, "inet_up_cost": 0.02, "inet_down_cost": 0.01, "min_bid": 0.1,
         "duration": 86400 * 3, "reliability": 0.99, "inet_down": 700.0,
         "geolocation": "Quebec, CA"}  # fmt: skip
INSTANCE = {"id": 3, "label": "sae1/run/1/a1/exp=9", "actual_status": "running", "status_msg": "ok",
            "gpu_name": "RTX 3090", "public_ipaddr": "1.2.3.4", "ssh_host": "ssh5.vast.ai",
            "ports": {"22/tcp": [{"HostIp": "0.0.0.0", "HostPort": "40022"}]}, "ssh_port": 10022,
            "dph_total": 0.3, "gpu_util": 12.0}  # fmt: skip


class Service:
    """Stands for the SDK: answers with what a file holds."""

    def __init__(self, text: bytes):
        self.text, self.client = text, self

    def answer(self, *_: object, **__: object) -> object:
        return json.loads(self.text)

    search_offers = show_instances_v1 = show_user = answer

    def get(self, *_: object, **__: object) -> object:
        return SimpleNamespace(status_code=200, text="", json=self.answer,
                               raise_for_status=lambda: None)  # fmt: skip


def market_of(folder: Path) -> Market:
    market = Market("key", spacing=0.0)
    market.sdk = Service((folder / "answer.json").read_bytes())
    return market


def answer(content: object) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "answer.json").write_text(json.dumps(content))

    return make


def is_printable(*lines: str) -> None:
    assert all(line.isprintable() and len(line) < 1500 for line in lines), lines


def use_offers(folder: Path) -> object:
    for interruptible in (False, True):
        for offer in market_of(folder).offers({}, disk_gb=40, interruptible=interruptible):
            is_printable(str(offer), offer.gpu_name, offer.place)
            cost = offer.rates.cost(running_h=1, existing_h=1, gb_up=1, gb_down=1)
            is_printable(str(cost))
    return None


def use_instances(folder: Path) -> object:
    market = market_of(folder)
    for instance in market.instances():
        is_printable(_status_line(instance), instance.status, instance.message, str(instance.label))
        if instance.endpoints:
            Remote(instance.id, instance.endpoints, folder, folder / "key", None).write_config()
            lines = (folder / f"ssh_config-{instance.id}").read_text().splitlines()
            assert len(lines) == 16, lines
    return None


def use_account(folder: Path) -> object:
    market = market_of(folder)
    is_printable(f"{market.credit():.2f}")
    market.exists(4)
    return None


TERMS = Terms(gpu_names=("RTX 3090",), n_gpus=1, disk_gb=30, image="i", image_gb=4,
              min_reliability=0.9, min_inet_mbps=1, min_cuda=12, interruptible=False, max_dph=1,
              max_hours=1, results_gb=1, start_minutes=1, lost_minutes=1, pull_minutes=1,
              attempts=3)  # fmt: skip


class Answering(Remote):
    """A machine whose answers lie in a folder."""

    def run(self, command: str, **_: object) -> str:
        path = self.folder / f"{command.removeprefix(JOB).split()[0]}.json"
        return path.read_bytes().decode(errors="replace") if path.exists() else ""

    def push(self, *_: object) -> None:
        pass


def make_answers(folder: Path) -> None:
    answers = {
        "check": {"python": "3.12.1", "gpu": "RTX 3090, 560.1", "free_gb": 30.5,
                  "missing": {"torch": "2.1"}, "problems": []},
        "status": {"running": True, "exit": None, "line": "cell 3", "tail": "cell 2\ncell 3"},
        "snapshot": {"state": ""}, "install": {"installed": {}}, "submit": {},
    }  # fmt: skip
    for name, content in answers.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    make_shard(folder)


def attended(folder: Path) -> object:
    ledger = Ledger(folder, 1)
    provisioner = Provisioner(None, "r", TERMS, ledger, 0.0, 0.0)
    job = Job(["python"], {}, "outputs/r", folder, [], b"", False)
    shard = Controller(provisioner, ledger.shards[0], job, key=folder / "key")
    shard.remote = Answering(4, (("1.2.3.4", 22),), folder, folder / "key", provisioner.stop)
    shard.set_up()
    shard.attend()
    is_printable(repr(shard.line)[:90])
    return None


def make_world(folder: Path) -> None:
    write_world(make_synth_world(100, 6, 0, n_steps=1), folder / "w.npz")


def x_of_world(folder: Path) -> object:
    world = read_world(folder / "w.npz")
    stream = SynthStream(world, batch_size=64, batch_seed=0, device=CPU)
    stream.with_truth(0)
    return None


READERS = {
    "tensors": Reader(make_tensors, "t.safetensors", tensors_of, "safetensors", checked=True),
    "tensors of others": Reader(make_foreign_tensors, "t.safetensors", tensors_of, "safetensors"),
    "record": Reader(lambda f: write_record(f / "r.json", RECORD), "r.json",
                     lambda f: read_record(f / "r.json"), "json", checked=True),
    "json": Reader(lambda f: write_record(f / "r.json", RECORD), "r.json",
                   lambda f: read_json(f / "r.json", remedy="mend it"), "json"),
    "table": Reader(lambda f: write_csv(f / "r.csv", ROWS), "r.csv",
                    lambda f: read_csv(f / "r.csv") and None),
    "results.csv": Reader(make_finished, "results.csv", finished, checked=True),
    "DONE": Reader(make_finished, "DONE", finished, checked=True),
    "world": Reader(make_world, "w.npz", x_of_world, "zip"),
    "text": Reader(lambda f: (f / "a.txt").write_text("<|endoftext|>".join(TEXTS)), "a.txt",
                   texts_of("a.txt")),
    "jsonl": Reader(lambda f: write_jsonl(f / "a.jsonl", TEXTS), "a.jsonl", texts_of("a.jsonl"),
                    "lines"),
    "parquet": Reader(lambda f: write_parquet(f / "a.parquet", TEXTS * 20), "a.parquet",
                      texts_of("a.parquet")),
    "bin": Reader(make_bins, "train.bin", ids_of_bin, checked=True),
    "manifest of a bin": Reader(make_bins, "manifest.json", ids_of_bin, "json", checked=True),
    "progress of a bin": Reader(make_progress, "progress.json", go_on_with_bins, "json"),
    "data of a checkpoint": Reader(make_data, "manifest.json", measured, "json"),
    "val.bin of a checkpoint": Reader(make_data, "val.bin", measured),
    "tokens": Reader(make_corpus, "text/tokens.bin", corpus_of, checked=True),
    "documents": Reader(make_corpus, "text/documents.npy", corpus_of, checked=True),
    "corpus.json": Reader(make_corpus, "text/corpus.json", corpus_of, "json", checked=True),
    "chunk": Reader(make_store, "store/chunk-00000.safetensors", store_of, "safetensors",
                    checked=True),
    "manifest of chunks": Reader(make_store, "store/manifest.json", store_of, "json", checked=True),
    "nanoGPT": Reader(lambda f: save_checkpoint(f / "ckpt.pt"), "ckpt.pt", use_nanogpt, "zip"),
    "config of gpt2": Reader(make_model("gpt2"), "config.json", use_model, "json"),
    "config of llama": Reader(make_model("llama"), "config.json", use_model, "json"),
    "config of gemma2": Reader(make_model("gemma2"), "config.json", use_model, "json"),
    "weights": Reader(make_model("gpt2"), "model.safetensors", use_model, "safetensors"),
    "tokenizer.json": Reader(make_tokenizer, "tokenizer.json", use_tokenizer("tokenizer.json"),
                             "json"),
    "unigram": Reader(make_unigram, "tokenizer.json", use_tokenizer("tokenizer.json"), "json"),
    "tokenizer of a folder": Reader(make_tokenizer, "tokenizer.json", use_tokenizer(""), "json"),
    "tokenizer_config.json": Reader(make_tokenizer, "tokenizer_config.json", use_tokenizer(""),
                                    "json"),
    "vocabulary": Reader(lambda f: (f / "v.json").write_text(VOCABULARY), "v.json",
                         use_vocabulary("v.json"), "json"),
    "meta.pkl": Reader(lambda f: (f / "meta.pkl").write_bytes(META), "meta.pkl",
                       use_vocabulary("meta.pkl")),
    "cfg.json": Reader(make_foreign_sae, "cfg.json", use_sae, "json"),
    "cfg.json with flags": Reader(make_sae_with_flags, "cfg.json", use_sae, "json"),
    "cfg.json of ours": Reader(make_sae, "cfg.json", use_sae, "json", checked=True),
    "sae_weights": Reader(make_sae, "sae_weights.safetensors", use_sae, "safetensors",
                          checked=True),
    "checkpoint": Reader(make_checkpoints, "checkpoints/a/step-00000009.safetensors",
                         checkpoint_of, "safetensors"),
    "config of a run": Reader(make_run, "run/config.json", rows_of_run, "json", checked=True),
    "row of a cell": Reader(make_run, f"run/{row_path(CELLS[0])}", rows_of_run, "json",
                            checked=True),
    "metrics.jsonl": Reader(make_series, "metrics.jsonl", rewound, "lines"),
    "shown.json": Reader(lambda f: write_record(f / "shown.json", {"page_l0": 32.0}), "shown.json",
                         lambda f: show.is_shown(f, CHOICE) and None, "json"),
    "names": Reader(make_names, "named_features.json", names_of, "json"),
    "wandb_run.json": Reader(lambda f: write_record(f / "wandb_run-metrics.json", {"id": "a"}),
                             "wandb_run-metrics.json", lambda f: wandb_id(f) and None, "json"),
    "SHA256SUMS": Reader(make_snapshot, "there/SHA256SUMS", fetched, names=False),
    "plan": Reader(make_plan, "rentals/r/plan.json", plan_of, "json"),
    "shard": Reader(make_shard, "shard-1.json", shard_of, "json"),
    "secrets": Reader(make_secrets, "secrets.json", secrets_of, "json", names=False),
    "offers": Reader(answer([OFFER, OFFER]), "answer.json", use_offers, "json", names=False),
    "instances": Reader(answer({"instances": [INSTANCE, INSTANCE], "next_token": None}),
                        "answer.json", use_instances, "json", names=False),
    "account": Reader(answer({"credit": 5.0, "instances": {"id": 4}}), "answer.json", use_account,
                      "json", names=False),
    "check of a machine": Reader(make_answers, "check.json", attended, "json", names=False),
    "status of a machine": Reader(make_answers, "status.json", attended, "json", names=False),
}  # fmt: skip


def agrees(original: object, value: object) -> bool:
    """Whether all that was there is there; a damaged name of the checksum may be one more entry."""
    if isinstance(original, dict) and isinstance(value, dict):
        return all(k in value and agrees(v, value[k]) for k, v in original.items())
    return original == value


CLAIM = re.compile(rb'\\?"checksum\\?": *\\?"')  # of a file to have one


class Bench:
    """A reader's valid folder, copied for each case, damaged and read: called in a child.

    damage: (content, name of the case) -> content
    """

    def __init__(self, reader: Reader, folder: Path, damage: Callable[[bytes, str], bytes]):
        self.reader, self.folder, self.damage = reader, folder, damage
        self.original: list[object] = []

    def __call__(self, name: str) -> None:
        reader, whole, case = self.reader, self.folder / "whole", self.folder / "damaged"
        if not self.original:
            shutil.rmtree(whole, ignore_errors=True)
            whole.mkdir(parents=True)
            reader.make(whole)
            shutil.copytree(whole, self._empty(case), dirs_exist_ok=True)
            self.original = [reader.read(case) if reader.checked else None]
        shutil.copytree(whole, self._empty(case), dirs_exist_ok=True)
        path = case / reader.file
        content = path.read_bytes()
        damaged = self.damage(content, name)
        path.write_bytes(damaged)
        stderr = Path("stderr").stat().st_size
        try:
            value = reader.read(case)
        except UserError as error:
            here = str(case) in str(error) or Path(reader.file).name in str(error)
            if reader.names and not here:
                raise AssertionError("it names no file") from error
            raise
        finally:
            with open("stderr", errors="replace") as file:
                file.seek(stderr)
                said = file.read()
            assert "Traceback" not in said, said
            assert "panicked" not in said, said
        # without its checksum a file claims to be one of an older version
        if reader.checked and (not CLAIM.search(content) or CLAIM.search(damaged)):
            assert agrees(self.original[0], value), "another value than that of the undamaged file"

    def _empty(self, folder: Path) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder
