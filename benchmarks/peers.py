"""Training loops of others. For toy_speed.py: each returns a function that makes n steps on xs; for
family_speed.py: each returns a function that makes the i-th step, on x. And the worlds of SAELens,
for world_speed.py."""

import importlib
import os
import sys
import types
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

H, BATCH = 256, 256
MIDDLE = 10**-1.0  # l1_alpha; what they do does not depend on how sparse it gets


class Loop2023(nn.Module):
    """Per batch what the replication of June 2023 does: unit columns before the forward pass, an
    unfused Adam, two losses fetched as numbers."""

    def __init__(self, n_dict: int):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(H, n_dict), nn.ReLU())
        self.decode = nn.Linear(n_dict, H, bias=False)
        nn.init.orthogonal_(self.decode.weight)
        self.adam = torch.optim.Adam(self.parameters(), lr=1e-3)
        self.seen = 0.0

    def step_(self, x: Tensor) -> None:
        codes = self.encode(x)
        self.decode.weight.data = nn.functional.normalize(self.decode.weight.data, dim=0)
        mse = nn.functional.mse_loss(self.decode(codes), x)
        l1 = MIDDLE / codes.shape[1] * codes.abs().sum(dim=1).mean()
        self.adam.zero_grad()
        (mse + l1).backward()
        self.adam.step()
        self.seen += mse.item() + l1.item()


def loop_2023(n_dict: int, xs: Iterator[Tensor]) -> Callable[[int], None]:
    loop = Loop2023(n_dict)
    return lambda n: [loop.step_(next(xs)) for _ in range(n)]


def dictionary_learning(n_dict: int, xs: Iterator[Tensor]) -> Callable[[int], None]:
    from dictionary_learning.trainers.standard import StandardTrainer

    trainer = StandardTrainer(
        steps=10**6, activation_dim=H, dict_size=n_dict, layer=0, lm_name="toy", device="cpu"
    )
    count = iter(range(10**6))
    return lambda n: [trainer.update(next(count), next(xs)) for _ in range(n)]


def sae_lens(n_dict: int, xs: Iterator[Tensor]) -> Callable[[int], None]:
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training import sae_trainer

    sae_trainer.tqdm = lambda *args, **options: _Quiet()
    sae = StandardTrainingSAE(
        StandardTrainingSAEConfig(d_in=H, d_sae=n_dict, l1_coefficient=MIDDLE)
    )

    def run(n: int) -> None:
        settings = SAETrainerConfig(
            total_training_samples=n * BATCH,
            train_batch_size_samples=BATCH,
            lr=1e-3,
            lr_end=1e-4,
            logger=LoggingConfig(log_to_wandb=False),
        )
        sae_trainer.SAETrainer(settings, sae, xs).fit()

    return run


class _Quiet:
    """A progress bar that shows nothing."""

    def __getattr__(self, name: str) -> Callable:
        return lambda *args, **options: None


OTHERS = {"loop of 2023": loop_2023, "dictionary_learning": dictionary_learning,
          "sae_lens": sae_lens}  # fmt: skip


CPU = torch.device("cpu")
PREFIXES = (1 / 32, 1 / 8, 1 / 2, 1)  # of Matryoshka's features
FAULTS = (
    ImportError,
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
)  # of theirs


def _lens_family(arch: str, **settings: object) -> Callable:
    """A trainer of SAELens's class of that name, with the settings of its own trainer."""

    def trainer(
        width: int, n_dict: int, k: int, n_dead: int, device: torch.device = CPU, *,
        compiled: bool = False,
    ) -> Callable[[int, Tensor], None]:  # fmt: skip
        import sae_lens
        from sae_lens.saes.sae import TrainStepInput

        cls, config = (getattr(sae_lens, f"{arch}TrainingSAE{end}") for end in ("", "Config"))
        of_family = {"k": k} if "TopK" in arch else {}
        if "Matryoshka" in arch:
            of_family["matryoshka_widths"] = [int(share * n_dict) for share in PREFIXES]
        sae = cls(config(d_in=width, d_sae=n_dict, device=str(device), **of_family, **settings))
        adam = torch.optim.Adam(sae.parameters(), lr=3e-4)
        dead = torch.arange(n_dict, device=device) < n_dead
        forward = sae.training_forward_pass
        if compiled:  # as its compile_sae
            forward = torch.compile(forward)

        def step(i: int, x: Tensor) -> None:
            of_step = TrainStepInput(
                sae_in=x,
                coefficients={"l1": 2.0, "l0": 2.0},
                dead_neuron_mask=dead,
                n_training_steps=i,
                is_logging_step=False,
            )
            adam.zero_grad()
            loss = forward(of_step).loss
            with torch.autocast(device.type, enabled=False):
                loss.backward()
                nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
                adam.step()

        return step

    return trainer


def _dl_family(module: str, cls: str, **settings: object) -> Callable:
    """A trainer of dictionary_learning."""

    def trainer(
        width: int, n_dict: int, k: int, n_dead: int, device: torch.device = CPU, *,
        compiled: bool = False,
    ) -> Callable[[int, Tensor], None]:  # fmt: skip
        # it reads language models, which no trainer does; and it replaces what torch.compile needs
        sys.modules.setdefault("nnsight", types.SimpleNamespace(LanguageModel=None))
        found = importlib.import_module(f"dictionary_learning.trainers.{module}")
        options = dict(steps=10**6, activation_dim=width, dict_size=n_dict, layer=0, lm_name="none")
        options |= {} if module == "standard" else {"k": k}
        one = getattr(found, cls)(**options, device=str(device), warmup_steps=10, **settings)
        if compiled:
            one.loss = torch.compile(one.loss)

        def step(i: int, x: Tensor) -> None:
            if n_dead:
                one.num_tokens_since_fired[:n_dead] = 10**9
            one.update(i, x)

        return step

    return trainer


def _sparsify(
    width: int, n_dict: int, k: int, n_dead: int, device: torch.device = CPU, *,
    compiled: bool = False,
) -> Callable[[int, Tensor], None]:  # fmt: skip
    """What sparsify's trainer does in a step with its own settings: signum, no auxiliary loss."""
    if device.type == "cpu":
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD

    sae = SparseCoder(width, SparseCoderConfig(num_latents=n_dict, k=k), device=device)
    signum = SignSGD(sae.parameters(), lr=5e-3 / (n_dict / 2**14) ** 0.5)
    forward = torch.compile(sae) if compiled else sae
    dead = torch.arange(n_dict, device=device) < n_dead if n_dead else None

    def step(i: int, x: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        found = forward(x, dead_mask=dead)
        with torch.autocast(device.type, enabled=False):
            (found.fvu + found.auxk_loss / 32 if n_dead else found.fvu).backward()
            sae.remove_gradient_parallel_to_decoder_directions()
            signum.step()
            signum.zero_grad()

    return step


# package -> family -> function of (width, n_dict, k, dead features, device, compiled=...)
FAMILIES_OF = {
    "sae_lens": {
        "relu": _lens_family("Standard", l1_coefficient=2.0),
        "topk": _lens_family("TopK"),
        "batchtopk": _lens_family("BatchTopK"),
        "jumprelu": _lens_family("JumpReLU"),
        "matryoshka": _lens_family("MatryoshkaBatchTopK", use_matryoshka_aux_loss=True),
    },
    "dictionary_learning": {
        "relu": _dl_family("standard", "StandardTrainer"),
        "topk": _dl_family("top_k", "TopKTrainer"),
        "batchtopk": _dl_family("batch_top_k", "BatchTopKTrainer"),
        "matryoshka": _dl_family(
            "matryoshka_batch_top_k",
            "MatryoshkaBatchTopKTrainer",
            group_fractions=[1 / 32, 3 / 32, 3 / 8, 1 / 2],
        ),
    },
    "sparsify": {"topk": _sparsify},
}


def world_of_sae_lens(n_features: int, width: int, n_roots: int):
    """Its SyntheticModel with SynthSAEBench's constants, features not made orthogonal.

    Raises:
        ImportError: it isn't installed.
    """
    from sae_lens import synthetic

    config = synthetic.SyntheticModelConfig(
        num_features=n_features,
        hidden_dim=width,
        firing_probability=synthetic.ZipfianFiringProbabilityConfig(
            exponent=0.5, max_prob=0.4, min_prob=5e-4
        ),
        hierarchy=synthetic.HierarchyConfig(
            total_root_nodes=n_roots,
            branching_factor=4,
            max_depth=3,
            mutually_exclusive_portion=1.0,
            mutually_exclusive_min_depth=0,
            compensate_probabilities=True,
            scale_children_by_parent=True,
        ),
        correlation=synthetic.LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
        mean_firing_magnitudes=synthetic.LinearMagnitudeConfig(start=5.0, end=4.0),
        std_firing_magnitudes=synthetic.FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        orthogonalization=None,
        bias=0.5,
        seed=42,
    )
    return synthetic.SyntheticModel(config, device="cpu")
