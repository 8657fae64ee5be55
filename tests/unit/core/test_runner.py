"""The runner: what it chooses, when it repeats, how it fails, and what a stop at any moment leaves behind."""
import io
import json
import keyword
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from collai.core import runner
from collai.core.runner import Result, UnknownParameter, UnknownTarget, last_run, refresh, run, run_key, select

RUN = "import sys; from collai.core.runner import run; print([r.status for r in run(sys.argv[1:], jobs=2)])"
SLEEPER = "\n".join([  # tells its process and one of its own, then waits until a file named `go` lies beside it
    "import os, pathlib, subprocess, sys, time",
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])",
    "pathlib.Path('pids.new').write_text(f'{os.getpid()} {child.pid}')",
    "os.replace('pids.new', 'pids')",
    "while not os.path.exists('go'): time.sleep(0.05)",
    "child.kill()",
])
COUNT = "with open('count', 'a') as f: f.write('x')"


def statuses(results):
    return [result.status for result in results]


# ------------------------------------------------------------------------------------------------ which notebooks

def test_targets_are_chains_names_or_paths(mini, monkeypatch):
    for name in ("index", "a/00_x", "a/01_y", "ab/00_z", "a/.ipynb_checkpoints/00_x"):
        mini.write(name, "1")
    assert select([], mini.root) == ["a/00_x", "a/01_y", "ab/00_z", "index"]
    assert select(["a", "a/01_y", "index"], mini.root) == ["a/00_x", "a/01_y", "index"]
    monkeypatch.chdir(mini.root / "nbs" / "a")
    assert select(["00_x.ipynb", "../ab"]) == ["a/00_x", "ab/00_z"]


def test_an_unknown_target_is_refused_with_the_nearest_names(mini):
    mini.write("emvs/01_cpd", "1")
    with pytest.raises(UnknownTarget, match=r"no chain or notebook 'emvz'; nearest: emvs"):
        run(["emvz"], root=mini.root)
    with pytest.raises(UnknownTarget, match=r"no chain or notebook 'emvs/01_cpt'; nearest: emvs/01_cpd"):
        run(["emvs/01_cpt"], root=mini.root)


def test_outside_a_repository_it_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no collai repository at or above"):
        run()


# ------------------------------------------------------------------------------------------------ up to date?

@given(st.lists(st.from_regex(r"[a-z]{1,5}", fullmatch=True).filter(lambda word: not keyword.iskeyword(word)), min_size=1, max_size=4))
def test_an_import_reaches_all_its_parents(parts):
    names = runner._imported("import collai." + ".".join(parts))
    assert names == {".".join(["collai", *parts][:end]) for end in range(1, len(parts) + 2)}


@pytest.fixture
def keyed(mini, cell):
    """A notebook of chain `mini` that reaches collai/mini/b.py through collai/mini/a.py."""
    for path in ("collai/__init__.py", "collai/mini/__init__.py", "collai/mini/unused.py"):
        mini.put(path, "")
    mini.put("collai/mini/a.py", "from .b import two")
    mini.put("collai/mini/b.py", "two = 2")
    mini.put("collai/mini/look.mplstyle", "axes.grid: True")
    mini.put("collai/_cards.json", '{"mini": {"year": 1}, "other": {"year": 1}}')
    mini.put("nbs/mini/results/cpu.json", "{}")
    mini.put("seeds/other.toml", "")
    mini.write("mini/00_a", cell("seed = 0", "parameters"), "%time\nfrom collai.mini.a import two")
    return mini


@pytest.mark.parametrize("path", ["collai/__init__.py", "collai/mini/a.py", "collai/mini/b.py", "collai/mini/look.mplstyle",
                                  "seeds/mini.toml", "nbs/mini/results/cpu.json", "requirements.lock"])
def test_the_key_changes_with_every_file_it_depends_on(keyed, path):
    before = run_key("mini/00_a", root=keyed.root)
    keyed.put(path, (keyed.root / path).read_text() + "\n# changed")
    assert run_key("mini/00_a", root=keyed.root) != before


@pytest.mark.parametrize("path", ["collai/mini/unused.py", "seeds/other.toml", "nbs/mini/notes.txt"])
def test_the_key_ignores_what_the_notebook_does_not_use(keyed, path):
    before = run_key("mini/00_a", root=keyed.root)
    keyed.put(path, "changed = True")
    assert run_key("mini/00_a", root=keyed.root) == before


def test_the_key_sees_the_chains_own_packaged_card_only(keyed):
    before = run_key("mini/00_a", root=keyed.root)
    keyed.put("collai/_cards.json", '{"mini": {"year": 1}, "other": {"year": 2}}')
    assert run_key("mini/00_a", root=keyed.root) == before
    keyed.put("collai/_cards.json", '{"mini": {"year": 2}, "other": {"year": 2}}')
    assert run_key("mini/00_a", root=keyed.root) != before


def test_a_notebook_without_a_card_depends_on_all_cards_and_on_the_list_of_notebooks(mini):
    mini.write("index", "1")
    keys = {run_key("index", root=mini.root)}
    mini.put("seeds/other.toml", "changed")
    keys.add(run_key("index", root=mini.root))
    mini.write("mini/00_a", "1")
    keys.add(run_key("index", root=mini.root))
    assert len(keys) == 3


def test_the_key_sees_settings_and_cells_but_not_outputs(keyed, cell, monkeypatch):
    def key(**settings):
        return run_key("mini/00_a", root=keyed.root, **settings)

    keys = {key(), key(profile="full"), key(params={"seed": 1}), key(params={"seed": 2})}
    assert len(keys) == 4
    with monkeypatch.context() as patch:
        patch.setenv("COLLAI_DEVICE", "cpu")
        assert key() not in keys
    book = json.loads((keyed.root / "nbs/mini/00_a.ipynb").read_text())
    book["cells"][1] |= {"outputs": [{"output_type": "stream", "name": "stdout", "text": ["hello"]}], "execution_count": 3}
    keyed.write("mini/00_a", *book["cells"])
    assert key() in keys
    keyed.write("mini/00_a", book["cells"][0], book["cells"][1] | {"metadata": {"tags": ["volatile"]}})
    assert key() not in keys


# ------------------------------------------------------------------------------------------------ one run

def test_a_notebook_runs_in_its_folder_with_this_python_one_thread_and_unix_sockets(mini, cell, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    look = "import os, sys, json\nfrom ipykernel.connect import get_connection_info\n" \
           "info = get_connection_info(unpack=True)\n" \
           "seen = [sys.executable, os.getcwd(), os.environ['OMP_NUM_THREADS'], info['transport'], info['ip']]\n" \
           "print(json.dumps([*seen, profile, seed]))"
    mini.write("mini/00_a", cell('profile = "none"\nseed = 0', "parameters"), look)
    assert statuses(run(root=mini.root, params={"seed": 7})) == ["done"]
    python, folder, threads, transport, address, profile, seed = json.loads(mini.printed("mini/00_a"))
    assert (python, folder, threads, profile, seed) == (sys.executable, str(mini.root / "nbs/mini"), "1", "quick", 7)
    assert transport == "ipc" and address.startswith(tempfile.gettempdir()) and not Path(address).parent.exists()
    assert last_run("mini/00_a", root=mini.root)["seconds"] > 0


def test_what_is_done_is_not_repeated_unless_forced_or_changed(mini):
    mini.write("mini/00_a", COUNT)
    assert statuses(run(root=mini.root)) == ["done"]
    assert statuses(run(root=mini.root)) == ["up to date"]
    assert statuses(run(root=mini.root, force=True)) == ["done"]
    mini.put("seeds/mini.toml", "changed")
    assert statuses(run(root=mini.root)) == ["done"]
    runner.executed("mini/00_a", root=mini.root).unlink()
    assert statuses(run(root=mini.root)) == ["done"]
    assert (mini.root / "nbs/mini/count").read_text() == "xxxx"


def test_a_failure_names_file_cell_and_line_and_stops_the_run(mini, cell):
    mini.write("mini/00_a", cell("# text", kind="markdown"), cell("profile = ''", "parameters"), "x = 0\n1 / x", "'after'")
    mini.write("mini/01_b", "1")
    first, second = run(root=mini.root, jobs=1)
    assert first.error == "nbs/mini/00_a.ipynb, cell 2, line 2: ZeroDivisionError: division by zero\n    1 / x"
    assert (first.status, second.status) == ("failed", "not run")
    assert "key" not in last_run("mini/00_a", root=mini.root) and "ZeroDivisionError" in json.dumps(mini.executed("mini/00_a"))


def test_a_syntax_error_and_a_dead_kernel_are_failures_with_a_place(mini):
    mini.write("mini/00_a", "1", "def f(:\n  pass")
    mini.write("mini/01_b", "1", "import os; os._exit(3)")
    syntax, dead = run(root=mini.root, jobs=1, keep_going=True)
    assert syntax.error.startswith("nbs/mini/00_a.ipynb, cell 1") and "SyntaxError" in syntax.error
    assert dead.error.startswith("nbs/mini/01_b.ipynb, cell 1: DeadKernelError")


def test_a_hung_cell_ends_with_the_time_limit_and_its_kernel_with_it(mini, wait_until, alive):
    mini.write("mini/00_a", SLEEPER)
    result, = run(root=mini.root, timeout=3)
    assert result.error.startswith("nbs/mini/00_a.ipynb, cell 0: CellTimeoutError: ") and "after 3 seconds" in result.error
    pids = [int(pid) for pid in (mini.root / "nbs/mini/pids").read_text().split()]
    wait_until(lambda: not any(map(alive, pids)), 20)


def test_an_unknown_parameter_is_refused_before_anything_runs(mini, cell):
    mini.write("otb/00_theory", cell('profile = "quick"\nseed = 0', "parameters"), COUNT)
    mini.write("otb/01_none", COUNT)
    with pytest.raises(UnknownParameter, match=r"^otb/00_theory has no parameter 'sede'; it has profile, seed$"):
        run(root=mini.root, params={"sede": 3})
    with pytest.raises(UnknownParameter, match=r"^otb/01_none has no parameter 'seed'; it has none$"):
        run(root=mini.root, params={"seed": 3})
    with pytest.raises(UnknownParameter, match="give the profile as profile="):
        run(root=mini.root, params={"profile": "full"})
    assert not (mini.root / "nbs/otb/count").exists() and not (mini.root / "build").exists()


@pytest.mark.parametrize(("settings", "message"), [
    ({"profile": "fast"}, "profile must be 'quick' or 'full', got 'fast'"),
    ({"jobs": 0}, "jobs must be at least 1, got 0"),
    ({"timeout": 0}, "timeout must be positive, got 0"),
])
def test_settings_without_sense_are_refused(mini, settings, message):
    with pytest.raises(ValueError, match=message):
        run(root=mini.root, **settings)


def test_without_papermill_it_says_what_to_install(mini, monkeypatch):
    mini.write("mini/00_a", "1")
    monkeypatch.setattr(runner, "find_spec", lambda name: None if name == "papermill" else name)
    with pytest.raises(ModuleNotFoundError, match=r'needs papermill: pip install "collai\[notebooks\]"'):
        run(root=mini.root)


def test_an_error_outside_of_the_notebook_is_a_failure_too(mini):
    mini.write("mini/00_a", "1")
    mini.put("build/running", "a file where a folder should be")
    result, = run(root=mini.root)
    assert result.status == "failed" and result.error.startswith("nbs/mini/00_a.ipynb: NotADirectoryError: ")


@pytest.fixture
def order(monkeypatch):
    """Names of the notebooks in the order they were started, without executing them."""
    started = []

    def execute(job, name):
        started.append(name)
        return Result(name, "failed", 0.1, "nbs/x.ipynb, cell 0: Oops\n    oops()") if "bad" in name else Result(name, "done", 0.1)

    monkeypatch.setattr(runner, "_execute", execute)
    return started


def test_the_longest_of_the_last_run_starts_first_and_a_new_one_before_all(mini, order):
    for name, seconds in {"a": 1.0, "b": 30.0, "c": 2.0, "new": None}.items():
        mini.write(f"mini/{name}", "1")
        if seconds:
            record = json.dumps({"notebook": name, "status": "done", "seconds": seconds, "error": ""})
            mini.put(f"build/executed/quick/mini/{name}.json", record)
    run(root=mini.root, jobs=1)
    assert order == ["mini/new", "mini/b", "mini/c", "mini/a"]


def test_after_a_failure_the_run_stops_unless_told_to_go_on(mini, order):
    for name in ("00_bad", "01_b"):
        mini.write(f"mini/{name}", "1")
    assert statuses(run(root=mini.root, jobs=1)) == ["failed", "not run"]
    assert statuses(run(root=mini.root, jobs=1, keep_going=True)) == ["failed", "done"]


def test_an_edit_during_the_run_makes_it_run_again(mini):
    for path in ("collai/__init__.py", "collai/mini.py"):
        mini.put(path, "")
    mini.write("mini/00_a", f"import collai.mini\nopen({str(mini.root / 'collai/mini.py')!r}, 'a').write('# more')")
    assert statuses(run(root=mini.root)) == ["done"]
    assert last_run("mini/00_a", root=mini.root)["status"] == "done" and "key" not in last_run("mini/00_a", root=mini.root)


def test_a_bar_on_a_terminal_plain_lines_elsewhere(mini, order, monkeypatch, capsys):
    mini.write("mini/00_a", "1")
    mini.write("mini/01_bad", "1")
    run(root=mini.root, jobs=1)
    lines = ["[1/2] mini/00_a: done, 0.1 s", "[2/2] mini/01_bad: failed, nbs/x.ipynb, cell 0: Oops"]
    assert capsys.readouterr().err.splitlines() == lines

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    run(root=mini.root, jobs=1)
    shown = sys.stderr.getvalue()
    assert "100%" in shown and "2/2" in shown and "mini/01_bad: failed, nbs/x.ipynb, cell 0: Oops" in shown and "[1/2]" not in shown


# ------------------------------------------------------------------------------------------------ stopped at any moment

def started(mini, wait_until, *command):
    """Start a run with one finished and one sleeping notebook; return it and the sleeper's processes."""
    mini.write("mini/00_a", COUNT)
    mini.write("mini/01_b", SLEEPER)
    process = mini.start("-c", RUN, *command)
    wait_until(lambda: (mini.root / "nbs/mini/pids").exists() and last_run("mini/00_a", root=mini.root).get("key"))
    return process, [int(pid) for pid in (mini.root / "nbs/mini/pids").read_text().split()]


def resumed(mini):
    """Run again, now without the wait; the finished notebook is not repeated."""
    (mini.root / "nbs/mini/go").touch()
    assert statuses(run(root=mini.root)) == ["up to date", "done"]
    assert (mini.root / "nbs/mini/count").read_text() == "x"


def test_sigterm_ends_kernels_and_their_children_before_it_raises(mini, wait_until, alive):
    mini.write("mini/01_b", SLEEPER)
    pids, handler = mini.root / "nbs/mini/pids", signal.getsignal(signal.SIGTERM)

    def terminate():
        wait_until(pids.exists)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate).start()
    with pytest.raises(KeyboardInterrupt):
        run(root=mini.root)
    assert not any(map(alive, map(int, pids.read_text().split())))
    assert not list((mini.root / "build/running").rglob("*.ipynb")) and not last_run("mini/01_b", root=mini.root)
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_run_that_waits_for_another_one_can_be_stopped(mini):
    mini.write("mini/00_a", "1")
    lock = FileLock(mini.put("build/running/quick/mini/00_a.lock", ""))
    timer = threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGINT))
    with lock, pytest.raises(KeyboardInterrupt):
        timer.start()
        run(root=mini.root)
    assert not last_run("mini/00_a", root=mini.root)


def test_a_killed_runner_leaves_no_kernel_and_no_socket_and_resumes(mini, wait_until, alive, tmp_path_factory):
    scratch = tmp_path_factory.mktemp("t")
    os.environ["TMPDIR"], before = str(scratch), os.environ.get("TMPDIR")
    try:
        process, pids = started(mini, wait_until)
    finally:
        os.environ.pop("TMPDIR") if before is None else os.environ.update(TMPDIR=before)
    assert len(list(scratch.glob("collai-*"))) == 1
    process.kill()
    wait_until(lambda: not any(map(alive, [process.pid, *pids])), 20)
    process.communicate()
    assert not list(scratch.glob("collai-*")) and not last_run("mini/01_b", root=mini.root)
    resumed(mini)


def test_a_kernel_whose_runner_died_before_it_was_up_ends_by_itself(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    command = [sys.executable, "-c", runner._LAUNCH, str(gone.pid), "-f", str(tmp_path / "kernel" / "k.json")]
    kernel = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL)
    assert kernel.wait(timeout=60) == -signal.SIGKILL


def test_two_runs_in_one_tree_share_the_work(mini):
    for name in ("00_a", "01_b"):
        mini.write(f"mini/{name}", f"import time; time.sleep(0.3)\nopen('{name}.count', 'a').write('x')")
    pair = [mini.start("-c", RUN) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert [file.read_text() for file in sorted((mini.root / "nbs/mini").glob("*.count"))] == ["x", "x"]
    assert all(last_run(f"mini/{name}", root=mini.root)["key"] for name in ("00_a", "01_b"))


# ------------------------------------------------------------------------------------------------ refresh

def test_refresh_publishes_outputs_and_nothing_else_and_is_repeatable(mini, cell):
    draw = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"
    noise = "import sys\nprint('one', flush=True)\nprint('to err', file=sys.stderr, flush=True)\nprint('two')"
    cells = [cell("# T", kind="markdown"), cell('profile = "x"', "parameters"), draw, noise, cell("print(id({}))", "volatile"), "6 * 7"]
    file = mini.write("mini/00_a", *cells)
    before = json.loads(file.read_text())
    assert statuses(refresh(["mini"], root=mini.root)) == ["done"]
    once = file.read_bytes()
    after = json.loads(once)
    bare = [{k: v for k, v in c.items() if k != "outputs"} for c in after["cells"]]
    assert bare == [{k: v for k, v in c.items() if k != "outputs"} for c in before["cells"]]
    assert after["metadata"] == before["metadata"]
    kinds = [[o.get("name", o["output_type"]) for o in c.get("outputs", [])] for c in after["cells"]]
    assert kinds == [[], [], ["display_data"], ["stdout"], [], ["execute_result"]]
    run(root=mini.root, force=True)
    assert statuses(refresh(["mini"], root=mini.root)) == ["up to date"]
    assert file.read_bytes() == once
    clean = "from nbdev.clean import nbdev_clean; nbdev_clean.__wrapped__('nbs')"
    assert mini.python("-c", clean).returncode == 0 and file.read_bytes() == once


def test_refresh_writes_nothing_when_one_notebook_fails(mini):
    good, bad = mini.write("mini/00_a", "print(1)"), mini.write("mini/01_b", "1 / 0")
    before = good.read_bytes(), bad.read_bytes()
    assert "failed" in statuses(refresh(root=mini.root))
    assert (good.read_bytes(), bad.read_bytes()) == before


def test_refresh_refuses_a_notebook_edited_while_it_ran(mini):
    mini.write("mini/00_a", "print(1)")
    run(root=mini.root)
    mini.write("mini/00_a", "print(2)")
    with pytest.raises(RuntimeError, match=r"nbs/mini/00_a.ipynb was edited while it ran"):
        runner._refreshed("mini/00_a", mini.root)
