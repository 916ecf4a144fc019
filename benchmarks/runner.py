"""Runs cases: the correctness check, then timing, then a row for every provider, available or not."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import torch

import pyvit
from benchmarks import energy, measure, providers
from benchmarks.cases import MODEL_MODES, Case
from benchmarks.ceiling import Ceiling
from benchmarks.gate import Verdict
from benchmarks.inputs import SOURCES
from benchmarks.specs import Provider, Spec
from benchmarks.workload import OURS, Contender, Workload, raised, uses_pyvit

NAN = math.nan
#: Providers with their own thread pool, which like torch's spins for a while after each call.
FOREIGN_THREADS = {"onnxruntime", "openvino"}
#: Ours may be this much of the best peer's speed and not have lost: what two runs of the same code differ by.
NEVER_LOSE = 0.97


@dataclass
class Row:
    """One line of results.csv. Times in milliseconds; ``ratio`` = baseline's time over this one's; ``peak_mem`` in MiB.
    Of ours, ``best_peer`` is the fastest provider without pyvit that is as accurate as the rule asks, and
    ``best_ratio`` its time over ours. ``intensity``: flops per byte that must be moved; ``bound``: what sets the
    roofline there, "compute" or "memory"; ``batch_size``, ``img_size`` and
    ``images_per_s`` of models; ``joules`` per call, where the machine counts
    them. ``samples``: milliseconds in every round, only in results.json.

    ``status``: "ok"; "outside rule" (a peer less accurate than the rule allows); "unchecked: reason" (a peer that
    cannot be compared); "red: reason" (failed the check, so no time); "missing: reason"; "failed: reason".
    """

    op: str
    case: str
    provider: str
    dtype: str
    mode: str
    threads: int
    median_ms: float = NAN
    p20: float = NAN
    p80: float = NAN
    ratio: float = NAN
    gflops: float = NAN
    percent_of_ceiling: float = NAN
    max_err: float = NAN
    allowed_err: float = NAN
    peak_mem: float = NAN
    versions: str = ""
    data: str = ""
    percent_of_roofline: float = NAN
    floor_ms: float = NAN
    baseline: str = ""
    status: str = "ok"
    best_peer: str = ""
    best_ratio: float = NAN
    bound: str = ""
    intensity: float = NAN
    batch_size: int = 0
    img_size: int = 0
    images_per_s: float = NAN
    joules: float = NAN
    samples: tuple[float, ...] = ()

    @property
    def timed(self) -> bool:
        return not math.isnan(self.median_ms)

    @property
    def loses(self) -> bool:
        """Whether a peer was faster."""
        return self.best_ratio < NEVER_LOSE


COLUMNS = [f.name for f in fields(Row) if f.name != "samples"]


@dataclass(frozen=True)
class Outcome:
    """A target compared with a run. ``passed`` is None if what it needs was not measured; ``measured`` then
    says why."""

    case: Case
    measured: str
    passed: bool | None


@dataclass
class Results:
    rows: list[Row] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def compared(self) -> list[Row]:
        """Rows of ours that a peer was timed beside."""
        return [row for row in self.rows if row.best_peer]

    @property
    def red(self) -> list[Row]:
        """Rows of ours that failed the check or did not run."""
        return [row for row in self.rows if row.provider.startswith(OURS) and row.status.startswith(("red", "failed"))]


@dataclass(frozen=True)
class Settings:
    """``seconds``: time per case and source; ``rounds``: minimum and maximum; ``peers``: see workload.PEERS.
    ``both_sources``: check ours on photographs and on random tensors before timing. ``extra``: see providers.build.
    ``floor``: lower bound of a case in milliseconds by a cost model. ``joules``: the machine's energy counter."""

    seconds: float = 1.0
    rounds: tuple[int, int] = (5, 101)
    peers: tuple[str, ...] = ()
    device: str = "cpu"
    both_sources: bool = True
    extra: Callable[[Case, Spec], Sequence[Provider]] | None = None
    floor: Callable[[Case], float] | None = None
    joules: Callable[[], float] | None = None


def versions(contender: Contender) -> str:
    own = f"pyvit {pyvit.__version__}"
    return "; ".join(part for part in (own, f"torch {torch.__version__}", contender.version) if part)


def build(case: Case, source: str, settings: Settings) -> Workload:
    if "compile" in settings.peers:  # recompile for every case, and fail instead of falling back to eager code
        torch._dynamo.reset()
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    if case.op in providers.SPECS:
        return providers.build(case, source, settings.peers, settings.device, settings.extra)
    from benchmarks import models

    return models.build(case, source, settings.peers, settings.device)


def _judge(row: Row, verdict: Verdict) -> None:
    row.max_err, row.allowed_err = verdict.error, verdict.allowed
    if not verdict.passed:
        refused = row.provider.startswith(OURS) or verdict.wrong
        row.status = f"red: {verdict.detail}" if refused else "outside rule"


def _gate(work: Workload, rows: dict[str, Row], settings: Settings) -> dict[str, measure.Run]:
    """Compute every contender's error. Returns the calls that may be timed."""
    open_to_clock = {}
    for name, contender in work.contenders.items():
        row = rows[name]
        try:
            if contender.unchecked:
                contender.run()
                row.status = f"unchecked: {contender.unchecked}"
                open_to_clock[name] = contender.run
                continue
            _judge(row, contender.verdict())
        except Exception as error:
            row.status = f"failed: {raised(error)}"
            if name.startswith(OURS):
                traceback.print_exc()
            continue
        if row.status in ("ok", "outside rule"):
            open_to_clock[name] = contender.run
    if (
        settings.both_sources
        and OURS in open_to_clock
        and SOURCES[0] in work.case.sources
        and "batch" in work.case.shape
    ):
        _gate_other_source(work, rows[OURS], settings)
        if rows[OURS].status != "ok":
            del open_to_clock[OURS]
    return open_to_clock


def _gate_other_source(work: Workload, row: Row, settings: Settings) -> None:
    """Check ours on a few images of the kind of input that is not timed. The row keeps the result that is closer to its
    limit."""
    few = replace(work.case, shape={**work.case.shape, "batch": min(2, work.case.shape["batch"])})
    verdict = build(few, next(s for s in SOURCES if s != work.source), settings).contenders[OURS].verdict()
    if not verdict.passed or verdict.error / verdict.allowed > row.max_err / row.allowed_err:
        _judge(row, verdict)


def _baseline(case: Case, timings: dict[str, measure.Timing]) -> str | None:
    for names in (case.baseline, case.against):
        present = [name for name in names if name in timings]
        if present:
            return min(present, key=lambda name: timings[name].median)
    return None


def run_workload(work: Workload, settings: Settings, ceiling: Ceiling) -> list[Row]:
    """Check, time and measure the memory of every contender of ``work``."""
    case, threads = work.case, torch.get_num_threads()
    rows = {
        name: Row(case.op, case.label, name, case.dtype, case.mode, threads, data=work.source)
        for name in (*work.contenders, *work.unavailable)
    }
    if settings.floor is not None:
        for row in rows.values():
            row.floor_ms = settings.floor(case)
    for name, reason in work.unavailable.items():
        rows[name].status = f"missing: {reason}"
    calls = _gate(work, rows, settings)
    rounds = settings.rounds if case.op in providers.SPECS else (3, settings.rounds[1])
    rest = 0.01 if FOREIGN_THREADS & calls.keys() else 0.0
    timings = measure.interleave(calls, seconds=settings.seconds, device=settings.device, rounds=rounds, rest=rest)
    baseline = _baseline(case, timings)
    for name, timing in timings.items():
        row = rows[name]
        row.median_ms, row.p20, row.p80 = timing.median, timing.quantile(0.2), timing.quantile(0.8)
        row.gflops = work.flops / timing.median / 1e6
        row.percent_of_ceiling = ceiling.percent(row.gflops, case.dtype)
        row.percent_of_roofline = 100 * ceiling.floor_ms(work.flops, work.bytes, case.dtype) / timing.median
        row.peak_mem = measure.peak_memory(calls[name], settings.device) + work.contenders[name].held
        if settings.joules is not None:
            row.joules = energy.per_call(calls[name], settings.joules, settings.device)
        row.versions = versions(work.contenders[name])
        row.samples = timing.samples
        row.intensity, row.bound = work.flops / work.bytes, ceiling.bound(work.flops, work.bytes, case.dtype)
        if case.mode in MODEL_MODES:
            row.batch_size, row.img_size = case.shape["batch"], case.shape["size"]
            row.images_per_s = 1e3 * row.batch_size / timing.median
        if baseline is not None:
            row.baseline, row.ratio = baseline, measure.ratio(timings[baseline], timing)
    peers = [name for name in timings if not uses_pyvit(name) and rows[name].status == "ok"]
    if OURS in timings and peers:
        best = min(peers, key=lambda name: timings[name].median)
        rows[OURS].best_peer, rows[OURS].best_ratio = best, measure.ratio(timings[best], timings[OURS])
    return list(rows.values())


def hold(case: Case, rows: Sequence[Row]) -> Outcome | None:
    """Compare the case's target with its rows (of one source of inputs)."""
    target, by_name = case.target, {row.provider: row for row in rows}
    if target is None:
        return None
    ours = by_name.get(OURS)
    if ours is None or not ours.timed:
        status = ours.status if ours else "not run"
        return Outcome(case, f"no time ({status})", None if status.startswith("missing") else False)
    others = [by_name[name] for name in target.against if name in by_name and by_name[name].timed]
    said, verdicts = [], []
    if (target.ratio or target.memory or target.extra_us) and not others:
        reasons = [f"{name}: {by_name[name].status if name in by_name else 'not asked for'}" for name in target.against]
        return Outcome(case, "; ".join(reasons), None)
    best = min(others, key=lambda row: row.median_ms) if others else None
    if target.ratio is not None and best is not None:
        times = ours.ratio if ours.baseline == best.provider else best.median_ms / ours.median_ms
        said.append(f"{times:.2f}x {best.provider}")
        verdicts.append(times >= target.ratio)
    if target.ceiling is not None:
        said.append(f"{ours.percent_of_ceiling:.0f} %")
        verdicts.append(ours.percent_of_ceiling >= target.ceiling)
    if target.roofline is not None:
        said.append(f"{ours.percent_of_roofline:.0f} % of roofline")
        verdicts.append(ours.percent_of_roofline >= target.roofline)
    absent = False
    for name, wanted in target.each:
        if name in by_name and by_name[name].timed:
            times = by_name[name].median_ms / ours.median_ms
            said.append(f"{times:.2f}x {name}")
            verdicts.append(times >= wanted)
        else:
            absent = True
            said.append(f"{name} not measured")
    if target.memory is not None:
        part = ours.peak_mem / others[0].peak_mem
        said.append(f"{part:.3f}x memory of {others[0].provider}")
        verdicts.append(part <= target.memory)
    if target.extra_us is not None and best is not None:
        extra = (ours.median_ms - best.median_ms) * 1e3
        said.append(f"{extra:+.1f} us over {best.provider}")
        verdicts.append(extra <= target.extra_us)
    if not verdicts or (all(verdicts) and absent):  # a target is met only if all of its parts were measured and met
        return Outcome(case, ", ".join(said), None)
    return Outcome(case, ", ".join(said), all(verdicts))


def run(
    cases: Sequence[Case],
    settings: Settings,
    ceiling: Ceiling,
    progress: Callable[[str], None],
    left: Callable[[], float] = lambda: math.inf,
    keep: Callable[[Sequence[Row]], None] = lambda rows: None,
) -> Results:
    """Run every case on each of its sources of inputs, with one line of progress each. When ``left()`` is negative, the
    remaining cases are only listed.

    ``keep`` gets all rows so far after every case, so that an interrupted run loses at most one case.
    """
    results = Results()
    for i, case in enumerate(cases, 1):
        if left() < 0:
            results.left_out += [late.id for late in cases[i - 1 :]]
            break
        for source in case.sources:
            prefix = f"[{i}/{len(cases)}] {case.id} ({source})"
            try:
                rows = run_workload(build(case, source, settings), settings, ceiling)
            except Exception as error:  # a case that cannot be set up is a red row; the others still run
                traceback.print_exc()
                reason = f"failed: {raised(error)}"
                rows = [
                    Row(
                        case.op,
                        case.label,
                        OURS,
                        case.dtype,
                        case.mode,
                        torch.get_num_threads(),
                        data=source,
                        status=reason,
                    )
                ]
            results.rows += rows
            outcome = hold(case, rows)
            if outcome is not None and source == case.sources[0]:
                results.outcomes.append(outcome)
            progress(f"{prefix}: {_summary(rows)}")
            keep(results.rows)
    return results


def _summary(rows: Sequence[Row]) -> str:
    ours = next((row for row in rows if row.provider == OURS), None)
    if ours is None or not ours.timed:
        return ours.status if ours else "not run"
    return (
        f"{ours.median_ms:.3g} ms, {ours.ratio:.2f}x {ours.baseline}, {ours.percent_of_ceiling:.0f} % of ceiling, "
        f"error {ours.max_err:.1e} (allowed {ours.allowed_err:.1e})"
    )


def as_record(row: Row) -> dict[str, object]:
    """The row as results.csv has it."""
    values = ((name, getattr(row, name)) for name in COLUMNS)
    return {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in values}
