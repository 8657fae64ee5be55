"""Cards: the schema refuses mistakes by name; cards and files agree."""
import json

import pytest

from collai.core import cards

CLAIM = {"id": "a", "text": "A", "value": 1.0, "unit": "dB", "better": "higher", "where": "Table 1", "quick": "exact"}
BOOK = {"path": "x/00_a", "exports": ["collai.x.a"], "claims": ["a"], "needs": ["cuda", "model:m", "dataset:d"]}
CARD = {"slug": "x", "title": "X", "authors": ["A"], "year": 2026, "summary": "S.", "claims": [CLAIM], "notebooks": [BOOK]}

TOML = """slug = "x"\ntitle = "X"\nauthors = ["A"]\nyear = 2026\nsummary = "S."
[[claims]]\nid = "a"\ntext = "A"\nvalue = 1.0\nunit = "dB"\nbetter = "higher"\nwhere = "Table 1"\nquick = "exact"
"""


@pytest.fixture
def tree(tmp_path):
    for name in ("seeds", "nbs/x", "collai"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "settings.ini").touch()
    (tmp_path / "seeds/x.toml").write_text(TOML)
    return tmp_path


def without(table, key):
    return {k: v for k, v in table.items() if k != key}


def test_a_right_card_has_no_mistakes():
    assert cards.mistakes(CARD, "x") == []
    assert cards.mistakes(without(CARD, "notebooks")) == []


@pytest.mark.parametrize("key", ["slug", "title", "authors", "year", "summary", "claims"])
def test_a_missing_key_of_a_card_is_named(key):
    assert f"x: key '{key}' is missing" in cards.mistakes(without(CARD, key), "x")


@pytest.mark.parametrize("key", ["id", "text", "unit", "better", "where", "quick"])
def test_a_missing_key_of_a_claim_is_named(key):
    found = cards.mistakes(CARD | {"claims": [without(CLAIM, key)]}, "x")
    assert any(f"key '{key}' is missing" in line for line in found)


@pytest.mark.parametrize(("change", "message"), [
    ({"unitt": "dB"}, "unknown key 'unitt'; nearest: unit"), ({"goal": 1.0}, "exactly one of 'value'"),
    ({"value": "1"}, "value must be a number, got '1'"), ({"value": True}, "value must be a number, got True"),
    ({"better": "more"}, "better must be one of higher, lower, equal, got 'more'"),
    ({"quick": "soon"}, "quick must be one of exact, direction, none, got 'soon'"),
    ({"tolerance": {"relative": 0.1}}, "tolerance knows rel and abs, got 'relative'")])
def test_a_wrong_entry_of_a_claim_is_named(change, message):
    found = cards.mistakes(CARD | {"claims": [CLAIM | change]}, "x")
    assert len(found) == 1 and message in found[0]


def test_a_claim_needs_a_figure_or_a_goal():
    assert "exactly one of" in cards.mistakes(CARD | {"claims": [without(CLAIM, "value")]}, "x")[0]


@pytest.mark.parametrize(("book", "message"), [
    ({"claims": ["a", "b"]}, "no claim 'b' on the card"), ({"needs": ["tpu"]}, "needs 'tpu' is none of"),
    ({"kernel": "R"}, "unknown key 'kernel'"), ({"claims": []}, "no notebook touches claim 'a'")])
def test_a_wrong_notebook_entry_is_named(book, message):
    found = cards.mistakes(CARD | {"notebooks": [BOOK | book]}, "x")
    assert len(found) == 1 and message in found[0]


def test_a_claim_out_of_reach_needs_no_notebook():
    far = CLAIM | {"id": "far", "quick": "none"}
    assert cards.mistakes(CARD | {"claims": [CLAIM, far]}, "x") == []


def test_a_claim_twice_and_a_wrong_slug_are_named():
    assert "x: claim 'a' stands twice" in cards.mistakes(CARD | {"claims": [CLAIM, CLAIM]}, "x")
    assert cards.mistakes(CARD, "y") == ["y: slug is 'x', but the file is y.toml"]


def test_load_all_names_the_mistakes_of_every_card(tree):
    (tree / "seeds/y.toml").write_text("slug = ")
    (tree / "seeds/z.toml").write_text('slug = "w"')
    with pytest.raises(cards.CardError) as caught:
        cards.load_all(tree)
    assert "y: y.toml does not parse" in str(caught.value) and "z: slug is 'w'" in str(caught.value)


def test_an_unknown_card_names_the_known_ones(tree):
    with pytest.raises(cards.CardError, match="no card 'w'; there are x"):
        cards.load("w", tree)


def test_cards_and_files_must_name_the_same_notebooks(tree):
    assert cards.file_mistakes(tree) == []
    (tree / "nbs/x/00_b.ipynb").touch()
    with (tree / "seeds/x.toml").open("a") as file:
        file.write('[[notebooks]]\npath = "x/00_a"\nexports = []\nclaims = ["a"]\nneeds = []\n')
    assert cards.file_mistakes(tree) == ["x/00_a: on the card, but nbs/x/00_a.ipynb does not exist",
                                         "x/00_b: nbs/x/00_b.ipynb stands on no card"]


def test_sync_writes_what_load_reads(tree):
    file = cards.sync(tree)
    assert json.loads(file.read_text(encoding="utf-8")) == cards.load_all(tree)
    assert file.read_text(encoding="utf-8") == cards.as_json(cards.load_all(tree))


def test_the_root_is_found_from_below_and_from_the_working_directory(tree, monkeypatch):
    monkeypatch.chdir(tree / "nbs" / "x")
    assert cards.find_root() == tree.resolve()
    assert cards.load_all() == cards.load_all(tree) and cards.load("x") == cards.load("x", tree)
    assert cards.file_mistakes() == [] and cards.sync() == tree.resolve() / "collai/_cards.json"


def test_outside_a_repository_the_message_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="settings.ini, nbs and seeds not found"):
        cards.find_root(tmp_path)
