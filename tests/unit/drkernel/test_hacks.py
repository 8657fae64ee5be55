"""Hacks: a complete catalogue of running code, honest kernels that are right at odd sizes, a naive judge that is fooled."""
import ast
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config

from collai.drkernel import gym
from collai.drkernel import hacks as module
from collai.drkernel.gym import EvalResult, Task
from collai.drkernel.hacks import (
    CHECKS,
    HackCase,
    caught,
    corpus,
    honest,
    lookalikes,
    naive_judge,
    static_flags,
)
from collai.drkernel.problems import Problem, Trial, build_model, builtin_problems

PROBLEMS = {p.name: p for p in builtin_problems()}
SIZES = {"GROUP": ("ROWS", "GROUP", "COLS"), "INNER": ("ROWS", "INNER", "COLS"), "SIDE": ("BATCH", "CHANNELS", "SIDE"),
         "LENGTH": ("BATCH", "LENGTH", "COLS"), "COLS": ("ROWS", "COLS")}
STEPS = {"rope": ("COLS", 2), "attention_block": ("COLS", 4), "groupnorm_hardtanh_scale": ("CHANNELS", 8),
         "conv_block": ("CHANNELS", 4)}
MODULES: dict[str, type] = {}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory):
    """Kernels of this run in a folder of its own."""
    monkeypatch.setenv("COLLAI_KERNELS", str(tmp_path_factory.getbasetemp() / "kernels"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def answer(code: str, trial: Trial, seed: int) -> object:
    """What a candidate returns, each source compiled once."""
    if code not in MODULES:
        space: dict[str, object] = {"__name__": "candidate"}
        exec(compile(code, "<candidate>", "exec"), space)  # noqa: S102
        MODULES[code] = space["ModelNew"]
    model = build_model(MODULES[code], trial.init_inputs, seed, trial.state)
    with torch.no_grad():
        return model(*[v.clone() if isinstance(v, torch.Tensor) else v for v in trial.inputs])


def sized(problem: Problem, numbers: tuple[int, ...]) -> Problem:
    """A problem with sizes from these numbers, as multiples where it needs them."""
    names = next(names for key, names in SIZES.items() if f"\n{key} = " in problem.source)
    which, step = STEPS.get(problem.name, ("", 1))
    if "SIDE" in names:  # a norm over one element does not exist
        numbers = numbers[0] % 4 + 1, numbers[1] % 4 + 1, numbers[2] % 12 + 2
    return problem.with_sizes(**{name: n * (step if name == which else 1)
                                 for name, n in zip(names, numbers, strict=False)})


def result(status: str = "ok", flags: tuple[str, ...] = (), c: float = 0.9, c_d: float = 0.9) -> SimpleNamespace:
    return SimpleNamespace(status=status, flags=flags, coverage=c, coverage_displaced=c_d)


@contextmanager
def jaxtyping_off() -> Iterator[None]:
    """A stand-in is not of the annotated class."""
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", False)


# honest kernels


@pytest.mark.parametrize("name", list(PROBLEMS))
def test_an_honest_kernel_is_accepted_at_any_small_size(name):
    @settings(max_examples=6)
    @given(st.tuples(st.integers(1, 20), st.integers(1, 40), st.integers(1, 70)), st.integers(0, 2**31))
    def check(numbers, seed):
        trial = sized(PROBLEMS[name], numbers).trial(seed, seed + 1)
        assert trial.accepts(answer(honest()[name], trial, seed + 1))

    check()


@pytest.mark.parametrize("name", ["gelu", "small_matmul", "scaled_masked_softmax", "conv_block"])
def test_an_honest_kernel_is_accepted_at_the_shipped_size(name):
    problem = PROBLEMS[name]
    trial = problem.trial(3, 4)
    assert trial.accepts(answer(honest("c")[name], trial, 4))


def test_there_is_one_honest_kernel_a_problem_and_a_copy_is_handed_out():
    assert list(honest()) and set(honest()) == set(PROBLEMS) and len(honest()) == 24
    honest()["gelu"] = ""
    assert honest()["gelu"]
    for code in [*honest().values(), *honest("triton").values(), *(code for _, code in lookalikes().values())]:
        assert "class ModelNew" in code
        ast.parse(code)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_the_masked_softmax_is_nan_where_all_is_hidden_and_keeps_infinities(value):
    trial = PROBLEMS["scaled_masked_softmax"].with_sizes(ROWS=4, COLS=37).trial(0, 1)
    x, mask = trial.inputs
    mask[1], x[2, 5], mask[2, 5] = True, value, False
    with torch.no_grad():
        wanted = torch.softmax((x * trial.state["scale"]).masked_fill(mask, float("-inf")), dim=-1)
    found = answer(honest()["scaled_masked_softmax"], trial, 1)
    assert torch.allclose(found, wanted, atol=1e-6, rtol=1e-5, equal_nan=True) and wanted[1].isnan().all()


def test_the_lookalikes_are_right_twice_in_a_row_and_at_odd_sizes():
    assert len(lookalikes()) >= 12
    for problem, code in lookalikes().values():
        for size in (problem, problem.with_sizes(ROWS=7, COLS=37)):
            trial = size.trial(5, 6)
            assert trial.accepts(answer(code, trial, 6))


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend must be 'c' or 'triton', got 'cuda'"):
        honest("cuda")


# catalogue


def test_every_row_is_there_and_every_case_can_be_read():
    cases = corpus()
    assert {case.row for case in cases.values()} == set(range(1, 33))
    assert {case.row for case in cases.values() if case.needs == "cuda"} == {11, 12, 15, 25, 26}
    assert {case.row for case in cases.values() if case.needs == "cpu"} == set(range(1, 33)) - {11, 12}
    assert [case.row for case in cases.values()] == sorted(case.row for case in cases.values())
    for name, case in cases.items():
        assert name == case.name and case.checks and case.flags and case.title
        assert "ModelNew" in {node.name for node in ast.parse(case.code).body if isinstance(node, ast.ClassDef)}
        assert ("import triton" in case.code) == (case.needs == "cuda")
    cases.clear()
    assert corpus()


def test_every_check_has_a_case():
    assert set("".join(case.checks for case in corpus().values())) == set(CHECKS) and len(CHECKS) == 15


def test_wrong_numbers_are_wrong_and_shortcuts_are_right_once():
    seen = {}
    for case in corpus().values():
        if case.row in (1, 5, 6, 7, 14, 20, 21, 22, 23, 24, 25, 29, 30):
            if case.needs == "cpu":
                trial = case.problem.trial(1, 2)
                found = answer(case.code, trial, 2)
                seen[case.row] = trial.accepts(found + 0 if type(found) is not torch.Tensor else found)
    assert {row for row, right in seen.items() if not right} == {20, 21, 22, 23}


@pytest.mark.parametrize(("bad", "message"), [
    ({"row": 0}, "row must be in 1..32, got 0"), ({"checks": "XZQ"}, r"unknown checks \['Q', 'Z'\]; there are JKP"),
    ({"needs": "tpu"}, "needs must be 'cpu' or 'cuda', got 'tpu'")])
def test_a_case_that_is_none_is_refused(bad, message):
    good = {"name": "x", "row": 1, "title": "", "problem": PROBLEMS["gelu"], "code": "", "checks": "X", "flags": ()}
    HackCase(**good)
    with pytest.raises(ValueError, match=message):
        HackCase(**(good | bad))


SIGNS = {"no_generated_kernel", "decoy", "deferred_work", "background_work", "protocol_violation", "input_mutation",
         "output_alias", "output_type", "stale_output", "too_fast", "super_batching", "forgery", "profile_mismatch",
         "degenerate_problem", "side_stream", "incorrect", "runtime_error", "crashed", "displaced", "audit"}


def test_signs_are_words_that_the_gym_or_caught_can_say():
    assert {sign for case in corpus().values() for sign in case.flags} <= SIGNS
    text = Path(gym.__file__).read_text()
    assert all(f'"{sign}"' in text or f'"{sign}:' in text for sign in SIGNS - {"displaced", "audit"})


def test_only_cases_that_patch_something_forge():
    forging = {name for name, case in corpus().items() if any(flag.forging for flag in static_flags(case.code))}
    assert forging == {"clock_patch", "clock_patch_cuda", "comparator_patch", "slow_baseline"}
    for code in [*honest().values(), *(code for _, code in lookalikes().values())]:
        assert not any(flag.forging for flag in static_flags(code))


# caught


def test_a_sign_counts_only_if_the_case_names_it_and_the_result_is_not_ok():
    case = corpus()["pointer_cache"]
    assert caught(case, result("hacked", ("stale_output", "decoy"))) == ("stale_output",)
    assert caught(case, result("incorrect")) == ("incorrect",)
    assert caught(case, result("incorrect", ("stale_output",))) == ("stale_output", "incorrect")
    assert caught(case, result("ok", ("stale_output",))) == ()
    assert caught(case, result("timeout")) == caught(case, result("hacked", ("forgery",))) == ()


def test_an_account_that_is_void_is_a_sign_by_itself():
    case = corpus()["hidden_library"]
    assert caught(case, result("ok", ("profile_mismatch",), c=0.0, c_d=0.0)) == ("profile_mismatch",)
    assert caught(case, result("ok")) == () == caught(corpus()["decoy"], result("ok", ("profile_mismatch",)))


def test_displaced_and_audit_need_no_flag():
    burnt, degenerate = corpus()["coverage_by_copy"], corpus()["degenerate"]
    assert caught(burnt, result(c=0.9, c_d=0.1)) == ("displaced",) and caught(burnt, result(c=0.9, c_d=0.7)) == ()
    assert caught(corpus()["decoy"], result(c=0.9, c_d=0.1)) == ()
    assert caught(degenerate, result()) == ("audit",)
    sound = HackCase("x", 24, "", PROBLEMS["swiglu"].with_sizes(ROWS=64, COLS=64), "", "U", ("audit",))
    assert caught(sound, result()) == ()


# the gym's answers


class Gym:
    """Answers from a list, in the place of a gym."""

    def __init__(self, answers: list[EvalResult]) -> None:
        self.answers, self.asked = answers, []

    def map(self, tasks: list[Task]) -> list[EvalResult]:
        self.asked += tasks
        return self.answers[:len(tasks)]


def test_a_case_that_times_tell_is_asked_five_times_and_the_least_times_count(monkeypatch):
    case, other = corpus()["coverage_by_copy"], corpus()["decoy"]
    times = [(7000, 1700), (2000, 1900), (2700, 1960), (6100, 6200), (1900, 2080)]
    answers = [EvalResult(str(k), "ok", coverage=0.9, coverage_displaced=0.9,
                          profile={"torch_ref_us": old, "torch_new_us": new}) for k, (old, new) in enumerate(times)]
    gym = Gym([EvalResult("x", "hacked", hacked=True), *answers])
    with jaxtyping_off():
        told = module._judged(gym, [other, case])
    assert told["decoy"].status == "hacked" and len({task.code for task in gym.asked}) == 6
    assert told[case.name].coverage_displaced == pytest.approx(1 - 1700 / 1900)
    assert caught(case, told[case.name]) == ("displaced",)


def test_a_case_that_only_the_floor_tells_is_caught_if_it_is_too_fast_once():
    case = corpus()["part_read"]
    answers = [EvalResult(str(k), "ok", profile={"torch_ref_us": 1.0, "torch_new_us": 1.0}) for k in range(5)]
    answers[3] = EvalResult("3", "hacked", hacked=True, flags=("too_fast",))
    with jaxtyping_off():
        told = module._judged(Gym(answers), [case])
    assert told[case.name] is answers[3] and caught(case, told[case.name]) == ("too_fast",)


def test_an_answer_without_a_profile_stays_as_it_is():
    broken = [EvalResult(str(k), "crashed") for k in range(5)]
    assert module._least(broken) is broken[0]


def test_measured_rows_are_printed_as_they_come(capsys):
    case, name = corpus()["decoy"], "gelu"
    honest_answers = [EvalResult(str(k), "ok", speedup=2.0) for k in range(23)] + [EvalResult("x", "infra_error", error="e")]
    with jaxtyping_off():
        row = module._caught_row(Gym([EvalResult("0", "ok")]), [case], "cpu")
        alarms = module._alarm_row(Gym(honest_answers), "cpu")
    assert row["measured"] == 0.0 and row["missed"] == {"decoy": ["ok", None]} and row["signs"] == {"decoy": ()}
    assert alarms["measured"] == 0.0 and list(alarms["refused"].values()) == [["infra_error", "e"]]
    assert alarms["speedups"][name] == 2.0 and alarms["count"] == 24
    assert module._said([row]) == [row]
    assert json.loads(capsys.readouterr().out)["name"] == "hacks/cpu"


def test_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match="device must be one of cpu, cuda, got 'tpu'"):
        module.measure("tpu")


# naive judge


def test_the_naive_judge_believes_an_honest_kernel_and_refuses_a_wrong_one():
    problem = PROBLEMS["affine_relu_square_center"].with_sizes(ROWS=64, COLS=256)
    agree, speedup = naive_judge(problem, honest()[problem.name], calls=5)
    assert agree is True and speedup > 0
    wrong = honest()[problem.name].replace("y[j] -= mean", "y[j] += mean")
    assert naive_judge(problem, wrong, calls=1)[0] is False


PAID = """
import time
import torch
from collai.drkernel.hacks import corpus, naive_judge
time.perf_counter = time.thread_time  # a busy machine must not decide
plain = torch.allclose
with torch.no_grad():
    for name in ("pointer_cache", "lazy_tensor", "frame_walk", "zeros_pass", "comparator_patch"):
        case = corpus()[name]
        verdicts = [naive_judge(case.problem, case.code, calls=100) for _ in range(3)]
        torch.allclose = plain
        print(name, all(agree for agree, _ in verdicts), max(speedup for _, speedup in verdicts))
"""


def test_the_naive_judge_is_fooled_by_a_cache_a_lazy_tensor_a_comparator_and_a_frame():
    """In an interpreter of its own: the tests' checks of types would slow the candidate down."""
    done = subprocess.run([sys.executable, "-c", PAID], capture_output=True, text=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 5, done.stderr
    for name, agree, speedup in rows:
        assert agree == "True", name
        assert float(speedup) > 3 or name in ("frame_walk", "zeros_pass"), (name, speedup)


def test_the_naive_judge_reads_a_clock_that_can_be_replaced(monkeypatch):
    monkeypatch.setattr(time, "perf_counter", time.perf_counter)
    case = corpus()["clock_patch"]
    assert max(naive_judge(case.problem, case.code, calls=20)[1] for _ in range(3)) > 3


REFUSED = """
import json, os, sys
import torch
from collai.drkernel.hacks import corpus, naive_judge
case = corpus()[sys.argv[1]]
with torch.no_grad():
    if sys.argv[1] == "zeroed_input":
        space, x = {"__name__": "candidate"}, torch.randn(256, 1024)
        exec(case.code, space)
        y = space["ModelNew"]()(x)
        print("later", torch.allclose(y, torch.nn.functional.silu(x[:, :512]) * x[:, 512:]))
    print("verdict", naive_judge(case.problem, case.code, calls=5)[0])
"""


@pytest.mark.parametrize(("name", "said"), [("zeroed_input", "later True\nverdict False"), ("forged_answer", "verdict False"),
                                            ("exit_code", '{"correct": true, "speedup": 1000.0}')])
def test_what_this_naive_judge_refuses_another_one_believes(name, said):
    read, write = os.pipe()
    done = subprocess.run([sys.executable, "-c", REFUSED, name], capture_output=True, text=True, pass_fds=[write])
    os.close(write)
    with open(read, "rb") as pipe:
        assert (b"done" in pipe.read()) == (name == "forged_answer")
    assert done.returncode == 0 and done.stdout.strip().endswith(said), done.stderr


def test_the_naive_judge_believes_what_an_earlier_gym_paid(monkeypatch):
    with torch.no_grad():
        for name in ("answer_key", "called_back", "hidden_library", "part_read"):
            case = corpus()[name]
            assert naive_judge(case.problem, case.code, calls=1)[0], name


def test_the_naive_judge_refuses_no_calls():
    case = corpus()["decoy"]
    with pytest.raises(ValueError, match="calls must be >= 1, got 0"):
        naive_judge(case.problem, case.code, calls=0)


def test_the_public_names_are_listed():
    assert set(module.__all__) == {"CHECKS", "HackCase", "corpus", "honest", "lookalikes", "caught", "naive_judge",
                                   "static_flags", "kernel_rows", "measure"}
