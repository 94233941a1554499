"""`fedgraft run --dry-run`."""

from __future__ import annotations

import shlex
from pathlib import Path

from fedgraft.cli.frame import console, print_json, reporting, starting


def rehearse(recipe: str | None, out: Path | None, overrides: list[str] | None, *, as_json: bool, quiet: bool) -> None:
    """Everything of `run` up to the first step, and the command that would start it."""
    with starting(quiet or as_json):
        from fedgraft.rehearsal import rehearse as execute
        from fedgraft.words import size

    with reporting(quiet or as_json) as progress:
        found = execute(recipe, out=out, overrides=overrides, progress=progress)
    words = ["fedgraft", "run", *([recipe] if recipe else []), *(["--out", str(out)] if out else [])]
    command = shlex.join([*words, *(word for override in overrides or [] for word in ("--set", override))])
    if as_json:
        rows = [vars(one) for one in found.rows]
        told = {"folder": str(found.folder), "rows": rows, "client": found.client, "loss": found.loss, "keeps": found.keeps}
        print_json({**told, "command": command})
        return
    cut, total = sum(one.cut for one in found.rows), sum(one.train for one in found.rows)
    lines = [f"rows: {total:,} training rows of {len(found.rows)} clients, {cut:,} cut to data.max_length"]
    lines += [f"kept replies: at most {size(found.keeps)} on the disk when the run has ended"] if found.keeps else []
    lines += [f"first batch: client {found.client}, loss {found.loss:.3f} before training", f"ready: start with `{command}`"]
    console().print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
