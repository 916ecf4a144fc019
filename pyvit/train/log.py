"""Output of a run: log.jsonl, TensorBoard events, and a progress bar."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from pyvit import dispatch
from pyvit.train.checkpoint import write_atomic


def active_kernels() -> str:
    """Which backend has served each operator so far, such as "flash_attention cpu, patch_embed cpu"."""
    used = dispatch.used_backends()
    return ", ".join(f"{op} {'/'.join(sorted(backends))}" for op, backends in sorted(used.items()))


class Log:
    """``log.jsonl`` of a run. Lines from step ``start`` on are removed: a killed run may have written them after its
    last checkpoint.
    """

    def __init__(self, folder: Path, start: int, tensorboard: bool, enabled: bool = True) -> None:
        self.path = folder / "log.jsonl"
        self.enabled = enabled
        self._warned = False
        self._writer = None
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        kept = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:  # the incomplete last line of a killed run
                continue
            if record.get("step", 0) < start:
                kept.append(line)
        write_atomic(self.path, lambda file: file.write("".join(f"{line}\n" for line in kept).encode()))
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start)

    def write(self, step: int, **values: Any) -> None:
        """Write one line, without values that are not finite. On a full disk the line is lost and a warning is
        printed."""
        if not self.enabled:
            return
        values = {k: v for k, v in values.items() if not isinstance(v, float) or math.isfinite(v)}
        record = {"step": step, **{k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}}
        try:
            self._append(json.dumps(record) + "\n")
        except OSError as error:
            self._warn(f"cannot write {self.path}: {error}")
        if self._writer is None:
            return
        try:
            for key, value in values.items():
                if isinstance(value, (int, float)):
                    self._writer.add_scalar(key, value, step)
        except OSError as error:  # raised by the writer's thread for an earlier call
            self._warn(f"cannot write TensorBoard's events: {error}")

    def _append(self, line: str) -> None:
        """Append a whole line or nothing."""
        with self.path.open("ab", buffering=0) as file:
            end, content = file.seek(0, os.SEEK_END), line.encode()
            try:
                while content:
                    content = content[file.write(content) or 0 :]
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(end)
                raise

    def _warn(self, message: str) -> None:
        if not self._warned:
            say(f"warning: {message}; the run continues")
        self._warned = True

    def close(self) -> None:
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                self._warn(f"cannot write TensorBoard's events: {error}")


def say(message: str) -> None:
    """Print a line. Characters that the terminal cannot show are escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(message.encode(encoding, "backslashreplace").decode(encoding), flush=True)


class Progress:
    """A progress bar with remaining time, images per second and the loss; on a pipe, a line every 10 seconds."""

    def __init__(self, steps: int, start: int, batch: int, enabled: bool) -> None:
        self.steps = steps
        self.start = start
        self.batch = batch
        self.enabled = enabled
        self._began = self._said = time.perf_counter()
        self._bar = None
        if enabled and sys.stdout.isatty():
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, TextColumn("{task.fields[status]}"))
            self._task = self._bar.add_task("", total=steps, completed=start, status="")
            self._bar.start()

    def rate(self, step: int) -> float:
        """Images per second since this process started."""
        return (step + 1 - self.start) * self.batch / max(time.perf_counter() - self._began, 1e-9)

    def update(self, step: int, status: str) -> None:
        if not self.enabled:
            return
        text = f"{self.rate(step):.0f} images/s  {status}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step + 1, status=text)
            return
        now = time.perf_counter()
        if now - self._said > 10 or step + 1 == self.steps:
            left = (now - self._began) / (step + 1 - self.start) * (self.steps - step - 1)
            say(f"step {step + 1}/{self.steps}  {left:.0f} s left  {text}")
            self._said = now

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
