"""What the checks look at: the repository's files, its notebooks cell by cell, and what Python code imports."""
import ast
import json
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = {"core": set(), "eval": {"core"}, "rl": {"core"}}  # shared chain -> shared chains it may import
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
CHAIN_NOTEBOOKS = [p for p in NOTEBOOKS if p.parent.name != "nbs"]
PAPER_NOTEBOOKS = [p for p in CHAIN_NOTEBOOKS if p.parent.name not in SHARED]
MODULES = sorted(p for p in (ROOT / "collai").rglob("*.py") if p.name != "_modidx.py")


def name(path: Path) -> str:
    """Name a file by its path from the root, for messages and test ids."""
    return str(path.relative_to(ROOT))


def dotted(path: Path) -> str:
    """Name a module or package the way Python imports it."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def files() -> list[Path]:
    """List the files of the repository: tracked ones and new ones that git doesn't ignore."""
    ask = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(p for p in (ROOT / f for f in listed.split("\0") if f) if p.is_file() and not p.is_symlink())


class Cell:
    """One cell of a notebook file."""

    def __init__(self, raw: dict, index: int) -> None:
        self.index, self.kind, self.text = index, raw["cell_type"], "".join(raw["source"])
        self.tags = raw["metadata"].get("tags", [])
        self.outputs, self.count = raw.get("outputs", []), raw.get("execution_count")
        self.lines = len(self.text.splitlines())
        self.exported = self.text.lstrip().startswith("#| export")

    @property
    def tree(self) -> ast.Module:
        """Syntax tree of a code cell without its magics."""
        return ast.parse("\n".join(line for line in self.text.splitlines() if not line.startswith(("%", "!"))))


def cells(notebook: Path) -> list[Cell]:
    """Read the cells of a notebook, numbered as JupyterLab shows them from 0."""
    return [Cell(raw, i) for i, raw in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"])]


def code(notebook: Path) -> list[Cell]:
    """Read the code cells of a notebook."""
    return [cell for cell in cells(notebook) if cell.kind == "code"]


def module_of(notebook: Path) -> str | None:
    """Name the module a notebook exports, for example ``collai.emvs.cpd``."""
    for cell in code(notebook):
        if cell.text.startswith("#| default_exp "):
            return "collai." + cell.text.split()[2]
    return None


def exported_modules() -> set[str]:
    """Name every module that some notebook exports."""
    return {module for module in map(module_of, NOTEBOOKS) if module}


def imports(tree: ast.AST, package: str = "") -> set[str]:
    """Collect the dotted names a syntax tree imports; relative ones are resolved against `package`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def own_modules(names: set[str]) -> set[str]:
    """Reduce imported names to the modules of this package that they come from."""
    known = exported_modules()
    return {module for module in known if any(n == module or n.startswith(module + ".") for n in names)}
