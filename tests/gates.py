"""Run the gates of `make test` in their order and stop at the first that fails: `python tests/gates.py [NAME ...]`."""
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REPORTS = ROOT / "build" / "tests"
WORKERS = ["-n", os.environ.get("JOBS", "2")]
GATES = {
    "form": ["tests/repo/test_form.py"],
    "drift": ["tests/repo/test_drift.py"],
    "lint": ["tests/repo/test_lint.py", "-k", "ruff"],
    "types": ["tests/repo/test_lint.py", "-k", "mypy"],
    "docs": ["tests/repo/test_docs.py"],
    "imports": ["tests/repo/test_imports.py"],
    "unit": ["tests/unit", "-x", *WORKERS, "--dist", "worksteal", "--cov", "--cov-report=term:skip-covered"],
    "notebooks": ["tests/notebooks", "-x", *WORKERS, "--dist", "load", "--maxschedchunk", "1"],
    "claims": ["tests/repo/test_cards.py"],
    "wheel": ["tests/repo/test_wheel.py"],
    "pages": ["tests/repo/test_site.py"],
}


def run(name: str) -> int:
    """Run one gate with pytest, which prints its own messages; give its exit status."""
    print(f"\n== {name} ({list(GATES).index(name) + 1} of {len(GATES)})", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "--tb=short", f"--junitxml={REPORTS / name}.xml", *GATES[name]]
    return subprocess.run(command, cwd=ROOT).returncode


def counts(names: list[str]) -> dict[str, int]:
    """Add up what pytest's own reports say."""
    total = {"passed": 0, "failed": 0, "skipped": 0}
    for name in names:
        suite = next(ET.parse(REPORTS / f"{name}.xml").iter("testsuite"))  # noqa: S314
        failed, skipped = int(suite.get("failures", 0)) + int(suite.get("errors", 0)), int(suite.get("skipped", 0))
        total["failed"] += failed
        total["skipped"] += skipped
        total["passed"] += int(suite.get("tests", 0)) - failed - skipped
    return total


def skips(names: list[str]) -> list[str]:
    """Say what was skipped, and why."""
    return [f"{case.get('name')}: {skip.get('message')}" for name in names
            for case in ET.parse(REPORTS / f"{name}.xml").iter("testcase") for skip in case.iter("skipped")]  # noqa: S314


def main(names: list[str]) -> int:
    """Run the named gates, all by default; the last line says what happened and where to look."""
    if unknown := [name for name in names if name not in GATES]:
        print(f"no gate {', '.join(unknown)}; the gates are {', '.join(GATES)}")
        return 2
    REPORTS.mkdir(parents=True, exist_ok=True)
    label = f"make check-{names[0]}" if len(names) == 1 else "make test"
    start, names = time.monotonic(), names or list(GATES)
    for i, name in enumerate(names):
        if status := run(name):
            left = f"; not run: {', '.join(names[i + 1:])}" if names[i + 1:] else ""
            print(f"\n{label}: FAILED at gate {name!r}; its messages stand above, make check-{name} repeats it{left}")
            return status
    for line in skips(names):
        print(f"skipped {line}")
    said = ", ".join(f"{n} {what}" for what, n in counts(names).items() if n)
    seconds = time.monotonic() - start
    print(f"\n{label}: {said} in {seconds:.2f}s ({timedelta(seconds=int(seconds))}); "
          "pytest's reports are in build/tests, the site in build/site/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
