"""The int8 rows of the benchmarks, and the table of accuracies."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks import cases, int8_accuracy, int8_table, models_int8
from benchmarks.workload import OURS
from pyvit import library

pytestmark = pytest.mark.skipif(library.problem() is not None, reason="needs the compiled library")


def test_cases_of_a_dtype() -> None:
    chosen = cases.select(("models",), "full", dtype="int8")
    assert {case.dtype for case in chosen} == {"int8"}
    assert {case.shape["batch"] for case in chosen} == {1, 8}
    assert all(name == "ours bf16" for case in chosen for name, _ in (case.target.each[:1] if case.target else ()))
    assert "int8" not in {case.dtype for case in cases.select(("ops",), "full", dtype="fp32")}


def test_errors_are_those_of_the_logits() -> None:
    (case,) = cases.select(("models",), "quick", dtype="int8")
    work = models_int8.build(case, "photos", ())
    assert work.contenders.keys() >= {OURS, "ours fp32"}
    verdicts = {name: contender.verdict() for name, contender in work.contenders.items()}
    assert all(verdict.passed for verdict in verdicts.values())
    assert verdicts["ours fp32"].error < 1e-4 < verdicts[OURS].error
    wrong = models_int8._verdict(lambda: torch.ones(1, 3), lambda: torch.tensor([[1.0, 2.0, 3.0]]).double(), 0.05)
    assert not wrong.passed


@pytest.mark.parametrize("heavy", [False, True])
def test_a_line_of_the_table(heavy: bool) -> None:
    family = int8_accuracy.Family("pico", "vit_pico_patch8_32", {"num_classes": 7})
    result = int8_accuracy.measure(family.subject(3, heavy))
    assert 0 < result.bf16_error < result.int8_error < 0.5
    assert result.int8_dense_least <= result.int8_dense_median <= 1.0001
    assert result.int8_to_bf16_least > 0.98
    assert result.line().count("|") == int8_table.HEAD[0].count("|") == int8_table.HEAD[1].count("|")


def test_results_are_kept_and_replaced(tmp_path: Path) -> None:
    numbers = (3, 5, 1, 49, *(0.123456789 + i for i in range(11)))
    one, two = (int8_table.Result(name, "trained", *numbers) for name in ("one", "two"))
    two.fp32_accuracy = two.bf16_accuracy = two.int8_accuracy = 87.5
    path = tmp_path / "results.csv"
    int8_table.merge([one, two], path)
    int8_table.merge([dataclasses.replace(one, quantized=4)], path)
    found = int8_table.read(path)
    assert [each.name for each in found] == ["one", "two"]
    assert found[0].quantized == 4
    assert found[0].line().endswith("|  |")
    assert found[1].line().endswith("| 87.50 / 87.50 / 87.50 |")
    assert found[1].int8_agreement == pytest.approx(two.int8_agreement, rel=1e-6)


def test_bert_is_transformers_own() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=40, max_position_embeddings=16, **sizes)
    torch.manual_seed(0)
    theirs = transformers.BertModel(config).eval()
    ours = int8_accuracy.Bert(config.to_dict(), theirs.state_dict()).eval()
    text = torch.randint(1, 40, (3, 9))
    text[1, 6:] = 0
    with torch.no_grad():
        wanted = theirs(text, attention_mask=(text != 0).long()).last_hidden_state
        torch.testing.assert_close(ours(text)[text != 0], wanted[text != 0], rtol=1e-4, atol=1e-5)
