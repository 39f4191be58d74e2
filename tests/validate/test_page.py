"""The report as a page: what it shows, what it keeps as text, and that it needs nothing beside itself."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest

from llmexport.export import engine_record
from llmexport.export.exported import Export, ExportedGraph
from llmexport.export.spec import Assembly, causal_lm
from llmexport.graphs.fusion import Fused
from llmexport.validate.compare import Difference
from llmexport.validate.facts import facts
from llmexport.validate.metrics import Metrics
from llmexport.validate.page import page, share, size, write
from llmexport.validate.report import Report, Rung
from llmexport.validate.tolerance import Tolerance

HOSTILE = "<script>x</script>\u202etxt\x1b[31m\n"
ALLOWED = Tolerance(1e-4, 1e-5)
VOID = {"meta", "link", "br", "line"}


def export(folder: Path, word: str = "gemma") -> Export:
    graph = ExportedGraph(
        word, Assembly((), (), ()), {}, {}, {word: 2}, {"fuse_gated_act": Fused(3, [("layers.0/mul", word)])}, "0" * 64
    )
    (folder / graph.file).write_bytes(b"x" * 2048) if folder != Path() else None
    return Export(
        folder=folder,
        graphs=(graph,) if folder != Path() else (),
        weights=(),
        config={},
        text_config={},
        renamed={},
        reference=causal_lm(word),
        versions={word: word},
        notes=(word,),
        companions={},
        inode=0,
        **dict.fromkeys(("arch", "block", "dtype", "target", "opset"), word),
    )


def detail(step: str | int, error: float, **said: Any) -> dict[str, Any]:
    difference = Difference(error, error / 10, 1.0, 1.0)
    return {"step": step, "output": "hidden", **said, "difference": difference, "allowed": ALLOWED}


def rung(name: str, *details: dict[str, Any]) -> Rung:
    worst = max(details, key=lambda d: d["difference"].excess(d["allowed"]))
    status = "pass" if worst["difference"].excess(ALLOWED) <= 1 else "fail"
    return Rung(name, status, "", worst["difference"], ALLOWED, list(details))


def report(layers: int = 2, error: float = 1e-6) -> Report:
    blocks = [detail(f"layers.{i}", error if i == 1 else 1e-6, kind="layer", run="prompt") for i in range(layers)]
    stages = [detail(0, 0.0, stage="prompt"), detail(1, math.nan if error > 1e-4 else 1e-6, stage="decode 1")]
    whole = dataclasses.replace(rung("onnxruntime", *stages), metrics=Metrics(134, 2e-3, 5e-2, 0.97, 0.95, "decode 3"))
    rungs = [rung("blocks", *blocks), whole, Rung("engine", "not run", "no GPU here")]
    return Report(
        rungs,
        {"PyTorch": {"prefill": 0.2, "decode": 0.01}},
        {"batch": 2, "tokens": 67, "crossed": [900]},
        calls={"PyTorch": {"prefill": 3, "decode": 8}},
        largest={"layers.0": 12.5, "layers.1": 45000.0, "head": math.inf},
        warning="layers.1 makes 45000",
    )


class Read(html.parser.HTMLParser):
    """A page that was read strictly: every element that begins ends, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.labels: list[str] = []
        self.said = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        self.links += [v for k in ("href", "src", "xlink:href", "action") if (v := said.get(k))]
        self.ids += [v for k in ("id",) if (v := said.get(k))]
        self.labels += [v for k in ("aria-labelledby",) if (v := said.get(k))]
        assert tag != "script"
        assert tag != "th" or said.get("scope") in ("row", "col")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said += data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "manifest.json").write_text("{}")
    return tmp_path


def test_a_page_is_whole_and_needs_nothing_beside_itself(folder: Path) -> None:
    text = page(facts(export(folder)), report(error=3e-4))
    read = Read(text)
    assert read.links == ["data:,"]
    assert not re.search(r"url\(|@import|https?:", text)
    assert sorted(set(read.ids)) == sorted(read.ids)
    assert set(read.labels) <= set(read.ids)


def test_a_page_says_what_a_report_does(folder: Path) -> None:
    said = Read(page(facts(export(folder)), report(error=3e-4))).said
    for words in (
        *("Not proven", "blocks: first over in layers.1, prompt, hidden", "no GPU here", "300%", "not finite"),
        *("decode 1", "layers.1", "67 tokens", "900 tokens", "200.00 ms", "10.00 ms", "2.0 kB", "gated_act"),
        *("gemma: layers.0/mul", "holds no engine", "2.0e-03", "97.0%", "part at decode 3"),
        *("Warning: layers.1 makes 45000", "4.5e+04", "69%", "of 3", "of 8"),
    ):
        assert words in said
    assert "Not proven" not in Read(page(facts(export(folder)), report())).said


def test_what_files_say_is_text_in_the_page(folder: Path) -> None:
    found = dataclasses.replace(export(folder), **dict.fromkeys(("arch", "block", "dtype", "target", "opset"), HOSTILE))
    found = dataclasses.replace(found, versions={HOSTILE: HOSTILE}, notes=(HOSTILE,))
    [graph] = found.graphs
    hostile = Fused(1, [(HOSTILE, HOSTILE)])
    found = dataclasses.replace(found, graphs=(dataclasses.replace(graph, fusions={HOSTILE: hostile}),))
    made = rung(HOSTILE, detail(HOSTILE, 1.0, kind=HOSTILE, run=HOSTILE))
    (folder / engine_record.RECORD).write_text(json.dumps(engine(graph.name, HOSTILE).as_data()))
    shown = page(facts(found), Report([made], {HOSTILE: {"prefill": 1}}, {}, HOSTILE))
    assert HOSTILE not in shown
    assert "<script" not in shown
    assert shown.count(r"&lt;script&gt;x&lt;/script&gt;\u202etxt\x1b[31m\n") > 30
    assert shown.replace("\n", "").isprintable()


def engine(graph: str, word: str, model: str = "0" * 64) -> engine_record.Engine:
    plan = engine_record.Plan(
        *("x", 1, "0" * 64, model, (), (), {}, {}),
        layers={word: 1},
        plugins={word: 1},
        messages=(word,),
        seconds=1.5,
    )
    said = dict.fromkeys(("backend", "version", "target", "arch", "block", "dtype", "checked"), word)
    return engine_record.Engine(
        **said, weights_at="inside", least=None, built_on=None, weights=(), profile={}, plugins=(), graphs={graph: plan}
    )


def test_the_engine_beside_an_export_is_shown_if_it_is_of_it(folder: Path) -> None:
    (folder / engine_record.RECORD).write_text(json.dumps(engine("gemma", "Rope").as_data()))
    assert "1 that TensorRT read: 1 Rope" in Read(page(facts(export(folder)), report())).said
    (folder / engine_record.RECORD).write_text(json.dumps(engine("gemma", "Rope", "1" * 64).as_data()))
    assert "is of another export" in facts(export(folder))["engine"]["none"]
    (folder / engine_record.RECORD).write_text("{")
    assert "is damaged" in facts(export(folder))["engine"]["none"]


def test_both_files_say_the_same(folder: Path) -> None:
    write(export(folder), report(error=3e-4))
    data = json.loads((folder / "report.json").read_text())
    assert data["verdict"] in (folder / "report.html").read_text()
    assert [f["file"] for f in data["files"]] == ["gemma.onnx", "manifest.json"]
    assert data["rungs"][1]["difference"]["max_abs"] == "nan"


def test_numbers_are_for_people() -> None:
    assert [share(n) for n in (0.0, 1e-5, 0.004, 0.123, 12.5, math.inf)] == [
        *("0%", "under 0.1%", "0.4%", "12%", "12 times", "not finite")
    ]
    assert [size(n) for n in (12, 999, 1000, 2_500_000, 10**15)] == ["12 B", "999 B", "1.0 kB", "2.5 MB", "1000.0 TB"]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    if (program := browser.find()) is None:
        pytest.skip(f"needs a browser: none of {', '.join(browser.NAMES)} is installed")
    with browser.chromium(program, tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1400])
def test_a_browser_shows_it_without_a_complaint_and_without_asking(
    width: int, scheme: str, folder: Path, tab: browser.Browser
) -> None:
    """Of many layers, one of them wrong, with the longest words there are."""
    found = dataclasses.replace(export(folder), notes=("word" * 100,), versions={"torch": "2.13.0" * 20})
    (folder / "report.html").write_text(page(facts(found), report(90, 3e-4)), encoding="utf-8")
    shown = tab.open(folder / "report.html", width=width, scheme=scheme)
    assert (shown.requests, shown.errors) == ([], [])
    assert shown.says("document.documentElement.scrollWidth <= window.innerWidth")
    assert shown.says("document.querySelectorAll('section').length") >= 8
    assert shown.says("matchMedia('(prefers-color-scheme: dark)').matches") is (scheme == "dark")
    assert shown.says(CONTRAST) == []


# What of the text is not told from what lies behind it as WCAG asks: 4.5 to 1.
CONTRAST = """
(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const read = colour => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data] };
  const linear = c => c <= 10 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = e => { for (; e; e = e.parentElement) {
    const colour = read(getComputedStyle(e).backgroundColor); if (colour[3] === 255) return colour }
    return read("white") };
  const own = e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  return [...document.querySelectorAll("main *")].filter(own).filter(e => {
    const style = getComputedStyle(e), svg = e instanceof SVGElement;
    if (svg && e.tagName !== "text") return false;
    const [a, b] = [light(read(svg ? style.fill : style.color)), light(behind(e))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05) < 4.5;
  }).map(e => e.className.baseVal || e.className || e.tagName);
})()
"""
