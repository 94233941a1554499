"""What a user installs: the wheel holds everything that is needed, nothing else, and starts."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(*arguments: str, cwd: Path, **environment: str) -> str:
    """Output of a fresh interpreter in a folder from which the source tree is not importable."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=inherited | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_wheel_is_complete_and_starts(tmp_path):
    out, site = tmp_path / "dist", tmp_path / "site"
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source_copy(tmp_path)), cwd=tmp_path)
    (wheel,) = out.glob("fedgraft-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())

    package = ROOT / "src" / "fedgraft"
    shipped = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.relative_to(package.parent).as_posix() for path in shipped} <= names
    assert any(name.startswith("fedgraft/assets/") for name in names)
    for licence in ("LICENSE", "NOTICE"):
        assert any(name.endswith(f".dist-info/licenses/{licence}") for name in names)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fedgraft"}
    assert not any("tests" in Path(name).parts for name in names)

    python("-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(site), str(wheel), cwd=tmp_path)
    place = python("-c", "import fedgraft; print(fedgraft.__file__)", cwd=tmp_path, PYTHONPATH=str(site))
    assert Path(place.strip()).is_relative_to(site)
    assert "Usage" in python("-m", "fedgraft", "--help", cwd=tmp_path, PYTHONPATH=str(site))


def source_copy(tmp_path: Path) -> Path:
    """The checkout without its environment and caches, so that setuptools leaves nothing behind in it."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, copy)
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return copy
