"""`python -m fedgraft.deployment.labour SITE.YAML`: the site's worker as a program."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from fedgraft.deployment.service import work


def main() -> None:
    """Work until told to stop; what can be mended ends in one line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        work(Path(sys.argv[1]), logging.getLogger("fedgraft").info)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
