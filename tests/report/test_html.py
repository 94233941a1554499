"""The page of a run and of a comparison: whole, self-contained, and true to the record."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import logging
import math
import re
from importlib import resources
from itertools import pairwise
from pathlib import Path

import pytest

from fedgraft.report.html import MARK, comparison_page, leave_page, run_page, write_page
from fedgraft.report.record import write_recipe
from tests.report.conftest import DIGEST, made_record, measured_record
from tests.report.parsed import parse, tables

BEGUN = {"environment": {}, "selection": {}, "done": 0}
SECTIONS = [
    "quality",
    "training",
    "experts",
    "gates",
    "routing",
    "others",
    "unseen",
    "data",
    "cost",
    "settings",
    "environment",
    "reproduce",
]


def seeded(seed, method="flex"):
    """The recipe of a made record with another seed or method."""
    return made_record().recipe | {"seed": seed, "method": {"name": method}}


def named(method, lift=0.0, **parts):
    """A measured run of another method."""
    return measured_record(lift=lift / 100, recipe=seeded(7, method), folder=Path(method), **parts)


def pages(make):
    """Pages of every stage and kind."""
    plain = make(recipe={key: part for key, part in make().recipe.items() if key not in {"graft", "selection"}}, selection={})
    return {
        "finished": run_page(make()),
        "measured": run_page(measured_record()),
        "stopped": run_page(make(done=1)),
        "trained": run_page(make(results={}, digest="")),
        "chosen": run_page(make(done=0)),
        "begun": run_page(make(**BEGUN)),
        "no graft": run_page(plain),
        "one client": run_page(make(1)),
        "many clients": run_page(make(30)),
        "two grafts": run_page(make(per_layer=2)),
        "one round": run_page(make(rounds=1)),
        "no rounds": run_page(make(rounds=0)),
        "comparison": comparison_page([make(folder=Path("a")), make(folder=Path("b"), done=1), plain]),
        "comparison of seeds": comparison_page([measured_record(lift=seed / 10, recipe=seeded(seed)) for seed in range(3)]),
        "comparison of many": comparison_page([named(f"m{at}", at) for at in range(12)]),
        "unfinished comparison": comparison_page([make(**BEGUN), make(**BEGUN, folder=Path("b"))]),
    }


@pytest.fixture(scope="module")
def every():
    return {name: (document, parse(document)) for name, document in pages(made_record).items()}


def test_pages_are_whole_documents(every):
    for name, (document, root) in every.items():
        assert document.startswith("<!doctype html>"), name
        assert root.one("html").attributes["lang"] == "en"
        assert "width=device-width" in root.one("meta", name="viewport").attributes["content"]
        assert len(root.all("h1")) == 1
        headings = [int(node.tag[1]) for node in root.walk() if re.fullmatch(r"h[1-6]", node.tag)]
        assert all(after - before <= 1 for before, after in pairwise(headings)), name
        ids = [node.attributes["id"] for node in root.walk() if "id" in node.attributes]
        assert len(ids) == len(set(ids)), name
        for node in root.walk():
            for reference in (node.attributes.get("aria-labelledby", "") or node.attributes.get("href", "")).split():
                if not reference.startswith("data:"):
                    assert reference.removeprefix("#") in ids, (name, reference)


def test_nothing_is_loaded_and_nothing_runs_but_our_script(every):
    script = (resources.files("fedgraft") / "assets" / "report" / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    for name, (document, root) in every.items():
        assert document.count("<script") == 1
        assert f"<script>{script}</script>" in document
        assert not {"img", "iframe", "object", "embed", "video", "audio", "source", "use", "image"} & {n.tag for n in root.walk()}, name
        assert not [node for node in root.walk() for attribute in node.attributes if attribute.startswith("on")]
        assert [node.attributes["href"] for node in root.all("link")] == ["data:,"]
        assert not re.search(r"https?:|url\(|@import|javascript:", document), name
        policy = root.one("meta", **{"http-equiv": "Content-Security-Policy"}).attributes["content"]
        assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"


def test_every_figure_has_its_text(every):
    for name, (_, root) in every.items():
        for figure in root.all("figure"):
            drawing = next(node for node in figure.all("svg") if node.attributes.get("role") == "img")
            title, description = drawing.one("title"), drawing.one("desc")
            assert title.text, name
            assert len(description.text) > 10
            assert drawing.attributes["aria-labelledby"].split() == [title.attributes["id"], description.attributes["id"]]
            assert title.text in figure.one("figcaption").text
            hidden = [node for node in figure.all("svg") if node is not drawing]
            assert all(node.attributes["aria-hidden"] == "true" for node in hidden)
            assert "nan" not in "".join(value for node in drawing.walk() for value in node.attributes.values()).lower()
            if figure.attributes["id"] not in {"quality-dots", "partition", "unseen-curve"}:  # their numbers stand in a table beside them
                assert figure.one("details").all("td"), (name, figure.attributes["id"])


def test_every_table_is_labelled_reachable_and_square(every):
    for name, (_, root) in every.items():
        for frame in (node for node in root.all("div", class_="scroll") if node.all("table")):
            assert frame.attributes["tabindex"] == "0"
            assert frame.attributes["aria-label"] == frame.one("table").attributes["aria-label"]
        for table in root.all("table"):
            widths = {len(row.all("td") + row.all("th")) for row in table.all("tr")}
            assert len(widths) == 1, (name, table.attributes["aria-label"])
            assert all(heading.attributes["scope"] in {"col", "row"} for heading in table.all("th"))


def test_a_finished_run_is_told_from_the_record(make):
    record = make(3)
    root = parse(run_page(record))
    assert [section.attributes["id"] for section in root.all("section")] == SECTIONS
    assert not root.all("p", class_="missing")
    assert root.one("h1").text == "flex on tiny"
    for words in ("finished", "3 of 3", DIGEST[:16], "2026-01-02T03:04:05+00:00"):
        assert words in root.one("header").text
    loss = _table(root, "response loss (nats/token)")
    assert loss["client-01"] == ["3.510", "3.010"]
    assert loss["mean"] == ["3.510", "3.010"]
    assert loss["worst"] == ["3.520", "3.020"]
    assert loss["gain over base"] == ["–", "0.500"]
    assert set(loss) == {"client", *record.results, "mean", "std", "worst", "gain over base"}
    assert _table(root, "Training loss per round and client")["2"][0] == "2.990"
    assert _table(root, "Learning rate")["3"] == ["0.001"]
    chosen = _table(root, "Chosen expert per client and MoE layer")
    assert chosen["client-02"] == [str(layer[0]) for layer in record.selection["client-02"]["experts"]]
    assert all(
        cell.endswith("(rank 1)")
        for cell in _table(root, "Relative reconstruction error of the choice per client and MoE layer")["client-00"]
    )
    gates = _table(root, "Mean gate per client and MoE layer")
    assert gates["client-01"] == [f"{layer[0]:.3f}" for layer in record.results["client-01"]["personal"]["gate_mean"]]
    held = next(value for name, value in tables(root).items() if name.startswith("Training rows"))
    assert held["client"] == ["training rows", "sums", "talk", "cut in training", "cut in evaluation"]
    assert held["client-00"] == ["40", "10", "30", "6", "4 of 10"]  # 2 cut in each of 3 rounds
    assert _table(root, "MB per round")["1"] == ["0.001", "0.001"]
    assert _table(root, "Seconds per round")["1"] == ["1.50"]
    assert _table(root, "Tokens per round and per second")["1"] == ["900", "600"]
    assert _table(root, "federation") == {"key": ["value"], "rounds": ["3"]}
    assert _table(root, "data")["categories"] == ["none"]
    assert _table(root, "run") == {"key": ["value"], "seed": ["7"]}
    facts = {row.one("dt").text: row.one("dd").text for row in root.one("section", id="environment").one("dl").all("div")}
    assert facts["packages.torch"] == "2.13.0"
    assert facts["command"] == "fedgraft run 'my recipe.yaml'"
    reproduce = root.one("section", id="reproduce").text
    assert "fedgraft run recipe.yaml --out ../again" in reproduce
    assert DIGEST in reproduce


def _table(root, label):
    return tables(root)[label]


@pytest.mark.parametrize(
    ("stage", "missing"),
    [
        ("begun", {"quality", "training", "experts", "gates", "routing", "data", "cost", "environment"}),
        ("chosen", {"quality", "training", "gates", "routing", "cost"}),
        ("stopped", {"quality", "gates", "routing"}),
        ("trained", {"quality", "gates", "routing"}),
        ("finished", set()),
        ("no graft", set()),
    ],
)
def test_what_is_not_there_is_said_with_the_way_on(every, stage, missing):
    _, root = every[stage]
    lacking = {
        section.attributes["id"]: section.one("p", class_="missing").text
        for section in root.all("section")
        if section.all("p", class_="missing")
    }
    assert set(lacking) == missing
    for name, text in lacking.items():
        assert name in {"data", "environment"} or "fedgraft resume ." in text
    assert ("Finish this run" in root.one("section", id="reproduce").text) == (stage not in {"finished", "no graft"})


def test_a_method_without_grafts_says_so(every):
    _, root = every["no graft"]
    assert "grafts no expert" in root.one("section", id="experts").text


def test_a_stopped_run_leaves_room_for_the_rounds_to_come(every):
    _, root = every["stopped"]
    ticks = [node.text for node in root.one("figure", id="training-loss").all("text", class_="middle")]
    assert "1 of 3" in root.one("header").text
    assert "3" in ticks


def test_two_grafts_of_a_layer_stand_side_by_side(make):
    record = make(per_layer=2)
    root = parse(run_page(record))
    first = record.selection["client-00"]["experts"][0]
    assert _table(root, "Chosen expert per client and MoE layer")["client-00"][0] == f"{first[0]}, {first[1]}"
    drawn = [node.text for node in root.one("figure", id="chosen-experts").all("tspan")]
    assert len(drawn) == 3 * 2 * 2
    assert sorted(drawn) == sorted(str(e) for facts in record.selection.values() for layer in facts["experts"] for e in layer)


def test_comparing_has_runs_as_columns(make):
    other = dataclasses.replace(make(), folder=Path("run's b"), recipe=make().recipe | {"method": {"name": "fedavg"}, "seed": 8})
    root = parse(comparison_page([make(), other]))
    assert [section.attributes["id"] for section in root.all("section")] == [
        "runs",
        "quality",
        "training",
        "experts",
        "others",
        "unseen",
        "data",
        "cost",
        "differences",
        "environment",
        "reproduce",
    ]
    assert _table(root, "response loss (nats/token)")["client"] == ["base", "flex", "fedavg"]
    assert _table(root, "response loss (nats/token)")["client-00"] == ["3.500", "3.000", "3.000"]
    assert _table(root, "Keys in which the recipes differ") == {
        "key": ["flex", "fedavg"],
        "method.name": ["flex", "fedavg"],
        "seed": ["7", "8"],
    }
    assert _table(root, "Bytes (fp32, all clients), tokens and seconds of training")["flex"][3:] == ["2,700", "4.5"]
    assert _table(root, "Mean training loss per round")["3"] == ["2.980", "2.980"]
    assert "fedgraft run 'run'\"'\"'s b/recipe.yaml' --out again/2" in root.one("section", id="reproduce").text
    drawn = {id_: root.one("figure", id=id_) for id_ in ("quality-dots", "training-loss", "bytes-quality")}
    for figure in drawn.values():  # a run looks the same in every figure
        marks = {entry.text: entry.one("path").attributes["class"].split()[1] for entry in figure.one("ul", class_="legend").all("li")}
        assert marks | {"base": "base"} == {"base": "base", "flex": "s0", "fedavg": "s1"}


def test_equal_recipes_have_no_differences(make):
    root = parse(comparison_page([make(folder=Path("a")), make(folder=Path("b"))]))
    assert "same in every key" in root.one("section", id="differences").text


def test_an_unfinished_run_is_named_in_a_comparison(every):
    _, root = every["comparison"]
    assert "fedgraft resume b" in root.one("section", id="runs").one("p", class_="missing").text


HOSTILE = "</title><script>alert('1')</script>&amp;\"'"


def test_hostile_text_stays_text(make):
    record = make([HOSTILE, "b"])
    recipe = record.recipe | {HOSTILE: {"x": HOSTILE}, "model": {"name": HOSTILE}, "method": {"name": HOSTILE}}
    environment = record.environment | {"command": [HOSTILE], "clients": {HOSTILE: {HOSTILE: 3}, "b": {"c": 1}}}
    bad = dataclasses.replace(record, recipe=recipe, environment=environment, folder=Path(HOSTILE.replace("/", "")), digest=HOSTILE)
    for document in (run_page(bad), comparison_page([bad, record])):
        assert document.count("<script") == 1
        root = parse(document)
        assert HOSTILE in _table(root, "response loss (nats/token)")
    assert any(HOSTILE.startswith(node.text.rstrip("…")) for node in parse(run_page(bad)).all("text", class_="tick"))


def test_losses_that_are_no_numbers_leave_a_gap(make):
    record = make(2, rounds=4)
    record.rounds[1]["clients"]["client-00"]["loss"] = math.nan
    record.rounds[1]["loss"] = None
    record.rounds[2]["clients"] = {}
    root = parse(run_page(record))
    figure = root.one("figure", id="training-loss")
    assert len(figure.all("div")[0].all("path", class_="s0")) == 2
    assert _table(root, "Training loss per round and client")["2"][:2] == ["nan", "nan"]


@pytest.mark.parametrize(
    "size", [{"clients": 100, "layers": 48, "experts": 128, "rounds": 200}, {"clients": 400, "layers": 48, "rounds": 60, "per_layer": 4}]
)
def test_pages_of_large_runs_stay_small(make, size):
    record = make(**size)
    document = run_page(record)
    assert len(document.encode()) < 3_000_000
    assert set(_table(parse(document), "response loss (nats/token)")) >= set(record.results)


def test_the_page_of_thousands_of_clients_lists_some_and_says_so(make):
    """Means, ranges and digests are of all of them."""
    record = make(4000, layers=6, rounds=1)
    record.environment["client_digests"] = dict.fromkeys(record.results, "a" * 64)
    document = run_page(record)
    root = parse(document)
    figures = {figure.attributes["id"]: figure for figure in root.all("figure")}
    assert len(document.encode()) < 2_500_000
    assert "first 200 of 4000 clients" in figures["chosen-experts"].text
    assert len(_table(root, "response loss (nats/token); the first 500 of 4000 clients, the record has all")) < 520
    assert "of 4000 clients, in environment.json" in root.one("section", id="environment").text


def test_a_drawing_of_too_many_clients_says_which(make):
    figures = {figure.attributes["id"]: figure for figure in parse(run_page(make(400, layers=48, rounds=60))).all("figure")}
    assert "first 166 of 400 clients" in figures["chosen-experts"].text  # 8,000 fields over 48 layers
    assert "first 100 of 400 clients" in figures["quality-dots"].text
    assert {entry.text for entry in figures["training-loss"].all("li")} == {"lowest client", "highest client", "mean"}


def test_the_same_record_gives_the_same_page_wherever_it_lies(make):
    assert run_page(make()) == run_page(make(folder=Path("/elsewhere/run")))


def test_only_a_report_of_ours_is_overwritten(make, tmp_path):
    path, letter = tmp_path / "report.html", tmp_path / "letter.html"
    for document in ("old", "new"):
        write_page(path, f"{MARK}{document}")
    assert path.read_text() == f"{MARK}new"
    letter.write_text("<p>mine</p>")
    with pytest.raises(ValueError, match=r"letter\.html: exists and is no report of fedgraft"):
        write_page(letter, run_page(make()))
    with pytest.raises(ValueError, match="is no report"):
        write_page(tmp_path, run_page(make()))
    assert letter.read_text() == "<p>mine</p>"
    assert MARK in run_page(make())[:4096]


def test_a_page_that_cannot_be_written_is_logged_and_nothing_else(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        leave_page(tmp_path)
    assert "the run itself is not affected" in caplog.text
    write_recipe(tmp_path / "recipe.yaml", {"method": {"name": "flex"}, "federation": {"rounds": 2}})
    leave_page(tmp_path)
    assert "flex on unknown model" in (tmp_path / "report.html").read_text()
    (tmp_path / "rounds.jsonl").write_text("{}\n")
    leave_page(tmp_path)
    assert caplog.text.count("was not written") == 2
