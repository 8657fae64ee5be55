"""Properties of `collai.drkernel.ckernel`: what is compiled, what is called, and what a hook may see and do."""
import ctypes
import os
import re
import stat
import subprocess
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.drkernel import ckernel as module
from collai.drkernel.ckernel import (
    FLAGS,
    CModule,
    CompileError,
    chain_source,
    cjit,
    compile_kernel,
    compiling,
    kernel_folder,
    kernel_key,
    knock_out,
    launch_chain,
    launch_hook,
    measure,
    profile_launches,
    stub_source,
)

quickly = settings(deadline=None, derandomize=True, max_examples=30)
SOURCE = r"""
#include <stdint.h>
#define FAKE "void hidden(float *x) {"  \
             void hidden2(float *x) {
// void hidden3(float *x) {
/* void hidden4(float *x) { */
static void helper(float *y, long n) { for (long i = 0; i < n; i++) y[i] += 1; }
void scale(const float *restrict x, float* y, long n, double a) {
    for (long i = 0; i < n; i++) { y[i] = x[i] * (float)a; }
}
void add(float const * x, float y[], int n) { for (int i = 0; i < n; i++) y[i] += x[i]; }
void types(const double *d, int32_t *i, long long *l, int8_t *s, uint8_t *u, const _Bool *b, float f)
{ i[0] = (int)d[0]; l[0] = i[0]; s[0] = -1; u[0] = 200 + b[0]; i[1] = (int)(f * 10); }
void nothing(void) { const char *text = "void hidden5(float *x) {"; (void)text; helper(0, 0); }
void odd(unsigned n) { }
#if 0
void absent(float *x) { }
#endif
"""


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory):
    """A cache of this file's own."""
    kept = os.environ.get("COLLAI_KERNELS")
    os.environ["COLLAI_KERNELS"] = str(tmp_path_factory.mktemp("kernels"))
    yield kernel_folder()
    os.environ.pop("COLLAI_KERNELS")
    if kept:
        os.environ["COLLAI_KERNELS"] = kept


@pytest.fixture(scope="module")
def lib(folder):
    return cjit(SOURCE, ("-O1",))


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# binding


def test_functions_are_bound_by_their_signatures_and_nothing_else_is(lib):
    bound = {name for name in vars(lib) if name != "_refused"}
    assert bound == {"scale", "add", "types", "nothing"}
    assert repr(lib.scale) == "void scale(const float *x, float *y, long n, double a)"
    assert repr(lib.types) == ("void types(const double *d, int32_t *i, long long *l, int8_t *s, uint8_t *u, const _Bool *b, "
                               "float f)")
    with pytest.raises(AttributeError, match="odd can't be called from Python: 'unsigned n' is no tensor or number"):
        lib.odd(3)
    for name in ("hidden", "helper", "absent"):
        with pytest.raises(AttributeError, match=f"no C function '{name}'; there are scale, add, types, nothing"):
            getattr(lib, name)


def test_every_type_arrives_as_it_was_sent(lib):
    d, i, n = torch.tensor([7.0], dtype=torch.float64), torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    s, u = torch.zeros(1, dtype=torch.int8), torch.zeros(1, dtype=torch.uint8)
    assert lib.types(d, i, n, s, u, torch.tensor([True]), np.float32(2.5)) is None
    assert i.tolist() == [7, 25] and n.item() == 7 and s.item() == -1 and u.item() == 201
    lib.nothing()


@given(st.integers(0, 300), st.floats(-100, 100), st.integers(0, 10**6))
@quickly
def test_results_equal_a_plain_loop_and_inputs_are_not_changed(n, a, seed):
    lib = cjit(SOURCE, ("-O1",))
    x, y = randn(n, seed=seed), torch.empty(n)
    kept = x.clone()
    lib.scale(x, y, n, a)
    assert torch.equal(x, kept)
    assert y.tolist() == [(np.float32(v) * np.float32(a)).item() for v in x.tolist()]


@pytest.mark.parametrize(("arguments", "said"), [
    ((randn(3), randn(3), 3), "scale takes 4 arguments (x, y, n, a), got 3"),
    ((randn(3).double(), randn(3), 3, 1.0), "scale, argument 'x': expected torch.float32 for float *, got torch.float64"),
    ((randn(3), randn(3, 2)[:, 0], 3, 1.0), "scale, argument 'y': not contiguous, shape (3,) has strides (2,)"),
    ((randn(3), torch.zeros(3, device="meta"), 3, 1.0), "scale, argument 'y': expected a CPU tensor, got one on meta"),
    (([1.0], randn(3), 3, 1.0), "scale, argument 'x': expected a tensor, got list"),
    ((np.ones(3, np.float32), randn(3), 3, 1.0), "scale, argument 'x': expected a tensor, got ndarray"),
    ((randn(3), randn(3), 3.0, 1.0), "scale, argument 'n': expected an integer for long, got float"),
    ((randn(3), randn(3), torch.tensor(3), 1.0), "scale, argument 'n': expected a number for long, got a tensor"),
    ((randn(3), randn(3), 2**63, 1.0), f"scale, argument 'n': {2**63} does not fit into long"),
    ((randn(3), randn(3), 3, "1"), "scale, argument 'a': expected a number for double, got str"),
    ((randn(3), randn(3), 3, 1j), "scale, argument 'a': expected a number for double, got complex")])
def test_arguments_that_do_not_fit_are_refused_by_name(lib, arguments, said):
    with pytest.raises(TypeError, match=re.escape(said)):
        lib.scale(*arguments)


def test_a_number_that_does_not_fit_into_an_int_is_refused(lib):
    with pytest.raises(TypeError, match="add, argument 'n': 2147483648 does not fit into int"):
        lib.add(randn(1), randn(1), 2**31)


def test_a_launcher_takes_no_new_attributes(lib):
    with pytest.raises(AttributeError):
        lib.scale.hook = print


def test_a_source_without_functions_is_refused():
    for text in ("int x;", "static void f(float *x) { }", "// void f(float *x) { }"):
        with pytest.raises(ValueError, match=re.escape("no function 'void f(...) {' in the source")):
            cjit(text)


# compiling


def test_the_message_of_the_compiler_is_the_error_and_names_no_folder(folder):
    with pytest.raises(CompileError, match="'oops' undeclared") as caught:
        cjit("void f(float *x) { x[0] = oops; }")
    assert str(folder) not in str(caught.value) and not list(folder.glob(".build-*"))


@pytest.mark.parametrize("flag", ["-o", "-fplugin=a.so", "-Wl,-x", "@file", "-include", "-I/etc", "-wrapper", "-fopenmp",
                                  "-save-temps", "-B.", "-DX=a;b", "-xc++", "-fdump-tree-all", "", "-O3\n", "-l m"])
def test_flags_that_name_files_or_programs_are_refused(flag):
    with pytest.raises(ValueError, match=re.escape(f"flag {flag!r} is not allowed")):
        compile_kernel("void f(void) { }", [flag])


@pytest.mark.parametrize("flags", [FLAGS, ("-Ofast",), ("-O2", "-funroll-loops", "-fno-tree-vectorize", "-std=c11", "-DN=4", "-Wall"),
                                   ("-mavx2", "-mno-fma", "-mtune=native", "-ffp-contract=off")])
def test_flags_of_optimisation_are_allowed(flags):
    assert module._checked_flags(flags, True) == flags


def test_the_cache_is_found_without_writing_or_starting_anything(tmp_path, monkeypatch):
    path = compile_kernel(SOURCE, ["-O0"], folder=tmp_path / "a")
    assert path.name == f"{kernel_key(SOURCE, ['-O0'])}.so" and stat.S_IMODE(path.stat().st_mode) == 0o444
    assert list(path.parent.iterdir()) == [path]
    before = path.stat().st_mtime_ns
    monkeypatch.setattr(subprocess, "run", None)
    monkeypatch.setattr(module.tempfile, "mkdtemp", None)
    assert compile_kernel(SOURCE, ["-O0"], folder=tmp_path / "a") == path and path.stat().st_mtime_ns == before
    CModule(path, SOURCE).nothing()


def test_the_key_follows_source_and_flags():
    keys = {kernel_key(s, f) for s in ("a", "b") for f in ((), ("-O1",), ("-O1", "-w"), ("-O1-w",))}
    assert len(keys) == 8 and kernel_key("a") == kernel_key("a", FLAGS)


def test_a_missing_kernel_in_a_folder_that_can_not_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match=r"kernel [0-9a-f]{64}\.so is not in .*, which can't be written: "):
        compile_kernel(SOURCE, folder=tmp_path / "file")


def test_without_a_compiler_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=re.escape("no C compiler found: install gcc or clang, or use device='cuda'")):
        cjit(SOURCE)


def test_a_compiler_that_never_ends_is_ended(tmp_path, monkeypatch):
    slow = tmp_path / "cc"
    slow.write_text("#!/bin/sh\nexec sleep 30\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(CompileError, match=re.escape("the compiler ran for more than 0.2 s")):
        compile_kernel("void f(void) { }", folder=tmp_path / "k", timeout=0.2)
    assert not list((tmp_path / "k").iterdir())


def test_fast_math_can_be_forbidden():
    text = "void f(const float *x, float *y) { y[0] = x[0] != x[0] ? 1.0f : 0.0f; }"
    x, y = torch.tensor([torch.nan]), torch.zeros(1)
    for flags, fast, wanted in ((FLAGS, True, 0.0), (FLAGS, False, 1.0), (("-Ofast",), False, 1.0)):
        CModule(compile_kernel(text, flags, fast_math=fast), text).f(x, y)
        assert y.item() == wanted
    assert module._checked_flags(("-Ofast", "-ffast-math", "-O2"), False) == ("-O3", "-O2")


def test_loading_a_fast_math_kernel_leaves_denormal_numbers_alone():
    cjit("void f(float *x) { x[0] *= 3; }").f(torch.ones(1))
    assert (torch.tensor([1e-40]) * 0.5).item() != 0


def test_another_compiler_can_stand_in_for_a_block(tmp_path):
    asked = []

    def judge(src, flags):
        asked.append((src, flags))
        return compile_kernel(src, flags, folder=tmp_path)

    with compiling(judge), compiling(compile_kernel), compiling(judge):
        cjit(SOURCE, ["-O1"]).nothing()
    cjit(SOURCE, ["-O1"]).nothing()
    assert asked == [(SOURCE, ("-O1",))] and len(list(tmp_path.glob("*.so"))) == 1


# hooks and profiles


def two_launches(lib, keep=0.0):
    """A function whose second launch fills a buffer that counts `keep` times."""
    def fn(x):
        out, scratch = torch.empty_like(x), torch.empty_like(x)
        lib.scale(x, out, x.numel(), 2.0)
        lib.scale(x, scratch, x.numel(), 3.0)
        return torch.relu(out) + keep * scratch if keep else torch.relu(out)
    return fn


def test_a_hook_sees_every_launch_and_decides_about_it(lib):
    x, y, seen = randn(4), torch.zeros(4), []

    def hook(launch):
        seen.append((launch.name, [t.data_ptr() for t in launch.read], [t.data_ptr() for t in launch.written]))
        if len(seen) > 1:
            launch.run()

    with launch_hook(hook):
        lib.scale(x, y, 4, 2.0)
        assert bool((y == 0).all())
        lib.scale(x, y, 4, 2.0)
    assert torch.equal(y, 2 * x) and seen == [("scale", [x.data_ptr()], [y.data_ptr()])] * 2
    lib.add(x, y, 4)
    assert len(seen) == 2


def test_the_innermost_hook_is_asked_and_an_error_takes_it_away(lib):
    outer, inner = [], []
    with launch_hook(outer.append):
        with pytest.raises(TypeError), launch_hook(inner.append):
            lib.nothing()
            lib.nothing(1)
        lib.nothing()
    assert [launch.name for launch in outer] == [launch.name for launch in inner] == ["nothing"] and not module._HOOKS


def test_a_profile_lists_launches_and_operators_in_order_without_counting_twice(lib):
    fn = two_launches(lib, keep=1.0)
    began = time.perf_counter()
    events = profile_launches(fn, randn(10_000))
    wall = (time.perf_counter() - began) * 1e6
    names = [(name, generated) for name, _, generated in events if name not in ("aten::empty_like", "aten::empty")]
    assert names == [("scale", True), ("scale", True), ("aten::relu", False), ("aten::mul", False), ("aten::add", False)]
    assert all(us > 0 for _, us, _ in events) and sum(us for _, us, _ in events) < wall


def test_a_profile_measures_the_time_of_the_launch(lib):
    slow = cjit("void f(float *x, long n) { for (long i = 0; i < n; i++) x[0] = x[0] * 0.5f + 1.0f; }", ("-O1",))

    def fastest(n, tries):  # of some tries: a process that is held up now and then does not count
        found = [profile_launches(lambda: slow.f(torch.ones(1), n)) for _ in range(tries)]
        return min(us for events in found for _, us, generated in events if generated)

    assert fastest(4_000_000, 1) > 20 * fastest(10_000, 9)


def test_the_clock_of_the_profile_can_not_be_replaced_from_outside(lib, monkeypatch):
    monkeypatch.setattr(time, "perf_counter_ns", lambda: 0)
    assert all(us > 0 for _, us, _ in profile_launches(two_launches(lib), randn(10)))


# knock-out


@pytest.mark.parametrize("poison", ["nan", "shift"])
def test_a_launch_that_matters_changes_the_output_and_a_decoy_does_not(lib, poison):
    x = randn(50)
    fn = two_launches(lib)
    kept = x.clone()
    assert not torch.equal(knock_out(fn, x, index=0, poison=poison), fn(x))
    assert torch.equal(knock_out(fn, x, index=1, poison=poison), fn(x)) and torch.equal(x, kept)
    fn = two_launches(lib, keep=0.5)
    assert not torch.equal(knock_out(fn, x, index=1, poison=poison), fn(x))


def test_finite_poison_finds_the_decoy_that_is_multiplied_by_zero(lib):
    def fn(x):
        scratch = torch.empty_like(x)
        lib.scale(x, scratch, x.numel(), 3.0)
        return x + 0.0 * scratch

    x = randn(20)
    assert bool(knock_out(fn, x, index=0).isnan().all()) and torch.equal(knock_out(fn, x, index=0, poison="shift"), fn(x))


def test_what_a_launch_only_reads_is_not_poisoned_even_when_it_is_not_const():
    lib = cjit("void decoy(float *x, float *scratch, long n) { for (long i = 0; i < n; i++) scratch[i] = x[i]; }", ("-O1",))

    def fn(x):
        lib.decoy(x, torch.empty_like(x), x.numel())
        return 2 * x

    x = randn(9)
    for poison in ("nan", "shift"):
        assert torch.equal(knock_out(fn, x, index=0, poison=poison), 2 * x)


def test_results_left_from_an_earlier_call_do_not_hide_a_launch(lib):
    out = torch.empty(9)

    def fn(x):
        lib.scale(x, out, 9, 2.0)
        return out.clone()

    x = randn(9)
    fn(x)
    assert bool(knock_out(fn, x, index=0).isnan().all())


def test_only_the_places_that_are_written_are_poisoned(lib):
    def fn(x):
        out = x.clone()
        lib.scale(x, out, 3, 2.0)
        return out

    x = randn(9)
    got = knock_out(fn, x, index=0)
    assert bool(got[:3].isnan().all()) and torch.equal(got[3:], x[3:])


def test_launches_that_add_in_place_are_knocked_out(lib):
    def fn(x):
        total = torch.zeros(9)
        for _ in range(3):
            lib.add(x, total, 9)
        return total

    x = randn(9)
    assert all(bool(knock_out(fn, x, index=i).isnan().all()) for i in range(3))
    assert torch.equal(fn(x), x + x + x)


def test_integers_get_wrong_values_that_stay_near_zero():
    lib = cjit("void even(const int *x, long *y, long n) { for (long i = 0; i < n; i++) y[i] = x[i] % 2; }", ("-O1",))

    def fn(x):
        y = torch.full((4,), 9)
        lib.even(x, y, 4)
        return y

    x = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    assert fn(x).tolist() == [0, 1, 0, 1] and knock_out(fn, x, index=0).tolist() == [1, 0, 1, 0]


def test_bad_requests_to_the_knock_out_are_refused(lib):
    with pytest.raises(ValueError, match="poison must be 'nan' or 'shift', got 'zero'"):
        knock_out(two_launches(lib), randn(2), index=0, poison="zero")
    for index in (2, -1):
        with pytest.raises(IndexError, match=f"no launch {index}, there were 2"):
            knock_out(two_launches(lib), randn(2), index=index)


def test_an_emptied_function_keeps_its_signature_and_does_nothing(lib):
    text = stub_source(SOURCE, "scale")
    other, x, y = cjit(text, ("-O1",)), randn(5), torch.full((5,), 7.0)
    other.scale(x, y, 5, 2.0)
    assert bool((y == 7).all()) and repr(other.scale) == repr(lib.scale)
    other.add(x, y, 5)
    assert torch.equal(y, x + 7)
    with pytest.raises(ValueError, match="no function 'helper' in the source; there are scale, add, types, nothing"):
        stub_source(SOURCE, "helper")


# the chain


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 100))
@quickly
def test_a_chain_is_the_same_however_it_is_cut(steps, launches, seed):
    lib, x = cjit(chain_source(8), ("-O2",)), randn(33, seed=seed)
    spare, count = [torch.empty(33), torch.empty(33)], []
    if launches > steps:
        with pytest.raises(ValueError, match=f"{steps} steps can't be cut into {launches} launches"):
            launch_chain(lib, x, spare, steps, launches)
        return
    kept = x.clone()
    with launch_hook(lambda launch: (launch.run(), count.append(launch.name))):
        y = launch_chain(lib, x, spare, steps, launches)
    assert torch.equal(y, module._eager_chain(x, steps)) and torch.equal(x, kept)
    lengths = [int(name[5:]) for name in count]
    assert len(lengths) == launches and sum(lengths) == steps and max(lengths) - min(lengths) <= 1


def test_the_measurement_gives_rows_with_bytes():
    rows = {row["name"]: row for row in measure("cpu", size=1000, steps=2, rounds=3)}
    memory = ("returned", "kept", "fused") if hasattr(ctypes.CDLL(None), "mallopt") else ()
    assert set(rows) == {f"{kind}_{n}" for kind in ("launches", "fused", "eager") for n in (1, 2)} | {
        f"memory_{name}" for name in memory}
    assert rows["launches_2"]["bytes"] == 16_000 and rows["fused_2"]["bytes"] == 8_000 and rows["eager_2"]["bytes"] == 16_000
    assert all(0 <= row["measured"] <= row["median"] and row["unit"] == "ms" for row in rows.values())
    with pytest.raises(ValueError, match="C kernels run on a CPU, got device 'cuda'"):
        measure("cuda")
    with pytest.raises(ValueError, match="most must be >= 1, got 0"):
        chain_source(0)
