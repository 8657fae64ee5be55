"""Claims: package and README repeat what the cards and the executed notebooks say. Runs after the notebooks."""
from base64 import b64decode

import pytest
import tree
from tree import ROOT

from collai.core import cards, report


@pytest.fixture(scope="module")
def table():
    """Claims of the existing chains with what the last quick run measured."""
    return report.claim_table("quick", ROOT)


def test_cards_and_notebooks_name_each_other():
    found = cards.file_mistakes(ROOT)
    assert not found, "; ".join(found)


def test_there_is_a_card_for_each_of_the_ten_papers():
    assert len(cards.load_all(ROOT)) == 10
    long = [slug for slug, card in cards.load_all(ROOT).items() if card["summary"].count(". ") != 2]
    assert not long, f"a summary has three sentences: {long}"


def test_the_packaged_cards_are_the_cards():
    packaged = (ROOT / "collai" / "_cards.json").read_text(encoding="utf-8")
    assert packaged == cards.as_json(cards.load_all(ROOT)), "run collai cards --sync"


def test_every_claim_was_measured(table):
    found = report.claim_mistakes(table, ROOT)
    assert not found, "; ".join(found)


def test_the_readme_shows_what_was_measured(table):
    found = report.check_readme(table, ROOT)
    assert not found, "run collai claims --write-readme: " + "; ".join(found)


def test_the_readme_figure_is_one_the_notebook_shows():
    shown = [b64decode("".join(output["data"]["image/png"])) for cell in tree.cells(ROOT / "nbs/emvs/05_localize.ipynb")
             for output in cell.outputs if "image/png" in output.get("data", {})]
    assert (ROOT / "docs/static/refinement.png").read_bytes() in shown, "take the picture from nbs/emvs/05_localize.ipynb again"
