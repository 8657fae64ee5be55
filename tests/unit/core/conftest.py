"""A small repository in a temporary folder, for the tests of runner, report and command line."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

CARD = """
slug = "mini"
title = "A small paper"
authors = ["A. Author"]
year = 2026
summary = "It measures one number."
[[claims]]
id = "speed"
text = "It is five times faster"
goal = 5.0
unit = "ratio"
better = "higher"
where = "ours"
quick = "exact"
[[notebooks]]
path = "mini/00_a"
exports = []
claims = ["speed"]
needs = []
"""


def cell(source, *tags, kind="code"):
    body = {"cell_type": kind, "id": f"c{abs(hash((source, kind))) % 10**8}", "metadata": {}, "source": source}
    body |= {"metadata": {"tags": list(tags)}} if tags else {}
    return body | ({"execution_count": None, "outputs": []} if kind == "code" else {})


class Mini:
    """The repository: `write` adds a notebook, `start` and `python` run Python in its root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        settings = "[DEFAULT]\nlib_path = collai\nallowed_cell_metadata_keys = tags\nclean_ids = False\n"
        self.put("settings.ini", settings)
        self.put("requirements.lock", "numpy==2.4.6\n")
        self.put("seeds/mini.toml", CARD)
        (root / "nbs").mkdir()

    def put(self, path: str, text: str) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return file

    def write(self, name: str, *cells) -> Path:
        kernel = {"display_name": "python3", "language": "python", "name": "python3"}
        cells = [one if isinstance(one, dict) else cell(one) for one in cells]
        book = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
        return self.put(f"nbs/{name}.ipynb", json.dumps(book, indent=1, sort_keys=True) + "\n")

    def executed(self, name: str, profile: str = "quick") -> dict:
        return json.loads((self.root / f"build/executed/{profile}/{name}.ipynb").read_text(encoding="utf-8"))

    def printed(self, name: str) -> str:
        outputs = [o for c in self.executed(name)["cells"] for o in c.get("outputs", []) if o.get("name") == "stdout"]
        return "".join("".join(o["text"]) for o in outputs)

    def start(self, *args: str, **env: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, *args], cwd=self.root, env=os.environ | env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def python(self, *args: str, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, *args], cwd=self.root, env=os.environ | env, text=True,
                              capture_output=True, timeout=60)


def wait_until(true, seconds: float = 60) -> None:
    """Wait for something to become true, and fail if it doesn't."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Say whether a process exists and is not merely waiting to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def mini(tmp_path) -> Mini:
    return Mini(tmp_path.resolve())


@pytest.fixture(name="cell")
def cell_():
    return cell


@pytest.fixture(name="wait_until")
def wait_until_():
    return wait_until


@pytest.fixture(name="alive")
def alive_():
    return alive
