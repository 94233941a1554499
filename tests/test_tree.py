"""The algebra of trees."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from fedgraft import tree
from tests.strategies import ADDRESSES, given, trees

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@given(trees(), st.sets(st.sampled_from(ADDRESSES)))
def test_combine_undoes_partition(whole, names):
    chosen, rest = tree.partition(whole, names.__contains__)
    assert chosen.keys() == whole.keys() & names
    assert chosen.keys().isdisjoint(rest)
    again = tree.combine(rest, chosen)
    assert again.keys() == whole.keys()
    assert all(again[key] is whole[key] for key in whole)  # shared, not copied


def test_combine_names_the_leaf_that_occurs_twice():
    with pytest.raises(ValueError, match="'b' occurs in two trees"):
        tree.combine({"a": torch.ones(1), "b": torch.ones(1)}, {"b": torch.zeros(1)})


@given(trees(), trees())
def test_digest_is_equal_for_equal_bits_alone(left, right):
    """Against a brute-force comparison of names, dtypes, shapes and bytes, whatever the order of the leaves."""

    def bits(leaves):
        return {key: (leaf.dtype, leaf.shape, leaf.reshape(-1).view(torch.uint8).tolist()) for key, leaf in leaves.items()}

    assert (tree.digest(left) == tree.digest(right)) == (bits(left) == bits(right))
    assert tree.equal(left, right) == (bits(left) == bits(right))
    assert tree.digest(dict(reversed(left.items()))) == tree.digest(left)
    assert tree.equal(left, tree.clone(left))


@given(trees(), st.data())
def test_digest_changes_with_any_bit(whole, data):
    leaves = {key: leaf for key, leaf in whole.items() if leaf.numel() and leaf.dtype != torch.bool}
    if not leaves:
        return
    key = data.draw(st.sampled_from(sorted(leaves)))
    changed = tree.clone(whole)
    raw = changed[key].view(-1).view(torch.uint8)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert tree.digest(changed) != tree.digest(whole)


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.zeros(2, 3, dtype=torch.int32)},  # the same bytes as another dtype
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(6)},
        {"b": torch.zeros(2, 3)},
        {"a": -torch.zeros(2, 3)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(0)},
        {},
    ],
)
def test_digest_changes_with_dtype_shape_address_and_sign_of_zero(other):
    assert tree.digest(other) != tree.digest({"a": torch.zeros(2, 3)})


def test_digest_is_what_it_says():
    """SHA-256 of the text and the little-endian bytes, computed by hand."""
    import hashlib
    import struct

    leaves = {"b": torch.tensor([1, -2]), "a": torch.tensor(0.5, dtype=torch.bfloat16)}
    expected = hashlib.sha256(b"a|bfloat16|[]|" + bytes([0x00, 0x3F]) + b"b|int64|[2]|" + struct.pack("<qq", 1, -2)).hexdigest()
    assert tree.digest(leaves) == expected


def test_digest_does_not_depend_on_memory_layout():
    leaf = torch.arange(6.0).reshape(2, 3)
    assert tree.digest({"a": leaf.T.contiguous()}) == tree.digest({"a": leaf.T})
    assert tree.digest({"a": leaf[:, :2]}) == tree.digest({"a": leaf[:, :2].clone()})


@given(trees(FLOATS))
def test_a_zero_delta_and_an_absent_one_change_nothing(state):
    finite = {key: leaf.nan_to_num(0.0) for key, leaf in state.items()}
    assert tree.equal(tree.apply_delta(finite, {}), finite)
    zero = {key: torch.zeros_like(leaf, dtype=torch.float64) for key, leaf in finite.items()}
    applied = tree.apply_delta(finite, zero)
    assert all(torch.equal(applied[key], finite[key]) and applied[key].dtype == finite[key].dtype for key in finite)


@given(st.lists(st.floats(2.0**-10, 2.0**10, width=32), min_size=2, max_size=8))
def test_adding_the_difference_gives_the_new_value_bit_for_bit(values):
    """Numbers of 24 bits whose exponents differ by at most 20 have a difference of at most 45 bits, so float64 holds it exactly."""
    new = {"a": torch.tensor(values)}
    old = {"a": -torch.tensor(values).flip(0)}
    delta = tree.subtract(new, old)
    assert delta["a"].dtype == torch.float64
    assert tree.equal(tree.apply_delta(old, delta), new)


def test_sums_are_taken_in_float64_and_rounded_once():
    """1 + 2^-25 + 2^-25 is 1 in float32, one addition at a time; the delta's sum 2^-24 + 2^-30 rounds up."""
    state, delta = {"a": torch.ones(1)}, {"a": torch.tensor([2.0**-24 + 2.0**-30], dtype=torch.float64)}
    assert tree.apply_delta(state, delta)["a"].item() == 1 + 2.0**-23


def test_subtract_names_the_leaf_and_both_shapes():
    with pytest.raises(ValueError, match=r"'a': got shape \(2,\) where the state holds \(3,\)"):
        tree.subtract({"a": torch.ones(2)}, {"a": torch.ones(3)})
    with pytest.raises(ValueError, match=r"'a': got shape \(2,\) where the state holds nothing"):
        tree.subtract({"a": torch.ones(2)}, {})


def test_clone_is_detached_and_apart():
    leaf = torch.ones(2, requires_grad=True)
    copy = tree.clone({"a": leaf})["a"]
    copy.add_(1)
    assert not copy.requires_grad
    assert leaf.tolist() == [1, 1]


def test_sizes():
    leaves = {"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(1)}
    assert tree.count(leaves) == 6 + 4 + 1
    assert tree.num_bytes(leaves) == 24 + 8 + 8
    assert (tree.count({}), tree.num_bytes({})) == (0, 0)


def test_digest_of_digests_depends_on_order():
    assert tree.digest_of_digests(["a", "b"]) != tree.digest_of_digests(["b", "a"])
