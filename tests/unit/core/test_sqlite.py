"""Properties of `collai.core.sqlite`: moves are whole, whoever forks, waits, is killed or comes with another kind of file."""

import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import weakref
from contextlib import closing

import pytest

from collai.core import sqlite as module
from collai.core.sqlite import SharedFile

TABLES = {"t": "CREATE TABLE t (who TEXT NOT NULL, n INTEGER NOT NULL)", "by_n": "CREATE UNIQUE INDEX by_n ON t (n)"}


def make(path, kind="tally", mark=77, tables=TABLES):
    return SharedFile(path, kind, mark, tables)


def add(file, who="x", hold=0.0):
    with file.transaction() as db:
        n = db.execute("SELECT count(*) FROM t").fetchone()[0]
        time.sleep(hold)
        db.execute("INSERT INTO t VALUES (?, ?)", (who, n))


def numbers(file):
    return [n for n, in file.rows("SELECT n FROM t ORDER BY rowid")]


def in_threads(work, count):
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def in_child(work, seconds=20):
    if not (pid := os.fork()):
        signal.alarm(seconds)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(99)
    return lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def all_done(threads):
    for thread in threads:
        thread.join()


@pytest.fixture
def file(tmp_path):
    with closing(make(tmp_path / "a.db")) as opened:
        yield opened


def test_a_block_happens_as_a_whole_or_not_at_all(file):
    add(file)
    with pytest.raises(KeyError), file.transaction() as db:
        db.execute("DELETE FROM t")
        raise KeyError
    with pytest.raises(sqlite3.IntegrityError), file.transaction() as db:
        db.execute("INSERT INTO t VALUES ('y', 1)")
        db.execute("INSERT INTO t VALUES ('y', 1)")
    assert file.rows("SELECT * FROM t") == [("x", 0)]
    assert file.rows("INSERT INTO t VALUES (?, ?) RETURNING n", "y", 5) == [(5,)] and numbers(file) == [0, 5]


def test_a_reading_block_sees_one_instant_and_stops_nobody(file, tmp_path):
    other = sqlite3.connect(tmp_path / "a.db", timeout=0)
    with file.transaction("DEFERRED") as db, closing(other):
        other.execute("INSERT INTO t VALUES ('other', 3)")
        other.commit()
        assert db.execute("SELECT count(*) FROM t").fetchone() == (0,)
    assert numbers(file) == [3]


def test_a_block_in_a_block_is_an_error_and_leaves_the_file_usable(file):
    with pytest.raises(sqlite3.OperationalError), file.transaction() as db:
        db.execute("INSERT INTO t VALUES ('lost', 9)")
        add(file)
    add(file)
    assert numbers(file) == [0]


def test_threads_and_objects_on_one_file_take_turns(file, tmp_path):
    second = make(tmp_path / "a.db")
    all_done([*in_threads(lambda: [add(file) for _ in range(20)], 4), *in_threads(lambda: [add(second) for _ in range(20)], 4)])
    assert numbers(file) == list(range(160))


def test_threads_of_forked_children_and_of_the_parent_take_turns(file):
    for round in range(1, 4):
        writing = in_threads(lambda: [add(file) for _ in range(10)], 4)
        children = [in_child(lambda: all_done(in_threads(lambda: [add(file) for _ in range(5)], 8))) for _ in range(2)]
        assert [ended() for ended in children] == [0, 0]
        all_done(writing)
        assert numbers(file) == list(range(120 * round))


def test_a_child_that_is_forked_during_a_move_may_write(file):
    for _ in range(5):
        slow = in_threads(lambda: add(file, hold=0.05), 1)
        time.sleep(0.01)
        began = time.monotonic()
        assert in_child(lambda: add(file))() == 0 and time.monotonic() - began < 10
        all_done(slow)
    assert numbers(file) == list(range(10))


def test_what_a_child_commits_after_its_parent_has_closed_is_kept(file, tmp_path):
    go, gone = os.pipe()
    add(file)

    def work():
        add(file)
        os.read(go, 1)
        add(file)

    ended = in_child(work)
    while len(numbers(file)) < 2:
        time.sleep(0.002)
    file.close()
    with closing(make(tmp_path / "a.db")) as third:
        add(third)
        os.write(gone, b"x")
        assert ended() == 0 and numbers(third) == [0, 1, 2, 3]


def test_what_a_child_commits_after_its_parent_was_killed_is_kept(tmp_path):
    code = ("import os, sys, time; from collai.core.sqlite import SharedFile\n"
            f"file = SharedFile(sys.argv[1], 'tally', 77, {TABLES!r})\n"
            "add = lambda: file.rows(sys.argv[2])\n"
            "if os.fork(): time.sleep(60)\n"
            "add(); print(flush=True); sys.stdin.readline(); add(); print(flush=True)")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    insert = "INSERT INTO t SELECT 'x', count(*) FROM t"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "a.db", insert], **pipes) as parent:
        assert parent.stdout.readline() == "\n"
        parent.kill()
        with closing(make(tmp_path / "a.db")) as file:
            add(file)
        parent.stdin.write("\n")
        parent.stdin.flush()
        assert parent.stdout.readline() == "\n"
    with closing(make(tmp_path / "a.db")) as file:
        assert numbers(file) == [0, 1, 2]


def test_children_of_children_fork_too(file):
    def work():
        add(file)
        assert in_child(lambda: add(file))() == 0
        all_done(in_threads(lambda: add(file), 4))  # the lock is free again for every thread

    assert in_child(work)() == 0
    all_done(in_threads(lambda: add(file), 4))
    assert numbers(file) == list(range(10))


def test_a_fork_inside_a_move_is_an_error_and_the_move_is_undone(file):
    with pytest.raises(sqlite3.ProgrammingError), file.transaction() as db:
        db.execute("INSERT INTO t VALUES ('lost', 9)")
        assert in_child(lambda: None)() == 0
        db.execute("INSERT INTO t VALUES ('lost', 10)")
    add(file)
    assert numbers(file) == [0]


def test_closed_files_stay_closed_and_forgotten_ones_are_let_go(file, tmp_path):
    other = make(tmp_path / "b.db")
    assert {file._key, other._key} <= module._OPEN.keys()
    del other
    assert [name for name in os.listdir(tmp_path) if name.startswith("b")] == ["b.db"]
    file.close()
    file.close()
    for _ in range(2):
        with pytest.raises(sqlite3.ProgrammingError, match=r"tally .*a\.db is closed"):
            file.rows("SELECT 1")
        assert in_child(lambda: None)() == 0
    assert [name for name in os.listdir(tmp_path) if name.startswith("a")] == ["a.db"]


def test_a_fork_while_a_file_is_let_go_finds_it_closed(tmp_path):
    go, gone = os.pipe()
    entered, forked, lost = threading.Event(), threading.Event(), [make(tmp_path / "a.db")]
    add(lost[0])
    slow = weakref.ref(lost[0], lambda _: (entered.set(), forked.wait(10)))
    threads = in_threads(lost.clear, 1)  # stops in the middle of letting the file go
    assert entered.wait(10) and slow() is None

    def work():
        mine = make(tmp_path / "a.db")
        add(mine)
        os.read(go, 1)
        add(mine)

    ended = in_child(work)
    with closing(sqlite3.connect(tmp_path / "a.db")) as other:
        while other.execute("SELECT count(*) FROM t").fetchone()[0] < 2:
            time.sleep(0.002)
    forked.set()
    all_done(threads)
    os.write(gone, b"x")
    assert ended() == 0 and numbers(make(tmp_path / "a.db")) == [0, 1, 2]


def test_files_that_are_let_go_during_a_move_are_closed_later(file, tmp_path):
    kept = len(module._OPEN)
    with file.transaction():
        others = [make(tmp_path / f"{i}.db") for i in range(3)]
        all_done(in_threads(others.clear, 1))
        assert len(module._LEFT) == 3 and len(module._OPEN) == kept + 3
    make(tmp_path / "b.db")
    assert not module._LEFT and len(module._OPEN) == kept


@pytest.mark.parametrize("trial", range(4))
def test_many_may_make_one_file_at_once(tmp_path, trial):
    start = time.time() + 0.05

    def work(late):
        while time.time() < start + late * 0.0004:
            pass
        add(make(tmp_path / "new" / "a.db"))

    children = [in_child(lambda i=i: work(i)) for i in range(6)]
    assert [ended() for ended in children] == [0] * 6 and numbers(make(tmp_path / "new" / "a.db")) == list(range(6))


def test_a_file_whose_maker_was_killed_is_made_again(tmp_path):
    (tmp_path / "empty.db").touch()
    with closing(sqlite3.connect(tmp_path / "log.db")) as db:
        db.execute("PRAGMA journal_mode = WAL")
    for name in ("empty.db", "log.db"):
        with closing(make(tmp_path / name)) as file:
            add(file)
            assert file.rows("PRAGMA application_id") == [(77,)] and file.rows("PRAGMA journal_mode") == [("wal",)]


def test_files_of_others_and_of_other_kinds_are_refused_and_left_alone(tmp_path):
    (tmp_path / "text").write_text("some words " * 400)
    with closing(sqlite3.connect(tmp_path / "theirs")) as db:
        db.execute("CREATE TABLE t (x)")
    make(tmp_path / "kind", "store", 5).close()
    make(tmp_path / "less", tables={"t": TABLES["t"]}).close()
    before = {one: one.read_bytes() for one in tmp_path.iterdir()}
    for name, reason in {"text": "file is not a database", "theirs": "it is another program's database",
                         "kind": "it is another program's database", "less": "it is another program's database"}.items():
        with pytest.raises(ValueError, match=f"{name} is no tally: {reason}"):
            make(tmp_path / name)
    assert {one: one.read_bytes() for one in tmp_path.iterdir()} == before
    with pytest.raises(sqlite3.OperationalError, match="unable to open") as caught:
        make(tmp_path)
    assert caught.value.__notes__ == [f"tally {tmp_path}"]


def test_a_busy_file_is_waited_for_but_not_for_ever(file, tmp_path, monkeypatch):
    with closing(sqlite3.connect(tmp_path / "a.db", isolation_level=None, check_same_thread=False)) as other:
        for use in (lambda: add(file), lambda: file.rows("INSERT INTO t VALUES ('x', 8)"), lambda: add(make(tmp_path / "a.db"))):
            other.execute("BEGIN IMMEDIATE")
            timer = threading.Timer(0.05, lambda: other.execute("COMMIT"))
            timer.start()
            use()
            timer.join()
        monkeypatch.setattr(module, "_PATIENCE", 0.05)
        other.execute("BEGIN IMMEDIATE")
        for use in (lambda: add(file), lambda: file.rows("DELETE FROM t")):
            with pytest.raises(sqlite3.OperationalError, match="database is locked"):
                use()
        other.execute("ROLLBACK")
    assert numbers(file) == [0, 8, 2]


def test_a_new_file_in_which_somebody_writes_is_waited_for(tmp_path):
    with closing(sqlite3.connect(tmp_path / "a.db", isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN EXCLUSIVE")
        timer = threading.Timer(0.1, lambda: other.execute("COMMIT"))
        timer.start()
        file = make(tmp_path / "a.db")
        add(file)
        timer.join()
        assert numbers(file) == [0] and not other.in_transaction


def test_copies_and_changed_folders_lead_to_the_same_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = make("a.db")
    monkeypatch.chdir("/")
    for one in (file, pickle.loads(pickle.dumps(file))):  # noqa: S301
        assert in_child(lambda one=one: add(one))() == 0
        add(one)
    assert numbers(file) == [0, 1, 2, 3] and file.path == tmp_path / "a.db" and os.listdir(tmp_path)[0].startswith("a.db")


def test_an_interrupt_while_waiting_leaves_no_move_open(file, monkeypatch):
    def interrupted(db, work):
        work()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_patiently", interrupted)
        with pytest.raises(KeyboardInterrupt):
            add(file)
    add(file)
    assert numbers(file) == [0]
