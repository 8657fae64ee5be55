"""Lint and types: ruff on everything, mypy on the package."""
import subprocess
import sys

import pytest
from tree import ROOT


@pytest.mark.parametrize("command", [["ruff", "check", "--no-cache", "--output-format=concise", "."],
                                     ["mypy", "--cache-dir", "build/mypy", "collai"]], ids=lambda command: command[0])
def test_finds_nothing(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{command[0]} says\n{done.stdout}{done.stderr}"
