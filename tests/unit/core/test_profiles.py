"""Profiles: what `quick` and `full` fix, and where `full` refuses to run."""
import os

import pytest

from collai.core import profiles


def test_quick_is_one_thread_on_the_cpu():
    cfg = profiles.get("quick", seed=7)
    assert (cfg.device, cfg.dtype, cfg.threads, cfg.cuda, cfg.seed) == ("cpu", "float64", 1, False, 7)
    assert cfg.pick(quick=1, full=2) == 1


def test_quick_holds_torch_to_one_thread():
    import torch

    torch.set_num_threads(2)
    profiles.get("quick")
    assert torch.get_num_threads() == 1


def test_full_without_a_gpu_refuses(monkeypatch):
    monkeypatch.delenv("COLLAI_DEVICE", raising=False)
    monkeypatch.setattr(profiles, "_has_cuda", lambda: False)
    with pytest.raises(RuntimeError, match="profile 'full' needs a GPU; set COLLAI_DEVICE=cpu"):
        profiles.get("full")


def test_full_on_the_cpu_when_asked_for(monkeypatch):
    monkeypatch.setenv("COLLAI_DEVICE", "cpu")
    cfg = profiles.get("full")
    assert (cfg.device, cfg.dtype, cfg.cuda, cfg.threads) == ("cpu", "float64", False, os.cpu_count())
    assert cfg.pick(quick=1, full=2) == 2
    profiles.get("quick")


def test_full_with_a_gpu_uses_it(monkeypatch):
    monkeypatch.delenv("COLLAI_DEVICE", raising=False)
    monkeypatch.setattr(profiles, "_has_cuda", lambda: True)
    cfg = profiles.get("full")
    assert (cfg.device, cfg.dtype, cfg.cuda) == ("cuda", "float32", True)
    profiles.get("quick")


def test_the_gpu_is_asked_of_torch():
    import torch

    assert profiles._has_cuda() == torch.cuda.is_available()


@pytest.mark.parametrize("word", ["fast", "", "QUICK", "full "])
def test_other_words_are_refused(word):
    with pytest.raises(ValueError, match=f"profile must be 'quick' or 'full', got {word!r}"):
        profiles.get(word)
