"""Drift: `collai/` is exactly what the notebooks export."""
import shutil
import subprocess
import sys
from pathlib import Path

import tree
from tree import ROOT


def python_files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.py"))}


def test_the_package_is_what_the_notebooks_export(tmp_path):
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for needed in ("settings.ini", "setup.py", "README.md"):
        shutil.copy(ROOT / needed, tmp_path)
    export = Path(sys.executable).with_name("nbdev_export")
    done = subprocess.run([export], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    fresh, here = python_files(tmp_path / "collai"), python_files(ROOT / "collai")
    stray = sorted(here.keys() - fresh.keys())
    assert not stray, f"no notebook exports collai/{stray}: delete them, or write them in a notebook"
    stale = sorted(n for n in fresh if fresh[n] != here.get(n))
    assert not stale, f"run make export and never edit collai/ by hand; it differs in {stale}"


def test_init_files_stay_empty():
    for path in (ROOT / "collai").rglob("__init__.py"):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
        keep = [line for line in lines if line.startswith("__version__ = ")] if path.parent.name == "collai" else []
        assert lines == keep, f"{tree.name(path)} must stay as generated; import from the modules"


def test_every_module_belongs_to_one_notebook():
    modules = [tree.module_of(p) for p in tree.CHAIN_NOTEBOOKS]
    twice = sorted({m for m in modules if m and modules.count(m) > 1})
    assert not twice, f"exported by two notebooks: {twice}"
