"""TinyLM against transformers' Qwen3, its cache against plain calls, files, and bad input."""
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.core.tinylm import CharTokenizer, KVCache, TinyLM, rotation

SIZES = {"hidden": 48, "layers": 3, "heads": 6, "kv_heads": 2, "head_dim": 10, "mlp": 80, "rope_theta": 5000.0}


def wide(model: TinyLM, seed: int = 0) -> TinyLM:
    """Redraw the weights so that every part of the model matters."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for w in model.parameters():
            w.uniform_(0.5, 1.5, generator=g) if w.ndim == 1 else w.normal_(0, 0.3, generator=g)
    return model


@pytest.fixture(scope="module")
def model():
    return wide(TinyLM(17, **SIZES))


@pytest.fixture(scope="module")
def qwen(model):
    from transformers import Qwen3Config, Qwen3ForCausalLM
    c = model.config
    shape = Qwen3Config(vocab_size=17, hidden_size=c["hidden"], num_hidden_layers=c["layers"], num_attention_heads=c["heads"],
                        num_key_value_heads=c["kv_heads"], head_dim=c["head_dim"], intermediate_size=c["mlp"],
                        tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": c["rope_theta"]})
    peer = Qwen3ForCausalLM(shape).eval()
    peer.load_state_dict(model.state_dict())
    return peer


@pytest.fixture(scope="module")
def batch():
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 17, (5, 14), generator=g)
    mask = (torch.arange(14) >= torch.tensor([[0], [1], [3], [7], [13]])).long()
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def far(a, b, mask):
    """Largest difference of logits on tokens."""
    return ((a - b).abs() * mask[..., None]).max().item()


@torch.no_grad()
def test_logits_are_those_of_qwen3(model, qwen, batch):
    ids, mask, place = batch
    theirs = qwen(ids, attention_mask=mask, position_ids=place).logits
    assert theirs.abs().max() > 3
    assert far(model(ids, mask, place).logits, theirs, mask) < 1e-5
    assert far(model(ids, mask).logits, qwen(ids, attention_mask=mask).logits, mask) < 1e-5
    assert far(model(ids).logits, qwen(ids).logits, torch.ones_like(mask)) < 1e-5
    assert (theirs - qwen(ids).logits).abs().max() > 0.1, "padding must matter, or the test tests nothing"
    hidden = model.base_model(ids, mask, place).last_hidden_state
    assert far(hidden, qwen.base_model(ids, attention_mask=mask, position_ids=place).last_hidden_state, mask) < 1e-5


@torch.no_grad()
def test_the_cache_gives_the_logits_of_qwen3s_cache(model, qwen, batch):
    ids, mask, place = batch
    ours, theirs = None, None
    for a, b in ((0, 6), (6, 7), (7, 8), (8, 12), (12, 14)):
        args = {"attention_mask": mask[:, :b], "position_ids": place[:, a:b], "use_cache": True}
        mine, other = (m(ids[:, a:b], past_key_values=c, **args) for m, c in ((model, ours), (qwen, theirs)))
        assert far(mine.logits, other.logits, mask[:, a:b]) < 1e-5
        ours, theirs = mine.past_key_values, other.past_key_values
    assert ours.length == theirs.get_seq_length() == 14


def test_gradients_are_those_of_qwen3(model, qwen, batch):
    ids, mask, place = batch
    for m in (model, qwen):
        m.zero_grad()
        logits = m(ids, attention_mask=mask, position_ids=place).logits
        (logits.log_softmax(-1)[..., 3] * mask).mean().backward()
    theirs = dict(qwen.named_parameters())
    for name, w in model.named_parameters():
        assert w.grad.abs().max() > 0
        assert (w.grad - theirs[name].grad).abs().max() < 1e-5 * max(1, theirs[name].grad.abs().max())


def test_first_weights_are_those_qwen3_would_have(model):
    fresh = TinyLM(17, **SIZES, seed=3)
    for w in fresh.parameters():
        if w.ndim == 1:
            assert (w == 1).all()
        else:
            assert abs(w.std() - 0.02) < 0.004 and abs(w.mean()) < 0.004
    assert not torch.equal(fresh.lm_head.weight, TinyLM(17, **SIZES, seed=4).lm_head.weight)
    assert torch.equal(fresh.lm_head.weight, TinyLM(**fresh.config).lm_head.weight)


@settings(deadline=None, max_examples=25)
@given(cuts=st.sets(st.integers(1, 13)), capacity=st.integers(1, 20))
def test_any_split_gives_the_logits_of_one_call(cuts, capacity):
    model = wide(TinyLM(9, hidden=16, heads=2, kv_heads=1, head_dim=8, mlp=16))
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 9, (3, 14), generator=g)
    mask = (torch.arange(14) >= torch.tensor([[0], [5], [13]])).long()
    cache, pieces, edges = KVCache(model, 3, capacity), [], [0, *sorted(cuts), 14]
    with torch.no_grad():
        for a, b in pairwise(edges):
            pieces.append(model(ids[:, a:b], mask[:, :b], past_key_values=cache).logits)
        assert far(torch.cat(pieces, 1), model(ids, mask).logits, mask) < 1e-4


@torch.no_grad()
def test_a_cache_without_mask_is_causal(model, batch):
    ids = batch[0]
    first = model(ids[:, :9], use_cache=True)
    rest = model(ids[:, 9:], past_key_values=first.past_key_values)
    assert (torch.cat((first.logits, rest.logits), 1) - model(ids).logits).abs().max() < 1e-4


@torch.no_grad()
def test_a_fixed_cache_never_changes_its_shape(model, batch):
    ids, mask, place = batch
    cache, reach = KVCache(model, 5, 20, fixed=True), torch.zeros(5, 20, dtype=torch.long)
    for t in range(14):
        cache.slot.fill_(t)
        reach[:, t] = mask[:, t]
        out = model(ids[:, t:t + 1], reach, place[:, t:t + 1], cache).logits
        assert cache.keys.shape == (3, 5, 2, 20, 10)
    assert (out[:, 0] - model(ids, mask, place).logits[:, -1]).abs().max() < 1e-4
    assert not cache.keys[:, :, :, 14:].any()


@torch.no_grad()
def test_rows_of_a_cache_are_copied_and_dropped(model, batch):
    ids, mask, place = batch
    cache = model.base_model(ids[:, :13], mask[:, :13], place[:, :13], use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    keep = torch.tensor([9, 0, 5])
    cache.batch_select_indices(keep)
    rows = keep // 2
    out = model(ids[rows, 13:], mask[rows], place[rows, 13:], cache).logits
    assert (out - model(ids, mask, place).logits[rows, 13:]).abs().max() < 1e-4


@torch.no_grad()
def test_low_precision_stays_close_and_keeps_its_dtype(model, batch):
    ids, mask, place = batch
    low = TinyLM(**model.config).to(torch.bfloat16)
    low.load_state_dict(model.state_dict())
    out = low(ids, mask, place, use_cache=True)
    assert out.logits.dtype == out.past_key_values.keys.dtype == torch.bfloat16
    whole = model(ids, mask, place).logits
    assert 0 < far(out.logits.float(), whole, mask) < 0.15 * whole.abs().max()


def test_files_keep_config_weights_and_dtype(model, batch, tmp_path):
    path = tmp_path / "m.safetensors"
    for dtype in (torch.float32, torch.bfloat16):
        TinyLM(**model.config).to(dtype).save(path)
        again = TinyLM.load(path)
        assert again.config == model.config and again.lm_head.weight.dtype == dtype
        assert again.lm_head.weight.requires_grad
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    from safetensors.torch import save_file
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"m.safetensors holds no config: it wasn't written by save"):
        TinyLM.load(path)
    with pytest.raises(FileNotFoundError):
        TinyLM.load(tmp_path / "none.safetensors")


def test_rotation_is_a_rotation():
    cos, sin = rotation(torch.arange(50)[None], 12, 1e4)
    assert cos.shape == sin.shape == (1, 1, 50, 12)
    assert torch.allclose(cos**2 + sin**2, torch.ones(50, 12), atol=1e-6)
    assert torch.allclose(torch.atan2(sin[0, 0, 1, :6], cos[0, 0, 1, :6]), 1e4 ** (-torch.arange(6) / 6), atol=1e-6)


@pytest.mark.parametrize(("change", "text"), [
    ({"vocab_size": 0}, "sizes must be at least 1, got vocab_size=0"), ({"mlp": -2}, "at least 1, got mlp=-2"),
    ({"heads": 5}, "kv_heads must divide heads and head_dim be even, got heads=5, kv_heads=2, head_dim=10"),
    ({"head_dim": 7}, "head_dim be even, got heads=6, kv_heads=2, head_dim=7")])
def test_impossible_sizes_are_refused(change, text):
    with pytest.raises(ValueError, match=text):
        TinyLM(**({"vocab_size": 17, **SIZES} | change))


def test_impossible_calls_are_refused(model, batch):
    ids, mask, _ = batch
    for call, text in ((lambda: model(ids, mask[:, 1:]), r"attention_mask must be \(5, 14\), one entry a position, got \(5, 13\)"),
                       (lambda: model(ids[:, :0]), r"at least one position, got shape \(5, 0\)"),
                       (lambda: model(ids[0]), r"input_ids must be \(B, T\), got shape \(14,\)"),
                       (lambda: model.base_model(ids[None], use_cache=True), r"input_ids must be \(B, T\), got shape \(1, 5, 14\)"),
                       (lambda: model(ids, past_key_values=KVCache(model, 4, 14)), "the cache has 4 rows, input_ids has 5"),
                       (lambda: model(ids[:, :1], past_key_values=KVCache(model, 5, 14, fixed=True)), "an attention_mask, got 1"),
                       (lambda: model(ids, mask, past_key_values=KVCache(model, 5, 14, fixed=True)), "one token a call")):
        with pytest.raises(ValueError, match=text):
            call()


@given(st.text("0123456789+=;.", max_size=30))
def test_text_comes_back(text):
    tok = CharTokenizer("0123456789+=;.")
    ids = tok.encode(text, add_special_tokens=False)
    assert len(ids) == len(text) and all(2 <= i < len(tok) for i in ids)
    assert tok.decode([0, 0, *ids, 1]) == tok.decode(torch.tensor([*ids, 1])) == text


def test_the_tokenizer_refuses_what_it_does_not_know():
    for call, text in ((lambda: CharTokenizer(""), "alphabet must be distinct characters, at least one, got ''"),
                       (lambda: CharTokenizer("aa"), "got 'aa'"),
                       (lambda: CharTokenizer("ab").encode("abc"), "character 'c' of 'abc' is not in the alphabet 'ab'"),
                       (lambda: CharTokenizer("ab").decode([4]), r"ids must lie in \[0, 4\), got 4"),
                       (lambda: CharTokenizer("ab").decode([-1]), r"ids must lie in \[0, 4\), got -1")):
        with pytest.raises(ValueError, match=text):
            call()
    assert CharTokenizer("ab").decode([0, 2, 1], skip_special_tokens=False) == "<pad>a<eos>"


def test_a_tree_of_texts_in_one_pass_reads_as_each_text_alone():
    """With a mask of (B, 1, T, T), branches that share a beginning are packed behind it and do not see each other."""
    model = TinyLM(vocab_size=11, hidden=16, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=24, seed=3)
    trunk, twigs = [1, 5, 2, 9, 4, 3], [(3, [7, 8]), (6, [7, 8, 2]), (1, [4])]
    ids, place = list(trunk), list(range(6))
    for start, twig in twigs:
        ids, place = ids + twig, place + list(range(start, start + len(twig)))
    looks = torch.ones(len(ids), len(ids)).tril().bool()
    at = 6
    for start, twig in twigs:
        looks[at:at + len(twig), start:at] = False
        at += len(twig)
    with torch.no_grad():
        packed = model(torch.tensor([ids]), looks[None, None], torch.tensor([place])).logits[0]
        added = torch.zeros(looks.shape).masked_fill(~looks, -1e9)
        again = model(torch.tensor([ids]), added[None, None], torch.tensor([place])).logits[0]
        at = 6
        for start, twig in twigs:
            alone = model(torch.tensor([trunk[:start] + twig])).logits[0, start:]
            for some in (packed, again):
                assert torch.allclose(some[at:at + len(twig)], alone, atol=1e-5)
            at += len(twig)
    with pytest.raises(ValueError, match=r"attention_mask must be \(1, 12\), one entry a position, got \(1, 1, 5, 5\)"):
        model(torch.tensor([ids]), looks[None, None, :5, :5])
