"""Metrics of a report: verdicts, curves, scores and controls, coverage, strengths, faithfulness and replication."""
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

import collai.ddr.metrics as metrics
from collai.ddr.checklist import Claim, LeakError, build_checklist, verdict
from collai.ddr.explore import BlindAgent
from collai.ddr.sandbox import Env, SqlSandbox, Trajectory, Turn
from collai.ddr.worlds import make_world
from collai.eval.llm import BadReply, Reply, TokenUsage

VERDICTS = ("CORRECT", "INCORRECT", "INSUFFICIENT")


@pytest.fixture(scope="module")
def world():
    return make_world("retail", seed=3, rows=2_000)


@pytest.fixture(scope="module")
def checklist(world):
    return build_checklist(world)


def known(item):
    """The claim of an item with its value and evidence."""
    return replace(item.claim, value=item.value, unit=item.unit, evidence_sql=item.truth_sql, text="as the item says")


def tells(*claims, world="", tokens=100):
    """A trajectory with one claim a turn and all of them in the report."""
    turns = [Turn(tool="execute_query", args={"query": "SELECT 1"}, result={"count": 1}, insight=c.text or "said", claims=[c],
                  tokens_in=tokens, tokens_out=10, seconds=0.5) for c in claims]
    return Trajectory(turns=turns, report="all", claims=list(claims), world=world)


def spread(checklist, n):
    """The checklist with its items dealt to n entities."""
    return replace(checklist, items=[replace(item, entity=str(i % n)) for i, item in enumerate(checklist.items)])


class Judge:
    """A chat that answers by a function of the task."""

    def __init__(self, answer):
        self.answer, self.requests = answer, []

    def generate(self, requests):
        self.requests += requests
        texts = [self.answer(json.loads(r.messages[1]["content"]), r) for r in requests]
        if any(text is None for text in texts):
            raise BadReply(200, None, None, "no JSON")
        return [Reply(text, "stop", TokenUsage(1, 1)) for text in texts]


def reply(label="CORRECT_INFO", yes=(0,), no=(), **more):
    return json.dumps({"context_quality": label, "supporting_message_indices": list(yes), "contradicting_message_indices": list(no),
                       "evidence_text": "", "reasoning": "", **more})


# verdicts

@pytest.mark.parametrize("name", VERDICTS)
@pytest.mark.parametrize("form", ["{0}", "```\n{0}\n```", "**{0}**", "'{0}'", '{{"context_quality": "{0}"', 'so: {{"context_quality":"{0}", '
                                  '"reasoning": "the phrase "INCORRECT_INFO" and CORRECT_INFO"}}', "{0}. Yes, {0}!", "{0},", "My final verdict is {0}."])
def test_a_whole_token_is_read_in_any_dress(name, form):
    assert metrics.parse_verdict(form.format(f"{name}_INFO")) == name


@pytest.mark.parametrize("text", ["", "correct", "CORRECT", "correct_info", "Correct_Info", "XCORRECT_INFO", "IN_CORRECT_INFO", "CORRECT_INFOS", "CORRECT INFO",
                                  "CORRECT_INFO INCORRECT_INFO", "not CORRECT_INFO", "It isn't really CORRECT_INFO", "never CORRECT_INFO",
                                  '{"context_quality": ""}', '{"context_quality": null} CORRECT_INFO', '{"context_quality": "RIGHT"} CORRECT_INFO',
                                  '{"context_quality": "CORRECT_INFO", "context_quality": "INCORRECT_INFO"}'])
def test_anything_else_has_failed(text):
    assert metrics.parse_verdict(text) == "CHECKER_FAILED"


@given(st.text(alphabet="CORETINFUSAX_ {}\":\\\n", max_size=60))
@settings(max_examples=200)
def test_no_text_is_correct_without_the_token(text):
    found = metrics.parse_verdict(text.replace("CORRECT_INFO", ""))
    assert found in (*VERDICTS, "CHECKER_FAILED") and found != "CORRECT"


# curves

cases = st.lists(st.tuples(st.sampled_from([*VERDICTS, "CHECKER_FAILED"]), st.sets(st.integers(0, 14), min_size=1, max_size=4),
                           st.sets(st.integers(0, 14), min_size=1, max_size=4)), min_size=1, max_size=12)


@given(cases)
@settings(max_examples=60)
def test_curves_never_fall_and_end_at_the_accuracy(items):
    verdicts, yes, no = ([list(x) if isinstance(x, set) else x for x in side] for side in zip(*items, strict=True))
    late, soon = (metrics.curve_from_indices(verdicts, yes, no, range(17), rule) for rule in ("max", "min"))
    for curve in (late, soon):
        assert list(curve.columns) == ["k", "correct", "incorrect", "insufficient"]
        assert (np.diff(curve.correct) >= 0).all() and (np.diff(curve.incorrect) >= 0).all() and curve.correct[0] == 0
        assert np.allclose(curve.correct + curve.incorrect + curve.insufficient, 1)
        assert math.isclose(curve.correct[15], verdicts.count("CORRECT") / len(verdicts))
        assert math.isclose(curve.incorrect[15], verdicts.count("INCORRECT") / len(verdicts))
    assert (late.correct <= soon.correct).all()
    for k in (1, 5, 9):
        assert math.isclose(late.correct[k], sum(v == "CORRECT" and max(s) < k for v, s in zip(verdicts, yes, strict=True)) / len(verdicts))


def test_an_item_without_a_place_is_never_counted():
    assert metrics.curve_from_indices(["CORRECT"], [[]], [[]], [0, 9]).correct.tolist() == [0, 0]


def test_curves_refuse():
    for call, text in ((lambda: metrics.curve_from_indices(["YES"], [[]], [[]], [1]), "verdict must be one of .* got 'YES'"),
                       (lambda: metrics.curve_from_indices(["CORRECT"], [[0], [1]], [[]], [1]), "1 verdicts, 2 supporting"),
                       (lambda: metrics.curve_from_indices([], [], [], [1]), "0 verdicts"),
                       (lambda: metrics.curve_from_indices(["CORRECT"], [[-2]], [[]], [1]), "message index must be >= 0, got -2"),
                       (lambda: metrics.curve_from_indices(["CORRECT"], [[0]], [[]], [-1]), "k must be >= 0, got -1"),
                       (lambda: metrics.curve_from_indices(["CORRECT"], [[0]], [[]], [1], "mean"), "rule must be one of 'max', 'min'")):
        with pytest.raises(ValueError, match=text):
            call()


def test_scaling_curves_by_all_measures(checklist):
    two = spread(checklist, 2)
    runs = {str(e): tells(*(known(i) for i in two.items if i.entity == str(e)), tokens=100 * (e + 1)) for e in range(2)}
    result = metrics.check(runs, two)
    n = [sum(i.entity == str(e) for i in two.items) for e in range(2)]
    turns = metrics.scaling_curve(result)
    assert turns.k.tolist() == list(range(101)) and turns.correct[1] == pytest.approx(2 / sum(n)) and turns.correct[100] == 1
    tokens = metrics.scaling_curve(result, x="tokens")
    assert tokens.k.iloc[-1] == max(n[0] * 110, n[1] * 210) and tokens.correct.iloc[-1] == 1
    cheap = next(row for row in tokens.itertuples() if row.k >= 110)
    assert cheap.correct >= 1 / sum(n)
    cost = metrics.scaling_curve(result, x="cost", prices=(1.0, 10.0))
    assert cost.k.iloc[-1] == pytest.approx(max(n[0] * 200, n[1] * 300) / 1e6)
    assert metrics.scaling_curve(result, x="seconds").k.iloc[-1] == pytest.approx(max(n) * 0.5)
    assert ((turns.lo <= turns.correct + 1e-12) & (turns.correct <= turns.hi + 1e-12)).all()
    with pytest.raises(ValueError, match="prices must be"):
        metrics.scaling_curve(result, x="cost")
    with pytest.raises(ValueError, match="x must be one of 'turns', 'tokens', 'seconds', 'cost', got 'dollars'"):
        metrics.scaling_curve(result, x="dollars")
    with pytest.raises(ValueError, match="needs a result by message"):
        metrics.scaling_curve(metrics.check(runs, two, mode="trajectory"))


def test_the_band_draws_whole_entities():
    hits, groups = np.repeat([[1.0], [0.0]], 50, axis=0), np.repeat(["a", "b"], 50)
    assert [x.item() for x in metrics._banded(hits, groups, 0)] == [0, 1]
    lo, hi = metrics._banded(hits, np.repeat("a", 100), 0)  # one entity: its items
    assert 0.35 < lo.item() < 0.45 and 0.55 < hi.item() < 0.65


# scores and controls

def test_the_truth_scores_one_and_silence_nothing(world, checklist):
    truth = tells(*map(known, checklist.items), world=checklist.world)
    for mode, policy in itertools.product(("message", "trajectory"), ("strict", "paper")):
        result = metrics.check(truth, checklist, mode=mode, policy=policy)
        assert result.accuracy_item == result.accuracy_sample == result.precision == result.f1 == 1
        assert result.incorrect == result.insufficient == result.failed == 0
    silent = metrics.check(Trajectory(), checklist)
    assert (silent.accuracy_item, silent.insufficient, silent.precision, silent.f1) == (0, 1, 0, 0)


@pytest.mark.parametrize("policy", ["strict", "paper"])
def test_verdicts_are_those_of_the_checklist(checklist, policy):
    said = [c for n, item in enumerate(checklist.items) for c in
            ([known(item)], [replace(known(item), value=9e9)], [known(item), replace(known(item), direction=0)], [])[n % 4]]
    result = metrics.check(tells(*said), checklist, policy=policy)
    assert result.per_item.verdict.tolist() == [verdict(said, item, policy) for item in checklist.items]
    assert result.accuracy_item + result.incorrect + result.insufficient == pytest.approx(1)


def test_both_signs_pay_only_under_the_papers_policy(checklist):
    said = [c for item in checklist.items for c in (known(item), replace(known(item), direction=0, value=None))]
    strict, paper = (metrics.check(tells(*said), checklist, policy=p) for p in ("strict", "paper"))
    assert strict.accuracy_item == 0 and strict.incorrect == 1 and paper.accuracy_item == 1 and paper.precision <= 0.5


def test_a_claim_that_contradicts_an_item_is_not_right(checklist):
    one = checklist.items[0]
    both = replace(checklist, items=[one, replace(one, id="twin", value=3 * one.value)])
    result = metrics.check(tells(known(one)), both)
    assert result.accuracy_item == 0.5 and result.incorrect == 0.5 and result.claims == (0, 1) and result.precision == 0


def test_sample_and_item_averages_differ(checklist):
    items = checklist.items[:3]
    items = [replace(items[0], entity="a"), replace(items[1], entity="b"), replace(items[2], entity="b")]
    result = metrics.check({"a": tells(known(items[0])), "b": tells(known(items[1]))}, replace(checklist, items=items))
    assert result.accuracy_item == pytest.approx(2 / 3) and result.accuracy_sample == pytest.approx(3 / 4)
    both = metrics.check({"a": tells(known(items[0])), "b": tells()}, replace(checklist, items=items), mode="trajectory")
    assert metrics.overall(result, both) == pytest.approx((2 / 3 + 3 / 4 + 1 / 3 + 1 / 2) / 4)
    with pytest.raises(ValueError, match="needs modes 'message' and 'trajectory', got 'trajectory' and 'message'"):
        metrics.overall(both, result)


def test_a_crash_does_not_raise_a_score(checklist):
    two = spread(checklist, 2)
    mine = tells(*(known(i) for i in two.items if i.entity == "0"))
    for crashed in ({"0": mine, "1": None}, {"0": mine}):
        kept, dropped = (metrics.check(crashed, two, missing_policy=p) for p in ("insufficient", "drop"))
        assert kept.accuracy_sample == 0.5 and kept.insufficient == pytest.approx(0.5) and dropped.accuracy_sample == 1
    with pytest.raises(ValueError, match="nothing to score"):
        metrics.check({"0": None, "1": None}, two, missing_policy="drop")


def test_swapping_gives_each_entity_the_next_report(checklist):
    two = spread(checklist, 2)
    own = {e: tells(*(known(i) for i in two.items if i.entity == e), world=checklist.world) for e in "01"}
    assert metrics.check(own, two).accuracy_item == 1 and metrics.check(own, two, swapped=True).accuracy_item == 0
    crossed = {"0": own["1"], "1": own["0"]}
    assert metrics.check(crossed, two, swapped=True).accuracy_item == 1


def test_a_stranger_needs_to_be_asked_for(checklist):
    foreign = tells(known(checklist.items[0]), world="other")
    with pytest.raises(ValueError, match=f"checklist was built for world {checklist.world}, the trajectory is of other"):
        metrics.check(foreign, checklist)
    assert metrics.check(foreign, checklist, swapped=True).accuracy_item > 0
    with pytest.raises(ValueError, match="swapped=True needs the trajectory of another entity or world"):
        metrics.check(replace(foreign, world=checklist.world), checklist, swapped=True)


def test_chance_is_taken_out(checklist):
    half = tells(*map(known, checklist.items[::2]))
    acc = metrics.check(half, checklist).accuracy_item
    assert metrics.check(half, checklist, blind=0.2).chance_corrected == pytest.approx((acc - 0.2) / 0.8)
    again = metrics.check(half, checklist, blind=metrics.check(half, checklist))
    assert again.chance_corrected == 0 and again.blind == acc
    assert metrics.check(half, checklist).chance_corrected == acc and metrics.check(half, checklist).blind == 0
    assert math.isnan(metrics.check(half, checklist, blind=1.0).chance_corrected)
    judged = metrics.check(half, checklist, checker=metrics.LLMChecker(Judge(lambda task, r: reply())))
    assert math.isnan(judged.chance_corrected) and judged.accuracy_item == 1
    with pytest.raises(ValueError, match=r"blind must be in \[0, 1\], got 1.5"):
        metrics.check(half, checklist, blind=1.5)


def test_the_blind_agent_is_worth_nothing_once_chance_is_out(world, checklist):
    with Env(world.db_path) as env:
        blind = BlindAgent([]).run(env)
    base = metrics.check(blind, checklist)
    assert 0 < base.accuracy_item < 0.5 and metrics.check(blind, checklist, blind=base).chance_corrected == 0


def test_claims_above_the_budget(checklist):
    said = [replace(known(checklist.items[0]), value=float(v)) for v in range(101)]
    with pytest.raises(ValueError, match="claims above the budget: 101 of entity"):
        metrics.check(tells(*said), checklist)
    again = tells(*said[:100], *(replace(c, text="in other words") for c in said[:100]))  # a repetition is no claim
    assert metrics.check(again, checklist).claims[1] == 100
    with pytest.raises(ValueError, match="claims above the budget: 2 of"):
        metrics.check(tells(*said[:2]), checklist, budget=1)


def test_names_outside_the_lists(checklist):
    for options, text in (({"mode": "turn"}, "mode must be one of 'message', 'trajectory', got 'turn'"),
                          ({"policy": "kind"}, "policy must be one of 'strict', 'paper', got 'kind'"),
                          ({"missing_policy": "skip"}, "missing_policy must be one of 'insufficient', 'drop', got 'skip'"),
                          ({"checker": "llm"}, "checker must be one of 'rules', .* got 'llm'")):
        with pytest.raises(ValueError, match=text):
            metrics.check(Trajectory(), checklist, **options)
    with pytest.raises(ValueError, match="unknown entity 'nobody'"):
        metrics.check({"nobody": Trajectory()}, checklist)
    with pytest.raises(ValueError, match="the checklist has 3 entities"):
        metrics.check(Trajectory(), spread(checklist, 3))


def test_a_leak_fails_the_run(checklist):
    for leaky in (Trajectory(report=f"x{checklist.canary}y"), Trajectory(turns=[Turn(result={"data": [[checklist.canary]]})]),
                  Trajectory(turns=[Turn(args={"query": f"SELECT '{checklist.canary}'"})])):
        with pytest.raises(LeakError):
            metrics.check(leaky, checklist)
        judge = Judge(lambda task, r: reply())
        with pytest.raises(LeakError):
            metrics.check(leaky, checklist, checker=metrics.LLMChecker(judge))
        assert not judge.requests


def test_pooled_results_are_those_of_all_items(checklist):
    full, none = metrics.check(tells(*map(known, checklist.items)), checklist, blind=0.0), metrics.check(Trajectory(), checklist, blind=0.5)
    both = metrics.pool([full, none, none])
    assert both.accuracy_item == pytest.approx(1 / 3) and both.blind == pytest.approx(1 / 3) and both.chance_corrected == pytest.approx(0)
    assert both.per_item.entity.nunique() == 3 and both.claims == full.claims
    assert metrics.scaling_curve(both).correct.iloc[-1] == pytest.approx(1 / 3)
    for parts in ([], [full, metrics.check(Trajectory(), checklist, mode="trajectory")]):
        with pytest.raises(ValueError, match="needs results of one mode"):
            metrics.pool(parts)


def test_stored_claims_are_read(checklist):
    stored = Trajectory(turns=[Turn(claims=[{**vars(known(item)), "tables": list(item.claim.tables)}]) for item in checklist.items])
    assert metrics.check(stored, checklist).accuracy_item == 1


def test_process_counts():
    run = Trajectory(turns=[Turn(tool="execute_query", result={"error": "no"}, insight="NO INSIGHT.", tokens_in=3, seconds=0.25),
                            Turn(tool="execute_code", result={"stdout": "1", "error": None}, insight="2 of 3", tokens_out=4, seconds=0.5),
                            Turn(insight=" ")])
    assert metrics.process(run) == {"turns": 3, "tokens_in": 3, "tokens_out": 4, "seconds": 0.75, "tool_success": 0.5,
                                    "valid_insights": pytest.approx(1 / 3)}
    assert set(metrics.process(Trajectory()).values()) == {0.0}


# the model as checker

def ask(checklist, answer, trajectory=None, **options):
    judge = Judge(answer)
    checker = metrics.LLMChecker(judge, **{k: options.pop(k) for k in ("labels",) if k in options})
    said = trajectory or Trajectory(turns=[Turn(insight="NO INSIGHT"), Turn(insight="a"), Turn(insight=""), Turn(insight="b")])
    return metrics.check(said, checklist, checker=checker, **options), checker, judge


@pytest.mark.parametrize("dress", ["{}", "```json\n{}\n```", "Here you are: {} Good luck."])
def test_the_models_object_is_read(checklist, dress):
    result, checker, judge = ask(checklist, lambda task, r: dress.format(reply(yes=(3, 1))))
    assert result.accuracy_item == 1 and result.per_item.supporting.tolist() == [[1, 3]] * len(checklist.items)
    assert checker.failed == 0 and checker.asked == len(judge.requests) == len(checklist.items)
    task = json.loads(judge.requests[0].messages[1]["content"])
    assert task["messages"] == {"1": "a", "3": "b"} and task["true_answer"] == checklist.items[0].answer
    assert task["question"] == checklist.items[0].question and checklist.canary not in str(judge.requests[0].messages)


@pytest.mark.parametrize("bad", ["INCORRECT_INFO", "", "{", reply("correct_info"), reply(yes=(7,)), reply(yes=(True,)), reply(yes="1"),
                                 '{"context_quality": "CORRECT_INFO"}', "[1]", reply(reasoning=3), reply() + reply(), None,
                                 reply("INCORRECT_INFO")[:-1] + ', "context_quality": "CORRECT_INFO"}', reply(context_quality=["CORRECT_INFO"])])
def test_three_bad_replies_are_a_failure_and_never_correct(checklist, bad):
    result, checker, judge = ask(checklist, lambda task, r: bad)
    assert result.failed == checker.failed == len(checklist.items) and result.accuracy_item == 0 and result.insufficient == 1
    assert len({tuple(map(str, r.messages)) for r in judge.requests}) == 3 * len(checklist.items)
    assert set(result.per_item.verdict) == {"CHECKER_FAILED"}


def test_a_second_try_counts(checklist):
    result, checker, judge = ask(checklist, lambda task, r: reply("INCORRECT_INFO", (), ()) if len(r.messages) > 2 else "sorry")
    assert result.incorrect == 1 and checker.failed == 0 and len(judge.requests) == 2 * len(checklist.items)
    assert result.per_item.contradicting.tolist() == [[3]] * len(checklist.items)  # unplaced: at the latest message


def test_contradiction_in_sight_is_strict(checklist):
    for policy, accuracy in (("strict", 0), ("paper", 1)):
        assert ask(checklist, lambda task, r: reply(yes=(1,), no=(3,)), policy=policy)[0].accuracy_item == accuracy


def test_without_insights_nothing_is_asked(checklist):
    result, checker, judge = ask(checklist, lambda task, r: reply(), Trajectory(turns=[Turn(insight="NO INSIGHT")]))
    assert result.insufficient == 1 and not judge.requests and checker.asked == 0


def test_a_report_is_one_message(checklist):
    run = Trajectory(turns=[Turn(insight="a"), Turn(insight="b")], report="FINISH: c")
    result, _, judge = ask(checklist, lambda task, r: reply(yes=(1,)), run, mode="trajectory")
    assert result.accuracy_item == 1 and json.loads(judge.requests[0].messages[1]["content"])["messages"] == {"1": "FINISH: c"}


def test_closed_answers_hide_the_truth(checklist):
    labels = ("improved", "worsened", "same")
    closed = replace(checklist, items=[replace(item, answer=labels[n % 3]) for n, item in enumerate(checklist.items)])
    said = {"label": "worsened", "supporting_message_indices": [3], "evidence_text": "", "reasoning": ""}
    result, _, judge = ask(closed, lambda task, r: json.dumps(said), labels=labels)
    share = np.mean([item.answer == "worsened" for item in closed.items])
    assert result.accuracy_item == pytest.approx(share) and result.incorrect == pytest.approx(1 - share)
    assert "true_answer" not in judge.requests[0].messages[1]["content"]
    assert ask(closed, lambda task, r: json.dumps({**said, "label": "CANNOT_TELL"}), labels=labels)[0].insufficient == 1
    assert ask(closed, lambda task, r: json.dumps({**said, "label": "better"}), labels=labels)[0].failed == len(closed.items)
    with pytest.raises(ValueError, match="answer must be one of 'improved', 'worsened', 'same', got"):
        ask(checklist, lambda task, r: json.dumps(said), labels=labels)


def test_repeats_are_other_requests(checklist):
    judge = Judge(lambda task, r: reply("CORRECT_INFO" if r.sample % 2 else "INSUFFICIENT_INFO"))
    run = Trajectory(turns=[Turn(insight="a")])
    found = metrics.LLMChecker(judge).repeat(run, checklist, n=4)
    assert found["accuracy"].tolist() == [0, 1, 0, 1] and found["same"] == 0 and found["failed"] == 0
    assert found["cv"] == pytest.approx(np.std([0, 1, 0, 1], ddof=1) / 0.5)
    assert metrics.LLMChecker(Judge(lambda task, r: "?")).repeat(run, checklist, n=2)["cv"] == 0
    with pytest.raises(ValueError, match="n must be >= 2, got 1"):
        metrics.LLMChecker(judge).repeat(run, checklist, n=1)


# exploration

@given(st.lists(st.integers(0, 40), min_size=1, max_size=20))
@settings(max_examples=60)
def test_entropy_is_that_of_scipy(counts):
    found, kept = metrics.exploration_from_counts(counts, 20), np.array([c for c in counts if c])
    assert 0 <= found.entropy_norm <= 1 and 0 <= found.effective_fields <= found.coverage + 1e-12
    assert found.coverage == len(kept) / 20 and sum(found.counts.values()) == sum(counts)
    if len(kept) > 1:
        assert found.entropy_norm == pytest.approx(stats.entropy(kept, base=len(kept)))
        assert found.effective_fields == pytest.approx(2 ** stats.entropy(kept, base=2) / 20)
        assert (found.entropy_norm > 1 - 1e-9) == (len(set(kept)) == 1)
    else:
        assert found.entropy_norm == 0


def test_one_more_field_may_lower_the_entropy():
    before, after = (metrics.exploration_from_counts(c, 8) for c in ({"t.a": 5, "t.b": 5}, {"t.a": 5, "t.b": 5, "t.c": 1}))
    assert after.coverage > before.coverage and after.entropy_norm < before.entropy_norm and after.effective_fields > before.effective_fields


def test_exploration_reads_the_parsed_queries(world):
    sqls = ["SELECT avg(o.amount) AS rating FROM orders o WHERE o.channel = 'web'",
            "WITH x AS (SELECT amount AS a FROM orders) SELECT max(a) FROM x", "SELECT * FROM ads"]
    turns = [Turn(tool="execute_query", args={"query": sql}, result={"count": 1}) for sql in sqls]
    turns += [Turn(tool="execute_query", args={"query": "SELECT rating FROM orders"}, result={"error": "timeout"}),
              Turn(tool="describe_table", args={"table_name": "orders"}, result={})]
    found = metrics.exploration(Trajectory(turns=turns), world.schema)
    ads = {f"ads.{c}": 1 for c in world.schema.tables["ads"]}
    assert found.counts == {"orders.amount": 2, "orders.channel": 1, **ads}
    assert found.coverage == pytest.approx(len(found.counts) / sum(map(len, world.schema.tables.values())))


def test_counts_refuse():
    for counts, n, text in (([-1], 3, "count of '0' must be >= 0, got -1"), ([1, 1], 1, "2 fields are touched, but n_fields = 1"),
                            ([], 0, "n_fields must be >= 1, got 0")):
        with pytest.raises(ValueError, match=text):
            metrics.exploration_from_counts(counts, n)


# strengths and novelty

tables = st.integers(2, 5).flatmap(lambda n: st.lists(st.lists(st.integers(0, 6), min_size=n, max_size=n), min_size=n, max_size=n))


@given(tables)
@settings(max_examples=60)
def test_strengths_are_the_maximum(rows):
    wins = np.array(rows, dtype=float)
    np.fill_diagonal(wins, 0)
    fit, n = metrics.bradley_terry(wins), len(wins)
    reach = np.linalg.matrix_power((wins > 0) + np.eye(n), n) > 0
    used = wins if reach.all() else wins + 0.1 * (1 - np.eye(n))
    assert fit.converged and (fit.components == 1) == bool(reach.all())
    theta = np.log(fit.strength)
    assert theta.sum() == pytest.approx(0, abs=1e-9) and (fit.strength[fit.ranking][:-1] >= fit.strength[fit.ranking][1:] - 1e-8).all()
    share = 1 / (1 + np.exp(theta[None, :] - theta[:, None]))
    assert np.allclose(used.sum(axis=1), ((used + used.T) * share).sum(axis=1), atol=1e-7)  # expected wins = wins
    assert ((fit.ci[:, 0] <= fit.strength) & (fit.strength <= fit.ci[:, 1])).all()
    up = metrics._bt_mm(other := np.linspace(-1, 1, n), used)
    assert metrics._bt_loglik(up, used) >= metrics._bt_loglik(other - other.mean(), used) - 1e-9


def test_parity_with_scipy_and_a_known_interval():
    wins = np.array([[0, 30.0], [10, 0]])
    fit = metrics.bradley_terry(wins)
    assert fit.strength[0] / fit.strength[1] == pytest.approx(3) and fit.ranking == [0, 1]
    half = 1.959963984540054 * np.sqrt(1 / 30 + 1 / 10) / 2  # half the log odds has half its standard error
    assert np.allclose(np.log(fit.ci[0]), np.log(3) / 2 + np.array([-half, half]))
    big = np.random.default_rng(0).integers(1, 9, (5, 5)) * (1.0 - np.eye(5))
    peer = optimize.minimize(lambda t: (big * np.logaddexp(0, t[None] - t[:, None])).sum(), np.zeros(5), method="BFGS", tol=1e-9).x
    assert np.allclose(metrics.bradley_terry(big).strength, np.exp(peer - peer.mean()), rtol=1e-4)


def test_where_no_strength_is_finite():
    bare, helped = (metrics.bradley_terry([[0, 5], [0, 0]], pseudo=p) for p in (0, 0.1))
    assert not bare.converged and np.isnan(bare.ci).all() and bare.components == 2
    assert helped.converged and helped.strength[0] / helped.strength[1] == pytest.approx(5.1 / 0.1)
    assert metrics.bradley_terry([[0, 3], [2, 0]], pseudo=9).strength[0] ** 2 == pytest.approx(1.5)  # not used
    assert metrics.bradley_terry([[0]]).strength.tolist() == [1] and metrics.bradley_terry(np.zeros((3, 3))).ranking == [0, 1, 2]


def test_tables_of_wins_refuse():
    for wins, pseudo, text in (([[0, 1]], 0.1, r"wins must have shape \(n, n\), got \(1, 2\)"), ([[1, 0], [0, 0]], 0.1, "0 on the diagonal"),
                               ([[0, -1], [0, 0]], 0.1, "finite, >= 0"), ([[0, math.nan], [0, 0]], 0.1, "finite, >= 0"),
                               ([[0, 1], [0, 0]], -1, "pseudo must be finite and >= 0, got -1")):
        with pytest.raises(ValueError, match=text):
            metrics.bradley_terry(wins, pseudo)


def writer(n, world=""):
    return Trajectory(turns=[Turn(insight=f"finding {i}") for i in range(n)] + [Turn(insight="NO INSIGHT")], world=world)


def longest(a, b):
    return "first" if len(a) > len(b) else "second" if len(b) > len(a) else "tie"


def test_novelty_ranks_and_swaps():
    seen = []
    fit = metrics.novelty({n: {str(e): writer(k) for e in range(20)} for n, k in (("few", 1), ("some", 2), ("many", 3))},
                          lambda a, b: seen.append((len(a), len(b))) or longest(a, b), seed=2)
    assert fit.ranking == ["many", "some", "few"] and fit.failed == 0 and {(1, 2), (2, 1)} <= set(seen)
    first = metrics.novelty({n: {str(e): writer(2) for e in range(200)} for n in "ab"}, lambda a, b: "first", seed=0)
    assert 0.6 < first.strength[0] / first.strength[1] < 1.7  # a liking for the first place is noise
    again = metrics.novelty({n: {str(e): writer(2) for e in range(200)} for n in "ab"}, lambda a, b: "first", seed=0)
    assert again.strength.tolist() == first.strength.tolist()


def test_novelty_leaves_out_what_decides_an_item(checklist):
    run, entity = tells(*map(known, checklist.items)), checklist.items[0].entity
    run.turns.append(Turn(insight="something else"))
    for trajs in ({"a": run, "b": writer(1)}, {"a": {entity: run}, "b": {entity: writer(1)}}):
        shown = []
        metrics.novelty(trajs, lambda a, b, shown=shown: shown.append({*a, *b}) or "tie",
                        results={"a": metrics.check(run, checklist)})
        assert shown == [{"something else", "finding 0"}]
    with pytest.raises(ValueError, match="novelty needs results by message, that of 'a' is by trajectory"):
        metrics.novelty({"a": run, "b": run}, longest, results={"a": metrics.check(run, checklist, mode="trajectory")})


def test_a_chat_judges_novelty():
    judge = Judge(lambda task, r: json.dumps({"more_novel": longest(task["first"], task["second"]), "reasoning": ""}))
    fit = metrics.novelty({"a": writer(1), "b": writer(4), "none": Trajectory()}, judge)
    assert fit.ranking == ["b", "a", "none"] and len(judge.requests) == 1  # an empty list loses unasked
    silent = metrics.novelty({"a": writer(1), "b": writer(4)}, Judge(lambda task, r: "no idea"))
    assert silent.failed == 1 and silent.strength.tolist() == [1, 1]
    with pytest.raises(ValueError, match="the judge's answer must be one of 'first', 'second', 'tie', got 'b'"):
        metrics.novelty({"a": writer(1), "b": writer(4)}, lambda a, b: "b")
    with pytest.raises(ValueError, match="at least two systems, got 1"):
        metrics.novelty({"a": writer(1)}, longest)


# faithfulness and replication

def test_faithful_claims(world, checklist):
    truth = [known(item) for item in checklist.items]
    with SqlSandbox(world.db_path) as box:
        assert {metrics.recompute(c, box) for c in truth} == {"FAITHFUL"}
        for c in truth:
            assert metrics.recompute(replace(c, value=c.value * 1.05), box) == "FAITHFUL"
            assert metrics.recompute(replace(c, value=c.value * 1.2), box) == "UNFAITHFUL"
            assert metrics.recompute(replace(c, evidence_sql=f"SELECT {c.value}"), box) == "NO_EVIDENCE"
            assert metrics.recompute(replace(c, evidence_sql=" "), box) == "NO_EVIDENCE"
            if c.kind in metrics._SIGNED:
                assert metrics.recompute(replace(c, value=None, direction=-c.direction), box) == "UNFAITHFUL"
                assert metrics.recompute(replace(c, value=None), box) == "FAITHFUL"
        for sql in ("DELETE FROM orders", "SELECT missing FROM orders", "SELECT channel FROM orders", "SELECT amount FROM orders WHERE false",
                    "SELECT sum(amount) FROM orders WHERE amount IS NULL"):
            assert metrics.recompute(replace(truth[0], evidence_sql=sql), box) == "UNFAITHFUL"
        table = metrics.faithfulness(tells(*truth, replace(truth[0], evidence_sql=None)), box)
    assert table.verdict.tolist() == ["FAITHFUL"] * len(truth) + ["NO_EVIDENCE"] and table.turn.tolist() == list(range(len(truth) + 1))
    assert metrics.recompute(truth[0], world.db_path) == "FAITHFUL"
    assert len(metrics.faithfulness(Trajectory(), world.db_path)) == 0


@pytest.mark.parametrize(("found", "stated", "good"), [
    (1.3, {"kind": "variance_change", "direction": 1}, True), (0.7, {"kind": "variance_change", "direction": 1}, False),
    (0.0, {"kind": "orphan_keys"}, False), (0.02, {"kind": "orphan_keys"}, True), (-4.0, {"kind": "trend", "direction": 0, "value": -4.0}, True),
    (math.nan, {"kind": "trend", "direction": 1}, False), (True, {"kind": "trend", "direction": 1}, False), (0.0, {"kind": "trend", "value": 0.0}, True)])
def test_a_value_carries_a_claim(found, stated, good):
    assert metrics._agrees(Claim(**{"metric": "orders.amount", **stated}), found) is good


def test_replication_counts_draws(monkeypatch, world):
    drawn = []

    class Fake:
        def __init__(self, path):
            self.number = len(drawn) - 1

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def fetch(self, sql):
            return self.number

    def pvalue(claim, fetch, schema):
        if claim.metric == "no.column":
            raise ValueError("unknown column")
        return 0.005 if fetch("") < claim.value else 0.01

    monkeypatch.setattr(metrics, "Env", Fake)
    monkeypatch.setattr(metrics, "claim_pvalue", pvalue)
    monkeypatch.setattr(type(world), "redraw", lambda self, rep, rows: drawn.append((rep, rows)) or world)
    claims = [Claim("trend", "a.b", value=float(v)) for v in (5, 3, 2, 0)] + [Claim("trend", "no.column", value=9.0)]
    table = metrics.replicate(claims, world, 5, 3)
    assert drawn == [(i, 6_000) for i in range(5)] and table.share.tolist() == [1, 0.6, 0.4, 0, 0]
    assert table.replicated.tolist() == [True, True, False, False, False]
    assert metrics.false_discovery_proportion(table) == pytest.approx(0.6)


def test_the_truth_replicates(world, checklist):
    claims = [known(item) for item in checklist.items]
    table = metrics.replicate(claims, world, draws=1, rows_factor=2)
    assert len(table) == len(claims) and metrics.false_discovery_proportion(table) < 0.35
    assert table.metric.tolist() == [c.metric for c in claims]


def test_proportions_refuse(world):
    import pandas as pd

    empty = metrics.replicate([], world)
    assert metrics.false_discovery_proportion(empty) == 0.0
    with pytest.raises(ValueError, match="needs a column 'replicated'"):
        metrics.false_discovery_proportion(pd.DataFrame({"share": [1.0]}))
    with pytest.raises(ValueError, match="rows_factor must be >= 1, got 0"):
        metrics.replicate([], world, rows_factor=0)
    with pytest.raises(ValueError, match="draws must be >= 1, got 0"):
        metrics.replicate([], world, draws=0)


# what looks like nothing, and evidence of turns

@pytest.mark.parametrize("text", ["CORRECT_INFO would be wrong.", "CORRECT_INFO? No.", "CORRECT_INFO. Or rather the opposite", "far from CORRECT_INFO",
                                  "I doubt that it is CORRECT_INFO", "CORRECT_INFO is ruled out", "neither here nor there: CORRECT_INFO", "x=CORRECT_INFO",
                                  "one cannot, given what is said about all the other shops in the north, call it CORRECT_INFO"])
def test_a_denial_in_any_words_is_no_verdict(checklist, text):
    assert metrics.parse_verdict(text) == "CHECKER_FAILED"
    assert ask(checklist, lambda task, r: text)[0].failed == len(checklist.items)


def test_the_model_is_read_by_the_public_parser(checklist, monkeypatch):
    monkeypatch.setattr(metrics, "parse_verdict", lambda text: "INSUFFICIENT")
    assert ask(checklist, lambda task, r: reply(yes=(1,)))[0].insufficient == 1


def test_texts_without_claims_are_no_zero(checklist):
    bare = replace(checklist, items=[replace(item, claim=None) for item in checklist.items])
    for run, items, text in ((Trajectory(turns=[Turn(insight="a"), Turn(insight="NO INSIGHT")], report="b"), checklist, "none of 2 texts comes with a claim"),
                             (tells(known(checklist.items[0])), bare, "no item has a claim")):
        with pytest.raises(ValueError, match=text):
            metrics.check(run, items)
        assert metrics.check(run, items, checker=metrics.LLMChecker(Judge(lambda task, r: reply(yes=())))).accuracy_item == 1
    some = replace(checklist, items=[bare.items[0], *checklist.items[1:]])
    assert metrics.check(tells(known(checklist.items[1])), some).accuracy_item == pytest.approx(1 / len(some.items))


@pytest.mark.parametrize(("found", "stated", "good"), [
    (0.25, {"kind": "missing_not_at_random", "value": 25.0, "unit": "percent"}, True),
    (25.0, {"kind": "missing_not_at_random", "value": 25.0, "unit": "percent"}, False),
    (0.25, {"kind": "missing_not_at_random", "value": 25.0, "unit": "percentage_points"}, False),
    (5.0, {"kind": "lag", "other": "orders.rating", "value": 5.0, "unit": "EUR"}, False), (-4.0, {"kind": "trend", "direction": -1, "value": 4.0, "unit": "EUR"}, True),
    (4.0, {"kind": "trend", "direction": -1, "value": -4.0, "unit": "EUR"}, False), (4.0, {"kind": "trend", "value": 4.0, "unit": "days"}, False),
    (0.2, {"kind": "trend", "direction": 0}, None), (0.0, {"kind": "trend", "direction": 0}, True), (0.02, {"kind": "orphan_keys", "direction": 0}, False)])
def test_units_and_denials_count(world, found, stated, good):
    claim = Claim(**{"metric": "orders.amount", **stated})
    with Env(world.db_path) as env:
        assert metrics._agrees(claim, found, metrics._unit_of(claim, env)) is good


def test_any_cell_of_the_turns_result_may_bear_a_claim_out(world):
    sql = "SELECT region, count(*) AS n, avg(rating) AS r FROM orders JOIN stores USING (store_id) GROUP BY region ORDER BY region"
    with SqlSandbox(world.db_path) as box:
        rows = box.query(sql).data
        said = [Claim("group_difference", "orders.rating", "stores.region", rows[2][0], direction=-1, value=v, evidence_sql=sql)
                for v in (rows[2][2], rows[3][1], rows[1][2] - rows[0][2], 987654.0, None)]
        turn = Turn(tool="execute_query", args={"query": sql}, claims=said)
        assert metrics.faithfulness(Trajectory([turn]), box).verdict.tolist() == [*["FAITHFUL"] * 3, "UNFAITHFUL", "NO_EVIDENCE"]
        other = replace(turn, args={"query": "SELECT 1"})  # evidence of its own: the first cell, which is a name
        assert set(metrics.faithfulness(Trajectory([other]), box).verdict) == {"UNFAITHFUL"}
        denied = replace(said[0], direction=0, value=None, evidence_sql="SELECT avg(rating) FROM orders")
        assert metrics.recompute(denied, box) == "NO_EVIDENCE"


def test_a_path_gets_one_sandbox(world, checklist, monkeypatch):
    opened = []
    monkeypatch.setattr(metrics, "SqlSandbox", type("Counted", (SqlSandbox,), {"__init__": lambda self, *a: opened.append(a) or SqlSandbox.__init__(self, *a)}))
    assert set(metrics.faithfulness(tells(*map(known, checklist.items)), world.db_path).verdict) == {"FAITHFUL"} and len(opened) == 1


def test_stored_claims_replicate(world, checklist):
    stored = [{**vars(known(item)), "tables": list(item.claim.tables)} for item in checklist.items[:1]]
    assert metrics.replicate(stored, world, draws=1, rows_factor=2).metric.tolist() == [checklist.items[0].claim.metric]
