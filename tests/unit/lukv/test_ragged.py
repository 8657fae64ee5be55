"""The ragged cache: merging, packing, attention, compaction, and generation inside transformers' own models."""
import copy
import gc
import itertools
import math
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from collai.lukv import ragged
from collai.lukv.ragged import (
    Compressor,
    Prefix,
    RaggedCache,
    RaggedLayer,
    Tail,
    full_layers,
    generate,
    merge_partials,
    ragged_attention,
    score_context,
)
from collai.lukv.scorers import ExpectedAttention, KeyDiff, Knorm, Random, SnapKV, StreamingLLM

QUICK = settings(deadline=None, derandomize=True, max_examples=30)
FAMILIES = {"Llama": {}, "Qwen3": {"head_dim": 8}, "Mistral": {"sliding_window": None}}
HIDDEN = {}


def rand(seed):
    """Normal numbers of a seed."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def tiny(family, **more):
    """Random decoder: 2 layers, 4 query heads, 2 KV heads of 8; large weights make attention sharp."""
    config = getattr(transformers, f"{family}Config")(
        **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
           "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3, "pad_token_id": None,
           "bos_token_id": None, "eos_token_id": None} | FAMILIES.get(family, {}) | more)
    torch.manual_seed(1)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


@pytest.fixture(scope="module")
def llama():
    return tiny("Llama")


def tokens(batch, length, seed=0):
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def decode(model, ids, cache, steps=10, **more):
    """Greedy tokens after a context whose cache is given."""
    out = model.generate(ids, past_key_values=cache, max_new_tokens=steps, do_sample=False,
                         attention_mask=torch.ones_like(ids), pad_token_id=0, **more)
    return out[:, ids.shape[1]:]


def full_cache(model, ids):
    """Transformers' own cache after a prefill."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


def plain(q, keys, values, visible):
    """Masked attention by one softmax in float64; visible [B, Hkv, Q, T]."""
    g = q.shape[1] // keys.shape[1]
    k, v, see = (x.repeat_interleave(g, 1) for x in (keys.double(), values.double(), visible))
    return (q.double() @ k.mT * q.shape[3] ** -0.5).masked_fill(~see, -math.inf).softmax(-1) @ v


def masked(module, query, key, value, attention_mask, **_):
    """Attention over a full cache in which HIDDEN says what each head keeps of the context."""
    keep, (n_q, n) = HIDDEN[module.layer_idx], (query.shape[2], key.shape[2])
    visible = torch.ones(n_q, n, dtype=torch.bool).tril(n - n_q).repeat(*keep.shape[:2], 1, 1)
    visible[..., :keep.shape[2]] &= keep[:, :, None]
    return plain(query, key, value, visible).to(query.dtype).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("masked_in_tests", masked)


def reference(model, ids, cache, masks, steps=10):
    """Greedy tokens of a full cache with masks."""
    HIDDEN.update(masks)
    model.set_attn_implementation("masked_in_tests")
    try:
        return decode(model, ids, cache, steps)
    finally:
        model.set_attn_implementation("sdpa")


def kept(cache):
    """Masks [B, Hkv, seen] of what a cache keeps, from the stored positions."""
    masks = {}
    for i, layer in enumerate(cache.layers):
        mask = torch.zeros(*layer.prefix.length.shape, layer.seen, dtype=torch.bool)
        for b, row in enumerate(layer.prefix.length.tolist()):
            for h, n in enumerate(row):
                a = int(layer.prefix.start[b, h])
                pos = layer.prefix.pos[a:a + n].long()
                assert (pos.diff() > 0).all()
                mask[b, h, pos] = True
        masks[i] = mask
    return masks


def ragged_run(model, ids, T, steps=10, **options):
    """Tokens and cache of a compressed prefill."""
    with Compressor(model, options.pop("scorer", KeyDiff()), **options) as compressor:
        cache = compressor.prefill(ids[:, :T])
        masks = kept(cache)
        return decode(model, ids, cache, steps), cache, masks


# --- merging -------------------------------------------------------------------------------------

@QUICK
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.floats(0.1, 60), st.integers(0, 10**6))
def test_merged_parts_equal_one_softmax(sizes, spread, seed):
    new, n = rand(seed), sum(sizes)
    x, v = spread * new(3, n).double(), new(n, 4).double()
    ends = np.cumsum([0, *sizes])
    parts = [slice(a, b) for a, b in itertools.pairwise(ends)]
    o = [(x[:, p].softmax(1) @ v[p]) for p in parts]
    lse = [x[:, p].logsumexp(1) if p.stop > p.start else torch.full((3,), -math.inf).double() for p in parts]
    want = x.softmax(1) @ v if n else torch.zeros(3, 4).double()
    assert torch.allclose(merge_partials(o, lse), want, atol=1e-12)


def test_merging_does_not_overflow_and_keeps_nan_visible():
    o, lse = [torch.ones(2, 3), torch.zeros(2, 3)], [torch.full((2,), 4e4), torch.full((2,), 4e4)]
    assert torch.allclose(merge_partials(o, lse), torch.full((2, 3), 0.5))
    assert merge_partials(o, [lse[0], torch.full((2,), math.nan)]).isnan().all()


@pytest.mark.parametrize(("o", "lse"), [([], []), ([torch.ones(2, 3)], [])])
def test_parts_without_partner_are_refused(o, lse):
    with pytest.raises(ValueError, match="give one lse for each o"):
        merge_partials(o, lse)


# --- attention -----------------------------------------------------------------------------------

def layer_of(keys, values, keep):
    """A layer that saw all tokens of the mask, was compacted, and then saw the rest."""
    layer, T = RaggedLayer(), keep.shape[2]
    layer.update(keys[:, :, :T], values[:, :, :T])
    layer.compact(keep)
    if keys.shape[2] > T:
        layer.update(keys[:, :, T:], values[:, :, T:])
    return layer


@QUICK
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(0, 12), st.integers(0, 40),
       st.integers(0, 10**6))
def test_ragged_attention_equals_a_mask(batch, hkv, g, n_q, before, T, seed):
    new, n = rand(seed), n_q + before
    keys, values, q = new(batch, hkv, T + n, 5), new(batch, hkv, T + n, 5), 3 * new(batch, hkv * g, n_q, 5)
    keep = new(batch, hkv, T) < new(batch, hkv, 1)
    layer = layer_of(keys, values, keep)
    causal = torch.ones(n_q, n, dtype=torch.bool).tril(n - n_q).expand(batch, hkv, -1, -1)
    visible = torch.cat([keep[:, :, None].expand(-1, -1, n_q, -1), causal], 3)
    out = ragged_attention(q, layer.prefix, layer.tail, scale=5 ** -0.5)
    assert torch.allclose(out.double(), plain(q, keys, values, visible), atol=1e-5)


@pytest.mark.parametrize("n_q", [1, 6])
def test_both_ways_over_packed_rows_agree(n_q):
    new = rand(3)
    q, length = new(3, 4, n_q, 8), torch.tensor([[0, 5], [700, 1], [33, 0]], dtype=torch.int32)
    n = int(length.sum())
    prefix = Prefix(new(n, 8), new(n, 8), (length.flatten().cumsum(0) - length.flatten()).int().view(3, 2), length)
    rows = (q * 0.3).reshape(6, -1, 8).transpose(0, 1)
    one = ragged._segment_partial(rows, prefix.keys, prefix.values, prefix.offsets, prefix.segments)
    two = ragged._padded_partial(rows, prefix.keys, prefix.values, prefix.start.flatten(), length.flatten())
    assert torch.allclose(one[0], two[0], atol=1e-5) and torch.allclose(one[1], two[1], atol=1e-5)
    assert (one[1].T[[0, 5]] == -math.inf).all() and (one[0].transpose(0, 1)[[0, 5]] == 0).all()
    o, lse = ragged._torch_partial(q, prefix.keys, prefix.values, prefix.start, length, 0.3)
    assert torch.allclose(o.reshape(6, -1, 8), one[0].transpose(0, 1), atol=1e-5)
    assert torch.allclose(lse.reshape(6, -1), one[1].T, atol=1e-5)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_stays_within_its_rounding(dtype, limit):
    new = rand(0)
    keys, values, q = (new(2, h, n, 16).to(dtype) for h, n in ((2, 60), (2, 60), (8, 1)))
    keep = torch.rand(2, 2, 50, generator=torch.Generator().manual_seed(0)) < 0.5
    layer = layer_of(keys, values, keep)
    visible = torch.cat([keep, torch.ones(2, 2, 10, dtype=torch.bool)], 2)[:, :, None]
    out = ragged_attention(q, layer.prefix, layer.tail, scale=0.25)
    assert out.dtype == dtype and (out.double() - plain(q, keys, values, visible)).abs().max() < limit


def test_a_length_on_the_device_hides_the_free_room():
    new = rand(1)
    q, keys, values = new(2, 4, 3, 8), new(2, 2, 20, 8), new(2, 2, 20, 8)
    graph = Tail(torch.zeros(2, 2, 32, 8), torch.full((2, 2, 32, 8), 9.0), 0, torch.zeros(1, dtype=torch.int32))
    for a in (0, 7, 17):
        graph.append(keys[:, :, a:a + (7, 10, 3)[(0, 7, 17).index(a)]], values[:, :, a:a + (7, 10, 3)[(0, 7, 17).index(a)]])
    want = ragged_attention(q, None, Tail(keys, values, 20), scale=0.3)
    assert graph.filled.item() == 20 and torch.allclose(ragged_attention(q, None, graph, scale=0.3), want, atol=1e-6)


def test_a_prefix_alone_and_an_empty_one_are_served():
    new = rand(2)
    q, keys = new(1, 2, 1, 4), new(1, 2, 6, 4)
    none = layer_of(keys, keys, torch.zeros(1, 2, 6, dtype=torch.bool))
    assert len(none.prefix.keys) == 0 and (ragged_attention(q, none.prefix, None, scale=1.0) == 0).all()
    assert (ragged._torch_partial(q, none.prefix.keys, none.prefix.values, none.prefix.start, none.prefix.length, 1.0)[1]
            == -math.inf).all()
    every = layer_of(keys, keys, torch.ones(1, 2, 6, dtype=torch.bool))
    want = F.scaled_dot_product_attention(q, keys, keys, scale=1.0)
    assert torch.allclose(ragged_attention(q, every.prefix, None, scale=1.0), want, atol=1e-6)


def test_backends_are_checked():
    q, tail = torch.ones(1, 1, 1, 4), Tail(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4), 1)
    for name in ("varlen", "triton"):
        with pytest.raises(RuntimeError, match=f"backend '{name}' needs a CUDA device"):
            ragged_attention(q, None, tail, scale=1.0, backend=name)
    with pytest.raises(ValueError, match="backend must be 'auto', 'torch', 'varlen' or 'triton', got 'flex'"):
        ragged_attention(q, None, tail, scale=1.0, backend="flex")
    with pytest.raises(ValueError, match="nothing to attend to"):
        ragged_attention(q, None, None, scale=1.0)


def test_the_fastest_backend_is_chosen_by_device_dtype_and_queries(monkeypatch):
    monkeypatch.setattr(ragged, "_triton_ready", lambda: True)
    assert ragged._choose(True, torch.bfloat16, 128) == ragged._choose(True, torch.float32, 1) == "triton"
    assert ragged._choose(True, torch.bfloat16, 129) == "varlen" and ragged._choose(True, torch.float32, 129) == "torch"
    monkeypatch.setattr(ragged, "_triton_ready", lambda: False)
    assert ragged._choose(True, torch.float16, 1) == "varlen" and ragged._choose(False, torch.float16, 1) == "torch"


@pytest.mark.parametrize(("n_q", "n", "window"), [(1, 9, None), (9, 9, None), (4, 9, None), (1, 9, 4), (9, 9, 4), (4, 9, 3)])
def test_dense_attention_is_causal_within_the_window(n_q, n, window):
    new = rand(0)
    q, keys, values = new(2, 4, n_q, 8), new(2, 2, n, 8), new(2, 2, n, 8)
    behind = torch.arange(n - n_q, n)[:, None] - torch.arange(n)
    visible = ((behind >= 0) & (behind < (window or n))).expand(2, 2, -1, -1)
    assert torch.allclose(ragged._dense_attention(q, keys, values, 8 ** -0.5, window).double(),
                          plain(q, keys, values, visible), atol=1e-6)


# --- tail, layer and cache -----------------------------------------------------------------------

@QUICK
@given(st.lists(st.integers(1, 90), min_size=1, max_size=12), st.integers(0, 10**6))
def test_a_tail_holds_what_was_appended_in_little_room(steps, seed):
    new = rand(seed)
    keys = new(2, 1, sum(steps), 3)
    tail, n = Tail(keys[:, :, :0], keys[:, :, :0], 0), 0
    for q in steps:
        tail.append(keys[:, :, n:n + q], -keys[:, :, n:n + q])
        n += q
        assert tail.length == n <= tail.keys.shape[2] <= max(n, 1.25 * n + 64)
    assert torch.equal(tail.keys[:, :, :n], keys) and torch.equal(tail.values[:, :, :n], -keys)


def test_appending_never_writes_into_the_models_tensors():
    keys = torch.zeros(1, 1, 3, 2)
    layer = RaggedLayer()
    layer.update(keys, keys)
    layer.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))
    assert (keys == 0).all() and layer.tail.length == 4


@QUICK
@given(st.integers(1, 3), st.integers(1, 3), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 10**6))
def test_repeated_compaction_keeps_what_all_masks_keep(batch, heads, turns, seed):
    new, total = rand(seed), sum(turns)
    states = new(2, batch, heads, total, 3)
    layer, alive, seen = RaggedLayer(), torch.zeros(batch, heads, 0, dtype=torch.bool), 0
    for n in turns:
        layer.update(*states[:, :, :, seen:seen + n])
        seen += n
        alive = torch.cat([alive, torch.ones(batch, heads, n, dtype=torch.bool)], 2)
        mask = new(batch, heads, seen) < 0.3
        layer.compact(mask)
        alive &= mask
        p = layer.prefix
        assert torch.equal(p.length.long(), alive.sum(2)) and torch.equal(p.pos.long(), alive.nonzero()[:, 2])
        assert torch.equal(p.keys, states[0, :, :, :seen][alive]) and torch.equal(p.values, states[1, :, :, :seen][alive])
        assert torch.equal(p.start.flatten(), p.offsets[:-1]) and p.offsets[-1] == len(p.keys)
        assert torch.equal(p.segments.bincount(minlength=batch * heads), p.length.flatten().long())
        assert layer.get_seq_length() == seen and layer.get_mask_sizes(4) == (seen + 4, 0)
        assert layer.get_mask_sizes(torch.arange(seen, seen + 4)) == (seen + 4, 0)


def test_packed_tensors_own_exactly_their_memory():
    keys = torch.zeros(1, 2, 100, 8)
    layer = layer_of(keys, keys, torch.arange(100).expand(1, 2, -1) < 7)
    assert layer.prefix.keys.untyped_storage().nbytes() == 14 * 8 * 4
    assert layer.prefix.values.untyped_storage().nbytes() == 14 * 8 * 4


def cache_of(batch=2, heads=2, T=6, layers=2, seed=0):
    cache, new = RaggedCache(), rand(seed)
    for i in range(layers):
        cache.update(new(batch, heads, T, 4), new(batch, heads, T, 4), i)
    return cache


def test_positions_and_masks_compact_alike():
    mask = torch.rand(2, 2, 6, generator=torch.Generator().manual_seed(5)) < 0.5
    one, two = cache_of(), cache_of()
    one.compact(0, mask)
    two.compact(0, [[head.nonzero()[:, 0].flip(0) for head in row] for row in mask])
    assert torch.equal(one.layers[0].prefix.keys, two.layers[0].prefix.keys)
    assert torch.equal(one.lengths()[0], mask.sum(2)) and (one.lengths()[1] == 6).all()
    assert one.lengths().dtype == torch.int64


def test_one_row_expands_to_many_before_and_after_a_compaction():
    masks = torch.rand(3, 2, 6, generator=torch.Generator().manual_seed(5)) < 0.6
    apart, late, dense = cache_of(batch=1), cache_of(batch=1), cache_of(batch=1)
    apart.compact(0, masks)
    late.compact(0, torch.ones(1, 2, 6, dtype=torch.bool))
    late.compact(0, masks)
    keys = dense.layers[0].tail.keys.expand(3, -1, -1, -1)
    for cache in (apart, late):
        assert torch.equal(cache.layers[0].prefix.keys, keys[masks]) and cache.layers[0].tail.keys.shape == (3, 2, 0, 4)


def test_rows_repeat_and_can_be_chosen():
    cache, mask = cache_of(), torch.rand(2, 2, 6, generator=torch.Generator().manual_seed(5)) < 0.5
    keys = cache.layers[0].tail.keys
    cache.compact(0, mask)
    cache.layers[0].update(torch.ones(2, 2, 1, 4), torch.ones(2, 2, 1, 4))
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.layers[0].prefix.keys, torch.cat([keys[b][mask[b]] for b in (0, 0, 1, 1)]))
    assert cache.layers[0].tail.keys.shape[0] == cache.layers[1].tail.keys.shape[0] == 4
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert torch.equal(cache.layers[0].prefix.values.shape[0] * torch.ones(()), mask.sum().float())
    assert torch.equal(cache.layers[0].prefix.keys, torch.cat([keys[b][mask[b]] for b in (1, 0)]))


def test_a_cache_can_be_emptied_and_used_again():
    cache = cache_of()
    cache.compact(0, torch.ones(2, 2, 6, dtype=torch.bool))
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes()["total"] == 0
    keys, _ = cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 0)
    assert keys.shape == (1, 2, 3, 4) and cache.get_seq_length() == 3


def test_logical_length_counts_evicted_tokens():
    cache = cache_of()
    cache.compact(0, torch.zeros(2, 2, 6, dtype=torch.bool))
    handle, again = cache.update(torch.ones(2, 2, 1, 4), torch.ones(2, 2, 1, 4), 0)
    assert handle is again and handle.shape == (2, 2, 7, 4) and cache.get_seq_length(0) == 7
    assert cache.layers[0].get_max_length() == cache.layers[0].get_max_cache_shape() == -1


@pytest.mark.parametrize(("keep", "error", "text"), [
    (torch.ones(2, 2, 5, dtype=torch.bool), ValueError, r"keep must be bool of shape \(B, Hkv, seen\) = \(2, 2, 6\)"),
    (torch.ones(3, 2, 6, dtype=torch.bool), ValueError, "keep must be bool of shape"),
    (torch.ones(2, 2, 6), ValueError, "keep must be bool of shape"),
    ([[[0]], [[0]]], ValueError, r"keep must hold 2 heads in each row, got \[1, 1\]"),
    ([[[0], [6]], [[0], [1]]], ValueError, r"positions must lie in \[0, 6\), got 6 to 6"),
    ([[[-1], [5]], [[0], [1]]], ValueError, r"positions must lie in \[0, 6\), got -1 to -1"),
])
def test_bad_masks_are_refused(keep, error, text):
    with pytest.raises(error, match=text):
        cache_of().compact(0, keep)


def test_an_empty_layer_cannot_be_compacted_and_nothing_goes_back():
    cache = cache_of()
    with pytest.raises(IndexError, match="layer 2 holds no entries"):
        cache.compact(2, torch.ones(2, 2, 6, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="a ragged cache cannot be cropped"):
        cache.crop(-1)
    with pytest.raises(NotImplementedError, match="a ragged cache cannot be reordered: beam search is not supported"):
        cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="nothing to compress"):
        RaggedCache().compress(ratio=0.5)
    bare = RaggedLayer()
    bare.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))
    bare.prefix = Prefix(torch.ones(1, 4), torch.ones(1, 4), *torch.tensor([[[0]], [[1]]], dtype=torch.int32))
    with pytest.raises(ValueError, match="this prefix has no positions"):
        bare.batch_repeat_interleave(2)


# --- budgets -------------------------------------------------------------------------------------

@QUICK
@given(st.sampled_from(["uniform", "adakv", "pyramid"]), st.integers(1, 4), st.integers(1, 4), st.integers(4, 30), st.data())
def test_a_total_is_met_exactly(rule, n_layers, heads, T, data):
    total = data.draw(st.integers(n_layers * heads, n_layers * heads * T))
    plan = ragged._make_plan(None, total, rule, n_layers, tuple(range(n_layers)), heads)
    scores = rand(total)(1, heads, T)
    counts = np.concatenate([plan(layer, scores) for layer in range(n_layers)])
    assert counts.sum() == total and counts.min() >= 1 and counts.max() <= T
    assert ragged._exact(np.array([[1, 5]]), 3, 9).tolist() == [[1, 2]]


@pytest.mark.parametrize("rule", ["uniform", "adakv", "pyramid"])
def test_protected_positions_lead_every_ranking(llama, rule):
    ids = tokens(2, 60)
    cache = Compressor(llama, SnapKV(window=6, kernel=3, sink=3), ratio=0.7, budgets=rule).prefill(ids)
    room, masks = cache.lengths() >= 9, torch.stack(list(kept(cache).values()))
    assert room.any() and masks[room][:, :3].all() and masks[room][:, -6:].all()
    assert masks[~room][:, :1].all() and not masks[~room][:, 3:-6].any()  # too few even for those: nothing else


def test_uniform_keeps_the_best_scores_of_each_head(llama):
    ids = tokens(2, 50)
    scorer = Knorm(sink=0, window=0)
    scores = score_context(llama, scorer, ids)
    cache = Compressor(llama, scorer, ratio=0.7).prefill(ids)
    for layer, mask in kept(cache).items():
        assert (mask.sum(2) == int(50 * (1 - 0.7))).all()
        least = scores[layer].masked_fill(~mask, math.inf).amin(2)
        assert (least >= scores[layer].masked_fill(mask, -math.inf).amax(2)).all()


def test_ties_are_kept_by_position():
    mask = ragged._select(torch.zeros(2, 2, 6), np.array([[2, 0], [6, 3]]))
    assert mask.sum(2).tolist() == [[2, 0], [6, 3]] and mask[1, 1].tolist() == [True] * 3 + [False] * 3


def test_counts_curves_and_functions_set_budgets(llama):
    ids, table = tokens(2, 40), np.array([[3, 9], [40, 1]])
    want = torch.tensor(table)[:, None].expand(-1, 2, -1)
    curve = SimpleNamespace(budgets=lambda T, ratio: np.round((1 - ratio) * T * np.array([[0.5, 1.5], [1, 1]])).astype(int))
    for budgets in (table, torch.tensor(table), table.tolist(), lambda scores, layer: table[layer]):
        assert torch.equal(Compressor(llama, KeyDiff(), budgets=budgets).prefill(ids).lengths(), want)
    assert Compressor(llama, KeyDiff(), budget_tokens=53, budgets=table).prefill(ids).lengths().sum() == 106
    cache = Compressor(llama, KeyDiff(), ratio=0.5, budgets=curve).prefill(ids)
    assert cache.lengths()[:, 0].tolist() == [[10, 30], [20, 20]]
    cache = Compressor(llama, KeyDiff(), budget_tokens=80, budgets=curve).prefill(ids)
    assert cache.lengths()[:, 1].tolist() == [[10, 30], [20, 20]]
    rows = np.array([[1, 2], [3, 4]])
    assert Compressor(llama, KeyDiff(), budgets=lambda scores, layer: rows).prefill(ids).lengths()[0].tolist() == [[1, 2], [3, 4]]


def test_a_curve_is_checked_against_model_and_scorer(llama):
    calls = []
    curve = SimpleNamespace(budgets=lambda T, ratio: np.full((2, 2), 5), check=lambda *a, **k: calls.append((*a, k)))
    scorer = KeyDiff()
    Compressor(llama, scorer, ratio=0.5, budgets=curve, strict=False)
    assert calls == [(llama, scorer, {"strict": False})]


def test_streaming_is_told_the_ratio_and_stays_as_it_was(llama):
    scorer = StreamingLLM(n_sink=4)
    cache = Compressor(llama, scorer, ratio=0.75).prefill(tokens(1, 40))
    assert scorer.ratio == 0 and cache.layers[1].prefix.pos[:10].tolist() == [0, 1, 2, 3, *range(34, 40)]


@pytest.mark.parametrize(("options", "error", "text"), [
    ({}, ValueError, "give exactly one of ratio and budget_tokens"),
    ({"ratio": 0.5, "budget_tokens": 9}, ValueError, "give exactly one of ratio and budget_tokens"),
    ({"ratio": 0.5, "budgets": np.ones((2, 2), int)}, ValueError, "give exactly one of ratio and budget_tokens"),
    ({"ratio": 1.0}, ValueError, r"ratio must be in \[0, 1\), got 1.0"),
    ({"ratio": -0.1}, ValueError, r"ratio must be in \[0, 1\)"),
    ({"ratio": math.nan}, ValueError, r"ratio must be in \[0, 1\)"),
    ({"budget_tokens": 5, "budgets": np.ones((2, 2), int)}, ValueError,
     "budget_tokens=5 differs from the sum of budgets 4"),
    ({"budget_tokens": 5.0}, TypeError, "budget must be an integer number of entries"),
    ({"budget_tokens": True}, TypeError, "budget must be an integer number of entries"),
    ({"budgets": np.ones((2, 2))}, TypeError, "budget must be an integer number of entries"),
    ({"budgets": np.ones((3, 2), int)}, ValueError, r"budgets must have shape \(L, Hkv\) = \(2, 2\), got \(3, 2\)"),
    ({"ratio": 0.5, "budgets": "best"}, ValueError, "budgets must be 'uniform', 'adakv', 'pyramid', counts or a curve"),
])
def test_contradicting_budgets_are_refused(llama, options, error, text):
    with pytest.raises(error, match=text):
        Compressor(llama, KeyDiff(), **options)


@pytest.mark.parametrize(("options", "text"), [
    ({"budget_tokens": 3}, r"budget B=3 outside \[4, 160\]"), ({"budget_tokens": 161}, r"budget B=161 outside \[4, 160\]"),
    ({"budgets": np.array([[1, 2], [3, 41]])}, r"budget B=41 outside \[0, 40\]"),
    ({"budgets": np.array([[1, 2], [3, -1]])}, r"budget B=-1 outside \[0, 40\]"),
    ({"budgets": lambda scores, layer: np.ones(2)}, "budgets of layer 0 must be 2 integers, got float64"),
    ({"ratio": 0.5, "budgets": SimpleNamespace(budgets=lambda T, ratio: np.ones((2, 3), int))}, "budgets must have shape"),
])
def test_budgets_that_do_not_fit_the_context_are_refused(llama, options, text):
    with pytest.raises(ValueError, match=text):
        Compressor(llama, KeyDiff(), **options).prefill(tokens(1, 40))


# --- generation ----------------------------------------------------------------------------------

@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_evicted_generates_what_the_full_cache_generates(family, batch):
    model, ids = tiny(family), tokens(batch, 40)
    want = model.generate(ids, max_new_tokens=10, do_sample=False, attention_mask=torch.ones_like(ids), pad_token_id=0)
    ours, cache, masks = ragged_run(model, ids, 36, ratio=0.0)
    assert torch.equal(ours, want[:, 40:]) and masks[0].all() and cache.get_seq_length() == 49


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_deleting_generates_what_masking_generates(family, batch):
    model, ids, changed = tiny(family), tokens(batch, 40), 0
    full = decode(model, ids, DynamicCache(config=model.config))
    for ratio, rule in ((0.3, "uniform"), (0.8, "adakv")):
        ours, _, masks = ragged_run(model, ids, 39, ratio=ratio, budgets=rule)
        assert torch.equal(ours, reference(model, ids, full_cache(model, ids[:, :39]), masks))
        changed += (ours != full).sum()
    assert changed > 0


@pytest.mark.parametrize("scorer", [ExpectedAttention(n_future=8), SnapKV(window=8, kernel=3), Random(seed=1),
                                    lambda module, hidden, keys, values, angles: values.abs().sum(3)],
                         ids=["EA", "SnapKV", "Random", "function"])
def test_any_scorer_serves(llama, scorer):
    ids = tokens(2, 48)
    ours, _, masks = ragged_run(llama, ids, 44, scorer=scorer, ratio=0.6, budgets="adakv")
    assert torch.equal(ours, reference(llama, ids, full_cache(llama, ids[:, :44]), masks))


def test_a_second_turn_after_a_second_compaction_equals_masks(llama):
    ids = tokens(2, 40)
    hidden = full_cache(llama, ids[:, :39])
    first, cache, masks = ragged_run(llama, ids, 39, ratio=0.5)
    assert torch.equal(first, reference(llama, ids, hidden, masks))
    cache.compress(ratio=0.8)
    assert (cache.lengths() == int(49 * (1 - 0.8))).all()
    turn, masks = torch.cat([ids, first, ids[:, :7]], 1), kept(cache)
    with Compressor(llama, KeyDiff(), ratio=0.5):
        second = decode(llama, turn, cache)
    assert torch.equal(second, reference(llama, turn, hidden, masks))


def test_compressing_again_repeats_the_plan_and_ranks_by_keydiff(llama):
    ids = tokens(2, 40)
    _, cache, first = ragged_run(llama, ids, 39, ratio=0.5)
    stored = copy.deepcopy(cache)
    cache.compress()
    assert (cache.lengths() == 49 // 2).all()
    layer = stored.layers[1]
    every = torch.cat([first[1], torch.ones(2, 2, 10, dtype=torch.bool)], 2)
    layer.compact(every)
    for b in range(2):
        for h in range(2):
            a, n = int(layer.prefix.start[b, h]), int(layer.prefix.length[b, h])
            keys, pos = layer.prefix.keys[a:a + n], layer.prefix.pos[a:a + n]
            score = -F.cosine_similarity(keys, F.normalize(keys, dim=-1).mean(0, keepdim=True))
            score[(pos < 4) | (pos == 48)] = math.inf
            want = pos[score.argsort(descending=True, stable=True)[:24]].sort().values
            at, m = int(cache.layers[1].prefix.start[b, h]), int(cache.layers[1].prefix.length[b, h])
            assert torch.equal(cache.layers[1].prefix.pos[at:at + m], want)


def test_compress_takes_scores_and_its_own_budgets(llama):
    _, cache, _ = ragged_run(llama, tokens(1, 40), 39, ratio=0.5)
    age = torch.arange(49.0).expand(2, 1, 2, 49)
    cache.compress(age, budgets=np.array([[12, 6], [7, 8]]))
    for layer, n in zip(cache.layers, ((12, 6), (7, 8)), strict=True):
        assert layer.prefix.length.tolist() == [list(n)]
        assert layer.prefix.pos[:4].tolist() == [0, 1, 2, 3] and layer.prefix.pos[:n[0]].tolist()[4:] == list(range(53 - n[0], 49))
    with pytest.raises(ValueError, match=r"scores of layer 0 must have shape \(B, Hkv, seen\) = \(1, 2, 49\)"):
        cache.compress(age[..., 1:], ratio=0.5)
    with pytest.raises(ValueError, match="give exactly one of ratio and budget_tokens"):
        cache_of().compress()


def test_rows_of_one_context_may_carry_different_masks(llama):
    ids = tokens(1, 40).expand(3, -1)
    cache = RaggedCache()
    with torch.no_grad():
        llama(ids[:1, :39], past_key_values=cache)
    masks = {i: torch.rand(3, 2, 39, generator=torch.Generator().manual_seed(i)) < 0.4 for i in range(2)}
    for i, mask in masks.items():
        cache.compact(i, mask)
    with Compressor(llama, KeyDiff(), ratio=0.5):
        ours = decode(llama, ids, cache)
    assert torch.equal(ours, reference(llama, ids, full_cache(llama, ids[:, :39]), masks))


def test_sampling_and_repeated_rows_work(llama):
    ids = tokens(1, 40)
    with Compressor(llama, KeyDiff(), ratio=0.5) as compressor:
        cache = compressor.prefill(ids[:, :-1])
        cache.batch_repeat_interleave(2)
        both = decode(llama, ids.expand(2, -1), cache)
        one = decode(llama, ids, compressor.prefill(ids[:, :-1]))
        out = llama.generate(ids, past_key_values=compressor.prefill(ids[:, :-1]), max_new_tokens=3, do_sample=True,
                             num_return_sequences=1, attention_mask=torch.ones_like(ids), pad_token_id=0)
    assert torch.equal(both, one.expand(2, -1)) and out.shape == (1, 43)


def test_layers_with_sliding_windows_stay_uncompressed():
    model = tiny("Mistral", sliding_window=9)
    ids = tokens(2, 40)
    with Compressor(model, KeyDiff(), ratio=0.9) as compressor:
        cache = compressor.prefill(ids[:, :-1])
        size = cache.nbytes()
        ours = decode(model, ids, cache)
    assert full_layers(model) == [] and (cache.lengths() == 8).all() and size["prefix"] == 0
    assert size["total"] == size["tail"] == size["dense_equivalent"] == 2 * 2 * 2 * 2 * 8 * 8 * 4
    assert torch.equal(ours, decode(model, ids, DynamicCache(config=model.config)))
    with pytest.raises(NotImplementedError, match="layer 0 has a sliding window and stays uncompressed"):
        cache.compact(0, torch.ones(2, 2, 40, dtype=torch.bool))


def test_models_that_mix_windows_compress_their_full_layers():
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    model = tiny("Qwen2", num_hidden_layers=3, use_sliding_window=True, sliding_window=9, layer_types=kinds)
    ids = tokens(2, 40)
    assert full_layers(model) == [1, 2]
    with Compressor(model, KeyDiff(), ratio=0.0) as compressor:
        ours = decode(model, ids, compressor.prefill(ids[:, :-1]))
    assert torch.equal(ours, decode(model, ids, DynamicCache(config=model.config)))
    for budgets in (np.array([[5, 7], [1, 2]]), np.array([[3, 3], [5, 7], [1, 2]])):
        cache = Compressor(model, KeyDiff(), budgets=budgets).prefill(ids)
        assert cache.lengths().tolist() == [[[8, 8]] * 2, [[5, 7]] * 2, [[1, 2]] * 2]
    assert Compressor(model, KeyDiff(), budget_tokens=31).prefill(ids).lengths()[1:].sum() == 62


def test_score_context_equals_the_scorer_on_a_full_cache(llama):
    ids, found = tokens(2, 40), []
    scorer = ExpectedAttention(n_future=8)
    hooks = [layer.self_attn.register_forward_hook(
        lambda m, a, k, _: found.append(scorer.score(m, k["hidden_states"], *(getattr(k["past_key_values"].layers[m.layer_idx], x)
                                                                            for x in ("keys", "values")), k["position_embeddings"])),
        with_kwargs=True) for layer in llama.model.layers]
    full_cache(llama, ids)
    for hook in hooks:
        hook.remove()
    scores = score_context(llama, scorer, ids)
    assert scores.dtype == torch.float32 and torch.allclose(scores, torch.stack(found), atol=1e-6)
    assert not any(m._forward_hooks for m in llama.modules())


def test_generate_joins_context_and_question(llama):
    words = SimpleNamespace(encode=lambda text, **_: [ord(c) % 64 for c in text],
                            decode=lambda ids, **_: ",".join(map(str, ids)))
    context, question = "the key of the door is under the mat", "where?"
    full = generate(llama, words, context, question, compressor=None, max_new_tokens=6)
    same = generate(llama, words, context, question, compressor=Compressor(llama, KeyDiff(), ratio=0.0), max_new_tokens=6)
    ids = torch.tensor([[ord(c) % 64 for c in context + question]])
    ours, _, _ = ragged_run(llama, ids, len(context), steps=6, ratio=0.7)
    compressor = Compressor(llama, KeyDiff(), ratio=0.7)
    assert full == same and len(full.split(",")) == 6
    with compressor:  # may already be entered
        again = generate(llama, words, context, question, compressor=compressor, max_new_tokens=6)
    assert again == ",".join(map(str, ours[0].tolist())) and llama.config._attn_implementation == "sdpa"
    for a, b in ((context, ""), ("", question)):
        with pytest.raises(ValueError, match="context and question must have tokens"):
            generate(llama, words, a, b, compressor=None, max_new_tokens=6)


def test_the_former_attention_returns_also_after_an_error(llama):
    llama.set_attn_implementation("eager")
    with pytest.raises(KeyboardInterrupt), Compressor(llama, KeyDiff(), ratio=0.5):
        assert llama.config._attn_implementation == "collai_ragged"
        raise KeyboardInterrupt
    assert llama.config._attn_implementation == "eager" and not llama._forward_pre_hooks
    llama.set_attn_implementation("sdpa")

    def broken(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Compressor(llama, broken, ratio=0.5).prefill(tokens(1, 20))
    assert not any(m._forward_hooks for m in llama.modules())


def test_padding_is_refused_wherever_it_enters(llama):
    ids = tokens(2, 20)
    padded = torch.ones_like(ids)
    padded[0, 0] = 0
    with Compressor(llama, KeyDiff(), ratio=0.5) as compressor:
        with pytest.raises(ValueError, match="padded batches are not supported: the attention mask has zeros"):
            compressor.prefill(ids, padded)
        with pytest.raises(ValueError, match="padded batches are not supported"):
            llama.generate(ids, attention_mask=padded, max_new_tokens=1, pad_token_id=0)
        assert compressor.prefill(ids, torch.ones_like(ids)).get_seq_length() == 20


def test_short_empty_or_misshapen_contexts_are_refused(llama):
    with pytest.raises(ValueError, match=r"context of 8 tokens is too short for scorer SnapKV \(needs > 8\)"):
        Compressor(llama, SnapKV(window=8), ratio=0.5).prefill(tokens(1, 8))
    for ids in (tokens(1, 8)[0], tokens(1, 0)):
        with pytest.raises(ValueError, match=r"input_ids must be \(B, T\) with T > 0"):
            score_context(llama, KeyDiff(), ids)
    with pytest.raises(ValueError, match=r"scores must have shape \(B, Hkv, T\) = \(1, 2, 8\), got \(1, 2, 7\)"):
        score_context(llama, lambda m, h, k, v, a: k[:, :, 1:, 0], tokens(1, 8))


def test_a_compacted_cache_outside_the_block_says_so(llama):
    for name in ("sdpa", "eager"):
        llama.set_attn_implementation(name)
        cache = Compressor(llama, KeyDiff(), ratio=0.5).prefill(tokens(1, 20))
        with pytest.raises(RuntimeError, match="a compacted cache is no tensor: run the model inside `with compressor:`"):
            decode(llama, tokens(1, 21), cache)
    llama.set_attn_implementation("sdpa")
    whole = tiny("Llama", num_key_value_heads=4)
    with pytest.raises(RuntimeError, match="a compacted cache is no tensor"):
        decode(whole, tokens(1, 21), Compressor(whole, KeyDiff(), ratio=0.5).prefill(tokens(1, 20)))


def test_beams_are_refused(llama):
    ids = tokens(1, 20)
    with Compressor(llama, KeyDiff(), ratio=0.5) as compressor:
        cache = compressor.prefill(ids[:, :-1])
        with pytest.raises(ValueError, match="the cache has 1 batch rows, the new tokens have 2: repeat the cache"):
            decode(llama, ids, cache, num_beams=2)
        cache = compressor.prefill(ids[:, :-1])
        cache.batch_repeat_interleave(2)
        with pytest.raises(NotImplementedError, match="beam search is not supported"):
            decode(llama, ids, cache, num_beams=2)


@pytest.mark.parametrize(("config", "text"), [
    ({"is_encoder_decoder": True}, "unsupported attention layer: SimpleNamespace is an encoder-decoder"),
    ({"layers": ["full_attention", "linear_attention"]}, "unsupported attention layer 1: linear_attention"),
])
def test_other_kinds_of_models_are_refused(config, text):
    inner = SimpleNamespace(layer_types=config.get("layers"), sliding_window=None, num_hidden_layers=2)
    shell = SimpleNamespace(is_encoder_decoder=config.get("is_encoder_decoder", False), get_text_config=lambda decoder: inner)
    with pytest.raises(NotImplementedError, match=text):
        full_layers(SimpleNamespace(config=shell)) if "layers" in config else Compressor(SimpleNamespace(config=shell), KeyDiff(), ratio=0.5)


def test_layers_without_separate_projections_are_refused(llama):
    fused = copy.deepcopy(llama)
    del fused.model.layers[1].self_attn.k_proj
    with pytest.raises(NotImplementedError, match="unsupported attention layer LlamaAttention: no k_proj"):
        Compressor(fused, KeyDiff(), ratio=0.5)
    del fused.model.layers[1].self_attn
    with pytest.raises(NotImplementedError, match="unsupported attention layer 1 in LlamaForCausalLM: no o_proj"):
        Compressor(fused, KeyDiff(), ratio=0.5)
    with pytest.raises(NotImplementedError, match="unsupported attention layer Linear: it uses softcap"):
        ragged._attention(torch.nn.Linear(1, 1), *torch.ones(3, 1, 1, 1, 4), None, softcap=30.0)


# --- memory --------------------------------------------------------------------------------------

def test_dense_layers_die_one_after_the_other(llama):
    storages, alive = [], []

    def spy(module, hidden, keys, values, angles):
        storages.extend(weakref.ref(x.untyped_storage()) for x in (keys, values))
        alive.append(sum(ref() is not None for ref in storages))
        return keys.norm(dim=-1)

    for run in (lambda: Compressor(llama, spy, ratio=0.5).prefill(tokens(2, 50)), lambda: score_context(llama, spy, tokens(2, 50))):
        held = run()
        assert alive == [2, 2] and not any(ref() is not None for ref in storages)
        storages.clear(), alive.clear()
        del held


def test_bytes_agree_with_what_is_alive(llama):
    ids = tokens(2, 50)
    Compressor(llama, KeyDiff(), ratio=0.5).prefill(ids)

    def live():
        gc.collect()
        held = [t.untyped_storage() for t in gc.get_objects() if type(t) is torch.Tensor]
        return sum({s.data_ptr(): s.nbytes() for s in held}.values())

    before = live()
    ours, cache, masks = ragged_run(llama, ids, 50 - 1, ratio=0.8, budgets="adakv")
    del ours, masks
    size, grown = cache.nbytes(), live() - before
    assert size["total"] == size["prefix"] + size["tail"] + size["index"] == grown
    assert size["prefix"] == cache.lengths().sum() * 2 * 8 * 4
    assert size["dense_equivalent"] == 2 * 2 * 2 * 2 * 59 * 8 * 4
    room = cache.layers[0].tail.keys.shape[2]
    assert size["tail"] == 2 * 2 * 2 * 2 * room * 8 * 4 and 10 <= room <= 64
    assert size["index"] <= 9 * cache.lengths().sum() + 2 * 4 * 64


def test_counts_tell_the_scorer_which_share_they_evict(llama):
    ids = tokens(1, 40)
    with Compressor(llama, StreamingLLM(), budgets=np.full((2, 2), 20)) as given:
        cache = given.prefill(ids)
    assert cache.layers[0].prefix.pos.tolist() == [*range(4), *range(24, 40)] * 2


def test_compressing_again_heeds_the_kind_of_budgets(llama):
    ids = tokens(1, 40)
    with Compressor(llama, KeyDiff(), ratio=0.5) as given:
        cache = given.prefill(ids)
        with pytest.raises(ValueError, match="give exactly one of ratio and budget_tokens"):
            cache.compress(budgets="adakv")
        with pytest.raises(ValueError, match="budgets must be 'uniform', 'adakv', 'pyramid'"):
            cache.compress(ratio=0.5, budgets="best")
        cache.compress(ratio=0.75, budgets="uniform")
    assert (cache.lengths() == 10).all()


class _Opening:
    """A tokenizer whose own texts start with token 7."""

    bos_token_id = 7

    def encode(self, text, add_special_tokens=True):
        return [7] * add_special_tokens + [ord(c) % 50 + 10 for c in text]

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))


def test_a_generated_answer_starts_from_the_opening_token_of_the_tokenizer(llama):
    said = generate(llama, _Opening(), "abcdefgh", "ij", compressor=None, max_new_tokens=3)
    ids = torch.tensor([[7, *_Opening().encode("abcdefghij", add_special_tokens=False)]])
    wanted = llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)[0, ids.shape[1]:]
    assert said == _Opening().decode(wanted.tolist())
