"""NVFlare's simulator with its FedAvg recipe over the adapters; a process for each client, as the simulator does it by itself."""

from __future__ import annotations

import os
from pathlib import Path

from common import work
from marks import OUT
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.client.config import ExchangeFormat
from nvflare.recipe import SimEnv
from nvflare_parts import Adapters, Rounds


def main() -> None:
    """All rounds."""
    recipe = FedAvgRecipe(
        name="peers",
        model=Adapters(),
        min_clients=len(work().clients),
        num_rounds=work().rounds,
        train_script=str(Path(__file__).with_name("nvflare_client.py")),
        server_expected_format=ExchangeFormat.PYTORCH,
    )
    recipe._job.to_server(Rounds(), id="rounds")
    recipe.execute(SimEnv(clients=work().clients, log_config="error", workspace_root=str(Path(os.environ[OUT]) / "simulation")))


if __name__ == "__main__":
    main()
