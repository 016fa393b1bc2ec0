"""README.md and README.zh-CN.md say the same: outline, commands, links, tables, names and figures."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
# Each page and the line that leads to the other one, which is left out of what is compared.
LANGUAGE_LINES = {
    "README.md": "English | [简体中文](README.zh-CN.md)",
    "README.zh-CN.md": "[English](README.md) | 简体中文",
}
PAGES = tuple(LANGUAGE_LINES)

CHINESE = "\u4e00-\u9fff"
# Where one of these is found, the reader stumbles.
TYPOGRAPHY = {
    "no space between Chinese and Latin": rf"[{CHINESE}][A-Za-z0-9`]|[A-Za-z0-9`%+][{CHINESE}]",
    "ASCII punctuation after Chinese": rf"[{CHINESE}`] ?[,;:?!()]|[{CHINESE}]\.|\([{CHINESE}]",
    "space beside full-width punctuation": r" [，。；：、？！（）]|[，。；：、？！（）] ",
}


@cache
def tokens(name: str) -> list[Token]:
    text = (ROOT / name).read_text(encoding="utf-8")
    if name in LANGUAGE_LINES:
        text = text.replace(LANGUAGE_LINES[name], "languages")
    return MarkdownIt("commonmark").enable("table").parse(text)


def inlines(block: Sequence[Token]) -> Iterator[Token]:
    """Texts, codes, links and images, those in link texts and alternative texts too."""
    for token in block:
        yield token
        yield from inlines(token.children or [])


def sections(name: str) -> list[list[Token]]:
    """The tokens from each heading to the next."""
    found: list[list[Token]] = []
    for token in tokens(name):
        if token.type == "heading_open":
            found.append([])
        found[-1].append(token)
    return found


def plain(inline: Token) -> str:
    """The text that a reader sees, with code between backticks."""
    shown = {"code_inline": "`{}`", "text": "{}", "softbreak": " "}
    return "".join(shown[t.type].format(t.content) for t in inlines(inline.children or []) if t.type in shown)


def headings(name: str) -> list[tuple[str, str]]:
    """Level and text of each."""
    found = tokens(name)
    return [(t.tag, plain(found[i + 1])) for i, t in enumerate(found) if t.type == "heading_open"]


def slugs(name: str) -> list[str]:
    """GitHub's anchors: lower case, hyphens for spaces, no punctuation, a number after a repeated one."""
    seen: Counter[str] = Counter()
    found = []
    for _, text in headings(name):
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found.append(slug + (f"-{seen[slug]}" if seen[slug] else ""))
        seen[slug] += 1
    return found


def targets(block: Sequence[Token]) -> list[str]:
    """Of links and images, those written in HTML too."""
    found = []
    for token in inlines(block):
        found += [str(token.attrs[key]) for key in ("href", "src") if key in token.attrs]
        if token.type in ("html_block", "html_inline"):
            found += re.findall(r"""\b(?:href|src|srcset)=["']([^"']+)""", token.content)
    return [unquote(target) for target in found]


def split(name: str, target: str) -> tuple[str, str]:
    """File, from the root, and anchor."""
    path, _, anchor = target.partition("#")
    return path or name, anchor


def page_targets(name: str, block: Sequence[Token]) -> Counter[str]:
    """Targets, where an anchor of the page itself is the number of its heading."""
    found = []
    for target in targets(block):
        path, anchor = split(name, target)
        found.append(f"#{slugs(name).index(anchor)}" if path == name and anchor else target)
    return Counter(found)


def codes(block: Sequence[Token]) -> list[str]:
    return [token.content for token in inlines(block) if token.type == "code_inline"]


def codes_in_any_order(block: Sequence[Token]) -> Counter[str]:
    return Counter(codes(block))


def numbers(block: Sequence[Token]) -> Counter[str]:
    text = " ".join(token.content for token in inlines(block) if token.type == "text")
    return Counter(re.findall(r"\d+(?:[.,]\d+)*", text))


def rows(block: Sequence[Token]) -> list[list[tuple[list[str], Counter[str], bool]]]:
    """Of each row of tables, of each cell: its codes, its numbers, and whether it is empty."""
    found: list[list[tuple[list[str], Counter[str], bool]]] = []
    for before, token in pairwise(block):
        if token.type == "tr_open":
            found.append([])
        if before.type in ("th_open", "td_open"):
            found[-1].append((codes([token]), numbers([token]), not token.content))
    return found


def outline(block: Sequence[Token]) -> list[tuple[str, str]]:
    """Paragraphs, list items, rows, cells and code blocks, in order."""
    return [(t.type, t.info) for t in block if t.type != "inline" and t.nesting >= 0]


def fences(block: Sequence[Token]) -> list[tuple[str, str]]:
    return [(t.info, t.content) for t in block if t.type in ("fence", "code_block")]


def by_section(name: str, what: Callable[[list[Token]], object]) -> dict[str, object]:
    """What each section has, under its English heading."""
    english = [text for _, text in headings(PAGES[0])]
    return dict(zip(english, map(what, sections(name)), strict=True))


def test_headings_have_the_same_levels():
    english, chinese = map(headings, PAGES)
    assert [level for level, _ in english] == [level for level, _ in chinese]


@pytest.mark.parametrize("what", [outline, fences, rows, numbers, codes_in_any_order], ids=lambda what: what.__name__)
def test_sections_have_the_same(what):
    english, chinese = (by_section(name, what) for name in PAGES)
    assert english == chinese


def test_sections_have_the_same_links():
    english, chinese = (by_section(name, lambda block, name=name: page_targets(name, block)) for name in PAGES)
    assert english == chinese


@pytest.mark.parametrize("name", PAGES)
def test_the_pages_lead_to_each_other(name):
    assert (ROOT / name).read_text(encoding="utf-8").splitlines().count(LANGUAGE_LINES[name]) == 1


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for target in targets(tokens(name)):
        if re.match(r"[a-z]+:", target):
            continue
        path, anchor = split(name, target)
        assert (ROOT / path).exists(), target
        if anchor:
            assert path.endswith(".md"), target
            assert anchor in slugs(path), target


@pytest.mark.parametrize("name", PAGES)
def test_no_mark_of_emphasis_is_left_over(name):
    """Beside full-width punctuation, ``**`` may be no mark but two asterisks."""
    left = [
        token.content for token in inlines(tokens(name)) if token.type == "text" and re.search(r"[*`]", token.content)
    ]
    assert left == []


@pytest.mark.parametrize("rule", TYPOGRAPHY)
def test_chinese_typography(rule):
    texts = [re.sub("`[^`]*`", "`code`", plain(t)) for t in tokens("README.zh-CN.md") if t.type == "inline"]
    assert [text for text in texts if re.search(TYPOGRAPHY[rule], text)] == []


def test_slugs_are_those_of_github(monkeypatch):
    text = "# Settings: `a.b` & more_x\n\n## 网络结构（XPos）\n\n## A *b*-c?\n\n## A b-c\n"
    monkeypatch.setitem(globals(), "tokens", lambda name: MarkdownIt("commonmark").parse(text))
    assert slugs("any") == ["settings-ab--more_x", "网络结构xpos", "a-b-c", "a-b-c-1"]
