"""The token baseline inside verl: our functions with verl's keywords, and, where an environment has verl, its own trainer code."""
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.core.claims import load_results
from collai.rl import verl_ext
from collai.rl.adv import bounded_energy, otb_advantage
from collai.rl.stats import token_stats
from collai.rl.verl_ext import _ESTIMATORS, _REACH, _random_batch, install, measure

ROOT = Path(__file__).resolve().parents[3]
PYTHON = os.environ.get("COLLAI_VERL_PYTHON") or (sys.executable if importlib.util.find_spec("verl") else None)
RECIPE = ("verl is not installed: name an interpreter that has it in COLLAI_VERL_PYTHON; an environment of its own with "
          f"this repository's packages visible, then {verl_ext._INSTALL}")


def keywords(batch, **more):
    """What verl's `compute_advantage` passes for a random batch."""
    stats = token_stats(batch["logits"], batch["ids"])
    return {"token_level_rewards": batch["token_level_rewards"], "response_mask": batch["response_mask"], "index": batch["uid"],
            "old_log_probs": stats.logp, "sum_pi_squared": stats.sum_sq, "rollout_is_weights": batch.get("rollout_is_weights")} | more


@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(_ESTIMATORS)), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_estimators_are_otb_with_the_energies_of_the_policy(seed, name, zero_tail, leave_one_out):
    align = "token" if name.startswith("tir") else "position"
    batch = _random_batch(np.random.default_rng(seed), holes=align == "token", scale=(0.1, 2.0))
    copies = {k: x.clone() for k, x in batch.items() if isinstance(x, torch.Tensor)}
    config = {"otb": {"leave_one_out": True}} if leave_one_out else None
    advantages, returns = _ESTIMATORS[name](**keywords(batch, handle_zero_tail=zero_tail, config=config, gamma=1.0, norm_adv_by_std=False))
    energy = bounded_energy(keywords(batch)["old_log_probs"], keywords(batch)["sum_pi_squared"], _REACH)
    assert (energy - token_stats(batch["logits"], batch["ids"]).energy).abs().max() < 1e-6
    ours = otb_advantage(batch["token_level_rewards"], batch["response_mask"], batch["uid"], energy, align=align, zero_tail=zero_tail,
                         is_weights=batch.get("rollout_is_weights"), leave_one_out=leave_one_out)
    assert torch.equal(advantages, ours.advantages) and torch.equal(returns, ours.returns)
    assert all(torch.equal(batch[k], x) for k, x in copies.items())


@given(st.floats(0, 1), st.floats(0, 1))
def test_energies_equal_the_published_formula_wherever_it_can_be_true(p, q):
    p, q = torch.tensor([[p]]), torch.tensor([[q]])
    logp = p.clamp(min=1e-30).log()
    plain, e = 1 - 2 * logp.exp() + q, bounded_energy(logp, q, _REACH)
    assert e >= 0 and (abs(e - plain) < 2e-5 or plain < 0)


def test_a_certain_token_keeps_its_small_energy():
    logp = torch.tensor([[-1e-5, -1e-3, 0.0]])
    e = bounded_energy(logp, (2 * logp).exp(), _REACH)
    assert torch.allclose(e, torch.expm1(logp) ** 2, rtol=1e-3) and bounded_energy(logp, (2 * logp).exp() - 0.1, _REACH).min() >= 0


def test_options_of_the_configuration_win_and_reach_the_estimator():
    batch = _random_batch(np.random.default_rng(3), holes=True, scale=(0.1, 2.0))
    energy = bounded_energy(keywords(batch)["old_log_probs"], keywords(batch)["sum_pi_squared"], _REACH)
    columns = batch["response_mask"].shape[1]
    prior = np.linspace(0, 1, columns + 5).tolist()
    config = {"otb": {"align": "position", "zero_tail": False, "eps": 1e-3, "prior": prior, "prior_strength": 2.0, "weighting": "token"}}
    found, _ = _ESTIMATORS["tir_optimal_token_baseline"](**keywords(batch, config=config))
    ours = otb_advantage(batch["token_level_rewards"], batch["response_mask"], batch["uid"], energy, is_weights=batch.get("rollout_is_weights"),
                         zero_tail=False, eps=1e-3, prior=torch.tensor(prior[:columns]), prior_strength=2.0, weighting="token")
    assert torch.equal(found, ours.advantages)
    with pytest.raises(ValueError, match="unknown otb option 'zero', use one of 'weighting', 'align', 'leave_one_out'"):
        _ESTIMATORS["optimal_token_baseline"](**keywords(batch, config={"otb": {"zero": 1}}))
    with pytest.raises(ValueError, match=r"algorithm.otb must be a mapping of options, got \['loo'\]"):
        _ESTIMATORS["optimal_token_baseline"](**keywords(batch, config={"otb": ["loo"]}))


def test_bfloat16_rewards_are_taken():
    batch = _random_batch(np.random.default_rng(5), holes=False, scale=(0.1, 2.0))
    rewards = batch["token_level_rewards"].bfloat16()
    found, _ = _ESTIMATORS["optimal_token_baseline"](**keywords(batch, token_level_rewards=rewards))
    wanted, _ = _ESTIMATORS["optimal_token_baseline"](**keywords(batch, token_level_rewards=rewards.float()))
    assert torch.equal(found, wanted) and found.dtype == torch.float32


def test_install_without_verl_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "verl", None)
    with pytest.raises(ImportError, match=r"needs verl .*pip install --no-deps verl==0\.9\.1; pip install \"tensordict==0\.10"):
        install()
    with pytest.raises(ImportError, match="needs verl"):
        measure("cpu")
    with pytest.raises(ValueError, match="device must be 'cpu', got 'cuda'"):
        measure("cuda")


def test_install_writes_both_names_and_without_replace_asks_verl(monkeypatch):
    """With verl's registration rule as it stands in 0.9.1; the real one is called below where verl is at hand."""
    registry = dict.fromkeys(_ESTIMATORS, print) | {"grpo": print}

    def register_adv_est(name):
        def register(function):
            if name in registry and registry[name] != function:
                raise ValueError(f"Adv estimator {name} has already been registered")
            registry[name] = function
        return register

    for name in ("verl", "verl.trainer", "verl.trainer.ppo"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    core_algos = types.SimpleNamespace(ADV_ESTIMATOR_REGISTRY=registry, register_adv_est=register_adv_est)
    monkeypatch.setattr(sys.modules["verl.trainer.ppo"], "core_algos", core_algos, raising=False)
    with pytest.raises(ValueError, match="Adv estimator optimal_token_baseline has already been registered"):
        install(replace=False)
    install()
    assert registry == _ESTIMATORS | {"grpo": print}
    install(replace=False)


def test_the_stored_comparison_is_complete():
    rows = load_results(ROOT / "nbs/rl/results/verl.json")["rows"]
    for name in _ESTIMATORS:
        row = rows[name]
        assert len(row["differences"]) == row["cases"] >= 200 and row["measured"] == max(row["differences"]) <= 2e-5
        assert row["packages"]["verl"] == "0.9.1" and row["date"] and "collai.rl.verl_ext" in row["command"]


INSIDE = """
import json, sys
import numpy as np
import torch
from collai.rl import verl_ext as ours
from omegaconf import OmegaConf
import verl
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos
said = {"external": core_algos.get_adv_estimator_fn("optimal_token_baseline").__module__}
said["measured"] = {row["name"]: row["measured"] for row in ours.measure("cpu", cases=40, seed=7) if "peaked" not in row["name"]}
name, public = "tir_optimal_token_baseline", core_algos.compute_multi_turn_optimal_token_baseline_advantage
core_algos.ADV_ESTIMATOR_REGISTRY[name] = public
try:
    ours.install(replace=False)
except ValueError as error:
    said["refused"] = str(error)
ours.install()
ours.install(replace=False)
batch = ours._random_batch(np.random.default_rng(0), True, (0.1, 2.0))
found = ours._through_verl(batch, name, {"leave_one_out": True, "finished": "keep", "prior": "batch", "prior_strength": 1.0})["advantages"]
stats = ours.token_stats(batch["logits"], batch["ids"])
wanted = ours.otb_advantage(batch["token_level_rewards"], batch["response_mask"], batch["uid"], stats.energy, align="token", leave_one_out=True,
                            finished="keep", prior="batch", prior_strength=1.0, is_weights=batch.get("rollout_is_weights")).advantages
said["options"] = float((found - wanted).abs().max())
said["config"] = [ours._options(c, 2) for c in (AlgoConfig(), OmegaConf.create({"gamma": 1.0}))]
struct = OmegaConf.create({"gamma": 1.0})
OmegaConf.set_struct(struct, True)
said["struct"] = ours._options(struct, 2)
core_algos.register_adv_est("my_baseline")(core_algos.get_adv_estimator_fn(name))
try:
    ours._through_verl(batch, "my_baseline")
except TypeError as error:
    said["new_name"] = str(error)
print("SAID", json.dumps(said))
"""


@pytest.mark.skipif(PYTHON is None, reason=RECIPE)
def test_verl_itself_calls_our_estimator_and_agrees():
    env = os.environ | {"PYTHONPATH": str(ROOT), "VERL_USE_EXTERNAL_MODULES": "collai.rl.verl_ext"}
    done = subprocess.run([PYTHON, "-c", INSIDE], env=env, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.split("SAID ")[1])
    assert said["external"] == "collai.rl.verl_ext"
    assert max(said["measured"].values()) <= 2e-5 and said["options"] <= 2e-5
    assert "already been registered" in said["refused"] and "old_log_probs" in said["new_name"]
    assert said["config"] == [{}, {}] and said["struct"] == {}
