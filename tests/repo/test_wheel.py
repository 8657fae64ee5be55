"""Wheel: what pip installs works by itself, in an environment that has never seen the repository."""
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import tree
from tree import MODULES, ROOT

EXAMPLES = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)


def run(command: list, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """An environment with nothing of this repository but its wheel; other packages come from the locked one."""
    folder = tmp_path_factory.mktemp("wheel")
    for path in tree.files():
        copy = folder / "source" / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, folder / "source"])
    shutil.rmtree(folder / "source")
    run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"])
    python = folder / "venv" / "bin" / "python"
    run([*pip, "--python", python, "install", "-q", "--no-deps", "--no-index", *folder.glob("*.whl")])
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], cwd=folder).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv"


def environment(venv: Path) -> dict[str, str]:
    """Variables of a user who only has this environment."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))}
    return {**keep, "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def test_every_module_imports_from_the_wheel(installed, tmp_path):
    names = [tree.dotted(m).removesuffix(".__init__") for m in MODULES]
    check = ("import importlib, pathlib, sys\n"
             "for name in sys.argv[1:]:\n"
             "    file = pathlib.Path(importlib.import_module(name).__file__)\n"
             "    assert pathlib.Path(sys.prefix) in file.parents, f'{name} comes from {file}'")
    run([installed / "bin" / "python", "-c", check, *names], cwd=tmp_path, env=environment(installed))


def test_the_command_lists_the_papers_from_another_folder(installed, tmp_path):
    said = run([installed / "bin" / "collai", "list"], cwd=tmp_path, env=environment(installed))
    missing = [card.stem for card in (ROOT / "seeds").glob("*.toml") if card.stem not in said]
    assert not missing, f"collai list does not name {missing}; it says\n{said}"


def test_the_readme_has_an_example():
    assert EXAMPLES, "README.md shows no ```python example"


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_the_readme_examples_run(installed, tmp_path, example):
    said = run([installed / "bin" / "python", "-c", example], cwd=tmp_path, env=environment(installed))
    assert said.strip() and "nan" not in said, f"the example prints {said!r}"
