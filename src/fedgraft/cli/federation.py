"""`fedgraft federation`, `fedgraft coordinator` and `fedgraft site`: a run over several machines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedgraft.cli.frame import AsJson, app, console, print_json

if TYPE_CHECKING:
    from fedgraft.deployment.federation import Federation

group = typer.Typer(no_args_is_help=True, help="A federation of several machines: make it, let sites in, see how it stands, stop it.")
app.add_typer(group, name="federation")

Folder = Annotated[str, typer.Argument(help="The federation's folder, or its name under federations/.")]
Site = Annotated[str, typer.Argument(help="Name of the site.")]
Hosts = Annotated[list[str], typer.Option("--host", help="Name or address by which sites reach the coordinator. Repeatable.")]


@group.command()
def init(
    folder: Annotated[Path, typer.Argument(help="New folder for the federation.")],
    host: Hosts,
    site: Annotated[list[str] | None, typer.Option("--site", help="A site to let in. Repeatable.")] = None,
    port: Annotated[int, typer.Option("--port", help="The one port that sites need.")] = 9092,
    listen: Annotated[str, typer.Option("--listen", help="Address of this machine to listen on.")] = "0.0.0.0",
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS and no keys; with 127.0.0.1 only.")] = False,
) -> None:
    """Make a federation: certificates, settings, and for each site a folder with its key to carry there."""
    _refuse_without_flower()
    from fedgraft.deployment.federation import create

    federation = create(folder, host, port=port, listen=listen, insecure=insecure)
    _say(f"Made {folder}; sites reach the coordinator as {federation.address}.")
    for name in site or []:
        _add(federation, name, None)
    _say(f"Start the coordinator with: fedgraft coordinator {folder}")


@group.command(name="add-site")
def add_site(
    folder: Folder,
    site: Site,
    public_key: Annotated[
        Path | None, typer.Option("--public-key", help="Public half (ECDSA P-384, OpenSSH) of a key that the site made itself.")
    ] = None,
) -> None:
    """Let a further site in, also while the coordinator runs."""
    _refuse_without_flower()
    from fedgraft.deployment.federation import find

    _add(find(folder), site, public_key)


@group.command(name="remove-site")
def remove_site(folder: Folder, site: Site) -> None:
    """Shut a site out, also while the coordinator runs; what it contributed stays."""
    from fedgraft.deployment.federation import find, remove_site

    remove_site(find(folder), site)
    _say(f"Site {site} is no longer let in.")


@group.command()
def renew(
    folder: Folder,
    host: Annotated[list[str] | None, typer.Option("--host", help="Other names or addresses than so far. Repeatable.")] = None,
) -> None:
    """Give the coordinator a new certificate and key, signed by the same authority; the old ones are kept."""
    from fedgraft.deployment.federation import find, renew

    federation = renew(find(folder), host or [])
    _say(f"{federation.folder / 'server.pem'} is new; start the coordinator again to use it.")
    if host:
        _say(f"Sites that reach it by an older name: set address to {federation.address} in their coordinator.yaml.")


@group.command()
def status(folder: Folder, as_json: AsJson = False) -> None:
    """Whether the coordinator runs, which sites are there, and what runs."""
    from fedgraft.deployment.federation import find
    from fedgraft.deployment.standing import standing

    found = standing(find(folder))
    if as_json:
        print_json(found)
        return
    from rich.table import Table

    process = found["process"]
    _say(
        f"{found['name']} at {found['address']}: "
        + (f"the coordinator runs (process {process})" if process else "no coordinator runs here")
    )
    if found["certificate_days"] is not None:
        _say(f"the coordinator's certificate holds for {found['certificate_days']} more days")
    for title, rows in (("sites", found["sites"]), ("runs", found["runs"])):
        table = Table(title=title, title_justify="left")
        for name in rows[0] if rows else ["none"]:
            table.add_column(name)
        for row in rows:
            table.add_row(*map(str, row.values()))
        console().print(table)


@group.command()
def stop(folder: Folder) -> None:
    """Stop the coordinator on this machine, and with it what runs; finished rounds are saved."""
    from fedgraft.deployment.federation import find
    from fedgraft.deployment.standing import stop

    _say("The coordinator is stopped." if stop(find(folder)) else "No coordinator ran here.")


@app.command()
def coordinator(folder: Folder) -> None:
    """Serve a federation on this machine until Ctrl-C."""
    _refuse_without_flower()
    from fedgraft.deployment.coordinator import coordinate
    from fedgraft.deployment.federation import find

    with _serving("coordinator") as tell:
        coordinate(find(folder), tell)


@app.command()
def site(
    policy: Annotated[Path, typer.Option("--policy", help="The site's settings: rows, model, and what may leave.")],
    coordinator: Annotated[
        Path | None, typer.Option("--coordinator", help="How the coordinator is reached (default: coordinator.yaml beside the settings).")
    ] = None,
    leave: Annotated[
        bool, typer.Option("--leave", help="Leave the federation: this site's key is shut out, and its processes here end.")
    ] = False,
) -> None:
    """Take part in a federation with this machine's rows until Ctrl-C; or leave it."""
    _refuse_without_flower()
    if leave:
        _leave(policy, coordinator)
        return
    from fedgraft.deployment.attendance import attend

    with _serving("site") as tell:
        attend(policy, coordinator, tell)


@contextmanager
def _serving(what: str) -> Iterator[Callable[[str], None]]:
    """Lines with the time; Ctrl-C ends in 130, SIGTERM in 143, when everything is stopped."""
    from fedgraft.signals import Terminated, terminating

    try:
        with terminating():
            yield lambda text: _say(f"{time.strftime('%H:%M:%S')}  {text}")
    except KeyboardInterrupt as stop:
        _say(f"The {what} is stopped.")
        raise typer.Exit(143 if isinstance(stop, Terminated) else 130) from None


def _add(federation: Federation, site: str, public_key: Path | None) -> None:
    from fedgraft.deployment.federation import add_site

    bundle = add_site(federation, site, public_key)
    secret = "it holds the site's key; keep no copy" if (bundle / "node.key").exists() else "its key is there already, as node.key"
    secret = "without a key" if federation.settings.insecure else secret
    _say(f"Site {site}: move {bundle} to its machine ({secret}) and fill in site.yaml there.")


def _leave(policy: Path, coordinator: Path | None) -> None:
    from fedgraft.deployment.departure import leave
    from fedgraft.words import size

    done = leave(policy, coordinator)
    _say(f"Site {done.site} has left the federation{' before' if done.before else ''}; nothing of it runs here.")
    if done.runs:
        _say(f"What its client has learnt stays on this machine: {len(done.runs)} runs, {size(done.size)}, in {done.memories}")
        _say("Delete that folder when nobody needs these models any more; nothing else has a copy.")
    _say(f"What was asked of it and what has left it stands in {done.log}")
    _say("What it contributed until now is in the merged models; the coordinator can say more: fedgraft forget RUN --client " + done.site)


def _refuse_without_flower() -> None:
    from importlib.util import find_spec

    if find_spec("flwr") is None:
        raise ValueError("Flower is not installed; install it with: pip install 'fedgraft[flower]'")


def _say(text: str) -> None:
    console().print(text, markup=False, highlight=False, soft_wrap=True)
