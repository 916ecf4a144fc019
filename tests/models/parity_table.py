"""``python -m tests.models.parity_table``: run the parity tests and write their errors to docs/models.md.

Needs transformers, timm, open_clip and torchvision. If a test fails or is skipped, the table is not changed.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from tests import peers

ROOT = Path(__file__).parents[2]
MARKERS = "<!-- parity -->", "<!-- /parity -->"


class _Skips:
    """Skipped tests and their reasons: a row of the table may depend on them."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            self.reasons.append(f"{report.nodeid}: {report.longrepr}")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.reasons.append(f"{report.nodeid}: {report.longrepr}")


def table(rows: list[dict]) -> list[str]:
    """A line for each pair of classes and dtype: number of cases, and the largest error of each kind."""
    groups: dict[tuple[str, ...], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["peer"], row["model"], row["class"], row["dtype"]), []).append(row)
    lines = ["| here | peer | dtype | cases | outputs | gradients |", "|---|---|---|---|---|---|"]
    for (peer, model, name, dtype), cases in sorted(groups.items()):
        errors = ([case[kind] for case in cases] for kind in ("output", "gradient"))
        worst = " | ".join("-" if None in found else f"{max(found):.1e}" for found in errors)
        lines.append(f"| `{model}` | {peer} `{name}` | {dtype} | {len(cases)} | {worst} |")
    return lines


def write(page: Path, lines: list[str]) -> None:
    """Replace the lines between the markers of ``page``. Raises ValueError if there are none."""
    before, start, rest = page.read_text().partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not start or not end:
        raise ValueError(f"{page} wants the lines {MARKERS[0]} and {MARKERS[1]}, and has not both")
    page.write_text("\n".join((before + start, *lines, end + after)))


def main() -> int:
    skips = _Skips()
    try:
        peers.torchvision()  # before the others ask for it: one that was built for another torch needs help at import
    except pytest.skip.Exception as absent:
        print(f"docs/models.md is left as it was: {absent}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder, "parity.jsonl")
        os.environ["PYVIT_PARITY"] = str(record)
        code = pytest.main(
            ["-q", "-k", "test_parity or test_vitdet", "--rootdir", str(ROOT), str(ROOT / "tests/models")],
            plugins=[skips],
        )
        if code or skips.reasons:
            print("docs/models.md is left as it was:", *skips.reasons or ["tests failed"], sep="\n", file=sys.stderr)
            return 1
        rows = [json.loads(line) for line in record.read_text().splitlines()]
    write(ROOT / "docs/models.md", table(rows))
    print(f"{len(rows)} cases on torch {torch.__version__.partition('+')[0]}: docs/models.md is written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
