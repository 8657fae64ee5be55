"""Claims: verdicts, rows, display and results files."""
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collai.core import claims

VALUE = {"value": 2.0, "unit": "dB", "better": "higher", "where": "Table 1", "quick": "exact", "text": "A claim"}
GOAL = {"goal": 5.0, "unit": "ratio", "better": "higher", "where": "ours", "quick": "exact", "text": "Ours"}
numbers = st.floats(-1e6, 1e6)


@given(numbers, numbers)
def test_higher_and_lower_are_mirror_images(aim, measured):
    up = claims.verdict(VALUE | {"value": aim}, measured)
    down = claims.verdict(VALUE | {"value": -aim, "better": "lower"}, -measured)
    assert up == down


@given(numbers, st.floats(0, 1e3))
def test_equal_means_within_the_tolerance(aim, slack):
    spec = VALUE | {"value": aim, "better": "equal", "tolerance": {"abs": slack}}
    assert claims.verdict(spec, aim) == "reproduced"
    assert claims.verdict(spec, aim + 1.01 * slack + 1.0) == "not reproduced"


@given(st.floats(0.1, 10), st.floats(0.01, 1))
def test_a_direction_needs_an_interval_that_excludes_no_effect(middle, half):
    spec = VALUE | {"quick": "direction"}
    seen = claims.verdict(spec, middle, (middle - half, middle + half))
    assert (seen == "direction") == (middle - half > 0)
    assert claims.verdict(spec, middle) == "not reproduced"


def test_no_effect_of_a_ratio_is_one():
    spec = GOAL | {"quick": "direction"}
    assert claims.verdict(spec, 1.5, (0.9, 2.0)) == "not reproduced"
    assert claims.verdict(spec, 1.5, (1.1, 2.0)) == "direction"
    assert claims.verdict(spec | {"goal": 0.5}, 0.8, (0.7, 0.9)) == "direction"
    assert claims.verdict(spec | {"goal": 1.0, "better": "lower"}, 0.8, (0.7, 0.9)) == "direction"
    assert claims.verdict(spec | {"goal": 1.0}, 0.8, (0.7, 0.9)) == "not reproduced"


def test_goals_of_ours_are_met_and_the_papers_statements_reproduced():
    assert claims.verdict(GOAL, 5.0) == "met"
    assert claims.verdict(GOAL, 4.0) == "not met"
    assert claims.verdict(GOAL | {"where": "abstract (C1)"}, 6.0) == "reproduced"
    assert claims.verdict(GOAL | {"quick": "none"}, math.nan) == "out of reach"


@pytest.mark.parametrize(("x", "text"), [(None, "–"), (0.99751, "0.998"), (4.12e-12, "4.12e-12"), (233_400.0, "233,000"),
                                         (12.34, "12.3"), (0.0, "0"), (-5.0, "-5")])
def test_numbers_are_written_with_three_digits(x, text):
    assert claims.number(x) == text


def test_a_row_keeps_the_papers_figure_and_our_goal_apart():
    row = claims.claim_row("p.a", VALUE, 2.5, (2.0, 3.0), "10 runs")
    assert claims.cells(row)[:5] == ["p.a", "2", "–", "2.5", "2 … 3"]
    row = claims.claim_row("p.b", GOAL, 7.0)
    assert claims.cells(row)[:5] == ["p.b", "–", "≥ 5", "7", "–"]


@pytest.mark.parametrize(("repeated", "message"), [
    ({"unit": "s"}, "unit is 'dB' on the card, got 's'"), ({"claimed": 3.0}, "claimed is 2.0 on the card, got 3.0"),
    ({"better": "lower"}, "better is 'higher' on the card"), ({"source": "Table 2"}, "source is 'Table 1' on the card")])
def test_what_a_row_repeats_must_agree_with_the_card(repeated, message):
    with pytest.raises(ValueError, match=message):
        claims.claim_row("p.a", VALUE, 2.0, **repeated)


@pytest.mark.parametrize(("measured", "ci"), [(math.nan, None), (math.inf, None), (1.0, (2.0, 1.0)), (1.0, (1.0,)),
                                              (1.0, (math.nan, 2.0))])
def test_numbers_that_cannot_be_results_are_refused(measured, ci):
    with pytest.raises(ValueError, match="p.a: "):
        claims.claim_row("p.a", VALUE, measured, ci)


def test_an_unknown_claim_names_the_nearest():
    with pytest.raises(ValueError, match="no claim 'emvs.recover' on any card; nearest: emvs.recovery"):
        claims.claim("emvs.recover", measured=1.0)


def test_a_displayed_claim_holds_the_row_and_a_table(capsys, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    claims.claim("emvs.recovery", measured=1e-12, unit="rad", better="lower", scale="<one> scene")
    assert shown[0][claims.MIME]["verdict"] == "reproduced"
    assert json.loads(json.dumps(shown[0][claims.MIME])) == shown[0][claims.MIME]
    assert "&lt;one&gt; scene" in shown[0]["text/html"] and "1e-12" in shown[0]["text/plain"]


def test_results_replace_their_own_rows_and_keep_the_others(tmp_path):
    out = tmp_path / "results" / "cpu.json"
    claims.save_results(out, [{"name": "a", "measured": 1.0, "unit": "s"}], command="first", commit="c1")
    claims.save_results(out, [{"name": "b", "measured": 2.0, "unit": "s"}], command="second", commit="c2")
    claims.save_results(out, [{"name": "a", "measured": 3.0, "unit": "s"}], command="third", commit="c3")
    rows = claims.load_results(out)["rows"]
    assert rows["a"]["measured"] == 3.0 and rows["a"]["command"] == "third"
    assert rows["b"]["command"] == "second" and rows["b"]["versions"]["numpy"]
    assert len(json.loads(out.read_text())["runs"]) == 2, "a run without rows is dropped"
    assert list(out.parent.iterdir()) == [out]


def test_many_writers_lose_no_row(tmp_path):
    out = tmp_path / "cpu.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: claims.save_results(out, [{"name": str(i), "measured": i, "unit": "s"}]), range(24)))
    assert len(claims.load_results(out)["rows"]) == 24


def test_a_missing_results_file_has_no_rows_and_says_so_to_who_wants_one(tmp_path):
    found = claims.load_results(tmp_path / "none.json")
    assert found == {"rows": {}} and found["rows"].get("a") is None and "a" not in found["rows"]
    with pytest.raises(FileNotFoundError, match=r"no results file .*none\.json, so no row 'a': measure it with python -m collai"):
        found["rows"]["a"]


def test_a_measurement_runs_from_the_command_line(tmp_path, capsys):
    out = tmp_path / "r.json"
    claims.measure_main(lambda device: [{"name": device, "measured": 2.0, "bound": 8.0, "unit": "1/s"}],
                        ["--out", str(out), "--commit", "abc"])
    assert "cpu: 2 1/s  measured/bound 0.25" in capsys.readouterr().out
    assert claims.load_results(out)["rows"]["cpu"]["commit"] == "abc"
    with pytest.raises(SystemExit):
        claims.measure_main(lambda device: [], ["--device", "tpu", "--out", str(out)])


def test_help_is_the_first_paragraph(capsys):
    def measure(device):
        """Time what is
        slow.

        Parameters
        ----------
        device : str
        """
        return []

    with pytest.raises(SystemExit):
        claims.measure_main(measure, ["--help"])
    out = capsys.readouterr().out
    assert "Time what is slow." in out and "Parameters" not in out


def test_a_gpu_is_named_by_its_driver(monkeypatch):
    answer = subprocess.CompletedProcess([], 0, stdout="Some GPU, 580.1\n", stderr="")
    monkeypatch.setattr(claims.subprocess, "run", lambda *a, **k: answer)
    assert {"device": "Some GPU", "driver": "580.1"}.items() <= claims.environment("cuda").items()


def test_the_commit_is_unknown_where_git_is(monkeypatch):
    def no_git(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(claims.subprocess, "run", no_git)
    assert claims._commit() is None


def test_reading_claims_loads_nothing_heavy():
    code = "import sys, collai.core.claims; print([m for m in ('numpy', 'torch', 'IPython') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
