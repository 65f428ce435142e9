"""The laws of toy data: what each brings to training, evaluation and files.

post, june2023      replicate the post: see data.py
synth, synth_v1     SynthSAEBench: see synth_world.py; v1 does not scale children by parents
correlated          Sparse but Wrong: see synth_world.py
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from sparse_coding.config import (
    UserError,
    fingerprint,
    given_flags,
    named_seed,
    pick,
    require,
    require_flag,
)
from sparse_coding.files import Damaged, cache_folder
from sparse_coding.sae.families import FAMILIES
from sparse_coding.sweep.grid import Cell
from sparse_coding.toy import synth_world
from sparse_coding.toy.data import LAWS, ToyData, WorldFile
from sparse_coding.toy.synth_stream import SynthStream
from sparse_coding.toy.synth_world import SynthWorld, make_correlated_world, make_synth_world

Law = Literal["post", "june2023", "synth", "synth_v1", "correlated"]
OF_POST = ("n_active", "feature_prob_decay", "noise_std")  # flags that only its laws have
OF_OTHERS = ("world", "n_worlds")
# flags of all laws
OF_LAWS = ("activation_dim", "n_true_features", "batch_size", "world", *OF_POST)
N_PROJECTION = 18  # the middle of those that Sparse but Wrong shows; 11 features are on
N_FOR_SCALE, SCALE_BATCH = (
    10,
    1024,
)  # batches, and their size, from which the mean square norm of x is taken


class Stream(Protocol):
    """Batches of a world: a pure function of (world, batch seed, step) on one kind of device.

    features: the true ones, (n_true_features, activation_dim)
    """

    features: Tensor

    def batch(self, step: int) -> Tensor:
        """x of one step, (batch_size, activation_dim)."""

    def with_truth(self, step: int) -> tuple[Tensor, Tensor]:
        """The same, and which features are on in it, (batch_size, n_true_features) bool."""


class Data(Protocol):
    """A law with its constants: ToyData or SynthData. A world is named by a seed; None is the one
    of a file."""

    law: str
    activation_dim: int
    n_true_features: int
    batch_size: int

    @property
    def eval_batch_size(self) -> int:
        """Of evaluation."""

    @property
    def n_projection(self) -> int | None:
        """n of the metric s_dec, where that is taken."""

    @property
    def identity(self) -> dict[str, str]:
        """What the numbers depend on beside the flags."""

    @property
    def n_bytes(self) -> int:
        """Memory that a world takes, while it is made."""

    def world_of(self, cell: Cell) -> int | None:
        """The world of a cell."""

    def features(self, world_seed: int | None) -> Tensor:
        """True features, (n_true_features, activation_dim)."""

    def scale(self, world_seed: int | None) -> float:
        """By which x is multiplied before it is trained on."""

    def stream(
        self, world_seed: int | None, *, batch_size: int, batch_seed: int, device: torch.device
    ) -> Stream:
        """Batches of a world."""

    def flags(self, cell: Cell) -> dict:
        """Those that --evaluate needs for the world of the cell."""

    def worlds(self, seeds: list) -> dict[str, WorldFile]:
        """By their names below a run folder, the files that hold these worlds."""


@dataclass(frozen=True)
class SynthData:
    """A law of synthetic worlds and its constants.

    world: a file that read_world takes; "": worlds are drawn, each from a seed
    """

    law: str
    activation_dim: int
    n_true_features: int
    batch_size: int
    world: str = ""

    def __post_init__(self) -> None:
        """Raises UserError for a constant out of its range; their names are those of the flags."""
        for name in ("activation_dim", "n_true_features", "batch_size"):
            require_flag(self, name, getattr(self, name) >= 1, "at least 1")
        if self.world:
            n, h = _from_file(self.world).features.shape
            rule = f"{n} x {h} (--n-true-features, --activation-dim)"
            fits = (n, h) == (self.n_true_features, self.activation_dim)
            require(fits, f"--world {self.world} has true features of {rule}: give these")
        elif self.law == "correlated":
            most = self.activation_dim
            rule = f"at most --activation-dim {most} with --data-law correlated"
            require_flag(self, "n_true_features", self.n_true_features <= most, rule)
        else:
            least = synth_world.IN_TREE
            rule = f"at least {least} with --data-law {self.law}: that many features a tree has"
            require_flag(self, "n_true_features", self.n_true_features >= least, rule)

    @property
    def eval_batch_size(self) -> int:
        """Of evaluation: codes are chosen from as many samples as in training."""
        return self.batch_size

    @property
    def n_projection(self) -> int | None:
        """n of the metric s_dec, where that is taken."""
        return N_PROJECTION if self.law == "correlated" else None

    @property
    def n_bytes(self) -> int:
        """Features, their gradient, moments; cosines of a chunk of them for each thread."""
        n, cosines = self.n_true_features, synth_world.CHUNK * torch.get_num_threads()
        return 4 * n * (5 * self.activation_dim + min(n, cosines) + 2 * synth_world.RANK)

    @property
    def identity(self) -> dict[str, str]:
        """What the numbers depend on beside the flags: the arrays of a world from a file."""
        return {"world_digest": synth_world.digest(self.drawn(None))} if self.world else {}

    def world_of(self, cell: Cell) -> int | None:
        """Seed of a cell's world, None of one in a file."""
        return cell.world

    def drawn(self, world_seed: int | None) -> SynthWorld:
        """The world of a seed; or of the file, for None."""
        return _from_file(self.world) if world_seed is None else _drawn(self, world_seed)

    def features(self, world_seed: int | None) -> Tensor:
        """Those of SynthWorld."""
        return self.drawn(world_seed).features

    def true_l0(self, world_seed: int | None) -> float:
        """Features that are on on average, where there are no trees: Σ of their probabilities."""
        return float(self.drawn(world_seed).probability.sum())

    def scale(self, world_seed: int | None) -> float:
        """That gives x a mean square norm of 1, for which constants of families are meant."""
        seed, cpu = named_seed("scale"), torch.device("cpu")
        stream = self.stream(world_seed, batch_size=SCALE_BATCH, batch_seed=seed, device=cpu)
        squares = [stream.batch(i).double().square().sum(dim=1).mean() for i in range(N_FOR_SCALE)]
        return float(torch.stack(squares).mean().rsqrt())

    def stream(
        self, world_seed: int | None, *, batch_size: int, batch_seed: int, device: torch.device
    ) -> SynthStream:
        """Batches of a world."""
        return SynthStream(
            self.drawn(world_seed),
            batch_size=batch_size,
            batch_seed=batch_seed,
            device=device,
            scaled=self.law != "synth_v1",
        )

    def flags(self, cell: Cell) -> dict:
        """Those that --evaluate needs for the world of the cell."""
        world = os.path.abspath(self.world) if self.world else str(cell.world)
        sizes = {name: getattr(self, name) for name in ("activation_dim", "n_true_features")}
        return {"data_law": self.law, "world": world, "batch_size": self.batch_size} | sizes

    def worlds(self, seeds: list) -> dict[str, WorldFile]:
        """A file of each, as read_world takes it."""

        def file_of(seed: int | None) -> WorldFile:
            world = self.drawn(seed)

            def check(path: Path) -> None:
                try:
                    found = synth_world.read_world(path)
                except UserError as error:
                    raise Damaged(path, error) from None
                if synth_world.digest(found) != synth_world.digest(world):
                    raise Damaged(path, "it is another world")

            return WorldFile(functools.partial(synth_world.write_world, world), check)

        return {f"world{'' if seed is None else seed}.npz": file_of(seed) for seed in seeds}


@functools.lru_cache(maxsize=2)
def _from_file(path: str) -> SynthWorld:
    return synth_world.read_world(Path(path))


@functools.lru_cache(maxsize=2)
def _drawn(data: SynthData, seed: int) -> SynthWorld:
    """The world of a seed, from the user's cache if it was drawn before."""
    correlated = data.law == "correlated"  # else trees: those of synth and synth_v1 are the same
    make = make_correlated_world if correlated else make_synth_world
    constants = {"correlated": correlated, "seed": seed, "torch": torch.__version__}
    constants |= {"n": data.n_true_features, "activation_dim": data.activation_dim}
    name = fingerprint(constants | synth_world.constants())
    path = cache_folder() / "worlds" / f"{name}.npz"
    try:
        return synth_world.read_world(path)
    except UserError:  # not there, or damaged
        world = make(data.n_true_features, data.activation_dim, seed)
    try:
        synth_world.write_world(world, path)
    except (OSError, UserError):
        print(f"the world could not be kept in {path.parent}: it is drawn again next time")
    return world


def data_of(config: object) -> Data:
    """The law that constants name, with those of its own.

    config: with the fields of ToyData and SynthData, and data_law
    """
    if config.data_law in LAWS:
        return pick(ToyData, config, law=config.data_law)
    world = "" if config.world.isdecimal() else config.world
    return pick(SynthData, config, law=config.data_law, world=world)


def worlds_of(config: object) -> Sequence[int | None]:
    """The worlds that constants ask for: seeds, or None for one that is in a file, or, where a seed
    is a whole replication, for that of each seed."""
    if config.data_law in LAWS or not config.world.isdecimal():
        return (None,)
    return range(int(config.world), int(config.world) + config.n_worlds)


def require_used(config: object, argv: list[str]) -> None:
    """Raises UserError for a flag of the command line that would change nothing under the law."""
    of_the_post = config.data_law in LAWS
    unused = OF_OTHERS if of_the_post else OF_POST
    for name in sorted(given_flags(argv) & set(unused)):
        laws = "synth, synth_v1, correlated" if of_the_post else ", ".join(LAWS)
        raise UserError(f"--{name.replace('_', '-')} is for --data-law {laws}: drop it")
    penalised = [name for name in config.arch if not FAMILIES[name].has_k]
    require(
        config.decoder_rows != "raw" or not penalised,
        f"--decoder-rows raw with --arch {' '.join(penalised)}: long rows make its penalty cost "
        "nothing; raw is for topk, batchtopk, matryoshka and matryoshka_refined",
    )
    require_flag(config, "n_worlds", 1 <= config.n_worlds <= 1000, "between 1 and 1000")
    one = config.n_worlds == 1 or config.world.isdecimal()
    require(one, f"--n-worlds {config.n_worlds} with --world {config.world}: a file has one world")
