"""Reports of validations: every output tells the verdict, the place, the cause and the numbers; no text is markup."""

import dataclasses
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jaxmllm.report.validation import console, html, markdown, tensorboard, words
from jaxmllm.report.validation.strips import STEPS, comparisons, layer_strip, singles, step
from jaxmllm.validation.report import Cause, Phase, Report
from tests.support.validation_reports import SWAPPED, make_comparison, make_report

FAULT = "decoder.5.mlp_out"
SHAPES = {
    "llava": {"blocks": 4, "layers": 14},
    "instructblip": {"blocks": 3, "layers": 2, "qformer": 12},
    "shallow": {"blocks": 2, "layers": 2},
}
EVIL = "<script>alert('a & b')</script> [bold] | *x* `y` __z__"


@pytest.fixture(scope="module")
def fault():
    return make_report(FAULT)


def printed(report, width=100):
    shown = Console(width=width, no_color=True, highlight=False)
    with shown.capture() as captured:
        shown.print(console.summary(report))
    return captured.get()


class Page(HTMLParser):
    """Elements, their titles and the text of a page."""

    def __init__(self, page):
        super().__init__()
        self.open, self.found, self.text, self.attributes = [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs).get("class", "")))
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs).get("class", "")))
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("first", [None, "vision.1.attn_out"])
def test_every_output_of_every_shape_tells_the_verdict(shape, first):
    report = make_report(first, **SHAPES[shape])
    word = "PASSES" if first is None else "DIFFERS"
    said = printed(report)
    assert said.startswith(word) and max(map(len, said.splitlines())) <= 100 and "…" not in said
    assert "".join(Page(html.page(report)).text).count(word) == 2  # title and banner
    assert markdown.page(report).startswith(f"# {word}: ")
    assert all(
        (SWAPPED.name in text) == (first is not None) for text in (said, html.page(report), markdown.page(report))
    )


def test_the_place_the_cause_and_the_exit_code_lead_the_console(fault):
    lines = printed(fault).splitlines()
    assert lines[1].startswith(f"{FAULT} departs first: its own error is ")
    assert lines[3].startswith("Most likely: gate and up projections are swapped (explains 99.8% of the difference)")
    assert lines[-1] == "exit code 1 (0 passes, 1 differs, 2 could not run)"


def test_the_worst_component_of_a_phase_is_the_worst_of_its_own_errors(fault):
    row = next(row for row in words.phase_table(fault) if row[0] == "decoder")
    assert row[2].endswith(".mlp_out") and row[3] == "own"
    assert max(each.ratio for each in fault.phase("decoder").comparisons if each.kind == "run") > float(row[6])


def test_the_strip_has_a_cell_for_every_comparison_and_outlines_those_that_depart(fault):
    strip = layer_strip(fault, "own")
    assert strip.parts == ("vision", "decoder") and len(strip.columns) == 24 + 32
    assert [each.component for each in strip.departing(("decoder", 5))] == [FAULT]
    assert (("vision", 0), "keys") not in strip.cells
    every = list(comparisons(fault))
    alone = [each for kinds in singles(fault).values() for each in kinds.values()]
    cells = [each for kind in ("own", "run") for each in layer_strip(fault, kind).cells.values()]
    assert len(every) == len(alone) + len(cells)
    page = Page(html.page(fault))
    rectangles = [css for tag, css in page.found if tag == "rect"]
    assert len(rectangles) == len(cells)
    assert sum(css.endswith(" out") for css in rectangles) == sum(each.departs for each in cells)
    assert words.describe(fault, strip.cells[("decoder", 5), "mlp_out"]) in page.text


def test_steps_of_the_colours_part_what_passes_from_what_departs():
    assert [step(ratio) for ratio in (0.0, 0.01, 0.011, 1.0, 1.0001, 1e9)] == [0, 0, 1, 4, 5, len(STEPS) - 1]
    assert step(float("nan")) == step(float("inf")) == len(STEPS) - 1


def test_a_ratio_above_one_is_never_written_as_one():
    assert [words.times(ratio) for ratio in (0.9996, 1.0, 1.0004, 1.2, 123.4, 4e6)] == [
        "1",
        "1",
        ">1",
        "1.2",
        "123",
        "4e+06",
    ]
    assert words.times(float("nan")) == "nan" and words.times(float("inf")) == "inf"


def test_the_page_holds_every_number_of_every_comparison(fault):
    text = "\n".join(Page(html.page(fault)).text)
    for each in list(comparisons(fault))[::97]:
        errors = each.errors
        for value in (errors.mean, errors.p99, errors.max, errors.scale, errors.relative, 1 - errors.cosine):
            assert words.number(value) in text
        limits = words.allowed(fault, each)
        assert ", ".join(words.number(limits[name]) for name in ("mean", "p99", "max")) in text
        for floor in each.floor.of.values():
            assert words.number(floor.max) in text
    for said in (
        "kl_max",
        "2.20e-07",
        "tf32 products",
        fault.command,
        fault.versions["torch"],
        "highest",
        *words.READING,
    ):
        assert said in text


def test_the_page_needs_nothing_else_and_is_light_or_dark(fault):
    page = html.page(fault)
    assert not re.search(r"https?://|<script|<link|<img|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page and "@media print" in page
    assert not any(name.startswith("on") for name, _ in Page(page).attributes)


def test_long_tables_are_folded(fault):
    page = html.page(fault)
    assert "<details><summary>Errors of all 672 comparisons</summary>" in page
    assert "<details open><summary>Errors of all 4 comparisons</summary>" in page
    deep = make_report("vision.7.attn_out", blocks=40, layers=80)
    assert len(html.page(deep)) < 4e6
    said = printed(deep)
    assert max(map(len, said.splitlines())) <= 100 and "…" not in said


def test_what_a_report_holds_is_never_markup():
    evil = dataclasses.replace(make_comparison("logits", ratio=2.0), place=EVIL, details={EVIL: 1.0})
    phase = Phase("logits", "differs", EVIL, (evil,), (EVIL,), (Cause(EVIL, EVIL, 0.5, EVIL),))
    report = Report(EVIL, EVIL, {EVIL: EVIL, "dtype": "float32"}, {EVIL: EVIL}, EVIL, (phase,), "logits")
    page = html.page(report)
    assert "<script" not in page and "alert(&#x27;a &amp; b&#x27;)" in page
    Page(page)
    text = markdown.page(report)
    outside = re.sub(r"^```$.*?^```$", "", re.sub(r"`+ .*? `+", "", text), flags=re.M | re.S)
    assert "<script" not in outside and "[bold]" not in outside
    for block in re.findall(r"(?:^\|.*\n?)+", text, flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    assert EVIL in printed(report, width=400)


def test_markdown_leaves_out_layers_and_says_how_many(fault):
    text = markdown.page(fault)
    own = text.split("### own")[1].split("###")[0]
    shown = re.findall(r"^\| decoder (\d+) ", own, flags=re.M)
    assert shown == ["0", "4", "5", "6", "7", "8", "9", "10", "16", "31"]
    assert own.count("**") == 2 * 8 and "43 layers are left out, 19 of which depart" in own
    assert len(text) < 60_000


@pytest.mark.parametrize(
    ("phases", "first", "headline"),
    [
        (
            (Phase("preprocessing", "differs", "pixels differ"),),
            "preprocessing",
            "preprocessing differs first: pixels differ",
        ),
        ((Phase("vision", "failed", "no memory"),), None, "The phase vision could not run: no memory"),
        ((), None, "Nothing was compared."),
        (
            (Phase("tensors", "passes", ""), Phase("edits", "skipped", "")),
            None,
            "All phases that ran agree. Skipped: edits.",
        ),
    ],
)
def test_reports_without_comparisons_have_a_headline_and_pages(phases, first, headline):
    report = Report("model", "reference", {}, {}, "jaxmllm validate model", phases, first)
    assert words.headline(report) == headline
    for said in (" ".join(printed(report).split()), "".join(Page(html.page(report)).text), markdown.page(report)):
        assert headline in said


def test_numbers_that_are_not_finite_and_floors_that_are_missing_are_shown():
    broken = dataclasses.replace(make_comparison("decoder.0.mlp_out", "run"), ratio=float("nan"))
    errors = dataclasses.replace(broken.errors, max=float("inf"), mean=float("inf"), cosine=float("nan"))
    broken = dataclasses.replace(broken, errors=errors, floor=dataclasses.replace(broken.floor, of={}))
    others = (make_comparison("decoder.0.resid_post", "run"), make_comparison("logits", "run", 0.0))
    phase = Phase("decoder", "differs", "", (broken, *others))
    report = Report("model", "reference", {"dtype": "float32"}, {}, "", (phase,), broken.component)
    assert "no floor was measured" in words.headline(report)
    assert "inf" in printed(report) and "**nan**" in markdown.page(report)
    Page(html.page(report))


def test_tensorboard_has_a_step_a_layer_and_the_floor_beside_the_port(fault, tmp_path):
    tensorboard.write(fault, tmp_path, fault.samples)
    port, floor = (events(tmp_path / name) for name in ("port", "floor"))
    strip = layer_strip(fault, "own")
    ratios = port.Scalars("own/decoder/mlp_out/ratio")
    assert [point.step for point in ratios] == list(range(32))
    expected = [strip.cells[("decoder", layer), "mlp_out"] for layer in range(32)]
    np.testing.assert_allclose([point.value for point in ratios], [each.ratio for each in expected], rtol=1e-6)
    beside = floor.Scalars("own/decoder/mlp_out/max_error")
    floors = [max(each.floor.of[way].max for way in fault.settings["ways"]) for each in expected]
    np.testing.assert_allclose([point.value for point in beside], floors, rtol=1e-6)
    assert len(port.Scalars("run/vision/resid_post/max_error")) == 24
    assert len(port.Scalars("run/other/logits/ratio")) == 1
    assert port.Images("ratios")[0].width > 500
    histograms = port.Histograms("own_log10/decoder/attn_in_faint")
    assert [each.step for each in histograms] == list(range(32))
    sample = np.log10(fault.samples["own/decoder.3.attn_in~faint"])
    assert histograms[3].histogram_value.min == pytest.approx(sample.min())
    assert "report/text_summary" in port.Tags()["tensors"]


def test_tensorboard_takes_reports_without_layers_and_differences_of_zero(tmp_path):
    phase = Phase("logits", "passes", "", (make_comparison("logits", "run", 0.0),))
    samples = {"run/logits": np.zeros(5), "own/logits": np.array([np.inf, 0.0, 1e-3])}
    tensorboard.write(Report("model", "reference", {}, {}, "", (phase,)), tmp_path, samples)
    found = events(tmp_path / "port").Tags()
    assert found["images"] == [] and found["histograms"] == ["own_log10/other/logits"]


def events(folder):
    found = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "tensors": 0, "histograms": 0})
    found.Reload()
    return found
