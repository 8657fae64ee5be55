"""Allocation rules against what kvpress 0.5.5 keeps (recorded by make_vectors.py)."""
from pathlib import Path

import numpy as np
import pytest

from collai.lukv.allocate import baseline_budgets, round_budgets

FILE = Path(__file__).parents[3] / "nbs" / "lukv" / "results" / "kvpress_0_5_5.npz"


@pytest.fixture(scope="module")
def peer():
    with np.load(FILE) as stored:
        return {name: stored[name] for name in stored.files}


def test_a_curve_is_rounded_to_the_counts_of_the_peer(peer):
    for (length, ratio), kept in zip(peer["lukv_cases"], peer["lukv_kept"], strict=True):
        row = min(98, max(0, round(100 * ratio) - 1))
        found = round_budgets(peer["lukv_curve"][row], int(length), rounding="kvpress")
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, kept, err_msg=f"T = {length:.0f}, ratio {ratio}")


def test_adakv_keeps_what_the_peer_keeps(peer):
    scores = peer["adakv_scores"]
    for (ratio, alpha), kept in zip(peer["adakv_cases"], peer["adakv_kept"], strict=True):
        found = baseline_budgets("adakv", scores, *scores.shape, float(ratio), alpha=float(alpha))
        np.testing.assert_array_equal(found, kept, err_msg=f"ratio {ratio}, alpha {alpha}")


def test_pyramid_layers_keep_what_the_peer_keeps(peer):
    for (layers, length, ratio, window, beta), kept in zip(peer["pyramid_cases"], peer["pyramid_kept"], strict=True):
        found = baseline_budgets("pyramid", None, int(layers), 3, int(length), float(ratio), beta=int(beta),
                                 window=int(window))
        expected = np.repeat(kept[kept >= 0][:, None], 3, axis=1)
        np.testing.assert_array_equal(found, expected, err_msg=f"L = {layers:.0f}, T = {length:.0f}, ratio {ratio}")


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.8, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("length", [1, 7, 100, 1000, 4093])
def test_uniform_budgets_truncate_like_the_peer(length, ratio):
    found = baseline_budgets("uniform", None, 2, 3, length, ratio)
    np.testing.assert_array_equal(found, np.full((2, 3), max(1, int(length * (1 - ratio)))))
