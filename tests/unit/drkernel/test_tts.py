"""More turns at test time: which turns are read again, what a kill costs, and what the best of many is worth."""
import dataclasses
import itertools
import json
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from collai.drkernel import tts
from collai.drkernel.gym import EvalResult
from collai.drkernel.policy import ChatPolicy, Trajectory, Turn
from collai.drkernel.problems import Problem
from collai.drkernel.rewards import best_by_turn, fast_p
from collai.drkernel.tts import (
    ScaledTrajectory,
    best_of,
    fast_table,
    select_context,
    sequential_scaling,
    study,
    study_rows,
    turn_score,
)
from collai.eval.stats import pass_at_k

SOURCE = "import torch\nclass Model(torch.nn.Module): ...\ndef get_inputs(): return []\ndef get_init_inputs(): return []\n"
ONE, TWO = (Problem.from_source(SOURCE + f"N = {n}\n", name=f"p{n}") for n in (1, 2))


class Dice:
    """A policy that writes a number, and a gym that takes it for the speed-up; below 0.5 it is wrong, above 2 hacked."""

    def __init__(self, fails_at=0, status=None):
        self.read, self.asked, self.fails_at, self.status = [], 0, fails_at, status

    def propose(self, problem, history=(), *, seed=0):
        self.read.append([turn.response for turn in history])
        return Turn([{"role": "user", "content": problem.name}], str(seed), str(seed % 1000 / 400), logprobs=[-0.5])

    def evaluate(self, task):
        self.asked += 1
        if self.asked == self.fails_at and self.status is None:
            raise KeyboardInterrupt
        speed = float(task.code)
        status = self.status if self.asked == self.fails_at else "hacked" if speed > 2 else "ok" if speed >= 0.5 else "incorrect"
        return EvalResult("t", status, compiled=True, correct=speed >= 0.5, hacked=speed > 2, speedup=max(speed, 0.5),
                          coverage=0.25, coverage_displaced=min(speed / 2.5, 1.0), max_err=math.inf)


def run(dice=None, **options):
    """A run of dice."""
    dice = dice or Dice()
    return sequential_scaling(dice, ONE, dice, **options)


# --- which turns ------------------------------------------------------------------------------------------------------

finite = st.one_of(st.integers(-3, 3), st.sampled_from([0.1, 0.7, 0.3, 1e-300, 1e300]), st.floats(-1e6, 1e6))


@given(st.lists(finite, max_size=12), st.integers(0, 13))
def test_the_window_is_the_first_of_the_largest_exact_sum(scores, keep):
    n = len(scores)
    starts = range(max(n - keep, 0) + 1)
    best = max(starts, key=lambda s: (sum(Fraction(x) for x in scores[s:s + keep]), -s))
    assert select_context(scores, keep) == list(range(n))[best:best + keep]


@given(st.lists(finite, max_size=12), st.integers(0, 13))
def test_the_other_methods_keep_the_last_and_the_best(scores, keep):
    n = len(scores)
    assert select_context(scores, keep, "last") == list(range(n))[max(n - keep, 0):]
    top = select_context(scores, keep, "topk")
    assert top == sorted(set(top)) and len(top) == min(keep, n)
    assert all((scores[out], -out) < (scores[k], -k) for k in top for out in set(range(n)) - set(top))


def test_a_tie_is_a_tie_in_the_presence_of_rounding():
    assert select_context([0.1, 0.7, 0.1, 0.7] * 5, 2) == [0, 1]
    assert select_context([0.1, 0.2, 0.3, 0.3, 0.2, 0.1], 3) == [1, 2, 3]
    assert select_context(np.array([1, 5, 5], dtype=np.float32), 1) == [1] == select_context((x for x in (1, 5, 5)), 1, "topk")


@pytest.mark.parametrize(("arguments", "message"), [
    (([1.0, math.nan], 1), "scores must be finite, got nan"),
    (([-math.inf], 1), "scores must be finite, got -inf"),
    (([1.0], -1), "keep must be .*got -1"),
    (([1.0], 1, "first"), "unknown method 'first', use one of 'best', 'last', 'topk'"),
])
def test_bad_selections_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        select_context(*arguments)


# --- the loop ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("turns", "iterations", "keep"), [(5, 10, 4), (1, 6, 0), (3, 4, 0), (4, 3, 2), (5, 1, 4)])
@pytest.mark.parametrize("method", ["best", "last", "topk"])
def test_every_turn_reads_what_was_kept_and_what_came_since(turns, iterations, keep, method):
    dice = Dice()
    made = run(dice, turns=turns, iterations=iterations, keep=keep, method=method, seed=3)
    assert isinstance(made, Trajectory) and isinstance(made, ScaledTrajectory) and dice.asked == len(made.turns)
    assert len(made.turns) == turns + (iterations - 1) * (turns - keep) and len(made.contexts) == iterations
    said, n, expected = [turn.response for turn in made.turns], 0, []
    for kept in made.contexts:
        assert kept == select_context([turn.reward for turn in made.turns[:n]], keep, method)
        context = [said[k] for k in kept]
        while len(context) < turns:
            expected.append(list(context))
            context.append(said[n])
            n += 1
    assert dice.read == expected and len(set(said)) == len(said)


def test_the_metric_counts_accepted_turns_only():
    made = run(metric="speedup", seed=1)
    scores = [turn_score(turn, "speedup") for turn in made.turns]
    for turn, score in zip(made.turns, scores, strict=True):
        right = turn.result["correct"] and not turn.result["hacked"]
        assert score == (turn.result["speedup"] if right else 0) and turn_score(turn) == turn.reward
        assert turn_score(turn, "coverage") == (turn.coverage if right else 0)
    assert {turn.result["hacked"] for turn in made.turns} == {True, False} and 0.0 in scores
    assert made.contexts[-1] == select_context(scores[:-1], 4)


@pytest.mark.parametrize("killed_at", [1, 4, 8, 14])
def test_a_killed_run_goes_on_and_evaluates_nothing_twice(tmp_path, killed_at):
    whole, first, second = run(), Dice(fails_at=killed_at), Dice()
    with pytest.raises(KeyboardInterrupt):
        run(first, path=tmp_path / "a" / "run.jsonl")
    with (tmp_path / "a" / "run.jsonl").open("ab") as file:
        file.write(b'{"messages": [{"role": "\xc3')  # cut within a letter
    assert run(second, path=tmp_path / "a" / "run.jsonl") == whole
    assert (first.asked - 1) + second.asked == 14
    done = Dice()
    assert run(done, path=tmp_path / "a" / "run.jsonl") == whole and done.asked == 0 and done.read == []


def test_a_longer_run_begins_as_a_shorter_one(tmp_path):
    short = run(iterations=3, path=tmp_path / "run.jsonl")
    dice = Dice()
    longer = run(dice, path=tmp_path / "run.jsonl")
    assert longer.turns[:7] == short.turns and longer.contexts[:3] == short.contexts and dice.asked == 7
    assert run(iterations=3, path=tmp_path / "run.jsonl") == short


def test_a_file_of_another_run_is_refused(tmp_path):
    path = tmp_path / "run.jsonl"
    run(path=path, iterations=1, trials=6)
    before = path.read_bytes()
    for options, odd in [({"method": "last"}, "method"), ({"seed": 1}, "seed"), ({"trials": 7}, "judging"), ({"keep": 3}, "keep")]:
        with pytest.raises(ValueError, match=f"run.jsonl holds another run: it differs in {odd}"):
            run(path=path, **{"trials": 6, **options})
    with pytest.raises(ValueError, match="it differs in problem"):
        sequential_scaling(Dice(), TWO, Dice(), path=path, trials=6)
    for text in ("no turns\n", "no end", "", "[1]\n", '{"seed": 0}\n{}'):
        (tmp_path / "other.txt").write_text(text)
        with pytest.raises(ValueError, match="other.txt is no file of turns"):
            run(path=tmp_path / "other.txt")
        assert (tmp_path / "other.txt").read_text() == text
    assert path.read_bytes() == before and json.loads(before.split(b"\n")[0])["turns"] == 5


class Weighted(Dice):
    """A policy with weights, and perhaps a key."""

    def __init__(self, weight, key=None):
        super().__init__()
        self.model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(self.model.weight, weight)
        if key:
            self.key = key


def test_turns_of_another_policy_are_not_taken_for_ones_own(tmp_path):
    path = tmp_path / "run.jsonl"
    made = run(Weighted(1.0), path=path, iterations=1)
    for other in (Dice(), Weighted(2.0), Weighted(1.0, key="b")):
        with pytest.raises(ValueError, match="run.jsonl holds another run: it differs in policy"):
            run(other, path=path, iterations=1)
        assert other.read == []
    again = Weighted(1.0)
    assert run(again, path=path, iterations=1) == made and again.read == []
    names = [tts._identity(ChatPolicy(SimpleNamespace(identity=lambda name=name: {"model": name}), temperature=heat))
             for name, heat in (("a", 1.0), ("b", 1.0), ("a", 0.5), ("a", 1.0))]
    assert len(set(names)) == 3 and names[0] == names[3]
    head, *lines = path.read_text().splitlines()
    old = {name: value for name, value in json.loads(head).items() if name != "policy"}
    path.write_text("\n".join([json.dumps(old), *lines, ""]))
    with pytest.raises(ValueError, match="it differs in policy"):  # a file that does not say whose turns it holds
        run(again, path=path, iterations=1)


def test_a_gym_that_fails_leaves_no_turn_behind(tmp_path):
    with pytest.raises(RuntimeError, match="the gym could not evaluate turn 2"):
        run(Dice(fails_at=3, status="infra_error"), path=tmp_path / "run.jsonl")
    assert run(path=tmp_path / "run.jsonl") == run()


@pytest.mark.parametrize(("options", "message"), [
    ({"turns": 0}, "turns must be .*got 0"), ({"iterations": 0}, "iterations must be .*got 0"),
    ({"keep": 5}, "keep must be .*got 5"), ({"keep": -1}, "keep must be .*got -1"), ({"seed": -1}, "seed must be .*got -1"),
    ({"method": "first"}, "unknown method 'first'"), ({"metric": "speed"}, "unknown metric 'speed'"),
    ({"trials": 0}, "trials must be >= 1, got 0"), ({"pr_mode": "all"}, "unknown pr_mode 'all'"),
    ({"timeout": -1}, "timeout must be positive and finite, got -1"), ({"w_pr": -1.0}, "w_pr must be finite and not negative"),
    ({"baseline": "fast"}, "baseline must be one of eager, compile, got 'fast'"),
])
def test_a_run_that_makes_no_sense_is_refused_before_a_turn_is_made(options, message):
    dice = Dice()
    with pytest.raises(ValueError, match=message):
        run(dice, **options)
    assert dice.read == []


def test_an_unknown_keyword_is_named_before_a_turn_is_made():
    dice = Dice()
    with pytest.raises(TypeError, match="unknown keyword 'trails'"):
        run(dice, trails=5)
    assert dice.read == [] and dice.asked == 0


def test_the_keywords_of_judge_reach_the_task():
    class Kept(Dice):
        def evaluate(self, task):
            self.task = task
            return super().evaluate(task)

    dice = Kept()
    run(dice, turns=1, keep=0, iterations=1, trials=4, correctness_trials=2, timeout=7, baseline="compile",
        require_generated=False, pr_mode="paper")
    got = dice.task
    assert (got.trials, got.correctness_trials, got.timeout, got.baseline, got.require_generated, got.pr_mode) == (
        4, 2, 7, "compile", False, "paper")


def test_a_turn_that_is_not_judged_has_no_score():
    with pytest.raises(ValueError, match="the turn is not judged"):
        turn_score(Turn([], "", ""))
    with pytest.raises(ValueError, match="unknown metric 'tokens'"):
        turn_score(run(iterations=1).turns[0], "tokens")


# --- what is reported -------------------------------------------------------------------------------------------------

def test_the_table_of_fast_turns_agrees_with_the_metrics_of_rewards():
    samples = [run(seed=s) for s in range(12)]
    last, best = fast_table(samples, 1.2)
    speeds = [[turn.result["speedup"] for turn in sample.turns] for sample in samples]
    right = [[turn.result["correct"] and not turn.result["hacked"] for turn in sample.turns] for sample in samples]
    tops = best_by_turn(speeds, right)
    for n in range(14):
        assert last[:, n].mean() == fast_p([row[n] for row in speeds], [row[n] for row in right], 1.2)
        assert best[:, n].mean() == fast_p([row[n] for row in tops], [row[n] > 0 for row in tops], 1.2)
    assert last.shape == best.shape == (12, 14) and (best[:, 1:] >= best[:, :-1]).all() and (best >= last).all()


def test_a_turn_that_just_reaches_the_threshold_counts_if_asked_for():
    turn = dataclasses.replace(run(iterations=1).turns[0], result={"correct": True, "hacked": False, "speedup": 1.2})
    samples = [Trajectory(ONE, [turn])]
    assert not fast_table(samples, 1.2)[0].any() and fast_table(samples, 1.2, inclusive=True)[0].all()


@pytest.mark.parametrize("lengths", [[], [0], [1, 2]])
def test_samples_must_have_equally_many_turns(lengths):
    turns = run(iterations=1).turns
    with pytest.raises(ValueError, match="samples must have equally many turns, at least one, got"):
        fast_table([Trajectory(ONE, turns[:n]) for n in lengths])


@given(st.lists(finite, min_size=1, max_size=7), st.data())
def test_the_best_of_k_is_the_mean_over_subsets(scores, data):
    k = data.draw(st.integers(1, len(scores)))
    subsets = [max(subset) for subset in itertools.combinations(map(float, scores), k)]
    assert math.isclose(best_of(scores, k), math.fsum(x / len(subsets) for x in subsets), rel_tol=1e-9, abs_tol=1e-6)
    assert min(scores) - 1e-6 <= best_of(scores, k) * (1 + 1e-12) or best_of(scores, k) < 0


@given(st.integers(1, 40), st.data())
def test_of_zeros_and_ones_it_is_pass_at_k(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    assert math.isclose(best_of([1] * c + [0] * (n - c), k), pass_at_k(n, c, k), abs_tol=1e-12)


def test_best_of_at_the_ends_and_without_sense():
    assert best_of([3, 1, 2], 1) == 2 and best_of([3, 1, 2], 3) == 3 and best_of([0.5] * 2000, 1000) == pytest.approx(0.5)
    for scores, k, message in [([1.0], 2, "k must be .*got 2"), ([1.0], 0, "k must be .*got 0"), ([], 1, "k must be"),
                               ([math.inf], 1, "scores must be finite, got inf")]:
        with pytest.raises(ValueError, match=message):
            best_of(scores, k)


def test_a_study_spends_as_many_turns_in_every_way_and_goes_on_after_a_kill(tmp_path):
    dice = Dice()
    found = study(dice, [ONE, TWO], dice, seeds=range(2), iterations=3, folder=tmp_path)
    assert list(found) == ["best", "last", "topk", "independent"] and dice.asked == 4 * 4 * 7
    assert {len(sample.turns) for samples in found.values() for sample in samples} == {7}
    assert all(kept == [] for sample in found["independent"] for kept in sample.contexts)
    again = Dice()
    assert study(again, [ONE, TWO], again, seeds=range(2), iterations=3, folder=tmp_path) == found and again.asked == 0
    rows = {row["name"]: row for row in study_rows(found)}
    for arm, samples in found.items():
        last, best = fast_table(samples)
        row = rows[f"scaling {arm}"]
        assert row["measured"] == best[:, -1].mean() and row["problems"] == ["p1", "p1", "p2", "p2"] and row["turns"] == 7
        assert [[n in fast for n in range(7)] for fast in row["last"]] == last.tolist()
        assert [[first is not None and n >= first for n in range(7)] for first in row["best"]] == best.tolist()
    with pytest.raises(ValueError, match="unknown arm 'first'"):
        study(dice, [ONE], dice, arms=["first"])
    with pytest.raises(ValueError, match="unknown device 'cuda'"):
        tts.measure("cuda")
