"""How much of timm and transformers runs on pyvit: ``python -m pyvit.integrations.coverage``.

Each kind of vision model with attention is built small with random weights and accelerated. Outputs and all gradients
are compared with the original's by the numerics rule of :mod:`pyvit.testing`, and inference is timed. Every model has a
record in build/coverage, and a second call only examines those without one. A model that crashes or hangs takes no
other along: models are examined in a child process.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fnmatch
import gc
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

import pyvit
from pyvit.integrations import coverage_page
from pyvit.integrations.coverage_models import LIBRARIES, Case, attention_kinds, build, tensors
from pyvit.testing import GRADIENT_FACTOR, Comparison, compare

#: What is left and does not weigh values by a softmax of products of queries and keys: beginnings of notes, parts of
#: the names of classes.
_OTHER_NOTES = ("attends over channels", "linear attention", "a state space model", "its weights are no products")
_OTHER_NAMES = re.compile(
    "MultiscaleDeformableAttention|HungarianMatcher|LinearSelfAttention|EfficientAdditiveAttention|GRUCell|FeaturesToDepth"
)
_RECORDS = Path("build/coverage")
_SECONDS = 60.0  # of processor time for one model
_GIB = 12  # of memory for one model
_ATTENTION = ("flash_attention", "rope_attention", "decomposed_attention", "window_attention")

Record = coverage_page.Record
Result = tuple[list[Tensor], dict[str, Tensor]]


def examine(case: Case) -> Record:
    """The record of one model: what was replaced and left, errors, speed-up and verdict.

    Raises nothing of the model's: a model that cannot be built, or does not run, has the verdict ``not run``, and one
    that does not run once accelerated ``fails``.
    """
    record: Record = {**case._asdict(), "verdict": "not run"}
    try:
        model, inputs = build(case)
        record["attention"] = attention_kinds(model)
        record["parameters"] = sum(p.numel() for p in model.parameters())
        if not record["attention"]:
            return {**record, "verdict": "no attention"}
        theirs = _results(model, inputs)
        exact, record["reference"] = _exact(model, inputs)
        original = copy.deepcopy(model)
        record["verdict"] = "fails"
        report = pyvit.accelerate(model)
        record["replaced"] = sorted(Counter((_short(r.kind), r.note) for r in report.replaced).items())
        record["left"] = sorted(Counter((_short(r.kind), r.note) for r in report.left).items())
        ours = _results(model, inputs)
        record |= _errors(ours, theirs, exact or theirs)
        record |= _calls(model, inputs)
        record["speedup"] = _speedup(original, model, inputs)
        record["verdict"] = _verdict(record)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = (str(error).strip() or "no message").splitlines()[0]
        record["reason"] = f"{type(error).__name__}: {text[:160]} ({Path(where.filename).name}:{where.lineno})"
    return record


def _verdict(record: Record) -> str:
    attends = any(name in note for (_, note), _ in record["replaced"] for name in _ATTENTION)
    other = [_is_other(what, note) for (what, note), _ in record["left"]]
    if not record["passed"]:
        return "differs"
    if not attends or not record["served"]:
        return "other" if other and all(other) else "none"
    # Modules of another kind have a softmax of torch's each.
    return "full" if all(other) and record["by_torch"] <= sum(count for _, count in record["left"]) else "part"


def _is_other(what: str, note: str) -> bool:
    return note.startswith(_OTHER_NOTES) or bool(_OTHER_NAMES.search(what))


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _results(model: nn.Module, inputs: dict[str, Any]) -> Result:
    """The outputs, and the gradients of all parameters and of the input."""
    model.zero_grad()
    model.eval()  # timm's LeViT forgets what it computed of its biases
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    ready = {k: v.to(dtype, copy=True) if v.is_floating_point() else v for k, v in inputs.items()}
    leaves = {k: v.requires_grad_() for k, v in ready.items() if v.is_floating_point()}
    out = tensors(model(**ready))
    generator = torch.Generator().manual_seed(1)
    loss = sum((t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in out if t.requires_grad)
    loss.backward()  # type: ignore[union-attr]
    gradients = {name: p.grad for name, p in (*model.named_parameters(), *leaves.items()) if p.grad is not None}
    model.zero_grad()
    model.eval()
    return [t.detach() for t in out], gradients


def _exact(model: nn.Module, inputs: dict[str, Any]) -> tuple[Result | None, str]:
    """The results in float64, or why there are none."""
    try:
        return _results(copy.deepcopy(model).double(), inputs), "float64"
    except Exception as error:  # a model that makes float32 tensors of its own
        return None, f"float32, as in float64 the original raises {type(error).__name__}"


def _errors(ours: Result, theirs: Result, exact: Result) -> Record:
    """The largest errors of outputs and gradients relative to the largest value, ours and the original's, and whether
    they pass by the rule that the tests of models use."""
    if len(ours[0]) != len(theirs[0]) or ours[1].keys() != theirs[1].keys():
        return {"passed": False, "error": None, "note": "other outputs, or gradients of other parameters"}
    outputs = compare("output", ours[0], theirs[0], exact[0], raises=False)
    names = [name for name, gradient in exact[1].items() if gradient.numel()]
    peaks = {name: float(exact[1][name].abs().max()) for name in names}
    largest = max(peaks.values())
    # Rounding passes through all layers: that of a small gradient is that of the larger ones that it comes from.
    least = [max(peaks[name], 0.1 * largest) for name in names]
    sides = ([side[1][name] for name in names] for side in (ours, theirs, exact))
    gradients = compare("gradient", *sides, GRADIENT_FACTOR, labels=names, magnitudes=least, raises=False)
    scale = max(c.magnitude for c in outputs)
    failed = [c for c in (*outputs, *gradients) if not c.passed]
    return {
        "passed": not failed,
        "error": _relative(outputs, "error", scale),
        "original_error": _relative(outputs, "naive_error", scale),
        "gradient_error": _relative(gradients, "error", largest),
        "original_gradient_error": _relative(gradients, "naive_error", largest),
        "note": "; ".join(map(str, failed[:3])),
    }


def _relative(found: Sequence[Comparison], which: str, scale: float) -> float:
    return max(getattr(c, which) for c in found) / max(scale, 1e-30)


def _calls(model: nn.Module, inputs: dict[str, Any]) -> Record:
    """How many attentions a forward of the accelerated model runs on pyvit's operators, and how many softmaxes and
    fused attentions on torch's."""
    found = _attentions(model, inputs)
    return {"by_torch": found["torch"], "served": found["pyvit"]}


def _attentions(model: nn.Module, inputs: dict[str, Any]) -> Counter[str]:
    found: Counter[str] = Counter()
    activity = [torch.profiler.ProfilerActivity.CPU]
    with torch.no_grad(), torch.profiler.profile(activities=activity) as profile:
        model(**inputs)
    whole = ("aten::scaled_dot_product_attention", "aten::_native_multi_head_attention", "aten::softmax")
    for event in profile.events():
        parents, parent = [], event.cpu_parent
        while parent is not None:
            parents.append(parent.name)
            parent = parent.cpu_parent
        inside = any(name.startswith("pyvit") or name in whole for name in parents)
        if event.name in whole and not inside:
            found["torch"] += 1
        if re.match(r"pyvit::\w*attention", event.name) and not any(name.startswith("pyvit") for name in parents):
            found["pyvit"] += 1
    return found


def _speedup(original: nn.Module, model: nn.Module, inputs: dict[str, Any], seconds: float = 0.3) -> float:
    """Time of the original's forward over the accelerated model's, the smallest of each, by turns."""
    best = [float("inf"), float("inf")]
    end, rounds = time.perf_counter() + seconds, 0
    with torch.no_grad():
        while rounds < 3 or time.perf_counter() < end:
            for at, side in enumerate((original, model)):
                start = time.perf_counter()
                side(**inputs)
                best[at] = min(best[at], time.perf_counter() - start)
            rounds += 1
    return best[0] / best[1]


# The child process


def _serve(pipe: Any) -> None:
    """Examine the cases that come through the pipe."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ["HF_HUB_OFFLINE"] = "1"  # random weights: nothing is fetched
    prepare()
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (_GIB << 30, resource.RLIM_INFINITY))
    while True:
        case = pipe.recv()
        with contextlib.ExitStack() as stack:
            quiet = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(quiet))
            stack.enter_context(contextlib.redirect_stderr(quiet))
            stack.enter_context(_limited())
            record = examine(case)
        pipe.send(record)
        gc.collect()


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """TimeoutError after too much processor time, where the system counts it."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {_SECONDS:.0f} s of processor time")

    if not hasattr(signal, "setitimer"):
        yield
        return
    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def prepare() -> None:
    """Import transformers' vision part before timm: it remembers whether torchvision is there."""
    for name in ("transformers.image_utils", "timm"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


class Child:
    """A process that examines models, started again if one of them ends it."""

    def __init__(self) -> None:
        self.process: multiprocessing.process.BaseProcess | None = None

    def __call__(self, case: Case, seconds: float = 15 * _SECONDS) -> Record:
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, there = context.Pipe()
            self.process = context.Process(target=_serve, args=(there,), daemon=True)
            self.process.start()
            there.close()
        self.pipe.send(case)
        try:
            if self.pipe.poll(seconds):
                return self.pipe.recv()
            reason = f"no result after {seconds:.0f} s"
        except (EOFError, ConnectionResetError):
            self.process.join(5)
            reason = f"the process ended with {self.process.exitcode}"
        self.close()
        return {**case._asdict(), "verdict": "not run", "reason": reason}

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


# Records


def _versions(library: str) -> str:
    return f"{library} {importlib.metadata.version(library)}"


def _path(case: Case) -> Path:
    return _RECORDS / case.library / f"{case.name}.json"


def cases(library: str, progress: Any = lambda text: None, fresh: bool = False) -> list[Case]:
    """The models of a library, from the list that an earlier call wrote for the same version."""
    path = _RECORDS / f"{_versions(library).replace(' ', '-')}.json"
    if path.exists() and not fresh:
        return [Case(item[0], item[1], item[2], tuple(item[3])) for item in json.loads(path.read_text())]
    prepare()
    found = LIBRARIES[library][0](progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))
    return found


def run(found: list[Case], out: TextIO, again: bool = False) -> list[Record]:
    """The records of these models; examines those that have none, or all ``again``."""
    child, records = Child(), []
    try:
        for number, case in enumerate(found):
            path = _path(case)
            if path.exists() and not again:
                records.append(json.loads(path.read_text()))
                continue
            record = child(case)
            if "allocate memory" in record.get("reason", ""):  # with what models before it have left
                child.close()
                record = child(case)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record, indent=1))
            records.append(record)
            print(f"{number + 1}/{len(found)} {case.name}: {summary(record)}", file=out, flush=True)
    finally:
        child.close()
    return records


def summary(record: Record) -> str:
    """A record in one line."""
    parts = [record["verdict"]]
    if record.get("error") is not None:
        parts.append(f"error {record['error']:.1e} ({record['original_error']:.1e})")
        parts.append(f"gradients {record['gradient_error']:.1e} ({record['original_gradient_error']:.1e})")
    if "speedup" in record:
        parts.append(f"{record['speedup']:.2f}x")
    if record.get("by_torch"):
        parts.append(f"{record['by_torch']} of {record['by_torch'] + record['served']} attentions by torch")
    parts += [f"left {count} {what}: {note}" for (what, note), count in record.get("left", ())]
    parts += [text for key in ("reason", "note") if (text := record.get(key))]
    return ", ".join(parts)


def page(libraries: dict[str, list[Case]]) -> str:
    """The page of all records, in Markdown."""
    records = {
        _versions(library): [json.loads(path.read_text()) for case in found if (path := _path(case)).exists()]
        for library, found in libraries.items()
    }
    missing = {library: len(found) - len(records[_versions(library)]) for library, found in libraries.items()}
    return coverage_page.page(records, missing)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m pyvit.integrations.coverage", description=__doc__)
    parser.add_argument("--library", choices=sorted(LIBRARIES), action="append", help="default: both")
    parser.add_argument("--only", metavar="PATTERN", help="models or families, with * and ?")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the page of all records")
    parser.add_argument("--again", action="store_true", help="examine models that have a record too")
    given = parser.parse_args(arguments)
    for library in given.library or sorted(LIBRARIES):
        found = cases(library, _progress)
        if given.only:
            found = [c for c in found if any(fnmatch.fnmatch(n, given.only) for n in (c.name, c.family, *c.also))]
        records = run(found, sys.stdout, given.again)
        counts = Counter(record["verdict"] for record in records)
        print(f"{_versions(library)}: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    if given.out is not None:
        given.out.write_text(page({library: cases(library, _progress) for library in sorted(LIBRARIES)}))


def _progress(text: str) -> None:
    print(f"\r{text:<100}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
