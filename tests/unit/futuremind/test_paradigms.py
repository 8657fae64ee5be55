"""Executors with fakes, the choice by topology, and the theorems against brute force."""
import copy
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from collai.futuremind.paradigms import (
    Candidate,
    best_vote,
    choose_paradigm,
    forward_cost,
    order_conditions,
    run_forward,
    run_parallel,
    run_plan,
    run_reverse,
    segments,
)
from collai.futuremind.plan import Condition, Plan, Step
from collai.futuremind.retrieval import BM25Retriever, Corpus, DenseRetriever, HybridRetriever, SvdEmbedder

RUNS = (run_forward, run_reverse, run_parallel)


class Index:
    """A retriever without words: a query has as many hits as it has answers."""

    def __init__(self, facts):
        self.facts, self.calls = facts, []

    def search(self, queries, k=10):
        self.calls.append((list(queries), k))
        return [[SimpleNamespace(doc_id=i, title=f"{q}/{i}", score=1.0, rank=i + 1) for i in range(min(k, len(self.facts.get(q, ()))))]
                for q in queries]


class Student:
    """A reader that knows the answers to the queries, and whose candidates are only those it is given, if any."""

    def __init__(self, facts):
        self.retriever, self.seen = Index(facts), []

    def read(self, step, hits, bindings):
        self.seen.append((step.id, dict(bindings)))
        query = hits[0].title.rpartition("/")[0] if hits else ""
        return [Candidate(text, f"doc {query}", i) for i, text in enumerate(self.retriever.facts.get(query, ()))]


def plan_of(steps, target="words", paradigm="A", conditions=()):
    return Plan("o", (), target, "text", (), "m", conditions, paradigm, steps)


def unary(queries, paradigm="C"):
    return plan_of([Step(f"S{i}", q, (), "x", "person*") for i, q in enumerate(queries)], "x", paradigm,
                   [Condition(f"K{i}", q, "r", (), "x", True) for i, q in enumerate(queries)])


def texts(run):
    return [c.text for c in run.candidates]


CHAIN = plan_of([Step("S1", "members of Kel", (), "x", "person*"), Step("S2", "town of {x}", "x", "y", "city*")], "y")
TOWNS = {"members of Kel": ["Ana", "Tor"], "town of Ana": ["Rome", "Oslo"], "town of Tor": ["ROME ", "Bern"], "films": ["Lume"],
         "director of Lume": ["Tor"]}


@given(st.lists(st.sets(st.integers(0, 9), min_size=0), min_size=1, max_size=5))
def test_the_paradigms_agree_on_exact_unary_conditions(sets):
    facts = {f"q{j}": [f"P{i}" for i in sorted(s)] for j, s in enumerate(sets)}
    want = {f"P{i}" for i in set.intersection(*sets)}
    rounds = []
    for run in RUNS:
        student = Student(facts)
        out = run(unary(facts), student)
        assert set(texts(out)) == want
        assert out.searches == sum(len(queries) for queries, _ in student.retriever.calls)
        assert all((f"doc q{j}", facts[f"q{j}"].index(x)) in out.evidence for j in range(len(sets)) for x in want)
        rounds.append(out.rounds)
    assert rounds[2] == 1 and rounds[0] <= len(sets)
    if want:
        assert rounds == [len(sets), len(sets), 1]


def test_reverse_takes_the_rarest_first_and_gives_what_is_left_to_the_next():
    facts = {"wide": list("abcdef"), "tight": ["c", "e"], "mid": ["c", "d", "e"]}
    student = Student(facts)
    out = run_reverse(unary(facts), student)
    assert [t["step"] for t in out.trace] == ["S1", "S2", "S0"] and out.searches == 3
    assert [seen.get("x") for _, seen in student.seen] == [None, ("c", "e"), ("c", "e")]


def test_reverse_looks_words_up_in_an_index_that_has_them():
    class Words(Index):
        def tokenize(self, texts):
            return [text.split() for text in texts]

    counts = {"won": 90, "prize": 60, "rare": 2, "the": 0, "wide": 50, "other": 55}
    facts = {f"won the {name} prize": ["P"] for name in ("wide", "rare", "other")}
    student = Student(facts)
    student.retriever = Words(facts | {word: ["d"] * n for word, n in counts.items()})
    out = run_reverse(unary(facts), student)
    assert [t["query"] for t in out.trace] == ["won the rare prize", "won the wide prize", "won the other prize"]
    assert out.searches == 3 and [k for _, k in student.retriever.calls][1:] == [10, 10, 10]
    assert choose_paradigm(unary(facts), student.retriever) == "B"


def test_parallel_sends_one_batch_a_level():
    steps = [Step("S1", "a", (), "x1"), Step("S2", "b {x1}", (), "x2"), Step("S3", "c", (), "x3"), Step("S4", "d {x3}", (), "x4"),
             Step("S5", "e {x2} {x4}", (), "x5")]
    facts = {"a": ["1"], "b 1": ["2"], "c": ["3"], "d 3": ["4"], "e 2 4": ["5"]}
    for run, rounds, calls in ((run_parallel, 3, [["a", "c"], ["b 1", "d 3"], ["e 2 4"]]), (run_forward, 5, None), (run_plan, 3, None)):
        student = Student(facts)
        out = run(plan_of(steps, "x5", "mixed"), student)
        assert (texts(out), out.rounds, out.searches) == (["5"], rounds, 5)
        assert calls in (None, [queries for queries, _ in student.retriever.calls])


def test_a_set_fans_out_and_equal_texts_are_one():
    for run in RUNS:
        out = run(CHAIN, Student(TOWNS))
        assert texts(out) == ["Rome", "Oslo", "Bern"] and (out.searches, out.rounds) == (3, 2)
    assert [t["query"] for t in out.trace] == ["members of Kel", "town of Ana", "town of Tor"]
    assert out.trace[1] == {"step": "S2", "round": 2, "query": "town of Ana", "titles": ["town of Ana/0", "town of Ana/1"],
                            "found": ["Rome", "Oslo"], "bound": {"y": ["Rome", "Oslo", "Bern"]}}


def test_the_fan_is_limited():
    facts = {"all": [f"P{i}" for i in range(200)]}
    out = run_forward(plan_of([Step("S1", "all", (), "x"), Step("S2", "of {x}", (), "y")], "y"), Student(facts))
    assert out.searches == 65 and texts(out) == []


@pytest.mark.parametrize(("stop", "want"), [("first", ["Ana"]), ("limit:1", ["Ana"]), ("limit:7", ["Ana", "Tor"]), ("until enough", ["Ana", "Tor"])])
def test_stop_rules(stop, want):
    assert texts(run_forward(plan_of([Step("S1", "members of Kel", (), "x", "person", "", stop)]), Student(TOWNS))) == want


def test_a_stop_rule_counts_what_all_conditions_leave():
    facts = {"q0": ["a", "b", "c"], "q1": ["c", "b"]}
    steps = [Step(f"S{j}", f"q{j}", (), "x", "person", "", "first") for j in range(2)]
    for run in RUNS:
        assert len(texts(run(plan_of(steps, "x"), Student(facts)))) == 1
        assert texts(run(plan_of(steps, "x"), Student(facts)))[0] in ("b", "c")


def test_filters_see_the_candidate_and_the_bindings():
    facts = {"a": ["Ana"], "dates": ["4 March 1957", "1961-01-01", "unknown", "Ana"]}
    for text, want in (("year(x) > 1960", ["1961-01-01"]), ("x in v", ["Ana"]), ("", facts["dates"]), ("x < 1900", [])):
        plan = plan_of([Step("S1", "a", (), "v"), Step("S2", "dates", "v", "d", "date", text)], "d")
        assert texts(run_forward(plan, Student(facts))) == want


@pytest.mark.parametrize(("target", "want"), [
    ("y", ["Rome", "Oslo", "Bern"]), ("the town", ["Rome", "Oslo", "Bern"]), ("x", ["Ana", "Tor"]), ("count(x)", ["2"]),
    ("'yes' if 'Ana' in x else 'no'", ["yes"]), ("count(x) == 2", ["yes"]), ("count(x) - 0.5", ["1.5"]), ("count(x) + 1.0", ["3"]),
    ("argmin(2, x, 3, 'no')", ["Ana", "Tor"]), ("year(x)", [])])
def test_targets(target, want):
    out = run_forward(plan_of(CHAIN.steps, target), Student(TOWNS))
    assert texts(out) == want
    if target.startswith("argmin"):
        assert out.candidates[0].title == "doc members of Kel"


def test_nothing_found_ends_early_and_answers_nothing():
    empty = plan_of([Step("S1", "nobody", (), "x"), *CHAIN.steps[1:]], "'yes' if x == y else 'no'")
    for run in RUNS:
        out = run(empty, Student(TOWNS))
        assert (texts(out), out.evidence, out.searches, out.rounds) == ([], [], 1, 1)
    facts = {"q0": [], "q1": ["a"], "q2": ["a"]}
    assert run_forward(unary(facts), Student(facts)).searches == 1 and run_parallel(unary(facts), Student(facts)).searches == 3


def test_texts_as_candidates_plain_hits_and_steps_that_bind_nothing():
    student = SimpleNamespace(retriever=SimpleNamespace(search=lambda queries, k: [["hit"] * k for _ in queries]), read_k=3,
                              read=lambda step, hits, bindings: [f"{step.id}{len(hits)}"])
    out = run_forward(plan_of([Step("S1", "q"), Step("S2", "p", "S1")]), student)
    assert texts(out) == ["S23"] and out.evidence == [] and out.trace[0]["titles"] == ["hit"] * 3


def test_plan_and_student_are_not_changed():
    facts = {"q0": ["a", "b"], "q1": ["b"]}

    class Spoiler(Student):
        def read(self, step, hits, bindings):
            found = super().read(step, hits, bindings)
            bindings.clear(), hits.clear()
            return found

    for run in (*RUNS, run_plan):
        plan, student = unary(facts), Spoiler(facts)
        before, state = plan.to_json(), copy.deepcopy(facts)
        assert texts(run(plan, student)) == ["b"]
        assert plan.to_json() == before and facts == state and set(vars(student)) == {"retriever", "seen"}


def test_an_invalid_plan_is_refused():
    for run in (*RUNS, run_plan):
        with pytest.raises(ValueError, match="step S1 needs 'x'"):
            run(plan_of([Step("S1", "of {x}")]), Student({}))
    with pytest.raises(ValueError, match="a plan needs conditions or steps to choose a paradigm"):
        choose_paradigm(plan_of([]), Index({}))
    with pytest.raises(ValueError, match="conditions form a cycle: K1→K2→K1"):
        choose_paradigm(plan_of([], conditions=[Condition("K1", "", "", "K2"), Condition("K2", "", "", "K1")]), Index({}))


@pytest.mark.parametrize(("sizes", "want"), [((50, 2, 40), "B"), ((50, 4, 40), "B"), ((50, 5, 40), "C"), ((9, 9, 9), "C"), ((30, 0, 30), "B"),
                                             ((40, 3), "C"), ((40, 1), "B")])
def test_the_choice_for_unary_conditions(sizes, want):
    facts = {f"q{j}": ["a"] * n for j, n in enumerate(sizes)}
    assert choose_paradigm(unary(facts), Index(facts)) == want
    needing = [Condition(f"K{j}", f"q{j}", "r", "x", (), True) for j in range(len(sizes))]
    assert choose_paradigm(plan_of([], conditions=needing), Index(facts)) == want


def test_the_choice_for_other_graphs():
    def choose(*rows):
        return choose_paradigm(plan_of([], conditions=[Condition(f"K{i}", "q", "r", *row) for i, row in enumerate(rows)]), Index({}))

    assert choose(((), "a"), ("a", "b")) == choose(((), "a"), ("a", "b"), ("b", "c")) == choose(((),), ("K0",)) == "A"
    assert choose(((), "a"), ((), "b")) == choose(((), "a")) == "C"
    assert choose(((), "a"), ((), "b"), (("a", "b"), "c")) == choose(((), "a"), ("a", "b"), ((), "c")) == "mixed"
    assert choose_paradigm(CHAIN, Index({})) == "A"


def test_segments_cover_every_step_once():
    steps = [Step("S1", "a", (), "x1"), Step("S2", "b {x1}", (), "x2"), Step("S3", "c", (), "y"), Step("S4", "d", (), "y"),
             Step("S5", "e {x2} {y}", (), "z"), Step("S6", "f {z}", (), "w")]
    facts = {"c": ["m"] * 30, "d": ["m"]}
    found = segments(plan_of(steps), Index(facts))
    assert [(s.paradigm, s.steps) for s in found] == [("B", ("S3", "S4")), ("A", ("S1", "S2")), ("A", ("S5", "S6"))]
    out = run_plan(plan_of(steps, "w", "mixed"), Student(facts | {"a": ["1"], "b 1": ["2"], "e 2 m": ["5"], "f 5": ["6"]}))
    assert texts(out) == ["6"] and out.rounds == 4 and [t["step"] for t in out.trace][:2] == ["S1", "S4"]


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.1, 5)), min_size=0, max_size=5))
def test_the_order_by_rank_is_the_cheapest(pairs):
    sel, cost = [s for s, _ in pairs], [c for _, c in pairs]
    order = order_conditions(sel, cost)
    assert sorted(order) == list(range(len(pairs))) and all(type(i) is int for i in order)

    def price(order):
        return forward_cost(7, [sel[i] for i in order], [cost[i] for i in order])

    assert price(order) <= min(price(o) for o in itertools.permutations(range(len(pairs)))) * (1 + 1e-9) + 1e-12
    assert np.isclose(price(range(len(pairs))), sum(7 * c * np.prod(sel[:j]) for j, c in enumerate(cost)))


def test_known_orders_and_costs():
    assert order_conditions([0.5, 0.1, 0.9], [1, 1, 1]) == [1, 0, 2] and order_conditions(np.array([0.5, 0.5]), [2, 1]) == [1, 0]
    assert order_conditions([0.3, 0.3], [1, 1]) == [0, 1] and forward_cost(100, [0.1, 0.5], [1, 1]) == pytest.approx(110)
    assert forward_cost(3, [], []) == 0.0


@pytest.mark.parametrize(("call", "message"), [
    (lambda: order_conditions([1.2], [1]), r"sel must be in \[0, 1\], got 1.2"), (lambda: order_conditions([float("nan")], [1]), "got nan"),
    (lambda: order_conditions([0.5], [0]), "cost must be finite and > 0, got 0.0"), (lambda: forward_cost(1, [0.5], [-1]), "got -1.0"),
    (lambda: order_conditions([0.5, 0.5], [1]), "of one length, got 2 and 1"), (lambda: forward_cost(-1, [], []), "n0 must be .* got -1"),
    (lambda: best_vote([], []), "of one length >= 1, got 0 and 0"), (lambda: best_vote([0.5], [2]), "false must be in"),
    (lambda: best_vote([0.5], [0.5], 0), "truth must be > 0")])
def test_bad_numbers_by_message(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6), st.floats(0.5, 5), st.floats(0, 300))
def test_votes_by_enumeration(rates, truth, others):
    m, scores = len(rates), []
    for t in range(1, m + 1):
        right, wrong = (sum(np.prod([r[k] if v else 1 - r[k] for r, v in zip(rates, vote, strict=True)])
                            for vote in itertools.product((0, 1), repeat=m) if sum(vote) >= t) for k in (0, 1))
        scores.append(2 * truth * right / (truth + truth * right + others * wrong))
    t, score = best_vote([r for r, _ in rates], [f for _, f in rates], truth, others)
    assert score == pytest.approx(max(scores), abs=1e-12) and scores[t - 1] == pytest.approx(max(scores), abs=1e-12)


def test_votes_of_equal_coins_are_binomial():
    right, wrong = binom.sf(np.arange(5), 5, 0.8), binom.sf(np.arange(5), 5, 0.1)
    score = 2 * right / (1 + right + 100 * wrong)
    assert best_vote([0.8] * 5, [0.1] * 5) == (int(score.argmax()) + 1, pytest.approx(score.max()))


class Strict(Index):
    """Refuses empty queries, as the retrievers of this chain do."""

    def search(self, queries, k=10):
        assert all(query.strip() for query in queries)
        return super().search(queries, k)


def test_a_candidate_without_text_is_none():
    student = Student({"q": ["", "  ", "a"], "a": ["b"]})
    student.retriever = Strict(student.retriever.facts)
    plan = plan_of([Step("S1", "q", (), "x", "person*"), Step("S2", "{x}", "x", "y", "text")], "y")
    for run in (*RUNS, run_plan):
        out = run(plan, student)
        assert [c.text for c in out.candidates] == ["b"] and out.searches == 2
        student.retriever.facts = {"q": ["", " "], "a": ["b"]}
        assert run(plan, student).candidates == []
        student.retriever.facts = {"q": ["", "  ", "a"], "a": ["b"]}


def test_a_fused_retriever_is_asked_for_words_through_its_sparse_part():
    docs = [SimpleNamespace(title="Zorb Prize", sentences=["It was won by Ann."]),
            *(SimpleNamespace(title=f"Band {i}", sentences=["A member played."]) for i in range(30))]
    corpus = Corpus.from_docs(docs)
    sparse = BM25Retriever(corpus)
    fused = HybridRetriever(DenseRetriever(corpus, SvdEmbedder(8)), sparse)
    queries = ["member played", "played in a band", "won Zorb Prize"]
    assert choose_paradigm(unary(queries), sparse) == choose_paradigm(unary(queries), fused) == "B"
    student = SimpleNamespace(retriever=fused, read=lambda step, hits, bindings: ["Ann"])
    out = run_reverse(unary(queries), student)
    assert out.trace[0]["query"] == "won Zorb Prize" and out.searches == 3
def test_why_a_filter_or_a_target_failed_is_in_the_trace():
    facts = {"who": ["Ana", "Tor"], "when": ["never"]}
    steps = [Step("S1", "who", (), "x", "person"), Step("S2", "when", (), "d", "date")]
    run = run_forward(Plan("o", (), "year(d)", "number", (), "m", (), "A", steps), Student(facts))
    assert not run.candidates and run.trace[-1]["reason"] == "target 'year(d)': no year in 'never'"
    steps[1] = Step("S2", "when", (), "d", "date", "year(x) > 1950")
    run = run_forward(Plan("o", (), "d", "date", (), "m", (), "A", steps), Student(facts))
    assert [entry.get("reason") for entry in run.trace] == [None, "filter 'year(x) > 1950': no year in 'never'"]
