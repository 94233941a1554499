"""NVFlare's client script: its client API around the same local steps; the base stays in memory from one round to the next."""

from __future__ import annotations

import nvflare.client as flare
from common import local_steps, put, taken, work
from marks import Marks
from nvflare_parts import DOT


def main() -> None:
    """All rounds of one client."""
    flare.init()
    marks, name = Marks(), flare.get_site_name()
    while flare.is_running():
        received = flare.receive()
        put({key.replace(DOT, "."): leaf for key, leaf in received.params.items()})
        local_steps(name, received.current_round, marks)
        leaves = {key.replace(".", DOT): leaf for key, leaf in taken().items()}
        flare.send(flare.FLModel(params=leaves, params_type="FULL", meta={"NUM_STEPS_CURRENT_ROUND": work().weights[name]}))


if __name__ == "__main__":
    main()
