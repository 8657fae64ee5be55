"""Honest Triton kernels of `collai.drkernel.hacks`: right at odd sizes, refused when broken, timed by a sound clock."""
import ast
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.drkernel import hacks as module
from collai.drkernel.problems import builtin_problems

quickly = settings(deadline=None, derandomize=True, max_examples=30)
PROBLEMS = {p.name: p for p in builtin_problems(device="cpu")}
SCRIPT = """
import json, sys, torch
from collai.drkernel import hacks
from collai.drkernel.problems import build_model, builtin_problems
torch.set_num_threads(1)
told, problems = {}, {p.name: p for p in builtin_problems(device="cpu")}
def ask(name, text, sizes, seed):
    trial = hacks._sized(problems[name], sizes).trial(seed, seed)
    kept = [v.clone() for v in trial.inputs]
    model = build_model(hacks._class_of(text), trial.init_inputs, seed + 1, trial.state)
    with torch.no_grad():
        ok = trial.accepts(model(*trial.inputs))
    assert all(torch.equal(a, b) for a, b in zip(kept, trial.inputs)), name
    return ok
for name, text in hacks._TRITON.items():
    told[name] = [ask(name, text, sizes, i) for i, sizes in enumerate(json.loads(sys.argv[1]))]
broken = json.loads(sys.argv[2])
planted = {name: ask(name, hacks._replaced(hacks._TRITON[name], {old: new}), hacks._TINY, 0)
           for name, (old, new) in broken.items()}
rows = hacks.kernel_rows("cpu", rounds=1)
print(json.dumps({"told": told, "planted": planted, "rows": rows}))
"""
SIZES = [{"ROWS": 5, "COLS": 38, "GROUP": 3, "BATCH": 3, "CHANNELS": 16, "SIDE": 5, "LENGTH": 7, "INNER": 37},
         {"ROWS": 9, "COLS": 64, "GROUP": 4, "BATCH": 2, "CHANNELS": 8, "SIDE": 8, "LENGTH": 16, "INNER": 64}]
BROKEN = {"residual_rmsnorm": ("/ COLS", "/ BLOCK"), "layernorm": ("v = tl.where(real, v - tl.sum(v, 1)[:, None] / COLS, 0.0)", "v = v - tl.sum(v, 1)[:, None] / COLS"),
          "scaled_masked_softmax": ('other=1)', 'other=0)'), "rope": ("b * c + a * s", "b * c - a * s"),
          "groupnorm_hardtanh_scale": ("group % GROUPS * EACH", "group * 0"), "logsumexp_mish": ("(e + 2.0)))", "(e + 1.0)))"),
          "clamp_min_softmax": ("static_range(1, GROUP)", "static_range(2, GROUP)"),
          "sigmoid_gating": ("tl.where(real, 1.0 / (1.0 + tl.exp(-(v * w + b))), 0.0)", "1.0 / (1.0 + tl.exp(-(v * w + b)))"),
          "matmul_bias_gelu_rowsum": ("other=0.0)[None, :]", "other=0.1)[None, :]")}


@pytest.fixture(scope="module")
def answers():
    """What a process with Triton's interpreter finds."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the optional package triton is not installed (pip install 'collai[triton]')")
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(SIZES), json.dumps(BROKEN)],
                         capture_output=True, text=True, timeout=300, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert run.returncode == 0, run.stderr[-3000:]
    assert "left out" not in run.stdout, run.stdout[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_every_kernel_is_accepted_at_odd_and_even_sizes_and_leaves_its_inputs_alone(answers):
    assert {p.name for p in builtin_problems(2)} <= set(answers["told"])
    assert [name for name, ok in answers["told"].items() if ok != [True, True]] == []


def test_kernels_with_one_planted_mistake_are_refused(answers):
    assert [name for name, ok in answers["planted"].items() if ok] == []


def test_the_benchmark_gives_all_rows_of_the_twelve_chains(answers):
    rows = {row["name"]: row for row in answers["rows"]}
    for problem in builtin_problems(2):
        for kind in ("share", "eager", "error"):
            assert rows[f"triton/{problem.name}/{kind}"]["measured"] >= 0
        assert rows[f"triton/{problem.name}/error"]["accepted"]
        assert rows[f"triton/{problem.name}/error"]["full_size"] < 1e-5
        assert all(e <= 1 for e in rows[f"triton/{problem.name}/share"]["variants_error"].values())
    assert rows["triton/mean/share"]["problems"] == 11 and rows["triton/mean/eager"]["problems"] == 12
    assert {key.rsplit("/", 1)[1] for key in rows if "/rate/" in key} == {"ours", "eager", *module._OTHER_PRODUCTS}


@pytest.mark.parametrize("name", sorted(module._TRITON))
def test_a_source_defines_its_kernel_and_module_with_the_parameters_of_the_reference(name):
    tree = ast.parse(module._TRITON[name])
    assert [node.name for node in tree.body if isinstance(node, ast.ClassDef)] == ["ModelNew"]
    assert any("triton.jit" in ast.unparse(d) for n in tree.body if isinstance(n, ast.FunctionDef) for d in n.decorator_list)
    reference = PROBLEMS[name].model(0)
    held = [*reference.named_parameters(), *reference.named_buffers()]
    assert set(made_names(module._TRITON[name])) == {key for key, _ in held}


def made_names(text):
    """Names of parameters and buffers that a source makes."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assign) and "nn.Parameter" in ast.unparse(node.value):
            yield node.targets[0].attr
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "self.register_buffer":
            yield node.args[0].value


@pytest.mark.parametrize("name", [p.name for p in builtin_problems(2)])
def test_variants_are_other_sources(name):
    texts = [*module._variants(name).values(), module._TRITON[name]]
    assert len(set(texts)) == len(texts) > 2
    for text in texts:
        ast.parse(text)


@pytest.mark.parametrize("name", [p.name for p in builtin_problems(2)])
def test_bytes_at_full_size_follow_from_two_small_traces(name):
    problem = module._sized(PROBLEMS[name], {"ROWS": 17, "BATCH": 5, "SIDE": 6, "LENGTH": 11})
    trace = problem.trace()
    assert module._moved(problem) == (trace.bytes_eager, trace.bytes_min)


@quickly
@given(st.integers(1, 64), st.integers(1, 4), st.integers(0, 1), st.booleans())
def test_streams_add_up_to_the_bytes_of_the_tensors(rows, reads, chars, writes):
    inputs = [torch.ones(rows, 32 * reads), torch.ones(rows, 32 * chars, dtype=torch.int8)]
    size, *streams = module._streams(inputs, torch.ones(rows, 32) if writes else torch.ones(rows))
    found = size * (4 * streams[0] + streams[1] + 4 * streams[2])
    wanted = sum(t.numel() * t.element_size() for t in inputs) + 4 * 32 * rows * writes
    assert found == wanted or not (writes or chars == 0)


@quickly
@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=60))
def test_the_interval_holds_the_median(values):
    middle, low, high = module._middle(values)
    assert min(values) <= low <= middle <= high <= max(values)
    assert len(values) > 6 or (low, high) == (min(values), max(values))


def test_the_interval_covers_the_true_median_in_about_95_percent():
    draw = torch.Generator().manual_seed(0)
    told = [module._middle(torch.randn(20, generator=draw).tolist()) for _ in range(2000)]
    assert 0.94 < sum(low <= 0 <= high for _, low, high in told) / 2000 < 0.99


def test_rounds_turn_their_order_round():
    seen = []
    calls = {name: [lambda name=name: seen.append(name)] for name in "ab"}
    assert {k: len(v) for k, v in module._rounds(calls, 4, "cpu").items()} == {"a": 4, "b": 4}
    assert "".join(seen) == "abbaabba"


@pytest.mark.parametrize("name", [p.name for p in builtin_problems(2) if not p.name.startswith("matmul")])
def test_hints_are_one_variant_apart_and_the_default_only_where_they_paid(name):
    text, variants = module._TRITON[name], module._variants(name)
    hints = 'eviction_policy="evict_first"'
    assert (hints in text) == (name == "logsumexp_mish")
    other = variants["no hints" if hints in text else "with hints"]
    assert (hints in other) != (hints in text) and module._plain(other) == module._plain(text)
    hinted = max(text, other, key=len)
    streams = [line for line in hinted.splitlines() if re.search(r"tl\.(load|store)\(", line) and "mask=real" in line]
    assert len(streams) > 0 and all(hints in line for line in streams) and hinted.count(hints) == len(streams)


# torch's compiler


class Refused(torch.nn.Module):
    """A module whose length can't be asked for, as torch's compiled ones are."""

    def forward(self, x):
        return x + 1

    def __len__(self):
        raise TypeError("Model does not support len()")


def test_a_failing_compiler_leaves_out_its_rows_only(monkeypatch, capsys):
    resets = []
    monkeypatch.setitem(vars(torch), "_dynamo", SimpleNamespace(reset=lambda: resets.append(1)))  # the real one is slow

    def fails(model, mode, dynamic):
        if mode == "default":
            raise RuntimeError("no")
        return lambda *inputs: time.sleep(5)

    monkeypatch.setattr(torch, "compile", fails)
    began = time.monotonic()
    assert module._compiled(Refused(), [torch.ones(2)], 0.3) == ({}, "") and time.monotonic() - began < 2
    told = capsys.readouterr().out
    assert "max-autotune-no-cudagraphs: TimeoutError: not done within 0.2 s" in told and "default: RuntimeError" in told
    assert len(resets) == 2 and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_compiled_module_without_a_length_is_kept(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, mode, dynamic: model)
    model = Refused()
    made, mode = module._compiled(model, [torch.ones(2)], 5.0)
    assert list(made) == ["compile"] and made["compile"] is not model and mode == "max-autotune-no-cudagraphs"


def test_a_chain_that_fails_leaves_the_others_and_no_chain_is_begun_too_late(monkeypatch, capsys):
    def rows(problem, device, rounds, seconds):
        if problem.name == "swiglu":
            raise TypeError("broken")
        return [{"name": f"triton/{problem.name}/share", "measured": seconds, "low": 1.0, "high": 1.0, "unit": "",
                 "bound": None, "compiling_seconds": 7.0}]

    monkeypatch.setattr(module, "_problem_rows", rows)
    told = module._chain_rows("cpu", {}, 1, time.monotonic() + 600, 40.0)
    assert [row["measured"] for row in told][:4] == [30.0, 30.0, 26.0, 19.0] and len(told) == 11
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines if line.startswith("{")] == told
    assert [line for line in lines if not line.startswith("{")] == ["left out: swiglu: TypeError: broken"]
    assert module._chain_rows("cpu", {}, 1, time.monotonic() - 1, 40.0) == []
    assert capsys.readouterr().out.count("no time is left") == 12
    told = module._chain_rows("cpu", {}, 1, time.monotonic() + 62, 40.0)  # five seconds a chain come first
    assert 0 < told[0]["measured"] <= 2 and told[1]["measured"] <= 12


def test_replacing_what_is_not_there_once_is_refused():
    assert module._replaced("ab", {"a": "c"}) == "cb"
    for text in ("bb", "aab"):
        with pytest.raises(ValueError, match=f"'a' is {text.count('a')} times in the source"):
            module._replaced(text, {"a": "c"})


@pytest.mark.parametrize(("wrong", "message"), [
    ({"device": "tpu"}, "device must be 'cuda' or 'cpu' and rounds >= 1, got 'tpu' and 2"),
    ({"device": "cpu", "rounds": 0}, "got 'cpu' and 0"),
    ({"device": "cpu"}, "TRITON_INTERPRET must be '1' before Triton is imported, got None")])
def test_a_benchmark_that_cannot_run_says_why(wrong, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=message):
        module.kernel_rows(**wrong)
