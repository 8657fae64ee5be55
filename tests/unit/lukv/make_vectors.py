"""Record what kvpress 0.5.5 answers, as test vectors: scores of its eight scorers and counts of its allocation rules.

kvpress pins an old transformers and patches attention when it is imported, so it never enters this project's
environment. It runs here only, in one of its own:

    python3.11 -m venv build/peer
    build/peer/bin/pip install torch==2.13.0 kvpress==0.5.5
    build/peer/bin/python tests/unit/lukv/make_vectors.py

The file `nbs/lukv/results/kvpress_0_5_5.npz` is written anew; its arrays are explained below where they are made.
Everything is computed in float32 on one CPU thread. Inputs are stored, not seeds, so nothing depends on a generator.
"""
from pathlib import Path
from types import SimpleNamespace

import kvpress
import numpy as np
import torch
import transformers
from kvpress.presses.scorer_press import ScorerPress
from transformers import DynamicCache, LlamaConfig, LlamaModel, Qwen3Config, Qwen3Model

FILE = Path(__file__).parents[3] / "nbs" / "lukv" / "results" / "kvpress_0_5_5.npz"
LAYER, WIDTH, HEADS, KV_HEADS, HEAD_DIM = 1, 24, 4, 2, 8
ROPE = {"llama": {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
                  "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        "qwen3": {"rope_type": "default", "rope_theta": 1_000_000.0}}
PRESSES = {"SnapKV": kvpress.SnapKVPress(window_size=8), "SnapKV_9": kvpress.SnapKVPress(window_size=16, kernel_size=9),
           "ExpectedAttention": kvpress.ExpectedAttentionPress(),
           "ExpectedAttention_eps": kvpress.ExpectedAttentionPress(epsilon=0.02),
           "ExpectedAttention_mean": kvpress.ExpectedAttentionPress(n_future_positions=7, n_sink=2,
                                                                    use_covariance=False, use_vnorm=False),
           "KeyDiff": kvpress.KeyDiffPress(), "Knorm": kvpress.KnormPress(), "TOVA": kvpress.TOVAPress(),
           "StreamingLLM": kvpress.StreamingLLMPress(compression_ratio=0.8), "Random": kvpress.RandomPress(seed=5),
           "ObservedAttention": kvpress.ObservedAttentionPress()}


def coarse(*shape, scale=1.0):
    """Normal numbers on a grid of 1/64, which float16 holds exactly and zip shrinks."""
    return (torch.randn(*shape) * scale * 64).round() / 64


def attention_layer(family):
    """One attention layer of a tiny random model, and the model's rotary embedding."""
    config_class, model_class = {"llama": (LlamaConfig, LlamaModel), "qwen3": (Qwen3Config, Qwen3Model)}[family]
    config = config_class(hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM,
                          num_hidden_layers=2, intermediate_size=8, vocab_size=8, max_position_embeddings=512,
                          rope_parameters=ROPE[family], attn_implementation="eager")
    model = model_class(config).eval()
    layer = model.layers[LAYER].self_attn
    for parameter in layer.parameters():
        parameter.data = coarse(*parameter.shape, scale=0.35) + (parameter.dim() == 1)
    layer.rotary_emb = model.rotary_emb
    return layer


def scores(family, batch, length):
    """Arrays `<family>_<batch>_*`: hidden, keys, values, cos, sin, q_proj, q_norm (Qwen3) and `score_<press>`."""
    layer, hidden = attention_layer(family), coarse(batch, length, WIDTH)
    rotation = layer.rotary_emb(hidden, torch.arange(length)[None])
    cache = DynamicCache(config=layer.config)
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    _, attentions = layer(hidden, position_embeddings=rotation, attention_mask=mask, past_key_values=cache,
                          cache_position=torch.arange(length))
    keys, values = cache.layers[LAYER].keys, cache.layers[LAYER].values
    found = {"hidden": hidden.half(), "keys": keys, "values": values, "cos": rotation[0], "sin": rotation[1],
             "q_proj": layer.q_proj.weight.half()}
    if family == "qwen3":
        found["q_norm"] = layer.q_norm.weight.half()
    for name, press in PRESSES.items():
        given = attentions if name == "ObservedAttention" else None
        found[f"score_{name}"] = press.score(layer, hidden, keys, values, given, {"position_embeddings": rotation})
    return {f"{family}_{batch}_{name}": x.numpy() for name, x in found.items()}


class Given(ScorerPress):
    """Scores that were made before."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return self.given.clone()


def kept(press, layer_idx, shape):
    """Entries a masking press keeps per head of one layer."""
    module = SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa"), layer_idx=layer_idx)
    keys = torch.zeros(1, *shape, 1)
    press.compress(module, None, keys, keys, None, {})
    counts = np.full(shape[0], shape[1])
    if module.masked_key_indices is not None:
        counts -= np.bincount(module.masked_key_indices[1].numpy(), minlength=shape[0])
    return counts


def adakv():
    """`adakv_scores` [L, Hkv, T]; `adakv_cases` [n, 2] = ratio, alpha; `adakv_kept` [n, L, Hkv] int64."""
    given = torch.randn(3, 4, 60).exp() * torch.tensor([0.2, 1.0, 1.5, 6.0])[:, None]
    cases = [(ratio, alpha) for ratio in (0.1, 0.5, 0.8, 0.9, 0.95) for alpha in (0.0, 0.2, 0.7, 1.0)]
    counts = []
    for ratio, alpha in cases:
        press = kvpress.AdaKVPress(Given(compression_ratio=ratio), alpha_safeguard=alpha)
        rows = []
        for layer, scores_of_layer in enumerate(given):
            press.press.given = scores_of_layer[None]
            rows.append(kept(press, layer, (4, 60)))
        counts.append(rows)
    return {"adakv_scores": given.numpy(), "adakv_cases": np.array(cases), "adakv_kept": np.array(counts)}


def pyramid():
    """`pyramid_cases` [n, 5] = L, T, ratio, window, beta; `pyramid_kept` [n, 32] int64 = per head, by layer, then -1."""
    cases, counts = [], []
    for n_layers, length, ratio, window, beta in (
            (8, 1000, 0.5, 64, 20), (8, 1000, 0.8, 64, 20), (8, 1000, 0.9, 64, 20), (32, 4096, 0.8, 64, 20),
            (32, 4096, 0.8, 32, 10), (32, 4097, 0.3, 64, 20), (6, 777, 0.8, 8, 20), (6, 777, 0.65, 8, 3),
            (2, 100, 0.1, 4, 5), (1, 500, 0.5, 8, 20), (6, 40, 0.8, 8, 20), (4, 5, 0.95, 1, 20), (6, 1024, 0.8, 1, 20)):
        press = kvpress.PyramidKVPress(compression_ratio=ratio, window_size=window, beta=beta)
        config = SimpleNamespace(num_hidden_layers=n_layers)
        row = [press.get_layer_budget(SimpleNamespace(config=config, layer_idx=i), length) for i in range(n_layers)]
        cases.append((n_layers, length, ratio, window, beta))
        counts.append(row + [-1] * (32 - n_layers))
    return {"pyramid_cases": np.array(cases, dtype=float), "pyramid_kept": np.array(counts)}


def lukv():
    """`lukv_curve` [99, L, Hkv] float32; `lukv_cases` [n, 2] = T, ratio; `lukv_kept` [n, L, Hkv] int64."""
    rate = np.arange(1, 100)[:, None, None] / 100
    noise = np.random.default_rng(7).normal(size=(1, 3, 5)) * 1.5
    curve = 1 / (1 + np.exp(-np.log(rate / (1 - rate)) - noise))
    curve[:, 0, 0], curve[:, 1, 1] = 0.0, 1.0
    curve = curve.astype(np.float32)
    ratios = (0.004, 0.3, 0.5, 0.8, 0.875, 0.99)
    cases = [(length, ratio) for length in (7, 50, 1000, 4093, 131_071) for ratio in ratios]
    counts = []
    for length, ratio in cases:
        inner = Given(compression_ratio=ratio)
        inner.given = torch.rand(1, 5, length)
        press = kvpress.LUKVPress(inner, compression_ratio=ratio)
        press._budget_curves = curve
        counts.append([kept(press, layer, (5, length)) for layer in range(3)])
    return {"lukv_curve": curve, "lukv_cases": np.array(cases), "lukv_kept": np.array(counts)}


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.no_grad():
        arrays = {}
        for family, batch, length in (("llama", 1, 48), ("llama", 2, 40), ("qwen3", 1, 40), ("qwen3", 2, 48)):
            arrays |= scores(family, batch, length)
        arrays |= adakv() | pyramid() | lukv()
    arrays["versions"] = np.array(["kvpress 0.5.5", f"transformers {transformers.__version__}",
                                   f"torch {torch.__version__.split('+')[0]}", f"numpy {np.__version__}"])
    FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE.name}: {len(arrays)} arrays, {FILE.stat().st_size / 1024:.0f} kB")
