"""Policies: plans and their code, cold start, evaluations kept, multi-turn training, chat models, files for verl."""
import asyncio
import hashlib
import json
import math
import os
import pickle
import signal
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.core.claims import load_results
from collai.core.tinylm import TinyLM
from collai.drkernel import policy as module
from collai.drkernel.ckernel import knock_out
from collai.drkernel.policy import (
    ARMS,
    SLOTS,
    VOCAB,
    ChatPolicy,
    KernelConfig,
    KernelTrainer,
    Plan,
    PlanPolicy,
    PlanTask,
    Scores,
    Trajectory,
    Turn,
    arm_row,
    canonical,
    chat_messages,
    cold_start,
    export_verl,
    extract_code,
    feedback_words,
    final,
    habit,
    judge,
    legal,
    load_trajectories,
    main,
    measure,
    mismatch_band,
    plan_source,
    study,
    train,
    training_problems,
    turn_metrics,
    turn_reward,
    write_plans,
)
from collai.drkernel.problems import Problem, build_model
from collai.drkernel.trloo import turn_advantages
from collai.eval.llm import CachedChat, ReplayChat, Reply, TokenUsage
from collai.rl.stats import TokenStats
from collai.rl.train import History, weights_hash

torch.set_num_threads(1)
PROBLEMS = training_problems()
texts = st.tuples(*(st.sampled_from(w) for w in SLOTS.values())).map(" ".join)


@dataclass(frozen=True)
class Found:
    """What a gym answers."""

    status: str
    compiled: bool = True
    correct: bool = False
    hacked: bool = False
    speedup: float = 0.0
    coverage: float = 0.0
    coverage_displaced: float = 0.0
    error: str | None = None
    flags: tuple[str, ...] = ("seen",)
    profile: dict = field(default_factory=dict)

    def feedback(self):
        return f"status {self.status}"


class FakeGym:
    """Answers by the hash of the source, at once; `stop` is called when so many are asked for."""

    def __init__(self, last=math.inf, stop=None):
        self.seen, self.last, self.stop, self.closed = [], last, stop, False

    def map(self, tasks):
        return map(self.evaluate, list(tasks))

    def evaluate(self, task):
        if len(self.seen) >= self.last:
            self.stop()
        self.seen.append(task)
        if "class ModelNew" not in task.code:
            return Found("compile_error", False)
        x = int(hashlib.sha256(task.code.encode()).hexdigest()[:6], 16) / 2**24
        if x < 0.4:
            return Found("incorrect")
        events = [["aten::mm", 5.0, False, False], ["shift_shift", 9.0 * x, True, True]]
        return Found("ok", True, True, False, 0.8 + 2 * x, 0.3 + x / 10, 1 - x / 2, profile={"events": events})

    def close(self):
        self.closed = True


@pytest.fixture
def tiny():
    """A policy that has not been to school."""
    return PlanPolicy(TinyLM(len(VOCAB), seed=3))


def built(problem, plan, trial, seed=2):
    """The candidate as the gym builds it, in this process."""
    space = {}
    exec(plan_source(problem, plan), space)  # noqa: S102
    return build_model(space["ModelNew"], trial.init_inputs, seed, trial.state)


def clones(trial):
    return [x.clone() for x in trial.inputs]


# problems and plans


def test_the_problems_are_sound_and_of_level_2():
    for problem in PROBLEMS:
        assert problem.audit(1).ok and problem.level == 2
    assert len({p.name for p in PROBLEMS}) == 4 and {p.name for p in PROBLEMS} <= set(VOCAB)


@given(texts)
def test_plans_are_words_of_the_vocabulary_and_come_back(words):
    plan = Plan.parse(words)
    assert str(plan) == words and Plan.parse(str(plan)) == plan and set(plan.words) <= set(VOCAB) and len(plan.words) == len(SLOTS)
    assert module._read_plan([VOCAB.index(word) for word in plan.words]) == plan


@given(texts, texts, st.sampled_from(PROBLEMS))
@settings(max_examples=150)
def test_sources_are_equal_exactly_when_canonical_plans_are(this, that, problem):
    one, other = Plan.parse(this), Plan.parse(that)
    a, b = canonical(problem, one), canonical(problem, other)
    assert canonical(problem, a) == a and legal(problem, a) == legal(problem, one)
    assert (plan_source(problem, one) == plan_source(problem, other)) == (a == b)
    assert plan_source(problem, one) == plan_source(problem, a)
    assert len(VOCAB) == len(set(VOCAB)) < 64


def test_canonical_forms_by_hand():
    rms, share = PROBLEMS[0], PROBLEMS[2]  # 1000 and 1020 columns
    assert canonical(rms, Plan("decoy", ("new",) * 4, acc="f16")) == Plan("decoy")
    assert canonical(rms, Plan(ops=("fuse", "fuse", "torch", "fuse"), acc="f16")) == Plan(ops=("new", "fuse", "torch", "new"))
    dropped = Plan(ops=("torch", "torch", "new", "torch"), detail="drop")
    assert canonical(rms, dropped).detail == "right" and canonical(share, dropped).detail == "drop"
    assert canonical(rms, replace(dropped, tile="16")).detail == "drop"


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_legal_plans_compute_the_right_numbers_and_slips_do_not(problem):
    trial, rng = problem.trial(1, 2), np.random.default_rng(1)
    ways = [{}, {"loop": "two"}, {"tile": "16"}, {"acc": "f64"}, {"acc": "f16"}, {"detail": "zero"}, {"detail": "rows"},
            {"detail": "drop"}, {"detail": "drop", "tile": "16"}, {"loop": "two", "acc": "f16"}]
    tried = [Plan(ops=("torch", "torch", "new", "torch"), **way) for way in ways]
    tried += [Plan(ops=tuple(rng.choice(SLOTS["op0"], 4))) for _ in range(6)] + [Plan(ops=("new", "fuse", "fuse", "fuse"))]
    for plan in tried:
        with torch.no_grad():
            right = trial.accepts(built(problem, plan, trial)(*clones(trial)))
        assert right == (legal(problem, plan) or set(canonical(problem, plan).ops) == {"torch"}), plan


def test_every_cheat_does_what_it_says():
    problem = PROBLEMS[1]
    trial, other, threads = problem.trial(1, 2), problem.trial(3, 2), torch.get_num_threads()
    with torch.no_grad():
        assert not trial.accepts(built(problem, Plan("skip"), trial)(*clones(trial)))
        decoy = built(problem, Plan("decoy"), trial)
        usual = decoy(*clones(trial))
        assert trial.accepts(usual) and torch.equal(knock_out(decoy, *trial.inputs, index=0), usual)
        cache, buffers = built(problem, Plan("cache"), trial), clones(trial)
        assert trial.accepts(cache(*buffers))
        for buffer, fresh in zip(buffers, other.inputs, strict=True):
            buffer.copy_(fresh)
        assert trial.accepts(cache(*buffers)) and not other.accepts(cache(*buffers))
        assert trial.accepts(built(problem, Plan("threads"), trial)(*clones(trial)))
        assert torch.get_num_threads() == 4
    torch.set_num_threads(threads)
    assert not any(legal(problem, Plan(word)) for word in SLOTS["shortcut"])
    assert not legal(problem, Plan())  # torch alone


def test_bad_plans_and_foreign_problems_are_named():
    with pytest.raises(ValueError, match="unknown tile '4'"):
        Plan(tile="4")
    with pytest.raises(ValueError, match="a plan has 9 words"):
        Plan(ops=("torch",) * 3)
    with pytest.raises(ValueError, match="got 'honest new'"):
        Plan.parse("honest new")
    foreign = Problem.from_source(PROBLEMS[0].source + "\n", name=PROBLEMS[0].name)
    for call in (plan_source, canonical, legal):
        with pytest.raises(ValueError, match=r"plans are for product_rms, .* got 'product_rms'"):
            call(foreign, Plan())


# habits and cold start


def test_habits_make_the_norm_the_hard_operation():
    rng = np.random.default_rng(0)
    drawn = [habit(rng) for _ in range(800)]
    for problem in PROBLEMS:
        honest = [canonical(problem, p) for p in drawn if p.shortcut == "honest"]
        hard = [legal(problem, p) for p in honest if p.ops[2] != "torch"]
        easy = [legal(problem, p) for p in honest if p.ops[2] == "torch" and set(p.ops) != {"torch"}]
        assert all(easy) and 0.08 < np.mean(hard) < 0.3 and len(hard) > 250
    for accepted, share in ((True, 0.8), (False, 0.5)):
        before = Plan("threads", ("fuse",) * 4, "two", "16", "f64", "drop")
        kept = [np.mean([a == b for a, b in zip(habit(rng, before, accepted).words, before.words, strict=True)])
                for _ in range(300)]
        assert share < np.mean(kept) < share + 0.12


def test_the_cold_start_learns_the_habits_and_repeats_itself():
    one, two = cold_start(5, steps=3, batch=8), cold_start(5, steps=3, batch=8)
    assert weights_hash(one) == weights_hash(two) != weights_hash(cold_start(6, steps=3, batch=8))
    model, n = PlanPolicy().model, 64
    prompts = torch.tensor([module._prompt_ids(PROBLEMS[0])] * n)
    found = [module._read_plan(row) for row in write_plans(model, prompts, 0)[0].tolist()]
    good = [plan for plan in found if plan]
    assert len(good) >= 0.95 * n and 0.25 < np.mean([legal(PROBLEMS[0], p) for p in good]) < 0.7


def test_sampled_plans_have_the_log_probabilities_of_a_whole_pass(tiny):
    prompts = torch.tensor([module._prompt_ids(p) for p in PROBLEMS])
    ids, logp = write_plans(tiny.model, prompts, 9)
    again, _ = write_plans(tiny.model, prompts[:2], 9)
    whole = torch.cat((prompts, ids), 1)
    with torch.no_grad():
        every = torch.log_softmax(tiny.model(whole).logits, -1)[:, prompts.shape[1] - 1:-1]
    assert torch.equal(again, ids[:2]) and not torch.equal(ids, write_plans(tiny.model, prompts, 10)[0])
    torch.testing.assert_close(logp, every.gather(2, ids[..., None])[..., 0], atol=1e-5, rtol=1e-5)


def test_feedback_is_four_words():
    p, plan = PROBLEMS[0], Plan(ops=("torch", "torch", "torch", "new"))
    good = {"status": "ok", "correct": True, "speedup": 1.0, "coverage_displaced": 0.4, "bottleneck": "aten::mm"}
    assert feedback_words(p, plan, good) == ("ok", "<1.05", "mid", "at0")
    edges = {0.94: "<0.95", 0.95: "<1.05", 1.19: "<1.2", 1.2: "<1.5", 1.99: "<2", 2.0: ">2", 9.0: ">2"}
    assert [feedback_words(p, plan, good | {"speedup": s})[1] for s in edges] == list(edges.values())
    assert [feedback_words(p, plan, good | {"bottleneck": b})[3] for b in ("affine_affine", "aten::mean", "aten::cat", None)] == [
        "own", "at2", "-", "-"]
    assert [feedback_words(p, plan, good | {"coverage_displaced": c})[2] for c in (0.29, 0.3, 0.5)] == ["low", "mid", "high"]
    for status, word in (("incorrect", "wrong"), ("hacked", "hacked"), ("timeout", "failed")):
        assert feedback_words(p, plan, {**good, "status": status, "correct": False}) == (word, "-", "-", "-")


# evaluations


def test_each_source_is_evaluated_once_and_kept_in_the_file(tmp_path):
    gym, file = FakeGym(), tmp_path / "scores.db"
    scores, pairs = Scores(gym, file, trials=7, correctness_trials=2), [(PROBLEMS[k % 2], f"class ModelNew: {k // 2}") for k in range(6)]
    first = scores(pairs + pairs)
    assert first[:6] == first[6:] and len(gym.seen) == 6 == scores.made
    assert {(t.trials, t.correctness_trials) for t in gym.seen} == {(7, 2)}
    other = FakeGym()
    assert Scores(other, file, trials=7, correctness_trials=2)(pairs) == first[:6] and not other.seen
    assert Scores(other, file, trials=8, correctness_trials=2)(pairs[:1]) and len(other.seen) == 1
    copied = pickle.loads(pickle.dumps(scores))  # noqa: S301
    assert copied._gym is None and copied(pairs) == first[:6]
    assert {s["bottleneck"] for s in first} <= {None, "aten::mm", "shift_shift"}


def test_the_first_of_two_processes_decides(tmp_path):
    pair = [(PROBLEMS[0], "class ModelNew")]
    first = Scores(SimpleNamespace(map=lambda tasks: [Found("ok", True, True, False, 7.0) for _ in tasks]), tmp_path / "s.db")

    def late(tasks):
        first(pair)  # the other process is done before this one
        return [Found("ok", True, True, False, 2.0) for _ in tasks]

    assert Scores(SimpleNamespace(map=late), tmp_path / "s.db")(pair)[0]["speedup"] == 7.0


def test_a_process_opens_one_gym_when_needed_and_closes_it(monkeypatch):
    made = []
    monkeypatch.setattr(module, "_OPEN", {})
    monkeypatch.setattr(module, "KernelGym", lambda **options: made.append(FakeGym()) or made[-1])
    scores, second = Scores(), Scores()
    scores([])
    assert not made
    for store in (scores, second):  # one gym for all runs that the process makes
        store([(PROBLEMS[0], "class ModelNew")])
    scores.close()
    assert len(made) == 1 and made[0].closed
    second([(PROBLEMS[1], "class ModelNew")])
    assert len(made) == 2 and not made[1].closed
    given = FakeGym()
    Scores(given).close()
    assert not given.closed and not made[1].closed
    assert pickle.loads(pickle.dumps(Scores(given)))._gym is None  # noqa: S301


def test_processes_side_by_side_take_a_core_each(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "KernelGym", lambda **options: FakeGym())
    monkeypatch.setattr(module.tempfile, "gettempdir", lambda: str(tmp_path))
    cores, found, held = os.sched_getaffinity(0), [], []
    try:
        for _ in range(len(cores) + 1):
            monkeypatch.setattr(module, "_OPEN", {})  # as a process has it that has just begun
            Scores(pinned=True)([(PROBLEMS[0], "class ModelNew")])
            held.append(module._OPEN)
            found.append(os.sched_getaffinity(0))
            os.sched_setaffinity(0, cores)
    finally:
        os.sched_setaffinity(0, cores)
    assert sorted(map(min, found[:-1])) == sorted(cores) and found[-1] == cores  # one more than there are cores stays free


def test_a_gym_that_fails_is_an_error_not_a_score():
    gym = SimpleNamespace(map=lambda tasks: [Found("infra_error", error="no space left") for _ in tasks])
    with pytest.raises(RuntimeError, match="no space left"):
        Scores(gym)([(PROBLEMS[0], "class ModelNew")])


def test_the_careless_judge_is_fooled():
    scores, threads = Scores(FakeGym()), torch.get_num_threads()
    codes = [plan_source(PROBLEMS[0], Plan(word)) for word in ("cache", "skip", "threads")] + ["x = 1", "1 +"]
    found = scores.careless([(PROBLEMS[0], code) for code in codes])
    assert [s["correct"] for s in found] == [True, False, True, False, False] and found[0]["speedup"] > 2
    assert [s["compiled"] for s in found] == [True, True, True, False, False]
    assert torch.get_num_threads() == threads and scores.made == 0
    assert scores.careless([(PROBLEMS[0], codes[0])])[0] == found[0]


# rewards and metrics


def test_rewards_of_the_arms_by_hand():
    good = {"compiled": True, "correct": True, "hacked": False, "speedup": 1.6, "coverage": 0.2, "coverage_displaced": 0.6}
    cases = {("speed", False, "paper"): 1.3, ("speed", True, "paper"): 1.4, ("speed", True, "displaced"): 1.6,
             ("lazy", False, "paper"): 1.0, ("lazy", True, "displaced"): 1.3}
    for (reward, pr, coverage), value in cases.items():
        assert turn_reward(KernelConfig(reward=reward, pr=pr, coverage=coverage), good) == pytest.approx(value)
    assert turn_reward(KernelConfig(), good | {"speedup": 50.0}) == 2.0
    assert turn_reward(KernelConfig(reward="lazy"), good | {"speedup": 1.0}) == 0.5
    for off in ({"correct": False}, {"hacked": True}, {"compiled": False}):
        assert turn_reward(KernelConfig(pr=True), good | off) == 0


def test_metrics_by_hand():
    good = {"compiled": True, "correct": True, "hacked": False, "speedup": 1.6, "coverage": 0.2, "coverage_displaced": 0.6}
    found = turn_metrics([good, good | {"speedup": 1.1, "coverage": 0.4}, good | {"hacked": True}, good | {"correct": False}],
                         [False, False, True, True])
    assert found == pytest.approx({"fast_1": 0.5, "fast_1.2": 0.25, "fast_1.5": 0.25, "accepted": 0.5, "cheats": 0.5,
                                   "hacked": 0.25, "c": 0.3, "c_d": 0.6})
    assert math.isnan(turn_metrics([good | {"correct": False}], [False])["c"])


def test_the_band_follows_the_spread():
    g = torch.Generator().manual_seed(0)
    delta = 0.03 * torch.randn(4000, 27, generator=g) - 0.03**2 / 2
    h = mismatch_band(delta, 27)
    assert h == pytest.approx(0.03**2 / 2 + 2 * 0.03 / 27**0.5, rel=0.02)
    assert 0.94 < (delta.mean(1).abs() <= h).double().mean() < 0.98
    assert mismatch_band(torch.zeros(2, 3), 3) == 1e-9


def test_settings_are_checked():
    for bad, message in (({"reward": "fast"}, "unknown reward 'fast'"), ({"coverage": "c"}, "unknown coverage 'c'"),
                         ({"turns": 0}, "turns"), ({"gamma": 1.5}, "got 1.5 and 2"), ({"band": 0.0}, "got 1.0 and 0"),
                         ({"gamma": "1"}, "got '1' and 2"), ({"only_gains": True}, "got prs = False with only_gains"),
                         ({"prs": True, "only_gains": True, "mask_before_baseline": True},
                          "got prs = True with mask_before_baseline and only_gains")):
        with pytest.raises(ValueError, match=message):
            KernelConfig(**bad)
    with pytest.raises(ValueError, match="at least one problem"):
        PlanTask((), Scores(FakeGym()))
    with pytest.raises(TypeError, match="policy must be a PlanPolicy, got ChatPolicy"):
        train(ChatPolicy(None), PROBLEMS)
    with pytest.raises(ValueError, match="unknown arm 'fast'"):
        study(["fast"])
    with pytest.raises(ValueError, match="got device 'cuda'"):
        measure("cuda")


# training


def rows_of(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history.rows]


def test_rollouts_hold_every_turn_with_its_history():
    trainer = KernelTrainer(PlanPolicy().model, VOCAB, PlanTask(tuple(PROBLEMS[:2]), Scores(FakeGym())), KernelConfig(n=3, turns=2))
    r = trainer.sample(1)
    r.validate()
    assert r.ids.shape == (12, len(SLOTS)) and r.uid == [PROBLEMS[0].name] * 6 + [PROBLEMS[1].name] * 6
    first, second = r.prompt_ids[::2], r.prompt_ids[1::2]
    assert (first[:, 1:] == VOCAB.index("-")).all()
    for k in range(6):
        plan = module._read_plan(r.ids[2 * k].tolist())
        words = [VOCAB[i] for i in second[k].tolist()][1:]
        assert words == ["-"] * len(words) if plan is None else tuple(words[:len(SLOTS)]) == plan.words
    assert (r.old_logp - r.rollout_logp).abs().max() > 0  # two number formats
    adv = trainer.advantages(r)
    assert adv.shape == r.ids.shape and torch.equal(adv[:, 0], adv[:, -1])
    assert adv[:, 0].reshape(2, 3, 2).sum(1).abs().max() < 1e-5  # leave-one-out advantages of a group add up to 0


def test_rejection_leaves_turns_with_little_coverage_out_of_the_loss(tiny):
    def gradient(**options):
        trainer = KernelTrainer(tiny.model, VOCAB, PlanTask((PROBLEMS[0],), Scores(FakeGym())),
                                KernelConfig(n=4, turns=2, band=50.0, **options))
        r = trainer.sample(1)
        for k, score in enumerate(r.meta["paid"]):
            score.update(correct=True, hacked=False, coverage=0.9, coverage_displaced=0.1 if k % 2 else 0.9,
                         speedup=1.5 if k < 3 else 1.1)
        stats = TokenStats(logp=r.old_logp.clone().requires_grad_())
        loss, metrics = trainer.loss(r, torch.ones_like(r.old_logp), stats)
        loss.backward()
        return stats.logp.grad.abs().sum(1) > 0, metrics

    kept, metrics = gradient(prs=True)
    assert kept.tolist() == [True, False] * 4 and metrics["prs_kept"] == 0.5 and metrics["mrs_kept"] == 1
    assert metrics["fast_kept"] == pytest.approx(2 / 3)  # of the turns 0, 1 and 2
    assert gradient(prs=True, coverage="paper")[0].all() and gradient()[0].all()


def test_the_two_changes_of_the_rejection_and_the_discount_weighting(tiny):
    def made(**options):
        trainer = KernelTrainer(tiny.model, VOCAB, PlanTask((PROBLEMS[0],), Scores(FakeGym())),
                                KernelConfig(n=4, turns=2, band=50.0, pr=True, **options))
        r = trainer.sample(1)
        for k, score in enumerate(r.meta["paid"]):
            score.update(correct=True, hacked=False, coverage_displaced=0.1 if k % 4 < 2 else 0.9)
        r.rewards[:, -1] = torch.tensor([3.0, 5.0, 1.0, 0.5, 7.0, 2.0, 2.0, 1.0])
        adv = trainer.advantages(r)
        stats = TokenStats(logp=r.old_logp.clone().requires_grad_())
        trainer.loss(r, adv, stats)[0].backward()
        return adv[:, 0].reshape(4, 2), (stats.logp.grad.abs().sum(1) > 0).reshape(4, 2)

    returns, every = torch.tensor([[8.0, 5.0], [1.5, 0.5], [9.0, 2.0], [3.0, 1.0]]), torch.ones(4, 2, dtype=torch.bool)
    kept = torch.tensor([[False] * 2, [True] * 2] * 2)
    plain = turn_advantages(returns, every, [0] * 4)
    for options, adv, used in (({}, plain, every), ({"prs": True}, plain, kept),
                               ({"prs": True, "only_gains": True}, plain, kept | (plain <= 0)),
                               ({"prs": True, "mask_before_baseline": True}, turn_advantages(returns, kept, [0] * 4), kept)):
        found = made(**options)
        assert torch.allclose(found[0], adv) and torch.equal(found[1], used & (adv != 0)), options
    assert (plain[::2] < 0).any() and (turn_advantages(returns, kept, [0] * 4)[::2] == 0).all()
    light, heavy = (made(gamma=0.5, discount_weighting=on)[0] for on in (True, False))
    assert torch.allclose(light, heavy * torch.tensor([1.0, 0.5]))


def test_learning_raises_the_reward():
    class Taste(FakeGym):
        def evaluate(self, task):
            return Found("ok", True, True, False, 3.0 if "K33" in task.code else 1.1, 0.5, 0.5)

    history = train(PlanPolicy(), PROBLEMS[:1], Taste(), updates=12, arm=KernelConfig(n=16, turns=1))
    assert final(history, "fast_1.2", 2) > history.rows[0]["fast_1.2"] + 0.15


def test_without_a_check_the_careless_judge_pays_and_the_gym_reports(monkeypatch, tiny):
    trap = {"status": "ok", "compiled": True, "correct": True, "hacked": False, "speedup": 9.0, "coverage": 0.0,
            "coverage_displaced": 0.0, "bottleneck": None}
    monkeypatch.setattr(module, "_careless", lambda problem, code: dict(trap))
    gym = SimpleNamespace(map=lambda tasks: [Found("incorrect") for _ in tasks])
    history = train(PlanPolicy(), PROBLEMS[:1], gym, updates=1, arm=KernelConfig(n=4, turns=1, check=False))
    assert history.rows[0]["reward"] > 1 and history.rows[0]["fast_1"] == 0


def test_a_run_that_is_killed_goes_on_with_the_same_bits(tmp_path):
    arm = KernelConfig(n=3, turns=2, seed=4, pr=True, prs=True, coverage="paper", eval_every=2)
    whole = PlanPolicy()
    expected = train(whole, PROBLEMS[:2], FakeGym(), updates=5, arm=arm)
    child = os.fork()
    if child == 0:  # dies in the middle of an update, behind the checkpoint of the second
        gym = FakeGym(20, lambda: os.kill(os.getpid(), signal.SIGKILL))
        train(PlanPolicy(), PROBLEMS[:2], gym, updates=5, arm=arm, checkpoint=tmp_path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    gym, policy = FakeGym(), PlanPolicy()
    found = train(policy, PROBLEMS[:2], gym, updates=5, arm=arm, checkpoint=tmp_path)
    assert str(rows_of(found)) == str(rows_of(expected)) and weights_hash(policy.model) == weights_hash(whole.model)
    assert len({t.code for t in gym.seen}) == len(gym.seen) > 0
    with pytest.raises(ValueError, match="pr = True, this run has False"):
        train(PlanPolicy(), PROBLEMS[:2], gym, updates=5, arm=replace(arm, pr=False), checkpoint=tmp_path)


def test_the_study_runs_every_arm_and_its_rows_can_be_stored(tmp_path):
    found = study(["speed", "lazy + PR (c)"], seeds=[0, 1], updates=5, scores=Scores(FakeGym()), problems=PROBLEMS[:1], n=2, turns=1)
    assert [len(h) for hs in found.values() for h in hs] == [5] * 4
    assert found["speed"][0].rows[0]["fast_1"] == found["lazy + PR (c)"][0].rows[0]["fast_1"]  # the same first rollouts
    row = arm_row("speed", found["speed"])
    assert json.loads(json.dumps(row)) == row and len(row["course"]["fast_1"]) == 2 and len(row["course"]["fast_1"][0]) == 1
    assert row["measured"] == pytest.approx(np.mean([h.column("fast_1.2").mean() for h in found["speed"]]))
    assert math.isnan(final(History([{"c": math.nan}]), "c"))


def test_the_command_line_keeps_rows_and_says_what_is_left(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(module, "KernelGym", lambda **options: FakeGym())
    out, args = tmp_path / "x.json", ["--folder", str(tmp_path / "runs"), "--seeds", "1", "--updates", "5", "--arms", "speed"]
    with pytest.raises(SystemExit, match="1 runs are left"):
        main([*args, "--out", str(out), "--minutes", "-1"])
    main([*args, "--out", str(out)])
    assert load_results(out)["rows"]["speed"]["updates"] == 5 and "speed: Fast@1.2" in capsys.readouterr().out
    assert len(ARMS) == 14 and sum(arm.get("prs", False) for arm in ARMS.values()) == 6


# turns, chats, files


class Script:
    """Says one text after the other."""

    name = "script"

    def __init__(self, *texts):
        self.texts = list(texts)

    def generate(self, requests):
        return asyncio.run(self.agenerate(requests))

    async def agenerate(self, requests):
        return [Reply(self.texts.pop(0), "stop", TokenUsage(3, 2), logprobs=[("a", -0.25, {})] if r.logprobs else None)
                for r in requests]

    def bound(self, request):
        return TokenUsage(9, request.max_tokens)

    def identity(self):
        return {"model": self.name}


def talk(chat, gym, **options):
    policy, turns = ChatPolicy(chat, **options), []
    for seed in range(2):
        turns.append(judge(policy.propose(PROBLEMS[0], turns, seed=seed), PROBLEMS[0], gym))
    return turns


@pytest.mark.parametrize("logprobs", [0, 2])
def test_a_recorded_conversation_replays_to_the_same_turns(tmp_path, logprobs):
    texts = ["no idea", "```python\nclass ModelNew:\n    pass\n```"]
    cached = CachedChat(Script(*texts), tmp_path / "chat.db")
    turns = talk(cached, FakeGym(), logprobs=logprobs)
    cached.export(tmp_path / "chat.jsonl")
    assert talk(ReplayChat(tmp_path / "chat.jsonl"), FakeGym(), logprobs=logprobs) == turns
    assert [t.code for t in turns] == ["", "class ModelNew:\n    pass\n"]
    assert turns[0].logprobs == ([-0.25] if logprobs else None)
    said = [m["content"] for m in turns[1].messages]
    assert said[1] == "no idea" and "status compile_error" in said[2] and "Improve" in said[2] and PROBLEMS[0].source in said[0]


def test_code_is_the_last_block_with_the_class():
    text = "```\nclass ModelNew: 1\n```\n ```python\nclass ModelNew: 2\n ```\n```c\nvoid f() {}\n```\nclass ModelNew"
    assert extract_code(text) == "class ModelNew: 2\n"
    assert extract_code("class ModelNew: pass") == extract_code("```\nclass Model\n```") == extract_code("```\nclass ModelNew") == ""


def test_judge_fills_in_what_the_gym_says():
    turn = Turn([], "", "class ModelNew: 7")
    gym = SimpleNamespace(evaluate=lambda task: Found("ok", True, True, False, 2.0, 0.2, 0.6))
    for mode, cover in (("paper", 0.2), ("displaced", 0.6), ("guarded", 0.2)):
        done = judge(turn, PROBLEMS[0], gym, pr_mode=mode)
        assert done.coverage == cover and done.reward == pytest.approx(1.5 + cover / 2) and done.feedback == "status ok"
    assert done.result == {**asdict(Found("ok", True, True, False, 2.0, 0.2, 0.6)), "flags": ["seen"]}
    with pytest.raises(ValueError, match="unknown pr_mode 'c'"):
        judge(turn, PROBLEMS[0], gym, pr_mode="c")


def test_the_plan_policy_reads_the_last_turn(tiny):
    gym, policy = FakeGym(), PlanPolicy()
    first = judge(policy.propose(PROBLEMS[1]), PROBLEMS[1], gym)
    assert first.code == plan_source(PROBLEMS[1], Plan.parse(first.response)) and len(first.logprobs) == len(SLOTS)
    seconds = {policy.propose(PROBLEMS[1], [first], seed=s).response for s in range(12)}
    firsts = {policy.propose(PROBLEMS[1], seed=s).response for s in range(12)}
    assert seconds != firsts and policy.propose(PROBLEMS[1], [first, first], seed=3) != policy.propose(PROBLEMS[1], [first], seed=4)
    nonsense = [tiny.propose(PROBLEMS[0], seed=s) for s in range(3)]
    assert {t.code for t in nonsense} == {""} and len(nonsense[0].response.split()) == len(SLOTS)
    assert judge(nonsense[0], PROBLEMS[0], gym).result["status"] == "compile_error"


text = st.text(max_size=20)
values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | text,
                      lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text("ab$", max_size=3).filter(
                          lambda s: not s.startswith("$")), x, max_size=3), max_leaves=6)
turns = st.fixed_dictionaries({
    "messages": st.lists(st.fixed_dictionaries({"role": text, "content": text}), max_size=2), "response": text, "code": text,
    "feedback": text, "result": st.none() | st.dictionaries(st.text("xyz", max_size=3), values, max_size=3),
    "reward": st.floats(), "coverage": st.floats(), "logprobs": st.none() | st.lists(st.floats(), max_size=3)})


@given(st.lists(st.tuples(st.sampled_from(PROBLEMS), st.lists(turns, max_size=3)), min_size=1, max_size=4))
@settings(max_examples=25)
def test_trajectories_come_back_as_they_were(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "verl" / "train.parquet"
    given_ = [Trajectory(problem, [Turn(**t) for t in ts]) for problem, ts in rows]
    found = load_trajectories(export_verl(given_, path))
    assert repr(found) == repr(given_) and repr(load_trajectories(path)) == repr(given_)  # NaN is not equal to itself


def test_the_table_has_the_columns_of_verl(tmp_path):
    import pyarrow.parquet as pq

    export_verl([Trajectory(PROBLEMS[1]), Trajectory(PROBLEMS[0]), Trajectory(PROBLEMS[1])], tmp_path / "x.parquet", split="test")
    rows = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert [r["extra_info"]["name"] for r in rows] == [PROBLEMS[1].name, PROBLEMS[0].name]
    assert rows[0] == {"data_source": "collai/drkernel", "prompt": chat_messages(PROBLEMS[1]), "ability": "kernel",
                       "reward_model": {"style": "rule", "ground_truth": PROBLEMS[1].source},
                       "extra_info": {"entry_point": "Model", "problem_id": 0, "name": PROBLEMS[1].name, "level": 2, "split": "test"}}


def test_what_json_would_change_is_refused(tmp_path):
    turn = Turn([], "", "")
    for result, message in (({"a": (1, 2)}, r"turn 0\['result'\]\['a'\] holds \(1, 2\)"), ({"$float": "nan"}, r"the key '\$float'")):
        with pytest.raises(ValueError, match=message):
            export_verl([Trajectory(PROBLEMS[0], [replace(turn, result=result)])], tmp_path / "x.parquet")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="got 0 and 'x.parquet'"):
        export_verl([], tmp_path / "x.parquet")
    (tmp_path / "bad.jsonl").write_text('{"problem": 1}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl, line 1 is no trajectory"):
        load_trajectories(tmp_path / "bad.jsonl")
