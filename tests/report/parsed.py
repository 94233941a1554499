"""A page as a tree, by the standard library's parser, which knows nothing of how it was made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input"}


@dataclass
class Node:
    """An element."""

    tag: str
    attributes: dict[str, str]
    parts: list[Node | str] = field(default_factory=list)

    def walk(self) -> Iterator[Node]:
        yield self
        for part in self.parts:
            if isinstance(part, Node):
                yield from part.walk()

    def all(self, tag: str, **attributes: str) -> list[Node]:
        """Every element of a tag below this one, with these attributes (`class_` holds the word)."""
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [
            node
            for node in self.walk()
            if node is not self
            and node.tag == tag
            and all(value in node.attributes.get(name, "").split() for name, value in wanted.items())
        ]

    def one(self, tag: str, **attributes: str) -> Node:
        (found,) = self.all(tag, **attributes)
        return found

    @property
    def text(self) -> str:
        return " ".join(" ".join(part if isinstance(part, str) else part.text for part in self.parts).split())


class Parser(HTMLParser):
    """Builds the tree; complains where an element is not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Node("", {})
        self.open = [self.root]

    def handle_starttag(self, tag, attrs):
        node = Node(tag, {name: value or "" for name, value in attrs})
        self.open[-1].parts.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag, attrs):
        self.open[-1].parts.append(Node(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        closed = self.open.pop()
        assert closed.tag == tag, f"<{closed.tag}> is closed by </{tag}> at {self.getpos()}"

    def handle_data(self, data):
        self.open[-1].parts.append(data)


def parse(document: str) -> Node:
    """The tree of a document."""
    parser = Parser()
    parser.feed(document)
    parser.close()
    assert len(parser.open) == 1, f"<{parser.open[-1].tag}> is never closed"
    return parser.root


def tables(root: Node) -> dict[str, dict[str, list[str]]]:
    """Label of a table -> first cell of a row -> its other cells."""
    return {
        table.attributes["aria-label"]: {
            cells[0].text: [cell.text for cell in cells[1:]]
            for cells in ([node for node in row.parts if not isinstance(node, str)] for row in table.all("tr"))
        }
        for table in root.all("table")
    }
