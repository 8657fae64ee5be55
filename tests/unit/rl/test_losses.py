"""Losses: parity with plain loops, masked positions without trace, the stated identities, and bad inputs by message."""
import math

import pytest
import torch

from collai.rl.losses import AGGREGATIONS, aggregate, kl_k3, ppo_clip_loss, rollout_weights, sft_loss


def case(seed: int, rows: int = 4, columns: int = 7, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random token tensors; one row in some cases is empty, masked positions hold NaN or infinities."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=g) > 0.4
    if seed % 3 == 0:
        mask[seed % rows] = False
    junk = torch.tensor([math.nan, math.inf, -math.inf, 1e30])[torch.randint(4, mask.shape, generator=g)]
    out = {name: torch.randn(rows, columns, generator=g, dtype=torch.float64) * k
           for name, k in (("logp", 0.5), ("old_logp", 0.5), ("adv", 1.0), ("weight", 1.0), ("is_weights", 1.0))}
    out["logp"], out["old_logp"] = out["logp"] - 4, out["old_logp"] - 4
    out["weight"], out["is_weights"] = out["weight"].abs(), out["is_weights"].exp()
    return {name: torch.where(mask, x, junk).to(dtype) for name, x in out.items()} | {"mask": mask}


def reduce_loop(rows: list[list[float]], mode: str, scale: float) -> float:
    """The four averages in Python numbers; `rows` holds the values of valid tokens."""
    full = [r for r in rows if r]
    if mode == "token-mean":
        return sum(map(sum, rows)) / max(1, sum(map(len, rows)))
    if mode == "seq-sum-norm":
        return sum(map(sum, rows)) / (len(rows) * scale)
    return sum(sum(r) / (len(r) if mode == "seq-mean-token-mean" else 1) for r in full) / max(1, len(full))


def term(c: dict[str, torch.Tensor], i: int, t: int, low: float, high: float, dual: float | None) -> float:
    """w·ρ·min(rA, clip(r)A) with its floor, in Python numbers."""
    r, a = math.exp(float(c["logp"][i, t]) - float(c["old_logp"][i, t])), float(c["adv"][i, t])
    j = min(r * a, min(max(r, 1 - low), 1 + high) * a)
    j = max(j, dual * a) if dual is not None and a < 0 else j
    return float(c["weight"][i, t]) * float(c["is_weights"][i, t]) * j


def slope(c: dict[str, torch.Tensor], i: int, t: int, low: float, high: float, dual: float | None) -> float:
    """Derivative of that term by logp: w·ρ·rA where no clip holds, else 0."""
    r, a = math.exp(float(c["logp"][i, t]) - float(c["old_logp"][i, t])), float(c["adv"][i, t])
    held = r > 1 + high if a > 0 else (r < 1 - low or (dual is not None and r > dual))
    return 0.0 if held else float(c["weight"][i, t]) * float(c["is_weights"][i, t]) * r * a


@pytest.mark.parametrize("agg", AGGREGATIONS)
@pytest.mark.parametrize("dual", [None, 1.3])
def test_ppo_loss_and_gradient_equal_a_plain_loop(agg, dual):
    for seed in range(25):
        c = case(seed)
        c["logp"].requires_grad_()
        loss, metrics = ppo_clip_loss(**c, clip_low=0.1, clip_high=0.28, dual_clip=dual, agg=agg)
        grad, = torch.autograd.grad(loss, c["logp"])
        c["logp"] = c["logp"].detach()
        valid = [[t for t in range(7) if c["mask"][i, t]] for i in range(4)]
        loop = -reduce_loop([[term(c, i, t, 0.1, 0.28, dual) for t in row] for i, row in enumerate(valid)], agg, 7)
        assert abs(loss.item() - loop) < 1e-6 * max(1, abs(loop))
        for i, row in enumerate(valid):
            for t in range(7):
                one = [[(slope(c, i, t, 0.1, 0.28, dual) if (k, u) == (i, t) else 0.0) for u in valid[k]] for k in range(4)]
                want = -reduce_loop(one, agg, 7) if t in row else 0.0
                assert abs(grad[i, t].item() - want) < 1e-6 * max(1, abs(want))
        assert all(type(v) is float and math.isfinite(v) for v in metrics.values())


def test_ppo_metrics_count_what_the_clips_hold():
    log_r = torch.tensor([[1.5, 0.5, 1.1, 4.0, 0.5, math.nan]]).log()
    adv = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, 7.0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    _, m = ppo_clip_loss(log_r, torch.zeros(1, 6), adv, mask, dual_clip=3.0)
    assert m == {"clip_share": 0.4, "clip_share_upper": 0.2, "clip_share_lower": 0.2, "dual_clip_share": 0.2,
                 "ratio_mean": pytest.approx(1.52), "ratio_min": pytest.approx(0.5), "ratio_max": pytest.approx(4.0),
                 "approx_kl": pytest.approx(sum(r - 1 - math.log(r) for r in (1.5, 0.5, 1.1, 4, 0.5)) / 5), "tokens": 5.0}
    assert ppo_clip_loss(log_r, torch.zeros(1, 6), adv, mask)[1]["dual_clip_share"] == 0


def test_on_policy_gradient_is_the_policy_gradient_also_without_detaching():
    c = case(1, dtype=torch.float64)
    logp = c["logp"].requires_grad_()
    loss, _ = ppo_clip_loss(logp, logp, c["adv"], c["mask"], agg="seq-mean-token-sum")
    grad, = torch.autograd.grad(loss, logp)
    rows = c["mask"].any(1).sum()
    assert torch.allclose(grad, -torch.where(c["mask"], c["adv"], 0) / rows)


def test_nothing_flows_into_the_other_inputs_and_none_is_changed():
    c = case(2)
    for x in c.values():
        if x.is_floating_point():
            x.requires_grad_()
    before = {name: x.detach().clone() for name, x in c.items()}
    loss, _ = ppo_clip_loss(**c)
    grads = torch.autograd.grad(loss, [c[n] for n in ("logp", "old_logp", "adv", "weight", "is_weights")], allow_unused=True)
    assert grads[0] is not None and all(g is None for g in grads[1:])
    assert all(torch.equal(torch.nan_to_num(before[n]), torch.nan_to_num(c[n].detach())) for n in c)


def test_a_weight_is_a_scaled_advantage():
    c = case(4, dtype=torch.float64)
    got = ppo_clip_loss(c["logp"], c["old_logp"], c["adv"], c["mask"], weight=c["weight"], dual_clip=1.5)[0]
    want = ppo_clip_loss(c["logp"], c["old_logp"], c["weight"] * c["adv"], c["mask"], dual_clip=1.5)[0]
    assert torch.isclose(got, want, rtol=1e-12)


def test_huge_ratios_stay_finite():
    logp, zero, one = torch.tensor([[300.0, 300.0]], requires_grad=True), torch.zeros(1, 2), torch.ones(1, 2)
    for adv in (zero, -one, one):
        loss, metrics = ppo_clip_loss(logp, zero, adv, one)
        assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, logp)[0]).all()
        assert all(map(math.isfinite, metrics.values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_narrow_inputs_are_summed_in_float32_and_float64_stays(dtype):
    c = {name: x.to(dtype) if x.is_floating_point() else x for name, x in case(5).items()}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    up = {name: x.to(wide) if x.is_floating_point() else x for name, x in c.items()}
    loss, _ = ppo_clip_loss(**c)
    assert loss.dtype == wide and torch.equal(loss, ppo_clip_loss(**up)[0])
    assert aggregate(c["adv"], c["mask"]).dtype == sft_loss(c["logp"], c["mask"])[0].dtype == wide


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32, torch.uint8])
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_aggregate_equals_a_plain_loop_for_every_kind_of_mask(mode, kind):
    for seed in range(10):
        c = case(seed)
        rows = [[float(x) for x, keep in zip(r, k, strict=True) if keep] for r, k in zip(c["adv"], c["mask"], strict=True)]
        x = c["adv"].requires_grad_()
        got = aggregate(x, c["mask"].to(kind), mode, scale=5 if mode == "seq-sum-norm" else None)
        assert abs(got.item() - reduce_loop(rows, mode, 5)) < 1e-6
        grad, = torch.autograd.grad(got, x)
        assert torch.isfinite(grad).all() and (grad[~c["mask"]] == 0).all()


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_without_valid_tokens_every_loss_is_zero(mode):
    for shape in ((2, 3), (0, 3), (2, 0)):
        x, mask = torch.full(shape, math.nan, requires_grad=True), torch.zeros(shape)
        for loss in (aggregate(x, mask, mode), ppo_clip_loss(x, x, x, mask, agg=mode)[0], sft_loss(x, mask, agg=mode)[0]):
            assert loss == 0 and (torch.autograd.grad(loss, x)[0] == 0).all()


def test_sft_is_weighted_cross_entropy():
    for seed in range(10):
        c = case(seed)
        logp = c["logp"].requires_grad_()
        loss, metrics = sft_loss(logp, c["mask"], weight=c["weight"], agg="seq-mean-token-mean")
        rows = [[(float(x), float(w)) for x, w, k in zip(*r, strict=True) if k]
                for r in zip(logp.tolist(), c["weight"].tolist(), c["mask"].tolist(), strict=True)]
        assert abs(loss.item() + reduce_loop([[x * w for x, w in r] for r in rows], "seq-mean-token-mean", 1)) < 1e-6
        assert abs(metrics["nll"] + reduce_loop([[x for x, _ in r] for r in rows], "token-mean", 1)) < 1e-6
        assert metrics["tokens"] == float(c["mask"].sum())
        assert (torch.autograd.grad(loss, logp)[0][~c["mask"]] == 0).all()


def test_k3_is_its_formula_never_negative_and_leaves_no_trace_under_a_mask():
    g = torch.Generator().manual_seed(0)
    logp = torch.randn(50_000, generator=g, dtype=torch.float64) * 2
    ref = torch.randn(50_000, generator=g, dtype=torch.float64) * 2
    d = ref - logp
    assert torch.allclose(kl_k3(logp, ref), d.exp() - d - 1, rtol=1e-9, atol=1e-15)
    for size in (1e-6, 1e-4, 1e-2, 1.0):
        assert (kl_k3(logp.float() * size, ref.float() * size) >= 0).all()
    x = torch.tensor([[0.3, math.nan, -200.0, -math.inf, math.inf]], requires_grad=True)
    loss = aggregate(kl_k3(x, torch.zeros(1, 5)), torch.tensor([[1, 0, 0, 0, 0]]))
    grad, = torch.autograd.grad(loss, x)
    assert grad[0].tolist() == [pytest.approx(1 - math.exp(-0.3)), 0, 0, 0, 0]


def test_k3_estimates_one_kl_and_its_gradient_is_that_of_the_other():
    g = torch.Generator().manual_seed(3)
    z = torch.randn(5, generator=g, dtype=torch.float64, requires_grad=True)
    ref, logp = torch.randn(5, generator=g, dtype=torch.float64).log_softmax(0), z.log_softmax(0)
    mean = (logp.exp().detach() * kl_k3(logp, ref)).sum()
    assert torch.isclose(mean, (logp.exp() * (logp - ref)).sum(), rtol=1e-12)
    other = (ref.exp() * (ref - logp)).sum()
    assert torch.allclose(*(torch.autograd.grad(v, z, retain_graph=True)[0] for v in (mean, other)), atol=1e-14)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_rollout_weights_equal_a_plain_loop(level, mode):
    for seed in range(20):
        c = case(seed)
        got = rollout_weights(c["logp"], c["old_logp"], c["mask"], level=level, cap=1.4, mode=mode)
        assert got.dtype == torch.float32 and not got.requires_grad
        for i in range(4):
            valid = [t for t in range(7) if c["mask"][i, t]]
            d = {t: float(c["logp"][i, t]) - float(c["old_logp"][i, t]) for t in valid}
            for t in range(7):
                rho = 0.0 if t not in valid else math.exp(d[t] if level == "token" else sum(d.values()))
                want = rho if rho <= 1.4 else (1.4 if mode == "truncate" else 0.0)
                assert abs(got[i, t].item() - want) < 1e-6


def test_rollout_weights_survive_products_that_overflow():
    far = torch.full((2, 3), 200.0) * torch.tensor([[1.0], [-1.0]])
    one, zero = torch.ones(2, 3), torch.zeros(2, 3)
    assert rollout_weights(far, zero, one, level="sequence").tolist() == [[2.0] * 3, [0.0] * 3]
    assert rollout_weights(far.requires_grad_(), zero, one, level="sequence", mode="mask").tolist() == [[0.0] * 3] * 2


GOOD = dict(logp=torch.zeros(2, 3), old_logp=torch.zeros(2, 3), adv=torch.zeros(2, 3), mask=torch.ones(2, 3))


@pytest.mark.parametrize(("change", "message"), [
    (dict(clip_low=1.0), r"clip_low must be in \[0, 1\), got 1.0"), (dict(clip_low=-0.1), "clip_low .* got -0.1"),
    (dict(clip_low=math.nan), "clip_low .* got nan"), (dict(clip_high=-0.1), "clip_high must be >= 0, got -0.1"),
    (dict(dual_clip=1), "dual_clip must be > 1, got 1"), (dict(agg="sum"), "unknown aggregation 'sum', .*'seq-sum-norm'"),
    (dict(mask=torch.full((2, 3), 2)), "mask must contain only 0 and 1"),
    (dict(mask=torch.full((2, 3), math.nan)), "mask must contain only 0 and 1"),
    (dict(mask=torch.ones(3)), r"mask must be \(B, T\), got shape \(3,\)"),
    (dict(old_logp=torch.zeros(3, 2)), r"old_logp has shape \(3, 2\), mask \(2, 3\)"),
    (dict(weight=torch.zeros(2, 1)), r"weight has shape \(2, 1\), mask \(2, 3\)"),
    (dict(adv=torch.tensor([[0, 0, 0], [0, math.inf, 0]])), "adv contain non-finite values at row 1, column 1"),
    (dict(is_weights=torch.tensor([[0, math.nan, 0], [0, 0, 0]])), "is_weights contain .* row 0, column 1")])
def test_ppo_refuses_bad_input_and_says_why(change, message):
    with pytest.raises(ValueError, match=message):
        ppo_clip_loss(**(GOOD | change))


def test_logits_and_probabilities_are_no_log_probabilities():
    z = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))
    one = torch.ones(2, 3)
    for x in (z[..., 4].abs(), z.softmax(-1).amax(-1), one * 0.13):
        for call in (lambda x: ppo_clip_loss(x, x, one, one), lambda x: sft_loss(x, one)):
            with pytest.raises(ValueError, match=r"log-probabilities can't be positive \(got max .*\): are these logits or probabilities"):
                call(x)
            call(torch.where(one.bool(), -x, x))


def test_log_probabilities_that_rounding_made_positive_are_taken():
    z = torch.tensor([[30.3, 41.1, 63.9]])
    logp = z - z.bfloat16()  # a certain token, whose log-sum-exp was rounded to bfloat16
    assert 0.05 < logp.max() < 0.125
    assert all(torch.isfinite(f[0]) for f in (ppo_clip_loss(logp, logp, logp, logp == logp), sft_loss(logp, logp == logp)))


@pytest.mark.parametrize("bad", [[[0.0]], None])
def test_what_is_no_tensor_is_refused_by_name(bad):
    x = torch.zeros(1, 1)
    calls = {"logp": (lambda: ppo_clip_loss(bad, x, x, x), lambda: sft_loss(bad, x), lambda: kl_k3(bad, x)),
             "old_logp": (lambda: ppo_clip_loss(x, bad, x, x), lambda: rollout_weights(bad, x, x)),
             "adv": (lambda: ppo_clip_loss(x, x, bad, x),), "x": (lambda: aggregate(bad, x),), "ref_logp": (lambda: kl_k3(x, bad),),
             "rollout_logp": (lambda: rollout_weights(x, bad, x),), "mask": (lambda: aggregate(x, bad), lambda: sft_loss(x, bad))}
    for name, every in calls.items():
        for call in every:
            with pytest.raises(TypeError, match=f"^{name} must be a torch.Tensor, got {type(bad).__name__}"):
                call()


@pytest.mark.parametrize(("call", "message"), [
    (lambda x: aggregate(x, x + 1, "mean"), "unknown aggregation 'mean', use one of 'token-mean', 'seq-mean-token-sum'"),
    (lambda x: aggregate(x, x + 1, scale=0), "scale must be positive, got 0"),
    (lambda x: aggregate(x[:1], x + 1), r"x has shape \(1, 3\), mask \(2, 3\)"),
    (lambda x: sft_loss(x, x + 1, agg="x"), "unknown aggregation 'x'"),
    (lambda x: sft_loss(x - math.inf, x + 1), "logp contain non-finite values at row 0, column 0"),
    (lambda x: kl_k3(x, x[0]), r"logp has shape \(2, 3\), ref_logp \(3,\)"),
    (lambda x: rollout_weights(x, x, x + 1, level="turn"), "unknown level 'turn', use one of 'token', 'sequence'"),
    (lambda x: rollout_weights(x, x, x + 1, mode="drop"), "unknown mode 'drop', use one of 'truncate', 'mask'"),
    (lambda x: rollout_weights(x, x, x + 1, cap=-1), "cap must be positive, got -1"),
    (lambda x: rollout_weights(x, x / 0, x + 1), "rollout_logp contain non-finite values at row 0, column 0")])
def test_the_other_functions_refuse_bad_input_and_say_why(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3))
