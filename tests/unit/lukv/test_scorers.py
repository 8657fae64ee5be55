"""Scorers: the peer's numbers, the classes of transformers, protection, precision, memory, and what is refused."""
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from collai.lukv import scorers
from collai.lukv.scorers import (
    TOVA,
    ExpectedAttention,
    KeyDiff,
    Knorm,
    ObservedAttention,
    Random,
    Scorer,
    SnapKV,
    StreamingLLM,
    force_protected,
)

FILE = Path(__file__).parents[3] / "nbs" / "lukv" / "results" / "kvpress_0_5_5.npz"
OURS = {"SnapKV": SnapKV(window=8), "SnapKV_9": SnapKV(window=16, kernel=9), "ExpectedAttention": ExpectedAttention(),
        "ExpectedAttention_eps": ExpectedAttention(eps=0.02),
        "ExpectedAttention_mean": ExpectedAttention(n_future=7, n_sink=2, use_cov=False, use_vnorm=False),
        "KeyDiff": KeyDiff(), "Knorm": Knorm(), "TOVA": TOVA(), "StreamingLLM": StreamingLLM(ratio=0.8),
        "Random": Random(seed=5), "ObservedAttention": ObservedAttention()}
ROPE = {"llama": {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
                  "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        "qwen3": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "mistral": {"rope_type": "default", "rope_theta": 10_000.0}}
CASES = ("llama_1", "llama_2", "qwen3_1", "qwen3_2")
quickly = settings(deadline=None, derandomize=True, max_examples=40)
each_case = pytest.mark.parametrize("case", CASES)
EIGHT = [SnapKV(window=8), ExpectedAttention(), KeyDiff(), Knorm(), TOVA(), StreamingLLM(ratio=0.5), Random(),
         ObservedAttention()]
each_scorer = pytest.mark.parametrize("scorer", EIGHT, ids=lambda s: s.name)


@pytest.fixture(scope="module")
def peer():
    with np.load(FILE) as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored.files if stored[name].dtype.kind == "f"}


def attention_class(family):
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig
    from transformers.models.mistral.modeling_mistral import MistralAttention, MistralConfig
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3Config
    return {"llama": (LlamaAttention, LlamaConfig), "qwen3": (Qwen3Attention, Qwen3Config),
            "mistral": (MistralAttention, MistralConfig)}[family]


def real_layer(family, layer_idx=1):
    """Attention layer of transformers with random weights, two query heads on each of two key-value heads."""
    attention, config = attention_class(family)
    config = config(hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=2,
                    intermediate_size=8, vocab_size=8, max_position_embeddings=512, rope_parameters=dict(ROPE[family]))
    config._attn_implementation = "eager"
    return attention(config, layer_idx).eval().requires_grad_(False)


def recorded(peer, case):
    """Stored inputs of one case, in the attention class they came from."""
    layer = real_layer(case[:5])
    layer.q_proj.weight.copy_(peer[f"{case}_q_proj"])
    if hasattr(layer, "q_norm"):
        layer.q_norm.weight.copy_(peer[f"{case}_q_norm"])
    rotation = peer[f"{case}_cos"], peer[f"{case}_sin"]
    return layer, peer[f"{case}_hidden"].float(), peer[f"{case}_keys"], peer[f"{case}_values"], rotation


def inputs(batch=2, length=40, family="qwen3", dtype=torch.float32, seed=0):
    """Random inputs that need not belong together."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    layer = real_layer(family).to(dtype)
    layer.q_proj.weight.copy_(draw(32, 24) / 3)
    angle = (torch.arange(length)[:, None] * 1e6 ** (-torch.arange(4) / 4)).repeat(1, 2)[None].to(dtype)
    hidden, keys, values = draw(batch, length, 24), draw(batch, 2, length, 8), draw(batch, 2, length, 8)
    return layer, hidden, keys, values, (angle.cos(), angle.sin())


@each_case
@pytest.mark.parametrize("name", OURS)
def test_scores_are_those_of_the_peer(peer, case, name):
    found = OURS[name].score(*recorded(peer, case))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, peer[f"{case}_score_{name}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_recomputed_attention_is_the_models_own(family):
    """Eager attention of transformers gives the matrix that ObservedAttention, TOVA and SnapKV recompute."""
    from transformers import DynamicCache
    layer, hidden, _, _, rotation = inputs(family=family)
    cache = DynamicCache(config=layer.config)
    mask = torch.full((40, 40), -1e30).triu(1)[None, None]
    _, a = layer(hidden, position_embeddings=rotation, attention_mask=mask, past_key_values=cache)
    given = layer, hidden, cache.layers[1].keys, cache.layers[1].values, rotation
    grouped = a.unflatten(1, (2, 2))
    torch.testing.assert_close(ObservedAttention().score(*given), (grouped.sum(3) / torch.arange(40, 0, -1)).mean(2))
    torch.testing.assert_close(TOVA().score(*given)[:, 1, :-1], a[:, :, -1, :-1].mean(1))
    raw = SnapKV(window=8, kernel=1).score(*given)[..., :-8]
    torch.testing.assert_close(raw, grouped[..., -8:, :-8].mean((2, 3)))


def test_maximum_pooling_takes_the_best_neighbour_of_every_query_head():
    given = inputs(batch=1)
    pooled = SnapKV(window=8, kernel=5, pool="max").score(*given)
    one_head = [t[:, :1] for t in given[2:4]]
    layer = SimpleNamespace(q_proj=lambda h: given[0].q_proj(h)[..., :8], q_norm=given[0].q_norm)
    raw = SnapKV(window=8, kernel=1).score(layer, given[1], *one_head, given[4])[0, 0, :-8]
    single = SnapKV(window=8, kernel=5, pool="max").score(layer, given[1], *one_head, given[4])[0, 0, :-8]
    assert torch.equal(single, torch.stack([raw[max(0, i - 2):i + 3].max() for i in range(32)]))
    assert (pooled >= SnapKV(window=8, kernel=5).score(*given))[..., :-8].all()


@each_scorer
def test_batch_rows_do_not_mix(scorer):
    """Up to the constant that lifts protected positions above the batch's maximum, rows are scored alone."""
    layer, hidden, keys, values, rotation = inputs()
    both = scorer.score(layer, hidden, keys, values, rotation)
    alone = scorer.score(layer, hidden[1:], keys[1:], values[1:], rotation)
    if scorer.name == "Random":
        assert both[1].ne(both[0]).all()
    else:
        free = alone[0] < alone.max()
        torch.testing.assert_close(both[1][free], alone[0][free])


@each_scorer
def test_a_score_is_float32_finite_repeatable_and_leaves_its_inputs_alone(scorer):
    given = inputs()
    before = [t.clone() for t in (*given[1:4], *given[4])]
    found = scorer.score(*given)
    assert found.dtype == torch.float32 and found.shape == (2, 2, 40) and torch.isfinite(found).all()
    assert not found.requires_grad
    assert torch.equal(found, scorer.score(*given))
    assert all(torch.equal(a, b) for a, b in zip(before, (*given[1:4], *given[4]), strict=True))


@each_scorer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs_are_summed_in_float32(scorer, dtype):
    """With a projection that rounds nothing, scores are those of the same numbers in float32."""
    _, _, keys, values, rotation = inputs(dtype=dtype)
    hidden = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer = SimpleNamespace(q_proj=lambda h: h, layer_idx=0, config=SimpleNamespace(rope_theta=1e4))
    found = scorer.score(layer, hidden, keys, values, rotation)
    wide = scorer.score(layer, hidden.float(), keys.float(), values.float(), tuple(t.float() for t in rotation))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wide, rtol=1e-6, atol=1e-6)


@each_scorer
def test_a_layer_in_half_precision_is_close_to_the_same_in_float32(scorer):
    given = inputs(dtype=torch.bfloat16)
    layer = real_layer("qwen3")
    layer.q_proj.weight.copy_(given[0].q_proj.weight)
    wide = layer, *(t.float() for t in given[1:4]), tuple(t.float() for t in given[4])
    torch.testing.assert_close(scorer.score(*given), scorer.score(*wide), rtol=0.05, atol=5e-3)


@pytest.mark.parametrize("scorer", [SnapKV(window=8), TOVA(), ExpectedAttention(), KeyDiff()], ids=lambda s: s.name)
def test_one_rotation_serves_all_rows_of_a_batch(scorer):
    layer, hidden, keys, values, rotation = inputs()
    every = tuple(t.expand(2, -1, -1) for t in rotation)
    found = scorer.score(layer, hidden, keys, values, every)
    assert torch.equal(found, scorer.score(layer, hidden, keys, values, rotation))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            self.size = max(self.size, t.numel() if isinstance(t, torch.Tensor) else 0)
        return out


@each_scorer
def test_no_tensor_grows_with_the_square_of_the_context(scorer, monkeypatch):
    monkeypatch.setattr(scorers, "_BLOCK", 32 * 1024)
    given = inputs(batch=1, length=1024)
    with Largest() as seen:
        scorer.score(*given)
    assert 0 < seen.size <= 1024 * 64 < 1024 * 1024


@pytest.mark.parametrize("block", [1, 81, 1000, 2**24])
def test_blocks_of_rows_do_not_change_observed_attention(monkeypatch, block):
    given = inputs()
    whole = ObservedAttention().score(*given)
    monkeypatch.setattr(scorers, "_BLOCK", block)
    torch.testing.assert_close(ObservedAttention().score(*given), whole)


@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 2**16))
@quickly
def test_moments_from_blocks_are_those_of_all_rows(length, block, seed):
    generator = torch.Generator().manual_seed(seed)
    weight, hidden = torch.randn(24, 32, generator=generator) / 3, torch.randn(2, length, 24, generator=generator) + 3
    mean, cov = scorers._query_moments(SimpleNamespace(q_proj=lambda h: h @ weight), hidden, 8, block)
    q = (hidden.double() @ weight.double()).unflatten(-1, (4, 8)).transpose(1, 2)
    torch.testing.assert_close(mean.double(), q.mean(2), rtol=1e-5, atol=1e-5)
    centred = q - q.mean(2, keepdim=True)
    torch.testing.assert_close(cov.double(), centred.mT @ centred / length, rtol=1e-4, atol=1e-5)


def test_a_rotary_embedding_of_the_layer_goes_before_the_config():
    layer, *rest = inputs()
    asked = []

    def tuned(x, position_ids):
        asked.append((x.dtype, position_ids))
        return tuple(1.5 * part for part in rotary(1.0, 0.1, 0.01, 0.001)(x, position_ids))

    without = ExpectedAttention(n_future=9).score(layer, *rest)
    layer.rotary_emb = tuned
    found = ExpectedAttention(n_future=9).score(layer, *rest)
    assert asked[0][0] == torch.float32 and torch.equal(asked[0][1], torch.arange(40, 49)[None])
    assert not torch.allclose(found, without, atol=1e-3)
    cos, sin = scorers._mean_rotation(layer, rest[1], 9)
    assert torch.equal(cos, tuned(cos, torch.arange(40, 49)[None])[0][0].mean(0))
    assert torch.equal(sin, tuned(cos, torch.arange(40, 49)[None])[1][0].mean(0))


LONG = {"original_max_position_embeddings": 128, "factor": 4.0}
KINDS = {"default": {}, "linear": {"factor": 3.0}, "dynamic": {"factor": 2.0},
         "llama3": LONG | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
         "yarn": LONG, "yarn_mscale": LONG | {"mscale": 0.7, "mscale_all_dim": 1.2, "beta_fast": 20, "beta_slow": 2},
         "yarn_given": LONG | {"attention_factor": 1.3, "truncate": False},
         "longrope": LONG | {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]},
         "longrope_ratio": {"original_max_position_embeddings": 128, "short_factor": [1.0] * 4,
                            "long_factor": [2.0] * 4},
         "longrope_given": {"original_max_position_embeddings": 128, "attention_factor": 1.2, "short_factor": [1.0] * 4,
                            "long_factor": [2.0] * 4}}


@pytest.mark.parametrize("length", [100, 600])
@pytest.mark.parametrize("name", KINDS)
def test_frequencies_are_those_of_transformers(name, length):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    kind = name.split("_")[0]
    rope = {**KINDS[name], "rope_type": kind, "rope_theta": 5000.0}
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, head_dim=8, max_position_embeddings=512,
                         rope_parameters=dict(rope))
    function = ROPE_INIT_FUNCTIONS.get(kind, LlamaRotaryEmbedding.compute_default_rope_parameters)
    freq, factor = function(config, device="cpu", seq_len=length)
    ours, own_factor = scorers._rope_frequencies(config, 0, 8, length)
    torch.testing.assert_close(ours, freq, rtol=1e-5, atol=1e-9)
    assert own_factor == pytest.approx(factor)
    old = SimpleNamespace(rope_theta=5000.0, max_position_embeddings=512,
                          rope_scaling={**KINDS[name], "type": kind} if kind != "default" else None)
    again, old_factor = scorers._rope_frequencies(old, 0, 8, length)
    assert torch.equal(again, ours) and old_factor == own_factor


def test_the_rotation_made_from_a_config_is_the_models_own():
    """YaRN makes cosines and sines larger than one."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, head_dim=8, max_position_embeddings=512,
                         rope_parameters={**LONG, "rope_type": "yarn", "rope_theta": 5000.0})
    found = scorers._mean_rotation(SimpleNamespace(config=config, layer_idx=0), torch.zeros(1, 1, 40, 8), 16)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(40, 56)[None])
    assert cos.max() > 1.1
    torch.testing.assert_close(found, (cos[0].mean(0), sin[0].mean(0)))


def test_frequencies_of_partial_rotation_and_of_layer_kinds():
    half = SimpleNamespace(rope_theta=100.0, partial_rotary_factor=0.5)
    freq, _ = scorers._rope_frequencies(half, 0, 8, 10)
    torch.testing.assert_close(freq, torch.tensor([1.0, 0.1]))
    kinds = SimpleNamespace(layer_types=["full_attention", "sliding_attention"], rope_parameters={
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}})
    for layer, theta in ((0, 1e6), (1, 100.0)):
        freq, _ = scorers._rope_frequencies(kinds, layer, 4, 10)
        assert freq[1].item() == pytest.approx(theta**-0.5)


def test_an_unknown_rope_is_refused():
    config = SimpleNamespace(rope_parameters={"rope_type": "axial", "rope_theta": 1.0})
    with pytest.raises(NotImplementedError, match="unsupported attention layer: RoPE of type 'axial'"):
        scorers._rope_frequencies(config, 0, 8, 10)


def rotary(*speeds):
    """Rotary embedding with these angles per position."""
    def at(x, position_ids):
        angle = (position_ids[..., None] * torch.tensor(speeds)).repeat(1, 1, 2)
        return angle.cos(), angle.sin()
    return at


@pytest.mark.parametrize("scorer", [EIGHT[0], EIGHT[1], EIGHT[4], EIGHT[7]], ids=lambda s: s.name)
def test_partial_rotation_is_a_full_one_with_angles_of_zero(scorer):
    """The rotated pairs (0, 2), (1, 3) of a half rotation are (0, 4), (1, 5) of a full one after a change of order."""
    layer, hidden, keys, values, _ = inputs()
    order, here = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7]), torch.arange(40)[None]
    half = SimpleNamespace(q_proj=layer.q_proj, layer_idx=0, rotary_emb=rotary(1.0, 0.01),
                           config=SimpleNamespace(rope_theta=1e4, partial_rotary_factor=0.5))
    whole = SimpleNamespace(q_proj=lambda h: layer.q_proj(h).unflatten(-1, (-1, 8))[..., order].flatten(-2),
                            layer_idx=0, rotary_emb=rotary(1.0, 0.01, 0.0, 0.0))
    found = scorer.score(half, hidden, keys, values, half.rotary_emb(None, here))
    same = scorer.score(whole, hidden, keys[..., order], values, whole.rotary_emb(None, here))
    torch.testing.assert_close(found, same)
    angles = half.rotary_emb(None, here)
    del half.rotary_emb
    torch.testing.assert_close(scorer.score(half, hidden, keys, values, angles), found)


@given(st.integers(0, 12), st.integers(0, 12), st.integers(1, 9))
@quickly
def test_protected_positions_come_first_in_every_ranking(sink, window, length):
    given_scores = torch.randn(2, 3, length, generator=torch.Generator().manual_seed(length))
    copy = given_scores.clone()
    forced = force_protected(given_scores, sink, window)
    safe = [i for i in range(length) if i < sink or i >= length - window]
    assert torch.isinf(forced).sum(-1).eq(len(safe)).all() and torch.isinf(forced[..., safe]).all()
    free = [i for i in range(length) if i not in safe]
    assert torch.equal(forced[..., free], given_scores[..., free]) and torch.equal(given_scores, copy)


def test_protection_cannot_be_negative():
    for sink, window in ((-1, 0), (0, -2)):
        with pytest.raises(ValueError, match=f"sink and window must not be negative, got {sink} and {window}"):
            force_protected(torch.zeros(3), sink, window)
        with pytest.raises(ValueError, match=f"sink and window must not be negative, got {sink} and {window}"):
            Knorm(sink=sink, window=window)


def test_default_protection_and_names():
    table = {type(s).__name__: (type(s)().sink, type(s)().window) for s in EIGHT}
    assert list(table) == [s.name for s in EIGHT]
    assert table == {"KeyDiff": (4, 1), "Knorm": (4, 1), "ExpectedAttention": (4, 1), "SnapKV": (4, 64), "TOVA": (0, 1),
                     "StreamingLLM": (4, 1), "Random": (4, 1), "ObservedAttention": (4, 1)}
    assert (SnapKV(window=32).window, KeyDiff(sink=2, window=7).sink, TOVA(window=3).window) == (32, 2, 3)


def test_settings_can_be_recorded_and_replaced():
    snap = SnapKV(window=32, kernel=7, pool="max", sink=2)
    assert dataclasses.asdict(snap) == {"sink": 2, "window": 32, "kernel": 7, "pool": "max"}
    assert dataclasses.replace(StreamingLLM(), ratio=0.3).ratio == 0.3


@pytest.mark.parametrize(("scorer", "length", "least"), [
    (SnapKV(), 64, 64), (SnapKV(window=2), 4, 4), (ExpectedAttention(n_sink=9), 9, 9), (KeyDiff(), 4, 4),
    (Knorm(sink=0, window=6), 6, 6), (TOVA(), 1, 1), (TOVA(window=0), 1, 1), (StreamingLLM(n_sink=11), 11, 11),
    (Random(), 3, 4), (ObservedAttention(), 4, 4)], ids=lambda x: getattr(x, "name", None))
def test_a_context_that_is_too_short_is_refused_and_one_more_token_is_enough(scorer, length, least):
    text = rf"^context of {length} tokens is too short for scorer {scorer.name} \(needs > {least}\)$"
    with pytest.raises(ValueError, match=text):
        scorer.score(*inputs(length=length))
    assert torch.isfinite(scorer.score(*inputs(length=least + 1))).all()


@pytest.mark.parametrize(("make", "text"), [
    (lambda: SnapKV(window=0), "window must be positive"), (lambda: SnapKV(kernel=2), "kernel odd"),
    (lambda: SnapKV(kernel=-1), "kernel odd"), (lambda: SnapKV(pool="median"), "pool 'avg' or 'max'; got .*median"),
    (lambda: ExpectedAttention(n_future=0), "n_future must be positive"),
    (lambda: ExpectedAttention(n_sink=-1), "n_sink and eps finite and not negative"),
    (lambda: ExpectedAttention(eps=-0.1), "eps=-0.1"), (lambda: ExpectedAttention(eps=math.inf), "eps finite"),
    (lambda: StreamingLLM(ratio=1.0), r"^ratio must be in \[0, 1\)"),
    (lambda: StreamingLLM(ratio=-0.1), r"^ratio must be in \[0, 1\)"),
    (lambda: StreamingLLM(n_sink=-1), "n_sink must not be negative, got -1")])
def test_settings_that_mean_nothing_are_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_a_layer_without_query_projection_is_refused():
    _, *rest = inputs()
    for scorer in (SnapKV(window=8), TOVA(), ExpectedAttention(), ObservedAttention()):
        with pytest.raises(NotImplementedError, match="unsupported attention layer SimpleNamespace: it has no q_proj"):
            scorer.score(SimpleNamespace(), *rest)


def test_a_scorer_of_ones_own_needs_a_rule_only():
    @dataclasses.dataclass
    class Late(Scorer):
        def _score(self, given):
            return torch.arange(given.keys.shape[2]).expand(given.keys.shape[:3])

    found = Late(sink=0).score(*inputs())
    assert found.dtype == torch.float32 and found[1, 1, 7] == 7
    with pytest.raises(NotImplementedError, match="Scorer has no rule of its own"):
        Scorer().score(*inputs())


@given(st.integers(5, 200), st.floats(0, 0.99))
@quickly
def test_streaming_keeps_sinks_and_the_most_recent(length, ratio):
    keys = torch.zeros(1, 1, length, 2)
    unused = torch.zeros(1, length, 2)
    found = StreamingLLM(ratio=ratio).score(None, unused, keys, keys, (unused, unused))[0, 0]
    evicted = torch.arange(4, length)[:length - int(length * (1 - ratio))]
    assert torch.equal(found.eq(0).nonzero()[:, 0], evicted)


def test_key_diff_is_the_mean_cosine_to_all_keys():
    given = inputs(batch=1)
    found, k = KeyDiff().score(*given), given[2].double()
    cosines = torch.nn.functional.cosine_similarity(k[:, :, :, None], k[:, :, None], dim=-1).mean(-1)
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(unit(found.double(), dim=-1), unit(-cosines, dim=-1), rtol=0, atol=1e-6)


def test_expected_attention_meets_a_simulation_of_averaged_future_queries():
    """Gaussian queries, rotated by the mean rotation: mean exponential weights, normalised, to five standard errors."""
    layer, hidden, keys, values, rotation = inputs(batch=1, length=30)
    scorer = ExpectedAttention(n_future=20, n_sink=2, use_vnorm=False, sink=2)
    found = scorer.score(layer, hidden, keys * 0.5, values, rotation)[0, :, 2:].double()
    rng = np.random.default_rng(0)
    q = scorers._queries(layer, hidden[:, 2:], 8)[0].double().numpy()
    angle = np.tile(np.arange(30, 50)[:, None] * 1e6 ** (-np.arange(4) / 4), 2)
    turn = np.block([[np.zeros((4, 4)), -np.eye(4)], [np.eye(4), np.zeros((4, 4))]])
    mean_rotation = (np.cos(angle)[:, None] * np.eye(8) + np.sin(angle)[:, :, None] * turn).mean(0)
    for j in range(2):
        weights, errors = [], []
        for h in (2 * j, 2 * j + 1):
            fresh = rng.multivariate_normal(q[h].mean(0), np.cov(q[h].T, bias=True), size=40_000) @ mean_rotation.T
            e = np.exp(fresh @ keys[0, j, 2:].double().numpy().T * 0.5 / math.sqrt(8))
            weights.append(e.mean(0) / e.mean(0).sum())
            errors.append(e.std(0) / math.sqrt(len(e)) / e.mean(0).sum())
        error = 5 * np.mean(errors, axis=0) + 5 * np.sqrt(np.square(errors).sum()) * np.mean(weights, axis=0)
        assert (np.abs(found[j].numpy() - np.mean(weights, axis=0)) < error).all()
