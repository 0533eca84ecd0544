"""The run report: JSON round trip, and a page that is whole, escaped and self-contained."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest

from chanprune_ext.errors import CheckpointError, InvalidArgumentError, OutputError
from chanprune_ext.quantities import (
    format_accuracy,
    format_bytes,
    format_count,
    format_milliseconds,
)
from chanprune_ext.report import (
    LayerWidth,
    Reference,
    RunReport,
    Stage,
    StageLatency,
    TrainingEpoch,
    load_report,
    render_html,
    write_report,
)

if TYPE_CHECKING:
    from pathlib import Path

VOID_ELEMENTS = {"meta", "br", "link", "img"}


def example_report() -> RunReport:
    original = Stage(
        name="original",
        accuracy=0.925,
        standard_error=0.008,
        samples=1017,
        params=853_018,
        macs=125_490_000,
        latency=StageLatency(10.0, 9.5, 10.5),
        file_bytes=3_450_000,
    )
    pruned = replace(
        original,
        name="plain <L1> & nothing else",
        accuracy=0.39,
        params=427_000,
        macs=62_900_000,
        latency=StageLatency(6.25, 6.0, 6.5, speedup=1.6),
        file_bytes=1_780_000,
        note="half of each block",
    )
    return RunReport(
        title="A & B",
        command="chanprune demo --out runs/<x>",
        created="2025-01-02 03:04",
        stages=(original, pruned),
        versions={"torch": "2.11"},
        conditions="batch 1, float32, cpu, 1 thread",
        widths=(LayerWidth("layer1.0.conv1", 16, 8), LayerWidth("layer1.0.conv2", 16, 16)),
        history=(TrainingEpoch(1, 2.0, 0.8, 0.01), TrainingEpoch(2, 1.5, None, 0.001)),
        notes=("Only 1,017 images.",),
        references=(
            Reference("article <2017>", -0.039, 0.5, source="its table 2"),
            Reference("peer", 0.002, 0.47, latency_share=0.78),
        ),
    )


class PageReader(HTMLParser):
    """Checks nesting, and collects text, addresses and sort keys."""

    def __init__(self) -> None:
        super().__init__()
        self.open_elements: list[str] = []
        self.addresses: list[str] = []
        self.rows: list[list[float]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in VOID_ELEMENTS:
            self.open_elements.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "td" and "data-sort" in values:
            self.rows[-1].append(float(values["data-sort"] or "nan"))
        for name in ("src", "href", "xlink:href"):
            if values.get(name):
                self.addresses.append(str(values[name]))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID_ELEMENTS:
            self.open_elements.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open_elements.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(page: str) -> PageReader:
    reader = PageReader()
    reader.feed(page)
    reader.close()
    assert reader.open_elements == []
    return reader


def test_one_epoch_is_one_and_the_speed_says_what_it_is() -> None:
    report = example_report()
    assert "2 epochs." in render_html(report)
    page = render_html(replace(report, history=report.history[:1]))
    assert "1 epoch." in page
    assert "10.0 ms → 6.25 ms; median of paired ratios" in page


def test_json_round_trip(tmp_path: Path) -> None:
    report = example_report()

    page = write_report(report, tmp_path / "runs" / "demo")

    assert page == tmp_path / "runs" / "demo" / "report.html"
    assert load_report(page.with_suffix(".json")) == report
    assert sorted(path.name for path in page.parent.iterdir()) == ["report.html", "report.json"]


def test_page_needs_nothing_outside_itself() -> None:
    page = render_html(example_report())
    reader = read_page(page)

    # References inside the page (markers, clip paths) are fine; anything else would be a request.
    assert all(address.startswith("#") for address in reader.addresses)
    assert not re.search(r"@import|url\((?!#)|<link|<img|<iframe", page)
    remaining = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert "http" not in remaining


def test_page_escapes_what_it_is_given() -> None:
    page = render_html(example_report())

    assert "<L1>" not in page
    assert "<x>" not in page
    assert "plain <L1> & nothing else" in read_page(page).text


def test_page_shows_every_part() -> None:
    text = read_page(render_html(example_report())).text

    for expected in (
        "92.5 ± 0.8 %",
        "10.0 ms",
        "6.25 ms, 1.60 times as fast",
        "\N{MULTIPLICATION SIGN}0.50",
        "853 k",
        "1.78 MB",
        "layer1.0.conv1: 16 → 8 channels",
        "epoch 2: 1.5",
        "training loss",
        "batch 1, float32, cpu, 1 thread",
        "Only 1,017 images.",
    ):
        assert expected in text


def test_sort_keys_are_the_values() -> None:
    reader = read_page(render_html(example_report()))

    assert [0.0, 0.925, 1017.0, 853018.0, 125490000.0, 10.0, 1.0, 3450000.0] in reader.rows
    assert [0.0, 16.0, 8.0, 50.0] in reader.rows
    assert [1.0, 16.0, 16.0, 100.0] in reader.rows


def test_charts_follow_the_theme_and_share_no_ids() -> None:
    page = render_html(example_report())
    drawings = re.findall(r'<svg class="chart".*?</svg>', page, flags=re.DOTALL)

    assert len(drawings) == 5
    for drawing in drawings:
        colors = set(re.findall(r"(?:fill|stroke|color): ?(#[0-9a-fA-F]+)", drawing))
        assert colors == set(), "a colour of its own would not follow dark mode"
    identities = re.findall(r'\bid="([^"]+)"', page)
    assert len(identities) == len(set(identities))


def test_published_results_stand_beside_the_run() -> None:
    report = example_report()
    text = read_page(render_html(report)).text
    times = "\N{MULTIPLICATION SIGN}"
    assert f"article <2017>: {times}0.50 multiply-accumulates, \N{MINUS SIGN}3.9 points" in text
    assert f"peer: {times}0.78 measured time, +0.2 points" in text
    assert (
        f"plain <L1> & nothing else: {times}0.62 measured time, \N{MINUS SIGN}53.5 points" in text
    )
    assert [0.0, -0.039, 0.5, -1.0] in read_page(render_html(report)).rows
    # nothing measured: one panel less, and a word on it
    unmeasured = replace(
        report, stages=tuple(replace(stage, latency=None) for stage in report.stages)
    )
    text = read_page(render_html(unmeasured)).text
    assert "Latency was not measured in this run." in text
    assert "points" in text
    assert "measured time" not in text


def test_reports_without_published_results_are_still_read(tmp_path: Path) -> None:
    data = example_report().to_dict()
    del data["references"]
    assert RunReport.from_dict(data).references == ()


def test_what_lost_everything_does_not_hide_the_rest() -> None:
    page = render_html(example_report())
    (drawing,) = re.findall(r'<svg[^>]*aria-label="Change of acc.*?</svg>', page, re.DOTALL)
    labels = re.findall(r">\s*(\N{MINUS SIGN}\d+\.\d)\s*<", drawing)
    assert "\N{MINUS SIGN}53.5" in labels  # named where it stands, at the border
    scale = [float(label.replace("\N{MINUS SIGN}", "-")) for label in labels]
    assert min(value for value in scale if value != -53.5) > -8


def test_a_run_that_lost_much_at_every_stage_is_drawn_to_scale() -> None:
    first = replace(example_report().stages[0], accuracy=0.78)
    half = replace(first, macs=first.macs // 2)
    stages = [first, *(replace(half, name=f"{a}", accuracy=a) for a in (0.0, 0.66, 0.69, 0.70))]
    page = render_html(RunReport("T", "c", "now", tuple(stages)))
    (drawing,) = re.findall(r'<svg[^>]*aria-label="Change of acc.*?</svg>', page, re.DOTALL)
    labels = re.findall(r">\s*(\N{MINUS SIGN}\d+\.\d)\s*<", drawing)
    assert "\N{MINUS SIGN}78.0" in labels  # at the border, and alone there
    assert not {"\N{MINUS SIGN}12.0", "\N{MINUS SIGN}9.0", "\N{MINUS SIGN}8.0"} & set(labels)


def test_page_without_optional_parts() -> None:
    stage = replace(example_report().stages[0], latency=None, file_bytes=None)
    page = render_html(RunReport("T", "c", "now", (stage,)))

    assert page.count('<svg class="chart"') == 1
    assert "Measured latency" not in read_page(page).text


def test_many_layers_are_drawn_without_names() -> None:
    widths = tuple(LayerWidth(f"block{i}.conv", 64, 32) for i in range(60))
    text = read_page(render_html(replace(example_report(), widths=widths))).text

    assert "layer, in execution order" in text
    assert "block59.conv: 64 → 32 channels" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "expected data of format"),
        ('{"format": "something"}', "expected data of format"),
        ('{"format": "chanprune-report", "version": 99}', "expected version 1, got 99"),
        ('{"format": "chanprune-report", "version": 1}', "a field is missing"),
    ],
)
def test_foreign_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_report(path)


def test_missing_and_undecodable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_report(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_report(tmp_path / "binary.json")


def test_unknown_field_is_refused() -> None:
    data = json.loads(json.dumps(example_report().to_dict()))
    data["stages"][0]["colour"] = "red"
    with pytest.raises(CheckpointError, match="colour"):
        RunReport.from_dict(data)


def test_bad_values_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"accuracy of stage 'x': .* got 92.5"):
        Stage("x", 92.5, 0.1, 10, 1, 1)
    with pytest.raises(InvalidArgumentError, match="at least one stage"):
        RunReport("T", "c", "now", ())


def test_unwritable_folder_leaves_nothing(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("here first")
    with pytest.raises(OutputError, match=r"file: cannot be made a folder"):
        write_report(example_report(), occupied)
    assert occupied.read_text() == "here first"


def test_page_is_rendered_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(OutputError, match=r"needs jinja2; install it with: pip install"):
        write_report(example_report(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("formatted", "expected"),
    [
        (format_count(0), "0"),
        (format_count(999), "999"),
        (format_count(1000), "1.00 k"),
        (format_count(853_018), "853 k"),
        (format_count(999_600), "1.00 M"),
        (format_count(4.1e9), "4.10 G"),
        (format_bytes(999.6), "1.00 kB"),
        (format_bytes(3_448_512), "3.45 MB"),
        (format_milliseconds(0.5), "0.50 ms"),
        (format_milliseconds(9.996), "10.0 ms"),
        (format_milliseconds(123.4), "123 ms"),
        (format_accuracy(0.92724), "92.7 %"),
        (format_accuracy(0.3913, 0.0153), "39.1 ± 1.5 %"),
    ],
)
def test_quantities(formatted: str, expected: str) -> None:
    assert formatted == expected
