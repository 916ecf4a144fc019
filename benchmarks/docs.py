"""What the documentation takes from data: ``python -m benchmarks.docs`` writes the charts of the committed results,
the README's numbers, the tables of machines, and the tables of what each backend serves. A test compares them with the
data."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

from benchmarks import html_report, int8_table, records, reliability
from benchmarks.runner import NEVER_LOSE, Row
from benchmarks.workload import OURS
from pyvit.dispatch.capabilities import CAPABILITIES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"

#: Providers that are no PyTorch.
RUNTIMES = ("onnxruntime", "openvino")


class Bar(NamedTuple):
    """A row of a chart: the case in the results, and its label."""

    op: str
    case: str
    mode: str
    label: str


class Speedup(NamedTuple):
    """Of pyvit over the fastest PyTorch form of the same computation, and over the fastest other runtime (NaN if none
    was measured)."""

    torch: float
    runtime: float = math.nan


_WINDOW7, _SWIN, _VIT = "8x56x56x96 window 7 shift 3", "swin_tiny_patch4_window7_224", "vit_base_patch16_224"

CPU_BARS = (
    Bar("flash_attention", "8x12x197x64", "forward", "attention, 197 tokens"),
    Bar("flash_attention", "8x12x1025x64", "forward", "attention, 1025 tokens"),
    Bar("flash_attention", "4x12x1025x64", "forward+backward", "the same, with gradients"),
    Bar("window_attention", _WINDOW7, "forward", "shifted windows, Swin-T stage 1"),
    Bar("window_attention", _WINDOW7, "forward+backward", "the same, with gradients"),
    Bar("patch_embed", "16x224 patch 16", "forward", "patch embedding"),
    Bar("patch_embed", "16x224 patch 16 keep 25 %", "forward", "the same, keeping 25 % (MAE)"),
    Bar("info_nce", "batch 4096 d 512", "forward+backward", "InfoNCE, batch 4096"),
    Bar("nt_xent", "batch 2048 d 128", "forward+backward", "NT-Xent, batch 2048"),
    Bar(_VIT, "batch 8", "inference", "ViT-B/16, inference"),
    Bar(_SWIN, "batch 8", "inference", "Swin-T, inference"),
    Bar(_SWIN, "batch 8", "train", "Swin-T, training step"),
)

GPU_BARS = tuple(
    Bar(op, case, mode, f"{label}, {mode}")
    for op, case, label in (
        ("flash_attention", "256x12x197x64", "attention, 197 tokens"),
        ("flash_attention", "32x12x1025x64", "attention, 1025 tokens"),
        ("window_attention", "128x56x56x96 window 7 shift 3", "windows of 7"),
        ("window_attention", "128x64x64x96 window 8 shift 4", "windows of 8"),
        ("window_attention", "32x96x96x128 window 12 shift 6", "windows of 12"),
        ("window_attention", "128x64x64x96 window 16 shift 8", "windows of 16"),
    )
    for mode in ("forward", "backward")
)


class Chart(NamedTuple):
    """A file of IMAGES: the results it is drawn from (the first that has a row decides), its rows and its title."""

    name: str
    machine: str
    tables: tuple[str, ...]
    bars: tuple[Bar, ...]
    title: str
    dtypes: tuple[str, ...] = ("fp32", "bf16")

    def rows(self) -> list[list[Row]]:
        return [records.read_csv(RESULTS / self.machine / table) for table in self.tables]


CHARTS = (
    Chart(
        "overview.svg",
        "amd-epyc-zen4-2-cores",
        ("ops_peers.csv", "peers.csv"),
        CPU_BARS,
        "Times as fast as the fastest PyTorch form, 2 cores of an AMD EPYC (Zen 4)",
    ),
    Chart(
        "zen5.svg",
        "amd-epyc-zen5-2-cores",
        ("peers.csv", "training.csv", "results.csv"),
        CPU_BARS,
        "Times as fast as the fastest PyTorch form measured, 2 cores of an AMD EPYC (Zen 5)",
    ),
    Chart(
        "h100.svg",
        "nvidia-h100-80gb-hbm3",
        ("results.csv",),
        GPU_BARS,
        "Times as fast as the fastest other kernel measured, H100, kernels of 2026-11-26",
        ("bf16",),
    ),
)


def speedup(tables: Iterable[Sequence[Row]], bar: Bar, dtype: str) -> Speedup | None:
    """Of the first table that timed the case; None if none did. Photographs come before random inputs."""
    for rows in tables:
        found = [r for r in rows if (r.op, r.case, r.mode, r.dtype) == (bar.op, bar.case, bar.mode, dtype) and r.timed]
        found = [r for r in found if r.data == "photos"] or found
        ours = max((r for r in found if r.provider.startswith(OURS)), key=lambda r: r.ratio, default=None)
        peers = [r for r in found if not r.provider.startswith(OURS) and r.status == "ok"]
        if ours is not None and peers:
            return Speedup(
                _over(ours, [r for r in peers if r.provider not in RUNTIMES]),
                _over(ours, [r for r in peers if r.provider in RUNTIMES]),
            )
    return None


def _over(ours: Row, peers: Sequence[Row]) -> float:
    """Of ours over the fastest of ``peers``: as measured in rounds where the row has it, else of the medians."""
    best = max(peers, key=lambda r: r.ratio, default=None)
    if best is None:
        return math.nan
    return ours.best_ratio if best.provider == ours.best_peer else ours.ratio / best.ratio


# The chart has its own background, so that it can be read on a page of any colour.
_STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #24292f; }
  .title { font-weight: 600; font-size: 14px; }
  .small { font-size: 12px; }
  .back { fill: #ffffff; stroke: #d0d7de; }
  .fp32 { fill: #3f6fb5; }
  .bf16 { fill: #e08a3c; }
  .one { stroke: #57606a; stroke-width: 1; }
  .mark { stroke: #24292f; stroke-width: 2; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; }
    .back { fill: #161b22; stroke: #30363d; }
    .fp32 { fill: #6a9be0; }
    .one { stroke: #9198a1; }
    .mark { stroke: #e6edf3; }
  }
"""
_WIDTH, _LEFT, _RIGHT, _TOP, _BAR, _GAP = 760, 248, 60, 64, 13, 10


def draw(chart: Chart) -> str:
    """The chart as SVG: for each case a bar per dtype, and a mark at the speedup over the fastest other runtime."""
    tables = chart.rows()
    found = [
        (bar.label, [(dtype, s) for dtype in chart.dtypes if (s := speedup(tables, bar, dtype)) is not None])
        for bar in chart.bars
    ]
    found = [(label, speedups) for label, speedups in found if speedups]
    longest = max(s.torch for _, speedups in found for _, s in speedups)
    unit = (_WIDTH - _LEFT - _RIGHT) / longest
    marked = any(not math.isnan(s.runtime) for _, speedups in found for _, s in speedups)
    body, y = [], float(_TOP)
    for label, speedups in found:
        middle = y + len(speedups) * _BAR / 2
        body.append(f'<text x="{_LEFT - 10}" y="{middle + 4.5:g}" text-anchor="end">{escape(label)}</text>')
        for dtype, s in speedups:
            end = _LEFT + s.torch * unit
            body.append(
                f'<rect class="{dtype}" x="{_LEFT}" y="{y:g}" width="{s.torch * unit:.1f}" height="{_BAR - 1}"/>'
                f'<text class="small" x="{end + 5:.1f}" y="{y + 10.5:g}">{s.torch:.2f}x</text>'
            )
            if not math.isnan(s.runtime):
                at = _LEFT + s.runtime * unit
                body.append(f'<path class="mark" d="M{at:.1f} {y - 1:g}v{_BAR + 1}"/>')
            y += _BAR
        y += _GAP
    one, height = _LEFT + unit, y + 8
    legend, x = [], float(_LEFT)
    for dtype in chart.dtypes:
        legend.append(f'<rect class="{dtype}" x="{x:g}" y="38" width="12" height="12"/>')
        legend.append(f'<text class="small" x="{x + 18:g}" y="48">{dtype}</text>')
        x += 70
    if marked:
        legend.append(f'<path class="mark" d="M{x + 4:g} 36v16"/>')
        legend.append(f'<text class="small" x="{x + 14:g}" y="48">over the faster of OpenVINO and ONNX Runtime</text>')
    lines = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:g}" role="img" '
        f'aria-label="{escape(chart.title)}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="back" x="0.5" y="0.5" width="{_WIDTH - 1}" height="{height - 1:g}" rx="6"/>',
        f'<text class="title" x="16" y="24">{escape(chart.title)}</text>',
        *legend,
        f'<path class="one" d="M{one:.1f} {_TOP - 6}V{y - _GAP + 4:g}"/>',
        *body,
        "</svg>",
    )
    return "\n".join(lines) + "\n"


#: Of int8 inference, measured by ``python -m benchmarks models --dtype int8 --full --peers ...``.
INT8 = RESULTS / "amd-epyc-zen4-2-cores" / "int8_peers.csv"
_INT8_PEERS = ("ours bf16", "ours fp32", "openvino", "onnxruntime", "torchao + compile")


def _int8_over(op: str, case: str) -> dict[str, float]:
    """Times of the other providers over pyvit's int8; NaN of those that were not timed."""
    times = {row.provider: row.median_ms for row in records.read_csv(INT8) if (row.op, row.case) == (op, case)}
    return {provider: time / times["ours"] for provider, time in times.items()}


def int8_speed() -> str:
    """Speed of int8 models against pyvit's other dtypes and other libraries' int8."""
    lines = ["| model | ms | % of the int8 ceiling | bf16 | fp32 | OpenVINO INT8 | ONNX Runtime | torchao, compiled |"]
    lines += ["|---" + "|---:" * 7 + "|"]
    for row in records.read_csv(INT8):
        if row.provider == OURS:
            over = _int8_over(row.op, row.case)
            ratios = ("-" if math.isnan(over[name]) else f"{over[name]:.2f}x" for name in _INT8_PEERS)
            ms = f"{row.median_ms:.0f}" if row.median_ms >= 100 else f"{row.median_ms:.1f}"
            lines.append(f"| {row.op}, {row.case} | {ms} | {row.percent_of_ceiling:.0f} | {' | '.join(ratios)} |")
    return "\n".join(lines) + "\n"


def numbers() -> str:
    """The README's three numbers."""
    tables = CHARTS[0].rows()

    def of(bar: Bar, dtype: str) -> Speedup:
        found = speedup(tables, bar, dtype)
        assert found is not None, bar
        return found

    short, long, window, swin = CPU_BARS[0], CPU_BARS[1], CPU_BARS[3], CPU_BARS[10]
    int8 = _int8_over(_VIT, "batch 8")
    return (
        f"- **{of(window, 'fp32').torch:.1f}x** shifted-window attention (Swin-T, stage 1, fp32; "
        f"{of(window, 'bf16').torch:.1f}x in bf16)\n"
        f"- **{of(long, 'bf16').torch:.1f}x** attention over 1025 tokens in bf16 "
        f"({of(short, 'bf16').torch:.1f}x over 197)\n"
        f"- **{of(swin, 'fp32').torch:.1f}x** whole Swin-T inference in fp32, and {of(swin, 'fp32').runtime:.2f}x "
        f"OpenVINO's speed; int8 by `pyvit.quantize` makes ViT-B {int8['ours fp32']:.1f}x as fast as in fp32 "
        f"({int8['openvino']:.2f}x OpenVINO's INT8)\n"
    )


#: What a call may ask for (pyvit.dispatch.capabilities) -> its name in the tables, in their order.
FEATURES = {
    "grad": "gradients",
    "bias": "float bias",
    "bias_grad": "gradient of the bias",
    "bool_mask": "boolean mask",
    "causal": "causal mask",
    "gqa": "grouped key heads",
    "lse": "log-sum-exp returned",
    "lse_grad": "gradient of the log-sum-exp",
    "bias_table": "relative-position bias, with gradient",
    "logit_scale": "cosine attention (Swin V2), with gradient",
    "shift": "shifted windows",
    "padding": "maps that do not divide by the window",
    "pad_qkv": "padding tokens with a value, with gradient",
    "dropout": "dropout",
    "uint8": "uint8 pixels",
    "normalize": "mean and standard deviation",
    "overlap": "overlapping patches",
    "pos_embed": "position embeddings",
    "prefix": "class and register tokens",
    "keep": "a subset of the patches",
    "images_grad": "gradient of the images",
}

_OPERATORS = (
    "flash_attention",
    "flash_attention_varlen",
    "rope_attention",
    "decomposed_attention",
    "attention_map",
    "window_attention",
    "patch_embed",
)
_BACKENDS = ("cpu", "triton", "cuda", "torch")


def capabilities() -> str:
    """Tables of what each backend serves."""
    lines = []
    for op in _OPERATORS:
        table = CAPABILITIES[op]
        backends = [b for b in _BACKENDS if b in table]
        lines += [f"### {op}", "", f"| | {' | '.join(backends)} |", "|---" * (len(backends) + 1) + "|"]
        dtypes = [", ".join(str(d).removeprefix("torch.") for d in table[b].dtypes) for b in backends]
        rows = [("dtypes", dtypes)]
        if any(table[b].head_dim[1] < 1 << 30 for b in backends):
            rows.append(("head dimensions", [_head_dim(table[b].head_dim) for b in backends]))
        for feature, name in FEATURES.items():
            if any(feature in table[b].features for b in backends):
                rows.append((name, ["yes" if feature in table[b].features else "no" for b in backends]))
        lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows] + [""]
    return "\n".join(lines)


def _head_dim(limits: tuple[int, int, int]) -> str:
    low, high, multiple = limits
    if high >= 1 << 30:
        return "any"
    return f"{low} to {high}" + (f", multiples of {multiple}" if multiple > 1 else "")


def machines(prefix: str) -> str:
    """A table of every file of results, the newest first; ``prefix``: the way from the page to the results."""
    rows = []
    for path in html_report.committed(RESULTS):
        run = html_report.load(path)
        page = path.with_suffix(".md")
        dates = re.findall(r"\b20\d\d-\d\d-\d\d\b", page.read_text() if page.exists() else "")
        torch = next((found[1] for row in run.rows if (found := re.search(r"torch ([\w.+]+)", row.versions))), "")
        compared = [best for case in run.cases.values() if (best := html_report.best_peer(case))]
        kept = sum(ratio >= NEVER_LOSE for _, ratio in compared)
        links = [f"[{file.name}]({prefix}{path.parent.name}/{file.name})" for file in (page, path) if file.exists()]
        cells = (path.parent.name, dates[0] if dates else "", torch, len(run.cases), f"{kept} of {len(compared)}")
        rows.append((cells[1], f"| {' | '.join(map(str, cells))} | {', '.join(links)} |\n"))
    head = (
        "| machine | measured | torch | cases | not slower than the fastest peer | files |\n|---|---|---|---|---|---|\n"
    )
    return head + "".join(line for _, line in sorted(rows, key=lambda row: row[0], reverse=True))


def machines_page() -> str:
    """benchmarks/results/machines.md."""
    return (
        "# Machines\n\nWritten by `python -m benchmarks.docs`. `pyvit bench --share` adds a machine; "
        "`python -m benchmarks.html_report` makes one HTML page of all. Peers are other libraries under "
        f"the numerics rule that were timed in the same rounds; not slower: at least {NEVER_LOSE} times as fast.\n\n"
        + machines("")
    )


def support() -> str:
    """The support table of docs/install.md, with links as from the README."""
    text = (ROOT / "docs/install.md").read_text()
    return text.partition("<!-- support -->\n")[2].partition("<!-- /support -->")[0].replace("](", "](docs/")


#: Of ``python -m benchmarks.reliability``.
RELIABILITY = RESULTS / "amd-epyc-zen4-2-cores" / reliability.FILE


#: Pages with a part that is written here, between the lines ``<!-- NAME -->`` and ``<!-- /NAME -->``.
PARTS = (
    ("README.md", "numbers", numbers),
    ("README.md", "support", support),
    ("docs/choice.md", "capabilities", capabilities),
    ("docs/guides/int8.md", "accuracy", int8_table.committed),
    ("docs/guides/int8.md", "speed", int8_speed),
    ("docs/reliability.md", "long and large", lambda: reliability.table(reliability.read(RELIABILITY))),
    ("docs/benchmarks.md", "machines", lambda: machines("../benchmarks/results/")),
)


def with_part(text: str, name: str, part: str) -> str:
    """A page with ``part`` between its markers. Raises ValueError if it does not have them."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the page must have the lines {begin.strip()} and {end}")
    return before + begin + part + end + after


def files() -> dict[Path, str]:
    """Everything that is written: path -> content."""
    found = {IMAGES / chart.name: draw(chart) for chart in CHARTS} | {RESULTS / "machines.md": machines_page()}
    for page, name, part in PARTS:
        text = found.get(ROOT / page) or (ROOT / page).read_text()
        found[ROOT / page] = with_part(text, name, part())
    return found


if __name__ == "__main__":
    for path, content in files().items():
        path.write_text(content)
        print(path.relative_to(ROOT))
