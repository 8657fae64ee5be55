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
    prefix = Prefix(new(n), new(n), start.to(DEVICE), length.to(DEVICE))
    return new(rows, heads * g, tokens), prefix, Tail(keys, values, tail, filled)


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
                    out[b, h, t] = logits.softmax(0) @ torch.cat(values).double().cpu()
                    lse[b, h, t] = logits.logsumexp(0)
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
@pytest.mark.parametrize("programs", [1, 3, 7, 60])
@pytest.mark.parametrize(("slots", "columns"), [(2, 16), (32, 32)])
def test_any_split_over_programs_gives_the_same(programs, slots, columns):
    tiles = {"programs": programs, "slots": slots, "columns": columns, "block": 16}
    check(*case([[200, 0, 90], [1, 16, 48]]), tiles)


@kernels
@pytest.mark.parametrize("programs", [1, 4, 5, 40])
@pytest.mark.parametrize("on_device", [False, True])
def test_a_tail_much_longer_than_the_prefix(programs, on_device):
    check(*case([[3, 0, 40]], tail=150, tokens=2, on_device=on_device), {"programs": programs, "block": 16})


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


# --- how the work is dealt (no GPU needed) -----------------------------------------------------------

def plain(rule):
    """The Python function behind a kernel's helper."""
    return getattr(rule, "fn", rule)


@pytest.mark.parametrize("programs", [1, 2, 5, 132])
@pytest.mark.parametrize("tiles", [0, 1, 4, 131, 132, 133, 1000])
def test_shares_cover_all_tiles_and_owners_find_them(programs, tiles):
    first = [plain(ragged._share)(p, tiles, programs) for p in range(programs + 1)]
    assert first[0] == 0 and first[-1] == tiles
    sizes = np.diff(first)
    assert sizes.min() >= 0 and sizes.max() - sizes.min() <= 1
    owners = [plain(ragged._owner)(tile, tiles, programs) for tile in range(tiles)]
    assert owners == np.repeat(np.arange(programs), sizes).tolist()


@pytest.mark.parametrize(("tiles", "recent"), [(0, 8), (410, 8), (131, 8), (12, 130), (132, 132), (1, 1)])
def test_prefix_and_tail_together_are_dealt_evenly(tiles, recent):
    share, turn = plain(ragged._share), plain(ragged._turn)
    places = [turn(p, tiles, 132) for p in range(132)]
    assert sorted(places) == list(range(132))
    total = [share(p + 1, tiles, 132) - share(p, tiles, 132) + share(places[p] + 1, recent, 132)
             - share(places[p], recent, 132) for p in range(132)]
    assert sum(total) == tiles + recent and max(total) - min(total) <= 1


def test_work_list_has_every_entry_once():
    _, prefix, _ = case([[300, 0], [7, 33]])
    work, bounds, tiles = ragged._work(prefix, 16)
    assert bounds.tolist() == [0, 19, 19, 20, 23] and tiles == 23 and len(work) == 24
    seen = [(int(info) >> 8, int(first) + i) for first, info in work for i in range(int(info) & 255)]
    heads = [h for h, n in enumerate((300, 0, 7, 33)) for _ in range(n)]
    assert seen == list(zip(heads, range(340), strict=True))
    assert ragged._work(prefix, 16)[0] is work and ragged._work(prefix, 128)[2] == 5


@pytest.mark.parametrize(("width", "size", "block"),
                         [(128, 2, 128), (128, 4, 64), (256, 2, 32), (256, 4, 16), (64, 2, 128)])
def test_tiles_fit_into_shared_memory(width, size, block):
    for rows, heads in ((16, 8), (16, 512), (min(64, 16384 // (width * size)), 8)):
        c = ragged._tiles(torch.device("cpu"), width, size, rows, heads)
        assert c["block"] == block or (rows > 16 and 16 <= c["block"] < block)
        need = (2 * c["block"] + rows) * width * size
        assert (c["stages"] if rows == 64 else c["stages"] - 1) * need + 4 * rows * width <= 232448
        assert width % c["columns"] == 0 and 16 <= c["slots"] <= 128


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
    names = ("batch", "tokens", "bytes", "bandwidth_fraction", "floor_fraction", "speedup_sdpa", "speedup_copy")
    rows = [{"name": str(i)} | dict(zip(names, values, strict=True)) for i, values in enumerate(
        [(1, 32768, 27e6, 0.7, 0.8, 4.1, 3.0), (1, 131072, 107e6, 0.9, 0.95, 4.8, 2.9),
         (4, 131072, 429e6, 0.93, 0.97, 4.7, 3.1), (16, 131072, 1700e6, 0.96, 0.94, 4.9, 3.2)])]
    worst = {row["name"]: row for row in ragged._worst(rows)}
    assert {name: row["measured"] for name, row in worst.items()} == {
        "attention_bandwidth": 0.9, "attention_bandwidth/plain read": 0.8, "attention_bandwidth/from 400 MB": 0.93,
        "attention_speedup": 4.7, "attention_speedup/from 400 MB": 4.7, "attention_speedup/small": 4.1,
        "copy_speedup": 2.9}
    assert worst["attention_speedup"]["worst_row"] == "2" and worst["attention_bandwidth"]["best"] == 0.96


def test_measure_on_a_cpu():
    rows = {row["name"]: row for row in measure("cpu")}
    assert rows["cpu error"]["measured"] <= rows["cpu error"]["bound"]
    assert 0 < rows["cpu attention_speedup"]["measured"] < 50
