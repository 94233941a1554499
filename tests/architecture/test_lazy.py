"""Start-up stays light: importing the command line loads none of the heavy libraries."""

import json
import subprocess
import sys

import pytest

HEAVY = {
    "torch",
    "numpy",
    "scipy",
    "transformers",
    "tokenizers",
    "peft",
    "pydantic",
    "matplotlib",
    "datasets",
    "flwr",
    "rouge_score",
    "jinja2",
}


def loaded_by(statement: str) -> set[str]:
    """Top-level packages in sys.modules after the statement ran in a fresh interpreter."""
    code = f"import sys, json\n{statement}\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("statement", ["import fedgraft", "import fedgraft.cli", "import fedgraft; dir(fedgraft)"])
def test_start_up_loads_nothing_heavy(statement):
    assert loaded_by(statement) & HEAVY == set()


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["run", "--help"],
        *([name, "--help"] for name in ("sweep", "chat", "generate", "export")),
        *(["list", kind] for kind in ("methods", "families", "criteria", "datasets", "recorders", "method")),
    ],
    ids=" ".join,
)
def test_help_lists_and_mistakes_load_nothing_heavy(words):
    """`list` reads docstrings without running the modules."""
    code = f"import sys\nsys.argv = {['fedgraft', *words]!r}\nfrom fedgraft.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass"
    assert loaded_by(code) & HEAVY == set()


def test_the_probe_sees_what_is_loaded():
    assert "fractions" in loaded_by("import fractions")
