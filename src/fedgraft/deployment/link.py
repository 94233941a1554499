"""`python -m fedgraft.deployment.link`: the coordinator's SuperLink, with a door at which sites take their leave."""

from __future__ import annotations

import os
from pathlib import Path

from fedgraft.deployment import farewell
from fedgraft.deployment.federation import find
from fedgraft.deployment.job import VARIABLE
from fedgraft.engine import superlink


def main() -> None:
    """`flower-superlink` for the federation that the environment names."""
    federation = find(Path(os.environ[VARIABLE]))
    superlink.main({} if federation.settings.insecure else {farewell.PATH: farewell.Farewell(federation).hear})


if __name__ == "__main__":
    main()
