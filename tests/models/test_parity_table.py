"""The parity table of docs/models.md: grouping of rows, and where it is written."""

import pytest

from tests.models.parity_table import table, write


def test_largest_error_of_each_group():
    row = {"peer": "timm 1", "model": "A", "class": "B", "dtype": "float32"}
    cases = [row | {"output": 1e-7, "gradient": 3e-6}, row | {"output": 2e-7, "gradient": 1e-6}]
    cases.append(row | {"dtype": "float64", "output": 1e-15, "gradient": None})
    first, second = table(cases)[2:]
    assert first == "| `A` | timm 1 `B` | float32 | 2 | 2.0e-07 | 3.0e-06 |"
    assert second == "| `A` | timm 1 `B` | float64 | 1 | 1.0e-15 | - |"


def test_rewrites_between_the_markers_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- parity -->\nold\n<!-- /parity -->\nafter\n")
    for _ in range(2):
        write(page, ["new"])
        assert page.read_text() == "before\n<!-- parity -->\nnew\n<!-- /parity -->\nafter\n"
    page.write_text("no table")
    with pytest.raises(ValueError, match=r"page\.md wants the lines"):
        write(page, ["new"])
