"""Trains sparse autoencoders on the activations of a language model, and shows their features.

One command harvests the activations of a text once, trains a grid of autoencoders (families x l0 x
expansion_factor x seed) on them at a time, evaluates each on held-out documents, and writes
figures, report.html and features.html, pages of what the features of each respond to.

    python run.py                              demo on a CPU (needs no network), full on a GPU
    python run.py --model ID --dataset ID --layer 3 --target-l0 16 32 64
    python run.py --evaluate FOLDER            a saved autoencoder, ours or SAELens's
    python run.py --export hub --push OWNER/NAME  also uploads what others load with sae_lens
    python run.py --help                       all constants

Any constant below is a flag, and wins over the preset. The same command resumes or merges.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from sparse_coding.config import UserError, parse_flags, pick, require, run_as_script
from sparse_coding.lm import recipe as recipes
from sparse_coding.lm import show
from sparse_coding.lm import target as targets
from sparse_coding.lm.hub.push import PushChoice
from sparse_coding.lm.recipe import Grid, LanguageRecipe, Optimisation, Place, Reading
from sparse_coding.lm.target import ModelChoice, Target, TextChoice
from sparse_coding.lm.transcoding import SiteName, Transcoding
from sparse_coding.sae.families import PREFIXES, Arch
from sparse_coding.sae.saelens import wanted_of_model
from sparse_coding.sae.saved import load_sae
from sparse_coding.sweep.grid import Cell, Families, Shard, find_shard
from sparse_coding.sweep.hardware import describe, pick_device, set_precision
from sparse_coding.sweep.script import PlannedRun, RunOptions, plan_run, train_planned

DESCRIPTION = __doc__.split("\n\n")[0]


@dataclass(frozen=True)
class Config:
    """The constants: each is a flag."""

    # auto: full (gpt2 on pile-10k) on CUDA or with --model, else demo (ours, on Python's library)
    preset: Literal["auto", "demo", "full"] = "auto"

    # the model: hub id (EleutherAI/pythia-70m, roneneldan/TinyStories-33M, ...), local folder,
    # nanoGPT's ckpt.pt, smollm2 or demo; of ten families, see docs/language_models.md
    model: str = "openai-community/gpt2"
    model_revision: str = ""  # commit, tag or branch of a hub id
    tokenizer: str = "auto"  # auto: the model's own; gpt2, bytes, a file or folder, ids of a .bin
    layer: int | None = None  # from 0; None: the middle one, n_layers // 2
    # mlp_in: what the MLP gets; mlp_act: input of its down projection; mlp_out: what it adds;
    # resid_post: stream after the layer; attn_concat: heads' outputs, for the output projection
    site: SiteName = "mlp_act"
    target_site: SiteName | Literal[""] = ""  # to be predicted by transcoders from --site
    skip: bool = False  # of transcoders: a linear connection as well, see docs/transcoders.md
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of model; auto: bfloat16 on new GPUs

    # hub id[:CONFIG][@SPLIT], .txt, .jsonl (also .gz, .zst), .parquet, folder, .bin, stdlib, pydoc
    dataset: str = "NeelNanda/pile-10k"
    dataset_revision: str = ""  # commit of a hub id; default: pinned for those we name
    text_column: str = "text"  # of .jsonl, .parquet and hub datasets
    context_length: int | None = None  # tokens of a row; None: 256, or all that the model can take
    # packed: documents one after another, cut to rows; documents: the start of one document per row
    packing: Literal["packed", "documents"] = "packed"
    held_out: float = 0.05  # share of the documents kept for evaluation, by a hash of their text
    max_text_tokens: int = 100_000_000  # of the text, from its start, are tokenized at most
    n_tokens: int = 3_000_000  # activations to train on, repeated in epochs if the text has fewer
    n_eval_tokens: int = 100_000  # held-out tokens for the evaluation
    n_page_tokens: int = 200_000  # held-out tokens for features.html

    # the grid: families x sparsity x expansion_factor = n_dict / width = 2^e; high ends exclusive
    arch: tuple[Arch, ...] = ("batchtopk", "relu")  # families, of sparse_coding/sae/families.py
    target_l0: tuple[int, ...] = ()  # mean codes per activation; (): 16 32 64, but of relu, if
    l1_exp_low: int | None = None  # these two are given, a grid of l1_alpha = 10^(e/4); an l0 of
    l1_exp_high: int | None = None  # some 25 is near -15 at width 256, and falls as 1/width
    expansion_exp_low: int = 0
    expansion_exp_high: int = 3
    prefixes: tuple[float, ...] = PREFIXES  # of matryoshka: shares of n_dict
    baseline: Literal["none", "frozen-decoder"] = "none"  # beside each: a random W_dec that stays
    seed: int = 0  # a seed has its own starts and order of activations
    n_seeds: int = 1  # seeds seed, seed + 1, ...

    # training; x is scaled to a mean square norm of 1 (folded out of the saved autoencoders)
    batch_size: int = 2048  # activations per step
    lr: float = 1e-3  # of Adam, betas (0.9, 0.999)
    # weight of mean Σ codes in the loss: l1_alpha (sum), or l1_alpha / n_dict (per_feature)
    l1_normalisation: Literal["sum", "per_feature"] = "sum"
    warmup: float = 0.02  # share of the steps in which the learning rate rises from 0
    l1_warmup: float = 0.05  # share of the steps in which l1_alpha rises from 0
    decay: float = 0.2  # share of the steps at the end in which the learning rate falls to 0
    # activations longer than this x the median are left out of training and fvu, and left as they
    max_norm_multiple: float = 10.0  # are in spliced losses (some models have a few); 0: no limit

    # the machine: rounding only, but for the device
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA if there is any
    # of factors in GEMMs, auto: tf32 on CUDA, float32 on a CPU, which may have bf16 and bf16x3, too
    precision: Literal["auto", "float32", "tf32", "bf16", "fp16", "bf16x3"] = "auto"
    lm_batch_size: int = 0  # rows of text per forward pass of the model; 0: as suits the device
    store_dtype: Literal["float16", "bfloat16"] = "float16"  # of stored activations
    activations_in: Literal["disk", "memory"] = "disk"  # memory, the GPU's or host's: see docs
    activations_dir: str = ""  # default: activations/<model>-layer<layer>-<site>-<hash>
    max_disk_gb: float = 20.0  # activations that need more are computed as they are read
    shuffle_gb: float = 0.5  # of activations that are mixed at a time; twice this is held in memory
    max_memory_gb: float = 0.0  # for training, in GB; 0: 80 % of what is free
    shard: str = ""  # i/N: train only this part; the same command without it merges

    # output
    output_dir: str = ""  # default: outputs/run-<preset>-<hash of the constants>
    fresh: bool = False  # delete what runs wrote into --output-dir and start again
    page_l0: float = 32.0  # features.html opens on the autoencoder of lowest fvu up to this l0
    pages: Literal["all", "best"] = "all"  # autoencoders that get a page of features, or that alone
    names: tuple[str, ...] = ()  # files with names of features, see docs/language_models.md#names
    # each like this too; hub: a folder for the Hugging Face Hub, as sae_lens finds it there
    export: Literal["none", "dictionary_learning", "sparsify", "circuit_tracer", "hub"] = "none"
    push: str = ""  # OWNER/NAME on the Hub, where the user is logged in: upload that folder there
    public: bool = False  # of --push: for everybody to see; else private
    evaluate: str = ""  # only evaluate this saved autoencoder, on --model and --dataset
    log_every: int = 100  # steps between records in metrics.jsonl
    wandb_mode: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online with a key


PRESETS = {
    "demo": dict(model="demo", layer=1, dataset="stdlib", context_length=128, n_tokens=600_000,
                 n_eval_tokens=30_000, batch_size=512, lr=3e-3, l1_exp_low=-15, l1_exp_high=-12),
    "full": dict(),
}  # fmt: skip
# change no number beyond rounding, so a run folder is the same with other values of these
NOT_IDENTITY = {"preset", "device", "precision", "max_memory_gb", "max_disk_gb", "shard", "fresh",
                "output_dir", "activations_dir", "activations_in", "lm_batch_size", "log_every",
                "wandb_mode", "page_l0", "pages", "names", "n_page_tokens", "export", "push",
                "public"}  # fmt: skip
CHECKED_BY = (RunOptions, Optimisation, Reading, Place, ModelChoice, TextChoice, Transcoding,
              show.ShowChoice, PushChoice)  # fmt: skip


def main(argv: list[str]) -> int:
    """Runs the command line `argv`; the exit code."""
    cfg = parse_flags(Config(), argv, description=DESCRIPTION)
    shard = find_shard(cfg.shard)
    require(shard.count == 1 or not cfg.fresh, "--fresh with shards: remove the folder instead")
    device = pick_device(cfg.device)
    precision = set_precision(cfg.precision, device)
    cfg = with_preset(cfg, argv, on_gpu=device.type == "cuda")
    cfg = dataclasses.replace(cfg, **targets.commits(pick(ModelChoice, cfg), pick(TextChoice, cfg)))
    if cfg.evaluate:
        return evaluate_saved(cfg, device)

    files = targets.stamps(pick(ModelChoice, cfg), pick(TextChoice, cfg))
    planned = plan_run(
        "run",
        dataclasses.asdict(cfg),
        not_identity=NOT_IDENTITY,
        more={"device_type": device.type, "precision": precision, **files},
        device=describe(device),
        suffix=shard.suffix,
    )
    choice, upload = pick(show.ShowChoice, cfg), pick(PushChoice, cfg)
    show.names_of(planned.folder, choice)  # refuses those of another run
    if not cfg.fresh and show.is_shown(planned.folder, choice) and (width := planned.saved_width):
        with planned.opened(grid_of(cfg).cells(width), shard):  # refuses other constants
            if (rows := planned.finished_rows()) and show.rename(planned.folder, choice):
                return show.last_lines(rows, planned.folder, choice, upload)
    print(f"{cfg.preset}: {cfg.model}, on {describe(device)}")
    target, recipe = open_target_of(cfg, device)
    target.require_same_files(files)
    cells = grid_of(cfg).cells(target.site.width)
    show.require_exportable(cells, cfg.export)
    planned.require_room(recipe, cells, fresh=cfg.fresh, max_memory_gb=cfg.max_memory_gb)
    planned = dataclasses.replace(planned, origin=planned.origin | {"activations": target.metadata})
    place, of_run = pick(Place, cfg), dict(folder=planned.folder, cells=cells)
    recipes.require_memory(recipe, place, **of_run, fresh=cfg.fresh)
    with planned.opened(cells, shard, fresh=cfg.fresh):
        recipe = recipes.with_activations(recipe, target, place, **of_run)
        rows = run(cfg, recipe, target, cells=cells, planned=planned, shard=shard)
        return show.last_lines(rows, planned.folder, choice, upload) if rows else 0


def run(
    cfg: Config, recipe: LanguageRecipe, target: Target, *, cells: list[Cell], planned: PlannedRun,
    shard: Shard,
) -> list[dict]:  # fmt: skip
    """Trains what is missing of this shard; all rows, merged, if nothing is missing of others."""
    of_run = dict(cells=cells, recipe=recipe, target=target, choice=pick(show.ShowChoice, cfg))
    options, config = dict(shard=shard, options=pick(RunOptions, cfg)), dataclasses.asdict(cfg)
    context = planned.origin | {"config": config, "activations": recipe.metadata}
    present = partial(show.show, planned.folder, **of_run, context=context)
    return train_planned(recipe, cells, planned, **options, config=config, present=present)


def evaluate_saved(cfg: Config, device: torch.device) -> int:
    """Prints the metrics of a saved autoencoder on --model and --dataset."""
    sae = load_sae(Path(cfg.evaluate)).to(device)
    target, recipe = open_target_of(cfg, device, **wanted_of_model(sae.metadata))
    show.check_fit(sae, target)
    for name, value in show.evaluate_one(sae, recipe).items():
        print(f"{name:14} {value:.6g}")
    return 0


def with_preset(cfg: Config, argv: list[str], *, on_gpu: bool) -> Config:
    """The preset's constants, under those of the autoencoder to --evaluate, under argv's flags."""
    auto = "full" if on_gpu or any(a.split("=")[0] == "--model" for a in argv) else "demo"
    preset = auto if cfg.preset == "auto" else cfg.preset
    default = Config(**PRESETS[preset])
    if cfg.evaluate:
        saved = targets.flags_of(Path(cfg.evaluate), argv)
        default = dataclasses.replace(default, batch_size=1)
        default = parse_flags(default, saved, description="", source=f"{cfg.evaluate}/cfg.json")
    cfg = parse_flags(default, argv, description=DESCRIPTION)
    target_l0 = recipes.asked_l0(cfg.arch, cfg.target_l0, cfg.l1_exp_low)
    cfg = dataclasses.replace(cfg, preset=preset, target_l0=target_l0)
    try:
        check(cfg, argv)
    except UserError as error:
        where = f" (if not given, it is of {cfg.evaluate}/cfg.json)" * bool(cfg.evaluate)
        raise UserError(f"{error}{where}") from None
    return cfg


def grid_of(cfg: Config) -> Grid:
    """Which autoencoders are trained."""
    return pick(Grid, cfg, families=pick(Families, cfg))


def check(cfg: Config, argv: list[str]) -> None:
    """Raises UserError for a constant out of its range or a flag of argv that changes nothing."""
    grid_of(cfg).families.require_used(argv)
    require(not (cfg.names and cfg.fresh), "--names are of what --fresh deletes: drop one of them")
    for part in CHECKED_BY:
        pick(part, cfg)


def open_target_of(
    cfg: Config, device: torch.device, **options: bool
) -> tuple[Target, LanguageRecipe]:
    """The target, whose introduction is printed, and how cells are trained on its activations.
    options: of open_target"""
    model, text = pick(ModelChoice, cfg), pick(TextChoice, cfg)
    target = targets.open_target(model, text, cfg.activations_dir, device=device, **options)
    recipe = recipes.recipe_on(target, pick(Reading, cfg), pick(Optimisation, cfg))
    print(f"{target.introduction()}\n{recipe.held_out.shortage()}", end="", flush=True)
    return target, recipe


if __name__ == "__main__":
    run_as_script(main)
