"""One self-contained page that shows what each feature of an autoencoder responds to.

The page needs nothing beside it and no network. The text of the corpus and the names of features
are hostile: they reach the page only as data, are made visible here (`visible`) and become
textContent there. What takes space is unpacked when a feature of it is looked at.

    summary    a pack: what the list needs of all features
    block i    a pack: the rest, of the features from i * BLOCK on
    pack       base64 of zlib of: uint32 length of the header, header (JSON), arrays
    header     "arrays": {name: [type, offset in bytes after the header, n_numbers]};
               that of the summary: "sizes": the lengths of their axes, "texts": of the tokens by
               number
    named      JSON: "cell", "checksum" and "names" as names.py reads them from a file, and
               "n_named": how many names each autoencoder of the run has
"""

import base64
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from sparse_coding.config import require
from sparse_coding.figures.report import environment
from sparse_coding.files import write_atomic
from sparse_coding.lm.features.collected import FeatureData
from sparse_coding.lm.features.names import LONGEST

BLOCK = 256  # features that are unpacked at a time: some 90 KB of the page
LEVEL = 7  # of compression: 9 saves 2 % more in eight times the time
STEPS = 65535  # a code is embedded as a whole number of max_activation / STEPS
MAX_SHOWN = 60  # characters of one token; a run of 500 dashes is one token somewhere
OF_SUMMARY = ("n_active", "max", "tokens", "top_filled", "top_row", "top_position")
NAMED = re.compile('(<script type="application/json" id="named">)([^<]*)(</script>)')
SIGNS = {"\n": "↵", "\t": "→"}
# What is not seen, or changes how the rest is read: controls, soft hyphen, joiners, fillers, line
# separators, directions, variation selectors, halves of surrogate pairs, tags.
UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u2028-\u202e\u2060-\u206f\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
    "\U000e0000-\U000e0fff]"
)


@dataclass(frozen=True)
class PageLink:
    """One page of a run: cell, what stands in the list of them, address relative to this page."""

    cell: str
    text: str
    href: str


@dataclass(frozen=True)
class Place:
    """Which autoencoder of which run a page is of.

    checksum: of its weights
    pages: of all autoencoders of the run that have one, this one too, in the order of the list
    report: address of the run's report, relative to this page
    names: cell -> feature -> name
    """

    cell: str
    checksum: str
    pages: tuple[PageLink, ...]
    report: str
    names: dict[str, dict[int, str]]


def write_feature_page(
    path: Path,
    data: FeatureData,
    *,
    token_texts: list[str],
    title: str,
    facts: dict[str, str | float],
    place: Place,
) -> None:
    """Writes the page atomically.

    `facts` says what was looked at, a line each: {"model": ..., "site": ..., "SAE": ...}.

    Raises:
        UserError: a token of the data has no text.
    """
    templates = environment(Path(__file__).parent, short=_short, grouped=_grouped)
    arrays = _arrays(data)
    html = templates.get_template("page_template.html").render(
        title=title,
        facts=facts,
        n_dict=len(data.n_active),
        n_dead=int((data.n_active == 0).sum()),
        n_tokens=data.n_tokens,
        place=place,
        longest_name=LONGEST,
        named=_named(place.cell, place.checksum, place.names),
        summary=_summary(data, arrays, token_texts),
        blocks=_blocks(arrays, len(data.n_active)),
    )
    write_atomic(path, html)


def write_names(path: Path, names: dict[str, dict[int, str]]) -> bool:
    """Writes the page of write_feature_page again, with these names in place of its own; False if
    it is none.

    names: as in Place
    """
    try:
        html = path.read_bytes().decode()
        parts = NAMED.split(html)
        known = json.loads(parts[2])
        parts[2] = _named(known["cell"], known["checksum"], names)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False
    if len(parts) != 5 or not html.endswith("</html>\n"):
        return False
    write_atomic(path, "".join(parts))
    return True


def _named(cell: str, checksum: str, names: dict[str, dict[int, str]]) -> Markup:
    """The JSON of a page's names, in which nothing ends the element that it stands in."""
    own = {str(feature): visible(name) for feature, name in sorted(names.get(cell, {}).items())}
    n_named = {name: len(of_cell) for name, of_cell in names.items()}
    content = {"cell": cell, "checksum": checksum, "names": own, "n_named": n_named}
    return htmlsafe_json_dumps(content, sort_keys=False)


def visible(text: str) -> str:
    """The text with a sign for everything that would not be seen or would change its reading.

    >>> visible("if x:\\n\\treturn\\u202e")
    'if x:↵→return⟨202E⟩'
    """
    return UNSEEN.sub(lambda match: SIGNS.get(match[0], f"⟨{ord(match[0]):04X}⟩"), text)


def _token_text(text: str) -> str:
    shown = visible(text[: MAX_SHOWN + 1])
    return shown[:MAX_SHOWN] + "…" if len(shown) > MAX_SHOWN else shown


def _summary(data: FeatureData, arrays: dict[str, np.ndarray], token_texts: list[str]) -> str:
    """What the page's list needs of all features."""
    n_top, n_window = data.top.codes.shape[1:]
    sizes = {
        "features": len(data.n_active),
        "block": BLOCK,
        "tokens": data.n_tokens,
        "length": data.tokens.shape[1],
        "before": data.n_before,
        "window": n_window,
        "top": n_top,
        "sampled": data.sampled.codes.shape[1],
        "bins": data.histogram.shape[1],
        "steps": STEPS,
    }
    of_all = {name: arrays[name] for name in OF_SUMMARY}
    return _packed(of_all, sizes=sizes, texts=_texts(arrays, token_texts))


def _blocks(arrays: dict[str, np.ndarray], n_dict: int) -> list[str]:
    """What the page shows of one feature, BLOCK of them together."""
    of_one = {name: array for name, array in arrays.items() if name not in OF_SUMMARY}
    starts = range(0, n_dict, BLOCK)
    return [_packed({k: v[i : i + BLOCK] for k, v in of_one.items()}) for i in starts]


def _packed(arrays: dict[str, np.ndarray], **header: object) -> str:
    """The arrays as the page's script reads them: see the module's docstring."""
    entries, blobs, offset = {}, [], 0
    for name, array in arrays.items():
        blob = array.tobytes()
        blob += bytes(-len(blob) % 8)  # a typed array begins at a multiple of its item's size
        entries[name] = [array.dtype.str.lstrip("<|"), offset, array.size]
        blobs.append(blob)
        offset += len(blob)
    head = json.dumps(header | {"arrays": entries}, separators=(",", ":")).encode()
    head += b" " * (-(len(head) + 4) % 8)
    size = len(head).to_bytes(4, "little")
    return base64.b64encode(zlib.compress(b"".join([size, head, *blobs]), LEVEL)).decode("ascii")


def _arrays(data: FeatureData) -> dict[str, np.ndarray]:
    """All numbers of the page, by the names that its script has for them."""
    arrays = {
        "n_active": _compact(data.n_active),
        "max": data.max_activation.astype("<f4"),
        "histogram": _compact(data.histogram),
        "bin_width": data.bin_width.astype("<f4"),
        "tokens": _compact(data.tokens),
    }
    for name in ("top", "sampled"):
        contexts = getattr(data, name)
        arrays[f"{name}_filled"] = _compact(contexts.n_filled)
        arrays[f"{name}_row"] = _compact(contexts.row)
        arrays[f"{name}_position"] = _compact(contexts.position)
        arrays[f"{name}_codes"] = _in_steps(contexts.codes, data.max_activation)
    for name in ("nearest", "promoted", "suppressed"):
        ranked = getattr(data, name)
        if ranked is not None:
            arrays[f"{name}_index"] = _compact(ranked.index)
            arrays[f"{name}_value"] = ranked.value.astype("<f4")
    return arrays


def _compact(numbers: np.ndarray) -> np.ndarray:
    """Whole numbers >= 0 in the smallest type that JavaScript has for them."""
    largest = int(numbers.max(initial=0))
    return numbers.astype("u1" if largest < 2**8 else "<u2" if largest < 2**16 else "<u4")


def _in_steps(codes: np.ndarray, max_activation: np.ndarray) -> np.ndarray:
    """Codes as multiples of max_activation / STEPS; what is active stays above 0."""
    step = np.where(max_activation > 0, max_activation, 1)[:, None, None] / np.float32(STEPS)
    return np.maximum(np.rint(codes / step).clip(0, STEPS), codes > 0).astype("<u2")


def _texts(arrays: dict[str, np.ndarray], token_texts: list[str]) -> list[str]:
    """The text of each token that the page can show, an empty one for the others."""
    names = [name for name in ("tokens", "promoted_index", "suppressed_index") if name in arrays]
    used = np.unique(np.concatenate([arrays[name].ravel() for name in names])).tolist()
    largest = max(used, default=-1)
    require(
        largest < len(token_texts),
        f"token {largest} has no text: the tokenizer has {len(token_texts)} tokens and is not "
        "the one that the text was tokenised with",
    )
    texts = [""] * (largest + 1)
    for token in used:
        texts[token] = _token_text(token_texts[token])
    return texts


def _short(value: str | float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else visible(str(value))


def _grouped(number: int) -> str:
    r"""
    >>> _grouped(60000)
    '60\u202f000'
    """
    return f"{number:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
