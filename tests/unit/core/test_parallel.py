"""Properties of `collai.core.parallel`: same numbers for any workers, errors with an index, no orphans."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.core import parallel
from collai.core.parallel import imap_unordered, item_seed, pmap

SCRIPT = r"""
import os, sys, time
from collai.core.parallel import pmap
def work(x):
    os.write(1, b"%d\n" % os.getpid())
    time.sleep(60)
pmap(work, range(4), workers=2, engine=sys.argv[1])
"""


def square(x):
    return x * x


def draw(size, seed_i):
    time.sleep(0.001 * (size % 4))
    return np.random.default_rng(seed_i).integers(0, 2**40, size).tolist()


def reciprocal(x):
    return 1 / x


class NoReturn(Exception):
    def __init__(self, code, reason):
        super().__init__(f"{code} {reason}")


def refuse(x):
    raise NoReturn(x, "does not travel")


def place(_):
    return os.getpid(), threading.get_ident()


def nested(_):
    return place(0), pmap(place, range(4), workers=4), pmap(place, range(4), engine="threads")


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until_gone(pids, seconds=20.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(map(is_running, pids)):
        time.sleep(0.05)
    return [pid for pid in pids if is_running(pid)]


def start_caller(engine="local", lines=2):
    caller = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, engine],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    return caller, {int(caller.stdout.readline()) for _ in range(lines)}


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(0, 2**70), st.integers(1, 5))
@settings(deadline=None, derandomize=True, max_examples=20)
def test_threads_give_the_plain_loop(sizes, seed, workers):
    expected = [draw(size, item_seed(seed, i)) for i, size in enumerate(sizes)]
    assert pmap(draw, sizes, engine="threads", workers=workers, seed=seed) == expected


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_processes_give_the_plain_loop(workers):
    sizes = [7 * i % 13 for i in range(20)]
    expected = [draw(size, item_seed(5, i)) for i, size in enumerate(sizes)]
    assert pmap(draw, sizes, workers=workers, seed=5) == expected
    assert pmap(draw, (size for size in sizes), workers=workers, seed=5) == expected


@pytest.mark.parametrize(("engine", "workers"), [("local", 1), ("local", 2), ("threads", 3)])
def test_results_that_come_as_they_finish_are_those_of_the_plain_loop(engine, workers):
    sizes = [7 * i % 13 for i in range(20)]
    came = list(imap_unordered(draw, sizes, engine=engine, workers=workers, seed=5))
    assert dict(came) == {i: draw(size, item_seed(5, i)) for i, size in enumerate(sizes)} and len(came) == 20


def test_a_slow_item_blocks_no_other():
    came = imap_unordered(lambda x: time.sleep(1.5 if x == 0 else 0), range(3), engine="threads", workers=2)
    assert [i for i, _ in came] == [1, 2, 0]


def test_results_that_come_as_they_finish_are_refused_at_once_and_errors_name_their_item():
    with pytest.raises(ValueError, match="workers must be >= 1, got 0"):
        imap_unordered(square, [1], workers=0)
    with pytest.raises(TypeError, match="fn must be callable"):
        imap_unordered(3, [1])
    came = imap_unordered(reciprocal, [1, 0, 2], workers=1)
    assert next(came) == (0, 1.0)
    with pytest.raises(ZeroDivisionError) as caught:
        next(came)
    assert "pmap: item 1" in caught.value.__notes__


def test_default_worker_numbers_give_the_plain_loop():
    assert pmap(square, range(5)) == [0, 1, 4, 9, 16]
    assert pmap(square, range(5), engine="threads") == [0, 1, 4, 9, 16]


def test_local_functions_and_lambdas_travel():
    offset = 10

    def shift(x):
        return x + offset

    assert pmap(shift, range(3), workers=2) == [10, 11, 12]
    assert pmap(lambda x: x + offset, range(3), workers=2) == [10, 11, 12]


def test_no_items_give_an_empty_list():
    assert pmap(square, [], workers=2) == []
    assert pmap(square, iter(()), workers=2) == []


def test_one_worker_runs_in_process():
    assert pmap(place, range(3), workers=1) == [place(0)] * 3


def test_two_workers_run_elsewhere_at_the_same_time():
    seen = pmap(lambda _: (time.sleep(0.3), os.getpid())[1], range(4), workers=2)
    assert os.getpid() not in seen and len(set(seen)) == 2


def test_threads_wait_side_by_side():
    barrier = threading.Barrier(8, timeout=20)
    assert sorted(pmap(lambda _: barrier.wait(), range(8), engine="threads", workers=8)) == [*range(8)]


@given(st.integers(0, 2**80), st.integers(0, 10**6))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_item_seed_is_the_spawned_sequence_cut_to_63_bits(seed, index):
    sequence = np.random.SeedSequence(seed, n_children_spawned=index).spawn(1)[0]
    assert item_seed(seed, index) == int(sequence.generate_state(1, np.uint64)[0]) // 2
    assert 0 <= item_seed(seed, index) < 2**63


def test_neighbouring_seeds_and_items_share_no_seed():
    seeds = {item_seed(s, i) for s in range(40) for i in range(50)}
    assert len(seeds) == 2000


@pytest.mark.parametrize("engine", ["local", "threads"])
def test_errors_keep_their_type_and_name_their_item(engine):
    with pytest.raises(ZeroDivisionError) as caught:
        pmap(reciprocal, [3, 2, 0, 1], engine=engine, workers=2)
    assert "pmap: item 2" in caught.value.__notes__


def test_errors_in_process_name_their_item():
    with pytest.raises(ZeroDivisionError) as caught:
        pmap(reciprocal, [3, 0, 1], workers=1)
    assert caught.value.__notes__ == ["pmap: item 1"]


def test_an_error_does_not_wait_for_the_other_items():
    def stop_or_sleep(x):
        if x == 1:
            raise KeyError("stop")
        time.sleep(60)

    start = time.monotonic()
    with pytest.raises(KeyError):
        pmap(stop_or_sleep, range(6), workers=2)
    assert time.monotonic() - start < 30
    assert pmap(square, range(4), workers=2) == [0, 1, 4, 9]


def test_an_error_that_cannot_travel_arrives_as_text():
    with pytest.raises(RuntimeError, match="NoReturn: 4 does not travel") as caught:
        pmap(refuse, [4, 4], workers=2)
    assert caught.value.__notes__[0].startswith("pmap: item ")
    with pytest.raises(NoReturn):
        pmap(refuse, [4, 4], engine="threads", workers=2)


def test_an_error_of_the_generator_arrives():
    def items():
        yield from range(9)
        raise LookupError("no more")

    for engine in ("local", "threads"):
        for workers in (1, 2):
            with pytest.raises(LookupError, match="no more"):
                pmap(square, items(), engine=engine, workers=workers)


def test_a_worker_that_dies_is_an_error_not_a_hang():
    with pytest.raises(Exception, match="terminated"):
        pmap(lambda x: os._exit(3), range(4), workers=2)
    assert pmap(square, range(4), workers=2) == [0, 1, 4, 9]


def test_a_result_that_cannot_travel_is_an_error():
    with pytest.raises(Exception, match="pickle"):
        pmap(lambda x: threading.Lock(), range(4), workers=2)


@pytest.mark.parametrize("engine", ["local", "threads"])
def test_nested_calls_stay_in_their_worker(engine):
    for outer, *inner in pmap(nested, range(3), engine=engine, workers=2):
        assert all(one == outer for places in inner for one in places)
    assert len({pid for pid, _ in pmap(place, range(4), workers=1)}) == 1


def test_workers_die_when_the_caller_is_killed():
    caller, pids = start_caller()
    assert len(pids) == 2 and all(map(is_running, pids))
    caller.kill()
    caller.wait()
    caller.stdout.close()
    assert wait_until_gone(pids) == []


@pytest.mark.parametrize("whole_group", [True, False])
def test_an_interrupt_leaves_no_worker(whole_group):
    caller, pids = start_caller()
    children = {child.pid for child in psutil.Process(caller.pid).children(recursive=True)}
    assert pids <= children
    if whole_group:
        os.killpg(caller.pid, signal.SIGINT)
    else:
        caller.send_signal(signal.SIGINT)
    assert caller.wait(timeout=60) != 0
    caller.stdout.close()
    assert wait_until_gone(pids | children) == []


def test_an_interrupt_ends_threads():
    caller, pids = start_caller("threads")
    assert pids == {caller.pid}
    caller.send_signal(signal.SIGINT)
    assert caller.wait(timeout=60) != 0
    caller.stdout.close()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"workers": 0}, ValueError, r"workers must be >= 1, got 0"),
        ({"workers": -3}, ValueError, r"workers must be >= 1, got -3"),
        ({"workers": 1.5}, TypeError, r"workers must be an integer, got 1\.5"),
        ({"engine": "x"}, ValueError, r"engine must be 'local', 'threads' or 'ray', got 'x'"),
        ({"engine": "ray"}, ImportError, r"engine='ray' needs the extra \[ray\]"),
        ({"seed": -1}, ValueError, r"seed must be >= 0, got -1"),
        ({"seed": 0.5}, TypeError, r"seed must be an integer, got 0\.5"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        pmap(square, [1, 2], **options)


def test_bad_functions_items_and_seeds_are_refused():
    with pytest.raises(TypeError, match="fn must be callable, got 3"):
        pmap(3, [1])
    with pytest.raises(TypeError, match="not iterable"):
        pmap(square, 3)
    with pytest.raises(ValueError, match="seed must be >= 0, got -2"):
        item_seed(-2, 0)
    with pytest.raises(ValueError, match="index must be >= 0, got -1"):
        item_seed(0, -1)


def test_sets_strings_and_descriptions_are_accepted():
    assert pmap(square, (x for x in range(3)), workers=1, desc="squares") == [0, 1, 4]
    assert pmap(str.upper, "abc", workers=np.int64(1), desc="upper") == ["A", "B", "C"]
    assert pmap(square, {3}, workers=2) == [9]
    assert pmap(draw, [2], workers=1, seed=np.int64(4)) == pmap(draw, [2], workers=1, seed=4)


def test_the_worker_side_in_this_process(monkeypatch):
    started = []
    monkeypatch.setattr(parallel, "_end_with", started.append)
    with pytest.raises(RuntimeError, match="NoReturn: 1 does not travel"):
        parallel._call(refuse, (1,), 7, caller=-1)
    with pytest.raises(ZeroDivisionError):
        parallel._call(reciprocal, (0,), 7, caller=-1)
    assert started == [-1, -1]


def test_the_watch_ends_a_process_whose_caller_is_another():
    ended = threading.Event()
    real_exit, os._exit = os._exit, lambda code: ended.set()
    try:
        parallel._end_with(os.getppid() + 1)
        assert ended.wait(5)
    finally:
        os._exit = real_exit


def test_import_is_light():
    code = "import sys, collai.core.parallel; print({'numpy', 'joblib', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
