"""Advantages: a loop over rollouts and columns as reference, verl's recorded answers, relations, properties, bad input."""
import inspect
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.rl import adv
from collai.rl.adv import (
    bounded_energy,
    check_estimator_options,
    check_integer,
    check_tensors,
    check_tokens,
    get_advantage,
    group_index,
    grpo_advantage,
    opo_advantage,
    otb_advantage,
    register_advantage,
    returns_to_go,
    rloo_advantage,
)

QUICK = settings(deadline=None, derandomize=True, max_examples=20)
VECTORS = Path(__file__).parent / "vectors" / "verl_otb.npz"
WEIGHTINGS, ESTIMATORS = ("cumulative", "token", "sequence", "uniform"), ("grpo", "rloo", "opo", "otb")
OPTIONS = st.fixed_dictionaries({
    "weighting": st.sampled_from(WEIGHTINGS), "align": st.sampled_from(["position", "token"]),
    "leave_one_out": st.booleans(), "finished": st.sampled_from(["drop", "keep"]), "zero_tail": st.booleans(),
    "prior": st.sampled_from([None, "batch", "tensor"]), "weighted": st.booleans()})


def batch(seed, rows=7, columns=9, holes=True, terminal=False):
    """A batch with holes, empty rows and groups of one; rewards on a grid, energies like those of a policy."""
    rng = np.random.default_rng(seed)
    length = rng.integers(0, columns + 1, rows)
    mask = np.arange(columns) < length[:, None]
    if holes:
        mask &= rng.random(mask.shape) < 0.7
    rewards = rng.integers(-8, 9, mask.shape) / 4 * mask
    if terminal:
        last = np.cumsum(mask, 1) == mask.sum(1, keepdims=True)
        rewards = np.where(last & mask, rng.integers(0, 2, (rows, 1)), 0)
    energy = rng.uniform(0, 1.9, mask.shape) * mask
    return tensors(rewards, energy), torch.as_tensor(mask), rng.integers(0, 3, rows)


def tensors(*arrays):
    return [torch.as_tensor(x, dtype=torch.float32) for x in arrays]


def difference(a, b):
    return float((a - b).abs().max()) if a.numel() else 0.0


def estimate(name, rewards, mask, uid, energy, **options):
    extra = {"energy": energy} if name == "otb" else {}
    return get_advantage(name)(rewards, mask, uid, **extra, **options)


# --- a reference that follows the formulas, one rollout and one column at a time ------------------

def squeezed(r, e, m):
    """Valid tokens of each row moved to its front."""
    out = np.zeros((3, *m.shape))
    for i in range(len(m)):
        n = m[i].sum()
        out[0, i, :n], out[1, i, :n], out[2, i, :n] = r[i, m[i]], e[i, m[i]], 1
    return out[0], out[1], out[2].astype(bool)


def reference(r, m, uid, e, weighting="cumulative", align="position", leave_one_out=False, finished="drop", prior=None,
              prior_strength=0.0, zero_tail=True, eps=1e-8):
    """Baselines (B, T) by loops, float64; `prior` None, "batch" or (T,)."""
    full = m
    if align == "token":
        r, e, m = squeezed(r, e, m)
    B, T = m.shape
    last = [max(np.flatnonzero(m[i]), default=-1) for i in range(B)]

    def look(i, t):
        """Weight and return of rollout i at t, None where it does not count."""
        if last[i] < 0 or (not m[i, t] and not (finished == "keep" and t > last[i])):
            return None
        s = min(t, last[i])
        w = {"cumulative": e[i, :s + 1].sum(), "token": e[i, s], "sequence": e[i].sum(), "uniform": 1.0}[weighting]
        return w, (r[i, t:].sum() if t <= last[i] else r[i].sum())

    def sums(rows, t):
        seen = [x for x in (look(k, t) for k in rows) if x]
        return sum(w * g for w, g in seen), sum(w for w, _ in seen), len(seen)

    out = np.zeros((B, T))
    for i, t in product(range(B), range(T)):
        group = [k for k in range(B) if uid[k] == uid[i] and last[k] >= 0]
        num, den, n = sums([k for k in group if k != i or not leave_one_out], t)
        if prior is not None:
            pnum, pden, _ = sums([k for k in range(B) if uid[k] != uid[i]], t)
            known, b0 = (pden > 0, pnum / pden if pden else 0) if isinstance(prior, str) else (True, prior[t])
            mean = den / n if den else 1.0
            num, den = num + known * prior_strength * mean * b0, den + known * prior_strength * mean
        out[i, t] = num / (den + (0 if leave_one_out else eps)) if den else 0
        others = max([last[k] for k in group if k != i], default=-1)
        if not leave_one_out and (len(group) == 1 or (zero_tail and finished == "drop" and t > others)):
            out[i, t] = 0
    if align == "token":
        back = np.zeros((B, T))
        for i in range(B):
            back[i, full[i]] = out[i, :full[i].sum()]
        out = back
    return out * full


@given(st.integers(0, 10**6), OPTIONS)
@QUICK
def test_otb_follows_its_formula(seed, options):
    (r, e), m, uid = batch(seed)
    options, rng = dict(options), np.random.default_rng(seed)
    rho = torch.as_tensor(rng.uniform(0, 2, m.shape), dtype=torch.float32) if options.pop("weighted") else None
    prior = torch.as_tensor(rng.normal(size=9), dtype=torch.float32) if options["prior"] == "tensor" else options["prior"]
    options |= {"prior": prior, "prior_strength": 0.0 if prior is None else float(rng.uniform(0, 3))}
    a = otb_advantage(r, m, uid, e, is_weights=rho, **options)
    e = e if rho is None else e * rho**2
    if isinstance(prior, torch.Tensor):
        options["prior"] = prior.double().numpy()
    b = reference(r.double().numpy(), m.numpy(), uid, e.double().numpy(), **options)
    returns = np.cumsum(r.double().numpy()[:, ::-1], 1)[:, ::-1] * m.numpy()
    assert np.abs(a.baselines.numpy() - b).max() < 1e-5
    assert np.abs(a.returns.numpy() - returns).max() < 1e-5
    assert np.abs(a.advantages.numpy() - (returns - b)).max() < 1e-5


@given(st.integers(0, 10**6))
@QUICK
def test_outcome_estimators_follow_their_formulas(seed):
    (r, _), m, uid = batch(seed)
    total, live, length = r.sum(1).double().numpy(), m.any(1).numpy(), m.sum(1).double().numpy()
    want = {name: np.zeros(len(total)) for name in ("grpo", "none", "rloo", "opo")}
    for i in np.flatnonzero(live):
        group = np.flatnonzero((uid == uid[i]) & live)
        if len(group) == 1:
            for name in want:
                want[name][i] = total[i] / (1 + 1e-6) if name == "grpo" else total[i]
            continue
        x = total[group]
        want["none"][i] = total[i] - x.mean()
        want["grpo"][i] = (total[i] - x.mean()) / (x.std(ddof=1) + 1e-6)
        want["rloo"][i] = total[i] - (x.sum() - total[i]) / (len(group) - 1)
        want["opo"][i] = total[i] - (length[group] * x).sum() / length[group].sum()
    got = {"grpo": grpo_advantage(r, m, uid), "none": grpo_advantage(r, m, uid, scale="none"),
           "rloo": rloo_advantage(r, m, uid), "opo": opo_advantage(r, m, uid)}
    for name, a in got.items():
        assert np.allclose(a.advantages.numpy(), want[name][:, None] * m.numpy(), atol=1e-5), name
        assert np.allclose(a.returns.numpy(), total[:, None] * m.numpy(), atol=1e-5), name
        if name != "grpo":
            assert difference(a.advantages, a.returns - a.baselines) < 1e-5


# --- verl ----------------------------------------------------------------------------------------

def cases():
    """Rows of each recorded case, with its three switches and the energy formed as verl forms it."""
    v = dict(np.load(VECTORS))
    for c in range(len(v["zero_tail"])):
        x = {k: torch.as_tensor(y[v["case"] == c]) for k, y in v.items() if len(y) == len(v["case"])}
        x["public"] = (1 - 2 * x["old_logp"].exp() + x["sum_sq"]).clamp(min=0)
        rho = x["rho"] if v["weighted"][c] else None
        yield x, rho, bool(v["zero_tail"][c]), bool(v["interleaved"][c])


def test_token_alignment_answers_what_verl_answers():
    seen, worst = 0, 0.0
    for x, rho, zero_tail, _ in cases():
        a = otb_advantage(x["rewards"], x["mask"], x["uid"], x["public"], is_weights=rho, align="token", zero_tail=zero_tail)
        worst, seen = max(worst, difference(a.advantages, x["token"])), seen + 1
    assert worst < 2e-5 and seen >= 200


def lone(x):
    """Rows whose group has no other row with a valid token."""
    live, uid = x["mask"].any(1), x["uid"]
    return torch.tensor([int((live & (uid == u)).sum()) == 1 for u in uid])


def verl_tail(x):
    """Where verl sets its baseline to 0: lengths taken for column numbers."""
    out, length = torch.zeros_like(x["mask"]), x["mask"].sum(1)
    for i, u in enumerate(x["uid"]):
        others = length[(x["uid"] == u) & (torch.arange(len(length)) != i)]
        if len(others) and length[i] > others.max():
            out[i, int(others.max()):] = True
    return out


def our_tail(x):
    out, columns = torch.zeros_like(x["mask"]), torch.arange(x["mask"].shape[1])
    for i, u in enumerate(x["uid"]):
        others = x["mask"][(x["uid"] == u) & (torch.arange(len(out)) != i)].any(0)
        out[i] = columns > int((others * (columns + 1)).max()) - 1
    return out


def test_column_alignment_differs_from_verl_in_its_tail_rule_and_in_empty_rows_only():
    compared = moved = counted = 0
    for x, rho, zero_tail, interleaved in cases():
        a = otb_advantage(x["rewards"], x["mask"], x["uid"], x["public"], is_weights=rho, zero_tail=zero_tail).advantages
        apart = (a - x["position"]).abs() > 2e-5
        allowed = (verl_tail(x) != our_tail(x)) & zero_tail
        allowed |= lone(x)[:, None] & torch.tensor([int((x["uid"] == u).sum()) > 1 for u in x["uid"]])[:, None]
        assert not (apart & ~allowed).any()
        if not interleaved and zero_tail:
            assert not apart.any()
        compared += int((x["mask"] & ~allowed).sum())
        moved, counted = moved + int((apart & zero_tail).sum()), counted + int((apart & (not zero_tail)).sum())
    assert compared > 3000 and moved > 50 and counted > 50


# --- relations -----------------------------------------------------------------------------------

@given(st.integers(0, 10**6))
@QUICK
def test_known_baselines_are_special_cases(seed):
    """W = 1 and the group mean; W = t at the last column and length weights; W_T; leave-one-out of W = 1."""
    (r, e), _, uid = batch(seed, terminal=True)
    m = torch.ones_like(r, dtype=torch.bool)
    r = torch.nn.functional.pad(r.sum(1, keepdim=True), (8, 0))
    ones = torch.ones_like(r)
    uniform = otb_advantage(r, m, uid, e, weighting="uniform")
    assert difference(uniform.advantages, grpo_advantage(r, m, uid, scale="none").advantages) < 1e-6
    others = otb_advantage(r, m, uid, e, weighting="uniform", leave_one_out=True)
    assert difference(others.advantages, rloo_advantage(r, m, uid).advantages) < 1e-6
    e = e + 0.01
    spread = otb_advantage(r, m, uid, e.sum(1, keepdim=True).expand_as(e), weighting="token")
    assert difference(spread.advantages, otb_advantage(r, m, uid, e, weighting="sequence").advantages) < 1e-6
    ragged = torch.arange(9) >= torch.tensor(np.random.default_rng(seed).integers(0, 8, 7))[:, None]
    last = otb_advantage(r, ragged, uid, ones, align="position").baselines[:, -1]
    assert difference(last, opo_advantage(r, ragged, uid).baselines[:, -1]) < 1e-6


@given(st.integers(0, 10**6), st.sampled_from(WEIGHTINGS), st.booleans(), st.integers(-50, 50))
@QUICK
def test_a_constant_added_to_the_terminal_returns_of_a_group_changes_nothing(seed, weighting, leave_one_out, constant):
    """Where the tail rule does not apply, and where somebody else has weight."""
    (r, e), m, uid = batch(seed, holes=False, terminal=True)
    last = (m.cumsum(1) == m.sum(1, keepdim=True)) & m
    options = {"weighting": weighting, "leave_one_out": leave_one_out, "zero_tail": False, "eps": 0.0}
    before, after = (otb_advantage(x, m, uid, e + 0.1, **options) for x in (r, r + constant * last))
    shared = torch.stack([m[(torch.as_tensor(uid) == uid[i]) & (torch.arange(len(m)) != i)].any(0) for i in range(len(m))])
    assert difference(before.advantages * shared, after.advantages * shared) < 1e-5
    for name in ("grpo", "rloo", "opo"):
        more = shared.any(1, keepdim=True)
        a, b = (estimate(name, x, m, uid, e).advantages * more for x in (r, r + constant * last))
        assert difference(a, b) < 1e-4


@given(st.integers(0, 10**6), st.sampled_from(WEIGHTINGS))
@QUICK
def test_equal_returns_leave_no_advantage(seed, weighting):
    (_, e), m, _ = batch(seed, holes=False)
    m[:, 0] = True
    r = ((m.cumsum(1) == m.sum(1, keepdim=True)) & m).float() * 3.0
    a = otb_advantage(r, m, [0] * 7, e + 0.1, weighting=weighting, finished="keep")
    assert float(a.advantages.abs().max()) < 1e-5
    for name in ("grpo", "rloo", "opo"):
        assert float(estimate(name, r, m, [0] * 7, e).advantages.abs().max()) < 1e-5


@given(st.integers(0, 10**6), OPTIONS)
@QUICK
def test_the_order_of_rows_and_the_names_of_groups_do_not_matter(seed, options):
    (r, e), m, uid = batch(seed)
    options = dict(options) | {"prior": None if options["prior"] == "tensor" else options["prior"]}
    del options["weighted"]
    options["prior_strength"] = 1.5 if options["prior"] else 0.0
    order = torch.as_tensor(np.random.default_rng(seed).permutation(7))
    names = [("prompt", int(u)) for u in uid]
    a = otb_advantage(r, m, uid, e, **options)
    b = otb_advantage(r[order], m[order], [names[i] for i in order], e[order], **options)
    for x, y in zip(a, b, strict=True):
        assert difference(x[order], y) < 1e-5


@given(st.integers(0, 10**6), st.sampled_from(ESTIMATORS), st.sampled_from([np.nan, np.inf, -np.inf]))
@QUICK
def test_masked_places_leave_no_trace_and_inputs_stay_as_they_are(seed, name, junk):
    (r, e), m, uid = batch(seed)
    dirty = [torch.where(m, x, junk) for x in (r, e)]
    copies = [x.clone() for x in (*dirty, m)]
    options = {"is_weights": dirty[1] / 2, "prior": "batch", "prior_strength": 1.0} if name == "otb" else {}
    clean = {"is_weights": e / 2, "prior": "batch", "prior_strength": 1.0} if name == "otb" else {}
    a, b = estimate(name, dirty[0], m, uid, dirty[1], **options), estimate(name, r, m, uid, e, **clean)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y) and x.dtype == torch.float32 and not (x * ~m).any() and torch.isfinite(x).all()
    assert torch.equal(returns_to_go(dirty[0], m), returns_to_go(r, m))
    for x, y in zip((*dirty, m), copies, strict=True):
        assert torch.equal(x.nan_to_num(9.0), y.nan_to_num(9.0))


@given(st.integers(0, 10**6), st.floats(1e-6, 50), st.booleans(), st.sampled_from(WEIGHTINGS))
@QUICK
def test_a_prior_pulls_the_baseline_and_never_beyond_it(seed, strength, leave_one_out, weighting):
    (r, e), m, uid = batch(seed)
    prior = torch.linspace(-1, 1, 9)
    options = {"weighting": weighting, "leave_one_out": leave_one_out, "zero_tail": False}
    alone = otb_advantage(r, m, uid, e + 0.1, **options).baselines
    pulled = otb_advantage(r, m, uid, e + 0.1, prior=prior, prior_strength=strength, **options).baselines
    low, high = torch.minimum(alone, prior), torch.maximum(alone, prior)
    counts = torch.tensor([int((m.any(1) & torch.as_tensor(uid == u)).sum()) for u in uid]) > 1
    inside = ((pulled >= low - 1e-5) & (pulled <= high + 1e-5)) | ~m | ~counts[:, None]
    assert inside.all()
    if leave_one_out:
        far = otb_advantage(r, m, uid, e + 0.1, prior=prior, prior_strength=1e9, **options).baselines
        assert difference(far, prior * m) < 1e-5


# --- edges ---------------------------------------------------------------------------------------

def test_a_rollout_alone_keeps_its_return():
    r, m = torch.tensor([[0.0, 2.0, 0.0]]), torch.tensor([[1, 1, 0]])
    for options in ({}, {"zero_tail": False}, {"leave_one_out": True}, {"finished": "keep"}):
        assert otb_advantage(r, m, ["a"], torch.ones(1, 3), **options).advantages.tolist() == [[2.0, 2.0, 0.0]]
    for f in (rloo_advantage, opo_advantage):
        assert f(r, m, ["a"]).advantages.tolist() == [[2.0, 2.0, 0.0]]
    assert grpo_advantage(r, m, ["a"]).advantages[0].tolist() == pytest.approx([2, 2, 0], abs=1e-5)


def test_rows_without_tokens_are_left_out():
    r, m = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]), torch.tensor([[1, 1], [0, 0], [1, 0]])
    with_row = otb_advantage(r, m, [0, 0, 0], torch.ones(3, 2))
    without = otb_advantage(r[[0, 2]], m[[0, 2]], [0, 0], torch.ones(2, 2))
    assert torch.equal(with_row.advantages[[0, 2]], without.advantages) and not with_row.advantages[1].any()
    alone = otb_advantage(r[:2], m[:2], [0, 0], torch.ones(2, 2), zero_tail=False)
    assert alone.advantages[0].tolist() == [1.0, 1.0]


def test_no_energy_means_no_baseline():
    r, m = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.ones(2, 2)
    for leave_one_out in (False, True):
        a = otb_advantage(r, m, [0, 0], torch.zeros(2, 2), leave_one_out=leave_one_out)
        assert torch.equal(a.advantages, a.returns) and a.returns.tolist() == [[1, 1], [0, 0]]


def test_leave_one_out_does_not_cancel():
    """Own weight 1, others' 1e-13: subtraction from the total would leave three digits."""
    r, m = torch.tensor([[1.0], [0.25], [0.75]]), torch.ones(3, 1)
    e = torch.tensor([[1.0], [1e-13], [3e-13]])
    assert float(otb_advantage(r, m, "aaa", e, leave_one_out=True).baselines[0]) == pytest.approx(0.625, rel=1e-6)


def test_other_prompts_alone_make_the_batch_prior():
    r, m, e = torch.tensor([[1.0], [3.0], [5.0]]), torch.ones(3, 1), torch.tensor([[1.0], [1.0], [2.0]])
    a = otb_advantage(r, m, [0, 1, 2], e, leave_one_out=True, prior="batch", prior_strength=1.0)
    assert a.baselines[:, 0].tolist() == pytest.approx([13 / 3, 11 / 3, 2])
    only = otb_advantage(r, m, [0, 0, 0], e, prior="batch", prior_strength=1.0)
    assert torch.equal(only.baselines, otb_advantage(r, m, [0, 0, 0], e).baselines)


def test_the_tail_rule_looks_at_columns():
    """Six tokens with a hole against three late ones: by length, the public rule would clear columns 3 to 6."""
    m = torch.tensor([[1, 1, 1, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 0]])
    r = torch.zeros(2, 7)
    r[0, 6] = 1
    b = otb_advantage(r, m, [0, 0], torch.ones(2, 7)).baselines
    assert b[0].tolist() == pytest.approx([1, 1, 1, 0, 4 / 6, 5 / 8, 0])


def test_small_negative_energies_count_as_zero():
    r, m = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.ones(2, 2)
    e = torch.tensor([[0.5, -9e-6], [0.5, 0.1]])
    assert torch.equal(otb_advantage(r, m, [0, 0], e).advantages, otb_advantage(r, m, [0, 0], e.clamp(min=0)).advantages)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_empty_batches_give_empty_answers(shape):
    x = torch.zeros(shape)
    for name in ESTIMATORS:
        for options in ({}, {"leave_one_out": True, "prior": "batch", "prior_strength": 1.0}) if name == "otb" else ({},):
            assert estimate(name, x, x, [0] * shape[0], x, **options).advantages.shape == shape
    assert returns_to_go(x, x, 0.5).shape == shape


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int8, torch.float32, torch.float64, torch.bfloat16])
def test_masks_and_rewards_come_in_any_type(dtype):
    (r, e), m, uid = batch(5)
    want = otb_advantage(r, m, uid, e)
    assert torch.equal(otb_advantage(r.double(), m.to(dtype), torch.as_tensor(uid), e).advantages, want.advantages)
    assert torch.equal(rloo_advantage((r * 4).long(), m.to(dtype), uid).advantages, rloo_advantage(r * 4, m, uid).advantages)


def test_nothing_carries_a_gradient():
    (r, e), m, uid = batch(3)
    r.requires_grad_(), e.requires_grad_()
    for name in ESTIMATORS:
        assert not any(x.requires_grad for x in estimate(name, r, m, uid, e))


@given(st.integers(0, 10**6), st.sampled_from([0, 0.3, 0.99, 1]))
@QUICK
def test_returns_follow_their_recursion(seed, gamma):
    (r, _), m, _ = batch(seed)
    want, g = np.zeros(r.shape), np.zeros(len(r))
    for t in reversed(range(r.shape[1])):
        g = r[:, t].numpy() * m[:, t].numpy() + gamma * g
        want[:, t] = g * m[:, t].numpy()
    assert np.abs(returns_to_go(r, m, gamma).numpy() - want).max() < 1e-5


def test_a_long_discount_neither_overflows_nor_vanishes():
    r = torch.zeros(1, 5000)
    r[0, -1] = 1
    g = returns_to_go(r, torch.ones(1, 5000), 0.5)
    assert g[0, -3:].tolist() == [0.25, 0.5, 1.0] and float(g[0, 0]) == 0


# --- registry and bad input ----------------------------------------------------------------------

def test_the_registry_takes_new_names_only(monkeypatch):
    monkeypatch.setattr(adv, "_ADVANTAGES", dict(adv._ADVANTAGES))
    assert get_advantage("otb") is otb_advantage and get_advantage("grpo") is grpo_advantage
    assert "energy" in inspect.signature(get_advantage("otb")).parameters
    assert register_advantage("mine")(rloo_advantage) is rloo_advantage and get_advantage("mine") is rloo_advantage
    with pytest.raises(ValueError, match="advantage 'otb' is already registered"):
        register_advantage("otb")(rloo_advantage)
    with pytest.raises(ValueError, match="unknown advantage 'gae', use one of 'grpo', 'rloo', 'opo', 'otb', .*'mine'"):
        get_advantage("gae")


R, M, E, U = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.ones(2, 2), torch.ones(2, 2), [0, 0]
HOLE = torch.tensor([[0.0, 1.0], [0.0, torch.nan]])


@pytest.mark.parametrize(("changed", "text"), [
    ({"mask": M * 2}, "mask must contain only 0 and 1"),
    ({"mask": M * torch.nan}, "mask must contain only 0 and 1"),
    ({"mask": M[0]}, r"mask must be \(B, T\), got shape \(2,\)"),
    ({"rewards": R[:, :1]}, r"rewards has shape \(2, 1\), mask \(2, 2\)"),
    ({"energy": E[:1]}, r"energy has shape \(1, 2\), mask \(2, 2\)"),
    ({"is_weights": E[:1]}, r"is_weights has shape \(1, 2\), mask \(2, 2\)"),
    ({"rewards": HOLE}, "rewards contain non-finite values at row 1, column 1"),
    ({"energy": HOLE}, "energy contain non-finite values at row 1, column 1"),
    ({"is_weights": HOLE}, "is_weights contain non-finite values at row 1, column 1"),
    ({"energy": E - 1.5}, r"energy must be non-negative \(got min -0.5\)"),
    ({"is_weights": -E}, r"is_weights must be non-negative \(got min -1\)"),
    ({"uid": [0]}, "uid has length 1, rewards have 2 rows"),
    ({"weighting": "length"}, "unknown weighting 'length', use one of 'cumulative', 'token', 'sequence', 'uniform'"),
    ({"align": "column"}, "unknown align 'column', use one of 'position', 'token'"),
    ({"finished": "stop"}, "unknown finished 'stop', use one of 'drop', 'keep'"),
    ({"prior": "group", "prior_strength": 1.0}, "unknown prior 'group', use one of 'batch'"),
    ({"prior": torch.ones(3), "prior_strength": 1.0}, r"prior must have shape \(2,\), got \(3,\)"),
    ({"prior": torch.tensor([1.0, torch.nan])}, "prior must be finite, got nan at column 1"),
    ({"prior_strength": 1.0}, "prior_strength is 1.0 but prior is None"),
    ({"prior": "batch", "prior_strength": -1.0}, "prior_strength must be finite and not negative, got -1.0"),
    ({"prior": "batch", "prior_strength": np.inf}, "prior_strength must be finite and not negative, got inf"),
    ({"eps": -1e-8}, "eps must be finite and not negative, got -1e-08"),
    ({"prior": "batch"}, "a prior has no effect while prior_strength is 0"),
    ({"prior": torch.ones(2), "prior_strength": 0}, "a prior has no effect while prior_strength is 0"),
    ({"leave_one_out": "False"}, "leave_one_out must be True or False, got 'False'"),
    ({"zero_tail": None}, "zero_tail must be True or False, got None"),
])
def test_bad_otb_arguments_are_refused(changed, text):
    with pytest.raises(ValueError, match=text):
        otb_advantage(**{"rewards": R, "mask": M, "uid": U, "energy": E, **changed})


@pytest.mark.parametrize("function", [grpo_advantage, rloo_advantage, opo_advantage, returns_to_go])
def test_other_functions_refuse_bad_tensors_too(function):
    more = () if function is returns_to_go else (U,)
    for rewards, mask, text in ((R, M * 2, "mask must contain"), (R[:1], M, r"rewards has shape \(1, 2\), mask \(2, 2\)"),
                                (HOLE, M, "rewards contain non-finite values at row 1, column 1")):
        with pytest.raises(ValueError, match=text):
            function(rewards, mask, *more)
    if more:
        with pytest.raises(ValueError, match="uid has length 3, rewards have 2 rows"):
            function(R, M, [0, 0, 0])


def test_bad_options_of_grpo_and_returns_are_refused():
    with pytest.raises(ValueError, match="unknown scale 'batch', use one of 'group', 'none'"):
        grpo_advantage(R, M, U, scale="batch")
    with pytest.raises(ValueError, match="eps must be positive, got 0"):
        grpo_advantage(R, M, U, eps=0)
    for gamma in (-0.1, 1.5, np.nan):
        with pytest.raises(ValueError, match="gamma must be in"):
            returns_to_go(R, M, gamma)


def test_a_lost_reward_warns_once():
    m = torch.tensor([[1, 0], [1, 0]])
    for function in (grpo_advantage, lambda r, m, u: otb_advantage(r, m, u, E), lambda r, m, u: returns_to_go(r, m)):
        with pytest.warns(UserWarning, match="1 rewards on masked tokens are ignored, the first at row 0, column 1") as seen:
            function(R, m, U)
        assert len(seen) == 1


def test_rows_that_all_stand_alone_warn_once():
    r, m, uid = torch.ones(3, 2), torch.ones(3, 2), range(3)
    for function in (grpo_advantage, rloo_advantage, opo_advantage, lambda r, m, u: otb_advantage(r, m, u, m)):
        with pytest.warns(UserWarning, match="every row has a uid of its own") as seen:
            function(r, m, uid)
        assert len(seen) == 1


def test_no_such_warning_where_nothing_could_be_compared_or_others_are(recwarn):
    r, m = torch.ones(3, 2), torch.ones(3, 2)
    for name in ESTIMATORS:
        estimate(name, r, m, [0, 1, 1], m), estimate(name, r[:1], m[:1], [0], m[:1])
        estimate(name, r[:0], m[:0], [], m[:0]), estimate(name, 0 * r, 0 * m, range(3), m)
    otb_advantage(r, m, range(3), m, leave_one_out=True, prior="batch", prior_strength=1.0)
    assert not recwarn


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_energies_may_be_as_large_as_float32_holds(weighting):
    (r, e), m, uid = batch(2)
    options = {"weighting": weighting, "prior": "batch", "prior_strength": 1.0, "eps": 0.0}
    for leave_one_out in (False, True):
        small, large = (otb_advantage(r, m, uid, k * e, is_weights=k * e, leave_one_out=leave_one_out, **options) for k in (1.0, 1e38))
        assert difference(small.advantages, large.advantages) < 1e-5


class Named(NamedTuple):
    logp: torch.Tensor = M
    energy: torch.Tensor = M


@pytest.mark.parametrize("bad", [[[1.0, 0.0], [0.0, 0.0]], np.ones((2, 2)), None, Named()])
def test_what_is_no_tensor_is_refused_by_name(bad):
    text = f"must be a torch.Tensor, got {type(bad).__name__}" + ("; take one of its fields: .logp, .energy$" if isinstance(bad, Named) else "$")
    for name in ("rewards", "mask", "energy"):
        with pytest.raises(TypeError, match=f"{name} {text}"):
            otb_advantage(**{"rewards": R, "mask": M, "uid": U, "energy": E, name: bad})
    for function in (grpo_advantage, rloo_advantage, opo_advantage, lambda r, m, u: returns_to_go(r, m)):
        for three, name in (((bad, M, U), "rewards"), ((R, bad, U), "mask")):
            with pytest.raises(TypeError, match=f"{name} {text}"):
                function(*three)
    if bad is not None:
        with pytest.raises(TypeError, match=f"x {text}"):
            check_tokens(M, x=bad)
    assert check_tensors(x=M) is None and check_tokens(M, x=None).all()


def test_numbers_that_float32_cannot_hold_are_refused():
    mask = torch.tensor([[1, 1], [0, 1]])
    check_tokens(mask, rewards=torch.full((2, 2), 3e38))
    check_tokens(mask, rewards=torch.tensor([[1, 1], [1e39, 1]], dtype=torch.float64))
    with pytest.raises(ValueError, match="rewards contain non-finite values at row 1, column 1"):
        check_tokens(mask, rewards=torch.tensor([[1, 1], [1, 1e39]], dtype=torch.float64))


# --- options, groups and priors before anything is estimated --------------------------------------

@pytest.mark.parametrize(("estimator", "options", "text"), [
    ("otb", {"foo": 1}, "unknown otb option 'foo', use one of 'weighting', 'align', 'leave_one_out', 'finished', 'prior'"),
    ("otb", {"energy": 1}, "unknown otb option 'energy', use one of"),
    ("otb", {"is_weights": 1}, "unknown otb option 'is_weights', use one of"),
    ("grpo", {"foo": 1}, "unknown grpo option 'foo', use one of 'scale', 'eps'"),
    ("rloo", {"uid": 1}, "unknown rloo option 'uid': rloo has none"),
    (opo_advantage, {"eps": 1}, "unknown opo_advantage option 'eps': opo_advantage has none"),
    ("gae", {}, "unknown advantage 'gae'"),
    ("otb", None, "options of otb must be a mapping of keywords, got None"),
    ("otb", {"weighting": "length"}, "unknown weighting 'length'"),
    ("otb", {"prior": torch.ones(3)[0], "prior_strength": 1.0}, r"prior must have shape \(1,\), got \(\)"),
    ("otb", {"prior_strength": 1.0}, "prior_strength is 1.0 but prior is None"),
    ("grpo", {"scale": "std"}, "unknown scale 'std'"),
    ("grpo", {"eps": 0}, "eps must be positive, got 0")])
def test_options_are_refused_by_name_and_value(estimator, options, text):
    with pytest.raises(ValueError, match=text):
        check_estimator_options(estimator, options)


def test_options_that_are_known_come_back_as_a_copy():
    given = {"weighting": "token", "prior": torch.ones(7), "prior_strength": 2.0}
    found = check_estimator_options("otb", given)
    assert found == given and found is not given
    assert check_estimator_options(otb_advantage, {"is_weights": None}, given=("energy",)) == {"is_weights": None}
    assert check_estimator_options(lambda rewards, mask, uid, **more: None, {"any": 1}) == {"any": 1}
    assert check_estimator_options(lambda *all_of_them, pull=0: None, {"pull": 1}) == {"pull": 1}


@pytest.mark.parametrize("uid", [
    [torch.tensor(0), torch.tensor(0), torch.tensor(1), torch.tensor(1)], list(torch.tensor([3, 3, 1, 1])),
    list(np.array([3, 3, 1, 1])), torch.tensor([0, 0, 1, 1]), np.array([5, 5, 6, 6]), "aabb", [("a", 1), ("a", 1), 0.5, 0.5]])
def test_names_of_groups_count_by_their_value(uid):
    assert group_index(uid, 4).tolist() == [0, 0, 1, 1]
    r = torch.tensor([[1.0], [0.0], [1.0], [0.0]])
    assert rloo_advantage(r, torch.ones(4, 1), uid).advantages[:, 0].tolist() == [1, -1, 1, -1]


@pytest.mark.parametrize(("uid", "shown"), [([[0], [1]], r"\[0\]"), (torch.tensor([[0, 1], [1, 2]]), r"\[0, 1\]"),
                                            (list(torch.tensor([[0, 1], [1, 2]])), r"\[0, 1\]"), (["a", ("b", [1])], r"\('b', \[1\]\)")])
def test_names_of_groups_are_hashable(uid, shown):
    with pytest.raises(TypeError, match=f"uid must hold hashable values, got {shown}"):
        rloo_advantage(torch.zeros(2, 1), torch.ones(2, 1), uid)


@pytest.mark.parametrize(("prior", "text"), [
    ([0.5, 0.5], r"prior must be None, 'batch' or a tensor of shape \(T,\), got \[0.5, 0.5\]"),
    (0.5, "prior must be None, 'batch' or a tensor of shape"), (np.ones(2), "prior must be None, 'batch' or a tensor of shape"),
    (torch.ones(3), r"prior must have shape \(2,\), got \(3,\)"), (torch.ones(1, 2), r"prior must have shape \(2,\), got \(1, 2\)"),
    (torch.tensor([0.0, torch.nan]), "prior must be finite, got nan at column 1")])
def test_priors_are_refused_for_what_is_wrong(prior, text):
    x = torch.ones(1, 2)
    with pytest.raises(ValueError, match=text):
        otb_advantage(x, x, [0], x, prior=prior, prior_strength=1.0)


def test_a_mask_is_refused_with_the_value():
    with pytest.raises(ValueError, match="mask must contain only 0 and 1, got 0.5"):
        check_tokens(torch.tensor([[1.0, 0.5]]))


def test_whole_numbers_are_checked_one_way():
    assert [check_integer("n", x, 0) for x in (0, np.int64(3), np.uint64(2**64 - 1), 2**70)] == [0, 3, 2**64 - 1, 2**70]
    assert all(type(check_integer("n", x, 0, 9)) is int for x in (1, np.int8(9)))
    for value, low, high, text in ((0.5, 0, None, "n must be an integer >= 0, got 0.5"), (True, 0, None, "got True"), (None, 0, 1, "got None"),
                                   (-1, 0, None, "n must be an integer >= 0, got -1"), (2, 0, 1, r"n must be an integer in \[0, 1\], got 2"),
                                   (np.bool_(True), 0, 1, "must be an integer"), (torch.ones(2), 0, 1, "must be an integer")):
        with pytest.raises(ValueError, match=text):
            check_integer("n", value, low, high)


@given(st.integers(0, 10**6), st.floats(0, 30))
@QUICK
def test_a_bounded_energy_is_never_farther_from_the_truth(seed, gap):
    z = torch.as_tensor(np.random.default_rng(seed).normal(size=(40, 9)))
    z[:, 0] += gap
    pi, logp = z.softmax(-1), z.log_softmax(-1)[:, 0].float()
    p, q = logp.double().exp(), pi.square().sum(-1).float()  # ln p counts as exact
    rest = torch.expm1(logp.double()).square()
    s = pi[:, 1:].square().sum(-1).clamp(max=rest)
    e, loose = bounded_energy(logp, q), bounded_energy(logp, q, 1e-5)
    assert (e >= rest.float() * 0.999).all() and (e <= 2.001 * rest.float()).all()
    plain = (q - (2 * logp).exp()).double()
    assert ((e.double() - rest - s).abs() <= (plain - s).abs() + 1e-6 * rest).all()
    assert torch.equal(e, loose) and (p <= 1).all()


def test_energies_far_outside_their_bounds_stay_within_reach_only():
    logp, q = torch.tensor([-0.5, -0.5, -0.5]), torch.tensor([0.9, 0.1, float("nan")])
    rest = torch.expm1(logp[0]) ** 2
    assert torch.allclose(bounded_energy(logp, q)[:2], torch.stack([2 * rest, rest]))
    far = bounded_energy(logp, q, 1e-5)
    assert torch.allclose(far[:2], torch.stack([rest + 0.9 - torch.exp(torch.tensor(-1.0)), rest]))  # a negative one is never kept
    assert far[2].isnan() and bounded_energy(logp, q)[2].isnan()
