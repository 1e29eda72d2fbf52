"""What ends a job of several processes, apart from mistakes of the user's."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which is treated as Ctrl-C; exit code 143."""


class Lost(Exception):
    """A process has gone, or does not come; exit code 134, to be started again."""


class Ended(Exception):
    """Another process has ended the job.

    Attributes:
      code: its exit code.
    """

    def __init__(self, code: int, line: str = ""):
        """Keeps the code, and the line that is still to be printed; empty for none."""
        self.code = code
        super().__init__(line)
