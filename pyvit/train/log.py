"""Output of a run: log.jsonl, TensorBoard events, and a progress bar."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping
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

    ``evaluated``: the last step with a line of evaluation results, which have no learning rate; -1 if there is none.
    """

    def __init__(self, folder: Path, start: int, tensorboard: bool, enabled: bool = True) -> None:
        self.path = folder / "log.jsonl"
        self.enabled = enabled
        self.evaluated = -1
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
                if "lr" not in record:
                    self.evaluated = record["step"]
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
        record = {"step": step, **{k: _rounded(v) if isinstance(v, float) else v for k, v in values.items()}}
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


def _rounded(value: float) -> float:
    """Six digits after the point, or of a smaller number six digits in all."""
    return round(value, 6) if abs(value) >= 1 else float(f"{value:.6g}")


class Progress:
    """A progress bar with remaining time, images per second and values; on a pipe, a line every 10 seconds.

    :meth:`update` is given how long each step took, and how long of that it waited for data. Rates are over all steps
    but the first, which also starts workers and compiles. Evaluations and checkpoints are not counted.
    """

    def __init__(self, steps: int, start: int, batch: int, enabled: bool) -> None:
        self.steps, self.start = steps, start
        self.batch = batch
        self.enabled = enabled
        self.count, self.seconds, self.waited = 0, 0.0, 0.0
        self._said = time.perf_counter()
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

    def rates(self) -> dict[str, float]:
        """Images per second; those without the time of waiting for data; and the share of that time."""
        seconds, images = max(self.seconds, 1e-9), max(self.count, 1) * self.batch
        wait = min(self.waited / seconds, 1.0)
        return {
            "images_per_s": images / seconds,
            "model_images_per_s": images / max(seconds - self.waited, 1e-9),
            "data_wait": wait,
        }

    def update(self, step: int, seconds: float, waited: float, values: Mapping[str, float]) -> None:
        """Count a step, and show ``values``."""
        if self.count == 1 and step == self.start + 1:
            self.count, self.seconds, self.waited = 0, 0.0, 0.0
        self.count, self.seconds, self.waited = self.count + 1, self.seconds + seconds, self.waited + waited
        if not self.enabled:
            return
        now, left = time.perf_counter(), self.steps - step - 1
        if self._bar is None and now - self._said <= 10 and left:
            return
        rates = self.rates()
        text = f"{rates['images_per_s']:.0f} images/s"
        if rates["data_wait"] >= 0.05:
            text += f" ({100 * rates['data_wait']:.0f} % of the time waiting for data)"
        text = "  ".join([text, *(f"{key} {value:.4f}" for key, value in values.items())])
        if self._bar is not None:
            self._bar.update(self._task, completed=step + 1, status=text)
        else:
            say(f"step {step + 1}/{self.steps}  {self.seconds / self.count * left:.0f} s left  {text}")
            self._said = now

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
