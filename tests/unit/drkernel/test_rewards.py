"""Rewards: formulas against plain Python, both coverages, rejection by probability and by draw, metrics, bad inputs."""
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.drkernel import rewards as module
from collai.drkernel.rewards import (
    best_by_turn,
    displaced_coverage,
    fast_p,
    kernel_reward,
    profiling_coverage,
    prs_keep_prob,
    prs_mask,
    summary,
)

unit = st.floats(0, 1)
times = st.lists(st.tuples(st.text(max_size=3), st.floats(0, 1e6), st.booleans()), max_size=12)


def turns(seed: int, n: int = 40, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Random turns; junk where they earn nothing."""
    g = torch.Generator().manual_seed(seed)
    flags = {name: torch.rand(n, generator=g) < p for name, p in (("compiled", 0.8), ("correct", 0.7), ("hacked", 0.2))}
    paid = flags["compiled"] & flags["correct"] & ~flags["hacked"]
    junk = torch.tensor([math.nan, math.inf, -7.0, 1e30], dtype=dtype)[torch.randint(4, (n,), generator=g)]
    speedup = torch.where(paid, 5 * torch.rand(n, generator=g, dtype=torch.float64).to(dtype), junk)
    coverage = torch.where(paid, torch.rand(n, generator=g, dtype=torch.float64).to(dtype), junk)
    return {**flags, "speedup": speedup, "coverage": coverage, "paid": paid}


ORDER = ("compiled", "correct", "speedup", "coverage", "hacked")


# reward


def test_rewards_equal_plain_python_whatever_stands_on_turns_that_earn_nothing():
    for seed in range(8):
        x, w = turns(seed), dict(w_correct=0.3, w_speed=0.2 + seed, w_pr=0.1 * (seed % 3), cap=2.5)
        found = kernel_reward(*(x[name] for name in ORDER), **w)
        for i, paid in enumerate(x["paid"].tolist()):
            s, c = float(x["speedup"][i]), float(x["coverage"][i])
            want = w["w_correct"] + w["w_speed"] * min(s, w["cap"]) + w["w_pr"] * c if paid else 0.0
            assert found[i].item() == pytest.approx(want, abs=1e-12)
            scalars = kernel_reward(*(x[name][i].item() for name in ORDER), **w)
            assert type(scalars) is float and scalars == found[i].item()


def test_the_defaults_are_those_of_the_paper():
    assert kernel_reward(True, True, 1.0, 0.0, False) == 1.0
    assert kernel_reward(True, True, 1.0, 1.0, False) == 1.5
    assert kernel_reward(True, True, 3.0, 0.0, False) == kernel_reward(True, True, 400.0, 0.0, False) == 2.0
    assert kernel_reward(True, True, 0.0, 0.0, False) == 0.5


@pytest.mark.parametrize(("compiled", "correct", "hacked"), [(False, True, False), (True, False, False), (True, True, True)])
def test_nothing_is_paid_for_what_does_not_compile_is_wrong_or_hacked(compiled, correct, hacked):
    for speedup, coverage in ((5.0, 1.0), (math.nan, math.nan), (2.0, 7.0)):
        assert kernel_reward(compiled, correct, speedup, coverage, hacked) == 0
        table = kernel_reward(torch.tensor(compiled), correct, torch.tensor(speedup), coverage, hacked)
        assert table == 0 and table.dtype == torch.float32


def test_scalars_go_with_tensors_and_the_dtype_is_kept():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = turns(1, dtype=dtype)
        assert kernel_reward(True, x["correct"], x["speedup"].abs().nan_to_num(1), 0.5, x["hacked"]).dtype == dtype
    mixed = kernel_reward(True, True, torch.ones(2, dtype=torch.float32), torch.zeros(2, dtype=torch.float64), False)
    assert mixed.dtype == torch.float64 and mixed.tolist() == [1, 1]
    assert kernel_reward(True, torch.tensor([True, False]), 2.0, 0.1, False).tolist() == [1.55, 0.0]


# coverage


@settings(max_examples=30, deadline=None, derandomize=True)
@given(events=times, seed=st.integers(0, 1000))
def test_plain_coverage_is_the_share_of_generated_time_in_any_order(events, seed):
    total = math.fsum(us for _, us, _ in events)
    want = math.fsum(us for _, us, own in events if own) / total if total else 0.0
    shuffled = [events[i] for i in np.random.default_rng(seed).permutation(len(events))]
    assert profiling_coverage(events) == profiling_coverage(iter(shuffled)) == want and 0 <= want <= 1


def test_events_of_the_gyms_own_profile_count_where_they_matter():
    events = [["k", 3.0, True, True], ["decoy", 1.0, True, False], ["aten::add", 4.0, False, False]]
    assert profiling_coverage(events) == 0.375 == profiling_coverage([(name, us, made and counts) for name, us, made, counts in events])


def test_kernels_are_told_apart_by_their_flag_not_their_name():
    assert profiling_coverage([("add", 1.0, True), ("add_relu_fused", 3.0, False)]) == 0.25


@settings(max_examples=30, deadline=None, derandomize=True)
@given(new=st.floats(0, 1e6), ref=st.floats(1e-3, 1e6))
def test_displaced_coverage_is_what_vanished_and_stays_within_its_bounds(new, ref):
    found = displaced_coverage(new, ref)
    assert found == pytest.approx(max(0.0, 1 - new / ref), abs=1e-15) and 0 <= found <= 1
    assert displaced_coverage(new, 0) == 0 and displaced_coverage(0, ref) == 1


@settings(max_examples=30, deadline=None, derandomize=True)
@given(phi=st.floats(0.01, 0.99), g=st.floats(0.1, 50), faster=st.floats(1.01, 3))
def test_plain_coverage_falls_with_the_speed_of_the_kernel_and_is_the_rest_of_amdahls_bound(phi, g, faster):
    def c(g):
        return profiling_coverage([("own", phi / g, True), ("lib", 1 - phi, False)])
    speedup, bound = 1 / (1 - phi + phi / g), 1 / (1 - phi)
    assert c(g) == pytest.approx(1 - speedup / bound, abs=1e-12) and c(g * faster) < c(g)


# rejection


def test_keep_probabilities_equal_plain_python():
    for seed in range(6):
        x = turns(seed)
        for threshold, temperature, fast in itertools.product((0, 0.3, 1), (0, 0.1, 0.5), (None, 2.0)):
            extra = {} if fast is None else {"speedup": x["speedup"], "speedup_threshold": fast}
            found = prs_keep_prob(x["coverage"], x["paid"], threshold, temperature, **extra)
            for i, paid in enumerate(x["paid"].tolist()):
                c = float(x["coverage"][i])
                want = (min(max((c - threshold) / temperature, 0), 1) if temperature else float(c >= threshold)) if paid else 1.0
                if fast is not None and float(x["speedup"][i]) >= fast:
                    want = 1.0
                assert found[i].item() == pytest.approx(want, abs=1e-12)


def test_the_numbers_of_the_derivation():
    c, right = torch.tensor([0.145, 0.3, 0.35, 0.4, math.nan]), torch.tensor([True] * 4 + [False])
    assert prs_keep_prob(c, right).tolist() == pytest.approx([0, 0, 0.5, 1, 1], abs=1e-6)
    assert prs_keep_prob(c, right, temperature=0).tolist() == [0, 1, 1, 1, 1]


def test_probabilities_keep_shape_and_dtype():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        c = torch.full((2, 3), 0.5, dtype=dtype, requires_grad=True)
        found = prs_keep_prob(c, torch.ones(2, 3, dtype=torch.bool))
        assert found.dtype == dtype and found.shape == (2, 3) and not found.requires_grad


def test_draws_come_from_the_generator_alone_and_follow_the_probabilities():
    c, right = torch.tensor([0.2, 0.32, 0.38, 0.9, 0.0]).repeat(2000, 1), torch.tensor([True] * 4 + [False]).repeat(2000, 1)
    first, again = (prs_mask(c, right, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    state = torch.get_rng_state()
    other = prs_mask(c, right, generator=torch.Generator().manual_seed(6))
    assert torch.equal(first, again) and not torch.equal(first, other) and torch.equal(state, torch.get_rng_state())
    assert first.dtype == torch.bool and not first[:, 0].any() and first[:, 3:].all()
    assert first[:, 1:3].double().mean(0).tolist() == pytest.approx([0.2, 0.8], abs=0.06)
    assert torch.equal(prs_mask(c, right, temperature=0), prs_keep_prob(c, right, temperature=0).bool())
    fast = prs_mask(c, right, speedup=c + 1, speedup_threshold=1.15, generator=torch.Generator())
    assert fast[:, 0].all()


def test_inputs_are_left_alone():
    x = turns(2)
    kept = {name: t.clone() for name, t in x.items()}
    kernel_reward(*(x[name] for name in ORDER))
    prs_mask(x["coverage"], x["paid"], speedup=x["speedup"], speedup_threshold=1)
    rows, flags = [[1.0, 2.0]], [[True, False]]
    best_by_turn(rows, flags)
    assert all(torch.equal(t.nan_to_num(9), kept[name].nan_to_num(9)) for name, t in x.items()) and rows == [[1.0, 2.0]]


# metrics


@settings(max_examples=30, deadline=None, derandomize=True)
@given(rows=st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0, 1.2, 3.0, math.nan]), st.booleans()), min_size=1, max_size=20),
       p=st.sampled_from([0, 0.5, 1, 1.2]))
def test_fast_p_counts_over_all_samples(rows, p):
    speed, right = [s for s, _ in rows], [ok and s == s for s, ok in rows]
    for kind in (list, np.array, torch.tensor):
        assert fast_p(kind(speed), kind(right), p) == sum(ok and s > p for s, ok in zip(speed, right, strict=True)) / len(rows)
        assert fast_p(kind(speed), kind(right), p, inclusive=True) == sum(
            ok and s >= p for s, ok in zip(speed, right, strict=True)) / len(rows)


def test_the_best_so_far_looks_at_correct_turns_of_rows_of_any_length():
    assert best_by_turn([[0.5, 9.0, 1.5, 1.2], [2.0], [], [math.nan, 0.7]],
                        [[True, False, True, True], [False], [], [False, True]]) == [[0.5, 0.5, 1.5, 1.5], [0.0], [], [0.0, 0.7]]
    assert best_by_turn(torch.tensor([[1.0, 2.0]]), torch.tensor([[True, True]])) == [[1.0, 2.0]]
    assert best_by_turn([], []) == []


def evaluation(**changes: object) -> SimpleNamespace:
    """An answer of the gym."""
    usual = dict(compiled=True, correct=True, hacked=False, speedup=1.0, speedup_ci=(0.5, 2.0), coverage=0.5, coverage_displaced=0.25)
    return SimpleNamespace(**usual | changes)


def test_a_summary_counts_over_all_and_averages_over_correct_results():
    rows = [evaluation(speedup=4.0), evaluation(coverage=0.1), evaluation(hacked=True, speedup=900.0, coverage=1.0),
            evaluation(correct=False, speedup=0.0, coverage=math.nan), evaluation(compiled=False, correct=False, speedup=0.0)]
    found = summary(iter(rows))
    want = {"n": 5, "compiled": 0.8, "correct": 0.4, "hacked": 0.2, "fast_1": 0.2, "fast_1.2": 0.2, "fast_1.5": 0.2, "fast_2": 0.2,
            "coverage": 0.3, "coverage_displaced": 0.25, "speedup": 2.0}
    assert list(found) == list(want) and found == pytest.approx(want)
    none = summary(rows[2:])
    assert none["correct"] == 0 and all(math.isnan(none[name]) for name in ("coverage", "coverage_displaced", "speedup"))


def test_a_conservative_summary_looks_at_the_lower_ends():
    rows = [evaluation(speedup=s, speedup_ci=(low, 9.0)) for s, low in ((1.3, 1.1), (1.3, 1.25), (3.0, 0.9), (1.0, 0.2))]
    rows += [evaluation(speedup=3.0, speedup_ci=(2.9, 3.1), hacked=True), evaluation(correct=False, speedup=0.0, speedup_ci=(0.0, 0.0))]
    plain, careful = summary(rows), summary(rows, conservative=True)
    fast = {name for name in plain if name.startswith("fast_")}
    assert {n: careful[n] * 6 for n in fast} == pytest.approx({"fast_1": 2, "fast_1.2": 1, "fast_1.5": 0, "fast_2": 0})
    assert all(careful[n] <= plain[n] if n in fast else careful[n] == plain[n] for n in plain)


# bad inputs

C, T = torch.tensor([0.5, 0.2]), torch.tensor([True, True])

BAD = {
    "coverage": (lambda: kernel_reward(True, True, 1.0, 1.5, False), r"coverage must be in \[0, 1\], got 1\.5"),
    "coverage nan": (lambda: kernel_reward(True, T, 1.0, C * math.nan, False), r"coverage must be in \[0, 1\], got nan"),
    "one coverage for all": (lambda: kernel_reward(True, T, 1.0, -0.5, False), r"coverage must be in \[0, 1\], got -0\.5"),
    "speedup": (lambda: kernel_reward(True, True, math.nan, 0.5, False), "speedup must be a number >= 0 where correct, got nan"),
    "negative speedup": (lambda: kernel_reward(True, T, -C, 0.5, False), r"speedup must be a number >= 0 where correct, got -0\.5"),
    "weight": (lambda: kernel_reward(True, True, 1.0, 0.5, False, w_pr=-1), "w_pr must be finite and not negative, got -1"),
    "infinite weight": (lambda: kernel_reward(True, True, 1.0, 0.5, False, w_speed=math.inf), "w_speed must be finite and not negative, got inf"),
    "cap": (lambda: kernel_reward(True, True, 1.0, 0.5, False, cap=0), "cap must be positive, got 0"),
    "shapes": (lambda: kernel_reward(True, T, C[:1], C, False), r"shapes must be equal, got correct \(2,\), speedup \(1,\), coverage \(2,\)"),
    "time": (lambda: profiling_coverage([("k", math.nan, True)]), "time of 'k' must be finite and not negative, got nan"),
    "negative time": (lambda: profiling_coverage([("k", -1.0, True)]), r"time of 'k' must be finite and not negative, got -1\.0"),
    "new": (lambda: displaced_coverage(-1, 2), "torch_new must be finite and not negative, got -1"),
    "ref": (lambda: displaced_coverage(1, math.inf), "torch_ref must be finite and not negative, got inf"),
    "keep coverage": (lambda: prs_keep_prob(C + 1, T), r"coverage must be in \[0, 1\], got 1\.5"),
    "mask coverage": (lambda: prs_mask(C - 1, T), r"coverage must be in \[0, 1\], got -0\.5"),
    "threshold": (lambda: prs_keep_prob(C, T, 1.1), r"threshold must be in \[0, 1\], got 1\.1"),
    "temperature": (lambda: prs_keep_prob(C, T, 0.3, -0.1), r"temperature must be finite and not negative, got -0\.1"),
    "flags": (lambda: prs_keep_prob(C, T.long()), r"coverage must be of a float type and correct bool, got torch\.float32 and torch\.int64"),
    "keep shapes": (lambda: prs_keep_prob(C, T[:1]), r"shapes must be equal, got coverage \(2,\), correct \(1,\)"),
    "alone": (lambda: prs_keep_prob(C, T, speedup_threshold=2.0), r"speedup and speedup_threshold belong together, got None and 2\.0"),
    "speed shapes": (lambda: prs_keep_prob(C, T, speedup=C[:1], speedup_threshold=1), r"got correct \(2,\), speedup \(1,\)"),
    "speed threshold": (lambda: prs_keep_prob(C, T, speedup=C, speedup_threshold=math.nan), "speedup_threshold must be a number, got nan"),
    "no sample": (lambda: fast_p([], [], 1), "needs a sample and a number to beat, got 0 samples and p = 1"),
    "p": (lambda: fast_p([1.0], [True], math.nan), "got 1 samples and p = nan"),
    "lengths": (lambda: fast_p([1.0], [True, True], 1), r"speedups have shape \(1,\), correct \(2,\): both must be \(n,\)"),
    "flag nan": (lambda: fast_p([1.5], [math.nan], 1), "correct must hold bools, got .*nan"),
    "flag text": (lambda: best_by_turn([[1.5, 1.0]], [[True, "no"]]), "correct must hold bools, got .*True"),
    "flag two": (lambda: fast_p([1.5, 1.0], torch.tensor([1, 2]), 1), "correct must hold bools, got .*2"),
    "nan speed": (lambda: fast_p([math.nan], [True], 1), "speedup must be a number >= 0 where correct, got nan"),
    "rows": (lambda: best_by_turn([[1.0]], []), "speedups have 1 rows, correct 0: they must be equal"),
    "row": (lambda: best_by_turn([[-1.0]], [[True]]), r"speedup must be a number >= 0 where correct, got -1\.0"),
    "no result": (lambda: summary([]), "a summary needs a result, got none"),
    "short event": (lambda: profiling_coverage([("k", 1.0)]), r"an event is \(name, us, is_generated\) or .*, got \('k', 1\.0\)"),
    "long event": (lambda: profiling_coverage([["k", 1.0, True, True, 0]]), "an event is "),
    "zero": (lambda: summary([evaluation(speedup=0.0)]), r"speedup must be positive and finite where correct, got 0\.0"),
    "result": (lambda: summary([evaluation(coverage_displaced=2)]), r"coverage must be in \[0, 1\], got 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_its_value(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_no_tensor_is_refused():
    for call in (lambda: prs_keep_prob([0.5], T), lambda: prs_mask(C, [True, True]), lambda: prs_keep_prob(C, T, speedup=[1, 1], speedup_threshold=1)):
        with pytest.raises(TypeError, match=r"must be a torch\.Tensor, got list"):
            call()


def test_arrays_are_no_tensors():
    for place, name in enumerate(("compiled", "correct", "speedup", "coverage", "hacked")):
        given = [True, True, 1.0, 0.5, False]
        given[place] = np.array([1.0, 0.5])
        with pytest.raises(TypeError, match=f"{name} must be a number or a torch.Tensor, got ndarray"):
            kernel_reward(*given)


def test_everything_public_is_listed():
    assert set(module.__all__) == {"kernel_reward", "profiling_coverage", "displaced_coverage", "prs_keep_prob", "prs_mask", "fast_p",
                                   "best_by_turn", "summary"}
