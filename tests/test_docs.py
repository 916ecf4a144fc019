"""The documentation: what it takes from data, its links and code, and the files for a forge."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import pyvit
from benchmarks import docs
from tests import peers

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
ASSEMBLE = runpy.run_path(str(DOCS / "assemble.py"))

#: Pages whose code is run.
RUN = (
    "README.md",
    "docs/quickstart.md",
    "docs/choice.md",
    "docs/guides/train.md",
    "docs/guides/serve-cpu.md",
    "docs/guides/embed.md",
    "docs/guides/int8.md",
)


def nav(entries):
    """The pages of mkdocs.yml's nav."""
    for entry in entries:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from nav(value) if isinstance(value, list) else [value]


def anchors(text):
    """The ids of a page's headings and API entries."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for title in re.findall(r"^#+ +(.*)$", text, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        yield re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())
    yield from re.findall(r"^::: (\S+)$", text, re.M)


def test_charts_numbers_and_tables_are_those_of_the_data():
    changed = [str(path.relative_to(ROOT)) for path, content in docs.files().items() if path.read_text() != content]
    assert not changed, "run python -m benchmarks.docs"


def test_diagrams_are_those_of_their_script():
    drawn = runpy.run_path(str(DOCS / "kernels/diagrams.py"))["DIAGRAMS"]
    assert {p.name for p in (DOCS / "kernels").glob("*.svg")} == set(drawn)
    for name, draw in drawn.items():
        assert (DOCS / "kernels" / name).read_text() == draw(), "run python docs/kernels/diagrams.py"


def test_links_lead_somewhere():
    pages = ASSEMBLE["pages"]()
    files = set(ASSEMBLE["places"]().values())
    known = {place: set(anchors(text)) for place, text in pages.items()}
    for place, text in pages.items():
        for match in ASSEMBLE["_LINK"].finditer(text):
            target, _, anchor = (match["target"] or "").partition("#")
            if match["code"] or re.match(r"[a-z]+:", target):
                continue
            goal = (Path(place).parent / target).as_posix() if target else place
            goal = str(Path("/", goal).resolve().relative_to("/"))
            assert goal in files, f"{place} links to {match['target']}"
            assert not anchor or anchor in known[goal], f"{place} links to {match['target']}"


def test_a_broken_link_is_an_error():
    page = ROOT / "README.md"
    with pytest.raises(ASSEMBLE["BrokenLink"], match=r"README\.md links to docs/nowhere\.md"):
        ASSEMBLE["relinked"](page, "[there](docs/nowhere.md)", ASSEMBLE["places"]())
    outside = ASSEMBLE["relinked"](page, "[there](setup.py) `[code](nowhere)`", ASSEMBLE["places"]())
    assert outside == "there `[code](nowhere)`"
    outside = ASSEMBLE["relinked"](page, "[there](setup.py)", ASSEMBLE["places"](), "https://forge/blob/main")
    assert outside == "[there](https://forge/blob/main/setup.py)"


def test_every_page_is_in_the_navigation_once():
    listed = list(nav(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    generated = ["results/index.html"]  # by make docs-site
    assert sorted(listed) == sorted([*ASSEMBLE["pages"](), *generated])


def test_the_reference_names_everything_public():
    pages = [page.read_text() for page in (DOCS / "reference").glob("*.md")]
    named = {name for text in pages for name in re.findall(r"^::: (\S+)$", text, re.M)}
    for module in ("pyvit", "pyvit.ops", "pyvit.nn", "pyvit.losses"):
        public = {f"{module}.{name}" for name in importlib.import_module(module).__all__}
        lazy = {"pyvit.accelerate", "pyvit.restore"}  # described where they are defined
        assert public - named <= {"pyvit.ops", "pyvit.__version__", *lazy}
    for name in named:
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__doc__, name


def test_code_of_the_pages_runs(tmp_path):
    """All of it in one process of its own: a page may change the process, as ``keep_memory`` does."""
    script = tmp_path / "pages.py"
    blocks = [
        (page, block)
        for page in RUN
        for block in re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    ]
    assert {page for page, _ in blocks} == set(RUN)
    lines = re.findall(r'^python -c "(.*)"$', (ROOT / "README.md").read_text(), re.M)
    assert len(lines) == 2
    blocks += [("README.md", line) for line in lines]
    for library in ("timm", "transformers"):
        if importlib.util.find_spec(library) is None:
            peers.peer(library)  # skips
    script.write_text(
        f"for page, block in {blocks!r}:\n    print(page)\n    exec(compile(block, page, 'exec'), {{}})\n"
    )
    # In an empty folder: pages may write files.
    settings = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=300, check=False, **settings
    )
    assert done.returncode == 0, done.stdout + done.stderr


FORGE = sorted((ROOT / ".github").rglob("*.yml"))


@pytest.mark.parametrize("path", FORGE, ids=lambda path: path.name)
def test_files_of_a_forge(path):
    content = yaml.safe_load(path.read_text())
    if path.parent.name == "workflows":
        assert True in content, "'on', which YAML reads as true"
        for job in content["jobs"].values():
            assert job["timeout-minutes"]
            for step in job["steps"]:
                assert "run" in step or re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])
    elif path.name != "config.yml":
        assert content.keys() >= {"name", "description", "body"}


def test_citation():
    content = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert content["cff-version"] == "1.2.0"
    assert content["version"] == pyvit.__version__
    assert content["license"] == "Apache-2.0"
