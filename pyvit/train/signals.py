"""Ctrl-C and SIGTERM: the run saves a checkpoint after the current step and then ends."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Stopped(SystemExit):
    """A run that was asked to stop and has saved a checkpoint. The exit code is the shell's for the signal, 130
    or 143."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = number


class StopSignals:
    """``last`` is the last signal received within :meth:`caught`, or 0."""

    def __init__(self) -> None:
        self.last = 0

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Record SIGINT and SIGTERM instead of ending the process. A second signal ends it. Only works in the main
        thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[int, Any] = {}

        def note(number: int, frame: Any) -> None:
            self.last = number
            restore()

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.getsignal(number) or signal.SIG_DFL
            signal.signal(number, note)
        try:
            yield
        finally:
            restore()
