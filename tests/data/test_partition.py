import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedgraft.data.clients import training_counts
from fedgraft.data.example import SPLITS, Example, read_rows
from fedgraft.data.partition import allocate, by_dirichlet, load_clients
from fedgraft.data.settings import DataSettings

NUMBERS = {"train": 60, "validation": 12, "test": 24}
KINDS = ("a", "b", "c")


def counts(clients):
    return {client.name: training_counts(client) for client in clients}


def load(split, path=None):
    return [Example(f"{split}-{kind}-{n}", kind, "Q", "", "A") for kind in KINDS for n in range(NUMBERS[split])]


def mine(folder, name, rows):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows(number, **fields):
    """`number` rows of each split."""
    return [{"prompt": f"Q{n} {s}", "response": "A", "split": s, **fields} for s in SPLITS for n in range(number)]


def ids(clients, split):
    return [row.id for client in clients for row in getattr(client, split)]


def test_category_is_the_default_and_covers_the_sample():
    clients = load_clients(DataSettings(), seed=0)
    assert [client.name for client in clients] == ["classification", "closed_qa", "information_extraction", "summarization"]
    assert counts(clients) == {client.name: {client.name: 400} for client in clients}
    assert {(len(client.validation), len(client.test)) for client in clients} == {(50, 100)}


def test_limits_take_a_part_of_the_same_rows_and_the_seed_chooses_them():
    def chosen(limit, seed):
        return load_clients(DataSettings(categories=["closed_qa"], train_rows=limit, validation_rows=0, test_rows=5), seed)[0]

    assert chosen(10, 0).train == chosen(30, 0).train[:10]
    assert {row.id for row in chosen(10, 0).train} != {row.id for row in chosen(10, 1).train}
    assert (len(chosen(10, 0).validation), len(chosen(10, 0).test)) == (0, 5)


@given(alpha=st.floats(0.05, 20), clients=st.integers(1, 8), seed=st.integers(0, 1000), limit=st.none() | st.integers(1, 22))
def test_dirichlet_clients_are_disjoint_and_full(alpha, clients, seed, limit):
    settings = DataSettings(partition="dirichlet", clients=clients, alpha=alpha, train_rows=limit)
    found = by_dirichlet(settings, load, seed)
    for split, number in NUMBERS.items():
        taken = ids(found, split)
        assert len(set(taken)) == len(taken)
        assert len(taken) == (3 * number if limit is None or split != "train" else limit * clients)
    assert found == by_dirichlet(settings, load, seed)


@given(seed=st.integers(0, 200), alpha=st.sampled_from([0.1, 1.0, 10.0]))
def test_dirichlet_splits_follow_one_mixture(seed, alpha):
    """20 test rows drawn from 24 per category cannot run out for one client, so they deviate by rounding only."""
    settings = DataSettings(partition="dirichlet", clients=1, alpha=alpha, train_rows=60, validation_rows=10, test_rows=20)
    (client,) = by_dirichlet(settings, load, seed)
    train, test = (Counter(row.category for row in part) for part in (client.train, client.test))
    assert all(abs(test[kind] - train[kind] / 3) < 1 for kind in KINDS)


def test_dirichlet_alpha_sets_the_spread():
    def largest(alpha):
        found = by_dirichlet(DataSettings(partition="dirichlet", clients=3, alpha=alpha, train_rows=12), load, 0)
        return np.mean([max(Counter(row.category for row in client.train).values()) for client in found])

    assert largest(0.05) > 10
    assert largest(1000.0) < 5


def test_overlap_draws_with_replacement():
    settings = DataSettings(partition="dirichlet", clients=6, alpha=0.1, overlap=True, train_rows=100)
    found = by_dirichlet(settings, load, 0)
    assert {len(client.train) for client in found} == {100}
    assert any(len({row.id for row in client.train}) < 100 for client in found)
    assert len(set(ids(found, "train"))) < 600
    for client in found:
        assert len({row.id for row in client.test}) == len(client.test) == 12
    assert len(set(ids(found, "test"))) < 72  # the clients share test rows, but none has a row twice


@given(size=st.integers(0, 50), weights=st.lists(st.floats(0.001, 1), min_size=1, max_size=6), data=st.data())
def test_allocate_fills_within_what_is_there(size, weights, data):
    available = np.array(data.draw(st.lists(st.integers(0, 60), min_size=len(weights), max_size=len(weights))))
    available[0] += max(0, size - available.sum())
    mixture = np.array(weights) / sum(weights)
    share = allocate(size, mixture, available)
    assert share.sum() == size
    assert (share >= 0).all()
    assert (share <= available).all()
    if (available >= np.ceil(size * mixture)).all():
        assert (abs(share - size * mixture) < 1).all()


def test_exhausted_category_is_refilled_in_proportion_to_the_rest():
    """12 rows wanted of a category with 2: the other 10 come 3 : 2 from the remaining 30 and 20."""
    assert allocate(12, np.array([1.0, 0, 0]), np.array([2, 30, 20])).tolist() == [2, 6, 4]


def test_iid_shares_everything_evenly():
    clients = load_clients(DataSettings(partition="iid", clients=7), seed=3)
    assert [client.name for client in clients] == [f"client-0{index}" for index in range(7)]
    assert len(ids(clients, "train")) == 1600
    assert {len(client.train) for client in clients} == {228, 229}
    keys = {(row.category, row.id) for client in clients for row in client.train}
    assert len(keys) == 1600
    assert all(len(kinds) == 4 for kinds in counts(clients).values())


def test_names_keep_their_order_above_a_hundred_clients():
    clients = load_clients(DataSettings(partition="iid", clients=101, validation_rows=1, test_rows=1), seed=0)
    assert (clients[0].name, clients[100].name) == ("client-000", "client-100")


def test_files_are_clients(tmp_path):
    mine(tmp_path, "north.jsonl", rows(3))
    mine(tmp_path, "south/train.jsonl", [{"prompt": "Q", "response": "A"}] * 2)
    mine(tmp_path, "south/validation.jsonl", [{"prompt": "Q", "response": "A"}])
    mine(tmp_path, "south/test.jsonl", [{"prompt": "Q", "response": "A"}])
    clients = load_clients(DataSettings(dataset="jsonl", partition="files", path=str(tmp_path), train_rows=2), seed=0)
    assert [(c.name, len(c.train), len(c.validation), len(c.test)) for c in clients] == [("north", 2, 3, 3), ("south", 2, 1, 1)]
    assert counts(clients) == {"north": {"north": 2}, "south": {"south": 2}}


ERRORS = [
    ({"train_rows": 401}, "category 'classification' has 400 train rows, data.train_rows asks for 401"),
    (
        {"categories": ["closed_qs"]},
        r"data.categories: no category 'closed_qs' \(did you mean 'closed_qa'\?\); there are: classification, ",
    ),
    ({"categories": ["closed_qa", "closed_qa"]}, "data.categories names a category twice"),
    ({"dataset": "doly"}, r"unknown dataset 'doly' \(did you mean 'dolly'\?\)"),
    ({"partition": "iid", "clients": 10, "train_rows": 161}, "data.train_rows: 161 asks 10 clients for 1610 train rows, there are 1600"),
    ({"partition": "dirichlet", "clients": 10, "test_rows": 41}, "data.test_rows: 41 asks 10 clients for 410 test rows, there are 400"),
    ({"partition": "dirichlet", "overlap": True, "test_rows": 401}, "data.test_rows: 401 asks 4 clients for 401 test rows, there are 400"),
    (
        {"partition": "iid", "clients": 201},
        "client 'client-200' has no validation rows; add rows, give some the field split: validation, or set",
    ),
    ({"partition": "dirichlet", "clients": 2000, "validation_rows": 0, "test_rows": 0}, "client 'client-1600' has no train rows; add rows"),
    ({"partition": "files"}, "data.partition 'files' needs data.path to be a folder"),
]


@pytest.mark.parametrize(("fields", "message"), ERRORS)
def test_errors_on_the_sample(fields, message):
    with pytest.raises(ValueError, match=message):
        load_clients(DataSettings(**fields), seed=0)


def own(tmp_path, partition="files", **fields):
    return load_clients(DataSettings(dataset="jsonl", partition=partition, path=str(tmp_path), **fields), seed=0)


def test_errors_on_own_files(tmp_path):
    with pytest.raises(ValueError, match=r"the folder holds no .jsonl or .jsonl.gz file and no subfolder"):
        own(tmp_path)
    mine(tmp_path, "north.jsonl", rows(2))
    mine(tmp_path, "North/train.jsonl", rows(2))
    with pytest.raises(ValueError, match=r"two clients are called 'north' \(upper and lower case count as equal\)"):
        own(tmp_path)


def test_file_named_after_a_split_is_no_client(tmp_path):
    mine(tmp_path, "train.jsonl", rows(2))
    with pytest.raises(ValueError, match=r"train.jsonl: named after a split, not a client; put it at .*/<client>/train.jsonl"):
        own(tmp_path)


@pytest.mark.parametrize("name", ["two words", "a/b", "..", "ü", "", "a.", "NUL", "aux.txt", "com1"])
def test_category_that_cannot_name_a_folder(tmp_path, name):
    mine(tmp_path, "own.jsonl", rows(2, category=name or " "))
    if not name:
        assert [client.name for client in own(tmp_path, "category")] == ["own"]
        return
    with pytest.raises(ValueError, match="cannot name a folder: use letters, digits"):
        own(tmp_path, "category")


def test_client_without_test_rows_unless_none_are_wanted(tmp_path):
    mine(tmp_path, "north.jsonl", [row for row in rows(2) if row["split"] != "test"])
    with pytest.raises(
        ValueError, match=r"client 'north' has no test rows; add rows, give some the field split: test, or set data.test_rows: 0"
    ):
        own(tmp_path)
    assert own(tmp_path, test_rows=0)[0].test == []


def test_no_train_rows_at_all(tmp_path):
    mine(tmp_path, "north.jsonl", [row for row in rows(2) if row["split"] == "test"])
    with pytest.raises(ValueError, match="dataset 'jsonl' has no train rows"):
        own(tmp_path, "dirichlet")
    with pytest.raises(ValueError, match="client 'north' has no train rows; add rows"):
        own(tmp_path, "files", validation_rows=0)


@pytest.mark.parametrize(
    "fields",
    [
        {"alpha": 0},
        {"alpha": float("inf")},
        {"clients": 0},
        {"max_length": 15},
        {"train_rows": 0},
        {"test_rows": -1},
        {"categories": []},
        {"typo": 1},
    ],
)
def test_settings_ranges(fields):
    with pytest.raises(ValidationError):
        DataSettings(**fields)


@pytest.mark.parametrize("partition", ["category", "files"])
def test_a_file_is_read_once_for_all_splits(tmp_path, monkeypatch, partition):
    for name in ("ada", "bo"):
        rows = [{"instruction": f"{name} {split}", "output": "x", "split": split} for split in ("train", "validation", "test")]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    read = []
    monkeypatch.setattr("fedgraft.data.datasets.jsonl.read_rows", lambda path: read.append(path.stem) or read_rows(path))
    found = load_clients(DataSettings(dataset="jsonl", path=str(tmp_path), partition=partition), 0)
    assert [[row.instruction for row in client.test] for client in found] == [["ada test"], ["bo test"]]
    assert sorted(read) == ["ada", "bo"]
