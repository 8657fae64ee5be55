"""Public data: guesses against enumeration, loaders against plain Python on small files, round trips, bad input."""

import csv
import gzip
import itertools
import json
import math
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.ddr import public as module
from collai.ddr.checklist import Claim, _sentences_of, build_checklist, verdict
from collai.ddr.metrics import check
from collai.ddr.public import (
    blind_baselines,
    load_checklist,
    load_companyfacts,
    load_ddr_logs,
    load_globem,
    load_mimic,
    real_small,
    to_ddr_bench,
)
from collai.ddr.sandbox import Env, Trajectory, Turn
from collai.ddr.worlds import Schema, World, digest, make_world

counts = st.lists(st.tuples(*[st.integers(0, 9)] * 3), min_size=1, max_size=4).filter(lambda t: sum(map(sum, t)) > 0)


def query(path: str, sql: str) -> list[tuple[Any, ...]]:
    """Rows of a query on a DuckDB file."""
    with closing(duckdb.connect(path, read_only=True)) as db:
        return db.execute(sql).fetchall()


def write_csv(path: Path, *rows: list[Any]) -> None:
    """A CSV file, packed if its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", newline="") as file:
        csv.writer(file).writerows(rows)


# guesses


@given(counts)
def test_baselines_are_the_best_of_all_guesses(table: list[tuple[int, int, int]]) -> None:
    total, names = sum(map(sum, table)), [str(i) for i in range(len(table))]
    right = {
        g: sum(row[j] for row, j in zip(table, g, strict=True)) / total
        for g in itertools.product(range(3), repeat=len(table))
    }
    found = blind_baselines(dict(zip(names, table, strict=True)))
    assert found["prior"] == pytest.approx(max(right.values()))
    assert found["constant"] == pytest.approx(max(right[(j,) * len(table)] for j in range(3)))


@given(counts)
def test_coarser_groups_never_guess_better(table: list[tuple[int, int, int]]) -> None:
    fine = blind_baselines({str(i): row for i, row in enumerate(table)})
    coarse = blind_baselines({"all": tuple(map(sum, zip(*table, strict=True)))})
    assert coarse["constant"] == coarse["prior"] == fine["constant"] <= fine["prior"] <= 1


def test_released_totals() -> None:
    assert blind_baselines({"all": (88, 173, 174)})["constant"] == 174 / 435


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({}, "counts hold no item"),
        ({"a": (0, 0, 0)}, "counts hold no item"),
        ({"a": (1, 2)}, r"counts of 'a' must be three numbers of items, got \(1, 2\)"),
        ({"a": (1, 2, -1)}, r"counts of 'a' must be three numbers of items, got \(1, 2, -1\)"),
    ],
)
def test_bad_counts(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        blind_baselines(bad)


# filings


def facts_file(
    path: Path, cik: Any, points: list[dict[str, Any]], concept: str = "Revenues", unit: str = "USD"
) -> Path:
    """A file of companyfacts with one series."""
    facts = {"us-gaap": {concept: {"label": "x", "description": None, "units": {unit: points}}}}
    path.write_text(json.dumps({"cik": cik, "entityName": f"Company {cik}", "facts": facts}))
    return path


def point(end: str, val: float | None, accn: str, filed: str, **more: Any) -> dict[str, Any]:
    """One value of one filing."""
    return {
        "start": "2020-01-01",
        "end": end,
        "val": val,
        "accn": accn,
        "fy": 2020,
        "fp": "FY",
        "form": "10-K",
        "filed": filed,
    } | more


SUBMISSIONS = {
    "cik": "0000000007",
    "name": "Seven",
    "sicDescription": "Tools",
    "tickers": ["S", "T"],
    "exchanges": ["NYSE", "OTC"],
    "stateOfIncorporation": "DE",
    "category": "Large",
    "filings": {"recent": {}},
    "addresses": {
        "mailing": {"street1": "Elm", "city": "X", "stateOrCountry": "CA", "zipCode": "01"},
        "business": {"street1": "Oak", "city": "X", "stateOrCountry": "CA", "zipCode": "01"},
    },
}
spans = st.sampled_from([("2020-01-01", "2020-06-30"), ("2020-04-01", "2020-06-30"), (None, "2020-06-30")])
points = st.lists(
    st.tuples(spans, st.integers(-3, 3), st.integers(0, 9), st.integers(1, 4)),
    min_size=1,
    max_size=12,
    unique_by=lambda t: (t[0], t[2], t[3]),
)


@settings(max_examples=8)
@given(points)
def test_what_was_filed_last_is_kept(drawn: list[tuple[tuple[str | None, str], int, int, int]]) -> None:
    made = [
        point(end, val, f"{accn}", f"202{year}-01-01") | {"start": start} for (start, end), val, accn, year in drawn
    ]
    with tempfile.TemporaryDirectory() as folder:
        report = load_companyfacts(facts_file(Path(folder, "a.json"), 5, made), Path(folder, "a.duckdb"))
        got = query(report.db_path, "SELECT start_date::VARCHAR, fact_value, restated FROM financial_facts")
    want = {}
    for start in {p["start"] for p in made}:
        series = sorted((p["filed"], p["accn"], p["val"]) for p in made if p["start"] == start)
        want[start] = (series[-1][2], len({val for *_, val in series}) > 1)
    assert {start: (value, restated) for start, value, restated in got} == want and len(got) == len(want)
    assert report.restatements == sum(restated for _, restated in want.values())
    assert report.rows["financial_facts"] == len(want)


def test_files_in_any_order_give_one_database(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    made = [
        facts_file(data / "a.json", 7, [point("2020-12-31", 1.0, "a", "2021-01-01")]),
        facts_file(
            data / "b.json",
            8,
            [point("2020-12-31", None, "a", "2021-01-01"), point("2020-12-31", 3.0, "b", "2020-01-01")],
            unit="EUR",
        ),
        data / "c.json",
        data / "d.json",
    ]
    made[2].write_text(json.dumps(SUBMISSIONS))
    made[3].write_text(json.dumps(SUBMISSIONS | {"cik": 9, "tickers": [], "exchanges": []}))
    reports = [load_companyfacts(files, tmp_path / f"{i}.duckdb") for i, files in enumerate((data, made[::-1]))]
    assert digest(reports[0].db_path) == digest(reports[1].db_path)
    assert reports[0].rows == {"companies": 3, "company_addresses": 4, "company_tickers": 2, "financial_facts": 2}
    assert reports[0].skipped == ["submissions of company 8", "companyfacts of company 9"]
    assert query(reports[0].db_path, "SELECT name, sector, filer FROM companies WHERE cik = 7") == [
        ("Seven", "Tools", "Large")
    ]
    assert query(reports[0].db_path, "SELECT fact_value, unit FROM financial_facts WHERE cik = 8") == [(3.0, "EUR")]
    assert set(query(reports[0].db_path, "SELECT ticker, exchange FROM company_tickers")) == {
        ("S", "NYSE"),
        ("T", "OTC"),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"cik": 1, "facts": {', r"cannot read .*bad\.json: .*[Mm]alformed JSON"),
        ("[1, 2]", r"cannot read .*bad\.json"),
        ('{"a": 1}', r"bad\.json is neither companyfacts nor submissions JSON"),
        ('{"cik": "x", "name": "y"}', r"cannot read .*bad"),
        ('{"cik": 1, "name": null}', r"bad\.json is neither"),
    ],
)
def test_broken_filings_name_the_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    good = facts_file(tmp_path / "good.json", 1, [point("2020-12-31", 1.0, "a", "2021-01-01")])
    with pytest.raises(ValueError, match=message):
        load_companyfacts([good, tmp_path / "bad.json"], tmp_path / "out" / "x.duckdb")
    assert not list((tmp_path / "out").iterdir())


def test_missing_filings(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*gone\.json"):
        load_companyfacts(str(tmp_path / "gone.json"))
    with pytest.raises(FileNotFoundError, match=r"no file .*\*\.json"):
        load_companyfacts(tmp_path)
    with pytest.raises(ValueError, match="paths name no file"):
        load_companyfacts([])


def test_a_public_sqlite_file_is_taken_as_it_is(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "10k.db")) as db, db:
        db.execute("CREATE TABLE financial_facts (cik INTEGER)")
        db.execute("INSERT INTO financial_facts VALUES (1), (2)")
    report = load_companyfacts(tmp_path / "10k.db")
    assert (report.db_path, report.rows) == (str(tmp_path / "10k.db"), {"financial_facts": 2})


def test_the_cache_knows_its_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = facts_file(tmp_path / "a.json", 1, [point("2020-12-31", 1.0, "a", "2021-01-01")])
    first = load_companyfacts(file)
    stamp = Path(first.db_path).stat().st_mtime_ns
    assert load_companyfacts(file) == first and Path(first.db_path).stat().st_mtime_ns == stamp
    facts_file(file, 1, [point("2020-12-31", 1.0, "a", "2021-01-01"), point("2020-12-31", 2.0, "b", "2022-01-01")])
    second = load_companyfacts(file)
    assert second.db_path != first.db_path and (first.restatements, second.restatements) == (0, 1)


# MIMIC-IV


def test_mimic_tables_types_and_notes(tmp_path: Path) -> None:
    write_csv(tmp_path / "hosp" / "patients.csv", ["subject_id", "gender", "dod"], [1, "F", "2110-01-02"], [2, "M", ""])
    write_csv(tmp_path / "hosp" / "patients.csv.gz", ["subject_id"], [99])
    write_csv(
        tmp_path / "hosp" / "prescriptions.csv.gz",
        ["subject_id", "ndc", "starttime"],
        [1, "88222033", "2110-01-02 03:04:05"],
    )
    write_csv(tmp_path / "icu" / "d_items.csv", ["itemid", "label"])
    write_csv(tmp_path / "note" / "discharge.csv.gz", ["note_id", "text"], [1, "secret"])
    report = load_mimic(tmp_path, tmp_path / "out" / "m.duckdb")
    assert report.rows == {"hosp_patients": 2, "hosp_prescriptions": 1, "icu_d_items": 0} and report.restatements == 0
    assert query(report.db_path, "SELECT ndc, starttime::VARCHAR FROM hosp_prescriptions") == [
        ("88222033", "2110-01-02 03:04:05")
    ]
    assert query(report.db_path, "SELECT typeof(dod), typeof(subject_id) FROM hosp_patients LIMIT 1") == [
        ("DATE", "BIGINT")
    ]
    assert {"note/discharge.csv.gz", "hosp/patients.csv.gz", "hosp/labevents.csv", "icu/chartevents.csv"} <= set(
        report.skipped
    )
    assert len(report.skipped) == 31 - 3 + 2


def test_mimic_types_hold_beyond_the_head(tmp_path: Path) -> None:
    write_csv(
        tmp_path / "hosp" / "patients.csv", ["subject_id", "x"], *[[i, 1] for i in range(220_000)], [1, "late text"]
    )
    report = load_mimic(tmp_path, tmp_path / "m.duckdb")
    assert query(report.db_path, "SELECT count(*) FROM hosp_patients WHERE x = 'late text'") == [(1,)]


def test_bad_mimic(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*hosp.patients\.csv, packed or not"):
        load_mimic(tmp_path)
    write_csv(tmp_path / "hosp" / "patients.csv", ["subject_id"], [1])
    (tmp_path / "hosp" / "omr.csv.gz").write_bytes(b"not packed")
    with pytest.raises(ValueError, match=r"cannot read .*omr\.csv\.gz"):
        load_mimic(tmp_path, tmp_path / "m.duckdb")
    assert not (tmp_path / "m.duckdb").exists()


# GLOBEM

SLEEP, STEPS = "f_slp:fitbit_sleep_summary_rapids_avgefficiencymain", "f_steps:fitbit_steps_intraday_rapids_sumsteps"
BLUE, WIFI = "f_blue:phone_bluetooth_rapids_countscans", "f_wifi:phone_wifi_rapids_countscans"


def test_globem_keeps_raw_columns_of_the_whole_day(tmp_path: Path) -> None:
    names = [
        "",
        "pid",
        "date",
        *(f"{x}:allday" for x in (SLEEP, f"{SLEEP}_norm", f"{SLEEP}_dis", STEPS, "f_other:x")),
        f"{STEPS}:night",
    ]
    write_csv(
        tmp_path / "FeatureData" / "rapids.csv",
        names,
        [0, "P1", "2018-01-01", 0.9, 1, "low", 5000, 7, 3],
        [1, "P2", "2018-01-01", "NA", "", "", "", "", ""],
    )
    write_csv(
        tmp_path / "FeatureData" / "first.csv", ["", "pid", "date", f"{STEPS}:allday"], [0, "P9", "2018-01-01", 1]
    )
    write_csv(tmp_path / "SurveyData" / "post.csv", ["pid"], ["P1"])
    report = load_globem(tmp_path, tmp_path / "g.duckdb")
    schema = Schema.read(report.db_path)
    assert report.rows == {"sleep": 2, "activity": 2}
    assert report.skipped == ["location", "phone_usage", "communication", "connectivity", "SurveyData/post.csv"]
    assert schema.tables["activity"] == {"pid": "VARCHAR", "date": "DATE", "intraday_rapids_sumsteps": "DOUBLE"}
    assert list(schema.tables["sleep"]) == ["pid", "date", "summary_rapids_avgefficiencymain"]
    assert query(report.db_path, "SELECT * EXCLUDE (date) FROM sleep ORDER BY pid") == [("P1", 0.9), ("P2", None)]
    assert schema.units["activity.intraday_rapids_sumsteps"] == "steps"
    assert all(f"{t}.{c}" in schema.comments for t, columns in schema.tables.items() for c in columns)


def test_globem_joins_files_of_one_table(tmp_path: Path) -> None:
    write_csv(
        tmp_path / "FeatureData" / "bluetooth.csv", ["", "pid", "date", f"{BLUE}:allday"], [0, "P1", "2018-01-01", 2]
    )
    write_csv(
        tmp_path / "FeatureData" / "wifi.csv",
        ["", "pid", "date", f"{WIFI}:allday", f"{BLUE}:allday"],
        [0, "P1", "2018-01-01", 3, 9],
        [1, "P1", "2018-01-02", 4, 9],
    )
    report = load_globem(tmp_path, tmp_path / "g.duckdb")
    rows = query(
        report.db_path, "SELECT rapids_countscans, phone_wifi_rapids_countscans FROM connectivity ORDER BY date"
    )
    assert rows == [(2.0, 3.0), (None, 4.0)]


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("f_call:phone_calls_rapids_incoming_meanduration", "s"),
        ("f_loc:phone_locations_barnett_avgflightdur", "s"),
        ("f_screen:phone_screen_rapids_sumdurationunlock", "min"),
        ("f_loc:phone_locations_barnett_disttravelled", "m"),
        ("f_loc:phone_locations_doryab_locationentropy", "nats"),
        ("f_blue:phone_bluetooth_doryab_countscansall", ""),
        ("f_slp:fitbit_sleep_intraday_rapids_ratiodurationasleepunifiedwithinmain", ""),
        ("f_loc:phone_locations_doryab_avgspeed", "km/h"),
        ("f_loc:phone_locations_locmap_percent_in_locmap_study", "percent"),
    ],
)
def test_units_of_features(name: str, unit: str) -> None:
    said = module._said(f"{name}:allday", module._SENSORS[name.split(":")[0]])
    assert (said.endswith(f"[{unit}]") if unit else "[" not in said) and ":" in said


def test_bad_globem(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*FeatureData.\*\.csv"):
        load_globem(tmp_path)
    write_csv(
        tmp_path / "FeatureData" / "rapids.csv", ["", "pid", "date", f"{STEPS}:allday"], [0, "P1", "2018-01-01", "many"]
    )
    with pytest.raises(ValueError, match=r"cannot read .*FeatureData: .*many"):
        load_globem(tmp_path, tmp_path / "g.duckdb")


# checklists and sessions


def test_a_released_checklist(tmp_path: Path) -> None:
    pairs = [{"question": f"Q{i}?", "answer": "A", "source_text": "s"} for i in range(2)]
    (tmp_path / "qa.json").write_text(
        json.dumps(
            {
                "metadata": {"provider": "x"},
                "results": [{"entity_id": 10502319, "qa_pairs": pairs}, {"entity_id": "7", "qa_pairs": pairs[:1]}],
            }
        )
    )
    checklist = load_checklist(tmp_path)
    assert [(i.id, i.entity) for i in checklist.items] == [
        ("10502319-00", "10502319"),
        ("10502319-01", "10502319"),
        ("7-00", "7"),
    ]
    assert checklist.world == "" and all(item.claim is None for item in checklist.items)
    with pytest.raises(ValueError, match="no item has a claim, and the rules compare claims"):
        check({"7": Trajectory([Turn(insight="x", claims=[Claim("trend", "t.y", direction=1)])])}, checklist)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"qa\.json is no checklist: Expecting"),
        ("{}", r"qa\.json is no checklist: it lacks 'results'"),
        ("[]", r"qa\.json is no"),
        (
            '{"results": [{"entity_id": 1, "qa_pairs": [{"question": "x"}]}]}',
            r"qa\.json is no checklist: it lacks 'answer'",
        ),
    ],
)
def test_broken_checklists(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "qa.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_checklist(tmp_path / "qa.json")


def test_missing_checklist_and_sessions(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*gone\.json"):
        load_checklist(tmp_path / "gone.json")
    with pytest.raises(FileNotFoundError, match="no folder .*<prefix>_<entity>"):
        load_ddr_logs(tmp_path)


def session(folder: Path, insights: list[str], report: str | None) -> None:
    """A session in the public layout."""
    write_csv(
        folder / "insights_20260101_000000.csv",
        ["timestamp", "assistant_message", "user_message", "insight"],
        *[["t", "I look.", "{}", text] for text in insights],
    )
    if report is not None:
        stats = {"final_summary": report, "completed": True}
        (folder / "session_stats_20260101_000000.json").write_text(json.dumps(stats))


# our worlds


@pytest.mark.parametrize("template", ["retail", "clinic", "filings", "wearable"])
def test_worlds_come_back(tmp_path: Path, template: str) -> None:
    world = make_world(template, seed=3, rows=1_500, path=str(tmp_path / "w.duckdb"))
    written, ours = to_ddr_bench(world, tmp_path / "bench"), build_checklist(world)
    back, schema = load_checklist(written["qa_file"]), Schema.read(written["db_path"], "sqlite")
    assert back.items == ours.items and back.world == digest(written["db_path"], "sqlite")
    assert (schema.tables, schema.values, schema.comments) == (
        world.schema.tables,
        world.schema.values,
        world.schema.comments,
    )
    assert (schema.keys, schema.primary) == (world.schema.keys, world.schema.primary)
    with closing(sqlite3.connect(written["db_path"])) as lite:
        for table, columns in schema.tables.items():
            sums = [f'count("{c}")' for c in columns] + [
                f'sum("{c}")' for c, kind in columns.items() if kind == "DOUBLE"
            ]
            ask = f'SELECT {", ".join(sums)} FROM "{table}"'  # noqa: S608
            got, want = lite.execute(ask).fetchone(), query(world.db_path, ask)[0]
            assert all(a == b or math.isclose(a, b, rel_tol=1e-9) for a, b in zip(got, want, strict=True))


def test_the_layout_of_a_written_world(tmp_path: Path) -> None:
    world = make_world("retail", seed=1, rows=1_000, path=str(tmp_path / "w.duckdb"))
    for _ in range(2):  # a second time replaces the files
        written = to_ddr_bench(world, tmp_path / "bench")
    data = json.loads(Path(written["qa_file"]).read_text())
    assert set(data) == {"metadata", "results"} and data["metadata"]["total_qa_pairs"] == 12
    assert (
        [one["entity_id"] for one in data["results"]]
        == json.loads(Path(written["id_file"]).read_text())
        == ["retail-1"]
    )
    assert all({"question", "answer", "source_text"} < set(pair) for pair in data["results"][0]["qa_pairs"])
    assert data["metadata"]["canary"] == load_checklist(written["qa_file"]).canary
    assert list(Path(written["db_path"]).parent.iterdir()) == [Path(written["db_path"])]  # no answers beside the data
    with closing(sqlite3.connect(written["db_path"])) as lite:
        assert lite.execute("SELECT count(*) FROM column_comments WHERE table_name = 'orders'").fetchone()[0] >= 10
        assert lite.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_runs_of_the_public_runner_on_our_world_are_scored(tmp_path: Path) -> None:
    world = make_world("retail", seed=2, rows=1_500, path=str(tmp_path / "w.duckdb"))
    written = to_ddr_bench(world, tmp_path / "bench")
    checklist = load_checklist(written["qa_file"])
    answers = [item.answer for item in checklist.items]
    session(tmp_path / "logs" / "user_retail-2", ["NO INSIGHT", *answers], "FINISH: " + " ".join(answers[:4]))
    (tmp_path / "logs" / "user_x_1").mkdir()
    with Env(written["db_path"], engine="sqlite") as env:
        logs = load_ddr_logs(tmp_path / "logs", env.schema)
        assert env.world == checklist.world
    assert logs.pop("x_1") is None
    assert check(logs, checklist).accuracy_item == 1 and check(
        logs, checklist, mode="trajectory"
    ).accuracy_item == pytest.approx(4 / 12)
    assert load_ddr_logs(tmp_path / "logs")["retail-2"].claims == []


# real data


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    return real_small(tmp_path_factory.mktemp("real") / "real.duckdb")


def test_answers_of_real_data_are_correct_in_both_wordings(real: tuple[str, Any]) -> None:
    schema = Schema.read(real[0])
    assert len(schema.tables) == 19 and all(
        f"{t}.{c}" in schema.comments for t, cs in schema.tables.items() for c in cs
    )
    for item in real[1].items:
        for text in (item.answer, *(_sentences_of(item.claim, schema, i)[1] for i in (0, 1))):
            assert verdict(Claim.parse(text, schema), item) == "CORRECT", text


def test_truths_of_real_data_are_those_of_the_file(real: tuple[str, Any]) -> None:
    for item in real[1].items:
        value = query(real[0], item.truth_sql)[0][0]
        assert item.value == pytest.approx(value, rel=1e-9) and item.claim.value == item.value
        assert item.claim.direction is None or item.claim.kind == "variance_change" or value * item.claim.direction > 0
    assert real[1].world == digest(real[0]) and {item.entity for item in real[1].items} == {"real-0"}


def test_what_is_known_of_real_data(real: tuple[str, Any]) -> None:
    when = {f"{i.claim.kind} {i.claim.metric}": i.claim.period for i in real[1].items if i.claim.period}
    assert when == {
        "seasonality co2.carbon_dioxide": "5",
        "seasonality elnino.sea_temperature": "3",
        "level_shift nile.volume": "1899-01-01",
    }
    assert "11 years before" in Schema.read(real[0]).comments["sunspots.former_spots"]
    assert query(real[0], "SELECT count(*), count(former_spots) FROM sunspots") == [(309, 298)]
    assert query(real[0], "SELECT count(*) FROM elnino")[0][0] == 61 * 12


def test_a_break_is_no_outlier() -> None:
    with closing(duckdb.connect()) as db:
        level = "if(i < 10, 0, if(i < 20, 1, 2)) AS y"
        db.execute(f"CREATE TABLE t AS SELECT DATE '2000-01-01' + i::INT AS date, {level} FROM range(21) r(i)")  # noqa: S608
        assert db.execute(module._BREAK.format(table="t", y="y")).fetchall() == [("2000-01-11",)]


def test_a_sign_that_the_data_do_not_show(monkeypatch: pytest.MonkeyPatch, real: tuple[str, Any]) -> None:
    monkeypatch.setattr(module, "_built", lambda *_: real[0])
    monkeypatch.setattr(module, "_KNOWN", "\ntrend nile.volume +\n")
    with pytest.raises(ValueError, match="the data do not show 00-trend"):
        real_small()


def test_real_data_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real: tuple[str, Any]) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path, checklist = real_small()
    monkeypatch.setattr(module, "_frames", lambda: pytest.fail("made twice"))
    again, told = real_small()
    assert again == path and Path(path).is_relative_to(tmp_path) and told.world == checklist.world == real[1].world
    assert [i.answer for i in told.items] == [i.answer for i in checklist.items] == [i.answer for i in real[1].items]
    assert isinstance(World(path, [], "real", 0, 0, 1.0).schema, Schema)


@pytest.mark.parametrize("home", ["/dev/null/cache", "read only"])
def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    if home == "read only":
        home = str(tmp_path / "home")
        Path(home, "collai", "ddr").mkdir(parents=True)
        monkeypatch.setattr(module.os, "access", lambda path, mode: not str(path).startswith(home))
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setattr(module.tempfile, "gettempdir", lambda: str(tmp_path))
    made = []
    for _ in range(2):
        made.append(module._built("odd", ["key"], None, lambda db: db.execute("CREATE TABLE t AS SELECT 1 AS x")))
    assert made[0] == made[1] and Path(made[0]).parent.parent == tmp_path and Path(made[0]).is_file()
    if home != "/dev/null/cache":  # a cache that was filled before it was locked is read
        there = module._in_cache("odd", module._code(), "key")
        there.write_bytes(Path(made[0]).read_bytes())
        assert module._built("odd", ["key"], None, lambda db: 1 / 0) == str(there) and not there.with_suffix(".lock").exists()


def test_folders_that_are_no_sessions_are_left_out(tmp_path: Path) -> None:
    for name in ("__pycache__", "_x", ".git_x", "patient_", "patient_7"):
        (tmp_path / name).mkdir()
    assert load_ddr_logs(tmp_path) == {"7": None}
