"""Tokens to a target: censoring, tables, resumable cells, choice of rates, and the studies end to end on a tiny task."""
import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import CensoredData, ecdf, logrank

from collai.core.tinylm import TinyLM
from collai.otb import training
from collai.otb.training import (
    ARMS,
    RATES,
    REFERENCE,
    Arrivals,
    HalfTrainer,
    arm_table,
    arms_for,
    arrivals,
    collapsed,
    compare,
    cross_fitted,
    estimate,
    km_median,
    large_study,
    late_gradient,
    main,
    stability,
    stored_arrivals,
    study,
    tokens_to_target,
)
from collai.rl.runs import run_arms
from collai.rl.tasks import CalcTool, ChainSum
from collai.rl.train import History, TrainConfig, sft

TINY = ChainSum(2, 3)
FAST = {"prompts_per_step": 2, "eval_every": 2, "eval_prompts": 4, "lr": 1e-2}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def policy():
    model = TinyLM(len(TINY.tokenizer()), hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=16, seed=0)
    sft(model, TINY.tokenizer(), TINY, steps=40, batch=16, lr=1e-2)
    return model


def course(*accuracy, tokens=100):
    return History([{"step": k, "tokens": tokens * k, "accuracy": a, "grad_norm": float(k)} for k, a in enumerate(accuracy, 1)])


def made(tokens, *failed):
    return Arrivals(np.array([*tokens, *failed], dtype=float), np.array([True] * len(tokens) + [False] * len(failed)))


# ---- arrivals and medians ----

def test_tokens_to_target_is_the_first_evaluation_at_or_above_it():
    nan = math.nan
    run = course(nan, 0.5, nan, 0.8, 0.7, 0.9)
    assert [tokens_to_target(run, x) for x in (0.5, 0.8, 0.80001, 0.91)] == [200, 400, 600, math.inf]
    assert tokens_to_target(course(nan, nan), 0.1) == math.inf
    for wrong in (0, -0.5, 1.5, nan):
        with pytest.raises(ValueError, match=rf"target must be in \(0, 1\], got {wrong}"):
            tokens_to_target(run, wrong)
    found = arrivals([run, course(0.1, 0.2)], 0.8)
    assert found.tokens.tolist() == [400, 200] and found.reached.tolist() == [True, False]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 8), st.booleans()), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_the_median_is_kaplan_meiers_also_for_drawn_runs(runs, random):
    t, seen = np.array([x for x, _ in runs], float), np.array([r for _, r in runs])
    drawn = [random.randrange(len(t)) for _ in t]
    for at in (slice(None), drawn):
        curve = ecdf(CensoredData(uncensored=t[at][seen[at]], right=t[at][~seen[at]])).sf
        below = [q for q, p in zip(curve.quantiles, curve.probabilities, strict=True) if p <= 0.5 + 1e-9]
        counts = None if at == slice(None) else np.bincount(drawn, minlength=len(t))[None]
        assert km_median(t, seen, counts)[0] == min(below, default=math.inf)


def test_a_median_needs_a_run():
    with pytest.raises(ValueError, match="a median needs at least one run, got 0"):
        km_median(np.zeros(0), np.zeros(0, bool))


# ---- the table ----

def test_a_table_compares_with_its_reference():
    slow, fast, never = made([50, 60, 70], 99, 99), made([10, 12, 14, 16, 18]), made([], 40, 40, 40, 40, 40)
    table = arm_table({"slow": slow, "fast": fast, "never": never})
    assert table["median"].tolist() == [70, 14, math.inf] and table["runs"].tolist() == [5, 5, 5]
    assert np.allclose(table["censored_share"], [0.4, 0, 1]) and np.allclose(table["saved"], [0, 0.8, 0])
    assert table.loc["fast", "lo"] == 10 or table.loc["fast", "lo"] == 12
    assert table.loc["slow", "hi"] == math.inf and table.loc["never", "saved_hi"] == 0
    sides = [CensoredData(uncensored=x.tokens[x.reached], right=x.tokens[~x.reached]) for x in (fast, slow)]
    assert table.loc["fast", "p_logrank"] == pytest.approx(logrank(*sides).pvalue)
    assert table.loc["slow", "p_logrank"] == pytest.approx(1.0)
    assert math.isnan(arm_table({"never": never})["p_logrank"].iloc[0])
    assert arm_table({"slow": slow, "fast": fast}, reference="fast").loc["slow", "saved"] == 1 - 70 / 14


def test_a_failing_arm_never_shows_a_saving_and_a_failing_reference_understates_it():
    cheap_but_failing, reference = made([], 10, 10, 10), made([50, 60, 70])
    assert arm_table({"r": reference, "a": cheap_but_failing}).loc["a", "saved"] == 0
    longer = made([], 80, 80, 80)
    assert arm_table({"r": reference, "a": longer}).loc["a", "saved"] == pytest.approx(1 - 80 / 60)
    assert arm_table({"r": longer, "a": reference}).loc["a", "saved"] == pytest.approx(1 - 60 / 80)


def test_tables_refuse_what_cannot_be_compared():
    with pytest.raises(ValueError, match=r"reference must be one of \['a'\], got 'b'"):
        arm_table({"a": made([1])}, reference="b")
    with pytest.raises(ValueError, match=r"the same seeds, at least one, got \[1, 2\] runs"):
        arm_table({"a": made([1]), "b": made([1, 2])})
    with pytest.raises(ValueError, match=r"got \[0\] runs"):
        arm_table({"a": made([])})
    for reference in (None, "a"):
        with pytest.raises(ValueError, match="at least one arm is needed, got none"):
            arm_table({}, reference=reference)


# ---- runs ----

def test_compare_gives_a_row_an_arm(policy):
    table = compare({"otb": FAST, "grpo": {"estimator": "grpo", **FAST}}, TINY, seeds=[0, 1], target=1.0, steps=2, start=policy)
    assert table.index.tolist() == ["otb", "grpo"]
    assert {"median", "lo", "hi", "censored_share", "saved", "p_logrank", "grad_norm"} <= set(table.columns)
    assert (table["censored_share"] == 1).all() and np.isinf(table["median"]).all() and (table["grad_norm"] >= 0).all()
    with pytest.raises(ValueError, match=r"target must be in \(0, 1\], got 2"):
        compare({"otb": FAST}, TINY, seeds=[0], target=2, steps=1)
    with pytest.raises(TimeoutError, match="1 of 1 runs are not finished"):
        compare({"otb": FAST}, TINY, seeds=[0], target=1.0, steps=2, start=policy, seconds=-1)


@pytest.mark.parametrize(("change", "text"), [
    ({"reference": "b"}, r"reference must be one of \['a'\], got 'b'"), ({"arms": {}}, "at least one arm is needed, got none"),
    ({"arms": {}, "reference": "a"}, "at least one arm is needed"), ({"seeds": iter(())}, "at least one seed is needed, got none"),
    ({"steps": 0}, "steps must be an integer >= 1, got 0"), ({"steps": 1.5}, "steps must be an integer >= 1, got 1.5"),
    ({"n_boot": 0}, "n_boot must be an integer >= 1, got 0")])
def test_compare_checks_before_it_trains(monkeypatch, change, text):
    monkeypatch.setattr(training, "run_arms", lambda *args, **options: pytest.fail("trained before the check"))
    with pytest.raises(ValueError, match=text):
        compare(**({"arms": {"a": FAST}, "task": TINY, "seeds": [0], "target": 0.5, "steps": 1} | change))


# ---- the study ----

def test_collapse_is_measured_against_the_best_a_run_had():
    assert collapsed(course(0.5, 0.8, 0.4, 0.39), 0.5) and not collapsed(course(0.5, 0.8, 0.4, 0.4), 0.5)
    assert collapsed(course(0.1, 0.1), 0.5) and not collapsed(course(0.3), 0.5)
    assert late_gradient(course(*[0.5] * 8)) == 7.5 and late_gradient(course(0.5)) == 1.0
    with pytest.raises(ValueError, match="the run has no evaluation in its 1 steps"):
        collapsed(course(math.nan), 0.5)
    ours, group = np.array([[False, False], [True, False]]), np.array([[False, True], [True, True]])
    difference, lo, hi = stability(ours, group)
    assert difference == pytest.approx(0.5) and lo <= difference <= hi


def test_each_half_of_the_seeds_chooses_the_rate_of_the_other():
    a = made([10, 90, 10, 90])
    b = Arrivals(np.array([80.0, 20, 80, 99]), np.array([True, True, True, False]))
    found, rates = cross_fitted({1e-4: a, 2e-4: b})
    assert rates == [2e-4, 1e-4] and found.tokens.tolist() == [80, 90, 80, 90]
    found, rates = cross_fitted({2e-4: b, 1e-4: a})
    assert rates == [2e-4, 1e-4] and found.reached.all()
    single, rates = cross_fitted({1e-4: made([5]), 2e-4: made([3])})
    assert single.tokens.tolist() == [3] and rates == [2e-4, 2e-4]
    with pytest.raises(ValueError, match="rates are needed, got none"):
        cross_fitted({})


def test_arms_cover_the_controls_and_look_equally_often():
    assert REFERENCE in ARMS and {"OTB N=4", "RLOO N=4", "GRPO N=4", "mean N=4", "GRPO N=32"} <= ARMS.keys()
    per_look = {c.n * c.prompts_per_step * c.eval_every for c in arms_for(ChainSum(4), RATES[0]).values()}
    assert len(per_look) == 1, "every arm is evaluated after the same number of rollouts"
    assert arms_for(CalcTool(2, 2), 1e-4)["OTB N=4"].options == {"align": "token"}
    assert arms_for(ChainSum(4), 1e-4)["OTB N=4"].options == {} and arms_for(ChainSum(4), 0.1)["RLOO N=4"].lr == 0.1


def test_a_study_stores_every_run_and_reads_it_back(policy, tmp_path):
    rows = study(TINY, seeds=(0, 1), tokens=100, target=0.9, names=("OTB N=4", "mean N=32"), rates=(1e-3, 1e-2), start=policy,
                 folder=tmp_path)
    names = [row["name"] for row in rows]
    assert names == ["chainsum-2-3 | OTB N=4 | 0.001", "chainsum-2-3 | mean N=32 | 0.001", "chainsum-2-3 | OTB N=4 | 0.01",
                     "chainsum-2-3 | mean N=32 | 0.01", "chainsum-2-3 | OTB N=4 | best", "chainsum-2-3 | mean N=32 | best"]
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert all(row["unit"] == "tokens" and len(row["tokens"]) == 2 and row["budget"] == 100 for row in rows)
    for row in rows[:4]:
        assert len(row["course"]["grid"]) == len(row["course"]["accuracy"]) and len(row["collapsed"]) == 2
    again = stored_arrivals(rows[0])
    assert again.reached.tolist() == [t is not None for t in rows[0]["tokens"]]
    runs = run_arms({"a": arms_for(TINY, 1e-3)["OTB N=4"]}, TINY, seeds=(0, 1), steps=10**9, tokens=100, start=policy)["a"]
    for target in (0.01, 0.3, 0.5, 0.6, 0.9, 1.0):
        mine, direct = stored_arrivals(rows[0], target), arrivals(runs, target)
        assert mine.tokens.tolist() == direct.tokens.tolist() and mine.reached.tolist() == direct.reached.tolist()
    with pytest.raises(TimeoutError, match="chainsum-2-3: 1 of 1 runs are left"):
        study(TINY, seeds=(0,), tokens=50, target=0.9, names=("OTB N=4",), rates=(1e-3,), start=policy, seconds=-1)


def test_bfloat16_training_keeps_small_updates_and_resumes(policy, tmp_path):
    cfg = TrainConfig(**(FAST | {"lr": 1e-5}))

    def fresh():
        return HalfTrainer(copy.deepcopy(policy), TINY.tokenizer(), TINY, cfg)

    whole, part, later = fresh(), fresh(), fresh()
    assert next(whole.model.parameters()).dtype == torch.bfloat16
    before = [c.clone() for c in whole.optimizer.copies]
    history = whole.run(4)
    moved = [(c - b).abs().max() for c, b in zip(whole.optimizer.copies, before, strict=True)]
    assert 0 < max(moved) < 1e-4, "updates far below the spacing of bfloat16 numbers are kept"
    part.run(2, checkpoint=tmp_path)
    assert np.array_equal(later.run(4, checkpoint=tmp_path).column("grad_norm"), history.column("grad_norm"))
    for a, b, w in zip(later.optimizer.copies, whole.optimizer.copies, later.model.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(w, a.bfloat16())


def test_the_large_study_runs_on_a_small_model(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "LARGE", {name: arm | {"prompts_per_step": 2, "n": 2, "eval_every": 1, "eval_prompts": 4}
                                            for name, arm in training.LARGE.items()})
    size = {"hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp": 16}
    options = {"seeds": (0, 1), "steps": 2, "rate": 1e-4, "target": 0.9, "folder": tmp_path, "device": "cpu", "size": size}
    rows = large_study(CalcTool(1, 1), sft_steps=2, **options)
    assert [row["name"] for row in rows] == [f"large | calctool-1-1 | {name} | 0.0001" for name in training.LARGE]
    assert all(len(row["courses"]) == 2 and len(row["courses"][0]["tokens"]) == 2 for row in rows)
    assert (tmp_path / "calctool-1-1.safetensors").is_file() and len(list(tmp_path.glob("*.json"))) == 6
    assert large_study(CalcTool(1, 1), sft_steps=2, seconds=-1, **options) == rows
    with pytest.raises(TimeoutError, match="calctool-1-1: 3 of 9 runs are left"):
        large_study(CalcTool(1, 1), seconds=-1, **(options | {"seeds": (0, 1, 2)}))


def test_the_command_writes_rows_and_says_what_is_left(policy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "_TASKS", {"cpu": {"chainsum": TINY, "calctool": TINY}})
    monkeypatch.setattr(training, "warm_start", lambda task: (copy.deepcopy(policy), task.tokenizer()))
    monkeypatch.setattr(training, "RATES", (1e-3,))
    given = ["--study", "cpu", "--out", str(tmp_path / "r.json"), "--folder", str(tmp_path / "f"), "--tasks", "chainsum",
             "--arms", "OTB N=4", "--seeds", "2", "--tokens", "60", "--commit", "abc"]
    with pytest.raises(SystemExit, match="chainsum-2-3: 10 of 10 runs are left; call again, same folder"):
        main([*given, "--minutes", "-1"])
    assert "core-minutes" in capsys.readouterr().out and not (tmp_path / "r.json").exists()
    monkeypatch.setattr(training, "study", lambda task, **kw: study(task, **(kw | {"rates": (1e-3,)})))
    main(given)
    stored = json.loads((tmp_path / "r.json").read_text())
    assert set(stored["rows"]) == {"chainsum-2-3 | OTB N=4 | 0.001", "chainsum-2-3 | OTB N=4 | best"}
    assert next(iter(stored["runs"].values()))["command"].startswith("python -m collai.otb.training --study cpu")
    with pytest.raises(SystemExit):
        main(["--study", "tpu", "--out", "x", "--folder", "y"])


def test_the_estimate_grows_with_the_work(policy, monkeypatch):
    monkeypatch.setattr(training, "warm_start", lambda task: (copy.deepcopy(policy), task.tokenizer()))
    monkeypatch.setattr(training, "ARMS", {"one": {"estimator": "rloo", "prompts_per_step": 2, "eval_every": 2, "eval_prompts": 4}})
    assert 0 < estimate([TINY], 1, 100, ["one"]) < 60
