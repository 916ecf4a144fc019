"""A run as one HTML file that needs nothing else: ``python -m benchmarks.html_report [RESULTS ...] [--out FILE]``.

RESULTS are folders, results.json or results.csv files; several make one page with a filter of machines. Without any, it
is all committed results, in benchmarks/results/index.html, which the documentation site shows.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from benchmarks import cases, inputs, machine, records, scaling
from benchmarks.ceiling import Ceiling
from benchmarks.runner import NEVER_LOSE, Row
from benchmarks.workload import OURS, uses_pyvit

TEMPLATE = Path(__file__).with_name("report_template.html")
_RESULTS = Path(__file__).parent / "results"
#: The page of all committed results.
INDEX = _RESULTS / "index.html"


@dataclass(frozen=True)
class Run:
    """What a page shows of one machine: its name, lines about it, rows, and ceilings if they are known."""

    name: str
    lines: Sequence[str]
    rows: Sequence[Row]
    ceiling: Ceiling | None = None
    price: float = 0.0
    cases: dict[str, list[Row]] = field(init=False)

    def __post_init__(self) -> None:
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.mode != "scaling":
                found.setdefault(title(row), []).append(row)
        object.__setattr__(self, "cases", found)


def title(row: Row) -> str:
    return f"{row.op} {row.case} {row.dtype} {row.mode}" + (", random inputs" if row.data == "random" else "")


def number(value: float, digits: int = 3) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"


def duration(ms: float) -> str:
    return f"{number(ms)} ms" if ms >= 0.1 else f"{number(1e3 * ms)} µs"


def times(ratio: float) -> str:
    """A speedup: 1.05x, 160x; empty if it is not known."""
    return "" if math.isnan(ratio) else f"{ratio:.2f}x" if ratio < 100 else f"{ratio:.0f}x"


def ours_of(rows: Iterable[Row]) -> Row | None:
    """The row of ours; on a GPU, where each of our backends has one, the fastest."""
    found = [row for row in rows if row.provider.startswith(OURS) and row.timed]
    return min(found, key=lambda row: (row.provider != OURS, row.median_ms), default=None)


def best_peer(rows: Sequence[Row]) -> tuple[Row, float] | None:
    """The fastest peer under the numerics rule, and its time over ours: as measured within rounds where the rows have
    it, else of the medians."""
    ours = ours_of(rows)
    peers = [r for r in rows if r.timed and r.status == "ok" and not uses_pyvit(r.provider)]
    if ours is None or not peers:
        return None
    best = min(peers, key=lambda r: r.median_ms)
    if ours.best_peer == best.provider:
        return best, ours.best_ratio
    over = ours.ratio / best.ratio  # both over the same baseline
    return best, best.median_ms / ours.median_ms if math.isnan(over) else over


def facts(ours: Row, peer: Row | None, price: float) -> list[str]:
    """What is said of our row under its bars."""
    found = []
    if not math.isnan(ours.percent_of_ceiling):
        found.append(f"{ours.percent_of_ceiling:.0f} % of the ceiling")
    if ours.bound:
        found.append(f"{ours.bound}-bound, {ours.percent_of_roofline:.0f} % of the roofline")
    if not math.isnan(ours.images_per_s):
        found.append(f"{number(ours.images_per_s)} images/s")
    if price and not math.isnan(ours.images_per_s):
        found.append(f"{number(records.images_per_dollar(ours, price), 4)} images per dollar")
    if not math.isnan(ours.peak_mem):
        beside = f" ({peer.provider}: {number(peer.peak_mem)})" if peer and not math.isnan(peer.peak_mem) else ""
        found.append(f"{number(ours.peak_mem)} MiB{beside}")
    if not math.isnan(ours.joules):
        beside = f" ({peer.provider}: {number(peer.joules)})" if peer and not math.isnan(peer.joules) else ""
        found.append(f"{number(ours.joules)} J{beside}")
    if not math.isnan(ours.max_err):
        found.append(f"error {ours.max_err:.1e} of {ours.allowed_err:.1e} allowed")
    return found


def _data(run: int, row: Row, name: str, **more: object) -> str:
    """The attributes by which the page filters and sorts."""
    values = {"machine": run, "op": row.op, "dtype": row.dtype, "mode": row.mode, "text": name, **more}
    return " ".join(f'data-{key}="{escape(str(value))}"' for key, value in values.items())


def card(index: int, name: str, rows: Sequence[Row], price: float = 0.0, where: str = "") -> str:
    """The bars of a case: the longer, the faster. ``where``: the machine, on a page of several."""
    timed = sorted((row for row in rows if row.timed), key=lambda row: row.median_ms)
    found, ours = best_peer(rows), ours_of(rows)
    peer, ratio = found or (None, math.nan)
    lost = ratio < NEVER_LOSE
    bars = []
    for row in timed:
        kind = "ours" if row.provider.startswith(OURS) else "with" if uses_pyvit(row.provider) else ""
        mark = "" if row.status == "ok" else f" ({row.status.partition(': ')[0]})"
        width = 100 * timed[0].median_ms / row.median_ms
        took = ", ".join(part for part in (duration(row.median_ms), times(row.ratio)) if part)
        span = f"{duration(row.p20)} to {duration(row.p80)} in 60 % of the rounds; " if row.p20 == row.p20 else ""
        bars.append(
            f'<div class="bar {kind}" title="{escape(span + row.versions)}"><span>{escape(row.provider + mark)}</span>'
            f'<i><u style="width:{width:.1f}%"></u></i><b>{took}</b></div>'
        )
    notes = facts(ours, peer, price) if ours else []
    untimed = [f"{row.provider}: {row.status}" for row in rows if not row.timed]
    against = (
        f'<strong class="{"lost" if lost else "won"}">{ratio:.2f}x {escape(peer.provider)}</strong>' if peer else ""
    )
    return (
        f"<article {_data(index, rows[0], name, ratio=f'{ratio:.4g}', lost=int(lost))}>"
        f"<h3>{escape(name)} {against}</h3>{''.join(bars)}"
        + (f"<p>{escape(where)}</p>" if where else "")
        + (f"<p>{escape('; '.join(notes))}</p>" if notes else "")
        + (
            f"<details><summary>not timed: {len(untimed)}</summary>{escape('; '.join(untimed))}</details>"
            * bool(untimed)
        )
        + "</article>"
    )


COLUMNS: tuple[tuple[str, Callable[[Row, Run], tuple[str, float | str]]], ...] = (
    ("provider", lambda row, run: (row.provider, row.provider)),
    ("ms", lambda row, run: (number(row.median_ms), row.median_ms)),
    ("ratio", lambda row, run: (times(row.ratio), row.ratio)),
    ("best peer", lambda row, run: (row.best_peer, row.best_peer)),
    ("over it", lambda row, run: (times(row.best_ratio), row.best_ratio)),
    ("% ceiling", lambda row, run: (number(row.percent_of_ceiling, 2), row.percent_of_ceiling)),
    ("bound", lambda row, run: (row.bound, row.bound)),
    ("images/s", lambda row, run: (number(row.images_per_s), row.images_per_s)),
    ("images/$", lambda row, run: (number(v := records.images_per_dollar(row, run.price)), v)),
    ("MiB", lambda row, run: (number(row.peak_mem), row.peak_mem)),
    ("J", lambda row, run: (number(row.joules), row.joules)),
    ("error", lambda row, run: (f"{row.max_err:.1e}" if row.max_err == row.max_err else "", row.max_err)),
    ("allowed", lambda row, run: (f"{row.allowed_err:.1e}" if row.max_err == row.max_err else "", row.allowed_err)),
    ("threads", lambda row, run: (str(row.threads), row.threads)),
    ("status", lambda row, run: (row.status, row.status)),
)


def table(runs: Sequence[Run]) -> str:
    """Every row; columns that nobody fills are left out."""
    cells = [
        (index, run, name, row, [of(row, run) for _, of in COLUMNS])
        for index, run in enumerate(runs)
        for name, rows in run.cases.items()
        for row in rows
    ]
    kept = [i for i in range(len(COLUMNS)) if any(values[i][0] for *_, values in cells)]
    several = len(runs) > 1
    heads = ["machine"] * several + ["case", *(COLUMNS[i][0] for i in kept)]
    body = []
    for index, run, name, row, values in cells:
        mine = ' class="ours"' if row.provider.startswith(OURS) else ""
        tds = [f"<td>{escape(run.name)}"] * several + [f"<td>{escape(name)}"]
        for text, key in (values[i] for i in kept):
            sort = f' data-v="{key:.6g}"' if isinstance(key, float) and not math.isnan(key) else ""
            tds.append(f"<td{sort}>{escape(text)}")
        body.append(f"<tr{mine} {_data(index, row, name, lost=int(row.loses))}>{''.join(tds)}")
    head = "".join(f"<th>{escape(text)}" for text in heads)
    return f"<table id=rows><thead><tr>{head}</thead><tbody>{''.join(body)}</tbody></table>"


def losses(runs: Sequence[Run]) -> str:
    """Where a peer is faster, the worst first."""
    found = []
    for index, run in enumerate(runs):
        for name, rows in run.cases.items():
            best = best_peer(rows)
            if best is not None and best[1] < NEVER_LOSE:
                found.append((best[1], index, run, name, best[0], rows[0]))
    if not found:
        return "<p>Nowhere in these rows.</p>"
    lines = []
    for ratio, index, run, name, peer, row in sorted(found, key=lambda item: item[0]):
        where = f"<td>{escape(run.name)}" * (len(runs) > 1)
        lines.append(
            f"<tr {_data(index, row, name, lost=1)}><td class=lost>{ratio:.2f}x<td>{escape(peer.provider)}{where}"
            f"<td>{escape(name)}"
        )
    head = "<th>speed<th>best peer" + "<th>machine" * (len(runs) > 1) + "<th>case"
    return f"<div class=wide><table><thead><tr>{head}</thead><tbody>{''.join(lines)}</tbody></table></div>"


_W, _H, _L, _B, _T, _R = 640, 390, 74, 56, 14, 14


class Axes:
    """A drawing with two logarithmic axes; the viewport scales with the page."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], x: str, y: str, ticks: Sequence[float] = ()) -> None:
        pad = 1.25
        self.x = (math.log(min(xs) / pad), math.log(max(xs) * pad))
        self.y = (math.log(min(ys) / pad), math.log(max(ys) * pad))
        self.body = [f'<rect class=frame x="{_L}" y="{_T}" width="{_W - _L - _R}" height="{_H - _B - _T}"/>']
        for value in ticks or _ticks(*self.x):
            at = self.at(value, min(ys))[0]
            self.body.append(f'<path class=grid d="M{at:.1f} {_T}V{_H - _B}"/>')
            self.body.append(f'<text x="{at:.1f}" y="{_H - _B + 20}" text-anchor=middle>{_short(value)}</text>')
        for value in _ticks(*self.y):
            at = self.at(min(xs), value)[1]
            self.body.append(f'<path class=grid d="M{_L} {at:.1f}H{_W - _R}"/>')
            self.body.append(f'<text x="{_L - 6}" y="{at + 4:.1f}" text-anchor=end>{_short(value)}</text>')
        self.body.append(f'<text x="{(_L + _W - _R) / 2}" y="{_H - 8}" text-anchor=middle>{escape(x)}</text>')
        middle = (_T + _H - _B) / 2
        self.body.append(f'<text transform="translate(18 {middle}) rotate(-90)" text-anchor=middle>{escape(y)}</text>')

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (math.log(x) - self.x[0]) / (self.x[1] - self.x[0])
        up = (math.log(y) - self.y[0]) / (self.y[1] - self.y[0])
        return _L + across * (_W - _L - _R), _H - _B - up * (_H - _B - _T)

    def line(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        path = "L".join("{:.1f} {:.1f}".format(*self.at(x, y)) for x, y in points)
        self.body.append(f'<path class="{kind}" d="M{path}"/>')

    def point(self, x: float, y: float, kind: str, name: str, attributes: str = "") -> None:
        a, b = self.at(x, y)
        place = f'cx="{a:.1f}" cy="{b:.1f}" r="4"'
        self.body.append(f'<circle class="{kind}" {attributes} {place}><title>{escape(name)}</title></circle>')

    def label(self, x: float, y: float, text: str, anchor: str = "start") -> None:
        a, b = self.at(x, y)
        self.body.append(f'<text x="{a:.1f}" y="{b:.1f}" text-anchor={anchor}>{escape(text)}</text>')

    def svg(self, name: str) -> str:
        return f'<svg viewBox="0 0 {_W} {_H}" role=img aria-label="{escape(name)}">{"".join(self.body)}</svg>'


def _ticks(low: float, high: float) -> list[float]:
    """Powers of ten, or 1, 2 and 5 times them where there are few."""
    exponents = range(math.floor(low / math.log(10)), math.ceil(high / math.log(10)) + 1)
    steps = (1,) if (high - low) / math.log(10) > 3 else (1, 2, 5)
    return [v for e in exponents for s in steps if low <= math.log(v := s * 10.0**e) <= high]


def _short(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    return f"{value:.4g}"


def roofline(run: Run, index: int) -> str:
    """Rate over flops per byte, with the machine's limits: ours filled, the best peer hollow. Cases below a thousandth
    of the highest limit, which measure the cost of a call, are left out."""
    points = []
    for name, rows in run.cases.items():
        best, ours = best_peer(rows), ours_of(rows)
        for row, kind in ((best[0] if best else None, "peer"), (ours, "ours")):
            if row is not None and row.intensity > 0 and row.gflops > 0:
                points.append((row, kind, f"{row.provider}: {name}, {number(row.gflops)} GF/s"))
    if run.ceiling is None or not points:
        return ""
    highest = max(run.ceiling.gflops.values())
    points = [point for point in points if point[0].gflops > highest / 1000]
    dtypes = [d for d in run.ceiling.gflops if any(row.dtype == d for row, _, _ in points)]
    xs = [row.intensity for row, _, _ in points]
    tops = [run.ceiling.gflops[d] for d in dtypes]
    edge = [top / run.ceiling.copy_gbs for top in tops]  # where the two limits meet
    low, high = min([*xs, *edge]) / 2, max([*xs, *edge]) * 2
    axes = Axes(
        [low, high],
        [*(row.gflops for row, _, _ in points), *(1.5 * top for top in tops)],
        "flops per byte moved",
        "GF/s",
    )
    bottom = math.exp(axes.y[0])
    for dtype, top, meet in zip(dtypes, tops, edge, strict=True):
        start = max(low, bottom / run.ceiling.copy_gbs)
        axes.line([(start, start * run.ceiling.copy_gbs), (meet, top), (high, top)], f"roof {dtype}")
        axes.label(low, top * 1.08, f"{dtype}: {top:.0f} GF/s")
        axes.line([(low, top), (meet, top)], f"roof dotted {dtype}")
    for row, kind, name in points:
        axes.point(row.intensity, row.gflops, f"{kind} {row.dtype}", name, _data(index, row, title(row)))
    return f"<figure>{axes.svg('roofline')}<figcaption>{escape(run.name)}. {_legend(dtypes)}</figcaption></figure>"


def _legend(dtypes: Iterable[str]) -> str:
    marks = [f'<b class="{dtype}">&#9679; {dtype}</b>' for dtype in dtypes]
    return f"{', '.join(marks)}; filled: pyvit, hollow: the fastest other library."


_DASHES = ("dashed", "dotted", "dash-dotted")


def curves(run: Run) -> str:
    """The scaling curves of a run: milliseconds, ours thick."""
    found = []
    for name, sweep in scaling.SWEEPS.items():
        rows = [row for row in run.rows if row.mode == "scaling" and row.timed and sweep.has(row)]
        lines: dict[tuple[str, str], dict[float, float]] = {}
        for row in rows:
            lines.setdefault((row.provider, row.dtype), {})[sweep.x(row)] = row.median_ms
        lines = {key: points for key, points in lines.items() if len(points) > 1}
        if not lines:
            continue
        xs = sorted({x for points in lines.values() for x in points})
        axes = Axes(xs, [y for points in lines.values() for y in points.values()], sweep.label, "milliseconds", xs)
        others = sorted({provider for provider, _ in lines if provider != OURS})
        for (provider, dtype), points in sorted(lines.items(), key=lambda item: item[0][0] == OURS):
            kind = f"ours {dtype}" if provider == OURS else f"{_DASHES[others.index(provider) % 3]} {dtype}"
            axes.line(sorted(points.items()), f"curve {kind}")
            for x, y in points.items():
                axes.point(x, y, kind, f"{provider} {dtype}, {sweep.label} {x:g}: {number(y)} ms")
        dtypes = dict.fromkeys(dtype for _, dtype in lines)
        marks = ", ".join(f'<b class="{d}">&#9679; {d}</b>' for d in dtypes)
        said = "".join(f"; {_DASHES[i % 3]}: {escape(provider)}" for i, provider in enumerate(others))
        caption = f"{escape(sweep.title)}, {escape(run.name)}. {marks}; solid: pyvit{said}."
        found.append(f"<figure>{axes.svg(f'scaling with {name}')}<figcaption>{caption}</figcaption></figure>")
    return "".join(found)


def _options(values: Iterable[str], everything: str) -> str:
    options = "".join(f"<option>{escape(value)}" for value in dict.fromkeys(values))
    return f'<option value="">{everything}{options}'


def page(runs: Sequence[Run]) -> str:
    """The whole file."""
    every = [row for run in runs for rows in run.cases.values() for row in rows]
    compared = [best for run in runs for rows in run.cases.values() if (best := best_peer(rows))]
    kept = sum(ratio >= NEVER_LOSE for _, ratio in compared)
    verdict = (
        f"In <strong>{kept} of {len(compared)}</strong> cases pyvit is not slower than the fastest other library (at "
        f"least {NEVER_LOSE:g} times as fast)."
        if compared
        else "No other library was timed beside pyvit."
    )
    cards = [
        card(i, name, rows, run.price, run.name * (len(runs) > 1))
        for i, run in enumerate(runs)
        for name, rows in run.cases.items()
    ]
    if any(line.startswith("busy: ") for run in runs for line in run.lines):
        verdict = f"<strong class=lost>The machine was busy: the times mislead.</strong> {verdict}"
    machines = "".join(
        f"<section class=machine><h2>{escape(run.name)}</h2><ul>{''.join(f'<li>{escape(line)}' for line in run.lines)}"
        "</ul></section>"
        for run in runs
    )
    several = "".join(f'<option value="{i}">{escape(run.name)}' for i, run in enumerate(runs))
    parts = {
        "verdict": verdict,
        "machines": machines,
        "machine_options": f'<select id=machine><option value="">every machine{several}</select>' * (len(runs) > 1),
        "ops": _options((row.op for row in every), "every operator and model"),
        "dtypes": _options((row.dtype for row in every), "every dtype"),
        "modes": _options((row.mode for row in every), "every mode"),
        "losses": losses(runs),
        "roofline": "".join(roofline(run, i) for i, run in enumerate(runs))
        or "<p>These results do not have the bytes that each case moves, or no ceilings.</p>",
        "curves": "".join(curves(run) for run in runs) or "<p>Not in these results.</p>",
        "cards": "".join(cards),
        "table": table(runs),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], TEMPLATE.read_text())


def ceiling_in(lines: Iterable[str]) -> Ceiling | None:
    """The ceilings as a report's first lines have them."""
    for line in lines:
        if line.startswith("ceiling: "):
            rates = {dtype: float(rate) for rate, dtype in re.findall(r"([\d.]+) GF/s (\w+)", line)}
            copy, threads = re.search(r"copy ([\d.]+) GB/s", line), re.search(r"\((\d+) threads?; ", line)
            if rates and copy:
                return Ceiling(rates, float(copy[1]), int(threads[1]) if threads else 0, "")
    return None


def run_of(about: dict[str, Any], rows: Sequence[Row], name: str = "", price: float = 0.0) -> Run:
    """From :func:`benchmarks.machine.describe`'s data."""
    lines = machine.lines(about)
    return Run(name or about.get("gpu") or about["processor"], lines, rows, ceiling_in(lines), price)


def add_costs(rows: Sequence[Row]) -> None:
    """Flops per byte of rows of older files, counted on the cases as they are now."""
    from benchmarks import models, providers

    lacking: dict[str, list[Row]] = {}
    for row in rows:
        if row.timed and math.isnan(row.intensity):
            lacking.setdefault(f"{row.op} {row.case} {row.dtype} {row.mode}", []).append(row)
    for case in (case for suite in cases.SUITES.values() for case in suite()):
        found = lacking.pop(case.id, [])
        if not found:
            continue
        if case.op in providers.SPECS:
            spec = providers.SPECS[case.op](case, "random", inputs.DTYPES[case.dtype], "cpu")
            flops, moved = providers.work_of(spec, case.mode)
        else:
            train, batch, size = case.mode == "train", case.shape["batch"], case.shape["size"]
            flops = models.flops(case.op, batch, train)
            moved = models.traffic(case.op, batch, size, case.dtype, train)
        for row in found:
            row.intensity = flops / moved


def load(path: Path, costs: bool = False) -> Run:
    """From files. A CSV's machine is described by the page of the same name (results.md beside results.csv), and its
    name is that of its folder. ``costs``: see :func:`add_costs`, which takes seconds."""
    about, rows = records.read(path)
    if costs:
        add_costs(rows)
    folder = path if path.is_dir() else path.parent
    if about:
        return run_of(about, rows)
    page = (path / "results.csv" if path.is_dir() else path).with_suffix(".md")
    lines = []
    for line in page.read_text().splitlines()[1:] if page.exists() else ():
        if line.startswith("- "):
            lines.append(line.removeprefix("- "))
        elif line:
            break
    ceiling = ceiling_in(lines)
    for row in rows:
        if ceiling is not None and row.intensity > 0 and not row.bound:
            flops = 1e6 * row.gflops * row.median_ms
            moved = flops / row.intensity
            row.bound = ceiling.bound(flops, moved, row.dtype)
            row.percent_of_roofline = 100 * ceiling.floor_ms(flops, moved, row.dtype) / row.median_ms
    stem = "" if path.is_dir() or path.stem == "results" else f", {path.stem.replace('_', ' ')}"
    return Run(folder.name + stem, lines, rows, ceiling)


def committed(folder: Path = _RESULTS) -> list[Path]:
    """The results of all machines in a folder, by default the committed ones. models.csv has the same rows as
    results.csv, in timm's columns."""
    return [
        path
        for path in sorted(folder.glob("*/*.csv"))
        if path.name != "models.csv" or not path.with_name("results.csv").exists()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.html_report", description=__doc__)
    parser.add_argument("results", nargs="*", type=Path, metavar="RESULTS")
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: report.html, or all results' index.html)")
    args = parser.parse_args()
    out = args.out or (Path("report.html") if args.results else INDEX)
    out.write_text(page([load(path, costs=True) for path in args.results or committed()]))
    print(f"wrote {out}, {out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
