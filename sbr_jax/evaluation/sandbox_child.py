"""The inside of the sandbox: a judge, and a worker that runs one program for it.

:mod:`sbr_jax.evaluation.sandbox` starts it as a script of a fresh interpreter without
environment. It reads its orders as JSON from standard input and imports only the
standard library. The worker is forked before the judge reads its secrets: the token
that marks success, and the check. Both give up their privileges before they begin.
"""

import ctypes
import io
import json
import os
import resource
import signal
import struct
import sys

# An isolated interpreter does not search its script's folder. Other files there (a
# module `code`) must not replace modules of the library.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import sandbox_wire as wire

del sys.path[0]

PASSED, FAILED, MEMORY, SIGNALLED = 0, 1, 3, 128
"""The judge's exit codes; a signal that ended the worker is added to the last."""

# System calls a program of pure Python needs to read, compute and print (x86-64).
_ALLOWED = {
    "read": 0,
    "write": 1,
    "close": 3,
    "stat": 4,
    "fstat": 5,
    "lstat": 6,
    "poll": 7,
    "lseek": 8,
    "mmap": 9,
    "mprotect": 10,
    "munmap": 11,
    "brk": 12,
    "rt_sigaction": 13,
    "rt_sigprocmask": 14,
    "rt_sigreturn": 15,
    "pread64": 17,
    "readv": 19,
    "writev": 20,
    "access": 21,
    "select": 23,
    "sched_yield": 24,
    "mremap": 25,
    "madvise": 28,
    "dup": 32,
    "nanosleep": 35,
    "getpid": 39,
    "exit": 60,
    "uname": 63,
    "getcwd": 79,
    "readlink": 89,
    "gettimeofday": 96,
    "getrusage": 98,
    "sysinfo": 99,
    "times": 100,
    "getuid": 102,
    "getgid": 104,
    "geteuid": 107,
    "getegid": 108,
    "getppid": 110,
    "sigaltstack": 131,
    "gettid": 186,
    "time": 201,
    "futex": 202,
    "sched_getaffinity": 204,
    "getdents64": 217,
    "restart_syscall": 219,
    "clock_gettime": 228,
    "clock_getres": 229,
    "clock_nanosleep": 230,
    "exit_group": 231,
    "newfstatat": 262,
    "readlinkat": 267,
    "faccessat": 269,
    "pselect6": 270,
    "getcpu": 309,
    "getrandom": 318,
    "statx": 332,
    "rseq": 334,
    "faccessat2": 439,
}
# Calls allowed for some arguments only: (number, argument's place, values or mask).
_OPEN, _OPENAT, _IOCTL, _FCNTL = 2, 257, 16, 72
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_TERMINAL_QUESTIONS = (0x5401, 0x5450, 0x5451)  # TCGETS, FIONCLEX, FIOCLEX
_DESCRIPTOR_FLAGS = (0, 1, 2, 3, 1030)  # F_DUPFD, F_[GS]ETFD, F_GETFL, F_DUPFD_CLOEXEC

_LOAD, _EQUAL, _ABOVE, _BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_YES, _NO, _DIE = 0x7FFF0000, 0x00050000 | 1, 0x80000000  # allow, EPERM, kill process
_ARCHITECTURE = 0xC000003E  # AUDIT_ARCH_X86_64
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
_TIMER_CREATE, _TIMER_SETTIME = 222, 223
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_READ_FILE, _READ_FOLDER = 1 << 2, 1 << 3
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
"""Number of rights that each version of Landlock knows; 16 from the fifth on."""
_WAIT = {"wait4": 61}
"""The judge's rights beyond the worker's: to learn how the worker ended."""


def _readable() -> list[str]:
    """Folders of the standard library, and the empty working folder."""
    base = sys.base_prefix
    found = [*sys.path, f"{base}/lib", f"{base}/lib64", os.getcwd()]
    found += ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib"]
    found += ["/nix/store", "/usr/share/zoneinfo", "/etc/localtime"]
    found += ["/etc/ld.so.cache", "/dev/null", "/dev/urandom"]
    return [os.path.realpath(path) for path in found if path and os.path.exists(path)]


def _system_call(number: int, *args) -> int:
    """Makes a system call that the C library has no function for."""
    libc = ctypes.CDLL(None, use_errno=True)
    plain = (ctypes.c_long(a) if isinstance(a, int) else a for a in args)
    result = libc.syscall(ctypes.c_long(number), *plain)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(number))
    return result


def _hide_files(readable: list[str]) -> None:
    """Forbids by Landlock to open anything but these, other processes above all."""
    version = _system_call(_LANDLOCK_CREATE, None, 0, 1)
    rights = (1 << _FILE_RIGHTS.get(version, 16)) - 1
    rules = _system_call(_LANDLOCK_CREATE, struct.pack("Q", rights), 8, 0)
    for path in readable:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed = _READ_FILE | (_READ_FOLDER if os.path.isdir(path) else 0)
        _system_call(_LANDLOCK_ADD, rules, 1, struct.pack("=Qi", allowed, place), 0)
        os.close(place)
    _system_call(_LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)


def _die_with(parent: int) -> None:
    """Ends this process when its parent ends, for whatever reason."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # It had ended before.
        os._exit(FAILED)


def _set_alarm(seconds: float, kernel: bool) -> None:
    """Ends this process after a time, in case nobody outside does."""
    if not kernel:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        return
    # The timer's signal is SIGKILL, which no handler or mask can stop.
    event = struct.pack("=qii48x", 0, int(signal.SIGKILL), 0)
    timer = ctypes.c_int()
    _system_call(_TIMER_CREATE, 1, event, ctypes.byref(timer))
    whole = struct.pack("=qqqq", 0, 0, int(seconds), int(seconds % 1 * 1e9))
    _system_call(_TIMER_SETTIME, timer.value, 0, whole, None)


def _filter(more: dict[str, int]) -> bytes:
    """The filter as BPF: allow the listed calls, answer EPERM to all others."""
    code: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, _ARCHITECTURE),
        (_RETURN, 0, 0, _DIE),
        (_LOAD, 0, 0, 0),
    ]
    # The x32 calling convention numbers the same calls differently.
    code += [(_ABOVE, 0, 1, 0x40000000), (_RETURN, 0, 0, _DIE)]
    for number in (*_ALLOWED.values(), *more.values()):
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _YES)]
    for number, place in ((_OPEN, 1), (_OPENAT, 2)):
        code += [
            (_EQUAL, 0, 4, number),
            (_LOAD, 0, 0, 16 + 8 * place),
            (_BITS, 0, 1, _WRITING),
            (_RETURN, 0, 0, _NO),
            (_RETURN, 0, 0, _YES),
        ]
    for number, values in (
        (_IOCTL, _TERMINAL_QUESTIONS),
        (_FCNTL, _DESCRIPTOR_FLAGS),
    ):
        code += [(_EQUAL, 0, 2 + 2 * len(values), number), (_LOAD, 0, 0, 16 + 8)]
        for value in values:
            code += [(_EQUAL, 0, 1, value), (_RETURN, 0, 0, _YES)]
        code += [(_RETURN, 0, 0, _NO)]
    code += [(_RETURN, 0, 0, _NO)]
    return b"".join(struct.pack("HBBI", *line) for line in code)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def _prctl(option: int, first: int, second: object = 0) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, first, second, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl", str(option))


def _install_filters(readable: list[str], more: dict[str, int]) -> None:
    """Permanently installs both filters, for files and for system calls."""
    code = _filter(more)
    program = _Program(len(code) // 8, code)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_DUMPABLE, 0)
    _hide_files(readable)
    _prctl(_PR_SET_SECCOMP, 2, ctypes.byref(program))


def _limit(memory: int, seconds: int) -> None:
    """Sets resource limits; once the filter is on, none can be raised."""
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for name, value in limits.items():
        resource.setrlimit(name, (value, value))
    # Soft below hard, so that running out of processor time has its own signal.
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))


_REFUSED = (
    "ctypes.",
    "fcntl.",
    "ftplib.",
    "http.",
    "mmap.",
    "os.",
    "pty.",
    "resource.",
    "shutil.",
    "signal.pthread_kill",
    "smtplib.",
    "socket.",
    "subprocess.",
    "syslog.",
    "tempfile.",
    "urllib.",
    "_posixsubprocess.",
)
_HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.putenv", "os.unsetenv")
_LOOKING = ("os.listdir", "os.scandir")


def _auditor(readable: list[str]):
    """Raises what the kernel would refuse as Python errors (or stands in for it)."""

    def check_place(path) -> None:
        if isinstance(path, int):
            return
        whole = os.path.realpath(os.fsdecode(path or "."))
        if not any(whole == p or whole.startswith(p + os.sep) for p in readable):
            raise PermissionError("the sandbox refuses to read files")

    def audit(event: str, args: tuple) -> None:
        if event == "open":
            path, mode, flags = args
            writing = isinstance(mode, str) and set(mode) & set("wax+")
            if writing or (isinstance(flags, int) and flags & _WRITING):
                raise PermissionError("the sandbox refuses to write files")
            check_place(path)
        elif event in _LOOKING:
            check_place(args[0])
        elif event.startswith(_REFUSED) and not event.startswith(_HARMLESS):
            raise PermissionError(f"the sandbox refuses {event}")

    return audit


def _enclose(orders: dict, readable: list[str], more: dict[str, int]) -> None:
    """Gives up this process's privileges."""
    _limit(orders["memory"], orders["cpu_seconds"])
    _set_alarm(orders["alarm"], orders["kernel"])
    if orders["kernel"]:
        _install_filters(readable, more)


def _work(orders: dict, judge: int, inbox: int, outbox: int) -> None:
    """Runs the program, then its function as often as the judge asks."""
    _die_with(judge)
    readable = _readable()
    _enclose(orders, readable, {})
    program, entry_point = orders["program"], orders["entry_point"]
    for name in [
        m for m in sys.modules if m.partition(".")[0] in ("ctypes", "_ctypes")
    ]:
        del sys.modules[name]
    sys.addaudithook(_auditor(readable))
    wire.send(outbox, "ready")
    wire.receive(inbox)
    namespace = {"__name__": "__main__", "__builtins__": __builtins__}

    def answered(call) -> dict:
        message = wire.answer(call)
        # Flush first: what the program printed comes before its answer.
        flushed = wire.answer(sys.stdout.flush)
        return message if "value" in flushed else flushed

    def reply(call) -> None:
        try:
            wire.send(outbox, answered(call))
        except (RuntimeError, MemoryError) as error:  # The answer is too long.
            wire.send(outbox, wire.complaint(error))

    def whole() -> None:
        exec(compile(program, "<program>", "exec"), namespace)

    def function(*args, **kwargs):
        return namespace[entry_point](*args, **kwargs)

    reply(whole)
    while True:
        args, kwargs = map(wire.decode, wire.receive(inbox))
        reply(lambda a=args, k=kwargs: function(*a, **k))


def _judge(secrets: dict, worker: int, inbox: int, outbox: int) -> int:
    """Runs the check against the worker's function; returns an exit code."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    # A message about an answer may quote text that cannot be encoded.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        wire.receive(inbox)
        os.write(1, secrets["begun"].encode())
        wire.send(outbox, "go")
        wire.value_of(wire.receive(inbox))
        if secrets["check"]:
            exec(compile(secrets["setup"], "<setup>", "exec"), namespace)
            # The check may call the function by either name.
            call = wire.remote(inbox, outbox)
            namespace[secrets["entry_point"]] = call
            exec(compile(secrets["check"], "<check>", "exec"), namespace)
        sys.stdout.flush()
    except wire.Gone:
        for pipe in (inbox, outbox):
            os.close(pipe)
        _, status = os.waitpid(worker, 0)
        signalled = os.WIFSIGNALED(status)
        return SIGNALLED + os.WTERMSIG(status) if signalled else FAILED
    except BaseException as error:  # Any exception is the result.
        print(": ".join(wire.complaint(error)["raised"]), flush=True)
        code = MEMORY if isinstance(error, MemoryError) else FAILED
    else:
        code = PASSED
    # Without its judge the worker ends, even in the middle of an answer; its last
    # output comes before the verdict.
    for pipe in (inbox, outbox):
        os.close(pipe)
    os.waitpid(worker, 0)
    return code


def main() -> None:
    """Reads the orders, forks the worker and judges it."""
    orders = json.loads(sys.stdin.buffer.read())
    sealed = int(sys.argv[1])
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    _die_with(orders["parent"])
    judge = os.getpid()
    (calls, to_worker), (answers, to_judge) = os.pipe(), os.pipe()
    worker = os.fork()
    if worker == 0:
        for descriptor in (sealed, to_worker, answers):
            os.close(descriptor)
        try:
            _work(orders, judge, calls, to_judge)
        except wire.Gone:
            os._exit(0)
    for descriptor in (calls, to_judge):
        os.close(descriptor)
    with open(sealed, "rb") as note:
        secrets = json.load(note)
    _enclose(orders, _readable(), _WAIT)
    code = _judge(secrets, worker, answers, to_worker)
    if code == PASSED:
        os.write(1, secrets["done"].encode())
    os._exit(code)


if __name__ == "__main__":
    main()
