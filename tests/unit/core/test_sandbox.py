"""Children that are contained, watched and never left behind."""
import json
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest

from collai.core import sandbox
from collai.core.sandbox import Ending, Sandbox, Zygote, missing_layers, shared_memory

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
complete = pytest.mark.skipif(bool(missing_layers()), reason=f"a sandbox layer is missing: {missing_layers()}")
BOX = {"memory_mb": 256, "disk_mb": 20}


@pytest.fixture(scope="module")
def zygote():
    with Zygote(()) as made:
        yield made


def run(zygote, source, box, **options):
    """Run source text in a child; its end and what it printed."""
    with zygote.spawn(exec, source, {}, sandbox=box, **{"timeout": 20, **options}) as child:
        return child.wait(30), child.output()


def gone(pid):
    """Whether a process is dead, if perhaps not yet collected by init."""
    task = sandbox._task(pid)
    return task is None or task.state in "ZX"


def soon(condition, seconds=10.0):
    """Wait for a condition; whether it came."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


# --- children ---------------------------------------------------------------------------------------------------------

@linux
def test_a_child_talks_through_its_pipes_and_returns_its_exit_code(zygote):
    with zygote.spawn(exec, "import os; os.write(4, os.read(3, 9).upper()); raise SystemExit") as child:
        assert child.wait(0.05) is None and child.layers == ("session", "folder")
        os.write(child.stdin, b"hello")
        assert os.read(child.stdout, 9) == b"HELLO" and child.wait(10) == ("exit", 1) == child.wait()
        assert os.read(child.stdout, 9) == b"" and "SystemExit" in child.output()
    assert run(zygote, "print('done')", None) == (Ending("exit", 0), "done\n")
    assert child.close() is None and not os.path.exists(child.folder)


@linux
def test_a_child_has_only_the_descriptors_it_is_given(zygote):
    fd, view = shared_memory(8, child_writes=True)
    source = "import os; print(os.listdir('/proc/self/fd')); os.pwrite(5, b'here', 0)"
    assert run(zygote, source, None, fds=[fd])[1] == f"{[str(n) for n in range(7)]}\n"  # 6 lists the folder itself
    assert view[:4] == b"here"
    os.close(fd)


@linux
def test_keys_of_services_do_not_reach_a_child(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "secret")
    with Zygote((), env={"TRITON_INTERPRET": "1"}) as made:
        end, text = run(made, "import os, json; print(json.dumps(dict(os.environ)))", Sandbox("auto"))
    seen = json.loads(text)
    assert end == ("exit", 0) and "SOME_API_KEY" not in seen and seen["TRITON_INTERPRET"] == "1"
    assert seen["HOME"] == seen["TMPDIR"] == seen["TRITON_CACHE_DIR"] and not os.path.exists(seen["HOME"])


@linux
def test_a_child_is_killed_by_its_parent_by_its_deadline_and_by_itself(zygote):
    with zygote.spawn(time.sleep, 60) as child:
        assert child.kill() == Ending("stopped", -9) == child.kill() and not child.ending.attributable and gone(child.pid)
    began = time.monotonic()
    assert run(zygote, "while True: pass", None, timeout=0.2)[0] == Ending("timeout", -9)
    assert time.monotonic() - began < 5
    end = run(zygote, "import os; os.kill(os.getpid(), 11)", Sandbox("auto"))[0]
    assert end == Ending("signal", -11) and end.attributable


@linux
def test_a_stopped_child_burns_no_time_and_goes_on(zygote):
    with zygote.spawn(exec, "import os\nwhile True: os.write(4, b'.')") as child:
        os.read(child.stdout, 1)
        child.send_signal(signal.SIGSTOP)
        assert soon(lambda: sandbox._task(child.pid).state == "T")
        child.send_signal(signal.SIGCONT)
        assert soon(lambda: sandbox._task(child.pid).state != "T") and child.kill().reason == "stopped"


@linux
def test_children_run_at_the_same_time_and_none_is_left_in_the_folder(zygote):
    children = [zygote.spawn(exec, "import os; os.read(3, 1)", sandbox=Sandbox("auto")) for _ in range(5)]
    assert len({child.folder for child in children}) == 5 == sum(not gone(child.pid) for child in children)
    for child in children:
        child.close()
    assert all(gone(child.pid) for child in children) and os.listdir(zygote.folder) == ["zygote.log"]


@linux
def test_what_cannot_start_is_refused(zygote):
    with pytest.raises(ValueError, match="timeout must be > 0, got 0"):
        zygote.spawn(print, timeout=0)
    with pytest.raises(RuntimeError, match="no zygote: ModuleNotFoundError: No module named 'no_such_module'"):
        Zygote(("no_such_module",))
    closed = Zygote(())
    closed.close()
    closed.close()
    assert gone(closed.pid) and not os.path.exists(closed.folder)
    with pytest.raises(RuntimeError, match="the zygote is closed"):
        closed.spawn(print)


@linux
def test_closing_the_zygote_first_stops_its_children():
    with Zygote(()) as made:
        child = made.spawn(time.sleep, 600)
    assert child.wait(10) == Ending("stopped", -9) and gone(child.pid)
    child.close()
    with pytest.raises(ValueError, match=rf"child {child.pid} is closed"):
        child.output()


@linux
def test_a_function_is_called_once_before_the_first_fork(tmp_path, monkeypatch):
    (tmp_path / "made_ready.py").write_text("import os\ndef ready(): os.environ['READY'] = str(os.getpid())\n")
    monkeypatch.syspath_prepend(tmp_path)
    with Zygote(("made_ready:ready",)) as made:
        assert run(made, "import os; print(os.environ['READY'])", None)[1] == f"{made.pid}\n"
    with pytest.raises(RuntimeError, match="no zygote: AttributeError: .* has no attribute 'steady'"):
        Zygote(("made_ready:steady",))


SPAWNER = """
import os, time
from collai.core.sandbox import Zygote
zygote = Zygote.attach(5, folder)
child = zygote.spawn(time.sleep, 600)
with zygote.spawn(exec, "import os; os.write(4, b'hi')") as other:
    os.write(4, f"{child.pid} {os.read(other.stdout, 9).decode()} {other.wait(10).code} {zygote.pid}".encode())
time.sleep(600)
"""


@linux
def test_a_child_spawns_others_which_end_with_it(zygote):
    with zygote.spawn(exec, SPAWNER, {"folder": zygote.folder}, fds=[zygote.fileno()]) as judge:
        pid, *said = os.read(judge.stdout, 99).decode().split()
        assert said == ["hi", "0", str(zygote.pid)] and not gone(int(pid))
        os.kill(judge.pid, signal.SIGKILL)
        assert judge.wait(10) == Ending("signal", -9) and soon(lambda: gone(int(pid)))
    assert run(zygote, "print('next')", None)[1] == "next\n"


@linux
def test_letting_go_of_a_hold_ends_nothing_and_closing_does_not_wait_for_holders():
    made = Zygote(())
    hold = Zygote.attach(os.dup(made.fileno()), made.folder)
    other = Zygote.attach(os.dup(made.fileno()), made.folder)
    other.close()
    with hold.spawn(exec, "print('here')") as child:
        assert child.wait(10).code == 0 and child.output() == "here\n"
    began = time.monotonic()
    made.close()
    assert time.monotonic() - began < 2 and gone(made.pid) and not os.path.exists(made.folder)
    with pytest.raises(RuntimeError, match="the zygote is closed"):
        hold.spawn(print)
    hold.close()


@linux
def test_a_zygote_with_threads_is_refused(tmp_path, monkeypatch):
    (tmp_path / "starts_a_thread.py").write_text("import threading, time\n"
                                                 "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match=r"importing \('starts_a_thread',\) starts threads, .* with 2 threads"):
        Zygote(("starts_a_thread",))


@linux
def test_a_function_that_the_zygote_cannot_import_is_refused(zygote, tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("def f(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import only_here

    with pytest.raises(RuntimeError, match="no child: ModuleNotFoundError: No module named 'only_here'"):
        zygote.spawn(only_here.f)
    assert run(zygote, "print(1)", None)[0].code == 0


PARENT = """
import sys; sys.path[:] = {path!r}
import os, time
from collai.core.sandbox import Sandbox, Zygote
zygote = Zygote(())
children = [zygote.spawn(time.sleep, 600), zygote.spawn(time.sleep, 600, sandbox=Sandbox("auto")),
            zygote.spawn(exec, "import os, time; os.write(4, str(os.fork() or os.getpid()).encode()); time.sleep(600)",
                         sandbox=Sandbox("auto", processes=3))]
started = []
while len(started) < 1 or not started[0]:
    started = [os.read(children[2].stdout, 99).decode()]
print(os.getpid(), zygote.pid, *(c.pid for c in children), zygote.folder, flush=True)
if {leave}: time.sleep(600)
"""


def parent(leave):
    """A process with a zygote and three children, one with a child of its own."""
    source = PARENT.format(path=sys.path, leave=leave)
    process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True)
    *pids, folder = process.stdout.readline().split()
    return process, [int(pid) for pid in pids], folder


@linux
@pytest.mark.parametrize("how", ["killed", "ends without closing"])
def test_nothing_is_left_when_the_parent(how):
    process, (_, made, *children), folder = parent(leave=how == "killed")
    if how == "killed":
        process.kill()
    process.communicate()
    assert soon(lambda: all(map(gone, [made, *children])) and not os.path.exists(folder))
    assert not any(map(sandbox._Watched.others, [sandbox._Watched(pid, 0, {}, set(), 0.0, 0) for pid in children]))


@linux
def test_children_of_a_killed_zygote_are_killed_and_that_is_not_their_fault():
    made = Zygote(())
    source = ("import os, time\nif os.fork() == 0: os.write(4, str(os.getpid()).encode())\ntime.sleep(600)")
    children = [made.spawn(time.sleep, 600), made.spawn(exec, source, {}, sandbox=Sandbox("auto", processes=3))]
    started = int(os.read(children[1].stdout, 99))
    os.kill(made.pid, signal.SIGKILL)
    assert soon(lambda: all(gone(child.pid) for child in children)) and not gone(started)  # the kernel's doing
    assert [child.wait(10) for child in children] == [Ending("lost", -9)] * 2 and not children[0].ending.attributable
    assert soon(lambda: gone(started))  # that of `wait`
    with pytest.raises(RuntimeError, match="no child"):
        made.spawn(print)
    for child in children:
        child.close()
    made.close()
    assert not os.path.exists(made.folder)


# --- sandbox ----------------------------------------------------------------------------------------------------------

REFUSED = {
    "fork": "os.fork()",
    "a fork from a thread": "import threading; e = []; t = threading.Thread(target=lambda: e.append(os.fork())); "
                            "t.start(); t.join(); e or denied()",
    "exec": "os.execv('/bin/true', ['true'])",
    "a subprocess": "import subprocess; subprocess.run(['/bin/true'])",
    "a socket": "import socket; socket.socket()",
    "a signal to its parent": "os.kill(os.getppid(), 0)",
    "a signal to everybody": "os.kill(-1, 0)",
    "a signal through a descriptor": "import fcntl; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())",
    "a signal through a pidfd": "os.pidfd_open(os.getppid())",
    "tracing its parent": "call(libc.ptrace, 16, os.getppid(), 0, 0)",
    "reading its parent's memory": "open(f'/proc/{os.getppid()}/mem', 'rb')",
    "reading its parent's environment": "open(f'/proc/{os.getppid()}/environ', 'rb').read()",
    "limiting its parent": "import resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    "moving its parent to another core": "os.sched_setaffinity(os.getppid(), {0})",
    "slowing its parent": "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "outliving its zygote": "call(libc.prctl, 1, 0, 0, 0, 0)",
    "leaving its session": "os.setsid()",
    "memory outside its limits": "os.memfd_create('x')",
    "shared memory that stays": "call(libc.shmget, 0, 4096, 0o1600)",
    "a namespace": "call(libc.unshare, 0x10000000)",
    "a mount": "call(libc.mount, b'x', b'/mnt', b'tmpfs', 0, 0)",
    "a higher limit": "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 40, 1 << 40))",
    "reading elsewhere": "open({secret!r}).read()",
    "listing elsewhere": "os.listdir(os.path.dirname({secret!r}))",
    "writing elsewhere": "open({secret!r}, 'a')",
    "making a file elsewhere": "open({secret!r} + '2', 'w')",
    "truncating elsewhere": "os.truncate({secret!r}, 0)",
    "deleting elsewhere": "os.unlink({secret!r})",
    "a link to elsewhere": "os.symlink({secret!r}, 'link'); open('link').read()",
    "changing the interpreter": "open(os.__file__, 'a')",
    "more memory than allowed": "bytearray(300 << 20)",
    "more shared memory than allowed": "import mmap; mmap.mmap(-1, 300 << 20)",
    "a file larger than allowed": "f = open('big', 'wb'); f.write(bytes(21 << 20))",
    "output larger than allowed": "[os.write(1, bytes(1 << 20)) for _ in range(21)]",
}
PRELUDE = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def denied(): raise PermissionError
def call(f, *a):
    if f(*a) < 0: raise OSError(ctypes.get_errno(), 'refused')
try:
    {line}
except (OSError, MemoryError, ValueError) as error: os.write(4, type(error).__name__.encode())
else: os.write(4, b'it worked')
"""


@complete
@pytest.mark.parametrize("what", REFUSED)
def test_a_sandboxed_child_is_refused(what, zygote, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("seed 4711")
    line = REFUSED[what].replace("{secret!r}", repr(str(secret)))
    with zygote.spawn(exec, PRELUDE.format(line=line), {}, sandbox=Sandbox("strict", **BOX), timeout=20) as child:
        seen = os.read(child.stdout, 99).decode()
    assert seen in ("PermissionError", "OSError", "MemoryError", "ValueError", ""), child.output()
    assert secret.read_text() == "seed 4711" and os.listdir(tmp_path) == ["secret"] and os.sched_getaffinity(0)
    assert seen or child.ending.reason == "disk"


FREE = {
    "fork": "if os.fork() == 0: os._exit(0)",
    "a subprocess": "import subprocess; subprocess.run(['/bin/true'], check=True)",
    "a socket": "import socket; socket.socket()",
    "a signal to its parent": "os.kill(os.getppid(), 0)",
    "reading elsewhere": "open({secret!r}).read()",
    "writing elsewhere": "open({secret!r}, 'a')",
    "more memory than allowed": "bytearray(300 << 20)",
}


@linux
@pytest.mark.parametrize("what", FREE)
def test_the_same_works_without_the_sandbox_so_the_tests_above_can_fail(what, zygote, tmp_path):
    (tmp_path / "secret").write_text("x")
    line = FREE[what].replace("{secret!r}", repr(str(tmp_path / "secret")))
    with zygote.spawn(exec, PRELUDE.format(line=line), {}, timeout=20) as child:
        assert os.read(child.stdout, 99) == b"it worked"


WATCHED = {
    "many files": ("for i in range(99): open(str(i), 'wb').write(bytes(1 << 20))\nwhile True: pass", {}, "disk"),
    "files without a name": ("import os; keep = []\nfor i in range(99):\n    keep.append(open('x', 'wb'))\n"
                             "    keep[-1].write(bytes(1 << 20)); keep[-1].flush(); os.unlink('x')\nwhile True: pass", {}, "disk"),
    "folders in folders": ("import os\nwhile True: os.mkdir('d'); os.chdir('d')", {}, "disk"),
    "resident memory": ("x = bytearray(b'1') * (300 << 20)\nwhile True: pass", {"cuda": True}, "memory"),
    "a fork bomb": ("import os\nwhile True: os.fork()", {"processes": 8}, "processes"),
    "a fork before the seal": ("import os, time\nos.fork(); time.sleep(60)", {"cuda": True}, "processes"),
}


@complete
@pytest.mark.parametrize("what", WATCHED)
def test_the_watch_ends(what, zygote):
    source, options, reason = WATCHED[what]
    with zygote.spawn(exec, source, {}, sandbox=Sandbox("strict", **BOX, **options), timeout=20) as child:
        assert child.wait(30) == Ending(reason, -9) and child.ending.attributable
        assert not sandbox._members(child.pid, alone=False) or soon(lambda: all(
            gone(task.pid) for task in sandbox._members(child.pid, alone=False)))
    assert not os.path.exists(child.folder)
    began = time.monotonic()
    assert run(zygote, "print('next')", Sandbox("strict"))[0].code == 0 and time.monotonic() - began < 2


@complete
def test_processor_time_ends(zygote):
    assert run(zygote, "while True: pass", Sandbox("strict", cpu_seconds=1))[0] == Ending("signal", -signal.SIGXCPU)


@complete
def test_honest_work_is_not_disturbed(zygote):
    source = """
import ctypes, glob, json, mmap, os, random, tempfile, threading, uuid
done = []
threads = [threading.Thread(target=done.append, args=(i,)) for i in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
with tempfile.TemporaryDirectory() as folder:
    open(folder + '/a', 'w').write('x'); os.rename(folder + '/a', 'b'); os.unlink('b')
open('/dev/null', 'w').write('x'); open('/dev/urandom', 'rb').read(4); open('/proc/self/status').read()
os.kill(os.getpid(), 0); ctypes.CDLL(None).getpid(); bytearray(50 << 20); mmap.mmap(-1, 1 << 20); open('/proc/cpuinfo').read()
import sqlite3, decimal, asyncio
print(len(done), os.getcwd() == tempfile.gettempdir())
"""
    assert run(zygote, source, Sandbox("strict", **BOX)) == (Ending("exit", 0), "8 True\n")


@complete
def test_a_compiler_runs_in_one_child_and_its_result_in_another(zygote, tmp_path):
    compile_it = ("import subprocess; open('k.c', 'w').write('int f(int x) { return x + 1; }'); "
                  "subprocess.run(['cc', '-shared', '-o', 'k.so', 'k.c'], check=True)")
    here = str(tmp_path)
    end, text = run(zygote, compile_it, Sandbox("strict", processes=16), folder=here)
    assert end == ("exit", 0), text
    end, text = run(zygote, "import ctypes; print(ctypes.CDLL('./k.so').f(41))", Sandbox("strict"), folder=here)
    assert (end, text) == (Ending("exit", 0), "42\n") and (tmp_path / "k.so").exists()


@complete
def test_a_compiler_child_cannot_hide_a_process(zygote):
    source = ("import os, time\npid = os.fork()\nif pid == 0:\n    try: os.setsid()\n"
              "    except PermissionError: os.write(4, str(os.getpid()).encode())\n    time.sleep(600)\n"
              "os.read(3, 1)")
    with zygote.spawn(exec, source, {}, sandbox=Sandbox("strict", processes=4)) as child:
        hidden = int(os.read(child.stdout, 99))
        assert not gone(hidden)
        os.write(child.stdin, b"x")
        assert child.wait(10) == ("exit", 0) and gone(hidden)


@complete
def test_a_compiler_child_makes_no_name_space_and_no_sibling(zygote):
    number = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
    line = (f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nfor flag in (0x8000, 0x10000000, 0x20000000, 0x40000000):\n"
            f"    print(libc.syscall({number}, flag | 17, 0, 0, 0, 0), ctypes.get_errno())")
    assert run(zygote, line, Sandbox("strict", processes=4)) == (Ending("exit", 0), "-1 1\n" * 4)


@complete
def test_what_may_be_read_may_not_be_truncated(zygote, tmp_path):
    (tmp_path / "data").write_text("seed")
    source = (f"import os; print(open({str(tmp_path / 'data')!r}).read())\ntry: os.open({str(tmp_path / 'data')!r}, os.O_TRUNC)\n"
              "except PermissionError: print('refused')")
    assert run(zygote, source, Sandbox("strict", readable=(str(tmp_path),)))[1] == "seed\nrefused\n"
    assert (tmp_path / "data").read_text() == "seed"


def test_bytes_below_a_folder_are_counted_up_to_a_limit(tmp_path, monkeypatch):
    assert sandbox._tree_bytes(str(tmp_path / "none"), 10) == 0
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file").write_bytes(bytes(100_000))
    found = sandbox._tree_bytes(str(tmp_path), 10**6)
    assert 100_000 <= found <= 120_000 and sandbox._tree_bytes(str(tmp_path), 99_999) == float("inf")
    monkeypatch.setattr(sandbox, "_MOST_ENTRIES", 1)
    assert sandbox._tree_bytes(str(tmp_path), 10**6) == float("inf")
    monkeypatch.undo()
    (tmp_path / "/".join("d" * 70)).mkdir(parents=True)
    assert sandbox._tree_bytes(str(tmp_path), 10**6) == float("inf")


@complete
def test_shared_memory_is_written_by_those_who_may_and_shrunk_by_nobody(zygote):
    line = "import os, mmap\n{}\nos.write(4, bytes(mmap.mmap(5, 4, prot=mmap.PROT_READ)))"
    tries = ["os.pwrite(5, b'evil', 0)", "mmap.mmap(5, 4)", "open('/proc/self/fd/5', 'r+b').write(b'evil')", "os.ftruncate(5, 0)"]
    safe = "\n".join(f"try: {one}\nexcept (OSError, ValueError): pass" for one in tries)
    for child_writes in (False, True):
        fd, view = shared_memory(4, child_writes)
        view[:] = b"good"
        with zygote.spawn(exec, line.format(safe), {}, sandbox=Sandbox("strict"), fds=[fd]) as child:
            assert os.read(child.stdout, 4) == view[:] == (b"evil" if child_writes else b"good"), child.output()
        view[:] = b"mine"
        os.close(fd)
    with pytest.raises(ValueError, match="size must be > 0, got 0"):
        shared_memory(0, True)


@linux
def test_a_missing_layer_is_said_once_and_never_silently(monkeypatch):
    monkeypatch.setattr(sandbox, "missing_layers", lambda: {"seccomp": "needs pyseccomp and libseccomp: no"})
    sandbox._warn_degraded.cache_clear()
    with pytest.warns(RuntimeWarning, match="the sandbox is degraded, it lacks seccomp: needs pyseccomp"):
        box = Sandbox()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Sandbox() == box and "seccomp" not in box.active_layers() and "landlock" in box.active_layers()
        assert Sandbox("off").active_layers() == () and Sandbox(("rlimits",)).active_layers() == ("rlimits",)
    for layers in ("strict", ("rlimits", "seccomp")):
        with pytest.raises(RuntimeError, match="sandbox layer 'seccomp' is missing: needs pyseccomp"):
            Sandbox(layers)
    sandbox._warn_degraded.cache_clear()


@linux
def test_the_reason_of_a_missing_layer_is_found(monkeypatch):
    ask = sandbox.missing_layers.__wrapped__
    monkeypatch.setitem(sys.modules, "pyseccomp", None)
    monkeypatch.setattr(sandbox, "_landlock_abi", lambda: 2)
    monkeypatch.setattr(sandbox, "_CAPSET", {})
    found = ask()
    assert found.keys() == {"landlock", "seccomp", "capabilities"} and "this kernel has 2" in found["landlock"]
    monkeypatch.setattr(sys, "platform", "plan9")
    assert ask().keys() == set(sandbox._LAYERS)


@pytest.mark.parametrize(("options", "message"), [
    ({"layers": "most"}, "layers must be 'auto', 'strict', 'off' or names among no_new_privs, .*, got 'most'"),
    ({"layers": ("rlimits", "magic")}, r"got \('rlimits', 'magic'\)"),
    ({"layers": ["rlimits"]}, r"layers must be .*, got \['rlimits'\]"),
    ({"memory_mb": 0}, "memory_mb must be > 0, got 0"),
    ({"disk_mb": -1}, "disk_mb must be > 0, got -1"),
    ({"cpu_seconds": 0}, "cpu_seconds must be > 0, got 0"),
    ({"processes": 0}, "processes must be > 0, got 0"),
])
def test_a_sandbox_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sandbox(**options)


def in_fork(act):
    """Run a function in a fork of this process; its exit code."""
    pid = os.fork()
    if not pid:
        try:
            os._exit(act())
        except BaseException:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


INSIDE = """
import os
def refused(act):
    try: act()
    except OSError: return True
assert refused(os.fork) and refused(lambda: open({secret!r})) and refused(lambda: open({secret!r}, 'w'))
assert refused(lambda: os.kill(os.getppid(), 0)) and bool(refused(lambda: os.setuid(0))) == (os.getuid() != 0)
open('mine', 'w').write('x'); os.remove('mine')
assert 'CapEff:\\t0000000000000000' in open('/proc/self/status').read()
"""


@complete
@pytest.mark.parametrize("user", [0, 65534], ids=["root", "nobody"])
def test_the_sandbox_binds(user, tmp_path):
    """Entered in a fork of this process, which a root process turns into one of nobody's."""
    if user and os.getuid():
        pytest.skip("only root can become nobody")
    secret, inside = tmp_path / "secret", tmp_path / "inside"
    secret.write_text("x")
    inside.mkdir()
    for path in (secret, inside):
        os.chmod(path, 0o777)  # noqa: S103

    def act():
        os.chdir(inside)
        if user:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        layers = Sandbox("strict", **BOX).enter(".")
        exec(INSIDE.format(secret=str(secret)), {})  # noqa: S102
        return 0 if layers == sandbox._LAYERS else 3

    assert in_fork(act) == 0


@complete
def test_a_layer_that_fails_stops_the_child(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(1, "not today")

    monkeypatch.setattr(sandbox, "_landlock", fails)

    def act():
        with pytest.raises(RuntimeError, match=r"sandbox layer 'landlock' failed: \[Errno 1\] not today"):
            Sandbox("auto", cuda=True).enter(tmp_path)
        return 0

    assert in_fork(act) == 0


@complete
def test_a_process_with_threads_cannot_enter(zygote):
    source = ("import threading, time; from collai.core.sandbox import Sandbox\n"
              "threading.Thread(target=time.sleep, args=(60,), daemon=True).start(); Sandbox().enter('.')")
    assert "before the first thread is started, this process has 2" in run(zygote, source, None)[1]


@complete
def test_the_filter_holds_threads_that_were_started_before_it(zygote):
    source = """
import os, threading
from collai.core import sandbox
start, seen = threading.Event(), []
def late():
    start.wait()
    try: seen.append(os.fork())
    except OSError: seen.append('refused')
thread = threading.Thread(target=late); thread.start()
sandbox._prctl(38, 1); sandbox._seccomp(False)
start.set(); thread.join(); print(seen)
"""
    assert run(zygote, source, None)[1] == "['refused']\n"


@complete
def test_seal_filters_every_thread_at_once(zygote):
    source = """
import os, socket, threading
from collai.core.sandbox import Sandbox
box, start, ready, seen = Sandbox("strict", cuda=True), threading.Event(), threading.Event(), []
def refused(act):
    try: act()
    except PermissionError: return True
    return False
def late():
    seen.append(refused(socket.socket))
    ready.set(); start.wait()
    seen.extend([refused(socket.socket), refused(os.fork)])
layers = box.enter(".")
thread = threading.Thread(target=late); thread.start(); ready.wait()
before = refused(socket.socket)
box.seal(); start.set(); thread.join()
open(f"/proc/self/task/{os.getpid()}/comm", "w").write("named")  # as the driver does
print("seccomp" in layers, len(layers), before, seen, refused(socket.socket), refused(os.fork))
"""
    assert run(zygote, source, None) == (Ending("exit", 0), "False 4 False [False, True, True] True True\n")


@complete
def test_only_a_sandbox_for_a_gpu_lets_threads_be_named(zygote):
    source = "import os; open(f'/proc/self/task/{os.getpid()}/comm', 'w').write('named')"
    assert run(zygote, source, Sandbox("strict", cuda=True))[0] == ("exit", 0)
    end, text = run(zygote, source, Sandbox("strict"))
    assert end == ("exit", 1) and "PermissionError" in text


@complete
def test_a_seal_that_fails_is_said(zygote):
    source = """
from collai.core import sandbox
box = sandbox.Sandbox("strict", cuda=True); box.enter(".")
def fails(*_): raise OSError(1, "not today")
sandbox._seccomp = fails
box.seal()
"""
    assert "RuntimeError: sandbox layer 'seccomp' failed: [Errno 1] not today" in run(zygote, source, None)[1]
    assert Sandbox("strict").seal() is None  # nothing is left to do


@complete
def test_threads_can_be_denied(zygote):
    source = "import threading; threading.Thread(target=print, args=('it ran',)).start()"
    assert run(zygote, source, Sandbox("strict")) == (Ending("exit", 0), "it ran\n")
    end, text = run(zygote, source, Sandbox("strict", threads=False))
    assert end == Ending("exit", 1) and "can't start new thread" in text
