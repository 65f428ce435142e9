"""features.html: one self-contained page that shows what each feature responds to.

The page needs nothing beside it and no network. The text of the corpus is hostile: it reaches the
page only as compressed data, is made visible here (`visible`) and becomes textContent there.

    payload    base64 of zlib of: uint32 length of the header, header (JSON), arrays
    header     "arrays": {name: [type, offset in bytes after the header, n_numbers]},
               "sizes": the lengths of their axes, "texts": of the tokens by number
"""

import base64
import json
import re
import zlib
from pathlib import Path

import numpy as np

from sparse_coding.config import require
from sparse_coding.figures.report import environment
from sparse_coding.files import write_atomic
from sparse_coding.lm.features.collected import FeatureData

STEPS = 65535  # a code is embedded as a whole number of max_activation / STEPS
MAX_SHOWN = 60  # characters of one token; a run of 500 dashes is one token somewhere
SIGNS = {"\n": "↵", "\t": "→"}
# What is not seen, or changes how the rest is read: controls, soft hyphen, joiners, fillers, line
# separators, directions, variation selectors, halves of surrogate pairs, tags.
UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u2028-\u202e\u2060-\u206f\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
    "\U000e0000-\U000e0fff]"
)


def write_feature_page(
    path: Path,
    data: FeatureData,
    *,
    token_texts: list[str],
    title: str,
    facts: dict[str, str | float],
) -> None:
    """Writes the page atomically.

    `facts` says what was looked at, a line each: {"model": ..., "site": ..., "SAE": ...}.

    Raises:
        UserError: a token of the data has no text.
    """
    templates = environment(Path(__file__).parent, short=_short, grouped=_grouped)
    html = templates.get_template("page_template.html").render(
        title=title,
        facts=facts,
        n_dict=len(data.n_active),
        n_dead=int((data.n_active == 0).sum()),
        n_tokens=data.n_tokens,
        payload=base64.b64encode(_payload(data, token_texts)).decode("ascii"),
    )
    write_atomic(path, html)


def visible(text: str) -> str:
    """The text with a sign for everything that would not be seen or would change its reading.

    >>> visible("if x:\\n\\treturn\\u202e")
    'if x:↵→return⟨202E⟩'
    """
    return UNSEEN.sub(lambda match: SIGNS.get(match[0], f"⟨{ord(match[0]):04X}⟩"), text)


def _token_text(text: str) -> str:
    shown = visible(text[: MAX_SHOWN + 1])
    return shown[:MAX_SHOWN] + "…" if len(shown) > MAX_SHOWN else shown


def _payload(data: FeatureData, token_texts: list[str]) -> bytes:
    """The data as the page's script reads it: see the module's docstring."""
    arrays = _arrays(data)
    entries, blobs, offset = {}, [], 0
    for name, array in arrays.items():
        blob = array.tobytes()
        blob += bytes(-len(blob) % 8)  # a typed array begins at a multiple of its item's size
        entries[name] = [array.dtype.str.lstrip("<|"), offset, array.size]
        blobs.append(blob)
        offset += len(blob)
    n_top, n_window = data.top.codes.shape[1:]
    header = {
        "arrays": entries,
        "texts": _texts(arrays, token_texts),
        "sizes": {
            "tokens": data.n_tokens,
            "length": data.tokens.shape[1],
            "before": data.n_before,
            "window": n_window,
            "top": n_top,
            "sampled": data.sampled.codes.shape[1],
            "bins": data.histogram.shape[1],
            "steps": STEPS,
        },
    }
    head = json.dumps(header, separators=(",", ":")).encode()  # ASCII: others are \\u escapes
    head += b" " * (-(len(head) + 4) % 8)
    size = len(head).to_bytes(4, "little")
    return zlib.compress(b"".join([size, head, *blobs]), 9)


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
