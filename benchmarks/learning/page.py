"""docs/results.md from the records: tables of means and standard deviations over the seeds, and the curves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.learning.record import ROOT, Record, read
from benchmarks.learning.rows import ABLATION, ROWS, SEEDS, VARIANTS, Row
from pyvit.train.checkpoint import write_atomic

PAGE = ROOT / "docs" / "results.md"
CURVES = ROOT / "docs" / "images" / "results" / "curves.svg"


def records(name: str) -> list[Record]:
    return [record for seed in SEEDS if (record := read(name, seed)) is not None]


def cell(found: Sequence[Record], key: str, digits: int = 1) -> str:
    """Mean and standard deviation over the seeds."""
    values = [record.results[key] for record in found if key in record.results]
    if not values:
        return ""
    one = "" if key.startswith("untrained") else " (1 seed)"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else one
    return f"{statistics.mean(values):.{digits}f}{spread}"


def minutes(found: Sequence[Record]) -> str:
    return f"{statistics.mean(record.cpu_seconds for record in found) / 60:.1f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [_line(header), _line(["---"] * len(header)), *(_line(cells) for cells in lines)]


def _rows(table: str) -> list[tuple[Row, list[Record]]]:
    known = [(row, records(row.name)) for row in ROWS if row.table == table]
    return [(row, found) for row, found in known if found]


def _command(row: Row) -> str:
    init = f" --init runs/{row.init}" if row.init else ""
    return f"`pyvit train {row.command}{init}`"


def _with_peers(
    table: str, keys: Sequence[str], names: Sequence[str], first: Sequence[Sequence[str]] = ()
) -> list[str]:
    lines = [list(cells) for cells in first]
    for row, found in _rows(table):
        lines.append([row.name, _command(row), *(cell(found, key) for key in keys), minutes(found)])
        for name in row.peers:
            if others := records(name):
                lines.append([others[0].command, "", *(cell(others, key) for key in keys), minutes(others)])
    return _table(["run", "command", *names, "CPU minutes"], lines) if _rows(table) else []


def supervised() -> list[str]:
    return _with_peers("supervised", ["accuracy"], ["accuracy, %"])


def self_supervised() -> list[str]:
    keys = ["knn", "linear", "untrained knn", "untrained linear"]
    pixels = records("pixels")
    first = [["raw pixels", "", *(cell(pixels, key).replace(" (1 seed)", "") for key in keys), ""]] if pixels else []
    return _with_peers("self-supervised", keys, ["k-NN, %", "linear, %", "untrained, k-NN", "untrained, linear"], first)


def few_labels() -> list[str]:
    return _with_peers("few labels", ["accuracy"], ["accuracy, %"])


def sound() -> list[str]:
    return _with_peers("sound", ["accuracy"], ["accuracy, %"])


def captions() -> list[str]:
    keys = ["zero-shot", "text_to_image@1", "text_to_image@5", "image_to_text@1", "image_to_text@5", "parts"]
    names = ["zero-shot, %", "text to image @1", "@5", "image to text @1", "@5", "parts found, %"]
    return _with_peers("captions", keys, names)


def ablation() -> list[str]:
    """Each variant beside the whole. An effect is shown if it exceeds twice the standard error of the difference."""
    whole = records(ABLATION[0].name)
    lines = []
    for row, name in zip(ABLATION, VARIANTS, strict=True):
        if found := records(row.name):
            effects = [_effect(whole, found, key) if row is not ABLATION[0] else "" for key in ("knn", "linear")]
            lines.append([name, cell(found, "knn"), effects[0], cell(found, "linear"), effects[1]])
    return _table(["variant", "k-NN, %", "effect", "linear, %", "effect"], lines) if lines else []


def _effect(whole: Sequence[Record], found: Sequence[Record], key: str) -> str:
    ours, other = ([record.results[key] for record in each] for each in (whole, found))
    if min(len(ours), len(other)) < 2:
        return "not known from one seed"
    change = statistics.mean(other) - statistics.mean(ours)
    error = (statistics.variance(ours) / len(ours) + statistics.variance(other) / len(other)) ** 0.5
    return f"{change:+.1f}" if abs(change) > 2 * error else "no effect at this scale"


TABLES = {
    "supervised": supervised,
    "self-supervised": self_supervised,
    "few labels": few_labels,
    "ablation": ablation,
    "captions": captions,
    "sound": sound,
}


def write() -> None:
    """Rewrite the tables of the page and draw the curves."""
    text = PAGE.read_text()
    for name, table in TABLES.items():
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        if not start:
            raise ValueError(f"{PAGE.name} must have the line <!-- {name} -->")
        _, _, after = rest.partition(f"<!-- end {name} -->")
        text = "\n".join([f"{before}{start}", *table(), f"<!-- end {name} -->{after}"]).replace(f"{start}\n", start)
    write_atomic(PAGE, lambda file: file.write(text.encode()))
    draw()


def draw() -> None:
    """The loss of the first seed of every row, one small plot each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [(row.name, found[0].curve) for row in ROWS if (found := records(row.name)) and found[0].curve]
    if not shown:
        return
    columns = 4
    lines = -(-len(shown) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(2.6 * columns, 1.9 * lines), squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    for axis, (name, curve) in zip(axes.flat, shown, strict=False):
        axis.plot([100 * at for at, _ in curve], [loss for _, loss in curve], color="#c44e52", linewidth=1)
        axis.set_title(name, fontsize=8)
        axis.tick_params(labelsize=6)
    figure.supxlabel("per cent of the training", fontsize=8)
    figure.supylabel("training loss", fontsize=8)
    figure.tight_layout()
    CURVES.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context({"svg.hashsalt": "pyvit"}):
        figure.savefig(CURVES, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    write()
