"""What a program would have to reach to pass without being right, and does not."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from tasks_case import needs_kernel
from test_sandbox import HOOKLESS, ISOLATIONS, changed_inside, ended, run

from sbr_jax.evaluation import sandbox
from sbr_jax.evaluation import sandbox_wire as wire
from sbr_jax.evaluation.sandbox import Ending, Trial

needs_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux ends a process with its parent"
)
CHECK = """
def check(candidate):
    assert candidate(2) == 3
    assert abs(candidate(0.5) - 1.5) < 1e-6
    assert add_one(7) == 8
    print(end='')
check(add_one)
"""


def judged(program, isolation="audit", check=CHECK, setup="", **options):
    trial = Trial(program, "add_one", setup, check)
    return run(trial, isolation, **options)


def test_a_right_function_passes_and_a_wrong_one_does_not():
    right = "def add_one(x):\n    print('seen', x)\n    return x + 1"
    assert judged(right).passed
    outcome = judged("def add_one(x): return x")
    assert (outcome.ending, outcome.output) == (Ending.FAILED, "AssertionError:")
    assert judged("x = 1").output.startswith("KeyError")
    assert "ZeroDivisionError" in judged("1 / 0").output
    helped = judged(
        right, setup="def h(x): return x + 1", check="assert add_one(1) == h(1)"
    )
    assert helped.passed
    assert helped.output == "seen 1"


FORGERIES = {
    "marker read from frames": """
import os, sys
def every():
    frame = sys._getframe()
    while frame is not None:
        yield from frame.f_locals.values()
        yield from frame.f_globals.values()
        frame = frame.f_back
def add_one(x):
    for value in list(every()):
        for text in value.values() if isinstance(value, dict) else [value]:
            if isinstance(text, (str, bytes)) and len(text) == 33:
                os.write(1, text if isinstance(text, bytes) else text.encode())
                os._exit(0)
    return 0
""",
    "marker found by the collector": """
import gc, os
def add_one(x):
    for thing in gc.get_objects():
        for text in thing.values() if type(thing) is dict else ():
            if isinstance(text, (str, bytes)) and len(text) == 33:
                os.write(1, text if isinstance(text, bytes) else text.encode())
                os._exit(0)
    return 0
""",
    "equal to everything": """
class Equal:
    def __eq__(self, other): return True
    def __sub__(self, other): return self
    def __abs__(self): return 0
def add_one(x): return Equal()
""",
    "a subclass that is equal to everything": """
class Equal(int):
    def __eq__(self, other): return True
    def __sub__(self, other): return 0
    __hash__ = int.__hash__
def add_one(x): return Equal(-5)
""",
    "asserts jumped over": """
import sys
def add_one(x):
    def jump(frame, event, argument):
        if event == 'line':
            for line in range(frame.f_lineno + 9, frame.f_lineno, -1):
                try:
                    frame.f_lineno = line
                    break
                except ValueError:
                    continue
        return jump
    sys._getframe(1).f_trace = jump
    sys.settrace(lambda *_: None)
    return 3
""",
    "built-ins that say yes": """
import builtins
builtins.abs = lambda x: 0
builtins.AssertionError = ValueError
def add_one(x): return 0
""",
    "the check replaced in every namespace": """
import gc
def add_one(x):
    for thing in gc.get_objects():
        if type(thing) is dict and 'check' in thing:
            thing['check'] = lambda candidate: None
    return 0
""",
    "leaving with success": "import os\ndef add_one(x): os._exit(0)",
    "a verdict of its own": """
import os
def add_one(x):
    for pipe in range(32):
        try:
            os.write(pipe, b'\\x02\\0\\0\\0\\0\\0\\0\\0{}')
        except OSError:
            pass
    return 0
""",
    "an exception that ends the judge": "def add_one(x): raise SystemExit(0)",
    "an exception of a name that ends the judge": """
class Gone(BaseException): pass
Gone.__name__ = 'SystemExit'
def add_one(x): raise Gone(0)
""",
}


@pytest.mark.parametrize("forgery", FORGERIES.values(), ids=FORGERIES)
def test_a_forged_verdict_is_a_failure(forgery):
    assert judged(forgery, ISOLATIONS[-1]).ending is Ending.FAILED


@pytest.mark.parametrize(
    "name", ["marker read from frames", "equal to everything", "asserts jumped over"]
)
def test_the_forgeries_work_where_nothing_keeps_them_apart(name):
    # In one process with its check, as it was: so the test above can fail.
    program = f"{FORGERIES[name]}\nbegun = done = '0' * 33\n{CHECK}\n"
    program += "print('came to its end')"
    outcome = run(program)
    assert "came to its end" in outcome.output or "0" * 33 in outcome.output


# --- secrets of others ----------------------------------------------------------------

SECRET = "a-token-that-no-program-may-read"
READ = [
    "open(f'/proc/{os.getppid()}/environ').read()",
    "open('/proc/{pid}/environ').read()",
    "open(f'/proc/{os.getppid()}/mem', 'rb').read(1)",
    "open('/proc/{pid}/mem', 'rb').seek(2**20)",
    "open(f'/proc/{os.getppid()}/maps').read()",
    "open('/proc/{pid}/cmdline').read()",
    "open('/proc/self/environ').read()",
    "os.listdir(f'/proc/{os.getppid()}/fd')",
    "os.listdir('/proc')",
    "open({path!r}).read()",
    "os.read(os.open({path!r}, os.O_RDONLY), 9)",
    "os.listdir({folder!r})",
    "open('/etc/passwd').read()",
    "open('/usr/lib/../../etc/passwd').read()",
]


@pytest.mark.parametrize("hook", [True, False], ids=["hook", "kernel alone"])
def test_nothing_of_others_can_be_read(hook, tmp_path, monkeypatch):
    if not hook:
        if not sandbox.kernel_isolation():
            pytest.skip("no Landlock in this kernel: files are not hidden")
        changed_inside(tmp_path, monkeypatch, *HOOKLESS)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    target = tmp_path / "secret.txt"
    target.write_text(SECRET)
    names = {"{pid}": os.getpid(), "{path!r}": repr(str(target))}
    ways = []
    for way in READ:
        for name, value in {**names, "{folder!r}": repr(str(tmp_path))}.items():
            way = way.replace(name, str(value))
        ways.append(f"import os\nprint({way})")
    found = ended(ways, "audit" if hook else "kernel")
    assert found == ["PermissionError"] * len(READ)


@needs_kernel
def test_links_of_other_processes_cannot_be_followed(tmp_path, monkeypatch):
    changed_inside(tmp_path, monkeypatch, *HOOKLESS)
    program = f"import os\nprint(os.readlink('/proc/{os.getpid()}/cwd'))"
    assert "PermissionError" in run(program, "kernel").output


# --- plain data -----------------------------------------------------------------------

VALUES = [
    None,
    True,
    -(2**70),
    10**5000,
    0.1,
    float("inf"),
    "é\ud800\0",
    b"\xff",
    bytearray(b"x"),
    2 - 1j,
    [1, (2, [3.0]), {4}, frozenset({5})],
    {1: "a", (1, 2): None, "x": {"y": []}},
    {},
    (),
    [[], [[]], ()],
]


@pytest.mark.parametrize(
    "value", VALUES, ids=lambda v: ascii(v)[:40] if v != 10**5000 else "long"
)
def test_plain_data_comes_back_as_it_was(value):
    ours, theirs = os.pipe()
    wire.send(theirs, wire.encode(value))
    found = wire.decode(wire.receive(ours))
    os.close(theirs)
    assert found == value
    assert type(found) is type(value)
    with pytest.raises(wire.Gone):
        wire.receive(ours)
    os.close(ours)


def test_what_is_no_plain_data_is_equal_to_nothing():
    class Liar(str):
        def __eq__(self, other):
            return True

        __hash__ = str.__hash__

    sent = wire.decode(wire.encode(Liar("x")))
    assert type(sent) is str
    assert sent != "y"
    for value in (object(), range(3), map(int, "012"), {"a": 1}.keys()):
        found = wire.decode(wire.encode(value))
        assert found not in ([0, 1, 2], range(3), {"a"}, None)
    assert list(wire.decode(wire.encode(range(3)))) == [0, 1, 2]


@pytest.mark.parametrize(
    "message",
    [
        {"value": {"eval": "1"}},
        {"value": [{"eval": "1"}]},
        {"value": [{"list": 3}]},
        {"value": [1, {"list": -1}]},
        {"value": [1, {"list": True}]},
        {"value": [[1]]},
        {"value": [1, 2]},
        {"value": []},
        {"value": [1, {"dict": 1}]},
        {"value": [{"int": "x"}]},
        {"value": [{"int": 1}]},
        {"value": [{"complex": [1] * 3}]},
        {"value": [{"opaque": []}]},
        {"value": 1, "raised": []},
        {"raised": [1, 2, 3]},
        3,
        None,
    ],
    ids=repr,
)
def test_what_is_no_answer_is_an_error(message):
    with pytest.raises(RuntimeError):
        wire.value_of(message)


DEEP = "r = []\nfor _ in range({}): r = [r]\n"
FLATTEN = "r, n = f(1), 0\nwhile r: r, n = r[0], n + 1\n"
JUDGED = {
    "a long integer": ("return 10**5000", "assert f(1) == 10**5000", ""),
    "a long integer asked": ("return x + 1", "assert f(10**5000) % 10 == 1", ""),
    "a wrong long integer": ("return 10**5000", "assert f(1) == 1", "AssertionError:"),
    "not a number": ("return float('nan')", "assert f(1) != f(1)", ""),
    "deep": (DEEP.format(9000) + "return r", FLATTEN + "assert n == 9000", ""),
    "deep, and little room": (
        "import sys\nsys.setrecursionlimit(60)\n" + DEEP.format(90) + "return r",
        FLATTEN + "assert n == 90",
        "",
    ),
    "holding itself": (
        "r = [1]\nr.append(r)\nreturn r",
        "assert f(1)[0] == 1 and f(1) != [1]",
        "",
    ),
    "half a character raised": (
        "raise ValueError('\\ud800')",
        "f(1)",
        r"ValueError: \ud800",
    ),
    "half a character named": (
        "raise type('E', (Exception,), {'__name__': '\\ud800'})('no')",
        "f(1)",
        "E: no",
    ),
    "a key that only its class can hash": (
        "class H(list): __hash__ = lambda self: 1\nreturn {H([1]): 1, (H(),): 2}",
        "assert len(f(1)) == 2 and sorted(f(1).values()) == [1, 2]",
        "",
    ),
    "members that only their class can hash": (
        "class H(list): __hash__ = lambda self: 1\nreturn {H([1])}",
        "assert len(f(1)) == 1 and f(1) != {1}",
        "",
    ),
    "a class": ("return list", "assert f(1) is not None", ""),
    "groups that last until the next": (
        "import itertools\nreturn itertools.groupby('aab')",
        "assert [(k, list(g)) for k, g in f(1)] == [('a', ['a'] * 2), ('b', ['b'])]",
        "",
    ),
}


@pytest.mark.parametrize(("body", "check", "said"), JUDGED.values(), ids=JUDGED)
def test_the_check_alone_judges_an_answer(body, check, said):
    program = "def f(x):\n" + textwrap.indent(body, "    ")
    outcome = run(Trial(program, "f", "", check), seconds=20)
    assert (outcome.output, outcome.passed) == (said, not said)


SHOUT = """
import os
for pipe in range(3, 32):
    try:
        os.write(pipe, b'\\xff' * 2**20)
    except OSError:
        pass
"""


@pytest.mark.parametrize(
    ("body", "check"),
    [
        ("return 'a' * (65 * 2**20)", "f(1)"),
        ("return 1", "f('a' * (65 * 2**20))"),
        (SHOUT, "f(1)"),
    ],
    ids=["an answer", "a question", "what is no message"],
)
def test_a_message_that_is_too_long_is_a_failure_at_once(body, check):
    # No worker that is still writing is waited for until its time is over.
    code = "def f(x):\n" + textwrap.indent(body, "    ")
    outcome = run(Trial(code, "f", "", check), seconds=20)
    assert outcome.ending is Ending.FAILED
    assert outcome.output.startswith("RuntimeError: a message of")


# --- nothing left behind --------------------------------------------------------------

STARTER = """
import importlib.util, sys, types
parent, typing = types.ModuleType("sbr_jax"), types.ModuleType("sbr_jax.typing")
typing.UserError = ValueError
sys.modules |= {{"sbr_jax": parent, "sbr_jax.typing": typing}}
spec = importlib.util.spec_from_file_location("sandbox", {path!r})
sandbox = sys.modules["sandbox"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sandbox)
sandbox.run_python(
    {program!r}, allow_code_execution=True, seconds=300, isolation={isolation!r}
)
"""
SLEEPER = "import signal, time\nsignal.signal({name}, signal.SIG_IGN)\ntime.sleep(300)"


def inside(mark):
    """Processes whose parent is a mark, or whose parent's parent is."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (
                    (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                )
            except OSError:
                continue
            if state != "Z":
                found[int(entry.name)] = int(parent)
    children = [pid for pid, parent in found.items() if parent == mark]
    return children + [pid for pid, parent in found.items() if parent in children]


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]
    except OSError:
        return False


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


@needs_linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_program_ends_with_who_started_it(number):
    starter = STARTER.format(
        path=sandbox.__file__,
        program=SLEEPER.format(name="signal.SIGTERM"),
        isolation=ISOLATIONS[-1],
    )
    process = subprocess.Popen([sys.executable, "-S", "-c", starter])
    try:
        found = wait_for(lambda: len(p := inside(process.pid)) == 2 and p)
        assert found, "judge and worker never began"
        process.send_signal(number)
        process.wait(10)
        assert wait_for(lambda: not any(map(alive, found)))
    finally:
        process.kill()


@needs_linux
def test_a_program_ends_by_its_own_alarm(tmp_path, monkeypatch):
    # Nobody outside keeps time here, and it refuses to hear the alarm.
    began = time.monotonic()
    real = sandbox._watch
    monkeypatch.setattr(sandbox, "_watch", lambda p, b, s, m: real(p, b, 60.0, m))
    monkeypatch.setattr(sandbox, "START_SECONDS", 1.0)
    sleeper = SLEEPER.format(name="signal.SIGALRM")
    outcome = run(sleeper, ISOLATIONS[-1], seconds=0.2)
    assert not outcome.passed
    assert time.monotonic() - began < 20
