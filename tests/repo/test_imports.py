"""Imports: the package and its command start fast, and a module loads only what it needs."""
import itertools
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import tree
from tree import MODULES, ROOT

PYTHON = [sys.executable]
ENV = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
COLLAI = str(Path(sys.executable).with_name("collai"))
PAPER_MODULES = [m for m in MODULES if m.name != "__init__.py" and m.parent.name not in ("collai", "core")]
# Beside these and the standard library, a paper's module imports everything inside the functions that need it,
# so that it can be measured on a GPU machine that has nothing else (house rule for `python -m collai.<slug>.<module>`).
LIGHT = {"numpy", "scipy", "jaxtyping", "tqdm", "torch", "transformers", "collai"}


def seconds(command: list[str]) -> float:
    """Processor seconds of a process, the best of seven: other work on the computer only ever adds to it."""
    used = []
    for _ in range(8):
        subprocess.run(command, cwd=ROOT, env=ENV, check=True, capture_output=True)
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(children.ru_utime + children.ru_stime)
    return min(after - before for before, after in itertools.pairwise(used))


@pytest.mark.parametrize(("command", "limit"), [([*PYTHON, "-c", "import collai"], 0.1), ([COLLAI, "--help"], 0.5)],
                         ids=["import collai", "collai --help"])
def test_starts_fast(command, limit):
    extra = seconds(command) - seconds([*PYTHON, "-c", "pass"])
    assert extra < limit, f"{extra:.2f} s over the bare interpreter, at most {limit}: python -X importtime shows where"


def test_shared_modules_load_neither_torch_nor_transformers():
    shared = [tree.dotted(m) for m in MODULES if m.parent.name in ("core", "eval") and m.stem not in ("__init__", "tinylm")]
    check = ("import importlib, sys\n"
             "for name in sys.argv[1:]:\n"
             "    importlib.import_module(name)\n"
             "    heavy = {'torch', 'transformers'} & sys.modules.keys()\n"
             "    if heavy: sys.exit(f'{name} loads {sorted(heavy)}; import it inside the function that needs it')")
    done = subprocess.run([*PYTHON, "-c", check, *shared], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", PAPER_MODULES, ids=tree.name)
def test_a_paper_module_loads_few_packages(module):
    top = set()
    for node in tree.ast.parse(module.read_text(encoding="utf-8")).body:
        top |= {name.split(".")[0] for name in tree.imports(node, tree.dotted(module.parent))
                if isinstance(node, tree.ast.Import | tree.ast.ImportFrom)}
    wrong = top - LIGHT - set(sys.stdlib_module_names)
    assert not wrong, f"import {sorted(wrong)} inside the functions that need it"
