"""A gym behind HTTP: the same answers, the same errors, and nothing for strangers."""
import dataclasses
import json
import math
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.drkernel import gym as gym_module
from collai.drkernel.gym import EvalResult, KernelGym, RemoteGym, Task, _serve, example
from collai.drkernel.problems import Problem, builtin_problems

httpx = pytest.importorskip("httpx", reason="needs the extra server")
pytest.importorskip("fastapi", reason="needs the extra server")
pytest.importorskip("uvicorn", reason="needs the extra server")

SOURCE = "import torch\nclass Model(torch.nn.Module): ...\ndef get_inputs(): return []\ndef get_init_inputs(): return []\n"
PROBLEM = Problem.from_source(SOURCE, name="nothing", level=1)
TASK = Task(PROBLEM, "class ModelNew: ...")


def made(name, task):
    """A result with every odd value, told by the code."""
    bad = math.inf if "inf" in task.code else math.nan if "nan" in task.code else 1e-7
    return EvalResult(task_id=name, status="incorrect" if bad != 1e-7 else "ok", compiled=True, correct=bad == 1e-7,
                      hacked=False, flags=("decoy", "stale_output"), speedup=2.0, speedup_ci=(1.5, 2.5), ref_ms=2.0,
                      new_ms=1.0, coverage=0.25, coverage_displaced=0.5, max_err=bad, attempts=1, cached=False,
                      sandbox="auto", error=None, profile={"events": [["k", 1.0, True, True]], "ref_us": 3.0})


class FakeGym:
    """KernelGym's methods, without kernels: each task takes a moment in one thread, unless it says 'never'."""

    def __init__(self, seconds=0.01):
        self.tasks, self.ends, self.todo, self.seconds = {}, {}, queue.Queue(), seconds
        threading.Thread(target=self.work, daemon=True).start()

    def work(self):
        while (name := self.todo.get()) is not None:
            if "never" not in self.tasks[name].code:
                time.sleep(self.seconds)
                self.ends[name] = made(name, self.tasks[name])

    def submit(self, task):
        if task.timeout == 13:
            raise ValueError("timeout must not be 13, got 13")
        name = f"task {len(self.tasks)}"
        self.tasks[name] = task
        self.todo.put(name)
        return name

    def result(self, id, timeout=None):
        if id not in self.tasks:
            raise KeyError(f"no task {id!r} in this gym")
        end = math.inf if timeout is None else time.monotonic() + timeout
        while id not in self.ends:
            if time.monotonic() >= end:
                raise TimeoutError(f"task {id!r} is queued after {timeout} s")
            time.sleep(0.001)
        return self.ends[id]

    def records(self):
        return list(self.ends.values())

    def info(self):
        return {"device": "cpu", "backend": "c", "workers": 1, "clock": "judge", "layers": ("rlimits", "seccomp")}

    serve = _serve


@pytest.fixture
def fake():
    """A fake gym, its server and a client."""
    gym = FakeGym()
    with gym.serve() as server, RemoteGym(server.url, patience=5) as remote:
        yield gym, server, remote
    gym.todo.put(None)


def same(a, b):
    """Whether two results are equal, NaN and all."""
    return repr(a) == repr(b)


def test_a_remote_gym_answers_as_the_gym_does(fake):
    gym, _, remote = fake
    name = remote.submit(TASK)
    assert same(remote.result(name), gym.result(name)) and gym.tasks[name] == TASK
    assert remote.result(name, timeout=0).feedback() == gym.result(name).feedback() and remote.evaluate(TASK).flags == ("decoy", "stale_output")
    results = list(remote.map([Task(PROBLEM, f"class ModelNew: {n} inf nan"[:18 + n]) for n in range(6)]))
    assert [r.task_id for r in results] == [f"task {n}" for n in range(2, 8)]
    assert all(same(a, b) for a, b in zip(remote.records(), gym.records(), strict=True)) and len(gym.records()) == 8
    assert remote.info() == gym.info() | {"layers": ["rlimits", "seccomp"]}


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_the_real_gym_behind_a_url_gives_what_it_gives_here():
    problem = next(p for p in builtin_problems(1) if p.name == "scale_bias_relu").with_sizes(ROWS=16, COLS=32)
    task = Task(problem, example(), trials=2, correctness_trials=1)
    with KernelGym() as gym, gym.serve() as server, RemoteGym(server.url) as remote:
        there = remote.evaluate(task)
        assert there.status == "ok" and gym.records() == [there] == remote.records()
        broken = remote.evaluate(Task(problem, "x = ("))
        assert broken.status == "compile_error" and broken.max_err == math.inf and broken == gym.records()[1]
        assert remote.info() == gym.info() | {"layers": list(gym.info()["layers"])}


numbers = st.floats(allow_nan=True, allow_infinity=True)
words = st.text(st.sampled_from('a\0\n"\\é漢😀'), max_size=9)


@settings(max_examples=40)
@given(st.tuples(numbers, numbers), numbers, words, st.none() | words)
def test_every_result_survives_strict_json(pair, number, text, error):
    before = EvalResult("t", "ok", True, True, False, ("a",), number, pair, number, 1.0, 0.5, 0.5, number, 1, True, "off", error,
                        {"events": [[text, 1.5, True, False]]})
    sent = json.dumps(gym_module._write_result(before), allow_nan=False)
    assert same(gym_module._read_result(json.loads(sent)), before)


@settings(max_examples=40)
@given(words, st.integers(1, 99), st.floats(0.5, 600), st.booleans(), st.integers(-5, 5))
def test_every_task_survives_json(code, trials, timeout, flag, priority):
    task = Task(PROBLEM, code, trials=trials, timeout=timeout, require_generated=flag, priority=priority)
    assert gym_module._read_task(json.dumps(gym_module._write_task(task)).encode()) == task


def test_errors_of_the_gym_pass_through_with_their_text(fake):
    _, _, remote = fake
    with pytest.raises(ValueError, match="^timeout must not be 13, got 13$"):
        remote.submit(Task(PROBLEM, "", timeout=13))
    with pytest.raises(KeyError, match=r"no task 'a b\?' in this gym"):
        remote.result("a b?")
    name = remote.submit(Task(PROBLEM, "never"))
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=rf"task '{name}' has not ended after 0\.2 s"):
        remote.result(name, timeout=0.2)
    assert 0.2 <= time.monotonic() - began < 3
    assert httpx.get(f"{remote.url}/tasks/{name}").json() == {"task_id": name, "ended": False}


GOOD = {"problem": {"name": "p", "source": SOURCE}, "code": ""}


@pytest.mark.parametrize(("change", "message"), [
    ({"trials": "20"}, "task: trials must be int, got '20'"),
    ({"trials": True}, "task: trials must be int, got True"),
    ({"trials": 0}, "trials must be >= 1, got 0"),
    ({"require_generated": 1}, "task: require_generated must be bool, got 1"),
    ({"timeout": None}, "task: timeout must be float, got None"),
    ({"baseline": "numba"}, "baseline must be one of eager, compile, got 'numba'"),
    ({"trails": 3}, "task has no field 'trails'; it has problem, code"),
    ({"problem": "p"}, "task: problem must be dict, got 'p'"),
    ({"problem": {"name": "p"}}, "problem lacks source"),
    ({"problem": {"name": "p", "source": "x = 1"}}, "problem 'p' lacks class Model"),
    ({"problem": {"name": "p", "source": SOURCE, "level": -1}}, "level must be >= 0, got -1"),
])
def test_a_bad_task_is_refused_with_the_offending_value(fake, change, message):
    answer = httpx.post(f"{fake[1].url}/tasks", json=GOOD | change)
    assert answer.status_code == 400 and message in answer.json()["error"] and fake[0].tasks == {}


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b'{"timeout": NaN}', b"[" * 100_000,
                                  b'{"problem": {}, "code": ' + b"9" * 10_000 + b"}", b'{"code": "\\ud800"}'])
def test_what_is_no_task_is_refused(fake, body):
    answer = httpx.post(f"{fake[1].url}/tasks", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"] and fake[2].evaluate(TASK).correct


def test_numbers_that_json_does_not_have_are_refused(fake):
    body = json.dumps(GOOD | {"timeout": math.inf}).encode()
    answer = httpx.post(f"{fake[1].url}/tasks", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"] == "the request is no JSON: JSON has no Infinity"


@pytest.mark.parametrize("wait", ["-1", "61", "nan", "inf"])
def test_a_poll_has_a_longest_time(fake, wait):
    name = fake[2].submit(TASK)
    assert httpx.get(f"{fake[1].url}/tasks/{name}/result?wait={wait}").status_code == 400


def test_a_task_that_is_too_large_is_refused_while_it_is_read():
    gym = FakeGym()
    with gym.serve(max_bytes=2000) as server, RemoteGym(server.url) as remote:
        assert remote.submit(TASK) == "task 0"
        with pytest.raises(ValueError, match="a task has at most 2000 bytes"):
            remote.submit(Task(PROBLEM, "x" * 2000))
        parts = (b" " * 1000 for _ in range(50))  # no length is announced
        answer = httpx.post(f"{server.url}/tasks", content=parts, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413


def test_strangers_are_kept_out():
    gym = FakeGym()
    with gym.serve(host="0.0.0.0", token="secret") as server:  # noqa: S104, S106
        url = server.url.replace("0.0.0.0", "127.0.0.1")  # noqa: S104
        for token in (None, "secreT", "secrets"):
            with RemoteGym(url, token=token) as remote, pytest.raises(PermissionError, match="this server needs its token"):
                remote.submit(TASK)
        with RemoteGym(url, token="secret") as remote:  # noqa: S106
            assert remote.evaluate(TASK).correct
        assert [httpx.get(f"{url}/{path}").status_code for path in ("info", "metrics", "records", "tasks/a", "health")] == [
            401, 401, 401, 401, 200]
    assert list(gym.tasks) == ["task 0"]


def test_a_web_page_cannot_send_tasks(fake):
    gym, server, _ = fake
    data = json.dumps(GOOD)
    assert httpx.post(f"{server.url}/tasks", content=data, headers={"Content-Type": "text/plain"}).status_code == 415
    for host in ("evil.example", "evil.example:80", ""):
        answer = httpx.post(f"{server.url}/tasks", json=GOOD, headers={"Host": host})
        assert answer.status_code in (400, 403)
    assert httpx.options(f"{server.url}/tasks", headers={"Origin": "http://evil.example"}).status_code == 405 and not gym.tasks


def test_when_too_many_wait_more_are_refused_until_there_is_room():
    gym = FakeGym(seconds=0.05)
    with gym.serve(max_waiting=2) as server, RemoteGym(server.url, patience=10) as remote:
        assert len({r.task_id for r in remote.map([TASK] * 8)}) == 8
        [remote.submit(Task(PROBLEM, "never")) for _ in range(2)]
        assert httpx.post(f"{server.url}/tasks", json=GOOD).status_code == 429
        remote.patience = 0.3
        with pytest.raises(TimeoutError, match=r"is busy for 0\.3 s: 2 tasks are waiting, more are not taken"):
            remote.submit(TASK)


def test_thirty_two_clients_at_once_get_each_its_own_result(fake):
    gym, server, _ = fake

    def ask(n):
        with RemoteGym(server.url) as remote:
            task = Task(PROBLEM, f"class ModelNew: {n}")
            result = remote.result(name := remote.submit(task))
            return result.task_id == name and gym.tasks[name] == task

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(ask, range(32))) and len(gym.records()) == 32


def test_small_packets_do_not_wait(fake):
    _, _, remote = fake
    remote.info()
    times = []
    for _ in range(30):
        began = time.perf_counter()
        remote.info()
        times.append(time.perf_counter() - began)
    assert sorted(times)[10] < 0.03  # 0.04 and more where each answer waits for a delayed acknowledgement


def test_a_repeated_request_makes_one_task(fake):
    gym, server, remote = fake
    for _ in range(3):
        assert httpx.post(f"{server.url}/tasks", json=GOOD, headers={"Idempotency-Key": "k"}).json() == {"task_id": "task 0"}
    send, lost = remote._client.request, []

    def loses(*args, **kwargs):
        answer = send(*args, **kwargs)
        if not lost:
            lost.append(answer)
            raise httpx.ReadError("lost")
        return answer

    remote._client.request = loses
    assert remote.submit(TASK) == "task 1" and len(gym.tasks) == 2


def test_a_monitor_reads_numbers(fake):
    _, server, remote = fake
    remote.evaluate(TASK)
    remote.submit(Task(PROBLEM, "never"))
    text = httpx.get(f"{server.url}/metrics").text
    assert 'collai_gym_records_total{status="ok"} 1\n' in text and "collai_gym_submitted_total 2\n" in text
    assert "collai_gym_waiting 1\n" in text and "collai_gym_workers 1\n" in text
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_nobody_there_is_said_with_the_url(fake):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with RemoteGym(url) as remote, pytest.raises(ConnectionError, match=f"no kernel gym at {url}"):
        remote.submit(TASK)
    with RemoteGym(f"{fake[1].url}/elsewhere") as remote, pytest.raises(RuntimeError, match="elsewhere/info answers 404"):
        remote.info()
    with pytest.raises(ValueError, match="url must begin with http:// or https://, got 'localhost:1'"):
        RemoteGym("localhost:1")


def test_stopping_ends_long_polls_and_frees_the_port():
    gym = FakeGym()
    server = gym.serve()
    port = int(server.url.rsplit(":", 1)[1])
    with RemoteGym(server.url, patience=0.5) as remote, ThreadPoolExecutor(1) as pool:
        name = remote.submit(Task(PROBLEM, "never"))
        waiting = pool.submit(remote.result, name)
        time.sleep(0.2)
        began = time.monotonic()
        server.close()
        assert time.monotonic() - began < 4
        with pytest.raises((ConnectionError, TimeoutError), match=r"127\.0\.0\.1"):
            waiting.result()
        server.wait()
        with gym.serve(port=port) as again, RemoteGym(again.url) as other:
            assert other.evaluate(TASK).correct
    with gym.serve() as taken, pytest.raises(OSError, match="in use"):
        gym.serve(port=int(taken.url.rsplit(":", 1)[1]))


def test_a_killed_server_is_a_connection_error():
    code = f"import sys; sys.path[:0] = {sys.path!r}; sys.path.insert(0, {str(Path(__file__).parent)!r})\n" \
           "import test_gym_server as t\ns = t.FakeGym().serve(); print(s.url, flush=True); s.wait()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        with RemoteGym(process.stdout.readline().strip()) as remote, ThreadPoolExecutor(1) as pool:
            assert remote.evaluate(TASK).correct
            waiting = pool.submit(remote.result, remote.submit(Task(PROBLEM, "never")))
            time.sleep(0.2)
            process.send_signal(signal.SIGKILL)
            with pytest.raises(ConnectionError, match=f"no kernel gym at {remote.url}"):
                waiting.result(10)


@pytest.mark.parametrize(("options", "message"), [
    ({"host": "0.0.0.0"}, "other computers reach '0.0.0.0': a server there needs a token"),  # noqa: S104
    ({"host": "judge.example"}, "other computers reach 'judge.example'"),
    ({"token": "two words"}, "a token is one word of ASCII characters"),
    ({"token": ""}, "a token is one word"),
    ({"max_waiting": 0}, "max_waiting must be > 0, got 0"),
    ({"max_bytes": -1}, "max_bytes must be > 0, got -1"),
    ({"port": -1}, "port must be 0 to 65535, got -1"),
    ({"port": 65536}, "port must be 0 to 65535, got 65536"),
])
def test_a_server_that_should_not_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FakeGym().serve(**options)


def test_half_a_character_travels_to_the_gym_and_back(fake):
    gym, _, remote = fake
    result = remote.evaluate(Task(PROBLEM, "x = '\ud83d'"))
    gym.ends[result.task_id] = dataclasses.replace(gym.ends[result.task_id], error="ValueError: \ud83d")
    assert gym.tasks[result.task_id].code == "x = '\ud83d'"
    assert [one.error for one in remote.records()] == ["ValueError: ?"]


def test_what_is_no_task_is_not_sent(fake):
    with pytest.raises(TypeError, match="task must be a Task, got str"):
        fake[2].submit("x")
    assert not fake[0].tasks


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_a_closed_gym_cannot_be_served():
    gym = KernelGym()
    gym.close()
    with pytest.raises(RuntimeError, match="the gym is closed"):
        gym.serve()


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ImportError, match=r"needs the extra \[server\]: pip install collai\[server\]"):
        FakeGym().serve()
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(ImportError, match=r"needs the extra \[server\]: pip install collai\[server\]"):
        RemoteGym("http://localhost:1")
