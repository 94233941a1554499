"""`fedgraft serve`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from fedgraft.cli.frame import IsQuiet, app, console, starting


@app.command()
def serve(
    folder: Annotated[Path, typer.Argument(help="A run folder, or an export in fedgraft's format.")],
    host: Annotated[str, typer.Option("--host", help="Address to listen at; other than loopback needs --keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port; 0: any that is free.", min=0, max=65535)] = 8080,
    keys: Annotated[Path | None, typer.Option("--keys", help="Ask for API keys: the file that --make-keys wrote.")] = None,
    make_keys: Annotated[Path | None, typer.Option("--make-keys", help="Write a key per client into this new file, and end.")] = None,
    tls: Annotated[tuple[Path, Path] | None, typer.Option("--tls", help="Serve HTTPS: private key and certificate, PEM.")] = None,
    batch: Annotated[int, typer.Option("--batch", help="Answers written at the same time.", min=1)] = 16,
    queue: Annotated[int, typer.Option("--queue", help="Requests that wait; more get 429.", min=1)] = 256,
    prompt_tokens: Annotated[
        int | None, typer.Option("--prompt-tokens", help="Tokens of a prompt at most (default: what the base holds).", min=1)
    ] = None,
    answer_tokens: Annotated[int, typer.Option("--answer-tokens", help="Tokens of an answer at most.", min=1)] = 1024,
    grace: Annotated[float, typer.Option("--grace", help="Seconds that answers have to end when the server is stopped.", min=0)] = 30.0,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Load the base another way: model.key=value. Repeatable.")] = None,
    quiet: IsQuiet = False,
) -> None:
    """Serve the models of a run over HTTP as OpenAI's API, each client a model name, with a page to compare them.

    Requests for different clients are answered in one batch on one base. Ctrl-C or SIGTERM lets the answers in the making end.
    """
    for package in ("fastapi", "uvicorn"):
        if find_spec(package) is None:
            raise ValueError(f"serving needs {package}; install it with: pip install 'fedgraft[serve]'")
    with starting(quiet):
        from fedgraft.deployment.federation import joined
        from fedgraft.serve.keys import make_keys as write
        from fedgraft.serve.keys import read_keys
        from fedgraft.serve.limits import Limits
        from fedgraft.serve.server import Server, opened
        from fedgraft.serve.service import Service
        from fedgraft.signals import terminating
        from fedgraft.use.load import load

    if make_keys is not None:
        write(make_keys, load(folder, overrides=set_ or []).models)
        typer.echo(make_keys)
        return
    limits = Limits(batch=batch, queue=queue, prompt_tokens=prompt_tokens, answer_tokens=answer_tokens, grace=grace)
    scheme = "https" if tls else "http"
    with opened(host, port, keys is not None) as sink:
        with starting(quiet):
            service = Service(load(folder, overrides=set_ or []), limits)
        server = Server(service, read_keys(keys, service.models) if keys else None, tls)
        try:
            with terminating():
                server.run_on(sink, lambda: _say(service, f"{scheme}://{joined(host, sink.getsockname()[1])}", quiet))
        except KeyboardInterrupt:  # uvicorn passes the signal on after a graceful stop
            raise typer.Exit(0) from None


def _say(service: object, address: str, quiet: bool) -> None:
    from fedgraft.serve.service import Service

    assert isinstance(service, Service)
    typer.echo(address)
    if quiet:
        return
    told = console(stderr=True)
    told.print(f"{len(service.models)} models: {', '.join(service.models)}", markup=False, highlight=False, soft_wrap=True)
    for why in service.missing.values():
        told.print(f"not served: {why}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if not service.loaded.mixes:
        told.print("One model at a time: what this run adapts is in use for all rows of a batch.", style="yellow", highlight=False)
    told.print(
        f"OpenAI's API at {address}/v1, a page to compare at {address}; Ctrl-C stops.", markup=False, highlight=False, soft_wrap=True
    )
