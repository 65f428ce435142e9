"""Each family against plain autograd in float64, and what decides where codes are equal."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from sparse_coding.sae.ensemble import Ensemble, ensemble_bytes
from sparse_coding.sae.families import (
    AUX,
    BANDWIDTH,
    EMA,
    FAMILIES,
    LP_EPS,
    PREFIXES,
    SLOPE,
    THRESHOLD,
    TRAINED,
    bands,
)
from sparse_coding.sae.spec import L0_CLAMP, L0_GAIN, SAESpec, Schedule, initial_autoencoder
from sparse_coding.sae.stack import largest

CPU = torch.device("cpu")
H, BATCH, N_STEPS, LR = 24, 32, 200, 3e-3
SCHEDULE = Schedule(
    N_STEPS, lr_warmup=5, l1_warmup=10, decay_start=160, anneal=range(40, 120), dead_steps=3
)
OTHERS = sorted(FAMILIES.keys() - {"relu"})
TRANSCODING = [arch for arch in TRAINED if not FAMILIES[arch].refined]


def batches(n: int = N_STEPS, h: int = H, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Sparse non-negative mixtures of 60 directions, of a mean square norm of about 1."""
    rng = torch.Generator().manual_seed(5)
    directions = nn.functional.normalize(torch.randn(60, h, generator=rng, dtype=torch.float64))
    active = torch.rand(n, BATCH, 60, generator=rng) < 0.08
    amounts = torch.rand(n, BATCH, 60, generator=rng, dtype=torch.float64) * active * 0.8
    return list((amounts @ directions).to(dtype))


def pairs(n: int = N_STEPS, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """(2, BATCH, H): x, and a y that is another mixture with a part that is linear in x."""
    rng = torch.Generator().manual_seed(6)
    mix, linear = (torch.randn(H, H, generator=rng, dtype=torch.float64) / H**0.5 for _ in "ab")
    return [
        torch.stack([x, (x @ mix).relu() + 0.5 * x @ linear + 0.1]).to(dtype)
        for x in batches(n, dtype=torch.float64)
    ]


def spec(arch: str, n_dict: int, seed: int = 0) -> SAESpec:
    l1 = {"l1": 2e-3, "lp": 2e-3, "l0_step": 1e-4, "l0_tanh": 3e-4, "none": 0.0}
    weight = l1[FAMILIES[arch].penalty]
    return SAESpec(n_dict, weight, seed, tied=True, target_l0=4 + seed, arch=arch)


class Step(torch.autograd.Function):
    """1[pre > θ] with the straight-through gradient of Rajamanoharan et al. 2024, section 4."""

    @staticmethod
    def forward(ctx, pre: Tensor, theta: Tensor) -> Tensor:
        ctx.save_for_backward(pre, theta)
        return (pre > theta).to(pre.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        pre, theta = ctx.saved_tensors
        window = ((pre - theta).abs() < BANDWIDTH / 2).to(pre.dtype)
        return torch.zeros_like(pre), (-window / BANDWIDTH * grad).sum(dim=0)


class Jump(torch.autograd.Function):
    """pre · 1[pre > θ] with that gradient; samples in rows. Where it goes through the input, the
    window is Anthropic's."""

    @staticmethod
    def forward(ctx, pre: Tensor, theta: Tensor, through_input: bool) -> Tensor:
        ctx.save_for_backward(pre, theta)
        ctx.through_input = through_input
        return pre.relu() * (pre > theta)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, theta = ctx.saved_tensors
        width = 2 / H**0.5 if ctx.through_input else BANDWIDTH
        window = ((pre - theta).abs() < width / 2).to(pre.dtype)
        on = ((pre > theta) & (pre > 0)).to(pre.dtype)
        pull = theta / width * window * grad
        return on * grad + pull * ctx.through_input, -pull.sum(dim=0), None


def k_largest(values: Tensor, k: int) -> Tensor:
    """Mask of the k largest of a vector, of equal ones the first; by a stable sort."""
    order = torch.sort(values, descending=True, stable=True).indices[:k]
    return torch.zeros(len(values), dtype=torch.bool).index_fill_(0, order, True)


class Reference(nn.Module):
    """One autoencoder of any family as the papers write it, features in columns."""

    def __init__(self, m: SAESpec, b_dec: Tensor | None):
        super().__init__()
        self.spec, self.family, self.weight = m, FAMILIES[m.arch], m.l1
        options = dict(tied=m.tied, unit_rows=m.rows == "unit", transcodes=m.transcodes)
        start = initial_autoencoder(H, m.n_dict, m.seed, **options)
        for name, tensor in start.items():
            setattr(self, name, nn.Parameter(tensor.double().clone()))
        self.b_dec = nn.Parameter(b_dec.clone()) if b_dec is not None else torch.zeros(H)
        if m.skip:
            self.W_skip = nn.Parameter(torch.zeros(H, H, dtype=torch.float64))
        if self.family.selection == "jump":
            self.threshold = nn.Parameter(torch.full((m.n_dict,), THRESHOLD, dtype=torch.float64))
        self.silent = torch.zeros(m.n_dict, dtype=torch.int64)
        self.smallest = self.smallest_of_first = None
        self.n_revived = 0
        self.rate = torch.zeros(m.n_dict, dtype=torch.float64)
        if m.rows == "unit":
            self.W_dec.data /= self.W_dec.data.norm(dim=1, keepdim=True)

    @torch.no_grad()
    def normalise_(self) -> None:
        if self.spec.rows == "unit":
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
        if self.family.selection == "jump":
            self.threshold.clamp_(min=0)

    @property
    def lengths(self) -> Tensor | float:
        """By which codes count; has a gradient."""
        return self.W_dec.norm(dim=1) if self.spec.rows == "free" else 1.0

    def codes(self, pre: Tensor, step: int) -> Tensor:
        kind, k = self.family.selection, self.spec.target_l0
        if self.family.refined:  # falls from 2.4 k over 180 steps, by a factor in float32
            factor = 2.4 + (1 - 2.4) * min(1.0, step / N_STEPS / 0.9)
            k = k * torch.tensor(factor, dtype=torch.float32).item()
        if kind == "jump":
            return Jump.apply(pre, self.threshold, self.family.through_input)
        positive = pre.relu()
        compared = (positive * self.lengths).detach()
        if kind == "topk":
            return positive * torch.stack([k_largest(row, int(k)) for row in compared])
        if kind == "batchtopk":  # of equal ones the lowest feature, then the lowest sample
            chosen = k_largest(compared.T.flatten(), int(k * len(pre)))
            return positive * chosen.view(positive.T.shape).T
        return positive

    def penalty(self, pre: Tensor, codes: Tensor, p: float) -> Tensor:
        on, codes = codes > 0, codes * self.lengths
        if self.family.penalty == "l1":
            return codes.sum()
        if self.family.penalty == "lp":
            return ((codes[on] + LP_EPS) ** p).sum()
        if self.family.penalty == "l0_step":
            return Step.apply(pre, self.threshold).sum()
        if self.family.penalty == "l0_tanh":
            return torch.tanh(SLOPE * H**0.5 * codes).sum()
        return torch.zeros(())

    def adapt_(self, codes: Tensor, step: int) -> None:
        """The weight as p falls and toward the target; which features are silent."""
        powers = [codes[codes > 0] + LP_EPS] * 2
        before, now = SCHEDULE.p(step - 1), SCHEDULE.p(step)
        if self.family.penalty == "lp" and now != before:
            self.weight *= float((powers[0] ** before).sum() / (powers[1] ** now).sum())
        if self.spec.l1 and step >= 10:
            off = float((codes > 0).sum()) / len(codes) / self.spec.target_l0
            self.weight *= min(max(off, 1 / L0_CLAMP), L0_CLAMP) ** L0_GAIN
        if self.family.selection == "batchtopk":
            self.smallest = self.moved(self.smallest, codes)

    def backward(self, x: Tensor, step: int) -> None:
        x, y = x if self.spec.transcodes else (x, x)
        encoded = x if self.spec.transcodes else x - self.b_dec
        pre = encoded @ self.W_enc.T + self.b_enc
        skipped = x @ self.W_skip.T if self.spec.skip else 0.0
        if self.family.refined:
            first = self.codes(pre, step)
            self.smallest_of_first = self.moved(self.smallest_of_first, first.detach())
            r = x - self.b_dec - first @ self.W_dec
            pre = pre + 0.3 * r @ self.W_enc.T
        codes = self.codes(pre, step)
        self.adapt_(codes.detach(), step)
        errors = [
            y - codes[:, :end] @ self.W_dec[:end] - self.b_dec - skipped
            for _, end in bands(self.spec.n_dict, PREFIXES if self.family.nested else (1.0,))
        ]
        loss = (
            self.of_ranks(x, codes) if self.family.refined else sum((e**2).mean() for e in errors)
        )
        weight = self.weight * min(1, step / 10)
        loss = loss + weight * self.penalty(pre, codes, SCHEDULE.p(step)) / len(x)
        dead = self.silent >= SCHEDULE.dead_steps
        if self.family.aux and dead.any():
            of_dead = pre.relu() * dead
            compared = (of_dead * self.lengths).detach()
            chosen = torch.stack([k_largest(row, H // 2) for row in compared])
            left_over = errors[-1].detach()
            loss = loss + AUX * ((left_over - (of_dead * chosen) @ self.W_dec) ** 2).mean()
        loss.backward()
        fired = (codes > 0).any(dim=0)
        self.n_revived += int((fired & dead).sum())
        self.silent = torch.where(fired, 0, self.silent + 1)

    def moved(self, smallest: float | None, codes: Tensor) -> float:
        """The running mean of the smallest code."""
        least = (codes * self.lengths)[codes > 0].min().item()
        old = least if smallest is None else smallest
        return old + EMA * (least - old)

    def of_ranks(self, x: Tensor, codes: Tensor) -> Tensor:
        """Errors of the whole and of inner prefixes of the features by how often they fire, of
        which each sees those before it without a gradient; large errors count more."""
        self.rate = 0.99 * self.rate + 0.01 * (codes > 0).double().mean(dim=0)
        order = self.rate.argsort(descending=True, stable=True)
        errors, x_hat = [x - codes @ self.W_dec - self.b_dec], self.b_dec
        for first, end in bands(self.spec.n_dict, PREFIXES)[:-1]:
            x_hat = x_hat + codes[:, order[first:end]] @ self.W_dec[order[first:end]]
            errors.append(x - x_hat)
            x_hat = x_hat.detach()
        of_samples = [(e**2).mean(dim=1) for e in errors]
        weights = [torch.softmax(0.002 * e.detach() / e.detach().mean(), 0) for e in of_samples]
        return sum((w * e).sum() for w, e in zip(weights, of_samples, strict=True))

    @torch.no_grad()
    def project_(self) -> None:
        self.W_dec.grad -= (self.W_dec.grad * self.W_dec).sum(1, keepdim=True) * self.W_dec


def train_reference(m: SAESpec, xs: list[Tensor], b_dec: Tensor | None) -> Reference:
    sae = Reference(m, b_dec)
    adam = torch.optim.Adam(sae.parameters(), lr=LR, foreach=False, fused=False)
    for step, x in enumerate(xs):
        # written out, not by Schedule: rises over 5 steps, falls from step 160 to 200
        adam.param_groups[0]["lr"] = LR * min(1, (step + 1) / 6) * min(1, (200 - step) / 40)
        adam.zero_grad()
        sae.backward(x, step)
        if b_dec is not None and m.rows == "unit":
            sae.project_()
        if sae.family.frozen:
            sae.W_dec.grad.zero_()
        adam.step()
        sae.normalise_()
    return sae


def trained(specs: list[SAESpec], xs: list[Tensor], **options) -> Ensemble:
    dtype = xs[0].dtype
    ensemble = Ensemble(specs, H, lr=LR, device=CPU, dtype=dtype, schedule=SCHEDULE, **options)
    for x in xs:
        ensemble.step_(x)
    return ensemble


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("choices", [{"selection": "jump"}, {"penalty": "l1"}])
def test_a_combination_without_gradients_is_refused(choices):
    with pytest.raises(ValueError, match="those of a k, without a penalty"):
        replace(FAMILIES["matryoshka_refined"], **choices)


@pytest.mark.parametrize(
    ("arch", "n_dict", "rows"),
    [(arch, n_dict, "unit") for arch in OTHERS for n_dict in (40, 96)]
    + [(arch, 40, "free") for arch in TRAINED]
    + [(arch, 40, "raw") for arch in ("topk", "batchtopk", "matryoshka", "matryoshka_refined")],
)
def test_a_family_equals_plain_autograd_after_200_steps(arch, n_dict, rows):
    xs = batches()
    b_dec = torch.cat(xs).mean(dim=0)
    specs = [replace(spec(arch, n_dict, seed), rows=rows) for seed in (0, 1)]
    ensemble = trained(specs, xs, b_dec=b_dec, project=True)
    for i, m in enumerate(specs):
        sae = train_reference(m, xs, b_dec)
        found = ensemble.dictionary(i)
        n = 1.0 if rows == "unit" else sae.W_dec.norm(dim=1)
        of_code = n if rows == "raw" else 1.0  # thresholds compare codes
        expected = {"W_enc": sae.W_enc.T * n, "b_enc": sae.b_enc * n, "W_dec": (sae.W_dec.T / n).T}
        expected["b_dec"] = sae.b_dec
        if rows != "unit":
            assert (n - 1).abs().max() > 0.1
        if FAMILIES[arch].selection == "jump":
            expected["threshold"] = sae.threshold * n
            assert sae.threshold.std() > 0  # it has learnt
        if FAMILIES[arch].selection == "batchtopk":
            smallest = torch.full((n_dict,), sae.smallest, dtype=torch.float64)
            expected["threshold"] = smallest * of_code
        if FAMILIES[arch].refined:
            first = torch.full((n_dict,), sae.smallest_of_first, dtype=torch.float64)
            expected["first_threshold"] = first * of_code
        assert found.keys() == expected.keys()
        for name, parameter in expected.items():
            assert distance(found[name], parameter.detach()) < 1e-9, name
        assert ensemble.l1(i) == pytest.approx(sae.weight, rel=1e-9)
        assert ensemble.n_revived(i) == sae.n_revived
        if FAMILIES[arch].aux:
            assert sae.n_revived > 0  # the auxiliary loss was at work


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("arch", TRANSCODING)
def test_a_transcoder_of_any_family_equals_plain_autograd_after_200_steps(arch, skip):
    xs = pairs()
    b_dec = torch.cat([y for _, y in xs]).mean(dim=0)
    m = replace(spec(arch, 40), transcodes=True, skip=skip)
    found = trained([m], xs, b_dec=b_dec, project=True)
    sae = train_reference(m, xs, b_dec)
    expected = {name: getattr(sae, name) for name in ("b_enc", "W_dec", "b_dec")}
    expected["W_enc"] = sae.W_enc.T
    if FAMILIES[arch].selection == "jump":
        expected["threshold"] = sae.threshold
    if skip:
        expected["W_skip"] = sae.W_skip
        assert sae.W_skip.norm() > 0.5  # of a y whose linear part is half as long as x
    dictionary = found.dictionary(0)
    for name, parameter in expected.items():
        assert distance(dictionary[name], parameter.detach()) < 1e-9, name
    x, y = xs[-1]
    _, y_hat = found.stacks[0].forward(x)
    if FAMILIES[arch].selection != "jump":  # whose codes the reference makes with a gradient
        codes = sae.codes(x @ sae.W_enc.T + sae.b_enc, N_STEPS)
        by_hand = codes @ sae.W_dec + sae.b_dec + (x @ sae.W_skip.T if skip else 0.0)
        assert distance(y_hat[0], by_hand.detach()) < 1e-9
    assert (y_hat[0] - y).square().mean() < 0.7 * (y - y.mean(dim=0)).square().mean()
    if FAMILIES[arch].aux:
        assert sae.n_revived > 0  # the auxiliary loss was at work


def test_a_skip_connection_learns_what_is_linear_in_x():
    """y = A x + 0.3, with l1 so strong that no code is left."""
    A = torch.randn(H, H, generator=torch.Generator().manual_seed(2), dtype=torch.float64) / H**0.5
    xs = [torch.stack([x, x @ A.T + 0.3]) for x in batches(400)]
    m = SAESpec(40, 10.0, 0, tied=True, transcodes=True, skip=True)
    ensemble = Ensemble([m], H, lr=2e-2, device=CPU, dtype=torch.float64, b_dec=torch.zeros(H))
    for x in xs:
        ensemble.step_(x)
    found = ensemble.dictionary(0)
    assert distance(found["W_skip"], A) < 1e-2
    assert (found["b_dec"] - 0.3).abs().max() < 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(skip=True), "a skip connection is a transcoder's"),
        (dict(transcodes=True, arch="matryoshka_refined"), "neither refines"),
        (dict(transcodes=True, x_scale=2.0), "nor scales its x"),
    ],
)
def test_a_transcoder_without_formulas_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SAESpec(40, 0.0, 0, **options)


@pytest.mark.parametrize("arch", ["topk", "batchtopk", "matryoshka"])
def test_without_b_dec_and_projection_too(arch):
    xs = batches(60)
    m = spec(arch, 40)
    found = trained([m], xs).dictionary(0)
    sae = train_reference(m, xs, None)
    for name, parameter in {"W_enc": sae.W_enc.T, "W_dec": sae.W_dec}.items():
        assert distance(found[name], parameter.detach()) < 1e-9, name


def test_of_equal_codes_the_lowest_feature_then_the_lowest_sample_is_chosen():
    """x of ones, and an encoder that gives equal pre-activations wherever it can."""
    x = torch.ones(3, 8)
    for arch, k, expected in (
        ("topk", 2, [[1, 1, 0, 0]] * 3),
        ("batchtopk", 5 / 3, [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]]),
    ):
        m = SAESpec(4, 0.0, 0, tied=True, target_l0=k, arch=arch)
        ensemble = Ensemble([m], 8, lr=LR, device=CPU)
        stack = ensemble.stacks[0]
        stack.W_enc.fill_(0.25)
        codes, _ = stack.forward(x)
        assert torch.equal(codes[0].T, 2 * torch.tensor(expected).float()), arch


def test_a_k_beyond_what_is_positive_takes_that_alone():
    m = SAESpec(4, 0.0, 0, tied=True, target_l0=3, arch="topk")
    stack = Ensemble([m], 8, lr=LR, device=CPU).stacks[0]
    stack.W_enc.fill_(-1)
    stack.W_enc[0, 2] = 1
    codes, _ = stack.forward(torch.ones(2, 8))
    assert torch.equal(codes[0] > 0, torch.tensor([[False] * 2] * 2 + [[True] * 2] + [[False] * 2]))


def test_largest_is_a_stable_sort():
    rng = torch.Generator().manual_seed(0)
    values = torch.randint(0, 4, (50, 30), generator=rng).float()
    for n in (0, 1, 7, 30, 99):
        expected = torch.stack([k_largest(row, n) for row in values])
        assert torch.equal(largest(values, n), expected), n


def test_prefixes_are_shares_of_the_dictionary_and_ascend():
    assert bands(4096, PREFIXES) == [(0, 128), (128, 512), (512, 2048), (2048, 4096)]
    assert bands(4096) == [(0, 4096)]
    for n in range(1, 70):  # small ones have fewer
        ends = [end for _, end in bands(n, PREFIXES)]
        assert ends[-1] == n
        assert all(a < b for a, b in itertools.pairwise([0, *ends]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_families_in_one_ensemble_have_the_bits_that_they_have_alone(dtype):
    specs = [spec(arch, n, seed) for n in (48, 96) for arch in FAMILIES for seed in (0, 1)]
    xs = batches(60, dtype=dtype)
    b_dec = torch.cat(xs).mean(dim=0)
    together = trained(specs, xs, b_dec=b_dec, project=True)
    for i in range(0, len(specs), 3):
        alone = trained([specs[i]], xs, b_dec=b_dec, project=True)
        for name, tensor in together.dictionary(i).items():
            assert torch.equal(tensor, alone.dictionary(0)[name]), (specs[i], name)
        assert together.l1(i) == alone.l1(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_transcoders_in_one_ensemble_have_the_bits_that_they_have_alone(dtype):
    specs = [
        replace(spec(arch, n, seed), transcodes=True, skip=True)
        for n in (48, 96)
        for arch in TRANSCODING
        for seed in (0, 1)
    ]
    xs, b_dec = pairs(60, dtype=dtype), torch.full((H,), 0.1)
    together = trained(specs, xs, b_dec=b_dec, project=True)
    for i in range(0, len(specs), 3):
        alone = trained([specs[i]], xs, b_dec=b_dec, project=True)
        for name, tensor in together.dictionary(i).items():
            assert torch.equal(tensor, alone.dictionary(0)[name]), (specs[i], name)


def test_free_rows_train_beside_rows_of_length_one():
    """In float32, where relu has kernels, which know rows of length 1 only."""
    specs = [replace(spec("relu", 48), rows=rows) for rows in ("free", "unit")]
    xs = batches(60, dtype=torch.float32)
    together = trained(specs, xs)
    assert [stack.unit_rows for stack in together.stacks] == [False, True]
    for i, one in enumerate(specs):
        alone = trained([one], xs)
        for name, tensor in together.dictionary(i).items():
            assert torch.equal(tensor, alone.dictionary(0)[name]), name
    rows = together.stacks[0].W_dec[0]
    assert (rows.norm(dim=1) - 1).abs().max() > 0.01
    assert torch.allclose(together.dictionary(0)["W_dec"].norm(dim=1), torch.ones(48))


def test_state_loaded_into_a_new_ensemble_continues_with_the_same_bits():
    specs = [spec(arch, 48) for arch in FAMILIES]
    xs = batches(80, dtype=torch.float32)
    options = dict(b_dec=torch.full((H,), 0.01), project=True)
    straight = trained(specs, xs[:50], **options)
    state = {name: tensor.clone() for name, tensor in straight.state().items()}
    resumed = trained(specs, [xs[0]], **options)  # its own state, which is replaced
    resumed.load_state_(state)
    for x in xs[50:]:
        straight.step_(x)
        resumed.step_(x)
    for name, tensor in straight.state().items():
        assert torch.equal(tensor, resumed.state()[name]), name


@pytest.mark.parametrize("transcodes", [False, True])
@pytest.mark.parametrize("arch", OTHERS)
def test_memory_plan_covers_what_a_family_holds(arch, transcodes):
    if transcodes and FAMILIES[arch].refined:
        pytest.skip("refined families are autoencoders' alone")
    kinds = [(arch, 96), (arch, 96), ("relu", 96)]
    ensemble = Ensemble(
        [
            replace(spec(a, n, i), transcodes=transcodes, skip=transcodes)
            for i, (a, n) in enumerate(kinds)
        ],
        H,
        lr=LR,
        device=CPU,
        b_dec=torch.zeros(H),
        schedule=SCHEDULE,
    )
    for x in (pairs if transcodes else batches)(8, dtype=torch.float32):
        ensemble.step_(x)
    held = [t for name, t in ensemble.state().items() if "step" not in name]
    held += ensemble.scratch.flat.values()
    allocated = sum(t.numel() * t.element_size() for t in held)
    planned = ensemble_bytes(kinds, H, BATCH, CPU, transcodes=transcodes)
    assert allocated <= planned <= 4 * allocated
