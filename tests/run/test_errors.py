"""What a user can mend: one message with the remedy, exit code 2, no traceback, and every file as it was."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fedgraft import files, hosting, runner
from fedgraft.bundle import Bundle
from fedgraft.data import calibration
from fedgraft.evaluation import response
from fedgraft.runner import run
from fedgraft.training import fit as fit_module
from fedgraft.training.client import MemoryStore
from tests.conftest import COMMON
from tests.run.world import World, contents

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in Click:DeprecationWarning")
ROW = '{"instruction": "a", "output": "b", "split": "train"}\n'
LEAN = {
    "training": {"steps": 1},
    "selection": {"tokens": 32},
    "evaluation": {"rows": 1, "generate": False, "models": ["personal"]},
    "federation": {"rounds": 2},
}


@pytest.fixture(scope="module")
def lean(world, tmp_path_factory):
    """A finished FLEx run of two rounds; not to be changed."""
    return run(world.recipe(**LEAN), out=tmp_path_factory.mktemp("lean") / "run").folder


@pytest.fixture
def folder(lean, tmp_path):
    """A run that stands after its first of two rounds as far as its files tell, to be changed."""
    copy = shutil.copytree(lean, tmp_path / "run")
    for name in ("results.json", "digest.txt", "digest.json"):
        (copy / name).unlink()
    return copy


@pytest.fixture
def refused(command, tmp_path) -> Iterator[Callable[..., str]]:
    """`refused(*words)`: the message of a command that must end in 2 and leave every file of the test's folder as it is."""

    def check(*words: str | Path) -> str:
        before = kept(tmp_path)
        done = command(*words, "--quiet")
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("error: ")
        assert "Traceback" not in done.err
        assert kept(tmp_path) == before
        return done.err.removeprefix("error: ").rstrip("\n")

    return check


def kept(folder: Path) -> dict[str, bytes]:
    """All files but the lock, which stays empty, the page, which is made of the others, and what tells of the session itself."""
    apart = {files.LOCK, "report.html", "now.json", "cost.json"}
    return {name: content for name, content in contents(folder).items() if Path(name).name not in apart}


def new(world: World, tmp_path: Path, *assignments: str) -> list[str | Path]:
    """A run of the small recipe with these changes, into a new folder."""
    recipe = world.write(tmp_path / "recipe.yaml")
    return ["run", recipe, "--out", tmp_path / "out", *(word for change in assignments for word in ("--set", change))]


FILES = {
    "empty": (b"", "mine.jsonl: the file holds no rows; write one JSON object per line"),
    "no field": (
        ROW.encode() + b'{"instruction": "a"}\n',
        "mine.jsonl, line 2: no field 'output' or 'response' (found: instruction); accepted:",
    ),
    "no layout": (
        b'{"question": "a"}\n',
        "mine.jsonl, line 1: no layout fits the fields found (question); accepted: instruction, optional",
    ),
    "broken": (
        ROW.encode() + b'{"instruction": \n',
        "mine.jsonl, line 2: broken JSON (Expecting value at column 16); write one JSON object",
    ),
    "encoding": (
        ROW.encode() + b'{"instruction": "sch\xf6n"}\n',
        "mine.jsonl, line 2: not UTF-8 (byte 21 is 0xf6); save the file as UTF-8",
    ),
    "no rows": (
        ROW.encode() * 3,
        "client 'mine' has no validation rows; add rows, give some the field split: validation, or set data.validation",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_data_files(world, refused, tmp_path, name):
    (tmp_path / "data").mkdir()
    content, message = FILES[name]
    (tmp_path / "data" / "mine.jsonl").write_bytes(content)
    assert message in refused(*new(world, tmp_path, f"data.path={tmp_path / 'data'}"))


def test_a_missing_file(world, refused, tmp_path):
    told = refused(*new(world, tmp_path, f"data.path={tmp_path}/none.jsonl", "data.partition=category"))
    assert told == f"{tmp_path}/none.jsonl: there is no such file; check data.path"


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (
            ["data.partition=category", "data.train_rows=100"],
            "category 'bakery' has 14 train rows, data.train_rows asks for 100; lower it or drop the category",
        ),
        (["data.partition=iid", "data.clients=30"], "client 'client-09' has no validation rows; add rows"),
        (["trainig.lr=1"], "unknown key 'trainig' (did you mean 'training'?); there are: model, data"),
        (["training.lrr=1"], "unknown key 'training.lrr' (did you mean 'lr'?); there are: steps"),
        (["method.name=flx"], "unknown method 'flx' (did you mean 'flex'?); there are: "),
        (["data.dataset=dolli"], "unknown dataset 'dolli' (did you mean 'dolly'?); there are: dolly, jsonl"),
        (["selection.criterion=gatemass"], "unknown criterion 'gatemass' (did you mean 'gate_mass'?)"),
        (["training.lr=-1"], "training.lr: Input should be greater than 0 (got -1)"),
        (["federation.rounds=many"], "federation.rounds: Input should be a valid integer"),
        (["data.max_length=3"], "data.max_length: Input should be greater than or equal to 16 (got 3)"),
        (["model.dtype=float8"], "model.dtype: Input should be 'float32', 'bfloat16' or 'float16' (got 'float8')"),
    ],
)
def test_recipes(world, refused, tmp_path, assignments, message):
    assert message in refused(*new(world, tmp_path, *assignments))


def test_a_recipe_that_is_not_utf8(refused, tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"# all\nseed: 1 # sch\xf6n\n")
    told = refused("run", tmp_path / "mine.yaml", "--out", tmp_path / "out")
    assert told == f"{tmp_path}/mine.yaml, line 2: not UTF-8 (byte 0xf6); save the file as UTF-8"


@pytest.mark.parametrize(
    ("missing", "word"), [("config.json", "config.json"), ("model.safetensors", "safetensors"), ("tokenizer.json", "tokenizer")]
)
def test_a_model_folder_with_missing_files(world, refused, tmp_path, missing, word):
    model = shutil.copytree(world.model, tmp_path / "model")
    (model / missing).unlink()
    told = refused(*new(world, tmp_path, f"model.name={model}"))
    assert str(model) in told
    assert word in told


def test_a_base_model_without_moe_layers(world, refused, tmp_path, tiny_tokenizer):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **COMMON | {"intermediate_size": 32}))
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    told = refused(*new(world, tmp_path, f"model.name={tmp_path / 'dense'}"))
    assert all(word in told for word in (str(tmp_path / "dense"), "LlamaForCausalLM", "MoE"))


def test_a_run_folder_that_exists(world, refused, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = refused("run", world.write(tmp_path / "recipe.yaml"), "--out", folder)
    assert told == f"{folder}: exists and is never overwritten; choose another --out, or continue it with: fedgraft resume run"


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2].rstrip() + b"\n"


def flipped(content: bytes) -> bytes:
    """One bit of the last tensor."""
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


def newer(content: bytes) -> bytes:
    if b'"schema": 1' in content or b"schema: 1" in content:
        return content.replace(b'"schema": 1', b'"schema": 2').replace(b"schema: 1", b"schema: 2")
    size = int.from_bytes(content[:8], "little")  # inside a string of the header, where quotes are escaped
    header = content[8 : 8 + size].replace(rb"\"schema\": 1", rb"\"schema\": 2")
    assert len(header) == size
    return struct.pack("<Q", size) + header + content[8 + size :]


STATE, MEMORY = "state/state.safetensors", "clients/garden/memory-0000003.safetensors"
DAMAGED = "damaged or not written by fedgraft ({}); restore it from a copy, or start a new run"
NEWER = "written by a newer fedgraft (schema 2, this one reads up to 1); upgrade fedgraft"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (STATE, cut, "damaged or not written by fedgraft ("),
        (STATE, flipped, DAMAGED.format("ValueError: its checksum does not fit")),
        (STATE, newer, NEWER),
        (MEMORY, flipped, DAMAGED.format("ValueError: its checksum does not fit")),
        (MEMORY, newer, NEWER),
        ("recipe.yaml", lambda content: b"[: nonsense\n", "damaged ("),
        ("recipe.yaml", newer, NEWER),
        ("environment.json", cut, "damaged ("),
        ("environment.json", newer, NEWER),
        ("rounds.jsonl", lambda content: content.replace(b'{"round"', b'{"rou', 1).replace(b": 0", b" 0", 1), ", line 1: damaged ("),
    ],
)
def test_damaged_and_newer_files(refused, folder, name, change, message):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))
    told = refused("resume", folder)
    assert told.startswith(f"{path}")
    assert message in told
    assert told.endswith(("start a new run", "upgrade fedgraft"))


def test_a_memory_in_the_place_of_the_state(refused, folder):
    shutil.copy(folder / MEMORY, folder / STATE)
    assert (
        refused("resume", folder) == f"{folder / STATE}: damaged (it is not the state of a run); restore it from a copy, or start a new run"
    )


def test_a_missing_record_of_the_beginning(refused, folder):
    (folder / "environment.json").unlink()
    assert "environment.json: missing, so what the run began with is unknown; restore the file" in refused("resume", folder)


def test_a_refused_extension_with_other_versions_notes_nothing(refused, folder):
    record = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    files.write_json(folder / "environment.json", record | {"fedgraft": "0.0.1"})
    assert refused("resume", folder, "--rounds", "1") == f"{folder}: 2 rounds are done already; --rounds must not be below that"


def test_another_base(world, refused, folder, tmp_path):
    other = shutil.copytree(world.model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}), encoding="utf-8")
    replace(folder / "recipe.yaml", str(world.model), str(other))
    told = refused("resume", folder)
    assert told == f"{folder}: the base model {str(other)!r} differs from the one this run began with; restore it, or start a new run"


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("change", "who"), [("edited", "client 'garden' differ"), ("gone", "client 'garden' (it has no data now) differ")])
def test_changed_data(world, refused, folder, tmp_path, change, who, known):
    data = shutil.copytree(world.data, tmp_path / "data")
    replace(folder / "recipe.yaml", str(world.data), str(data))
    if change == "edited":
        replace(data / "garden.jsonl", "There are", "There were")
    else:
        (data / "garden.jsonl").unlink()
    if not known:  # written before the digests of clients were kept
        record = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        files.write_json(folder / "environment.json", {name: value for name, value in record.items() if name != "client_digests"})
    told = refused("resume", folder)
    named = f"the data of {who}" if known else "the data differ"
    assert told == f"{folder}: {named} from those this run began with; restore them, or start a new run"


def test_two_processes_in_one_folder(refused, folder, world, tmp_path):
    with files.locked(folder):
        told = refused("resume", folder)
        assert told.startswith(f"{folder}: another fedgraft is running in this folder; wait until it has ended, or stop it")
    (tmp_path / "out").mkdir()
    with files.locked(tmp_path / "out"):
        assert "another fedgraft is running in this folder" in refused(*new(world, tmp_path))


def test_a_folder_taken_while_the_model_was_loading(world, command, tmp_path, monkeypatch):
    load, letter = hosting.load_base, tmp_path / "out" / "letter.txt"

    def slow(settings):
        letter.parent.mkdir()
        letter.write_text("mine", encoding="utf-8")
        return load(settings)

    monkeypatch.setattr(hosting, "load_base", slow)
    done = command(*new(world, tmp_path), "--quiet")
    assert done.code == 2
    assert "exists and is never overwritten" in done.err
    assert contents(tmp_path / "out") == {files.LOCK: b"", "letter.txt": b"mine"}


def stand(folder: Path, at: str) -> str:
    return f"Nothing is lost: the run stands at {at}, its settings are in {folder / 'recipe.yaml'}; continue with: fedgraft resume {folder}"


@pytest.mark.parametrize(
    ("number", "name", "message"),
    [
        (errno.ENOSPC, STATE, "no space left on the disk; free some"),
        (errno.ENOSPC, "rounds.jsonl", "no space left on the disk; free some"),
        (
            errno.EACCES,
            "clients/bakery/memory-0000004.safetensors",
            "no permission (Permission denied); change its owner or mode, or choose",
        ),
        (errno.EROFS, "results.json", "no permission (Read-only file system); change its owner or mode, or choose another folder"),
    ],
)
def test_a_disk_that_is_full_or_forbidden(command, lean, world, tmp_path, monkeypatch, number, name, message):
    """The third round is being done when the write fails; afterwards the run goes on to the same bits."""
    folder = shutil.copytree(lean, tmp_path / "run")
    whole = runner.resume(shutil.copytree(lean, tmp_path / "whole"), rounds=3)
    fsync = os.fsync

    def failing(handle: int) -> None:
        where = os.readlink(f"/proc/self/fd/{handle}")
        if Path(name).name in where:
            raise OSError(number, os.strerror(number))
        fsync(handle)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to know what is being written")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        done = command("resume", folder, "--rounds", "3", "--quiet")
    assert (done.code, done.out) == (2, "")
    at = "round 3 of 3" if name == "results.json" else "round 2 of 3"
    assert done.err.startswith(f"error: {folder / name}: {message}")
    assert done.err.rstrip().endswith(stand(folder, at))
    assert list(folder.rglob("*.tmp")) == []
    assert runner.resume(folder).digest == whole.digest


def test_a_place_where_nothing_can_be_written(world, refused, tmp_path, monkeypatch):
    mkdir = Path.mkdir

    def forbidden(self, *arguments, **options):
        if self.name == "out":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        mkdir(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", forbidden)
    told = refused(*new(world, tmp_path))
    assert told.startswith(f"{tmp_path / 'out'}: no permission (Permission denied); change its owner or mode, or choose another folder")
    assert told.endswith("Nothing was begun")


MEMORY_ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nmore"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    MemoryError(),
]


@pytest.mark.parametrize("error", MEMORY_ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    ("module", "function", "where", "lower"),
    [
        (hosting, "load_base", "loading (", "set model.dtype: bfloat16"),
        (calibration, "batches_alike", "selection of client 'bakery' (", "lower selection.tokens"),
        (fit_module, "_gradients", "training of client 'bakery' (", "raise training.accumulation up to training.batch_size"),
        (response, "batches_in_order", "evaluation of client 'bakery' (", "lower evaluation.batch_size"),
    ],
)
def test_out_of_memory(world, command, tmp_path, monkeypatch, error, module, function, where, lower):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr(module, function, failing)
    done = command(*new(world, tmp_path, "training.steps=1", "selection.tokens=32", "federation.rounds=1"), "--quiet")
    assert (done.code, done.out) == (2, "")
    assert f"error: out of memory in {where}" in done.err
    assert lower in done.err
    assert len(done.err.splitlines()) == 1
    out = tmp_path / "out"
    at = "its start" if "selection" in where or "training" in where else "round 1 of 1"
    at = "round 0 of 1" if "training" in where else at
    assert done.err.rstrip().endswith("Nothing was begun" if "loading" in where else stand(out, at))
    assert out.exists() == ("loading" not in where)


def test_out_of_memory_in_the_training_after_the_last_round(world, command, tmp_path, monkeypatch):
    step, rest = fit_module._gradients, iter(range(3))  # one training step of each client

    def failing(*arguments, **options):
        if next(rest, None) is None:
            raise MemoryError
        return step(*arguments, **options)

    monkeypatch.setattr(fit_module, "_gradients", failing)
    sections = {"method": {"name": "fedavg_ft"}, "graft": None, "federation": {"rounds": 1}, "training": {"steps": 1}}
    file = world.write(tmp_path / "recipe.yaml", **sections)
    done = command("run", file, "--out", tmp_path / "out", "--quiet")
    assert done.code == 2
    assert done.err.startswith("error: out of memory in finishing of client 'bakery' (MemoryError): raise training.accumulation")


def test_a_bug_is_told_apart_from_a_mistake(command, world, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise AttributeError("no such [thing]")

    monkeypatch.setattr(hosting, "load_base", broken)
    done = command(*new(world, tmp_path), "--quiet")
    assert (done.code, done.out) == (1, "")
    assert done.err == (
        "error: AttributeError: no such [thing]\n"
        "This is a bug in fedgraft or in a library; run again with --debug for the traceback: fedgraft --debug ...\n"
    )
    with pytest.raises(AttributeError, match="no such"):
        command("--debug", *new(world, tmp_path), "--quiet")


def test_an_unreadable_file_is_named(command, finished, monkeypatch):
    def forbidden(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    done = command("compare", finished.folder)
    assert done.code == 2
    assert done.err.startswith(f"error: {finished.folder / 'recipe.yaml'}: no permission (Permission denied)")


def test_state_and_memories_from_before_the_checksum_are_read(folder, lean, monkeypatch):
    """A run of an earlier fedgraft resumes to the same digest."""
    for path in (folder / STATE, *folder.glob("clients/*/*.safetensors")):
        bundle = Bundle.load(path)
        content = bundle.encode()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        inner = json.loads(header["__metadata__"]["fedgraft"])
        assert inner.pop("sum")
        header["__metadata__"]["fedgraft"] = json.dumps(inner)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    assert MemoryStore(folder / "clients").load("garden", 3).facts["experts"]
    assert runner.resume(folder).digest == (lean / "digest.txt").read_text(encoding="utf-8").strip()


def replace(path: Path, old: str, new_text: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new_text), encoding="utf-8")
