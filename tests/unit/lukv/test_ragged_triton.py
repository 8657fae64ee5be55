"""Kernels of the ragged cache, run by Triton's interpreter (TRITON_INTERPRET=1) or on a GPU; and what measures them."""
import math
import os
from itertools import pairwise

import numpy as np
import pytest
import torch

from collai.lukv import ragged
from collai.lukv.ragged import Prefix, Tail, measure

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernels = pytest.mark.skipif(
    not ragged._triton_ready() or (DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"),
    reason="the kernels need the package triton, and either a GPU or TRITON_INTERPRET=1")
# the interpreter computes with numpy, which has no bfloat16
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
CLOSE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def case(lengths, *, g=2, tokens=1, dim=32, tail=5, dtype=torch.float32, on_device=False, seed=0):
    """Queries, prefix and tail with the given kept entries a head; room behind the tail is filled with NaN."""
    rng = torch.Generator().manual_seed(seed)
    length = torch.tensor(lengths, dtype=torch.int32)
    rows, heads = length.shape

    def new(*shape):
        return torch.randn(*shape, dim, generator=rng).to(DEVICE, dtype)

    start = (length.flatten().cumsum(0) - length.flatten()).int().view(rows, heads)
    n = int(length.sum())
    keys, values = new(rows, heads, tail + 3), new(rows, heads, tail + 3)
    keys[:, :, tail:], values[:, :, tail:] = math.nan, math.nan
    filled = torch.tensor([tail], dtype=torch.int32, device=DEVICE) if on_device else None
    return new(rows, heads * g, tokens), Prefix(new(n), new(n), start.to(DEVICE), length.to(DEVICE)), Tail(keys, values, tail, filled)


def exact(q, prefix, tail, scale):
    """Output and log-sum-exp in float64, one query row at a time."""
    rows, hq, tokens, _ = q.shape
    out, lse = torch.zeros(q.shape, dtype=torch.float64), torch.full(q.shape[:3], -math.inf, dtype=torch.float64)
    for b in range(rows):
        for h in range(hq):
            for t in range(tokens):
                keys, values = [], []
                if prefix is not None:
                    j = h * prefix.length.shape[1] // hq
                    part = slice(int(prefix.start[b, j]), int(prefix.start[b, j]) + int(prefix.length[b, j]))
                    keys, values = [prefix.keys[part]], [prefix.values[part]]
                if tail is not None:
                    j, seen = h * tail.keys.shape[1] // hq, tail.length - tokens + t + 1
                    keys, values = [*keys, tail.keys[b, j, :seen]], [*values, tail.values[b, j, :seen]]
                logits = torch.cat(keys).double().cpu() @ q[b, h, t].double().cpu() * scale
                if len(logits):
                    out[b, h, t], lse[b, h, t] = logits.softmax(0) @ torch.cat(values).double().cpu(), logits.logsumexp(0)
    return out, lse


def check(q, prefix, tail, tiles=None):
    out, lse = ragged._triton_forward(q, prefix, tail, q.shape[-1] ** -0.5, tiles)
    truth, truth_lse = exact(q, prefix, tail, q.shape[-1] ** -0.5)
    assert out.dtype == q.dtype and lse.dtype == torch.float32 and out.shape == q.shape
    torch.testing.assert_close(out.double().cpu(), truth, rtol=0, atol=CLOSE[q.dtype])
    torch.testing.assert_close(lse.double().cpu(), truth_lse, rtol=0, atol=1e-4 if q.dtype == torch.float32 else 1e-3)


@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [32, 80, 96])
def test_unequal_heads_and_padded_dimensions(dtype, dim):
    check(*case([[300, 0], [7, 33]], g=4, dim=dim, dtype=dtype))


@kernels
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(("tokens", "g", "tail"), [(1, 1, 1), (3, 2, 3), (5, 4, 9), (33, 2, 34)])
def test_several_query_tokens_see_the_tail_causally(tokens, g, tail, on_device):
    check(*case([[20, 3]], g=g, tokens=tokens, tail=tail, on_device=on_device))


@kernels
@pytest.mark.parametrize("programs", [1, 3, 7, 16])
@pytest.mark.parametrize("slots", [2, 32])
def test_any_split_over_programs_gives_the_same(programs, slots):
    check(*case([[200, 0, 90], [1, 16, 48]]), {"programs": programs, "slots": slots, "block": 16})


@kernels
def test_prefix_or_tail_may_be_missing():
    q, prefix, tail = case([[30, 0]])
    check(q, prefix, None)
    check(q, None, tail)


@kernels
def test_heads_without_any_key_give_zero_and_no_mass():
    q, prefix, _ = case([[0, 12]])
    out, lse = ragged._triton_forward(q, prefix, None, 1.0)
    assert not out[0, :2].any() and (lse[0, :2] == -math.inf).all() and lse[0, 2:].isfinite().all()


@kernels
def test_batch_rows_may_share_entries():
    q, prefix, tail = case([[30, 20], [30, 20]])
    shared = Prefix(prefix.keys[:50], prefix.values[:50], prefix.start[:1].expand(2, -1).contiguous(), prefix.length)
    check(q, shared, tail)


@kernels
def test_strided_queries_and_tail():
    q, prefix, tail = case([[30, 20]], g=2, tokens=2)
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    wide = Tail(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (tail.keys, tail.values)), tail.length)
    check(turned, prefix, wide)


@kernels
def test_large_logits_do_not_overflow():
    q, prefix, tail = case([[64, 5]])
    check(q * 200, Prefix(prefix.keys, prefix.values, prefix.start, prefix.length), tail, {"programs": 5})


# --- flash attention as a backend: how heads become sequences --------------------------------------

def test_heads_become_sequences_for_flash_attention(monkeypatch):
    """`_flash` is replaced by plain attention sequence by sequence, with flash's +inf for an empty one."""
    def flash(q, keys, values, ends, rows, longest, scale):
        o, lse = torch.zeros_like(q), torch.full((1, len(q)), math.inf)
        assert longest == int(ends.diff().max())
        for i, (a, b) in enumerate(pairwise(ends)):
            if a < b:
                here, logits = slice(i * rows, (i + 1) * rows), q[i * rows:(i + 1) * rows, 0] @ keys[a:b, 0].T * scale
                o[here, 0], lse[0, here] = logits.softmax(-1) @ values[a:b, 0], logits.logsumexp(-1)
        return o, lse

    monkeypatch.setattr(ragged, "_flash", flash)
    q, prefix, _ = case([[9, 0, 4], [1, 17, 2]], g=3, tokens=2)
    if DEVICE == "cuda":
        q, prefix = q.cpu(), Prefix(prefix.keys.cpu(), prefix.values.cpu(), prefix.start.cpu(), prefix.length.cpu())
    o, lse = ragged._varlen_partial(q, prefix, 0.3)
    truth, truth_lse = exact(q, prefix, None, 0.3)
    torch.testing.assert_close(o.double(), truth, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse.double(), truth_lse, rtol=0, atol=1e-5)


@pytest.mark.skipif(DEVICE == "cpu", reason="torch's variable-length attention needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_flash_attention_on_the_gpu(dtype):
    q, prefix, _ = case([[300, 0], [7, 33]], g=4, dim=64, dtype=dtype)
    o, lse = ragged._varlen_partial(q, prefix, 0.125)
    truth, truth_lse = exact(q, prefix, None, 0.125)
    torch.testing.assert_close(o.double().cpu(), truth, rtol=0, atol=CLOSE[dtype])
    torch.testing.assert_close(lse.double().cpu(), truth_lse, rtol=0, atol=1e-3)


# --- measurement -----------------------------------------------------------------------------------

@pytest.mark.parametrize("cv", [0.5, 1.0, 1.5])
def test_measured_heads_are_as_uneven_as_they_say(cv):
    count = ragged._uneven(16, 64, 131072, 0.2, cv)
    assert count.shape == (16, 64) and count.dtype == np.int64
    assert count.sum() == round(0.2 * 16 * 64 * 131072) and count.min() >= 5 and count.max() <= 131072
    assert count.std() / count.mean() == pytest.approx(cv, rel=1e-3)
    small = ragged._uneven(1, 8, 8192, 0.2, cv, 3)
    assert small.sum() == round(0.2 * 8 * 8192) and small.std() / small.mean() == pytest.approx(cv, rel=1e-3)


def test_worst_rows_are_the_worst():
    rows = [{"name": str(i), "batch": b, "tokens": t, "bytes": n, "bandwidth_fraction": f, "speedup_sdpa": s, "speedup_copy": c}
            for i, (b, t, n, f, s, c) in enumerate([(1, 32768, 27e6, 0.7, 4.1, 3.0), (1, 131072, 107e6, 0.9, 4.8, 2.9),
                                                    (4, 131072, 429e6, 0.93, 4.7, 3.1)])]
    worst = {row["name"]: row for row in ragged._worst(rows)}
    assert {name: row["measured"] for name, row in worst.items()} == {
        "attention_bandwidth": 0.9, "attention_speedup": 4.7, "attention_speedup/small": 4.1, "copy_speedup": 2.9}
    assert worst["attention_speedup"]["worst_row"] == "2"


def test_measure_on_a_cpu():
    rows = {row["name"]: row for row in measure("cpu")}
    assert rows["cpu error"]["measured"] <= rows["cpu error"]["bound"]
    assert 0 < rows["cpu attention_speedup"]["measured"] < 50
