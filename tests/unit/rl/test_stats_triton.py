"""Kernels of the token statistics, run by Triton's interpreter (TRITON_INTERPRET=1) or on a GPU; how their work is dealt; what measures them."""
import math
import os

import pytest
import torch

from collai.rl import stats

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
kernels = pytest.mark.skipif(
    stats.triton is None or not (DEVICE == "cuda" or INTERPRETED),
    reason="the kernels need the package triton, and either a GPU or TRITON_INTERPRET=1")
# the interpreter computes with numpy, which has no bfloat16
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
# on a GPU small tiles of 16-bit numbers must still be large enough for its matrix units
SMALL = {"BM": 16, "BN": 32, "BK": 16} if INTERPRETED else {"BM": 64, "BN": 64, "BK": 32, "warps": 4, "stages": 2, "roles": 0}
CLOSE = {torch.float32: 2e-5, torch.float16: 2e-5, torch.bfloat16: 2e-5}
ALL = (True, True, True)


@pytest.fixture(autouse=True)
def _index_of_arrays(monkeypatch):
    """Triton 3.6's interpreter takes int() of an array with one entry, which numpy refuses from 2.4 on."""
    if INTERPRETED and stats.triton is not None:
        from triton.runtime import interpreter
        patch = interpreter._patch_lang_tensor

        def repaired(tensor, scope):
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        monkeypatch.setattr(interpreter, "_patch_lang_tensor", repaired)


def case(n, d, vocab, *, dtype=torch.float32, biased=False, spread=1.0, seed=0):
    """Hidden states, weights, bias or None, ids; the first bias is −inf."""
    rng = torch.Generator().manual_seed(seed)
    h, w = spread * torch.randn(n, d, generator=rng), torch.randn(vocab, d, generator=rng) / d**0.5
    bias = torch.randn(vocab, generator=rng) if biased else None
    ids = torch.randint(1, vocab, (n,), generator=rng)
    if biased:
        bias[0] = -math.inf
    return (*(None if x is None else x.to(DEVICE, dtype) for x in (h, w, bias)), ids.to(DEVICE))


def wide(*tensors):
    return [None if x is None else x.double() for x in tensors]


def exact(h, w, bias, ids, scale=1.0, softcap=None):
    """States in float64 by the plain backend, and its plan."""
    plan = stats._Plan(scale, softcap, 4096, 4096, "torch", ALL)
    return stats._linear_states(*wide(h, w, bias), ids, None, plan), plan


def check(found, truth, atol):
    """Equal statistics, a small relative error of the energy."""
    assert found.dtype == torch.float32 and found.shape == truth.shape
    a, b = stats._finish(found), stats._finish(truth)
    for x, y in zip(a[:5], b[:5], strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=atol)
    torch.testing.assert_close(a.energy.double(), b.energy, rtol=1e-4 if atol < 1e-4 else 1e-2, atol=0)


def both(given, scale=1.0, softcap=None, wants=ALL):
    """States by the kernel and through tiles in memory."""
    return (stats._triton_forward(*given, scale, softcap, wants, SMALL),
            stats._tiles_forward(*given, scale, softcap, wants, size=4 * len(given[0]) * 256))


@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d", "vocab"), [(1, 16, 2), (5, 24, 33), (70, 40, 300)])
def test_states_of_any_size(n, d, vocab, dtype):
    given = case(n, d, vocab, dtype=dtype)
    truth, _ = exact(*given)
    for found in both(given):
        check(found, truth, CLOSE[dtype])


@kernels
@pytest.mark.parametrize(("softcap", "biased", "scale"), [(5.0, False, 1.0), (None, True, 0.7), (3.0, True, 1.6)])
def test_bias_cap_and_temperature(softcap, biased, scale):
    given = case(40, 16, 600, biased=biased, spread=4.0)
    truth, _ = exact(*given, scale, softcap)
    for found in both(given, scale, softcap):
        check(found, truth, 2e-5)


@kernels
def test_a_pointer_where_addresses_do_not_fit_a_descriptor():
    h, w, _, ids = case(20, 17, 90)
    assert stats._operands(h, w, stats._cut(h.device, 4) | SMALL)[2] is False
    truth, _ = exact(h, w, None, ids)
    check(stats._triton_forward(h, w, None, ids, 1.0, None, ALL, SMALL), truth, 2e-5)


@kernels
def test_descriptors_and_pointers_agree():
    given, found = case(20, 32, 90, dtype=torch.float16), []
    for tma in (True, False):
        cut = SMALL | {"tma": tma}
        assert stats._operands(given[0], given[1], stats._cut(given[0].device, 2) | cut)[2] is tma
        found.append(stats._triton_forward(*given, 1.0, None, ALL, cut))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@kernels
def test_columns_of_a_wider_matrix():
    h, w, _, ids = case(20, 64, 90)
    truth, _ = exact(h[:, :32], w[:, :32], None, ids)
    check(stats._triton_forward(h[:, :32], w[:, :32], None, ids, 1.0, None, ALL, SMALL), truth, 2e-5)
    turned = w[:, :32].T.contiguous().T
    check(stats._triton_forward(h[:, :32], turned, None, ids, 1.0, None, ALL, SMALL), truth, 2e-5)


@kernels
@pytest.mark.parametrize("programs", [1, 3, 7, 50])
def test_any_number_of_programs_gives_the_same(programs):
    given = case(70, 16, 300)
    truth, _ = exact(*given)
    check(stats._triton_forward(*given, 1.0, None, ALL, SMALL | {"programs": programs}), truth, 2e-5)


@pytest.mark.skipif(stats.gluon is None or DEVICE == "cpu" or torch.cuda.get_device_capability()[0] != 9,
                    reason="the kernel with roles needs a Hopper GPU and Triton's Gluon")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("n", "d", "vocab"), [(1, 64, 300), (130, 72, 1000), (515, 520, 4097), (2000, 1024, 20000)])
@pytest.mark.parametrize(("softcap", "biased"), [(None, False), (5.0, True)])
def test_the_kernel_with_roles(n, d, vocab, softcap, biased, dtype):
    given = case(n, d, vocab, dtype=dtype, biased=biased, spread=3.0)
    assert stats._cut(given[0].device, 2)["roles"]
    truth, _ = exact(*given, 0.8, softcap)
    found = stats._triton_forward(*given, 0.8, softcap, ALL)
    check(found, truth, 1e-4)
    check(stats._triton_forward(*given, 0.8, softcap, ALL, {"roles": 0}), truth, 1e-4)
    for _ in range(5):
        assert torch.equal(stats._triton_forward(*given, 0.8, softcap, ALL), found)


@kernels
def test_what_is_not_wanted_is_zero():
    given = case(20, 16, 70)
    full = both(given)
    for wants in ((False, False, False), (True, False, False), (False, True, False)):
        for found, whole in zip(both(given, wants=wants), full, strict=True):
            torch.testing.assert_close(found[[0, 1, 5]], whole[[0, 1, 5]], rtol=1e-6, atol=1e-6)
            assert [bool(x.any()) for x in found[2:5]] == list(wants)


@kernels
def test_energy_of_a_nearly_certain_policy():
    _, w, _, _ = case(1, 16, 200)
    ids, axes = torch.arange(8, device=DEVICE), torch.eye(8, 16, device=DEVICE)
    w, h = (w * 0.1).index_copy(0, ids, axes), torch.linspace(5, 30, 8, device=DEVICE)[:, None] * axes
    truth, _ = exact(h, w, None, ids)
    assert stats._finish(truth).q.min() < 1e-9
    for found in both((h, w, None, ids)):
        check(found, truth, 2e-5)


@kernels
def test_infinite_logits_and_nan():
    h, w, bias, ids = case(6, 16, 100, biased=True)
    ids[0], bias[3:] = 0, -math.inf
    ids[1:] = torch.tensor([1, 2, 1, 2, 1], device=DEVICE)
    truth, _ = exact(h, w, bias, ids)
    for found in both((h, w, bias, ids)):
        assert found[5, 0] == -math.inf and found.isfinite().sum() == found.numel() - 1
        check(found[:, 1:], truth[:, 1:], 2e-5)
    bias[2:] = -math.inf
    for found in both((h, w, bias, torch.ones_like(ids))):  # no other entry has any weight
        assert (found[0] == -math.inf).all() and not found[1:5].any() and found[5].isfinite().all()
    h[2] = math.nan
    for found in both((h, w, None, ids)):
        assert found[1, 2].isnan() and found[:, [0, 1, 3, 4, 5]].isfinite().all()


@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize(("softcap", "biased"), [(None, False), (4.0, True)])
def test_gradients(tiles, softcap, biased, dtype):
    given = case(40, 24, 2300, biased=biased, dtype=dtype, spread=3.0)
    truth, plan = exact(*given, 0.8, softcap)
    rng = torch.Generator().manual_seed(1)
    coef = stats._coefficients(truth, *(torch.randn(40, generator=rng).double().to(DEVICE) for _ in range(3)))
    needs = (True, True, biased)
    expected = stats._linear_gradients(*wide(*given[:3]), given[3], None, plan, coef, needs)
    found = stats._triton_backward(*given, 0.8, softcap, coef.float(), needs, tiles=tiles, size=0, cut=SMALL)
    limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.double() - b).norm() <= limit * b.norm()


@kernels
def test_only_the_gradients_that_are_needed():
    given = case(10, 16, 60, biased=True)
    truth, _ = exact(*given)
    coef = stats._coefficients(truth.float(), torch.ones(10, device=DEVICE), None, None)
    full = stats._triton_backward(*given, 1.0, None, coef, (True, True, True), cut=SMALL)
    for i in range(3):
        part = stats._triton_backward(*given, 1.0, None, coef, [j == i for j in range(3)], cut=SMALL)
        assert [x is None for x in part] == [j != i for j in range(3)]
        torch.testing.assert_close(part[i], full[i])


@kernels
def test_the_public_function_by_this_backend():
    h, w, bias, ids = case(12, 16, 90, biased=True)
    h, w = h.view(3, 4, 16).requires_grad_(), w.requires_grad_()
    mask = torch.ones(3, 4, device=DEVICE)
    mask[1, 2:] = 0
    found = [stats.linear_token_stats(h, w, ids.view(3, 4), bias=bias, mask=mask, temperature=1.3, backend=name)
             for name in ("torch", "triton")]
    for a, b in zip(found[0], found[1], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    plain, ours = (torch.autograd.grad((s.logp + s.entropy * s.sum_sq).sum(), (h, w)) for s in found)
    for a, b in zip(plain, ours, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm()


# --- who may use it ----------------------------------------------------------------------------------

def test_reasons_why_it_is_not_usable(monkeypatch):
    x = torch.zeros(2, 2)
    monkeypatch.setattr(stats, "triton", None)
    assert stats._triton_ready(x, x) == "the package triton is not installed"
    with pytest.raises(ValueError, match="backend 'triton' is not usable here: the package triton is not installed"):
        stats.linear_token_stats(x, x, torch.zeros(2, dtype=torch.int64), backend="triton")
    monkeypatch.setattr(stats, "triton", object())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert stats._triton_ready(x, x) == "it needs a GPU, the tensors are on cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert stats._triton_ready(x, x) is None
    assert stats._triton_ready(x, x.half()) == \
        "hidden and weight must share float32, bfloat16 or float16, they have torch.float32 and torch.float16"


# --- how the work is dealt (no GPU needed) -----------------------------------------------------------

def plain(rule):
    """The Python function behind a kernel's helper."""
    return getattr(rule, "fn", rule)


@pytest.mark.parametrize("tiles", [1, 7, 8, 12, 13, 64, 257])
@pytest.mark.parametrize(("columns", "programs"), [(1, 132), (594, 132), (594, 3), (20, 7)])
def test_every_share_of_every_tile_has_one_program(tiles, columns, programs):
    group, splits, late = stats._deal(tiles, columns, programs, 16)
    assert 1 <= group <= min(16, tiles, programs) and max(splits, late) <= columns
    assert group * splits <= programs and (tiles % group) * late <= programs
    total = tiles // group * group * splits + tiles % group * late
    seen = [tuple(map(int, plain(stats._unit)(p, tiles, group, splits, late))) for p in range(total)]
    assert sorted(seen) == [(t, s, n) for t in range(tiles)
                            for n in [splits if t < tiles // group * group else late] for s in range(n)]
    assert [plain(stats._slot)(t, s, tiles, group, splits, late) for t, s, _ in seen] == list(range(total))


def test_programs_that_run_together_share_a_group():
    group, splits, late = stats._deal(64, 594, 132, 16)
    assert (group, splits, late) == (12, 11, 33)  # 5 · 54 + 18 steps = 64 · 594 / 132: nobody waits
    first = [plain(stats._unit)(p, 64, group, splits, late)[0] for p in range(132)]
    assert set(first) == set(range(12)) and first[:12] == list(range(12))


@pytest.mark.parametrize("tiles", [8, 30, 64, 256])
@pytest.mark.parametrize("programs", [108, 132, 264])
def test_few_programs_wait(tiles, programs):
    group, splits, late = stats._deal(tiles, 594, programs, 16)
    steps = tiles // group * math.ceil(594 / splits) + (math.ceil(594 / late) if tiles % group else 0)
    assert steps <= 1.08 * tiles * 594 / programs + 1


# --- measurement -------------------------------------------------------------------------------------

def test_the_measured_problem_has_peaked_and_flat_policies():
    h, w, ids = stats._problem(256, 64, 1000, "cpu", torch.float32)
    logp, entropy, squares, energy = stats._exact(h, w, ids)
    assert logp.max() > -1e-3 and logp.min() < -3 and entropy.max() > 3
    found = stats.linear_token_stats(h, w, ids, backend="torch")
    for a, b in zip(found[:4], (logp, entropy, squares, energy), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    for a, b in zip(stats._naive(h, w, ids), (logp, entropy, squares), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats._dense_logp(h, w, ids).double(), logp, rtol=1e-4, atol=1e-5)


def test_peak_counts_what_is_alive_at_once():
    def call():
        a = torch.empty(1 << 20)
        b = a + 1
        del a
        return (b + 1).sum()

    assert 8 << 20 <= stats._peak(call, "cpu") <= (8 << 20) + 4096


def test_rounds_are_interleaved_and_every_call_is_timed():
    order = []
    times = stats._interleaved({name: lambda name=name: order.append(name) for name in "abc"}, 3, "cpu")
    assert "".join(order) == "abcbcacab" and all(len(ms) == 3 and min(ms) >= 0 for ms in times.values())


def test_a_call_that_fails_is_left_out(capsys):
    def absent():
        raise ImportError("no such peer")

    kept, extra = stats._usable({"absent": absent, "here": lambda: torch.zeros(1024)}, "cpu")
    assert list(kept) == list(extra) == ["here"] and extra["here"] == 4096
    assert "left out: absent: ImportError: no such peer" in capsys.readouterr().out


def row(name, measured, **more):
    return {"name": name, "measured": measured, "unit": "ms", "bound": 1.0, "low": measured, "high": measured,
            "extra_MiB": 10.0, **more}


def test_goals_are_ratios_of_the_rows_of_one_shape():
    big, small = "8192x4096x151936", "1024x4096x151936"
    rows = [row(f"forward/{big}/ours", 16.0), row(f"forward/{big}/gemm", 15.0), row(f"forward/{big}/naive", 32.0),
            row(f"forward/{small}/ours", 2.2), row(f"forward/{small}/gemm", 2.0), row(f"train/{big}/ours", 66.0),
            row(f"train/{big}/naive", 60.0), {"name": "error/ours", "measured": 1e-4, "unit": "nats", "bound": 1e-3}]
    goals = {g["name"]: g for g in stats._goal_rows(rows)}
    assert goals["all_over_gemm"]["measured"] == pytest.approx(16 / 15) and goals["all_over_naive"]["measured"] == 0.5
    assert goals[f"all_over_gemm/{small}"]["measured"] == pytest.approx(1.1)
    assert goals["train_over_naive"]["measured"] == pytest.approx(1.1) and goals["forward_memory"]["measured"] == 10.0
    assert not {"all_over_trl", "all_over_logp", f"train_over_naive/{small}"} & goals.keys()


def test_the_fastest_of_our_ways_is_named():
    rows = [row("forward/8x8x8/kernel", 3.0), row("forward/8x8x8/tiles", 2.0), row("forward/8x8x8/naive", 1.0)]
    assert [(r["name"], r["way"], r["measured"]) for r in stats._fastest(rows)] == [("fastest/forward/8x8x8", "tiles", 2.0)]
