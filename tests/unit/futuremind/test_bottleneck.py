"""The law of granularity, limits, curves and gaps, and the exact attribution, on a small world with a fake reader."""
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from collai.futuremind.bottleneck import (
    FEATURES,
    STAGES,
    CapacityCurve,
    LimitedStudent,
    SplitTeacher,
    _Facts,
    _fit_curve,
    _Oracle,
    _probes,
    bias_gap,
    capacity_curve,
    fit_law,
    lossy_share,
    optimal_granularity,
    shapley_attribution,
    shapley_values,
    snap_rate,
    step_difficulty,
)
from collai.futuremind.paradigms import run_plan
from collai.futuremind.plan import Step
from collai.futuremind.retrieval import BM25Retriever, Corpus
from collai.futuremind.students import ReaderStudent
from collai.futuremind.teachers import SymbolicTeacher
from collai.futuremind.worlds import Question, make_world

positive = st.floats(0.01, 5)
SETTINGS = [(g, s) for g in ("coarse", "medium", "fine") for s in ("terse", "verbose")]


class Knows:
    """Reads perfectly whatever the documents of its hits say; its retriever is real."""

    def __init__(self, world, retriever):
        self.facts, self.retriever, self.read_k = _Facts(world), retriever, 10
        self.oracle = _Oracle(SimpleNamespace(retriever=retriever, read=lambda *_: []), self.facts, (), False, True)
        self.titles = [doc.title for doc in world.docs]

    def read(self, step, hits, bindings):
        return self.oracle.read(step, [SimpleNamespace(title=t) for t in self.titles], bindings)


@pytest.fixture(scope="module")
def world():
    return make_world(seed=3, entities=120)


@pytest.fixture(scope="module")
def student(world):
    return Knows(world, BM25Retriever(Corpus.from_docs(world.docs)))


@pytest.fixture(scope="module")
def questions(world):
    return world.questions(21, seed=0)


@pytest.fixture(scope="module")
def chains(world):
    asked = world.questions(12, types=["bridge", "compositional"], seed=0)
    return [q for q in asked if SymbolicTeacher().plan(q.question).paradigm == "A"]


@given(positive, positive, positive, st.floats(1.05, 5))
def test_the_optimum_is_the_minimum(D, a, b, gamma):
    m, success = optimal_granularity(D, a, b, gamma)

    def g(x):
        return a * math.exp(x) + b * D**gamma * math.exp(x * (1 - gamma))

    found = minimize_scalar(g, bracket=(math.log(m) - 1, math.log(m) + 1), tol=1e-12)
    assert math.isclose(math.exp(-found.fun), success, rel_tol=1e-9) and math.isclose(math.exp(found.x), m, rel_tol=1e-3)


def test_the_worked_example():
    m, success = optimal_granularity(4, 0.1, 0.2, 2)
    assert (type(m), type(success)) == (float, float)
    assert round(m, 3) == 5.657 and round(-math.log(success), 4) == 1.1314
    assert optimal_granularity(4, 0.2, 0.4, 2)[0] == m and optimal_granularity(8, 0.1, 0.2, 2)[0] == pytest.approx(2 * m)


@pytest.mark.parametrize(("arguments", "message"), [
    ((4, 0.1, 0.2, 1), "gamma must be > 1 and finite, got 1"), ((4, 0.1, 0.2, 0.5), "got 0.5"), ((4, 0.1, 0.2, math.nan), "got nan"),
    ((0, 0.1, 0.2, 2), "D must be finite and > 0, got 0"), ((4, -0.1, 0.2, 2), "a must be finite and > 0, got -0.1"),
    ((4, 0.1, math.inf, 2), "b must be finite and > 0, got inf")])
def test_bad_laws_by_message(arguments, message):
    with pytest.raises(ValueError, match=message):
        optimal_granularity(*arguments)


def test_split_plans_add_up_and_answer_alike(chains, student):
    free = LimitedStudent(student)
    for question in chains:
        facts = len(SymbolicTeacher().plan(question.question).steps)
        for m in range(1, 2 * facts + 1):
            plan = SplitTeacher(m).plan(question.question)
            plan.validate()
            difficulties = [step_difficulty(s) for s in plan.steps]
            assert len(difficulties) == m and sum(difficulties) == facts
            assert max(difficulties) - min(difficulties) <= 1
            assert run_plan(plan, free).candidates[0].text == question.answer
        with pytest.raises(LookupError, match=f"no chain of at least {facts + 0.5:g} facts"):
            SplitTeacher(2 * facts + 1).plan(question.question)
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        SplitTeacher(0)


def test_only_chains_are_split(world):
    for question in world.questions(4, types=["intersection", "comparison"], seed=0):
        with pytest.raises(LookupError, match="no chain"):
            SplitTeacher(2).plan(question.question)


def test_a_lost_thread_follows_the_draws(chains, student):
    free, lucky = LimitedStudent(student), []
    for seed in range(6):
        limited = LimitedStudent(student, 0.2, 0.1, 2, seed)
        for question in chains:
            plan = SymbolicTeacher().plan(question.question)
            queries = [t["query"] for t in run_plan(plan, free).trace]
            lucky.append(all(limited.draw(q) < math.exp(-0.3) for q in queries))
            assert bool(run_plan(plan, limited).candidates) == lucky[-1]
    assert 0 < np.mean(lucky) < 1 and limited.rate(2) == pytest.approx(0.6)


def test_limits_of_memory_steps_and_attention(world, chains, student):
    plan = next(p for q in chains if len((p := SymbolicTeacher("medium", "verbose").plan(q.question)).steps) >= 3)
    assert run_plan(plan, LimitedStudent(student)).candidates
    assert not run_plan(plan, LimitedStudent(student, max_instruction_tokens=10)).candidates
    step, child = Step("S", "father of {v1}", ("v1",), ("v2",), "person"), next(s for s, _, r in world.graph.edges(keys=True) if r == "father")
    assert [len(LimitedStudent(student, memory_slots=n).read(step, [], {"v1": (child,), "v0": ("b",)})) for n in (1, 2)] == [0, 1]
    for change, message in (({"a": -1}, "a and b must be >= 0"), ({"gamma": 0.5}, "gamma >= 1"), ({"max_steps": 0}, "limits must be >= 1")):
        with pytest.raises(ValueError, match=message):
            LimitedStudent(student, **change)


def test_a_page_is_opened_by_the_reader_and_not_made_up(world):
    reader = ReaderStudent(BM25Retriever(Corpus.from_docs(world.docs)))
    title = world.docs[0].title
    found = [LimitedStudent(reader).read(Step("S", f"page of {name}", (), ("p0",), "text"), [], {}) for name in (title, "Nobody Nor")]
    assert [[c.text for c in some] for some in found] == [[title], []]


@settings(max_examples=10)
@given(st.floats(0.03, 0.3), st.floats(0.03, 0.3), st.floats(1.5, 3))
def test_the_law_is_found_again(a, b, gamma):
    parts = [[4], [2, 2], [1] * 4, [0.5] * 8]
    law = np.array([math.exp(-sum(a + b * d**gamma for d in p)) for p in parts])
    fitted = fit_law(parts, law * 1e6, 1_000_000)
    again = np.array([math.exp(-sum(fitted[0] + fitted[1] * d ** fitted[2] for d in p)) for p in parts])
    assert np.abs(again - law).max() < 5e-3


def test_bad_counts_by_message():
    with pytest.raises(ValueError, match=r"wins must be 2 counts in \[0, 10\], got \[3\]"):
        fit_law([[1], [2]], [3], 10)
    with pytest.raises(ValueError, match="got \\[3, 11\\]"):
        fit_law([[1], [2]], [3, 11], 10)


@given(st.lists(st.booleans(), min_size=36, max_size=36), st.sampled_from(FEATURES), st.floats(0, 20))
def test_a_curve_never_rises(passed, name, more):
    plans = [p for q in PROBED for p in _probes(q)]
    curve = _fit_curve(plans, [passed[i % 36] for i in range(len(plans))])
    size = {n: 2.0 for n in FEATURES}
    assert 0 < curve(size | {name: 2 + more}) <= curve(size) < 1 and min(curve.weights) >= 0


PROBED = [q.question for q in make_world(seed=3, entities=120).questions(6, seed=0)]


def test_a_curve_learns_a_limit(world, student):
    patient = capacity_curve(LimitedStudent(student), world, n=42)
    hasty = capacity_curve(LimitedStudent(student, max_steps=2), world, n=42)
    assert isinstance(patient, CapacityCurve)
    long, short = (SymbolicTeacher(g).plan(next(q for q in world.questions(6, types=["bridge"], hops=(3, 4), seed=0)).question) for g in ("fine", "coarse"))
    assert patient(long) > 0.8 and hasty(long) < 0.3 < hasty(short)
    assert patient(long) == pytest.approx(patient({**long.complexity(), "hidden": 0, "extra": len(long.steps) - len(long.conditions)}))
    with pytest.raises(ValueError, match="n must be >= 1, got 0"):
        capacity_curve(student, world, n=0)


def test_the_gap_is_0_for_the_easiest_teacher_and_counts_what_cannot_be_planned(student, questions):
    curve = CapacityCurve(5.0, (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
    assert bias_gap(SymbolicTeacher("coarse"), student, questions, curve) == 0.0
    gaps = [bias_gap(SymbolicTeacher(g), student, questions, curve) for g in ("coarse", "medium", "fine")]
    assert gaps == sorted(gaps) and gaps[1] > 0 and all(type(g) is float for g in gaps)

    class Mute:
        def plan(self, question):
            raise LookupError(question)

    assert bias_gap(Mute(), student, questions, curve) > gaps[2]
    assert 0 <= bias_gap(SymbolicTeacher("fine"), LimitedStudent(student, 0.2), questions) <= 1
    with pytest.raises(ValueError, match="questions must not be empty"):
        bias_gap(SymbolicTeacher(), student, [])


def test_the_oracle_agrees_with_every_plan(world, student, questions):
    facts = _Facts(world)
    for question in questions:
        gold = [t for t, _ in question.supporting_facts]
        for setting in SETTINGS:
            plan = SymbolicTeacher(*setting).plan(question.question)
            run = run_plan(plan, _Oracle(student, facts, gold, True, True))
            assert run.candidates and run.candidates[0].text in (question.answer, *question.aliases), (setting, question.question)
        blind = _Oracle(SimpleNamespace(retriever=SimpleNamespace(search=lambda queries, k: [[] for _ in queries]), read=lambda *_: []),
                        facts, gold, False, True)
        assert not run_plan(SymbolicTeacher().plan(question.question), blind).candidates


@given(st.lists(st.floats(-1, 1), min_size=16, max_size=16))
def test_shapley_values_are_means_over_orders(worth):
    want = np.zeros(4)
    for order in itertools.permutations(range(4)):
        before = 0
        for i in order:
            want[i] += (worth[before | 1 << i] - worth[before]) / 24
            before |= 1 << i
    assert np.allclose(shapley_values(worth), want) and math.isclose(want.sum(), worth[-1] - worth[0], abs_tol=1e-12)


def test_shapley_tables_must_be_whole():
    with pytest.raises(ValueError, match=r"worth must have 2\*\*n entries, got 6"):
        shapley_values(range(6))


def test_the_attribution_adds_up(world, student, questions):
    found = shapley_attribution(world, questions[:7], LimitedStudent(student, 0.1, 0.1))
    assert tuple(found.values) == STAGES == ("P", "L", "S", "R", "search", "read")
    assert sum(found.values.values()) == pytest.approx(found.acc_all - found.acc_none, abs=1e-12)
    assert found.acc_all == 1.0 and found.table.shape == (64, 7) and found.acc_none == found.table[0].mean()
    assert found.values["L"] > 0
    assert shapley_attribution(world, questions[:3], LimitedStudent(student, max_steps=1)).acc_all < 1
    with pytest.raises(ValueError, match="questions must not be empty"):
        shapley_attribution(world, [], student)


def test_snapped_chains_are_counted():
    question = Question("id", "who", "D", ["Dee"], evidences=[["A", "r", "B"], ["B", "r", "C"], ["C", "r", "D"]])

    def run(*bound):
        return SimpleNamespace(trace=[{"step": f"S{i}", "bound": {f"x{i}": [v] if isinstance(v, str) and v else list(v)}} for i, v in enumerate(bound)] + [{"step": "end", "reason": ""}])

    cases = [(run("B", "C", "D"), 0), (run(["the b"], ["c"], ["Dee"]), 0), (run("X", "Y", "Z"), 1), (run("X", "C", "D"), 1), (run("B", "C", "Z"), 0),
             (run("B", "X", []), 0), (run("B", [], "Z"), 0), (run("Y", "Z"), 1)]
    for made, snapped in cases:
        assert snap_rate([(made, question)]) == snapped, made
    assert snap_rate([(made, question) for made, _ in cases]) == pytest.approx(3 / 8)
    with pytest.raises(ValueError, match="runs must not be empty"):
        snap_rate([])


def test_the_lossy_share_is_0_for_the_reference_and_positive_for_what_cannot_be_read(world, student, chains):
    assert lossy_share(SymbolicTeacher("medium"), student, world, chains) == 0.0
    single = SimpleNamespace(retriever=student.retriever, read_k=10,
                             read=lambda step, hits, bindings: [] if " of the " in step.query else student.read(step, hits, bindings))
    assert lossy_share(SymbolicTeacher("coarse"), single, world, chains) > 0.3
    mute = SimpleNamespace(retriever=student.retriever, read_k=10, read=lambda *_: [])
    assert lossy_share(SymbolicTeacher("coarse"), mute, world, chains) == 0.0
    with pytest.raises(ValueError, match="questions must not be empty"):
        lossy_share(SymbolicTeacher(), student, world, [])


def test_a_reader_that_reads_for_real(world, questions):
    corpus = Corpus.from_docs(world.docs)
    reader = ReaderStudent(BM25Retriever(corpus))
    found = shapley_attribution(world, questions[:4], reader)
    assert sum(found.values.values()) == pytest.approx(found.acc_all - found.acc_none, abs=1e-12) and found.acc_all == 1.0
    assert 0 <= bias_gap(SymbolicTeacher("medium"), reader, questions[:6]) <= 1
