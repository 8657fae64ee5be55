"""Importance of cache entries: the recorder on real model classes, loss curves, gap, fidelity, perturbation bound."""
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from collai.lukv import utility
from collai.lukv.utility import (
    UtilityRecorder,
    fidelity,
    loss_curve,
    optimality_gap,
    oracle_importance,
    perturbation_bound,
    rank_by_score,
)

QUICK = settings(deadline=None, derandomize=True, max_examples=40)
SIZES = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 6,
         "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "eos_token_id": None}
FAMILIES = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen3": (Qwen3ForCausalLM, Qwen3Config),
            "mistral": (MistralForCausalLM, MistralConfig)}
T, QUESTION, NEW = 37, 5, 9
IDS = torch.randint(1, 97, (1, T + QUESTION), generator=torch.Generator().manual_seed(3))


def make(family="llama", dtype=torch.float32, attn="sdpa", **sizes):
    """A random model with weights large enough for uneven attention."""
    cls, config = FAMILIES[family]
    torch.manual_seed(0)
    extra = {"sliding_window": None} if family == "mistral" else {}
    model = cls(config(**{**SIZES, **extra, **sizes}, attn_implementation=attn)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(6)
    return model.to(dtype)


def generate(model, ids=IDS, new=NEW, **kwargs):
    return model.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=0, **kwargs)


def naive(model, ids, rows, t=T, *, time="max", group="max", norm="layer", window=None):
    """Importance from full eager attention matrices of one pass over all tokens, in loops."""
    former = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(ids, output_attentions=True, use_cache=True)
    model.set_attn_implementation(former)
    layers = []
    for layer, attn in enumerate(out.attentions):
        values = out.past_key_values.layers[layer].values[0, :, :t].double()
        w = model.model.layers[layer].self_attn.o_proj.weight.detach().double()
        d, hq = values.shape[-1], attn.shape[1]
        g = hq // len(values)
        n = torch.stack([(w[:, q * d:(q + 1) * d] @ values[q // g].T).norm(dim=0) for q in range(hq)])
        layers.append((n, attn[0][:, rows, :t].double() * n[:, None], g))
    total = sum(n.sum() for n, _, _ in layers)
    found = []
    for n, weighted, g in layers:
        scale = {"layer": n.sum(), "global": total, "none": torch.tensor(1.0)}[norm]
        heads = torch.stack([weighted[j:j + g].amax(0) if group == "max" else weighted[j:j + g].mean(0)
                             for j in range(0, len(weighted), g)])
        found.append({"max": heads.amax(1), "sum": heads.sum(1), "mean": heads.mean(1)}[time] / scale)
    return torch.stack(found)


# --- recorder ------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("time", "group", "norm"), [("max", "max", "layer"), ("sum", "mean", "none"), ("mean", "max", "global")])
def test_recorder_equals_full_eager_attention(family, time, group, norm):
    model = make(family)
    with UtilityRecorder(model, T, reduce_time=time, reduce_group=group, norm=norm) as r:
        out = generate(model)
    u = r.result()
    want = naive(model, out, slice(T + QUESTION, T + QUESTION + NEW - 1), time=time, group=group, norm=norm)
    assert u.shape == (3, 2, T) and u.dtype == torch.float32
    assert torch.allclose(u.double(), want, rtol=2e-4, atol=1e-6 * float(want.max()))
    assert float(want.max() / want.mean()) > 1.8


@pytest.mark.parametrize("heads", [(6, 6), (6, 1), (4, 2)])
def test_recorder_knows_its_groups(heads):
    model = make(num_attention_heads=heads[0], num_key_value_heads=heads[1])
    with UtilityRecorder(model, T) as r:
        out = generate(model)
    want = naive(model, out, slice(T + QUESTION, T + QUESTION + NEW - 1))
    assert r.result().shape == (3, heads[1], T)
    assert torch.allclose(r.result().double(), want, rtol=2e-4, atol=1e-6 * float(want.max()))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_recording_changes_no_token_and_leaves_the_model_as_it_was(attn):
    model = make(attn=attn)
    before = generate(model)
    with UtilityRecorder(model, T) as r:
        during = generate(model)
        assert model.config._attn_implementation == "collai_utility"
    assert model.config._attn_implementation == attn
    assert not utility._RECORDERS and not model.model._forward_pre_hooks
    kept = r.result().clone()
    assert torch.equal(before, during) and torch.equal(before, generate(model)) and torch.equal(kept, r.result())


def test_model_is_restored_after_an_exception():
    model = make()
    with pytest.raises(KeyError), UtilityRecorder(model, T):
        raise KeyError("stop")
    assert model.config._attn_implementation == "sdpa" and not utility._RECORDERS and not model.model._forward_pre_hooks


def test_nothing_stays_behind_when_entering_fails(monkeypatch):
    model = make()
    with UtilityRecorder(model, T), pytest.raises(RuntimeError, match="being recorded already"):
        UtilityRecorder(model, T).__enter__()
    monkeypatch.setattr(model, "set_attn_implementation", lambda name: None)
    with pytest.raises(NotImplementedError, match="unsupported attention layer: LlamaForCausalLM"):
        UtilityRecorder(model, T).__enter__()
    assert not utility._RECORDERS and not model.model._forward_pre_hooks


def test_question_rows_count_only_on_request():
    model = make()
    with UtilityRecorder(model, T) as plain, torch.no_grad():
        model(IDS)
    with pytest.raises(RuntimeError, match="no decode step recorded"):
        plain.result()
    with UtilityRecorder(model, T, include_question=True) as r:
        out = generate(model)
    want = naive(model, out, slice(T, T + QUESTION + NEW - 1))
    assert torch.allclose(r.result().double(), want, rtol=2e-4, atol=1e-6 * float(want.max()))


@pytest.mark.parametrize("time", ["max", "sum", "mean"])
def test_teacher_forcing_in_one_pass_equals_decoding(time):
    model = make()
    with UtilityRecorder(model, T, reduce_time=time) as decoded:
        out = generate(model, new=40)
    start = T + QUESTION
    with UtilityRecorder(model, T, reduce_time=time, query_start=start) as forced, torch.no_grad():
        model(out[:, :-1], use_cache=False)
    with UtilityRecorder(model, T, reduce_time=time, query_start=start) as resumed, torch.no_grad():
        cache = DynamicCache()
        model(out[:, :start - 2], past_key_values=cache)
        model(out[:, start - 2:-1], past_key_values=cache)
    assert torch.allclose(decoded.result(), forced.result(), rtol=1e-3, atol=1e-6)
    assert torch.allclose(decoded.result(), resumed.result(), rtol=1e-3, atol=1e-6)


def test_context_may_be_prefilled_before_recording_and_its_own_queries_do_not_count():
    model = make()
    cache = DynamicCache()
    with torch.no_grad():
        model(IDS[:, :T - 3], past_key_values=cache)
        with UtilityRecorder(model, T) as r:
            for i in range(T - 3, T):
                model(IDS[:, i:i + 1], past_key_values=cache)
            with pytest.raises(RuntimeError, match="no decode step"):
                r.result()
            model(IDS[:, T:T + 1], past_key_values=cache)
    want = naive(model, IDS[:, :T + 1], slice(T, T + 1))
    assert torch.allclose(r.result().double(), want, rtol=2e-4, atol=1e-6 * float(want.max()))


def test_several_generations_add_up():
    model = make()
    other = torch.cat([IDS[:, :T], IDS[:, T:].flip(1)], dim=1)
    parts = []
    with UtilityRecorder(model, T) as both:
        for ids in (IDS, other):
            generate(model, ids)
    for ids in (IDS, other):
        with UtilityRecorder(model, T) as r:
            generate(model, ids)
        parts.append(r.result())
    assert torch.equal(both.result(), torch.maximum(*parts)) and not torch.equal(*parts)


def test_static_cache_gives_the_same():
    model = make()
    with UtilityRecorder(model, T) as dynamic:
        generate(model)
    with UtilityRecorder(model, T) as static:
        generate(model, cache_implementation="static", disable_compile=True)
    assert torch.allclose(dynamic.result(), static.result(), rtol=1e-4, atol=1e-7)


def test_what_a_sliding_window_dropped_is_worth_nothing():
    model = make("mistral", sliding_window=16)
    with UtilityRecorder(model, T) as r:
        out = generate(model, new=4)
    u = r.result()
    start = T + QUESTION  # the first counted query sees positions start - 15 ... start
    assert bool((u[..., :start - 15] == 0).all()) and bool((u[..., start - 15:] > 0).all())
    with UtilityRecorder(model, T, reduce_time="sum", norm="none", query_start=start) as forced, torch.no_grad():
        model(out[:, :-1], use_cache=False)
    with UtilityRecorder(model, T, reduce_time="sum", norm="none") as decoded:
        generate(model, new=4)
    assert torch.allclose(forced.result(), decoded.result(), rtol=1e-3, atol=1e-6)


def test_a_later_call_may_see_more_of_the_window_than_the_first():
    model = make("mistral", sliding_window=16)
    with UtilityRecorder(model, T, norm="none") as both:
        generate(model, IDS, new=2)
        generate(model, IDS[:, :T + 1], new=2)
    parts = []
    for ids in (IDS, IDS[:, :T + 1]):
        with UtilityRecorder(model, T, norm="none") as r:
            generate(model, ids, new=2)
        parts.append(r.result())
    assert torch.allclose(both.result(), torch.maximum(*parts), rtol=1e-5)
    assert int((parts[0] > 0).sum()) < int((parts[1] > 0).sum())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.06), (torch.float16, 0.01), (torch.float64, 1e-6)])
def test_recorder_works_in_other_precisions(dtype, tolerance):
    """Against the same keys and queries in float64: only the rounding of stored tensors and of eager's weights is left."""
    model = make(dtype=dtype)
    with UtilityRecorder(model, T) as r:
        out = generate(model)
    want = naive(model, out, slice(T + QUESTION, T + QUESTION + NEW - 1))
    u = r.result()
    assert u.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float((u.double() - want).norm() / want.norm()) < tolerance


def test_memory_stays_linear(monkeypatch):
    """No tensor of the recorder holds weights of more than 16 query rows, however long the pass."""
    seen = []
    inner = utility._step_utility
    monkeypatch.setattr(utility, "_step_utility", lambda a, *rest: seen.append(tuple(a.shape)) or inner(a, *rest))
    model = make()
    with UtilityRecorder(model, T, include_question=True) as r, torch.no_grad():
        model(IDS.repeat(1, 3))
    assert max(shape[0] for shape in seen) == 16 and sum(shape[0] for shape in seen) == 3 * (3 * (T + QUESTION) - T)
    assert all(s.total.shape == (2, T) and s.norms.shape == (2, 3, T) for s in r._streams)


def test_result_is_read_from_weights_without_gradients():
    model = make()
    with UtilityRecorder(model, T, include_question=True) as r:
        model(IDS)
    assert not r.result().requires_grad
    with UtilityRecorder(model, T) as mixed:
        with torch.inference_mode():
            generate(model)
        generate(model)
    assert torch.isfinite(mixed.result()).all()


@pytest.mark.parametrize(("call", "text"), [
    (lambda m: m(IDS.repeat(2, 1)), "one sequence at a time, got a batch of 2"),
    (lambda m: m(IDS, attention_mask=(torch.arange(T + QUESTION) > 2).long()[None]), "padded batches are not supported"),
])
def test_batches_and_padding_are_refused(call, text):
    model = make()
    with pytest.raises(ValueError, match=text), UtilityRecorder(model, T):
        call(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("kwargs", "text"), [
    ({"context_len": 0}, "context_len must be at least 1, got 0"),
    ({"norm": "head"}, "norm must be one of layer, none, global; got 'head'"),
    ({"reduce_time": "last"}, "reduce_time must be one of max, sum, mean; got 'last'"),
    ({"reduce_group": "sum"}, "reduce_group must be one of max, mean; got 'sum'"),
    ({"query_start": T - 1}, "query_start must be at least context_len=37"),
    ({"query_start": T, "include_question": True}, "without include_question"),
])
def test_options_without_meaning_are_refused(kwargs, text):
    with pytest.raises(ValueError, match=text):
        UtilityRecorder(make(), **{"context_len": T, **kwargs})


def test_models_it_does_not_describe_are_refused():
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(NotImplementedError, match="unsupported attention layer: T5.* is an encoder-decoder"):
        UtilityRecorder(t5, 3)
    model = make()
    model.model.layers[1].self_attn.kv_lora_rank = 8
    with pytest.raises(NotImplementedError, match="unsupported attention layer LlamaAttention"):
        UtilityRecorder(model, 3)
    with pytest.raises(NotImplementedError, match="unsupported attention layer: Linear has 0"):
        UtilityRecorder(torch.nn.Linear(2, 2), 3)
    model = make()
    del model.model.layers[2].self_attn.o_proj
    with pytest.raises(NotImplementedError, match="has 2 attention layers with an o_proj, its config says 3"):
        UtilityRecorder(model, 3)
    model = make()
    with UtilityRecorder(model, T) as r, pytest.raises(NotImplementedError, match="no plain softmax"):
        q = torch.zeros(1, 6, 1, 16)
        r._look(model.model.layers[0].self_attn, q, q[:, :2], q[:, :2], None, {"softcap": 30.0})


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_position_of_a_pass_is_read_from_its_cache_whatever_its_name(name):
    """The argument was renamed between versions of transformers."""
    r, cache = UtilityRecorder(make(), T), DynamicCache()
    cache.update(torch.zeros(1, 2, 7, 16), torch.zeros(1, 2, 7, 16), 0)
    r._before(torch.nn.Identity(), (), {"attention_mask": None, name: cache, "use_cache": True})
    assert r._start == 7


# --- all steps at once ---------------------------------------------------------------------------

def layer(n=5, hkv=2, g=3, t=11, d=4, e=7, seed=0, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    attn = torch.softmax(3 * torch.randn(n, hkv * g, t + 2, generator=gen, dtype=dtype), -1)[..., :t]
    return attn, torch.randn(hkv, t, d, generator=gen, dtype=dtype), torch.randn(e, hkv * g * d, generator=gen, dtype=dtype)


@pytest.mark.parametrize("e", [2, 4, 7])
@pytest.mark.parametrize("norm", ["layer", "none"])
@pytest.mark.parametrize("group", ["max", "mean"])
@pytest.mark.parametrize("time", ["max", "sum", "mean"])
def test_oracle_importance_is_its_formula(time, group, norm, e):
    attn, values, w = layer(e=e)
    u = oracle_importance(attn, values, w, num_kv_heads=2, reduce_time=time, reduce_group=group, norm=norm)
    n = [[float((w[:, 4 * q:4 * q + 4] @ values[q // 3, i]).norm()) for i in range(11)] for q in range(6)]
    scale = sum(map(sum, n)) + 1e-9 if norm == "layer" else 1
    over_group = {"max": max, "mean": lambda x: sum(x) / len(x)}[group]
    over_time = {"max": max, "sum": sum, "mean": lambda x: sum(x) / len(x)}[time]
    for j in range(2):
        for i in range(11):
            want = over_time([over_group([float(attn[s, q, i]) * n[q][i] / scale for q in range(3 * j, 3 * j + 3)])
                              for s in range(5)])
            assert abs(float(u[j, i]) - want) < 1e-12


def test_long_contexts_are_normed_in_blocks():
    attn, values, w = layer(n=1, t=9001, dtype=torch.float32)
    u = oracle_importance(attn, values, w, num_kv_heads=2, norm="none")
    direct = torch.einsum("jti,ejgi->jgte", values, w.view(7, 2, 3, 4)).norm(dim=-1)
    assert torch.allclose(u, (attn[0].view(2, 3, -1) * direct).amax(1), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_computed_in_float32(dtype):
    attn, values, w = layer()
    u = oracle_importance(attn.to(dtype), values.to(dtype), w.to(dtype), num_kv_heads=2)
    want = oracle_importance(attn.to(dtype).double(), values.to(dtype).double(), w.to(dtype).double(), num_kv_heads=2)
    assert u.dtype == torch.float32 and torch.allclose(u.double(), want, rtol=1e-5)


@pytest.mark.parametrize(("change", "text"), [
    (lambda a, v, w: (a[0], v, w), r"need attn \(N, Hq, T\)"),
    (lambda a, v, w: (a[:0], v, w), r"need attn \(N, Hq, T\).*attn \(0, 6, 11\)"),
    (lambda a, v, w: (a[..., :-1], v, w), "num_kv_heads=2 does not fit"),
    (lambda a, v, w: (a[:, :5], v, w), "num_kv_heads=2 does not fit"),
    (lambda a, v, w: (a, v[:1], w), "num_kv_heads=2 does not fit"),
    (lambda a, v, w: (a, v, w[:, :-1]), r"Hq\*D columns"),
    (lambda a, v, w: (-a, v, w), "attn must be finite and non-negative"),
    (lambda a, v, w: (a * torch.nan, v, w), "attn must be finite and non-negative"),
    (lambda a, v, w: (a, v * torch.inf, w), "utility must be finite and non-negative"),
])
def test_layers_that_do_not_fit_are_refused(change, text):
    with pytest.raises(ValueError, match=text):
        oracle_importance(*change(*layer()), num_kv_heads=2)


def test_oracle_importance_has_no_global_norm():
    with pytest.raises(ValueError, match="norm must be one of layer, none; got 'global'"):
        oracle_importance(*layer(), num_kv_heads=2, norm="global")


# --- loss, gap, fidelity -------------------------------------------------------------------------

def pair(h, t, seed, levels=None):
    gen = torch.Generator().manual_seed(seed)
    draw = (lambda: torch.rand(h, t, generator=gen)) if levels is None else (
        lambda: torch.randint(0, levels, (h, t), generator=gen).float())
    return draw(), draw()


CASES = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(0, 10**6), st.sampled_from([None, 2, 3]))


def test_ranking_is_stable_and_takes_forced_entries_first():
    u = torch.arange(6.0)
    assert rank_by_score(u, torch.tensor([1.0, 2, 1, 2, torch.inf, -torch.inf])).tolist() == [4, 1, 3, 0, 2, 5]
    assert rank_by_score(u, torch.zeros(6)).tolist() == u.tolist()
    big = torch.arange(5000.0)
    assert torch.equal(rank_by_score(big, (big % 2)), torch.cat([big[1::2], big[::2]]))


@QUICK
@given(CASES)
def test_the_loss_is_the_sum_of_what_is_evicted(case):
    u, s = pair(*case)
    ranked = rank_by_score(u, s)
    curve = loss_curve(ranked)
    h, t = u.shape
    assert curve.shape == (h, t + 1) and curve.dtype == torch.float64
    for b in range(t + 1):
        for j in range(h):
            order = sorted(range(t), key=lambda i, j=j: (-float(s[j, i]), i))
            assert abs(float(curve[j, b]) - sum(float(u[j, i]) for i in order[b:])) < 1e-9
    assert bool((curve[:, :-1] >= curve[:, 1:]).all()) and bool((curve[:, -1] == 0).all())


@QUICK
@given(CASES)
def test_the_gap_is_loss_minus_the_best_subset(case):
    u, s = pair(*case)
    gap = optimality_gap(u, s)
    kept = loss_curve(rank_by_score(u, s))
    h, t = u.shape
    for j in range(h):
        for b in range(t + 1):
            best = max(sum(float(u[j, i]) for i in c) for c in combinations(range(t), b))
            want = float(kept[j, b]) - (float(u[j].double().sum()) - best)
            assert abs(float(gap[j, b]) - want) < 1e-9
    assert bool((gap >= 0).all())


@QUICK
@given(CASES)
def test_the_gap_vanishes_exactly_when_the_ranked_utilities_fall(case):
    u, s = pair(*case)
    ranked = rank_by_score(u, s)
    falls = (ranked[:, :-1] >= ranked[:, 1:]).all(1)
    assert torch.equal((optimality_gap(u, s) == 0).all(1), falls)
    assert bool((optimality_gap(u, u) == 0).all())


@QUICK
@given(CASES)
def test_fidelity_is_its_definition_and_stays_in_its_range(case):
    u, s = pair(*case)
    t = u.shape[1]
    gap, best = optimality_gap(u, s), loss_curve(u.sort(descending=True).values)
    random = (1 - torch.arange(t + 1).double() / t) * u.double().sum(1, keepdim=True)
    room = (random - best).sum(1)
    f = fidelity(u, s)
    assert f.shape == u.shape[:1]
    for j in range(len(u)):
        flat = bool((u[j] == u[j, 0]).all())
        assert abs(float(f[j]) - (1.0 if flat else float(1 - gap[j].sum() / room[j]))) < 1e-6
    assert bool((f >= -1 - 1e-12).all()) and bool((f <= 1).all())


def test_rounding_makes_no_gap_negative():
    gen = torch.Generator().manual_seed(5)
    u, s = torch.rand(50, 300, generator=gen, dtype=torch.float64), torch.rand(50, 300, generator=gen)
    assert bool((optimality_gap(u, s) >= 0).all())


def test_fidelity_of_known_orders():
    u = torch.rand(4, 50, generator=torch.Generator().manual_seed(1))
    assert fidelity(u, u).tolist() == [1.0] * 4 and torch.allclose(fidelity(u, -u), torch.tensor(-1.0).double())
    assert fidelity(torch.full((2, 7), 0.3), pair(2, 7, 0)[1]).tolist() == [1.0, 1.0]
    assert float(fidelity(torch.zeros(5), torch.rand(5))) == 1.0
    gen = torch.Generator().manual_seed(2)
    mean = fidelity(u[:1].expand(4000, -1), torch.rand(4000, 50, generator=gen)).mean()
    assert abs(float(mean)) < 0.02


@pytest.mark.parametrize("call", [rank_by_score, optimality_gap, fidelity])
def test_bad_utilities_and_scores_are_refused(call):
    u, s = pair(2, 5, 0)
    for bad in (torch.nan, torch.inf, -0.5):
        wrong = u.clone()
        wrong[1, 2] = bad
        with pytest.raises(ValueError, match=f"utility must be finite and non-negative, got {bad} in 1 entries"):
            call(wrong, s)
    with pytest.raises(ValueError, match=r"utility and score shapes differ: \(2, 5\) and \(2, 4\)"):
        call(u, s[:, :4])
    with pytest.raises(ValueError, match=r"utility and score shapes differ: \(2, 5\) and \(5,\)"):
        call(u, s[0])
    with pytest.raises(ValueError, match="scores must not be NaN, got 1 of them"):
        call(u, torch.where(s == s.max(), torch.nan, s))
    with pytest.raises(ValueError, match="utility must be finite and non-negative"):
        loss_curve(-u)


def test_inputs_are_not_changed():
    u, s = pair(2, 6, 4)
    attn, values, w = layer()
    before = [x.clone() for x in (u, s, attn, values, w)]
    loss_curve(rank_by_score(u, s)), optimality_gap(u, s), fidelity(u, s)
    oracle_importance(attn, values, w, num_kv_heads=2)
    perturbation_bound(attn[0, 0] / attn[0, 0].sum(), values[0], w[:, :4], torch.arange(11) > 3)
    assert all(torch.equal(x, y) for x, y in zip(before, (u, s, attn, values, w), strict=True))


# --- perturbation --------------------------------------------------------------------------------

@QUICK
@given(st.integers(2, 20), st.integers(1, 8), st.integers(1, 8), st.integers(0, 10**6), st.floats(0.1, 6))
def test_the_change_never_exceeds_its_bound(t, d, e, seed, sharp):
    gen = torch.Generator().manual_seed(seed)
    a = torch.softmax(sharp * torch.randn(t, generator=gen, dtype=torch.float64), 0)
    v, w = torch.randn(t, d, generator=gen, dtype=torch.float64), torch.randn(e, d, generator=gen, dtype=torch.float64)
    keep = torch.rand(t, generator=gen) < 0.5
    keep[int(torch.randint(t, (1,), generator=gen))] = True
    actual, bound = perturbation_bound(a, v, w, keep)
    whole = w @ (a @ v)
    masked = torch.softmax(torch.where(keep, a.log(), -torch.inf), 0)
    assert torch.allclose(actual, (whole - w @ (masked @ v)).norm(), atol=1e-10)
    assert float(actual) <= float(bound) + 1e-12
    assert (float(bound) == 0) == bool(keep.all())


def test_the_bound_is_reached_by_opposite_values():
    v = torch.tensor([[1.0, 2], [-1, -2], [-1, -2]])
    actual, bound = perturbation_bound(torch.tensor([0.3, 0.5, 0.2]), v, torch.eye(2), torch.tensor([False, True, True]))
    assert actual.dtype == bound.dtype == torch.float64
    assert torch.isclose(actual, bound) and torch.isclose(actual, 0.6 * v[0].double().norm())


@pytest.mark.parametrize(("change", "text"), [
    (lambda a, v, w, k: (a[:2], v, w, k), r"need a \(T,\)"),
    (lambda a, v, w, k: (a, v[:, :1], w, k), r"need a \(T,\)"),
    (lambda a, v, w, k: (a, v, w, k[:2]), r"need a \(T,\)"),
    (lambda a, v, w, k: (a * 2, v, w, k), "a must be non-negative and sum to 1, got sum 2"),
    (lambda a, v, w, k: (a - torch.tensor([0.6, -0.6, 0.0]), v, w, k), "a must be non-negative"),
    (lambda a, v, w, k: (a * torch.nan, v, w, k), "a must be non-negative and sum to 1, got sum nan"),
    (lambda a, v, w, k: (a, v, w, k & False), "keep must hold an entry with positive weight"),
    (lambda a, v, w, k: (a, v * torch.nan, w, k), "utility must be finite"),
])
def test_bad_rows_are_refused(change, text):
    good = torch.tensor([0.5, 0.3, 0.2]), torch.ones(3, 2), torch.eye(2), torch.tensor([True, False, True])
    with pytest.raises(ValueError, match=text):
        perturbation_bound(*change(*good))
