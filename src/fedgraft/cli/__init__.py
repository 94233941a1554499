"""The command line, one module per command. Heavy modules are imported inside the commands, so `--help` answers at once."""

from __future__ import annotations

from fedgraft.cli import compare, doctor, listing, run  # noqa: F401  # each registers its commands, in the order of --help
from fedgraft.cli.frame import STATE, app, console, escape


def main() -> None:
    """Entry point: errors a user can mend end in one message and exit code 2, Ctrl-C in 130 and how to go on."""
    try:
        code = app(standalone_mode=False)
    except (ValueError, OSError) as error:
        if STATE["debug"]:
            raise
        console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
    except Exception as error:
        show = getattr(error, "show", None)  # a usage error of the command line library
        if show is None:
            raise
        show()
        raise SystemExit(getattr(error, "exit_code", 2)) from None
    if code:
        raise SystemExit(code)
