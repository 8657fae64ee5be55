"""The command line: every command, its exit code, its last line; Ctrl-C and an installed package in processes of their own."""
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from collai.core import cards, claims, cli, report, runner

CLI = ("-m", "collai.core.cli")
CLAIM = "\n".join([  # what `claim` displays, for a card the installed package doesn't hold
    "import json, pathlib",
    "from collai.core import cards, claims",
    "from IPython.display import display",
    "spec = cards.load('mini')['claims'][0]",
    "row = claims.claim_row('mini.speed', spec, 7.0, (6.0, 8.0), '3 runs')",
    "display({claims.MIME: row}, raw=True)",
])


@pytest.fixture
def here(mini, monkeypatch):
    """The small repository as working directory, with a README and packed cards."""
    mini.put("README.md", "<!-- claims -->\n<!-- /claims -->\n")
    mini.put("collai/_cards.json", cards.as_json(cards.load_all(mini.root)))
    monkeypatch.chdir(mini.root)
    return mini


def collai(*args):
    result = CliRunner().invoke(cli.app, list(args))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


# ------------------------------------------------------------------------------------------------ help and list

def test_the_commands_are_those_of_the_house():
    code, out, _ = collai("--help")
    listed = [line.split()[0] for line in out.split("Commands:\n")[1].splitlines() if line]
    assert code == 0
    assert listed == ["list", "run", "report", "claims", "cards", "refresh", "site", "new", "doctor"]
    assert "..." not in out.split("Commands:")[1]  # no description is cut


@pytest.mark.parametrize("command", ["list", "run", "report", "claims", "cards", "refresh", "site", "new", "doctor"])
def test_every_command_explains_itself(command):
    code, out, _ = collai(command, "--help")
    assert code == 0 and "Usage:" in out


def test_help_answers_at_once_and_loads_nothing_heavy(tmp_path):
    code = "import sys, collai.core.cli as c; heavy = {'numpy', 'torch', 'papermill', 'doit', 'rich', 'IPython', 'tqdm'}; " \
           "print(sorted(heavy & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]", done.stderr
    best = min(timed([sys.executable, *CLI, "--help"], tmp_path) for _ in range(3))
    assert best < 0.5


def timed(command, folder):
    """Seconds a command computes: a machine that is busy with something else is no fault of it."""
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    return end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime


def test_list_in_a_repository_tells_states_apart(here):
    here.write("mini/00_a", "1")
    here.write("mini/01_b", "1 / 0")
    here.write("mini/02_c", "1")
    here.write("core/00_x", "1")
    here.put("seeds/plan.toml", (here.root / "seeds/mini.toml").read_text().split("[[notebooks]]")[0].replace('"mini"', '"plan"'))
    for name, record in {"00_a": {"status": "done", "key": runner.run_key("mini/00_a", root=here.root)},
                         "01_b": {"status": "failed"}, "02_c": {"status": "done", "key": "old"}}.items():
        here.put(f"build/executed/quick/mini/{name}.json", json.dumps({"seconds": 1.25, **record}))
    code, out, _ = collai("list")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0 and lines == [
        "mini A small paper (1 claims, 1 notebooks)", "mini/00_a up to date, 1.2 s", "mini/01_b failed, 1.2 s",
        "mini/02_c changed since its last run, 1.2 s", "plan A small paper (1 claims, planned)", "core shared", "core/00_x never run"]
    assert collai("list", "--chain", "plan")[1].split()[0] == "plan"
    assert collai("list", "--chain", "pan") == (2, "", "collai: no chain 'pan'; nearest: plan\n")


def test_list_works_in_any_folder_without_papermill(tmp_path):
    block = "import sys\nfor name in ('papermill', 'doit', 'jupyter_client', 'nbclient', 'nbformat', 'IPython', 'filelock', 'numpy'):\n" \
            "    sys.modules[name] = None\nimport collai.core.cli as c\nc.app(sys.argv[1:])"
    def ask(*args):
        return subprocess.run([sys.executable, "-c", block, *args], capture_output=True, text=True, cwd=tmp_path)

    done = ask("list")
    assert done.returncode == 0, done.stderr
    packed = claims.packaged_cards()
    assert all(f"{slug} " in done.stdout for slug in packed) and packed
    assert ("planned" in done.stdout) == any(not card.get("notebooks") for card in packed.values())
    assert all(module in done.stdout for card in packed.values() for book in card.get("notebooks", []) for module in book["exports"])
    outside = ask("run")
    assert outside.returncode == 2 and "no collai repository at or above" in outside.stderr


def test_run_without_papermill_says_what_to_install(here, monkeypatch):
    here.write("mini/00_a", "1")
    monkeypatch.setattr(runner, "find_spec", lambda name: None)
    assert collai("run") == (2, "", 'collai: running notebooks needs doit, filelock, ipykernel, papermill: pip install "collai[notebooks]"\n')


# ------------------------------------------------------------------------------------------------ run, report, claims

def test_run_report_and_claims_from_start_to_end(here, cell):
    here.write("mini/00_a", cell("seed = 0", "parameters"), CLAIM, "print(seed)")
    code, out, err = collai("run", "mini", "-p", "seed", "3", "--jobs", "1")
    assert (code, out.splitlines()[-1]) == (0, out.splitlines()[-1]) and "[1/1] mini/00_a: done" in err
    assert out.splitlines()[0].split()[:2] == ["claim", "paper's"] and out.splitlines()[1].split()[0] == "mini.speed"
    assert out.splitlines()[-1].startswith("1 notebook done in ") and out.splitlines()[-1].endswith(" s; report: build/report.html")
    assert here.printed("mini/00_a") == "3\n"
    page = (here.root / "build/report.html").read_text(encoding="utf-8")
    assert "It is five times faster" in page and "1 of 1 notebooks ran" in page
    assert json.loads((here.root / "build/claims.json").read_text())["rows"][0]["seed"] == 3

    assert collai("run", "-p", "seed", "3")[1].splitlines()[-1] == \
        "1 notebook done in 0 s (1 skipped as up to date); report: build/report.html"
    code, _, err = collai("claims", "--check")
    assert code == 1 and "not in README.md: It is five times faster (`mini.speed`)" in err
    before = (here.root / "README.md").read_text()
    code, _, err = collai("claims", "--write-readme")
    assert code == 2 and "default parameters; not up to date: mini/00_a (collai run)" in err
    assert (here.root / "README.md").read_text() == before, "a run with another seed is not what the README shows"
    collai("run")
    assert collai("claims", "--write-readme")[1].splitlines()[-1] == "claims: README.md"
    assert collai("claims", "--check") == (0, "1 claims: cards, notebooks and README.md agree\n", "")
    assert json.loads(collai("claims", "--json")[1])["rows"][0]["measured"] == 7.0
    assert collai("report") == (0, "report: build/report.html\n", "")


def test_a_failed_run_names_the_place_and_exits_with_one(here):
    here.write("mini/00_a", "1", "1 / 0")
    code, out, err = collai("run")
    seconds, last = out.splitlines()
    assert code == 1 and seconds.startswith("worker-seconds of the notebooks: ")
    assert err.endswith("nbs/mini/00_a.ipynb, cell 1, line 1: ZeroDivisionError: division by zero\n    1 / 0\n")
    assert last.startswith("0 notebooks done in ") and last.endswith(" s, 1 failed; report: build/report.html")
    assert "ZeroDivisionError" in (here.root / "build/report.html").read_text()


@pytest.mark.parametrize(("args", "said"), [
    (["run", "minni"], "collai: no chain or notebook 'minni'; nearest: mini"),
    (["run", "-p", "sede", "1"], "collai: mini/00_a has no parameter 'sede'; it has none"),
    (["run", "-p", "seed"], "collai: -p takes a name and a value, got 'seed'"),
    (["run", "--profile", "fast"], "'fast' is not one of 'quick', 'full'"),
    (["run", "--jobs", "0"], "jobs must be at least 1, got 0"),
    (["refresh"], "Missing argument"),
    (["refresh", "nothing"], "collai: no chain or notebook 'nothing'"),
    (["new", "nobody", "00_a"], "collai: no chain 'nobody'; nearest: "),
    (["new", "mini", "a"], "collai: NAME must look like 03_crb, got 'a'"),
    (["new", "mini", "00_a"], "collai: nbs/mini/00_a.ipynb exists"),
    (["claims", "--check", "--json"], "collai: --check, --write-readme and --json exclude each other"),
    (["paint"], "No such command 'paint'"),
])
def test_wrong_use_ends_in_one_sentence_and_exit_code_two(here, args, said):
    here.write("mini/00_a", "1")
    code, _, err = collai(*args)
    assert code == 2 and said in err and "Traceback" not in err


@pytest.mark.parametrize("args", [["run"], ["report"], ["claims"], ["cards"], ["refresh", "x"], ["new", "core", "00_x"], ["site"]])
def test_outside_of_a_repository_every_command_but_list_and_doctor_says_so(tmp_path, monkeypatch, args):
    monkeypatch.chdir(tmp_path)
    code, _, err = collai(*args)
    assert code == 2 and err.startswith("collai: no collai repository at or above")


def test_a_broken_card_stops_a_run_before_it_starts(here):
    here.write("mini/00_a", "1")
    here.put("seeds/mini.toml", "slug = ")
    code, _, err = collai("run")
    assert code == 2 and "does not parse" in err and not (here.root / "build").exists()


def test_ctrl_c_ends_the_kernels_exits_with_130_and_the_same_command_goes_on(here, wait_until, alive):
    here.write("mini/00_a", "open('count', 'a').write('x')")
    write = "import os, time\nopen('pid.new', 'w').write(str(os.getpid()))\nos.replace('pid.new', 'pid')\n"
    here.write("mini/01_b", write + "while not os.path.exists('go'): time.sleep(0.05)")
    process, folder = here.start(*CLI, "run"), here.root / "nbs/mini"
    wait_until(lambda: (folder / "pid").exists() and runner.last_run("mini/00_a", root=here.root).get("key"))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.rstrip().endswith("the same command goes on from there")
    assert not alive(int((folder / "pid").read_text())) and not list((here.root / "build/running").rglob("*.ipynb"))
    assert not runner.last_run("mini/01_b", root=here.root)
    (folder / "go").touch()
    assert "(1 skipped as up to date)" in collai("run")[1] and (folder / "count").read_text() == "x"


def test_open_shows_the_page(here, monkeypatch):
    opened = []
    monkeypatch.setattr(cli.typer, "launch", opened.append)
    assert collai("report", "--open")[0] == 0 and opened == [str(here.root / "build/report.html")]


# ------------------------------------------------------------------------------------------------ cards, refresh, new, site, doctor

def test_cards_finds_mistakes_and_syncs(here):
    assert collai("cards") == (1, "", "mini/00_a: on the card, but nbs/mini/00_a.ipynb does not exist\n")
    here.write("mini/00_a", "1")
    assert collai("cards") == (0, "1 card, no mistake\n", "")
    (here.root / "collai/_cards.json").unlink()
    assert "collai cards --sync" in collai("claims", "--check")[2]
    assert collai("cards", "--sync") == (0, "1 card, no mistake; wrote collai/_cards.json\n", "")
    here.put("seeds/mini.toml", 'slug = "mini"')
    code, _, err = collai("cards")
    assert code == 1 and "mini: key 'title' is missing" in err


def test_refresh_publishes_and_says_so(here, monkeypatch):
    file = here.write("mini/00_a", "print(1)")
    code, out, _ = collai("refresh", "mini")
    assert code == 0 and out.endswith("; outputs: nbs\n") and json.loads(file.read_text())["cells"][0]["outputs"]
    here.write("mini/00_a", "1 / 0")
    code, out, err = collai("refresh", "mini")
    assert code == 1 and out.endswith("1 failed; nothing written\n") and "ZeroDivisionError" in err

    def edited(targets):
        raise RuntimeError("nbs/mini/00_a.ipynb was edited while it ran; refresh it again")

    monkeypatch.setattr(runner, "refresh", edited)
    assert collai("refresh", "mini") == (1, "", "collai: nbs/mini/00_a.ipynb was edited while it ran; refresh it again\n")


def test_a_new_notebook_is_valid_and_its_template_is_in_the_order_of_the_house(here):
    code, out, _ = collai("new", "mini", "03_way_out")
    assert code == 0 and out.startswith("wrote nbs/mini/03_way_out.ipynb; add it to seeds/mini.toml")
    book = json.loads((here.root / "nbs/mini/03_way_out.ipynb").read_text(encoding="utf-8"))
    sources = ["".join(c["source"]) for c in book["cells"]]
    assert sources[0].startswith("# ") and "\n> " in sources[0] and "#| default_exp mini.way_out" in sources[2]
    assert book["cells"][3]["metadata"]["tags"] == ["parameters"] and "(mini.1)" in sources[9]
    assert len({c["id"] for c in book["cells"]}) == len(book["cells"])
    for c in book["cells"]:
        if c["cell_type"] == "code":
            compile("".join(c["source"]), "cell", "exec")
    assert collai("new", "core", "08_more")[1].startswith("wrote nbs/core/08_more.ipynb; fill in")


def test_site_calls_sphinx_and_reports_its_failure(here, monkeypatch):
    asked = []

    def pretend(command, cwd):
        asked.append((command[2], cwd))
        return subprocess.CompletedProcess(command, len(asked) // 3)

    monkeypatch.setattr(cli.subprocess, "run", pretend)
    assert collai("site") == (0, "site: build/site/index.html\n", "")
    code, _, err = collai("site", "--check")
    assert code == 1 and "failed: -m pytest" in err
    assert asked == [("sphinx", here.root), ("sphinx", here.root), ("pytest", here.root)]


def test_doctor_starts_a_kernel_and_notices_what_is_broken(here, monkeypatch):
    monkeypatch.setattr(cli, "_gpu", lambda: "none")
    code, out, _ = collai("doctor")
    assert code == 0 and "starts, computes and ends in" in out and out.endswith("doctor: all well\n")
    assert f"Python {sys.version.split()[0]}" in out and f"{here.root / 'build'} is writable" in out
    monkeypatch.setattr(cli, "_kernel_seconds", lambda: 1 / 0)
    monkeypatch.setenv("HOME", str(here.root))
    monkeypatch.chdir(Path(os.sep))
    code, out, err = collai("doctor")
    assert code == 1 and "none at or above this folder" in out and "BROKEN: ZeroDivisionError" in err


def test_worker_seconds_are_added_up_by_chain():
    runs = [runner.Result("a/00", "done", 2.4), runner.Result("a/01", "failed"), runner.Result("b/00", "up to date", 3.0)]
    assert cli._worker_seconds(runs) == "worker-seconds of the notebooks: 5 (a 2, b 3)"


def test_report_and_command_line_agree_on_the_summary(here):
    done = [runner.Result("a", "done", 1.0), runner.Result("b", "up to date", 2.0), runner.Result("c", "not run")]
    assert cli._summary(done, 3.2, "r.html") == "2 notebooks done in 3 s (1 skipped as up to date), 1 not run; report: r.html"
    assert report.headline([], {"a": {"status": "done", "seconds": 1.0}}) == "1 of 1 notebooks ran (1 worker-seconds). 0 claims: none yet."
