"""Stopping between two steps: Ctrl-C and SIGTERM are noted, and the run saves itself before it ends."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Stopped(SystemExit):
    """A run that was asked to stop, and has saved what it had; the exit code is the shell's for the signal, 130 or
    143."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = number


class StopSignals:
    """``last``: the last signal that arrived within :meth:`caught`, 0 for none."""

    def __init__(self) -> None:
        self.last = 0

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Note SIGINT and SIGTERM instead of ending; the second one ends at once, as without us. Signals reach the main
        thread alone."""
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
