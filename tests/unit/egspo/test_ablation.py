"""Controls, records at equal tokens, tables against plain loops, and a study that goes on from its folder."""
import copy
import functools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from collai.core.tinylm import TinyLM
from collai.egspo import ablation
from collai.egspo.ablation import (
    ARMS,
    GRID,
    RATES,
    SCOPES,
    TASKS,
    ControlConfig,
    ControlTrainer,
    ablate,
    arms_for,
    at_best_rate,
    control_gate,
    estimate,
    main,
    plan,
    record,
    study,
    table_of,
)
from collai.egspo.recipe import CopyList, CopySum, Course, GatedConfig, GatedTrainer
from collai.eval.stats import paired_bootstrap
from collai.rl.runs import run_arms
from collai.rl.train import History, greedy_accuracy, sft

COURSE = Course(CopySum(2, 2), held=CopyList(2, 2))
TOK = COURSE.tokenizer()
FAST = {"prompts_per_step": 3, "eval_every": 2, "eval_prompts": 8, "lr": 2e-3}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def learned():
    model = TinyLM(len(TOK), hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=16)
    sft(model, TOK, COURSE.imitation, steps=28, batch=16, lr=2e-2)
    return model


def trainer(**settings):
    return ControlTrainer(copy.deepcopy(learned()), TOK, COURSE, ControlConfig(**(FAST | settings)))


# ---- control gates ----

@given(st.integers(0, 2**32), st.booleans())
def test_a_random_gate_has_the_values_of_the_gate_in_another_order(seed, soft):
    g = torch.Generator().manual_seed(seed)
    gate, mask = torch.rand(4, 5, generator=g), (torch.rand(4, 5, generator=g) < 0.6).long()
    gate = gate if soft else (gate < 0.3).float()
    dirty = torch.where(mask.bool(), gate, math.nan)
    before = dirty.clone(), mask.clone()
    drawn, again = (control_gate(dirty, mask, "random", generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(drawn, again) and drawn.dtype == torch.float32 and not drawn[mask == 0].any()
    assert sorted(drawn[mask == 1].tolist()) == sorted(gate[mask == 1].tolist())
    flipped = control_gate(dirty, mask, "reversed")
    assert torch.equal(flipped[mask == 1], 1 - gate[mask == 1]) and not flipped[mask == 0].any()
    assert torch.equal(before[1], mask) and torch.equal(before[0].nan_to_num(9), dirty.nan_to_num(9))


def test_a_random_gate_prefers_no_token():
    gate, mask = torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 7]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    drawn = torch.stack([control_gate(gate, mask, "random", generator=torch.Generator().manual_seed(k)) for k in range(500)])
    assert (drawn.mean(0)[mask == 1] - 2 / 7).abs().max() < 5 * math.sqrt(2 / 7 * 5 / 7 / 500)
    assert control_gate(gate[:0], mask[:0], "random").shape == (0, 4)
    assert not control_gate(gate, 0 * mask, "reversed").any()


def test_control_gates_refuse_what_is_no_gate():
    gate, mask = torch.tensor([[0.0, 1.0]]), torch.tensor([[1, 1]])
    with pytest.raises(ValueError, match="unknown kind 'sorted', use one of 'random', 'reversed'"):
        control_gate(gate, mask, "sorted")
    with pytest.raises(ValueError, match=r"gate must be in \[0, 1\] \(got min -1, max 0\)"):
        control_gate(gate - 1, mask, "random")
    with pytest.raises(ValueError, match="mask must contain only 0 and 1"):
        control_gate(gate, 2 * mask, "random")
    with pytest.raises(ValueError, match=r"gate has shape \(1, 2\), mask \(1, 1\)"):
        control_gate(gate, mask[:, :1], "reversed")


def test_controls_of_a_run_follow_from_seed_and_step(tmp_path):
    batch = trainer().sample(1)
    plain = trainer().gate(batch)[0]
    first = trainer(control="random").gate(batch)[0]
    assert torch.equal(first, trainer(control="random", phi=0.5).gate(batch)[0]) and not torch.equal(first, plain)
    assert float(first.sum()) == float(plain.sum()) > 0
    assert not torch.equal(first, trainer(control="random", seed=1).gate(batch)[0])
    assert torch.equal(trainer(control="reversed").gate(batch)[0], (1 - plain) * batch.mask)
    whole = trainer(control="random", epochs=2)
    whole.run(3)
    assert not torch.equal(whole.gate(batch)[0], first), "another step, another gate"
    trainer(control="random", epochs=2).run(2, checkpoint=tmp_path)
    later = trainer(control="random", epochs=2)
    assert later.run(3, checkpoint=tmp_path).column("energy_share_high").tolist() == whole.history.column("energy_share_high").tolist()
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), later.model.parameters(), strict=True))
    with pytest.raises(ValueError, match="unknown control 'shuffled'"):
        ControlConfig(control="shuffled")


def test_without_a_control_it_is_the_gated_trainer():
    theirs = GatedTrainer(copy.deepcopy(learned()), TOK, COURSE, GatedConfig(**FAST)).run(3)
    assert trainer().run(3).column("grad_norm").tolist() == theirs.column("grad_norm").tolist()


# ---- arms ----

def test_arms_name_their_settings():
    arms = arms_for(3e-4)
    assert list(arms) == list(ARMS) and {c.lr for c in arms.values()} == {3e-4}
    assert {c.n * c.prompts_per_step * c.eval_every for c in arms.values()} == {320}, "all arms are looked at equally often"
    assert arms["GRPO"].phi == 1 and arms["80/20 mask"].phi == 0 and arms["random gate"].control == "random"
    assert arms["SFT only"].mu == 1 and arms["SFT only"].expert_share == 0.5
    assert arms["OTB + gate"].estimator == "otb" and arms["OTB + gate"].phi == 0.1 and arms["EGSPO 0.1"].mu == 0
    assert arms_for(1e-4, ["phi 0.1, q 0.8"])["phi 0.1, q 0.8"] == arms_for(1e-4, ["EGSPO 0.1"])["EGSPO 0.1"]
    with pytest.raises(ValueError, match="unknown arm 'PPO', use one of 'GRPO'"):
        arms_for(1e-4, ["GRPO", "PPO"])


def test_the_plan_sweeps_rates_for_arms_and_one_rate_for_the_grid():
    sums = plan("chainsum")
    assert len(sums) == len(set(sums)) == len(ARMS) * len(RATES) + len(GRID) + len(SCOPES)
    assert [rate for name, rate in sums if name == "GRPO"] == list(RATES)
    assert [rate for name, rate in sums if name == "SFT only"] == [20 * rate for rate in RATES]
    assert {rate for name, rate in sums if name in GRID} == {RATES[1]}
    assert {name for name, _ in plan("copysum")} == set(ARMS)
    assert plan("copysum", ["GRPO"]) == [("GRPO", rate) for rate in RATES]


def test_names_may_come_one_by_one_and_unknown_ones_are_refused(tiny):
    two = ["GRPO", "OTB"]
    assert plan("chainsum", iter(two)) == plan("chainsum", two) and len(plan("chainsum", two)) == 2 * len(RATES)
    assert list(arms_for(1e-4, iter(two))) == two
    assert estimate(iter(["copysum", "chainsum"]), 1, iter(["GRPO"])) > 0
    for name, task in (("GRPPO", "chainsum"), ("scope running", "copysum")):
        with pytest.raises(ValueError, match=f"unknown arm of {task} '{name}', use one of 'GRPO', 'EGSPO 0.1'"):
            plan(task, [name])
    with pytest.raises(ValueError, match="unknown arm of chainsum 'G'"):
        plan("chainsum", "GRPO")
    for refused in (plan, lambda task: study(task, seeds=[0]), lambda task: estimate([task], 1)):
        with pytest.raises(ValueError, match="unknown task 'nope', use one of 'chainsum', 'copysum'"):
            refused("nope")
    with pytest.raises(ValueError, match="at least one seed is needed, got none"):
        study("chainsum", seeds=iter([]))


# ---- records and tables ----

def course(accuracy, entropy=None, kl=None, held=None, expert_tokens=None, each=100):
    rows = []
    for k, x in enumerate(accuracy):
        row = {"tokens": each * (k + 1), "accuracy": x, "entropy": 0.1 if entropy is None else entropy[k], "grad_norm": 1.0 + k,
               "kl": 0.0 if kl is None else kl[k], "gate_share": 0.2, "energy_share_high": 0.5 + 0.1 * k}
        row |= {} if held is None else {"held_accuracy": held[k]}
        rows.append(row | ({} if expert_tokens is None else {"expert_tokens": expert_tokens}))
    return History(rows)


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 2)), min_size=1, max_size=12), st.integers(5, 60))
def test_courses_average_over_tokens(steps, budget):
    tokens = np.cumsum([n for n, _ in steps])
    history = History([{"tokens": int(t), "accuracy": 0.5, "entropy": h, "kl": 2 * h, "grad_norm": 1.0, "gate_share": 0.2,
                        "energy_share_high": 0.9} for t, (_, h) in zip(tokens, steps, strict=True)])
    budget = min(budget * 6, int(tokens[-1]) // 6 * 6) or int(tokens[-1])
    each = [h for n, h in steps for _ in range(n * 6)]  # a sixth of a token is the unit
    found = record([history], budget)
    expected = [np.mean(each[k * budget:(k + 1) * budget]) for k in range(6)]
    assert np.allclose(found["entropy"][0], expected) and np.allclose(found["kl"][0], 2 * np.array(expected))


def test_a_record_keeps_what_the_table_needs():
    nan = math.nan
    runs = [course([nan, 0.4, nan, 0.8], held=[nan, 1.0, nan, 0.5], expert_tokens=7), course([0.1, nan, nan, 0.7], held=[1.0, nan, nan, 0.7], expert_tokens=9)]
    found = record(runs, 300)
    assert found["grid"] == [50, 100, 150, 200, 250, 300] and np.allclose(found["accuracy"][0], [0.4, 0.4, 0.4, 0.4, 0.5, 0.6])
    assert np.allclose(found["held"], [0.75, 0.8]) and found["expert_tokens"] == [28, 36] and found["grad_norm"] == [2.5, 2.5]
    assert np.allclose(found["energy_share"], 0.65) and np.allclose(found["gate_share"], 0.2)
    bare = record([course([0.5])], 100)
    assert bare["held"] is None and bare["expert_tokens"] == [0] and json.loads(json.dumps(found)) == found
    with pytest.raises(ValueError, match="no evaluation in its 1 steps"):
        record([course([nan])], 100)
    with pytest.raises(ValueError, match="at least one run is needed, got none"):
        record([], 100)


def test_differences_are_paired_by_seed():
    a, b, c = (record([course([x]) for x in xs], 100) for xs in ([0.2, 0.5, 0.9], [0.3, 0.6, 0.95], [0.5, 0.1, 0.4]))
    table = table_of({"GRPO": a, "EGSPO 0.1": b, "random gate": c})
    assert table["accuracy"].tolist() == pytest.approx([np.mean([0.2, 0.5, 0.9]), np.mean([0.3, 0.6, 0.95]), np.mean([0.5, 0.1, 0.4])])
    expected = paired_bootstrap([0.3, 0.6, 0.95], [0.2, 0.5, 0.9])
    assert table.loc["EGSPO 0.1", ["- GRPO", "- GRPO lo", "- GRPO hi"]].tolist() == pytest.approx(expected)
    assert table.loc["EGSPO 0.1", "- GRPO lo"] > 0 > table.loc["random gate", "- GRPO lo"] and table.loc["GRPO", "- GRPO"] == 0
    assert table.loc["EGSPO 0.1", "- random gate"] == pytest.approx(np.mean([0.3, 0.6, 0.95]) - np.mean([0.5, 0.1, 0.4]))
    assert table["runs"].tolist() == [3] * 3 and table["held"].isna().all()
    assert "- CHORD-phi" not in table_of({"GRPO": a}, ("GRPO", "CHORD-phi"))
    single = table_of({"GRPO": record([course([0.2])], 100), "x": record([course([0.5])], 100)})
    assert single.loc["x", "- GRPO"] == pytest.approx(0.3) and math.isnan(single.loc["x", "- GRPO hi"])


def test_tables_refuse_what_cannot_be_compared():
    one, two = record([course([0.2])], 100), record([course([0.2]), course([0.3])], 100)
    with pytest.raises(ValueError, match=r"the same seeds and the same budget, got \(runs, tokens, seeds\) = \{'a': \(1, 100.0, None\), 'b': \(2, 100.0, None\)\}"):
        table_of({"a": one, "b": two})
    with pytest.raises(ValueError, match="the same seeds and the same budget"):
        table_of({"a": one, "b": record([course([0.2])], 50)})
    with pytest.raises(ValueError, match=r"got \(runs, tokens, seeds\) = \{\}"):
        table_of({})


def test_records_of_other_seeds_are_not_paired():
    runs = [course([0.2]), course([0.4])]
    first, other, unknown = record(runs, 100, seeds=(0, 1)), record(runs, 100, seeds=range(1, 3)), record(runs, 100)
    assert first["seeds"] == [0, 1] and unknown["seeds"] is None
    for refused in (table_of, at_best_rate):
        with pytest.raises(ValueError, match=r"the same seeds .*\{1.0: \(2, 100.0, \[0, 1\]\), 2.0: \(2, 100.0, \[1, 2\]\)"):
            refused({1.0: first, 2.0: other})
    bare = {name: x for name, x in first.items() if name != "seeds"}
    assert len(table_of({"a": first, "b": unknown, "c": bare})) == 3, "rows of before have no seeds"
    assert at_best_rate({1.0: first, 2.0: first})[0]["seeds"] == [0, 1] and at_best_rate({1.0: bare, 2.0: first})[0]["seeds"] is None


def test_each_half_of_the_seeds_chooses_the_rate_of_the_other():
    slow, fast = (record([course([x], kl=[x], held=[x]) for x in xs], 100) for xs in ([0.1, 0.9, 0.2, 0.8], [0.7, 0.3, 0.6, 0.4]))
    found, rates = at_best_rate({1e-4: slow, 2e-4: fast})
    assert rates == [1e-4, 2e-4, 1e-4, 2e-4] and [run[-1] for run in found["accuracy"]] == pytest.approx([0.1, 0.3, 0.2, 0.4])
    assert found["held"] == pytest.approx([0.1, 0.3, 0.2, 0.4]) and found["grid"] == slow["grid"]
    assert [run[-1] for run in found["kl"]] == pytest.approx([0.1, 0.3, 0.2, 0.4])
    six = record([course([0.5])] * 6, 100)
    assert at_best_rate({1e-4: six, 2e-4: six})[0]["grid"] == six["grid"] and at_best_rate({1e-4: six})[0]["held"] is None
    with pytest.raises(ValueError, match="the same seeds and the same budget"):
        at_best_rate({})


# ---- runs ----

def test_an_ablation_compares_runs_at_equal_tokens(tmp_path):
    arms = {"GRPO": ControlConfig(phi=1.0, **FAST), "random gate": {"control": "random", **FAST}}
    table = ablate(arms, COURSE, seeds=(0, 1), steps=2, start=learned())
    runs = run_arms({name: ControlConfig(**a) if isinstance(a, dict) else a for name, a in arms.items()}, COURSE, seeds=(0, 1), steps=2,
                    start=learned(), make=ControlTrainer)
    budget = min(h.column("tokens")[-1] for hs in runs.values() for h in hs)
    assert table.equals(table_of({name: record(hs, budget) for name, hs in runs.items()}))
    assert table.index.tolist() == list(arms) and table["held"].notna().all()
    plain, ours = (ablate({"GRPO": kind(phi=1.0, **FAST)}, COURSE, seeds=(0, 1), steps=2, start=learned()) for kind in (GatedConfig, ControlConfig))
    assert plain.equals(ours), "settings without a control"
    for none, seeds in (({}, (0,)), ({"GRPO": FAST}, [])):
        with pytest.raises(ValueError, match=r"at least one arm and one seed are needed, got arms \[.*\] and seeds \["):
            ablate(none, COURSE, seeds=seeds, steps=2, start=learned())
    with pytest.raises(TimeoutError, match="2 of 2 runs are not finished; call again with the same folder"):
        ablate({"GRPO": FAST}, COURSE, seeds=(0, 1), steps=2, start=learned(), folder=tmp_path, seconds=-1)


@pytest.fixture
def tiny(monkeypatch):
    """The study on a task of seconds."""
    monkeypatch.setattr(ablation, "TASKS", {"chainsum": (COURSE, COURSE, 120), "copysum": (COURSE.task, COURSE, 120)})
    monkeypatch.setattr(ablation, "warm_start", lambda task: (copy.deepcopy(learned()), TOK))
    monkeypatch.setattr(ablation, "arms_for", lambda rate, names: {
        name: ControlConfig(**(FAST | {"lr": rate}), **{**ARMS, **GRID, **SCOPES}[name]) for name in names})


def test_a_study_keeps_every_arm_that_is_complete(tiny, tmp_path):
    names = ("SFT only", "scope running")
    options = {"seeds": (0, 1), "names": names, "folder": tmp_path}
    rows, left = study("chainsum", **options)
    key = COURSE.key
    assert left == 0 and [row["name"] for row in rows] == [f"{key} | {name} | {rate:g}" for name, rate in plan("chainsum", names)]
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    for row in rows:
        assert row["unit"] == "accuracy" and row["grid"][-1] == 120 and np.shape(row["accuracy"]) == np.shape(row["kl"]) == (2, 6)
        assert row["measured"] == pytest.approx(np.mean([run[-1] for run in row["accuracy"]])) and 0 < row["start"] < 1
        assert (min(row["expert_tokens"]) > 0) == ("SFT" in row["name"]) and row["seeds"] == [0, 1]
        assert row["held_start"] == round(greedy_accuracy(learned(), TOK, COURSE.held, prompts=256), 4)
        assert all(x == round(x, 4) for run in row["entropy"] for x in run), "four digits are enough"
    assert study("chainsum", seconds=-1, **options) == (rows, 0), "finished runs come from the folder"
    more, left = study("chainsum", seconds=-1, **(options | {"names": ("SFT only", "80/20 mask")}))
    assert [row["name"] for row in more] == [f"{key} | SFT only | {20 * rate:g}" for rate in RATES] and left == 6
    table_of({row["name"]: row for row in rows}, ())


def test_the_estimate_grows_with_the_work(tiny):
    one = estimate(["copysum"], 1, ["GRPO"])
    assert 0 < one < 5 and estimate(["copysum"], 40, ["GRPO", "80/20 mask"]) > 5 * one


def test_the_command_writes_what_is_complete_and_says_what_is_left(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ablation, "estimate", lambda tasks, seeds, names: 4.0)
    given_ = ["--out", str(tmp_path / "r.json"), "--folder", str(tmp_path / "f"), "--tasks", "copysum", "--seeds", "1", "--commit", "abc", "--jobs", "1"]
    with pytest.raises(SystemExit, match="3 runs are left; call again, same folder"):
        main([*given_, "--arms", "GRPO", "--minutes", "-1"])
    assert "about 4 core-minutes, 4 minutes with 1 jobs" in capsys.readouterr().out and not (tmp_path / "r.json").exists()
    main([*given_, "--arms", "GRPO"])
    with pytest.raises(SystemExit, match="3 runs are left"):
        main([*given_, "--arms", "GRPO", "80/20 mask", "--minutes", "-1"])
    stored = json.loads((tmp_path / "r.json").read_text())
    assert set(stored["rows"]) == {f"copysum-2-2 | GRPO | {rate:g}" for rate in RATES}
    assert {row["held_start"] for row in stored["rows"].values()} == {None}, "nothing is held back here"
    assert next(iter(stored["runs"].values()))["command"].startswith("python -m collai.egspo.ablation --out")
    with pytest.raises(SystemExit):
        main(["--out", "x", "--folder", "y", "--tasks", "maths"])


@pytest.mark.parametrize(("given_", "text"), [
    (["--seeds", "0"], "argument --seeds: must be a whole number >= 1, got 0"), (["--seeds", "-1"], "argument --seeds: must be a whole number >= 1, got -1"),
    (["--jobs", "0"], "argument --jobs: must be a whole number >= 1, got 0"), (["--jobs", "two"], "argument --jobs: must be a whole number >= 1, got two"),
    (["--minutes", "nan"], "argument --minutes: must be a number, got nan"),
    (["--tasks", "copysum", "--arms", "scope running"], "argument --arms: unknown arm of copysum 'scope running', use one of 'GRPO'"),
    (["--device", "cuda"], "argument --device: no GPU is to be seen here"),
    (["--out", "."], "argument --out: . is no results file (it is a folder)"), (["--out", "list.json"], "argument --out: list.json is no results file"),
    (["--out", "text.json"], "argument --out: text.json is no results file (Expecting value")])
def test_the_command_refuses_before_any_run(given_, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ablation, "estimate", lambda *_: pytest.fail("began"))
    (tmp_path / "text.json").write_text("no JSON")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(SystemExit) as stopped:
        main(["--out", "r.json", "--folder", "f", *given_])
    assert stopped.value.code == 2 and text in capsys.readouterr().err
    assert {f.name for f in tmp_path.iterdir()} == {"text.json", "list.json"}


def test_the_help_of_the_command_lists_the_arms(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "4000")
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert all(name in told for name in (*ARMS, *SCOPES, *GRID))


def test_the_shipped_tasks_have_their_start_policies():
    for what, imitated, budget in TASKS.values():
        model, _ = ablation.warm_start(imitated)
        assert len(what.tokenizer()) == len(model.lm_head.weight) and budget > 10_000
