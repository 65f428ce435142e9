"""A tiny sweep of run.py on small models made here, and on some hundred short documents."""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from builders.models import byte_level_bpe, random_model, save_tokenizer, write_parquet
from builders.scripts import (
    EACH_STEP,
    SMALL,
    Done,
    Process,
    Server,
    assert_done,
    bytes_under,
    table,
)

CONTEXT, WIDTH, N_DOCUMENTS = 16, 64, 400
LLAMA = dict(num_hidden_layers=2, intermediate_size=WIDTH)
FAMILIES = {"gpt2": dict(n_layer=2, n_inner=WIDTH), "gpt_neox": LLAMA, "llama": LLAMA}
PLACES = ("--output-dir", "run", "--activations-dir", "acts")
TINY = (
    f"--arch relu --preset full --layer 1 --context-length {CONTEXT} --held-out 0.2 "
    "--n-tokens 12000 --batch-size 64 --lm-batch-size 8 --n-eval-tokens 1000 --n-page-tokens 1000 "
    "--l1-exp-low -8 --l1-exp-high -6 --expansion-exp-low -1 --expansion-exp-high 1 "
    "--wandb-mode disabled --log-every 10 --device cpu"
).split()
N_STEPS = 12000 // 64
# one cell
SMALLEST = ("--n-tokens", "4000", "--expansion-exp-high", "0", "--l1-exp-high", "-7")
HARVEST = "sparse_coding.lm.activations.store._write_chunk"  # called for each of seven chunks
HARVEST_IN_MEMORY = "sparse_coding.lm.activations.places.InMemory._keep"  # so is this
OFTEN = SMALL | EACH_STEP


def documents() -> list[str]:
    """Sentences of a small language in which a word says much about the next one."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghilmnorstu", k=rng.randint(2, 7))) for _ in range(60)]
    texts = []
    for n in range(N_DOCUMENTS):
        at, text = rng.randrange(60), [f"{n}:"]
        for _ in range(rng.randint(10, 60)):
            at = (3 * at + rng.choice((1, 1, 1, 2, 7))) % 60
            text.append(words[at] + rng.choice(("", "", "", ",", ".")))
        texts.append(" ".join(text))
    return texts


@dataclass(frozen=True)
class World:
    """A parquet file and a folder of models, none of which anybody may change, and the tiny sweep
    on them: into run/ and acts/ below cwd, unless `more` says otherwise."""

    root: Path
    server: Server

    @property
    def text(self) -> Path:
        return self.root / "train.parquet"

    def flags(self, kind: str = "gpt2") -> list[str]:
        return [*TINY, "--model", str(self.root / kind), "--dataset", str(self.text)]

    def start(self, *more: object, cwd: Path, kind: str = "gpt2", **options: object) -> Process:
        return self.server.start(*self.flags(kind), *PLACES, *more, cwd=cwd, **options)

    def run(self, *more: object, cwd: Path, kind: str = "gpt2", **options: object) -> Done:
        return self.server.run(*self.flags(kind), *PLACES, *more, cwd=cwd, **options)

    def finish(self, *more: object, **options: object) -> Done:
        """A run that must end well."""
        done = self.run(*more, **options)
        assert_done(done)
        return done


def train_a_little_(model, bpe, texts: list[str]) -> None:
    """So that ablations cost something: the next word is learned, roughly."""
    stream = torch.tensor([i for e in bpe.encode_batch(texts) for i in (0, *e.ids)])
    rows = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    model.train()
    for step in range(80):
        ids = rows[torch.arange(64) * 7 + step & 1023]
        loss = model(ids, labels=ids).loss
        adam.zero_grad()
        loss.backward()
        adam.step()


def make_world(root: Path, server: Server) -> World:
    """Trains and writes what a World has, below root."""
    texts = documents()
    bpe = byte_level_bpe(special=["<|endoftext|>"], vocab_size=320, texts=texts)
    for kind, sizes in FAMILIES.items():
        model = random_model(kind, noise=0.0, vocab_size=320, **sizes)
        if kind == "gpt2":
            train_a_little_(model, bpe, texts)
        if kind == "llama":  # no ablation changes its predictions
            model.lm_head.weight.data.zero_()
        model.save_pretrained(root / kind)
        save_tokenizer(root / kind, bpe)
    write_parquet(root / "train.parquet", texts)
    write_parquet(root / "few.parquet", texts[:80])
    (root / "other.txt").write_text("<|endoftext|>".join(texts[::-1]))
    return World(root, server)


def numbers_in(cwd: Path) -> dict[str, bytes | list]:
    """What must be the same bits in two runs of the same constants."""
    kept = {f"acts/{name}": data for name, data in bytes_under(cwd / "acts").items()}
    kept |= {f"saes/{name}": data for name, data in bytes_under(cwd / "run/saes").items()}
    return kept | {"results.csv": [row | {"seconds": 0} for row in table(cwd / "run")]}


def assert_same_numbers(cwd: Path, finished: Path, *, store: bool = True) -> None:
    ours, theirs = numbers_in(cwd), numbers_in(finished)
    if not store:
        theirs = {k: v for k, v in theirs.items() if not k.startswith("acts/chunk-")}
        del theirs["acts/manifest.json"]
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
