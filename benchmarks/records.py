"""Files of results: results.csv (a row per provider), results.json (that, the machine, and the time of every round),
and models.csv (timm's columns)."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.cases import MODEL_MODES
from benchmarks.runner import COLUMNS, Row, as_record

#: Of results.json; it changes when a reader must.
FORMAT = 1


def read_csv(path: Path) -> list[Row]:
    """The rows of a results.csv; columns that it does not have keep their defaults."""
    kinds = {f.name: {"int": int, "float": float}.get(str(f.type), str) for f in fields(Row)}
    with path.open(newline="") as file:
        rows = [Row(**{name: kinds[name](value) for name, value in record.items()}) for record in csv.DictReader(file)]
    for row in rows:
        if row.mode in MODEL_MODES and not row.batch_size:  # older files: the label tells it
            row.batch_size, row.img_size = int(row.case.removeprefix("batch ")), 224
            row.images_per_s = 1e3 * row.batch_size / row.median_ms
    return rows


def write_csv(rows: Sequence[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(as_record(row) for row in rows)


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return [float(f"{v:.5g}") for v in value] if isinstance(value, tuple) else value


def write_json(rows: Sequence[Row], about: dict[str, Any], path: Path) -> None:
    """One row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({f.name: _plain(getattr(row, f.name)) for f in fields(Row)}) for row in rows]
    head = f'{{"format": {FORMAT},\n"machine": {json.dumps(about)},\n"rows": [\n'
    path.write_text(head + ",\n".join(lines) + "\n]}\n")


def read_json(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The machine and the rows. Raises ValueError for a file of another format."""
    found = json.loads(path.read_text())
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{path} is not a results.json of format {FORMAT}")
    known = {f.name: str(f.type) for f in fields(Row)}
    rows = []
    for record in found["rows"]:
        values = {name: value for name, value in record.items() if name in known}
        values = {name: math.nan if known[name] == "float" and v is None else v for name, v in values.items()}
        rows.append(Row(**{**values, "samples": tuple(values.get("samples") or ())}))
    return found["machine"], rows


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The machine and rows of a results.json or results.csv, or of the folder that holds them. A CSV has no
    machine."""
    if path.is_dir():
        found = [path / name for name in ("results.json", "results.csv") if (path / name).exists()]
        if not found:
            raise FileNotFoundError(f"{path} has no results.json or results.csv")
        path = found[0]
    return read_json(path) if path.suffix == ".json" else ({}, read_csv(path))


#: Columns of timm's benchmark.py, for inference and training, and ours after them.
_TIMM = ("samples_per_sec", "step_time", "batch_size", "img_size")
MODEL_COLUMNS = (
    "model", *(f"infer_{name}" for name in _TIMM), "infer_gmacs", *(f"train_{name}" for name in _TIMM), "param_count",
    "provider", "dtype", "threads", "best_peer", "best_ratio", "percent_of_ceiling", "bound", "peak_mem", "joules",
    "images_per_dollar", "max_err", "allowed_err", "status", "versions",
)  # fmt: skip


def images_per_dollar(row: Row, price: float) -> float:
    """At ``price`` dollars an hour for the machine; NaN if either is not known."""
    return row.images_per_s * 3600 / price if price else math.nan


def model_records(rows: Sequence[Row], price: float = 0.0) -> list[dict[str, object]]:
    """models.csv: every timed row of a model. Times in milliseconds, parameters in millions, as timm has them."""
    from benchmarks import models

    found = []
    for row in rows:
        if row.mode not in MODEL_MODES or not row.timed:
            continue
        kind = "train" if row.mode == "train" else "infer"
        values = (f"{row.images_per_s:.2f}", f"{row.median_ms:.3f}", row.batch_size, row.img_size)
        record: dict[str, object] = dict.fromkeys(MODEL_COLUMNS, "")
        record |= {f"{kind}_{name}": value for name, value in zip(_TIMM, values, strict=True)}
        if kind == "infer":
            record["infer_gmacs"] = f"{models.flops(row.op, 1, False) / 2e9:.2f}"
        record |= {name: value for name, value in as_record(row).items() if name in MODEL_COLUMNS}
        record["model"], record["param_count"] = row.op, f"{models.parameters(row.op) / 1e6:.2f}"
        record["images_per_dollar"] = f"{images_per_dollar(row, price):.0f}" if price else ""
        found.append(record)
    return found


def write_models(rows: Sequence[Row], path: Path, price: float = 0.0) -> bool:
    """Whether there were any models to write."""
    records = model_records(rows, price)
    if records:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, MODEL_COLUMNS)
            writer.writeheader()
            writer.writerows(records)
    return bool(records)
