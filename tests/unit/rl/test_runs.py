"""Runs of several arms: resumable cells, accuracy at equal tokens, settings chosen on other seeds."""
import copy
import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from collai.core.tinylm import TinyLM
from collai.rl import runs
from collai.rl.runs import accuracy_at, cross_fit, evaluations, run_arms
from collai.rl.tasks import ChainSum
from collai.rl.train import History, TrainConfig, Trainer, sft

TINY = ChainSum(2, 3)
FAST = {"prompts_per_step": 2, "eval_every": 2, "eval_prompts": 4, "lr": 1e-2}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def policy():
    model = TinyLM(len(TINY.tokenizer()), hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=16, seed=0)
    sft(model, TINY.tokenizer(), TINY, steps=40, batch=16, lr=1e-2)
    return model


def test_runs_are_those_of_the_trainer_and_resume_from_their_folder(policy, tmp_path):
    arms = {"otb": FAST, "mean": TrainConfig(estimator="grpo", options={"scale": "none"}, **FAST)}
    options = {"seeds": [0, 7], "steps": 4, "start": policy}
    found = run_arms(arms, TINY, **options)
    alone = Trainer(copy.deepcopy(policy), TINY.tokenizer(), TINY, TrainConfig(seed=7, **FAST)).run(4)
    assert np.array_equal(found["otb"][1].column("grad_norm"), alone.column("grad_norm"))
    assert list(found) == ["otb", "mean"] and all(len(h) == 4 for hs in found.values() for h in hs)
    assert run_arms(arms, TINY, seconds=-1, folder=tmp_path, **options) == {"otb": [None] * 2, "mean": [None] * 2}
    run_arms({"otb": FAST}, TINY, folder=tmp_path, **options)
    assert len(list(tmp_path.glob("*.json"))) == 2
    kept = run_arms(arms, TINY, seconds=-1, folder=tmp_path, **options)
    assert kept["mean"] == [None, None] and np.array_equal(kept["otb"][1].column("reward"), alone.column("reward"))
    other = run_arms({"otb": FAST}, TINY, seconds=-1, folder=tmp_path, **(options | {"steps": 5}))
    assert other["otb"] == [None, None], "another budget is another run"


def test_a_run_out_of_time_goes_on_where_it_was(policy, tmp_path, monkeypatch):
    ticks = iter([0.0, 0.0, 0.0, 9.0, *[0.0] * 50])  # start, begin of the cell, one look in time, one late
    monkeypatch.setattr(runs.time, "time", lambda: next(ticks))
    options = {"seeds": [3], "steps": 6, "start": policy, "folder": tmp_path, "seconds": 5.0}
    assert run_arms({"a": FAST}, TINY, **options)["a"] == [None]
    (state,) = tmp_path.iterdir()
    assert len(torch.load(state / "trainer.pt", weights_only=True)["rows"]) == 2
    (late,) = run_arms({"a": FAST}, TINY, **options)["a"]
    (whole,) = run_arms({"a": FAST}, TINY, seeds=[3], steps=6, start=policy)["a"]
    assert np.array_equal(late.column("grad_norm"), whole.column("grad_norm")) and len(late) == 6
    assert not state.exists() and [f.suffix for f in tmp_path.iterdir()] == [".json"]


def test_a_killed_run_loses_one_interval_at_most(policy, tmp_path):
    made = []

    class Killed(Trainer):
        def sample(self, step):
            made.append(step)
            if len(made) == 6:
                raise SystemExit("killed")
            return super().sample(step)

    options = {"seeds": [3], "steps": 8, "start": policy, "folder": tmp_path, "make": Killed}
    with pytest.raises(SystemExit):
        run_arms({"a": FAST}, TINY, **options)
    (state,) = tmp_path.iterdir()
    assert len(torch.load(state / "trainer.pt", weights_only=True)["rows"]) == 4
    (late,) = run_arms({"a": FAST}, TINY, **options)["a"]
    assert made == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]
    (whole,) = run_arms({"a": FAST}, TINY, seeds=[3], steps=8, start=policy)["a"]
    assert np.array_equal(late.column("grad_norm"), whole.column("grad_norm"))
    assert [f.suffix for f in tmp_path.iterdir()] == [".json"]


def cell(policy, tmp_path, **changed):
    settings = {"cfg": TrainConfig(**FAST), "task": TINY, "model": policy, "steps": 4, "tokens": 1.0, "target": None, "make": Trainer,
                "device": "cpu", "folder": tmp_path, "deadline": 0.0}
    return runs._Cell(**(settings | changed))


def test_every_digit_of_a_setting_is_part_of_a_run_s_name(policy, tmp_path):
    """Numbers of tensors, also of long ones; classes of one name in two modules; parts of a partial; shape of the policy."""
    def prior(change, count=3):
        x = torch.full((count,), 0.5)
        x[count // 2] += change
        return TrainConfig(options={"prior": x, "prior_strength": 1.0}, **FAST)

    def named(module, name="Trainer"):
        return type("Trainer", (Trainer,), {"__module__": module, "__qualname__": name})

    turned = TinyLM(**(policy.config | {"rope_theta": 5.0}))
    turned.load_state_dict(policy.state_dict())
    changes = [{}, *({"cfg": prior(x)} for x in (0.0, 1e-6, 9e-6)), *({"cfg": prior(x, 5000)} for x in (0.0, 1e-6)),
               {"cfg": TrainConfig(**(FAST | {"lr": 0.01 + 1e-15}))}, {"make": named("a")}, {"make": named("b")}, {"make": named("a", "In.Trainer")},
               {"make": functools.partial(Trainer)}, {"make": functools.partial(Trainer, extra=0.1)},
               {"make": functools.partial(Trainer, extra=torch.tensor([0.1]))}, {"model": turned}, {"device": "cuda"}]
    keys = [cell(policy, tmp_path, **change).key() for change in changes]
    assert len(set(keys)) == len(keys)
    assert [cell(policy, tmp_path, **copy.deepcopy(change)).key() for change in changes] == keys


def test_a_partial_makes_trainers_and_their_runs_are_kept(policy, tmp_path):
    class Slow(Trainer):
        def __init__(self, *args, pause):
            super().__init__(*args)
            self.pause = pause

    options = {"seeds": [0], "steps": 2, "start": policy, "folder": tmp_path}
    for pause in (0.1, 0.2):
        run_arms({"a": FAST}, TINY, make=functools.partial(Slow, pause=pause), **options)
    assert len(list(tmp_path.glob("*.json"))) == 2
    for nameless in (lambda *args: Trainer(*args), functools.partial(Slow, pause=object())):
        with pytest.raises(TypeError, match="a run can be kept in a folder if its settings have numbers or names, got"):
            run_arms({"a": FAST}, TINY, make=nameless, **options)
    with pytest.raises(ValueError, match="steps must be an integer >= 0, got 1.5"):
        run_arms({"a": FAST}, TINY, **(options | {"steps": 1.5}))


def test_runs_end_at_tokens_or_target(policy):
    (by_tokens,) = run_arms({"a": FAST}, TINY, seeds=[0], steps=99, tokens=100, start=policy)["a"]
    used = by_tokens.column("tokens")
    assert used[-1] >= 100 and used[-3] < 100 and len(by_tokens) % 2 == 0

    class Lucky(Trainer):
        def evaluate(self):
            return 0.5 + 0.1 * len(self.history)

    (by_target,) = run_arms({"a": FAST}, TINY, seeds=[0], steps=99, target=0.8, start=policy, make=Lucky)["a"]
    assert len(by_target) == 4


def test_the_same_seed_meets_the_same_problems_in_every_arm(policy):
    met = {}

    class Noted(Trainer):
        def sample(self, step):
            rollouts = super().sample(step)
            met.setdefault(self.cfg.estimator, []).append(rollouts.prompt_ids.tolist())
            return rollouts

    run_arms({name: {"estimator": name, **FAST} for name in ("otb", "grpo")}, TINY, seeds=[4], steps=3, start=policy, make=Noted)
    assert met["otb"] == met["grpo"] and len(met["otb"]) == 3


def test_accuracy_is_linear_between_looks_and_constant_outside():
    rows = [{"tokens": t, "accuracy": a} for t, a in ((10, 0.2), (20, np.nan), (30, 0.6), (35, np.nan))]
    tokens, accuracy = evaluations(History(rows))
    assert tokens.tolist() == [10, 30] and accuracy.tolist() == [0.2, 0.6]
    assert np.allclose(accuracy_at(History(rows), np.array([0, 10, 25, 30, 99])), [0.2, 0.2, 0.5, 0.6, 0.6])
    with pytest.raises(ValueError, match="the run has no evaluation in its 1 steps"):
        accuracy_at(History(rows[1:2]), np.array([1.0]))


@given(arrays(np.float64, array_shapes(min_dims=2, max_dims=2, max_side=5), elements=st.integers(0, 3)))
@settings(deadline=None, max_examples=100)
def test_a_seed_has_no_say_in_its_own_setting(scores):
    kept, at = scores.copy(), cross_fit(scores)
    assert np.array_equal(scores, kept) and at.shape == scores.shape[1:]
    for seed in range(scores.shape[1]):
        others = [s for s in range(scores.shape[1]) if s % 2 != seed % 2] or [seed]
        means = [np.mean([row[s] for s in others]) for row in scores]
        assert at[seed] == means.index(max(means))


def test_what_is_chosen_on_other_seeds_is_not_flattered():
    """All outcomes of two fair settings and four seeds: exactly one half, where the best on the same seeds shows more."""
    outcomes = [np.array(bits, float).reshape(2, 4) for bits in itertools.product((0, 1), repeat=8)]
    assert np.mean([x[cross_fit(x), np.arange(4)].mean() for x in outcomes]) == 0.5
    assert np.mean([x.mean(axis=1).max() for x in outcomes]) > 0.6


@pytest.mark.parametrize(("scores", "text"), [
    (np.zeros((0, 3)), r"at least one setting and one seed, got shape \(0, 3\)"),
    (np.zeros((3, 0)), r"got shape \(3, 0\)"),
    (np.array([[1.0], [np.nan]]), "scores contain NaN at setting 1"),
])
def test_scores_that_cannot_be_compared_are_refused(scores, text):
    with pytest.raises(ValueError, match=text):
        cross_fit(scores)
