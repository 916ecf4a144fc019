"""Output of a run: the tables on the terminal, and the files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, records
from benchmarks.runner import NEVER_LOSE, Outcome, Results, Row


def _number(value: float, digits: int = 3) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:.0f}"


def _cells(row: Row) -> list[str]:
    times = f"{_number(row.median_ms)} [{_number(row.p20)}, {_number(row.p80)}]" if row.timed else "-"
    error = f"{row.max_err:.1e} / {row.allowed_err:.1e}" if not math.isnan(row.max_err) else "-"
    ratio = f"{row.ratio:.2f}x" if not math.isnan(row.ratio) else "-"
    status = "" if row.status == "ok" else row.status
    return [
        row.provider,
        times,
        ratio,
        f"{row.best_ratio:.2f}x {row.best_peer}{', loses' if row.loses else ''}" if row.best_peer else "",
        _number(row.gflops),
        "-" if math.isnan(row.percent_of_ceiling) else f"{row.percent_of_ceiling:.0f}",
        row.bound,
        _number(row.images_per_s),
        error,
        _number(row.peak_mem),
        _number(row.joules),
        status,
    ]


_HEADINGS = (
    "provider", "ms [p20, p80]", "ratio", "best peer", "GF/s", "% ceiling", "bound", "images/s", "error / allowed",
    "MiB", "J", "status",
)  # fmt: skip


def _filled(table: Sequence[Sequence[str]]) -> list[int]:
    """The columns in which any row has something to say."""
    return [i for i in range(len(table[0])) if any(row[i] not in ("", "-") for row in table)] if table else []


def show(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, with rich if it is installed, else in plain columns. An empty first cell continues the row
    above."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(row[i]) for row in (headings, *rows)) for i in range(len(headings))]
        print(f"\n{title}")
        for row in (headings, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    table = Table(title=title, title_justify="left", header_style="bold", show_edge=False)
    for heading in headings:
        table.add_column(
            heading,
            justify="left" if heading in ("case", "provider", "best peer", "bound", "status") else "right",
            overflow="fold",
        )
    for i, row in enumerate(rows):
        if i and row[0]:
            table.add_section()
        table.add_row(*(cell.replace("[", "\\[") for cell in row))
    console = Console()
    Console(width=max(console.width, 160)).print(table)


def show_rows(rows: Sequence[Row]) -> None:
    """Print a table for each operator with all providers of all cases; errors and missing providers are listed
    below."""
    ops: dict[str, list[list[str]]] = {}
    notes, last = [], ""
    floors = any(
        not math.isnan(row.floor_ms) for row in rows
    )  # on a GPU: the lower bound of the cost model, and the share of the measured roofline
    headings = (*_HEADINGS[:-1], "floor ms", "% roofline", _HEADINGS[-1]) if floors else _HEADINGS
    for row in rows:
        case = f"{row.case} {row.dtype} {row.mode}" + (", random" if row.data == "random" else "")
        short, _, why = row.status.partition(": ")
        cells = _cells(row)
        cells[-1] = "" if short == "ok" else short
        cells[-1:-1] = [_number(row.floor_ms), _number(row.percent_of_roofline)] if floors else []
        ops.setdefault(row.op, []).append([case if row.op + case != last else "", *cells])
        last = row.op + case
        if why:
            notes.append(f"{short}: {row.op} {case}, {row.provider}: {why}")
    for op, table in ops.items():
        filled = _filled(table)
        show(op, [("case", *headings)[i] for i in filled], [[row[i] for i in filled] for row in table])
    print("\n".join(["", *notes]))


def show_outcomes(outcomes: Sequence[Outcome]) -> None:
    """Print the targets with measurements and verdicts."""
    words = {True: "pass", False: "MISS", None: "not measured"}
    rows = [
        [o.case.id, str(o.case.target), f"best of {', '.join(o.case.target.against)}", o.measured, words[o.passed]]
        for o in outcomes
    ]
    show("Targets", ("case", "target", "against", "measured", "verdict"), rows)
    passed, missed = (sum(o.passed is p for o in outcomes) for p in (True, False))
    print(f"{passed} targets met, {missed} missed, {len(outcomes) - passed - missed} not measured")


def never_lose(rows: Sequence[Row]) -> list[str]:
    """The verdict over all rows of ours: in how many the best peer was not faster, and those in which it was, the worst
    first. ``rows``: :attr:`Results.compared`."""
    lost = sorted((row for row in rows if row.loses), key=lambda row: row.best_ratio)
    head = f"never slower than the best peer (at least {NEVER_LOSE}x): {len(rows) - len(lost)} of {len(rows)} rows"
    return [head] + [
        f"{row.best_ratio:.2f}x {row.best_peer}: {row.op} {row.case} {row.dtype} {row.mode}, {row.data}" for row in lost
    ]


def write_markdown(results: Results, lines: Sequence[str], path: Path, more: Sequence[str] = ()) -> None:
    """Write a page with the machine, ``more``, the targets if requested, and all rows."""
    words = {True: "pass", False: "**miss**", None: "not measured"}
    text = ["# Benchmark results", "", *(f"- {line}" for line in lines), *(["", *more] if more else [])]
    if results.outcomes:
        text += ["", "## Targets", "", "| case | target | against | measured | |", "|---|---|---|---|---|"]
    for o in results.outcomes:
        text.append(
            f"| {o.case.id} | {o.case.target} | {', '.join(o.case.target.against)} | {o.measured} | {words[o.passed]} |"
        )
    if results.compared:
        head, *lost = never_lose(results.compared)
        text += ["", "## Against the best peer", "", head[0].upper() + head[1:] + ".", *([""] if lost else [])]
        text += [f"- {line}" for line in lost]
    text += ["", "## Every row", ""]
    table = [[f"{row.op} {row.case} {row.dtype} {row.mode}, {row.data}", *_cells(row)] for row in results.rows]
    filled = _filled(table)
    for cells in (("case", *_HEADINGS), ("---",) * (len(_HEADINGS) + 1), *table):
        text.append("| " + " | ".join(cells[i] for i in filled) + " |")
    path.write_text("\n".join(text) + "\n")


def write(
    results: Results, about: dict[str, Any], out: Path, plots: bool = True, price: float = 0.0, html: bool = True
) -> list[Path]:
    """Write report.html, results.csv, results.json, results.md, models.csv and the plots to ``out``. Returns the paths.
    ``about``: :func:`benchmarks.machine.describe`'s; ``price``: of the machine, dollars per hour."""
    records.write_csv(results.rows, out / "results.csv")
    records.write_json(results.rows, about, out / "results.json")
    write_markdown(results, machine.lines(about), out / "results.md")
    written = [out / "results.csv", out / "results.json", out / "results.md"]
    if html:
        from benchmarks import html_report

        (out / "report.html").write_text(html_report.page([html_report.run_of(about, results.rows, price=price)]))
        written.insert(0, out / "report.html")
    if records.write_models(results.rows, out / "models.csv", price):
        written.append(out / "models.csv")
    if plots:
        from benchmarks import plots as drawing

        written += drawing.draw(results.rows, out)
    return written
