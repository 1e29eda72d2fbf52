"""Exceptions that end a job of several processes, other than a user's mistakes."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C; exit code 143."""


class Lost(Exception):
    """A process has gone or did not come; exit code 134, so start the job again."""


class Ended(Exception):
    """Another process has ended the job.

    Attributes:
      code: its exit code.
    """

    def __init__(self, code: int, line: str = ""):
        """Keeps the code, and the line still to be printed (empty for none)."""
        self.code = code
        super().__init__(line)
