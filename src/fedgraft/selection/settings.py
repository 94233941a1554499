"""The recipe section of expert selection."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedgraft.settings import Section

CPU_TOKENS = 4_096
GPU_TOKENS = 128 * 2_048  # the paper's 128 sequences of 2,048 tokens


class SelectionSettings(Section):
    """How each client chooses the experts it grafts."""

    criterion: str = "reconstruction"
    """Name of a criterion; `fedgraft list criteria` shows them."""
    tokens: int | None = Field(default=None, ge=1)
    """Calibration tokens per client. Empty means 4,096 on a CPU and 262,144 (128 x 2,048) on a GPU."""
    text: Literal["own", "generic"] = "own"
    """What the experts are judged on: `own`, the client's training text; `generic`, shipped general text (about 14,000 tokens at most), the
    same for every client and apart from the text that `evaluation.knowledge_tokens` measures on."""

    file: str | None = None
    """Choices made beforehand: what `fedgraft select` wrote for these clients and this base. They are read, and nothing is measured in the
    run. Only with `engine: inprocess`, since a site reads no file that a coordinator names."""

    def budget(self, device_type: str) -> int:
        """Calibration tokens per client on a torch device type."""
        return self.tokens or (CPU_TOKENS if device_type == "cpu" else GPU_TOKENS)
