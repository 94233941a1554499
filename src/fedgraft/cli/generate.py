"""`fedgraft generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedgraft.cli.frame import IsQuiet, app, reporting, starting
from fedgraft.cli.using import BaseKeys, NewTokens, RunFolder, Seed, Temperature, TopP, telling, wanted


@app.command()
def generate(
    run: RunFolder,
    prompts: Annotated[Path, typer.Option("--prompts", help="A text file with a prompt per line, or .jsonl rows as for training.")],
    client: Annotated[list[str] | None, typer.Option("--client", help="Whose model: a client, shared or base. Repeatable.")] = None,
    all_clients: Annotated[bool, typer.Option("--all-clients", help="The models of all clients.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="The .jsonl file to write, never overwritten (default: standard output).")
    ] = None,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Prompts that are answered at a time.")] = 8,
    set_: BaseKeys = None,
    quiet: IsQuiet = False,
) -> None:
    """Answer a file of prompts with one or several models; one JSON line per model and prompt, written when all are done."""
    if out is not None and out.exists():
        raise ValueError(f"{out}: exists and is never overwritten; choose another --out")
    with reporting(quiet) as progress:
        with starting(quiet):
            from fedgraft import files
            from fedgraft.use.load import load
            from fedgraft.use.prompts import read_prompts
            from fedgraft.use.writing import Sampling, write_file
        rows = read_prompts(prompts)
        with telling(progress.warn):
            loaded = load(run, overrides=set_ or [])
        names = wanted(loaded, client, all_clients)
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        progress.begin("answers", len(names) * len(rows))
        text = write_file(loaded, names, rows, sampling, batch, progress.step)
        if out is not None:
            files.write_text(out, text)
    if out is None:
        sys.stdout.write(text)
    else:
        typer.echo(out)
