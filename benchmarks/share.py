"""Results of a machine in the form that is committed: ``pyvit bench --share``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import machine, report
from benchmarks.runner import Results

_CHECKOUT = Path(__file__).resolve().parent / "results"
#: Where results are shared: a checkout's, or a folder of the present one.
RESULTS = _CHECKOUT if _CHECKOUT.is_dir() else Path("results")


def write(results: Results, about: dict[str, Any], folder: Path, price: float = 0.0) -> list[Path]:
    """Write ``folder``/MACHINE/. Returns the paths. results.json and results.md hold the processor, versions, ceilings,
    command line and state of the machine with the rows."""
    out = folder / machine.slug(about["device"])
    return report.write(results, about, out, plots=False, price=price, html=False)
