"""True gradient norms, paired variances of group gradients, forward-only metrics."""
import numpy as np
import pytest
import torch

from collai.core.claims import load_results, save_results
from collai.core.tinylm import TinyLM
from collai.eval.stats import resample_counts
from collai.otb import variance
from collai.otb.variance import measure, paired_gradient_variance, token_gradient_norms, variance_metrics
from collai.rl.adv import Advantage, rloo_advantage
from collai.rl.buffer import Rollouts
from collai.rl.sample import generate
from collai.rl.stats import TokenStats, model_token_stats
from collai.rl.tasks import ChainSum
from collai.rl.train import warm_start

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return TinyLM(9, hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=16, seed=1)


def batch(groups=4, n=3, seed=0, tool=True):
    """Random rollouts of unequal length, one column of tool output, padded prompts, uids out of order."""
    rng = np.random.default_rng(seed)
    b = groups * n
    length = rng.integers(2, 7, b)
    column = np.arange(6)
    turn = np.where(column < length[:, None], (column > 2).astype(int), -1)
    mask = (turn >= 0) & ~((column == 2) & tool)
    rewards = np.zeros((b, 6), dtype=np.float32)
    rewards[np.arange(b), [np.flatnonzero(m)[-1] for m in mask]] = rng.random(b)
    prompt = np.ones((b, 4), dtype=int)
    prompt[::2, 0] = 0
    zero = torch.zeros(b, 6)
    return Rollouts(torch.from_numpy(rng.integers(0, 9, (b, 4))), torch.from_numpy(prompt),
                    torch.from_numpy(rng.integers(0, 9, (b, 6))), torch.from_numpy(mask.astype(int)),
                    [f"p{i % groups}" for i in range(b)], torch.from_numpy(turn), torch.from_numpy(rewards), zero,
                    energy=torch.from_numpy(rng.random((b, 6), dtype=np.float32)) * torch.from_numpy(mask))


def dense_logp(model, r):
    """Log-probabilities of the response from dense logits, one row at a time and without padding."""
    out = torch.zeros(r.ids.shape, dtype=torch.float64)
    for i in range(len(r.uid)):
        p, n = r.prompt_ids[i][r.prompt_mask[i] == 1], int((r.turn[i] >= 0).sum())
        z = model(torch.cat([p, r.ids[i, :n]])[None]).logits[0, len(p) - 1:-1]
        out[i, :n] = torch.log_softmax(z, -1).gather(1, r.ids[i, :n, None])[:, 0]
    return out


def flat(loss, model):
    return torch.cat([g.ravel() for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)])


# --- true norms ----------------------------------------------------------------------------------

def test_norms_are_those_of_plain_autograd(model):
    double, r = TinyLM(**model.config).double(), batch(2, 2)
    norms = token_gradient_norms(double, r)
    logp = dense_logp(double, r)
    for i in range(4):
        total = 0.0
        for t in range(6):
            if not r.mask[i, t]:
                assert norms.token[i, t] == norms.head[i, t] == norms.prefix[i, t] == 0
                continue
            s = flat(logp[i, t], double)
            total = total + s
            assert torch.isclose(norms.token[i, t], s @ s, rtol=1e-8)
            assert torch.isclose(norms.prefix[i, t], total @ total, rtol=1e-8)
            head = torch.autograd.grad(logp[i, t], double.get_output_embeddings().weight, retain_graph=True)[0]
            assert torch.isclose(norms.head[i, t], head.square().sum(), rtol=1e-8)


def test_energy_times_hidden_norm_is_the_norm_of_the_output_layer(model):
    double, r = TinyLM(**model.config).double(), batch()
    norms, valid = token_gradient_norms(double, r), r.mask.bool()
    stats = model_token_stats(double, *r.inputs(), 6, mask=r.mask, outputs=("energy", "hidden_sq"))
    assert torch.allclose((stats.energy * stats.hidden_sq).double()[valid], norms.head[valid], rtol=1e-5)
    assert (norms.token >= norms.head * (1 - 1e-12)).all()


def test_frozen_layers_are_left_out_and_a_frozen_head_is_refused(model):
    part, r = TinyLM(**model.config).double(), batch(2, 1)
    full = token_gradient_norms(part, r)
    part.base_model.requires_grad_(False)
    norms = token_gradient_norms(part, r)
    assert torch.allclose(norms.token, full.head, rtol=1e-9) and torch.equal(norms.token, norms.head)
    part.get_output_embeddings().weight.requires_grad_(False)
    with pytest.raises(ValueError, match="the output layer must require a gradient; 0 other weights do"):
        token_gradient_norms(part, r)


def test_rank_correlations_are_scipys_and_lie_in_their_intervals():
    from scipy.stats import spearmanr
    rng = np.random.default_rng(0)
    x, rows = rng.random(60).round(1), np.repeat(np.arange(12), 5)
    y = x + rng.random(60)
    (rho, lo, hi), (one, low, high) = variance._rank_correlations([(x, y), (x, 2 * x)], rows, 60)
    assert np.isclose(rho, spearmanr(x, y).statistic) and lo < rho < hi
    drawn = [np.repeat(np.arange(60), c) for c in resample_counts(12, 60)[:, rows]]
    slow = np.quantile([spearmanr(x[at], y[at]).statistic for at in drawn], [0.025, 0.975])
    assert np.allclose((lo, hi), slow, atol=1e-12)
    assert one == pytest.approx(1) and low == pytest.approx(1) and high == pytest.approx(1)


# --- paired variance -----------------------------------------------------------------------------

KINDS = {"rloo": {}, "plain": {"estimator": "grpo", "scale": "none"}, "loo": {"estimator": "otb", "leave_one_out": True},
         "mine": lambda rewards, mask, uid: rloo_advantage(rewards, mask, uid).advantages * 2,
         "energetic": lambda rewards, mask, uid, energy: energy * rewards.sum(1, keepdim=True)}


def test_variances_are_those_of_gradients_taken_one_by_one(model):
    r = batch()
    table = paired_gradient_variance(model, r, KINDS, n_boot=40)
    rows = table.to_dict("index")
    logp, names = dense_logp(model, r), sorted(set(r.uid))
    adv = {"rloo": rloo_advantage(r.rewards, r.mask, r.uid).advantages, "energetic": r.energy * r.rewards.sum(1, keepdim=True)}
    for name, a in adv.items():
        groups = [torch.tensor([u == v for u in r.uid]) for v in names]
        g = torch.stack([flat((a * r.mask * logp)[rows_].sum() / 3, model) for rows_ in groups])
        assert np.isclose(rows[name]["variance"], g.var(dim=0).sum().item(), rtol=1e-3), name
    assert list(rows) == list(KINDS) and rows["rloo"]["groups"] == 4
    assert rows["rloo"]["ratio"] == rows["rloo"]["ratio_hi"] == rows["rloo"]["scaled"] == rows["rloo"]["scale"] == 1
    assert rows["mine"]["ratio"] == pytest.approx(4, rel=1e-4) and rows["mine"]["ratio_lo"] == pytest.approx(4, rel=1e-4)
    assert rows["mine"]["scale"] == pytest.approx(2, rel=1e-4) and rows["mine"]["scaled_hi"] == pytest.approx(1, rel=1e-4)
    assert rows["plain"]["scale"] == pytest.approx(2 / 3, rel=1e-4) and rows["plain"]["scaled"] == pytest.approx(1, rel=1e-4)


def test_the_bootstrap_is_paired_and_centred():
    g = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 10, 30)) + 0.5).float()
    counts = np.random.default_rng(1).multinomial(10, np.full(10, 0.1), 4000)
    w = np.concatenate([np.ones((1, 10)), counts])
    gram = (g[1] @ g[1].T).double().numpy()
    values, product = variance._moments(gram, gram, w)
    copies = [np.repeat(g[1].double().numpy(), c, axis=0) for c in counts[:20]]
    direct = [np.cov(x.T).trace() * 10 / 9 for x in copies]
    apart = ~np.eye(10, dtype=bool)
    pairs = [np.average(gram[apart], weights=np.outer(c, c)[apart]) for c in counts[:20]]
    assert np.allclose(values[1:21], direct) and np.allclose(product[1:21], pairs)
    assert np.isclose(product[0], (gram.sum() - np.trace(gram)) / 90)
    assert np.isclose(values[0], np.cov(g[1].double().numpy().T).trace())
    assert abs(values[1:].mean() / values[0] - 1) < 5 * values[1:].std() / values[0] / np.sqrt(4000)
    row = variance._table(torch.stack([g[0], g[0] * 3]), w)[1]
    assert row["ratio_lo"] == pytest.approx(9, rel=1e-5) and row["ratio_hi"] == pytest.approx(9, rel=1e-5)


def test_the_scale_has_no_bias_from_the_noise():
    """Means (1, 0) and (0.5, 0), noise that two estimators share: the product of averages would give a scale near 1."""
    rng = np.random.default_rng(0)
    noise = 6 * rng.normal(size=(3000, 8, 5))
    scales = []
    for x in noise:
        a, b = x + np.eye(5)[0], x + 0.5 * np.eye(5)[0]
        scales.append([variance._moments(a @ a.T, y @ a.T, np.ones((1, 8)))[1][0] for y in (a, b)])
    size, product = np.mean(scales, axis=0)
    spread = np.std(scales, axis=0) / np.sqrt(3000)
    assert abs(size - 1) < 5 * spread[0] < 5 and abs(product - 0.5) < 5 * spread[1] < 5
    biased = np.mean([(x.mean(0) + np.eye(5)[0]) @ (x.mean(0) + np.eye(5)[0]) for x in noise])
    assert biased > 20


def test_names_alone_are_taken_and_a_lone_name(model):
    table = paired_gradient_variance(model, batch(), ("rloo", "otb"), n_boot=5)
    assert list(table.index) == ["rloo", "otb"] and table["groups"].tolist() == [4, 4]
    assert table.equals(paired_gradient_variance(model, batch(), {"rloo": {}, "otb": {}}, n_boot=5))
    assert list(paired_gradient_variance(model, batch(), "otb", n_boot=5).index) == ["otb"]


def test_a_batch_in_which_nothing_is_learned_gives_nan_not_an_error(model):
    r = batch(3, 2)
    r.rewards.zero_()
    table = paired_gradient_variance(model, r, {"rloo": {}, "otb": {}}, n_boot=10)
    assert table.loc["rloo", "variance"] == 0 and np.isnan(table.loc["otb", "ratio"]) and np.isnan(table.loc["otb", "scaled_lo"])


def test_inputs_are_not_changed(model):
    r = batch()
    before = [x.clone() for x in (r.rewards, r.energy, r.ids, *model.parameters())]
    training = model.training
    paired_gradient_variance(model, r, {"otb": {}}, n_boot=5)
    assert all(torch.equal(a, b) for a, b in zip(before, (r.rewards, r.energy, r.ids, *model.parameters()), strict=True))
    assert all(p.grad is None for p in model.parameters()) and model.training is training


@pytest.mark.parametrize(("rows", "kinds", "text"), [
    (None, {}, "estimators is empty"), (None, [], "estimators is empty"), (None, {"best": {}}, "unknown advantage 'best'"),
    (None, {"otb": {"foo": 1}}, "unknown otb option 'foo', use one of 'is_weights', 'weighting'"),
    (None, {"x": {"estimator": "rloo", "foo": 1}}, "unknown rloo option 'foo'"),
    ([0], {"rloo": {}}, "a variance needs at least 2 groups, got 1"),
    (None, {"x": lambda rewards, mask, uid: mask[:1]}, r"estimator 'x' must give finite \(12, 6\), got \(1, 6\)"),
    (None, {"x": lambda rewards, mask, uid: rewards * float("nan")}, "estimator 'x' must give finite"),
])
def test_bad_requests_are_refused(model, rows, kinds, text):
    r = batch() if rows is None else batch().select(rows)
    with pytest.raises(ValueError, match=text):
        paired_gradient_variance(model, r, kinds)


def test_missing_energies_are_named(model):
    r = batch()
    r.energy = None
    assert len(paired_gradient_variance(model, r, {"rloo": {}}, n_boot=2)) == 1
    with pytest.raises(ValueError, match="estimator 'otb' takes energies, and the rollouts hold none"):
        paired_gradient_variance(model, r, {"otb": {}})


def test_the_number_of_resamples_is_checked(model):
    with pytest.raises(ValueError, match="n_boot must be >= 1, got 0"):
        paired_gradient_variance(model, batch(), {"rloo": {}}, n_boot=0)


# --- metrics -------------------------------------------------------------------------------------

def test_metrics_are_the_formula_with_and_without_hidden_norms():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    adv = torch.tensor([[1.0, 3.0, 9.0], [-1.0, 9.0, 9.0]])
    energy, hidden = torch.tensor([[0.5, 0.25, 7.0], [1.0, 7.0, 7.0]]), torch.tensor([[2.0, 4.0, 1.0], [3.0, 1.0, 1.0]])
    stats = TokenStats(None, None, None, energy * mask)
    assert variance_metrics(stats, adv, mask, 0.5) == pytest.approx({"power": 2.0, "signal": 0.25, "noise": 1.75})
    full = variance_metrics(stats._replace(hidden_sq=hidden * mask), Advantage(adv, adv, adv), mask, 0.5)
    assert full == pytest.approx({"power": (4 * 2.0 + 3.0) / 2, "signal": 0.25, "noise": 5.25})


def test_metrics_estimate_the_noise_of_independent_rollouts(model):
    double, r = TinyLM(**model.config).double(), batch(12, 4, tool=False)  # every row has a prompt of its own
    adv, out = rloo_advantage(r.rewards, r.mask, r.uid), double.get_output_embeddings().weight
    logp = dense_logp(double, r)
    each = torch.stack([torch.autograd.grad(x, out, retain_graph=True)[0].ravel() for x in (adv.advantages * logp).sum(1)])
    assert torch.allclose(variance._head_gradients(double, r, adv.advantages), each, atol=1e-9)
    stats = model_token_stats(double, *r.inputs(), 6, mask=r.mask, outputs=("energy", "hidden_sq"))
    found = variance_metrics(stats, adv, r.mask, each.mean(0).norm().item())
    assert found["noise"] == pytest.approx(each.var(dim=0).sum().item() / len(each), rel=0.4)


def test_the_noise_by_groups_is_that_of_batches_of_new_prompts():
    """True noise over many batches of the shipped policy: by groups right, by rollouts far too small at N = 32."""
    task = ChainSum()
    model, tok = warm_start(task)
    problems = [task.sample(np.random.default_rng([9, i])) for i in range(96)]
    many = generate(model, tok, problems, n=32, max_new=task.max_new, seed=3)
    each = variance._head_gradients(model, many, rloo_advantage(many.rewards, many.mask, many.uid).advantages)
    means = each.view(12, 8 * 32, -1).mean(dim=1)  # twelve batches of eight prompts
    truth = means.var(dim=0).sum().item()
    found = [variance._noise(model, many.select(range(256 * i, 256 * i + 256)), 32, 10) for i in range(12)]
    by_groups, by_rollouts = (np.mean([r[name] for r in found]) for name in ("measured", "by_rollouts"))
    assert by_groups == pytest.approx(truth, rel=0.5) and by_rollouts < 0.4 * truth
    assert np.mean([r["forward"] for r in found]) == pytest.approx(by_rollouts, rel=0.2)


def test_metrics_need_energies():
    one = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"stats\.energy is None; name 'energy' among the outputs"):
        variance_metrics(TokenStats(None, None, None, None), one, one, 1.0)
    with pytest.raises(ValueError, match="grad_norm must be >= 0, got -1"):
        variance_metrics(TokenStats(None, None, None, one), one, one, -1.0)


def test_rows_of_the_measurement_can_be_stored(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="device must be 'cpu', got 'cuda'"):
        measure("cuda")
    sample = variance.generate
    monkeypatch.setattr(variance, "generate", lambda model, tok, problems, **kw: sample(model, tok, problems[:3], **kw))
    monkeypatch.setattr(variance, "_STUDY", {"rloo": {}, "otb": {}})
    assert variance._first(batch(), 1).uid == batch().uid[:1]
    ranks = variance._rank_correlations
    monkeypatch.setattr(variance, "_rank_correlations", lambda pairs, rows, n_boot: ranks(pairs, rows, 20))
    save_results(tmp_path / "x.json", measure("cpu"))
    rows = load_results(tmp_path / "x.json")["rows"]
    assert {"proxy_e", "proxy_W_h2", "noise_4", "noise_32", "variance_otb_4", "variance_rloo_32"} <= rows.keys()
    assert rows["variance_otb_4"]["groups"] == 3 and rows["noise_32"]["by_rollouts"] > 0
    assert rows["proxy_e"]["measured"] > 0.5
