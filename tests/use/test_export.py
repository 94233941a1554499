"""What was exported predicts in a fresh process as the live model does; what can't be exact is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fedgraft
from fedgraft import seeds
from fedgraft.use.about import UNSTATED, licence_of
from fedgraft.use.export.export import export
from fedgraft.use.export.merged import _compare
from tests.run.conftest import ENVIRONMENT, ROOT
from tests.use.conftest import loss_on

SMALL = {"steps": 2, "batch_size": 2, "lr": 5e-2, "lr_min": 1e-2}
ROUTER_ROW = {"gate_start": "router_row"}
LOW = {"gate_start": "low"}
CASES = {
    # name: (format, how it is loaded, model, run, a word of its kind)
    "package of a client": ("fedgraft", "fedgraft", "garden", {"name": "flex"}, "leaves on their base"),
    "package of the shared leaves": ("fedgraft", "fedgraft", "shared", {"name": "flex"}, "leaves on their base"),
    "adapter of flex": ("peft", "peft", "shared", {"name": "flex"}, "PEFT"),
    "adapter of a client of fedavg": ("peft", "peft", "garden", {"name": "fedavg"}, "PEFT"),
    "adapter of a lower rank": ("peft", "peft", "garden", {"name": "hetlora", "method": {"ranks": [2, 1], "decay": 1.0}}, "PEFT"),
    "adapter of two pairs": ("peft", "peft", "garden", {"name": "apfl"}, "PEFT"),
    "adapter of stacked residuals": ("peft", "peft", "shared", {"name": "flora", "federation": {"rounds": 1}}, "PEFT"),
    "adapter of some layers": ("peft", "peft", "shared", {"name": "fedrep", "method": {"layers": 1}}, "PEFT"),
    "merged lora": ("merged", "plain", "garden", {"name": "fedavg"}, "plain qwen2_moe"),
    "merged residual": ("merged", "plain", "shared", {"name": "fedex_lora"}, "plain qwen2_moe"),
    "merged router and experts": (
        "merged",
        "plain",
        "garden",
        {"name": "fedavg", "family": "mixtral", "lora": {"targets": ["q", "o", "router", "experts"]}},
        "plain mixtral",
    ),
    "in place": ("merged", "plain", "garden", {"name": "flex", "graft": {"form": "in_place"}}, "plain qwen2_moe"),
    "mixtral": ("merged", "plain", "garden", {"name": "flex", "family": "mixtral", "graft": ROUTER_ROW}, "shared expert is the graft"),
    "mixtral, all of the expert": (
        "merged",
        "plain",
        "garden",
        {"name": "flex", "family": "mixtral", "graft": {"train": "full", "gate": "off"}},
        "shared expert is the graft",
    ),
    "mixtral, preserving": (
        "merged",
        "plain",
        "garden",
        {"name": "flex", "family": "mixtral", "graft": {"form": "preserving", "gate": "fixed"}},
        "shared expert is the graft",
    ),
    "mixtral, gate with a bias": ("merged", "custom", "garden", {"name": "flex", "family": "mixtral", "graft": LOW}, "modelling file"),
    "mixtral, two gates": (
        "merged",
        "custom",
        "garden",
        {"name": "flex", "family": "mixtral", "method": {"shared_graft": True}},
        "modelling",
    ),
    "beside a shared expert": ("merged", "custom", "garden", {"name": "flex"}, "modelling file"),
    "olmoe, preserving": ("merged", "custom", "harbour", {"name": "flex", "family": "olmoe", "graft": {"form": "preserving"}}, "modelling"),
}
BIT_FOR_BIT = ("package of a client", "package of the shared leaves", "adapter of flex", "adapter of a client of fedavg")


def run_of(trained, case):
    options = dict(CASES[case][3])
    return trained(options.pop("name"), **options)


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """Case -> (folder, what was written, live logits, live tokens, reloaded tensors, what was said); all reloaded in one fresh process."""
    place = tmp_path_factory.mktemp("exports")
    ids = torch.randint(3, 259, (2, 24), generator=seeds.torch_rng(1, "ids"))
    save_file({"ids": ids}, place / "ids")
    found, jobs = {}, []
    for number, (case, (kind, way, name, _, _)) in enumerate(CASES.items()):
        record, folder = run_of(trained, case), place / f"export-{number}"
        written = export(record.folder, name, kind, folder)
        with fedgraft.load(record.folder, name) as loaded, torch.no_grad():
            logits = loaded.model(input_ids=ids).logits
            options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
            tokens = loaded.model.generate(input_ids=ids[:1], attention_mask=torch.ones_like(ids[:1]), **options)
        found[case] = (folder, written, logits, tokens[0, 24:].tolist())
        base = record.recipe["model"]["name"]
        out = place / f"out-{number}"
        jobs.append({"kind": way, "folder": str(folder), "base": base, "ids": str(place / "ids"), "out": str(out)})
    (place / "jobs.json").write_text(json.dumps(jobs))
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT / "src"), "HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-m", "tests.use.reload", str(place / "jobs.json")]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    again = [load_file(job["out"]) for job in jobs]
    heard = [dict(safe_open(job["out"], "pt").metadata()) for job in jobs]
    return {case: (*found[case], again[number], heard[number]) for number, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES)
def test_a_fresh_process_gives_the_live_logits(exported, case):
    _, written, logits, tokens, again, _ = exported[case]
    assert CASES[case][4] in written.kind
    if case in BIT_FOR_BIT:
        assert torch.equal(again["logits"], logits)
    torch.testing.assert_close(again["logits"], logits, rtol=1e-4, atol=1e-4)
    new = again["written"][0, 24:].tolist()
    if CASES[case][0] != "peft":  # an adapter brings no generation settings, so it may go on after the end
        assert new == tokens
    assert (written.difference is not None) == (CASES[case][0] == "merged")
    assert written.difference is None or written.difference < 1  # a token next to a tie may go to another expert


def test_the_leaves_matter(exported, trained):
    """Every model is far from its base, so equal logits say something."""
    for case, (_, _, logits, *_) in exported.items():
        record = run_of(trained, case)
        ids = torch.randint(3, 259, (2, 24), generator=seeds.torch_rng(1, "ids"))
        with fedgraft.load(record.folder, "base") as loaded, torch.no_grad():
            assert (loaded.model(input_ids=ids).logits - logits).abs().max() > 0.05, case


def test_nobody_is_warned_while_loading(exported):
    """Missing or superfluous keys would be told here."""
    assert {case: heard["heard"] for case, (*_, heard) in exported.items() if heard["heard"] != "[]"} == {}


def test_a_mixtral_becomes_a_qwen2_moe_that_anybody_can_load(exported):
    folder, *_, heard = exported["mixtral"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["norm_topk_prob"], config["shared_expert_intermediate_size"]) == ("qwen2_moe", True, 16)
    assert "auto_map" not in config
    assert "norm_topk_prob" in (folder / "README.md").read_text()  # some tools do not heed it
    assert heard["class"] == "Qwen2MoeForCausalLM"
    names = set(safe_open(folder / "model.safetensors", "pt").keys())
    assert "model.layers.0.mlp.shared_expert_gate.weight" in names
    assert "model.layers.0.mlp.experts.7.down_proj.weight" in names  # one by one, as other tools read them


def test_custom_code_is_refused_without_trust_instead_of_run_without_grafts(exported):
    from transformers import AutoModelForCausalLM

    folder = exported["beside a shared expert"][0]
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    text = (folder / "modeling_grafted.py").read_text()
    assert "<" not in text
    compile(text, "modeling_grafted.py", "exec")


def test_the_card_tells_where_the_model_comes_from(exported, trained):
    record, card = trained("flex"), (exported["beside a shared expert"][0] / "README.md").read_text()
    for part in (
        "# garden",
        "trust_remote_code=True",
        record.environment["base_digest"][:16],
        "| rounds | 2 of 2 |",
        "garden 14",
        "no privacy",
        f"| personal | {record.results['garden']['personal']['loss']:.4f} |",
        "Licences",
    ):
        assert part in card
    assert "undefined" not in card.lower()
    shared = (exported["adapter of flex"][0] / "README.md").read_text()
    assert "mean over clients" in shared
    assert "never saw" not in shared
    assert "| personal |" not in shared
    assert str(exported["adapter of flex"][0].parents[1]) not in card + shared  # nothing says where things lay


def test_a_hub_base_and_its_licence_are_told(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    assert licence_of(str(base)) == licence_of(str(tmp_path / "gone")) == licence_of("mistralai/Mixtral-8x7B-v0.1") == UNSTATED
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    assert licence_of(str(base)) == "mit"
    assert licence_of("demo") == "Apache-2.0"


def test_a_package_moves_and_needs_no_run(exported, tmp_path, world):
    folder = shutil.copytree(exported["package of a client"][0], tmp_path / "elsewhere")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "fedgraft.json", "leaves.safetensors"]
    loaded = fedgraft.load(folder)
    assert (loaded.client, loaded.models) == ("garden", ["base", "garden"])
    with pytest.raises(ValueError, match="an export holds one model, 'garden'"):
        loaded.use("harbour")
    shutil.copytree(world.model, tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(ValueError, match="belong to another base"):
        fedgraft.load(folder, overrides=[f"model.name={tmp_path / 'base'}"])


def test_a_run_whose_base_has_moved_can_be_exported(trained, tmp_path):
    folder, recipe = shutil.copytree(trained("flex").folder, tmp_path / "run"), trained("flex").folder / "recipe.yaml"
    old = trained("flex").recipe["model"]["name"]
    (folder / "recipe.yaml").write_text(recipe.read_text().replace(old, str(tmp_path / "gone")))
    with pytest.raises(ValueError, match="no such folder"):
        export(folder, "garden", "fedgraft", tmp_path / "out")
    export(folder, "garden", "fedgraft", tmp_path / "out", overrides=[f"model.name={old}"])
    assert fedgraft.load(tmp_path / "out").client == "garden"


def test_a_package_can_be_exported_further(exported, trained, tmp_path):
    written = export(exported["package of a client"][0], "garden", "merged", tmp_path / "out")
    assert "modelling file" in written.kind
    assert f"{trained('flex').results['garden']['personal']['loss']:.4f}" in (tmp_path / "out" / "README.md").read_text()


def test_a_package_has_the_loss_of_the_run(exported, trained):
    folder, record = exported["package of a client"][0], trained("flex")
    loaded = fedgraft.load(record.folder, "garden")
    package = fedgraft.load(folder)
    package.source.recipe = loaded.source.recipe  # whose rows are looked at
    assert loss_on(package, "garden") == record.results["garden"]["personal"]["loss"]


@pytest.mark.parametrize(
    ("options", "name", "kind", "why"),
    [
        ({"name": "flex"}, "garden", "peft", r"grafted experts and their gates are no LoRA.*--client shared"),
        ({"name": "fedex_lora"}, "shared", "peft", r"layers\.0\.attention\.q\.residual is a dense change"),
        ({"name": "local"}, "shared", "peft", "shares is nothing"),
        ({"name": "fedavg", "lora": {"targets": ["q", "router"]}}, "shared", "peft", "router's rows were trained in full"),
        ({"name": "fedavg", "lora": {"targets": ["q", "experts"]}}, "shared", "peft", "routed experts lie one by one"),
        ({"name": "fedavg", "lora": {"targets": ["shared"]}}, "garden", "peft", r"takes a layer called gate_proj for the routed experts"),
        ({"name": "flex"}, "base", "merged", "the base is there already"),
        ({"name": "flex"}, "garden", "gguf", r"no such format; choose from peft, fedgraft, merged"),
        ({"name": "flex"}, "gardener", "fedgraft", r"did you mean 'garden'"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(trained, tmp_path, options, name, kind, why):
    options = dict(options)
    record = trained(options.pop("name"), **options)
    with pytest.raises(ValueError, match=why):
        export(record.folder, name, kind, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(trained, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ValueError, match="never overwritten"):
        export(trained("flex").folder, "garden", "fedgraft", tmp_path / "out")
    (tmp_path / "out" / "mine").unlink()
    export(trained("flex").folder, "garden", "fedgraft", tmp_path / "out")
    assert (tmp_path / "out" / "README.md").is_file()


def test_another_model_than_the_live_one_is_never_written(trained, tmp_path, monkeypatch):
    """The comparison after reloading is what stands between a wrong conversion and a user."""
    from fedgraft.use.export import weights

    monkeypatch.setattr(weights, "_pair", lambda leaves, name, alpha: 0 * leaves[f"{name}.B"].double() @ leaves[f"{name}.A"].double())
    with pytest.raises(ValueError, match="logits differ by up to"):
        export(trained("flex").folder, "garden", "merged", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_sixteen_bits_are_rounded_and_said_so(trained, tmp_path):
    record = trained("fedavg", model={"dtype": "bfloat16"}, training={"steps": 1, "batch_size": 2})
    written = export(record.folder, "garden", "merged", tmp_path / "out")
    assert "rounded to bfloat16" in written.notes[0]
    assert written.difference > 0


def test_a_window_keeps_mixtral_from_becoming_a_qwen2_moe(tiny_base):
    from fedgraft.use.export.qwen2_moe import why_not

    assert "a window of 16 tokens" in why_not(tiny_base("mixtral", sliding_window=16), {})
    assert why_not(tiny_base("mixtral"), {}) == ""


def test_paths_of_the_adapter_are_the_modules_of_the_model(exported, trained):
    """No suffix that could match another layer."""
    import re

    settings = json.loads((exported["adapter of flex"][0] / "adapter_config.json").read_text())
    with fedgraft.load(trained("flex").folder) as loaded:
        names = [name for name, _ in loaded.model.named_modules() if re.fullmatch(settings["target_modules"], name)]
    assert names == [f"model.layers.{layer}.self_attn.{role}_proj" for layer in (0, 1) for role in "qkv"]
    assert Path(settings["base_model_name_or_path"]).is_dir()


def test_single_tokens_next_to_a_tie_may_differ_and_another_model_may_not():
    """In fp32 all logits of a twentieth of the tokens may be off; a thousandth of the deviation on all tokens may not."""
    before = torch.randn(4, 20, 50, generator=torch.Generator().manual_seed(0))
    few, all_, wild = before.clone(), before + 2e-3, before.clone()
    few[:, 7] += 0.15
    wild[:, 7] += 10.0
    assert _compare(few, before, exact=True) == pytest.approx(0.15, rel=1e-5)
    assert _compare(all_, before, exact=False) == pytest.approx(2e-3, rel=1e-3)
    for other in (all_, wild, before * float("nan")):
        with pytest.raises(ValueError, match="so it is another model"):
            _compare(other, before, exact=True)
