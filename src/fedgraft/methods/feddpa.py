"""FedDPA (Yang et al. 2024, arXiv 2403.19211): a shared and an own adapter, blended for each row by how near that is to the client's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fedgraft.address import MIX, as_first
from fedgraft.bundle import Bundle
from fedgraft.data.batches import prompt_ids
from fedgraft.methods._linear import on_linear_layers
from fedgraft.methods._personal import answer_second, fine_tune, fine_tuned_at_the_end, twice, with_second
from fedgraft.methods.method import Method, Prediction, RowShares, personal_leaves
from fedgraft.seeds import numpy_rng
from fedgraft.settings import Share
from fedgraft.training.client import Client
from fedgraft.training.measure import last_states
from fedgraft.training.personal_rules import beside, first_alone, own_leaves
from fedgraft.tree import Tree, combine


def build(
    variant: Literal["F", "T"] = "F",
    scale: Share = 0.5,
    instances: PositiveInt = 5,
    share: Share | None = None,
    mix: Share = 0.5,
    rounds: PositiveInt = 1,
    lr: PositiveFloat | None = None,
) -> Method:
    """The shared path is FedAvg's in both variants; a row is predicted with s B_v A_v + (1 - s) B_w A_w, v being the own adapter.

    s = scale times the mean cosine between the last state (model with v, last token) of the row's prompt and those of some of the client's
    training prompts; below 0 it is 0. As in the authors' code, but for two things: those prompts are drawn once for all rows, and v of T
    trains from the first round on. Windows of general text count as prompts of their own.

    Args:
        variant: `F`: after the last round v is fine-tuned from the final w; `T`: each round v trains beside the received w, then w trains.
        scale: the largest share of the own adapter, 0 to 1: 0 predicts as FedAvg.
        instances: how many of the client's training prompts a row is compared with.
        share: s for all rows, in the place of one for each.
        mix: share of v in the blend with w that it trains in (T).
        rounds: rounds' worth of local steps of the fine-tuning, on the batches that would have come next (F).
        lr: learning rate of the fine-tuning; empty: `training.lr`, since the rounds' cosine has ended by then (F).
    """

    def answer(method: Method, client: Client, package: Bundle) -> dict[str, Prediction]:
        models, own = answer_second(method, client, package), personal_leaves(method, client)
        if not own:  # its fine-tuning is to come, or was lost
            return models
        blend = combine(package.tree("shared"), own)
        if share is None:
            model = Prediction(tree=blend, experts=[], shares=nearness(client, as_first(own), instances, scale))
        else:
            model = Prediction(tree=combine(blend, {MIX: torch.tensor(float(share))}), experts=[])
        return models | {"personal": model}

    common = Method(settle=on_linear_layers(), leaves=twice, personal=own_leaves, row_wise=share is None, answer=answer)
    if variant == "T":
        return replace(common, local=beside(mix), passes=2, fresh=with_second)
    return replace(common, local=first_alone, finalize=fine_tuned_at_the_end(rounds, lr), fresh=lambda method, client: {}, finish=fine_tune)


def nearness(client: Client, tree: Tree, instances: int, scale: float) -> RowShares:
    """Shares in proportion to the mean cosine of a prompt's last state with those of some training prompts of the client."""
    tokenizer, data = client.model.base.tokenizer, client.data_settings

    @cache
    def known() -> Tensor:
        chosen = numpy_rng(client.seed, "instances", client.name).permutation(client.examples)[:instances]
        return last_states(
            client, tree, [prompt_ids(client.data.train[int(row)], tokenizer, data.template, data.max_length) for row in chosen]
        )

    def shares(prompts: Sequence[Sequence[int]]) -> Tensor:
        states = last_states(client, tree, prompts)
        return (scale * cosine_similarity(states[:, None], known()[None], dim=-1).mean(1)).clamp(0, 1)

    return shares
