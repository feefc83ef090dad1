"""Pages of HTML, read strictly: every tag is closed, and nothing is loaded from anywhere."""

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
