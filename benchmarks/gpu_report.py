"""The tables of a GPU run, from its record."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

from benchmarks import gpu_cases, gpu_steps, records, report, runner
from benchmarks.gpu_rows import Data, Item, read
from benchmarks.runner import Outcome, Results, Row

#: Steps whose rows are runner.Row.
TIMED = ("dispatch", "peers", "models")
_FIELDS = {f.name for f in fields(Row)}
_FLOATS = {f.name for f in fields(Row) if f.type in ("float", float)}


def row_of(data: Data) -> Row | None:
    """The benchmark's row of a record's; None for an item that has only a status."""
    if "provider" not in data:
        return None
    return Row(**{k: math.nan if k in _FLOATS and v is None else v for k, v in data.items() if k in _FIELDS})


def bad(item: Item) -> list[str]:
    """What is wrong with an item's own results; peers may fail."""
    found = []
    for data in item.rows:
        status = str(data.get("status", "ok"))
        ours = str(data.get("provider", runner.OURS)).startswith(runner.OURS)
        if ours and status.startswith(("red", "failed", "crashed", "timed out")):
            found.append(f"{item.step}: {item.item}{' ' + data['provider'] if 'provider' in data else ''}: {status}")
    return found


def latest(items: Sequence[Item]) -> list[Item]:
    """Of every step's item the newest result: kernels and versions may have changed since an older one."""
    found: dict[tuple[str, str], Item] = {}
    for item in items:
        found.pop((item.step, item.item), None)
        found[item.step, item.item] = item
    return list(found.values())


def results(items: Sequence[Item]) -> Results:
    cases = {c.id: c for c in gpu_cases.every()}
    found = Results()
    for item in items:
        if item.step not in TIMED:
            continue
        rows = [row for row in map(row_of, item.rows) if row is not None]
        found.rows += rows
        case = cases.get(item.item)
        if item.step != "dispatch" and case is not None and (outcome := runner.hold(case, rows)) is not None:
            found.outcomes.append(outcome)
    measured = {o.case.id for o in found.outcomes}
    found.outcomes += [Outcome(c, "not run", None) for c in cases.values() if c.target and c.id not in measured]
    return found


def measured_rows(items: Sequence[Item]) -> Iterator[str]:
    """Lines for ``pyvit.dispatch.choice.MEASURED``: calls that both backends computed correctly."""
    from benchmarks import gpu_model
    from pyvit.dispatch import cost_model

    cases = {c.id: c for c in gpu_cases.dispatch()}
    for item in items:
        case, name = cases.get(item.item), str(item.versions.get("gpu", "")).lower().replace(" ", "")
        gpu = max((key for key in cost_model.GPUS if key.lower() in name), key=len, default=None)
        if item.step != "dispatch" or case is None or gpu is None:
            continue
        rows = {row.provider: row for row in map(row_of, item.rows) if row is not None and row.timed}
        ours = [rows.get(f"{runner.OURS} {backend}") for backend in ("cuda", "triton")]
        if all(row is not None and row.status == "ok" for row in ours):
            triton, cuda = item.rows[0].get("digests") or ("", "")
            theirs = [row.median_ms for name, row in rows.items() if name in gpu_cases.PYTORCHS and row.status == "ok"]
            figures = (ours[0].median_ms, ours[1].median_ms, min(theirs, default=math.nan))  # type: ignore[union-attr]
            row = gpu_model.measured(case, gpu, figures, item.at[:10], (cuda, triton), item.versions.get("triton", ""))
            yield repr(row).replace("nan", "NAN") + ","


def _table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    return lines + [
        "| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in row) + " |" for row in rows
    ]


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def lines(items: Sequence[Item], left_out: Sequence[str] = ()) -> list[str]:
    """results.md, without the tables of timed cases."""
    by: dict[str, list[Item]] = {}
    for item in items:
        by.setdefault(item.step, []).append(item)
    text = ["## What is wrong", "", *([f"- {line[:500]}" for item in items for line in bad(item)] or ["Nothing."]), ""]
    text += ["## Items", "", *_table(("step", "items", "statuses"), list(_counts(by))), ""]
    if left_out:
        text += ["## No time was left for", "", *(f"- {line}" for line in left_out), ""]
    for step in ("versions", "ceilings", "pipes", "memcheck", "nsight", "kernels", "tuning"):
        rows = [
            (item.item, ", ".join(f"{k} {_number(v)}" for k, v in row.items() if k != "said"))
            for item in by.get(step, ())
            for row in item.rows
        ]
        if rows:
            text += [f"## {step}", "", *_table(("item", "result"), rows), ""]
    choice = list(measured_rows(items))
    if choice:
        text += ["## Rows for pyvit.dispatch.choice.MEASURED", "", "```python", *choice, "```", ""]
    return text


def _counts(by: dict[str, list[Item]]) -> Iterator[tuple[str, int, str]]:
    for step in gpu_steps.STEPS:
        if step.name in by:
            found = Counter(str(row.get("status", "ok")).partition(":")[0] for i in by[step.name] for row in i.rows)
            yield step.name, len(by[step.name]), ", ".join(f"{count} {name}" for name, count in found.items())


def write(out: Path, left_out: Sequence[str] = ()) -> int:
    """Write results.md and results.csv of the record in ``out``, and say what is wrong. Returns an exit status."""
    items = latest(read(out / "rows.jsonl"))
    if not items:
        print(f"{out / 'rows.jsonl'}: no results")
        return 1
    found = results(items)
    about = [f"{name}: {value}" for name, value in items[-1].versions.items()]
    records.write_csv(found.rows, out / "results.csv")
    report.write_markdown(found, [*about, f"last row: {items[-1].at}"], out / "results.md", lines(items, left_out))
    report.show_rows(found.rows)
    report.show_outcomes([o for o in found.outcomes if o.measured != "not run"])
    wrong = [line for item in items for line in bad(item)]
    for line in [*wrong, *(f"no time left: {line}" for line in left_out)]:
        print(line[:300])
    print(f"{len(items)} items; wrote {out / 'results.md'} and results.csv")
    return 1 if wrong else 0
