"""What a user's rows look like as training data, and what is wrong with them: each problem comes with its remedy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from fedgraft.data.batches import encode
from fedgraft.data.example import SPLITS, Example
from fedgraft.data.partition import ClientData
from fedgraft.data.settings import DataSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNCUT = 1 << 30  # a length no row reaches
FEW_TRAIN, FEW_TEST = 16, 5  # below these a client's own figures are mostly noise
SHORT_WORDS = 5  # the longest response that can be a label
SHOWN = 3  # names listed in a message before "and N more"


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths in tokens over some rows."""

    median: int
    p95: int
    longest: int


@dataclass(frozen=True, kw_only=True)
class ClientSurvey:
    """One client's rows in figures; lengths and repetitions are over all its splits."""

    rows: dict[str, int]
    """Split -> rows."""
    prompt: Lengths
    response: Lengths
    """With the end token."""
    longest: int
    """Tokens of the longest row, prompt and response together."""
    cut: int
    """Rows longer than `max_length`."""
    categories: dict[str, int]
    labels: dict[str, int]
    """Response -> rows where all responses are short labels, else {}."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something to mend, where, and how."""

    client: str
    """"" for all clients together."""
    problem: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Survey:
    """All clients in figures, and what to mend."""

    max_length: int
    """Tokens at which rows were counted as cut."""
    clients: dict[str, ClientSurvey]
    problems: list[Problem]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def row_lengths(clients: Sequence[ClientData], tokenizer: PreTrainedTokenizerBase, template: str) -> dict[str, list[tuple[int, int]]]:
    """Client -> (prompt tokens, response tokens) of each of its rows, uncut, with the template's own words.

    Raises:
        ValueError: the template cannot hold a row.
    """
    rows = {client.name: [encode(example, tokenizer, template, UNCUT)[0] for example in _all(client)] for client in clients}
    return {name: [(row.start, len(row.ids) - row.start) for row in encoded] for name, encoded in rows.items()}


def survey(clients: Sequence[ClientData], lengths: dict[str, list[tuple[int, int]]], settings: DataSettings) -> Survey:
    """Figures and problems of the clients' rows; `lengths` is what `row_lengths` returned for them."""
    labelled = _are_labels([example.response for client in clients for example in _all(client)])
    figures = {client.name: _figures(client, lengths[client.name], settings.max_length, labelled) for client in clients}
    problems = [problem for look in LOOKS for client in clients for problem in look(client, figures[client.name])]
    problems += [problem for problem in (_cut(figures, lengths, settings.max_length), _shared(clients), _lone(clients)) if problem]
    return Survey(max_length=settings.max_length, clients=figures, problems=problems)


def _all(client: ClientData) -> Iterator[Example]:
    return chain(client.train, client.validation, client.test)


def _figures(client: ClientData, lengths: list[tuple[int, int]], max_length: int, labelled: bool) -> ClientSurvey:
    totals = [prompt + response for prompt, response in lengths]
    return ClientSurvey(
        rows={split: len(getattr(client, split)) for split in SPLITS},
        prompt=_spread([prompt for prompt, _ in lengths]),
        response=_spread([response for _, response in lengths]),
        longest=max(totals, default=0),
        cut=sum(total > max_length for total in totals),
        categories=_counted(example.category for example in _all(client)),
        labels=_counted(example.response for example in _all(client)) if labelled else {},
    )


def _spread(values: list[int]) -> Lengths:
    median, p95 = (int(np.percentile(values or [0], share, method="higher")) for share in (50, 95))
    return Lengths(median=median, p95=p95, longest=max(values, default=0))


def _counted(words: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(words).items(), key=lambda item: (-item[1], item[0])))


def _are_labels(responses: list[str]) -> bool:
    """Few different responses, each of a few words and used often."""
    different = set(responses)
    return len(different) * 4 <= len(responses) and all(len(response.split()) <= SHORT_WORDS for response in different)


def _prompt(example: Example) -> str:
    """The prompt without its case and spacing, so that near repetitions are found too."""
    words = [*(content for _, content in example.turns), example.instruction, example.context]
    return " ".join("\x1f".join(words).casefold().split())


def _row(example: Example) -> str:
    return f"{_prompt(example)}\x1f{' '.join(example.response.casefold().split())}"


def _few(client: ClientData, figures: ClientSurvey) -> Iterator[Problem]:
    rows = figures.rows
    if rows["train"] < FEW_TRAIN:
        remedy = "add rows, merge it with a similar client, or compare with `method.name: local` before trusting its figures"
        yield Problem(client=client.name, problem=f"only {_count(rows['train'], 'training row')}", remedy=remedy)
    if 0 < rows["test"] < FEW_TEST:
        yield Problem(
            client=client.name,
            problem=f"only {_count(rows['test'], 'test row')}, so its figures are mostly noise",
            remedy="add rows, or give more of them the field `split: test`",
        )


def _repeated(client: ClientData, figures: ClientSurvey) -> Iterator[Problem]:
    repeated = [example.id for example, count in _occurrences(client.train) if count > 1]
    if repeated:
        yield Problem(
            client=client.name,
            problem=f"training rows that repeat an earlier one: {_named(repeated)}",
            remedy="remove the repetitions; they count double in training and in the average over clients",
        )


def _occurrences(examples: list[Example]) -> Iterator[tuple[Example, int]]:
    seen: Counter[str] = Counter()
    for example in examples:
        seen[_row(example)] += 1
        yield example, seen[_row(example)]


def _leaked(client: ClientData, figures: ClientSurvey) -> Iterator[Problem]:
    trained = {_prompt(example) for example in client.train}
    for split in ("validation", "test"):
        leaked = [example.id for example in getattr(client, split) if _prompt(example) in trained]
        if leaked:
            yield Problem(
                client=client.name,
                problem=f"{split} rows with the prompt of a training row: {_named(leaked)}",
                remedy="remove one of each, or give both the same `split`; else the figures flatter the model",
            )


def _wordless(client: ClientData, figures: ClientSurvey) -> Iterator[Problem]:
    empty = [example.id for example in _all(client) if not _worded(example)]
    if empty:
        yield Problem(
            client=client.name,
            problem=f"responses without a letter or digit: {_named(empty)}",
            remedy="write the answer that the model should give, or remove the rows",
        )


def _worded(example: Example) -> bool:
    return any(character.isalnum() for character in example.response)


def _one_word(client: ClientData, figures: ClientSurvey) -> Iterator[Problem]:
    words = [len(example.response.split()) for example in _all(client)]
    short = [example.id for example, count in zip(_all(client), words, strict=True) if count == 1 and _worded(example)]
    if not figures.labels and short and np.median(words) >= 8 and len(short) * 10 <= len(words):
        yield Problem(
            client=client.name,
            problem=f"responses of a single word where most are sentences: {_named(short)}",
            remedy="check that they are meant; the model learns to answer so",
        )


def _unseen(client: ClientData, figures: ClientSurvey) -> Iterator[Problem]:
    if not figures.labels:
        return
    known = Counter(example.response for example in client.train)
    missing = sorted({example.response for example in (*client.validation, *client.test)} - known.keys())
    if missing:
        yield Problem(
            client=client.name,
            problem=f"labels in validation or test that no training row has: {_named(missing)}",
            remedy="add training rows with them, or move some with the field `split: train`",
        )
    label, most = max(known.items(), key=lambda item: item[1], default=("", 0))
    if len(known) > 1 and most * 10 > 9 * known.total():
        yield Problem(
            client=client.name,
            problem=f"{most} of {known.total()} training rows have the label {label!r}",
            remedy="read its figures against always answering that, and add rows of the other labels",
        )


Look = Callable[[ClientData, ClientSurvey], Iterator[Problem]]
LOOKS: tuple[Look, ...] = (_few, _repeated, _leaked, _wordless, _one_word, _unseen)


def _cut(figures: dict[str, ClientSurvey], lengths: dict[str, list[tuple[int, int]]], max_length: int) -> Problem | None:
    cut, rows = sum(client.cut for client in figures.values()), sum(map(len, lengths.values()))
    if not cut:
        return None
    longest = max(client.longest for client in figures.values())
    return Problem(
        client="",
        problem=f"{cut} of {rows} rows exceed data.max_length {max_length} and lose the end of their context, then of the response",
        remedy=f"set data.max_length up to {longest} if memory allows, or shorten the rows",
    )


def _shared(clients: Sequence[ClientData]) -> Problem | None:
    holders: dict[str, set[str]] = {}
    for client in clients:
        for example in _all(client):
            holders.setdefault(_row(example), set()).add(client.name)
    shared = [names for names in holders.values() if len(names) > 1]
    if not shared:
        return None
    who = _named(sorted(set().union(*shared)))
    return Problem(
        client="",
        problem=f"{_count(len(shared), 'row')} held by more than one client: {who}",
        remedy="fine if the clients really share them; else keep each at one client, or one's test rows are trained on by another",
    )


def _lone(clients: Sequence[ClientData]) -> Problem | None:
    if len(clients) > 1:
        return None
    return Problem(
        client="",
        problem="there is one client, so nothing is federated",
        remedy="write one file per client into a folder, or train it alone with `method.name: local_graft`",
    )


def _named(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
