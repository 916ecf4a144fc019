"""The folder of an embedding: part-00000.parquet (or .npy, .safetensors), ..., a manifest, and the list of unreadable
images.

A part and its record, part-00000.json, are complete or not there: the record is written first, the part is renamed into
place last. So a part that exists is never written again, and one that does not is computed as a whole.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pyvit.embed.source import Images, _pyarrow
from pyvit.train.checkpoint import load_json, save_json, write_atomic

FORMATS = ("parquet", "npy", "safetensors")
STORED = ("float16", "float32")

MANIFEST, INPUTS, UNREADABLE = "manifest.json", "inputs.jsonl", "unreadable.txt"


@dataclass
class Part:
    """Rows of an embedding: position in the source, name, class (if classes are stored), and vectors (n, D)."""

    index: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    labels: list[str | None] | None = None
    vectors: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    unreadable: list[tuple[str, str]] = field(default_factory=list)


def part_path(folder: Path, number: int, form: str) -> Path:
    return folder / f"part-{number:05d}.{form}"


def _record_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.json"


def write_part(folder: Path, number: int, part: Part, form: str) -> None:
    record: dict[str, Any] = {"rows": len(part.names), "unreadable": part.unreadable}
    if form != "parquet":
        record |= {"index": part.index, "path": part.names}
        record |= {} if part.labels is None else {"label": part.labels}
    save_json(_record_path(folder, number), record)
    write_atomic(part_path(folder, number, form), lambda file: file.write(_content(part, form)))


def _content(part: Part, form: str) -> bytes | memoryview:
    buffer = io.BytesIO()
    if form == "npy":
        np.save(buffer, part.vectors)
    elif form == "safetensors":
        from safetensors.numpy import save

        return save({"embedding": part.vectors, "index": np.asarray(part.index, np.int64)})
    else:
        pq = _pyarrow("write")
        import pyarrow as pa

        vectors = pa.FixedSizeListArray.from_arrays(pa.array(part.vectors.reshape(-1)), part.vectors.shape[1])
        columns = {"index": pa.array(part.index, pa.int64()), "path": pa.array(part.names, pa.string())}
        if part.labels is not None:
            columns["label"] = pa.array(part.labels, pa.string())
        table = pa.table({**columns, "embedding": vectors})
        # Vectors do not compress, and uncompressed ones are read at the speed of memory.
        codecs = dict.fromkeys(columns, "zstd") | {"embedding.list.element": "none"}
        pq.write_table(table, buffer, compression=codecs, use_dictionary=["label"], write_statistics=list(columns))
    return buffer.getbuffer()


def read_part(folder: Path, number: int, form: str) -> Part:
    """A part; the vectors of .npy and .safetensors stay on disk until they are used."""
    path, record = part_path(folder, number, form), load_json(_record_path(folder, number))
    unreadable = [(name, reason) for name, reason in record["unreadable"]]
    if form == "parquet":
        table = _pyarrow("read").read_table(path, memory_map=True)
        column = table["embedding"].combine_chunks()
        width = column.type.list_size
        vectors = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
        labels = table["label"].to_pylist() if "label" in table.column_names else None
        return Part(table["index"].to_pylist(), table["path"].to_pylist(), labels, vectors, unreadable)
    if form == "npy":
        vectors = np.load(path, mmap_mode="r") if record["rows"] else np.load(path)
    else:
        from safetensors import safe_open

        with safe_open(path, "numpy") as file:
            vectors = file.get_tensor("embedding")
    return Part(record["index"], record["path"], record.get("label"), vectors, unreadable)


def prepare(folder: Path, manifest: dict[str, Any], images: Images) -> list[int]:
    """Create ``folder`` for the embedding that ``manifest`` describes, or continue one: the numbers of the parts that
    are missing.

    Raises ValueError, with what differs, if the folder has an embedding of other images, by another model, or in
    another form, or if it has other files. The caller holds the folder's lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MANIFEST).exists():
        _check_same(folder, manifest, images)
    else:
        others = [p.name for p in folder.iterdir() if p.name not in (INPUTS, "run.lock") and not p.name.startswith(".")]
        if others:
            raise ValueError(f"embed: {folder} has other files, such as {min(others)}; choose an empty --out")
        lines = (json.dumps(entry) + "\n" for entry in images.files)
        write_atomic(folder / INPUTS, lambda file: file.writelines(line.encode() for line in lines))
        save_json(folder / MANIFEST, manifest)
    for stale in itertools.chain(folder.glob(".part-*"), folder.glob(".manifest*"), folder.glob(f".{UNREADABLE}*")):
        stale.unlink()  # of an interrupted write
    return [n for n in range(manifest["parts"]) if not part_path(folder, n, manifest["format"]).exists()]


def _check_same(folder: Path, manifest: dict[str, Any], images: Images) -> None:
    before = open_manifest(folder)
    end = "; choose another --out"
    if before["encoder"]["fingerprint"] != manifest["encoder"]["fingerprint"]:
        old, new = before["encoder"], manifest["encoder"]
        settings = [k for k in ("dtype", "size", "crop", "mean", "std", "native") if _plain(old[k]) != _plain(new[k])]
        named = [
            e["model"] + (f" with {e['checkpoint']}" if e["checkpoint"] else "") + f" [{e['fingerprint']}]"
            for e in (old, new)
        ]
        told = ", ".join(f"{k} {old[k]}, not {new[k]}" for k in settings) or f"{named[0]}, not {named[1]}"
        raise ValueError(f"embed: {folder} has vectors of another model: {told}{end}")
    for key in ("format", "stored", "per_part", "labels"):
        if before[key] != manifest[key]:
            raise ValueError(f"embed: {folder} was made with {key} {before[key]}, got {manifest[key]}{end}")
    with (folder / INPUTS).open() as file:
        held = [tuple(json.loads(line)) for line in file]
    if held != images.files:
        raise ValueError(f"embed: the images have changed since {folder} was begun: {_change(held, images.files)}{end}")


def _change(before: Sequence[tuple[str, int]], now: Sequence[tuple[str, int]]) -> str:
    """The difference of two lists of (name, size), by the names of some files."""
    old, new = dict(before), dict(now)
    lists = {
        "new": [name for name in new if name not in old],
        "missing": [name for name in old if name not in new],
        "of another size": [name for name, size in new.items() if old.get(name, size) != size],
    }
    told = [f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in lists.items() if names]
    return "; ".join(told) or "their order"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def open_manifest(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).exists():
        raise FileNotFoundError(f"{folder} has no {MANIFEST}: it must be the --out of 'pyvit embed'")
    return load_json(folder / MANIFEST)


def finish(folder: Path, manifest: dict[str, Any]) -> tuple[int, list[tuple[str, str]]]:
    """Write the list of unreadable images, and the number of rows of each part into the manifest. Returns the rows and
    the unreadable images, with reasons."""
    records = [load_json(_record_path(folder, number)) for number in range(manifest["parts"])]
    unreadable = [(name, reason) for record in records for name, reason in record["unreadable"]]
    lines = [f"{printable(name)}\t{printable(reason)}\n" for name, reason in unreadable]
    write_atomic(folder / UNREADABLE, lambda file: file.writelines(line.encode() for line in lines))
    rows = [record["rows"] for record in records]
    done = {"rows": sum(rows), "unreadable": len(unreadable), "rows_of_parts": rows}
    save_json(folder / MANIFEST, {**manifest, "complete": done})
    return sum(rows), unreadable


def printable(text: str) -> str:
    """``text`` with control characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def parts(folder: Path, manifest: dict[str, Any]) -> Iterator[Part]:
    """The parts that are there, in order."""
    for number in range(manifest["parts"]):
        if part_path(folder, number, manifest["format"]).exists():
            yield read_part(folder, number, manifest["format"])
