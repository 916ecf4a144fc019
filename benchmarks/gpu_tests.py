"""The tests' results, recorded as each test ends: a plugin of pytest for ``benchmarks.gpu``."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_device import LOST
from benchmarks.gpu_rows import Record

_REPOSITORY = Path(__file__).parent.parent
#: Seconds after which a test is ended.
LIMIT = 180.0


class Recorder:
    """Runs the tests of one process of several, without those in ``done``, until ``left()`` is negative. After a
    failure with which the GPU is lost (``lost()`` says why) the process ends: another one does the rest."""

    def __init__(
        self,
        record: Record,
        key: str,
        done: set[str],
        shard: tuple[int, int],
        left: Callable[[], float],
        say: Callable[..., None],
        lost: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.record, self.key, self.done, self.shard = record, key, done, shard
        self.left, self.say, self.lost = left, say, lost
        self._session: Any = None
        self._finished = 0
        self._reports: list[Any] = []

    def pytest_sessionstart(self, session: Any) -> None:
        self._session = session

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Tests are divided by their names' hashes: each process collects them all. Those of tensors of 2**31 elements
        are in one process, as two may not fit."""
        at, count = self.shard
        of = lambda i: 0 if "far" in i.fixturenames else zlib.crc32(i.nodeid.encode()) % count  # noqa: E731
        wanted = [of(i) == at and i.nodeid not in self.done for i in items]
        config.hook.pytest_deselected(items=[i for i, w in zip(items, wanted, strict=True) if not w])
        items[:] = [i for i, w in zip(items, wanted, strict=True) if w]

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and self.shard[0] == 0 and report.nodeid not in self.done:
            row = {"status": "red: cannot be collected", "said": str(report.longrepr)[-4000:]}
            self.record.append("tests", report.nodeid, self.key, [row])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._reports = []
        self.say("begin", step="tests", item=nodeid, key=self.key, limit=LIMIT)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._reports.append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        reports = self._reports
        bad = [r for r in reports if r.failed]
        skipped = [r for r in reports if r.skipped]
        row: dict[str, Any] = {
            "status": "red: test failed" if bad else "skipped" if skipped else "ok",
            "seconds": sum(r.duration for r in reports),
        }
        if bad or skipped:
            row["said"] = "\n".join(str(r.longrepr) for r in bad or skipped)[-4000:]
        self._finished += 1
        self.record.append("tests", nodeid, self.key, [row])
        self.say("end")
        if bad and self.lost() is not None:
            os._exit(LOST)
        if self.left() < 0:
            self._session.shouldstop = "no time left"

    def pytest_sessionfinish(self, session: Any) -> None:
        if left := len(getattr(session, "items", [])) - self._finished:
            self.say("left", step="tests", items=[f"{left} tests"])


def run(plugin: Recorder, arguments: Sequence[str], folder: str = str(_REPOSITORY)) -> int:
    """pytest's exit status, run in ``folder``. The first failure does not end the run."""
    import pytest

    os.chdir(folder)
    options = ["-q", "--no-header", "--tb=short", "--continue-on-collection-errors", "-pno:cacheprovider", "-pno:xdist"]
    return int(pytest.main([*options, *arguments], plugins=[plugin]))
