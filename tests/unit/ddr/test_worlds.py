"""Generated worlds: the same from the same arguments, truths that plain SQL finds, nulls that hold nothing, and no trace in the file."""
# ruff: noqa: S608  (queries are built from names the generator made)
import math
import os
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

import duckdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import collai
from collai.ddr import worlds
from collai.ddr.worlds import KINDS, Plant, Schema, digest, make_world

TEMPLATES = ("retail", "clinic", "filings", "wearable")
TIMED = ("trend", "seasonality", "level_shift")
NEEDS = {"trend": "by segment direction time", "seasonality": "period time", "level_shift": "by segment direction period time",
         "group_difference": "by segment direction", "correlation": "other direction",
         "interaction": "other by segment given direction", "simpson": "by segment given direction",
         "anomaly_day": "direction period", "missing_not_at_random": "by segment direction", "orphan_keys": "other",
         "lag": "other direction lag", "top_share": "by segment", "variance_change": "by segment direction",
         "dose_threshold": "other direction cut", "duplicate_rows": ""}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """No test reads or fills the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def ask(path, sql):
    with closing(duckdb.connect(str(path), read_only=True)) as db:
        return db.execute(sql).fetchall()


def drawn(template, seed, kinds=None, strength=1.0):
    """Plants alone, no file."""
    spec = worlds._TEMPLATES[template]()
    kinds = [k for k in KINDS[:12] if k in spec.places] if kinds is None else kinds
    return spec, worlds._plants(spec, kinds, strength, np.random.default_rng([seed]))


def joined(schema, table, *names):
    """FROM clause that reaches the tables of these columns along the keys."""
    seen, clause = {table}, table
    for target in dict.fromkeys(n.split(".")[0] for n in names if n):
        ways = [[]] if target not in seen else []
        while ways:
            way = ways.pop(0)
            here = way[-1][1].split(".")[0] if way else table
            if here == target:
                for child, parent in way:
                    if (new := parent.split(".")[0]) not in seen:
                        seen.add(new)
                        clause += f" JOIN {new} ON {child} = {parent}"
                break
            ways += [[*way, key] for key in sorted(schema.keys.items()) if key[0].split(".")[0] == here]
    return clause


# --- the same from the same ----------------------------------------------------------------------------------------


def test_the_same_arguments_give_the_same_contents_in_any_process(tmp_path):
    code = "from collai.ddr.worlds import make_world; w = make_world('retail', 5, 1500); print(w.db_path, w.digest)"
    env = {**os.environ, "PYTHONPATH": str(Path(collai.__file__).parents[1]), "XDG_CACHE_HOME": str(tmp_path / "one")}
    running = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate()[0] for process in running}
    here = make_world("retail", 5, 1500, path=str(tmp_path / "here.duckdb"))
    assert len(said) == 1 and here.digest == said.pop().split()[1] == make_world("retail", 5, 1500, 1).digest
    assert {p.suffix for p in (tmp_path / "one").rglob("*") if p.is_file()} <= {".duckdb", ".lock"}


def test_every_argument_matters():
    base = dict(template="retail", seed=1, rows=1000, strength=1.0, plants=["trend", "top_share"])
    changes = ({}, {"seed": 2}, {"rows": 1001}, {"strength": 0.5}, {"plants": ["trend"]}, {"template": "filings"})
    assert len({make_world(**{**base, **change}).digest for change in changes}) == len(changes)


def test_a_file_in_the_cache_is_taken_as_it_is_and_a_named_one_is_replaced(tmp_path):
    first = make_world(rows=1000, plants=[])
    stamp = os.stat(first.db_path).st_mtime_ns
    assert make_world(rows=1000, plants=[]).db_path == first.db_path and os.stat(first.db_path).st_mtime_ns == stamp
    target = tmp_path / "it's here.duckdb"
    target.write_text("something else")
    assert make_world(rows=1000, plants=[], path=str(target)).digest == first.digest
    assert [p.name for p in tmp_path.iterdir()] == [target.name]


def test_a_redraw_keeps_the_process_and_changes_the_noise():
    world = make_world("wearable", 3, 1000)
    again = [world.redraw(0), world.redraw(1), world.redraw(1), world.redraw(1, rows=2000)]
    assert len({w.digest for w in (world, *again)}) == 4 and again[1].digest == again[2].digest
    assert again[0].redraw(1).digest == again[1].digest
    for other in again:
        assert other.plants == world.plants and other.schema.tables == world.schema.tables
    assert again[3].rows == 2000 and ask(again[3].db_path, "SELECT count(*) FROM activity") == [(2000,)]
    with pytest.raises(ValueError, match="rep must be >= 0, got -1"):
        world.redraw(-1)
    with pytest.raises(ValueError, match="rows must be >= 1000, got 10"):
        world.redraw(0, 10)


# --- what is planted -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
@given(seed=st.integers(0, 2**40))
@settings(max_examples=8)
def test_plants_say_all_their_claim_needs_and_stay_out_of_each_others_way(template, seed):
    spec, plants = drawn(template, seed)
    assert [p.kind for p in plants] == [k for k in KINDS[:12] if k in spec.places] and len(plants) >= 10
    for plant in plants:
        p = plant.params
        assert set(NEEDS[plant.kind].split()) <= p.keys() and math.isfinite(p["effect"]) and p["effect"] != 0
        assert not worlds._column(spec, p["metric"]).decoy and p.get("direction", 1) in (-1, 1)
        if "direction" in p:
            assert (p["effect"] > 0) == (p["direction"] > 0)
        if "by" in p:
            column = worlds._column(spec, p["by"])
            assert p["segment"] in column.args and not column.decoy
        if plant.kind == "interaction":
            assert p["given"] == p["by"]
    shaped = {name for p in plants if p.kind in ("simpson", "top_share") for name in (p.params["by"], p.params.get("given"))}
    assert not any(p.params.get("by", "") in shaped for p in plants if p.kind not in ("simpson", "top_share"))
    carriers = [worlds._carriers((p.params["metric"], p.params["by"], p.params.get("given", "")))
                for p in plants if p.kind in ("simpson", "top_share")]
    assert sum(map(len, carriers)) == len(set().union(*carriers))
    timed = [p.params for p in plants if p.kind in TIMED]
    for one, two in ((a, b) for a in timed for b in timed if a is not b and a["metric"] == b["metric"]):
        assert one["by"] == two["by"] and one["segment"] != two["segment"]


@given(seed=st.integers(0, 10**6), kinds=st.lists(st.sampled_from([k for k in KINDS if k != "duplicate_rows"]), max_size=8))
@settings(max_examples=15)
def test_a_kind_named_twice_is_planted_in_two_places(seed, kinds):
    try:
        plants = drawn("retail", seed, kinds)[1]
    except ValueError as error:
        assert "no place left for another" in str(error) and max(Counter(kinds).values()) > 1
        return
    assert [p.kind for p in plants] == kinds
    places = [(p.kind, *(p.params.get(k) for k in ("metric", "by", "segment", "given", "other")),
               p.params.get("period") if p.kind == "anomaly_day" else None) for p in plants]
    assert len(set(places)) == len(places)


@given(k=st.integers(2, 10), effect=st.floats(-5, 5), seed=st.integers(0, 99))
def test_shares_of_strata_turn_the_margin_around(k, effect, seed):
    drawn = {name: np.array(x) for name, x in worlds._strata(k, effect, np.random.default_rng(seed)).items()}
    inside, outside = drawn["inside"], drawn["outside"]
    assert min(inside.min(), outside.min()) > 0 and abs(inside.sum() - 1) + abs(outside.sum() - 1) < 1e-12
    assert abs(effect + drawn["levels"] @ (inside - outside) + effect) < 1e-9


# --- truths by SQL -------------------------------------------------------------------------------------------------


def truth(world, plant):
    """What plain SQL says about a plant, in the units of its effect, and how far it may be off."""
    p, kind, s = plant.params, plant.kind, world.schema
    y, table = p["metric"], p["metric"].split(".")[0]
    source = joined(s, table, p.get("by"), p.get("given"), p.get("other") if kind not in ("lag", "orphan_keys") else None)
    inside = f"{p['by']} = '{p['segment']}'" if "by" in p else "true"
    n, sd = ask(world.db_path, f"SELECT count({y}), stddev({y}) FILTER ({inside}) FROM {source}"
                if kind not in ("anomaly_day", "duplicate_rows") else f"SELECT count(*), 1 FROM {table}")[0]
    within = n * (1 if kind in ("correlation", "dose_threshold", "anomaly_day") else 0.1)
    loose = 5 * sd * math.sqrt(12 / within)
    start = "DATE '2150-01-01'" if world.template == "clinic" else "DATE '2022-01-01'" if world.template == "wearable" \
        else "DATE '2021-01-01'"
    day = f"date_diff('day', {start}, {p['time']}::DATE)" if "time" in p else ""
    if kind in ("anomaly_day", "orphan_keys", "duplicate_rows"):
        others = ", ".join(c for c in s.tables[table] if f"{table}.{c}" != y)
        sql = {"anomaly_day": f"SELECT (count(*) FILTER ({y}::DATE = DATE '{p.get('period')}') - {n} / 1096) / {n}",
               "orphan_keys": f"SELECT avg(({y} NOT IN (SELECT {p.get('other')} FROM "
                              f"{p.get('other', '.').split('.')[0]}))::INT)",
               "duplicate_rows": f"SELECT 1 - (SELECT count(*) FROM (SELECT DISTINCT {others} FROM {table})) / count(*)"}
        return ask(world.db_path, f"{sql[kind]} FROM {table}")[0][0], 40 / n
    if kind == "lag":
        late, early = table, p["other"].split(".")[0]
        mean, sd = worlds._moments(worlds._retail(), p["other"])
        return ask(world.db_path, f"SELECT regr_slope({y}, ({p['other']} - {mean}) / {sd}) FROM {late} JOIN {early} "
                   f"ON {late}.date = {early}.date + {p['lag']}")[0][0], 5 * 1000 / math.sqrt(1096)
    gap = f"avg({y}) FILTER ({inside}) - avg({y}) FILTER (NOT ({inside}))"
    if kind == "simpson":
        strata = ask(world.db_path, f"SELECT count(*), {gap} FROM {source} GROUP BY {p['given']}")
        assert all(x * p["direction"] > 0 for _, x in strata)
        assert ask(world.db_path, f"SELECT {gap} FROM {source}")[0][0] * p["direction"] < 0
        return sum(k * x for k, x in strata) / sum(k for k, _ in strata), loose
    if kind in ("missing_not_at_random", "top_share"):
        what = f"avg(({y} IS NULL)::INT) FILTER ({inside})" if kind != "top_share" else f"sum({y}) FILTER ({inside}) / sum({y})"
        return ask(world.db_path, f"SELECT {what} FROM {source}")[0][0], 0.06
    if kind == "variance_change":
        return ask(world.db_path, f"SELECT stddev({y}) FILTER ({inside}) / stddev({y}) FILTER (NOT ({inside})) - 1 FROM {source}"
                   )[0][0], 0.1
    x = {"trend": f"{day} / 1096" if world.template != "wearable" else f"{day} / 730",
         "level_shift": f"(date_trunc('day', {p.get('time')}) >= DATE '{p.get('period')}')::INT",
         "seasonality": f"cos(2 * pi() * ({day} / 365.25 - ({p.get('period')} - 0.5) / 12))",
         "dose_threshold": f"({p.get('other')} > {p.get('cut')})::INT"}.get(kind, p.get("other"))
    if kind == "group_difference":
        return ask(world.db_path, f"SELECT {gap} FROM {source}")[0][0], loose
    spread = ask(world.db_path, f"SELECT stddev({x}) FROM {source}")[0][0]
    where = "true" if kind in ("correlation", "dose_threshold") else inside
    if world.template == "retail" and "by" in p:
        outside = ask(world.db_path, f"SELECT regr_slope({y}, {x}) FROM {source} WHERE NOT ({inside})")[0][0]
        assert abs(outside) < abs(p["effect"]) / 2
    return ask(world.db_path, f"SELECT regr_slope({y}, {x}) FROM {source} WHERE {where}")[0][0], loose / spread / 3.4


@pytest.mark.parametrize(("template", "kinds"), [
    *((template, None) for template in TEMPLATES), ("retail", ["variance_change", "dose_threshold", "duplicate_rows", "lag"]),
    ("clinic", ["duplicate_rows", "variance_change"]), ("wearable", ["dose_threshold"]), ("filings", ["variance_change"])])
def test_plain_sql_finds_every_plant(template, kinds):
    world = make_world(template, 11, 20_000, plants=kinds)
    for plant in world.plants:
        value, loose = truth(world, plant)
        goal = plant.params["effect"] if plant.kind != "missing_not_at_random" else 1 - 0.98 * (1 - plant.params["effect"])
        assert abs(value - goal) < loose, (plant, value, loose)
        if "direction" in plant.params:
            assert value * plant.params["direction"] > 0, plant


@given(seed=st.integers(0, 10**6), strength=st.sampled_from([0.25, 0.5, 1.0]))
@settings(max_examples=4)
def test_a_planted_reversal_is_in_the_file(tmp_path_factory, seed, strength):
    world = make_world("retail", seed, 6000, strength, ["simpson"], str(tmp_path_factory.mktemp("w") / "w.duckdb"))
    value, _ = truth(world, world.plants[0])  # which looks at every stratum and at the margin
    assert value * world.plants[0].params["direction"] > 0


def test_a_reversal_that_is_never_there_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(worlds, "_reversed", lambda *_: False)
    monkeypatch.setattr(worlds, "_TRIES", 2)
    with pytest.raises(ValueError, match="2 draws without the planted reversal"):
        make_world(rows=1000, plants=["simpson"], path=str(tmp_path / "w.duckdb"))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(worlds, "_finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_world(rows=1000, path=str(tmp_path / "w.duckdb"))
    assert not list(tmp_path.iterdir())


# --- nothing where nothing is --------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_null_world_has_no_differences_trends_or_slopes(template):
    world = make_world(template, 7, 8000, plants=[])
    spec, s, z = worlds._TEMPLATES[template](), world.schema, []
    for metric, by, _ in spec.places["group_difference"]:
        table = metric.split(".")[0]
        time = worlds._clock(spec, table)
        source = joined(s, table, by)
        for n, mean, sd, r in ask(world.db_path, f"SELECT count({metric}), avg({metric}), stddev({metric}), "
                                  f"corr({metric}, epoch({time}::TIMESTAMP)) FROM {source} GROUP BY {by}"):
            z += [(mean - worlds._moments(spec, metric)[0]) * math.sqrt(n) / sd, r * math.sqrt(n)]
    for metric, _, x in spec.places["correlation"]:
        n, r = ask(world.db_path, f"SELECT count(*), corr({metric}, {x}) FROM {joined(s, metric.split('.')[0], x)}")[0]
        z.append(r * math.sqrt(n))
    assert len(z) > 20 and np.abs(z).max() < 4.5 and 0.7 < np.std(z) < 1.3


def test_strength_scales_and_zero_plants_nothing():
    spec, full = drawn("retail", 4)
    half, none = drawn("retail", 4, strength=0.5)[1], drawn("retail", 4, strength=0.0)[1]
    for a, b, c in zip(full, half, none, strict=True):
        if a.kind == "top_share":
            even = 1 / len(worlds._column(spec, a.params["by"]).args)
            assert abs(b.params["effect"] - (a.params["effect"] + even) / 2) < 1e-12 and c.params["effect"] == even
        else:
            assert b.params["effect"] == a.params["effect"] / 2 and c.params["effect"] == 0
    make_world(rows=1000, strength=0)
    make_world(rows=1000, strength=20.0)


# --- the file ------------------------------------------------------------------------------------------------------


def test_the_shop_has_the_promised_columns_and_unique_names():
    promised = {"orders": "order_id customer_id store_id product_id date amount discount rating returned channel ship_days",
                "customers": "customer_id signup segment", "stores": "store_id region format",
                "products": "product_id category price", "ads": "date spend", "web": "date sessions"}
    spec = worlds._retail()
    names = Counter(c for table in spec.tables.values() for c in table.columns)
    assert {name for name, k in names.items() if k > 1} == {"date", "customer_id", "store_id", "product_id"}
    world = make_world(rows=40_000, plants=["duplicate_rows", "anomaly_day"])
    for table, columns in promised.items():
        assert set(columns.split()) < world.schema.tables[table].keys()  # the rest are decoys, at least one
    counts = {t: ask(world.db_path, f"SELECT count(*) FROM {t}")[0][0] for t in promised}
    assert counts == {"orders": 40_000, "customers": 2000, "stores": 60, "products": 200, "ads": 1096, "web": 1096}
    crossed = ask(world.db_path, "SELECT count(*) FROM stores GROUP BY region, format")
    assert crossed == [(5,)] * 12  # no category of a store tells of another
    assert {world.schema.tables[t]["date"] for t in ("orders", "ads", "web")} == {"DATE"}


def test_mimic_names():
    world = make_world("clinic", rows=1000, plants=[])
    tables = world.schema.tables
    assert ask(world.db_path, "SELECT count(*) FROM d_labitems GROUP BY category, fluid") == [(3,)] * 4
    for table, names in {"patients": "subject_id gender anchor_age anchor_year", "d_labitems": "itemid label fluid category",
                         "admissions": "subject_id hadm_id admittime dischtime admission_type insurance hospital_expire_flag",
                         "labevents": "labevent_id subject_id hadm_id itemid charttime valuenum priority",
                         "diagnoses_icd": "subject_id hadm_id seq_num icd_code icd_version",
                         "prescriptions": "subject_id hadm_id pharmacy_id starttime stoptime drug_type drug route",
                         "services": "subject_id hadm_id transfertime prev_service curr_service",
                         "d_icd_diagnoses": "icd_code icd_version long_title"}.items():
        assert set(names.split()) <= tables[table].keys()


@pytest.mark.parametrize("template", TEMPLATES)
def test_files_say_what_columns_mean_and_nothing_of_plants(template):
    spec, schemas = worlds._TEMPLATES[template](), [make_world(template, seed, 1000).schema for seed in (0, 1)]
    assert [list(c) for c in schemas[0].tables.values()] != [list(c) for c in schemas[1].tables.values()]
    for s in schemas:
        assert s == Schema.read(make_world(template, schemas.index(s), 1000).db_path)
        assert {f"{t}.{c}" for t, columns in s.tables.items() for c in columns} | s.tables.keys() == s.comments.keys()
        assert s.keys and set(s.primary.items()) >= {tuple(parent.split(".")) for parent in s.keys.values()}
        found = [worlds._column(spec, f"{t}.{c}").decoy for t, columns in s.tables.items() for c in columns]
        assert 2 <= sum(found) < len(found) / 2
    data = Path(make_world(template, 0, 1000).db_path).read_bytes()
    for word in ({*KINDS} - {"lag", "trend", "correlation"}) | {"decoy", "canary", "strength"}:
        assert word.encode() not in data, word


def test_units_stand_in_brackets():
    s = make_world(rows=1000, plants=[]).schema
    assert (s.units["orders.amount"], s.units["products.price"], s.units["orders.channel"]) == ("EUR", "EUR", "")
    assert s.values["stores.region"] == ("east", "north", "south", "west")


# --- any file ------------------------------------------------------------------------------------------------------


def test_keys_are_found_where_none_are_declared(tmp_path):
    with closing(duckdb.connect(str(tmp_path / "a.duckdb"))) as db:
        db.execute('CREATE TABLE "odd ""name" (pid INTEGER, "the note" VARCHAR, ok BOOLEAN)')
        db.execute("INSERT INTO \"odd \"\"name\" VALUES (1, 'it''s', true), (2, NULL, false)")
        db.execute("CREATE TABLE visit AS SELECT i % 3 AS pid, i AS n, DATE '2020-01-01' + i::INT AS day FROM range(90) t(i)")
        db.execute("ALTER TABLE visit ALTER pid TYPE INTEGER")
    s = Schema.read(tmp_path / "a.duckdb")
    assert s.keys == {"visit.pid": 'odd "name.pid'} and s.primary == {'odd "name': "pid"}
    assert s.values == {'odd "name.the note': ("it's",), 'odd "name.ok': ("false", "true")} and s.comments == {}
    assert s.units["visit.n"] == "" and len(digest(tmp_path / "a.duckdb")) == 64


def test_a_file_that_is_open_with_other_settings_can_be_read():
    world = make_world(rows=1000, plants=[])
    with closing(duckdb.connect(world.db_path, read_only=True, config={"threads": 1, "enable_external_access": "false"})):
        assert Schema.read(world.db_path) == world.schema and digest(world.db_path) == world.digest


@pytest.mark.parametrize("engine", ["duckdb", "sqlite"])
def test_a_digest_sees_every_cell_name_and_type_but_not_the_order(tmp_path, engine):
    def made(i, table="a INTEGER, b VARCHAR(9)", rows=((1, "x"), (2, None)), name="t"):
        path = tmp_path / f"{i}"
        with closing(duckdb.connect(str(path)) if engine == "duckdb" else sqlite3.connect(path)) as db:
            db.execute(f"CREATE TABLE {name} ({table})")
            db.executemany(f"INSERT INTO {name} VALUES (?, ?)", rows)
            db.commit()
        return digest(path, engine)
    same = {made(0), made(1, rows=((2, None), (1, "x")))}
    others = [made(2, rows=((1, "x"), (2, ""))), made(3, rows=((1, None), (2, "x"))), made(4, rows=((1, "x"),)),
              made(5, rows=((1, "x"), (2, None), (2, None))), made(6, table="a INTEGER, c VARCHAR"), made(7, name="u"),
              made(8, table="a DOUBLE, b VARCHAR")]
    assert len(same) == 1 and len({*same, *others}) == 8


def test_what_cannot_be_read_is_refused(tmp_path):
    for read in (Schema.read, digest):
        with pytest.raises(FileNotFoundError, match="no database file"):
            read(tmp_path / "none.duckdb")
        with pytest.raises(ValueError, match="engine must be 'duckdb' or 'sqlite', got 'csv'"):
            read(tmp_path / "none.duckdb", "csv")


@pytest.mark.parametrize(("wrong", "text"), [
    ({"template": "shop"}, "template must be one of retail, clinic, filings, wearable, got 'shop'"),
    ({"plants": ["trend", "wave"]}, "retail can hold trend, seasonality, .*duplicate_rows, got 'wave'"),
    ({"template": "clinic", "plants": ["lag"]}, "clinic can hold .*, got 'lag'"),
    ({"template": "wearable", "plants": ["anomaly_day"]}, "wearable can hold .*, got 'anomaly_day'"),
    ({"rows": 999}, "rows must be >= 1000, got 999"), ({"rows": -5}, "rows must be >= 1000, got -5"),
    ({"strength": -0.1}, "strength must be finite and >= 0, got -0.1"),
    ({"strength": math.inf}, "strength must be finite and >= 0, got inf"),
    ({"strength": math.nan}, "strength must be finite and >= 0, got nan"), ({"seed": -3}, "seed must be >= 0, got -3"),
    ({"plants": ["duplicate_rows"] * 2}, "no place left for another 'duplicate_rows'")])
def test_wrong_arguments_are_refused_with_their_value(wrong, text):
    with pytest.raises(ValueError, match=text):
        make_world(**wrong)


def test_a_plant_is_a_kind_with_parameters():
    assert Plant("trend", {"metric": "orders.amount"}) == Plant("trend", {"metric": "orders.amount"})


@pytest.mark.parametrize("wrong", [{"rows": 1000.5}, {"seed": 1.5}, {"rows": "4000"}])
def test_rows_and_seeds_are_whole_numbers(wrong):
    with pytest.raises(TypeError, match=f"{next(iter(wrong))} must be an integer, got"):
        make_world("retail", **wrong)


def test_a_file_of_users_is_read_whatever_its_columns_are(tmp_path):
    path = str(tmp_path / "own.duckdb")
    with closing(duckdb.connect(path)) as db:
        db.execute("CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE SCHEMA other; CREATE TABLE other.t (i INTEGER)")
        db.execute("CREATE TABLE \"a table\" AS SELECT i, 'ok'::mood AS mood, [i] AS items, INTERVAL (i) DAY AS wait, "
                   "{'k': i} AS st, i AS \"dotted.name\" FROM range(9) t(i)")
        db.execute("CREATE VIEW seen AS SELECT 1 AS one")
    with pytest.warns(UserWarning, match="names with a dot are left out: a table.dotted.name"):
        schema = Schema.read(path)
    assert schema.tables == {"a table": {"i": "BIGINT", "mood": "VARCHAR", "items": "BIGINT[]", "wait": "INTERVAL", "st": "STRUCT(k BIGINT)"}}
    assert schema.values == {"a table.mood": ("ok",)}


def test_the_engine_of_a_file_is_looked_at_first(tmp_path):
    lite = str(tmp_path / "a.sqlite")
    with closing(sqlite3.connect(lite)) as db, db:
        db.execute("CREATE TABLE t (i INTEGER)")
    with pytest.raises(ValueError, match="a.sqlite is an SQLite file: pass engine='sqlite'"):
        Schema.read(lite)
    duck = str(tmp_path / "a.duckdb")
    duckdb.connect(duck).close()
    with pytest.raises(ValueError, match="a.duckdb is a DuckDB file: pass engine='duckdb'"):
        Schema.read(duck, engine="sqlite")
