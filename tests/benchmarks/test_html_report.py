"""The report as one HTML file."""

from __future__ import annotations

import html.parser
import re
from pathlib import Path

from benchmarks import html_report, records
from benchmarks.ceiling import Ceiling
from benchmarks.html_report import Run
from benchmarks.runner import Row

TOP = Ceiling({"fp32": 200.0, "bf16": 400.0}, 40.0, 2, "fixed for the test")


class Parsed(html.parser.HTMLParser):
    """Counts of elements, and the text of the page; raises on tags closed in the wrong order."""

    VOID = ("meta", "input", "link", "img", "br")
    #: Their end tags may be omitted.
    OPTIONAL = ("li", "option", "tr", "td", "th", "tbody", "thead")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.count: dict[str, int] = {}
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in (*self.VOID, *self.OPTIONAL):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.OPTIONAL:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def rows(ours: float, **more: object) -> list[Row]:
    """A case of ours, SDPA and a peer that is not installed."""
    common = {"dtype": "fp32", "mode": "forward", "threads": 2, **more}
    made = [
        Row("flash_attention", "8x<b>", "ours", median_ms=ours, gflops=100 / ours, intensity=50.0, **common),
        Row("flash_attention", "8x<b>", "sdpa", median_ms=2.0, gflops=50.0, intensity=50.0, **common),
        Row("flash_attention", "8x<b>", "natten", status="missing: not installed: natten", **common),
    ]
    made[0].peak_mem, made[0].bound, made[0].percent_of_roofline = 12.0, "compute", 50.0
    return made


def scaling() -> list[Row]:
    names = [f"1x12x{n}x64" for n in (49, 197, 577)]
    return [
        Row("flash_attention", name, provider, "fp32", "scaling", 2, median_ms=ms * (i + 1))
        for provider, ms in (("ours", 1.0), ("sdpa", 2.0))
        for i, name in enumerate(names)
    ]


def test_page_shows_cases_and_needs_no_network() -> None:
    made = [*rows(1.0), *rows(4.0, data="random"), *scaling()]
    page = html_report.page([Run("a machine", ["2 cores & more"], made, TOP, price=0.5)])
    parsed = Parsed(page)
    assert not re.search(r"(src|href)=|https?:|@import|url\(", page)
    assert parsed.count["article"] == 2
    assert parsed.count["svg"] == 2  # roofline, tokens
    assert "1 of 2 cases" in parsed.text
    assert "8x<b>" in parsed.text
    assert "2.00x sdpa" in parsed.text
    assert "compute-bound, 50 % of the roofline" in parsed.text
    assert "natten: missing: not installed: natten" in parsed.text
    slower = page.partition("Where pyvit is slower</h2>")[2].partition("<h2>")[0]
    assert "0.50x" in slower
    assert "random inputs" in slower
    assert "{{" not in page


def test_a_busy_machine_is_said_first() -> None:
    page = html_report.page([Run("m", ["busy: the load average is 9 on 2 cores"], rows(1.0))])
    assert "The machine was busy" in page.partition("<section")[0]
    assert "was busy" not in html_report.page([Run("m", ["2 cores"], rows(1.0))])


def test_facts_are_those_of_ours_where_it_has_variants() -> None:
    variant = Row("flash_attention", "8x<b>", "ours bf16", "fp32", "forward", 2, median_ms=0.1)
    assert html_report.ours_of([variant, *rows(1.0)]).provider == "ours"
    on_gpu = [Row("f", "c", f"ours {name}", "bf16", "forward", 1, median_ms=ms) for name, ms in (("a", 2), ("b", 1))]
    assert html_report.ours_of(on_gpu).provider == "ours b"


def test_page_of_several_machines_names_them() -> None:
    page = html_report.page([Run("first", [], rows(1.0), TOP), Run("second", [], rows(1.5))])
    assert Parsed(page).count["section"] == 2
    assert '<option value="1">second' in page
    assert page.count("<p>second</p>") == 1
    assert "<td>first" in page


def test_images_per_dollar_and_energy_are_shown() -> None:
    made = rows(1000.0, mode="inference")
    made[0].images_per_s, made[0].joules = 8.0, 70.0
    text = html_report.page([Run("m", [], made, TOP, price=0.36)])
    assert "8 images/s; 80,000 images per dollar" in text
    assert "70 J" in text


def test_page_without_peers_or_times() -> None:
    alone = rows(1.0)[:1]
    failed = Row("linear", "x", "ours", "fp32", "forward", 2, status="red: wrong")
    parsed = Parsed(html_report.page([Run("m", [], [*alone, failed])]))
    assert "No other library was timed" in parsed.text
    assert "ours: red: wrong" in parsed.text
    assert "Nowhere in these rows." in parsed.text


def test_older_files_get_their_machine_from_the_page_beside_and_their_bytes_from_the_cases(tmp_path: Path) -> None:
    case = "2x2x65x32"
    made = [Row("flash_attention", case, "ours", "fp32", "forward", 2, median_ms=1.0, gflops=1.0)]
    records.write_csv(made, tmp_path / "peers.csv")
    (tmp_path / "peers.md").write_text(
        "# Benchmark results\n\n- A processor, 2 cores\n- ceiling: 231 GF/s fp32, 463 GF/s bf16, copy 43.4 GB/s "
        "(2 threads; x)\n\n## Targets\n\n- no fact\n"
    )
    run = html_report.load(tmp_path / "peers.csv", costs=True)
    assert list(run.lines) == [
        "A processor, 2 cores",
        "ceiling: 231 GF/s fp32, 463 GF/s bf16, copy 43.4 GB/s (2 threads; x)",
    ]
    assert run.ceiling is not None
    assert run.ceiling.gflops == {"fp32": 231.0, "bf16": 463.0}
    # two products of 65 x 65 x 32 in each of 4 heads, over q, k, v and the output
    assert run.rows[0].intensity == 4 * 4 * 65 * 65 * 32 / (4 * 4 * 65 * 32 * 4)
    assert run.rows[0].bound == "compute"
