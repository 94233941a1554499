"""The package's front door."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fedgraft

ROOT = Path(__file__).parents[1]


def test_version_is_that_of_the_project_file():
    assert fedgraft.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_no_public_name_is_a_submodule():
    """Importing a submodule would replace the public object of the same name."""
    package = Path(fedgraft.__file__).parent
    submodules = {path.stem for path in package.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert submodules & set(fedgraft.PUBLIC) == set()


def test_all_is_the_public_names():
    assert set(fedgraft.__all__) == {*fedgraft.PUBLIC, "__version__"}


@pytest.mark.parametrize("name", sorted(fedgraft.PUBLIC))
def test_public_name_is_the_object_of_its_module(name):
    module = importlib.import_module(fedgraft.PUBLIC[name])
    assert getattr(fedgraft, name) is getattr(module, name)
    assert callable(getattr(fedgraft, name))


def test_run_is_a_function_whatever_was_imported_before():
    code = "import fedgraft.runner, fedgraft, types; assert isinstance(fedgraft.run, types.FunctionType)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_attribute_lists_the_public_names():
    with pytest.raises(AttributeError, match="load_recipe"):
        _ = fedgraft.nothing
