"""The record of a GPU run, and the process that watches over those that measure."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_cases, gpu_model, gpu_report, gpu_rows, runner
from benchmarks.cases import Case
from benchmarks.gpu_worker import Order, Watcher
from benchmarks.workload import OURS
from pyvit.dispatch import choice

REPOSITORY = Path(__file__).parents[2]


def test_record_reads_what_was_written_and_drops_what_is_torn(tmp_path):
    """A process that is killed while it writes leaves a torn line, or an item without some of its rows."""
    path = tmp_path / "rows.jsonl"
    record = gpu_rows.Record(path, {"torch": "2"}, "python -m benchmarks.gpu")
    record.append("cases", "a", "k1", [{"ms": 1.5, "ratio": math.nan}, {"ms": 2.0}])
    record.append("cases", "b", "k1", [{"ms": 3.0}])
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines(keepends=True)[-1])):
        path.write_bytes(whole[:-cut])
        assert [i.item for i in gpu_rows.read(path)] == ["a"]
        assert gpu_rows.repair(path) == len(whole.splitlines(keepends=True)[-1]) - cut
        assert gpu_rows.repair(path) == 0
    first = whole.splitlines(keepends=True)[0]
    path.write_bytes(first)  # one of a's two rows
    assert gpu_rows.read(path) == []
    record.append("cases", "a", "k1", [{"ms": 1.0}])
    (item,) = gpu_rows.read(path)
    assert (item.rows, item.versions) == (({"ms": 1.0},), {"torch": "2"})
    path.write_bytes(whole)
    assert gpu_rows.read(path)[0].rows == ({"ms": 1.5, "ratio": None}, {"ms": 2.0})


def test_a_key_depends_on_versions_and_digests():
    keys = {
        gpu_rows.key_of({"torch": "2", "triton": "3"}, "d1", ""),
        gpu_rows.key_of({"torch": "2", "triton": "3"}, "d2", ""),
        gpu_rows.key_of({"torch": "2", "triton": "4"}, "d1", ""),
        gpu_rows.key_of({"torch": "2", "triton": "3"}, "", "d1"),
    }
    assert len(keys) == 4
    assert gpu_rows.key_of({"a": "1", "b": "2"}) == gpu_rows.key_of({"b": "2", "a": "1"})


def test_measured_rows_are_made_of_a_record(tmp_path):
    """Both backends right and timed: a line for MEASURED that says what it measured, with PyTorch's fastest. One wrong:
    none."""
    case, wrong = (c for c in gpu_cases.dispatch()[:2])
    record = gpu_rows.Record(tmp_path / "rows.jsonl", {"gpu": "NVIDIA H200", "triton": "3.9"}, "")

    def row(of: Case, provider: str, ms: float, status: str = "ok") -> dict[str, Any]:
        found = runner.Row(of.op, of.label, provider, of.dtype, of.mode, 1, median_ms=ms, status=status)
        return vars(found) | {"digests": ["t1", "c1"]}

    ours = [row(case, f"{OURS} cuda", 2.0), row(case, f"{OURS} triton", 1.23456)]
    theirs = [row(case, "sdpa cuDNN", 1.5), row(case, "sdpa flash", 1.4), row(case, "sdpa math", 1.0, "outside rule")]
    record.append("dispatch", case.id, "k", [*ours, *theirs])
    bad = row(wrong, f"{OURS} cuda", math.nan, "red: far off")
    record.append("dispatch", wrong.id, "k", [bad, row(wrong, f"{OURS} triton", 1.0)])
    items = gpu_rows.read(tmp_path / "rows.jsonl")
    (line,) = gpu_report.measured_rows(items)
    (found,) = eval(f"({line})", {"Measured": choice.Measured, "torch": torch, "NAN": math.nan})
    shape, today = gpu_model.shape(case), items[0].at[:10]
    grad = case.mode == "forward+backward"
    assert found == choice.Measured(
        "H200", case.op, torch.bfloat16, grad, shape, 2.0, 1.235, 1.4, today, ("c1", "t1"), "3.9"
    )
    assert gpu_report.write(tmp_path) == 1  # one of ours is wrong
    assert line in (tmp_path / "results.md").read_text()


WORKER = """
import json, os, sys, time
sys.path.insert(0, {repository!r})
from pathlib import Path
from benchmarks import gpu_rows
order = json.loads(sys.argv[1])
record = gpu_rows.Record(Path(order["out"]) / "rows.jsonl", {{}}, order["command"])
done = {{i.item for i in gpu_rows.read(record.path)}}
say = lambda **m: os.write(1, ("\\n\\x1e" + json.dumps(m) + "\\n").encode())
print("this goes to the log")
for item in {items!r}:
    if item in done:
        continue
    say(kind="begin", step="ceilings", item=item, key="k", limit=100.0 if item == "is slow" else 1.0)
    if item == "is slow":
        time.sleep(600)
    if item == "hangs":
        os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "1234.5")
        time.sleep(600)
    if item == "crashes":
        os.abort()
    record.append("ceilings", item, "k", [{{"status": "ok"}}])
    say(kind="end")
    if item == "loses the GPU":
        sys.exit(75)
"""


def _order(steps: tuple[str, ...], out: Path, seconds: float) -> Order:
    return Order(steps, str(out), "fake", "test", time.time() + seconds)


def _watched(tmp_path: Path, items: list[str], seconds: float = 60.0) -> tuple[dict[str, str], list[str], Watcher]:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(repository=str(REPOSITORY), items=items))
    shown: list[str] = []
    record = gpu_rows.Record(tmp_path / "rows.jsonl", {}, "test")
    watcher = Watcher(record, tmp_path / "log.txt", shown.append, command=(sys.executable, str(script)))
    watcher.run(_order(("ceilings",), tmp_path, seconds), dict(os.environ))
    return {i.item: i.rows[0]["status"] for i in gpu_rows.read(record.path)}, shown, watcher


def test_an_item_that_hangs_or_crashes_costs_its_own_row(tmp_path):
    """The others are done, by another worker; what the hanging one had started is ended too."""
    found, shown, _ = _watched(tmp_path, ["a", "hangs", "b", "crashes", "loses the GPU", "c"])
    assert found == {
        "a": "ok",
        "hangs": "timed out: after 1 s",
        "b": "ok",
        "crashes": f"crashed: exit status {-signal.SIGABRT}",
        "loses the GPU": "ok",
        "c": "ok",
    }
    assert "this goes to the log" in (tmp_path / "log.txt").read_text()
    assert "sleep" not in [Path(p).read_text().strip() for p in _children_named("sleep", "1234.5")]
    items = gpu_rows.read(tmp_path / "rows.jsonl")
    assert [line.split(": ")[2].split(" ")[0] for item in items for line in gpu_report.bad(item)] == [
        "timed",
        "crashed",
    ]
    assert len(shown) == 6


def _children_named(name: str, argument: str) -> Iterator[str]:
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if command.read_bytes().split(b"\0")[:2] == [name.encode(), argument.encode()]:
                yield str(command.parent / "comm")


def test_a_worker_that_cannot_begin_is_not_started_for_ever(tmp_path):
    (tmp_path / "worker.py").write_text("raise SystemExit(3)")
    shown: list[str] = []
    record = gpu_rows.Record(tmp_path / "rows.jsonl", {}, "test")
    command = (sys.executable, str(tmp_path / "worker.py"))
    Watcher(record, tmp_path / "log.txt", shown.append, command=command).run(
        _order(("ceilings",), tmp_path, 60.0), dict(os.environ)
    )
    assert len(shown) == 2
    (item,) = gpu_rows.read(record.path)
    assert item.rows[0]["status"].startswith("failed: workers end with status 3")


def test_time_that_is_over_leaves_the_rest(tmp_path):
    begun = time.time()
    found, _, watcher = _watched(tmp_path, ["a", "is slow", "b"], seconds=5.0)
    assert 5.0 <= time.time() - begun < 30.0
    assert found == {"a": "ok"}
    assert watcher.left_out == ["ceilings: is slow and what follows"]
