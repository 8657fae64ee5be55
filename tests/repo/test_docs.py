"""Docs: every public name of the package explains itself, and `__all__` lists all of them."""
import ast
import re
from pathlib import Path

import pytest
import tree
from tree import MODULES

each_module = pytest.mark.parametrize("module", [m for m in MODULES if m.name != "__init__.py"], ids=tree.name)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def parse(module: Path) -> ast.Module:
    return ast.parse(module.read_text(encoding="utf-8"))


def section(doc: str, title: str) -> str:
    """Text of one section of a NumPy-style docstring, empty without it."""
    found = re.search(rf"^{title}\n---+\n(.*?)(?=^\w[^\n]*\n---|\Z)", doc, re.M | re.S)
    return found.group(1) if found else ""


def walk_own(node: ast.AST):
    """Walk a function's body without the functions, classes and lambdas defined in it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, Function | ast.ClassDef | ast.Lambda):
            yield child
            yield from walk_own(child)


def parameters(function: Function) -> list[str]:
    a = function.args
    every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
    return [arg.arg for arg in every if arg.arg not in ("self", "cls") and not arg.arg.startswith("_")]


def is_command(function: Function) -> bool:
    """A command of the command line: typer shows its docstring, its options carry their own help."""
    return any(isinstance(d, ast.Call) and ast.unparse(d.func).endswith((".command", ".callback"))
               for d in function.decorator_list)


def missing_in_function(function: Function, label: str) -> list[str]:
    doc = ast.get_docstring(function) or ""
    if not doc:
        return [f"{label}: no docstring"]
    if is_command(function):
        return []
    listed = section(doc, "Parameters")
    names = {n.strip().lstrip("*") for line in re.findall(r"^([*\w][^:\n]*)", listed, re.M) for n in line.split(",")}
    found = [f"{label}: parameter {p!r} is not described" for p in parameters(function) if p not in names]
    returns = function.returns is not None and ast.unparse(function.returns) not in ("None", "NoReturn")
    if returns and not (section(doc, "Returns") or section(doc, "Yields")):
        found.append(f"{label}: no Returns section")
    raised = {ast.unparse(n.exc.func if isinstance(n.exc, ast.Call) else n.exc) for n in walk_own(function)
              if isinstance(n, ast.Raise) and n.exc is not None}
    errors = {r for r in raised if re.fullmatch(r"[A-Z]\w*", r)}
    return found + [f"{label}: {e} is not in a Raises section" for e in sorted(errors) if e not in section(doc, "Raises")]


def missing_in_class(node: ast.ClassDef) -> list[str]:
    doc = ast.get_docstring(node) or ""
    if not doc:
        return [f"{node.name}: no docstring"]
    listed = section(doc, "Parameters") + section(doc, "Attributes")
    fields = [f.target.id for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)]
    found = [f"{node.name}: field {f!r} is not described" for f in fields
             if not f.startswith("_") and not re.search(rf"^[^\n:]*\b{f}\b", listed, re.M)]
    methods = [m for m in node.body if isinstance(m, Function) and not m.name.startswith("_")]
    return found + [x for m in methods for x in missing_in_method(m, f"{node.name}.{m.name}")]


def missing_in_method(method: Function, label: str) -> list[str]:
    """A property or a method without parameters needs its sentence only."""
    if any("property" in ast.unparse(d) for d in method.decorator_list) or not parameters(method):
        return [] if ast.get_docstring(method) else [f"{label}: no docstring"]
    return missing_in_function(method, label)


@each_module
def test_every_public_name_is_described(module):
    body = parse(module)
    found = [] if ast.get_docstring(body) else ["the module: no docstring (the notebook's '> summary' line makes it)"]
    for node in body.body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            found += missing_in_function(node, node.name)
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found += missing_in_class(node)
    assert not found, "describe in the notebook, NumPy style: " + "; ".join(found)


@each_module
def test_all_lists_every_public_name(module):
    body, defined, listed = parse(module), set(), set()
    for node in body.body:
        if isinstance(node, Function | ast.ClassDef):
            defined.add(node.name)
        for target in (node.targets if isinstance(node, ast.Assign) else []):
            names = [n.id for n in ast.walk(target) if isinstance(n, ast.Name)]
            defined |= set(names)
            if names == ["__all__"]:
                listed = set(ast.literal_eval(node.value))
    public = {n for n in defined if not n.startswith("_")}
    assert public == listed, f"__all__ misses {sorted(public - listed)}, has too many {sorted(listed - public)}"
