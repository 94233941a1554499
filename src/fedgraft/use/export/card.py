"""The model card of an export: `README.md`."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgraft import __version__, files
from fedgraft.report.shaping import budget, shown
from fedgraft.use.about import CARD
from fedgraft.use.export.subject import Subject, Written

if TYPE_CHECKING:
    from jinja2 import Template


def write_card(subject: Subject, written: Written, folder: Path) -> None:
    """Write `README.md`."""
    about = subject.about
    values = {
        **about,
        "title": about["client"] or subject.name,
        "kind": written.kind,
        "loading": written.loading,
        "notes": [*written.notes, *subject.base.notes],
        "version": __version__,
        "spent": budget(about["privacy"]) if about["privacy"] else "",
        "settings": {part: _listed(about[part]) for part in ("method", "lora", "graft", "training") if about[part]},
        "base_id": json.dumps(about["base"]) if about["on_hub"] else None,
    }
    text = _template().render(values)
    files.write_text(folder / CARD, text)


def _listed(section: dict[str, Any]) -> str:
    return ", ".join(f"{key} {shown(value)}" for key, value in section.items())


@lru_cache(maxsize=1)
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    text = files.read_text(Path(str(resources.files("fedgraft"))) / "assets" / "export" / "card.md.j2")
    return Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False).from_string(text)
