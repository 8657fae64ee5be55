"""The trainer: proxies, records, settings, and runs that give the same numbers however often they are stopped."""
import copy
import csv
import functools
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import numpy as np
import pytest
import torch
from filelock import FileLock
from jaxtyping import config

from collai.core.tinylm import TinyLM
from collai.rl import train
from collai.rl.adv import get_advantage, register_advantage
from collai.rl.losses import ppo_clip_loss
from collai.rl.stats import model_token_stats
from collai.rl.tasks import CalcTool, ChainSum, Problem
from collai.rl.train import (
    COLUMNS,
    History,
    TrainConfig,
    Trainer,
    demonstration_logps,
    gradient_proxies,
    greedy_accuracy,
    sft,
    warm_start,
    weights_hash,
)

TIMELESS = [name for name in COLUMNS if name != "seconds"]


@pytest.fixture(autouse=True)
def interrupts_are_heard():
    """A shell that starts tests in the background lets them ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(task, seed=0):
    tok = task.tokenizer()
    return TinyLM(len(tok), hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=16, seed=seed), tok


@functools.cache
def learned(task_type, *sizes):
    task = task_type(*sizes)
    model, tok = small(task)
    sft(model, tok, task, steps=40, batch=16, lr=1e-2)
    return model


def half_right(task=None):
    """A fresh copy of a policy whose groups hold right and wrong answers, its tokenizer and its task."""
    task = task or ChainSum(2, 3)
    sizes = (task.terms, task.base) if isinstance(task, ChainSum) else (task.depth, task.digits)
    return copy.deepcopy(learned(type(task), *sizes)), task.tokenizer(), task


def trainer(task=None, model=None, **settings):
    fresh, tok, task = half_right(task)
    return Trainer(fresh if model is None else model, tok, task,
                   TrainConfig(**{"prompts_per_step": 2, "eval_every": 2, "eval_prompts": 3, "lr": 1e-2} | settings))


def same(a: History, b: History) -> bool:
    names = [name for name in a.rows[0] if name != "seconds"]
    return len(a.rows) == len(b.rows) and all(np.array_equal(a.column(n), b.column(n), equal_nan=True) for n in names)


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ---- proxies ----

def test_proxies_follow_their_definition_row_by_row():
    generator = torch.Generator().manual_seed(0)
    energy, adv = torch.rand(6, 5, generator=generator), torch.randn(6, 5, generator=generator)
    mask = (torch.rand(6, 5, generator=generator) < 0.6).long()
    mask[2] = 0
    power = 0.0
    for e, a, m in zip(energy, adv, mask.bool(), strict=True):
        if m.any():
            power += float(a[m].mean()) ** 2 * float(e[m].sum()) / 6
    dirty = torch.where(mask.bool(), energy, math.nan), torch.where(mask.bool(), adv, math.inf)
    for e, a in ((energy, adv), dirty):
        found = gradient_proxies(e, a, mask, 0.3)
        assert found["power"] == pytest.approx(power, rel=1e-6)
        assert found["signal"] == pytest.approx(0.09)
        assert found["noise"] == pytest.approx(max(0.0, (power - 0.09) / 5), rel=1e-5)
    assert gradient_proxies(energy, adv, mask, 100)["noise"] == 0.0
    assert math.isnan(gradient_proxies(energy[:1], adv[:1], mask[:1], 0.1)["noise"])


def test_proxies_refuse_what_means_nothing():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="mask must contain only 0 and 1"):
        gradient_proxies(x, x, 2 * x, 1.0)
    with pytest.raises(ValueError, match="grad_norm must be >= 0, got nan"):
        gradient_proxies(x, x, x, math.nan)
    with pytest.raises(ValueError, match=r"at least one rollout is needed, got shape \(0, 3\)"):
        gradient_proxies(x[:0], x[:0], x[:0], 1.0)
    with pytest.raises(ValueError, match="adv contain non-finite values at row 1, column 2"):
        bad = x.clone()
        bad[1, 2] = math.nan
        gradient_proxies(x, bad, x, 1.0)


def test_the_signal_of_a_token_mean_is_that_of_the_sums_over_the_squared_length():
    by_token, by_sum = (trainer(n=4, prompts_per_step=4, agg=agg).run(1).rows[0] for agg in ("token-mean", "seq-mean-token-sum"))
    assert by_token["power"] == by_sum["power"] > 0 and by_token["tokens"] == by_sum["tokens"]
    assert by_sum["signal"] == pytest.approx((by_token["tokens"] / 16) ** 2 * by_token["signal"], rel=1e-4)


# ---- history and settings ----

def test_a_history_survives_its_files(tmp_path):
    rows = [{"step": 1, "accuracy": math.nan, "grad_norm": 0.1 + 0.2}, {"step": 2, "accuracy": 0.5, "stage": 3.0}]
    history = History(rows)
    history.to_json(tmp_path / "a.json")
    history.to_csv(tmp_path / "a.csv")
    again = History.from_json(tmp_path / "a.json")
    assert len(again) == 2 and again.rows[1] == rows[1] and math.isnan(again.rows[0]["accuracy"])
    assert "NaN" not in (tmp_path / "a.json").read_text()
    with (tmp_path / "a.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == [*COLUMNS, "stage"] and table[0]["accuracy"] == "" and table[1]["stage"] == "3.0"
    assert float(table[0]["grad_norm"]) == 0.1 + 0.2
    assert history.column("stage").dtype == np.float64 and math.isnan(history.column("stage")[0])
    assert np.isnan(history.column("reward")).all() and History().column("reward").shape == (0,)
    with pytest.raises(ValueError, match="unknown column 'acc', use one of 'step', 'tokens'"):
        history.column("acc")


@pytest.mark.parametrize(("settings", "text"), [
    ({"estimator": "ppo"}, "unknown advantage 'ppo'"), ({"agg": "mean"}, "unknown agg 'mean', use one of 'token-mean'"),
    ({"n": 0}, "n must be an integer >= 1, got 0"), ({"epochs": 1.5}, "epochs must be an integer >= 1, got 1.5"),
    ({"eval_every": True}, "eval_every must be an integer >= 1, got True"), ({"seed": -1}, "seed must be an integer >= 0"),
    ({"lr": 0.0}, "lr must be positive, got 0.0"), ({"grad_clip": math.inf}, "grad_clip must be positive, got inf"),
    ({"prompts_per_step": 0}, "prompts_per_step must"), ({"eval_prompts": 0}, "eval_prompts must"),
    ({"options": {"foo": 1}}, "unknown otb option 'foo', use one of 'weighting', 'align'"),
    ({"estimator": "rloo", "options": {"foo": 1}}, "unknown rloo option 'foo': rloo has none"),
    ({"options": {"energy": 1}}, "unknown otb option 'energy'"), ({"options": {"weighting": "best"}}, "unknown weighting 'best'"),
    ({"options": None}, "options of otb must be a mapping of keywords, got None"),
    ({"lr": "1e-4"}, "lr must be a number, got '1e-4'"), ({"grad_clip": None}, "grad_clip must be a number, got None"),
    ({"lr": True}, "lr must be a number, got True"), ({"lr": math.nan}, "lr must be positive, got nan")])
def test_settings_are_refused_with_their_value(settings, text):
    with pytest.raises(ValueError, match=text):
        TrainConfig(**settings)


def test_numbers_of_numpy_become_plain_ones(tmp_path):
    given = {"leave_one_out": True}
    config.update("jaxtyping_disable", True)  # annotations say int and float
    try:
        cfg = TrainConfig(n=np.int64(3), seed=np.uint8(2), lr=np.float32(0.25), prompts_per_step=np.int32(2), options=given)
    finally:
        config.update("jaxtyping_disable", False)
    assert cfg == TrainConfig(n=3, seed=2, lr=0.25, prompts_per_step=2, options={"leave_one_out": True})
    assert [type(x) for x in (cfg.n, cfg.seed, cfg.lr)] == [int, int, float] and cfg.options is not given
    model, tok, task = half_right()
    assert train._plain({"a": (np.float64(0.5), np.arange(2))}) == {"a": [0.5, [0, 1]]}
    Trainer(model, tok, task, cfg).run(1, checkpoint=tmp_path)
    again, _, _ = half_right()
    assert len(Trainer(again, tok, task, cfg).run(1, checkpoint=tmp_path)) == 1


# ---- a step ----

def test_a_row_has_every_column_and_counts_model_tokens():
    run = trainer(CalcTool(1, 1), n=3)
    history = run.run(2)
    assert set(COLUMNS) <= history.rows[0].keys() and "clip_share" in history.rows[0]
    untrained = trainer(CalcTool(1, 1), n=3).sample(1)
    assert history.rows[0]["tokens"] == int(untrained.mask.sum())
    assert history.rows[0]["reward"] == float(untrained.rewards.sum(1).mean())
    assert history.rows[0]["tokens"] < history.rows[1]["tokens"] <= history.rows[0]["tokens"] + 6 * CalcTool(1, 1).max_new
    assert np.isnan(history.column("accuracy")).tolist() == [True, False]
    assert all(type(x) in (int, float) for row in history.rows for x in row.values())


def test_the_first_step_is_the_gradient_of_the_estimator():
    run, (expected, _, _) = trainer(n=3, lr=1e-3, grad_clip=1e9), half_right()
    batch = run.sample(1)
    adv = get_advantage("otb")(batch.rewards, batch.mask, batch.uid, batch.energy).advantages
    logp = model_token_stats(expected, *batch.inputs(), batch.ids.shape[1], mask=batch.mask).logp
    loss = -(logp * adv * batch.mask).sum() / batch.mask.sum()
    optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-3, weight_decay=0.0)
    loss.backward()
    norm = torch.stack([p.grad.square().sum() for p in expected.parameters()]).sum().sqrt()
    optimizer.step()
    assert run.run(1).rows[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert norm > 0
    for a, b in zip(run.model.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("task", [ChainSum(3, 5), CalcTool(2, 1)], ids=lambda t: t.key)
def test_sampling_and_update_agree_on_the_log_probabilities(task):
    model, tok = small(task)
    sft(model, tok, task, steps=15, batch=16)
    run = trainer(task, model, n=4, prompts_per_step=4)
    batch = run.sample(1)
    stats = model_token_stats(model, *batch.inputs(), batch.ids.shape[1], mask=batch.mask)
    for mine, theirs in ((stats.logp, batch.old_logp), (stats.entropy, batch.entropy), (stats.energy, batch.energy)):
        assert torch.allclose(mine, theirs, atol=2e-5)
    row = run.run(1).rows[0]
    assert abs(row["ratio_max"] - 1) < 1e-4 and abs(row["ratio_min"] - 1) < 1e-4 and row["clip_share"] == 0


def test_epochs_make_updates_on_the_same_rollouts_and_clip():
    model, _, task = half_right()
    row = trainer(task, model, n=8, prompts_per_step=8, epochs=4, lr=5e-2).run(1).rows[0]
    assert row["clip_share"] > 0 and row["ratio_max"] > 1.05
    assert row["tokens"] < 8 * 8 * task.max_new + 1


def test_a_subclass_may_weight_tokens_and_report():
    class Gated(Trainer):
        outputs = ("logp", "sum_sq", "sum_cube")

        def loss(self, rollouts, adv, stats):
            assert stats.sum_cube is not None and stats.entropy is None
            gate = (rollouts.entropy >= 0.5).float() * rollouts.mask
            loss, metrics = ppo_clip_loss(stats.logp, rollouts.old_logp, adv, rollouts.mask, weight=gate)
            return loss, metrics | {"gate_share": float(gate.sum() / rollouts.mask.sum()), "tokens": -5.0}

    model, tok, task = half_right()
    history = Gated(model, tok, task, TrainConfig(prompts_per_step=2, eval_every=9)).run(2)
    assert np.all(history.column("gate_share") > 0) and np.all(history.column("tokens") > 0)


def test_steps_see_the_problems_of_their_seed_and_number_alone():
    a, b = trainer(seed=3, lr=1e-5), trainer(seed=3, lr=1e-1, estimator="grpo")
    a.run(2)
    assert torch.equal(a.sample(7).prompt_ids, b.sample(7).prompt_ids)
    assert not torch.equal(a.sample(7).prompt_ids, a.sample(8).prompt_ids)
    assert not torch.equal(trainer(seed=4).sample(7).prompt_ids, b.sample(7).prompt_ids)


def test_a_gradient_that_is_not_finite_does_not_reach_the_weights():
    class Broken(Trainer):
        def loss(self, rollouts, adv, stats):
            return stats.logp.sum() * math.inf, {}

    task = ChainSum(2, 3)
    model, tok = small(task)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"the gradient's norm is (nan|inf) at step 1"):
        Broken(model, tok, task, TrainConfig(prompts_per_step=2)).run(1)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


# ---- stopping and going on ----

def test_more_steps_later_and_a_fresh_trainer_give_the_same_run(tmp_path):
    whole = trainer(n=3)
    expected = whole.run(7)
    parts = trainer(n=3)
    assert len(parts.run(0)) == 0
    parts.run(3)
    assert np.count_nonzero(expected.column("grad_norm")) > 2, "a run without gradients would prove nothing"
    assert same(parts.run(7), expected) and same_weights(parts.model, whole.model)
    assert same(parts.run(5), expected), "fewer steps than made: nothing happens"
    trainer(n=3).run(3, checkpoint=tmp_path)
    later = trainer(n=3)
    assert same(later.run(7, checkpoint=tmp_path), expected) and same_weights(later.model, whole.model)
    assert [f.name for f in tmp_path.iterdir()] == ["trainer.pt"]
    last = trainer(n=3)
    assert same(last.run(7, checkpoint=tmp_path), expected) and same_weights(last.model, whole.model)


CHILD = """
    import sys
    import torch
    torch.set_num_threads(1)
    from collai.core.tinylm import TinyLM
    from collai.rl.tasks import ChainSum
    from collai.rl.train import TrainConfig, Trainer, sft
    task = ChainSum(2, 3)
    tok = task.tokenizer()
    model = TinyLM(len(tok), hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=16, seed=0)
    sft(model, tok, task, steps=40, batch=16, lr=1e-2)
    cfg = TrainConfig(n=3, prompts_per_step=2, eval_every=2, eval_prompts=3, lr=1e-2)
    print("ready", flush=True)
    Trainer(model, tok, task, cfg).run(int(sys.argv[2]), checkpoint=sys.argv[1])
"""


def child(folder, steps) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(CHILD), str(folder), str(steps)], env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path, process, seconds=60.0):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, process.stderr.read()
        time.sleep(0.002)


def test_a_killed_process_goes_on_bit_by_bit(tmp_path):
    """SIGKILL as soon as a state is there, while the run works on; what is left is a whole state."""
    process = child(tmp_path, 100_000)
    wait_for(tmp_path / "trainer.pt", process)
    try:
        with pytest.raises(RuntimeError, match=r"another run is using .*trainer\.pt"):
            trainer(n=3, lr=0.5).run(2, checkpoint=tmp_path)
    finally:
        process.kill()
        process.communicate()
    (tmp_path / "trainer.pt.1.new").write_bytes(b"half a file")
    done = len(torch.load(tmp_path / "trainer.pt", weights_only=True)["rows"])
    assert done >= 2 and done % 2 == 0
    later, whole = trainer(n=3), trainer(n=3)
    assert same(later.run(done + 3, checkpoint=tmp_path), whole.run(done + 3)) and same_weights(later.model, whole.model)
    assert [f.name for f in tmp_path.iterdir()] == ["trainer.pt"], "what the kill left half written is gone"
    stored = torch.load(tmp_path / "trainer.pt", weights_only=True)
    for name, state in whole.optimizer.state_dict()["state"].items():
        assert all(torch.equal(x, stored["optimizer"]["state"][name][key]) for key, x in state.items())


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_a_write_that_breaks_leaves_the_old_state(tmp_path, monkeypatch, kind):
    run = trainer(n=3)
    run.run(2, checkpoint=tmp_path)
    before = (tmp_path / "trainer.pt").read_bytes()

    def broken(state, stream):
        stream.write(b"half")
        raise kind("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match=r"the state could not be written \(disk full\): .*trainer\.pt'"):
        run.run(4, checkpoint=tmp_path)
    assert (tmp_path / "trainer.pt").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    later, whole = trainer(n=3), trainer(n=3)
    assert same(later.run(4, checkpoint=tmp_path), whole.run(4))


def test_ctrl_c_stops_after_the_step_and_stores_it(tmp_path):
    class Interrupted(Trainer):
        def loss(self, rollouts, adv, stats):
            if len(self.history) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return super().loss(rollouts, adv, stats)

    settings = {"n": 3, "prompts_per_step": 2, "eval_every": 50, "lr": 1e-2}
    model, tok, task = half_right()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 3") as stopped:
        Interrupted(model, tok, task, TrainConfig(**settings)).run(9, checkpoint=tmp_path)
    assert signal.getsignal(signal.SIGINT) is before and stopped.value.__notes__ == [f"the state is in {tmp_path / 'trainer.pt'}"]
    whole, later = trainer(**settings, eval_prompts=128), Interrupted(*half_right(), TrainConfig(**settings))
    assert len(torch.load(tmp_path / "trainer.pt", weights_only=True)["rows"]) == 3
    assert same(later.run(5, checkpoint=tmp_path), whole.run(5)) and same_weights(later.model, whole.model)


def test_a_second_ctrl_c_is_not_held_back():
    class Stubborn(Trainer):
        def sample(self, step):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            return super().sample(step)

    task = ChainSum(2, 3)
    model, tok = small(task)
    run = Stubborn(model, tok, task, TrainConfig())
    with pytest.raises(KeyboardInterrupt):
        run.run(3)
    assert len(run.history) == 0


def test_runs_in_a_thread_too():
    from threading import Thread
    found = []
    thread = Thread(target=lambda: found.append(trainer().run(1)))
    thread.start()
    thread.join()
    assert len(found[0]) == 1


class Judged(Trainer):
    """What happens while step 4 is evaluated is up to the test."""

    judge = staticmethod(lambda: None)

    def evaluate(self):
        if len(self.history) == 3:
            self.judge()
        return super().evaluate()


def judged(judge=None, **settings):
    run = Judged(*half_right(), trainer(n=3, **settings).cfg)
    run.judge = judge or run.judge
    return run


def unanswered():
    raise TimeoutError("the judge did not answer")


def pressed_twice():
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("judge", "error"), [(unanswered, TimeoutError), (pressed_twice, KeyboardInterrupt)])
def test_a_step_that_broke_off_is_made_again_from_the_stored_state_or_not_at_all(tmp_path, judge, error):
    whole, first, later, bare = judged(), judged(judge), judged(judge), judged(judge)
    expected = whole.run(7)
    with pytest.raises(error):
        first.run(7, checkpoint=tmp_path)
    first.judge = whole.judge
    assert len(first.history) == 3 and same(first.run(7, checkpoint=tmp_path), expected), "back to the state of step 2"
    assert same_weights(first.model, whole.model)
    later.run(3)
    with pytest.raises(error):
        later.run(7)
    later.judge = whole.judge
    assert same(later.run(7, checkpoint=tmp_path), expected) and same_weights(later.model, whole.model)
    with pytest.raises(error):
        bare.run(7)
    bare.judge = whole.judge
    for place in ({}, {"checkpoint": tmp_path / "empty"}):
        with pytest.raises(RuntimeError, match="step 4 broke off, so the weights lie between two steps: pass the checkpoint"):
            bare.run(7, **place)


def test_a_failure_before_the_update_changes_nothing():
    class Flaky(Trainer):
        asked = 0

        def sample(self, step):
            self.asked += 1
            if self.asked == 3:
                raise TimeoutError
            return super().sample(step)

    run = Flaky(*half_right(), trainer(n=3).cfg)
    with pytest.raises(TimeoutError):
        run.run(5)
    assert same(run.run(5), trainer(n=3).run(5))


def test_an_ignored_ctrl_c_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert len(judged(pressed_twice).run(5)) == 5 and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_run_in_the_folder_is_told_so(tmp_path):
    (model, tok, task), text = half_right(), r"another run is using .*{}\.pt: wait until it ends, or use another folder"
    with FileLock(tmp_path / "sft.pt.lock"), pytest.raises(RuntimeError, match=text.format("sft")):
        sft(model, tok, task, steps=1, checkpoint=tmp_path)
    with FileLock(tmp_path / "trainer.pt.lock"), pytest.raises(RuntimeError, match=text.format("trainer")):
        trainer().run(1, checkpoint=tmp_path)
    assert len(trainer().run(1, checkpoint=tmp_path)) == 1
    assert {f.name for f in tmp_path.iterdir()} == {"sft.pt.lock", "trainer.pt"}


def test_a_folder_that_cannot_be_used_is_noticed_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    run = trainer()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=r"no checkpoint can be kept here \(.*file"):
            run.run(2, checkpoint=folder)
        with pytest.raises(OSError, match="no checkpoint can be kept here"):
            sft(run.model, run.tok, run.task, steps=1, checkpoint=folder)
    assert len(run.history) == 0 and same_weights(run.model, half_right()[0])


def test_a_checkpoint_knows_the_weights_it_started_from(tmp_path):
    task, (model, tok, _) = ChainSum(2, 3), half_right()
    trainer(n=3).run(3, checkpoint=tmp_path)
    sft(model, tok, task, steps=3, batch=8, checkpoint=tmp_path)
    large = TinyLM(len(tok), hidden=32, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=16)
    for other in (small(task, seed=5)[0], large):
        before = copy.deepcopy(other)
        with pytest.raises(ValueError, match=r"trainer\.pt belongs to other start weights \(.*hand over those that the run began"):
            trainer(n=3, model=other).run(3, checkpoint=tmp_path)
        with pytest.raises(ValueError, match=r"sft\.pt belongs to other start weights"):
            sft(other, tok, task, steps=3, batch=8, checkpoint=tmp_path)
        assert same_weights(other, before)


def test_weights_that_are_the_stored_ones_go_on(tmp_path):
    """As in a notebook, where the cell that makes the trainer is run once more on the same model."""
    model = half_right()[0]
    whole = trainer(n=3)
    expected = whole.run(7)
    for steps in (3, 3, 5, 7):
        history = trainer(n=3, model=model).run(steps, checkpoint=tmp_path)
    assert same(history, expected) and same_weights(model, whole.model)
    assert same(trainer(n=3).run(7, checkpoint=tmp_path), expected), "the start is still known"
    model.lm_head.weight.data += 1
    with pytest.raises(ValueError, match="other start weights"):
        trainer(n=3, model=model).run(7, checkpoint=tmp_path)


def test_a_checkpoint_of_another_trainer_or_of_an_earlier_version_is_refused(tmp_path):
    trainer(n=3).run(2, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"trainer\.pt has trainer = 'Trainer', this run has 'Judged'"):
        judged().run(3, checkpoint=tmp_path)
    (model, tok, task), options = half_right(), {"steps": 2, "batch": 4, "checkpoint": tmp_path}
    sft(model, tok, task, **options)
    for name in ("trainer.pt", "sft.pt"):
        stored = torch.load(tmp_path / name, weights_only=True)
        del stored["settings"]["trainer"], stored["settings"]["start"]
        torch.save(stored, tmp_path / name)
    with pytest.raises(ValueError, match=r"trainer\.pt does not say its trainer, so an earlier version wrote it: remove it"):
        trainer(n=3).run(3, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"sft\.pt does not say its trainer"):
        sft(half_right()[0], tok, task, **options)


def test_the_hash_of_weights_is_that_of_their_bytes():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).requires_grad_(False)
    told = hashlib.sha256(b"".join(w.numpy().tobytes() for w in model.state_dict().values())).hexdigest()
    assert weights_hash(model) == told
    assert weights_hash(copy.deepcopy(model).to(torch.bfloat16)) != told
    model[1].num_batches_tracked += 1
    assert weights_hash(model) != told, "buffers count"


@pytest.mark.parametrize(("change", "text"), [({"lr": 0.5}, r"has lr = 0\.01, this run has 0\.5"), ({"seed": 1}, "has seed = 0"),
                                              ({"options": {"leave_one_out": True}}, r"has options = \{\}"),
                                              ({"task": ChainSum(3, 3)}, "has task = 'chainsum-2-3'")])
def test_a_checkpoint_of_another_run_is_refused_by_the_name_of_the_difference(tmp_path, change, text):
    trainer().run(1, checkpoint=tmp_path)
    other = trainer(**change)
    before = {name: x.clone() for name, x in other.model.state_dict().items()}
    with pytest.raises(ValueError, match=text):
        other.run(2, checkpoint=tmp_path)
    assert all(torch.equal(x, before[name]) for name, x in other.model.state_dict().items()) and len(other.history) == 0


def test_tensors_among_the_options_are_stored_and_compared(tmp_path):
    @register_advantage("unit_test_table")
    def table_advantage(rewards, mask, uid, table=None):
        return get_advantage("rloo")(rewards, mask, uid)

    trainer(estimator="unit_test_table", options={"table": torch.zeros(3)}).run(1, checkpoint=tmp_path)
    again = trainer(estimator="unit_test_table", options={"table": torch.zeros(3)}).run(1, checkpoint=tmp_path)
    assert len(again) == 1
    with pytest.raises(ValueError, match=r"has options = \{'table': \[0.0, 0.0, 0.0\]\}, this run has \{'table': \[0.0, 1.0, 0.0\]\}"):
        trainer(estimator="unit_test_table", options={"table": torch.tensor([0.0, 1, 0])}).run(1, checkpoint=tmp_path)


@pytest.mark.parametrize("content", [b"", b"no state", b"PK\x03\x04 half", None], ids=["empty", "text", "half", "other"])
def test_a_broken_state_is_named_by_its_path(tmp_path, content):
    for name in ("trainer.pt", "sft.pt"):
        if content is None:
            torch.save({"settings": {}}, tmp_path / name)
        else:
            (tmp_path / name).write_bytes(content)
    (model, tok), task = small(ChainSum(2, 3)), ChainSum(2, 3)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"trainer\.pt holds no state of a run \(\w+: "):
        trainer(model=model).run(1, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"sft\.pt holds no state of a run \(\w+: "):
        sft(model, tok, task, steps=1, checkpoint=tmp_path)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("steps", [-1, "3", 1.5, None])
def test_steps_that_are_no_number_are_refused(steps):
    model, tok, task = half_right()
    with pytest.raises(ValueError, match=f"steps must be an integer >= 0, got {steps!r}"):
        trainer().run(steps)
    with pytest.raises(ValueError, match=f"steps must be an integer >= 0, got {steps!r}"):
        sft(model, tok, task, steps=steps)


def test_a_list_of_problems_is_no_task():
    model, tok, _ = half_right()
    problems = [Problem("1+2=", "3", "3.")]
    for call in (lambda: Trainer(model, tok, problems, TrainConfig()), lambda: sft(model, tok, problems, steps=1)):
        with pytest.raises(TypeError, match=r"this list has no key \(a list of problems becomes a task by PromptTask\(problems"):
            call()


def test_a_prior_is_cut_to_the_step_and_must_cover_the_longest_answer():
    task = ChainSum(2, 3)
    prior = torch.linspace(0.1, 0.9, task.max_new + 2)
    run, loose = (trainer(n=3, options={"prior": p, "prior_strength": 2.0}) for p in (prior, prior[:task.max_new]))
    batch = run.sample(1)
    width = batch.mask.shape[1]
    direct = get_advantage("otb")(batch.rewards, batch.mask, batch.uid, batch.energy, prior=prior[:width], prior_strength=2.0)
    assert width < len(prior) and torch.equal(run.advantages(batch), direct.advantages)
    assert same(run.run(3), loose.run(3)) and len(run.cfg.options["prior"]) == len(prior)
    with pytest.raises(ValueError, match=f"prior has 3 columns, max_new of the task is {task.max_new}: it must cover"):
        trainer(options={"prior": prior[:3], "prior_strength": 2.0})


def test_an_optimiser_on_16_bit_weights_is_worth_a_warning():
    model, tok, task = half_right()
    short = copy.deepcopy(model).to(torch.bfloat16)
    with pytest.warns(UserWarning, match=r"changes torch\.bfloat16 weights: .*load the policy with dtype=torch\.float32"):
        trainer(model=short).run(1)
    with pytest.warns(UserWarning, match=r"changes torch\.bfloat16 weights"):
        sft(short, tok, task, steps=1, batch=4)
    mixed = copy.deepcopy(model)
    mixed.base_model.to(torch.bfloat16).requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trainer(mixed, tok, task, TrainConfig()).run(0)
        trainer().run(1)


# ---- the start ----

@pytest.mark.parametrize("task", [ChainSum(3, 4), CalcTool(2, 1)], ids=lambda t: t.key)
def test_imitation_learns_and_repeats_itself(task):
    (a, tok), (b, _) = small(task), small(task)
    losses = sft(a, tok, task, steps=25, batch=16, seed=5)
    assert losses.shape == (25,) and losses.dtype == np.float64
    assert losses[0] == pytest.approx(math.log(len(tok)), abs=0.2) and losses[-1] < 0.85 * losses[0]
    assert np.array_equal(sft(b, tok, task, steps=25, batch=16, seed=5), losses) and same_weights(a, b)


def test_imitation_stops_at_an_accuracy():
    task = ChainSum(2, 2)
    model, tok = small(task)
    losses = sft(model, tok, task, steps=2000, batch=32, lr=1e-2, until=0.7)
    assert len(losses) < 2000 and len(losses) % 10 == 0 and greedy_accuracy(model, tok, task) >= 0.7


def test_an_imitation_that_is_stopped_anywhere_goes_on_bit_by_bit(tmp_path, monkeypatch):
    task, options = ChainSum(2, 3), {"batch": 8, "seed": 2}
    (whole, tok), (cut, _) = small(task), small(task)
    losses = sft(whole, tok, task, steps=25, **options)
    assert np.array_equal(sft(cut, tok, task, steps=7, checkpoint=tmp_path, **options), losses[:7])
    again = small(task)[0]
    drawn, demonstrated = [], train.demonstration_logps

    def stopping(*args):
        drawn.append(1)
        if len(drawn) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return demonstrated(*args)

    monkeypatch.setattr(train, "demonstration_logps", stopping)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 13"):
        sft(again, tok, task, steps=25, checkpoint=tmp_path, **options)
    last = small(task)[0]
    assert np.array_equal(sft(last, tok, task, steps=25, checkpoint=tmp_path, **options), losses) and len(drawn) == 6 + 12
    assert same_weights(last, whole)
    assert np.array_equal(sft(small(task)[0], tok, task, steps=25, checkpoint=tmp_path, **options), losses) and len(drawn) == 18
    with pytest.raises(ValueError, match=r"has batch = 8, this run has 9"):
        sft(last, tok, task, steps=25, checkpoint=tmp_path, batch=9, seed=2)


def test_an_imitation_takes_numbers_of_numpy(tmp_path):
    task, plain = ChainSum(2, 3), {"batch": 8, "lr": 0.25, "seed": 2}
    config.update("jaxtyping_disable", True)  # annotations say int and float
    try:
        given = {"batch": np.int64(8), "lr": np.float32(0.25), "seed": np.uint8(2)}
        (whole, tok), (cut, _), (later, _) = small(task), small(task), small(task)
        losses = sft(whole, tok, task, steps=5, **plain)
        sft(cut, tok, task, steps=np.int64(3), checkpoint=tmp_path, **given)
        assert np.array_equal(sft(later, tok, task, steps=5, checkpoint=tmp_path, **given), losses)
    finally:
        config.update("jaxtyping_disable", False)
    for wrong, text in (({"lr": "1e-3"}, "lr must be a number"), ({"batch": 0}, "batch must be an integer >= 1"),
                        ({"seed": -1}, "seed must be an integer >= 0")):
        with pytest.raises(ValueError, match=text):
            sft(later, tok, task, steps=1, **(plain | wrong))


def test_an_imitation_that_reached_its_accuracy_stays_there(tmp_path):
    task, options = ChainSum(2, 2), {"steps": 2000, "batch": 32, "lr": 1e-2, "until": 0.7}
    model, tok = small(task)
    losses = sft(model, tok, task, checkpoint=tmp_path, **options)
    assert np.array_equal(sft(small(task)[0], tok, task, checkpoint=tmp_path, **options), losses)


def test_demonstrations_are_scored_as_each_alone():
    task = CalcTool(2, 1)
    model, tok = small(task)
    problems = [task.sample(np.random.default_rng(i)) for i in range(3)]
    logp, mask = demonstration_logps(model, tok, problems)
    for problem, row, valid in zip(problems, logp, mask, strict=True):
        ids = [*tok.encode(problem.prompt + problem.demo), tok.eos_token_id]
        full = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1], -1)
        start = len(tok.encode(problem.prompt)) - 1
        alone = full[range(start, len(ids) - 1), ids[start + 1:]]
        said = valid[:len(alone)].bool()
        assert torch.allclose(row[:len(alone)][said], alone[said], atol=1e-5) and not valid[len(alone):].any()
    assert logp.requires_grad and (row[~valid.bool()] == 0).all()


def test_what_the_tool_writes_is_context_but_no_target():
    from collai.rl.train import _demonstration
    task = CalcTool(2, 1)
    tok = task.tokenizer()
    ids, mask = _demonstration(tok, Problem("(3*4)+5=", "17", "<3*4>=12;<12+5>=17;17.", task))
    assert tok.decode(ids) == "<3*4>=12;<12+5>=17;17." and ids[-1] == tok.eos_token_id
    assert tok.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "<3*4><12+5>17."
    with pytest.raises(ValueError, match="the tool answers '=12;' to '<3\\*4>', the demonstration goes on with '=13"):
        _demonstration(tok, Problem("3*4=", "13", "<3*4>=13;13.", task))
    with pytest.raises(ValueError, match="problem '3=' has no demonstration"):
        _demonstration(tok, Problem("3=", "3", "", task))


@pytest.mark.parametrize("task", [ChainSum(4), CalcTool(2, 2), CalcTool(3, 1)], ids=lambda t: t.key)
def test_the_shipped_policies_are_half_right(task):
    model, tok = warm_start(task)
    assert len(tok) == model.config["vocab_size"] and 0.3 <= greedy_accuracy(model, tok, task) <= 0.7


def test_a_task_without_a_shipped_policy_is_refused_by_name():
    with pytest.raises(ValueError, match=r"no checkpoint is shipped for 'chainsum-9-7' \(there are: calctool.*chainsum-4-10.*\)"):
        warm_start(ChainSum(9, 7))


def test_retraining_is_the_training_of_sft(monkeypatch):
    calls = []
    monkeypatch.setattr("collai.rl.train.sft", lambda *args, **options: calls.append((args, options)))
    for task, steps in ((ChainSum(4), 280), (CalcTool(2, 2), 70)):
        model, tok = warm_start(task, seed=3, retrain=True)
        assert same_weights(model, TinyLM(len(tok), seed=3)) and calls.pop()[1] == {"seed": 3, "steps": steps}


def test_json_of_a_real_run_is_valid(tmp_path):
    trainer().run(1).to_json(tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text())[0]["accuracy"] is None
