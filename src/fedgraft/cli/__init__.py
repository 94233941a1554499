"""The command line, one module per command. Heavy modules are imported inside the commands, so `--help` answers at once."""

from __future__ import annotations

from fedgraft.cli import (  # noqa: F401  # each registers its commands, in the order of --help
    chat,
    compare,
    doctor,
    export,
    federation,
    forget,
    generate,
    init,
    joining,
    listing,
    report,
    run,
    select,
    serve,
    sweep,
    watch,
)
from fedgraft.cli.frame import STATE, app, console, escape


def main() -> None:
    """Entry point: errors a user can mend end in one message and exit code 2, Ctrl-C in 130 and how to go on, others in 1.

    With `--debug` an error passes through, so that Python shows its traceback.
    """
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        if STATE["debug"]:
            raise
        raise SystemExit(_tell(error)) from None
    if code:
        raise SystemExit(code)


def _tell(error: Exception) -> int:
    """Print what went wrong; returns the exit code."""
    show = getattr(error, "show", None)  # a usage error of the command line library
    if show is not None:
        show()
        return int(getattr(error, "exit_code", 2))
    if isinstance(error, ValueError | OSError):
        text, code = _message(error), 2
    else:
        kind = type(error).__name__
        text = f"{kind}: {error}\nThis is a bug in fedgraft or in a library; run again with --debug for the traceback: fedgraft --debug ..."
        code = 1
    console(stderr=True).print(f"[bold red]error:[/] {escape(text)}", highlight=False, soft_wrap=True)
    return code


def _message(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        from fedgraft.trouble import disk

        return disk(error) or f"{error.filename}: {error.strerror}"
    return str(error)
