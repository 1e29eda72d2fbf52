"""The inside of the sandbox: gives up what it may do, then runs one program.

Started by :mod:`sbr_jax.evaluation.sandbox` as a script of a fresh interpreter; reads
its orders as JSON from standard input and imports nothing outside the standard library.
"""

import ctypes
import json
import os
import resource
import struct
import sys

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
# Calls that are allowed for some arguments: (number, argument's place, values or mask).
_OPEN, _OPENAT, _IOCTL, _FCNTL = 2, 257, 16, 72
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_TERMINAL_QUESTIONS = (0x5401, 0x5450, 0x5451)  # TCGETS, FIONCLEX, FIOCLEX
_DESCRIPTOR_FLAGS = (0, 1, 2, 3, 1030)  # F_DUPFD, F_[GS]ETFD, F_GETFL, F_DUPFD_CLOEXEC

_LOAD, _EQUAL, _ABOVE, _BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_YES, _NO, _DIE = 0x7FFF0000, 0x00050000 | 1, 0x80000000  # allow, EPERM, kill process
_ARCHITECTURE = 0xC000003E  # AUDIT_ARCH_X86_64
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _PR_SET_DUMPABLE = 22, 38, 4


def _filter() -> bytes:
    """The filter as BPF: allow what is listed, answer EPERM to all else."""
    code: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, _ARCHITECTURE),
        (_RETURN, 0, 0, _DIE),
        (_LOAD, 0, 0, 0),
    ]
    # The x32 calling convention has other numbers for the same calls.
    code += [(_ABOVE, 0, 1, 0x40000000), (_RETURN, 0, 0, _DIE)]
    for number in _ALLOWED.values():
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


def _install_filter() -> None:
    """Puts the filter on this process, for good."""
    libc = ctypes.CDLL(None, use_errno=True)
    code = _filter()
    program = _Program(len(code) // 8, code)
    calls = (
        (_PR_SET_NO_NEW_PRIVS, 1, 0),
        (_PR_SET_DUMPABLE, 0, 0),
        (_PR_SET_SECCOMP, 2, ctypes.byref(program)),
    )
    for option, first, second in calls:
        if libc.prctl(option, first, second, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl", str(option))


def _limit(memory: int, seconds: int) -> None:
    """Resource limits; none can be raised again once the filter is on."""
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for name, value in limits.items():
        resource.setrlimit(name, (value, value))
    # Apart, so that the end of processor time has its own signal.
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


def _audit(event: str, args: tuple) -> None:
    """Says in Python's words what the kernel would refuse (and stands in for it)."""
    if event == "open":
        _, mode, flags = args
        writing = isinstance(mode, str) and set(mode) & set("wax+")
        if writing or (isinstance(flags, int) and flags & _WRITING):
            raise PermissionError("the sandbox refuses to write files")
    elif event.startswith(_REFUSED) and not event.startswith(_HARMLESS):
        raise PermissionError(f"the sandbox refuses {event}")


def main() -> None:
    """Reads the orders, gives up everything, runs the program, reports."""
    orders = json.loads(sys.stdin.buffer.read())
    program = orders["program"]
    begun, done = orders["begun"].encode(), orders["done"].encode()
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    report = os.dup(1)
    _limit(orders["memory"], orders["cpu_seconds"])
    if orders["kernel"]:
        _install_filter()
    orders.clear()
    for name in [
        m for m in sys.modules if m.partition(".")[0] in ("ctypes", "_ctypes")
    ]:
        del sys.modules[name]
    sys.addaudithook(_audit)
    os.write(report, begun)
    status = 1
    try:
        code = compile(program, "<program>", "exec")
        exec(code, {"__name__": "__main__", "__builtins__": __builtins__})
        status = 0
    except SystemExit as error:
        print(f"SystemExit: {error.code}", flush=True)
    except BaseException as error:  # Whatever it was, it is the result.
        print(f"{type(error).__name__}: {str(error)[:500]}", flush=True)
    if status == 0:
        sys.stdout.flush()
        # Only a program that came to its end gets here: leaving early is no success.
        os.write(report, done)
    os._exit(status)


if __name__ == "__main__":
    main()
