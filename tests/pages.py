"""Pages of HTML, read strictly: every tag is closed, and nothing is loaded from anywhere."""

import json
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """A page that is well-formed, self-contained and runs nothing, or an AssertionError."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        assert not {"script", "link", "iframe", "object", "form", "base"} & {
            t for t, _ in self.tags
        }

    @classmethod
    def of(cls, file: Path) -> "Page":
        assert file.stat().st_size < 2_000_000
        return cls(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = {name: value or "" for name, value in attrs}
        for name, value in told.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "action", "xlink:href"):
                assert value.startswith("data:image/jpeg;base64,"), (tag, value)
            assert "url(" not in value, (tag, value)
        self.tags.append((tag, told))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:  # of SVG
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            assert "url(" not in data and "@import" not in data
        elif data.strip():
            self.texts.append(" ".join(data.split()))

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    @property
    def pictures(self) -> list[str]:
        return [told["src"] for tag, told in self.tags if tag == "img"]

    @property
    def attributes(self) -> list[str]:
        return [value for _, told in self.tags for value in told.values()]

    def csp(self) -> str:
        (told,) = (
            told for tag, told in self.tags if told.get("http-equiv") == "Content-Security-Policy"
        )
        return told["content"]


def require_report(folder: Path) -> Page:
    """The page that a run has left, which says what its other files say."""
    page = Page.of(folder / "report.html")
    summary, ledger, config = (
        json.loads((folder / f"{name}.json").read_text())
        for name in ("summary", "ledger", "config")
    )
    assert "HM of base and novel" in page.text
    for model in ("student_before", "student_after", "teacher"):
        row = [summary[model][column] for column in ("base", "novel", "hm", "all", "agreement")]
        assert " ".join("-" if one is None else f"{one:.2f}" for one in row) in page.text, model
    assert f"trained {ledger['trained']:,} " in page.text
    assert f"seen {ledger['seen']:,}" in page.text
    for reason, number in ledger["skipped"].items():
        assert f"skipped: {reason} {number:,} " in page.text
        assert f"Skipped: {reason}" in page.text, "with examples"
    assert config["versions"]["torch"] in page.text and config["corpus"]["shards"] in page.text
    return page


def require_probed(folder: Path, samples: int) -> None:
    """The probes of a run of one worker and small steps: all samples of each step, `samples` in the
    end, which agree as often as the loss kernels have counted it."""
    lines = (folder / "telemetry" / "probes.jsonl").read_text().splitlines()
    probes = {one["step"]: one for one in map(json.loads, lines)}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    told = [one for one in map(json.loads, lines) if one["kind"] == "train"]
    assert sorted(probes) == [one["step"] for one in told]
    for one in told:
        probe = probes[one["step"]]
        same = [a == b for a, b in zip(probe["teacher"], probe["student"], strict=True)]
        assert abs(sum(same) / len(same) - one["agreement"]) < 1e-9, one["step"]
    assert sum(len(probe["shard"]) for probe in probes.values()) == samples
