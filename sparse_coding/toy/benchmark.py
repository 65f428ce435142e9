"""What a run on synthetic worlds says: which family finds the true features, beside the numbers of
others, and how much of the spread is the world's."""

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev, variance

from sparse_coding.figures.frontier import FrontierSpec
from sparse_coding.figures.scatter import ScatterSpec
from sparse_coding.sae.families import FAMILIES
from sparse_coding.sweep.grid import asked_of
from sparse_coding.toy.laws import Data, SynthData

REFERENCES = Path(__file__).parents[2] / "results" / "synthsaebench_reference.json"
METRICS = ("f1", "mcc", "uniqueness", "explained_variance")
SHORT = {"explained_variance": "ev"}
SAMPLES_WITHIN = 0.01  # share by which our samples may be more or fewer than those of a table

TRUTH = ScatterSpec(
    name="truth",
    title="Which family finds the true features",
    explanation="Higher is better: f1 says how well codes tell when a true feature is on. A family "
    "further to the right reconstructs more of x. The two need not agree: what reconstructs best "
    "may do so with codes that mix features.",
    alt="A point for each autoencoder, f1 over explained variance, a colour for each family",
    x="explained_variance",
    y="f1",
    x_label="explained variance (1 − fvu)",
    y_label="f1 against the true features",
)
FIND = FrontierSpec(
    name="frontier_f1",
    title="Codes against true features, by sparsity",
    explanation="Higher is better: how well codes tell when a true feature is on, at which l0. "
    "With fewer codes than features are on, features must share them.",
    alt="Lines of f1 over l0, one for each family and dictionary size",
    column="f1",
    y_label="f1 against the true features",
    upwards=True,
)
SPARSE_BUT_WRONG = (
    FrontierSpec(
        name="frontier_s_dec",
        title="Decoder projection against sparsity",
        explanation="It needs no ground truth: the projection is least at the true number of "
        "features that are on, 11. With fewer codes rows mix correlated features, with more they "
        "have no reason not to.",
        alt="Lines of s_dec over l0, with a minimum",
        column="s_dec",
        y_label="s_dec, n = 18",
        upwards=False,
    ),
    FrontierSpec(
        name="frontier_mcc",
        title="True features found, against sparsity",
        explanation="1 is perfect: each row of the dictionary is a true feature. Below the true l0 "
        "the loss is lower with rows that are wrong.",
        alt="Lines of mcc over l0, with a maximum at the true l0",
        column="mcc",
        y_label="mcc with the true features",
        upwards=True,
    ),
)


def verdict(rows: list[dict], data: SynthData) -> str:
    """One paragraph: which family finds the true features and which reconstructs best; of Sparse
    but Wrong, at which l0 the decoder projection is least."""
    finite = [row for row in rows if math.isfinite(row["mse"]) and not FAMILIES[row["arch"]].frozen]
    if not finite:
        return "All cells diverged: lower the learning rate."
    of_kind = defaultdict(list)
    for row in finite:
        of_kind[row["arch"], row["n_dict"], asked_of(row)].append(row)

    def mean(same: list[dict], metric: str) -> float:
        return fmean(as_trained(row, metric) for row in same)

    if data.n_projection and any(row["s_dec"] is not None for row in finite):
        least = min(of_kind.values(), key=lambda same: mean(same, "s_dec"))
        return (
            f"The decoder projection is least at {asked_of(least[0])}: there rows match true "
            f"features with a mean cosine (mcc) of {mean(least, 'mcc'):.3f}. On average "
            f"{data.true_l0(least[0]['world']):.2f} features are on."
        )
    found = max(of_kind.values(), key=lambda same: mean(same, "f1"))
    rebuilt = max(of_kind.values(), key=lambda same: mean(same, "explained_variance"))
    texts = [
        f"{asked_of(same[0])} (f1 {mean(same, 'f1'):.3f}, mcc {mean(same, 'mcc'):.3f}, explained "
        f"variance {mean(same, 'explained_variance'):.3f})"
        for same in (found, rebuilt)
    ]
    if found is rebuilt:
        return f"True features are found best, and x is reconstructed best, by {texts[0]}."
    return f"True features are found best by {texts[0]}, x is reconstructed best by {texts[1]}."


def references(rows: list[dict], data: Data, n_samples: int) -> list[dict]:
    """Tables of others on this law, these sizes and this world, from results/.

    n_samples: that the rows were trained on
    """
    if not isinstance(data, SynthData):
        return []
    sizes = {"law": data.law, "n_true_features": data.n_true_features}
    sizes |= {"activation_dim": data.activation_dim}
    n_dicts = {row["n_dict"] for row in rows}

    def fits(table: dict) -> bool:
        of_others = table["n_samples"]
        return (
            all(table[name] == value for name, value in sizes.items())
            and table["n_dict"] in n_dicts
            and abs(n_samples - of_others) <= SAMPLES_WITHIN * of_others
            and table["world"] in (None, data.identity.get("world_digest"))
        )

    return [table for table in json.loads(REFERENCES.read_text())["tables"] if fits(table)]


def as_trained(row: dict, metric: str) -> float:
    """A metric of a row with codes chosen as in training, as benchmarks have it."""
    if metric == "explained_variance":
        fvu = row["fvu"] if row["fvu_trained"] is None else row["fvu_trained"]
        return 1 - fvu
    chosen = row.get(f"{metric}_trained")
    return row[metric] if chosen is None else chosen


def comparison(rows: list[dict], table: dict) -> Iterator[tuple[dict, str, list[float], float]]:
    """(row of the table, metric, ours by seed, how far our mean may be off).

    That is the table's tolerance, and without one two standard errors of the difference; of a
    single autoencoder of ours the spread is theirs.
    """
    for theirs in table["rows"]:
        same = [
            row
            for row in rows
            if (row["arch"], row["target_l0"]) == (theirs["arch"], theirs["target_l0"])
            and row["n_dict"] == table["n_dict"]
        ]
        for metric in METRICS if same else ():
            ours = [as_trained(row, metric) for row in same]
            sd = theirs[metric][1]
            own = stdev(ours) if ours[1:] else sd
            error = math.hypot(own / len(ours) ** 0.5, sd / table["n_runs"] ** 0.5)
            yield theirs, metric, ours, table["tolerance"] or 2 * error


def print_comparisons(rows: list[dict], tables: list[dict]) -> None:
    """Ours beside theirs, a verdict for each number."""
    for table in tables:
        print(f"{table['name']}; mean ± sd of {table['n_runs']} runs of theirs")
        print("arch          l0  metric           ours          theirs  difference")
        for theirs, metric, ours, allowed in comparison(rows, table):
            mean, sd = theirs[metric]
            difference = fmean(ours) - mean
            spread = f" ± {stdev(ours):.4f}" if ours[1:] else " " * 9
            verdict = "pass" if abs(difference) <= allowed else "FAIL"
            print(
                f"{theirs['arch']:10} {theirs['target_l0']:5g}  {SHORT.get(metric, metric):10}"
                f"  {fmean(ours):.4f}{spread}  {mean:.4f} ± {sd:.4f}"
                f"  {difference:+.4f}  {verdict} (± {allowed:.4f})"
            )


def spread(rows: list[dict]) -> Iterator[tuple[str, str, float, float, float]]:
    """(arch, metric, mean, sd between worlds, sd between seeds of a world), where there are several
    of both; of the smallest dictionary and sparsity.

    The sd between worlds is that of a one-way random-effects model: the variance of the means of
    worlds less what seeds alone give it, at least 0.
    """
    of_arch: dict[str, dict[int, list[dict]]] = defaultdict(lambda: defaultdict(list))
    first = {}
    for row in rows:
        kind = row["n_dict"], row["target_l0"], row["l1_alpha"] if not row["target_l0"] else None
        if first.setdefault(row["arch"], kind) == kind and not FAMILIES[row["arch"]].frozen:
            of_arch[row["arch"]][row["world"]].append(row)
    for arch, of_world in of_arch.items():
        worlds = list(of_world.values())
        if len(worlds) < 2 or min(map(len, worlds)) < 2:
            continue
        for metric in METRICS:
            values = [[as_trained(row, metric) for row in world] for world in worlds]
            within = fmean(map(variance, values))
            between = variance(map(fmean, values)) - within / len(values[0])
            mean = fmean(map(fmean, values))
            yield arch, metric, mean, max(0.0, between) ** 0.5, within**0.5


def print_spread(rows: list[dict]) -> None:
    """How much of the spread is the world's, where there are several."""
    found = list(spread(rows))
    if found:
        n_worlds = len({row["world"] for row in rows})
        print(f"spread over {n_worlds} worlds, and over the seeds of one")
        print("arch                metric        mean  sd of worlds  sd of seeds  world's share")
    for arch, metric, mean, between, within in found:
        total = between**2 + within**2
        share = f"{between**2 / total:.0%}" if total else "-"
        name = SHORT.get(metric, metric)
        print(f"{arch:18}  {name:10}  {mean:.4f}  {between:12.4f}  {within:11.4f}  {share:>13}")
