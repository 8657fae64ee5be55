"""Token statistics: float64 definitions as reference, gradients for every tiling, edges, dtypes, models, bad input."""
import math
from functools import partial
from itertools import pairwise, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config

from collai.core.tinylm import TinyLM
from collai.rl import stats
from collai.rl.stats import TokenStats, linear_token_stats, model_token_stats, token_stats

QUICK = settings(deadline=None, derandomize=True, max_examples=12)
FIELDS = ("logp", "entropy", "sum_sq", "energy", "sum_cube")


def definitions(z, ids):
    """The five fields of float64 logits, sums for the energy without the sampled token."""
    z = z.double()
    log_p = z.log_softmax(-1)
    p, at = log_p.exp(), ids[..., None]
    others = p.scatter(-1, at, 0.0)
    sampled = p.gather(-1, at)[..., 0]
    entropy = -torch.where(p > 0, p * log_p, 0).sum(-1)
    energy = others.sum(-1) ** 2 + (others**2).sum(-1)
    return log_p.gather(-1, at)[..., 0], entropy, others.square().sum(-1) + sampled**2, energy, (p**3).sum(-1)


def case(n=9, d=8, vocab=50, seed=0, spread=1.0):
    """Hidden states, head, bias, ids and three rows of gains, float64."""
    rng = torch.Generator().manual_seed(seed)
    h, w, b, gains = (torch.randn(*s, generator=rng, dtype=torch.float64) for s in ((n, d), (vocab, d), (vocab,), (3, n)))
    return h, spread * w, b, torch.randint(vocab, (n,), generator=rng), gains


def logits_of(h, w, b, softcap, temperature):
    x = h @ w.T + b
    return (x if softcap is None else softcap * torch.tanh(x / softcap)) / temperature


def distance(found, exact):
    """Relative error, norm over norm."""
    return float((found.double() - exact).norm() / exact.norm())


def gradients(h, w, b, ids, gains, dtype=torch.float32, **kw):
    """Fields, and gradients in hidden, head and bias of the first three weighted with gains."""
    leaves = [x.to(dtype).requires_grad_() for x in (h, w, b)]
    found = linear_token_stats(leaves[0], leaves[1], ids, bias=leaves[2], **kw)
    loss = sum((g.float() * x).sum() for g, x in zip(gains, found, strict=False) if x is not None)
    return found, torch.autograd.grad(loss, leaves)


def exact_gradients(h, w, b, ids, gains, softcap=None, temperature=1.0):
    leaves = [x.clone().requires_grad_() for x in (h, w, b)]
    found = definitions(logits_of(*leaves, softcap, temperature), ids)
    return torch.autograd.grad(sum((g * x).sum() for g, x in zip(gains, found, strict=False)), leaves)


@QUICK
@given(st.integers(2, 60), st.integers(1, 12), st.sampled_from([0.1, 1.0, 4.0]), st.sampled_from([None, 2.0, 30.0]),
       st.sampled_from([0.3, 1.0, 2.0]), st.integers(0, 99))
def test_fields_are_those_of_the_definitions(vocab, n, spread, softcap, temperature, seed):
    h, w, b, ids, _ = case(n, 4, vocab, seed, spread)
    z = logits_of(h, w, b, softcap, temperature)
    exact = definitions(z, ids)
    fused = linear_token_stats(h, w, ids, bias=b, softcap=softcap, temperature=temperature, outputs=TokenStats._fields)
    dense = token_stats(z * temperature, ids, temperature=temperature)
    for name, true in zip(FIELDS, exact, strict=True):
        for found in (getattr(fused, name), getattr(dense, name)):
            assert found.dtype == torch.float32 and found.shape == ids.shape
            torch.testing.assert_close(found.double(), true, rtol=1e-6, atol=1e-30 if name == "energy" else 1e-6)
    torch.testing.assert_close(fused.hidden_sq.double(), h.square().sum(1), rtol=1e-6, atol=0)
    assert dense.hidden_sq is None


@pytest.mark.parametrize(("token_chunk", "vocab_chunk"), [(1, 1), (1, 20), (2, 7), (5, 19), (5, 20), (1024, 8192)])
@pytest.mark.parametrize(("softcap", "temperature"), [(None, 1.0), (3.0, 0.7)])
def test_gradients_agree_with_float64_autograd_for_every_tile(token_chunk, vocab_chunk, softcap, temperature):
    data = case(5, 8, 20)
    options = {"softcap": softcap, "temperature": temperature}
    exact = exact_gradients(*data, **options)
    _, found = gradients(*data, token_chunk=token_chunk, vocab_chunk=vocab_chunk, **options)
    assert max(map(distance, found, exact)) <= 2e-6
    _, found = gradients(*data, dtype=torch.float64, token_chunk=token_chunk, vocab_chunk=vocab_chunk, **options)
    assert all(g.dtype == torch.float64 for g in found) and max(map(distance, found, exact)) <= 2e-7


@pytest.mark.parametrize("field", ["logp", "entropy", "sum_sq"])
def test_gradients_of_one_field_alone(field):
    h, w, b, ids, gains = case(seed=1)
    gains = torch.stack([g * (name == field) for name, g in zip(FIELDS, gains, strict=False)])
    exact = exact_gradients(h, w, b, ids, gains)
    found = gradients(h, w, b, ids, gains)[1]
    assert max(map(distance, found, exact)) <= 2e-6
    chosen = gradients(h, w, b, ids, gains, outputs=(field,))
    assert [f for f in TokenStats._fields if getattr(chosen[0], f) is not None] == [field]
    assert max(map(distance, chosen[1], exact)) <= 2e-6


def test_gradients_of_flat_and_of_certain_distributions_keep_their_digits():
    """ln π + H of a flat distribution, and 1 − π of a certain one, are small differences of large numbers."""
    rng = torch.Generator().manual_seed(3)
    flat, sure = (torch.randn(4, 5000, generator=rng) * s for s in (0.1, 1.0))
    ids = torch.randint(5000, (4,), generator=rng)
    sure[range(4), ids] += 30.0
    for z, row in product((flat, sure), range(3)):
        leaf, exact = z.clone().requires_grad_(), z.double().requires_grad_()
        found = token_stats(leaf, ids)[row].sum()
        true = definitions(exact, ids)[row].sum()
        assert distance(torch.autograd.grad(found, leaf)[0], torch.autograd.grad(true, exact)[0]) <= 1e-5


@pytest.mark.parametrize("gap", [0.0, 5.0, 9.0, 15.0, 20.0, 30.0, 43.0])
@pytest.mark.parametrize("vocab_chunk", [64, 8192])
def test_the_energy_is_accurate_at_large_gaps(gap, vocab_chunk):
    rng = torch.Generator().manual_seed(4)
    z = torch.randn(32, 1000, generator=rng)
    ids = torch.randint(1000, (32,), generator=rng)
    z[range(32), ids] = z.scatter(1, ids[:, None], -math.inf).logsumexp(1) + gap
    exact = definitions(z, ids)[3]
    h = torch.cat([torch.eye(32), torch.zeros(32, 1)], 1)
    for found in (token_stats(z, ids).energy,
                  linear_token_stats(h, torch.cat([z.T, torch.ones(1000, 1)], 1), ids, vocab_chunk=vocab_chunk).energy):
        assert float(((found.double() - exact) / exact).abs().max()) <= 2e-5 and (found > 0).all()


def test_log_probability_and_entropy_of_a_certain_token_keep_their_digits():
    z = torch.tensor([[25.0, 0.0, 1.0]])
    found = token_stats(z, torch.tensor([0]))
    q = (1 + math.e) * math.exp(-25)
    rest = math.log(1 + math.e) - math.e / (1 + math.e)
    assert math.isclose(found.logp, -q, rel_tol=1e-6)
    assert math.isclose(found.entropy, q * (1 - math.log(q) + rest), rel_tol=1e-6)


def test_masked_positions_leave_no_trace():
    h, w, b, ids, gains = case()
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 0])
    bad = h.clone()
    bad[1], bad[4], bad[8] = math.nan, math.inf, math.nan
    odd = ids.masked_fill(mask == 0, -100)
    keep = mask == 1
    for kind in (torch.bool, torch.int64, torch.float32):
        for chunk in (1, 4, 100):
            found, grads = gradients(bad, w, b, odd, gains, mask=mask.to(kind), token_chunk=chunk, vocab_chunk=13,
                                     outputs=TokenStats._fields)
            clean, true = gradients(h[keep], w, b, ids[keep], gains[:, keep], outputs=TokenStats._fields)
            for x, y in zip(found, clean, strict=True):
                assert (x[~keep] == 0).all()
                torch.testing.assert_close(x[keep], y, rtol=1e-5, atol=1e-6)
            assert (grads[0][~keep] == 0).all()
            torch.testing.assert_close(grads[0][keep], true[0], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(grads[1:], true[1:], rtol=1e-4, atol=1e-6)


def test_masked_logits_leave_no_trace():
    z = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    z[1, 2] = math.nan
    leaf, ids = z.clone().requires_grad_(), torch.tensor([[0, 1, 2], [3, 4, 99]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    found = token_stats(leaf, ids, mask=mask)
    (found.logp + found.entropy + found.sum_sq).sum().backward()
    assert all(x[1, 2] == 0 for x in found if x is not None)
    assert (leaf.grad[1, 2] == 0).all() and leaf.grad.isfinite().all() and (leaf.grad[0] != 0).all()


def test_nothing_valid_gives_zeros():
    h, w, _, ids, _ = case()
    h.requires_grad_()
    found = linear_token_stats(h, w, ids, mask=torch.zeros_like(ids), outputs=TokenStats._fields)
    assert all((x == 0).all() for x in found)
    found.logp.sum().backward()
    assert (h.grad == 0).all()


def test_a_nan_that_is_not_masked_is_seen():
    found = token_stats(torch.tensor([[0.0, math.nan, 1.0]]), torch.tensor([0]))
    assert all(x.isnan().all() for x in found if x is not None)


def test_minus_infinity_is_a_legal_logit():
    h, w, b, _, _ = case(4)
    b[[2, 7]] = -math.inf
    ids = torch.tensor([2, 3, 7, 4])
    gains = torch.tensor([[0, 1, 0, 1.0], [1] * 4, [1] * 4])  # of logp only where it is finite
    found, grads = gradients(h, w, b, ids, gains, outputs=FIELDS, vocab_chunk=7)
    assert found.logp[[0, 2]].tolist() == [-math.inf] * 2 and found.logp[[1, 3]].isfinite().all()
    assert all(x.isfinite().all() for x in found[1:] if x is not None) and all(g.isfinite().all() for g in grads)
    exact = definitions(h @ w.T + b, ids)
    for name, true in zip(FIELDS[1:], exact[1:], strict=True):
        torch.testing.assert_close(getattr(found, name).double(), true, rtol=1e-5, atol=1e-6)


def test_a_token_without_rivals_is_certain():
    for z in (torch.tensor([[3.0]]), torch.tensor([[3.0, -math.inf]])):
        found = token_stats(z, torch.tensor([0]))
        assert [float(x) for x in found if x is not None] == [0.0, 0.0, 1.0, 0.0, 1.0]


def test_empty_ids_give_empty_fields():
    h, w, b, ids, _ = case()
    for shape in ((0,), (3, 0), (0, 2)):
        leaf = h.new_zeros((*shape, 8)).requires_grad_()
        found = linear_token_stats(leaf, w, ids[:0].view(shape), bias=b, outputs=TokenStats._fields)
        assert all(x.shape == shape and x.dtype == torch.float32 for x in found)
        found.logp.sum().backward()
        assert leaf.grad.shape == leaf.shape
        assert token_stats(h.new_zeros((*shape, 5)), ids[:0].view(shape)).energy.shape == shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_are_not_rounded_on_the_way(dtype):
    h, w, b, ids, gains = (x if i == 3 else x.to(dtype).double() for i, x in enumerate(case(16, 32, 300)))
    exact = definitions(h @ w.T + b, ids)
    found, grads = gradients(h, w, b, ids, gains, dtype=dtype)
    for x, y in zip(found[:4], exact, strict=False):
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=2e-5)
    for g, true in zip(grads, exact_gradients(h, w, b, ids, gains), strict=True):
        assert g.dtype == dtype and distance(g, true) <= 2 * torch.finfo(dtype).eps
    leaf = (h @ w.T).to(dtype).requires_grad_()
    token_stats(leaf, ids).logp.sum().backward()
    assert leaf.grad.dtype == dtype


def test_autocast_changes_nothing():
    h, w, b, ids, gains = case()
    plain = gradients(h, w, b, ids, gains)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = gradients(h, w, b, ids, gains)
    assert all(torch.equal(x, y) for x, y in zip((*plain[0][:4], *plain[1]), (*cast[0][:4], *cast[1]), strict=True))


def test_weights_are_detached_and_inputs_are_left_alone():
    h, w, b, ids, gains = case()
    before = [x.clone() for x in (h, w, b, ids)]
    found, _ = gradients(h, w, b, ids, gains, outputs=TokenStats._fields)
    dense = token_stats((h @ w.T).requires_grad_(), ids)
    for name in TokenStats._fields:
        assert getattr(found, name).requires_grad == (name in ("logp", "entropy", "sum_sq"))
    assert dense.logp.requires_grad and not dense.energy.requires_grad
    linear_token_stats(h, w, ids, bias=b, softcap=2.0, temperature=0.5)
    z = h @ w.T
    kept = z.clone()
    token_stats(z, ids)
    assert torch.equal(z, kept) and all(torch.equal(x, y) for x, y in zip((h, w, b, ids), before, strict=True))


def test_frozen_parts_get_no_gradient():
    h, w, _, ids, _ = case()
    for leaf, other in ((h, w), (w, h)):
        leaf.requires_grad_()
        linear_token_stats(h, w, ids).logp.sum().backward()
        assert leaf.grad.abs().sum() > 0 and other.grad is None
        leaf.requires_grad_(False)
        leaf.grad = None


def test_second_derivatives_are_refused():
    z = torch.zeros(1, 3, requires_grad=True)
    first, = torch.autograd.grad(token_stats(z, torch.tensor([0])).logp.square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_any_leading_shape_and_integer_type():
    h, w, _, ids, _ = case(12)
    flat = linear_token_stats(h, w, ids)
    for kind in (torch.int32, torch.int16, torch.uint8):
        folded = linear_token_stats(h.view(2, 3, 2, 8).transpose(0, 1), w, ids.view(2, 3, 2).transpose(0, 1).to(kind))
        assert torch.equal(folded.logp.transpose(0, 1).reshape(-1), flat.logp)
    assert torch.equal(linear_token_stats(h[0], w, ids[0]).logp, linear_token_stats(h[:1], w, ids[:1]).logp[0])


@QUICK
@given(st.lists(st.integers(1, 29), max_size=6), st.integers(0, 99))
def test_states_of_pieces_merge_in_any_order(cuts, seed):
    rng = torch.Generator().manual_seed(seed)
    z = 10 * torch.randn(3, 30, generator=rng, dtype=torch.float64)
    z[torch.rand(3, 30, generator=rng) < 0.4] = -math.inf
    ids = torch.randint(30, (3,), generator=rng)
    wants = (True, True, True)
    whole = stats._fold(z.clone(), ids, wants)
    pieces = [stats._fold(z[:, a:b].clone(), ids - a, wants) for a, b in pairwise(sorted({0, *cuts, 30}))]
    assert torch.equal(stats._fold(z.clone(), ids, wants, fused=True), whole)
    while len(pieces) > 1:
        i = int(torch.randint(len(pieces) - 1, (), generator=rng))
        pieces.append(stats._merge(pieces.pop(i + 1), pieces.pop(i)))
    torch.testing.assert_close(pieces[0], whole, rtol=1e-12, atol=1e-12)


def test_the_compiled_backend_agrees(monkeypatch):
    """Traced and run without the C++ compiler, which takes 15 s; `measure` and the full notebook run that too."""
    monkeypatch.setattr(stats, "_compiled", lambda f: torch.compile(partial(f, fused=True), dynamic=True, backend="aot_eager"))
    data = case(40, 8, 600)
    plain = gradients(*data, softcap=5.0)
    compiled = gradients(*data, softcap=5.0, backend="compile")
    for x, y in zip((*plain[0][:4], *plain[1]), (*compiled[0][:4], *compiled[1]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_backends_that_do_not_work_here_say_why(monkeypatch):
    from torch._dynamo.exc import BackendCompilerFailed
    h, w, _, ids, _ = case()

    def fails(*_):
        raise BackendCompilerFailed(lambda: None, RuntimeError("no working C++ compiler found"), None)
    monkeypatch.setattr(stats, "_compiled", lambda _: fails)
    with pytest.raises(ValueError, match=r"backend 'compile' is not usable here: .*no working C\+\+ compiler found"):
        linear_token_stats(h, w, ids, backend="compile")
    monkeypatch.setattr(stats, "_triton_ready", lambda *_: "no GPU")
    with pytest.raises(ValueError, match="backend 'triton' is not usable here: no GPU"):
        linear_token_stats(h, w, ids, backend="triton")


def test_triton_gets_the_valid_rows_and_gives_gradients_to_all(monkeypatch):
    """The kernels themselves are tested in test_stats_triton.py; here they are replaced by plain torch."""
    h, w, b, ids, gains = case()
    mask = torch.arange(9) % 3 != 1
    plan = stats._Plan(1.0, None, 100, 100, "torch", (True, True, True))
    monkeypatch.setattr(stats, "_triton_ready", lambda *_: None)
    monkeypatch.setattr(stats, "_triton_forward", lambda h, w, b, ids, scale, cap, wants:
                        stats._linear_states(h, w, b, ids, None, plan))
    monkeypatch.setattr(stats, "_triton_backward", lambda h, w, b, ids, scale, cap, coef, needs:
                        stats._linear_gradients(h, w, b, ids, None, plan, coef, needs))
    for rows in (mask, None):
        found, expected = (gradients(h, w, b, ids, gains, mask=rows, backend=x) for x in ("triton", "torch"))
        for x, y in zip((*found[0][:4], *found[1]), (*expected[0][:4], *expected[1]), strict=True):
            torch.testing.assert_close(x, y)


def test_logits_are_never_stored():
    """Both passes stay far below the 39 MiB of the logits (and 78 of logits and probabilities)."""
    rng = torch.Generator().manual_seed(0)
    h, w = torch.randn(512, 4, generator=rng), torch.randn(20_000, 4, generator=rng)
    ids = torch.randint(20_000, (512,), generator=rng)
    h.requires_grad_()
    w.requires_grad_()

    def both():
        found = linear_token_stats(h, w, ids)
        return torch.autograd.grad((found.logp + found.entropy + found.sum_sq).sum(), (h, w))
    assert stats._peak(both, "cpu") < 12 * 2**20


# Models ---------------------------------------------------------------------------------------------------------------
def padded(vocab, rows=3, length=9, response=4):
    """Ids and attention of rows with prompts of several lengths, the last response one token short."""
    ids = torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(5))
    seen = torch.ones_like(ids)
    seen[0, :2], seen[1, :1], seen[2, -1] = 0, 0, 0
    return ids, seen, response


def check_model(model, **kw):
    ids, seen, n = padded(17)
    place = (seen.cumsum(1) - 1).clamp(min=0)
    dense = token_stats(model(ids, attention_mask=seen, position_ids=place).logits[:, -n - 1:-1], ids[:, -n:],
                        mask=seen[:, -n:], **kw)
    fused = model_token_stats(model, ids, seen, n, **kw)
    for x, y in zip(fused[:4], dense[:4], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert fused.logp.shape == (3, n) and fused.logp[2, -1] == 0 and (fused.logp[:2] < 0).all()
    fused.logp.sum().backward()
    assert model.get_output_embeddings().weight.grad.abs().sum() > 0


def test_the_tiny_model_is_scored_like_its_logits():
    check_model(TinyLM(17, hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=16), temperature=0.8)


def test_options_go_through_and_the_mask_may_be_another():
    model, (ids, seen, n) = TinyLM(17, hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=16), padded(17)
    mask = torch.zeros(3, n, dtype=torch.bool)
    mask[0, 1] = True
    found = model_token_stats(model, ids, seen, n, mask=mask, outputs=("logp", "hidden_sq"))
    assert found.entropy is None and torch.equal(found.logp != 0, mask) and torch.equal(found.hidden_sq > 0, mask)


class Scaled(torch.nn.Module):
    """A model that caps and scales its logits, with a bias in its head."""

    def __init__(self, config):
        super().__init__()
        self.config, self.table, self.head = config, torch.nn.Embedding(17, 6), torch.nn.Linear(6, 17)
        self.base_model = lambda ids, attention_mask, position_ids, use_cache: SimpleNamespace(
            last_hidden_state=self.table(ids) + position_ids[..., None])

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids, attention_mask, position_ids):
        get = self.config.get if isinstance(self.config, dict) else vars(self.config).get
        x = self.head(self.base_model(ids, attention_mask, position_ids, False).last_hidden_state)
        cap = get("final_logit_softcapping")
        x = x if cap is None else cap * torch.tanh(x / cap)
        return SimpleNamespace(logits=x * get("logit_scale", 1.0) / get("logits_scaling", 1.0))


@pytest.mark.parametrize("config", [{}, {"final_logit_softcapping": 0.5}, {"logit_scale": 0.25}, {"logits_scaling": 3.0},
                                    SimpleNamespace(final_logit_softcapping=0.5)])
def test_caps_and_scales_of_the_model_are_not_lost(config):
    check_model(Scaled(config), temperature=0.7)


# Bad input ------------------------------------------------------------------------------------------------------------
Z, A = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(("changes", "error", "text"), [
    ({"ids": A.float()}, TypeError, "ids must be integers, got torch.float32"),
    ({"ids": A.bool()}, TypeError, "ids must be integers, got torch.bool"),
    ({"ids": A + 5}, ValueError, r"ids must lie in \[0, 5\), got 5 at index \(0, 0\)"),
    ({"ids": A - torch.tensor([0, 0, 1])}, ValueError, r"ids must lie in \[0, 5\), got -1 at index \(0, 2\)"),
    ({"ids": A - torch.tensor([0, 0, 1]), "mask": torch.tensor([[1, 1, 0], [0, 0, 1]])}, ValueError,
     r"got -1 at index \(1, 2\)"),
    ({"ids": A[:1]}, ValueError, r"\(2, 3, 5\) and \(1, 3\)"),
    ({"mask": torch.full((2, 3), 0.5)}, ValueError, "mask must contain only 0 and 1, got 0.5"),
    ({"mask": torch.full((2, 3), math.nan)}, ValueError, "mask must contain only 0 and 1, got nan"),
    ({"mask": torch.ones(3)}, ValueError, r"mask has shape \(3,\), ids have shape \(2, 3\)"),
    ({"temperature": 0}, ValueError, "temperature must be positive and finite, got 0"),
    ({"temperature": -1.0}, ValueError, "temperature must be positive and finite, got -1.0"),
    ({"temperature": math.nan}, ValueError, "temperature must be positive and finite, got nan"),
])
def test_bad_calls_are_refused(changes, error, text):
    call = {"ids": A} | changes
    with pytest.raises(error, match=text):
        token_stats(Z, **call)
    with pytest.raises(error, match=text):
        linear_token_stats(Z, torch.zeros(5, 5), **call)


@pytest.mark.parametrize(("changes", "error", "text"), [
    ({"weight": torch.zeros(5, 4)}, ValueError, r"weight must be \(V, d\) with hidden \(..., d\), got \(5, 4\) and \(2, 3, 5\)"),
    ({"weight": torch.zeros(0, 5)}, ValueError, r"got \(0, 5\)"),
    ({"weight": torch.zeros(5, 5, dtype=torch.int64)}, TypeError, "weight must have a floating dtype, got torch.int64"),
    ({"hidden": Z.long()}, TypeError, "hidden must have a floating dtype, got torch.int64"),
    ({"bias": torch.zeros(4)}, ValueError, r"bias must be \(5,\), got \(4,\)"),
    ({"softcap": 0.0}, ValueError, "softcap must be positive and finite, got 0.0"),
    ({"token_chunk": 0}, ValueError, "token_chunk must be an integer >= 1, got 0"),
    ({"vocab_chunk": 2.5}, ValueError, "vocab_chunk must be an integer >= 1, got 2.5"),
    ({"backend": "cuda"}, ValueError, "unknown backend 'cuda', use one of 'auto', 'torch', 'compile', 'triton'"),
    ({"outputs": ("logp", "kl")}, ValueError, "unknown output 'kl', use one of 'logp', 'entropy', "),
])
def test_bad_heads_and_options_are_refused(changes, error, text):
    with pytest.raises(error, match=text):
        linear_token_stats(**{"hidden": Z, "weight": torch.zeros(5, 5), "ids": A} | changes)


def test_outputs_may_be_any_iterable_and_chunks_numbers_of_numpy():
    h, w, _, ids, _ = case()
    found = linear_token_stats(h, w, ids, outputs=iter(("logp", "hidden_sq")))
    assert torch.equal(found.logp, linear_token_stats(h, w, ids).logp) and found.hidden_sq is not None and found.entropy is None
    config.update("jaxtyping_disable", True)  # annotations say int
    try:
        small = linear_token_stats(h, w, ids, token_chunk=np.int64(2), vocab_chunk=np.int32(7))
    finally:
        config.update("jaxtyping_disable", False)
    assert torch.allclose(small.logp, found.logp, atol=1e-6)


def test_logits_must_be_floating_and_not_empty():
    with pytest.raises(TypeError, match="logits must have a floating dtype, got torch.int64"):
        token_stats(Z.long(), A)
    with pytest.raises(ValueError, match=r"\(2, 3, 0\)"):
        token_stats(Z[..., :0], A)


@pytest.mark.parametrize("n", [0, -1, 9, 20])
def test_the_response_must_be_shorter_than_the_row(n):
    ids, seen, _ = padded(17)
    with pytest.raises(ValueError, match=f"n_response must be in 1 … 8, got {n}"):
        model_token_stats(None, ids, seen, n)


def test_ids_and_attention_must_agree():
    ids, seen, n = padded(17)
    with pytest.raises(ValueError, match=r"must be \(B, L\), got \(3, 9\) and \(3, 8\)"):
        model_token_stats(None, ids, seen[:, 1:], n)
