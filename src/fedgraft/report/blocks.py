"""What a page is made of: sections of blocks, as plain data; each kind of block has its own template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table. Text of cells is what is shown; numbers align right where `numeric`."""

    template: ClassVar[str] = "grid.html.j2"
    caption: str
    columns: Sequence[str]
    """Headings; the first is that of the row headings."""
    rows: Sequence[Sequence[str]]
    """The first cell of each row is its heading."""
    feet: Sequence[Sequence[str]] = ()
    """Summary rows below a rule."""
    leading: Sequence[int] = ()
    """Numbers of the rows to which those that follow belong."""
    numeric: bool = True
    sortable: bool = True
    """False where the order of the rows says something, as that of steps does."""

    @property
    def sorts(self) -> bool:
        """Whether the reader may order the rows: some rows of figures, none of which belongs to another."""
        return self.sortable and self.numeric and not self.leading and len(self.rows) > 1


@dataclass(frozen=True, kw_only=True)
class Legend:
    """One entry of a figure's legend: its mark as SVG elements in a box of 30 x 12, and what it stands for."""

    mark: str
    label: str


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing with everything that stands in for it: title, description, caption and the numbers as a table."""

    template: ClassVar[str] = "figure.html.j2"
    name: str
    """Unique on the page; ids derive from it."""
    title: str
    description: str
    """What the drawing shows, for those who do not see it."""
    svg: str
    """Elements inside the svg element, already escaped."""
    width: float
    height: float
    caption: str = ""
    legend: Sequence[Legend] = ()
    scale: tuple[str, str] | None = None
    """What the two ends of the colour scale stand for."""
    data: Grid | None
    """None where a table beside it holds the same numbers."""
    natural: bool = False
    """Keeps its size and scrolls in its own frame; otherwise it fills the column."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Names with their values."""

    template: ClassVar[str] = "facts.html.j2"
    items: Sequence[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Note:
    """A paragraph; `missing` when it says what is not there and why."""

    template: ClassVar[str] = "note.html.j2"
    text: str
    missing: bool = False


@dataclass(frozen=True, kw_only=True)
class Commands:
    """Lines for a shell."""

    template: ClassVar[str] = "commands.html.j2"
    label: str
    lines: Sequence[str]


Block: TypeAlias = Grid | Figure | Facts | Note | Commands


@dataclass(frozen=True, kw_only=True)
class Section:
    """A headed part of a page."""

    name: str
    """Its anchor."""
    title: str
    blocks: Sequence[Block]
    dense: bool = False
    """Small tables, set in as many columns as there is room for."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole document."""

    title: str
    lead: str
    facts: Facts
    sections: Sequence[Section]
