"""The gym's path for a GPU, on a CPU: regions are plain shared memory, and a thread stands for what is queued behind the gate."""

import contextlib
import ctypes
import mmap
import os
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch

from collai.core import sandbox
from collai.core.sandbox import Zygote
from collai.drkernel import gym as module
from collai.drkernel.ckernel import CompileError
from collai.drkernel.gym import Task
from collai.drkernel.problems import builtin_problems

HERE = sys.modules.setdefault("test_gym_gpu", sys.modules[__name__])  # as children find this file
PROBLEM = next(p for p in builtin_problems(1) if p.name == "gelu").with_sizes(ROWS=64, COLS=128)
OTHER = next(p for p in builtin_problems(1) if p.name == "row_softmax").with_sizes(ROWS=64, COLS=64)


class GPU(str):
    """Is "cuda" to the gym and "cpu" to torch."""

    __slots__ = ()
    __module__ = "test_gym_gpu"

    def __hash__(self):
        return hash("cuda")

    def __eq__(self, other):
        return str(other) == "cuda"

    def __ne__(self, other):
        return not self == other

    def __reduce__(self):
        return GPU, (str.__str__(self),)


class Region(module._Region):
    """Memory that everybody may write."""

    def __init__(self, size, child_writes, device="cpu"):
        self.size, (self.fd, self.memory) = size, module.shared_memory(size, True)
        self.bytes = module._as_tensor(self.memory)

    def forget(self):
        pass

    def poison(self, size):
        self.bytes[:size] = 255


class Gate:
    """Passes that are asked for are worked off by a thread when the word is written."""

    def __init__(self):
        page = module._HELD["claims"]
        self.words = (ctypes.c_uint32 * 1024).from_buffer(page, len(page) - module._GATE_BYTES)

    def shut(self, number):
        self.queued, self.model = [], module._HELD["model"]

        def later(*inputs):
            if getattr(self.model, "waits", False):
                while self.words[0] != number:
                    time.sleep(1e-3)
                return self.model(*inputs)
            self.queued.append((inputs, torch.empty_like(inputs[0])))
            return self.queued[-1][1]

        module._HELD["model"] = later

    def tick(self):
        pass

    def mark(self, number):
        queued, model = self.queued, self.model
        module._HELD["model"] = model

        def work():
            while self.words[0] != number:
                time.sleep(2e-5)
            with torch.no_grad():
                for inputs, output in queued:
                    output.copy_(model(*inputs))
            if not getattr(model, "silent", False):
                self.words[module._MARK] = number

        threading.Thread(target=work, daemon=True).start()


def install():
    """Make a process see a GPU."""
    module._Region, module._let_judge_build = Region, lambda: None
    module._begin_cuda = lambda base, share: module._HELD.update(wait=lambda: None, **({"gate": Gate()} if share else {}))
    module._open_cuda = lambda handle: module._as_tensor(mmap.mmap(5 + handle[0], handle[1]))
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda *_: None
    torch.cuda.current_stream = lambda *_: types.SimpleNamespace(synchronize=lambda: None, cuda_stream=0)


@contextlib.contextmanager
def judging(tmp_path, share=0.1):
    """A judge for a GPU that is none."""
    kept = (module._Region, module._begin_cuda, module._open_cuda, module._let_judge_build,
            torch.cuda.synchronize, torch.cuda.empty_cache, torch.cuda.current_stream)
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        install()
        with Zygote(["collai.drkernel.gym", "test_gym_gpu:install"]) as zygote:
            judge = module._Judge(zygote, {"device": GPU("cpu"), "sandbox": "off", "kernels": str(tmp_path), "backend": "c",
                                           "memory_mb": 4096, "sandbox_name": "off", "room": 1 << 24, "share": share}, None)
            judge.regions = lambda bench, expected=False: {"watch": "", "handles": [(0, 1 << 24), (1, 1 << 23)]}
            yield judge
    finally:
        sys.path.remove(str(Path(__file__).parent))
        (module._Region, module._begin_cuda, module._open_cuda, module._let_judge_build,
         torch.cuda.synchronize, torch.cuda.empty_cache, torch.cuda.current_stream) = kept


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    with judging(tmp_path_factory.mktemp("kernels")) as found:
        yield found


CODE = '''import torch, sys
from torch import nn
GYM = sys.modules["collai.drkernel.gym"]
def jit(function):
    return function
@jit
def kernel(x, y):
    y.copy_(nn.functional.gelu(x))
BEFORE
class ModelNew(nn.Module):
    SAYS = True
    def forward(self, x):
        y = torch.empty_like(x)
        BODY
        return y
'''
PAID = {"status": "ok", "flags": []}
calls = iter(range(10**6))


def code(body="kernel(x, y)", before="", says="fine"):
    return f"{CODE.replace('BODY', body).replace('BEFORE', before).replace('SAYS', says)}# {next(calls)}"


def judged(judge, text, problem=PROBLEM, **options):
    found = judge.evaluate(Task(problem, text, **{"trials": 4, "require_generated": False, "timeout": 20} | options))
    assert found["status"] != "infra_error", found["error"]
    return found


def test_passes_are_queued_and_timed_from_the_gate(judge):
    first = judged(judge, code())
    assert first["correct"] and first["profile"]["gated"] and first["profile"]["calls_a_window"] > 1, first
    assert set(first["profile"]["seconds"]) == {"begin", "question", "time", "profile"} and first["new_ms"] > 0
    assert len(judge.ready) == judge.spare and len(judge.dying) == 1
    children = [side.child for side in judge.ready]
    assert judged(judge, code())["correct"] and judge.ready[0].child is children[1]


def test_a_pass_that_waits_is_timed_as_it_is(judge):
    found = judged(judge, code(says="waits"))
    assert found["correct"] and not found["profile"]["gated"] and found["new_ms"] > 0, found


def test_a_mark_that_never_comes_is_asked_for(judge, monkeypatch):
    monkeypatch.setattr(module, "_MARK_NS", 50_000_000)
    found = judged(judge, code(says="silent"), trials=2)
    assert found["correct"] and found["new_ms"] * found["profile"]["calls_a_window"] > 25, found


EARLY = """
class Open:
    def shut(self, number): self.number = number
    def tick(self): pass
    def mark(self, number): GATE.words[GYM._MARK] = number
GATE = vars(GYM).setdefault("KEPT_GATE", GYM._HELD["gate"])  # the emptied source was here before
GYM._HELD["gate"] = Open()
"""


@pytest.mark.parametrize(("body", "before", "status", "flag"), [
    ("kernel(x, y)", EARLY, "incorrect", "stale_output"),  # computes before the inputs are there
    ("kernel(1.01 * x, y)", "", "incorrect", None), ("raise ValueError('no')", "", "runtime_error", None),
    ("import time; time.sleep(60)", "", "timeout", None), ("import os; os._exit(3)", "", "crashed", None)])
def test_what_is_wrong_is_found(judge, body, before, status, flag):
    found = judged(judge, code(body, before), timeout=3)
    assert found["status"] == status and (flag is None or flag in found["flags"]), found
    assert judged(judge, code())["correct"]


def test_the_emptied_source_comes_first_and_a_failure_costs_a_child(judge):
    for text, other, loaded in ((code(), True, True), (code("y.copy_(nn.functional.gelu(x))"), False, True),
                                (code("kernel(x, y); assert y.isfinite().all() and y.any()", "torch.empty_like = torch.zeros_like"),
                                 True, False), ("class ModelNew: pass", None, False)):
        task = Task(PROBLEM, text, timeout=20)
        bench = judge.bench(task.problem, task.baseline)
        side, found = judge.emptied(task, bench, judge.take(20))
        assert (found, side.loaded) == (other, loaded) and 5 < side.budget <= 20
        judge.leave(side)
    judge.take(1).child.close()


def test_two_problems_are_held_at_most(judge):
    for problem in (PROBLEM, OTHER, PROBLEM.with_sizes(ROWS=32), OTHER, PROBLEM):
        judged(judge, code().replace("nn.functional.gelu(x)", "nn.functional.gelu(x)" if problem.name == "gelu" else "x.softmax(-1)"),
               problem)
        assert len(judge.benches) <= 2 + 1 and next(reversed(judge.benches))[0] == problem
        assert all(bench.aside is None for key, bench in judge.benches.items() if key[0] != problem)
    next(iter(judge.benches.values())).reference.child.kill()
    assert judged(judge, code(), PROBLEM.with_sizes(ROWS=16))["correct"]


def test_without_a_gate_windows_are_as_before(tmp_path):
    with judging(tmp_path, share=0.0) as judge:
        found = judged(judge, code())
        assert found["correct"] and not found["profile"]["gated"], found


def test_a_child_that_never_lived_is_nobodys_fault(judge):
    side = judge.make_side(None, judge.outputs, judge.claims, wait=False)
    side.child.kill()
    while os.read(side.child.stdout, 64):  # it may have said that it lives
        pass
    with pytest.raises(module._LostError, match="no child|lost"):
        judge.begin(side)


def test_work_beside_the_gate_is_charged():
    bench = module._Bench.__new__(module._Bench)
    spent = iter((1.0, 2.0, 1.2, 9.0))
    bench.device, bench.shown = "cuda", float("inf")
    bench.hide, bench.show = (lambda: None), (lambda: next(spent))
    side = module._Side.__new__(module._Side)
    side.queue, side.open = (lambda count, seconds: True), (lambda: 5.0)
    told = [bench.timed_pass(side, 4, True) for _ in range(4)]
    assert told == [(5.0, False), (5.5, True), (5.0, False), (12.5, True)]


def test_late_is_more_than_chance_and_a_fiftieth():
    ref = [1.0, 1.1, 0.9, 1.0, 1.05, 0.95]
    assert module._late(ref, [1.01, 1.1, 0.92, 1.02, 1.04, 0.97], 2.0) == [0.0] * 6
    assert module._late(ref, [t + 0.5 for t in ref], 2.0) == pytest.approx([0.5] * 6)
    assert module._late(ref, [0.5] * 6, 2.0) == [0.0] * 6


# --- Triton's tools ---------------------------------------------------------------------------------------------------

def test_the_judge_assembles(monkeypatch, tmp_path):
    source, made, result = (tmp_path / name for name in ("k.ptx", "k.o", "x.so"))
    source.write_text("ptx"), result.write_bytes(b"cubin")
    asked = []
    monkeypatch.setattr(module, "_ask_compiler", lambda *words: asked.append(words) or str(result))
    tools, command = module._Tools(), ["/bin/ptxas", "-v", "--gpu-name=sm_90a", str(source), "-o", str(made)]
    tools.run(command, check=True, stderr=None)
    assert made.read_bytes() == b"cubin" and asked == [("ptx", ("-v", "--gpu-name=sm_90a"), "ptxas")]
    assert tools.CalledProcessError is subprocess.CalledProcessError
    assert module._build_launcher("name", str(source), "folder", [], []) == str(result)
    assert asked[1] == ("ptx", ("name",), "launcher")

    def refuse(*_):
        raise CompileError("line 3")

    monkeypatch.setattr(module, "_ask_compiler", refuse)
    with (tmp_path / "log").open("w+b") as log, pytest.raises(subprocess.CalledProcessError):
        tools.run(command, check=True, stderr=log)
    assert (tmp_path / "log").read_text() == "line 3"


def test_tools_run_in_a_sandbox_and_are_named(tmp_path):
    with Zygote(["collai.drkernel.gym"]) as zygote:
        with pytest.raises(ValueError, match="there is no tool 'make' here"):
            module._built(zygote, "auto", "make", "", (), 10)
        with pytest.raises(CompileError):  # there is no Triton, or the text is none
            module._built(zygote, "auto", "ptxas", "nonsense", (), 30)
    side = types.SimpleNamespace(left=lambda: 1.0, builder=module._no_tool, refused="", sources={})
    assert "no tool" in module._compile(side, b'{"src": "", "flags": [], "tool": "ptxas"}')["error"]


def test_what_may_start_programs_is_seen():
    for text, starts in (("import torch\nf = torch.compile(print)", True), ("from torch.utils.cpp_extension import load", True),
                         ("import triton", False), ("import subprocess\nsubprocess.run([])", True)):
        assert module._starts_programs(text) == starts
    assert not module._empty_kernels("x = 1") and "pass" in module._empty_kernels("@triton.jit\ndef k(x):\n    x + 1")


# --- the zygote's watch -----------------------------------------------------------------------------------------------

def test_one_look_serves_all_children():
    looks = []
    limits = {"timeout": None, "memory": 1 << 40, "alone": False, "processes": 4, "disk": 1 << 30, "folder": "/nowhere"}
    child = types.SimpleNamespace(pid=1, status=sys.stdout.fileno(), limits=limits, began=0.0, resident=0, given=set())
    task = sandbox._Task(1, "S", 1, 1, 0)

    def groups():
        looks.append(1)
        return {1: [task] * 5}

    assert sandbox._exceeds(child, groups) in ("processes", "stopped") and len(looks) <= 1
    assert any(one.pid == module.os.getpid() for some in sandbox._groups().values() for one in some)


@pytest.mark.parametrize(("slow", "flagged"), [(lambda k: k < 5, False), (lambda k: True, True), (lambda k: k % 2 == 0, True), (lambda k: False, False)])
def test_a_single_call_is_looked_at_again_before_it_counts_as_a_batch(slow, flagged):
    bench, new, judge = object.__new__(module._Bench), object.__new__(module._Side), types.SimpleNamespace(alone=contextlib.nullcontext)
    bench.reference, asked = object.__new__(module._Side), []

    def single(one, count, gated):
        asked.append(one)
        assert (count, gated) == (1, True)
        return 1.15 if one is new and slow(4 + asked.count(new)) else 0.25
    bench.single = single
    spent = {"gated": True, "alone": {"ref": [0.25] * 5, "new": [1.15 if slow(k) else 0.25 for k in range(5)]}}
    assert module._batches(judge, bench, new, spent, 0.15, {"ref_ms": 0.1, "new_ms": 0.1}) is flagged
    assert asked.count(new) == asked.count(bench.reference) == 20 * slow(0)


@pytest.mark.parametrize(("count", "asked"), [(0, ["shut", "tick", "mark"]), (2, ["shut", "pass", "pass", "mark"])])
def test_a_window_without_passes_has_a_kernel_that_does_nothing(count, asked, monkeypatch):
    done = []
    gate = types.SimpleNamespace(shut=lambda number: done.append("shut"), tick=lambda: done.append("tick"), mark=lambda number: done.append("mark"))
    monkeypatch.setattr(module, "_HELD", {"gate": gate, "model": lambda x: done.append("pass"), "sets": [[1], [2], [3]]})
    assert module._queue(count, 7) == b"d"
    assert done == asked
