"""Tools: comparators against a plain loop, unbiased under both alignments by enumeration, runs and rows of the study."""
import json
from collections import Counter

import numpy as np
import pytest
import torch

from collai.core.tinylm import TinyLM
from collai.otb.tools import COLUMN_ARM, _aligned, _limited, column_study, comparators, compare_tools, measure
from collai.otb.training import ARMS, stored_arrivals
from collai.rl.adv import otb_advantage
from collai.rl.tasks import CalcTool, ChainSum
from collai.rl.train import TrainConfig

TASK = CalcTool(1, 1)
FAST = {"prompts_per_step": 2, "eval_prompts": 4, "eval_every": 1, "lr": 1e-3}


def tiny() -> TinyLM:
    """A fresh policy for `TASK`."""
    return TinyLM(len(TASK.tokenizer()), hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=16, seed=0)


@pytest.mark.parametrize("align", ["token", "position"])
@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_comparators_equal_a_plain_loop(align, kind):
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        mask = torch.rand(7, 9, generator=g) > 0.4
        mask[3] = False
        uid = [("a", "b", 1)[int(k)] for k in torch.randint(0, 3, (7,), generator=g)]
        places = [[int(mask[i, :t].sum()) if align == "token" else t for t in range(9)] for i in range(7)]
        count = Counter((uid[i], places[i][t]) for i, t in mask.nonzero().tolist())
        want = [[count[uid[i], places[i][t]] - 1 if mask[i, t] else 0 for t in range(9)] for i in range(7)]
        got = comparators(mask.to(kind), uid, align=align)
        assert got.tolist() == want and got.dtype == torch.int64


def test_by_token_only_the_tail_of_the_longest_rollout_is_alone():
    for seed in range(20):
        mask = torch.rand(4, 12, generator=torch.Generator().manual_seed(seed)) > 0.4
        n = sorted(mask.sum(1).tolist())
        alone = mask & (comparators(mask, [0] * 4) == 0)
        assert int(alone.sum()) == n[-1] - n[-2]
        assert torch.equal(alone, alone & (mask.cumsum(1) > n[-2]))
    assert comparators(torch.zeros(0, 3), []).shape == (0, 3) and comparators(torch.ones(2, 0), [1, 1]).shape == (2, 0)


@pytest.mark.parametrize("uid", [[0, 0, 1, 1], (0, 0, 1, 1), np.array([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1]),
                                 list(torch.tensor([0, 0, 1, 1])), list(np.array(["a", "a", "b", "b"]))], ids=lambda u: type(u).__name__)
def test_comparators_take_names_of_every_kind(uid):
    mask = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 1, 0], [1, 1, 1]])
    assert comparators(mask, uid).tolist() == [[1, 1, 0], [1, 0, 1], [1, 1, 0], [1, 1, 0]]
    with pytest.raises(TypeError, match=r"uid must hold hashable values, got \[0\]"):
        comparators(mask, [[0], [0], [1], [1]])


def test_a_token_alone_in_its_column_gets_no_advantage_and_has_one_by_token():
    mask = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 1, 1, 0, 0, 1]])
    rewards = torch.tensor([[0, 0, 0, 0, 0, 1.0], [0, 0, 0, 0, 0, 0]])
    energy = torch.full((2, 6), 0.5)
    adv = {a: otb_advantage(rewards, mask, ["x", "x"], energy, align=a).advantages for a in ("token", "position")}
    alone = mask.bool() & (comparators(mask, ["x", "x"], align="position") == 0)
    assert alone.tolist() == [[False] * 4 + [True, False], [False, False, True, False, False, False]]
    assert (adv["position"][alone].abs() < 1e-6).all() and (adv["token"][alone].abs() > 0.2).all()


@pytest.mark.parametrize(("change", "message"), [
    ({"align": "turn"}, "unknown align 'turn', use one of 'token', 'position'"),
    ({"uid": [1]}, r"uid has length 1, mask shape \(2, 3\): one entry a row is needed"),
    ({"mask": torch.full((2, 3), 2)}, "mask must contain only 0 and 1")])
def test_comparators_refuse_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        comparators(**({"mask": torch.ones(2, 3), "uid": [1, 1]} | change))


def test_arms_that_know_alignments_are_doubled_unless_they_name_one():
    arms = {"a": {"estimator": "otb", "n": 2, "options": {"leave_one_out": True}}, "b": TrainConfig(estimator="rloo"),
            "c": TrainConfig(options={"align": "position"})}
    found = _aligned(arms)
    assert {name: align for name, (_, align) in found.items()} == {"a, token": "token", "a, position": "position", "b": "", "c": "position"}
    assert found["a, token"][0].options == {"leave_one_out": True, "align": "token"} and found["a, token"][0].n == 2
    assert arms["a"]["options"] == {"leave_one_out": True} and found["b"][0] is arms["b"] and found["c"][0] is arms["c"]


def test_fewer_turns_make_a_task_of_another_name():
    task = CalcTool(3, 1)
    assert _limited(task, 4).max_turns == 4 and _limited(task, 9).key == task.key == "calctool-3-1"
    short = _limited(task, 2)
    assert (short.max_turns, short.key, task.max_turns) == (2, "calctool-3-1-2turns", 4)


def test_compare_tools_trains_both_alignments_and_the_others_once():
    table = compare_tools({"otb": {"estimator": "otb", "n": 2, **FAST}, "mean": {"estimator": "grpo", "n": 2, **FAST}}, TASK,
                          seeds=[0, 1], target=0.9, steps=1, start=tiny(), reference="mean")
    assert table.index.tolist() == ["otb, token", "otb, position", "mean"] and table["align"].tolist() == ["token", "position", ""]
    assert (table["runs"] == 2).all() and (table["censored_share"] == 1).all() and np.isinf(table["median"]).all()
    assert {"saved", "saved_lo", "saved_hi", "lo", "hi", "p_logrank"} <= set(table.columns)


@pytest.mark.parametrize(("change", "message"), [
    ({"max_turns": 1}, "tools need at least 2 turns, got max_turns 1 for a task of 2"),
    ({"task": ChainSum(2, 3)}, "tools need at least 2 turns, got max_turns 4 for a task of 1"),
    ({"target": 0.0}, r"target must be in \(0, 1\], got 0.0"),
    ({"task": CalcTool(5, 5), "start": None}, "no checkpoint is shipped for 'calctool-5-5'")])
def test_compare_tools_refuses_bad_input(change, message):
    good = {"arms": {"a": FAST}, "task": TASK, "seeds": [0], "target": 0.5, "steps": 1, "start": tiny()}
    with pytest.raises(ValueError, match=message):
        compare_tools(**(good | change))


def test_the_column_study_differs_from_the_arm_of_the_study_in_its_index_only(monkeypatch):
    seen = {}
    monkeypatch.setattr("collai.otb.tools.run_arms", lambda arms, task, **kw: seen.update(arms=arms, **kw) or {k: [None] for k in arms})
    with pytest.raises(TimeoutError, match="not all runs are finished; call again with the same folder"):
        column_study(TASK, seeds=[3], rates=(1e-4, 2e-4), folder="x")
    assert seen["arms"] == {f"{r:g}": {**ARMS["OTB N=4"], "options": {"align": "position"}, "lr": r} for r in (1e-4, 2e-4)}
    assert seen["seeds"] == [3] and seen["folder"] == "x" and seen["target"] == 0.8 and seen["tokens"] == 60_000
    assert all(TrainConfig(**c).n == 4 for c in seen["arms"].values())


def test_the_row_of_the_column_study_can_be_stored_and_read_back():
    row, = column_study(TASK, seeds=range(2), target=0.9, tokens=1, rates=(1e-3,), start=tiny())
    assert row["name"] == f"calctool-1-1 | {COLUMN_ARM} | best" and row["unit"] == "tokens" and row["measured"] is None
    again = stored_arrivals(json.loads(json.dumps(row, allow_nan=False)))
    assert again.reached.tolist() == [False, False] and (again.tokens > 0).all() and row["rates"] == [1e-3, 1e-3]


def test_measure_runs_the_study_on_a_known_device_only(monkeypatch):
    asked = {}
    monkeypatch.setattr("collai.otb.tools.column_study", lambda task, **kw: asked.update(kw, key=task.key) or [{"name": "x"}])
    assert measure("cpu") == [{"name": "x"}] and asked == {"key": "calctool-2-2", "seeds": range(10), "device": "cpu", "workers": None}
    measure("cuda")
    assert asked["device"] == "cuda" and asked["workers"] == 1
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'tpu'"):
        measure("tpu")
