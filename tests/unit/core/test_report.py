"""The report: what is collected, what a reader sees, and when the README counts as right."""
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collai.core import cards, claims, report

PIXEL = ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==\n")
MORE = """
[[claims]]
id = "far"
text = "It scales | to a cluster"
value = 9.0
unit = "ratio"
better = "higher"
where = "Table 2"
quick = "none"
"""


def shown(data, *tags):
    output = {"output_type": "display_data", "metadata": {}, "data": data}
    return {"cell_type": "code", "source": "show()", "metadata": {"tags": list(tags)}, "outputs": [output]}


def text(source, kind="markdown", *tags):
    return {"cell_type": kind, "source": source, "metadata": {"tags": list(tags)}} | ({"outputs": []} if kind == "code" else {})


@pytest.fixture
def ran(mini):
    """A repository with one executed notebook, which `pretend` can replace or join with others."""
    card = (mini.root / "seeds/mini.toml").read_text().replace("[[notebooks]]", MORE + "[[notebooks]]")
    mini.put("seeds/mini.toml", card)
    mini.put("README.md", "Top\n<!-- claims -->\n<!-- /claims -->\nBottom\n")
    spec = cards.load("mini", mini.root)["claims"][0]

    def row(measured=7.14, ci=(6.9, 7.4), name="mini.speed"):
        return claims.claim_row(name, spec, measured, ci, "20 runs")

    def pretend(name="mini/00_a", *cells, status="done", seconds=12.0, error=""):
        book = json.dumps({"cells": cells})
        mini.put(f"nbs/{name}.ipynb", book)
        mini.put(f"build/executed/quick/{name}.ipynb", book)
        record = {"notebook": name, "status": status, "seconds": seconds, "error": error}
        mini.put(f"build/executed/quick/{name}.json", json.dumps(record))

    mini.row, mini.pretend = row, pretend
    pretend("mini/00_a", text("seed = 0", "code", "parameters"), text("seed = 5", "code", "injected-parameters"),
            shown({claims.MIME: row()}))
    return mini


# ------------------------------------------------------------------------------------------------ claims

def test_rows_come_with_notebook_and_the_seed_they_ran_with(ran):
    row, = report.collect_claims(ran.root / "build/executed/quick")
    assert row == ran.row() | {"notebook": "mini/00_a", "seed": 5}
    assert report.collect_claims(ran.root / "build/executed/quick", names=[]) == []
    assert report.collect_claims(str(ran.root / "nowhere")) == []


def test_rows_of_failed_and_of_removed_notebooks_do_not_count(ran):
    ran.pretend("mini/01_b", shown({claims.MIME: ran.row()}), status="failed")
    ran.pretend("mini/02_c", shown({claims.MIME: ran.row()}))
    (ran.root / "nbs/mini/02_c.ipynb").unlink()
    assert [row["notebook"] for row in report.claim_table(root=ran.root) if row["measured"]] == ["mini/00_a"]


def test_a_notebook_without_a_seed_has_none(ran):
    ran.pretend("mini/00_a", text("profile = 'quick'", "code", "parameters"), shown({claims.MIME: ran.row()}))
    assert report.claim_table(root=ran.root)[0]["seed"] is None


def test_the_table_follows_the_card_and_shows_what_is_out_of_reach(ran):
    table = report.claim_table(root=ran.root)
    assert [(row["id"], row["measured"], row["verdict"]) for row in table] == [
        ("mini.speed", 7.14, "met"), ("mini.far", None, "out of reach")]
    assert report.claim_mistakes(table, ran.root) == []


def test_missing_and_unknown_rows_are_mistakes(ran):
    ran.pretend("mini/00_a", shown({claims.MIME: ran.row(name="mini.spede")}))
    assert report.claim_mistakes(report.claim_table(root=ran.root), ran.root) == [
        "mini.speed: on the card, but no executed notebook measures it (collai run)", "mini.spede: measured, but on no card"]


def test_a_planned_chain_owes_nothing(ran):
    card = (ran.root / "seeds/mini.toml").read_text().split("[[notebooks]]")[0]
    ran.put("seeds/other.toml", card.replace('slug = "mini"', 'slug = "other"'))
    table = report.claim_table(root=ran.root)
    assert {row["id"].split(".")[0] for row in table} == {"mini"} and report.claim_mistakes(table, ran.root) == []


def test_claims_are_written_as_json(ran):
    file = report.write_claims(root=ran.root)
    assert file == ran.root / "build/claims.json"
    assert json.loads(file.read_text()) == {"profile": "quick", "rows": report.claim_table(root=ran.root)}


# ------------------------------------------------------------------------------------------------ README

def test_what_is_written_into_the_readme_is_found_right(ran):
    table = report.claim_table(root=ran.root)
    assert report.check_readme(table, ran.root)[0] == "not in README.md: It is five times faster (`mini.speed`)"
    assert report.write_readme(table, ran.root) == ran.root / "README.md"
    readme = (ran.root / "README.md").read_text()
    assert readme.startswith("Top\n<!-- claims -->\n| claim |") and readme.endswith("|\n<!-- /claims -->\nBottom\n")
    assert "It scales \\| to a cluster (`mini.far`)" in readme
    assert report.check_readme(table, ran.root) == []
    report.write_readme(table, ran.root)
    assert (ran.root / "README.md").read_text() == readme


@pytest.mark.parametrize(("measured", "ci", "said"), [
    (7.2, (7.1, 7.3), None),  # 1 %
    (7.35, (7.0, 7.5), None),  # in both intervals
    (7.45, (7.0, 7.6), None),  # 7.14 lies in the fresh interval
    (7.8, (7.6, 8.0), "'7.14', measured now '7.8'"),
    (4.0, (3.9, 4.1), "'met', measured now 'not met'"),
])
def test_other_last_digits_pass_and_other_results_do_not(ran, measured, ci, said):
    report.write_readme(report.claim_table(root=ran.root), ran.root)
    ran.pretend("mini/00_a", shown({claims.MIME: ran.row(measured, ci)}))
    found = report.check_readme(report.claim_table(root=ran.root), ran.root)
    assert found == [] if said is None else said in found[0]


def test_rounding_noise_passes_whatever_its_digits(ran):
    noise = ran.row() | {"measured": 3e-12, "ci": None}
    report.write_readme([noise], ran.root)
    assert report.check_readme([noise | {"measured": 8e-11}], ran.root) == []
    assert report.check_readme([noise | {"measured": 8e-6}], ran.root) != []


@given(st.floats(min_value=1e-5, max_value=1e8), st.floats(-0.014, 0.014))
def test_numbers_agree_within_the_tolerance_however_they_are_rounded(value, change):
    old, new = ([claims.number(x), "–"] for x in (value, value * (1 + change)))
    assert report._agree(old, new)
    assert not report._agree(old, [claims.number(value * 1.04), "–"])


@pytest.mark.parametrize("change", [
    lambda row: [row | {"text": "It is six times faster"}], lambda row: [], lambda row: [row, row],
    lambda row: [row | {"scale": "21 runs"}], lambda row: [row | {"goal": 6.0}], lambda row: [row | {"measured": None}],
])
def test_any_other_difference_is_found(ran, change):
    row = ran.row()
    report.write_readme([row], ran.root)
    assert report.check_readme(change(row), ran.root)


def test_a_row_cut_short_by_hand_is_found(ran):
    report.write_readme([ran.row()], ran.root)
    readme = (ran.root / "README.md").read_text().replace(" | 20 runs |", " |")
    ran.put("README.md", readme)
    assert report.check_readme([ran.row()], ran.root) == [
        "It is five times faster (`mini.speed`): README.md has 7 columns, not 8"]


@pytest.mark.parametrize("readme", ["no marks", "<!-- /claims --> <!-- claims -->", "<!-- claims --><!-- claims --><!-- /claims -->"])
def test_a_readme_without_its_marks_is_refused(ran, readme):
    ran.put("README.md", readme)
    with pytest.raises(ValueError, match="README.md must hold"):
        report.write_readme([], ran.root)


# ------------------------------------------------------------------------------------------------ the page

def test_a_figure_takes_the_caption_right_after_it(ran):
    cells = [shown({"image/png": PIXEL}), text("**Figure 1.** First."), shown({"image/png": PIXEL}), text("Just text."),
             shown({"image/png": [PIXEL, PIXEL]})]
    assert report.figures({"cells": cells}) == [
        (PIXEL.strip(), "**Figure 1.** First."), (PIXEL.strip(), ""), ((PIXEL * 2).replace("\n", ""), "")]


def test_the_page_holds_everything_and_asks_for_nothing(ran):
    hostile = "**Figure 1.** ![x](https://example.org/x.png) <script>alert(1)</script> & $a<b$"
    ran.pretend("mini/00_a", shown({claims.MIME: ran.row()}), shown({"image/png": PIXEL}), text(hostile), seconds=120.0)
    ran.pretend("mini/01_b", status="failed", seconds=3.0, error="nbs/mini/01_b.ipynb, cell 4: ValueError: <b>no</b>")
    ran.write("index", "1")
    page = report.write_report(root=ran.root)
    assert page == ran.root / "build/report.html"
    said = page.read_text(encoding="utf-8")
    assert "1 of 3 notebooks ran, 1 failed (123 worker-seconds). 2 claims: 1 met, 1 out of reach." in said
    assert "ValueError: &lt;b&gt;no&lt;/b&gt;" in said and "<script" not in said
    assert '<span class="bad">of 110 worker-seconds</span>' in said and "✓ met" in said
    fetched = [url for pair in re.findall(r'src="([^"]*)"|<link[^>]*href="([^"]*)"', said) for url in pair if url]
    assert fetched and all(url.startswith("data:") for url in fetched)
    assert said.count("<img") == 1 and "url(" not in said and "@import" not in said


def test_an_empty_repository_gives_a_page_too(ran):
    (ran.root / "nbs/mini/00_a.ipynb").unlink()
    said = report.write_report(root=ran.root).read_text(encoding="utf-8")
    assert "0 of 0 notebooks ran (0 worker-seconds). 1 claims: 1 out of reach." in said and 'id="failures"' not in said


def test_the_root_is_found_from_the_working_directory(ran, monkeypatch):
    monkeypatch.chdir(ran.root / "nbs")
    assert report.claim_table() == report.claim_table(root=str(ran.root))
    assert report.write_report() == ran.root / "build/report.html" and report.write_claims().exists()
    assert report.write_readme(report.claim_table()) and report.check_readme(report.claim_table()) == []
