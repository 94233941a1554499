"""Many requests over many connections, malformed ones among them, and whatever was answered otherwise than it should have been."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import httpx

Expected = Mapping[tuple[str, str], str]
"""(model, question) -> the greedy answer of that model."""
TOKENS = 12
JSON = {"content-type": "application/json"}
SPOILT: tuple[tuple[int, Callable[[bytes], bytes]], ...] = (
    (400, lambda body: body[:-3]),
    (400, lambda body: b"[]"),
    (400, lambda body: body.replace(b'"user"', b'"king"')),
    (400, lambda body: body.replace(b'"max_tokens": ', b'"max_tokens": -')),
    (404, lambda body: body.replace(b'"model": "', b'"model": "no-')),
    (413, lambda body: body + b" " * (1 << 20)),
)


def storm(url: str, expected: Expected, requests: int, connections: int = 16) -> list[str]:
    """Send the requests; returns what was wrong. Every fourth is malformed, every fifth streams, every eleventh leaves in the middle."""
    cases = list(expected)

    def send(lane: int) -> list[str]:
        wrong = []
        with httpx.Client(base_url=url, timeout=300) as client:
            for number in range(lane, requests, connections):
                wrong += _one(client, number, *cases[(7 * number) % len(cases)], expected)
        return wrong

    with ThreadPoolExecutor(connections) as pool:
        return [line for lines in pool.map(send, range(connections)) for line in lines]


def _one(client: httpx.Client, number: int, model: str, question: str, expected: Expected) -> list[str]:
    wish = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": TOKENS}
    path = "/v1/chat/completions"
    if number % 4 == 3:
        status, spoil = SPOILT[number // 4 % len(SPOILT)]
        found = client.post(path, content=spoil(json.dumps(wish).encode()), headers=JSON)
        return [] if found.status_code == status else [f"{number}: {found.status_code} in the place of {status}: {found.text[:200]}"]
    if number % 11 == 10:
        with client.stream("POST", path, json={**wish, "stream": True}) as leaving:
            next(leaving.iter_lines())
        return []
    if number % 5 == 4:
        text = ""
        with client.stream("POST", path, json={**wish, "stream": True}) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
    else:
        found = client.post(path, json=wish)
        if found.status_code != 200:
            return [f"{number}: {found.status_code} {found.text[:200]}"]
        text = found.json()["choices"][0]["message"]["content"]
    return [] if text == expected[model, question] else [f"{number}: {model} said {text!r} in the place of {expected[model, question]!r}"]
