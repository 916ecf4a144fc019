"""The processes that measure, and the one that watches them.

A worker does the items of some steps and records each when it is done. The watcher ends a worker whose item takes too
long, records what became of an item whose worker crashed, and starts another worker for the rest: one kernel that hangs
or leaves the GPU unusable costs its own row. A worker whose watcher is gone ends at once, with all that it started.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import gpu_rows

_REPOSITORY = Path(__file__).parent.parent
#: Marks a worker's messages to its watcher among what else it prints.
_MARK = "\x1e"
#: Seconds that a worker may take until its first item: imports, and pytest's collection.
STARTUP = 240.0


@dataclass(frozen=True)
class Order:
    """What a worker is to do. ``until``: time.time() at which it must have ended; ``shard`` of ``shards``: which of the
    items, where they are divided between processes."""

    steps: tuple[str, ...]
    out: str
    device: str
    command: str
    until: float
    shard: int = 0
    shards: int = 1


def _channel() -> Callable[..., None]:
    """Sends messages to the watcher, also while pytest captures standard output."""
    channel = os.dup(1)

    def say(kind: str, **fields: Any) -> None:
        os.write(channel, f"\n{_MARK}{json.dumps({'kind': kind, **fields})}\n".encode())

    return say


def _end_with_watcher() -> None:
    """End this process and its children when the watcher's end of standard input closes."""
    watched = os.dup(0)  # pytest replaces standard input

    def wait() -> None:
        os.read(watched, 1)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def _until(end: float) -> float:
    return end - time.time()


def work(order: Order) -> int:
    """A worker's process. Returns its exit status."""
    _end_with_watcher()
    say = _channel()
    from benchmarks import gpu_device, gpu_steps, gpu_tests

    device = gpu_device.open_device(order.device)
    versions = device.versions()
    measured_with = {name: v for name, v in versions.items() if name not in gpu_device.ABOUT_ONLY}
    out = Path(order.out)
    record = gpu_rows.Record(out / "rows.jsonl", versions, order.command)
    for name in order.steps:
        step = gpu_steps.BY_NAME[name]
        done = {(i.item, i.key) for i in gpu_rows.read(record.path) if i.step == name}
        share = step.share if len(order.steps) > 1 else 1.0
        end = time.time() + share * (order.until - time.time())
        left = functools.partial(_until, end)
        ctx = gpu_steps.Context(device, out, left)
        if name == "tests":
            key = gpu_rows.key_of(measured_with, *gpu_steps.every_digest())
            if importlib.util.find_spec("pytest") is None:
                record.append(name, "pytest", key, [{"status": "missing: pytest is not installed"}])
                continue
            known = {item for item, of in done if of == key}
            plugin = gpu_tests.Recorder(record, key, known, (order.shard, order.shards), left, say, device.lost)
            gpu_tests.run(plugin, gpu_steps.TINY_TESTS if ctx.tiny else gpu_steps.TESTS)
            continue
        with device.active() if step.kernels else contextlib.nullcontext():
            works = list(step.items(ctx))[order.shard :: order.shards]
            keyed = [(w, gpu_rows.key_of(measured_with, *w.digests)) for w in works]
            for i, (item, key) in enumerate(keyed):
                if (item.item, key) in done:
                    continue
                if left() < 0:
                    say("left", step=name, items=[w.item for w, k in keyed[i:] if (w.item, k) not in done])
                    break
                say("begin", step=name, item=item.item, key=key, limit=item.limit)
                try:
                    rows = list(item.run())
                except Exception as error:
                    traceback.print_exc()
                    first = next(iter(str(error).splitlines()), "")
                    rows = [{"status": f"failed: {type(error).__name__}: {first}"}]
                why = device.lost()
                if why is not None:
                    rows = [*rows, {"status": f"crashed: {why}"}]
                record.append(name, item.item, key, rows or [{"status": "nothing to measure"}])
                say("end")
                if why is not None:
                    return gpu_device.LOST
    return 0


class Watcher:
    """Runs workers for orders. ``show`` gets a line for every item."""

    def __init__(
        self,
        record: gpu_rows.Record,
        log: Path,
        show: Callable[[str], None],
        keep_open: Sequence[int] = (),
        command: Sequence[str] = (sys.executable, "-m", "benchmarks.gpu", "--worker"),
    ) -> None:
        self.record, self.log, self.show = record, log, show
        self.keep_open, self.command = tuple(keep_open), list(command)
        self.left_out: list[str] = []
        self._lock = threading.Lock()

    def run(self, order: Order, environment: dict[str, str]) -> None:
        """Until the order's items are done or its time is over."""
        stuck = 0
        while time.time() < order.until and stuck < 2:
            finished, progress, status = self._once(order, environment)
            if finished:
                return
            stuck = 0 if progress else stuck + 1
            if stuck:
                self.show(f"{', '.join(order.steps)}: a worker ended with status {status} before its first item")
        if stuck:
            key = gpu_rows.key_of(self.record.versions, str(time.time()))
            row = {"status": f"failed: workers end with status {status} before their first item, see {self.log.name}"}
            self.record.append(order.steps[0], "worker", key, [row])

    def _once(self, order: Order, environment: dict[str, str]) -> tuple[bool, bool, int]:
        """One worker: whether nothing is left to do, whether it did anything, and its exit status."""
        process = subprocess.Popen(
            [*self.command, json.dumps(asdict(order))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=_REPOSITORY,
            env=environment,
            start_new_session=True,
            pass_fds=self.keep_open,
        )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, args=(process, lines), daemon=True).start()
        current: dict[str, Any] | None = None
        begun, progress, ended = time.time(), False, ""
        until = begun + STARTUP
        while True:
            try:
                line = lines.get(timeout=max(0.0, min(until, order.until) - time.time()))
            except queue.Empty:
                ended = "no time left" if time.time() >= order.until else "timed out"
                _kill(process)
                break
            if line is None:
                break
            message = json.loads(line)
            progress = True
            if message["kind"] == "begin":
                current, begun = message, time.time()
                until = begun + message["limit"]
            elif message["kind"] == "end" and current is not None:
                self.show(f"{current['step']}: {current['item']} ({time.time() - begun:.1f} s)")
                current, until = None, time.time() + STARTUP
            elif message["kind"] == "left":
                with self._lock:
                    self.left_out += [f"{message['step']}: {item}" for item in message["items"]]
        status = process.wait()
        _kill(process)  # what it started and left behind
        if ended == "no time left":
            if current is not None:
                with self._lock:
                    self.left_out.append(f"{current['step']}: {current['item']} and what follows")
            return True, progress, status
        if current is not None:
            why = f"timed out: after {current['limit']:.0f} s" if ended else f"crashed: exit status {status}"
            self.show(f"{current['step']}: {current['item']}: {why}")
            self.record.append(current["step"], current["item"], current["key"], [{"status": why}])
            return False, True, status
        return status == 0, progress, status

    def _read(self, process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
        assert process.stdout is not None
        with self.log.open("a") as log:
            for line in process.stdout:
                if line.startswith(_MARK):
                    lines.put(line[1:])
                elif line.strip():
                    log.write(line)
                    log.flush()
        lines.put(None)


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
