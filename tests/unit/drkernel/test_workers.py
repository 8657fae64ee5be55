"""A queue that records every task once, whoever is killed."""
import itertools
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.core import sandbox
from collai.drkernel import workers
from collai.drkernel.workers import LeasedQueue, RayQueue, RedisQueue, Zygote

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


def soon(condition, seconds=10.0):
    """Wait for a condition; whether it came."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def in_fork(act):
    """Run a function in a fork of this process; its exit code."""
    pid = os.fork()
    if not pid:
        try:
            os._exit(act())
        except BaseException:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_the_children_of_the_sandbox_are_offered_here():
    for name in ("Child", "Ending", "Sandbox", "Zygote", "missing_layers", "shared_memory"):
        assert name in workers.__all__ and getattr(workers, name) is getattr(sandbox, name)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A running Redis server, reached through a socket file."""
    pytest.importorskip("redis", reason="needs the package redis")
    if (program := shutil.which("redis-server")) is None:
        pytest.skip("needs a redis-server")
    folder = tmp_path_factory.mktemp("redis")
    line = [program, "--port", "0", "--unixsocket", folder / "socket", "--dir", folder, "--appendonly", "yes"]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL) as process:
        assert soon((folder / "socket").exists)
        yield f"unix://{folder / 'socket'}"
        process.terminate()


@pytest.fixture(scope="module")
def cluster():
    """A running Ray cluster of this computer."""
    ray = pytest.importorskip("ray", reason="needs the package ray")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20,
             logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.fixture(params=["file", "redis", "ray"])
def make(request, tmp_path):
    """Opens one queue again and again, on a file, a server or a cluster."""
    if request.param == "file":
        return (yield lambda **options: LeasedQueue(tmp_path / "q.db", **options))
    if request.param == "ray":
        ray, made = request.getfixturevalue("cluster"), []
        yield lambda **options: made.append(RayQueue(tmp_path / "q.db", **options)) or made[-1]
        return ray.kill(made[-1]._keeper) if made else None
    url = request.getfixturevalue("server")
    yield lambda **options: RedisQueue(url, name=str(tmp_path), **options)


def test_higher_priorities_go_first_and_equal_ones_in_the_order_of_submission(make):
    queue = make(max_deaths=9)
    for n, priority in enumerate([0, 2, 1, 2, -1, 2**63 - 1, -(2**63)]):
        queue.submit(n, priority=priority)
    first, second = queue.lease(), queue.lease()
    assert (first.payload, second.payload) == (5, 1) and queue.fail(second, True) == "queued"  # it is the next one again
    assert [queue.lease().payload for _ in range(6)] == [1, 3, 2, 0, 4, 6] and queue.lease() is None


def test_a_task_goes_through_the_queue_and_is_recorded_once(make):
    queue = make()
    names = [queue.submit({"n": n}) for n in (2, 0, 1, 3)]
    assert queue.counts() == {"queued": 4} and queue.submit([1], id="x") == "x" == queue.submit([1], id="x")
    leases = [queue.lease() for _ in range(5)]
    assert [lease.payload for lease in leases] == [{"n": 2}, {"n": 0}, {"n": 1}, {"n": 3}, [1]]
    assert queue.lease() is None and {lease.token for lease in leases} == {1}
    assert all(queue.heartbeat(lease) for lease in leases) and queue.counts() == {"leased": 5}
    assert queue.finish(leases[0], "ok", {"speedup": 2.0}) and not queue.finish(leases[0], "ok", {"speedup": 3.0})
    assert queue.records() == queue.records(names[0]) == [(names[0], "ok", {"speedup": 2.0}, 1)] and queue.records("y") == []
    assert queue.wait(names[0]).body == {"speedup": 2.0} and not queue.heartbeat(leases[0])
    assert queue.counts() == {"leased": 4, "ok": 1}


def test_a_known_end_is_recorded_at_once(make):
    queue = make()
    assert queue.submit({"n": 1}, id="known", end=("ok", {"speedup": 2.0})) == "known"
    assert queue.records() == [("known", "ok", {"speedup": 2.0}, 1)] and queue.lease() is None
    assert queue.wait("known", timeout=0).status == "ok" and queue.counts() == {"ok": 1}
    assert queue.submit({"n": 1}, id="known", end=("crashed", None)) == "known" == queue.submit({"n": 1}, id="known")
    queue.submit(2, id="open")
    queue.submit(2, id="open", end=("ok", 2))  # it is there already
    assert queue.counts() == {"ok": 1, "queued": 1} and len(queue.records()) == 1 and queue.reclaim() == []
    with pytest.raises(ValueError, match="with another payload"):
        queue.submit(3, id="known", end=("ok", 3))
    assert queue.finish(queue.lease(), "ok") and [r.id for r in queue.records()] == ["known", "open"]


def test_deaths_and_failures_are_counted_apart_and_both_end(make):
    queue = make(max_deaths=2, max_failures=3)
    for pattern in itertools.product([True, False], repeat=4):
        name, states = queue.submit(None), []
        for attributable in pattern:
            if (lease := queue.lease()) is None:
                break
            states.append(queue.fail(lease, attributable, body={"error": "died"}))
            assert queue.fail(lease, attributable) is None and not queue.finish(lease, "ok")
        deaths, failures = (list(itertools.accumulate(p == a for p in pattern)) for a in (True, False))
        first = next(i for i in range(4) if deaths[i] == 2 or failures[i] == 3)
        end = "crashed" if deaths[first] == 2 else "infra_error"
        assert states == ["queued"] * first + [end]
        assert queue.records(name) == [(name, end, {"error": "died"}, first + 1)]


def test_a_lease_runs_out_unless_the_heart_beats_and_the_late_result_is_dropped(make):
    queue = make(seconds=1.0)
    name = queue.submit("work")
    slow = queue.lease()
    for _ in range(3):
        time.sleep(0.4)
        assert queue.heartbeat(slow) and queue.lease() is None
    time.sleep(1.1)
    second = queue.lease()
    assert (second.id, second.token) == (name, 2) and not queue.heartbeat(slow) and not queue.finish(slow, "ok", "late")
    assert queue.finish(second, "ok", "second") and queue.records() == [(name, "ok", "second", 2)]


def test_a_clock_that_was_put_back_blocks_no_task(tmp_path, monkeypatch):
    queue, now = LeasedQueue(tmp_path / "q.db"), time.time()
    queue.submit(1)
    queue.lease()
    monkeypatch.setattr(time, "time", lambda: now - 3600)
    assert queue.lease().token == 2


def test_a_new_start_on_the_same_file_takes_up_what_dead_workers_held(make):
    queue = make()
    names = [queue.submit(n) for n in range(3)]
    take = "import pickle, sys; q = pickle.load(sys.stdin.buffer); print(sum(q.lease() is not None for _ in range(2)))"
    assert subprocess.run([sys.executable, "-c", take], input=pickle.dumps(queue), capture_output=True).stdout == b"2\n"
    mine = queue.lease()
    again = make()
    assert sorted(again.reclaim()) == sorted(names[:2]) and again.reclaim() == []
    assert [again.lease().token for _ in range(2)] == [2, 2] and again.finish(mine, "ok")


def test_a_worker_of_another_boot_or_name_space_is_not_called_dead():
    own = f"{workers._world()}|{os.getpid()}|"
    assert not workers._is_gone(own + workers._birth(os.getpid())) and workers._is_gone(own + "1")
    assert not workers._is_gone(f"elsewhere|{os.getpid()}|1")


def test_waiting_ends(make):
    queue = make()
    with pytest.raises(KeyError, match="no task 'a'"):
        queue.wait("a")
    queue.submit(1, id="a")
    with pytest.raises(TimeoutError, match=r"task 'a' is queued after 0\.01 s"):
        queue.wait("a", timeout=0.01)


@pytest.mark.parametrize(("act", "error", "message"), [
    (lambda q: q.submit({1, 2}), TypeError, "payload must be JSON: .*set"),
    (lambda q: [q.submit(1, id="a"), q.submit(2, id="a")], ValueError, r"task 'a' is in .* with another payload"),
    (lambda q: q.submit(1, priority=2**63), ValueError, "priority must be an integer of 64 bits, got 9223372036854775808"),
    (lambda q: q.submit(1, end=("leased", 1)), ValueError, "status must name an end, got 'leased'"),
    (lambda q: q.submit(1, end=("ok", {1})), TypeError, "body must be JSON: .*set"),
    (lambda q: q.finish(q.lease(), "queued"), ValueError, "status must name an end, got 'queued'"),
    (lambda q: q.finish(q.lease(), "ok", object()), TypeError, "body must be JSON"),
    (lambda q: q.fail(q.lease(), True, object()), TypeError, "body must be JSON"),
])
def test_bad_input_is_refused_and_changes_nothing(act, error, message, make):
    queue = make()
    queue.submit("first", id="first")
    with pytest.raises(error, match=message):
        act(queue)
    assert queue.records() == [] and sum(queue.counts().values()) in (1, 2)


def test_a_queue_that_cannot_be_is_refused(make, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="seconds must be > 0, got 0"):
        make(seconds=0)
    with pytest.raises(ValueError, match="max_deaths must be > 0, got -1"):
        make(max_deaths=-1)
    with pytest.raises(ValueError, match=r"test_workers\.py is no queue: "):
        LeasedQueue(__file__)
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ImportError, match=r"needs the extra \[redis\]: pip install collai\[redis\]"):
        RedisQueue("redis://localhost")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"needs the extra \[ray\]: pip install collai\[ray\]"):
        RayQueue(tmp_path / "q.db")


def test_a_queue_stays_where_it_was_made_wherever_its_copies_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    queue = LeasedQueue("q.db")
    queue.submit("first", id="a")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert pickle.loads(pickle.dumps(queue)).counts() == {"queued": 1} and os.listdir() == []  # noqa: S301
    for path, error, message in (("", ValueError, "queue must be the path of a file, got ''"),
                                 (tmp_path, ValueError, f"queue must be the path of a file, and {tmp_path} is a folder"),
                                 ("no/q.db", FileNotFoundError, f"no folder {tmp_path}/elsewhere/no for the queue")):
        with pytest.raises(error, match=message):
            LeasedQueue(path)
    assert os.listdir() == []


def test_no_server_is_told_by_its_address(server, tmp_path):
    with pytest.raises(ConnectionError, match=f"no Redis at unix://{tmp_path}/none"):
        RedisQueue(f"unix://{tmp_path}/none")


@settings(deadline=None, max_examples=15, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(["submit", "submit", "lease", "finish", "fail", "die"]), st.integers(-2, 2)), max_size=40))
def test_a_server_hands_out_many_tasks_in_the_order_of_a_file(server, moves):
    with tempfile.TemporaryDirectory() as folder:
        queues, held = (LeasedQueue(Path(folder, "q.db")), RedisQueue(server, name=uuid.uuid4().hex)), ([], [])
        for n, (move, number) in enumerate(moves):
            said = []
            for queue, leases in zip(queues, held, strict=True):
                if move == "submit":
                    said.append(queue.submit(n, id=f"task {90 - n}", priority=number, end=("ok", n) if number == 0 and n % 2 else None))
                elif move == "lease":
                    said.append(queue.lease())
                    leases.extend([said[-1]] if said[-1] else [])
                elif leases:
                    lease = leases[number % len(leases)]
                    said.append(queue.finish(lease, "ok", n) if move == "finish" else queue.fail(lease, move == "die", n))
            assert said[:1] == said[1:] and queues[0].counts() == queues[1].counts()
        assert queues[0].records() == queues[1].records()


def follow(queue, late, moves):
    """One task; three workers; every answer is compared with a loop over a dictionary."""
    name = queue.submit("x")
    model, held, ends = {"state": "queued", "token": 0, "deaths": 0, "failures": 0}, {}, []

    def lose(kind):
        model[kind] += 1
        over = model[kind] == {"deaths": 2, "failures": 5}[kind]
        model["state"] = {"deaths": "crashed", "failures": "infra_error"}[kind] if over else "queued"
        ends.extend([model["state"]] * over)

    for move, who in moves:
        mine, current = held.get(who), who in held and (model["state"], model["token"]) == ("leased", held[who].token)
        if move == "lease":
            got = queue.lease()
            assert (got is not None) == (model["state"] == "queued")
            if got:
                model |= {"state": "leased", "token": model["token"] + 1}
                held[who] = got
                assert got.token == model["token"]
        elif move == "late":
            late(queue)
            assert len(queue.reclaim()) == (model["state"] == "leased")
            lose("failures") if model["state"] == "leased" else None
        elif mine and move == "beat":
            assert queue.heartbeat(mine) == current
        elif mine and move == "finish":
            assert queue.finish(mine, "ok", who) == current
            if current:
                model["state"] = "ok"
                ends.append("ok")
        elif mine:
            assert (queue.fail(mine, move == "die") is not None) == current
            lose("deaths" if move == "die" else "failures") if current else None
        assert queue.counts() == {model["state"]: 1} and [r.status for r in queue.records()] == ends and len(ends) <= 1
    assert len(queue.records(name)) == (model["state"] not in ("queued", "leased"))


def late_in_file(queue):
    with queue._file.transaction() as db:
        db.execute("UPDATE tasks SET deadline = 0 WHERE state = 'leased'")


def late_on_server(queue):
    for one in queue._db.xpending_range(queue._stream, "workers", "-", "+", 9):
        queue._db.xclaim(queue._stream, "workers", one["consumer"], 0, [one["message_id"]], idle=10**8, justid=True)


scripts = st.lists(st.tuples(st.sampled_from(["lease", "lease", "finish", "die", "fail", "late", "beat"]), st.integers(0, 2)),
                   max_size=25)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(scripts)
def test_the_queue_agrees_with_a_plain_model(moves):
    with tempfile.TemporaryDirectory() as folder:
        follow(LeasedQueue(Path(folder, "q.db")), late_in_file, moves)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(moves=scripts)
def test_the_queue_on_redis_agrees_with_the_same_model(server, moves):
    follow(RedisQueue(server, name=uuid.uuid4().hex), late_on_server, moves)


@pytest.fixture(scope="module")
def queue_on_ray(cluster, tmp_path_factory):
    """A queue and its file; the keeper of one serves many tests."""
    queue = RayQueue(tmp_path_factory.mktemp("ray") / "q.db")
    yield queue, LeasedQueue(queue.path)
    cluster.kill(queue._keeper)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(moves=scripts)
def test_the_queue_on_ray_agrees_with_the_same_model(queue_on_ray, moves):
    queue, file = queue_on_ray
    for table in ("tasks", "records"):
        file._file.rows(f"DELETE FROM {table}")  # noqa: S608
    follow(queue, lambda _: late_in_file(file), moves)


RAY_WORK = """
import pickle, sys, time
queue = pickle.load(sys.stdin.buffer)
print(flush=True)
while lease := queue.lease():
    time.sleep(0.01)
    queue.finish(lease, "ok", lease.payload * 2)
"""


def hire_on_ray(queue):
    """A worker that has reached the cluster."""
    worker = subprocess.Popen([sys.executable, "-c", RAY_WORK], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    worker.stdin.write(pickle.dumps(queue))
    worker.stdin.close()
    worker.stdout.readline()
    return worker


def test_workers_and_keeper_on_ray_are_killed_and_every_task_has_one_record(cluster, tmp_path):
    queue = RayQueue(tmp_path / "q.db", seconds=1.0, max_failures=100)
    find = queue._keeper.__ray_call__.remote
    names, keepers = [queue.submit(n) for n in range(300)], [cluster.get(find(lambda _: os.getpid()))]
    staff = [hire_on_ray(queue) for _ in range(2)]
    for _ in range(2):
        time.sleep(0.3)
        os.kill(keepers[-1], signal.SIGKILL)
        keepers.append(cluster.get(find(lambda _: os.getpid())))
        staff[0].kill()
        staff[0].wait()
        queue.reclaim()
        staff.append(hire_on_ray(queue))
        staff = staff[1:]
    assert soon(lambda: set(queue.counts()) == {"ok"}, 20)
    [worker.wait(20) for worker in staff]
    assert len(set(keepers)) == 3 and sorted((r.id, r.body) for r in queue.records()) == sorted(
        (name, 2 * n) for n, name in enumerate(names))
    cluster.kill(queue._keeper)
    again = RayQueue(tmp_path / "q.db", seconds=1.0, max_failures=100)  # a new keeper, the old file
    assert len(again.records()) == 300
    cluster.kill(again._keeper)


def test_what_only_ray_refuses(cluster, tmp_path):
    queue = RayQueue(tmp_path / "q.db")
    with pytest.raises(ValueError, match=r"q\.db is kept with other .* than \(3\.0, 2, 5\)"):
        RayQueue(tmp_path / "q.db", seconds=3.0)
    with pytest.raises(ValueError, match="is no queue"):
        RayQueue(__file__)
    assert in_fork(lambda: refused(queue.counts) + 2 * refused(lambda: RayQueue(tmp_path / "r.db"))) == 3
    cluster.kill(queue._keeper)
    assert soon(lambda: refused(queue.counts, ConnectionError, "no keeper of queue"))


def refused(act, kind=RuntimeError, text="Ray does not survive a fork"):
    """Whether an error is raised that says this."""
    try:
        act()
    except kind as error:
        return text in str(error)
    return False


WORK = """
import pickle, time
queue = pickle.loads(queue)
while lease := queue.lease():
    time.sleep(0.01)
    queue.finish(lease, "ok", lease.payload * 2)
"""


@linux
@pytest.mark.parametrize("make", ["file", "redis"], indirect=True)
def test_workers_killed_at_random_lose_no_task_and_record_none_twice(make):
    rng, kills, queue = random.Random(0), 0, make(max_failures=100)  # noqa: S311
    globs = {"queue": pickle.dumps(queue)}
    names = [queue.submit(n) for n in range(150)]
    with Zygote(("collai.drkernel.workers", *["redis"] * isinstance(queue, RedisQueue))) as zygote:
        staff = [zygote.spawn(exec, WORK, globs) for _ in range(3)]
        while set(queue.counts()) != {"ok"}:
            time.sleep(0.02)
            old = staff.pop(rng.randrange(3))
            kills += old.kill().reason == "stopped"
            old.close()
            queue.reclaim()
            staff.append(zygote.spawn(exec, WORK, globs))
        for child in staff:
            child.close()
    assert kills >= 5 and [r.attempts for r in queue.records()] != [1] * 150
    assert sorted((r.id, r.body) for r in queue.records()) == sorted((name, 2 * n) for n, name in enumerate(names))


def test_a_queue_travels_to_another_process(make):
    queue = make(seconds=3.0)
    copy = pickle.loads(pickle.dumps(queue))  # noqa: S301
    name = copy.submit(7)
    assert queue.lease().id == name and copy.seconds == 3.0
