"""A whole run of fedgraft, with all that a run does in a round and after it, by the recipe that the others' rows came from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from marks import OUT, WORK, Marks

from fedgraft import runner
from fedgraft.report.progress import Quiet
from fedgraft.session import Session

MARKS = Marks()


class Marked(Session):
    """Notes when a round is committed."""

    def _round(self) -> None:
        super()._round()
        for client, facts in self.replies.items():
            MARKS.trained(client, self.server.round - 1, facts["loss"])  # type: ignore[arg-type]
        traffic = self.engine.traffic
        MARKS.round_done(bytes=traffic.down + traffic.up)


class Steps(Quiet):
    """Notes the first step."""

    def part(self, client: str, title: str, done: int, total: int, loss: float | None = None, note: str = "") -> None:
        """A step is done."""
        if loss is not None and done:
            MARKS.stepped()


def main() -> None:
    """The run."""
    make: Callable[..., Any] = Marked
    runner.Session = make  # type: ignore[misc]
    recipe = json.loads((Path(os.environ[WORK]) / "recipe.json").read_text(encoding="utf-8"))
    runner.run(recipe, out=Path(os.environ[OUT]) / "run", progress=Steps())


if __name__ == "__main__":
    main()
