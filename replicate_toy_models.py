"""Draws the toy figures of "Taking features out of superposition with sparse autoencoders".

Sharkey, Braun, Millidge (2022): data of known sparse features in superposition, one sparse
autoencoder per (l1_alpha, dictionary size), and four pictures of the plane they span: MMCS with the
true features, dead features, MMCS with larger dictionaries, reconstruction loss.

    python replicate_toy_models.py                    quick on a CPU, full on a GPU
    python replicate_toy_models.py --preset smoke     does everything once, in seconds
    python replicate_toy_models.py --verify           against the record of June 2023
    python replicate_toy_models.py --preset synth1k   which family finds the true features
    python replicate_toy_models.py --evaluate FOLDER  one autoencoder of a run
    python replicate_toy_models.py --help             all constants

Any constant below is a flag, and wins over the preset. The same command resumes or merges.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from sparse_coding.config import parse_flags, pick, require, require_flag, run_as_script
from sparse_coding.sae.families import PREFIXES, Arch, Rows
from sparse_coding.sae.saelens import saved_flags
from sparse_coding.sae.saved import load_sae
from sparse_coding.sweep.grid import Cell, Families, Shard, check_grid, find_shard, make_grid
from sparse_coding.sweep.hardware import describe, pick_device, set_precision
from sparse_coding.sweep.script import PlannedRun, RunOptions, plan_run, train_planned
from sparse_coding.toy import replication
from sparse_coding.toy.laws import OF_LAWS, Law, data_of, require_used, worlds_of
from sparse_coding.toy.recipe import ToyRecipe, evaluate_one

DESCRIPTION = __doc__.split("\n\n")[0]


@dataclass(frozen=True)
class Config:
    """Every constant, each a flag; comments give meaning, unit and source."""

    # auto: full on CUDA, else quick. smoke and quick: a smaller world with the same picture
    # synth16k: SynthSAEBench (2602.14687); synth1k: a small one; sparse_but_wrong: 2508.16560
    preset: Literal["auto", "smoke", "quick", "full", "synth16k", "synth1k", "sparse_but_wrong"] = (
        "auto"
    )

    # data (defaults: the post)
    data_law: Law = "post"  # june2023: what the 2023 replication drew; others: docs/data.md
    activation_dim: int = 256  # h, dimensions of x
    n_true_features: int = 512  # G, twice as many as dimensions
    n_active: float = 5.0  # k, true features active on average in a sample
    feature_prob_decay: float = 0.99  # λ: feature g is active in proportion to λ^g
    noise_std: float = 0.0  # standard deviation of noise added to every dimension of x
    # of the last three laws, whose seeds share worlds: the first one's seed, or an npz of one world
    world: str = "42"
    n_worlds: int = 1  # worlds world, world + 1, ...

    # the grid: l1_alpha = 10^(e/4), dict_ratio = 2^e; high ends are exclusive
    arch: tuple[Arch, ...] = ("relu",)  # families, of sparse_coding/sae/families.py
    # for these; (): n_active, but of relu the grid of l1_alpha
    target_l0: tuple[int | float, ...] = ()
    prefixes: tuple[float, ...] = PREFIXES  # of matryoshka: shares of n_dict
    decoder_rows: Rows = "unit"  # of W_dec; free: of any length, slow; raw: docs/families.md
    baseline: Literal["none", "frozen-decoder"] = "none"  # beside each: a random W_dec that stays
    l1_exp_low: int = -8  # lowest e of l1_alpha = 10^(e/4): from 0.01
    l1_exp_high: int = 9  # end of e, exclusive: to 10^(8/4) = 100
    dict_ratio_exp_low: int = -3  # lowest e of dict_ratio = 2^e: n_dict from n_true_features / 8
    dict_ratio_exp_high: int = 6  # end of e, exclusive: to 2^5 = 32 n_true_features
    # weight of mean Σ codes: l1_alpha / n_dict (per_feature, the post) or l1_alpha (sum)
    l1_normalisation: Literal["per_feature", "sum"] = "per_feature"
    seed: int = 0  # a seed is a whole replication: its own world, batches and starts
    n_seeds: int = 1  # seeds seed, seed + 1, ...; figures show their mean

    # training (defaults: the post)
    batch_size: int = 256  # vectors per step
    n_steps: int = 20_000  # steps of every autoencoder
    lr: float = 1e-3  # of Adam, betas (0.9, 0.999)
    n_eval_samples: int = 2560  # fresh ones for results.csv, in whole batches

    # the machine: rounding only, but for the device, which draws random numbers of its own
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA if there is any
    # of factors in GEMMs, auto: tf32 on CUDA, float32 on a CPU, which may have bf16 and bf16x3, too
    precision: Literal["auto", "float32", "tf32", "bf16", "fp16", "bf16x3"] = "auto"
    max_memory_gb: float = 0.0  # for training, in GB; 0: 80 % of what is free
    shard: str = ""  # i/N: train only this part; the same command without it merges

    # output
    output_dir: str = ""  # default: outputs/replicate_toy_models-<preset>-<hash of the constants>
    fresh: bool = False  # delete what runs wrote into --output-dir and start again
    log_every: int = 500  # steps between records in metrics.jsonl
    wandb_mode: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online with a key
    verify: bool = False  # only train the June-2023 cells and compare them with the record
    evaluate: str = ""  # only print the metrics of this saved autoencoder, on its own world


# --lr is that of all families, as in the benchmark; a quarter of its features fit
SYNTH = dict(data_law="synth", arch=("relu", "batchtopk", "jumprelu", "matryoshka",
             "matryoshka_refined"), dict_ratio_exp_low=-2, dict_ratio_exp_high=-1, n_seeds=5,
             batch_size=1024, l1_normalisation="sum")  # fmt: skip
# verify is no choice of --preset: --verify takes it
PRESETS = {
    "smoke": dict(activation_dim=32, n_true_features=64, n_active=3.0, n_steps=600, log_every=100,
                  l1_exp_low=-6, l1_exp_high=7, dict_ratio_exp_low=-1, dict_ratio_exp_high=3),
    "quick": dict(activation_dim=64, n_true_features=128, n_active=3.0, n_steps=2500, log_every=125,
                  dict_ratio_exp_low=-2, dict_ratio_exp_high=4),
    "full": dict(),
    "synth16k": dict(SYNTH, activation_dim=768, n_true_features=16_384, target_l0=(25,), lr=3e-4,
                     n_steps=195_312, n_eval_samples=1_000_000),
    "synth1k": dict(SYNTH, activation_dim=96, n_true_features=1024, target_l0=(5.5,), n_steps=4882,
                    n_eval_samples=100_000),
    "sparse_but_wrong": dict(SYNTH, data_law="correlated", arch=("batchtopk",), activation_dim=100,
                             n_true_features=50, target_l0=tuple(range(1, 26)), n_steps=8000,
                             batch_size=256, lr=6e-4, decoder_rows="raw", dict_ratio_exp_low=0,
                             dict_ratio_exp_high=1, n_eval_samples=20_000),
    "verify": dict(data_law="june2023", n_steps=5000, n_seeds=3),
}  # fmt: skip
# change no number beyond rounding, so a run folder is the same with other values of these
NOT_IDENTITY = {"preset", "device", "precision", "max_memory_gb", "shard", "output_dir", "fresh",
                "log_every", "wandb_mode", "evaluate"}  # fmt: skip
# flags that a saved autoencoder brings along for --evaluate
OF_WORLD = ("seed", "data_law", "n_eval_samples", *OF_LAWS)


def main(argv: list[str]) -> int:
    """The whole run; the exit code."""
    cfg = parse_flags(Config(), argv, description=DESCRIPTION)
    shard = find_shard(cfg.shard)
    require(shard.count == 1 or not cfg.fresh, "--fresh with shards: remove the folder instead")
    device = pick_device(cfg.device)
    precision = set_precision(cfg.precision, device)
    cfg = with_preset(cfg, argv, on_gpu=device.type == "cuda")
    if cfg.evaluate:
        return evaluate_saved(cfg, device)
    recipe = recipe_of(cfg, device)  # refuses what is out of range
    cells = grid(cfg)

    planned = plan_run(
        "replicate_toy_models",
        dataclasses.asdict(cfg),
        not_identity=NOT_IDENTITY,
        more={"device_type": device.type, "precision": precision, **recipe.data.identity},
        device=describe(device),
        suffix=shard.suffix,
    )
    planned.require_room(recipe, cells, fresh=cfg.fresh, max_memory_gb=cfg.max_memory_gb)
    with planned.opened(cells, shard, fresh=cfg.fresh):
        if rows := planned.finished_rows():
            replication.mend_worlds(planned.folder, recipe.data, cells)
            return replication.last_lines(rows, planned.folder, recipe, verify=cfg.verify)
        return run(cfg, recipe, cells, planned=planned, shard=shard)


def run(
    cfg: Config, recipe: ToyRecipe, cells: list[Cell], *, planned: PlannedRun, shard: Shard
) -> int:
    """Trains what is missing of this shard; merges if nothing is missing of the others."""
    config = dataclasses.asdict(cfg)

    def present(rows: list[dict]) -> dict[str, Path]:
        replication.write_worlds(planned.folder, recipe.data, cells)
        if cfg.verify:
            return {}
        return replication.draw(
            planned.folder,
            rows,
            data=recipe.data,
            world=recipe.data.world_of(cells[0]),
            l1_normalisation=cfg.l1_normalisation,
            context=planned.origin | {"config": config},
        )

    announce(cfg, len(cells), shard, recipe.device)
    options = pick(RunOptions, cfg)
    rows = train_planned(
        recipe, cells, planned, shard=shard, options=options, config=config, present=present
    )
    return replication.last_lines(rows, planned.folder, recipe, verify=cfg.verify) if rows else 0


def check(cfg: Config, argv: list[str]) -> None:
    """Raises UserError for a constant out of its range, but those of the recipe, and for a flag of
    argv that would change nothing."""
    pick(Families, cfg).require_used(argv)
    require_used(cfg, argv)
    check_grid(cfg, "dict_ratio_exp")
    pick(RunOptions, cfg)


def with_preset(cfg: Config, argv: list[str], *, on_gpu: bool) -> Config:
    """The preset's constants, with the flags of argv over them."""
    auto = "full" if on_gpu else "quick"
    preset = "verify" if cfg.verify else auto if cfg.preset == "auto" else cfg.preset
    default = Config(**PRESETS[preset])
    if cfg.evaluate:
        folder = Path(cfg.evaluate)
        saved = saved_flags(folder, load_sae(folder).metadata.get("flags"), OF_WORLD)
        source = f"{folder}/cfg.json"
        default = parse_flags(default, saved, description=DESCRIPTION, source=source)
    cfg = parse_flags(default, argv, description=DESCRIPTION)
    check(cfg, argv)
    if cfg.verify:
        require_flag(cfg, "preset", cfg.preset == "auto", "left out with --verify")
        for name in dataclasses.asdict(cfg).keys() - NOT_IDENTITY - {"verify", "seed"}:
            fixed = getattr(default, name)
            require_flag(cfg, name, getattr(cfg, name) == fixed, f"{fixed} with --verify: drop it")
    return dataclasses.replace(cfg, preset=preset)


def grid(cfg: Config) -> list[Cell]:
    """All cells of the run."""
    seeds = range(cfg.seed, cfg.seed + cfg.n_seeds)
    if cfg.verify:
        return replication.record_cells(seeds, cfg.n_true_features)
    l1_exps = range(cfg.l1_exp_low, cfg.l1_exp_high)
    size_exps = range(cfg.dict_ratio_exp_low, cfg.dict_ratio_exp_high)
    of_size = make_grid(cfg.n_true_features, seeds=seeds, l1_exps=l1_exps, size_exps=size_exps)
    cells = [dataclasses.replace(cell, world=world) for world in worlds_of(cfg) for cell in of_size]
    middle = (cfg.l1_exp_low + cfg.l1_exp_high - 1) // 2
    default_l0 = (max(1, round(cfg.n_active)),)
    return pick(Families, cfg).cells(cells, start=middle, default_l0=default_l0)


def evaluate_saved(cfg: Config, device: torch.device) -> int:
    """Prints the metrics of a saved autoencoder on the world of its flags."""
    sae = load_sae(Path(cfg.evaluate)).to(device)
    cell = Cell(cfg.seed, 0, 0, sae.n_dict, world=next(iter(worlds_of(cfg))))
    for name, value in evaluate_one(sae, data_of(cfg), cell, cfg.n_eval_samples).items():
        print(f"{name:18} {value:.6g}")
    return 0


def recipe_of(cfg: Config, device: torch.device) -> ToyRecipe:
    """How the constants say that cells are trained."""
    return pick(ToyRecipe, cfg, data=data_of(cfg), device=device)


def announce(cfg: Config, n_cells: int, shard: Shard, device: torch.device) -> None:
    """The first line on the screen: what runs, on what, and what --preset full would cost."""
    line = f"{cfg.preset}: {n_cells} SAEs on {describe(device)}"
    if shard.count > 1:
        line += f", shard {shard.index + 1} of {shard.count}"
    if cfg.preset in ("smoke", "quick"):
        n_full = len(grid(Config(**PRESETS["full"])))
        line += f" (--preset full: {n_full} SAEs; what it takes is in README.md)"
    print(line)


if __name__ == "__main__":
    run_as_script(main)
