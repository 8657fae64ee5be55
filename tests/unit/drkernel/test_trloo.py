"""Turns: returns, advantages, loss and mismatch filter against plain loops; exact expectations; bad inputs by message."""
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.drkernel import trloo as module
from collai.drkernel.trloo import (
    METHODS,
    mrs_mask,
    policy_loss,
    self_inclusion_factor,
    turn_advantages,
    turn_returns,
)
from collai.rl.adv import grpo_advantage, rloo_advantage

LEVELS = ("geometric", "sequence", "turn", "turn_geo", "token")
JUNK = torch.tensor([math.nan, math.inf, -math.inf, 1e30])


def batch(seed: int, rows: int = 9, turns: int = 3, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Random turns of some groups that are not neighbours; NaN, infinities or large numbers where nothing happened."""
    g = torch.Generator().manual_seed(seed)
    length = torch.randint(0, turns + 1, (rows, 1), generator=g)
    valid = torch.arange(turns) < length
    x = torch.randn(rows, turns, generator=g, dtype=torch.float64) + seed % 3
    junk = JUNK.double()[torch.randint(4, valid.shape, generator=g)]
    return {"x": torch.where(valid, x, junk).to(dtype), "valid": valid,
            "ids": torch.randint(-3, 40, (4,), generator=g)[torch.randint(4, (rows,), generator=g)]}


def tokens(seed: int, rollouts: int = 4, turns: int = 3, width: int = 5, noise: float = 0.01) -> dict[str, torch.Tensor]:
    """Random token tensors of all turns; some turns and rollouts are empty; junk under the mask."""
    g = torch.Generator().manual_seed(seed)
    shape = (rollouts * turns, width)
    mask = (torch.rand(shape, generator=g) > 0.3) & (torch.rand(shape[0], 1, generator=g) > 0.2)
    if seed % 4 == 0:
        mask[:turns] = False
    junk = JUNK.double()[torch.randint(4, shape, generator=g)]
    old = -3 * torch.rand(shape, generator=g, dtype=torch.float64) - 2
    new = old + noise * torch.randn(shape, generator=g, dtype=torch.float64)
    adv = torch.randn(rollouts, turns, generator=g, dtype=torch.float64)
    adv[~mask.any(1).reshape(rollouts, turns)] = math.nan
    return {"new": torch.where(mask, new, junk), "old": torch.where(mask, old, junk), "mask": mask, "adv": adv}


def advantages_by_loop(b: dict[str, torch.Tensor], method: str, eps: float = 1e-6) -> list[list[float]]:
    """One rollout and turn after the other."""
    x, valid, ids = b["x"].double(), b["valid"], b["ids"].tolist()
    out = [[0.0] * x.shape[1] for _ in ids]
    for i, t in valid.nonzero().tolist():
        mine = float(x[i, t])
        others = [float(x[j, t]) for j in range(len(ids)) if ids[j] == ids[i] and valid[j, t] and j != i]
        every = [*others, mine]
        mean = sum(every) / len(every)
        std = math.sqrt(sum((y - mean) ** 2 for y in every) / len(others)) if others else 1.0
        out[i][t] = {"reinforce": mine, "grpo_center": mine - mean,
                     "trloo": mine - (sum(others) / len(others) if others else 0),
                     "grpo": (mine - (mean if others else 0)) / (std + eps)}[method]
    return out


# returns


def test_returns_equal_a_plain_loop_whatever_stands_on_turns_that_did_not_happen():
    for seed in range(40):
        b, gamma = batch(seed), (0.0, 0.4, 1.0, 1)[seed % 4]
        found = turn_returns(b["x"], b["valid"], gamma)
        for i, t in itertools.product(range(9), range(3)):
            want = sum(gamma ** (u - t) * float(b["x"][i, u]) for u in range(t, 3) if b["valid"][i, u])
            assert found[i, t].item() == pytest.approx(want if b["valid"][i, t] else 0.0, abs=1e-12)
        assert (found[~b["valid"]] == 0).all()


def test_results_keep_the_dtype_and_carry_no_gradient():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        b = batch(3, dtype=dtype)
        leaf = b["x"].clone().requires_grad_()
        results = [turn_returns(leaf, b["valid"]), *(turn_advantages(leaf, b["valid"], b["ids"], m) for m in METHODS)]
        assert all(x.dtype == dtype and not x.requires_grad for x in results)
        assert turn_returns(b["x"], b["valid"]).float() == pytest.approx(
            turn_returns(b["x"].double(), b["valid"]).float(), rel=1e-2, abs=1e-2)


def test_inputs_are_left_alone():
    for dtype in (torch.float32, torch.float64):
        b, c = batch(4, dtype=dtype), tokens(4)
        kept = {name: x.clone() for name, x in (b | c).items()}
        turn_returns(b["x"], b["valid"], 0.5)
        for method in METHODS:
            turn_advantages(b["x"], b["valid"], b["ids"], method)
        policy_loss(c["new"], c["old"], c["adv"], c["mask"], normalize="alive")
        mrs_mask(c["new"], c["old"], c["mask"], 3)
        assert all(torch.equal(x.nan_to_num(7), kept[name].nan_to_num(7)) for name, x in (b | c).items())


# advantages


@pytest.mark.parametrize("method", METHODS)
def test_advantages_equal_a_plain_loop(method):
    for seed in range(30):
        b, eps = batch(seed), (1e-6, 0.5)[seed % 2]
        found = turn_advantages(b["x"], b["valid"], b["ids"], method, eps)
        assert found.flatten().tolist() == pytest.approx(
            [y for row in advantages_by_loop(b, method, eps) for y in row], rel=1e-10, abs=1e-12)
        assert (found[~b["valid"]] == 0).all()


def test_the_discount_weighting_multiplies_each_turn_by_its_power_and_one_changes_nothing():
    for seed in range(12):
        b, dtype = batch(seed), (torch.float64, torch.float32)[seed % 2]
        x = b["x"].to(dtype)
        for method, gamma in itertools.product(METHODS, (0, 0.4, 1, 1.0)):
            plain = turn_advantages(x, b["valid"], b["ids"], method)
            found = turn_advantages(x, b["valid"], b["ids"], method, discount_weighting=gamma)
            want = plain.double() * torch.tensor([gamma**t for t in range(3)], dtype=torch.float64)
            assert found.dtype == dtype and torch.allclose(found.double(), want, rtol=1e-6, atol=1e-12)
            assert gamma != 1 or torch.equal(found, plain)


def test_text_is_no_number():
    assert not module._between("1", 0, 1) and not module._between(math.nan, 0, 1) and not module._between(None, 0, 1)
    assert module._between(np.float32(0.5), 0, 1) and module._between(1, 0, 1)


def test_the_time_of_the_advantages_is_measured():
    rows = {row["name"]: row for row in module.measure("cpu", problems=3, rounds=2)}
    assert set(rows) == {f"advantages/{name}" for name in (*METHODS, "collai.rl")}
    assert all(row["measured"] >= 0 and row["count"] == 3 * 16 * 3 for row in rows.values())


def test_one_turn_is_what_the_shared_chain_computes():
    for seed in range(20):
        b = batch(seed, turns=1, dtype=torch.float32)
        x, mask = torch.where(b["valid"], b["x"], 0), b["valid"].float()
        for method, known in (("trloo", rloo_advantage), ("grpo", grpo_advantage)):
            want = known(x, mask, b["ids"]).advantages
            assert torch.allclose(turn_advantages(b["x"], b["valid"], b["ids"], method), want, rtol=1e-5, atol=2e-6)


def test_names_of_groups_may_be_anything_and_the_order_of_rows_does_not_matter():
    for seed in range(6):
        b = batch(seed)
        order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
        for method in METHODS:
            found = turn_advantages(b["x"], b["valid"], b["ids"], method)
            for names in ([f"problem {i}" for i in b["ids"].tolist()], b["ids"].numpy(), b["ids"].tolist(), b["ids"].int() * 7):
                assert torch.equal(turn_advantages(b["x"], b["valid"], names, method), found)
            moved = turn_advantages(b["x"][order], b["valid"][order], b["ids"][order], method)
            assert torch.allclose(moved, found[order], rtol=1e-12, atol=1e-12)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(value=st.floats(-1e6, 1e6, width=32), rows=st.integers(2, 50), method=st.sampled_from(["trloo", "grpo_center", "grpo"]))
def test_equal_returns_give_exactly_no_advantage(value, rows, method):
    x = torch.full((rows, 2), value, dtype=torch.float32)
    assert (turn_advantages(x, x == x, torch.zeros(rows, dtype=torch.int64), method) == 0).all()


def test_a_rollout_alone_at_its_turn_keeps_its_return_but_not_under_the_plain_mean():
    x, alone = torch.tensor([[2.0, 3.0], [4.0, math.nan]]), torch.tensor([[True, True], [True, False]])
    for method, want in (("trloo", 3.0), ("reinforce", 3.0), ("grpo_center", 0.0), ("grpo", 3 / 1.5)):
        assert turn_advantages(x, alone, torch.tensor([1, 1]), method, eps=0.5)[0, 1] == want


def test_a_constant_added_to_all_returns_changes_nothing_where_two_are_left():
    for seed in range(10):
        b = batch(seed)
        valid = b["valid"] | True
        x = torch.where(b["valid"], b["x"], 0.3)
        for method in ("trloo", "grpo_center", "grpo"):
            found = [turn_advantages(x + shift, valid, torch.zeros(9, dtype=torch.int64), method) for shift in (0, 100)]
            assert torch.allclose(*found, atol=1e-10)


def test_holes_are_allowed_between_turns_for_advantages_only():
    b = batch(1)
    holed = torch.tensor([[True, False, True]] * 9)
    x = torch.where(holed, 1.0 * torch.arange(27.0).reshape(9, 3), math.nan)
    want = advantages_by_loop({"x": x, "valid": holed, "ids": b["ids"]}, "trloo")
    assert turn_advantages(x, holed, b["ids"]).flatten().tolist() == pytest.approx([y for row in want for y in row])
    with pytest.raises(ValueError, match=r"first turns, then False, got \[True, False, True\] in row 0"):
        turn_returns(x, holed)


# expectations


def two_turns(a: float, b: float) -> list[tuple[float, list[float], list[list[float]]]]:
    """Ways of a policy with two coins in logits a, b: probability, rewards, score (2,) of each turn. Tails goes on."""
    p, q = 1 / (1 + math.exp(-a)), 1 / (1 + math.exp(-b))
    return [(p, [0.7], [[1 - p, 0.0]]), ((1 - p) * q, [0.1, 1.5], [[-p, 0.0], [0.0, 1 - q]]),
            ((1 - p) * (1 - q), [0.1, -0.4], [[-p, 0.0], [0.0, -q]])]


def objective(a: float, b: float) -> float:
    return sum(chance * sum(rewards) for chance, rewards, _ in two_turns(a, b))


@pytest.mark.parametrize("K", [1, 2, 3])
def test_leaving_one_out_is_unbiased_and_the_group_mean_shrinks_each_turn_by_its_factor(K):
    a, b, h = 0.4, -0.3, 1e-5
    slope = [(objective(a + h, b) - objective(a - h, b)) / (2 * h), (objective(a, b + h) - objective(a, b - h)) / (2 * h)]
    total = {method: [0.0, 0.0] for method in ("trloo", "grpo_center")}
    for group in itertools.product(two_turns(a, b), repeat=K):
        chance = math.prod(way[0] for way in group)
        rewards = torch.tensor([[*way[1], math.nan][:2] for way in group], dtype=torch.float64)
        valid = torch.tensor([[True, len(way[1]) > 1] for way in group])
        for method, sums in total.items():
            adv = turn_advantages(turn_returns(rewards, valid), valid, torch.zeros(K, dtype=torch.int64), method)
            for i, way in enumerate(group):
                for t, score in enumerate(way[2]):
                    sums[t] += chance * adv[i, t].item() * score[t] / K  # coin t is thrown in turn t alone
    p = 1 - 1 / (1 + math.exp(-a))
    assert total["trloo"] == pytest.approx(slope, abs=1e-8)
    want = [self_inclusion_factor(1.0, K) * slope[0], self_inclusion_factor(p, K) * slope[1]]
    assert total["grpo_center"] == pytest.approx(want, abs=1e-8)


def test_the_factor_is_that_of_a_binomial_number_of_rollouts():
    for K, tenth in itertools.product((1, 2, 5, 16), range(1, 11)):
        p = Fraction(tenth, 10)
        want = sum(math.comb(K, n) * p**n * (1 - p) ** (K - n) * (n - 1) for n in range(1, K + 1)) / (K * p)
        assert self_inclusion_factor(tenth / 10, K) == pytest.approx(float(want), abs=1e-14)
    table = self_inclusion_factor(np.array([[0.0, 0.6], [1.0, 1e-9]]), 2)
    assert table == pytest.approx(np.array([[0.0, 0.3], [0.5, 5e-10]]), rel=1e-6)


# loss


def loss_by_loop(c: dict[str, torch.Tensor], normalize: str, clip: tuple[float, float]) -> float:
    """One token after the other."""
    rollouts, turns = c["adv"].shape
    total = 0.0
    for t in range(turns):
        rows = [b * turns + t for b in range(rollouts)]
        alive = sum(bool(c["mask"][row].any()) for row in rows)
        part = 0.0
        for b, row in enumerate(rows):
            for at in c["mask"][row].nonzero().flatten().tolist():
                r, a = math.exp(float(c["new"][row, at] - c["old"][row, at])), float(c["adv"][b, t])
                part += min(r * a, min(max(r, 1 - clip[0]), 1 + clip[1]) * a)
        total += part / (rollouts if normalize == "rollouts" else max(alive, 1))
    return -total


@pytest.mark.parametrize("normalize", ["rollouts", "alive"])
def test_the_loss_equals_a_plain_loop(normalize):
    for seed in range(24):
        c, clip = tokens(seed, noise=0.3), ((0.2, 0.28), (0, 0.1))[seed % 2]
        loss, stats = policy_loss(c["new"], c["old"], c["adv"], c["mask"], clip, normalize)
        assert loss.item() == pytest.approx(loss_by_loop(c, normalize, clip), abs=1e-10)
        assert stats["turns"] == c["mask"].any(1).sum() and all(type(x) is float and math.isfinite(x) for x in stats.values())


def test_at_the_old_policy_the_slope_of_each_token_is_its_advantage_over_the_rollouts():
    for seed in range(20):
        c = tokens(seed)
        leaf = c["old"].clone().requires_grad_()
        slope, = torch.autograd.grad(policy_loss(leaf, c["old"], c["adv"], c["mask"])[0], leaf)
        want = torch.where(c["mask"], -c["adv"].reshape(-1, 1) / 4, 0)
        assert torch.allclose(slope, want, atol=1e-12) and (slope[~c["mask"]] == 0).all()


def test_a_batch_without_a_token_has_no_loss_and_no_slope():
    leaf = torch.full((6, 2), math.nan, requires_grad=True)
    for normalize in ("rollouts", "alive"):
        loss, stats = policy_loss(leaf, leaf.detach(), torch.zeros(2, 3), torch.zeros(6, 2), normalize=normalize)
        assert loss == 0 and stats["turns"] == 0 and not torch.autograd.grad(loss, leaf)[0].any()


# mismatch


def kept_by_loop(c: dict[str, torch.Tensor], turns: int, level: str, lower: float, upper: float, veto: float) -> list[list[int]]:
    """One row after the other."""
    delta = (c["new"] - c["old"]).tolist()
    rows = [[d for d, m in zip(line, mask, strict=True) if m] for line, mask in zip(delta, c["mask"].tolist(), strict=True)]
    out = []
    for i, row in enumerate(rows):
        first = i // turns * turns
        unit = row if level.startswith("turn") else [d for other in rows[first:first + turns] for d in other]
        x = sum(unit) / (len(unit) or 1) if "geo" in level else sum(unit)
        ok = lower <= math.exp(min(max(x, -20), 20)) <= upper
        own = [lower <= math.exp(min(max(d, -20), 20)) <= upper if level == "token" else ok for d in delta[i]]
        vetoed = any(math.exp(d) < veto for d in row)
        out.append([int(m and o and not vetoed) for m, o in zip(c["mask"][i].tolist(), own, strict=True)])
    return out


@pytest.mark.parametrize("level", LEVELS)
def test_the_filter_equals_a_plain_loop(level):
    seen = set()
    for seed in range(20):
        c, noise = tokens(seed, noise=(0.02, 0.5)[seed % 2]), (0.02, 0.5)[seed % 2]
        band = (1 / (1 + noise / 2), 1 + noise / 2)
        for veto in (0, 0.7):
            found, stats = mrs_mask(c["new"], c["old"], c["mask"].float(), 3, level, *band, veto)
            want = kept_by_loop(c, 3, level, *band, veto)
            assert found.tolist() == want
            assert stats["kept"] == pytest.approx(found.sum().item() / c["mask"].sum().item())
            seen |= {found.sum().item() == 0, found.sum().item() == c["mask"].sum().item()}
    assert False in seen


def test_a_veto_drops_its_turn_and_a_rejected_rollout_all_of_them():
    old = torch.full((4, 2), -15.0)
    delta = torch.tensor([[-9.3, 9.3], [0.0, 0.0], [0.0, 0.02], [0.0, 0.0]])
    found, stats = mrs_mask(old + delta, old, torch.ones(4, 2, dtype=torch.int64), 2)
    assert found.tolist() == [[0, 0], [1, 1], [0, 0], [0, 0]] and found.dtype == torch.int64
    assert (stats["vetoed"], stats["rejected"], stats["kept"]) == (0.25, 0.5, 0.25)
    assert mrs_mask(old + delta, old, torch.ones(4, 2), 2, veto=0)[0].sum() == 4


def test_the_ends_of_the_band_belong_to_it_and_a_missing_lower_end_is_the_inverse():
    old = torch.zeros(3, 1, dtype=torch.float64) - 5
    delta = torch.tensor([[2.0], [0.5], [0.49]], dtype=torch.float64).log()
    ones = torch.ones(3, 1, dtype=torch.bool)
    top = math.exp((old + delta - old)[0, 0].item())
    assert mrs_mask(old + delta, old, ones, 1, lower=None, upper=2.0000001)[0].flatten().tolist() == [True, True, False]
    assert mrs_mask(old + delta, old, ones, 1, lower=0.1, upper=top)[0].all()
    assert mrs_mask(old, old, ones, 1, lower=1, upper=1)[0].all() and not mrs_mask(old, old, ones, 1, lower=1.1, upper=2)[0].any()
    assert not mrs_mask(old + delta, old, ones, 1, lower=0.1, upper=math.nextafter(top, 0) - 1e-12)[0][0]


def test_huge_ratios_are_clamped_and_nothing_is_nothing():
    old, delta = torch.full((2, 1), -90.0), torch.tensor([[85.0], [-85.0]])
    found, stats = mrs_mask(old + delta, old - 0, torch.ones(2, 1), 1, veto=0)
    assert not found.any() and stats["weight_max"] == pytest.approx(math.exp(20)) and stats["weight_min"] == pytest.approx(math.exp(-20))
    found, stats = mrs_mask(old * math.nan, old, torch.zeros(2, 1), 2)
    assert not found.any() and stats == {"kept": 1, "rejected": 0, "vetoed": 0, "weight_mean": 1, "weight_min": 1, "weight_max": 1}


# bad inputs

X, V, IDS = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
NAN = torch.tensor([[0.0, 0.0, 0.0], [0.0, math.nan, 0.0]])
LOG = torch.full((6, 4), -1.0)
ONES = torch.ones(6, 4)

BAD = {
    "gamma": (lambda: turn_returns(X, V, 1.01), r"gamma must be in \[0, 1\], got 1\.01"),
    "hole": (lambda: turn_returns(X, torch.tensor([[True] * 3, [False, True, True]])), r"got \[False, True, True\] in row 1"),
    "reward": (lambda: turn_returns(NAN, V), "rewards must be finite where valid, got nan at rollout 1, turn 1"),
    "shapes": (lambda: turn_returns(X, V[:, :2]), r"rewards has shape \(2, 3\), valid \(2, 2\): both must be \(B, T\)"),
    "empty": (lambda: turn_returns(X[:0], V[:0]), r"must hold a rollout and a turn at least, got shape \(0, 3\)"),
    "ints": (lambda: turn_returns(X.long(), V), r"of a float type and valid bool, got torch\.int64 and torch\.bool"),
    "not bool": (lambda: turn_advantages(X, X, IDS), r"returns must be of a float type and valid bool, got torch\.float32 and"),
    "method": (lambda: turn_advantages(X, V, IDS, "rloo"), "unknown method 'rloo', use one of 'trloo', 'grpo', 'grpo_center'"),
    "eps": (lambda: turn_advantages(X, V, IDS, eps=0), "eps must be positive and finite, got 0"),
    "endless eps": (lambda: turn_advantages(X, V, IDS, "grpo", math.inf), "eps must be positive and finite, got inf"),
    "weighting": (lambda: turn_advantages(X, V, IDS, discount_weighting=1.5), r"discount_weighting must be in \[0, 1\], got 1\.5"),
    "group NaN": (lambda: turn_advantages(X, V, torch.tensor([0.0, math.nan])), "group_ids must not hold NaN, got nan"),
    "group NaN in a list": (lambda: turn_advantages(X, V, ["a", math.nan]), "group_ids must not hold NaN, got nan"),
    "group NaN in an array": (lambda: turn_advantages(X, V, np.array([math.nan, 1], dtype=np.float32)), "must not hold NaN"),
    "ids": (lambda: turn_advantages(X, V, IDS[:1]), r"group_ids has shape \(1,\), returns have 2 rows"),
    "names": (lambda: turn_advantages(X, V, ["a"]), "group_ids has length 1, returns have 2 rows"),
    "return": (lambda: turn_advantages(NAN, V, IDS), "returns must be finite where valid, got nan at rollout 1, turn 1"),
    "p": (lambda: self_inclusion_factor(np.array([0.5, -0.1]), 2), r"p must be in \[0, 1\], got -0\.1"),
    "K": (lambda: self_inclusion_factor(0.5, 0), "K must be an integer >= 1, got 0"),
    "normalize": (lambda: policy_loss(LOG, LOG, X, ONES, normalize="mean"), "unknown normalize 'mean', use one of 'rollouts', 'alive'"),
    "rows": (lambda: policy_loss(LOG, LOG, X[:1], ONES), r"mask has shape \(6, 4\), adv \(1, 3\): it needs one row a turn"),
    "clip": (lambda: policy_loss(LOG, LOG, X, ONES, clip=(1.0, 0.2)), r"clip_low must be in \[0, 1\), got 1\.0"),
    "one clip": (lambda: policy_loss(LOG, LOG, X, ONES, clip=0.2), r"clip must be a pair of numbers, got 0\.2"),
    "three clips": (lambda: policy_loss(LOG, LOG, X, ONES, clip=(0.1, 0.2, 0.3)), r"clip must be a pair of numbers, got \(0\.1"),
    "text as clip": (lambda: policy_loss(LOG, LOG, X, ONES, clip="ab"), "clip must be a pair of numbers, got 'ab'"),
    "advantage": (lambda: policy_loss(LOG, LOG, NAN, ONES), "adv contain non-finite values at row 4, column 0"),
    "level": (lambda: mrs_mask(LOG, LOG, ONES, 3, "batch"), "unknown level 'batch', use one of 'geometric', 'sequence', 'turn',"),
    "upper": (lambda: mrs_mask(LOG, LOG, ONES, 3, lower=None, upper=0), "upper must be positive, got 0"),
    "band": (lambda: mrs_mask(LOG, LOG, ONES, 3, lower=1.2), r"got lower 1\.2 and upper 1\.001"),
    "lower": (lambda: mrs_mask(LOG, LOG, ONES, 3, lower=0), r"lower must be positive and at most upper, got lower 0"),
    "inverse": (lambda: mrs_mask(LOG, LOG, ONES, 3, lower=None, upper=0.9), r"got lower 1\.1+2 and upper 0\.9"),
    "veto": (lambda: mrs_mask(LOG, LOG, ONES, 3, veto=1), r"veto must be in \[0, 1\), got 1"),
    "turns": (lambda: mrs_mask(LOG, LOG, ONES, 4), "mask has 6 rows, no multiple of turns = 4"),
    "no turns": (lambda: mrs_mask(LOG, LOG, ONES, 0), "turns must be an integer >= 1, got 0"),
    "token": (lambda: mrs_mask(LOG * math.inf, LOG, ONES, 3), "train_logp contain non-finite values at row 0, column 0"),
    "widths": (lambda: mrs_mask(LOG, LOG[:, :2], ONES, 3), r"rollout_logp has shape \(6, 2\), mask \(6, 4\): they must be equal"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_its_value(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_no_tensor_is_refused():
    for call in (lambda: turn_returns([[1.0]], V), lambda: turn_advantages(X, [[True]], IDS), lambda: policy_loss(LOG, LOG, [[1.0]], ONES)):
        with pytest.raises(TypeError, match=r"must be a torch\.Tensor, got list"):
            call()


def test_a_name_that_can_not_be_hashed_is_one_of_a_group():
    with pytest.raises(TypeError, match=r"group_ids must hold hashable values, got \['b'\]"):
        turn_advantages(X, V, ["a", ["b"]])


def test_everything_public_is_listed():
    assert set(module.__all__) == {
        "METHODS", "turn_returns", "turn_advantages", "self_inclusion_factor", "policy_loss", "mrs_mask", "measure"}
