"""SAELens as the referee: its own autoencoders, its own evaluation, on a world out of a file.

The world is an npz of the arrays of SynthWorld (sparse_coding/toy/synth_world.py), so that what
this project trains on the same file can be held against it. SAELens draws the samples, trains at a
constant learning rate and evaluates what it trained on fresh samples, in batches of 1 024; of each
batch its BatchTopK keeps the k · 1 024 largest codes in the evaluation too. A seed sets the start
and the samples.

    make .venv-peers/installed
    .venv-peers/bin/python benchmarks/world_referee.py --world world.npz --output referee.jsonl

Nine minutes of a quiet core for each of ten autoencoders in a world of 1 024 features, two thirds
of it for samples. A process takes one thread: run one for each core, each
with its --arch. The same command leaves out what the output has already. Families of another L0
for each coefficient (standard, jumprelu) are not here: SAELens has nothing that finds it.
"""

import json
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from peers import world_of_sae_lens

sys.path.insert(0, str(Path(__file__).parent.parent))
from sparse_coding.config import (
    UserError,
    parse_flags,
    pick,
    progress_bar,
    require,
    require_flag,
    run_as_script,
)
from sparse_coding.files import parse_json, sha256
from sparse_coding.toy.synth_world import FEATURES_PER_ROOT, SynthWorld, read_world

if TYPE_CHECKING:
    from sae_lens.synthetic import SyntheticModel
    from sae_lens.synthetic.evals import SyntheticDataEvalResult

BATCH = 1024
PARTS = (32, 8, 2)  # of n_dict: the inner widths of matryoshka; 8, 32, 128 of 256


@dataclass(frozen=True)
class Settings:
    """What an autoencoder's numbers depend on, beside its family, its seed and the world."""

    n_dict: int = 256
    k: float = 5.5
    n_samples: int = 5_000_000
    lr: float = 1e-3  # constant
    eval_samples: int = 100_000


@dataclass(frozen=True)
class Config(Settings):
    world: str = ""  # an npz; needed
    arch: tuple[Literal["batchtopk", "matryoshka"], ...] = ("batchtopk", "matryoshka")
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    output: str = ""  # a jsonl file: a line is added for each autoencoder that is finished


def model_of(world: SynthWorld, path: str) -> "SyntheticModel":
    """SAELens's model with the arrays of the world.

    Raises:
        UserError: the world's trees are not those of the model.
    """
    n, width = world.features.shape
    n_roots = max(1, n // FEATURES_PER_ROOT)
    model = world_of_sae_lens(n, width, n_roots)
    same = parents_of(model) == world.parent.tolist()
    require(same, f"{path} has other trees than SAELens's {n_roots} roots of four children each")
    vectors, law = model.feature_dict, model.activation_generator
    vectors.feature_vectors.data = world.features
    vectors.bias.data = world.bias
    law.firing_probabilities = world.probability
    law.correlation_thresholds = world.threshold
    law.low_rank_correlation = (world.loadings, world.diagonal)
    law.mean_firing_magnitudes = world.mean  # before the first sample, which keeps them
    law.std_firing_magnitudes = world.std
    return model


def parents_of(model: "SyntheticModel") -> list[int]:
    """The parent of each feature, -1 where there is none."""
    found = [-1] * model.cfg.num_features
    nodes = list(model.hierarchy.roots)
    for node in nodes:  # grows
        for child in node.children:
            found[child.feature_index] = node.feature_index
            nodes.append(child)
    return found


def trained(model: "SyntheticModel", arch: str, seed: int, cfg: Config) -> dict:
    """The scores of one autoencoder, and the seconds it took."""
    from sae_lens import LoggingConfig, __version__
    from sae_lens.synthetic import SyntheticSAERunner, SyntheticSAERunnerConfig

    torch.manual_seed(seed)
    start = time.perf_counter()
    settings = SyntheticSAERunnerConfig(
        synthetic_model=model.cfg,
        sae=sae_config(arch, model.cfg.hidden_dim, cfg),
        training_samples=cfg.n_samples,
        batch_size=BATCH,
        lr=cfg.lr,
        eval_samples=cfg.eval_samples,
        output_path=None,
        checkpoint_path=None,
        logger=LoggingConfig(log_to_wandb=False),
    )
    done = SyntheticSAERunner(settings, override_synthetic_model=model).run()
    seconds = round(time.perf_counter() - start, 1)
    return scores(done.final_eval) | {"seconds": seconds, "sae_lens": __version__}


def sae_config(arch: str, width: int, cfg: Config):
    """SAELens's config of an autoencoder; what isn't named is as it has it."""
    import sae_lens

    sizes = dict(k=cfg.k, d_in=width, d_sae=cfg.n_dict)
    if arch == "batchtopk":
        return sae_lens.BatchTopKTrainingSAEConfig(**sizes)
    return sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(
        **sizes,
        matryoshka_widths=[*(cfg.n_dict // part for part in PARTS), cfg.n_dict],
        use_matryoshka_aux_loss=True,
    )


def scores(found: "SyntheticDataEvalResult") -> dict:
    """By the names that this project gives them."""
    return {
        "f1": found.classification.f1_score,
        "precision": found.classification.precision,
        "recall": found.classification.recall,
        "mcc": found.mcc,
        "uniqueness": found.uniqueness,
        "explained_variance": found.explained_variance,
        "l0": found.sae_l0,
        "dead": found.dead_latents,
        "shrinkage": found.shrinkage,
        "true_l0": found.true_l0,
    }


def finished(output: Path) -> list[dict]:
    """The lines of the output so far."""
    lines = output.read_text().splitlines() if output.exists() else []
    remedy = "remove that line, or name another --output"
    return [parse_json(line, output, remedy=remedy) for line in lines]


def line_of(record: dict) -> str:
    """What is printed of an autoencoder."""
    return (
        f"{record['arch']:10} seed {record['seed']}  f1 {record['f1']:.4f}  "
        f"precision {record['precision']:.4f}  recall {record['recall']:.4f}  "
        f"mcc {record['mcc']:.4f}  uniqueness {record['uniqueness']:.4f}  "
        f"explained variance {record['explained_variance']:.4f}  l0 {record['l0']:.2f}  "
        f"dead {record['dead']}  {record['seconds']:.0f} s"
    )


def check(cfg: Config) -> None:
    """Raises UserError for flags that can't be, or without SAELens."""
    require(bool(cfg.world), "--world is needed: the npz of a world")
    for name in ("n_dict", "n_samples", "eval_samples", "k", "lr"):
        require_flag(cfg, name, getattr(cfg, name) > 0, "above 0")
    require_flag(cfg, "n_samples", cfg.n_samples >= BATCH, f"{BATCH} or more, a batch")
    rule = f"a multiple of {PARTS[0]}, for matryoshka's first width"
    require_flag(cfg, "n_dict", "matryoshka" not in cfg.arch or cfg.n_dict % PARTS[0] == 0, rule)
    require_flag(cfg, "k", cfg.k <= cfg.n_dict, f"at most --n-dict {cfg.n_dict}")
    try:
        from sae_lens import __version__
        from sae_lens.training import sae_trainer
    except ImportError as error:
        remedy = "make .venv-peers/installed, then .venv-peers/bin/python benchmarks/..."
        raise UserError(f"SAELens can't be imported ({error}): {remedy}") from None
    sae_trainer.tqdm = progress_bar
    print(f"SAELens {__version__}, torch {torch.__version__}, {cfg}", flush=True)


def main(argv: list[str]) -> int:
    cfg = parse_flags(Config(), argv, description=__doc__.split("\n\n")[0])
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="sae_lens")
    check(cfg)
    model = model_of(read_world(Path(cfg.world)), cfg.world)
    of_all = vars(pick(Settings, cfg)) | {"world": sha256(Path(cfg.world))[:16]}
    output = Path(cfg.output) if cfg.output else None
    so_far = finished(output) if output else []
    for arch in cfg.arch:
        for seed in cfg.seeds:
            what = {"arch": arch, "seed": seed}
            record = next((old for old in so_far if old.items() >= (what | of_all).items()), None)
            if record is None:
                record = what | trained(model, arch, seed, cfg) | of_all
                if output:
                    output.parent.mkdir(parents=True, exist_ok=True)
                    with output.open("a") as file:
                        file.write(json.dumps(record) + "\n")
            print(line_of(record), flush=True)
    return 0


if __name__ == "__main__":
    run_as_script(main)
