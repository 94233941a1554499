"""Every module of the package keeps every rule, and every rule rejects what it is there to reject."""

from pathlib import Path, PurePath

import pytest

from fedgraft import plugins
from tests.architecture import rules

SRC = Path(__file__).parents[2] / "src"
MODULES = sorted(path.relative_to(SRC) for path in (SRC / "fedgraft").rglob("*.py"))


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_package_keeps_rule(rule):
    sources = {path: (SRC / path).read_text(encoding="utf-8") for path in MODULES}
    violations = [f"src/{path}:{found}" for path, source in sources.items() for found in rule(rules.module_name(path), source)]
    if violations:
        pytest.fail("\n".join([rule.__doc__, *violations]), pytrace=False)


def test_the_package_is_found():
    assert PurePath("fedgraft/tree.py") in MODULES


def test_plugin_folders_are_those_of_the_loader():
    assert set(rules.PLUGIN_FOLDERS) == set(plugins.FOLDERS.values())


def test_layers_name_each_part_once():
    names = [name for layer in rules.LAYERS for name in layer]
    assert len(names) == len(set(names))
    assert {*rules.BESIDE, *(name for beside in rules.BESIDE.values() for name in beside)} <= set(names)


def function(lines: int) -> str:
    return '"""M."""\n\ndef f():\n    """D."""\n' + "    pass\n" * (lines - 2)


BAD = [
    (rules.layer_order, "fedgraft.tree", "from fedgraft.methods import method"),
    (rules.layer_order, "fedgraft.tree", "import fedgraft.moe.load"),
    (rules.layer_order, "fedgraft.data.batches", "from fedgraft import runner"),
    (rules.layer_order, "fedgraft.data.batches", "def f():\n    from fedgraft.training.fit import fit"),
    (rules.layer_order, "fedgraft.data.batches", "if TYPE_CHECKING:\n    from fedgraft.training.fit import fit"),
    (rules.layer_order, "fedgraft.data.batches", "from ..training import fit"),
    (rules.layer_order, "fedgraft.data.batches", "import importlib\nimportlib.import_module('fedgraft.cli')"),
    (rules.layer_order, "fedgraft.engine.flower", "from fedgraft.report import record"),
    (rules.layer_order, "fedgraft.moe.load", "from fedgraft.grafts import graft"),
    (rules.layer_order, "fedgraft.helpers", ""),
    (rules.layer_order, "fedgraft.methods.flex", "from fedgraft import run"),
    (rules.lazy_entry, "fedgraft.__init__", "from fedgraft.tree import Tree"),
    (rules.lazy_entry, "fedgraft.__init__", "import torch"),
    (rules.lazy_entry, "fedgraft.__main__", "from fedgraft.cli import main\n\nmain()"),
    (rules.owned_imports, "fedgraft.runner", "import flwr"),
    (rules.owned_imports, "fedgraft.moe.load", "from peft import LoraConfig"),
    (rules.owned_imports, "fedgraft.training.fit", "from transformers.models import auto"),
    (rules.owned_imports, "fedgraft.data.batches", "def f():\n    import transformers"),
    (rules.owned_imports, "fedgraft.training.fit", "if TYPE_CHECKING:\n    import transformers"),
    (rules.named_errors, "fedgraft.report.tail", "import json\njson.loads('1')"),
    (rules.named_errors, "fedgraft.report.tail", "import json\nlist(map(json.loads, []))"),
    (rules.named_errors, "fedgraft.files", "from json import load"),
    (rules.named_errors, "fedgraft.recipe", "import yaml\nyaml.safe_load('1')"),
    (rules.no_pickle, "fedgraft.files", "import pickle"),
    (rules.no_pickle, "fedgraft.files", "def f():\n    from joblib import dump"),
    (rules.no_pickle, "fedgraft.files", "import torch\ntorch.load('x', weights_only=True)"),
    (rules.no_pickle, "fedgraft.files", "from torch import save"),
    (rules.no_pickle, "fedgraft.files", "import numpy\nnumpy.load('x', allow_pickle=True)"),
    (rules.file_length, "fedgraft.tree", "\n" * 301),
    (rules.file_length, "fedgraft.methods.flex", "\n" * 150),
    (rules.file_length, "fedgraft.methods.method", "\n" * 301),
    (rules.file_length, "fedgraft.moe.families.mixtral", "\n" * 150),
    (rules.function_length, "fedgraft.tree", function(61)),
    (rules.name_chains, "fedgraft.runner", "if a:\n    pass\nelif method == 'flex':\n    pass"),
    (rules.name_chains, "fedgraft.moe.load", "if a:\n    pass\nelif config.model_type == 'mixtral':\n    pass"),
    (rules.docstrings, "fedgraft.tree", "def f():\n    pass"),
    (rules.docstrings, "fedgraft.tree", '"""M."""\n\ndef f():\n    pass'),
    (rules.docstrings, "fedgraft.tree", '"""M."""\n\nclass A:\n    """A."""\n\n    def f(self):\n        pass'),
    (rules.docstrings, "fedgraft.tree", '"""M."""\n\nclass A:\n    x = 1'),
    (rules.no_print, "fedgraft.report.table", "print('x')"),
    (rules.portable, "fedgraft.files", "import fcntl"),
    (rules.portable, "fedgraft.files", "def f():\n    from resource import getrusage"),
    (rules.portable, "fedgraft.files", "import os\nos.fork()"),
    (rules.portable, "fedgraft.files", "multiprocessing.get_context('fork')"),
    (rules.portable, "fedgraft.files", "open('x')"),
    (rules.portable, "fedgraft.files", "path.read_text()"),
    (rules.portable, "fedgraft.files", "path.open('a', encoding='utf-8')"),
    (rules.portable, "fedgraft.files", "path.write_text('x', encoding='utf-8')"),
    (rules.unfinished, "fedgraft.tree", "x = 1  # TO" + "DO: more"),
    (rules.unfinished, "fedgraft.tree", "# enough for" + " now"),
]


@pytest.mark.parametrize(("rule", "module", "source"), BAD)
def test_rule_rejects(rule, module, source):
    assert rule(module, source)


GOOD = [
    (rules.named_errors, "fedgraft.files", "import json\njson.loads(json.dumps(1))"),
    (rules.layer_order, "fedgraft.methods.flex", "from fedgraft.training.fit import fit\nfrom fedgraft import bundle"),
    (rules.layer_order, "fedgraft.grafts.lora", "from fedgraft.moe.family import Family\nfrom .graft import Graft"),
    (rules.layer_order, "fedgraft.cli", "from fedgraft import __version__\nfrom fedgraft.runner import run"),
    (rules.lazy_entry, "fedgraft.__init__", "import importlib\n\ndef f():\n    import torch"),
    (rules.lazy_entry, "fedgraft.__main__", 'if __name__ == "__main__":\n    from fedgraft.cli import main\n    main()'),
    (rules.owned_imports, "fedgraft.data.batches", "if TYPE_CHECKING:\n    from transformers import PreTrainedTokenizerBase"),
    (rules.owned_imports, "fedgraft.engine.flower", "from flwr.app import Message"),
    (rules.no_pickle, "fedgraft.files", "import numpy\nfrom safetensors.torch import load\nnumpy.load('x', allow_pickle=False)"),
    (rules.file_length, "fedgraft.methods.method", "\n" * 300),
    (rules.file_length, "fedgraft.methods.flex", "\n" * 149),
    (rules.function_length, "fedgraft.tree", function(60)),
    (rules.name_chains, "fedgraft.tree", "if a:\n    pass\nelif size == 3:\n    pass"),
    (rules.docstrings, "fedgraft.tree", '"""M."""\n\ndef _f():\n    def g():\n        pass'),
    (rules.no_print, "fedgraft.cli", "print('x')"),
    (
        rules.portable,
        "fedgraft.files",
        "path.open('wb')\npath.open('w', encoding='utf-8', newline='\\n')\nfiles.read_text(path)\nos.open(x, 1)",
    ),
    (
        rules.portable,
        "fedgraft.files",
        "method.open(method)\npath.read_text('utf-8')\nopen(path, 'rb')",
    ),
]


@pytest.mark.parametrize(("rule", "module", "source"), GOOD)
def test_rule_accepts(rule, module, source):
    assert rule(module, source) == []


def test_every_rule_has_an_example_it_rejects():
    assert {rule for rule, _, _ in BAD} == set(rules.RULES)
