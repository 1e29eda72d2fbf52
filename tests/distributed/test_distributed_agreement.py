"""Roll call, agreement and ends between processes, played by threads of one."""

import concurrent.futures
import socket
import threading
import time

import pytest

from sbr_jax import progress
from sbr_jax.distributed import logs, meeting, stopping
from sbr_jax.distributed.errors import Ended, Lost, Terminated
from sbr_jax.distributed.links import meet
from sbr_jax.distributed.meeting import Meeting
from sbr_jax.distributed.session import Session, code_of, wait_of
from sbr_jax.typing import UserError

CARD = {"code": "ab12", "command line": ["run", "demo"]}


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def together(*bodies):
    """Calls one body in a thread each; what each gave or raised."""
    with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
        futures = [pool.submit(body) for body in bodies]
        return [future.exception() or future.result() for future in futures]


def call(port, index, count=2, seconds=5.0, names=(), **changes):
    place = Meeting("localhost", port, count, index, names)
    return meet(place, {**CARD, **changes}, seconds)


def roll_call(*cards, count=2, seconds=5.0):
    """Each card is the changes of a process, with its index."""
    port = free_port()
    return together(
        *(lambda c=c: call(port, count=count, seconds=seconds, **c) for c in cards)
    )


def close(*met):
    """Ends what a roll call gave."""
    for links, _ in met:
        for link in links:
            link.close()


@pytest.fixture
def sessions():
    """Three sessions that have met, by index; ended after the test."""
    found = roll_call(*({"index": i} for i in range(3)), count=3)
    made = [Session(i, 3, links, 1.0) for i, (links, _) in enumerate(found)]
    yield made
    for session in made:
        session._left.set()
        for link in session.links:
            link.close()


# --- who is there ---------------------------------------------------------------------


def test_who_is_missing_is_named():
    port, names = free_port(), ("a", "b", "c")
    first, second = together(
        lambda: call(port, 0, 3, 0.5, names), lambda: call(port, 1, 3, 0.5, names)
    )
    assert isinstance(first, UserError)
    assert "2 came within 0 s; missing: process 2 (c): start" in str(first)
    # The one that came is told, and says nothing itself.
    assert isinstance(second, Ended)
    assert (second.code, str(second)) == (2, "")


def test_a_first_process_that_does_not_come_is_named():
    (found,) = roll_call({"index": 1}, seconds=0.2)
    assert isinstance(found, UserError)
    assert "process 0 does not answer at localhost" in str(found)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"code": "cd34"}, "another code than process 0 .*: cd34 there, ab12 here"),
        (
            {"command line": ["run", "demo", "--quiet"]},
            "another command line .*: --quiet there, nothing more here",
        ),
    ],
)
def test_who_differs_is_refused(changes, said):
    first, second = roll_call({"index": 0}, {"index": 1, **changes})
    with pytest.raises(UserError, match=said):
        raise first
    assert (second.code, str(second)) == (2, "")


def test_a_number_given_twice_is_refused():
    found = roll_call({"index": 0}, {"index": 1}, {"index": 1}, count=3)
    assert "expected each process from 1 to 2 once" in str(found[0])


def test_strangers_are_not_counted():
    port = free_port()

    def stranger():
        for said in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"index": "x"}\n', b""):
            while True:
                try:
                    connection = socket.create_connection(("localhost", port))
                    break
                except ConnectionRefusedError:
                    time.sleep(0.01)
            connection.sendall(said)
            connection.close()
        return call(port, 1)

    first, second = together(lambda: call(port, 0), stranger)
    assert first[1] == second[1]
    close(first, second)


# --- agreement ------------------------------------------------------------------------


def test_all_take_the_first_ones_word(sessions):
    def body(session):
        found = [session.decide(lambda: session.index)]
        # A decision inside a decision is of the same process.
        found += session.decide(lambda: [session.decide(lambda: "inner")])
        session.barrier("a place")
        return [*found, session.gather("names", session.index)]

    assert together(*(lambda s=s: body(s) for s in sessions)) == [
        [0, "inner", [0, 1, 2]],
        [0, "inner", []],
        [0, "inner", []],
    ]


def test_laggards_are_named(sessions):
    (found,) = together(lambda: sessions[0].barrier("a place"))
    assert isinstance(found, Lost)
    assert "process 1 (" in str(found)
    assert "process 2 (" in str(found)
    assert "not at a place within 1 s" in str(found)
    assert code_of(found) == 134


def test_who_differs_later_on_is_named(sessions):
    first, *_ = together(
        *(
            lambda s=s: s.require_same("data", "xy"[s.index == 1], "give the same")
            for s in sessions
        )
    )
    with pytest.raises(UserError, match=r"process 1 .* data .* y there, x here; give"):
        raise first


def test_who_goes_is_noticed_at_once(sessions):
    sessions[2]._left.set()
    sessions[2].links[0].close()
    began = time.monotonic()
    (found,) = together(lambda: sessions[0].barrier("a place"))
    assert isinstance(found, Lost)
    assert "process 2" in str(found)
    assert time.monotonic() - began < 0.5


def test_processes_at_different_places_are_a_defect(sessions):
    _, found, _ = together(
        lambda: sessions[0].decide(lambda: 1),
        lambda: sessions[1].links[0].take("elsewhere", 1.0),
        lambda: sessions[2].decide(lambda: 1),
    )
    assert isinstance(found, RuntimeError)


@pytest.mark.parametrize("where", [0, 1])
def test_the_error_of_one_ends_all_and_is_said_once(sessions, where):
    def body(session):
        try:
            if session.index == where:
                raise UserError("no such file")
            session.barrier("a place")
        except (UserError, Ended) as error:
            session.leave(error)
            return error
        return None

    found = together(*(lambda s=s: body(s) for s in sessions))
    assert [code_of(error) for error in found] == [2, 2, 2]
    said = [str(error) for error in found]
    assert sum("no such file" in line for line in said) == 1 + (where > 0)
    # Whoever is not the first says it in its log; the first prints it for all.
    assert "no such file" in said[0]


@pytest.mark.parametrize(("told", "code"), [(None, 134), (143, 143), (1, 1)])
def test_what_fails_because_another_went_is_no_defect_of_its_own(sessions, told, code):
    """Also where the failure is noticed before the other's end is."""

    def go():
        time.sleep(0.3)
        if told is not None:
            sessions[1]._tell(told)
        sessions[1]._left.set()
        sessions[1].links[0].close()

    def fail():
        error = RuntimeError("a collective was cut off")
        try:
            sessions[0].leave(error)
        except (Lost, Ended) as found:
            return found
        return error

    def wait():
        try:
            sessions[2].barrier("a place")
        except Ended as found:
            sessions[2].leave(found)

    _, found, _ = together(go, fail, wait)
    assert code_of(found) == code
    assert ("process 1" in str(found)) == (told is None)


def test_a_process_that_stands_still_ends_itself_with_its_stack(
    sessions, monkeypatch, capfd
):
    codes, ended = [], threading.Event()

    def leave(code):
        codes.append(code)
        ended.set()

    monkeypatch.setattr("sbr_jax.distributed.session.os._exit", leave)
    sessions[0].patience = 0.1
    sessions[0].watch()
    assert ended.wait(5)
    sessions[0]._left.set()
    said = capfd.readouterr().err
    assert codes[0] == 134
    assert "test_a_process_that_stands_still" in said
    assert "in process 0: its stack is in its log" in said
    # The others are told.
    with pytest.raises(Ended):
        sessions[1].decide(lambda: None)


def test_programs_are_waited_for_by_all_but_in_decisions(sessions):
    compiled = "/jax/core/compile/backend_compile_duration"

    def body(session):
        session._main = threading.current_thread()

        def alone():
            session.made_ready(compiled, 0.1)
            return "decided"

        session.made_ready(compiled, 0.1, fun_name="step")
        session.made_ready("another event", 0.1)
        return session.decide(alone)

    assert together(*(lambda s=s: body(s) for s in sessions)) == ["decided"] * 3
    sessions[0]._main = threading.current_thread()
    with pytest.raises(Lost, match="not at compiling step within 1 s"):
        sessions[0].made_ready(compiled, 0.1, fun_name="step")


def test_long_work_stops_between_its_parts_unless_it_saves_itself(
    sessions, monkeypatch
):
    session = sessions[0]
    session._main = threading.current_thread()
    monkeypatch.setattr(session, "poll", lambda: True)
    monkeypatch.setattr(progress, "HEARD", [session.heard])
    with progress.task("answers", 2) as done:
        with stopping.holding():
            done(1)
        with session.alone():
            done(1)
        # In another thread nobody could stop the work.
        assert together(lambda: done(1)) == [None]
        with pytest.raises(Terminated):
            done(2)


@pytest.fixture(autouse=True)
def _no_exit(monkeypatch):
    """Sessions that end badly leave the process of the tests alone."""
    monkeypatch.setattr("sbr_jax.distributed.session.atexit.register", lambda *a: None)


@pytest.mark.parametrize("said", ["", "0", "nan"])
def test_a_wait_that_is_none_is_refused(said, monkeypatch):
    monkeypatch.setenv("SBR_JAX_WAIT", said)
    with pytest.raises(UserError, match="SBR_JAX_WAIT: expected seconds above 0, got"):
        wait_of(1.0)
    monkeypatch.setenv("SBR_JAX_WAIT", "2.5")
    assert wait_of(1.0) == 2.5


# --- folders --------------------------------------------------------------------------


def test_hosts_that_see_another_folder_are_named(sessions, tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "SEEN", 0.3)
    places = [tmp_path / name for name in ("shared", "shared", "own")]
    for place in places:
        place.mkdir(exist_ok=True)
    found = together(
        *(
            lambda s=s, p=p: logs.require_shared(s, p)
            for s, p in zip(sessions, places, strict=True)
        )
    )
    assert isinstance(found[0], UserError)
    assert "process 2" in str(found[0])
    assert "process 1" not in str(found[0])
    assert not [path for place in places for path in place.iterdir()]


# --- where they meet ------------------------------------------------------------------


@pytest.mark.parametrize("option", ["host", "host:8476,2", "host:99999,2,0", ":1,2,0"])
def test_other_words_are_refused(option):
    with pytest.raises(UserError, match="expected auto, off or HOST:PORT,N,I"):
        meeting.find(option)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"TPU_WORKER_HOSTNAMES": "t-0", "TPU_WORKER_ID": "0"}, None),
        (
            {"TPU_WORKER_HOSTNAMES": "t-0,t-1", "TPU_WORKER_ID": "1"},
            Meeting("t-0", 8476, 2, 1, ("t-0", "t-1")),
        ),
        (
            {
                "SLURM_JOB_ID": "4097",
                "SLURM_STEP_NODELIST": "n7,n9",
                "SLURM_NTASKS": "8",
                "SLURM_PROCID": "5",
            },
            Meeting("n7", 61441, 8, 5),
        ),
    ],
)
def test_what_the_machine_says_is_taken(environment, expected, monkeypatch):
    monkeypatch.setattr(meeting.os, "environ", environment)
    monkeypatch.setattr(meeting, "CHIPS", ())
    assert meeting.find("auto") == expected


def test_a_tpu_slice_is_asked_of_its_server(monkeypatch):
    told = {
        "agent-worker-number": "1",
        "worker-network-endpoints": "a:8470:10.0.0.2,b:8470:10.0.0.3",
    }
    monkeypatch.setattr(meeting.os, "environ", {})
    monkeypatch.setattr(meeting, "CHIPS", ("/",))
    monkeypatch.setattr(meeting, "_attribute", told.__getitem__)
    found = meeting.find("auto")
    assert found == Meeting("10.0.0.2", 8476, 2, 1, ("10.0.0.2", "10.0.0.3"))

    def silent(name):
        raise OSError

    monkeypatch.setattr(meeting, "_attribute", silent)
    assert meeting.find("auto") is None


@pytest.mark.parametrize("written", [False, True])
def test_a_process_that_a_thread_ends_leaves_no_empty_folder(
    written, tmp_path, monkeypatch
):
    codes = []
    monkeypatch.setattr("os._exit", codes.append)
    session, folder = Session(0, 1, []), tmp_path / "made"
    folder.mkdir()
    if written:
        (folder / "results.jsonl").touch()
    session.made = folder
    # What happens when another process has ended and this one is slow to notice.
    session._break(Ended(2, ""), 2)
    assert codes == [2]
    assert folder.exists() == written
