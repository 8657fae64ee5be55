"""Every way in which a candidate can end, a clock and numbers that it can't reach, and a gym that loses nothing."""
import contextlib
import dataclasses
import gc
import itertools
import json
import math
import os
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import config

from collai.core import sandbox
from collai.drkernel import gym as module
from collai.drkernel.ckernel import cjit
from collai.drkernel.gym import STATUSES, EvalResult, KernelGym, Task, measure, roofline_floor, static_flags
from collai.drkernel.problems import Problem, builtin_problems

pytestmark = pytest.mark.skipif(sys.platform != "linux" or bool(sandbox.missing_layers()), reason="needs all layers")
PROBLEM = {p.name: p for p in builtin_problems()}["scale_bias_relu"].with_sizes(ROWS=16, COLS=32)
KILLED_TASKS = 100 if os.environ.get("PROFILE") == "full" else 30

CANDIDATE = '''
import ctypes, os, sys, time
import torch
from torch import nn
from collai.drkernel.ckernel import cjit
K = cjit(r"""
void f(const float *x, const float *w, const float *b, float *y, long rows, long cols) {
    for (long i = 0; i < rows * cols; i++) {
        float v = x[i] * w[i % cols] + b[i % cols];
        y[i] = v > 0 ? v : 0;
    }
}
void spin(void) { for (volatile long i = 0;; i++); }
void copy(const float *x, float *y, long n) { for (long i = 0; i < n; i++) y[i] = x[i]; }
""")
TOP
class ModelNew(nn.Module):
    def __init__(self, cols):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(cols))
        self.bias = nn.Parameter(torch.randn(cols))
        INIT

    def forward(self, x):
        BEFORE
        y = torch.empty_like(x)
        K.f(x, self.weight, self.bias, y, *x.shape)
        AFTER
        return y
'''
TORCH = "y = torch.relu(x * self.weight + self.bias)"


def unseen(text):
    """The same at run time, where no look at the source finds it."""
    return f"exec({text!r})"


def candidate(top="", init="pass", before="pass", after="pass"):
    """An honest source, changed in one place."""
    text = CANDIDATE.replace("TOP", top)
    for name, lines in (("INIT", init), ("BEFORE", before), ("AFTER", after)):
        text = text.replace(name, lines.strip().replace("\n", "\n        "))
    return text


def task(code, problem=PROBLEM, **options):
    """A task with few trials."""
    return Task(problem, code, **{"trials": 5, "correctness_trials": 1, "timeout": 20, **options})


def stat(pid):
    """State, parent and so on of a process; None when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None


def gone(pid):
    """Whether a process is dead, if perhaps not yet collected by init."""
    return (words := stat(pid)) is None or words[0] in b"ZX"


def family(pid):
    """All processes below a process."""
    try:
        text = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    except OSError:
        return set()
    children = set(map(int, text.split()))
    return children.union(*map(family, children))


def soon(condition, seconds=10.0):
    """Wait for a condition; whether it came."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.03)
    return True


def kill(*pids, sign=signal.SIGKILL):
    """Send a signal to processes that may have just ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, sign)


def complete(gym, old=()):
    """Whether as many workers live as there should be, none of them an old one."""
    pids = gym.worker_pids()
    return len(pids) == gym.workers and not {*pids} & {*old} and not any(map(gone, pids))


def processes(gym):
    """The zygote, and what it forked besides workers: candidates and references."""
    zygote = gym._zygote.pid
    return zygote, family(zygote) - set(gym.worker_pids())


@pytest.fixture(scope="module", autouse=True)
def kernels(tmp_path_factory):
    """A folder of kernels of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLLAI_KERNELS", str(tmp_path_factory.mktemp("kernels")))
        yield


@pytest.fixture(scope="module")
def gym(kernels):
    """A plain gym, one worker."""
    with KernelGym() as made:
        yield made


@pytest.fixture(scope="module")
def fleet(kernels, tmp_path_factory):
    """Two workers, a durable queue, little memory, no cache."""
    with KernelGym(2, queue=tmp_path_factory.mktemp("fleet") / "q.db", memory_mb=400, cache=False) as made:
        yield made


# --- verdicts ---------------------------------------------------------------------------------------------------------

def test_an_honest_kernel_is_ok_and_everything_about_it_is_told(gym):
    result = gym.evaluate(task(candidate(), trials=20, correctness_trials=5))
    assert (result.status, result.flags, result.error, result.sandbox) == ("ok", (), None, "full")
    assert result.compiled and result.correct and not result.hacked and not result.cached and result.attempts == 1
    low, high = result.speedup_ci
    assert 0 < low <= result.speedup <= high and result.ref_ms > 0 < result.new_ms and 0 <= result.max_err < 1e-6
    assert 0 < result.coverage <= 1 and 0 <= result.coverage_displaced <= 1
    events = result.profile["events"]
    assert [(name, made, matters) for name, _, made, matters in events if made] == [("f", True, True)]
    assert result.profile["bytes_min"] == 4 * (2 * 16 * 32 + 2 * 32)
    of_kernels = sum(us for _, us, made, _ in events if made)
    assert result.coverage == pytest.approx(of_kernels / sum(us for _, us, *_ in events))
    spent, reference = result.profile["torch_new_us"], result.profile["torch_ref_us"]
    assert result.coverage_displaced == pytest.approx(min(max(1 - spent / reference, 0), 1))
    assert json.loads(json.dumps(dataclasses.asdict(result)))["task_id"] == result.task_id


C_ERROR = candidate().replace("float v =", "flot v =")
SPREAD = """
import torch
class Own(torch.Tensor): pass
"""
ENDS = {
    # name: (source, status, flag, error, options)
    "no Python": ("def (:", "compile_error", "", "SyntaxError", {}),
    "a NUL in the source": ("class ModelNew: pass\0", "compile_error", "", "null byte", {}),
    "half a character": ("class ModelNew: '\ud800'", "compile_error", "", "surrogate", {}),
    "too deep": ("class ModelNew: x = " + "(" * 5000 + ")" * 5000, "compile_error", "", "", {}),
    "more than 1 MiB": (candidate() + "#" * (1 << 20), "compile_error", "", "exceeds 1 MiB", {}),
    "no ModelNew": (candidate().replace("ModelNew", "Model"), "compile_error", "", "lacks class ModelNew", {}),
    "empty": ("", "compile_error", "", "lacks class ModelNew", {}),
    "C that is no C": (C_ERROR, "compile_error", "", "flot", {}),
    "too much C": (candidate().replace("void spin", "#define A(x) x x x x x x x x x x\n#define B A(A(A(A(A(A(A(y[0]+=1;)))))))\n"
                                       "void slow(float *y) { B }\nvoid spin"), "compile_error", "", "", {}),
    "an error at import": (candidate("1 / 0"), "runtime_error", "", "ZeroDivisionError: division by zero", {}),
    "an unknown module": (candidate("import no_such"), "runtime_error", "", "No module named 'no_such'", {}),
    "an error in __init__": (candidate(init="self.x"), "runtime_error", "", "AttributeError", {}),
    "an error in forward": (candidate(before="raise KeyError('k')"), "runtime_error", "", "KeyError: 'k'", {}),
    "an exit": (candidate(before="sys.exit(0)"), "runtime_error", "", "SystemExit", {}),
    "an interrupt": (candidate(before="raise KeyboardInterrupt"), "runtime_error", "", "KeyboardInterrupt", {}),
    "an error without words": (candidate("class E(Exception):\n    def __str__(self): raise self", before="raise E"),
                               "runtime_error", "", "E", {}),
    "deep recursion": (candidate(before="self.forward(x)"), "runtime_error", "", "RecursionError", {}),
    "no module": (candidate() + "class ModelNew:\n    def __init__(self, cols): pass", "runtime_error", "",
                  "must build a torch.nn.Module", {}),
    "other arguments": (candidate().replace("def __init__(self, cols)", "def __init__(self)").replace("(cols)", "(32)"),
                        "runtime_error", "", "TypeError", {}),
    "a wrong type for C": (candidate(before="x = x.double()"), "runtime_error", "", "TypeError", {}),
    "a fork": (candidate(before="os.fork()"), "runtime_error", "", "PermissionError", {}),
    "a program": (candidate("import subprocess; subprocess.run(['true'])"), "runtime_error", "", "PermissionError", {}),
    "a socket": (candidate("import socket; socket.socket()"), "runtime_error", "", "PermissionError", {}),
    "reading elsewhere": (candidate(init="open('/etc/shadow')"), "runtime_error", "", "PermissionError", {}),
    "writing elsewhere": (candidate(before="open('/tmp/hack', 'w')"), "runtime_error", "", "PermissionError", {}),
    "writing packages": (candidate("open(torch.__file__, 'a')"), "runtime_error", "", "PermissionError", {}),
    "killing its parent": (candidate("os.kill(os.getppid(), 9)"), "runtime_error", "", "PermissionError", {}),
    "a wrong number": (candidate(after="y[3, 4] += 1e-3"), "incorrect", "", "largest error", {}),
    "half of the rows": (candidate(after="y[8:] = 0"), "incorrect", "", "largest error", {}),
    "low precision": (candidate(after="y = y.bfloat16().float()"), "incorrect", "", "largest error", {}),
    "nothing written": (candidate(after="y = torch.empty_like(x)"), "incorrect", "", "", {}),
    "a NaN": (candidate(after="y[0, 0] = float('nan')"), "incorrect", "", "NaN or infinity", {}),
    "an infinity": (candidate(after="y[5, 0] = float('inf')"), "incorrect", "", "infinity|inf times", {}),
    "another shape": (candidate(after="return y[None]"), "incorrect", "output_type", r"shape \(1, 16, 32\), expected \(16, 32\)", {}),
    "a row less": (candidate(after="return y[1:]"), "incorrect", "output_type", r"shape \(15, 32\)", {}),
    "another dtype": (candidate(after="return y.double()"), "incorrect", "output_type", "dtype torch.float64", {}),
    "another device": (candidate(after="return y.to('meta')"), "incorrect", "output_type", "device meta", {}),
    "None": (candidate(after="return None"), "incorrect", "output_type", "NoneType", {}),
    "an array": (candidate(after="return y.numpy()"), "incorrect", "output_type", "ndarray", {}),
    "two outputs": (candidate(after="return y, y.clone()"), "incorrect", "output_type", "2 outputs|tuple, expected a tensor", {}),
    "no outputs": (candidate(after="return ()"), "incorrect", "output_type", "must return tensors", {}),
    "a subclass": (candidate(SPREAD, after="return y.as_subclass(Own)"), "incorrect", "output_type", "Own", {}),
    "a parameter": (candidate(after="return nn.Parameter(y, False)"), "incorrect", "output_type", "Parameter", {}),
    "a sparse tensor": (candidate(after="return y.to_sparse()"), "incorrect", "output_type", "sparse", {}),
    "its input": (candidate(after="return x"), "incorrect", "output_alias", "shares memory with an input", {}),
    "a view of its input": (candidate(after="return x[:, :].view(16, 32)"), "incorrect", "output_alias", "input", {}),
    "its parameter": (candidate(after="return self.weight.data.expand(16, 32)"), "incorrect", "output_alias", "parameter", {}),
    "torch alone": (candidate(after=TORCH).replace("K.f(", "(lambda *a: 0)("), "hacked", "no_generated_kernel", "", {}),
    "a kernel beside it": (candidate(after=f"K.copy(x, y, x.numel())\n{TORCH}"), "hacked", "no_generated_kernel", "", {}),
    "an unfair fallback": (candidate(before=f"try:\n    K.f(x)\nexcept TypeError:\n    {TORCH}\n    return y"),
                           "hacked", "no_generated_kernel", "", {}),
    "a patched comparison": (candidate("torch.allclose = lambda *a, **k: True"), "hacked", "forgery", "", {}),
    "a byte on the pipe": (candidate(before="os.write(4, b'd')"), ("hacked", "incorrect"), "", "", {}),
    "a word on the pipe": (candidate("os.write(4, b'ok')"), "hacked", "protocol_violation", "unexpected", {}),
    "a huge request": (candidate("os.write(4, b'q\\xff\\xff\\xff\\x7f')"), "hacked", "protocol_violation", "too long", {}),
    "forever in Python": (candidate(before="while True: pass"), "timeout", "", "not done in time", {"timeout": 0.4}),
    "forever in C": (candidate(before="K.spin()"), "timeout", "", "", {"timeout": 0.4}),
    "forever at import": (candidate("while True: pass"), "timeout", "", "", {"timeout": 0.4}),
    "forever in __init__": (candidate(init="time.sleep(1e6)"), "timeout", "", "", {"timeout": 0.4}),
    "a stop": (candidate(before="import signal; os.kill(os.getpid(), signal.SIGSTOP)"), "timeout", "", "", {"timeout": 0.4}),
    "an order taken away": (candidate(before="os.read(3, 1)"), "timeout", "", "", {"timeout": 0.4}),
    "a thread": (candidate("import threading; threading.Thread(target=print).start()"), "runtime_error", "", "thread", {}),
    "memory at once": (candidate("bytearray(64 << 30)"), "oom", "", "MemoryError", {}),
    "a tensor at once": (candidate(before="torch.empty(1 << 36)"), "oom", "", "", {}),
    "much output": (candidate("import sys\nwhile True: sys.stdout.write('x' * 65536)"), "runtime_error", "", "", {}),
    "disk": (candidate("for i in range(999): open(f'f{i}', 'wb').write(bytes(1 << 22))\nwhile True: pass"),
             "runtime_error", "", "disk", {}),
    "a large file": (candidate("f = open('f', 'wb')\nwhile True: f.write(bytes(1 << 22))"), "runtime_error", "", "", {}),
    "forks": (candidate("while True:\n    try: os.fork()\n    except OSError: pass"), "timeout", "", "", {"timeout": 0.4}),
    "threads": (candidate("import threading\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()"),
                "runtime_error", "", "", {}),
}


CATASTROPHES = ("forks", "threads", "disk", "forever in C", "memory at once", "much output")


@pytest.mark.parametrize("name", ENDS)
def test_a_candidate_ends_as(name, gym):
    code, status, flag, error, options = ENDS[name]
    began = time.monotonic()
    result = gym.evaluate(task(code, **options))
    spent = time.monotonic() - began
    assert result.status in ((status,) if isinstance(status, str) else status), (result.error, result.flags)
    assert not flag or flag in result.flags
    assert error == "" or re.search(error, result.error or ""), result.error
    assert result.correct == (result.status == "hacked" and flag in ("no_generated_kernel", "forgery"))
    assert result.correct or result.speedup == 0 == max(result.speedup_ci)
    assert result.hacked == (result.status == "hacked") and result.attempts == 1
    assert spent < options.get("timeout", 6) + 4
    if name in CATASTROPHES:  # what comes next does not feel it
        began = time.monotonic()
        after = gym.evaluate(task(candidate(f"# after {name}")))
        assert (after.status, after.flags, after.attempts) == ("ok", (), 1) and time.monotonic() - began < 2


CRASHES = {
    "a wild pointer": ("ctypes.string_at(1)", "SIGSEGV"),
    "an exit code of 0": ("os._exit(0)", "exit code 0"),
    "an exit code of 7": ("os._exit(7)", "exit code 7"),
    "an abort": ("os.abort()", "SIGABRT"),
    "a signal to itself": ("os.kill(os.getpid(), 9)", "SIGKILL"),
    "closed pipes": ("os.closerange(0, 60)", "without an answer"),
}


@pytest.mark.parametrize("name", CRASHES)
@pytest.mark.parametrize("where", ["top", "before"])
def test_a_crash_is_tried_once_more_and_then_final(name, where, gym):
    line, error = CRASHES[name]
    result = gym.evaluate(task(candidate(**{where: line})))
    assert (result.status, result.attempts, result.correct) == ("crashed", 2, False) and error in result.error
    assert result.compiled == (where == "before")


def test_a_closed_pipe_and_no_end_is_no_fault_of_the_gym(gym):
    began = time.monotonic()
    result = gym.evaluate(task(candidate(before="os.close(4)\nwhile True: pass"), timeout=1))
    assert result.status in ("crashed", "timeout", "hacked") and time.monotonic() - began < 8


def test_writing_to_the_inputs_is_found(gym):
    result = gym.evaluate(task(candidate(after="x.zero_()")))
    assert not result.correct and "input_mutation" in result.flags and result.attempts == 1


def test_memory_that_grows_is_oom(fleet):
    grows = "keep = []\nwhile True: keep.append(bytes([1]) * (1 << 24))"
    touched = "keep = []\nwhile True: keep.append(torch.ones(1 << 22))"
    for top in (grows, touched):
        assert fleet.evaluate(task(candidate(top))).status == "oom"
    enough = fleet.evaluate(task(candidate("keep = torch.ones(50 << 18)")))  # 50 MiB
    assert enough.status == "ok"


FILL = """
import mmap
for k in range(3):
    region = mmap.mmap(6, 1 << 28, offset=k << 28)
    for i in range(0, 1 << 28, 4096): region[i] = 1
    region.close()
"""


def test_the_output_region_is_no_store_of_memory(fleet):
    fleet.evaluate(task(candidate(FILL)))
    fds = [f"/proc/{pid}/fd/{n}" for pid in fleet.worker_pids() for n in os.listdir(f"/proc/{pid}/fd")]
    held = {found.st_ino: found.st_blocks * 512 for fd in fds if "memfd" in os.readlink(fd) for found in [os.stat(fd)]}
    assert sum(held.values()) < 400 << 20


def test_a_problem_that_fails_is_an_infra_error_and_no_fault_of_the_candidate(gym):
    broken = PROBLEM.source.replace("return torch.relu", "raise ValueError('broken reference')\n        return torch.relu")
    result = gym.evaluate(task(candidate(), Problem.from_source(broken, name="broken")))
    assert result.status == "infra_error" and "broken reference" in result.error and not result.hacked
    assert gym.evaluate(task(candidate("# after a broken problem"))).status == "ok"


@pytest.mark.parametrize("place", ["get_inputs():", "forward(self, x):"])
def test_an_error_of_a_problem_names_the_problem(place, gym):
    broken = PROBLEM.source.replace(f"def {place}", f"def {place}\n        raise OSError('no data')" if "self" in place
                                    else f"def {place}\n    raise OSError('no data')")
    result = gym.evaluate(task(candidate(), Problem.from_source(broken, name="my own")))
    assert result.status == "infra_error" and result.error.startswith("problem 'my own': OSError: no data"), result.error


def test_what_the_judge_does_is_not_on_the_candidates_time(gym):
    slow = PROBLEM.source.replace("def get_inputs():", "def get_inputs():\n    import time; time.sleep(0.25)")
    result = gym.evaluate(task(candidate(), Problem.from_source(slow, name="slow"), timeout=1.0, correctness_trials=3))
    assert (result.status, result.flags) == ("ok", ()), result.error


# --- fairness ---------------------------------------------------------------------------------------------------------

USELESS, USED = "K.copy(x, torch.empty_like(x), x.numel())", "z = torch.empty_like(y); K.copy(y, z, y.numel()); y = z"
DECOYS = {
    "a copy nobody reads": (candidate(after=USELESS), ["f"], True),
    "the same before": (candidate(before=USELESS), ["f"], True),
    "a copy that is read": (candidate(after=USED), ["copy", "f"], False),
    "one of two launches": (candidate(before=USELESS, after=USED), ["copy", "f"], True),
}


@pytest.mark.parametrize("name", DECOYS)
def test_only_launches_that_matter_count(name, gym):
    code, matter, decoy = DECOYS[name]
    result = gym.evaluate(task(code))
    kept = [event for event in result.profile["events"] if event[3]]
    assert (result.status, "decoy" in result.flags) == ("ok", decoy) and sorted(event[0] for event in kept) == matter
    assert result.coverage == pytest.approx(sum(e[1] for e in kept) / sum(e[1] for e in result.profile["events"]))


def test_a_launch_without_which_there_is_no_end_matters(gym):
    began = time.monotonic()
    result = gym.evaluate(task(candidate(after="while not torch.isfinite(y).all(): pass"), timeout=1))
    assert (result.status, result.flags) == ("ok", ()) and time.monotonic() - began < 5


def test_torch_alone_is_a_baseline_where_that_is_asked_for(gym):
    result = gym.evaluate(task(ENDS["torch alone"][0], require_generated=False))
    assert (result.status, result.flags, result.coverage) == ("ok", (), 0.0) and result.coverage_displaced < 1


STALE = {
    "the first answer for ever": ("self.y = None", "if self.y is not None: return self.y.clone()", "self.y = y.clone()"),
    "by address": ("self.y = {}", "if x.data_ptr() in self.y: return self.y[x.data_ptr()].clone()",
                   "self.y[x.data_ptr()] = y.clone()"),
    "by identity": ("self.y = {}", "if id(x) in self.y: return self.y[id(x)].clone()", "self.y[id(x)] = y.clone()"),
    "after four calls": ("self.n, self.y = 0, None", "self.n += 1\nif self.n > 4: return self.y.clone()", "self.y = y.clone()"),
}


@pytest.mark.parametrize("name", STALE)
def test_an_answer_to_earlier_contents_is_stale(name, gym):
    init, before, after = STALE[name]
    result = gym.evaluate(task(candidate(init=init, before=before, after=after), trials=8, correctness_trials=2))
    assert (result.status, result.flags, result.correct) == ("incorrect", ("stale_output",), False)
    assert result.speedup == 0.0 and "timed call" in result.error


def test_a_cache_by_a_look_at_the_contents_is_refused(gym):
    cache = candidate("CACHE = {}", before="key = len(CACHE) and 1\nif key in CACHE: return CACHE[key].clone()",
                      after="CACHE[1] = y.clone()")
    result = gym.evaluate(task(cache, correctness_trials=3))  # across instances: no fresh instance gets the old answer
    assert result.status == "incorrect" and "trial 2" in result.error


LATE = """
def late(output):
    end = time.perf_counter() + 5e-3
    while time.perf_counter() < end: pass
    return KEPT(output)
space = vars(sys.modules["collai.drkernel.gym"])
KEPT, space["output_tensors"] = space["output_tensors"], late
"""
BUSY = """
import threading
def burn():
    while True: sum(range(1000))
threading.Thread(target=burn, daemon=True).start()
"""


def test_work_at_handing_in_is_paid(gym):
    late = gym.evaluate(task(candidate(unseen(LATE))))
    assert (late.status, late.flags) == ("ok", ()) and late.new_ms > 4.5 and late.speedup < 0.5


# what it answers to: the kernel runs only when the judge asks for a copy of the outputs
DEFERRED = """
import sys
g = sys.modules["collai.drkernel.gym"]
own, said = g._copy_out, g._hand_in
def later(count):
    g._HELD["calls"] = []
    return said()
def copy_out():
    g._HELD["calls"] = [g._HELD["model"](*one) for one in g._HELD["sets"]]
    return own()
g._forward, g._copy_out = later, copy_out
"""
# it says that it is done, where the output will stand, and goes on
EARLY = """
import json, sys
g = sys.modules["collai.drkernel.gym"]
forward, write = g._forward, g._write_fd
def early(count):
    model, x = g._HELD["model"], g._HELD["sets"][0][0]
    y = g._HELD["y"] = torch.empty_like(x)
    g._claim({"outputs": [[y.data_ptr(), *y.stride()]]})
    write(4, b"d")
    end = time.perf_counter() + 3e-3
    while time.perf_counter() < end: pass
    K.f(x, model.weight, model.bias, y, *x.shape)
    g._write_fd = lambda *a: setattr(g, "_write_fd", write)
    return b"d"
g._forward = early
"""


def test_nothing_runs_after_the_answer(gym):
    honest = gym.evaluate(task(candidate()))
    for text in (DEFERRED, EARLY):
        result = gym.evaluate(task(candidate(unseen(text)), trials=10))
        charged = result.status == "ok" and result.new_ms > 2.5  # it went on while the judge waited for its turn
        assert charged or (result.status == "incorrect" and result.speedup == 0.0), result
    assert honest.status == "ok"


class Copying(KernelGym):
    """A gym on a machine where no process may read another one's memory."""

    def _hire(self, number):
        self.options["reads"] = False
        return super()._hire(number)


def test_where_memory_cant_be_read_work_in_the_copy_is_paid(kernels):
    with Copying() as gym:
        assert gym.evaluate(task(candidate())).status == "ok"
        wrong = gym.evaluate(task(candidate(after="y[3, 4] += 1e-3")))
        late = gym.evaluate(task(candidate(unseen(DEFERRED.replace("    return own()", "    time.sleep(5e-3)\n    return own()"))),
                                 correctness_trials=2))
    assert wrong.status == "incorrect" and late.new_ms > 4.5 and late.speedup < 0.5
    assert late.status == "hacked" and "deferred_work" in late.flags, late.error


SPANS = {"another address": ("[[1 << 40, 32, 1]]", "can't be read"), "no address": ("[]", "no word"),
         "a negative one": ("[[-8, 32, 1]]", "no word"), "text": ("[['0', 32, 1]]", "no word"), "truth": ("[[True, 32, 1]]", "no word"),
         "a stride too few": ("[[p, 32]]", "no word"), "far strides": ("[[p, 1 << 30, 1]]", "spread over"),
         "no list": ("7", "no word"), "more than one": ("[[p, 32, 1]] * 2", "no word")}


@pytest.mark.parametrize("name", SPANS)
def test_a_claimed_place_must_fit_the_output(name, gym):
    text, error = SPANS[name]
    forged = f"""
import sys
g = sys.modules["collai.drkernel.gym"]
own = g._claim
def claim(message):
    if "outputs" in message:
        p = message["outputs"][0][0]
        message = {{"outputs": {text}}}
    own(message)
g._claim = claim
"""
    result = gym.evaluate(task(candidate(unseen(forged))))
    assert (result.status, result.flags) == ("incorrect", ("output_type",)) and error in result.error
    assert gym.evaluate(task(candidate(f"# after {name}"))).status == "ok"


LAYOUTS = {"turned": "y = y.t().contiguous().t()", "a column of pairs": "z = torch.empty(16, 32, 2); z[..., 0] = y; y = z[..., 0]",
           "far apart": "z = torch.empty(16, 640); z[:, ::20] = y; y = z[:, ::20]",
           "with an offset": "z = torch.empty(17, 32); z[1:] = y; y = z[1:]"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_outputs_may_stand_in_memory_in_any_way(name, gym):
    result = gym.evaluate(task(candidate(after=LAYOUTS[name])))
    assert (result.status, result.flags) == ("ok", ()), result.error


CLOCKS = """
import time, torch
KEPT = time.sleep
for space in (vars(time), vars(sys.modules["collai.drkernel.gym"])["time"].__dict__):
    space.update(perf_counter=lambda: 0.0, perf_counter_ns=lambda: 0, monotonic=lambda: 0.0, time=lambda: 0.0,
                 sleep=lambda s: None)
vars(torch.cuda).update(synchronize=lambda *a: None, Event=None)
"""


def test_the_time_is_the_judges(gym):
    honest = gym.evaluate(task(candidate(before="time.sleep(4e-3)")))
    patched = gym.evaluate(task(candidate(unseen(CLOCKS), before="KEPT(4e-3)")))
    for result in (honest, patched):
        assert (result.status, result.flags) == ("ok", ()) and 4 <= result.new_ms < 12 and result.speedup < 0.5


def test_a_problem_that_asks_for_a_constant_proves_nothing(gym):
    source = PROBLEM.source.replace("torch.relu(x * self.weight + self.bias)", "torch.relu(x * 0 + self.bias)")
    code = candidate().replace("float v = x[i] * w[i % cols] +", "float v =")
    result = gym.evaluate(task(code, Problem.from_source(source, name="constant")))
    assert (result.status, result.flags, result.correct) == ("hacked", ("degenerate_problem",), True)


def test_a_millisecond_is_measured_as_one(gym):
    """A kernel that takes several milliseconds takes as long by the judge's clock as by this process's."""
    spins = "volatile double s = 0; for (long i = 0; i < 1000000; i++) s += 1e-9; y[0] = y[0] + 0 * s;"
    code = candidate().replace("void spin", f"void work(float *y) {{ {spins} }}\nvoid spin").replace(
        "return y\n", "K.work(y)\n        return y\n")
    result = gym.evaluate(task(code, trials=9))
    fn = cjit(f"void work(float *y) {{ {spins} }}").work
    spent = []
    for _ in range(9):
        began = time.perf_counter()
        fn(torch.zeros(1))
        spent.append(1e3 * (time.perf_counter() - began))
    assert result.status == "ok" and 0.8 * min(spent) < result.new_ms < 4 * max(spent)


# --- secrets ----------------------------------------------------------------------------------------------------------

MEMORY = """
import numpy as np
def inverted(values):  # the bytes of float32 numbers, inverted one by one: they never stand in memory as they are
    return b"".join(bytes(255 - b for b in np.float32(v).tobytes()) for v in values)
def count(pattern):
    found = 0
    with open("/proc/self/maps") as file:
        lines = [line.split() for line in file]
    with open("/proc/self/mem", "rb", 0) as memory:
        for line in lines:
            low, high = (int(part, 16) for part in line[0].split("-"))
            if "r" not in line[1] or line[-1] in ("[vvar]", "[vsyscall]") or ".so" in line[-1]: continue
            for start in range(low, high, 1 << 22):
                try:
                    memory.seek(start)
                    block = memory.read(min(high - start, 1 << 22))
                except (OSError, OverflowError, ValueError):
                    break
                found += (~np.frombuffer(block, np.uint8)).tobytes().count(pattern)
    return found
"""
SEARCH = """
i = 5
w, b = self.weight.numpy(), self.bias.numpy()
exact = [max(np.float32(0), x.numpy()[i, j] * w[j] + b[j]) for j in range(32)]
j = max(range(28), key=lambda j: sum(v > 0 for v in exact[j:j + 4]))
raise RuntimeError(f"inputs {count(inverted(x.numpy()[i, j:j + 4]))}, answers {count(inverted(exact[j:j + 4]))}")
"""


def test_the_answer_is_nowhere_in_the_candidates_memory(gym):
    result = gym.evaluate(task(candidate(MEMORY, before=SEARCH)))
    inputs, answers = map(int, re.search(r"inputs (\d+), answers (\d+)", result.error).groups())
    assert inputs >= 1 and answers == 0  # the search finds what is there


SEEDS = """
import gc
from collai.drkernel.problems import _seeded
def numbers():
    frame, spaces = sys._getframe(), [one for one in gc.get_objects() if isinstance(one, (dict, list, tuple))]
    while frame: spaces.append(dict(frame.f_locals)); frame = frame.f_back
    found = set()
    for space in spaces:
        for one in list(space.values() if isinstance(space, dict) else space):
            if type(one) is int and 0 <= one < 2**32: found.add(one)
    return found
"""
GUESS = """
inputs = weights = 0
for seed in self.found | numbers():
    with _seeded(seed):
        values = torch.randn(16, 32)
    inputs += torch.equal(values, x)
    with _seeded(seed):
        weights += torch.equal(torch.randn(32), self.weight)
raise RuntimeError(f"inputs {inputs}, weights {weights}, of {len(self.found)}, "
                   f"words {sorted(os.environ)}, line {open('/proc/self/cmdline').read()!r}")
"""


def test_the_seed_of_the_inputs_is_nowhere_to_be_found(gym, monkeypatch):
    result = gym.evaluate(task(candidate(SEEDS, init="self.found = numbers()", before=GUESS)))
    found = re.search(r"inputs (\d+), weights (\d+), of (\d+)", result.error)
    assert found, result.error
    assert int(found[1]) == 0 < int(found[3])
    assert int(found[2]) >= 1  # the seed of the parameters is theirs: the search finds what is there
    assert not re.search("KEY|TOKEN|SECRET", result.error.split("words")[1])


def test_inputs_are_read_only_and_other_regions_are_out_of_reach(gym):
    write = "ctypes.memmove(x.data_ptr(), b'1234', 4)"
    assert gym.evaluate(task(candidate(before=write))).status in ("crashed", "hacked")
    look = """
import mmap
writable = set()
for fd in range(5, 60):
    try: mmap.mmap(fd, 16)
    except (OSError, ValueError): continue
    writable.add(os.fstat(fd).st_ino)
raise RuntimeError(f"writable {sorted(writable) == sorted(os.fstat(fd).st_ino for fd in (6, 7))}")
"""
    assert "writable True" in gym.evaluate(task(candidate(before=look))).error


def test_a_child_that_is_about_to_be_dead_did_not_talk():
    """Its end of the pipe is shut a moment before anybody can be told how it ended."""
    ours, theirs = os.pipe()
    child = types.SimpleNamespace(stdout=ours, wait=lambda seconds: sandbox.Ending("exit", 1) if seconds else None,
                                  output=lambda size: "")
    side = types.SimpleNamespace(child=child, trusted=False, _poll=select.poll())
    side._poll.register(ours, select.POLLIN)
    module._quiet(side)
    os.write(theirs, b"d")
    with pytest.raises(module._Ended, match="unexpected bytes"):
        module._quiet(side)
    os.read(ours, 1)
    os.close(theirs)
    with pytest.raises(module._Ended, match="ended without an answer, exit code 1"):
        module._quiet(side)
    os.close(ours)


# --- tampering --------------------------------------------------------------------------------------------------------

WRONG = "y = torch.full_like(y, 0.5)"
SILENT = "vars(sys.modules['collai.drkernel.gym'])['_hand_in'] = lambda: b'd'"
TWICE = """
space = vars(sys.modules["collai.drkernel.gym"])
KEPT = space["_write_fd"]
space["_write_fd"] = lambda fd, text: KEPT(fd, text + text)
"""


def test_what_nobody_wrote_is_no_answer(gym):
    result = gym.evaluate(task(candidate(unseen(SILENT))))
    assert (result.status, result.flags) == ("incorrect", ("output_type",)) and "no word" in result.error


def test_an_answer_that_was_not_asked_for_is_a_violation(gym):
    result = gym.evaluate(task(candidate(unseen(TWICE))))
    assert (result.status, result.flags, result.correct) == ("hacked", ("protocol_violation",), False)


TAMPERED = {
    "garbage in all descriptors but the answers": (
        "for fd in (*range(4), *range(5, 51)):\n    try: os.write(fd, b'\\0done')\n    except OSError: pass", "ok"),
    "closed standard descriptors": ("os.closerange(0, 3)", "ok"),
    "signal handlers": ("import signal\nfor s in (1, 2, 3, 10, 12, 13, 14, 15, 17, 18, 20):\n    signal.signal(s, lambda *a: None)", "ok"),
    "blocked signals": ("import signal; signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))", "ok"),
    "an exit function": ("import atexit; atexit.register(os.abort)", "ok"),
    "no recursion": ("sys.setrecursionlimit(200)", "ok"),
    "no memory management": ("import gc; gc.disable(); gc.set_debug(0)", "ok"),
    "a trace": ("sys.settrace(lambda *a: None); sys.setprofile(lambda *a: None)", "ok"),
    "printed verdicts": ("print('status: ok, speedup: 1000'); sys.stdout.flush()", "ok"),
    "another folder": ("os.mkdir('sub'); os.chdir('sub')", "ok"),
    "a file for others": ("open('sitecustomize.py', 'w').write('raise SystemExit')", "ok"),
    "dead builtins": ("import builtins\nfor n in ('isinstance', 'len', 'zip', 'sum', 'getattr'):\n"
                      "    vars(builtins)[n] = lambda *a: True", None),
    "dead json": ("vars(sys.modules['json'])['dumps'] = lambda *a, **k: '{}'", None),
    "another os.write": ("vars(os).update(write=lambda *a: 0, read=lambda *a: b'')", None),
    "another copy": ("C = torch.Tensor.copy_\ntype.__setattr__(torch.Tensor, 'copy_', lambda s, o, *a: C(s, torch.ones_like(s)))", None),
    "a true comparison": ("for n in ('allclose', 'equal', 'isfinite'):\n    vars(torch)[n] = lambda *a, **k: True", None),
    "another gym": ("g = vars(sys.modules['collai.drkernel.gym'])\nfor n in ('_copy_out', '_hand_in', '_complaint', '_claim', 'compare'):\n"
                    "    g[n] = lambda *a, **k: ''", None),
    "no forward": ("g = vars(sys.modules['collai.drkernel.gym'])\ng['_forward'] = lambda *a: None", None),
    "outputs kept": ("g = vars(sys.modules['collai.drkernel.gym'])\nF = g['_forward']\nS = []\n"
                     "def forward(n):\n    if len(S) < 2: S.append(F(n))\ng['_forward'] = forward", None),
    "its own deadline": ("import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 1))", "ok"),
    "lies about its profile": ("g = vars(sys.modules['collai.drkernel.gym'])\n"
                               "g['_profiled'] = lambda *a: {1: float('nan')}", None),
    "everything left to exec": (unseen("import torch\ntorch.equal = torch.allclose = lambda *a, **k: True"), None),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_tampering_makes_nothing_right_that_is_wrong_and_harms_nobody(name, gym):
    top, status = TAMPERED[name]
    if status == "ok":  # it changes nothing
        honest = gym.evaluate(task(candidate(top), timeout=3))
        assert (honest.status, honest.flags) == ("ok", ()), honest.error
        return
    wrong = gym.evaluate(task(candidate(top, after=WRONG), timeout=3))
    assert not wrong.correct and wrong.status not in ("ok", "hacked", "infra_error") and wrong.speedup == 0, wrong
    assert gym.evaluate(task(candidate(f"# after {name}"))).status == "ok"


CLAIMS = """
import json, sys
g = sys.modules["collai.drkernel.gym"]
def lie(model, *inputs):
    model(*inputs)
    return ROWS
g._profiled = lie
"""
VOID = {"much too long": "[['f', 1000.0 * 1000, True]]", "none of it": "[]", "less than half": "[['f', 1.0, True]]",
        "NaN": "[['f', float('nan'), True]]", "infinity": "[['f', float('inf'), True]]", "negative": "[['f', -1.0, True]]",
        "a number without end": "[['f', 10**400, True]]", "text": "[['f', 'x', True]]", "two in a row": "[['f', 1.0]]",
        "a number": "5", "no list": "{'f': 1}"}


@pytest.mark.parametrize("name", VOID)
def test_an_account_that_does_not_fit_the_time_is_void(name, gym):
    slow = "for _ in range(300): x = (x + 1) - 1"
    result = gym.evaluate(task(candidate(unseen(CLAIMS.replace("ROWS", VOID[name])), before=slow)))
    assert result.status in ("ok", "hacked") and "profile_mismatch" in result.flags, result
    assert (result.coverage, result.coverage_displaced) == (0.0, 0.0) and result.status != "infra_error"


def test_an_account_that_is_no_json_is_void(gym):
    for text in (b"[" * 200_000, b'{"events": [["f", NaN, true]]}', b"\xff", b"{}", b'{"events": ' + b"9" * 5000 + b"}"):
        forged = f"""
import sys
g = sys.modules["collai.drkernel.gym"]
def account():
    text = {text!r}
    g._HELD["claims"][:len(text) + 4] = len(text).to_bytes(4, "little") + text
g._profile = account
"""
        result = gym.evaluate(task(candidate(unseen(forged))))
        assert (result.status, result.correct) == ("hacked", True) and "profile_mismatch" in result.flags
        assert (result.coverage, result.coverage_displaced) == (0.0, 0.0)


def test_an_honest_account_is_believed(gym):
    result = gym.evaluate(task(candidate(before="for _ in range(300): x = (x + 1) - 1")))
    assert (result.status, result.flags) == ("ok", ()) and 0 < result.coverage < 0.2 and result.coverage_displaced == 0


HIDDEN = """
from torch.utils._python_dispatch import _disable_current_modes
def work(x):
    for _ in range(3000): x = (x + 1) - 1
    return x
"""


def test_torch_behind_the_profiles_back_is_no_coverage(gym):
    before = "with _disable_current_modes(): x = work(x)"
    seen = gym.evaluate(task(candidate(HIDDEN, before="x = work(x)")))
    hidden = gym.evaluate(task(candidate(HIDDEN, before=before)))
    assert (seen.status, seen.flags) == ("ok", ()) and hidden.status == "ok" and hidden.flags == ("profile_mismatch",)
    assert hidden.coverage == hidden.coverage_displaced == 0.0


CALLED_BACK = candidate("""
B = cjit('void work(float *y, long call) { ((void (*)(void))call)(); }')
CALL = ctypes.CFUNCTYPE(None)
""", after="""
def work(): torch.relu(x * self.weight + self.bias, out=None) if False else y.copy_(torch.relu(x * self.weight + self.bias))
y = torch.empty_like(x)
call = CALL(work)
B.work(y, ctypes.cast(call, ctypes.c_void_p).value)
""").replace("K.f(x, self.weight", "(lambda *a: 0)(x, self.weight")


def test_c_that_calls_torch_back_is_no_kernel(gym):
    result = gym.evaluate(task(CALLED_BACK))
    assert (result.status, result.flags, result.coverage) == ("hacked", ("no_generated_kernel",), 0.0)
    assert ["work", False] in [[name, made] for name, _, made, _ in result.profile["events"]]


def test_messages_that_make_no_sense_are_no_fault_of_the_gym(gym):
    for message in ("{'src': 5, 'flags': []}", "{'src': 'void f(void) {}', 'flags': [5]}", "{'src': 'void f(void) {}', 'flags': 5}", "[1]",
                    "{'src': 'void f(void) {}'}", "{'src': chr(0xd800), 'flags': []}"):
        ask = f"""
import json, sys
g = sys.modules["collai.drkernel.gym"]
text = json.dumps({message}).encode()
g._write_fd(4, b"q" + len(text).to_bytes(4, "little") + text)
assert "error" in g._hear_message()
"""
        result = gym.evaluate(task(candidate(unseen(ask))))
        assert (result.status, result.error) == ("ok", None), (message, result)
    forged = "import sys\ng = sys.modules['collai.drkernel.gym']\ndef forward(n):\n    g._claim({'type': 5, 'text': [1]})\n    return b'e'\ng._forward = forward"
    assert gym.evaluate(task(candidate(unseen(forged)))).status == "runtime_error"


def test_the_answers_of_the_catalogue_are_out_of_reach(gym):
    for line in ("from collai.drkernel.hacks import honest", "import collai.rl.adv",
                 "open(sys.modules['collai.drkernel.problems'].__file__)", "open(sys.modules['collai.drkernel.gym'].__file__)",
                 "os.listdir(os.path.dirname(sys.modules['collai'].__file__))"):
        result = gym.evaluate(task(candidate(line)))
        assert result.status == "runtime_error" and "PermissionError" in result.error, line
    own = "from collai.drkernel.problems import builtin_problems\nassert builtin_problems() == []"
    assert gym.evaluate(task(candidate(own))).status == "ok"


def test_only_own_shared_objects_can_be_read(gym):
    other = str(next(Path(os.environ["COLLAI_KERNELS"]).glob("*.so")))
    for line in (f"open({other!r}, 'rb')", f"ctypes.CDLL({other!r})", f"os.listdir({os.environ['COLLAI_KERNELS']!r})"):
        result = gym.evaluate(task(candidate(line)))
        assert result.status == "runtime_error" and re.search("Permission denied|cannot open", result.error), result.error
    own = "assert [n for n in os.listdir('.') if n.endswith('.so')]\nos.chmod(next(n for n in os.listdir('.') if n.endswith('.so')), 0o600)"
    assert gym.evaluate(task(candidate(own))).status == "ok"
    unfit = "os.chmod('.', 0)\ncjit('void g(float *y) { y[0] = 1; }')"
    assert gym.evaluate(task(candidate(unfit))).status in ("ok", "runtime_error")


# --- tasks, results, cache --------------------------------------------------------------------------------------------

def dispatch(gym, *tasks):
    """Hand in tasks and wait for all of them."""
    return [gym.result(id) for id in [gym.submit(one) for one in tasks]]


@pytest.mark.parametrize(("options", "message"), [
    ({"problem": "scale"}, "problem must be a Problem, got str"),
    ({"code": b"x"}, "code must be a string, got bytes"),
    ({"trials": 0}, "trials must be >= 1, got 0"),
    ({"correctness_trials": -1}, "correctness_trials must be >= 1, got -1"),
    ({"timeout": 0}, "timeout must be positive and finite, got 0"),
    ({"timeout": math.inf}, "timeout must be positive and finite, got inf"),
    ({"timeout": math.nan}, "timeout must be positive and finite, got nan"),
    ({"timeout": 10**400}, "timeout must be positive and finite, got 1000"),
    ({"baseline": "fast"}, "baseline must be one of eager, compile, got 'fast'"),
    ({"pr_mode": "both"}, "pr_mode must be one of paper, displaced, guarded, got 'both'"),
    ({"trials": 2.5}, "trials must be a whole number, got 2.5"),
    ({"trials": "5"}, "trials must be a whole number, got '5'"),
    ({"trials": True}, "trials must be a whole number, got True"),
    ({"correctness_trials": 1.5}, "correctness_trials must be a whole number, got 1.5"),
    ({"priority": 1.5}, "priority must be a whole number, got 1.5"),
    ({"timeout": "5"}, "timeout must be positive and finite, got '5'"),
    ({"timeout": True}, "timeout must be positive and finite, got True"),
    ({"require_generated": "no"}, "require_generated must be True or False, got 'no'"),
    ({"trials": 10**6}, "trials must be <= 10000, got 1000000"),
    ({"correctness_trials": 10**6}, "correctness_trials must be <= 10000, got 1000000"),
])
def test_a_task_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Task(**{"problem": PROBLEM, "code": "", **options})


@pytest.mark.parametrize(("options", "message"), [
    ({"workers": 0}, "workers must be >= 1, got 0"),
    ({"workers": 1.5}, "workers must be a whole number, got 1.5"),
    ({"workers": True}, "workers must be a whole number, got True"),
    ({"memory_mb": "1"}, "memory_mb must be a whole number, got '1'"),
    ({"device": "tpu"}, "device must be one of cpu, cuda, got 'tpu'"),
    ({"backend": "cuda"}, "backend must be one of c, triton, auto, got 'cuda'"),
    ({"sandbox": "most"}, "sandbox must be one of auto, strict, off, got 'most'"),
    ({"memory_mb": 0}, "memory_mb must be >= 1, got 0"),
    ({"device": "cuda", "backend": "c"}, "backend on 'cuda' must be one of triton, got 'c'"),
    ({"queue": "http://x"}, "queue must be a path or begin with redis://, rediss:// or ray://, got 'http://x'"),
    ({"queue": ""}, "queue must be the path of a file, got ''"),
    ({"queue": os.path.dirname(__file__)}, "queue must be the path of a file, and .*/drkernel is a folder"),
])
def test_a_gym_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        KernelGym(**options)


def test_a_missing_gpu_or_package_is_named(monkeypatch):
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device 'cuda' is not available here"):
        KernelGym(device="cuda")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs the extra \[triton\]: pip install collai\[triton\]"):
        KernelGym(backend="triton")


def test_numbers_of_numpy_are_numbers():
    config.update("jaxtyping_disable", True)  # the annotations say int and float
    try:
        one = Task(PROBLEM, "", np.int64(4), np.uint8(2), np.float32(1.5), priority=np.int32(-1))
    finally:
        config.update("jaxtyping_disable", False)
    assert one == Task(PROBLEM, "", 4, 2, 1.5, priority=-1) and json.loads(json.dumps(module._payload(one)))["trials"] == 4
    assert [type(n) for n in (one.trials, one.correctness_trials, one.timeout, one.priority)] == [int, int, float, int]


def test_what_is_no_task_is_named(gym):
    for wrong in ("x", None, {"code": "x"}):
        with pytest.raises(TypeError, match=f"task must be a Task, got {type(wrong).__name__}"):
            gym.submit(wrong)


def test_a_relative_path_means_the_same_file_to_every_worker(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLLAI_KERNELS", "made")
    with KernelGym(queue="tasks.db") as one:
        assert one.result(one.submit(task(candidate("# relative"))), timeout=20).status == "ok"
        assert one.evaluate(task(candidate("# relative"))).cached
    assert {"tasks.db", "tasks.db.cache", "made"} <= set(os.listdir(tmp_path)) and list((tmp_path / "made").glob("*.so"))
    with pytest.raises(FileNotFoundError, match=f"no folder {tmp_path}/none for the queue"):
        KernelGym(queue="none/tasks.db")
    assert not (tmp_path / "none").exists()


@pytest.fixture
def nothing_left(monkeypatch):
    """Checks that the test leaves no process, folder or descriptor."""
    made, original = [], tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", lambda *a, **k: made.append(original(*a, **k)) or made[-1])
    gc.collect()
    before, fds = family(os.getpid()), len(os.listdir("/proc/self/fd"))
    yield made
    assert soon(lambda: not {pid for pid in family(os.getpid()) - before if not gone(pid)}, 2)
    assert not [folder for folder in made if os.path.exists(folder)]
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= fds


def test_a_strict_gym_names_the_missing_layer(monkeypatch, nothing_left):
    for place in (module, sandbox):
        monkeypatch.setattr(place, "missing_layers", lambda: {"seccomp": "needs pyseccomp and libseccomp: no"})
    with pytest.raises(RuntimeError, match="sandbox layer 'seccomp' is missing: needs pyseccomp"):
        KernelGym(sandbox="strict")


def test_the_gym_tells_about_itself(gym, fleet):
    info = gym.info()
    assert {name: info[name] for name in ("device", "backend", "workers", "clock")} == {
        "device": "cpu", "backend": "c", "workers": 1, "clock": "judge"}
    assert info["layers"] == ("session", "folder", "watchdog", *sandbox._LAYERS) and info["missing"] == {}
    assert fleet.info()["workers"] == 2 == len(set(fleet.worker_pids())) and len(gym.worker_pids()) == 1


CACHED = {"ok": candidate("# cached"), "incorrect": candidate("# cached", after="y[0] += 1"), "compile_error": "# cached",
          "hacked": candidate("os.write(4, b'x')  # cached"), "runtime_error": candidate("raise OSError  # cached"),
          "oom": candidate("raise MemoryError  # cached")}


@pytest.mark.parametrize("status", CACHED)
def test_a_known_result_is_not_judged_again(status, gym):
    first = gym.evaluate(task(CACHED[status]))
    began = time.monotonic()
    again = gym.evaluate(task(CACHED[status], timeout=7, priority=3))
    spent = time.monotonic() - began
    kept = status in ("ok", "incorrect", "hacked", "compile_error")
    assert first.status == again.status == status and not first.cached and again.cached == kept
    assert again.task_id != first.task_id and gym.result(again.task_id) == again and gym.result(first.task_id) == first
    if kept:
        assert dataclasses.replace(again, task_id=first.task_id, cached=False) == first and spent < 0.1


def test_what_a_result_depends_on_is_in_its_key(gym):
    base = candidate("raise SystemExit  # key").replace("raise SystemExit", "os.write(4, b'x')")
    assert not gym.evaluate(task(base)).cached
    other = PROBLEM.with_sizes(ROWS=8, COLS=32)
    changes = [{"trials": 4}, {"correctness_trials": 2}, {"baseline": "compile"},
               {"require_generated": False}, {"problem": other}]
    for change in changes:
        assert not gym.evaluate(task(base, **change)).cached and gym.evaluate(task(base, **change)).cached
    assert not gym.evaluate(task(base + "\n")).cached
    assert gym.evaluate(task(base, pr_mode="paper")).cached  # who reads a result picks the coverage


def test_without_a_cache_the_same_is_judged_again(fleet):
    results = dispatch(fleet, *[task(candidate())] * 3)
    assert [(r.status, r.cached) for r in results] == [("ok", False)] * 3 and len({r.task_id for r in results}) == 3


def sleeper(seconds, text=""):
    """A candidate that sleeps and then fails."""
    return candidate(f"time.sleep({seconds}); raise ValueError({text!r})")


def test_higher_priorities_are_judged_first(gym):
    ids = {name: gym.submit(task(sleeper(wait, name), priority=priority)) for name, wait, priority in [
        ("running", 0.5, 9), ("low", 0, -1), ("first", 0, 5), ("second", 0, 5), ("middle", 0, 2)]}
    for id in ids.values():
        gym.result(id)
    order = [r.task_id for r in gym.records() if r.task_id in ids.values()]
    names = {id: name for name, id in ids.items()}
    assert [names[id] for id in order] == ["running", "first", "second", "middle", "low"]


def test_waiting_ends_and_unknown_ids_are_refused(gym):
    id = gym.submit(task(sleeper(0.3)))
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=f"task '{id}' is (queued|leased) after 0.05 s"):
        gym.result(id, timeout=0.05)
    assert time.monotonic() - began < 0.3 and gym.result(id, timeout=20).status == "runtime_error"
    with pytest.raises(KeyError, match="no task 'nobody'"):
        gym.result("nobody")


def test_who_waits_for_a_result_is_told_when_the_gym_is_closed(kernels):
    found = []

    def wait(one, id):
        try:
            found.append(one.result(id))
        except RuntimeError as error:
            found.append(str(error))

    with KernelGym() as one:
        id = one.submit(task(candidate("while True: pass"), timeout=600))
        thread = threading.Thread(target=wait, args=(one, id), daemon=True)
        thread.start()
        time.sleep(0.3)
    thread.join(10)
    assert found == ["the gym is closed"]


@pytest.mark.parametrize("end", ["exit", "SIGTERM"])
def test_a_gym_that_nobody_closed_leaves_no_folder(end, kernels):
    code = f"""
import sys; sys.path[:] = {sys.path!r}
import os, signal
from collai.drkernel.gym import KernelGym
gym = KernelGym()
print(gym._own, gym._zygote.folder, sep="\\n", flush=True)
if {end!r} == "SIGTERM":
    os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60)
    folders = done.stdout.split()
    assert len(folders) == 2 and soon(lambda: not any(map(os.path.exists, folders)))


def test_map_keeps_the_order_and_every_id_has_one_record(fleet):
    names = [f"number {n}" for n in range(6)]
    tasks = [task(sleeper(0.3 if n == 0 else 0, name), priority=n) for n, name in enumerate(names)]
    results = list(fleet.map(iter(tasks)))
    assert all(name in r.error for name, r in zip(names, results, strict=True))
    ids = [r.task_id for r in fleet.records()]
    assert len(ids) == len(set(ids)) and {r.task_id for r in results} <= set(ids)
    assert results == [one for r in results for one in fleet.records() if one.task_id == r.task_id]


def test_threads_may_share_a_gym(fleet):
    found, began = {}, threading.Barrier(8)

    def work(n):
        began.wait()
        ids = [fleet.submit(task(sleeper(0, f"thread {n} task {k}"))) for k in range(3)]
        found[n] = [fleet.result(id) for id in ids]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len({r.task_id for rs in found.values() for r in rs}) == 24
    assert all(f"thread {n} task {k}" in r.error for n, rs in found.items() for k, r in enumerate(rs))


# --- deaths -----------------------------------------------------------------------------------------------------------

def test_workers_killed_at_random_lose_no_task_and_record_none_twice(fleet):
    rng, kills, before = random.Random(0), 0, len(fleet.records())  # noqa: S311
    tasks = [task(candidate(f"# killed {n}") if n % 3 == 0 else sleeper(0.05, f"killed {n}")) for n in range(KILLED_TASKS)]
    ids = [fleet.submit(one) for one in tasks]
    while (seen := len(fleet.records())) < before + KILLED_TASKS:
        assert soon(lambda seen=seen: len(fleet.records()) > seen, 30)  # something ends between two kills, so no task meets five
        time.sleep(rng.uniform(0, 0.2))
        if pids := fleet.worker_pids():
            kill(rng.choice(pids))
            kills += 1
    records = fleet.records()[before:]
    assert sorted(r.task_id for r in records) == sorted(ids) and kills >= 2
    expected = ["ok" if n % 3 == 0 else "runtime_error" for n in range(KILLED_TASKS)]
    results = [fleet.result(id) for id in ids]
    assert [r.status for r in results] == expected, [(r.error, r.flags) for r in results if r.status not in expected]
    assert KILLED_TASKS < sum(r.attempts for r in records) <= KILLED_TASKS + kills
    assert soon(lambda: complete(fleet))


def test_a_dead_worker_is_replaced_at_once(fleet):
    for sign in (signal.SIGKILL, signal.SIGTERM):
        old = fleet.worker_pids()
        id = fleet.submit(task(sleeper(0.5)))
        time.sleep(0.2)
        began = time.monotonic()
        kill(*old, sign=sign)
        assert soon(lambda old=old: complete(fleet, old), 2)
        assert fleet.result(id, 30).attempts == 2 and time.monotonic() - began < 3


def test_a_candidate_does_not_outlive_its_worker_and_five_deaths_are_enough(fleet):
    id, old = fleet.submit(task(candidate("while True: pass"), timeout=600)), set()
    while not fleet._queue.records(id):  # the infrastructure's fault, five times
        soon(lambda: any((seen := stat(pid)) and seen[0] == b"R" for pid in processes(fleet)[1]), 1)
        old |= processes(fleet)[1]
        pids = fleet.worker_pids()
        kill(*pids)
        assert soon(lambda pids=pids: complete(fleet, pids), 3)
    last = fleet.result(id)
    assert (last.status, last.attempts) == ("infra_error", 5) and "worker was lost" in last.error
    assert soon(lambda: all(map(gone, old)), 3)


def test_a_dead_reference_is_no_fault_of_the_candidate(fleet):
    dispatch(fleet, *[task(candidate())] * 2)
    time.sleep(0.7)  # spare candidates are there, too
    kill(*processes(fleet)[1])
    time.sleep(0.1)
    results = dispatch(fleet, *[task(candidate())] * 4)
    assert [r.status for r in results] == ["ok"] * 4, [r.error for r in results]


def test_a_killed_zygote_is_replaced_with_all_it_had(fleet):
    zygote, children = processes(fleet)
    pids = fleet.worker_pids()
    id = fleet.submit(task(sleeper(0.3)))
    time.sleep(0.1)
    kill(zygote)
    assert fleet.result(id, 60).status == "runtime_error" and fleet.evaluate(task(candidate())).status == "ok"
    assert all(map(gone, [zygote, *children, *pids])) and soon(lambda: complete(fleet))


CLIENT = """
import sys; sys.path[:] = {path!r}
import json, time
from collai.drkernel.gym import KernelGym, Task
from collai.drkernel.problems import Problem
problem, codes = json.loads(sys.stdin.readline())
gym = KernelGym(queue={queue!r})
ids = [gym.submit(Task(Problem(**problem), code, trials=5, correctness_trials=1, timeout=600)) for code in codes]
gym.result(ids[0])
print(json.dumps(ids), gym._zygote.folder, sep="\\n", flush=True)
time.sleep(600)
"""


def test_a_killed_client_leaves_nothing_and_its_queue_is_finished_by_the_next(kernels, tmp_path):
    queue = str(tmp_path / "q.db")
    codes = [candidate("# first"), sleeper(2, "was running"), candidate("# third"), candidate(after="y[0] = 7")]
    client = subprocess.Popen([sys.executable, "-c", CLIENT.format(path=sys.path, queue=queue)], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)
    client.stdin.write(json.dumps([vars(PROBLEM), codes]) + "\n")
    client.stdin.flush()
    ids, folder = json.loads(client.stdout.readline()), client.stdout.readline().strip()
    time.sleep(0.3)
    started = family(client.pid)
    assert len(started) >= 3 and Path(folder).exists()
    client.kill()
    client.communicate()
    assert soon(lambda: all(map(gone, started)) and not Path(folder).exists())
    with KernelGym(queue=queue, sandbox="off") as one:
        results = [one.result(id, 60) for id in ids]
        assert [r.status for r in results] == ["ok", "runtime_error", "ok", "incorrect"]
        assert [r.attempts for r in results] == [1, 2, 1, 1] and "was running" in results[1].error
        assert sorted(r.task_id for r in one.records()) == sorted(ids)
        assert [r.sandbox for r in results] == ["full", "off", "off", "off"] and one.info()["layers"] == ("session", "folder")
        assert one.evaluate(task(codes[0])).cached  # the cache lies beside the queue
        busy = one.evaluate(task(candidate(BUSY), trials=9))  # a thread, which only a full sandbox forbids
        assert busy.status == "hacked" and "background_work" in busy.flags and busy.correct
    assert one.result(ids[0]) == results[0]  # and what is recorded can be read when it is closed
    with pytest.raises(RuntimeError, match="the gym is closed"):
        one.submit(task(codes[0]))


@pytest.fixture
def no_seccomp(tmp_path, monkeypatch):
    """A machine that lacks a layer of the sandbox, for the zygotes, too: they get the same path."""
    (tmp_path / "pyseccomp.py").write_text("raise ImportError('not here')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pyseccomp", raising=False)
    for cache in (sandbox.missing_layers, sandbox._warn_degraded):
        cache.cache_clear()
    yield
    monkeypatch.undo()
    for cache in (sandbox.missing_layers, sandbox._warn_degraded):
        cache.cache_clear()
    assert not sandbox.missing_layers()


def test_an_error_in_the_block_leaves_nothing_and_a_degraded_sandbox_is_said(kernels, no_seccomp, nothing_left):
    with pytest.warns(RuntimeWarning, match="the sandbox is degraded, it lacks seccomp: .*not here") as seen:
        one = KernelGym()
    assert len(seen) == 1
    made = family(os.getpid()) - family(one._zygote.pid) - {one._zygote.pid}
    with pytest.raises(ZeroDivisionError):
        with one, warnings.catch_warnings():
            warnings.simplefilter("error")  # it is said once
            results = dispatch(one, task(candidate()), task(candidate("1 / 0")), task(""), task(candidate("open('/etc/shadow')")))
            assert [r.status for r in results] == ["ok", "runtime_error", "compile_error", "runtime_error"]
            assert {r.sandbox for r in results} == {"degraded"}
            info = one.info()
            assert "seccomp" not in info["layers"] and "landlock" in info["layers"] and "not here" in info["missing"]["seccomp"]
            id = one.submit(task(candidate("while True: pass"), timeout=600))
            assert soon(lambda: any(r and r[0] == b"R" for r in map(stat, processes(one)[1])))
            started = family(os.getpid()) - made
            1 / 0  # noqa: B018
    assert len(started) >= 3 and all(map(gone, started))
    one.close()
    assert one.worker_pids() == []
    with pytest.raises(RuntimeError, match="the gym is closed"):
        one.submit(task(candidate()))
    with pytest.raises(RuntimeError, match="sandbox layer 'seccomp' is missing"):
        KernelGym(sandbox="strict")
    assert id not in {r.task_id for r in results}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """URL of a running Redis server."""
    pytest.importorskip("redis", reason="needs the package redis")
    if (program := shutil.which("redis-server")) is None:
        pytest.skip("needs a redis-server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("redis")
    line = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", folder]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL) as process:
        def answers():
            with socket.socket() as one:
                return one.connect_ex(("127.0.0.1", port)) == 0

        assert soon(answers)
        yield f"redis://127.0.0.1:{port}/0"
        process.terminate()


def test_a_gym_on_a_redis_server(kernels, server):
    with KernelGym(queue=server) as one:
        assert [r.status for r in one.map([task(candidate()), task(candidate("1 / 0"))])] == ["ok", "runtime_error"]
        again = one.evaluate(task(candidate()))
        assert again.cached and again.status == "ok" and one.result(again.task_id) == again
        assert one.result(one.submit(task(candidate(), priority=1)), timeout=60).status == "ok"
        with pytest.raises(KeyError, match="no task 'nobody'"):
            one.result("nobody")
        id = one.submit(task(sleeper(0.4, "taken over")))
        time.sleep(0.2)
        kill(*one.worker_pids())
        assert one.result(id, 30).attempts == 2 and len(one.records()) == 5


def test_a_server_that_is_not_there_is_named(nothing_left):
    pytest.importorskip("redis", reason="needs the package redis")
    with pytest.raises(ConnectionError, match="no Redis at redis://127.0.0.1:1"):
        KernelGym(queue="redis://127.0.0.1:1")


# --- sources ----------------------------------------------------------------------------------------------------------

FORGED = {
    "an attribute": ("import torch\ntorch.allclose = print", "torch.allclose"),
    "a nested attribute": ("import torch\ntorch.cuda.Event.elapsed_time = print", "torch.cuda.Event.elapsed_time"),
    "an alias": ("import torch.nn.functional as F\nF.relu = print", "torch.nn.functional.relu"),
    "a submodule": ("import torch.nn.functional\ntorch.nn.Module.__call__ = print", "torch.nn.Module.__call__"),
    "a class": ("from torch import Tensor\nTensor.copy_ = print", "torch.Tensor.copy_"),
    "a class by another name": ("from torch.nn import Module as M\nM.forward = print", "torch.nn.Module.forward"),
    "setattr": ("import torch\nsetattr(torch.Tensor, 'copy_', print)", "torch.Tensor.copy_"),
    "setattr by a computed name": ("import time\nsetattr(time, 'perf' + '_counter', print)", "time"),
    "del": ("import torch\ndel torch.allclose", "torch.allclose"),
    "delattr": ("import torch\ndelattr(torch, 'equal')", "torch.equal"),
    "augmented": ("import time\ntime.timezone += 1", "time.timezone"),
    "annotated": ("import time\ntime.time: object = print", "time.time"),
    "one of many": ("import time\na, (b, time.time) = 1, (2, print)", "time.time"),
    "a chain": ("import time\na = time.time = print", "time.time"),
    "inside a function": ("def f():\n    import time\n    time.time = print", "time.time"),
    "builtins": ("import builtins\nbuiltins.len = print", "builtins.len"),
    "__builtins__": ("__builtins__.len = print", "builtins.len"),
    "another name": ("import time\nt = time\nt.time = print", "time.time"),
    "another name later": ("import time\ndef f():\n    t.time = print\nt = time", "time.time"),
    "one of two names": ("import time, os\nt, o = time, os\nt.time = print", "time.time"),
    "a walrus": ("import time\n(t := time).__name__\nt.time = print", "time.time"),
    "the table of modules": ("import sys\ng = sys.modules['time']\ng.time = print", "time.time"),
    "an entry of that": ("import sys\nsys.modules['time'] = print", "sys.modules.time"),
    "import_module": ("import importlib\nt = importlib.import_module('time')\nt.time = print", "time.time"),
    "__import__": ("__import__('time').time = print", "time.time"),
    "getattr": ("import torch\ngetattr(torch, 'Tensor').copy_ = print", "torch.Tensor.copy_"),
    "a dictionary": ("import time\ntime.__dict__['time'] = print", "time.time"),
    "its alias": ("import time\nd = vars(time)\nd['time'] = print", "time.time"),
    "a dictionary's method": ("import torch\ntorch.__dict__.update(equal=print)", "torch.?"),
    "a dictionary in place": ("import torch\nd = torch.__dict__\nd |= {'equal': print}", "torch.?"),
    "type.__setattr__": ("import torch\ntype.__setattr__(torch.Tensor, 'copy_', print)", "torch.Tensor.copy_"),
    "its own __setattr__": ("import time\ntime.__setattr__('time', print)", "time.time"),
    "__delattr__": ("import time\nobject.__delattr__(time, 'time'), print", "time.time"),
    "mock": ("from unittest import mock\nmock.patch('torch.allclose', print).start()", "torch.allclose"),
    "mock of an object": ("import torch\nfrom unittest.mock import patch\npatch.object(torch, 'equal', print).start()", "torch"),
    "a loop": ("import time\nfor time.time in [print]: pass", "time.time"),
    "with": ("import time\nwith open('x') as time.time: print", "time.time"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forgery_is_seen_in_the_source(name):
    code, what = FORGED[name]
    flags = [flag for flag in static_flags(code) if flag.forging]
    assert [flag.name for flag in flags] == ["forgery"] and what in flags[0].text
    assert flags[0].line == next(n for n, line in enumerate(code.split("\n"), 1)
                                 if any(word in line for word in ("print", "del", "+=")))


HONEST = """
'''try: torch.allclose = lambda: True  # only words'''
import os, torch, numpy as np
from torch import nn
from dataclasses import dataclass
torch.manual_seed(0)
torch.backends.cudnn.benchmark = True
torch.backends.cuda.matmul.allow_tf32 = False
os.environ["X"] = "1"
@dataclass
class Config: size: int = 4
Config.size = 8
config = Config()
config.size += 1
class ModelNew(nn.Module):
    def __init__(self, cols):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(cols))
        self.weight.data = torch.ones(cols)
        self.conv = nn.Conv2d(1, 1, 1)
        self.conv.bias.data.zero_()
        setattr(self, "half", None)
        delattr(self, "half")
        object.__setattr__(self, "half", None)
        self.__dict__.update(half=None)
        t, self.table = os, np.zeros(3)
        t = self
        t.other = 1
        for os in (): os.name = 1
        self.table[0] = 1
    def forward(self, x):
        x = x.detach()
        x.requires_grad = False
        out = torch.empty_like(x)
        out[0] = 1
        return out
"""


def test_honest_sources_forge_nothing():
    for code in (HONEST, candidate(), *(candidate(top) for top in ("import time as torch_time", "torch.set_num_threads(1)"))):
        assert not any(flag.forging for flag in static_flags(code))


@pytest.mark.parametrize(("line", "name"), [
    ("sys._getframe()", "introspection"), ("gc.get_objects()", "introspection"), ("threading.Thread()", "threads"),
    ("torch.cuda.Stream()", "stream"), ("torch.cuda.CUDAGraph()", "graph"), ("torch.compile(f)", "compile"),
    ("torch.set_num_threads(9)", "resources"), ("os._exit(0)", "processes"), ("ctypes.CDLL(None)", "memory"),
    ("x.data_ptr()", "identity"), ("class ModelNew(Model): pass", "subclass"),
    ("def f():\n    try: pass\n    except OSError: return 1", "fallback"),
])
def test_a_look_gives_advice_that_is_no_verdict(line, name):
    flags = static_flags(f"import sys, gc, threading, torch, os, ctypes\n{line}")
    assert name in {flag.name for flag in flags} and not any(flag.forging for flag in flags)
    assert all(flag.line >= 2 for flag in flags) and flags == sorted(flags, key=lambda f: f.line)


def test_a_source_that_is_no_python_has_no_flags():
    with pytest.raises(SyntaxError):
        static_flags("def")
    assert static_flags("") == []


# --- measures ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("first", "second", "noise"), [(1, 1, 0.2), (3, 1, 0.2), (1, 2, 0.0), (40, 30, 1.5)])
def test_a_ratio_of_times_is_found_in_noise(first, second, noise, monkeypatch):
    rng, now = random.Random(1), [0]  # noqa: S311

    def lasts(ms):
        def fn():
            now[0] += int(1e6 * ms * math.exp(rng.gauss(0, noise)))
        return fn

    monkeypatch.setattr(time, "perf_counter_ns", lambda: now[0])
    ref = lasts(first)
    for new in (lasts(second), ref) if first == second else (lasts(second),):  # one and the same function, too
        speedup, (low, high), ref_ms, new_ms = measure(ref, new, rounds=50, window_ms=10)
        assert low <= first / second <= high and low <= speedup <= high and (low < high) == (noise > 0)
        size = math.exp(noise ** 2 / 2)  # the mean of so many calls as fill a window
        assert 0.5 * first < ref_ms < 1.5 * size * first and 0.5 * second < new_ms < 1.5 * size * second
        assert (noise > 1 or high / low < 1.2) and (noise or (low, high, ref_ms) == (0.5, 0.5, first))


def test_a_measurement_alternates_and_fills_its_windows(monkeypatch):
    now, calls = [0], []

    def lasts(name, ms):
        def fn():
            now[0] += int(1e6 * ms)
            calls.append(name)
        return fn

    monkeypatch.setattr(time, "perf_counter_ns", lambda: now[0])
    measure(lasts("a", 2.0), lasts("b", 5.0), rounds=2, window_ms=5)
    assert "".join(calls) == "aabb" + 2 * ("aaab" + "baaa")


@pytest.mark.parametrize(("options", "shown"), [
    ({"rounds": 0}, "got 0 and 5.0"), ({"rounds": 1.5}, "got 1.5 and 5.0"), ({"window_ms": 0}, "got 10 and 0"), ({"window_ms": math.nan}, "got 10 and nan")])
def test_a_measurement_that_makes_no_sense_is_refused(options, shown):
    with pytest.raises(ValueError, match=f"rounds must be >= 1 and window_ms > 0, {shown}"):
        measure(print, print, **options)


def test_the_floor_is_the_larger_of_two_bounds():
    assert roofline_floor(4.8e9, 0, "cuda") == pytest.approx(0.9) == roofline_floor(0, 4.94e11, "cuda")
    assert roofline_floor(0, 0, "cpu") == 0.0
    for device, (bandwidth, peak) in module._PEAKS.items():
        for bytes, flops in itertools.product((0, 10, 1e9), (0, 1e6, 1e12)):
            found = roofline_floor(bytes, flops, device)
            assert found == pytest.approx(900 * max(bytes / bandwidth, flops / peak))
    with pytest.raises(ValueError, match="device must be one of cpu, cuda, got 'tpu'"):
        roofline_floor(1, 1, "tpu")
    for given in ((-1, 1), (1, -2.5), (math.nan, 1)):
        with pytest.raises(ValueError, match="must not be negative, and bandwidth > 0, got"):
            roofline_floor(*given, "cpu")
    for bandwidth in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="bandwidth > 0, got 1, 1 and"):
            roofline_floor(1, 1, "cpu", bandwidth)
    assert roofline_floor(1e9, 0, "cpu", 1e10) == pytest.approx(90) and roofline_floor(1e9, 0, "cpu", 1e20) == roofline_floor(1e9, 0, "cpu")


def test_a_rate_out_of_reach_is_that_of_this_core():
    for size in (1 << 22, 1 << 25):
        source, target = torch.ones(2, size // 8)
        spent = min(module._window(lambda: target.copy_(source), 1) for _ in range(5))  # noqa: B023
        assert size / module._out_of_reach(size) < 1e-3 * spent < 20 * size / module._out_of_reach(size)


def test_blocks_of_two_pairs_cancel_a_drift_that_is_linear_in_each():
    m = lambda t: math.exp(0.4 * t)  # noqa: E731
    ref = [3 * m(t) for k in range(6) for t in (9 * k, 9 * k + 3)]
    new = [2 * m(t) for k in range(6) for t in (9 * k + 1, 9 * k + 2)]
    assert module._paired(ref, new) == (pytest.approx(1.5), (pytest.approx(1.5), pytest.approx(1.5)))
    assert module._paired([*ref, 1e9, 1.0], [*new, 1.0, 1.0])[0] == pytest.approx(1.5)


def test_no_draw_comes_twice_to_the_same_child(monkeypatch):
    class Draws:
        def inputs(self, seed, device):
            drawn.append(torch.randn(1 << 11, 1 << 9))
            return [drawn[-1]]
    drawn = []
    monkeypatch.setattr(module, "_KEPT_BYTES", 3 << 22)
    bench = module._Bench.__new__(module._Bench)
    bench.device, bench.problem, bench.bases, bench.unused = "cpu", Draws(), [], []
    bench.trials = [(0, dataclasses.make_dataclass("T", ["inputs"])([torch.empty(1 << 11, 1 << 9)]))]
    for child, new in ((1, 5), (2, 2)):
        bench.unused, before = list(bench.bases), len(drawn)
        seen = [bench.unseen()[0] for _ in range(5)]
        ratios = {round(float((v[:, 1] / v[:, 0]).sort().values[1000]), 6) for v in seen}
        assert len(drawn) - before == new and len(ratios) == 5 and len(bench.bases) == 3, child


# --- feedback ---------------------------------------------------------------------------------------------------------

def test_feedback_names_what_helps():
    profile = {"events": [[f"k{n}", 10.0 * n, n % 2 == 0, n != 6] for n in range(8)]}
    text = EvalResult("a", "ok", True, True, False, ("decoy",), 2.5, (2.25, 2.75), 5.0, 2.0, 0.25, 0.5, 1e-7,
                      profile=profile).feedback()
    for words in ("Correct.", "decoy", "2.5 [2.25, 2.75]", "2 ms", "reference 5 ms", "25%", "50%", "k7: 70 us", "k3: 30 us"):
        assert words in text
    assert "k2" not in text and "k6: 60 us, does not matter" in text and text.count("does not matter") == 1
    assert text.index("k7") < text.index("k6") < text.index("k5")


def test_feedback_shows_the_candidates_own_frames_and_a_short_message(gym):
    code = candidate(before="raise ValueError('b\u00f6se ' + 'a' * 5000 + ' end')")
    line = next(n for n, text in enumerate(code.splitlines(), 1) if "raise ValueError" in text)
    text = gym.evaluate(task(code)).feedback()
    assert f"candidate.py:{line} in forward" in text and "ValueError: b\u00f6se aaa" in text and text.endswith("aaa end")
    assert "gym.py" not in text and "torch/nn" not in text and len(text) < 500, text
    crash = gym.evaluate(task(candidate(before="import ctypes; ctypes.string_at(8)"))).feedback()
    assert "SIGSEGV" in crash and re.search(r"candidate\.py:\d+ in forward", crash), crash
    assert "gym.py" not in crash and "File" not in crash and len(crash) < 500, crash
    noisy = gym.evaluate(task(candidate().replace("float v = ", "flot v = "))).feedback()
    assert noisy.startswith("Does not compile.") and "unknown type name" in noisy


SURROGATES = (candidate(before="raise ValueError('\\ud83d')"), candidate("setattr(torch, '\\udead', 1)"), "x = '\ud83d'")


@pytest.mark.parametrize("code", SURROGATES)
def test_half_a_character_in_what_a_candidate_says_harms_nobody(code, gym):
    result = gym.evaluate(task(code))
    for text in (result.feedback(), repr(result), json.dumps(module._write_result(result), ensure_ascii=False)):
        text.encode()
    assert module._plain({"\ud83d": ["a\ud83d", 1.5]}) == {"?": ["a?", 1.5]}  # as older files hold it


@pytest.mark.parametrize("status", STATUSES)
def test_feedback_tells_every_status_apart_and_the_end_of_an_error(status):
    one = EvalResult("a", status, error="x" * 5000 + "the end" if status not in ("ok", "hacked") else None,
                     correct=status in ("ok", "hacked"), flags=("forgery",) if status == "hacked" else ())
    text = one.feedback()
    others = [EvalResult("a", other).feedback().split("\n")[0] for other in STATUSES if other != status]
    assert text.split("\n")[0] not in others and len(text) < 2500
    assert ("the end" in text) == (one.error is not None) and ("forgery" in text) == (status == "hacked")
    assert ("Speed-up" in text) == one.correct and ("no reward" in text) == (status == "hacked")


def test_feedback_reveals_no_number_of_the_inputs(gym):
    source = PROBLEM.source.replace("[torch.randn(ROWS, COLS)]", "[torch.randn(ROWS, COLS).sign() * 7193.25]")
    problem = Problem.from_source(source, name="telltale")
    for after in ("y[0, 3] += 1", "y[1] = float('nan')", "y = y * 2", "return y.double()"):
        result = gym.evaluate(task(candidate(after=after), problem))
        assert result.status == "incorrect" and result.feedback().startswith("Wrong result.")
        assert not re.search("7193|seed", result.feedback())


def test_no_gym_of_these_tests_has_a_task_without_a_record(gym, fleet):
    for one in (gym, fleet):
        records = one.records()
        assert len({r.task_id for r in records}) == len(records) == sum(one._queue.counts().values())
        assert {r.status for r in records} <= set(STATUSES)
