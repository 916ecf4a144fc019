"""The tests that a GPU run starts: divided between processes, recorded one by one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import gpu_device, gpu_rows, gpu_tests

REPOSITORY = Path(__file__).parents[2]


def test_tests_are_divided_once(tmp_path):
    """Every test is in one process; those that need most of the memory are in the same one; recorded ones in none."""
    from types import SimpleNamespace

    items = [SimpleNamespace(nodeid=f"t::{i}", fixturenames=["far"] if i % 9 == 0 else []) for i in range(90)]
    config = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: None))
    got = []
    for shard in range(4):
        mine = list(items)
        plugin = gpu_tests.Recorder(None, "", {"t::5"}, (shard, 4), lambda: 1.0, lambda **_: None)
        plugin.pytest_collection_modifyitems(config, mine)
        got.append(mine)
    assert sorted(i.nodeid for mine in got for i in mine) == sorted(i.nodeid for i in items if i.nodeid != "t::5")
    assert all(not i.fixturenames for mine in got[1:] for i in mine)


def _tests_run(folder: Path, lost: str = "lambda: None") -> tuple[int, dict[str, dict[str, Any]], list[Any]]:
    """pytest in a process of its own, as in a worker: its exit status, rows by name, and what it said at its end."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom benchmarks import gpu_rows, gpu_tests\n"
        "record = gpu_rows.Record(Path('rows.jsonl').absolute(), {}, '')\n"
        "done = {item.item for item in gpu_rows.read(record.path)}\nleft = []\n"
        "say = lambda kind, **fields: left.extend(fields['items'] if kind == 'left' else ())\n"
        f"plugin = gpu_tests.Recorder(record, 'k', done, (0, 1), lambda: 1.0, say, {lost})\n"
        "gpu_tests.run(plugin, ['.', '--rootdir', '.', '-c', '/dev/null'], '.')\nprint(left)\n"
    )
    environment = dict(os.environ, PYTHONPATH=str(REPOSITORY))
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True)
    rows = {i.item.rpartition("::")[2]: i.rows[0] for i in gpu_rows.read(folder / "rows.jsonl")}
    return done.returncode, rows, done.stdout.strip().splitlines()[-1:]


def test_a_failing_test_is_recorded_and_the_others_run(tmp_path):
    """The row has the message. Neither a failure nor a file that cannot be imported ends the run."""
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    (tmp_path / "test_some.py").write_text(
        "import pytest\ndef test_a(): assert 1 == 2\ndef test_b(): pass\ndef test_c(): pytest.skip('no reason')\n"
    )
    status, found, said = _tests_run(tmp_path)
    assert (status, said) == (0, ["[]"])
    assert {name: row["status"] for name, row in found.items()} == {
        "test_broken.py": "red: cannot be collected",
        "test_a": "red: test failed",
        "test_b": "ok",
        "test_c": "skipped",
    }
    assert "assert 1 == 2" in found["test_a"]["said"]
    assert "no_such_module" in found["test_broken.py"]["said"]
    before = (tmp_path / "rows.jsonl").read_bytes()
    _tests_run(tmp_path)
    assert (tmp_path / "rows.jsonl").read_bytes() == before  # what is recorded is not run again


def test_a_test_that_loses_the_gpu_does_not_fail_the_others(tmp_path):
    (tmp_path / "test_some.py").write_text("def test_a(): assert False\ndef test_b(): pass\n")
    status, found, _ = _tests_run(tmp_path, lost="lambda: 'an illegal memory access was encountered'")
    assert status == gpu_device.LOST
    assert list(found) == ["test_a"]
    assert _tests_run(tmp_path)[1]["test_b"]["status"] == "ok"
