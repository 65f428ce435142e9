"""features.html: complete and escaped as a file, and used in headless Chromium as a reader does."""

import base64
import dataclasses
import json
import re
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.browser import Browser, Page

from sparse_coding.config import UserError
from sparse_coding.lm.features.collected import (
    Contexts,
    FeatureCollector,
    FeatureData,
    Ranked,
    logit_effects,
    nearest_features,
)
from sparse_coding.lm.features.page import (
    PageLink,
    Place,
    visible,
    write_feature_page,
    write_names,
)

N_DICT, LENGTH = 40, 16
DEAD, PLANTED, NUMBERS = 13, 7, 8
ATTACKS = (
    "</script><script>document.title='attacked'</script>",
    "<img src=x onerror=\"document.title='attacked'\">",
    "\"'`${document.title='attacked'}&lt;",
    "\u202eabc\u2066",
    "\u05d0\u05d1\u05d2",  # Hebrew: read from right to left
    "\x00\x07\x7f\x9b\n\t\r",
    "\ud800",  # half of a pair, from a broken decoder
    "\u0301\u0301\u0301",  # combining marks without a letter
    "=" * 500,
    "\u2028\ufeff",
)
WORDS = [" def", "def", "\n", "\t", "1", "2", "class", " return", "(", ")"]
TEXTS = [*WORDS, *(f" word{i}" for i in range(30)), *ATTACKS]
FIRST_ATTACK = len(TEXTS) - len(ATTACKS)
FACTS = {"model": "a <b>model</b>", "layer": 1, "l1_alpha": 0.00031622776601683794}


def make_data() -> FeatureData:
    """40 features on 60 rows: 13 is dead, 7 fires on " def" alone, 8 on "1" and "2"."""
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, len(TEXTS), (60, LENGTH), generator=rng)
    codes = torch.randn(60, LENGTH, N_DICT, generator=rng).sub(1).relu()
    codes[..., DEAD] = 0
    codes[..., PLANTED] = (tokens == 0) * (2.5 + tokens.roll(1, dims=1) / 100)
    codes[..., NUMBERS] = ((tokens == 4) | (tokens == 5)) * 0.001
    collector = FeatureCollector(N_DICT, LENGTH, n_before=6, n_after=4)
    collector.add(tokens, codes)
    W_dec, unembedding = (torch.randn(n, 6, generator=rng) for n in (N_DICT, len(TEXTS)))
    promoted, suppressed = logit_effects(W_dec, lambda d: d @ unembedding.T)
    return dataclasses.replace(
        collector.result(),
        nearest=nearest_features(W_dec),
        promoted=promoted,
        suppressed=suppressed,
    )


def place(names: dict[int, str] | None = None, cells: tuple[str, ...] = ("a",)) -> Place:
    """Of the first of the cells, in a run whose pages lie side by side."""
    links = tuple(PageLink(cell, f"autoencoder {cell}", f"{cell}.html") for cell in cells)
    names = {cells[0]: names} if names else {}
    return Place(cells[0], "0f" * 32, links, "report.html", names)


def write(path: Path, data: FeatureData | None = None, **changes) -> Path:
    arguments = {"token_texts": TEXTS, "title": "Features of a test", "facts": FACTS}
    arguments["place"] = place()
    write_feature_page(path, data or make_data(), **(arguments | changes))
    return path


def unpack(html: str) -> tuple[dict, dict[str, np.ndarray]]:
    """(header of the summary, arrays of all packs) of the page, read as the module's docstring
    says."""
    packs = re.findall(r'<script type="application/octet-stream"[^>]*>([^<]*)</script>', html)
    header, parts = {}, {}
    for packed in packs:
        raw = zlib.decompress(base64.b64decode(packed, validate=True))
        start = 4 + int.from_bytes(raw[:4], "little")
        head = json.loads(raw[4:start])
        header = header or head
        for name, (kind, offset, count) in head["arrays"].items():
            part = np.frombuffer(raw, f"<{kind}", count, start + offset)
            parts.setdefault(name, []).append(part)
    return header, {name: np.concatenate(of_blocks) for name, of_blocks in parts.items()}


# ---- the file


def test_the_page_holds_the_data(tmp_path):
    data = make_data()
    header, arrays = unpack(write(tmp_path / "features.html", data).read_text(encoding="utf-8"))
    assert arrays["n_active"].tolist() == data.n_active.tolist()
    assert arrays["max"].tolist() == data.max_activation.tolist()
    assert arrays["histogram"].tolist() == data.histogram.ravel().tolist()
    assert arrays["nearest_index"].tolist() == data.nearest.index.ravel().tolist()
    assert header["sizes"]["tokens"] == data.n_tokens
    codes = arrays["top_codes"].reshape(data.top.codes.shape)
    step = data.max_activation[:, None, None] / header["sizes"]["steps"]
    np.testing.assert_allclose(codes * step, data.top.codes, atol=float(step.max()))
    assert (codes > 0).tolist() == (data.top.codes > 0).tolist()  # active stays active
    row, position = data.sampled.row[3, 2], data.sampled.position[3, 2]
    at = 3 * header["sizes"]["sampled"] + 2
    assert arrays["sampled_row"][at] * LENGTH + arrays["sampled_position"][at] == (
        row * LENGTH + position
    )
    assert arrays["tokens"].reshape(-1, LENGTH).tolist() == data.tokens.tolist()


def test_the_page_has_the_same_bytes_twice(tmp_path):
    assert write(tmp_path / "a.html").read_bytes() == write(tmp_path / "b.html").read_bytes()


def test_the_page_refers_to_nothing_on_the_network(tmp_path):
    html = write(tmp_path / "features.html").read_text(encoding="utf-8")
    addresses = set(re.findall(r"https?://[^\"]*", html))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name space, never loaded
    assert re.search(r"@import|url\(|\bsrc=|<link", html) is None
    assert "default-src 'none'" in html


def test_text_from_outside_is_escaped(tmp_path):
    attack = ATTACKS[0] + "\u202e"
    path = tmp_path / "features.html"
    html = write(path, title=attack, facts={attack: attack}).read_text(encoding="utf-8")
    assert "<script>document" not in html
    assert html.count("&lt;script&gt;document.title=&#39;attacked&#39;") == 4
    assert "\u202e" not in html
    assert html.count("<script") == 4  # names, two packs and ours


def test_texts_of_unused_tokens_are_left_out(tmp_path):
    texts = [*TEXTS, *["never seen"] * 50000]
    header, _ = unpack(write(tmp_path / "a.html", token_texts=texts).read_text(encoding="utf-8"))
    assert len(header["texts"]) <= len(TEXTS)


def test_a_token_without_text_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"token 4\d has no text: the tokenizer has 40 tokens"):
        write(tmp_path / "features.html", token_texts=TEXTS[:40])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b", "a b"),
        ("\n\t\r", "↵→⟨000D⟩"),
        ("\x00\x1b\x7f\x9b", "⟨0000⟩⟨001B⟩⟨007F⟩⟨009B⟩"),
        ("\u202e\u2066\u200f\u200b", "⟨202E⟩⟨2066⟩⟨200F⟩⟨200B⟩"),
        ("\ud800\U000e0041", "⟨D800⟩⟨E0041⟩"),
        ("été 日本 \ufffd 🙂", "été 日本 \ufffd 🙂"),
    ],
)
def test_what_cannot_be_seen_gets_a_sign(text, shown):
    assert visible(text) == shown


# ---- the browser


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("page") / "features.html")


@pytest.fixture
def page(browser: Browser, path: Path) -> Iterator[Page]:
    browser.open(path)
    yield Page(browser)
    assert browser.complaints() == []
    assert browser.run("document.title") == "Features of a test"  # no attack has run


def test_the_page_opens_on_a_live_feature_and_says_what_it_shows(page):
    assert page.selected() == 0
    assert page.text("#count") == "40 of 40"
    assert page.text("#summary-line") == summary_line(make_data(), 0)
    assert page.browser.run("document.getElementById('status').hidden")
    facts = page.texts(".facts dd")
    assert facts == ["a <b>model</b>", "1", "0.0003162"]
    assert "40 features of one dictionary" in page.text("p")
    assert "1 of them is dead" in page.text("p")


def density(data: FeatureData) -> np.ndarray:
    """(n_dict,) share of the tokens on which the feature is active."""
    return data.n_active / data.n_tokens


def summary_line(data: FeatureData, feature: int) -> str:
    share = f"({data.n_active[feature]} of {data.n_tokens} tokens)"
    return f"density {density(data)[feature]:#.3g} {share}, max {data.max_activation[feature]:#.3g}"


def test_a_planted_feature_shows_its_token_shaded_with_the_value_on_hover(page):
    data = make_data()
    page.filter(str(PLANTED))
    page.browser.key("ArrowDown")
    assert page.selected() == PLANTED
    n_contexts = int(data.top.n_filled[PLANTED] + data.sampled.n_filled[PLANTED])
    assert page.texts(".text .chosen") == [" def"] * n_contexts
    assert set(page.texts(".text .on")) == {" def"}
    strengths = [f"{value:#.3g}" for value in data.top.codes[PLANTED, :, 6]]
    assert page.texts(".contexts .strength")[:8] == strengths
    page.browser.mouse(".text .chosen")
    assert page.text("#tip") == f"{strengths[0]} · token 0  def"
    assert page.browser.run("!tip.hidden && tip.getBoundingClientRect().height > 0")
    shade = "getComputedStyle(document.querySelector('.text .chosen')).backgroundColor"
    assert page.browser.run(shade) == "rgba(240, 140, 40, 0.95)"  # its maximum
    page.browser.mouse(".text .token:not(.on)")
    assert page.text("#tip").startswith("inactive · token ")
    page.browser.mouse("#name")
    assert page.browser.run("tip.hidden")


def test_the_filter_takes_numbers_conditions_and_texts(page):
    data = make_data()
    assert page.filter("13") == [13]
    assert page.filter("max>2.4 density<0.2") == [
        f for f in range(N_DICT) if data.max_activation[f] > 2.4 and density(data)[f] < 0.2
    ]
    assert page.filter("density = 0") == [DEAD]
    as_shown = [f"{value:#.3g}" for value in data.max_activation]
    assert page.filter(f"max={as_shown[3]}") == [
        f for f in range(N_DICT) if as_shown[f] == as_shown[3]
    ]
    assert page.filter("feature>=38") == [38, 39]
    assert page.filter("max>") == list(range(N_DICT))  # not finished yet
    assert page.filter("DEF feature=7") == [7]
    assert page.filter('" def" feature=7') == [7]
    assert page.filter('"\u00a0def" feature=7') == []
    assert page.filter('" DEF"') == []
    assert page.filter('"2" feature=8') == [8]
    newline = page.filter(r"\n")
    assert newline == page.filter("↵") == with_top_token(data, lambda text: "\n" in text)
    assert page.filter("word2") == with_top_token(data, lambda text: "word2" in text)
    assert page.filter("no such token") == []
    assert page.text("#count") == "0 of 40"
    assert page.filter("") == list(range(N_DICT))


def with_top_token(data: FeatureData, wanted) -> list[int]:
    """Features with a top context whose chosen token has a text that is wanted."""
    tokens = data.tokens[data.top.row, data.top.position]
    return [
        feature
        for feature, n in enumerate(data.top.n_filled)
        if any(wanted(TEXTS[token]) for token in tokens[feature, :n])
    ]


def test_the_list_can_be_sorted_and_hides_the_dead(page):
    data = make_data()
    by_max = np.argsort(-data.max_activation, kind="stable").tolist()
    assert page.sort("max -1") == by_max
    assert page.sort("density 1") == np.argsort(density(data), kind="stable").tolist()
    assert page.texts(".option.dead > :last-child") == ["dead"]
    page.browser.mouse("#hide-dead", click=True)
    assert DEAD not in page.features()
    assert page.text("#count") == "39 of 40"


def test_keys_move_through_the_list_and_the_address_follows(page):
    for key, feature in [("ArrowDown", 1), ("ArrowDown", 2), ("ArrowUp", 1), ("End", 39)]:
        page.browser.key(key)
        assert page.selected() == feature
        page.browser.wait(f"location.hash === '#cell=a&f={feature}'")
    page.browser.key("ArrowDown")
    assert page.selected() == 39  # the end
    row = "document.querySelector('.option[aria-selected=true]')"
    assert page.browser.run(f"""(() => {{ const box = {row}.getBoundingClientRect();
        const frame = list.getBoundingClientRect();
        return box.top >= frame.top && box.bottom <= frame.bottom + 1; }})()""")
    active = page.browser.run("list.getAttribute('aria-activedescendant')")
    assert active == page.browser.run(f"{row}.id") == "option-39"


def test_a_click_in_the_list_on_a_button_or_on_a_near_feature_selects(page):
    data = make_data()
    page.browser.mouse("#option-5", click=True)
    assert page.selected() == 5
    page.browser.mouse("#next", click=True)
    assert page.selected() == 6
    assert page.browser.run("document.activeElement.id") == "next"  # for the next Enter
    page.browser.mouse("#body a", click=True)
    page.browser.wait(f"selected === {data.nearest.index[6, 0]}")
    assert page.selected() == data.nearest.index[6, 0]
    page.browser.run("history.back()")
    page.browser.wait("selected === 6")


def test_an_address_opens_its_feature(browser, path):
    browser.open(path, f"#f={DEAD}")
    page = Page(browser)
    assert page.selected() == DEAD
    assert page.text("#summary-line") == "dead: inactive on all 960 tokens"
    assert page.texts(".contexts li") == []
    browser.open(path, "#f=4711")
    assert page.text("#name") == "There is no feature 4711"
    browser.key("ArrowDown")
    assert page.selected() == 0
    assert browser.complaints() == []


# ---- names, other autoencoders, keys


NAMES = {3: "a name", 7: ATTACKS[0], 12: "Zebra \u202e", DEAD: "nothing"}
CELLS = ("a", "seed0_dict000040_l1exp+01", "c")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the first of three autoencoders; beside it are those of the others."""
    folder = tmp_path_factory.mktemp("run")
    here = place(NAMES, CELLS)
    for cell in CELLS:
        path = folder / f"{cell}.html"
        write(path, place=dataclasses.replace(here, cell=cell), facts=FACTS | {"cell": cell})
    return folder / "a.html"


@pytest.fixture
def named(browser: Browser, run: Path) -> Iterator[Page]:
    browser.open(run)
    yield Page(browser)
    assert browser.complaints() == []
    assert browser.run("document.title") == "Features of a test"


def test_a_feature_has_its_name_in_the_list_the_search_the_view_and_beside_others(named):
    browser, data = named.browser, make_data()
    assert browser.run("optionOf('a').textContent").endswith(", 4 named")
    assert named.texts(".option .given") == ["a name", ATTACKS[0], "Zebra ⟨202E⟩", "nothing"]
    assert browser.run("getComputedStyle(document.querySelector('.given')).display") != "none"
    assert named.filter("NAME") == [3]
    assert named.filter('"NAME"') == []
    assert 12 in named.filter('"Zebra"')
    browser.key("ArrowDown")
    assert named.text("#given") == "Zebra ⟨202E⟩"
    assert set(NAMES) <= set(named.filter("o")) | {12}
    named.filter("")
    assert named.sort("name 1")[:5] == [7, 3, DEAD, 12, 0]
    named.browser.mouse("#named-only", click=True)
    assert named.features() == [7, 3, DEAD, 12]
    near = next(f for f in range(N_DICT) if 3 in data.nearest.index[f])
    browser.run(f"select({near})")
    i = data.nearest.index[near].tolist().index(3)
    assert named.texts(".items li")[i].startswith("3 a name")
    assert named.text("#given") == NAMES.get(near, "")


def test_hostile_names_are_text(browser, tmp_path):
    names = dict(enumerate((*ATTACKS, "</script><!--<script>", "&lt;b&gt;&amp;")))
    path = write(tmp_path / "a.html", place=place(names))
    assert path.read_text().count("</script>") == 4
    browser.open(path)
    page = Page(browser)
    shown = page.texts(".option .given")
    assert shown[:3] == list(ATTACKS[:3])
    assert shown[-2:] == ["</script><!--<script>", "&lt;b&gt;&amp;"]
    assert shown[3] == "⟨202E⟩abc⟨2066⟩"
    for _ in names:
        browser.key("j")
    assert browser.run("document.title") == "Features of a test"
    assert browser.complaints() == []


def test_keys_lead_to_the_next_feature_the_search_and_other_autoencoders(named):
    browser = named.browser
    browser.mouse("#name", click=True)  # no control has the focus
    browser.run("document.activeElement.blur()")
    for key, feature in [("j", 1), ("j", 2), ("k", 1)]:
        browser.key(key)
        assert named.selected() == feature
    browser.key("/")
    assert browser.run("document.activeElement === filter")
    browser.type("j[word")
    assert (browser.run("filter.value"), named.selected()) == ("j[word", 1)
    named.filter("word2")
    browser.key("Escape")
    assert browser.run("document.activeElement === list && filter.value") == "word2"
    browser.key("j")
    browser.key("]")
    browser.wait("named?.cell === 'seed0_dict000040_l1exp+01'")
    browser.wait("selected >= 0")
    assert browser.run("filter.value") == "word2"  # the search goes along
    assert named.features() == with_top_token(make_data(), lambda text: "word2" in text)
    assert browser.run("byId('cell').selectedOptions[0].dataset.cell") == CELLS[1]
    browser.key("[")
    browser.wait("named?.cell === 'a' && selected >= 0")
    browser.key("[")  # round
    browser.wait("named?.cell === 'c' && selected >= 0")
    hint = browser.run("Array.from(document.querySelectorAll('kbd'), k => k.textContent).join('')")
    assert sorted(hint) == sorted("[]/kjn")


def test_the_list_of_autoencoders_leads_to_their_pages(named):
    browser = named.browser
    assert named.texts("#cell option")[1:] == [f"autoencoder {cell}" for cell in CELLS[1:]]
    browser.run("byId('cell').focus()")
    browser.key("ArrowDown")
    browser.wait("named?.cell === 'seed0_dict000040_l1exp+01'")
    browser.wait("document.querySelector('main').hidden === false")
    assert named.texts(".facts dd")[-1] == CELLS[1]


def test_the_link_of_a_feature_finds_its_autoencoder_from_any_page(named, run):
    browser = named.browser
    browser.key("]")
    browser.wait("named?.cell === 'seed0_dict000040_l1exp+01'")
    browser.wait("selected >= 0")
    browser.run("select(17)")
    link = browser.run("byId('link').href")
    browser.wait(f"location.href === {json.dumps(link)}")
    fragment = link.partition("#")[2]
    assert fragment == "cell=seed0_dict000040_l1exp%2B01&f=17"
    for written in (fragment, fragment.replace("%2B", "+")):
        browser.open(run, f"#{written}")  # the page of another
        browser.wait("named?.cell !== 'a' && selected === 17")
        assert named.texts(".facts dd")[-1] == CELLS[1]
        assert named.selected() == 17
    browser.open(run, "#cell=gone&f=17")
    assert named.text("#message") == "There is no page of gone here: this is that of a."
    assert named.selected() == 0
    browser.open(run, "#f=17")  # of older pages
    assert named.selected() == 17
    assert browser.run("byId('message').hidden")


def test_names_given_in_the_page_are_saved_as_the_file_that_is_read(named, tmp_path):
    browser = named.browser
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.key("j")
    browser.key("n")
    assert browser.run("document.activeElement.id") == "own-name"
    browser.type(" <b>mine</b> ")
    browser.key("Enter")
    assert named.text("#given") == "<b>mine</b>"
    assert browser.run("document.activeElement === list")
    browser.key("n")
    browser.type("lost")
    browser.key("Escape")
    assert named.text("#given") == "<b>mine</b>"
    for name in ("", "renamed"):  # 3 loses its name, 4 gets one, while others are chosen
        browser.run("select(selected < 3 ? 3 : 4)")
        browser.key("n")
        browser.run("byId('own-name').value = ''")
        browser.type(name)
    browser.mouse("#next", click=True)
    assert named.texts(".option .given")[:2] == ["<b>mine</b>", "renamed"]
    assert not browser.run("byId('unsaved').hidden")
    browser.mouse("#save", click=True)
    saved = tmp_path / "named_features-a.json"
    end = time.monotonic() + 10
    while not saved.exists() and time.monotonic() < end:
        time.sleep(0.02)
    content = json.loads(saved.read_text())
    assert content.keys() == {"cell", "checksum", "names"}
    assert (content["cell"], content["checksum"]) == ("a", "0f" * 32)
    expected = {"1": "<b>mine</b>", "4": "renamed", "7": ATTACKS[0], "12": "Zebra ⟨202E⟩"}
    assert content["names"] == expected | {str(DEAD): "nothing"}
    assert browser.run("byId('unsaved').hidden && window.onbeforeunload === null")


def test_names_are_written_into_a_page_that_is_there(tmp_path):
    bare, named = (write(tmp_path / f"{i}.html", place=place(n)) for i, n in enumerate([{}, NAMES]))
    assert write_names(bare, {"a": NAMES})
    assert bare.read_bytes() == named.read_bytes()
    for damaged in (b"", b"\xff", b"<html>", named.read_bytes()[:-1],
                    named.read_bytes().replace(b'{"cell"', b'{"sell"', 1)):  # fmt: skip
        named.write_bytes(damaged)
        assert not write_names(named, {})
        assert named.read_bytes() == damaged
    assert not write_names(tmp_path / "none.html", {})


# ---- the rest of a feature


def test_the_cards_and_the_histogram_show_the_numbers(page):
    data = make_data()
    items = page.texts(".items li")
    nearest, promoted, suppressed = items[:5], items[5:13], items[13:]
    assert [int(text.split()[0]) for text in nearest] == data.nearest.index[0].tolist()
    assert nearest[0].endswith(f"{data.nearest.value[0, 0]:#.3g}")
    for shown, ranked in ((promoted, data.promoted), (suppressed, data.suppressed)):
        numbers = [f"{value:#.3g}" for value in ranked.value[0]]
        assert [text.endswith(n) for text, n in zip(shown, numbers, strict=True)] == [True] * 8
    bars = page.browser.run(
        "Array.from(document.querySelectorAll('#histogram rect'), bar => bar.dataset.note)"
    )
    counts = [int(note.split(": ")[1].removesuffix(" tokens")) for note in bars]
    assert counts == data.histogram[0, : len(counts)].tolist()
    assert sum(counts) == data.n_active[0]
    page.browser.mouse("#histogram rect")
    assert page.text("#tip") == bars[0]


def test_hostile_text_is_shown_and_does_nothing(page):
    shown = set()
    for _ in range(N_DICT):
        shown |= set(page.texts(".text .token"))
        page.browser.key("ArrowDown")
    expected = [
        *ATTACKS[:3],
        "⟨202E⟩abc⟨2066⟩",
        "\u05d0\u05d1\u05d2",
        "⟨0000⟩⟨0007⟩⟨007F⟩⟨009B⟩↵→⟨000D⟩",
        "⟨D800⟩",
        "\u25cc\u0301\u0301\u0301",
        "=" * 60 + "…",
        "⟨2028⟩⟨FEFF⟩",
    ]
    assert [text for text in expected if text not in shown] == []
    assert page.browser.run("document.querySelectorAll('#body img, #body script').length") == 0


def test_tokens_stand_in_the_order_of_the_text_whatever_their_direction(browser, tmp_path):
    texts = ["\u05d0\u05d1", "12", "\u0627\u0628", "!", "a"]
    tokens = torch.tensor([[0, 1, 2, 3, 0, 1, 4, 2, 0, 3]])
    collector = FeatureCollector(1, 10, n_after=9)
    collector.add(tokens, torch.ones(1, 10, 1))
    browser.open(write(tmp_path / "features.html", collector.result(), token_texts=texts))
    lefts = browser.run(
        "Array.from(document.querySelectorAll('.text .token'), t => t.getBoundingClientRect().left)"
    )
    assert len(lefts) == 10
    assert lefts == sorted(lefts)
    assert browser.complaints() == []


@pytest.mark.parametrize("width", [1200, 390])
def test_nothing_is_wider_than_the_screen(browser, path, width):
    browser.open(path, width=width)
    for _ in range(10):
        assert browser.run("document.documentElement.scrollWidth") <= width
        browser.key("ArrowDown")
    assert Page(browser).selected() == 10


def test_every_control_has_a_name_for_those_who_do_not_see_it(page):
    nodes = page.browser.call("Accessibility.getFullAXTree")["nodes"]
    roles = ("searchbox", "combobox", "checkbox", "listbox", "button", "option", "image", "img")
    named = [
        (node["role"]["value"], node["name"]["value"])
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in roles
    ]
    assert {role for role, _ in named} >= {"searchbox", "combobox", "checkbox", "listbox", "button"}
    assert [role for role, name in named if not name] == []


def test_a_page_without_optional_parts_opens(browser, tmp_path):
    bare = dataclasses.replace(make_data(), nearest=None, promoted=None, suppressed=None)
    browser.open(write(tmp_path / "bare.html", bare))
    assert Page(browser).texts(".items") == []
    none = FeatureCollector(3, 4).result()  # no text at all
    browser.open(write(tmp_path / "none.html", none))
    assert Page(browser).texts(".option.dead > :first-child") == ["0", "1", "2"]
    assert browser.complaints() == []


def test_a_damaged_page_says_so(browser, tmp_path, path):
    html = path.read_text(encoding="utf-8")
    broken = tmp_path / "broken.html"
    broken.write_text(re.sub(r'(id="summary">.{500})[^<]*', r"\1", html), encoding="utf-8")
    browser.open(broken)
    assert Page(browser).text("#status").startswith("The page cannot be shown: ")
    assert browser.run("document.querySelector('main').hidden")


def make_large(n_dict: int) -> FeatureData:
    """The test's data with its features repeated."""
    small = make_data()
    chosen = np.arange(n_dict) % N_DICT

    def repeated(value: object) -> object:
        if isinstance(value, tuple):
            return type(value)(*map(repeated, value))
        return value[chosen] if isinstance(value, np.ndarray) else value

    names = {field.name for field in dataclasses.fields(small)} - {"tokens"}
    return dataclasses.replace(small, **{name: repeated(getattr(small, name)) for name in names})


def test_of_16000_features_only_the_rows_in_view_are_in_the_document(browser, tmp_path):
    data = make_large(16000)
    browser.open(write(tmp_path / "large.html", data))
    page = Page(browser)
    assert page.text("#count") == "16\u202f000 of 16\u202f000"
    assert 10 < len(page.texts(".option")) < 60
    assert browser.run("blocks.size") == 1  # the others are unpacked when they are looked at
    browser.key("End")
    browser.wait("blocks.size === 2 && !detail.hasAttribute('aria-busy')")
    assert page.selected() == 15999
    strengths = [f"{value:#.3g}" for value in data.top.codes[15999, :, 6]]
    assert page.texts(".contexts .strength")[:8] == strengths
    page.filter("max>2.4")
    browser.run("list.scrollTop = 50000")
    browser.frame()
    middle = page.texts(".option > :first-child")[10]
    browser.mouse(f"#option-{middle}", click=True)
    assert page.selected() == int(middle)
    assert len(page.texts(".option")) < 60
    assert browser.complaints() == []


def make_realistic(n_dict: int, n_tokens: int = 200_000) -> tuple[FeatureData, list[str]]:
    """(data, texts) as large as those of a real run: codes of 32 features on every token, frequent
    and rare, 49152 tokens of which few are frequent."""
    rng, length, vocabulary = np.random.default_rng(0), 128, 49152
    shares = 1 / np.arange(1, vocabulary + 1)
    tokens = rng.choice(vocabulary, (n_tokens // length, length), p=shares / shares.sum())
    n_rows, n_window = len(tokens), 33

    def contexts() -> Contexts:
        row, position = rng.integers(0, n_rows, (n_dict, 8)), rng.integers(0, length, (n_dict, 8))
        codes = rng.random((n_dict, 8, n_window), np.float32)
        codes *= rng.random(codes.shape, np.float32) < 0.1  # as on the demo
        codes[:, :, 24] = 1 - np.arange(8) / 10
        return Contexts(np.full(n_dict, 8), row, position, codes)

    def ranked(n: int, size: int) -> Ranked:
        values = -np.sort(-rng.random((n_dict, n), np.float32), axis=1)
        return Ranked(rng.integers(0, size, (n_dict, n)), values)

    data = FeatureData(
        n_tokens=n_tokens,
        n_active=rng.integers(10, 1000, n_dict),
        max_activation=np.full(n_dict, 1.0, np.float32),
        histogram=rng.poisson(200 * 0.93 ** np.arange(64), (n_dict, 64)),
        bin_width=np.full(n_dict, 1 / 32),
        tokens=tokens,
        n_before=24,
        top=contexts(),
        sampled=contexts(),
        nearest=ranked(5, n_dict),
        promoted=ranked(8, vocabulary),
        suppressed=ranked(8, vocabulary),
    )
    return data, [f" word{i}" for i in range(vocabulary)]


@pytest.mark.long
def test_three_autoencoders_of_24576_features_open_in_three_seconds_each(browser, tmp_path, capsys):
    data, texts = make_realistic(24576)
    cells = ("a", "b", "c")
    names = {f: f"what feature {f} is about" for f in range(0, 24576, 3)}
    for i in range(3):
        here = place(names, cells[i:] + cells[:i])
        path = write(tmp_path / f"{cells[i]}.html", data, token_texts=texts, place=here)
        assert path.stat().st_size < 17e6
    page = Page(browser)
    for cell in cells:
        seconds = []
        for _ in range(3):
            clock, cpu = time.monotonic(), browser.cpu_seconds()
            browser.open(tmp_path / f"{cell}.html", f"#cell={cell}&f=21000")
            assert page.text("#name") == "Feature 21000"
            assert len(page.texts(".contexts li")) == 16
            # the machine may be busy with something else
            seconds.append(min(time.monotonic() - clock, browser.cpu_seconds() - cpu))
            assert browser.complaints() == []
        assert min(seconds) < 3, seconds
        with capsys.disabled():
            print(f"\n{path.stat().st_size / 1e6:.1f} MB open in {min(seconds):.2f} s")
    browser.open(tmp_path / "a.html")
    assert page.text("#count") == "24\u202f576 of 24\u202f576"
    assert page.text("#given") == "what feature 0 is about"
    assert page.filter('"feature 2457"') == [f for f in names if str(f).startswith("2457")]
    browser.key("Escape")
    browser.key("]")
    browser.wait("named?.cell === 'b' && selected >= 0")
    assert browser.complaints() == []
