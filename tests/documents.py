"""README.md and docs/*.md as they are read by a test: their blocks, commands, links and anchors."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_INDENTED = re.compile(r"(?:(?<=\n\n)|\A)(?: {4}.*\n(?:\n(?= {4}))?)+")
_COMMAND = re.compile(
    r"(?:^|&&|\$\()\s*((?:promptkd|make|python3?)\b(?:[^&)'\"]|'[^']*'|\"[^\"]*\")*)"
)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


class Block(NamedTuple):
    kind: str  # sh, toml, python, or nothing, as of an indented one
    text: str


def blocks(page: str) -> list[Block]:
    """In their order on the page."""
    text = PAGES[page]
    fenced = [*_FENCE.finditer(text)]
    found = [(match.start(), Block(*match.groups())) for match in fenced]
    for match in _INDENTED.finditer(_blanked(text, [match.span() for match in fenced])):
        found.append((match.start(), Block("", re.sub(r"^ {4}", "", match[0], flags=re.M))))
    return [block for _, block in sorted(found)]


def _blanked(text: str, spans: list[tuple[int, int]]) -> str:
    """With `spans` of it in dots, so that places stay what they are."""
    for start, end in spans:
        text = text[:start] + re.sub(r"[^\n]", ".", text[start:end]) + text[end:]
    return text


def commands(page: str) -> list[tuple[str, ...]]:
    """The words of every promptkd, make or python that a page tells to type, in order."""
    return [words for block in blocks(page) for words in typed(block)]


def typed(block: Block) -> list[tuple[str, ...]]:
    """Those of a block."""
    found: list[tuple[str, ...]] = []
    if block.kind not in ("", "sh"):
        return found
    for line in block.text.replace("\\\n", " ").splitlines():
        for match in _COMMAND.finditer(line):
            words = shlex.split(match[1], comments=True)
            ends = (n for n, word in enumerate(words) if re.match(r"\d?[<>|]", word))
            found.append(tuple(words[: next(ends, len(words))]))
    return found


def files(page: str) -> dict[str, str]:
    """The files whose text a page shows, by the name in their first line."""
    named = [(re.match(r"# ([\w./-]+\.toml)\b", block.text), block) for block in blocks(page)]
    return {match[1]: block.text for match, block in named if match and block.kind == "toml"}


def links(page: str) -> list[tuple[str, str]]:
    """Path, from the page's own folder, and anchor of each link to a file of ours."""
    prose = _blanked(PAGES[page], [match.span() for match in _FENCE.finditer(PAGES[page])])
    found = [link for link in _LINK.findall(prose) if "://" not in link]
    return [(link.partition("#")[0], link.partition("#")[2]) for link in found]


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", text, flags=re.M)
    plain = [re.sub(r"[^\w\- ]", "", head.lower().replace("`", "")) for head in heads]
    return {head.replace(" ", "-") for head in plain}
