"""FedEx-LoRA (Singhal et al. 2025, arXiv 2410.09432, section 4): FedAvg of A and B, and the error of that as a frozen residual."""

from __future__ import annotations

from dataclasses import replace

from fedgraft.address import is_residual
from fedgraft.aggregation.low_rank_merges import averaged_with_residual, take
from fedgraft.methods._linear import on_linear_layers
from fedgraft.methods._low_rank import BY_PRODUCT, absorb_factors, dense_residuals
from fedgraft.methods.method import Method
from fedgraft.training.personal_rules import around


def build() -> Method:
    """Every client starts a round from exactly the mean of the clients' (alpha / r) B A: means of A and B plus a dense residual per layer.

    The paper adds the residual to the base; here it is a shared leaf that clients use and never train or send, so the base stays as it is.
    Down it costs out x in entries a layer. All clients have `lora.rank`.
    """
    settle = on_linear_layers(lambda method, surroundings: replace(method, merge=averaged_with_residual(surroundings.lora.alpha)))
    return Method(
        settle=settle,
        needs_mean=BY_PRODUCT,
        merges_changes=False,
        down=lambda shapes: shapes | dense_residuals(shapes),
        local=around(is_residual),
        absorb=absorb_factors,
        step=take,
    )
