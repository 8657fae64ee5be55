"""Gated loss: parity with plain loops in 300 cases, exact limits, the scaled gradient, its metrics, imitation terms, bad inputs."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.core.tinylm import TinyLM
from collai.egspo import loss as module
from collai.egspo.gate import RunningQuantile, entropy_gate
from collai.egspo.loss import chord_loss, chord_phi, egspo_loss, measure, mu_schedule
from collai.rl.losses import AGGREGATIONS, ppo_clip_loss

NAMES = ("logp", "old_logp", "adv", "entropy")
PPO = ("logp", "old_logp", "adv", "mask")


def case(seed: int, rows: int = 4, columns: int = 7, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random token tensors; one row in some cases is empty, masked positions hold NaN, infinities or large numbers."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=g) > 0.4
    if seed % 3 == 0:
        mask[seed % rows] = False
    junk = torch.tensor([math.nan, math.inf, -math.inf, 1e30])[torch.randint(4, mask.shape, generator=g)]
    x = {name: torch.randn(rows, columns, generator=g, dtype=torch.float64)
         for name in (*NAMES, "is_weights", "energy", "gate", "sum_sq")}
    pi = torch.randn(rows, columns, 6, generator=g, dtype=torch.float64).softmax(2)
    x |= {"logp": -0.5 * x["logp"].abs(), "old_logp": -0.5 * x["old_logp"].abs(), "entropy": x["entropy"].abs(),
          "is_weights": x["is_weights"].exp(), "energy": x["energy"].square(), "gate": x["gate"].sigmoid(),
          "sum_sq": pi.square().sum(2), "sum_cube": pi.pow(3).sum(2)}
    if seed % 5 == 0:  # ties
        x["entropy"] = (3 * x["entropy"]).round() / 3
    return {name: torch.where(mask, v, junk).to(dtype) for name, v in x.items()} | {"mask": mask}


def options_of(seed: int) -> dict[str, object]:
    """Options of a case, all combinations over some hundred seeds."""
    rng = np.random.default_rng(seed)
    pick = {"phi": (0, 0.1, 0.5, 1, "chord", "chord-state"), "quantile": (0, 0.3, 0.8, 1), "scope": ("batch", "sequence"),
            "clip_low": (0.0, 0.2), "clip_high": (0.1, 0.28), "agg": AGGREGATIONS, "normalize": ("tokens", "weights"),
            "gate": (False, False, True), "is_weights": (False, True)}
    return {name: values[rng.integers(len(values))] for name, values in pick.items()}


def call(c: dict[str, torch.Tensor], **options: object) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss of a case; True stands for the case's own tensor."""
    tensors = {name: c[name] for name in ("gate", "is_weights", "energy") if options.pop(name, False)}
    return egspo_loss(*(c[n] for n in PPO), c["entropy"], moments=(c["sum_sq"], c["sum_cube"]), **tensors, **options)


def gates_by_loop(c: dict[str, torch.Tensor], quantile: float, scope: str) -> list[list[float]]:
    """Gate of each token from sorted lists; 0 under the mask."""
    rows = [[float(c["entropy"][i, t]) for t in range(c["mask"].shape[1]) if c["mask"][i, t]] for i in range(len(c["mask"]))]
    cuts = []
    for i in range(len(rows)):
        peers = sorted(rows[i] if scope == "sequence" else [h for row in rows for h in row])
        cuts.append(peers[math.ceil(round(quantile * (len(peers) - 1), 9))] if peers else math.inf)
    return [[float(bool(c["mask"][i, t]) and float(c["entropy"][i, t]) >= cuts[i]) for t in range(c["mask"].shape[1])]
            for i in range(len(rows))]


def weights_by_loop(c: dict[str, torch.Tensor], o: dict[str, object]) -> dict[tuple[int, int], float]:
    """Weight of each valid token in Python numbers."""
    gates, w = gates_by_loop(c, o["quantile"], o["scope"]), {}
    for i, t in c["mask"].nonzero().tolist():
        g, p = float(c["gate"][i, t]) if o["gate"] else gates[i][t], math.exp(float(c["logp"][i, t]))
        phi = {"chord": p * (1 - p), "chord-state": float(c["sum_sq"][i, t]) - float(c["sum_cube"][i, t])}.get(o["phi"], o["phi"])
        w[i, t] = g + (1 - g) * phi
    mean = sum(w.values()) / len(w) if w and o["normalize"] == "weights" else 1
    return {at: x / mean if mean else 0.0 for at, x in w.items()}


def loss_by_loop(c: dict[str, torch.Tensor], o: dict[str, object]) -> float:
    """The loss, one token after the other."""
    rows: dict[int, list[float]] = {}
    for (i, t), w in weights_by_loop(c, o).items():
        r, a = math.exp(float(c["logp"][i, t]) - float(c["old_logp"][i, t])), float(c["adv"][i, t])
        rho = float(c["is_weights"][i, t]) if o["is_weights"] else 1.0
        rows.setdefault(i, []).append(w * rho * min(r * a, min(max(r, 1 - o["clip_low"]), 1 + o["clip_high"]) * a))
    sums, n = [sum(row) for row in rows.values()], sum(map(len, rows.values()))
    return -{"token-mean": sum(sums) / max(1, n), "seq-mean-token-sum": sum(sums) / max(1, len(rows)),
             "seq-mean-token-mean": sum(sum(r) / len(r) for r in rows.values()) / max(1, len(rows)),
             "seq-sum-norm": sum(sums) / c["mask"].numel()}[o["agg"]]


def plain(c: dict[str, torch.Tensor], **options: object) -> tuple[torch.Tensor, dict[str, float]]:
    """PPO's loss of a case."""
    tensors = {"is_weights": c["is_weights"]} if options.pop("is_weights", False) else {}
    return ppo_clip_loss(*(c[n] for n in PPO), **tensors, **options)


def slope_of(f, c: dict[str, torch.Tensor], **options: object) -> torch.Tensor:
    """Gradient in logp of a loss of a case."""
    leaf = c["logp"].clone().requires_grad_()
    return torch.autograd.grad(f(c | {"logp": leaf}, **options)[0], leaf)[0]


def test_the_loss_equals_a_plain_loop_in_300_cases():
    for seed in range(300):
        c, o = case(seed), options_of(seed)
        loss, metrics = call(c, **o)
        want = loss_by_loop(c, o)
        assert loss.item() == pytest.approx(want, abs=1e-5 * max(1, abs(want))), (seed, o)
        assert all(type(v) is float and math.isfinite(v) for v in metrics.values())


def test_the_gradient_is_the_weight_times_that_of_ppo_and_nothing_under_the_mask():
    for seed in range(80):
        c, o = case(seed, dtype=torch.float64), options_of(seed)
        c["gate"] = c["gate"].float().double()  # gates are float32
        slope = slope_of(plain, c, **{n: o[n] for n in ("clip_low", "clip_high", "agg", "is_weights")})
        found = slope_of(call, c, **o)
        want = torch.zeros_like(slope)
        for at, w in weights_by_loop(c, o).items():
            want[at] = w * slope[at]
        assert torch.allclose(found, want, rtol=1e-10, atol=1e-14) and (found[~c["mask"]] == 0).all()


def test_attenuated_gradients_are_exactly_the_fraction_where_a_fraction_is_exact():
    for seed in range(40):
        c = case(seed)
        slope, gate = slope_of(plain, c), entropy_gate(c["entropy"], c["mask"])
        for phi in (0.0, 0.25, 0.5):
            assert torch.equal(slope_of(call, c, phi=phi), torch.where(gate > 0, slope, phi * slope))


def test_without_attenuation_or_threshold_it_is_ppo_bit_by_bit():
    for seed in range(24):
        c = case(seed)
        agg = AGGREGATIONS[seed % 4]
        value, slope = plain(c, agg=agg)[0], slope_of(plain, c, agg=agg)
        for same in (dict(phi=1), dict(phi=1.0, normalize="weights"), dict(quantile=0, phi=0), dict(phi=1, gate=True),
                     dict(quantile=0, scope="sequence", phi="chord")):
            assert torch.equal(call(c, agg=agg, **same)[0], value)
            assert torch.equal(slope_of(call, c, agg=agg, **same), slope)


def test_one_weight_for_every_soft_gate_if_nothing_is_attenuated():
    g = torch.rand(1, 200_000, generator=torch.Generator().manual_seed(0))
    assert (module._weights(g, 1, g > -1, "tokens") == 1).all()
    assert (module._weights(g.round(), 0.1, g > -1, "tokens")[g.round() == 1] == 1).all()


def test_full_attenuation_is_the_hard_mask_divided_by_all_tokens():
    for seed in range(30):
        c = case(seed)
        gate = entropy_gate(c["entropy"], c["mask"])
        hard = ppo_clip_loss(c["logp"], c["old_logp"], c["adv"], gate)[0] * gate.sum() / c["mask"].sum().clamp(min=1)
        assert call(c, phi=0)[0].item() == pytest.approx(hard.item(), abs=1e-6)
        divided = ppo_clip_loss(c["logp"], c["old_logp"], c["adv"], gate)[0].item()
        assert call(c, phi=0, normalize="weights")[0].item() == pytest.approx(divided, abs=1e-6)


def test_weights_that_are_all_zero_give_no_loss_under_either_normalisation():
    c = case(1)
    c["gate"] = torch.zeros_like(c["gate"])
    for normalize in ("tokens", "weights"):
        assert call(c, phi=0, gate=True, normalize=normalize)[0] == 0
        assert not slope_of(call, c, phi=0, gate=True, normalize=normalize).any()


def test_the_weight_is_a_scaled_advantage_of_the_same_sign():
    for seed in range(40):
        fixed = {"normalize": "tokens", "agg": "token-mean", "is_weights": False, "gate": False}
        c, o = case(seed, dtype=torch.float64), options_of(seed) | fixed | {"clip_low": 0.2, "clip_high": 0.2}
        scaled = torch.where(c["mask"], c["adv"], 0).clone()
        for at, w in weights_by_loop(c, o).items():
            assert 0 <= w <= 1
            scaled[at] *= w
        want = ppo_clip_loss(c["logp"], c["old_logp"], scaled, c["mask"])[0]
        assert torch.isclose(call(c, **o)[0], want, rtol=1e-12, atol=1e-15)


def test_a_gate_fixed_at_the_rollout_is_used_as_it_is():
    c = case(4)
    hard = entropy_gate(c["entropy"], c["mask"], quantile=0.5, scope="sequence")
    want, metrics = call(c, quantile=0.5, scope="sequence")
    for gate in (hard, torch.where(c["mask"], hard, math.nan), hard.bool(), hard.double()):
        loss, found = egspo_loss(*(c[n] for n in PPO), c["entropy"], gate=gate)
        assert torch.equal(loss, want)
        assert found | {"tau": 0} == metrics | {"tau": 0}
    state = RunningQuantile(0.8)
    running = entropy_gate(c["entropy"], c["mask"], scope="running", state=state)
    assert torch.equal(egspo_loss(*(c[n] for n in PPO), c["entropy"], gate=running)[0], call(c)[0])


def test_nothing_flows_into_the_other_inputs_and_none_is_changed():
    c = case(2)
    for x in c.values():
        if x.is_floating_point():
            x.requires_grad_()
    before = {name: x.detach().clone() for name, x in c.items()}
    for phi in (0.3, "chord", "chord-state"):
        loss, _ = call(c, phi=phi, gate=True, is_weights=True, energy=True)
        names = [n for n in c if n != "mask"]
        grads = dict(zip(names, torch.autograd.grad(loss, [c[n] for n in names], allow_unused=True), strict=True))
        assert [n for n in names if grads[n] is not None] == ["logp"]
    assert all(torch.equal(torch.nan_to_num(before[n]), torch.nan_to_num(c[n].detach())) for n in c)


def test_what_stands_under_the_mask_leaves_no_trace():
    for seed in range(20):
        c, o = case(seed), options_of(seed) | {"energy": True}
        clean = {n: torch.where(c["mask"], x, 0) if n != "mask" else x for n, x in c.items()}
        (loss, metrics), (again, same) = call(c, **o), call(clean, **o)
        assert torch.equal(loss, again) and metrics == same
        assert torch.equal(slope_of(call, c, **o), slope_of(call, clean, **o))


def test_without_valid_tokens_the_loss_is_zero():
    for shape in ((2, 3), (0, 3), (2, 0)):
        x, mask = torch.full(shape, math.nan, requires_grad=True), torch.zeros(shape)
        for more in ({}, {"gate": x.detach()}, {"scope": "sequence"}, {"normalize": "weights"}, {"phi": "chord"}):
            loss, metrics = egspo_loss(x, x, x, mask, x, **more)
            assert loss == 0 and (torch.autograd.grad(loss, x)[0] == 0).all()
            assert all(metrics[n] == 0 for n in ("gate_share", "tau", "mean_entropy_high", "mean_entropy_low", "clip_share_low"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_narrow_inputs_are_summed_in_float32_and_float64_stays(dtype):
    for seed in range(6):
        c = {n: x.to(dtype) if x.is_floating_point() else x for n, x in case(seed).items()}
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        up = {n: x.to(wide) if x.is_floating_point() else x for n, x in c.items()}
        for phi in (0.1, "chord"):
            loss, metrics = call(c, phi=phi)
            assert loss.dtype == wide and torch.equal(loss, call(up, phi=phi)[0])
            assert metrics == call(up, phi=phi)[1]


@pytest.mark.parametrize("given_gate", [False, True])
def test_metrics_are_means_over_high_and_low_tokens(given_gate):
    for seed in range(20):
        c = case(seed)
        _, m = call(c, quantile=0.6, gate=given_gate, energy=True)
        g = torch.where(c["mask"], c["gate"], 0) if given_gate else torch.tensor(gates_by_loop(c, 0.6, "batch"))
        sums = {name: [0.0, 0.0] for name in ("n", "H", "held", "power")}
        for i, t in c["mask"].nonzero().tolist():
            r, a = math.exp(float(c["logp"][i, t]) - float(c["old_logp"][i, t])), float(c["adv"][i, t])
            values = {"n": 1.0, "H": float(c["entropy"][i, t]), "held": float(r > 1.2 if a > 0 else r < 0.8),
                      "power": float(c["energy"][i, t]) * a**2}
            for name, v in values.items():
                sums[name][0] += float(g[i, t]) * v
                sums[name][1] += (1 - float(g[i, t])) * v
        def over(a: float, b: float) -> float:
            return a / b if b > 1e-9 else 0.0
        (h, lo), both = sums["n"], sum(sums["n"])
        want = {"gate_share": over(h, both), "mean_entropy_high": over(sums["H"][0], h), "mean_entropy_low": over(sums["H"][1], lo),
                "clip_share_high": over(sums["held"][0], h), "clip_share_low": over(sums["held"][1], lo),
                "energy_share_high": over(sums["power"][0], sum(sums["power"]))}
        assert {n: m[n] for n in want} == pytest.approx(want, rel=1e-4, abs=1e-5)
        valid = c["entropy"][c["mask"]]
        opened = c["entropy"][c["mask"] & (c["gate"] >= 0.5)]
        tau = (float(opened.min()) if len(opened) else 0) if given_gate else float(valid.quantile(0.6)) if len(valid) else 0
        assert m["tau"] == pytest.approx(tau, rel=1e-5)
        assert "energy_share_high" not in call(c)[1]
        assert m.items() >= ppo_clip_loss(*(c[n] for n in PPO))[1].items()


def test_the_threshold_of_rows_is_reported_as_their_mean():
    c = case(3)
    rows = [c["entropy"][i][c["mask"][i]] for i in range(4) if c["mask"][i].any()]
    want = np.mean([float(row.quantile(0.3)) for row in rows])
    assert call(c, quantile=0.3, scope="sequence")[1]["tau"] == pytest.approx(want, rel=1e-5) and len(rows) == 3


def test_a_constant_advantage_moves_nothing_on_average_unless_the_weight_sees_the_token():
    pi = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    one, moments = torch.ones(3, 1).double(), tuple(pi.pow(k).sum().expand(3, 1) for k in (2, 3))
    for phi, want in (("chord", [0.0154, -0.0056, -0.0098]), ("chord-state", [0, 0, 0]), (0.4, [0, 0, 0])):
        z = pi.log().requires_grad_()
        logp = z.log_softmax(0)[:, None]
        loss, _ = egspo_loss(logp, logp, one, one, one, phi=phi, gate=0 * one, moments=moments, is_weights=3 * pi[:, None])
        assert (-torch.autograd.grad(loss, z)[0]).tolist() == pytest.approx(want, abs=1e-15)


ONE = torch.ones(2, 3)
GOOD = dict(logp=0 * ONE, old_logp=0 * ONE, adv=ONE, mask=ONE, entropy=ONE)


@pytest.mark.parametrize(("change", "message"), [
    (dict(phi=1.5), r"phi must be in \[0, 1\], got 1.5"), (dict(phi="p"), "unknown phi 'p'"), (dict(phi="chord-state"), "needs moments"),
    (dict(quantile=-1), r"quantile must be in \[0, 1\], got -1"), (dict(scope="turn"), "unknown scope 'turn', use one of 'batch'"),
    (dict(scope="running"), "scope 'running' and a state belong together"), (dict(clip_low=1.0), r"clip_low must be in \[0, 1\), got 1.0"),
    (dict(clip_high=-0.1), "clip_high .* got -0.1"), (dict(clip_high=1), r"clip_high must be in \[0, 1\), got 1"),
    (dict(agg="mean"), "unknown aggregation 'mean'"), (dict(normalize="mean"), "unknown normalize 'mean', use one of 'tokens', 'weights'"),
    (dict(gate=2 * ONE), r"gate must be in \[0, 1\] \(got min 2, max 2\)"), (dict(gate=-ONE), r"gate .* \(got min -1, max -1\)"),
    (dict(gate=ONE * math.nan), r"gate must be in \[0, 1\] \(got min nan"), (dict(gate=ONE[:1]), r"gate has shape \(1, 3\), mask \(2, 3\)"),
    (dict(entropy=-ONE), r"entropy must be non-negative \(got min -1\)"), (dict(entropy=ONE * math.nan), "entropy contain non-finite"),
    (dict(entropy=ONE[:, :1]), r"entropy has shape \(2, 1\), mask \(2, 3\)"), (dict(mask=ONE / 2), "mask must contain only 0 and 1"),
    (dict(logp=ONE[:, :1], phi="chord"), r"logp has shape \(2, 1\), mask \(2, 3\)"), (dict(logp=ONE / 0), "logp contain non-finite"),
    (dict(adv=ONE / 0), "adv contain non-finite"), (dict(old_logp=ONE[:1]), r"old_logp has shape \(1, 3\)"),
    (dict(energy=ONE / 0), "energy contain non-finite"), (dict(energy=ONE[:1]), r"energy has shape \(1, 3\)"),
    (dict(phi="chord-state", moments=(ONE / 0, ONE)), "sum_sq contain non-finite"),
    (dict(phi="chord-state", moments=(ONE, ONE[:1])), r"sum_cube has shape \(1, 3\), mask \(2, 3\)"),
    (dict(is_weights=ONE[:, :2]), r"is_weights has shape \(2, 2\)")])
def test_the_loss_refuses_bad_input_and_says_why(change, message):
    with pytest.raises(ValueError, match=message):
        egspo_loss(**(GOOD | change))


@pytest.mark.parametrize("name", ["logp", "mask", "entropy", "adv", "energy", "gate"])
def test_what_is_no_tensor_is_refused_by_its_name(name):
    with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got list"):
        egspo_loss(**(GOOD | {name: [[1.0] * 3] * 2}))
    with pytest.raises(TypeError, match="rl_loss must be a torch.Tensor, got float"):
        chord_loss(0.5, ONE, ONE, mu=0.1)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 50), st.integers(0, 50), st.floats(0, 1), st.floats(0, 1), st.integers(0, 200))
def test_the_schedule_is_its_closed_form_with_exact_ends(warmup, decay, peak, valley, step):
    mu = mu_schedule(step, warmup=warmup, decay=decay, peak=peak, valley=valley)
    if step < warmup:
        assert mu == pytest.approx(peak * step / warmup)
    elif step < warmup + decay:
        assert mu == pytest.approx(valley + (peak - valley) / 2 * (1 + math.cos(math.pi * (step - warmup) / decay)), abs=1e-12)
    else:
        assert mu == valley
    if decay:
        assert mu_schedule(warmup, warmup=warmup, decay=decay, peak=peak, valley=valley) == peak
    assert mu_schedule(0, warmup=warmup, decay=1, peak=peak, valley=valley) == (0 if warmup else peak)


def test_imitation_is_the_weighted_mean_over_all_expert_tokens():
    for seed in range(20):
        c = case(seed)
        leaf, rl = c["logp"].clone().requires_grad_(), torch.tensor(0.7, requires_grad=True)
        for mu, phi in ((0.0, True), (0.3, True), (0.3, False), (1.0, True)):
            loss, m = chord_loss(rl, leaf, c["mask"], mu=mu, phi=phi)
            x = [float(v) for v in c["logp"][c["mask"]]]
            w = [math.exp(v) * (1 - math.exp(v)) if phi else 1.0 for v in x]
            sft, n = -sum(a * b for a, b in zip(w, x, strict=True)) / max(1, len(x)), max(1, len(x))
            assert loss.item() == pytest.approx((1 - mu) * 0.7 + mu * sft, abs=1e-6)
            assert m == pytest.approx({"mu": mu, "sft_loss": sft, "expert_nll": -sum(x) / n, "expert_tokens": len(x)}, abs=1e-6)
            to_rl, to_expert = torch.autograd.grad(loss, (rl, leaf))
            assert to_rl.item() == pytest.approx(1 - mu) and (to_expert[~c["mask"]] == 0).all()
            assert to_expert[c["mask"]].tolist() == pytest.approx([-mu * v / n for v in w], abs=1e-7)
    assert torch.equal(chord_phi(torch.tensor([[math.log(0.5), 0.0, -math.inf]])), torch.tensor([[0.25, 0.0, 0.0]]))


@pytest.mark.parametrize(("call_it", "message"), [
    (lambda: chord_loss(torch.zeros(()), ONE, ONE, mu=-0.1), r"mu must be in \[0, 1\], got -0.1"),
    (lambda: chord_loss(torch.zeros(1), ONE, ONE, mu=0.1), r"rl_loss must be a scalar, got shape \(1,\)"),
    (lambda: chord_loss(torch.zeros(()), ONE, 2 * ONE, mu=0.1), "mask must contain only 0 and 1"),
    (lambda: chord_loss(torch.zeros(()), ONE / 0, ONE, mu=0.1), "logp contain non-finite"),
    (lambda: mu_schedule(-1, warmup=1, decay=1, peak=1, valley=0), "step must be >= 0, got -1"),
    (lambda: mu_schedule(1, warmup=-1, decay=1, peak=1, valley=0), "warmup must be >= 0, got -1"),
    (lambda: mu_schedule(1, warmup=1, decay=-2, peak=1, valley=0), "decay must be >= 0, got -2"),
    (lambda: mu_schedule(1, warmup=1, decay=1, peak=1.5, valley=0), r"peak must be in \[0, 1\], got 1.5"),
    (lambda: mu_schedule(1, warmup=1, decay=1, peak=1, valley=math.nan), r"valley must be in \[0, 1\], got nan"),
    (lambda: measure("tpu"), "device must be 'cpu' or 'cuda', got 'tpu'")])
def test_the_other_functions_refuse_bad_input_and_say_why(call_it, message):
    with pytest.raises(ValueError, match=message):
        call_it()


def test_the_cost_of_gate_and_entropy_is_measured_inside_updates():
    torch.set_num_threads(1)
    model = TinyLM(17)
    before = [p.detach().clone() for p in model.parameters()]
    row, = module._overhead_rows("cpu", model, (16, 4, (6, 2)), 3, "cpu")
    assert row["name"] == "overhead_cpu_64" and row["tokens"] == 64 and row["rounds"] == 3 and row["parameters"] > 70_000
    parts = ("ppo_ms", "gate_ms")
    assert row["low"] <= row["measured"] <= row["high"] and all(0 < row[name] < row["update_ms"] for name in parts)
    assert row["weights_ms"] < row["update_ms"] and row["unit"] == "% of an update" and row["bound"] == 0.5
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_gate_and_loss_are_timed_beside_their_peers():
    names = [row["name"] for row in module._gate_rows("cpu", (8, 8), 2, "cpu")]
    assert names == ["gate_cpu_64", "select_ours_cpu_64", "select_sort_cpu_64", "select_kthvalue_cpu_64"]
    rows = module._loss_rows("cpu", (8, 8), 2, "cpu", False)
    assert [row["name"] for row in rows] == ["loss_own_eager_cpu_64", "loss_given_eager_cpu_64"]
    assert all(row["measured"] > 0.5 and row["peer"] > 0 for row in rows)


def test_a_part_that_fails_leaves_the_other_rows(monkeypatch, capsys):
    def parts():
        yield lambda: [{"name": "a", "measured": 1.0, "unit": "ms"}]
        yield lambda: [][0]
        yield lambda: [{"name": "b", "measured": 2.0, "unit": "ms"}]

    monkeypatch.setattr(module, "_cpu_parts", parts)
    assert [row["name"] for row in measure("cpu")] == ["a", "b"]
    out = capsys.readouterr()
    assert "IndexError" in out.err and '"name": "a"' in out.out


def test_the_parts_on_a_cpu_use_one_thread_and_at_least_4096_tokens():
    parts = list(module._cpu_parts())
    assert torch.get_num_threads() == 1
    rows = [part.args[2][0] * sum(part.args[2][2]) // 2 for part in parts if part.func is module._overhead_rows]
    assert len(parts) == 5 and min(rows) >= 4096


@pytest.mark.parametrize("phi", [0.1, "chord", None])
def test_the_switch_of_chord_loss_is_a_bool(phi):
    loss = getattr(chord_loss, "__wrapped__", chord_loss)
    with pytest.raises(TypeError, match=r"phi is a switch here, True or False, got"):
        loss(torch.tensor(0.5), -torch.ones(1, 2), torch.ones(1, 2), mu=0.1, phi=phi)
