"""`fedgraft chat`, `generate` and `export` as they are typed."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest
from rich.console import Console

import fedgraft
from fedgraft.cli.chat import _beside
from fedgraft.use.prompts import read_prompts
from fedgraft.use.writing import Conversation, Sampling, write_answers

SHORT = ("--max-new-tokens", "5")


@pytest.fixture
def run(trained):
    return trained("flex").folder


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("How many boats?\nHow many beans?\n")
    return path


@pytest.fixture
def typed(monkeypatch, command):
    """`typed("line", ..., words=[...])`: the command with these lines on standard input."""

    def do(*lines, words):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return command(*words)

    return do


def test_generate_writes_one_line_per_model_and_prompt(command, run, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    done = command("generate", run, "--prompts", prompts, "--all-clients", "--client", "base", *SHORT, "--out", out)
    assert (done.code, done.out) == (0, f"{out}\n")
    assert "answers" in done.err
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["model"] for line in lines[::2]] == ["base", "bakery", "garden", "harbour"]
    loaded = fedgraft.load(run)
    expected = write_answers(loaded, "harbour", read_prompts(prompts), Sampling(max_new_tokens=5), 8)
    assert [line["answer"] for line in lines[-2:]] == expected
    printed = command("generate", run, "--prompts", prompts, "--client", "harbour", *SHORT, "--quiet")
    assert [json.loads(line) for line in printed.out.splitlines()] == lines[-2:]
    assert printed.err == ""
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_generate_refuses_before_it_works(command, run, prompts, tmp_path):
    (tmp_path / "out.jsonl").write_text("mine")
    for words, why in (
        (("--client", "garden", "--out", tmp_path / "out.jsonl"), "never overwritten"),
        ((), "--client: whose model? There are: base, shared, bakery, garden, harbour"),
        (("--client", "gardn"), "did you mean 'garden'"),
        (("--client", "garden", "--set", "training.lr=1"), "only keys of model"),
        (("--client", "garden", "--max-new-tokens", "2000"), "leave no room"),
    ):
        done = command("generate", run, "--prompts", prompts, *words)
        assert done.code == 2, words
        assert why in " ".join(done.err.split())
    assert (tmp_path / "out.jsonl").read_text() == "mine"


def test_an_unfinished_run_is_warned_of(command, run, prompts, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "results.json").unlink()
    done = command("generate", folder, "--prompts", prompts, "--client", "garden", *SHORT)
    assert done.code == 0
    assert "its last committed leaves are used" in " ".join(done.err.split())


def test_chat_remembers_switches_and_forgets(typed, run):
    lines = ("How many boats?", "And now?", "/models", "/forget", "How many boats?", "/use shared base", "Hello", "/nothing", "/quit", "no")
    done = typed(*lines, words=["chat", run, "--client", "garden", *SHORT])
    assert done.code == 0, done.err
    loaded = fedgraft.load(run)
    talk, sampling = Conversation(loaded, "garden"), Sampling(max_new_tokens=5)
    first, second = talk.say("How many boats?", sampling), talk.say("And now?", sampling)
    shared, base = (Conversation(loaded, name).say("Hello", sampling) for name in ("shared", "base"))
    told = [line.strip() for line in done.out.splitlines()]
    assert first != second
    places = [told.index(part) for part in (first, second, "base, shared, bakery, garden, harbour", "forgotten", "now with shared, base")]
    assert places == sorted(places)
    assert told.count(first) == 2
    assert told[told.index("now with shared, base") + 1 :][:4] == ["shared", shared, "base", base]
    assert "/quit" in told[-1]


def test_chat_compares_with_base_and_shared(typed, run):
    done = typed("How many boats?", words=["chat", run, "--client", "garden", "--compare", *SHORT])
    loaded = fedgraft.load(run)
    names = ("base", "shared", "garden")
    answers = [Conversation(loaded, name).say("How many boats?", Sampling(max_new_tokens=5)) for name in names]
    assert [line.strip() for line in done.out.splitlines()] == [part for pair in zip(names, answers, strict=True) for part in pair]


def test_in_a_terminal_answers_stand_side_by_side(run):
    loaded, sink = fedgraft.load(run), io.StringIO()
    talks = [Conversation(loaded, name) for name in ("base", "garden")]
    _beside(talks, "How many boats?", Sampling(max_new_tokens=5), Console(file=sink, force_terminal=True, width=100))
    heads = [line for line in sink.getvalue().splitlines() if "base" in line and "garden" in line]
    assert heads
    assert all(talk.messages[-1]["role"] == "assistant" for talk in talks)


def test_chat_ends_with_what_is_wrong(typed, run):
    done = typed("/use nobody", words=["chat", run, "--client", "garden"])
    assert done.code == 2
    assert "no model 'nobody'" in done.err
    assert typed(words=["chat", run]).code == 2


def test_export_says_how_it_is_loaded(command, run, tmp_path):
    done = command("export", run, "--client", "garden", "--as", "merged", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "trust_remote_code=True" in done.out
    assert "no logit differs by more than" in done.out
    told = command("export", run, "--as", "peft", "--out", tmp_path / "adapter", "--json")
    document = json.loads(told.out)
    assert (document["folder"], document["difference"]) == (str(tmp_path / "adapter"), None)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    refused = command("export", run, "--client", "garden", "--as", "peft", "--out", tmp_path / "none")
    assert refused.code == 2
    assert "are no LoRA" in refused.err


def test_an_export_can_be_talked_with(command, typed, run, tmp_path):
    command("export", run, "--client", "garden", "--as", "fedgraft", "--out", tmp_path / "out")
    done = typed("How many boats?", words=["chat", tmp_path / "out", *SHORT])
    assert done.out.strip() == Conversation(fedgraft.load(run), "garden").say("How many boats?", Sampling(max_new_tokens=5))
