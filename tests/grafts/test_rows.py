"""A batch whose rows are of different clients, against each client alone."""

from __future__ import annotations

import pytest
import torch

from fedgraft.address import MIX, as_own
from fedgraft.grafts.graft import Fitted
from tests.conftest import PROVEN
from tests.grafts.twins import random_leaves

IDS = torch.randint(3, 259, (7, 12), generator=torch.Generator().manual_seed(7))
MASK = (torch.arange(12) >= torch.tensor([0, 3, 0, 5, 1, 0, 2])[:, None]).long()
WHICH = [2, 0, 3, 1, 2, 3, 1]
"""The client of every row, in no order; client 3 is the base."""
FORMS = [
    {},
    {"form": "preserving", "gate_start": "low", "per_layer": 2},
    {"form": "in_place"},
    {"train": "full", "gate": "off"},
    {"gate": "fixed"},
]


def clients_of(model, per_layer=1):
    """Leaves of three clients: other leaves, other source experts; the first has no graft, the second none in layer 0."""
    found = []
    for number in range(3):
        experts = [[(number + 3 * place) % 8 for place in range(per_layer)], [(number + 1 + place) % 8 for place in range(per_layer)]]
        tree = random_leaves(model.fresh_adapters(number) | model.fresh_side(experts, number), number)
        tree = {key: leaf for key, leaf in tree.items() if not (".side." in key and (number == 0 or (number == 1 and "layers.0" in key)))}
        tree = {key: leaf.to(model.base.model.dtype) for key, leaf in tree.items()}
        found.append(model.fitted(tree, [] if number == 0 else experts))
    return [*found, Fitted()]


@torch.no_grad()
def predicted(model, fitted, rows=slice(None)):
    model.put(fitted)
    return model.base.model(input_ids=IDS[rows], attention_mask=MASK[rows], use_cache=False).logits * MASK[rows, :, None]


def differ(model, clients):
    """How far every row of a mixed batch is at most from the same row predicted by its client alone."""
    mixed = predicted(model, model.side_by_side(clients).of(WHICH))
    worst = 0.0
    for row, client in enumerate(WHICH):
        alone = predicted(model, clients[client], slice(row, row + 1))
        worst = max(worst, float((mixed[row] - alone[0]).abs().max()))
        assert client == 3 or float((predicted(model, Fitted(), slice(row, row + 1)) - alone).abs().max()) > 1e-3
    return worst


@pytest.mark.parametrize("graft", FORMS, ids=str)
@pytest.mark.parametrize("family", PROVEN)
def test_every_row_is_its_own_client_s(tiny_graft, family, graft):
    """In double precision to 1e-9, but a gate that is no leaf is computed in single precision.

    Adapters at every linear layer, shared experts among them, which see all tokens in one list.
    """
    model = tiny_graft(family, base={"dtype": torch.float64}, targets=("q", "v", "linear"), **graft)
    assert differ(model, clients_of(model, graft.get("per_layer", 1))) < (1e-5 if graft.get("gate") == "fixed" else 1e-9)


def test_single_precision_and_another_batch_of_the_same_clients(tiny_graft):
    """To 1e-4 at logits of size 1, as any other batch size would; the stack serves other rows too."""
    model = tiny_graft("qwen2_moe")
    clients = clients_of(model)
    assert differ(model, clients) < 1e-4
    stack = model.side_by_side(clients)
    for which in ([1, 1], [3, 3], [0, 3], [2]):
        mixed = predicted(model, stack.of(which), slice(len(which)))
        for row, client in enumerate(which):
            alone = predicted(model, clients[client], slice(row, row + 1))
            torch.testing.assert_close(mixed[row], alone[0], rtol=1e-4, atol=1e-4)


def test_ranks_second_pairs_blends_and_residuals(tiny_graft):
    """A client of lower rank, one with a blend of two pairs, one with a dense residual, one with a stacked one and no pair."""
    model = tiny_graft("olmoe", base={"dtype": torch.float64})
    trees = [{key: leaf.double() for key, leaf in random_leaves(model.fresh_adapters(0), seed).items()} for seed in range(3)]
    low = {key: leaf[:2] if key.endswith(".A") else leaf[:, :2] for key, leaf in trees[0].items()}
    blend = trees[0] | as_own(trees[1]) | {MIX: torch.tensor(0.3, dtype=torch.float64)}
    dense = trees[2] | {f"{key[:-2]}.residual": 0.1 * leaf.new_ones(32, 32) for key, leaf in trees[2].items() if key.endswith("q.A")}
    stacked = {f"{key[:-2]}.residual.{key[-1]}": leaf for key, leaf in trees[1].items()}
    clients = [model.fitted(tree, []) for tree in (low, blend, dense, stacked)]
    mixed = predicted(model, model.side_by_side(clients).of([3, 2, 1, 0, 2, 1, 3]))
    for row, client in enumerate([3, 2, 1, 0, 2, 1, 3]):
        torch.testing.assert_close(mixed[row], predicted(model, clients[client], slice(row, row + 1))[0], rtol=0, atol=1e-9)


def test_what_is_in_use_for_all_rows_can_t_be_mixed(tiny_graft):
    for target in ("router", "experts"):
        model = tiny_graft("qwen2_moe", targets=("q", target))
        client = model.fitted(random_leaves(model.fresh_adapters(0)), [])
        with pytest.raises(ValueError, match="routers and routed experts are in use for all rows"):
            model.side_by_side([client, Fitted()])
    model = tiny_graft("qwen2_moe")
    tree = random_leaves(model.fresh_adapters(0))
    client = model.fitted(tree | as_own(tree) | {MIX: torch.tensor([0.1, 0.2])}, [])
    with pytest.raises(ValueError, match="blended row by row"):
        model.side_by_side([client, Fitted()])
