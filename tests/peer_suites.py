"""Run the model tests of timm, transformers and torchvision with pyvit's kernels in every model that they build.

    python tests/peer_suites.py --timm CHECKOUT --transformers CHECKOUT --torchvision CHECKOUT

A CHECKOUT is the library's repository at the installed version; nothing in it changes. A pytest plugin accelerates each
model where the library builds it. Tests that fail run again without pyvit. Prints one row for each family, and the
tests that fail only with pyvit, on which the exit status depends. ``--families`` selects some, ``-k`` and others after
``--`` go to pytest.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

#: library -> (file or folder of tests, or None for a file per family; family -> regular expression of test ids)
SUITES: dict[str, tuple[str | None, dict[str, str]]] = {
    "timm": (
        "tests/test_models.py",
        {
            "ViT": r"-(vit|flexivit|naflexvit)_(?!.*_r\d)",
            "DeiT": r"-deit3?_",
            "EVA, BEiT": r"-(eva|beit)",
            "Swin, Swin V2": r"-swin(v2)?_",
            "hybrids": r"-(vit_.*_r\d|maxvit|coatnet|crossvit|convit|levit|cait|xcit|twins|pvt|nest|hiera|mvitv2|volo)",
        },
    ),
    "torchvision": ("test/test_models.py", {"ViT": r"vit_", "Swin, Swin V2": r"swin_"}),
    "transformers": (
        None,
        {
            name: rf"^tests/models/{name}/"
            for name in (
                "vit", "deit", "beit", "vit_mae", "vit_msn", "ijepa", "dinov2", "dinov2_with_registers", "dinov3_vit",
                "clip", "siglip", "siglip2", "swin", "swinv2", "audio_spectrogram_transformer", "aimv2", "radio",
                "qwen2_vl", "qwen2_5_vl",
            )
        },
    ),
}  # fmt: skip


def _building(library: str) -> list[tuple[Any, str, str]]:
    """(object or table, name, kind) of what builds a library's models: functions that return one, or a method that
    every model calls at the end of its constructor."""
    if library == "timm":
        import timm

        return [(place, "create_model", "function") for place in (timm, timm.models, timm.models._factory)]
    if library == "torchvision":
        from torchvision.models import _api

        return [(_api.BUILTIN_MODELS, name, "function") for name in _api.BUILTIN_MODELS]
    from transformers import PreTrainedModel

    return [(PreTrainedModel, "post_init", "method")]


class Plugin:
    """pytest plugin: selects a family's tests, accelerates models (``with_pyvit``), and appends to a file for each test
    its id, its outcome and how many modules were replaced."""

    def __init__(self, library: str, pattern: str, results: Path, with_pyvit: bool) -> None:
        self.library, self.pattern, self.results, self.with_pyvit = library, pattern, results, with_pyvit
        self.replaced = 0
        self.outcomes: set[str] = set()

    def pytest_configure(self) -> None:
        for place, name, kind in _building(self.library):  # imports the installed library, not the checkout's
            if not self.with_pyvit:
                continue
            table = place if isinstance(place, dict) else vars(place)
            wrapped = self.wrap(table[name], kind)
            if isinstance(place, dict):
                place[name] = wrapped
            else:
                setattr(place, name, wrapped)

    def wrap(self, build: Callable[..., Any], kind: str) -> Callable[..., Any]:
        import pyvit

        @functools.wraps(build)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = build(*args, **kwargs)
            self.replaced += len(pyvit.accelerate(args[0] if kind == "method" else result).replaced)
            return result

        return wrapped

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        chosen = [item for item in items if re.search(self.pattern, item.nodeid)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
        items[:] = chosen

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[object]:
        self.replaced, self.outcomes = 0, set()
        result = yield
        outcome = next((o for o in ("failed", "skipped") if o in self.outcomes), "passed")
        with self.results.open("a") as file:
            print(json.dumps({"id": item.nodeid, "outcome": outcome, "replaced": self.replaced}), file=file)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.outcomes.add(report.outcome)


def run(
    checkout: Path, library: str, pattern: str, paths: Sequence[str], options: Sequence[str], *, with_pyvit: bool
) -> dict[str, dict[str, Any]]:
    """Results of a family's tests by id. pytest runs in a process of its own, in the checkout."""
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "results.jsonl"
        this = [sys.executable, str(Path(__file__).resolve()), "--child", library, pattern, str(results)]
        command = [*this, "with" if with_pyvit else "without", "-q", "--tb=short", *options, *paths]
        done = subprocess.run(command, cwd=checkout, check=False)
        # 0 and 1: tests ran, and some failed. 5: none was selected.
        if done.returncode not in (0, 1, 5):
            raise RuntimeError(f"pytest ended with status {done.returncode}")
        lines = results.read_text().splitlines() if results.exists() else []
    return {row["id"]: row for row in map(json.loads, lines)}


def child(library: str, pattern: str, results: str, with_pyvit: str, *arguments: str) -> int:
    sys.path.pop(0)  # this file's folder, whose modules are not the suite's
    return int(pytest.main([*arguments], plugins=[Plugin(library, pattern, Path(results), with_pyvit == "with")]))


def compare(checkout: Path, library: str, family: str, options: Sequence[str]) -> tuple[str, list[str]]:
    """A family's row of the table, and the tests that fail only with pyvit."""
    tests, families = SUITES[library]
    pattern = families[family]
    paths = [tests] if tests else [str(p) for p in sorted(checkout.glob(f"tests/models/{family}/test_modeling_*.py"))]
    found = run(checkout, library, pattern, paths, options, with_pyvit=True) if paths else {}
    failed = [name for name, row in found.items() if row["outcome"] == "failed"]
    again = run(checkout, library, pattern, failed, (), with_pyvit=False) if failed else {}
    worse = [name for name in failed if again.get(name, {}).get("outcome") != "failed"]
    count = Counter(row["outcome"] for row in found.values())
    ours = sum(row["outcome"] == "passed" and row["replaced"] > 0 for row in found.values())
    cells = (library, family, count["passed"], ours, count["skipped"], len(failed) - len(worse), len(worse))
    return f"| {' | '.join(map(str, cells))} |", worse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for library in SUITES:
        parser.add_argument(f"--{library}", type=Path, metavar="CHECKOUT")
    parser.add_argument("--families", nargs="*", metavar="NAME", help="such as ViT or swin; all by default")
    parser.add_argument("options", nargs="*", metavar="-- OPTIONS", help="of pytest")
    args = parser.parse_args()
    checkouts = {library: getattr(args, library) for library in SUITES if getattr(args, library)}
    if not checkouts:
        parser.error("give a checkout: " + ", ".join(f"--{library}" for library in SUITES))
    for library, checkout in checkouts.items():
        if not (checkout / (SUITES[library][0] or "tests/models")).exists():
            parser.error(f"--{library} must be a checkout of {library} with its tests, got {checkout}")
    titles = "passed", "of these with pyvit's modules", "skipped", "failed without pyvit too", "failed only with pyvit"
    lines = [f"| library | family | {' | '.join(titles)} |", f"|---|---|{'---:|' * len(titles)}"]
    worse: list[str] = []
    for library, checkout in checkouts.items():
        for family in SUITES[library][1]:
            if args.families is not None and family not in args.families:
                continue
            try:
                row, names = compare(checkout.resolve(), library, family, args.options)
            except RuntimeError as error:  # for example a module that the tests import is not installed
                row, names = f"| {library} | {family} | {error} |", [f"{library} {family}: {error}"]
            lines.append(row)
            worse += names
            print(row, *names, sep="\n", flush=True)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", *checkouts))
    print(f"\n{versions}, {datetime.date.today()}\n", *lines, "", *worse, sep="\n")
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main())
