"""Notebooks: each runs from top to bottom in a fresh kernel (quick profile), and each chain stays within its budget.

Results are shared with `collai run`: what is up to date in `build/executed` is not run again.
"""
import shutil

import pytest
from tree import CHAIN_NOTEBOOKS, PAPER_NOTEBOOKS, ROOT

from collai.core import runner
from collai.core.report import BUDGET

CHAINS = sorted({notebook.parent.name for notebook in CHAIN_NOTEBOOKS})


def seconds(name: str) -> float:
    """Seconds of a notebook's last run; unknown counts as long."""
    return runner.last_run(name, "quick", ROOT).get("seconds") or float("inf")


@pytest.mark.parametrize("name", sorted(runner.notebooks(ROOT), key=lambda name: (-seconds(name), name)))
def test_the_notebook_runs(name):
    result = runner.run([name], "quick", jobs=1, root=ROOT)[0]
    assert result.status in ("done", "up to date"), result.error


def shortest(chain: str) -> str:
    """The quickest notebook of a chain, of those with a figure where the chain is a paper's."""
    ours = [n for n in CHAIN_NOTEBOOKS if n.parent.name == chain]
    drawn = [n for n in ours if n in PAPER_NOTEBOOKS and "image/png" in n.read_text(encoding="utf-8")]
    return min((f"{chain}/{n.stem}" for n in drawn or ours), key=lambda name: (seconds(name), name))


@pytest.mark.parametrize("chain", CHAINS)
def test_refreshing_twice_gives_the_same_bytes(chain, tmp_path):
    name = shortest(chain)
    for folder in ("nbs", "collai", "seeds"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for file in ("settings.ini", "requirements.lock"):
        shutil.copy(ROOT / file, tmp_path)
    texts = []
    for _ in range(2):
        shutil.rmtree(tmp_path / "build", ignore_errors=True)
        result = runner.refresh([name], jobs=1, root=tmp_path)[0]
        assert result.status == "done", result.error
        texts.append((tmp_path / "nbs" / f"{name}.ipynb").read_bytes())
    assert texts[0] == texts[1], f"{name}: outputs change from run to run; seed them, or tag the cell 'volatile'"


@pytest.mark.parametrize("chain", CHAINS)
def test_the_chain_stays_within_its_budget(chain):
    runner.run([chain], "quick", jobs=1, root=ROOT)
    each = {name: seconds(name) for name in runner.select([chain], ROOT)}
    total = sum(each.values())
    assert total <= 1.5 * BUDGET, f"{total:.0f} s, the budget is {BUDGET:.0f}: {each}"
