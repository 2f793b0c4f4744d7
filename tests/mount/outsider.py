"""A process that does on a mount what it is told.

For tests that stop the server or keep data dirty: whatever the test's own process starts inherits its descriptors and
closes them, each such close is a flush, and a flush stores, or waits for the server.

Told are Python expressions, built with f-strings and !r; answers are literals. `(fd := os.open(...))` keeps a value.
"""

from __future__ import annotations

import ast
import errno
import select
import subprocess
import sys
from types import TracebackType

ANSWER_S = 60.0
_CHILD = """
import mmap, os, sys, time
names = {"os": os, "mmap": mmap, "time": time}
exec(eval(sys.stdin.readline()), names)
for line in sys.stdin:
    try:
        answer = ("value", eval(eval(line), names))
    except OSError as error:
        answer = ("error", error.errno, str(error))
    except Exception as problem:
        answer = ("bug", repr(problem))
    print(repr(answer), flush=True)
"""


class Outsider:
    """`prelude`: statements to begin with, which may define functions; os, mmap and time are there."""

    def __init__(self, prelude: str = "") -> None:
        command = [sys.executable, "-S", "-E", "-c", _CHILD]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._say(prelude)

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Outsider:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait(ANSWER_S)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def tell(self, expression: str) -> None:
        """Have it begin; `answer` follows."""
        self._say(expression)

    def has_answered(self, within_s: float = 0.0) -> bool:
        assert self._process.stdout is not None
        # An answer is read whole, and none comes unasked: nothing is left in the buffer.
        return bool(select.select([self._process.stdout], [], [], within_s)[0])

    def answer(self, limit_s: float = ANSWER_S) -> object:
        """What the expression came to. Raise its OSError, AssertionError if there is none in time."""
        assert self._process.stdout is not None
        assert self.has_answered(limit_s), f"no answer within {limit_s:g} s"
        value = ast.literal_eval(self._process.stdout.readline().decode())
        match value:
            case ("error", int(number), str(text)):
                raise OSError(number, text)
            case ("bug", str(text)):
                raise AssertionError(text)
            case ("value", result):
                return result
        raise AssertionError(value)

    def has_died(self, within_s: float) -> int | None:
        """The signal that ended it, None if none did in time."""
        try:
            return -self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            return None

    def do(self, expression: str) -> object:
        self.tell(expression)
        return self.answer()

    def error(self, limit_s: float = ANSWER_S) -> str:
        """Wait for the answer and return the name of its errno, or "none"."""
        try:
            self.answer(limit_s)
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        return "none"

    def _say(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(repr(text).encode() + b"\n")
        self._process.stdin.flush()
