"""The table of defects fits the code, so that ``make mutation`` applies every one of them."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path

import pytest

from tests.mutation.defects import DEFECTS, Defect

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: f"{d.file}: {d.what}")
def test_a_defect_can_be_made(defect: Defect) -> None:
    assert (ROOT / defect.file).read_text().count(defect.old) == 1
    assert defect.old != defect.new
    files = [part for part in shlex.split(defect.tests) if part.startswith("tests/")]
    assert files
    assert all((ROOT / name).is_file() for name in files)


def test_defects_differ() -> None:
    assert len(DEFECTS) >= 60
    assert max(Counter((d.file, d.old) for d in DEFECTS).values()) == 1
