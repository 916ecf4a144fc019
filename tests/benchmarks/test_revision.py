"""pyvit bench --compare REVISION: what is measured, and with which pyvit."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as suite
from benchmarks import revision

ROOT = Path(__file__).resolve().parents[2]


def test_commits_are_those_of_git() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert revision.commit_of("HEAD") == revision.commit_of(head[:10]) == head
    assert revision.commit_of("no-such-branch") is None


def test_base_is_neither_file_nor_revision(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        suite.parse(["--compare", "no-such-branch"])
    assert "no-such-branch is neither a file or folder nor a revision" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given",
    [
        ["ops", "--quick", "--compare", "x", "--only", "linear", "--threads", "1"],
        ["models", "blocks", "--dtype", "bf16", "--peers", "timm,compile", "--busy", "--keep-memory"],
        ["ops", "--full", "--seconds", "3", "--rounds", "20", "--minutes", "2"],
    ],
)
def test_both_revisions_get_the_same_options(given: list[str], tmp_path: Path) -> None:
    asked = suite.parse([str(tmp_path) if word == "x" else word for word in given])
    again = vars(suite.parse(revision.options(asked)))
    ignored = {"compare", "no_plots", "revision"}
    assert {k: v for k, v in again.items() if k not in ignored} == {
        k: v for k, v in vars(asked).items() if k not in ignored
    }


def test_the_other_pyvit_is_measured_by_this_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree with another pyvit and another suite: the first is imported, the second is not."""
    (tmp_path / "pyvit" / "lib").mkdir(parents=True)
    (tmp_path / "pyvit" / "lib" / "built").touch()
    marker = tmp_path / "imported"
    (tmp_path / "pyvit" / "__init__.py").write_text(
        f"open({str(marker)!r}, 'w').write(__file__)\nraise SystemExit(3)\n"
    )
    monkeypatch.setattr(revision, "tree_of", lambda commit: tmp_path)
    with pytest.raises(RuntimeError, match=r"does not run with 0123 \(status 3\)"):
        revision.measure("0123", suite.parse(["ops", "--quick"]))
    assert marker.read_text() == str(tmp_path / "pyvit" / "__init__.py")


def test_results_of_the_revision_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: object) -> argparse.Namespace:
        out = Path(command[command.index("--out") + 1])
        out.mkdir(parents=True)
        (out / "results.json").write_text(json.dumps(command[:1]))
        return argparse.Namespace(returncode=1)  # a red row of the base is no error here

    monkeypatch.setattr(revision, "tree_of", lambda commit: tmp_path)
    monkeypatch.setattr(revision.subprocess, "run", run)
    found = revision.measure("0123", suite.parse(["ops", "--quick"]))
    assert json.loads(found.read_text()) == [sys.executable]
