"""Programs of models: right ones pass, harmful ones fail and leave nothing behind."""

import os
import socket
import time
from pathlib import Path

import pytest
from tasks_case import needs_kernel
from tiny_data import DATA, needs_data

from sbr_jax.data import load_evalset
from sbr_jax.evaluation import sandbox
from sbr_jax.evaluation.sandbox import Ending, run_many, run_python
from sbr_jax.evaluation.tasks.code import humaneval_program
from sbr_jax.typing import UserError

ISOLATIONS = ["audit", *(["kernel"] if sandbox.kernel_isolation() else [])]


def run(program, isolation="audit", seconds=5.0, **options):
    return run_python(
        program,
        allow_code_execution=True,
        isolation=isolation,
        seconds=seconds,
        **options,
    )


EACH = """
for way in {ways!r}:
    try:
        exec(way, {{}})
    except BaseException as error:
        print(type(error).__name__)
    else:
        print("done:", way)
"""


def ended(ways, isolation):
    """How each of the ways ended, tried one after the other in one process."""
    outcome = run(EACH.format(ways=list(ways)), isolation, seconds=20)
    assert outcome.passed, outcome.output
    found = outcome.output.splitlines()
    assert len(found) == len(ways), outcome.output
    return found


HOOKLESS = ("    sys.addaudithook(_auditor(readable))\n", "")
"""What takes the audit hook away: only the kernel's filters are left to say no."""


def changed_inside(folder, monkeypatch, before, after):
    """Puts a changed copy of the inside into the sandbox's place."""
    text = sandbox._CHILD.read_text()
    assert before in text
    child = folder / "child.py"
    child.write_text(text.replace(before, after))
    wire = sandbox._CHILD.with_name("sandbox_wire.py")
    (folder / wire.name).write_text(wire.read_text())
    monkeypatch.setattr(sandbox, "_CHILD", child)


def test_nothing_runs_unless_allowed(tmp_path):
    with pytest.raises(UserError, match="allow_code_execution"):
        run_python("pass")
    # Only True will do, not something that happens to be true.
    with pytest.raises(UserError, match="allow_code_execution"):
        run_python("pass", allow_code_execution="yes")


@pytest.mark.parametrize(
    "bad", [{"seconds": 0}, {"memory_mb": -1}, {"max_output": 0}, {"isolation": "none"}]
)
def test_limits_are_checked(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        run_python("pass", allow_code_execution=True, **bad)


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_a_right_program_passes_and_its_output_comes_back(isolation):
    program = "import math, typing, collections, re\nprint(math.isqrt(50))"
    outcome = run(program, isolation)
    assert outcome == sandbox.Outcome(Ending.PASSED, "7")


@pytest.mark.parametrize(
    ("program", "word"),
    [
        ("assert 1 + 1 == 3", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("raise ValueError('no')", "ValueError: no"),
        # Leaving before the tests is no success, whatever the status.
        ("import sys\nsys.exit(0)\nassert False", "SystemExit"),
        ("import os\nos._exit(0)\nassert False", ""),
    ],
)
def test_a_wrong_program_fails(program, word):
    outcome = run(program)
    assert outcome.ending is Ending.FAILED
    assert word in outcome.output


def test_nobody_reads_what_is_not_there():
    assert "EOFError" in run("input()").output
    # No packages of the surrounding environment.
    assert "ModuleNotFoundError" in run("import numpy").output
    assert run(
        "import os\nassert set(os.environ) <= {'LC_CTYPE'} and not os.listdir()"
    ).passed


def test_an_endless_loop_ends_in_time():
    start = time.monotonic()
    assert run("while True: pass", seconds=0.7).ending is Ending.TIMEOUT
    # One second of processor time ends a program that catches everything, too.
    assert time.monotonic() - start < 5
    sleeper = "import time\nwhile True:\n try: time.sleep(9)\n except BaseException: 0"
    assert run(sleeper, seconds=0.5).ending is Ending.TIMEOUT


def test_ten_gigabytes_are_refused():
    outcome = run("x = bytearray(10 * 2**30)")
    assert outcome.ending is Ending.MEMORY
    assert run("x = bytearray(10 * 2**20)").passed


def test_endless_output_is_cut():
    outcome = run("while True: print('x' * 1000)", max_output=10_000)
    assert outcome.ending is Ending.OUTPUT
    assert len(outcome.output) <= 10_000


def test_a_crash_is_no_pass():
    crash = "import faulthandler\nfaulthandler._sigsegv()"
    assert run(crash).ending is Ending.KILLED


FORK_BOMB = """
import os, time
try:
    while True:
        os.fork()
except OSError:
    pass
{after}
"""


def left_running(mark):
    """Processes with a mark in their command line, but those of another test worker.

    What loses its parent is the init process's, so those are counted.
    """
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "cmdline").read_text():
                above = ancestors(int(entry.name))
                if os.getpid() in above or len(above) == 1:
                    found.append(entry.name)
        except OSError:
            continue
    return found


def ancestors(process):
    """Parent, its parent and so on."""
    above = []
    while process > 1:
        # After the name, which is in brackets and may hold anything: state and parent.
        rest = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2]
        process = int(rest.split()[1])
        above.append(process)
    return above


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_a_fork_bomb_starts_no_process(isolation):
    outcome = run(FORK_BOMB.format(after="raise SystemExit('no process')"), isolation)
    assert outcome.ending is Ending.FAILED
    assert "no process" in outcome.output
    if Path("/proc").is_dir():
        assert not left_running("sandbox_child")


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_other_ways_to_start_something_fail(isolation):
    ways = (
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import multiprocessing; multiprocessing.Process(target=print).start()",
        "import ctypes; ctypes.CDLL(None)",
    )
    assert not [way for way in ended(ways, isolation) if way.startswith("done")]


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_files_stay_as_they_are(isolation, tmp_path):
    target = tmp_path / "kept.txt"
    target.write_text("before")
    os.chmod(tmp_path, 0o777)
    os.chmod(target, 0o666)
    ways = (
        "open({path!r}, 'w')",
        "open({path!r}, 'a')",
        "open({path!r}, 'r+')",
        "import os; os.open({path!r}, os.O_WRONLY)",
        "import os; os.truncate({path!r}, 0)",
        "import os; os.remove({path!r})",
        "import os; os.rename({path!r}, {path!r} + '.old')",
        "import os; os.chmod({path!r}, 0)",
        "import os; os.symlink('/etc', {path!r} + '.link')",
        "import os; os.mkdir({path!r} + '.folder')",
        "import pathlib; pathlib.Path({path!r}).write_text('after')",
        "import shutil; shutil.rmtree({folder!r})",
    )
    ways = [way.format(path=str(target), folder=str(tmp_path)) for way in ways]
    assert not [way for way in ended(ways, isolation) if way.startswith("done")]
    assert target.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"]


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_no_socket_reaches_anybody(isolation):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        port = server.getsockname()[1]
        program = f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)"
        assert run(program, isolation).ending is Ending.FAILED
        with pytest.raises(TimeoutError):
            server.accept()


@needs_kernel
def test_the_kernel_allows_no_thread():
    program = "import threading; threading.Thread(target=print).start()"
    assert "can't start new thread" in run(program, "kernel").output


CALLS = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for call in {calls!r}:
    ctypes.set_errno(0)
    assert eval(call) == -1, call
    assert ctypes.get_errno() == 1, (call, ctypes.get_errno())
"""


@needs_kernel
def test_the_kernel_refuses_where_the_hook_is_gone(tmp_path, monkeypatch):
    changed_inside(tmp_path, monkeypatch, *HOOKLESS)
    target = tmp_path / "kept.txt"
    target.write_text("before")
    path = repr(str(target).encode())
    calls = [
        "libc.fork()",
        "libc.socket(2, 1, 0)",
        f"libc.open({path}, 1)",
        f"libc.unlink({path})",
        f"libc.kill({os.getpid()}, 0)",
        "libc.setuid(0)",
        "libc.unshare(0x10000000)",
        "libc.syscall(435, 0, 0)",  # clone3
        "libc.syscall(425, 1, 0)",  # io_uring_setup
        f"libc.syscall(437, -100, {path}, 0, 0)",  # openat2
        "libc.syscall(319, b'x', 0)",  # memfd_create
        "libc.prlimit(0, 7, 0, 0)",
    ]
    outcome = run(CALLS.format(calls=calls), "kernel")
    assert outcome.passed, outcome.output
    assert target.read_text() == "before"


@needs_kernel
def test_the_filter_test_can_fail(tmp_path, monkeypatch):
    # The same program is not refused where there is neither filter nor hook.
    changed_inside(tmp_path, monkeypatch, *HOOKLESS)
    program = "import ctypes\nassert ctypes.CDLL(None).socket(2, 1, 0) == -1"
    assert run(program, "audit").ending is Ending.FAILED
    assert run(program, "kernel").passed


def test_a_sandbox_that_cannot_be_set_up_is_no_failed_program(tmp_path, monkeypatch):
    changed_inside(tmp_path, monkeypatch, "def _limit(", "def _unlimited(")
    with pytest.raises(UserError, match=r"did not start.*NameError"):
        run("pass")


def test_folders_are_removed(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run("import os; print(os.getcwd())").output.startswith(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_many_keep_their_order():
    programs = [f"print({i})\nassert {i} % 2" for i in range(6)]
    outcomes = run_many(
        programs, allow_code_execution=True, seconds=10, isolation="audit"
    )
    assert [o.output.splitlines()[0] for o in outcomes] == list("012345")
    assert [o.passed for o in outcomes] == [False, True] * 3


@pytest.mark.thorough
@needs_data
def test_every_canonical_solution_passes_and_none_without_its_body():
    tasks = load_evalset("humaneval", DATA)
    right = [humaneval_program(task, task.solution) for task in tasks]
    wrong = [humaneval_program(task, "    return None\n") for task in tasks[:12]]
    outcomes = run_many(
        [*right, *wrong],
        allow_code_execution=True,
        seconds=20.0,
        isolation=ISOLATIONS[-1],
    )
    failed = [t.id for t, o in zip(tasks, outcomes, strict=False) if not o.passed]
    assert len(tasks) == 164
    assert failed == []
    assert not any(o.passed for o in outcomes[len(tasks) :])
