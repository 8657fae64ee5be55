"""Properties of `collai.drkernel.problems`: what a problem is, what it accepts, and what the audit finds."""
import dataclasses
import math
import random
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from collai.drkernel import problems as module
from collai.drkernel.problems import (
    Problem,
    Tolerance,
    build_model,
    builtin_problems,
    compare,
    load_kernelbench,
    measure_tolerance,
    output_tensors,
)

quickly = settings(deadline=None, derandomize=True, max_examples=25)
SOURCE = """import torch
from torch import nn

ROWS = 6
COLS = 32


class Model(nn.Module):
    def __init__(self, cols):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(cols))

    def forward(self, x):
        return {forward}


def get_inputs():
    return [{inputs}]


def get_init_inputs():
    return [COLS]
"""
NAMES = """scale_bias_relu gelu row_softmax layernorm rmsnorm cumsum argmax_gather small_matmul
affine_relu_square_center swiglu residual_rmsnorm scaled_masked_softmax matmul_bias_gelu_rowsum groupnorm_hardtanh_scale
clamp_min_softmax logsumexp_mish bias_residual_layernorm rope int8_dequant_add sigmoid_gating
mlp_block attention_block conv_block gru_step""".split()


def problem(forward="x * self.weight", inputs="torch.randn(ROWS, COLS)", extra="", name="p"):
    return Problem.from_source(SOURCE.format(forward=forward, inputs=inputs) + extra, name=name)


def small(one):
    sizes = {"ROWS": 8, "BATCH": 2, "SIDE": 16, "LENGTH": 32, "INNER": 64, "COLS": 128}
    return one.with_sizes(**{n: k for n, k in sizes.items() if f"\n{n} = " in one.source})


# reading


def test_the_own_set_is_the_list_of_24_problems_in_its_order_and_levels():
    own = builtin_problems()
    assert [p.name for p in own] == NAMES and [p.level for p in own] == [1] * 8 + [2] * 12 + [3] * 4
    assert [p for k in (1, 2, 3) for p in builtin_problems(k)] == own


def test_own_sources_differ_between_devices_in_their_size_lines_only():
    for a, b in zip(builtin_problems(), builtin_problems(device="cuda"), strict=True):
        pairs = [(x, y) for x, y in zip(a.source.splitlines(), b.source.splitlines(), strict=True) if x != y]
        assert pairs and all(re.fullmatch(r"[A-Z]+ = \d+", line) for pair in pairs for line in pair)


def test_own_sizes_are_those_of_the_specification():
    most = {"rows": 1, "product": 1, "groups": 1, "images": 1, "rope": 1, "conv": 1, "block": 1, "step": 1}
    for device, low, high in (("cpu", 2**18, 2**22), ("cuda", 2**25, 2**28)):
        for name, sizes in module._SIZES[device].items():
            elements = {"images": lambda s: s["BATCH"] * s["CHANNELS"] * s["SIDE"] ** 2,
                        "conv": lambda s: s["BATCH"] * s["CHANNELS"] * s["SIDE"] ** 2}.get(
                            name, lambda s: math.prod(v for k, v in s.items() if k != "INNER"))(sizes)
            assert low <= elements <= high and name in most


@pytest.mark.parametrize(("part", "shown"), [("class Model", "class Model"), ("def get_inputs", "get_inputs()"),
                                             ("def get_init_inputs", "get_init_inputs()")])
def test_a_text_without_one_of_its_parts_is_refused_by_name(part, shown):
    text = SOURCE.format(forward="x", inputs="").replace(part, part + "_old")
    with pytest.raises(ValueError, match=re.escape(f"problem 'x' lacks {shown}")):
        Problem.from_source(text, name="x")


def test_reading_does_not_run_the_text():
    assert Problem.from_source("raise SystemExit\n" + SOURCE.format(forward="x", inputs="x"), name="x").name == "x"


def test_bad_texts_names_and_levels_are_refused():
    with pytest.raises(ValueError, match="problem 'x' is no Python: line 2"):
        Problem.from_source("a = 1\nb = (", name="x")
    with pytest.raises(ValueError, match="a problem needs a name, got ''"):
        Problem.from_source(SOURCE, name="")
    with pytest.raises(ValueError, match="level must be >= 0, got -1"):
        problem().__class__("x", -1, problem().source)
    with pytest.raises(ValueError, match="level must be 1, 2, 3 or None, got 4"):
        builtin_problems(4)
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'tpu'"):
        builtin_problems(device="tpu")


def test_a_file_gives_its_name_and_the_level_of_its_folder(tmp_path):
    (tmp_path / "level2").mkdir()
    text = problem().source
    for folder, level in (("level2", 2), (".", 0)):
        path = tmp_path / folder / "7_Chain.py"
        path.write_text(text)
        assert Problem.from_file(path) == Problem("7_Chain", level, text)
    with pytest.raises(FileNotFoundError):
        Problem.from_file(tmp_path / "none.py")


def test_sizes_are_replaced_in_the_text_and_nowhere_else():
    one = problem(extra="\nµ = 1; OTHER = 12  # ROWS = 6\n")
    two = one.with_sizes(ROWS=7, OTHER=345, COLS=8)
    assert two.source == one.source.replace("\nROWS = 6", "\nROWS = 7").replace("COLS = 32", "COLS = 8").replace("12", "345")
    assert two.inputs(0)[0].shape == (7, 8) and one.inputs(0)[0].shape == (6, 32)
    with pytest.raises(ValueError, match="problem 'p' has no size 'HEADS'; it has ROWS, COLS"):
        problem().with_sizes(HEADS=2)
    with pytest.raises(ValueError, match="size ROWS must be >= 1, got 0"):
        problem().with_sizes(ROWS=0)


@pytest.mark.parametrize(("forward", "special"), [
    ("x", False), ('x.masked_fill(x > 0, float("-inf"))', True), ("torch.nan_to_num(x)", True), ("x + torch.inf", True),
    ("torch.where(x.isnan(), 0, x)", True), ("x.info() if 0 else x", False)])
def test_texts_that_handle_nan_or_infinity_are_known(forward, special):
    assert problem(forward).special_values is special


def test_a_comment_about_infinity_handles_none():
    assert not problem(extra='\n# float("inf")\n"""inf is not met"""\n').special_values


# checkouts and tables


def write_checkout(root, inner=""):
    for level, names in ((1, ["10_Ten", "9_Nine"]), (2, ["1_One"]), (4, ["1_Far"])):
        folder = root / inner / f"level{level}"
        folder.mkdir(parents=True)
        for name in names:
            (folder / f"{name}.py").write_text(problem(extra=f"# {name}\n").source)
        (folder / "notes.py").write_text("no problem")


@pytest.mark.parametrize("inner", ["KernelBench", ""])
def test_a_checkout_is_read_by_level_and_number(tmp_path, inner):
    write_checkout(tmp_path, inner)
    read = load_kernelbench(tmp_path)
    assert [(p.level, p.name) for p in read] == [(1, "9_Nine"), (1, "10_Ten"), (2, "1_One")]
    assert read[0].source.endswith("# 9_Nine\n")
    assert [p.name for p in load_kernelbench(tmp_path, [4])] == ["1_Far"]


def test_the_published_table_is_read_as_a_checkout_is(tmp_path):
    pd = pytest.importorskip("pandas")
    rows = [(problem().source, 1, "9_Nine", 9), (problem("x").source, 1, "Ten", 10), (problem().source, 2, "1_One", 1)]
    frame = pd.DataFrame(rows, columns=["code", "level", "name", "problem_id"]).sample(frac=1, random_state=0)
    (tmp_path / "data").mkdir()
    frame.to_parquet(tmp_path / "data" / "level.parquet")
    wanted = [Problem("9_Nine", 1, rows[0][0]), Problem("10_Ten", 1, rows[1][0])]
    for root in (tmp_path, str(tmp_path / "data" / "level.parquet")):
        assert load_kernelbench(root, levels=(1,)) == wanted and len(load_kernelbench(root)) == 3


def test_nothing_found_and_unknown_levels_are_refused(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"no problem of the levels [1, 2, 3] in {tmp_path}")):
        load_kernelbench(tmp_path)
    for levels in ((0, 1), (5,), ()):
        with pytest.raises(ValueError, match="levels must be some of 1, 2, 3, 4, got"):
            load_kernelbench(tmp_path, levels)


# construction


def test_seeds_decide_everything_and_leave_the_generators_alone():
    text = "torch.randn(ROWS, COLS) + np.random.rand() + random.random()"
    one = problem(inputs=text, extra="\nimport random\nimport numpy as np\n")
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    a, b, c = one.inputs(5)[0], one.inputs(5)[0], one.inputs(6)[0]
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
    assert np.array_equal(np.random.get_state()[1], states[1][1])  # noqa: NPY002


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_beyond_the_32_bits_of_torch_are_refused(seed):
    for call in (problem().inputs, problem().init_inputs, problem().model):
        with pytest.raises(ValueError, match=re.escape(f"seed must be in [0, 2**32), got {seed}")):
            call(seed)


def test_a_candidate_gets_the_reference_values_where_names_and_shapes_agree():
    class ModelNew(nn.Module):
        def __init__(self, cols):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(cols))
            self.other = nn.Parameter(torch.randn(3))
            self.register_buffer("bias", torch.zeros(2))

    state = {"weight": torch.arange(32.0), "other": torch.zeros(4), "bias": torch.ones(2), "none": torch.ones(1)}
    new = build_model(ModelNew, [32], 3, state)
    again = build_model(ModelNew, [32], 3)
    assert torch.equal(new.weight, state["weight"]) and torch.equal(new.bias, state["bias"])
    assert torch.equal(new.other, again.other) and bool((again.weight == 0).all())
    assert not new.training and not any(p.requires_grad for p in new.parameters())


def test_both_models_draw_the_same_random_numbers_under_one_seed():
    one = problem()
    assert torch.equal(one.model(9).weight, build_model(type(one.model(0)), [32], 9).weight)
    assert not torch.equal(one.model(9).weight, one.model(10).weight)


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=re.escape("list must build a torch.nn.Module, got list")):
        build_model(list, [], 0)


def test_init_inputs_are_not_shared_with_the_model():
    class Takes(nn.Module):
        def __init__(self, values):
            super().__init__()
            values.append(1)

    values = [[0]]
    build_model(Takes, values, 0)
    assert values == [[0]]


# tolerance and comparison


def by_loop(y, expected, exact, allowed):
    """The rule as a plain loop over elements and rows."""
    worst = row_worst = 0.0
    rows = [(y, expected, exact)] if y.ndim < 2 else zip(*(t.reshape(-1, t.shape[-1]) for t in (y, expected, exact)), strict=True)
    for ys, es, xs in rows:
        d2 = x2 = 0.0
        for a, b, x in zip(ys.reshape(-1).tolist(), es.reshape(-1).tolist(), xs.reshape(-1).tolist(), strict=True):
            if math.isnan(b) or math.isinf(b):
                error, x = (0.0 if a == b or (math.isnan(a) and math.isnan(b)) else math.inf), 0.0
            else:
                error = abs(a - x) if math.isfinite(a) else math.inf
            worst = max(worst, error / (allowed.atol + allowed.rtol * abs(x)))
            d2, x2 = d2 + error**2, x2 + x**2
        row_worst = max(row_worst, math.sqrt(d2 / x2) if x2 else 0.0)
    return worst, row_worst


@given(st.integers(0, 10**6), st.sampled_from([(3, 17), (20,), (1, 2, 18), (2, 3)]), st.sampled_from(["", "nan", "inf", "both"]),
       st.floats(-9, -4))
@quickly
def test_the_comparison_equals_a_plain_loop(seed, shape, special, size):
    g = torch.Generator().manual_seed(seed)
    exact = torch.randn(shape, generator=g, dtype=torch.float64)
    expected = exact.float()
    y = (exact + 10.0**size * torch.randn(shape, generator=g, dtype=torch.float64)).float()
    flat = [t.view(-1) for t in (expected, exact, y)]
    if special in ("nan", "both"):
        for t in flat:
            t[0] = math.nan
    if special in ("inf", "both"):
        flat[0][1] = flat[2][1] = -math.inf  # the exact value may be finite where the reference overflows
    allowed = measure_tolerance(expected, exact, 4)
    kept = [t.clone() for t in (y, expected, exact)]
    found = compare(y, expected, exact, allowed)
    worst, row = by_loop(y, expected, exact, allowed)
    assert math.isclose(found.ratio, max(worst, row / allowed.row), rel_tol=1e-9, abs_tol=1e-300)
    assert math.isclose(found.row_err, row, rel_tol=1e-9, abs_tol=1e-300) and found.ok == (found.ratio <= 1)
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(kept, (y, expected, exact), strict=True))


def test_the_tolerance_follows_its_formula():
    exact = torch.tensor([[3.0, -4.0] + [0.0] * 14, [0.0, 5.0] + [0.0] * 14], dtype=torch.float64)
    expected = exact.float()
    expected[0, 0] += 1e-5
    rms, eps = math.sqrt(50 / 32), torch.finfo(torch.float32).eps
    e32 = abs(expected[0, 0].item() - 3) / rms
    got = measure_tolerance(expected, exact, 100)
    assert math.isclose(got.rms, rms) and math.isclose(got.e32, e32)
    assert math.isclose(got.atol, rms * 8 * e32) and math.isclose(got.rtol, 8 * eps * 10)
    assert math.isclose(got.row, 8 * (expected[0, 0].item() - 3) / 5 + got.rtol)
    assert math.isclose(measure_tolerance(exact.float(), exact).atol, rms * 1e-6)
    assert math.isclose(measure_tolerance(exact.float(), exact, 10_000).atol, rms * 8 * eps * 100)
    assert measure_tolerance(expected, exact, rtol=0.5).rtol == 0.5
    assert measure_tolerance(expected[:, :15], exact[:, :15]).row == math.inf


def test_short_types_keep_a_relative_tolerance_below_one():
    exact = torch.ones(2, 2, dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float16):
        got = measure_tolerance(exact.to(dtype), exact, 2**20)
        assert 8 * torch.finfo(dtype).eps <= got.rtol < 0.1
        assert not compare(torch.zeros(2, 2, dtype=dtype), exact.to(dtype), exact, got).ok


def test_bad_arguments_of_the_tolerance_are_refused():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=re.escape("expected has shape (2, 3), exact has (3, 2)")):
        measure_tolerance(x, x.T.double())
    for reduction, rtol in ((0, None), (1, -0.1), (1, math.nan)):
        with pytest.raises(ValueError, match=f"reduction must be >= 1 and rtol finite and >= 0, got {reduction} and {rtol}"):
            measure_tolerance(x, x.double(), reduction, rtol)


@pytest.mark.parametrize(("y", "reason"), [
    (torch.zeros(3, 2), "shape (3, 2), expected (2, 3)"), (torch.zeros(2, 3).double(), "dtype torch.float64, expected torch.float32"),
    (torch.zeros(2, 3, device="meta"), "device meta, expected cpu"),
    (torch.full((2, 3), math.nan), "NaN or infinity in other places than in the reference"),
    (torch.zeros(2, 3), "times what is allowed")])
def test_every_refusal_says_why(y, reason):
    x = torch.ones(2, 3)
    got = compare(y, x, x.double(), measure_tolerance(x, x.double()))
    assert not got.ok and reason in got.reason and got.ratio > 1


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_nan_and_infinity_in_a_second_place_are_refused(wrong):
    x = torch.tensor([math.nan, 1.0, math.inf, 2.0])
    y = x.clone()
    y[1] = wrong
    allowed = measure_tolerance(x, x.double())
    assert compare(x.clone(), x, x.double(), allowed).ok and not compare(y, x, x.double(), allowed).ok


def test_a_row_that_is_small_beside_the_others_must_be_right_too():
    exact = torch.ones(4, 16, dtype=torch.float64)
    exact[2] = 1e-7
    allowed = measure_tolerance(exact.float(), exact)
    y = exact.float()
    y[2] = 0
    got = compare(y, exact.float(), exact, allowed)
    assert 1e-7 < allowed.atol and not got.ok and math.isclose(got.row_err, 1.0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_integers_must_be_equal(dtype):
    x = torch.tensor([[0, 1], [1, 1]]).to(dtype)
    allowed = measure_tolerance(x, x.double())
    assert compare(x.clone(), x, x.double(), allowed).ok
    got = compare(1 - x.to(torch.int64) if dtype == torch.int64 else (x == 0).to(dtype), x, x.double(), allowed)
    assert not got.ok and got.reason == "integers differ" and got.ratio > 1


def test_large_integers_are_compared_exactly():
    x = torch.tensor([2**60])
    assert not compare(x + 1, x, x.double(), measure_tolerance(x, x.double())).ok


def test_empty_and_scalar_outputs_are_compared():
    for x in (torch.zeros(0, 3), torch.zeros(2, 0), torch.tensor(2.0)):
        assert compare(x.clone(), x, x.double(), measure_tolerance(x, x.double())).ok


@pytest.mark.parametrize("shape", [(700, 300), (2, 150_000), (200_000,), (3, 65_536), (65_537, 1)])
def test_blocks_give_what_the_whole_gives_and_no_temporary_is_larger(shape):
    g = torch.Generator().manual_seed(0)
    exact = torch.randn(shape, generator=g, dtype=torch.float64)
    expected, y = exact.float(), (exact + 1e-7 * torch.randn(shape, generator=g, dtype=torch.float64)).float()

    class Largest(TorchDispatchMode):
        most = 0
        _should_skip_dynamo = classmethod(lambda cls: False)

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
                self.most = max(self.most, result.untyped_storage().nbytes())
            return result

    with Largest() as seen:
        allowed = measure_tolerance(expected, exact, 9)
        got = compare(y, expected, exact, allowed)
    d, rows = (y.double() - exact).abs(), (y.double() - exact, exact)
    norm = [t.reshape(-1, shape[-1]).square().sum(1) for t in rows]
    row = (norm[0] / norm[1]).sqrt().amax().item()
    whole = max((d / (allowed.atol + allowed.rtol * exact.abs())).amax().item(), row / allowed.row)
    assert math.isclose(got.ratio, whole, rel_tol=1e-9) and math.isclose(allowed.rms, exact.square().mean().sqrt().item(), rel_tol=1e-9)
    assert seen.most <= 2**26 and seen.most <= 4 * 8 * 2**16


@given(st.integers(0, 10**6), st.floats(-8.0, -4.5), st.sampled_from([(5, 40), (300,), (2, 3, 7), (2, 2, 17)]), st.booleans())
@quickly
def test_the_fast_verdict_is_the_verdict(seed, size, shape, tiny_row):
    g = torch.Generator().manual_seed(seed)
    exact = torch.randn(shape, generator=g, dtype=torch.float64)
    if tiny_row:
        exact[0] *= 1e-7
    expected = (exact * (1 + 1e-7 * torch.randn(shape, generator=g, dtype=torch.float64))).float()
    y = expected + 10.0**size * torch.randn(shape, generator=g)
    trial = module.Trial([], [], {}, [expected], [exact], [measure_tolerance(expected, exact, 16)])
    assert trial.accepts(y) == trial.compare(y).ok
    y.view(-1)[seed % y.numel()] = math.nan
    assert not trial.accepts(y) and not trial.accepts([y, y]) and not trial.accepts("no")
    assert trial.accepts([expected]) and trial.accepts(expected)


# trials


def test_a_trial_holds_the_answers_in_both_types_and_changes_nothing():
    one = problem("x.mul_(self.weight).sum(-1, keepdim=True)")  # a reference that changes its input
    trial = one.trial(4, 5)
    assert torch.equal(trial.inputs[0], one.inputs(4)[0]) and torch.equal(trial.state["weight"], one.model(5).weight)
    exact = (trial.inputs[0].double() * trial.state["weight"].double()).sum(-1, keepdim=True)
    assert torch.allclose(trial.exact[0], exact, rtol=1e-14, atol=0) and trial.expected[0].dtype == torch.float32
    assert trial.init_inputs == [32] and trial.compare(exact.float()).ok and trial.accepts(exact.float())
    assert torch.get_default_dtype() == torch.float32


def test_several_outputs_are_all_compared_and_a_wrong_number_is_refused():
    trial = problem("(x, [x * 2, x.argmax(-1)])").trial(0, 0)
    good = [t.clone() for t in trial.expected]
    assert trial.compare(good).ok and trial.compare((good[0], (good[1], good[2]))).ok and trial.accepts(good)
    bad = [good[0], good[1], good[2] + 1]
    assert trial.compare(bad).reason == "integers differ" and not trial.accepts(bad)
    assert trial.compare(good[:2]).reason == "2 outputs, expected 3"
    assert "must return tensors, got str" in trial.compare("text").reason


def test_a_text_may_set_its_own_tolerance():
    loose = problem(extra="\nrtol = 0.5\n").trial(0, 0)
    assert loose.allowed[0].rtol == 0.5 and loose.compare(loose.expected[0] * 1.4).ok
    for extra, ok in (("", False), ("\nallow_lower_precision = True\n", True)):
        trial = problem(extra=extra).trial(0, 0)
        assert trial.compare(trial.expected[0].bfloat16().float()).ok is ok
        assert not trial.compare(trial.expected[0] * 0).ok and not trial.compare(trial.expected[0].bfloat16()).ok


def test_a_reference_without_float64_is_refused():
    with pytest.raises(ValueError, match="problem 'p' has no float64 reference: "):
        problem("x @ torch.zeros(32, 2, dtype=torch.float32)").trial(0, 0)


def test_new_tensors_of_a_reference_follow_the_type():
    assert problem("x @ torch.ones(32, 2)").trial(0, 0).exact[0].dtype == torch.float64


def test_what_is_no_tensor_is_refused_as_output():
    x = torch.zeros(1)
    assert output_tensors([x, (x, [x])]) == [x, x, x]
    for bad, said in (({"a": x}, "dict"), ([], "list"), ([x, None], "NoneType")):
        with pytest.raises(TypeError, match=f"a model must return tensors, got {said}"):
            output_tensors(bad)


@pytest.mark.parametrize("name", NAMES)
def test_honest_rounding_passes_and_a_shorter_type_does_not(name, lower=torch.float16):
    one = small(next(p for p in builtin_problems() if p.name == name))
    trial = one.trial(11, 12)
    assert trial.compare(trial.expected).ok and trial.compare([x.to(e.dtype) for x, e in zip(trial.exact, trial.expected, strict=True)]).ok
    model = one.model(12)
    with torch.no_grad():
        short = output_tensors(model.to(lower)(*[v.to(lower) if v.is_floating_point() else v for v in trial.inputs]))
    assert not trial.compare([t.float() for t in short]).ok


# counts


@pytest.mark.parametrize(("forward", "inputs", "length", "flops"), [
    ("x * 2", "torch.randn(ROWS, COLS)", 1, 0), ("torch.softmax(x, -1)", "torch.randn(ROWS, COLS)", 32, 0),
    ("x.sum(-1)", "torch.randn(ROWS, COLS)", 32, 0), ("x.mean()", "torch.randn(ROWS, COLS)", 192, 0),
    ("x.cumsum(0)", "torch.randn(ROWS, COLS)", 6, 0), ("x @ x.T", "torch.randn(ROWS, COLS)", 32, 2 * 36 * 32),
    ("nn.functional.conv2d(x, x[:2, :, :3, :3])", "torch.randn(2, 4, 5, 5)", 36, 2 * 36 * 2 * 2 * 9),
    ("nn.functional.layer_norm(x, (32,))", "torch.randn(ROWS, COLS)", 32, 0),
    ("nn.functional.scaled_dot_product_attention(x, x, x)", "torch.randn(1, 2, 7, 16)", 16, 4 * 2 * 7 * 7 * 16),
    ("x[:, :1]", "torch.randn(ROWS, COLS)", 1, 0)])
def test_sums_and_products_are_counted(forward, inputs, length, flops):
    seen = problem(forward, inputs).trace()
    assert (seen.reduction, seen.flops) == (length, flops)


def test_bytes_are_counted_as_derived():
    size = 4 * 6 * 32
    seen = problem("torch.relu(x * 2).neg().view(-1)").trace()
    assert seen.bytes_eager == 3 * 2 * size and seen.bytes_min == 2 * size + 4 * 32
    assert seen.peak_bytes == 4 * 32 + 3 * size  # input, and two temporaries at a time
    assert problem("x.add_(1)").trace().bytes_eager == 3 * size - size + 0  # x is read, and written in place
    assert problem("x.t()").trace().bytes_eager == 0


# audit


@pytest.mark.parametrize("name", NAMES)
def test_no_trivial_answer_passes_our_problems(name):
    report = small(next(p for p in builtin_problems() if p.name == name)).audit(1)
    assert report.ok and report.flags == () and report.name == name and min(report.ratios.values()) > 100
    assert {"zeros", "constant", "previous"} <= set(report.ratios) == set(report.fixed)


@pytest.mark.parametrize(("forward", "inputs", "flags"), [
    ("x * 0", "torch.randn(ROWS, COLS)", {"zeros", "constant", "row mean", "previous", "parameters", "flat"}),
    ("x * 0 + 3", "torch.randn(ROWS, COLS)", {"constant", "row mean", "previous", "parameters", "flat"}),
    ("x + self.weight * 0", "torch.randn(ROWS, COLS)", {"copy", "parameters"}),
    ("(self.weight + x * 0)", "torch.randn(ROWS, COLS)", {"previous"}),
    ("x[:, :1] * self.weight.sum() + 0 * x", "torch.randn(ROWS, COLS)", {"row mean"}),
    ("x * self.weight + 1e-4 * torch.rand(1)", "torch.randn(ROWS, COLS)", {"nondeterministic"}),
    ("x * self.weight", "torch.ones(ROWS, COLS)", {"previous"}),
    ("1000 + x * self.weight", "torch.randn(ROWS, COLS)", {"flat"})])
def test_the_audit_names_what_is_wrong(forward, inputs, flags):
    torch.manual_seed(0)
    assert set(problem(forward, inputs).audit().flags) == flags


def test_the_audit_flags_memory_and_checks_its_seeds():
    assert problem().audit(1, memory_mb=1e-4).flags == ("memory",)
    with pytest.raises(ValueError, match="seeds must be >= 1, got 0"):
        problem().audit(0)


def test_a_fixed_tolerance_lets_zeros_pass_a_wide_softmax():
    report = problem("torch.softmax(x, -1)", "torch.randn(ROWS, 4096)").audit(1)
    assert report.fixed["zeros"] <= 1 < report.ratios["zeros"]


def test_the_records_can_not_be_changed():
    one = problem()
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.name = "y"
    assert dataclasses.is_dataclass(Tolerance)
