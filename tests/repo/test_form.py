"""Form: every notebook looks like the template in CONTRIBUTING.md, and imports point downwards only."""
import ast
import base64
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tree
from tree import CHAIN_NOTEBOOKS, MODULES, NOTEBOOKS, PAPER_NOTEBOOKS, ROOT, SHARED

KB = 1024
CLAIM = "application/vnd.collai.claim+json"
each = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=tree.name)
each_in_chain = pytest.mark.parametrize("notebook", CHAIN_NOTEBOOKS, ids=tree.name)
each_of_paper = pytest.mark.parametrize("notebook", PAPER_NOTEBOOKS, ids=tree.name)


def test_nbdev_clean_changes_nothing(tmp_path):
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copy(ROOT / "settings.ini", tmp_path)
    subprocess.run([Path(sys.executable).with_name("nbdev_clean")], cwd=tmp_path, check=True, capture_output=True)
    dirty = [tree.name(p) for p in NOTEBOOKS if p.read_bytes() != (tmp_path / p.relative_to(ROOT)).read_bytes()]
    assert not dirty, f"run make clean-nbs; it would change {dirty}"


@each
def test_the_notebook_opens_with_title_and_summary(notebook):
    first = tree.cells(notebook)[0]
    assert first.kind == "markdown" and re.match(r"# \S.*\n\n?> \S.*", first.text), \
        "cell 0 must be markdown: '# Title', then a line '> one-sentence summary'"


@each_in_chain
def test_the_notebook_says_what_it_exports_and_takes_parameters(notebook):
    module = tree.module_of(notebook)
    assert module and module.startswith(f"collai.{notebook.parent.name}."), \
        f"a code cell '#| default_exp {notebook.parent.name}.NAME' is missing (found {module})"
    tagged = [cell for cell in tree.code(notebook) if "parameters" in cell.tags]
    assert len(tagged) == 1, "one code cell must be tagged 'parameters', for papermill"
    body = tagged[0].tree.body
    plain = [isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.List | ast.Tuple | ast.Dict | ast.UnaryOp)
             for node in body]
    assert all(plain), "the parameters cell must only assign literals: papermill replaces them"
    names = {target.id for node in body for target in node.targets}
    assert {"profile", "seed"} <= names, f"the parameters cell must set profile and seed, it sets {sorted(names)}"


@each_of_paper
def test_the_notebook_has_a_notation_table(notebook):
    header = re.compile(r"^\| *symbol *\|.*\n\|[-| :]+\|", re.M)
    assert any(cell.kind == "markdown" and header.search(cell.text) for cell in tree.cells(notebook)), \
        "a markdown cell with the table '| symbol | meaning | shape | unit | name in code |' is missing"


@each
def test_cells_are_short(notebook):
    long = [f"cell {c.index}: {c.lines} lines" for c in tree.code(notebook) if c.lines > (40 if c.exported else 15)]
    assert not long, f"split: exported cells have at most 40 lines, others 15; {long}"


@each
def test_no_cell_both_imports_and_computes(notebook):
    """Imports for the type checker alone may stand anywhere."""
    mixed = []
    for cell in tree.code(notebook):
        body = [node for node in cell.tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
        if len({isinstance(node, ast.Import | ast.ImportFrom) for node in body}) == 2:
            mixed.append(cell.index)
    assert not mixed, f"move the imports into a cell of their own: cells {mixed}"


@each
def test_outputs_are_committed_without_errors(notebook):
    code = tree.code(notebook)
    assert any(cell.outputs for cell in code), "no outputs: run make refresh CHAIN=... and commit the notebook"
    errors = [c.index for c in code if any(o["output_type"] == "error" for o in c.outputs)]
    assert not errors, f"error outputs in cells {errors}: repair, then make refresh"
    noisy = [c.index for c in code if any(o.get("name") == "stderr" for o in c.outputs)]
    assert not noisy, f"stderr in cells {noisy}: repair the cause of the warning, then make refresh"


@each
def test_nothing_in_the_file_changes_from_run_to_run(notebook):
    code = tree.code(notebook)
    assert all(cell.count is None for cell in code), "execution counts must be null: make refresh does it"
    full = [c.index for c in code if "volatile" in c.tags and c.outputs]
    assert not full, f"cells {full} are tagged volatile, their outputs must be empty: make refresh does it"
    injected = [c.index for c in code if "injected-parameters" in c.tags]
    assert not injected, f"papermill's cell {injected} must not be committed: make refresh drops it"
    addresses = [c.index for c in code if re.search(r" at 0x[0-9a-f]{6}", "".join(str(o.get("data", o.get("text"))) for o in c.outputs))]
    assert not addresses, f"outputs of cells {addresses} show a memory address: end the cell with ';' or plt.show()"


@each_of_paper
def test_the_notebook_shows_a_captioned_figure_and_a_claim(notebook):
    cells = tree.cells(notebook)
    figures = [i for i, cell in enumerate(cells) if any("image/png" in o.get("data", {}) for o in cell.outputs)]
    assert figures, "no figure among the outputs"
    bare = [i for i in figures if i + 1 == len(cells) or not cells[i + 1].text.startswith("**Figure ")]
    assert not bare, f"the cell after a figure must be its caption and start with '**Figure N.**': cells {bare}"
    assert any(CLAIM in o.get("data", {}) for cell in cells for o in cell.outputs), "no claim(...) row among the outputs"


@each
def test_files_and_pictures_are_small(notebook):
    size = notebook.stat().st_size
    assert size <= 300 * KB, f"{size / KB:.0f} kB, at most 300: fewer or smaller figures, less printed"
    pictures = [(c.index, len(base64.b64decode("".join(o["data"]["image/png"]))))
                for c in tree.code(notebook) for o in c.outputs if "image/png" in o.get("data", {})]
    big = [f"cell {i}: {n / KB:.0f} kB" for i, n in pictures if n > 150 * KB]
    assert not big, f"a picture has at most 150 kB: {big}"


def test_all_notebooks_together_stay_below_12_mb():
    total = sum(p.stat().st_size for p in NOTEBOOKS)
    assert total <= 14 * KB * KB, f"{total / KB / KB:.1f} MB"


@each_in_chain
def test_a_notebook_imports_only_what_comes_before_it(notebook):
    names = set().union(*(tree.imports(cell.tree) for cell in tree.code(notebook)))
    before = {tree.module_of(p) for p in CHAIN_NOTEBOOKS if p.parent == notebook.parent and p < notebook}
    wrong = [m for m in tree.own_modules(names) if m.split(".")[1] == notebook.parent.name and m not in before]
    assert not wrong, f"imports {wrong}; its chain has only {sorted(before)} before it"


@pytest.mark.parametrize("module", MODULES, ids=tree.name)
def test_imports_point_downwards_only(module):
    chain = module.parent.name
    allowed = {chain} | SHARED.get(chain, set(SHARED))
    names = tree.imports(ast.parse(module.read_text(encoding="utf-8")), tree.dotted(module.parent))
    wrong = [m for m in tree.own_modules(names) if m.split(".")[1] not in allowed]
    assert not wrong, f"{chain} may import {sorted(allowed)} of this package, not {wrong}"


def test_no_file_names_a_machine():
    """No host of a package registry and no folder of someone's computer may be written into a file."""
    hosts = [r"pypi\.org", r"pythonhosted\.org", r"registry\.npmjs", r"download\.pytorch", r"deb\.debian"]
    folders = [r"(?<![\w.])/" + r"(root|work|home/[a-z]\w*|Users/[A-Z]\w*)/[\w.]"]
    folders += [r"(?<![\w.])" + re.escape(str(ROOT)) + r"\b"] if len(ROOT.parts) > 2 else []
    pattern = re.compile("|".join(hosts + folders))
    found = []
    for path in tree.files():
        if path == Path(__file__):
            continue
        text = path.read_bytes().decode("utf-8", errors="ignore")
        found += [f"{tree.name(path)}: {hit.group(0)}" for hit in pattern.finditer(text)]
    assert not found, f"name no host and no folder of one machine: {found[:10]}"


def test_stored_results_say_where_they_come_from():
    for path in (ROOT / "nbs").glob("*/results/*.json"):
        stored = json.loads(path.read_text(encoding="utf-8"))
        for run in stored["runs"].values():
            missing = {"device", "date", "versions", "command"} - run.keys()
            assert not missing, f"{tree.name(path)}: a run without {sorted(missing)}"
        orphans = [name for name, row in stored["rows"].items() if row["run"] not in stored["runs"]]
        assert not orphans, f"{tree.name(path)}: rows {orphans} point to no run"
