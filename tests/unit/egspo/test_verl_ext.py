"""The gated loss inside verl: its weights and the way to the entropies, and, where an environment has verl, its own actor loss."""
import functools
import importlib
import importlib.util
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collai.core.claims import load_results
from collai.egspo import verl_ext
from collai.egspo.verl_ext import (
    _FOUND,
    _policy_loss,
    _random_case,
    _weigh,
    _with_entropies,
    install,
    measure,
    policy_loss_config,
)
from collai.rl import verl_ext as rl_verl_ext
from collai.rl.losses import ppo_clip_loss

ROOT = Path(__file__).resolve().parents[3]
PYTHON = os.environ.get("COLLAI_VERL_PYTHON") or (sys.executable if importlib.util.find_spec("verl") else None)
RECIPE = ("verl is not installed: name an interpreter that has it in COLLAI_VERL_PYTHON; an environment of its own with "
          f"this repository's packages visible, then {verl_ext._INSTALL}")


def vanilla(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights):
    """verl's default loss in its default aggregation, (egspo.5.1) written out."""
    r = (log_prob - old_log_prob).exp()
    term = torch.maximum(-r * advantages, -r.clamp(1 - config.clip[0], 1 + config.clip[1]) * advantages)
    term = torch.where(advantages < 0, torch.minimum(-3 * advantages, term), term)
    return (term * (1 if rollout_is_weights is None else rollout_is_weights) * response_mask).sum() / response_mask.sum(), {"actor/ppo_kl": 0.0}


@pytest.fixture
def verl(monkeypatch):
    """The parts of verl 0.9.1 that are touched, as they stand there; the real ones are called below where verl is at hand."""
    for name in ("verl", "verl.trainer", "verl.trainer.ppo", "verl.workers", "verl.workers.utils", "verl.workers.engine_workers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    registry = {"vanilla": vanilla}

    def register_policy_loss(name):
        return lambda function: registry.__setitem__(name, function) or function

    def ppo_loss(config, model_output, data, dp_group=None):
        return registry[config.policy_loss["loss_mode"]](**data["arguments"], config=config)

    class PolicyLossConfig(dict):
        """Fixed fields, as verl's dataclass."""

        def __init__(self, loss_mode, clip_cov_lb=1.0):
            super().__init__(loss_mode=loss_mode, clip_cov_lb=clip_cov_lb)

        def get(self, name, default=None):
            return getattr(self, name, super().get(name, default))

    core_algos = types.SimpleNamespace(register_policy_loss=register_policy_loss, get_policy_loss_fn=registry.__getitem__)
    losses = types.SimpleNamespace(ppo_loss=ppo_loss)
    monkeypatch.setattr(sys.modules["verl.trainer.ppo"], "core_algos", core_algos, raising=False)
    monkeypatch.setattr(sys.modules["verl.workers.utils"], "losses", losses, raising=False)
    monkeypatch.setitem(sys.modules, "verl.workers.config", types.SimpleNamespace(PolicyLossConfig=PolicyLossConfig))
    padding = types.SimpleNamespace(no_padding_2_padding=lambda x, data: x.reshape(data["shape"]))
    monkeypatch.setitem(sys.modules, "verl.workers.utils.padding", padding)
    return types.SimpleNamespace(registry=registry, losses=losses, ppo_loss=ppo_loss)


def by_loop(case):
    """Weights one token at a time, and how many are high; the quantile lies between two sorted entropies."""
    valid = sorted(h for row, keep in zip(case["entropy"].tolist(), case["mask"].tolist(), strict=True) for h, m in zip(row, keep, strict=True) if m)
    place = case["quantile"] * (len(valid) - 1)
    low = int(place)
    tau = valid[low] + (place - low) * (valid[min(low + 1, len(valid) - 1)] - valid[low]) if valid else 0.0
    out, high = torch.zeros(case["mask"].shape), 0
    for i, j in case["mask"].nonzero().tolist():
        p, above = float(case["logp"][i, j].exp()), float(case["entropy"][i, j]) >= tau
        out[i, j] = 1.0 if above else p * (1 - p) if case["phi"] == "chord" else case["phi"]
        high += above
    return out, high


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=80, deadline=None)
def test_weights_are_those_of_a_loop_whatever_stands_on_masked_tokens(seed):
    case = _random_case(np.random.default_rng(seed))
    dirty = {k: case[k].masked_fill(~case["mask"], float("nan")) for k in ("entropy", "logp")}
    copies = {k: x.clone() for k, x in dirty.items()}
    weight, said = _weigh(dirty["entropy"], dirty["logp"], case["mask"], case["phi"], case["quantile"])
    wanted, high = by_loop(case)
    assert (weight - wanted).abs().max() < 1e-6 and weight.dtype == torch.float32
    count = max(int(case["mask"].sum()), 1)
    assert said["actor/egspo_mean_weight"] == pytest.approx(float(wanted.sum()) / count, abs=1e-6)
    assert said["actor/egspo_high_share"] == pytest.approx(high / count, abs=1e-6)
    assert all(torch.equal(dirty[k].nan_to_num(9), x.nan_to_num(9)) for k, x in copies.items())


def test_an_entropy_far_below_zero_is_refused_and_garbage_on_masked_tokens_is_not():
    entropy = torch.tensor([[-5.0, 1.0]])
    with pytest.raises(ValueError, match=r"entropy must be non-negative \(got min -5\)"):
        _weigh(entropy, torch.zeros(1, 2), torch.ones(1, 2), 0.1, 0.4)
    assert _weigh(entropy, torch.zeros(1, 2), torch.tensor([[0, 1]]), 0.1, 0.4)[0].tolist() == [[0.0, 1.0]]


def test_rounding_below_zero_counts_as_zero():
    weight, _ = _weigh(torch.tensor([[-4e-6, 0.0, 1.0]]), torch.zeros(1, 3), torch.ones(1, 3), 0.1, 0.4)
    assert weight.tolist() == [[1.0, 1.0, 1.0]]


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_loss_is_verls_clipped_loss_times_the_weights(verl, seed):
    rng = np.random.default_rng(seed)
    case = _random_case(rng) | {"agg": "token-mean"}
    case["mask"][0, 0] = True
    case["old"] = case["old"] - torch.from_numpy(2 * rng.random(case["old"].shape)).float()  # ratios beyond 3 too
    config = types.SimpleNamespace(policy_loss=policy_loss_config(phi=case["phi"], quantile=case["quantile"]), clip=case["clip"])
    arguments = {"old_log_prob": case["old"], "log_prob": case["logp"], "advantages": case["adv"], "response_mask": case["mask"],
                 "loss_agg_mode": "token-mean", "rollout_is_weights": case.get("is_weights")}
    batch = Batch({"arguments": arguments}, case["entropy"])
    loss, metrics = verl.losses.ppo_loss(config, {}, batch)
    weight, _ = _weigh(case["entropy"], case["logp"], case["mask"], case["phi"], case["quantile"])
    wanted, _ = ppo_clip_loss(case["logp"], case["old"], case["adv"], case["mask"], clip_low=case["clip"][0], clip_high=case["clip"][1],
                              dual_clip=3.0, weight=weight, is_weights=case.get("is_weights"))
    assert abs(loss - wanted) < 1e-5 * max(1, abs(wanted)) and metrics["actor/egspo_fixed_gate"] == 1.0 and "actor/ppo_kl" in metrics
    assert _FOUND.get() is None


class Batch(dict):
    """A batch with entropies, by the calls of a TensorDict."""

    def __init__(self, items, entropy):
        super().__init__(items | {"entropy": entropy})

    def select(self, name):
        return types.SimpleNamespace(to_padded_tensor=lambda: {name: self[name]})


def test_install_registers_and_wraps_once(verl):
    install()
    install()
    assert verl.registry["egspo"] is _policy_loss and verl.losses.ppo_loss.__wrapped__ is verl.ppo_loss
    assert sys.modules["verl.workers.engine_workers"].ppo_loss is verl.losses.ppo_loss


def test_somebody_elses_wrapper_does_not_keep_ours_out(verl):
    verl.losses.ppo_loss = functools.wraps(verl.ppo_loss)(lambda *args: verl.ppo_loss(*args))
    theirs = verl.losses.ppo_loss
    install()
    assert verl.losses.ppo_loss is not theirs and verl.losses.ppo_loss.__wrapped__ is theirs


def test_other_losses_pass_through_untouched_and_missing_entropies_are_named(verl):
    seen = []
    gated = _with_entropies(lambda config, *rest: seen.append((rest, _FOUND.get())) or "answer")
    config = types.SimpleNamespace(policy_loss={"loss_mode": "vanilla"})
    assert gated(config, {}, {"entropy": 1}, "group") == "answer" and seen == [(({}, {"entropy": 1}, "group"), None)]
    install()
    config = types.SimpleNamespace(policy_loss=policy_loss_config())
    x = torch.zeros(1, 2)
    arguments = {"old_log_prob": x, "log_prob": x, "advantages": x, "response_mask": x + 1, "loss_agg_mode": "token-mean",
                 "rollout_is_weights": None}
    with pytest.raises(ValueError, match=r"finds no entropies.*use_v1=true\); otherwise set actor_rollout_ref.actor.calculate_entropy=true"):
        verl.losses.ppo_loss(config, {}, {"arguments": arguments})


def test_present_entropies_serve_where_the_batch_has_none_and_the_metric_says_so(verl):
    policy_loss, x = policy_loss_config(phi=0.5, quantile=0.5), torch.zeros(1, 2)
    arguments = {"old_log_prob": x, "log_prob": x, "advantages": x - 1, "response_mask": x + 1, "loss_agg_mode": "token-mean",
                 "rollout_is_weights": None}
    config, now = types.SimpleNamespace(policy_loss=policy_loss, clip=(0.2, 0.2)), torch.tensor([0.3, 0.7], requires_grad=True)
    loss, metrics = verl.losses.ppo_loss(config, {"entropy": now}, {"arguments": arguments, "shape": (1, 2)})
    assert loss == 0.75 and metrics["actor/egspo_fixed_gate"] == 0.0 and metrics["actor/egspo_mean_weight"] == 0.75


@pytest.mark.parametrize(("modules", "registered"), [("collai.rl.verl_ext,collai.egspo.verl_ext", True), ("collai.egspo", False), ("", False)])
def test_named_in_verls_environment_variable_the_module_installs_itself(verl, monkeypatch, modules, registered):
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", modules)
    monkeypatch.delitem(sys.modules, "collai.egspo.verl_ext")
    importlib.import_module("collai.egspo.verl_ext")
    assert ("egspo" in verl.registry) == registered


def one_of_two(rank, port, queue):
    """One rank of two, with a micro-batch of its own size."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    entropy, mask = rank_case(rank)
    weight, _ = _weigh(entropy, torch.zeros_like(entropy), mask, 0.25, 0.6, torch.distributed.group.WORLD)
    queue.put((rank, weight.tolist()))
    torch.distributed.destroy_process_group()


def rank_case(rank):
    g = torch.Generator().manual_seed(rank)
    entropy = torch.rand(2 + rank, 5 + 4 * rank, generator=g) * (1 + rank)
    return entropy, torch.rand(entropy.shape, generator=g) < 0.8


def test_all_ranks_share_one_quantile():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    work = [context.Process(target=one_of_two, args=(rank, port, queue)) for rank in range(2)]
    for process in work:
        process.start()
    try:
        found = dict(queue.get(timeout=60) for _ in range(2))
    finally:
        for process in work:
            process.join(timeout=10)
            process.kill()
    cases = [rank_case(rank) for rank in range(2)]
    tau = torch.quantile(torch.cat([h[m] for h, m in cases]), 0.6)
    for rank, (h, m) in enumerate(cases):
        assert found[rank] == torch.where(m, torch.where(h >= tau, 1.0, 0.25), 0.0).tolist() and torch.quantile(h[m], 0.6) != tau


def test_a_loss_that_fails_leaves_no_entropies_behind():
    def fails(*args):
        raise RuntimeError(str(_FOUND.get() is not None))

    config = types.SimpleNamespace(policy_loss={"loss_mode": "egspo"})
    with pytest.raises(RuntimeError, match="True"):
        _with_entropies(fails)(config, {}, Batch({}, torch.zeros(1, 1)))
    assert _FOUND.get() is None


def test_options_are_kept_and_bad_ones_refused(verl):
    made = policy_loss_config(phi="chord", quantile=0.9, clip_cov_lb=2.0)
    assert (made.get("phi"), made.get("quantile"), made["clip_cov_lb"], made["loss_mode"]) == ("chord", 0.9, 2.0, "egspo")
    assert policy_loss_config().phi == 0.1 and policy_loss_config().quantile == 0.8
    for options, message in (({"phi": 1.5}, r"phi must be a number in \[0, 1\] or 'chord', got 1.5"), ({"phi": float("nan")}, "got nan"),
                             ({"phi": "chord-state"}, "got 'chord-state'"), ({"quantile": -0.1}, r"quantile must be in \[0, 1\], got -0.1"),
                             ({"loss_mode": "gspo"}, "policy_loss_config is for loss_mode 'egspo', got 'gspo'")):
        with pytest.raises(ValueError, match=message):
            policy_loss_config(**options)
    with pytest.raises(TypeError, match="fi"):
        policy_loss_config(fi=0.1)


def test_without_verl_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "verl", None)
    for call in (install, policy_loss_config, lambda: measure("cpu")):
        with pytest.raises(ImportError, match=r"collai.egspo.verl_ext needs verl .*pip install --no-deps verl==0\.9\.1; pip install \"tensordict"):
            call()
    with pytest.raises(ValueError, match="device must be 'cpu', got 'cuda'"):
        measure("cuda")
    assert verl_ext._INSTALL == rl_verl_ext._INSTALL


def test_the_stored_comparison_is_complete():
    rows = load_results(ROOT / "nbs/egspo/results/verl.json")["rows"]
    for name in ("verl_fixed", "verl_present"):
        row = rows[name]
        assert len(row["loss"]) == len(row["gradient"]) == row["cases"] >= 300
        assert row["measured"] == max(row["loss"] + row["gradient"]) <= 1e-5
        assert row["packages"]["verl"] == "0.9.1" and row["date"] and "collai.egspo.verl_ext" in row["command"]


INSIDE = """
import json, os, sys
import numpy as np
import torch
import verl
from verl.trainer.ppo import core_algos
external = os.environ.get("VERL_USE_EXTERNAL_MODULES")
said = {"external": core_algos.POLICY_LOSS_REGISTRY["egspo"].__module__ if external else "egspo" in core_algos.POLICY_LOSS_REGISTRY}
from hydra import compose, initialize_config_dir
from verl.utils.config import omega_conf_to_dataclass
from verl.workers import engine_workers
from verl.workers.utils import losses
folder = os.path.join(os.path.dirname(verl.__file__), "trainer/config")
actor = "actor_rollout_ref.actor"
def config(*more):
    with initialize_config_dir(config_dir=folder, version_base=None):
        made = compose("ppo_trainer", overrides=[f"{actor}.ppo_micro_batch_size_per_gpu=4", *more])
    return omega_conf_to_dataclass(made.actor_rollout_ref.actor)
target = f"{actor}.policy_loss._target_=collai.egspo.verl_ext.policy_loss_config"
try:
    config(target)
except Exception as error:
    said["forgotten"] = str(error)
made = config(target, f"{actor}.policy_loss.loss_mode=egspo", f"+{actor}.policy_loss.phi=0.25", f"+{actor}.policy_loss.quantile=0.6")
said["options"] = [type(made.policy_loss).__name__, made.policy_loss.get("phi"), made.policy_loss.get("quantile"), made.policy_loss.loss_mode]
from collai.egspo import verl_ext as ours
from collai.rl.losses import ppo_clip_loss
said["installed"] = [core_algos.get_policy_loss_fn("egspo") is ours._policy_loss, engine_workers.ppo_loss is losses.ppo_loss,
                     losses.ppo_loss.__wrapped__.__module__]
said["measured"] = {row["name"]: row["measured"] for row in ours.measure("cpu", cases=60, seed=7)}
rng = np.random.default_rng(3)
dual, plain, both, found = 0.0, 0.0, 0, 0.0
for i in range(40):
    case = ours._random_case(rng) | {"agg": "token-mean", "fixed": bool(i % 2)}
    case["old"] = case["old"] - torch.from_numpy(2 * rng.random(case["old"].shape)).float()  # ratios beyond 3 too
    loss, gradient, metrics = ours._through_verl(case)
    weight, _ = ours._weigh(case["entropy"], case["logp"], case["mask"], case["phi"], case["quantile"])
    wanted, own = ppo_clip_loss(case["logp"], case["old"], case["adv"], case["mask"], clip_low=case["clip"][0], clip_high=case["clip"][1],
                                dual_clip=3.0, weight=weight, is_weights=case.get("is_weights"))
    dual, both = max(dual, float((loss - wanted).abs())), both + (own["dual_clip_share"] > 0)
    assert float(metrics["actor/egspo_fixed_gate"].aggregate()) == float(i % 2)
    full = ours._through_verl(case | {"phi": 1.0})[:2]
    reference = ours.policy_loss_config
    ours.policy_loss_config = lambda **_: made.policy_loss.__class__(loss_mode="vanilla")
    found = max(found, *(float((a - b).abs().max()) for a, b in zip(full, ours._through_verl(case | {"fixed": True})[:2])))
    ours.policy_loss_config = reference
said |= {"dual": dual, "dual_clipped": both, "phi_one": found}
try:
    case = ours._random_case(rng) | {"fixed": False}
    scored, ours._scored = ours._scored, lambda case, x: None if x is case["entropy"] else scored(case, x)
    ours._through_verl(case)
except ValueError as error:
    said["missing"] = str(error)
ours._scored = scored

def rank(i, port, queue):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=i, world_size=2)
    from verl.utils import tensordict_utils as tu
    make = tu.get_tensordict
    for case, (halves, tokens) in enumerate(pairs):
        tu.get_tensordict = lambda t, n: make(t, n | {"dp_size": 2, "batch_num_tokens": tokens})
        loss, gradient, _ = ours._through_verl(halves[i], torch.distributed.group.WORLD)
        queue.put((case, i, float(loss), gradient.tolist()))
    torch.distributed.destroy_process_group()

pairs, whole = [], []
for i in range(8):
    case = ours._random_case(np.random.default_rng(100 + i)) | {"agg": "token-mean", "fixed": bool(i % 2)}
    other = ours._random_case(np.random.default_rng(200 + i))
    t = min(case["mask"].shape[1], other["mask"].shape[1])
    tensors = [k for k in ("old", "logp", "adv", "entropy", "mask")]
    halves = [{k: v for k, v in case.items() if k != "is_weights"} | {k: part[k][:, :t].contiguous() for k in tensors}
              | {"lengths": [t] * len(part["lengths"]), "prompts": part["prompts"]} for part in (case, other)]
    joined = halves[0] | {k: torch.cat([h[k] for h in halves]) for k in tensors}
    pairs.append((halves, max(int(joined["mask"].sum()), 1)))
    whole.append(ours._direct(joined))
import socket
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
context = torch.multiprocessing.get_context("fork")
queue = context.Queue()
work = [context.Process(target=rank, args=(i, port, queue)) for i in range(2)]
[p.start() for p in work]
answers = {(c, i): (loss, torch.tensor(g)) for c, i, loss, g in (queue.get(timeout=120) for _ in range(16))}
[p.join(timeout=20) for p in work]
said["ranks"] = max(max(abs((answers[c, 0][0] + answers[c, 1][0]) / 2 - float(loss)),
                        float((torch.cat([answers[c, 0][1], answers[c, 1][1]]) / 2 - g).abs().max())) for c, (loss, g) in enumerate(whole))
print("SAID", json.dumps(said))
"""


@pytest.mark.skipif(PYTHON is None, reason=RECIPE)
@pytest.mark.parametrize("external", [True, False])
def test_verls_own_actor_loss_calls_ours_and_agrees(external):
    env = {k: v for k, v in os.environ.items() if k != "VERL_USE_EXTERNAL_MODULES"} | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if external:
        env["VERL_USE_EXTERNAL_MODULES"] = "collai.rl.verl_ext,collai.egspo.verl_ext"
    done = subprocess.run([PYTHON, "-c", INSIDE], env=env, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.split("SAID ")[1])
    assert said["external"] == ("collai.egspo.verl_ext" if external else False)
    assert "policy_loss_config is for loss_mode 'egspo', got 'vanilla'" in said["forgotten"]
    assert said["options"] == ["PolicyLossConfig", 0.25, 0.6, "egspo"] and said["installed"] == [True, True, "verl.workers.utils.losses"]
    assert max(said["measured"].values()) <= 1e-5 and said["dual"] <= 1e-5 and said["dual_clipped"] > 5 and said["phi_one"] == 0
    assert "finds no entropies" in said["missing"] and said["ranks"] <= 1e-5
