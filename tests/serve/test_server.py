"""The server as OpenAI's own client meets it."""

from __future__ import annotations

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch

import fedgraft
from fedgraft.serve.keys import make_keys, read_keys
from fedgraft.serve.limits import Limits
from fedgraft.serve.refusal import Refusal
from fedgraft.serve.service import Service

QUESTION = "How many boats on day 3?"
LONG = {"max_tokens": 800, "temperature": 0}


def asked(text=QUESTION):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def server(serving):
    return serving()


@pytest.fixture(scope="module")
def local(trained):
    """`local(model, text, most)`: the greedy answer of transformers' `generate`, and its tokens."""
    loaded = fedgraft.load(trained("flex").folder)

    def write(name, text=QUESTION, most=24):
        ids = torch.tensor([loaded.prompt(text)])
        with loaded.using(name) as model:
            written = model.generate(ids, max_new_tokens=most, do_sample=False)[0, ids.shape[1] :].tolist()
        return loaded.decode(written), len(written), ids.shape[1]

    return write


def test_three_clients_at_once_get_what_they_would_get_locally(server, local):
    """Text and numbers of tokens, plain and streamed, while the answers stand in one batch."""
    names = ["garden", "harbour", "bakery"] * 2 + ["base", "shared"]

    def ask(number):
        client, name, streamed = server.client(), names[number], number % 2 == 1
        wish = {"model": name, "messages": asked(), "temperature": 0, "max_tokens": 24}
        if not streamed:
            found = client.chat.completions.create(**wish)
            return found.choices[0].message.content, found.usage
        chunks = list(client.chat.completions.create(**wish, stream=True, stream_options={"include_usage": True}))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-2].choices[0].finish_reason in {"stop", "length"}
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]), chunks[-1].usage

    with ThreadPoolExecutor(len(names)) as pool:
        found = list(pool.map(ask, range(len(names))))
    for name, (text, usage) in zip(names, found, strict=True):
        expected, written, read = local(name)
        assert (text, usage.completion_tokens, usage.prompt_tokens) == (expected, written, read), name
    assert len({text for text, _ in found}) == 5
    sums = {line.split()[0]: float(line.split()[1]) for line in server.service.metrics.text().splitlines() if line[0] != "#"}
    assert sums["fedgraft_forward_rows_total"] > 1.5 * sums["fedgraft_forwards_total"]


def test_models_are_listed_and_told_apart(server):
    client = server.client()
    assert [model.id for model in client.models.list()] == ["base", "shared", "bakery", "garden", "harbour"]
    assert client.models.retrieve("garden").owned_by == "fedgraft"
    with pytest.raises(openai.NotFoundError, match="'gardn' does not exist"):
        client.models.retrieve("gardn")


def test_completions_continue_texts_and_tokens(server, trained):
    """Several at once, in order; nothing is put around a prompt and nothing is stripped from the answer."""
    client, tokenizer = server.client(), fedgraft.load(trained("flex").folder).tokenizer
    texts = ["There are ", "a"]
    found = client.completions.create(model="harbour", prompt=texts, max_tokens=6, temperature=0)
    again = client.completions.create(model="harbour", prompt=[tokenizer(text)["input_ids"] for text in texts], max_tokens=6, temperature=0)
    streamed = ["", ""]
    for chunk in client.completions.create(model="harbour", prompt=texts, max_tokens=6, temperature=0, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    answers = [choice.text for choice in found.choices]
    assert answers == [choice.text for choice in again.choices] == streamed
    assert found.usage.prompt_tokens == sum(map(len, texts))
    ids = torch.tensor([tokenizer(texts[0])["input_ids"]])
    loaded = server.service.loaded
    with loaded.using("harbour") as model:
        expected = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert answers[0] == tokenizer.decode(expected, skip_special_tokens=True)


def test_seeds_stop_texts_and_lengths(server, local):
    client = server.client()

    def ask(**options):
        return client.chat.completions.create(model="garden", messages=asked(), **({"max_tokens": 24} | options)).choices[0]

    assert ask(seed=3).message.content == ask(seed=3).message.content != ask(seed=4).message.content
    whole = local("garden")[0]
    stop = whole[5:7]
    assert ask(temperature=0, stop=[stop, "never"]).message.content == whole[: whole.index(stop)].strip()
    assert ask(temperature=0, stop=stop).finish_reason == "stop"
    cut = ask(temperature=0, max_completion_tokens=2, max_tokens=5)
    assert (cut.finish_reason, cut.message.content) == ("length", local("garden", most=2)[0])
    parts = [{"role": "user", "content": [{"type": "text", "text": "How many boats "}, {"type": "text", "text": "on day 3?"}]}]
    found = client.chat.completions.create(model="garden", messages=parts, temperature=0, max_tokens=24)
    assert found.choices[0].message.content == whole


BAD = {
    "not JSON": (400, {"content": b'{"model": "base"', "headers": {"content-type": "application/json"}}, "no JSON"),
    "no object": (400, {"json": [1]}, "dictionary"),
    "no model": (400, {"json": {"messages": asked()}}, "model: Field required"),
    "unknown model": (404, {"json": {"model": "gardn", "messages": asked()}}, "'gardn' does not exist"),
    "no messages": (400, {"json": {"model": "base", "messages": []}}, "messages: List should have at least 1 item"),
    "role": (400, {"json": {"model": "base", "messages": [{"role": "king", "content": "x"}]}}, "role 'king'"),
    "no user": (400, {"json": {"model": "base", "messages": [{"role": "system", "content": "x"}]}}, "the user's"),
    "picture": (
        400,
        {"json": {"model": "base", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}},
        "type: Input should be 'text'|text: Field",
    ),
    "too long": (400, {"json": {"model": "base", "messages": asked("x" * 1100)}}, r"has \d+ tokens; at most 1023"),
    "heat": (400, {"json": {"model": "base", "messages": asked(), "temperature": 3}}, "temperature: .*less than or equal to 2"),
    "no number": (
        400,
        {"content": b'{"model":"base","messages":[],"top_p":NaN}', "headers": {"content-type": "application/json"}},
        "top_p|messages",
    ),
    "two answers": (400, {"json": {"model": "base", "messages": asked(), "n": 2}}, "n is not supported"),
    "tools": (400, {"json": {"model": "base", "messages": asked(), "tools": [{}]}}, "tools is not supported"),
    "half a letter": (
        400,
        {"content": rb'{"model":"base","messages":[{"role":"user","content":"\ud800"}]}', "headers": {"content-type": "application/json"}},
        "half a character",
    ),
    "deep": (400, {"content": b"[" * 100_000, "headers": {"content-type": "application/json"}}, ""),
    "empty stop": (400, {"json": {"model": "base", "messages": asked(), "stop": ""}}, "stop"),
    "large": (413, {"json": {"model": "base", "messages": asked("x" * (1 << 20))}}, "larger than 1048576 bytes"),
    "large in parts": (413, {"content": (b"x" * 65536 for _ in range(20)), "headers": {"content-type": "application/json"}}, "larger than"),
    "form": (400, {"data": {"model": "base"}}, ""),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_told_what_is_wrong(server, name):
    status, request, told = BAD[name]
    headers = request.get("headers", {})
    found = httpx.post(f"{server.url}/v1/chat/completions", **(request | {"headers": headers}), timeout=60)
    error = found.json()["error"]
    assert (found.status_code, error.keys()) == (status, {"message", "type", "param", "code"})
    assert re.search(told, error["message"]), error
    assert server.post(json={"model": "base", "messages": asked(), "max_tokens": 1}).status_code == 200


def test_other_paths_and_prompts(server):
    assert httpx.get(f"{server.url}/nix").status_code == 404
    assert httpx.get(f"{server.url}/v1/chat/completions").status_code == 405
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    for prompt, told in (("", "empty"), ([], "prompt"), ([5, 99999], "99999"), ([-1], "prompt"), (["x"] * 65, "prompt")):
        found = server.post("completions", json={"model": "base", "prompt": prompt})
        assert (found.status_code, told in found.json()["error"]["message"]) == (400, True), found.text


def test_other_names_of_this_machine_are_refused_without_keys(server):
    """A web page whose name was pointed at 127.0.0.1 could otherwise ask in its visitor's name."""
    found = httpx.get(f"{server.url}/v1/models", headers={"host": "evil.example:80"})
    assert (found.status_code, "names of this machine" in found.text) == (403, True)
    assert httpx.get(f"{server.url}/v1/models", headers={"host": "[::1]:80"}).status_code == 200


def test_keys_keep_sites_apart(serving, trained, tmp_path):
    names = fedgraft.load(trained("flex").folder).models
    make_keys(tmp_path / "keys.json", names)
    keys = {entry["name"]: entry["key"] for entry in json.loads((tmp_path / "keys.json").read_text())["keys"]}
    server = serving(read_keys(tmp_path / "keys.json", names))
    garden = server.client(keys["garden"])
    assert [model.id for model in garden.models.list()] == ["base", "shared", "garden"]
    assert [model.id for model in server.client(keys["operator"]).models.list()] == names
    wish = {"messages": asked(), "max_tokens": 2}
    assert garden.chat.completions.create(model="garden", **wish).choices
    with pytest.raises(openai.PermissionDeniedError, match="does not open the model 'harbour'"):
        garden.chat.completions.create(model="harbour", **wish)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        garden.chat.completions.create(model="nobody", **wish)
    with pytest.raises(openai.AuthenticationError, match="not known"):
        server.client("fg-wrong").models.list()
    for headers in ({}, {"authorization": "Basic x"}, {"authorization": "Bearer"}):
        found = httpx.post(f"{server.url}/v1/chat/completions", content=b"{", headers=headers)
        assert (found.status_code, found.json()["error"]["code"], found.headers["www-authenticate"]) == (401, "invalid_api_key", "Bearer")
    for key, status in ((keys["garden"], 403), (keys["operator"], 200), ("x", 401)):
        assert httpx.get(f"{server.url}/metrics", headers={"authorization": f"Bearer {key}"}).status_code == status
    assert httpx.get(f"{server.url}/health").status_code == httpx.get(f"{server.url}/").status_code == 200


def test_a_full_queue_is_told_and_who_leaves_makes_room(serving):
    server = serving(batch=1, queue=2)
    answers, chunk = server.client().chat.completions.create(model="base", messages=asked(), stream=True, **LONG), None
    for chunk in answers:
        if chunk.choices[0].delta.content:
            break
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(server.post, json={"model": "garden", "messages": asked(), "max_tokens": 1}) for _ in range(2)]
        until(lambda: len(server.service.scheduler._waiting) == 2)
        found = server.post(json={"model": "garden", "messages": asked()})
        assert (found.status_code, found.json()["error"]["code"], found.headers["retry-after"]) == (429, "queue_full", "1")
        assert server.post("completions", json={"model": "base", "prompt": ["a", "b"]}).status_code == 429
        answers.close()
        assert [one.result().status_code for one in waiting] == [200, 200]
    until(lambda: not server.service.scheduler._running)


def test_a_stop_lets_answers_end_and_refuses_the_rest(serving, monkeypatch):
    server = serving(batch=1)
    scheduler, forward, told = server.service.scheduler, server.service.loaded.model.forward, threading.Event()

    def waits(*args, **kwargs):
        assert told.wait(30)
        return forward(*args, **kwargs)

    monkeypatch.setattr(server.service.loaded.model, "forward", waits)
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(server.post, json={"model": "base", "messages": asked(), "max_tokens": 60, "temperature": 0})
        until(lambda: scheduler._running)
        waiting = pool.submit(server.post, json={"model": "base", "messages": asked()})
        until(lambda: scheduler._waiting)
        server.server.should_exit = True
        until(lambda: scheduler._closing)
        told.set()
        assert (waiting.result().status_code, waiting.result().json()["error"]["code"]) == (503, "stopping")
        assert running.result().status_code == 200
    with pytest.raises(Refusal, match="stopping"):
        scheduler.submit([])


def test_an_answer_that_outlasts_the_grace_is_given_up(serving):
    server = serving(grace=0.0)
    chunks = server.client().chat.completions.create(model="base", messages=asked(), stream=True, **LONG)
    next(iter(chunks))
    server.server.should_exit = True
    with pytest.raises((openai.APIError, httpx.RemoteProtocolError)):
        list(chunks)


def test_a_failing_batch_is_told_and_the_next_goes_on(serving, monkeypatch, caplog):
    server = serving()
    broken = threading.Event()
    forward = server.service.loaded.model.forward

    def fails(*args, **kwargs):
        if broken.is_set():
            raise RuntimeError("no memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(server.service.loaded.model, "forward", fails)
    broken.set()
    wish = {"model": "garden", "messages": asked(), "max_tokens": 3}
    found = server.post(json=wish)
    assert (found.status_code, found.json()["error"]["type"]) == (500, "server_error")
    assert "no memory" in caplog.text
    broken.clear()
    assert server.post(json=wish).status_code == 200


def test_a_model_that_does_not_run_is_noticed_before_requests_come(trained, monkeypatch):
    with fedgraft.load(trained("flex").folder) as loaded:

        def fails(*args, **kwargs):
            raise RuntimeError("no memory")

        monkeypatch.setattr(loaded.model, "forward", fails)
        with pytest.raises(RuntimeError, match="no memory"):
            Service(loaded, Limits())


def test_models_that_can_t_be_mixed_take_turns(serving):
    """Adapted routers: one model at a time, each as it is alone."""
    server = serving(method="fedavg", sections={"lora": {"targets": ["q", "router"]}})
    names = ["garden", "base", "harbour", "garden", "base"]
    with ThreadPoolExecutor(5) as pool:
        asks = [pool.submit(server.post, json={"model": name, "messages": asked(), "temperature": 0, "max_tokens": 8}) for name in names]
        texts = [one.result().json()["choices"][0]["message"]["content"] for one in asks]
    loaded = server.service.loaded
    assert not loaded.mixes
    for name, text in zip(names, texts, strict=True):
        ids = torch.tensor([loaded.prompt(QUESTION)])
        with loaded.using(name) as model:
            assert text == loaded.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist())


def test_what_is_no_live_model_is_not_served(serving):
    server = serving(method="feddpa", sections={"method": {"variant": "T"}})
    assert server.service.models == ["base", "shared"]
    found = server.post(json={"model": "garden", "messages": asked()})
    assert (found.status_code, found.json()["error"]["code"]) == (404, "model_not_found")


def until(true, patience=30):
    end = time.monotonic() + patience
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)
