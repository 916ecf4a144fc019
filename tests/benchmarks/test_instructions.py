"""Counts of instructions: callgrind's files, and the comparison of two."""

from __future__ import annotations

import json

import pytest

from benchmarks import instructions

#: A kernel that calls a helper of its library and one of another.
CALLGRIND = """\
events: Ir
ob=(1) /somewhere/pyvit/lib/libpyvit_ops.so
fl=(1) attention.cpp
fn=(1) forward(long)
10 100
+2 50
cob=(2) /usr/lib/libm.so
cfn=(2) exp
calls=3 20
12 900
cfn=(3) helper(float)
calls=1 30
13 40
* 7

fn=(3)
30 40

ob=(2)
fn=(2)
20 900
totals: 1097
"""


def test_only_what_the_library_itself_executes_is_counted() -> None:
    found = instructions.of_library(CALLGRIND, "libpyvit_ops")
    assert found == {"forward(long)": 157, "helper(float)": 40}
    assert instructions.of_library(CALLGRIND, "libm").total() == 900


def test_functions_are_named_shortly() -> None:
    name = "void pyvit::avx2::(anonymous namespace)::tile<6, pyvit::Vec<float> >(float const*, long)"
    assert instructions.short(name) == "tile"
    assert instructions.short("helper(float)") == "helper"


def test_three_per_cent_are_found_and_a_few_instructions_are_not() -> None:
    base = {"a": 1_000_000, "b": 1_000_000, "c": 1_000_000, "gone": 5}
    new = {"a": 1_030_000, "b": 1_000_400, "c": 960_000, "added": 7}
    assert instructions.changes(base, new) == [("a", pytest.approx(0.03)), ("c", pytest.approx(-0.04))]


def test_more_instructions_fail_the_command(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(instructions.shutil, "which", lambda name: name)
    case = "linear 64x32x96 gelu fp32 forward"
    (tmp_path / "base.json").write_text(json.dumps({case: 1000}))
    for counted, status in ((1030, 1), (1001, 0), (970, 0)):
        monkeypatch.setattr(instructions, "count", lambda name, n=counted: instructions.Counter({"linear(float)": n}))
        args = ["--only", "linear 64x", "--out", str(tmp_path / "new.json"), "--compare", str(tmp_path / "base.json")]
        assert instructions.main(args) == status
        assert ("+3.0 %" in capsys.readouterr().out) == (counted == 1030)
        assert json.loads((tmp_path / "new.json").read_text()) == {case: counted}
