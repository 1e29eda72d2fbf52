"""Streams that are closed, full or poor in letters, and signals: one line, no loss."""

import errno
import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from cloud_case import wait_for

from sbr_jax.programs import cli, terminal
from sbr_jax.typing import UserError

TABLE = "medical → legal: 99.1 ± 0.2, 4–9 × 3"


# --- letters --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [
        ("utf-8", TABLE),
        ("ascii", "medical -> legal: 99.1 +/- 0.2, 4-9 x 3"),
        ("latin-1", "medical -> legal: 99.1 ± 0.2, 4-9 × 3"),
    ],
)
def test_every_terminal_gets_every_line(encoding, printed, monkeypatch):
    page = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(page, encoding=encoding))
    assert cli.guarded(lambda: print(TABLE), interrupted="") == 0
    assert page.getvalue().decode(encoding) == printed + "\n"
    assert sys.stdout.errors == "strict"


@pytest.mark.parametrize("text", ["日本", "a\udcffb"])
def test_what_has_no_spelling_is_escaped(text, monkeypatch):
    page = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(page, encoding="latin-1"))
    assert cli.guarded(lambda: print(text), interrupted="") == 0
    assert page.getvalue().isascii()
    assert b"\\" in page.getvalue()


def test_a_complaint_reaches_a_poor_terminal(monkeypatch):
    page = io.BytesIO()
    stream = io.TextIOWrapper(page, encoding="ascii", errors="backslashreplace")
    monkeypatch.setattr(sys, "stderr", stream)

    def program():
        raise UserError("a → b")

    assert cli.guarded(program, interrupted="") == cli.EXIT_USER
    assert page.getvalue() == b"error: a -> b\n"


# --- what the system refuses ----------------------------------------------------------

REFUSED = {
    "full": OSError(errno.ENOSPC, "No space left on device", "a/b"),
    "long": OSError(errno.ENAMETOOLONG, "File name too long", "a/b"),
    "bytes": PermissionError(errno.EACCES, "Permission denied", b"a/b"),
}


@pytest.mark.parametrize("error", REFUSED.values(), ids=REFUSED)
def test_what_the_system_refuses_is_one_line_with_its_place(error, capsys):
    def program():
        raise error

    assert cli.guarded(program, interrupted="") == cli.EXIT_SYSTEM
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "'a/b'" in said
    assert error.strerror in said
    assert ("make room" in said) == (error.errno == errno.ENOSPC)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("lines", [1, 10_000])
def test_a_full_output_is_one_line(lines, monkeypatch, capsys):
    # One line fails as it is flushed, many as they are printed.
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)

        def program():
            for _ in range(lines):
                print("a line of a table")

        assert cli.guarded(program, interrupted="") == cli.EXIT_SYSTEM
        said = capsys.readouterr().err
        assert said.startswith("error: expected to print to standard output, got 'No")
        assert said.count("\n") == 1


def test_a_reader_that_stops_early_is_no_error(monkeypatch, capsys):
    ours, theirs = os.pipe()
    os.close(ours)
    with open(theirs, "w", encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.guarded(lambda: print("a"), interrupted="") == cli.EXIT_PIPE
    assert capsys.readouterr().err == ""


PROGRAM = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("terminal", {path!r})
terminal = importlib.util.module_from_spec(spec)
spec.loader.exec_module(terminal)
with terminal.streams():
    file = open({file!r}, "w")
    try:
        print("a → b")
        sys.stdout.flush()
        code = 0
    except OSError as error:
        terminal.silence_output()
        code = 1
    terminal.complain("a complaint")
    file.write("results")
    file.close()
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("redirection", "code", "out", "err"),
    [
        ("", 0, b"a -> b\n", b"a complaint\n"),
        (">&-", 1, b"", b"a complaint\n"),
        ("<&- >&- 2>&-", 1, b"", b""),
        (">/dev/full", 1, b"", b"a complaint\n"),
        ("2>/dev/full", 0, b"a -> b\n", b""),
    ],
)
def test_a_closed_stream_costs_no_file(redirection, code, out, err, tmp_path):
    if "/dev/full" in redirection and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    file = tmp_path / "results.jsonl"
    text = PROGRAM.format(path=terminal.__file__, file=str(file))
    done = subprocess.run(
        ["sh", "-c", f'"$0" -S -c "$1" {redirection}', sys.executable, text],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)
    assert file.read_text() == "results"


# --- signals --------------------------------------------------------------------------


def test_sigterm_is_an_interrupt_with_a_code_of_its_own(capsys):
    cleaned = []

    def program():
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        try:
            time.sleep(20)
        finally:
            cleaned.append(True)

    assert cli.guarded(program, interrupted="kept") == cli.EXIT_TERMINATED
    assert capsys.readouterr().err == "kept\n"
    assert cleaned
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("other", [signal.SIG_IGN, lambda *_: None])
def test_a_handler_of_somebody_else_stays(other):
    before = signal.signal(signal.SIGTERM, other)
    try:
        seen = []
        cli.guarded(
            lambda: seen.append(signal.getsignal(signal.SIGTERM)), interrupted=""
        )
        assert seen == [other]
        assert signal.getsignal(signal.SIGTERM) is other
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_thread_may_run_a_program():
    codes = []
    thread = threading.Thread(
        target=lambda: codes.append(cli.guarded(lambda: None, interrupted=""))
    )
    thread.start()
    thread.join()
    assert codes == [0]


CHILD = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("terminal", {path!r})
terminal = importlib.util.module_from_spec(spec)
spec.loader.exec_module(terminal)
terminal.end_with_parent()
print("ready", flush=True)
time.sleep(300)
"""
STARTER = """
import os, subprocess, sys, time
child = subprocess.Popen(
    [sys.executable, "-S", "-c", sys.argv[1]],
    env={**os.environ, sys.argv[2]: str(os.getpid())},
)
print(child.pid, flush=True)
time.sleep(300)
"""


def gone(pid):
    try:
        return "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]
    except OSError:
        return True


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux ends a process with its parent"
)
def test_a_process_ends_with_its_parent():
    child = CHILD.format(path=terminal.__file__)
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", STARTER, child, terminal.PARENT],
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        pid = int(process.stdout.readline())
        assert process.stdout.readline() == "ready\n"
        assert not gone(pid)
        process.kill()
        wait_for(lambda: gone(pid))


def test_a_process_whose_parent_is_gone_before_ends(tmp_path):
    child = CHILD.format(path=terminal.__file__)
    done = subprocess.run(
        [sys.executable, "-S", "-c", child],
        env={**os.environ, terminal.PARENT: "1"},
        capture_output=True,
    )
    if sys.platform == "linux":
        assert done.returncode == -signal.SIGKILL
    assert b"ready" not in done.stdout


# --- cells of a sweep -----------------------------------------------------------------

CELL = "import sys, time\nopen(sys.argv[1], 'w').close()\ntime.sleep(300)"


def test_no_cell_outlives_a_sweep(tmp_path, monkeypatch, capfd):
    from sbr_jax.programs import sweep
    from sbr_jax.programs.sweep_state import Sweep

    begun = []
    start = subprocess.Popen

    def started(*args, **options):
        begun.append(start(*args, **options))
        return begun[-1]

    def command(made, name, *, quiet):
        return [sys.executable, "-S", "-c", CELL, str(tmp_path / name)]

    monkeypatch.setattr(sweep.subprocess, "Popen", started)
    monkeypatch.setattr(sweep, "cell_command", command)
    made = Sweep("s", tmp_path, dict.fromkeys("abc"), (0,))

    def program():
        def stop():
            try:
                wait_for(lambda: all((tmp_path / name).exists() for name in "ab"))
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=stop).start()
        sweep.execute_cells(made, 2, quiet=True)

    assert cli.guarded(program, interrupted="kept") == cli.EXIT_TERMINATED
    assert capfd.readouterr().err == "kept\n"
    assert [process.returncode for process in begun] == [-signal.SIGTERM] * 2
    assert not (tmp_path / "c").exists()
