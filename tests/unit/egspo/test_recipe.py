"""The three stages: tasks, the gated update against a plain loop, what is watched, and runs that a kill can't change."""
import copy
import doctest
import functools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import config

from collai.core.tinylm import TinyLM
from collai.egspo import recipe
from collai.egspo.ablation import TASKS
from collai.egspo.loss import mu_schedule
from collai.egspo.recipe import (
    MIXED,
    CopyList,
    CopySum,
    Course,
    EGSPOConfig,
    EGSPORecipe,
    GatedConfig,
    GatedTrainer,
    evaluate,
)
from collai.eval.stats import bootstrap_mean, wilson
from collai.rl.adv import get_advantage
from collai.rl.sample import generate, load_policy
from collai.rl.tasks import ChainSum, Mixture, Problem, PromptTask, load_prompts
from collai.rl.train import TrainConfig, Trainer, greedy_accuracy, sft, warm_start

COURSE = Course(CopySum(2, 2), held=CopyList(2, 2))
TOK = COURSE.tokenizer()
SIZE = {"hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp": 16}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def learned():
    model = TinyLM(len(TOK), **SIZE)
    sft(model, TOK, COURSE.imitation, steps=28, batch=16, lr=2e-2)
    return model


def gated(kind=GatedTrainer, course=COURSE, **settings):
    cfg = {"prompts_per_step": 3, "eval_every": 2, "eval_prompts": 8, "lr": 3e-3} | settings
    return kind(copy.deepcopy(learned()), TOK, course, GatedConfig(**cfg))


def same(a, b):
    names = {name for h in (a, b) for row in h.rows for name in row} - {"seconds"}
    return len(a) == len(b) and all(np.array_equal(a.column(n), b.column(n), equal_nan=True) for n in names)


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# ---- tasks ----

@given(st.integers(2, 5), st.integers(2, 16), st.integers(0, 2**32))
def test_sums_written_out_are_rewarded_for_their_last_number(terms, base, seed):
    task = CopySum(terms, base)
    problem = task.sample(np.random.default_rng(seed))
    numbers = [int(x, base) for x in problem.prompt[:-1].split("+")]
    steps = [re.fullmatch(r"(\w+)\+(\w)=(\w+)", part).groups() for part in problem.demo[:-1].split(";")]
    total = numbers[0]
    for (left, right, result), b in zip(steps, numbers[1:], strict=True):
        assert (int(left, base), int(right, base), int(result, base)) == (total, b, total + b)
        total += b
    assert int(problem.answer, base) == total and problem.demo.endswith(".") and problem.task is task
    assert len(problem.demo) + 1 <= task.max_new and set(problem.prompt + problem.demo) <= set(task.alphabet)
    assert task.reward(problem, problem.demo) == 1.0 == task.reward(problem, f"0+0=0;1+0={problem.answer}.")
    for wrong in (problem.demo[:-1], f"{problem.answer}.", f"0+0={problem.answer}0.", problem.demo + "0", ""):
        assert task.reward(problem, wrong) == 0.0


def test_lists_are_rewarded_when_they_are_written_again():
    task = CopyList(4, 5)
    problem = task.sample(np.random.default_rng(3))
    assert re.fullmatch(r"[0-4](;[0-4]){3}=", problem.prompt) and problem.demo == problem.prompt[:-1] + "."
    assert task.reward(problem, problem.demo) == 1.0 and len(problem.demo) + 1 <= task.max_new
    for wrong in (problem.prompt[:-1], problem.demo[2:], "9;9;9;9.", problem.demo.replace(";", "")):
        assert task.reward(problem, wrong) == 0.0
    assert {CopySum(3).key, CopyList(6).key, ChainSum(4).key} == {"copysum-3-10", "copylist-6-10", "chainsum-4-10"}
    assert CopySum().alphabet == CopyList().alphabet == ChainSum().alphabet


@pytest.mark.parametrize("task", [CopySum, CopyList])
def test_tasks_refuse_sizes_that_mean_nothing(task):
    with pytest.raises(ValueError, match=r"terms must be an integer in \[2, 64\], got 1"):
        task(1)
    with pytest.raises(ValueError, match=r"base must be an integer in \[2, 36\], got 40"):
        task(3, 40)


def test_the_shipped_policy_copies_surely_and_computes_half_right():
    model, tok = warm_start(MIXED)
    share = {task.key: greedy_accuracy(model, tok, task, prompts=64) for task in MIXED.tasks}
    assert 0.3 <= share["copysum-3-10"] <= 0.7 and 0.3 <= share["chainsum-4-10"] <= 0.7 and share["copylist-6-10"] > 0.95


def test_a_course_is_its_task_with_two_more_roles():
    rng = np.random.default_rng(0)
    task, held, experts = CopySum(2, 3), CopyList(2, 3), ChainSum(3, 3)
    course = Course(task, experts=experts, held=held)
    assert course.sample(rng).task is task and course.experts is experts and course.held is held
    assert {course.imitation.sample(rng).task for _ in range(30)} == {experts, held}
    assert course.key == "copysum-2-3 after chainsum-3-3+copylist-2-3"
    assert (course.max_new, course.max_turns, course.stop) == (task.max_new, 1, None)
    problem = task.sample(rng)
    assert course.reward(problem, problem.demo) == 1.0 and course.step("1+1=2.") is None
    assert set(course.tokenizer().decode(range(len(course.tokenizer())))) >= set(held.alphabet)
    alone = Course(task)
    assert alone.key == task.key and alone.imitation is alone.experts is task and alone.held is None
    with pytest.raises(AttributeError, match="a course has no judge"):
        _ = course.judge


@pytest.mark.parametrize("course", [COURSE, Course(CopyList(2, 3), experts=CopySum(2, 3)), *(what for what, *_ in TASKS.values())])
def test_a_course_can_be_sent_to_another_process(course):
    sent = pickle.loads(pickle.dumps(course))  # noqa: S301
    drawn, theirs = (task.sample(np.random.default_rng(3)) for task in (course, sent))
    assert (sent.key, theirs.prompt, theirs.demo) == (course.key, drawn.prompt, drawn.demo)
    assert sent.reward(theirs, drawn.demo) == 1.0 and sent.tokenizer().decode([1, 2]) == course.tokenizer().decode([1, 2])


def test_courses_with_other_roles_have_other_keys():
    a, b, c = CopySum(2, 3), CopyList(2, 3), ChainSum(3, 3)
    both = Mixture([b, c])
    courses = [Course(a), Course(a, experts=b), Course(a, held=b), Course(a, experts=b, held=c), Course(a, experts=both),
               Course(a, experts=both, held=a), Course(a, experts=b, held=Mixture([c, a])), Course(a, experts=Mixture([a, b])),
               Course(Course(a, experts=b), experts=c), Course(a, experts=Course(b, experts=c))]
    assert len({course.key for course in courses}) == len(courses)
    assert Course(CopySum(), held=CopyList()).key == "copysum-3-10 after copysum-3-10+copylist-6-10", "names rows of the stored study"


def test_what_is_no_task_or_no_settings_is_refused_at_once():
    problems = [COURSE.task.sample(np.random.default_rng(k)) for k in range(3)]
    for make in (Course, lambda x: Course(COURSE.task, experts=x), lambda x: Course(COURSE.task, held=x),
                 lambda x: gated(course=x), lambda x: EGSPORecipe(learned(), TOK, x, EGSPOConfig())):
        with pytest.raises(TypeError, match=r"task must have key, .*this list has no key \(a list of problems becomes a task by PromptTask"):
            make(problems)
    for wrong in ({"rl_steps": 1}, GatedConfig()):
        with pytest.raises(TypeError, match=f"cfg must be EGSPOConfig, got {type(wrong).__name__}"):
            EGSPORecipe(learned(), TOK, COURSE, wrong)
    for wrong in (EGSPOConfig(), TrainConfig()):
        with pytest.raises(TypeError, match=f"cfg must be GatedConfig, got {type(wrong).__name__}"):
            GatedTrainer(learned(), TOK, COURSE, wrong)


# ---- settings ----

@pytest.mark.parametrize(("settings", "text"), [
    ({"quantile": 1.5}, r"quantile must be in \[0, 1\], got 1.5"), ({"scope": "token"}, "unknown scope 'token'"),
    ({"phi": -0.1}, r"phi must be in \[0, 1\], got -0.1"), ({"phi": "cord"}, "unknown phi 'cord'"),
    ({"clip_low": 1.0}, r"clip_low must be in \[0, 1\), got 1.0"), ({"clip_high": -1}, r"clip_high must be in \[0, 1\), got -1"),
    ({"mu": 1.5}, r"mu must be in \[0, 1\], got 1.5"), ({"mu": {"peak": 1}}, "mu must be a number or hold decay, peak, valley, warmup"),
    ({"mu": {"warmup": 0, "decay": 1, "peak": 2, "valley": 0}}, r"peak must be in \[0, 1\], got 2"),
    ({"expert_share": 0}, r"expert_share must be in \(0, 1\), got 0"), ({"n": 0}, "n must be an integer >= 1, got 0"),
    ({"mu": "0.1"}, "mu must be a number, got '0.1'"), ({"mu": None}, "mu must be a number, got None"),
    ({"expert_share": "0.2"}, "expert_share must be a number, got '0.2'"),
    ({"mu": {"warmup": 0.5, "decay": 1, "peak": 0.5, "valley": 0}}, "warmup must be an integer >= 0, got 0.5"),
    ({"mu": {"warmup": 0, "decay": "1", "peak": 0.5, "valley": 0}}, "decay must be an integer >= 0, got '1'")])
def test_settings_of_the_gate_are_refused_with_their_value(settings, text):
    with pytest.raises((ValueError, TypeError), match=text):
        GatedConfig(**settings)


@pytest.mark.parametrize(("settings", "text"), [
    ({"sft_steps": -1}, "sft_steps must be an integer >= 0, got -1"), ({"rl_steps": 2.5}, "rl_steps must be an integer >= 0, got 2.5"),
    ({"ppo_epochs": 0}, "ppo_epochs must be an integer >= 1, got 0"), ({"sft_batch": True}, "sft_batch must be an integer >= 1, got True"),
    ({"lr_sft": 0.0}, "lr_sft must be positive, got 0.0"), ({"lr_rl": math.inf}, "lr_rl must be positive, got inf"),
    ({"sft_until": 1.5}, r"sft_until must be in \(0, 1\], got 1.5"), ({"advantage": "ppo"}, "unknown advantage 'ppo'"),
    ({"phi": 2}, r"phi must be in \[0, 1\], got 2"), ({"lr_sft": "0.1"}, "lr_sft must be a number, got '0.1'"),
    ({"sft_until": "0.5"}, "sft_until must be a number, got '0.5'"), ({"agg": "mean"}, "unknown agg 'mean'")])
def test_settings_of_the_recipe_are_refused_with_their_value(settings, text):
    with pytest.raises((ValueError, TypeError), match=text):
        EGSPOConfig(**settings)


def test_the_recipe_hands_every_setting_on():
    cfg = EGSPOConfig(rl_steps=3, prompts_per_step=5, n=2, ppo_epochs=3, lr_rl=1e-5, quantile=0.7, scope="sequence", phi="chord",
                      mu=0.2, expert_share=0.3, expert_phi=True, clip_low=0.1, clip_high=0.3, advantage="otb", options={"leave_one_out": True},
                      agg="seq-mean-token-sum", grad_clip=0.5, eval_every=7, eval_prompts=9, seed=11)
    assert cfg.gated() == GatedConfig(prompts_per_step=5, n=2, epochs=3, lr=1e-5, quantile=0.7, scope="sequence", phi="chord", mu=0.2,
                                      expert_share=0.3, expert_phi=True, clip_low=0.1, clip_high=0.3, estimator="otb",
                                      options={"leave_one_out": True}, agg="seq-mean-token-sum", grad_clip=0.5, eval_every=7,
                                      eval_prompts=9, seed=11)
    config.update("jaxtyping_disable", True)  # annotations say int and float
    try:
        counted = EGSPOConfig(sft_steps=np.int64(5), ppo_epochs=np.int32(2), lr_sft=np.float32(0.5))
    finally:
        config.update("jaxtyping_disable", False)
    assert (type(counted.sft_steps), type(counted.ppo_epochs), type(counted.lr_sft)) == (int, int, float)
    spec = {"sft_steps": 280, "rl_steps": 100, "prompts_per_step": 8, "n": 4, "ppo_epochs": 1, "lr_sft": 3e-3, "lr_rl": 2e-4,
            "quantile": 0.8, "phi": 0.1, "mu": 0.0, "expert_share": 0.2, "clip_low": 0.2, "clip_high": 0.2, "advantage": "grpo", "seed": 0}
    assert {name: getattr(EGSPOConfig(), name) for name in spec} == spec


# ---- the gated update ----

def dense(model, batch):
    """Log-probabilities (B, T, V) of a batch, one row at a time and without padding."""
    rows = torch.zeros(*batch.ids.shape, len(TOK))
    for i in range(len(batch.ids)):
        prompt = batch.prompt_ids[i][batch.prompt_mask[i] == 1]
        answer = batch.ids[i][batch.mask[i] == 1]
        out = model(torch.cat((prompt, answer))[None]).logits[0].log_softmax(-1)
        rows[i, :len(answer)] = out[len(prompt) - 1:len(prompt) - 1 + len(answer)]
    return rows


def expected_loss(model, run, batch, phi, mu, expert_phi):
    """The loss of the first update of a step, token by token."""
    adv = get_advantage("grpo")(batch.rewards, batch.mask, batch.uid).advantages
    logp, total, count = dense(model, batch), 0.0, int(batch.mask.sum())
    tau = np.quantile([h for row, m in zip(batch.entropy.tolist(), batch.mask.tolist(), strict=True)
                       for h, k in zip(row, m, strict=True) if k], 0.8)
    for i, t in batch.mask.nonzero().tolist():
        p = logp[i, t].detach().exp()
        a = int(batch.ids[i, t])
        w = {"chord": float(p[a] * (1 - p[a])), "chord-state": float((p**2 - p**3).sum())}.get(phi, phi)
        w = 1.0 if float(batch.entropy[i, t]) >= tau - 1e-7 else w
        total = total - w * (logp[i, t, a] - batch.old_logp[i, t]).exp() * adv[i, t] / count
    if mu:
        tokens = []
        for problem in run.experts():
            prompt, demo = TOK.encode(problem.prompt), [*TOK.encode(problem.demo), TOK.eos_token_id]
            out = model(torch.tensor([[*prompt, *demo]])).logits[0].log_softmax(-1)
            tokens += [out[len(prompt) - 1 + k, v] for k, v in enumerate(demo)]
        experts = torch.stack(tokens)
        weight = (experts.exp() * (1 - experts.exp())).detach() if expert_phi else 1.0
        total = (1 - mu) * total + mu * (-(weight * experts)).mean()
    return total


@pytest.mark.parametrize(("phi", "mu", "expert_phi"), [
    (0.1, 0.0, False), (1.0, 0.1, True), ("chord", 0.0, False), ("chord-state", 0.3, False)])
def test_an_update_is_the_gradient_of_the_formula(phi, mu, expert_phi):
    run = gated(phi=phi, mu=mu, expert_phi=expert_phi, grad_clip=1e9)
    model = copy.deepcopy(learned())
    loss = expected_loss(model, run, run.sample(1), phi, mu, expert_phi)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    row = run.run(1).rows[0]
    norm = float(torch.stack([g.square().sum() for g in grads]).sum().sqrt())
    assert norm > 1e-3 and row["grad_norm"] == pytest.approx(norm, rel=1e-3)
    for g, x in zip(grads, run.model.parameters(), strict=True):
        assert torch.allclose(x.grad, g, atol=2e-5)
    assert row["gate_share"] == pytest.approx(0.2, abs=0.05) and ("mu" in row) == bool(mu)


def test_without_attenuation_it_is_the_plain_trainer():
    plain = Trainer(copy.deepcopy(learned()), TOK, COURSE.task,
                    TrainConfig(estimator="grpo", prompts_per_step=3, eval_every=2, eval_prompts=8, lr=3e-3, epochs=2))
    ours, theirs = gated(phi=1, epochs=2).run(3), plain.run(3)
    assert np.count_nonzero(theirs.column("grad_norm")) > 1, "runs without gradients would agree anyway"
    for name in ("tokens", "reward", "accuracy", "entropy", "grad_norm", "clip_share"):
        assert np.allclose(ours.column(name), theirs.column(name), rtol=1e-5, equal_nan=True), name


def test_the_gate_stays_that_of_the_rollout_in_all_updates():
    gates = []

    class Watching(GatedTrainer):
        def loss(self, rollouts, adv, stats):
            gates.append((self.gate(rollouts)[0], stats.logp.detach() - rollouts.old_logp))
            return super().loss(rollouts, adv, stats)

    gated(Watching, epochs=3, lr=5e-2).run(1)
    (first, still), (_, moved), (last, _) = gates
    assert torch.equal(first, last) and still.abs().max() < 1e-4 < moved.abs().max()


def test_the_running_threshold_follows_from_the_rows(tmp_path):
    levels = []

    class Watching(GatedTrainer):
        def sample(self, step):
            batch = super().sample(step)
            levels.append(np.quantile(batch.entropy[batch.mask == 1].double().numpy(), 0.8))
            return batch

    settings = {"scope": "running", "epochs": 2, "lr": 1e-3, "prompts_per_step": 4}
    whole = gated(Watching, **settings)
    taus = whole.run(5).column("tau")
    by_hand = [levels[0]]
    for level in levels[1:]:
        by_hand.append(0.9 * by_hand[-1] + 0.1 * level)
    assert np.allclose(taus, by_hand, rtol=1e-5) and np.ptp(taus) > 0
    assert np.count_nonzero(whole.history.column("grad_norm")[3:])
    gated(**settings).run(3, checkpoint=tmp_path)
    later = gated(**settings)
    assert same(later.run(5, checkpoint=tmp_path), whole.history) and same_weights(later.model, whole.model)


def test_experts_follow_from_seed_and_step_and_mu_from_its_schedule():
    schedule = {"warmup": 2, "decay": 3, "peak": 0.8, "valley": 0.1}
    run = gated(mu=schedule, n=4, prompts_per_step=4, expert_share=0.2)
    first = run.experts()
    assert len(first) == 4 and all(p.task is COURSE.task for p in first) and run.experts() == first
    assert gated(mu=0.1, n=4, prompts_per_step=4, lr=0.5).experts() == first != gated(mu=0.1, seed=1).experts()
    assert len(gated(n=2, prompts_per_step=1).experts()) == 1
    history = run.run(6)
    assert run.experts() != first
    assert history.column("mu").tolist() == [mu_schedule(k, **schedule) for k in range(6)]
    assert (history.column("expert_tokens") > 0).all() and history.column("sft_loss")[0] == history.column("expert_nll")[0]
    assert len(gated(course=Course(COURSE.task, experts=CopyList(2, 2)), mu=0.1).experts()[0].demo) == 4


# ---- what is watched ----

def test_the_distance_is_that_of_the_policy_that_sampled_from_the_start():
    run = gated(epochs=2)
    history, start = run.run(2), learned()
    batch = run.sample(3)
    theirs, ours = (dense(m, batch).gather(-1, batch.ids[..., None])[..., 0] for m in (start, run.model))
    d = (theirs - ours)[batch.mask == 1].detach()
    assert run.run(3).rows[-1]["kl"] == pytest.approx(float((d.exp() - d - 1).mean()), rel=1e-3)
    assert abs(history.rows[0]["kl"]) < 1e-6 < history.rows[-1]["kl"]
    assert same_weights(run.reference, start) and not any(p.requires_grad for p in run.reference.parameters())


def test_the_held_back_skill_is_watched_where_the_run_is_evaluated():
    run = gated()
    held = run.run(4).column("held_accuracy")
    assert np.isnan(held).tolist() == [True, False, True, False]
    assert held[-1] == greedy_accuracy(run.model, TOK, COURSE.held, prompts=8)
    assert "held_accuracy" not in gated(course=COURSE.task).run(2).rows[1]


def test_a_checkpoint_of_another_reference_is_refused(tmp_path):
    run = gated()
    run.run(2, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="has reference = "):
        GatedTrainer(run.model, TOK, COURSE, run.cfg).run(3, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="has phi = 0.1, this run has 0.2"):
        gated(phi=0.2).run(3, checkpoint=tmp_path)


def test_the_gate_works_on_token_advantages():
    history = gated(estimator="otb", options={"leave_one_out": True}, prompts_per_step=6, lr=1e-3).run(2)
    share = history.column("energy_share_high")
    assert history.column("grad_norm").min() > 0 and 0.3 < share.max() <= 1 and share.min() >= 0


# ---- the recipe ----

SETTINGS = {"sft_steps": 12, "sft_batch": 4, "lr_sft": 1e-3, "sft_until": None, "rl_steps": 4, "prompts_per_step": 3, "lr_rl": 3e-3,
            "scope": "running", "mu": 0.1, "eval_every": 2, "eval_prompts": 8}


def fresh(task=None, **settings):
    course = COURSE if task is None else Course(task, held=COURSE.held)
    return EGSPORecipe(copy.deepcopy(learned()), TOK, course, EGSPOConfig(**(SETTINGS | settings)))


def test_one_record_holds_all_stages():
    run = fresh()
    history = run.run()
    assert history.column("stage").tolist() == [1] * 12 + [3] * 4
    assert history.column("step").tolist() == [*range(1, 13), *range(1, 5)]
    assert (history.column("tokens")[:12] == 0).all() and (np.diff(history.column("tokens")[11:]) > 0).all()
    by_hand = copy.deepcopy(learned())
    losses = sft(by_hand, TOK, COURSE.imitation, steps=12, batch=4, lr=1e-3)
    assert history.column("nll")[:12].tolist() == losses.tolist() and np.isnan(history.column("nll")[12:]).all()
    assert np.flatnonzero(np.isfinite(history.column("accuracy"))).tolist() == [11, 13, 15]
    assert np.flatnonzero(np.isfinite(history.column("held_accuracy"))).tolist() == [11, 13, 15]
    assert all(type(x) in (int, float) for row in history.rows for x in row.values())
    rest = GatedTrainer(by_hand, TOK, COURSE, run.cfg.gated())
    assert rest.run(4).column("kl").tolist() == history.column("kl")[12:].tolist() and same_weights(by_hand, run.model)


def test_imitation_stops_at_its_accuracy_on_the_rewarded_task(monkeypatch, tmp_path):
    seen = []

    def rising(model, tok, task, *, prompts):
        seen.append(task)
        return 0.1 * len(seen)

    monkeypatch.setattr(recipe, "greedy_accuracy", rising)
    run = fresh(sft_until=0.2, rl_steps=0, sft_steps=90)
    history = run.run(checkpoint=tmp_path)
    assert len(history) == 20 and seen[:2] == [run.course, run.course], "looked at after steps 10 and 20, on the task alone"
    again = fresh(sft_until=0.2, rl_steps=0, sft_steps=90)
    seen[:] = [None]
    assert len(again.run(checkpoint=tmp_path)) == 20 and same_weights(again.model, run.model)


def test_a_folder_of_another_recipe_is_refused_before_anything_is_written(tmp_path):
    cfg = {"sft_steps": 20, "sft_until": 0.9, "rl_steps": 2}
    run = fresh(**cfg)
    expected = run.run(checkpoint=tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    for name, value, was in (("sft_steps", 30, 20), ("sft_steps", 10, 20), ("sft_until", 1.0, 0.9), ("sft_until", 0.01, 0.9), ("phi", 0.2, 0.1)):
        with pytest.raises(ValueError, match=rf"recipe\.pt has {name} = {was}, this run has {value}"):
            fresh(**(cfg | {name: value})).run(checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"recipe\.pt has task = 'copysum-2-2 after copysum-2-2\+copylist-2-2', this run has 'copysum-2-2'"):
        EGSPORecipe(copy.deepcopy(learned()), TOK, COURSE.task, run.cfg).run(checkpoint=tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
    again, longer = fresh(**cfg), fresh(**(cfg | {"rl_steps": 3}))
    assert same(again.run(checkpoint=tmp_path), expected) and same_weights(again.model, run.model)
    assert len(longer.run(checkpoint=tmp_path)) == len(expected) + 1, "more steps of the last stage go on"


def test_a_folder_whose_imitation_alone_was_longer_is_refused(tmp_path):
    fresh(sft_steps=20, rl_steps=0).run(checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"has sft_steps = 20, this run has 10"):
        fresh(sft_steps=10).run(checkpoint=tmp_path)
    assert not (tmp_path / "trainer.pt").exists()


def test_stages_may_be_left_out():
    history = fresh(sft_steps=0, rl_steps=2).run()
    assert history.column("stage").tolist() == [1, 3, 3] and history.rows[0]["step"] == 0
    assert math.isfinite(history.rows[0]["accuracy"]) and len(fresh(sft_steps=3, rl_steps=0).run()) == 3


CHILD = """
    import sys
    import torch
    torch.set_num_threads(1)
    from collai.core.tinylm import TinyLM
    from collai.egspo.recipe import CopyList, CopySum, Course, EGSPOConfig, EGSPORecipe
    course = Course(CopySum(2, 2), held=CopyList(2, 2))
    tok = course.tokenizer()
    cfg = EGSPOConfig(**({settings} | dict(sft_steps=60, rl_steps=100_000)))
    EGSPORecipe(TinyLM.load(sys.argv[1]), tok, course, cfg).run(checkpoint=sys.argv[2])
"""


def wait_for(path, process, seconds=180.0):
    end = time.monotonic() + seconds
    while not path.exists():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(f"{path.name} did not appear: {process.communicate()[1]}")
        time.sleep(0.002)


def test_waiting_ends_although_the_child_lives(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stderr=subprocess.PIPE, text=True)
    with pytest.raises(pytest.fail.Exception, match="never did not appear"):
        wait_for(tmp_path / "never", child, seconds=0.05)
    assert child.returncode == -signal.SIGKILL


def test_a_process_killed_in_any_stage_goes_on_bit_by_bit(tmp_path):
    """Stopped dead in stage 1, where what a kill would leave is copied, then killed in stage 3."""
    learned().save(start := tmp_path / "start")
    late, early = tmp_path / "run", tmp_path / "early"
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(CHILD).format(settings=SETTINGS), start, late],
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(late / "sft.pt", process)
        process.send_signal(signal.SIGSTOP)
        shutil.copytree(late, early)
        process.send_signal(signal.SIGCONT)
        wait_for(late / "trainer.pt", process)
        time.sleep(0.05)
    finally:
        process.kill()
    process.communicate()
    done = len(torch.load(early / "sft.pt", weights_only=True)["losses"])
    made = len(torch.load(late / "trainer.pt", weights_only=True)["rows"])
    assert process.returncode == -signal.SIGKILL and 10 <= done < 60 and made >= 2 and not (early / "trainer.pt").exists()
    settings = {"sft_steps": 60, "rl_steps": made + 3}
    whole = fresh(**settings)
    expected = whole.run()
    for folder in (early, late):
        later = fresh(**settings)
        assert same(later.run(checkpoint=folder), expected) and same_weights(later.model, whole.model)


class Interrupting(CopySum):
    """Presses Ctrl-C when it is asked for its `left`-th problem."""

    left = -1

    def sample(self, rng):
        Interrupting.left -= 1
        if Interrupting.left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return super().sample(rng)


def test_ctrl_c_stops_after_the_step_in_both_parts(tmp_path):
    task, before = Interrupting(2, 2), signal.getsignal(signal.SIGINT)
    Interrupting.left = 10  # of about 24 problems in stage 1; the others are lists
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step [2-9]\n"):
        fresh(task).run(checkpoint=tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["recipe.pt", "sft.pt"]
    fresh(task, rl_steps=0).run(checkpoint=tmp_path)
    Interrupting.left = 8 + 3 + 3 + 2  # evaluation after stage 1, problems and experts of the first step, problems of the second
    with pytest.raises(KeyboardInterrupt, match="stopped after step 2"):
        fresh(task).run(checkpoint=tmp_path)
    assert len(torch.load(tmp_path / "trainer.pt", weights_only=True)["rows"]) == 2
    assert signal.getsignal(signal.SIGINT) is before
    Interrupting.left = -1
    later, whole = fresh(task), fresh(task)
    assert same(later.run(checkpoint=tmp_path), whole.run()) and same_weights(later.model, whole.model)


def test_the_same_object_goes_on_after_ctrl_c_in_the_last_stage(tmp_path):
    task = Interrupting(2, 2)
    whole, Interrupting.left = fresh(task), 10**9
    fresh(task, rl_steps=0).run()
    asked = 10**9 - Interrupting.left + 3 + 3 + 1  # stage 1, problems and experts of the first step, problems of the second
    expected = whole.run()
    for place in ({"checkpoint": tmp_path}, {}):
        run, Interrupting.left = fresh(task), asked
        with pytest.raises(KeyboardInterrupt, match="stopped after step 2"):
            run.run(**place)
        assert same(run.run(**place), expected) and same_weights(run.model, whole.model)
        assert same(run.run(**place), expected), "made already"


def test_the_same_object_goes_on_in_stage_1_only_from_a_state(tmp_path):
    task = Interrupting(2, 2)
    whole, run = fresh(task), fresh(task)
    Interrupting.left = 10
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step [2-9]\n") as stopped:
        run.run(checkpoint=tmp_path)
    assert stopped.value.__notes__ == [f"the state is in {tmp_path / 'sft.pt'}"]
    Interrupting.left = -1
    assert same(run.run(checkpoint=tmp_path), whole.run()) and same_weights(run.model, whole.model)
    lost, Interrupting.left = fresh(task), 10
    with pytest.raises(KeyboardInterrupt, match="stopped after step") as stopped:
        lost.run()
    assert stopped.value.__notes__ == ["the state is lost (no checkpoint)"]
    Interrupting.left = -1
    for place in ({}, {"checkpoint": tmp_path / "new"}):
        with pytest.raises(RuntimeError, match="stage 1 broke off and no state of it is stored: make a new recipe from the start weights"):
            lost.run(**place)


def test_the_example_of_the_help_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = {}
    for example in doctest.DocTestParser().get_examples(EGSPORecipe.__doc__):
        exec(example.source, found)  # noqa: S102
    assert len(found["history"]) == 12 and found["history"].column("stage").tolist() == [1] * 10 + [3] * 2


# ---- evaluation ----

def test_evaluation_counts_answers_and_problems():
    model, n = learned(), 6
    problems = [COURSE.task.sample(np.random.default_rng(k)) for k in range(9)]
    rollouts = generate(model, TOK, problems, n=n, max_new=COURSE.task.max_new, seed=recipe.item_seed(4, 0))
    right = np.array([[COURSE.task.reward(p, rollouts.meta["text"][i * n + k]) for k in range(n)] for i, p in enumerate(problems)])
    found = evaluate(model, TOK, problems, n=n, seed=4)
    assert 0 < right.mean() < 1 and found["avg"] == pytest.approx(right.mean()) and found["pass"] == (right.max(axis=1) == 1).mean()
    assert np.allclose(found["avg_ci"], bootstrap_mean(right.mean(axis=1))[1:]), "whole problems are drawn"
    assert found["pass_ci"] == wilson(int(right.max(axis=1).sum()), 9)
    assert evaluate(model, TOK, problems, n=n, seed=4) == found != evaluate(model, TOK, problems, n=n, seed=5)
    greedy = evaluate(model, TOK, problems, n=1, temperature=0)
    assert greedy["avg"] == greedy["pass"]


def test_evaluation_in_parts_keeps_the_order_of_the_problems(monkeypatch):
    class Sure(CopyList):
        def reward(self, problem, transcript):
            return float(problem.answer[0] == "1")

    task = Sure(2, 2)
    problems = [task.sample(np.random.default_rng(k)) for k in range(7)]
    monkeypatch.setattr(recipe, "_ROWS", 6)
    rewards = recipe._answers(learned(), TOK, problems, 2, 1.0, 0)
    assert rewards.tolist() == [[float(p.answer[0] == "1")] * 2 for p in problems] and 0 < rewards.mean() < 1
    monkeypatch.setattr(recipe, "_ROWS", 1)
    assert recipe._answers(learned(), TOK, problems, 2, 1.0, 0).tolist() == rewards.tolist()


def test_evaluation_refuses_what_has_no_interval():
    problems = [COURSE.task.sample(np.random.default_rng(k)) for k in range(3)]
    with pytest.raises(ValueError, match="at least 2 problems are needed for an interval, got 1"):
        evaluate(learned(), TOK, problems[:1])
    with pytest.raises(ValueError, match="problem 0 has no task to judge it"):
        evaluate(learned(), TOK, [Problem("1+1=", "2"), Problem("1+2=", "3")])
    with pytest.raises(ValueError, match="n must be an integer >= 1, got 0"):
        evaluate(learned(), TOK, problems, n=0)
    with pytest.raises(ValueError, match=r"n must be an integer >= 1, got 2\.5"):
        evaluate(learned(), TOK, problems, n=2.5)


def test_files_and_a_transformers_checkpoint_go_through_all_stages(tmp_path):
    """Prompts in parquet, experts as chats in JSONL, answers compared in value, a Qwen3 of random weights from a folder."""
    import pandas as pd
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    pytest.importorskip("math_verify")
    words = ["<eos>", *"0123456789+-/=. "]
    engine = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="."))  # noqa: S106
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=engine, eos_token="<eos>")  # noqa: S106
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                                 head_dim=8, intermediate_size=16)).save_pretrained(tmp_path / "model")
    fast.save_pretrained(tmp_path / "model")
    pd.DataFrame({"prompt": ["1/2=", "3/6="], "answer": ["0.5", "1/2"]}).to_parquet(tmp_path / "prompts.parquet")
    (tmp_path / "experts.jsonl").write_text("\n".join(json.dumps({"messages": [
        {"role": "user", "content": f"{a}/2"}, {"role": "assistant", "content": f"{a / 2}"}]}) for a in range(1, 9)))
    model, tok = load_policy(str(tmp_path / "model"))
    prompts = load_prompts(tmp_path / "prompts.parquet")
    rewarded, experts = PromptTask(prompts, max_new=6), PromptTask(load_prompts(tmp_path / "experts.jsonl"), max_new=6)
    assert rewarded.reward(rewarded.problems[0], "2/4") == 1.0 and rewarded.reward(rewarded.problems[1], "0.6") == 0.0
    cfg = EGSPOConfig(sft_steps=6, sft_until=None, sft_batch=8, lr_sft=3e-2, rl_steps=2, prompts_per_step=2, n=2, mu=0.2, eval_every=1,
                      eval_prompts=2, phi="chord-state")
    before = copy.deepcopy(model)
    history = EGSPORecipe(model, tok, Course(rewarded, experts=experts), cfg).run(checkpoint=tmp_path / "run")
    assert history.column("stage").tolist() == [1] * 6 + [3] * 2 and history.column("nll")[5] < history.column("nll")[0]
    assert (history.column("expert_tokens")[6:] >= 4).all() and not same_weights(before, model)
    found = evaluate(model, tok, rewarded.problems, n=3)
    assert 0 <= found["avg"] <= found["pass"] <= 1
