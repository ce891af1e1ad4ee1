"""A page as a browser's parser sees it."""

from __future__ import annotations

import re
from html.parser import HTMLParser

__all__ = ["Page", "assert_alone"]

_VOID = {"meta", "circle", "polyline", "rect"}


class Page(HTMLParser):
    """The elements, the numbers in `<data>`, and the text of a page.

    Args:
        content: The file.

    Attributes:
        elements: Name and attributes of each, in order.
        numbers: The value of each `<data>`.
        texts: What is written, style sheets and metadata apart.
        titles: What is told when one points at a mark.
        policy: Of the page for the browser.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.numbers: list[float] = []
        self.texts: list[str] = []
        self.titles: list[str] = []
        self.style = ""
        self._open: list[str] = []
        self.feed(content.decode("utf-8"))
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.elements.append((tag, values))
        if tag == "data":
            self.numbers.append(float(values["value"]))
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"{tag} is closed, and is not what was opened last"

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["style"]:
            self.style += data
        elif self._open[-1:] == ["title"]:
            self.titles.append(data)
        elif data.strip():
            self.texts.append(data.strip())

    @property
    def policy(self) -> str:
        """Of the page for the browser."""
        (found,) = [values["content"] for _, values in self.elements if "http-equiv" in values]
        return found


def assert_alone(content: bytes) -> Page:
    """The page runs nothing, loads nothing and leads nowhere."""
    page = Page(content)
    names = {name for name, _ in page.elements}
    assert names <= {
        *("html", "head", "meta", "title", "style", "body", "main", "header", "p", "h1", "h2", "dl", "dt", "dd", "div"),
        *("figure", "figcaption", "ul", "li", "i", "section", "table", "thead", "tbody", "tr", "th", "td", "data"),
        *("code", "footer", "svg", "polyline", "circle", "rect", "text"),
    }
    attributes = {name for _, values in page.elements for name in values}
    assert not {name for name in attributes if name.startswith("on")}
    assert not attributes & {
        "href",
        "src",
        "srcset",
        "xlink:href",
        "action",
        "formaction",
        "data",
        "poster",
        "background",
    }
    styles = page.style + "".join(values.get("style", "") for _, values in page.elements)
    assert not re.search(r"url\(|@import|expression|//", styles)
    assert page.policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert b"://" not in content
    return page
