"""make reliability: every part in small, its record, and that wrong results fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import reliability, reliability_large, reliability_soak
from pyvit import library, ops
from pyvit.testing import NumericsError

pytestmark = pytest.mark.skipif(library.problem() is not None, reason=str(library.problem()))


def off_at(op: Any, *at: int, by: float = 0.5) -> Any:
    """``op`` with one element wrong, except on the reference backend."""

    def wrong(*args: Any, backend: str | None = None, **options: Any) -> Any:
        out = op(*args, backend=backend, **options)
        if backend != "reference":
            found = out.detach().clone()
            found[at] += by
            return out + (found - out.detach())
        return out

    return wrong


@pytest.mark.parametrize("part", reliability_large.PARTS)
def test_parts_in_small(part: str) -> None:
    checks = reliability_large.PARTS[part][0](0.004)
    assert checks
    assert all(0 < check.of_limit <= 1 for check in checks)


@pytest.mark.parametrize(
    ("part", "op", "at"),
    [
        ("elements", "linear", (-1, -1, -1)),
        ("elements", "flash_attention", (-1, -1, -1, -1)),
        ("elements", "patch_embed", (-2, 3, 1)),
        ("tokens", "flash_attention", (0, 0, 100, 3)),
        ("map", "window_attention", (0, -1, -1, -1)),
        ("heads", "flash_attention", (-1, -1, -1, -1)),
        ("pairs", "info_nce", ()),
    ],
)
def test_a_wrong_element_fails(monkeypatch: pytest.MonkeyPatch, part: str, op: str, at: tuple[int, ...]) -> None:
    monkeypatch.setattr(ops, op, off_at(getattr(ops, op), *at))
    with pytest.raises(AssertionError):
        reliability_large.PARTS[part][0](0.004)


def test_soak_in_small() -> None:
    figures = reliability_soak.soak(1e-4)
    assert figures["checks"] == 1
    assert sum(figures["steps"].values()) == reliability_soak.EVERY


def test_soak_notices_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model = reliability_soak.models()["ViT"]
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([1, 2])
    reliability_soak.check("ViT", model, images, labels)
    plain, calls = type(model).forward, []

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return plain(self, x) + (1e-3 if len(calls) == 1 else 0.0)  # the first is pyvit's

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(NumericsError, match="logits"):
        reliability_soak.check("ViT", model, images, labels)


def test_growth_is_that_after_the_warm_up() -> None:
    flat = [(i / 100, 500.0 if i > 15 else 20.0 * i) for i in range(101)]
    assert reliability_soak.grown(flat) == (500.0, 0.0)
    leaking = [(at, mib + 100 * at) for at, mib in flat]
    assert reliability_soak.grown(leaking)[1] == pytest.approx(60, abs=3)


def test_record_is_resumed_and_a_failed_part_leaves_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / reliability.FILE
    small = ["--out", str(tmp_path), "--scale", "0.003", "--threads", "1"]
    assert reliability.main([*small, "--parts", "pairs"]) == 0
    first = path.read_text()
    assert "info_nce, 196 pairs" in capsys.readouterr().out
    monkeypatch.setattr(reliability, "NAMES", ("pairs",))
    assert reliability.main(small) == 0
    assert path.read_text() == first
    assert "pairs: recorded" in capsys.readouterr().out
    monkeypatch.setattr(reliability, "available", lambda: 0.5)
    assert reliability.main([*small, "--again"]) == 1
    assert path.read_text() == first
    monkeypatch.undo()
    assert reliability.main([*small[:2], "--scale", "-1", "--parts", "pairs"]) == 1  # the process fails
    assert "pairs" not in reliability.read(path)
