"""The public API is the recorded one, and docs/stability.md says what is provisional."""

import re
from pathlib import Path

from tests import api

COMMAND = "if that is meant, run python -m tests.api, and say it in CHANGELOG.md (docs/stability.md has the rules)"


def test_the_public_api_is_the_recorded_one():
    changed = api.differences(api.FILE.read_text().splitlines(), api.lines())
    assert not changed, "\n".join([*changed, COMMAND])


def test_differences_are_named():
    old = ["stable      pyvit.ops.a(x, *, y=1)", "stable      pyvit.ops.b(x)", "stable      pyvit.ops.d(x)"]
    new = ["stable      pyvit.ops.a(x, *, y=2)", "stable      pyvit.ops.c(x)", "provisional pyvit.ops.d(x)"]
    assert api.differences(old, new) == [
        "changed: stable      pyvit.ops.a(x, *, y=1)\n     to: stable      pyvit.ops.a(x, *, y=2)",
        "removed: stable      pyvit.ops.b(x)",
        "added: stable      pyvit.ops.c(x)",
        "changed: stable      pyvit.ops.d(x)\n     to: provisional pyvit.ops.d(x)",
    ]
    assert api.differences(new, new) == []


def test_no_name_depends_on_the_process():
    text = api.FILE.read_text()
    assert " at 0x" not in text
    assert len(set(text.splitlines())) == len(text.splitlines())


def test_the_page_lists_what_is_provisional():
    page = (Path(api.ROOT) / "docs" / "stability.md").read_text()
    listed = page.partition("<!-- provisional -->")[2].partition("<!-- /provisional -->")[0]
    assert sorted(re.findall(r"^- `([\w.]+)`", listed, re.M)) == sorted(api.PROVISIONAL)
    public = [entry[12:] for entry in api.FILE.read_text().splitlines()]
    for name in api.PROVISIONAL:
        assert any(re.match(re.escape(name) + r"\b", entry) for entry in public), f"{name} is not public"
