"""The site: the notebooks as they were committed, nothing is executed; every page is complete without a network.

Sphinx reads what stands below this folder. The notebooks are copied here, and one page a chain and one page of its API are
written from them and the cards, so that a new chain appears by itself; git ignores all of it.
"""
import ast
import configparser
import json
import re
import sys
import tomllib
from pathlib import Path

from docutils import nodes

GALLERY = "viabench"  # the chain that has one
DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS)]
from gallery import gallery  # noqa: E402

metadata = configparser.ConfigParser(delimiters=["="])
metadata.read(ROOT / "settings.ini", encoding="utf-8")

project = "collai"
author = copyright = "the collai authors"
release = metadata["DEFAULT"]["version"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx.ext.viewcode",
              "sphinx.ext.mathjax", "sphinx-mathjax-offline", "sphinx_copybutton"]
exclude_patterns = ["**/.ipynb_checkpoints"]

nb_execution_mode = "off"
nb_render_markdown_format = "gfm"  # tables in outputs
suppress_warnings = ["mystnb.unknown_mime_type",  # claim rows: the table beside them is shown
                     "ref.python"]  # two chains may use one name: the first page is linked
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
default_role = "literal"  # `name` in a docstring
autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say shapes, dtypes and units, which hints can't
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # fields of a tuple are documented in its class, once

html_theme = "furo"
html_title = "collai"
html_favicon = "static/favicon.svg"
html_static_path = ["static"]
html_css_files = ["collai.css"]
html_copy_source = False
html_show_sphinx = False


def cells(notebook: Path) -> list[str]:
    """Read the texts of a notebook's cells."""
    return ["".join(cell["source"]) for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]]


def module_of(notebook: Path) -> str | None:
    """Name the module a notebook exports."""
    exports = [text.split()[2] for text in cells(notebook) if text.startswith("#| default_exp ")]
    return f"collai.{exports[0]}" if exports else None


def public_names(module: str) -> list[str]:
    """List a module's public functions and classes in source order, without importing it."""
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"]


def about_paper(card: dict) -> list[str]:
    """Write what a card says: the paper, its summary, what it claims and what we ask of it."""
    end = "" if card["title"].endswith("?") else "."
    page = [f"*{card['title']}{end}* {', '.join(card['authors'])}, {card['year']}, arXiv {card.get('arxiv', '–')}.", "",
            card["summary"].strip(), "", "| claim | paper's figure | our criterion | unit | where |", "|---|---|---|---|---|"]
    sign = {"higher": "≥", "lower": "≤", "equal": "="}
    for claim in card["claims"]:
        goal = f"{sign[claim['better']]} {claim['goal']:,g}" if "goal" in claim else "–"
        value = f"{claim['value']:,g}" if "value" in claim else "–"
        page.append(f"| {claim['text']} | {value} | {goal} | {claim['unit']} | {claim['where']} |")
    return [*page, "", "The notebooks measure them, in reading order:", ""]


def chain_page(slug: str, card: dict, notebooks: list[Path]) -> str:
    """Write the page of a chain: what the paper is about, its notebooks in reading order, its API, its gallery."""
    about = about_paper(card) if card else ["Shared by the chains of the papers.", ""]
    more = [f"/api/{slug}", *([f"/gallery/{slug}"] if slug == GALLERY else [])]
    tree = ["```{toctree}", ":maxdepth: 1", "", *(f"/nbs/{slug}/{n.stem}" for n in notebooks), *more, "```", ""]
    return "\n".join([f"# {slug}", "", *about, *tree])


def api_page(slug: str, notebooks: list[Path]) -> str:
    """Write the API of a chain, module by module, in the order in which the notebooks teach it."""
    page = [f"# API of {slug}", ""]
    for notebook in notebooks:
        if module := module_of(notebook):
            title = cells(notebook)[0].splitlines()[0].removeprefix("# ")
            page += [f"## {module}", "", f"Derived and tested in [{title}](/nbs/{slug}/{notebook.name}).", "",
                     "```{eval-rst}", f".. currentmodule:: {module}", ".. autosummary::", "   :nosignatures:", "",
                     *(f"   {name}" for name in public_names(module)), "",
                     f".. automodule:: {module}", "   :members:", "```", ""]
    return "\n".join(page)


def generated() -> dict[Path, str]:
    """Write every generated page: its file, its text."""
    cards = {file.stem: tomllib.loads(file.read_text(encoding="utf-8")) for file in (ROOT / "seeds").glob("*.toml")}
    pages = {DOCS / "nbs" / "index.ipynb": (ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8")}
    for folder in sorted({notebook.parent for notebook in (ROOT / "nbs").glob("*/*.ipynb")}):
        slug, notebooks = folder.name, sorted(folder.glob("*.ipynb"))
        group = "chains" if slug in cards else "shared"
        pages[DOCS / group / f"{slug}.md"] = chain_page(slug, cards.get(slug, {}), notebooks)
        pages[DOCS / "api" / f"{slug}.md"] = api_page(slug, notebooks)
        pages |= {DOCS / "nbs" / slug / n.name: n.read_text(encoding="utf-8") for n in notebooks}
    return pages


def write_pictures(folder: Path, pictures: dict[str, bytes]) -> None:
    """Write the pictures of the gallery into the built site, and take away those of families that are gone."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in (file for file in folder.iterdir() if file.name not in pictures):
        old.unlink()
    for name, data in pictures.items():
        (folder / name).write_bytes(data)


def write_pages(app: object) -> None:
    """Bring the generated pages up to date; what stays the same is not touched, so that Sphinx need not read it again."""
    pages = generated()
    if GALLERY in {page.stem for page in pages if page.parent.name == "chains"}:
        pages[DOCS / "gallery" / f"{GALLERY}.md"], pictures = gallery()
        write_pictures(Path(app.outdir) / "_static" / "gallery", pictures)
    for group in ("nbs", "chains", "shared", "api", "gallery"):
        for old in (file for file in (DOCS / group).rglob("*.*") if file.is_file() and file not in pages):
            old.unlink()
    for path, text in pages.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def leave_formulas_whole(app: object, tree: nodes.document) -> None:
    """Hand display formulas to MathJax as written: Sphinx's wrapping of several lines does not allow a tag."""
    for formula in tree.findall(nodes.math_block):
        if not formula.get("no-wrap", formula.get("nowrap")):
            text = formula.astext().strip()
            formula.children = []
            formula += nodes.Text(rf"\[{text}\]")
            formula["no-wrap"] = formula["nowrap"] = True


def link_equations(app: object, tree: nodes.document) -> None:
    """Let every (otb.3) in the text lead to the formula on the same page that is tagged so."""
    tags = {}
    for formula in list(tree.findall(nodes.math_block)):
        for tag in re.findall(r"\\tag\{([^}]*)\}", formula.astext()):
            tags[tag] = nodes.make_id(f"equation-{tag}")
            formula.parent.insert(formula.parent.index(formula), nodes.target(ids=[tags[tag]]))
    skip = nodes.literal, nodes.literal_block, nodes.math, nodes.math_block, nodes.reference, nodes.title
    for text in [t for t in tree.findall(nodes.Text) if "(" in t and not isinstance(t.parent, skip)]:
        parts = re.split(r"(\([\w.]+\))", text.astext())
        if any(part[1:-1] in tags for part in parts[1::2]):
            linked = [nodes.reference(part, part, refid=tags[part[1:-1]], internal=True) if part[1:-1] in tags
                      else nodes.Text(part) for part in parts if part]
            text.parent.replace(text, linked)


def mark_captions(app: object, tree: nodes.document) -> None:
    """Mark the paragraphs that caption a figure, for the style sheet."""
    for paragraph in tree.findall(nodes.paragraph):
        first = next((child for child in paragraph.children if child.astext()), None)
        if isinstance(first, nodes.strong) and first.astext().startswith("Figure "):
            paragraph["classes"].append("figure-caption")


def keep_bars(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Show |x| of a docstring as written; reStructuredText would look for a substitution."""
    lines[:] = [re.sub(r"(`[^`]*`)|\|", lambda hit: hit[1] or r"\|", line) for line in lines]


def setup(app: object) -> None:
    """Connect the steps above."""
    app.connect("builder-inited", write_pages)
    app.connect("doctree-read", leave_formulas_whole)
    app.connect("doctree-read", link_equations)
    app.connect("doctree-read", mark_captions)
    app.connect("autodoc-process-docstring", keep_bars)
