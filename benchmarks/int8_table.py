"""The committed results of ``python -m benchmarks.int8_accuracy``, and the table of them in docs/guides/int8.md."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "int8_accuracy.csv"


@dataclasses.dataclass
class Result:
    """A model in bfloat16 and in bfloat16 with int8 layers, against itself in float32.

    ``tokens``: how many dense features were compared. ``error``: relative, of logits, or of class features where there
    are none. ``image``: cosine of class features. ``int8_to_bf16``: the least dense cosine between those two. Agreement
    of the top-1 and accuracy are in per cent; accuracy is NaN without labels.
    """

    name: str
    weights: str
    quantized: int
    layers: int
    inputs: int
    tokens: int
    bf16_error: float
    int8_error: float
    bf16_image_least: float
    int8_image_least: float
    bf16_dense_median: float
    int8_dense_median: float
    bf16_dense_least: float
    int8_dense_least: float
    int8_to_bf16_least: float
    bf16_agreement: float
    int8_agreement: float
    fp32_accuracy: float = math.nan
    bf16_accuracy: float = math.nan
    int8_accuracy: float = math.nan

    def line(self) -> str:
        cells = [self.name, self.weights, f"{self.quantized} of {self.layers}"]
        cells += [f"{self.bf16_error:.4f} / {self.int8_error:.4f}"]
        cells += [f"{self.bf16_image_least:.4f} / {self.int8_image_least:.4f}"]
        cells += [f"{self.bf16_dense_median:.5f} / {self.int8_dense_median:.5f}"]
        cells += [f"{self.bf16_dense_least:.4f} / {self.int8_dense_least:.4f}", f"{self.int8_to_bf16_least:.4f}"]
        cells += [f"{self.bf16_agreement:.1f} / {self.int8_agreement:.1f}"]
        accuracy = (self.fp32_accuracy, self.bf16_accuracy, self.int8_accuracy)
        cells += ["" if math.isnan(accuracy[0]) else " / ".join(f"{value:.2f}" for value in accuracy)]
        return f"| {' | '.join(cells)} |"


HEAD = (
    "| model | weights | int8 layers | error | class cosine, least | dense cosine, median | dense cosine, least | "
    "the same, int8 to bf16 | top-1 agreement, % | accuracy, fp32 / bf16 / int8, % |",
    "|---" * 10 + "|",
)


def table(results: Sequence[Result]) -> str:
    return "\n".join([*HEAD, *(result.line() for result in results)]) + "\n"


def write(results: Sequence[Result], path: Path = RESULTS) -> None:
    names = [field.name for field in dataclasses.fields(Result)]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for result in results:
            values = (getattr(result, name) for name in names)
            writer.writerow([f"{value:.7g}" if isinstance(value, float) else value for value in values])


def read(path: Path = RESULTS) -> list[Result]:
    kinds = {field.name: {"int": int, "float": float}.get(str(field.type), str) for field in dataclasses.fields(Result)}
    with path.open(newline="") as file:
        return [
            Result(**{name: kinds[name](value) for name, value in record.items()}) for record in csv.DictReader(file)
        ]


def merge(results: Sequence[Result], path: Path = RESULTS) -> None:
    """Writes results in place of those of the same models and weights; the others stay."""
    kept = {(each.name, each.weights): each for each in (read(path) if path.exists() else ())}
    write([*{**kept, **{(each.name, each.weights): each for each in results}}.values()], path)


def committed() -> str:
    """The table of the committed results."""
    return table(read())
