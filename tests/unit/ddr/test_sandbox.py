"""Model-written SQL and Python: what is refused, what passes, and that the tools answer afterwards."""
import json
import math
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import time
from datetime import date, datetime, timedelta
from datetime import time as clock
from decimal import Decimal
from pathlib import Path

import duckdb
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.ddr import sandbox as m
from collai.ddr.sandbox import (
    Budget,
    Env,
    PySandbox,
    QueryResult,
    SqlError,
    SqlMemory,
    SqlRejected,
    SqlSandbox,
    SqlTimeout,
    Trajectory,
    Turn,
    touched_fields,
)

QUICK, TABLES = 0.25, {"t": ["i", "x", "g"], "u": ["i", "created_at", "last_updated"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for engine in ("duckdb", "sqlite"):
        m._small(f"{folder}/{engine}.db", engine)
    extra = ("CREATE TABLE u (i INTEGER, created_at VARCHAR, last_updated VARCHAR)", "INSERT INTO u VALUES (1, '2024', 'drop')")
    with duckdb.connect(f"{folder}/duckdb.db") as duck:
        lite = sqlite3.connect(f"{folder}/sqlite.db")
        for text in extra:
            duck.execute(text), lite.execute(text)
        lite.commit(), lite.close()
    return folder


@pytest.fixture(scope="module")
def boxes(place):
    with SqlSandbox(f"{place}/duckdb.db", timeout_s=QUICK, memory_mb=256) as duck, \
            SqlSandbox(f"{place}/sqlite.db", "sqlite", QUICK, memory_mb=256) as lite, \
            PySandbox(f"{place}/duckdb.db", timeout_s=20.0, memory_mb=384) as python:
        before = {name: Path(place, name).read_bytes() for name in os.listdir(place)}
        yield {"duckdb": duck, "sqlite": lite, "python": python}
        assert {name: Path(place, name).read_bytes() for name in os.listdir(place)} == before  # after all attacks
    assert not [p for p in psutil.Process().children(recursive=True) if "_serve" in " ".join(p.cmdline())]


@pytest.fixture(scope="module")
def calm(place):
    """Sandboxes with the usual limits, for queries that must pass however busy the machine is."""
    with SqlSandbox(f"{place}/duckdb.db") as duck, SqlSandbox(f"{place}/sqlite.db", "sqlite") as lite:
        yield {"duckdb": duck, "sqlite": lite}


MORE_SQL = {
    "duckdb": {
        "UPDATE t SET i = 0": SqlRejected, "TRUNCATE t": SqlRejected, "ALTER TABLE t ADD COLUMN z INT": SqlRejected,
        "CREATE OR REPLACE VIEW v AS SELECT 1": SqlRejected, "CREATE MACRO f() AS 1": SqlRejected, "BEGIN": SqlRejected,
        "EXPORT DATABASE 'd'": SqlRejected, "IMPORT DATABASE 'd'": SqlRejected, "USE memory": SqlRejected,
        "CHECKPOINT": SqlRejected, "VACUUM": SqlRejected, "DETACH duckdb": SqlRejected, "RESET threads": SqlRejected,
        "PREPARE p AS SELECT 1": SqlRejected, "EXECUTE gate('SELECT 1')": SqlRejected, "SET VARIABLE a = 1": SqlRejected,
        "WITH a AS (INSERT INTO t VALUES (1, 1, 'a') RETURNING *) FROM a": SqlRejected,
        "WITH a AS (UPDATE t SET i = 1 RETURNING *) FROM a": SqlRejected, "/* SELECT */ DROP TABLE t": SqlRejected,
        "EXPLAIN ANALYZE DELETE FROM t": SqlRejected, "EXPLAIN (FORMAT json) DROP TABLE t": SqlRejected,
        "EXPLAIN /* x */ ANALYZE -- y\n CREATE TABLE z (a INT)": SqlRejected, "SELECT 1;; SELECT 2": SqlRejected,
        "SELECT * FROM t WHERE i IN (SELECT count(*) FROM read_csv('/etc/passwd'))": SqlRejected,
        "SELECT (SELECT content FROM main.read_text('/etc/passwd'))": SqlRejected,
        "SELECT * FROM system.main.read_blob('/etc/passwd')": SqlRejected, "FROM parquet_scan('x')": SqlRejected,
        "SUMMARIZE SELECT * FROM glob('*')": SqlRejected, "FROM (DESCRIBE FROM sniff_csv('/etc/passwd'))": SqlRejected,
        "FROM duckdb_secrets()": SqlRejected, "FROM \"duckdb_databases\"": SqlRejected, "FROM pg_catalog.pg_settings": SqlRejected,
        "FROM json_execute_serialized_sql('{}')": SqlRejected, "SELECT getvariable('x')": SqlRejected,
        "SELECT \"Current_Setting\"('temp_directory')": SqlRejected, "SELECT write_log('x')": SqlRejected,
        "SELECT nextval('s')": SqlRejected, "FROM pragma_storage_info('t')": SqlRejected, "FROM seq_scan('t')": SqlRejected,
        "SELECT 1 ORDER BY (SELECT 1 FROM duckdb_settings())": SqlRejected, "FROM 'https://127.0.0.1/x.csv'": SqlError,
        "FROM '/etc/passwd'": SqlError, "FROM sys": SqlError, "FROM session": SqlError, "FROM self": SqlError,
        "SELECT error('x')": SqlError, "SELECT '\ud800'": SqlRejected, "SELECT 'a\0b'": SqlRejected, "": SqlRejected,
        "-- SELECT 1": SqlRejected, ";": SqlRejected, "SELECT 1" + " " * 100_000: SqlRejected, "SELEC 1": SqlError,
        "SELECT count(*) FROM t a, t b, t c, t d": SqlTimeout, "SELECT levenshtein(repeat('a', 999999), repeat('b', 999999))":
        SqlError, "SELECT string_agg(repeat('x', 1000), '') FROM range(9999999)": SqlError,
        "SELECT list(a.range) FROM range(99999999) a": SqlError, "SELECT format('{:>2000000000}', 1)": SqlError,
        "SELECT " + ", ".join(f"repeat('é', 900) AS c{i}" for i in range(200)): SqlError},
    "sqlite": {
        "INSERT INTO t VALUES (1, 1, 'a')": SqlRejected, "REPLACE INTO t VALUES (1, 1, 'a')": SqlRejected,
        "UPDATE t SET i = 0": SqlRejected, "BEGIN IMMEDIATE": SqlRejected, "SAVEPOINT a": SqlRejected, "REINDEX": SqlRejected,
        "ANALYZE": SqlRejected, "DETACH main": SqlRejected, "CREATE TEMP TABLE z (a)": SqlRejected,
        "WITH a AS (SELECT 1) INSERT INTO t SELECT 1, 1, 'a'": SqlRejected, "EXPLAIN DROP TABLE t": SqlRejected,
        "PRAGMA query_only = 0": SqlRejected, "SELECT * FROM pragma_compile_options": SqlRejected,
        "SELECT * FROM pragma_journal_mode('wal')": SqlRejected, "SELECT readfile('/etc/passwd')": SqlError,
        "SELECT writefile('x', 'y')": SqlError, "SELECT edit('x')": SqlError, "SELECT * FROM t; DELETE FROM t": SqlRejected,
        "-- \n": SqlRejected, "SELECT '\0'": SqlRejected, "SELECT group_concat(a.g || b.g) FROM t a, t b, t c": SqlError,
        "SELECT count(*) FROM t a, t b, t c": SqlTimeout,
        "SELECT randomblob(2000000000)": SqlError, "SELECT replace(hex(zeroblob(4000000)), '0', 'xxxxxxxxxx')": SqlError},
}
MORE_PYTHON = [
    "import socket; socket.socketpair()", "import asyncio; asyncio.run(asyncio.sleep(0))", "import os; os.popen('true').read()",
    "import multiprocessing as p; p.Process(target=print).start()", "import os; os.spawnv(0, '/bin/true', ['true'])",
    "import pty; pty.fork()", "import os; os.forkpty()", "import os; os.setsid()", "import os; os.killpg(0, 9)",
    "import ctypes; ctypes.c_int.from_address(1)", "import ctypes; ctypes.string_at(1)", "open('/dev/mem', 'rb')",
    "import pathlib; pathlib.Path('x').write_text('y')", "import tempfile; tempfile.NamedTemporaryFile()",
    "import shutil; shutil.copy(data_path, 'x')", "import shutil; shutil.rmtree('/tmp')", "import os; os.mkdir('x')",
    "import os; os.truncate(data_path, 0)", "import os; os.link(data_path, 'x')", "import os; os.chown(data_path, 1, 1)",
    "import os; list(os.scandir('/etc'))", "import os; os.open('/etc/shadow', 0)", "import os; os.chdir('/etc')",
    "import sqlite3; sqlite3.connect('x.db').execute('CREATE TABLE t (a)')", "import sqlite3; sqlite3.connect('/etc/passwd')",
    "import numpy; numpy.save('x', numpy.ones(1))", "import pandas; pandas.read_csv('/etc/passwd')",
    "import duckdb; duckdb.sql('INSTALL httpfs')", "import duckdb; duckdb.sql(\"ATTACH 'new.db'\")",
    "import duckdb; duckdb.sql(\"COPY (SELECT 1) TO '\" + data_path + \"'\")", "import collai.ddr.sandbox",
    "__import__('importlib').import_module('collai.ddr.worlds')", "import sys; sys._getframe(1).f_globals['os'].system('true')",
    "import os; os.memfd_create('x')", "import resource; resource.setrlimit(resource.RLIMIT_NPROC, (9, 9))",
    "import gc; gc.get_objects()", "x = [0] * 10**10", "import mmap; mmap.mmap(-1, 10**11)", "raise KeyboardInterrupt",
    "import signal, os; os.kill(os.getpid(), 11)", "def f(): f()\nf()", "import os; os.close(4)", "x =", "1 / 0", "\0", "input()",
    "class E(Exception):\n    def __str__(self): raise self\nraise E", "import os; os.write(4, b'\\0\\0\\0\\3[[['); os._exit(0)",
    "import os; os.write(4, b'\\xff' * 99)\nos._exit(1)", "import os\nfor _ in range(9): os.write(1, b'x' * 10**6)",
    "import http.client; http.client.HTTPConnection('127.0.0.1').request('GET', '/')", "import os; os.symlink('/etc', 'e')"]
SQL = [(engine, text, kind) for engine, texts in MORE_SQL.items() for text, kind in texts.items()]
SQL += [(engine, text, SqlError) for engine in ("duckdb", "sqlite") for text in m._ATTACKS[engine].values()]


@pytest.mark.parametrize("engine, text, kind", SQL, ids=[f"{e}-{t[:40]!a}" for e, t, _ in SQL])
def test_an_attack_in_sql_is_blocked_and_the_next_query_is_answered(boxes, engine, text, kind):
    with pytest.raises(kind) as caught:
        boxes[engine].query(text)
    assert len(str(caught.value)) <= 1_000 and str(Path(boxes[engine].db_path).parent) not in str(caught.value)
    assert boxes[engine].query("SELECT count(*) FROM t").data == [[1_000]]


@pytest.mark.parametrize("code", MORE_PYTHON + [c for c in m._ATTACKS["python"].values() if "while" not in c],
                         ids=lambda code: ascii(code[:40]))
def test_an_attack_in_python_ends_as_an_error(boxes, code):
    done = boxes["python"].run(code)
    assert done.error and len(done.error) <= 1_100 and len(done.stdout) <= m._PRINTED


def test_python_is_stopped_at_its_limit_and_works_again(boxes):
    box = boxes["python"]
    for code in ("while True: pass", "import time\nwhile True:\n    try: time.sleep(9)\n    except BaseException: pass"):
        assert m._run_python(box, code, 0.3).error == "stopped after 0.3 s"
    assert m._run_python(box, "print('a', flush=True)\nwhile True: pass", 0.5).stdout == "a\n"
    assert (box.run("1 + 1").stdout, box.run("1 + 1").error) == ("2\n", None)


HONEST = ["SELECT max(created_at), min(last_updated) FROM u", "SELECT replace(g, 'a', 'drop table t') FROM t LIMIT 1",
          "SELECT 'insert; delete; --' AS a", "WITH a AS (SELECT 1 AS b) SELECT b FROM a UNION ALL SELECT 2", "VALUES (1, 2)",
          "SELECT sum(x) OVER (PARTITION BY g ORDER BY i) FROM t", "SELECT /* update */ 1 -- drop", "\n SELECT 1 ;\n",
          "EXPLAIN SELECT * FROM t", "SELECT CASE WHEN x > 0.5 THEN 'set' ELSE 'call' END FROM t", "select \"i\" from \"t\" where i in (select i from u)",
          "SELECT name FROM sqlite_master", "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r WHERE n < 5) SELECT n FROM r",
          "SELECT * FROM json_each('[1, 2]')"]
DUCK = ["FROM t", "(SELECT 1)", "SHOW TABLES", "DESCRIBE t", "SUMMARIZE u", "SELECT * EXCLUDE (x) FROM t", "SELECT unnest(range(3))",
        "SELECT table_name FROM information_schema.tables", "SELECT * FROM duckdb_columns()", "EXPLAIN ANALYZE SELECT 1",
        "EXPLAIN (FORMAT json) SELECT 1", "PIVOT t ON g IN ('a') USING sum(x)", "SELECT list_transform([1], lambda v: v + 1)",
        "SELECT " + " + ".join(["1"] * 900), "SELECT now(), INTERVAL 3 DAY, [1, 2], {'a': DATE '2024-01-01'}, 'ab'::BLOB, 1.5::DECIMAL(4, 2)"]
LITE = ["SELECT * FROM pragma_table_info('t')", "EXPLAIN QUERY PLAN SELECT * FROM t", "SELECT 1 IN (" + ", ".join("1" * 999) + ")"]


@pytest.mark.parametrize("engine, text", [(e, t) for e, more in (("duckdb", DUCK), ("sqlite", LITE)) for t in HONEST + more])
def test_an_honest_query_passes(calm, engine, text):
    found = calm[engine].query(text)
    assert found.count == len(found.data) >= 1 and all(len(row) == len(found.cols) for row in found.data)
    json.dumps([found.cols, found.data], allow_nan=False)


@pytest.mark.parametrize("engine", ["duckdb", "sqlite"])
def test_rows_are_cut_by_the_call_and_not_by_the_text(calm, engine):
    box = calm[engine]
    assert (box.query("SELECT * FROM t").count, box.query("SELECT * FROM t").truncated) == (20, True)
    assert box.query("SELECT * FROM (SELECT * FROM t LIMIT 500) AS s", 7).count == 7
    assert (box.query("SELECT * FROM t LIMIT 3").truncated, box.query("SELECT * FROM t LIMIT 3", 3).truncated) == (False, False)
    assert box.query("SELECT * FROM t", np.int64(10**6)).count == box.max_rows == 100
    cells = ", ".join(["printf('%s', 'xxxxxxxxxxxxxxxxxxxx')"] * 60)
    wide = box.query(f"SELECT {cells} FROM t", 100)  # noqa: S608
    assert wide.truncated and len(json.dumps([wide.cols, wide.data])) <= 1 << 16
    with pytest.raises(ValueError, match="limit must be >= 1, got 0"):
        box.query("SELECT 1", 0)
    with pytest.raises(TypeError, match=r"limit must be an integer, got 2\.5"):
        box.query("SELECT 1", 2.5)


@pytest.mark.parametrize("engine", ["duckdb", "sqlite"])
def test_a_wrong_name_is_answered_with_those_that_exist(calm, engine):
    for text, hint in (("SELECT * FROM tt", "nearest: t; tables: t, u"), ("SELECT creatd_at FROM u", "nearest: created_at; columns of u"),
                       ("SELECT z.i FROM t", "columns of t: i, x, g")):
        with pytest.raises(SqlError) as caught:
            calm[engine].query(text)
        assert hint in caught.value.hint and not isinstance(caught.value, SqlRejected)


def test_the_texts_of_refusals(boxes):
    for text, got in (("drop table t", "DROP"), ("SELECT 1; DROP TABLE t", "2 statements"), ("", "an empty text")):
        with pytest.raises(SqlRejected, match=f"^only one SELECT statement is allowed; got {got}$"):
            boxes["duckdb"].query(text)
    with pytest.raises(SqlRejected, match="got more than one statement"):
        boxes["sqlite"].query("SELECT 1; SELECT 2")
    with pytest.raises(SqlTimeout, match=r"^stopped after 0\.25 s$"):
        boxes["sqlite"].query(m._LOOP)
    kept = pickle.loads(pickle.dumps(SqlRejected("a", "b")))  # noqa: S301
    assert (kept.msg, kept.hint, str(kept)) == ("a", "b", "a")


def test_what_cannot_be_opened_is_named(place, tmp_path):
    (tmp_path / "text.db").write_text("no database at all, but longer than a page header " * 9)
    for path, engine, kind, text in ((tmp_path / "none.db", "duckdb", FileNotFoundError, "no database file .*none.db"),
                                     (tmp_path, "sqlite", FileNotFoundError, "no database file"),
                                     (tmp_path / "text.db", "duckdb", ValueError, "cannot open .*text.db with duckdb"),
                                     (tmp_path / "text.db", "sqlite", ValueError, "cannot open .*text.db with sqlite"),
                                     (place / "duckdb.db", "mysql", ValueError, "engine must be 'duckdb' or 'sqlite', got 'mysql'")):
        with pytest.raises(kind, match=text):
            SqlSandbox(path, engine)
    for name, text in (("timeout_s", "finite and > 0"), ("max_rows", ">= 1"), ("memory_mb", "finite and > 0")):
        with pytest.raises(ValueError, match=f"{name} must be {text}, got 0"):
            SqlSandbox(place / "duckdb.db", **{name: 0})
    with pytest.raises(FileNotFoundError, match="no data folder nowhere"):
        PySandbox("nowhere")


def test_workers_are_replaced_whoever_kills_them(place, boxes):
    with SqlSandbox(place / "duckdb.db") as box:
        with pytest.raises(SqlMemory):
            box.query("SELECT range(2000000000)")
        assert box.query("SELECT 1").data == [[1]]
    box = boxes["duckdb"]
    for _ in range(3):
        before = [child.pid for child in box._workers.children]
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        assert all(child.wait(5) for child in box._workers.children)
        assert box.query("SELECT 1").data == [[1]]
        assert not {child.pid for child in box._workers.children} & set(before)
    os.kill(box._workers.children[0].pid, signal.SIGSTOP)  # alive and silent
    with pytest.raises(SqlTimeout):
        box.query("SELECT 1")
    assert box.query("SELECT 1").data == [[1]]
    os.kill(box._workers.zygote.pid, signal.SIGKILL)  # and with it the workers
    assert all(child.wait(5) for child in box._workers.children)
    assert box.query("SELECT 1").data == [[1]]


def test_nothing_is_left_behind(place):
    source = ("import os, psutil\nfrom collai.ddr.sandbox import *\n"
              f"a = SqlSandbox({str(place / 'duckdb.db')!r})\n"
              "print(*[p.pid for p in psutil.Process().children(recursive=True)], flush=True)\n")
    for end in ("os.kill(os.getpid(), 9)", "raise ValueError", "del a; print(len(psutil.Process().children()))",
                "a.close(); a.close(); print(len(psutil.Process().children()))"):
        done = subprocess.run([sys.executable, "-c", source + end], capture_output=True, text=True)
        pids, *rest = done.stdout.splitlines()
        assert len(pids.split()) >= 3 and rest in ([], ["0"])
        for _ in range(200):
            left = [pid for pid in map(int, pids.split()) if psutil.pid_exists(pid)]
            if not left:
                break
            time.sleep(0.05)
        assert not left, end


def test_a_closed_sandbox_says_so(place):
    with SqlSandbox(place / "duckdb.db") as box:
        zygote = box._workers.zygote
        with SqlSandbox(place / "duckdb.db") as other:
            assert other._workers.zygote is zygote
        assert box.query("SELECT 1").data == [[1]]
    with pytest.raises(RuntimeError, match="the sandbox is closed"):
        box.query("SELECT 1")


def test_the_database_of_python_is_all_that_it_sees(boxes):
    code = "import os, duckdb\nprint(os.listdir('.'), sorted(k for k in os.environ if 'KEY' in k or 'TOKEN' in k))\n" \
           "duckdb.connect(data_path, read_only=True).execute('SELECT count(*) FROM t').fetchall()"
    assert boxes["python"].run(code).stdout == "[] []\n[(1000,)]\n"


def test_a_folder_of_data_can_be_read(tmp_path):
    (tmp_path / "a.csv").write_text("x\n1\n2\n")
    with PySandbox(tmp_path) as box:
        box.timeout_s = 20
        assert box.run("import pandas as pd\npd.read_csv(data_path + '/a.csv').x.sum()").stdout == "3\n"
        assert box.run("import os; os.listdir(data_path)").stdout == "['a.csv']\n"
        assert "writing is not allowed" in str(box.run("open(data_path + '/b', 'w')").error)
        assert box.run("'a'").stdout == "'a'\n" and box.run("for i in range(2): print(i)").stdout == "0\n1\n"


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.dates()
                           | st.datetimes() | st.times() | st.timedeltas() | st.decimals() | st.uuids(),
                           lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


@settings(max_examples=50)
@given(json_values)
def test_a_cell_is_json_and_short(value):
    shown = m._cell(value)
    text = json.dumps(shown, allow_nan=False)
    assert len(shown if isinstance(shown, str) else text) <= 1_000


def test_cells_of_known_value():
    assert [m._cell(x) for x in (math.nan, -math.inf, Decimal("1.5"), Decimal("NaN"), date(2024, 2, 29), clock(1, 2), b"\x01", True)] \
        == [None, None, 1.5, None, "2024-02-29", "01:02:00", "01", True]
    assert m._cell(datetime(2024, 1, 1)) == "2024-01-01T00:00:00" and m._cell(timedelta(days=2)) == "2 days, 0:00:00"
    assert len(m._cell("x" * 5000)) == len(m._cell(b"x" * 5000)) == 1_000 and len(m._cell(list(range(5000)))) == 1_000


@given(st.integers(0, 12), st.integers(1, 12), st.integers(0, 3000))
def test_rows_fit_or_are_cut(n, limit, width):
    reply = m._fit(["a"], iter([("x" * width,)] * n), limit)
    assert len(reply["data"]) == min(n, limit) and reply["truncated"] == (n > limit)


@given(st.binary(max_size=40))
def test_no_message_of_a_child_can_raise(data):
    read, write = os.pipe()
    os.write(write, data), os.close(write)
    assert isinstance(m._receive(read, 0.0), dict | None)
    os.close(read)


names, aliases = st.sampled_from(["i", "x", "g"]), st.sampled_from(["t", "a", "T"])


@settings(max_examples=40)
@given(st.lists(names, min_size=1, max_size=3), aliases, names, st.booleans())
def test_fields_are_those_without_which_the_query_fails(chosen, alias, last, cte):
    cells = ", ".join(f"{alias}.{c}" for c in chosen)
    inner = f"SELECT {cells} FROM t AS {alias} WHERE {alias}.{last} IS NOT NULL"  # noqa: S608
    query = f"WITH w AS ({inner}) SELECT count(*) FROM w" if cte else inner  # noqa: S608
    for dialect in ("duckdb", "sqlite"):
        assert touched_fields(query, TABLES, dialect) == sorted(f"t.{c}" for c in {*chosen, last})


def test_fields_of_stars_aliases_and_broken_text():
    assert touched_fields("SELECT * FROM t JOIN u USING (i)", TABLES) == ["t.g", "t.i", "t.x", "u.created_at", "u.i", "u.last_updated"]
    assert touched_fields("SELECT count(*) FROM t -- x", TABLES) == []
    assert touched_fields("SELECT g AS x FROM T WHERE 'i' = g", TABLES) == ["t.g"]
    assert touched_fields("SELECT x FROM t WHERE i = (SELECT max(i) FROM u WHERE created_at = g)", TABLES) == \
        ["t.g", "t.i", "t.x", "u.created_at", "u.i"]
    assert touched_fields("SELECT x FROM t WHERE (", TABLES) == ["t.x"] == touched_fields("SELECT x, nope FROM t", TABLES)
    assert touched_fields("SELECT x FROM t" + " " * 30_000, TABLES) == ["t.x"]
    assert touched_fields("SELECT " + "(" * 3000 + "x" + ")" * 3000 + " FROM t", TABLES) == ["t.x"]
    assert touched_fields("DESCRIBE t", TABLES) == [] and touched_fields("SELECT 1", TABLES) == []


@pytest.mark.parametrize("engine", ["duckdb", "sqlite"])
def test_an_environment_answers_every_mistake(place, engine):
    with Env(place / f"{engine}.db", engine=engine, entity="x") as env:
        assert env.call("get_database_info", {})["tables"]["t"] == {"rows": 1_000, "columns": 3, "comment": ""}
        assert [c["name"] for c in env.call("describe_table", {"table_name": '"T"'})["columns"]] == ["i", "x", "g"]
        assert env.call("execute_query", {"query": "SELECT 1 AS a"}) == {"cols": ["a"], "data": [[1]], "count": 1}
        assert env.call("execute_query", {"query": "SELECT * FROM t", "limit": 999})["count"] == 100
        assert env.call("execute_code", {"code": "1 + 1", "timeout": 9}) == {"stdout": "2\n"}
        assert env.call("list_files", {"pattern": "*.db"})["files"][0]["name"] == f"{engine}.db"
        assert set(env.call("get_field_description", {"data_file": "t"})["fields"]) == {"t.i", "t.x", "t.g"}
        for tool, args in (("nope", {}), ("execute_query", {}), ("execute_query", None), ("execute_query", {"query": 1}),
                           ("execute_query", {"query": "SELECT 1", "limit": 0}), ("execute_query", {"query": "DROP TABLE t"}),
                           ("execute_query", {"query": "SELECT 1", "limit": True}), ("describe_table", {"table_name": "tt"}),
                           ("execute_query", {"query": "SELECT 1", "more": 1}), ("execute_code", {"code": "1 / 0"}),
                           ("execute_code", {"code": "1", "timeout": -1}), ("list_files", {"path": "/etc"}), (None, {}),
                           ("get_field_description", {"data_file": "zz.csv"}), ("execute_query", [1]), ([], {})):
            reply = env.call(tool, args)
            assert reply["error"] and isinstance(reply["hint"], str) and len(json.dumps(reply)) < 3_000, (tool, args)
        assert env.left() == 100 - 7 - 16
    with pytest.raises(RuntimeError, match="the environment is closed"):
        env.call("get_database_info", {})
    with pytest.raises(RuntimeError, match="the environment is closed"):
        env.fetch("SELECT 1")


def test_a_budget_ends_an_environment(place):
    path = place / "duckdb.db"
    with Env(path, tools=("sql",), budget=Budget(turns=2)) as env:
        assert env.call("execute_code", {"code": "1"})["hint"] == "tools: execute_query, describe_table, get_database_info"
        assert env.query("SELECT x FROM t", 3).fields == ["t.x"] and env.left() == 0 and env.spent() == "2 turns"
        assert env.call("execute_query", {"query": "SELECT 1"})["error"] == "the budget of 2 turns is spent" == env.run("1").error
        with pytest.raises(SqlError, match="the budget of 2 turns is spent"):
            env.query("SELECT 1")
        assert list(env.fetch("SELECT sum(i) AS s FROM t")["s"]) == [499_500]
    env = Env(path, budget=Budget(seconds=1e-9, tokens=5))
    env.spend(4)
    assert env.left() == 100
    env.fetch("SELECT 1")
    assert env.spent() == "1e-09 seconds" and env.left() == 0
    env.close(), env.close()
    for make, text in ((lambda: Budget(turns=0), "turns must be >= 1, got 0"), (lambda: Budget(tokens=0), "tokens must be >= 1"),
                       (lambda: Budget(seconds=math.inf), "seconds must be finite"), (lambda: env.spend(-1), "tokens must be >= 0"),
                       (lambda: Env(path, tools=("R",)), "tools are 'sql' and 'python', got 'R'"),
                       (lambda: Env(path, engine="x"), "engine must be")):
        with pytest.raises(ValueError, match=text):
            make()
    with pytest.raises(FileNotFoundError, match=r"no database file none\.db"):
        Env("none.db")


def test_both_engines_fetch_the_same(place):
    found = [Env(place / f"{engine}.db", engine=engine).fetch(
        "SELECT i, x, g, CASE WHEN i > 0 THEN i END AS n, CASE WHEN i > 0 THEN g END AS m FROM t ORDER BY i") for engine in ("duckdb", "sqlite")]
    for name, cells in found[0].items():
        assert not isinstance(cells, np.ma.MaskedArray) and cells.dtype.kind == found[1][name].dtype.kind
        np.testing.assert_array_equal(cells, found[1][name]) if cells.dtype.kind == "O" else np.testing.assert_allclose(cells, found[1][name])
    assert math.isnan(found[0]["n"][0]) and found[0]["m"][0] is None and found[0]["n"].dtype == np.float64


@given(st.lists(st.builds(Turn, st.text(), st.text(), st.dictionaries(st.text(), st.integers()), st.none() | st.lists(st.integers()),
                          st.text(), st.lists(st.dictionaries(st.text("abc", min_size=1), st.integers())), st.integers(0, 9),
                          st.integers(0, 9), st.floats(0, 9)), max_size=3), st.text(), st.sampled_from(m._ENDS))
@settings(max_examples=20)
def test_a_trajectory_reads_back_equal(tmp_path_factory, turns, report, end):
    path = tmp_path_factory.getbasetemp() / "run.json"
    told = Trajectory(turns, report, [{"kind": "trend"}], end, "w")
    told.save(path)
    assert Trajectory.load(path) == told


def test_a_trajectory_takes_dataclasses_arrays_and_nothing_else(tmp_path):
    told = Trajectory([Turn(result={"a": np.arange(2), "b": {1}, "d": date(2024, 1, 1), "n": np.float64(1)})], claims=[Budget(turns=3)])
    told.save(tmp_path / "a.json")
    back = Trajectory.load(tmp_path / "a.json", Budget)
    assert back.claims == [Budget(turns=3)] and back.turns[0].result == {"a": [0, 1], "b": [1], "d": "2024-01-01", "n": 1.0}
    with pytest.raises(TypeError, match="a trajectory holds JSON values and dataclasses, got object"):
        Trajectory([Turn(result=object())]).save(tmp_path / "a.json")
    assert Trajectory.load(tmp_path / "a.json", Budget) == back  # still the old one
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no trajectory"):
        Trajectory.load(tmp_path / "b.json")
    with pytest.raises(FileNotFoundError, match="no trajectory file"):
        Trajectory.load(tmp_path / "c.json")
    with pytest.raises(ValueError, match="stop_reason must be one of .*, got 'x'"):
        Trajectory(stop_reason="x")


def test_the_measurement_has_a_row_for_every_attack(boxes, monkeypatch):
    few = {engine: dict(list(attacks.items())[:2]) for engine, attacks in m._ATTACKS.items()}
    monkeypatch.setattr(m, "_ATTACKS", few)
    medians = m._medians
    monkeypatch.setattr(m, "_medians", lambda path, engine, n, vary: medians(path, engine, 9, vary))
    rows = m.measure("cpu")
    assert len(rows) == 4 + 6 and all(row.get("how") != "got through" for row in rows)
    with pytest.raises(ValueError, match="device must be 'cpu', got 'cuda'"):
        m.measure("cuda")
    assert QueryResult(["a"], [[1]], 1, False, 0.0).fields == []


@pytest.mark.parametrize("end", ["CREATE TEMP TABLE orders AS SELECT 1 AS x", "SET VARIABLE v = 1", "SELECT * FROM duckdb_settings()"])
def test_a_nested_comment_hides_nothing_behind_explain(tmp_path, end):
    import duckdb

    path = tmp_path / "nested.duckdb"
    with duckdb.connect(str(path)) as db:
        db.execute("CREATE TABLE t AS SELECT 1 AS x")
    with SqlSandbox(str(path)) as box:
        for text in (f"EXPLAIN ANALYZE /* /* */ SELECT 1 -- */ {end}", f"/* */ EXPLAIN -- x\n{end}"):
            with pytest.raises(SqlRejected):
                box.query(text)
        assert box.query("EXPLAIN SELECT x FROM t").count >= 1 and box.query("SELECT x FROM t /* /* nested */ */").data == [[1]]


def test_the_row_limit_is_a_whole_number(tmp_path):
    with pytest.raises((TypeError, ValueError), match="max_rows"):
        SqlSandbox(str(tmp_path / "none.duckdb"), max_rows=2.5)


def test_replaced_builtins_open_nothing(place):
    with PySandbox(f"{place}/duckdb.db", timeout_s=20.0, memory_mb=384) as box:
        said = box.run("import builtins, os\nbuiltins.any = lambda found: True\nos.listdir('/proc')")
        assert said.error and "PermissionError: outside the data folder: /proc" in said.error


@pytest.mark.parametrize("wrong, kind, message", [
    ({"tools": "sql"}, TypeError, "tools must be a list and budget a Budget, got 'sql' and None"),
    ({"budget": 5}, TypeError, "tools must be a list and budget a Budget, got .* and 5"),
    ({"engine": "sqlite"}, ValueError, "is a DuckDB file: pass engine='duckdb'")])
def test_an_environment_of_wrong_parts_is_refused(place, wrong, kind, message):
    with pytest.raises(kind, match=message):
        Env(f"{place}/duckdb.db", **wrong)
