"""What NVFlare's server needs of a job: the adapters as a module, and a widget that notes when a round is merged."""

from __future__ import annotations

from common import work
from marks import Marks
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.app_event_type import AppEventType
from torch import nn

DOT = "/"
"""In place of the dot, which names of parameters cannot have."""


class Adapters(nn.Module):
    """Nothing but the leaves."""

    def __init__(self) -> None:
        super().__init__()
        for name, leaf in work().leaves().items():
            self.register_parameter(name.replace(".", DOT), nn.Parameter(leaf))


class Rounds(FLComponent):
    """Hears the server's events."""

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Note that a round was merged."""
        if event_type == AppEventType.AFTER_AGGREGATION:
            Marks().round_done()
