"""Tuning of tile sizes on this machine's GPU: ``python -m pyvit.triton_kernels.tools.tune``.

A candidate is timed in the whole call that uses it, forward and backward, and only counts if its results agree with
those of the current tiles. The best candidate of each kernel is written, as soon as it is known, to the file that
:func:`pyvit.triton_kernels.tiles.tuned` reads.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import replace

import torch
from pyvit.triton_kernels import digests, tiles
from pyvit.triton_kernels.tiles import Config, Entry
from pyvit.triton_kernels.tools.workloads import CASES, Run, prepare
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

#: Values to try for each field, per kernel; other fields keep the table's values.
SPACE: dict[str, dict[str, Sequence[int]]] = {
    "forward_short": {"block_m": (32, 64, 128), "group": (1, 2, 4), "warps": (4, 8)},
    "forward_persistent": {"stages": (1, 2)},
    "forward_long": {
        "block_m": (64, 128),
        "block_n": (64, 128),
        "edge_n": (16, 64),
        "warps": (4, 8),
        "stages": (2, 3, 4),
    },
    "backward_short": {"block_n": (32, 64), "stages": (1, 2)},
    "backward_dq": {"block_m": (64, 128), "block_n": (32, 64, 128), "warps": (4, 8), "stages": (1, 2, 3)},
    "backward_dkdv": {"block_m": (64, 128), "block_n": (32, 64, 128), "warps": (4, 8), "stages": (1, 2, 3)},
    "bias_grad": {"block_m": (32, 64), "block_n": (32, 64, 128), "warps": (4, 8), "stages": (1, 2)},
    "attention_map": {"block_n": (32, 64, 128), "warps": (2, 4), "stages": (1, 2, 3)},
    "window_forward": {"block_m": (16, 32, 64), "block_n": (32, 64), "group": (4, 8, 16), "warps": (1, 2, 4, 8)},
    "window_forward_long": {
        "block_m": (32, 64, 128),
        "block_n": (32, 64, 128),
        "edge_n": (16, 32),
        "warps": (2, 4, 8),
        "stages": (1, 2, 3),
    },
    "window_backward": {"group": (2, 4, 8), "warps": (4, 8), "stages": (1, 2)},
    "window_backward_keys": {"block_m": (32, 64), "block_n": (16, 32, 64), "group": (2, 4, 8), "warps": (2, 4, 8)},
    "window_backward_queries": {
        "block_m": (32, 64, 128),
        "block_n": (32, 64),
        "edge_n": (16, 32),
        "group": (4, 8),
        "warps": (2, 4, 8),
        "stages": (1, 2, 3),
    },
    "window_backward_bias": {
        "block_m": (32, 64),
        "block_n": (32, 64),
        "group": (4, 8),
        "warps": (2, 4, 8),
        "stages": (1, 2),
    },
    "patch_forward": {
        "block_m": (64, 128),
        "block_n": (64, 128, 256),
        "edge_n": (32, 64),
        "warps": (4, 8),
        "stages": (2, 3, 4),
    },
    "patch_weight_gradient": {
        "block_m": (64, 128),
        "block_n": (64, 128),
        "edge_n": (32, 64),
        "warps": (4, 8),
        "stages": (2, 3),
    },
    "patch_image_gradient": {
        "block_m": (64, 128),
        "block_n": (64, 128),
        "edge_n": (32, 64),
        "warps": (4, 8),
        "stages": (2, 3),
    },
    "pair_sums": {
        "block_m": (64, 128),
        "block_n": (64, 128, 256),
        "edge_n": (32, 64),
        "warps": (4, 8),
        "stages": (2, 3, 4),
    },
    "pair_gradient": {
        "block_m": (64, 128),
        "block_n": (32, 64, 128),
        "edge_n": (32, 64),
        "group": (2, 4),
        "warps": (4, 8),
        "stages": (1, 2, 3),
    },
    "spread_tokens": {"block_m": (32, 64), "block_n": (64, 128), "edge_n": (32, 64), "warps": (4, 8)},
}


def candidates(kernel: str, now: Config, length: int) -> Iterator[Config]:
    """Configurations to try: those with least padding first, then those nearest to ``now``. A time budget cuts the list
    at its end."""
    space = SPACE[kernel]
    found = [replace(now, **dict(zip(space, values, strict=True))) for values in itertools.product(*space.values())]

    def order(c: Config) -> tuple[float, int]:
        padding = 1.0
        for field in ("block_m", "block_n"):
            if field in space:
                block = getattr(c, field)
                padding *= -(-length // block) * block / length
        return round(padding, 2), sum(getattr(c, f) != getattr(now, f) for f in space)

    yield from (c for c in sorted(found, key=order) if c != now)


def milliseconds(run: Run, repeats: int = 10) -> float:
    """Median time of ``run`` on the GPU, as a captured CUDA graph, because launching several short kernels can take
    longer on the CPU."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def _agree(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """Whether results are equal up to the rounding of another order of summation."""
    for g, w in zip(got, wanted, strict=True):
        if g.numel() and not (g.float() - w.float()).abs().max() <= 0.02 * w.float().abs().max() + 1e-6:
            return False
    return True


#: A candidate of one case: the case, the dtype, the kernel and its configuration.
Task = tuple[str, torch.dtype, str, Config]
_prepared = functools.lru_cache(maxsize=1)(prepare)


def _compile(device: str, name: str, dtype: torch.dtype, kernel: str, candidate: Config) -> None:
    """Run the candidate once, in a separate process, so that Triton's cache has the compiled kernel."""
    tiles.force(kernel, candidate)
    try:
        _prepared(name, dtype, device)()
        if device == "cuda":
            torch.cuda.synchronize()
    finally:
        tiles.force(kernel, None)


def compile_ahead(tasks: Sequence[Task], seconds: float, jobs: int, device: str = "cuda") -> set[Task]:
    """The ``tasks`` that ``jobs`` processes compiled and ran without an error within ``seconds``."""
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    try:
        futures = {pool.submit(_compile, device, *task): task for task in tasks}
        done, _ = wait(futures, timeout=max(seconds, 0.0))
        return {futures[future] for future in done if future.exception() is None}
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_turn(lists: Sequence[Sequence[Task]]) -> list[Task]:
    """The first of every list, then the second of every list, and so on."""
    return [task for row in itertools.zip_longest(*lists) for task in row if task is not None]


def tune(
    cases: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    *,
    budget: float = 240.0,
    report: Callable[[str], None] = print,
    time_of: Callable[[Run], float] = milliseconds,
    device: str = "cuda",
    jobs: int = 1,
    resume: bool = False,
    batch: int = 64,
    most: int | None = None,
) -> tuple[Entry, ...]:
    """Search tiles for ``cases`` (of ``workloads.CASES``; by default all) within ``budget`` seconds. Saves the best of
    each kernel as soon as it is known, and returns all that are saved.

    With ``jobs`` > 1, that many processes compile candidates in the first two thirds of the budget, and the rest is for
    timing; with 1, each is compiled before it is timed. Entries saved earlier for other calls are kept; with
    ``resume``, so are those for these calls, which are then not searched again. ``batch``: see ``workloads.prepare``;
    ``most``: of how many candidates of a kernel, at most.

    Raises RuntimeError without a GPU, ValueError for an unknown case.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("tune: needs a GPU that torch can see (torch.cuda.is_available() is False)")
    names = list(CASES if cases is None else cases)
    if unknown := [n for n in names if n not in CASES]:
        raise ValueError(f"tune: cases must be among {', '.join(CASES)}, got {', '.join(unknown)}")
    where = torch.cuda.get_device_name() if device == "cuda" else device
    begun = time.monotonic()
    deadline = begun + budget
    work = [(name, dtype) for name in names for dtype in dtypes]
    kept = {_call(e): e for e in tiles.tuned()}
    done = set(kept) if resume else set()
    ahead: set[Task] | None = None
    if jobs > 1:
        lists = []
        for name, dtype in work:
            with tiles.asking() as asked:
                prepare(name, dtype, device, batch)()
            for call in dict.fromkeys(asked):
                if call not in done:
                    lists.append([(name, dtype, call[0], c) for c in candidates(call[0], tiles.choose(*call), call[4])])
        tasks = _in_turn(lists)
        ahead = compile_ahead(tasks, begun + budget * 2 / 3 - time.monotonic(), jobs, device)
        report(f"compiled {len(ahead)} of {len(tasks)} candidates in {time.monotonic() - begun:.0f} s")
    for at, (name, dtype) in enumerate(work):
        run = prepare(name, dtype, device, batch)
        with tiles.asking() as asked:
            wanted = run()
        share = time.monotonic() + max(0.0, deadline - time.monotonic()) / (len(work) - at)
        kernels = [call for call in dict.fromkeys(asked) if call not in done]
        for i, call in enumerate(kernels):
            until = time.monotonic() + max(0.0, share - time.monotonic()) / (len(kernels) - i)
            choices = [
                c
                for c in candidates(call[0], tiles.choose(*call), call[4])
                if ahead is None or (name, dtype, call[0], c) in ahead
            ][:most]
            entry = _search(name, run, wanted, call, choices, until, where, time_of, report)
            if entry is not None:
                kept[call] = entry
                tiles.save(tuple(kept.values()))
    report(f"{len(kept)} entries in {tiles.overrides_path()}")
    return tuple(kept.values())


def _call(entry: Entry) -> tuple[str, str, int, int, int]:
    """The arguments of ``tiles.choose`` that ``entry`` was measured for."""
    (arch,) = entry.archs
    return entry.kernel, arch, entry.itemsize, entry.head_dim, entry.length


def _search(
    case: str,
    run: Run,
    wanted: Sequence[Tensor],
    call: tuple[str, str, int, int, int],
    choices: Sequence[Config],
    until: float,
    where: str,
    time_of: Callable[[Run], float],
    report: Callable[[str], None],
) -> Entry | None:
    """The best configuration of one kernel for ``case``, or None if there was no time for a comparison."""
    kernel, arch, itemsize, head_dim, length = call
    now = tiles.choose(*call)
    best = now
    first = time_of(run)
    tried = 0
    least = first
    try:
        for candidate in choices:
            if time.monotonic() >= until:
                break
            tiles.force(kernel, candidate)
            try:
                got = run()
            except (OutOfResources, PTXASError) as error:
                report(f"  {kernel} {candidate}: {type(error).__name__}")
                continue
            if not _agree(got, wanted):
                report(f"  {kernel} {candidate}: wrong results, left out")
                continue
            tried += 1
            if (spent := time_of(run)) < least:
                best, least = candidate, spent
    finally:
        tiles.force(kernel, None)
    report(f"{case}: {kernel} {first:.3f} -> {least:.3f} ms for the call, {tried} candidates, {best}")
    if not tried:
        return None
    measured = f"{case} forward and backward on {where}: {least:.3f} ms, {first:.3f} before, {tried} candidates"
    return Entry(
        kernel, best, (arch,), itemsize, head_dim, length, measured, digests.kernel(kernel), tiles.triton_version()
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pyvit.triton_kernels.tools.tune", description=__doc__)
    parser.add_argument("--case", nargs="+", choices=list(CASES))
    parser.add_argument("--dtype", nargs="+", choices=["bfloat16", "float16", "float32"], default=["bfloat16"])
    parser.add_argument("--budget", type=float, default=240.0, help="seconds")
    parser.add_argument(
        "--jobs",
        type=int,
        default=max(1, (os.cpu_count() or 2) - 1),
        help="processes that compile (default: cores - 1)",
    )
    parser.add_argument("--resume", action="store_true", help="keep what an earlier run has found")
    options = parser.parse_args(argv)
    try:
        tune(
            options.case,
            [getattr(torch, d) for d in options.dtype],
            budget=options.budget,
            jobs=options.jobs,
            resume=options.resume,
        )
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
