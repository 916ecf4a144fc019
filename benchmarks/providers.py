"""From an operator's case to calls that can be checked and timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks import block_specs, inputs, loss_specs
from benchmarks.cases import Case
from benchmarks.gate import Gate, Verdict, worst
from benchmarks.specs import SPECS as OP_SPECS
from benchmarks.specs import Provider, Spec, Tensors
from benchmarks.workload import OURS, Contender, Workload, raised

SPECS = {**OP_SPECS, **loss_specs.SPECS, **block_specs.SPECS}
#: Largest batch for which a loss is compared with its float64 reference, whose logits have (batch, batch) elements.
LOSS_CHECK = 2048
#: GiB that the naive form of a large case needs; it is skipped if they are not available.
NEEDS_GIB = {"info_nce batch 32768 d 512 fp32 forward+backward": 20.0}


def timed(provider: Provider, tensors: Tensors, grads: Sequence[str], mode: str) -> Callable[[], object]:
    """The timed call: the forward without autograd, with the gradients of ``grads`` and of prepared tensors, or only
    these gradients."""
    given = {name: t.detach() for name, t in (provider.prepare(tensors) if provider.prepare else tensors).items()}
    if not mode.endswith("backward"):

        def forward() -> object:
            with torch.no_grad():
                return provider.fn(**given)

        return forward
    wanted = [name for name, t in given.items() if t.is_floating_point() and (name in grads or name not in tensors)]
    leaves = {name: t.requires_grad_() if name in wanted else t for name, t in given.items()}
    with torch.no_grad():
        probe = provider.fn(**leaves)
    outs = [probe] if isinstance(probe, Tensor) else list(probe)
    cotangents = [torch.randn_like(o) for o in outs]
    sources = [leaves[name] for name in wanted]
    if mode == "backward":
        graph: list[object] = []  # created by the first call, which is not timed

        def alone() -> object:
            if not graph:
                graph.append(provider.fn(**leaves))
            return torch.autograd.grad(graph[0], sources, cotangents, retain_graph=True)  # type: ignore[arg-type]

        return alone

    def both() -> object:
        out = provider.fn(**leaves)
        return torch.autograd.grad(out, sources, cotangents)

    return both


def work_of(spec: Spec, mode: str) -> tuple[float, float]:
    """Useful flops, and the bytes that every kernel must move: inputs and outputs once, and the same for the
    backward."""
    read = sum(t.nbytes for t in spec.tensors.values())
    written = spec.output * next(t.itemsize for t in spec.tensors.values() if t.is_floating_point())
    gradients = sum(spec.tensors[name].nbytes for name in spec.grads)
    forward, backward = (spec.flops, read + written), (spec.flops * spec.backward, read + 2 * written + gradients)
    parts = {"forward+backward": (forward, backward), "backward": (backward,)}.get(mode, (forward,))
    return sum(flops for flops, _ in parts), float(sum(moved for _, moved in parts))


def available_gib() -> float:
    """Available memory in GiB."""
    with open("/proc/meminfo") as info:
        return next(int(line.split()[1]) for line in info if line.startswith("MemAvailable")) / 2**20


def build(
    case: Case,
    source: str,
    peers: Sequence[str],
    device: str = "cpu",
    extra: Callable[[Case, Spec], Sequence[Provider]] | None = None,
) -> Workload:
    """The workload of an operator's case: check and calls of every provider, and why some are missing. ``extra`` adds
    providers of a device."""
    dtype, backward = inputs.DTYPES[case.dtype], case.mode.endswith("backward")
    spec = SPECS[case.op](case, source, dtype, device)
    work = Workload(case, source, *work_of(spec, case.mode), unavailable=dict(spec.unavailable or {}))
    checked = spec
    if case.op in loss_specs.SPECS and case.shape["batch"] > LOSS_CHECK:
        smaller = Case(case.op, case.label, case.dtype, case.mode, dict(case.shape, batch=LOSS_CHECK))
        checked = SPECS[case.op](smaller, source, dtype, device)
    gate: list[Gate] = []

    def verdict(provider: Provider) -> Verdict:
        if not gate:
            gate.append(Gate(checked.tensors, checked.naive, checked.grads if backward else (), checked.items))
        return worst(gate[0](provider.name, provider.whole))

    need = NEEDS_GIB.get(case.id, 0.0)
    added = list(extra(case, spec)) if extra else []
    for provider, in_check in zip([*spec.providers, *added], [*checked.providers, *added], strict=True):
        if provider.name == "compile" and "compile" not in peers:
            continue
        if provider.missing:
            work.unavailable[provider.name] = provider.missing
            continue
        if provider.name != OURS and need > available_gib():
            work.unavailable[provider.name] = f"needs {need:g} GiB of memory, {available_gib():.0f} available"
            continue
        try:
            run = timed(provider, spec.tensors, spec.grads, case.mode)
        except Exception as error:
            if provider.name == OURS:
                raise
            work.unavailable[provider.name] = raised(error)
            continue
        work.contenders[provider.name] = Contender(
            run, lambda p=in_check: verdict(p), provider.version, unchecked=provider.unchecked
        )
    return work
