"""site.yaml: what it says, where relative paths begin, and mistakes named by file and key."""

from __future__ import annotations

import re

import pytest

from fedgraft.deployment.place import Place, place_of
from fedgraft.deployment.site_settings import QUESTIONS, load_site
from fedgraft.methods.method import Method, questions

SITE = "name: north\nmodel: {name: demo}\ndata: {dataset: jsonl, path: rows, partition: files}\n"


@pytest.fixture
def site(tmp_path):
    def write(text=""):
        (tmp_path / "etc").mkdir(exist_ok=True)
        (tmp_path / "etc" / "site.yaml").write_text(SITE + text, encoding="utf-8")
        return tmp_path / "etc" / "site.yaml"

    return write


def test_paths_begin_at_the_file(site, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    settings, place = load_site(site())
    etc = tmp_path / "etc"
    assert settings.data.path == str(etc / "rows")
    assert settings.model.name == "demo"
    assert place == Place(state=etc / "state", door=etc / "state" / "socket")
    assert place.log == etc / "state" / "site.log.jsonl"
    assert place.memories("r1") == etc / "state" / "runs" / "r1" / "clients"


def test_folders_that_are_named(site, tmp_path):
    file = site(f"folder: {tmp_path / 'var'}\nsocket: door\n")
    assert load_site(file)[1] == Place(state=tmp_path / "var", door=tmp_path / "etc" / "door")


def test_a_local_model_and_a_hub_name(site, tmp_path):
    (tmp_path / "etc" / "moe").mkdir(parents=True)
    site()
    for name, wanted in (("moe", str(tmp_path / "etc" / "moe")), ("org/moe", "org/moe")):
        file = tmp_path / "etc" / "site.yaml"
        file.write_text(SITE.replace("demo", name), encoding="utf-8")
        assert load_site(file)[0].model.name == wanted


def test_the_site_decides_where_things_lie_and_the_recipe_the_rest(site):
    settings, _ = load_site(site())
    assert settings.own_data.keys() == {"dataset", "path", "partition", "clients", "categories", "alpha", "overlap"}
    assert "dtype" not in settings.own_model
    assert settings.own_model["offload"] is None  # so that no coordinator can name a folder to write to
    file = site()
    file.write_text(SITE.replace("demo", "demo, dtype: bfloat16").replace("files", "files, train_rows: 7"), encoding="utf-8")
    settings, _ = load_site(file)
    assert settings.own_model["dtype"] == "bfloat16"
    assert settings.own_data["train_rows"] == 7


def test_the_questions_are_those_of_the_frame():
    assert set(QUESTIONS) == {*questions(Method()), "evaluate"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("polcy: {}\n", "unknown key 'polcy' (did you mean 'policy'?)"),
        ("policy: {leafs: []}\n", "unknown key 'policy.leafs' (did you mean 'leaves'?)"),
        ("policy: {privacy: {clipping: 1}}\n", "unknown key 'policy.privacy.clipping' (did you mean 'clip'?)"),
        ("policy: {methods: [flx]}\n", "policy.methods: Value error, unknown name 'flx' (did you mean 'flex'?)"),
        ("policy: {questions: [rows]}\n", "policy.questions: Value error, unknown name 'rows'"),
        ("policy: {leaves: [layers..attention]}\n", "policy.leaves: Value error, a pattern is parts with dots"),
        ("policy: {rounds: 0}\n", "policy.rounds: Input should be greater than or equal to 1"),
        ("folder: 7\n", "folder: Input should be a valid string"),
        ("grace: -1\n", "grace: "),
        ("- a\n", "not valid YAML"),
        ("name: south\n", "line 4: not valid YAML (key 'name' occurs twice)"),
    ],
)
def test_mistakes_name_file_and_key(site, text, said):
    file = site(text)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))}.*{re.escape(said)}"):
        load_site(file)


@pytest.mark.parametrize("name", ["../up", "a/b", ".", ""])
def test_a_name_that_is_no_folder(site, name):
    file = site()
    file.write_text(SITE.replace("north", f"'{name}'"), encoding="utf-8")
    with pytest.raises(ValueError, match="name: Value error, use letters"):
        load_site(file)


def test_what_is_missing_is_named(site):
    file = site()
    file.write_text("name: north\n", encoding="utf-8")
    with pytest.raises(ValueError, match="model: Field required"):
        load_site(file)
    file.write_text("[1]\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"site\.yaml is a mapping"):
        load_site(file)


def test_the_folders_alone_are_read_without_the_rest(site, tmp_path):
    assert place_of(site("folder: var\nno_such_key: 1\n")).state == tmp_path / "etc" / "var"
    with pytest.raises(ValueError, match="socket: name a folder, this is a int"):
        place_of(site("socket: 7\n"))
