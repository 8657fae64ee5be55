"""Record what verl 0.9.1 answers, as test vectors: both of its optimal token baselines on random batches.

verl pins an old transformers, so it never enters this project's environment. It runs here only, in one of its own:

    python3.11 -m venv build/peer
    build/peer/bin/pip install torch==2.13.0 "tensordict==0.10.*" ray omegaconf hydra-core codetiming torchdata
    build/peer/bin/pip install --no-deps verl==0.9.1
    build/peer/bin/python tests/unit/rl/vectors/make_verl.py

(and what its import then still asks for). The file `verl_otb.npz` beside this script is written anew. Inputs are stored,
not seeds, so nothing depends on a generator. Rows of all cases stand below each other in one (rows, T) table, shorter
cases padded with mask 0; `case` names the case of each row, `uid` its prompt. Inputs: `rewards`, `mask`, `old_logp`,
`sum_sq` (float32, as verl gets them), `energy` (computed in float64 without the sampled token), `rho` (1 in cases
without rollout weights). Of each case: `interleaved`, `weighted`, `zero_tail`. verl's advantages: `position`, `token`. Of the two
functions: `default_code` and `default_text`, the default of `handle_zero_tail` in the signature and in the docstring.
"""
import inspect
import re
from pathlib import Path

import numpy as np
import torch
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

FILE = Path(__file__).with_name("verl_otb.npz")
CASES, COLUMNS, VOCAB = 208, 14, 6
NAMES = {"position": "optimal_token_baseline", "token": "tir_optimal_token_baseline"}


def coarse(x, steps=64):
    """Round to a grid that float32 holds exactly and zip shrinks."""
    return np.round(x * steps) / steps


def masks(rng, rows, interleaved):
    """Prefixes of random length, some of them empty or full; interleaved: with holes, as tool outputs leave them."""
    length = rng.integers(0, COLUMNS + 1, rows) * (rng.random(rows) > 0.1)
    length[rng.random(rows) < 0.15] = COLUMNS
    mask = np.arange(COLUMNS) < length[:, None]
    return mask & (rng.random(mask.shape) < 0.6) if interleaved else mask


def statistics(rng, shape):
    """Log-probability of a sampled token, Σπ² and the energy, from random logits, all computed in float64."""
    z = rng.normal(size=(*shape, VOCAB)) * rng.choice([0.5, 2.0, 4.0], (*shape[:1], 1, 1))
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    ids = (p.cumsum(-1) > rng.random((*shape, 1))).argmax(-1)[..., None]
    others = p.copy()
    np.put_along_axis(others, ids, 0.0, -1)
    energy = others.sum(-1) ** 2 + (others**2).sum(-1)
    return np.log(np.take_along_axis(p, ids, -1)[..., 0]), (p**2).sum(-1), energy


def make(rng, case):
    """Inputs of one case and what verl answers."""
    rows, interleaved, weighted, zero_tail = rng.integers(1, 9), case % 2 == 1, case % 4 >= 2, case % 8 >= 4
    mask = masks(rng, rows, interleaved)
    logp, sum_sq, energy = statistics(rng, mask.shape)
    rewards = coarse(rng.normal(size=mask.shape)) * (rng.random(mask.shape) < 0.2)  # some tokens
    if case % 3:
        last = (np.cumsum(mask, 1) == mask.sum(1, keepdims=True)).argmax(1)  # the last valid one only
        rewards = np.eye(COLUMNS)[last] * rng.integers(0, 2, (rows, 1))
    rho = coarse(np.minimum(np.exp(rng.normal(size=mask.shape) / 2), 2)) if weighted else np.ones(mask.shape)
    x = {"rewards": rewards * mask, "old_logp": logp, "sum_sq": sum_sq, "energy": energy, "rho": rho}
    x = {name: np.where(mask, v, 0).astype(np.float32) for name, v in x.items()} | {"mask": mask}
    x["uid"] = rng.integers(0, max(1, rows // 2), rows)
    t = {name: torch.as_tensor(v) for name, v in x.items()}
    for name, peer in NAMES.items():
        x[name] = ADV_ESTIMATOR_REGISTRY[peer](
            token_level_rewards=t["rewards"], response_mask=t["mask"].float(), index=x["uid"], old_log_probs=t["old_logp"],
            sum_pi_squared=t["sum_sq"], rollout_is_weights=t["rho"] if weighted else None,
            handle_zero_tail=zero_tail)[0].numpy()
    return x | {"case": np.full(rows, case)}, (interleaved, weighted, zero_tail)


def defaults():
    """Default of the tail rule as code and as documentation have it, one value a variant."""
    functions = [ADV_ESTIMATOR_REGISTRY[peer] for peer in NAMES.values()]
    code = [inspect.signature(f).parameters["handle_zero_tail"].default for f in functions]
    text = [re.search(r"handle_zero_tail:.*?Default: (True|False)", f.__doc__, re.S).group(1) == "True" for f in functions]
    return {"default_code": np.array(code), "default_text": np.array(text)}


def main():
    """Write the file."""
    rng = np.random.default_rng(20_260)
    made = [make(rng, case) for case in range(CASES)]
    table = {name: np.concatenate([x[name] for x, _ in made]) for name in made[0][0]}
    kinds = np.array([kind for _, kind in made])
    table |= {"interleaved": kinds[:, 0], "weighted": kinds[:, 1], "zero_tail": kinds[:, 2]} | defaults()
    np.savez_compressed(FILE, **{k: v.astype(np.int16) if v.dtype == np.int64 else v for k, v in table.items()})
    print(f"{FILE.name}: {CASES} cases, {len(table['case'])} rows, {FILE.stat().st_size / 1024:.0f} kB")


if __name__ == "__main__":
    main()
