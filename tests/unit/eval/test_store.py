"""Properties of `collai.eval.store`: rows depend on keys alone, whatever kills, stops or shares the run."""

import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from functools import cmp_to_key
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.eval import store as module
from collai.eval.llm import ChatError, ChatRefused, ChatTimeout
from collai.eval.llm import fingerprint as original
from collai.eval.store import Store, cell_seed, fingerprint, run_cells

quickly = settings(deadline=None, derandomize=True, max_examples=40)
parts = st.one_of(st.integers(), st.text(max_size=5), st.integers(0, 12), st.sampled_from(["1", "a", "10"]))
keys = st.one_of(parts, st.lists(parts, min_size=1, max_size=3).map(tuple))
numbers = st.floats(allow_nan=False, allow_infinity=False)
leaves = st.one_of(st.none(), st.booleans(), st.integers(), numbers, st.text(max_size=8))
values = st.recursive(leaves, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner)), max_leaves=6)
rows = st.dictionaries(st.text(max_size=5), values, max_size=4)


@dataclass(frozen=True)
class Agent:
    name: str
    steps: int = 3


@dataclass(frozen=True)
class Robot:
    name: str
    steps: int = 3


def draw(size, seed):
    time.sleep(0.001 * (size % 3))
    numbers = np.random.default_rng(seed).normal(size=size)
    return {"size": size, "sum": float(numbers.sum())}, {"numbers": numbers.tobytes()}


def plain_loop(spec, cells, fn):
    found = {key: fn(args, cell_seed(original(spec), key)) for key, args in cells.items()}
    return {key: row if isinstance(row, tuple) else (row, {}) for key, row in found.items()}


def content(store):
    return dict(zip(sorted(store.done(), key=module._place), store.rows(), strict=True))


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "a.db", {"study": 1}) as opened:
        yield opened


@given(st.lists(keys, max_size=8))
@quickly
def test_keys_have_one_text_each_and_come_back(many):
    texts = {module._key_text(key) for key in many}
    assert len(texts) == len({(type(key), key) for key in many})
    assert {(type(key), key) for key in map(module._key, texts)} == {(type(key), key) for key in many}


def before(a, b):
    first, second = (x if isinstance(x, tuple) else (x,) for x in (a, b))
    for x, y in zip(first, second, strict=False):
        if isinstance(x, str) != isinstance(y, str):
            return 1 if isinstance(x, str) else -1
        if x != y:
            return -1 if x < y else 1
    return len(first) - len(second) or isinstance(a, tuple) - isinstance(b, tuple)


@given(st.lists(keys, max_size=8))
@quickly
def test_keys_are_sorted_part_by_part_with_numbers_before_strings(many):
    assert sorted(many, key=module._place) == sorted(many, key=cmp_to_key(before))


@given(rows)
@quickly
def test_a_row_comes_back_as_it_was_with_its_fields_in_order(row):
    back = json.loads(module._row_text(row))
    assert back == row and repr(back) == repr(row)


@given(st.lists(st.one_of(keys, numbers, st.text()), max_size=4))
@quickly
def test_a_seed_is_the_first_63_bits_of_the_digest(things):
    bits = "".join(f"{int(digit, 16):04b}" for digit in fingerprint(list(things)))
    assert cell_seed(*things) == int(bits[:63], 2)


def test_a_seed_is_the_same_in_every_process():
    text = json.dumps(["study", ["task", 3]], separators=(",", ":"))
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    code = "from collai.eval.store import cell_seed; print(cell_seed('study', ('task', 3)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert int(done.stdout) == cell_seed("study", ("task", 3)) == number


def test_fingerprint_is_that_of_requests():
    assert fingerprint is original


def test_rows_frame_and_lines_come_in_the_order_of_the_keys(store, tmp_path):
    order = [("b", 1), ("a", 10), ("a", 9), ("a", "9")]
    for i, key in enumerate(order):
        assert store.add(key, {"i": i, "x": 0.1 * i}) is True
    assert [row["i"] for row in store.rows()] == [2, 1, 3, 0]
    frame = store.frame()
    assert frame.index.nlevels == 2 and list(frame.index) == [order[i] for i in (2, 1, 3, 0)]
    assert list(frame.columns) == ["i", "x"] and list(frame["i"]) == [2, 1, 3, 0]
    assert store.to_jsonl(tmp_path / "rows.jsonl") is None
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").open()] == store.rows()
    store.to_jsonl(str(tmp_path / "rows.jsonl"))
    assert not list(tmp_path.glob("*.new")) and len((tmp_path / "rows.jsonl").read_text().splitlines()) == 4


def test_keys_of_different_shapes_share_a_frame(store):
    for key in (3, "3", ("a", 1), ("a",)):
        store.add(key, {"key": str(key)})
    assert list(store.frame().index) == [3, "3", ("a",), ("a", 1)]
    assert list(store.frame()["key"]) == [str(key) for key in store.frame().index]


def test_a_new_store_is_empty(store, tmp_path):
    assert store.done() == set() and store.rows() == [] and store.errors() == [] and len(store.frame()) == 0
    store.to_jsonl(tmp_path / "rows.jsonl")
    assert (tmp_path / "rows.jsonl").read_bytes() == b""


def test_files_of_a_cell_come_back_and_missing_ones_are_named(store):
    data = bytes(range(256))
    store.add(1, {}, {"a.png": data, "b.xml": bytearray(b"xy"), "empty": memoryview(b"")})
    store.add(2, {}, {"a.png": b"other"})
    assert store.blob(1, "a.png") == data and store.blob(1, "b.xml") == b"xy" and store.blob(1, "empty") == b""
    assert store.blob(2, "a.png") == b"other" and store.blob(np.int64(1), "a.png") == data
    with pytest.raises(KeyError, match=r"cell 2 has no blob 'b.xml', it has \['a.png'\]"):
        store.blob(2, "b.xml")
    with pytest.raises(KeyError, match=r"cell 'none' has no blob 'x', it has \[\]"):
        store.blob("none", "x")


def test_the_first_write_wins_and_a_contradiction_in_one_run_is_an_error(store):
    assert store.add("k", {"a": 1, "b": 2}, {"f": b"1"})
    assert not store.add("k", {"b": 2, "a": 1}, {"f": b"2"})
    with pytest.raises(ValueError, match=r"key 'k' came twice in one run, with the rows {\"a\": 1, \"b\": 2} and {\"a\": 3}"):
        store.add("k", {"a": 3})
    with Store(store.path, {"study": 1}) as other:
        assert not other.add("k", {"a": 3})
    assert store.rows() == [{"a": 1, "b": 2}] and store.blob("k", "f") == b"1"


def test_a_row_and_its_files_are_stored_together_or_not_at_all(store, monkeypatch):
    store._file.rows("CREATE TRIGGER full BEFORE INSERT ON blob WHEN NEW.name = 'b' BEGIN SELECT RAISE(FAIL, 'disk full'); END")
    with pytest.raises(sqlite3.IntegrityError, match="disk full"):
        store.add(1, {"x": 1}, {"a": b"1", "b": b"2"})
    assert store.done() == set() and store._file.rows("SELECT count(*) FROM blob") == [(0,)]
    assert store.add(1, {"x": 1}, {"a": b"1"}) and store.blob(1, "a") == b"1"


def test_inputs_are_not_changed(store):
    row, blobs, cells = {"x": [1, {"y": 2}]}, {"f": b"1"}, {2: {"n": [1]}}
    store.add(1, row, blobs)
    run_cells(store, cells, lambda args, seed: {"n": args["n"]})
    assert (row, blobs, cells) == ({"x": [1, {"y": 2}]}, {"f": b"1"}, {2: {"n": [1]}})


STUDY = {"agents": [Agent("a"), Agent("b")], "prompt": "Think.", "budget": 100, "weights": np.arange(3.0), "$x": {"y": 1}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 200}, r"budget \(stored 100, given 200\)"),
        ({"budget": 100.0}, r"budget \(stored 100, given 100\.0\)"),
        ({"budget": True}, r"budget \(stored 100, given true\)"),
        ({"prompt": "Think!", "budget": 1}, r"budget \(stored 100, given 1\)"),
        ({"agents": [Agent("a"), Agent("b", 4)]}, r"agents\[1\]\.steps \(stored 3, given 4\)"),
        ({"agents": [Agent("a"), Robot("b")]}, r"agents\[1\] \(stored \"Agent\", given \"Robot\"\)"),
        ({"agents": [Agent("a")]}, r"agents \(stored 2 entries, given 1\)"),
        ({"agents": {"b": 2, "a": 1}}, r"agents \(stored .*\.\.\., given {\"a\": 1, \"b\": 2}\)"),
        ({"weights": np.arange(3)}, r"weights\.\$array\[0\] \(stored \"<f8\", given \"<i8\"\)"),
        ({"$x": {"y": 2}}, r"mismatch: \$x\.y \(stored 1, given 2\)"),
        ({"seed": 0}, r"seed \(only in the given study\)"),
        ({"budget": None}, r"budget \(stored 100, given null\)"),
    ],
)
def test_another_study_is_refused_with_the_first_key_that_differs(tmp_path, change, message):
    Store(tmp_path / "a.db", STUDY).close()
    with pytest.raises(ValueError, match=f"study fingerprint mismatch: .*{message}" if "mismatch" not in message else message):
        Store(tmp_path / "a.db", {**STUDY, **change})


def test_a_key_that_is_gone_is_named_and_plain_studies_are_compared(tmp_path):
    Store(tmp_path / "a.db", {"a": 1, "b": 2}).close()
    with pytest.raises(ValueError, match=r"study fingerprint mismatch: b \(only in the stored study\)"):
        Store(tmp_path / "a.db", {"a": 1})
    with pytest.raises(ValueError, match=r"study fingerprint mismatch: spec \(stored {.*}, given \"x\"\)"):
        Store(tmp_path / "a.db", "x")
    Store(tmp_path / "b.db", ["x"]).close()
    with pytest.raises(ValueError, match=r"study fingerprint mismatch: \[0\] \(stored \"x\", given \"y\"\)"):
        Store(tmp_path / "b.db", ["y"])


@given(st.dictionaries(st.text(max_size=3), values, max_size=4), st.dictionaries(st.text(max_size=3), values, max_size=4))
@quickly
def test_a_difference_is_named_exactly_when_fingerprints_differ(old, new):
    for a, b in ((old, new), (old, dict(reversed(old.items()))), (old, {**old, "z": new})):
        found = module._difference(module._canonical(a, "spec"), module._canonical(b, "spec"))
        assert (found is None) == (fingerprint(a) == fingerprint(b))


def test_the_same_study_opens_again_however_it_is_written(tmp_path):
    with Store(tmp_path / "deep" / "er" / "a.db", STUDY) as store:
        store.add(1, {"x": 1})
        assert store.fingerprint == fingerprint(STUDY) and store.path == tmp_path / "deep" / "er" / "a.db"
    again = {**dict(reversed(STUDY.items())), "agents": (Agent("a"), Agent("b"))}
    with Store(str(tmp_path / "deep" / "er" / "a.db"), again) as store:
        assert store.rows() == [{"x": 1}]
    assert [file.name for file in (tmp_path / "deep" / "er").iterdir()] == ["a.db"]


def test_a_study_without_a_canonical_form_leaves_no_file(tmp_path):
    with pytest.raises(TypeError, match=r"spec\['tasks'\] is a set, which has no canonical form"):
        Store(tmp_path / "a.db", {"tasks": {1, 2}})
    assert not list(tmp_path.iterdir())


def test_files_of_others_are_refused_and_not_touched(tmp_path):
    (tmp_path / "text.db").write_text("some words " * 400)
    with closing(sqlite3.connect(tmp_path / "theirs.db")) as db, db:
        db.execute("CREATE TABLE cell (key, row)")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for file, message in (("text.db", "file is not a database"), ("theirs.db", "it is another program's database")):
        with pytest.raises(ValueError, match=rf"{file} is no store: {message}"):
            Store(tmp_path / file, {})
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    with pytest.raises(sqlite3.OperationalError, match="unable to open") as caught:
        Store(tmp_path, {})
    assert caught.value.__notes__ == [f"store {tmp_path}"]


def test_a_file_that_was_killed_while_it_was_made_is_made_again(tmp_path):
    (tmp_path / "empty.db").touch()
    with closing(sqlite3.connect(tmp_path / "log.db")) as db:
        db.execute("PRAGMA journal_mode = WAL")
    for name in ("empty.db", "log.db"):
        with Store(tmp_path / name, 1) as store:
            assert store.add(1, {}) and store.done() == {1}


def test_threads_and_a_forked_child_share_a_store(store):
    threads = [threading.Thread(target=lambda i=i: [store.add((i, k), {"k": k}) for k in range(10)]) for i in range(4)]
    for thread in threads:
        thread.start()
    if not (pid := os.fork()):
        signal.alarm(20)
        os._exit(0 if all(store.add(("child", k), {"k": k}) for k in range(10)) and len(store.rows()) >= 10 else 1)
    assert os.waitpid(pid, 0)[1] == 0
    for thread in threads:
        thread.join()
    assert len(store.done()) == 50 and len(store.rows()) == 50


def test_a_closed_store_is_not_used_again(store):
    store.close()
    store.close()
    with pytest.raises(sqlite3.ProgrammingError, match="is closed"):
        store.rows()


def test_opening_waits_for_another_process_that_writes_into_the_new_file(tmp_path):
    with closing(sqlite3.connect(tmp_path / "a.db", isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        commit = threading.Timer(0.2, other.execute, ["COMMIT"])
        commit.start()
        with Store(tmp_path / "a.db", 1) as store:
            assert store.add(1, {}) and store.done() == {1}
        commit.join()


@given(st.lists(st.integers(0, 15), unique=True, max_size=8), st.lists(st.integers(0, 5), max_size=3), st.integers(1, 4))
@settings(quickly, max_examples=12)
def test_threads_stops_and_orders_give_the_rows_of_a_plain_loop(tmp_path_factory, sizes, stops, workers):
    cells = {("size", size): size for size in sizes}
    expected = plain_loop(STUDY, cells, draw)
    with Store(tmp_path_factory.mktemp("s") / "a.db", STUDY) as store:
        new = [run_cells(store, cells, draw, max_cells=most, workers=workers, engine="threads") for most in [*stops, None]]
        assert sum(new) == len(sizes) and all(n <= most for n, most in zip(new, stops, strict=False))
        assert content(store) == {key: row for key, (row, _) in expected.items()}
        assert all(store.blob(key, "numbers") == blobs["numbers"] for key, (_, blobs) in expected.items())


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_give_the_rows_of_a_plain_loop(tmp_path, workers):
    def late(size, seed):
        time.sleep(0.002 * (size % 3))
        return {"size": size, "seed": seed, "draw": np.random.default_rng(seed).normal()}

    with Store(tmp_path / "a.db", STUDY) as store:
        assert run_cells(store, {size: size for size in range(12, -1, -1)}, late, workers=workers) == 13
        assert store.rows() == [late(i, cell_seed(store.fingerprint, i)) for i in range(13)]


def test_local_functions_travel_and_errors_of_processes_name_their_cell(store):
    bound = 5
    assert run_cells(store, {i: i for i in range(3)}, lambda x, seed: {"y": x + bound}, workers=2) == 3
    assert [row["y"] for row in store.rows()] == [5, 6, 7]

    def broken(x, seed):
        raise KeyError("no such task")

    with pytest.raises(KeyError, match="no such task") as caught:
        run_cells(store, {("x", 1): 0, ("x", 2): 0}, broken, workers=2)
    assert any(note.startswith("cell ('x', ") for note in caught.value.__notes__)


def test_only_what_is_missing_is_computed_in_the_order_given(store):
    calls = []

    def noted(x, seed):
        calls.append(x)
        return {"x": x}

    store.add(3, {"x": "kept"})
    assert run_cells(store, {i: i for i in (5, 3, 1, 4)}, noted, max_cells=2) == 2 and calls == [5, 1]
    assert run_cells(store, {i: i for i in (5, 3, 1, 4)}, noted) == 1 and calls == [5, 1, 4]
    assert run_cells(store, {}, noted) == 0 and run_cells(store, {9: 9}, noted, max_cells=0) == 0
    assert content(store)[3] == {"x": "kept"}


def test_every_cell_is_stored_before_the_next_one_begins(store):
    def watch(x, seed):
        with closing(sqlite3.connect(store.path)) as db:
            return {"seen": db.execute("SELECT count(*) FROM cell").fetchone()[0]}

    run_cells(store, {i: i for i in range(5)}, watch)
    assert [row["seen"] for row in store.rows()] == [0, 1, 2, 3, 4]


def test_a_slow_cell_holds_back_no_finished_one(store):
    gate = threading.Event()

    def wait_for_the_others(x, seed):
        if x == 0 and not gate.wait(20):
            raise RuntimeError("the others were not stored")
        if x == 3:
            gate.set()
        return {"x": x}

    class Loud(Store):
        def _put(self, *cell):
            order.append(cell[0])
            return super()._put(*cell)

    order = []
    with Loud(store.path, {"study": 1}) as loud:
        run_cells(loud, {i: i for i in range(4)}, wait_for_the_others, workers=2, engine="threads")
    assert order[-1] == "0" and sorted(order) == ["0", "1", "2", "3"]


@pytest.fixture
def waits(monkeypatch):
    waited = []
    monkeypatch.setattr(module.time, "sleep", waited.append)
    return waited


def failing(error, times):
    calls = Counter()

    def fn(x, seed):
        calls[x] += 1
        if calls[x] <= times.get(x, 0):
            raise error
        return {"x": x, "seed": seed}

    return fn, calls


@pytest.mark.parametrize("error", [ConnectionError("cut"), TimeoutError("late"), ChatTimeout(message="late"), ChatError(503)])
def test_errors_of_the_infrastructure_are_tried_again_with_the_same_seed(store, waits, error):
    fn, calls = failing(error, {1: 2, 2: 1})
    assert run_cells(store, {0: 0, 1: 1, 2: 2}, fn) == 3 and calls == {0: 1, 1: 3, 2: 2}
    assert store.rows() == [{"x": i, "seed": cell_seed(store.fingerprint, i)} for i in range(3)] and store.errors() == []
    assert waits == [0.1, 0.2, 0.1]


def test_a_server_is_given_the_time_it_asks_for_up_to_a_minute(store, waits):
    run_cells(store, {1: 1}, failing(ChatError(429, False, 7.5), {1: 1})[0])
    run_cells(store, {2: 2}, failing(ChatError(429, False, 1e6), {2: 1})[0])
    assert waits == [7.5, 60.0]


def test_used_up_tries_raise_the_error_and_keep_what_is_finished(store, waits):
    fn, calls = failing(ConnectionError("cut"), {2: 9})
    with pytest.raises(ConnectionError, match="cut") as caught:
        run_cells(store, {i: i for i in range(5)}, fn, retries=3)
    assert calls == {0: 1, 1: 1, 2: 4} and store.done() == {0, 1} and store.errors() == []
    assert {"cell 2", "tries: 4"} <= set(caught.value.__notes__)


def test_recorded_errors_leave_when_their_cell_is_finished(store, waits):
    fn, _ = failing(ChatTimeout(message="late"), {("b", 1): 5, 1: 2})
    cells = {("b", 1): ("b", 1), 1: 1, 0: 0}
    assert run_cells(store, cells, fn, on_error="record", retries=1) == 1 and store.done() == {0}
    late = {"type": "ChatTimeout", "message": "late", "tries": 2}
    assert store.errors() == [{"key": 1, **late}, {"key": ("b", 1), **late}]
    assert run_cells(store, cells, fn, on_error="record", retries=0) == 1
    assert store.errors() == [{"key": ("b", 1), **late, "tries": 1}]
    assert store.add(("b", 1), {"by": "hand"}) and store.errors() == []


def test_recorded_errors_come_back_from_processes(store):
    def refused(x, seed):
        raise ChatRefused(400, False, message=f"no {x}")

    assert run_cells(store, {1: 1, 2: 2}, refused, workers=2, on_error="record") == 0
    assert [(e["key"], e["message"], e["tries"]) for e in store.errors()] == [(1, "no 1", 1), (2, "no 2", 1)]


def test_a_refused_request_is_not_sent_again(store, waits):
    fn, calls = failing(ChatRefused(400), {1: 9})
    with pytest.raises(ChatRefused, match="HTTP status 400"):
        run_cells(store, {1: 1}, fn)
    assert calls == {1: 1} and waits == []


def test_other_errors_are_raised_at_once_unless_they_are_named(store, waits):
    fn, calls = failing(ZeroDivisionError("bug"), {1: 1})
    with pytest.raises(ZeroDivisionError):
        run_cells(store, {1: 1}, fn, on_error="record")
    assert calls == {1: 1} and store.errors() == []
    fn, calls = failing(ZeroDivisionError("bug"), {1: 1})
    assert run_cells(store, {1: 1}, fn, retry_on=(ArithmeticError,)) == 1 and calls == {1: 2}
    fn, calls = failing(ConnectionError("cut"), {2: 1})
    with pytest.raises(ConnectionError):
        run_cells(store, {2: 2}, fn, retry_on=())


def test_a_cell_that_another_run_finished_is_no_error(store):
    def overtaken(x, seed):
        with Store(store.path, {"study": 1}) as other:
            other.add(x, {"by": "the other"})
        if x == 1:
            raise ConnectionError("cut")
        return {"by": "us"}

    assert run_cells(store, {1: 1, 2: 2}, overtaken, on_error="record", retries=0) == 0
    assert store.errors() == [] and store.rows() == [{"by": "the other"}] * 2


def test_a_bad_score_is_a_result(store):
    calls = []
    assert run_cells(store, {1: 1}, lambda x, seed: calls.append(x) or {"score": 0.0, "error": "wrong answer"}) == 1
    assert calls == [1] and store.rows()[0]["score"] == 0.0


def test_an_interrupt_loses_only_what_is_in_flight(store):
    def stop(x, seed):
        if x == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        return {"x": x}

    with pytest.raises(KeyboardInterrupt):
        run_cells(store, {i: i for i in range(6)}, stop)
    assert store.done() == {0, 1, 2}
    assert run_cells(store, {i: i for i in range(6)}, lambda x, seed: {"x": x}) == 3
    assert store.rows() == [{"x": i} for i in range(6)]


KILLER = r"""
import os, random, signal, sys, time
import joblib, tqdm
from collai.eval.store import Store, cell_seed, run_cells
path, n, kills = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng, log = random.Random(0), os.open(path + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def work(x, seed):
    os.write(log, b"call %d\n" % x)
    return {"x": x, "seed": seed}, {"page": bytes([x % 256]) * 20_000}
class Loud(Store):
    def _put(self, key, *rest):
        new = super()._put(key, *rest)
        os.write(log, b"kept %s\n" % key.encode())
        return new
def child(workers):
    with Loud(path, {"n": n}) as store:
        print(run_cells(store, {i: i for i in range(n)}, work, workers=workers, engine="threads"), flush=True)
    os._exit(0)
seen = set()
for kill in range(kills):
    early = kill % 10 == 0  # also while the file is made and opened
    goal = os.fstat(log).st_size + (0 if early else rng.randrange(240))
    if (pid := os.fork()) == 0:
        child(3 if kill % 5 == 4 else 1)
    while os.fstat(log).st_size < goal:
        time.sleep(0.0003)
    time.sleep(rng.uniform(0, 0.03 if early else 0.003))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "the study was finished too early"
    os.write(log, b"kill %d\n" % kill)
    with Store(path, {"n": n}) as store:
        now = store.rows()
        assert all(row["seed"] == cell_seed(store.fingerprint, row["x"]) for row in now), "a row changed"
        fresh = {row["x"] for row in now} - seen
        assert all(store.blob(x, "page") == bytes([x % 256]) * 20_000 for x in fresh), "a file is missing or changed"
        assert seen <= {row["x"] for row in now}, "a row was lost"
        seen = {row["x"] for row in now}
child(1)
"""


def test_fifty_kills_lose_repeat_and_change_no_cell(tmp_path):
    n, path = 3000, tmp_path / "a.db"  # more than a fast disk can do between fifty kills
    done = subprocess.run([sys.executable, "-c", KILLER, path, str(n), "50"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with Store(path, {"n": n}) as store:
        assert store.rows() == [{"x": i, "seed": cell_seed(store.fingerprint, i)} for i in range(n)]
        assert all(store.blob(i, "page") == bytes([i % 256]) * 20_000 for i in range(n))
        assert store._file.rows("PRAGMA integrity_check") == [("ok",)]
        assert store._file.rows("SELECT count(*) FROM blob") == [(n,)]
    events = [line.split() for line in Path(f"{path}.log").read_text().splitlines()]
    kept, kills, repeated = set(), 0, 0
    started = Counter()
    for what, number in events:
        if what == "call":
            assert number not in kept, f"cell {number} was stored and computed again"
            started[number] += 1
        kept |= {number} if what == "kept" else set()
        kills += what == "kill"
    repeated = sum(started.values()) - n
    assert kills == 50 and len(kept) >= n - 50 and 0 < repeated


PROCESSES = r"""
import os, sys, time
from collai.eval.store import Store, run_cells
def work(x, seed):
    with open(sys.argv[1] + ".log", "ab") as log:
        log.write(b"%d %d\n" % (x, os.getpid()))
    time.sleep(0.02)
    return {"x": x, "seed": seed}
with Store(sys.argv[1], "processes") as store:
    print(run_cells(store, {i: i for i in range(int(sys.argv[2]))}, work, workers=2))
"""


def is_running(pid):
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")
def test_a_killed_run_leaves_no_worker_and_its_cells_are_taken_up(tmp_path):
    path, n = tmp_path / "a.db", 30
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with Store(path, "processes") as store:
        caller = subprocess.Popen([sys.executable, "-c", PROCESSES, path, str(n)], **quiet)
        while len(store.done()) < 5:
            time.sleep(0.005)
        caller.kill()
        caller.communicate()
        half = content(store)
        workers = {int(line.split()[1]) for line in Path(f"{path}.log").read_text().splitlines()}
        deadline = time.monotonic() + 20
        while any(map(is_running, workers)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert caller.pid not in workers and not any(map(is_running, workers))
        last = subprocess.run([sys.executable, "-c", PROCESSES, path, str(n)], text=True, stdout=subprocess.PIPE)
        assert 5 <= len(half) < n and int(last.stdout) == n - len(half)
        assert content(store) == {i: {"x": i, "seed": cell_seed(store.fingerprint, i)} for i in range(n)}
        assert half.items() <= content(store).items()


SHARED = r"""
import os, sys, time
from collai.eval.store import Store, run_cells
while not os.path.exists(sys.argv[1] + ".go"):
    time.sleep(0.001)
with Store(sys.argv[1], "shared") as store:
    print(run_cells(store, {i: i for i in range(150)}, lambda x, seed: ({"x": x, "seed": seed}, {"f": b"%d" % x})))
"""


def test_runs_that_begin_together_on_one_new_file_share_the_cells(tmp_path):
    path = tmp_path / "a.db"
    runs = [subprocess.Popen([sys.executable, "-c", SHARED, path], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    time.sleep(0.5)
    Path(f"{path}.go").touch()
    new = [int(run.communicate(timeout=60)[0]) for run in runs]
    with Store(path, "shared") as store:
        assert sum(new) == 150 and store.rows() == [{"x": i, "seed": cell_seed(store.fingerprint, i)} for i in range(150)]
        assert all(store.blob(i, "f") == b"%d" % i for i in range(150))


COST = """
import sys, time
from collai.eval.store import Store, run_cells
with Store(sys.argv[1], 1) as store:
    run_cells(store, {-1: 0}, lambda x, seed: {})
    start = time.process_time()
    run_cells(store, {i: i for i in range(1000)}, lambda x, seed: {"x": x})
    print(time.process_time() - start)
"""


def test_trivial_cells_cost_less_than_half_a_millisecond_of_processor_time(tmp_path):
    done = subprocess.run([sys.executable, "-c", COST, tmp_path / "a.db"], capture_output=True, text=True)
    assert float(done.stdout) < 0.5


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"a": float("nan")}, "row field 'a' is no JSON value: nan"),
        ({"a": [1, float("inf")]}, r"row field 'a'\[1\] is no JSON value: inf"),
        ({"a": {"b": {"c": {1, 2}}}}, r"row field 'a'\['b'\]\['c'\] is no JSON value: set"),
        ({"a": np.float32(1)}, r"row field 'a' is no JSON value: float32 '1\.0'"),
        ({"a": np.arange(2)}, r"row field 'a' is no JSON value: ndarray '\[0 1\]'"),
        ({"a": b"x"}, "row field 'a' is no JSON value: bytes"),
        ({"a": {3: 1}}, "row field 'a' has the key 3, in JSON keys are strings"),
        ({4: 1}, "row has the field 4, names must be strings"),
        ([1], r"a row must be a dict of JSON values, got list '\[1\]'"),
        (None, "a row must be a dict of JSON values, got NoneType 'None'"),
    ],
)
def test_a_row_that_is_not_json_is_refused_with_its_field(store, row, message):
    for engine, workers in (("local", 1), ("threads", 2)):
        with pytest.raises(TypeError, match=message):
            run_cells(store, {("k", 1): 0, ("k", 2): 0}, lambda args, seed: row, engine=engine, workers=workers)
    with pytest.raises(TypeError, match=message):
        store.add("k", row)
    assert store.done() == set()


def test_numbers_of_numpy_that_are_floats_and_tuples_are_accepted(store):
    store.add(1, {"a": np.float64(0.1), "b": (1, (2,)), "c": np.str_("x")})
    assert store.rows() == [{"a": 0.1, "b": [1, [2]], "c": "x"}]


@pytest.mark.parametrize("key", [1.0, None, True, (), ("a", None), ("a", ("b",)), ("a", True), b"a"])
def test_keys_of_another_kind_are_refused(store, key):
    for call in (lambda: store.add(key, {}), lambda: run_cells(store, {key: 0}, draw), lambda: store.blob(key, "x")):
        with pytest.raises(TypeError, match="a key must be a str, an int or a tuple of them, got"):
            call()


@pytest.mark.parametrize(
    ("blobs", "message"),
    [
        ({"a": "text"}, "blobs must be a dict of bytes by name, got 'a': str"),
        ({1: b"x"}, "blobs must be a dict of bytes by name, got 1: bytes"),
        ([b"x"], "blobs must be a dict of bytes by name, got list"),
    ],
)
def test_files_that_are_not_bytes_are_refused(store, blobs, message):
    for call in (lambda: store.add(1, {}, blobs), lambda: run_cells(store, {1: 0}, lambda args, seed: ({}, blobs))):
        with pytest.raises(TypeError, match=message):
            call()
    assert store.done() == set()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"workers": 0}, ValueError, "workers must be >= 1, got 0"),
        ({"workers": 1.5}, TypeError, r"workers must be an integer, got 1\.5"),
        ({"engine": "x"}, ValueError, "engine must be 'local', 'threads' or 'ray', got 'x'"),
        ({"engine": "ray"}, ImportError, r"needs the extra \[ray\]"),
        ({"max_cells": -1}, ValueError, "max_cells must be >= 0, got -1"),
        ({"max_cells": 2.0}, TypeError, r"max_cells must be an integer, got 2\.0"),
        ({"retries": -1}, ValueError, "retries must be >= 0, got -1"),
        ({"on_error": "skip"}, ValueError, "on_error must be 'raise' or 'record', got 'skip'"),
        ({"retry_on": OSError}, TypeError, "retry_on must be a tuple of exception types, got <class 'OSError'>"),
        ({"retry_on": ("x",)}, TypeError, r"retry_on must be a tuple of exception types, got \('x',\)"),
        ({"retry_on": (KeyboardInterrupt,)}, TypeError, "retry_on must be a tuple of exception types"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(store, options, error, message):
    with pytest.raises(error, match=message):
        run_cells(store, {1: 1}, lambda x, seed: {}, **options)
    assert store.done() == set()


def test_bad_cells_and_functions_are_refused(store):
    with pytest.raises(TypeError, match=r"cells must be a dict {key: args}, got list"):
        run_cells(store, [1, 2], draw)
    with pytest.raises(TypeError, match="fn must be callable, got 3"):
        run_cells(store, {1: 1}, 3)


def test_integers_of_numpy_and_generators_of_keys_are_accepted(store):
    cells = {np.int64(1): 1, ("a", np.int32(2)): 2}
    assert run_cells(store, cells, lambda x, seed: {"x": x}, workers=np.int64(1), max_cells=np.int64(5), retries=np.int8(0)) == 2
    assert store.done() == {1, ("a", 2)}


def test_the_parts_of_the_measurement_count_what_they_say(tmp_path, monkeypatch):
    assert all(rate > 0 and ms > 0 for rate, ms in module._rates(20, str(tmp_path)).values()) and not list(tmp_path.iterdir())
    assert module._resume(50, str(tmp_path / "r.db")) > 0
    study = module._killed_study(str(tmp_path / "k.db"), 1, 8)
    assert study["cells"][-1] == 8 and len(study["kills"]) == 3 and 8 <= study["calls"] <= 11
    monkeypatch.setattr(module, "_rates", lambda n, folder: {"bare SQLite": (9.0, 0.2), "add": (8.0, 0.3)})
    monkeypatch.setattr(module, "_killed_study", lambda path, workers, n: {"calls": 203, "kills": [1.0]})
    monkeypatch.setattr(module, "_resume", lambda n, path: 0.5)
    named = {row["name"]: row for row in module.measure("cpu")}
    assert named["store/add"]["peer"] == 9.0 and named["store/add"]["cpu_ms"] == 0.3 and named["store/killed, local 2"]["measured"] == 3
    with pytest.raises(ValueError, match="device must be 'cpu', got 'cuda'"):
        module.measure("cuda")


def test_a_study_that_dies_by_itself_is_an_error_not_a_loop(tmp_path):
    with pytest.raises(RuntimeError, match="the study ended with status 1 after 0 cells"):
        module._killed_study(str(tmp_path / "k.db"), 0, 8)


def test_import_is_light():
    code = "import sys, collai.eval.store; print({'torch', 'transformers', 'openai', 'inspect_ai', 'pandas', 'joblib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
