"""The page in a real Chromium: opened from a file, clicked, used by keyboard, in both languages, dark, on a phone.

The fixture `opened` fails a test in whose end the browser's console holds an error, or a request has left the page.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_runs import dump, make_run, sample
from opened_page import Opened
from playwright.sync_api import Page

from mezzo.report import read_runs, render, write

SITE = "blocks.1.mlp.down:fprop.a"
PLOTS = ("loss", "lr", "loss_scale", "grad_norm", "tokens_per_s", "mfu", "memory", "logits")


def written(*runs: Path) -> Path:
    out = runs[0].parent / "page.html"
    write(render(read_runs(runs)), out)
    return out


def open_and_offline(opened: Opened, *runs: Path, **more: object) -> Page:
    return opened(written(*runs), offline=True, **more)


def points(page: Page, plot: str) -> list[int]:
    """How many points each trace of a plot has on the screen's data."""
    found: list[int] = page.evaluate(f"document.querySelector('{plot}').data.map((one) => one.x.length)")
    return found


def click_cell(page: Page, row: int, column: int) -> None:
    """Click into a cell of the heatmap of sites, as a mouse does."""
    page.locator("#sites-heat").scroll_into_view_if_needed()
    place = page.evaluate(
        """([row, column]) => {
          const div = document.querySelector("#sites-heat .heat"), box = div.getBoundingClientRect();
          const { xaxis, yaxis } = div._fullLayout;
          return [box.left + xaxis._offset + xaxis.c2p(column), box.top + yaxis._offset + yaxis.c2p(row)];
        }""",
        [row, column],
    )
    page.mouse.move(*place)
    page.wait_for_timeout(150)  # plotly looks where the mouse is before it takes a click
    page.mouse.click(*place)


def test_every_plot_is_drawn(run: Path, opened: Opened) -> None:
    page = open_and_offline(opened, run)
    for name in PLOTS:
        plot = f"#plot-{name}" + ("" if name == "logits" else " .plot")
        assert sum(points(page, plot)) > 3, name
        assert page.locator(f"{plot} .scatterlayer .trace").count() >= 1, name
    assert page.locator("#sites-heat .heatmaplayer image").count() == 1
    assert page.locator("#updates-heat .heatmaplayer image").count() == 1
    assert points(page, "#plot-loss_scale .plot")[1] == 3  # every skipped step is marked
    assert page.evaluate("document.querySelector('#plot-loss .plot').layout.shapes.length") == 2  # the second phase
    assert "Phase 1: steps 1 to 160, ended by until 0.8. Phase 2: steps 161 to 200." in page.inner_text("#plot-loss")
    assert not page.is_visible("#plot-sparsity")  # where nothing is pruned


def test_a_click_on_a_cell_opens_the_site_at_that_step(run: Path, opened: Opened) -> None:
    page = open_and_offline(opened, run)
    click_cell(page, 3, 4)
    page.wait_for_selector("#panel[open]")
    assert page.inner_text("#panel-title") == "blocks.0.mlp.down:fprop.a"
    assert page.inner_text("#panel-slider-value") == "100"
    assert sum(points(page, "#panel-history")) == 40  # four measures at ten steps
    assert sum(points(page, "#panel-histogram")) > 10
    assert "smallest subnormal 2⁻²⁴" in page.inner_text("#panel-range")
    assert "65,504" in page.inner_text("#panel-range")
    assert "under nvfp4: nvfp4" in page.inner_text("#panel-numbers")


def test_the_keyboard_reaches_every_site_and_the_histograms_steps(run: Path, opened: Opened) -> None:
    page = open_and_offline(opened, run)
    page.focus("#filter")
    for _ in range(40):  # Tab goes through the headers of the table to its first site
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.dataset.name !== undefined"):
            break
    names = page.evaluate("[...document.querySelectorAll('#sites-table button[data-name]')].map((b) => b.dataset.name)")
    assert page.evaluate("document.activeElement.dataset.name") == names[0]
    for _ in range(names.index(SITE)):
        page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.dataset.name") == SITE
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    page.wait_for_selector("#panel[open]")
    assert page.inner_text("#panel-title") == SITE
    for _ in range(3):  # two buttons of the plot before it
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "panel-slider"
    before = page.inner_text("#panel-slider-value")
    page.keyboard.press("ArrowLeft")
    assert (before, page.inner_text("#panel-slider-value")) == ("200", "180")
    page.keyboard.press("Escape")
    page.wait_for_selector("#panel", state="hidden")
    assert page.evaluate("document.activeElement.dataset.name") == SITE
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.dataset.name") == names[-1]


def test_sites_are_filtered_grouped_and_sorted(run: Path, opened: Opened) -> None:
    page = open_and_offline(opened, run)
    rows = page.locator("#sites-table tbody tr")
    assert rows.count() == 36
    page.fill("#filter", "1 mlp")
    assert rows.count() == 8
    page.select_option("#sites-controls select >> nth=1", "weights")
    assert rows.all_inner_texts()[0].startswith("blocks.1.mlp.up:fprop.b")
    assert rows.count() == 2
    page.fill("#filter", "nothing")
    assert "No site matches." in page.inner_text("#sites-heat")
    page.fill("#filter", "")
    page.select_option("#sites-controls select >> nth=1", "all")
    for order, turned in (("ascending", False), ("descending", True)):  # the worst first
        values = [float(text.split("\t")[2].split()[0].replace("∞", "inf")) for text in rows.all_inner_texts()]
        assert values == sorted(values, reverse=turned)
        assert page.get_attribute("#sites-table th >> nth=2", "aria-sort") == order
        page.click("#sites-table [data-sort=sqnr]")
    for measure in ("underflow", "overflow", "amax"):
        page.select_option("#sites-controls select >> nth=0", measure)
        assert page.locator("#sites-heat .heatmaplayer image").count() == 1
    before = page.inner_text("#sites-table")
    page.select_option("#sites-controls select >> nth=2", "nvfp4")
    assert page.locator("#sites-heat .heatmaplayer image").count() == 1
    assert "nvfp4" in page.inner_text("#sites-table")
    assert page.inner_text("#sites-table") != before


def test_values_that_are_not_finite_are_the_worst_in_colour_sign_and_order(tmp_path: Path, opened: Opened) -> None:
    run = make_run(tmp_path / "first", steps=40)
    lines = [json.loads(line) for line in (run / "sites.jsonl").read_text().splitlines()]
    for line in lines:
        line["sites"][SITE] |= {"nonfinite": 3, "sqnr": None}
    (run / "sites.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = open_and_offline(opened, run)
    heat = "document.querySelector('#sites-heat .heat').data[0]"
    marked = page.evaluate(f"{heat}.text.map((line) => line.every((text) => text === '✕'))")
    at = marked.index(True)
    assert marked.count(True) == 1
    assert set(page.evaluate(f"{heat}.z[{at}]")) == {page.evaluate(f"{heat}.zmin")}
    assert page.locator("#sites-table tbody tr").all_inner_texts()[0].startswith(SITE)


def test_sites_that_lose_nothing_are_coloured_as_well(tmp_path: Path, opened: Opened) -> None:
    run = make_run(tmp_path / "first", steps=40)
    lines = [json.loads(line) for line in (run / "sites.jsonl").read_text().splitlines()]
    for line in lines:
        for measure in line["sites"].values():
            measure["sqnr"] = "Infinity"
    (run / "sites.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = open_and_offline(opened, run)
    assert set(page.evaluate("document.querySelector('#sites-heat .heat').data[0].z.flat()")) == {1}
    assert "∞ dB" in page.inner_text("#sites-table")


def test_the_language_changes_every_text(run: Path, opened: Opened) -> None:
    page = open_and_offline(opened, run)
    page.click("#lang")
    assert page.get_attribute("html", "lang") == "zh-CN"
    assert page.inner_text("#h-reproduce") == "如何复现"
    assert "已完成" in page.inner_text("#verdict")
    assert page.text_content("#plot-loss .xtitle") == "步"
    page.click(f"#sites-table button[data-name='{SITE}']")
    assert "最小次正规数" in page.inner_text("#panel-range")
    left = page.evaluate(
        """() => [...document.querySelectorAll("h2, h3, label, button, th, .note, .xtitle, .legendtext, option")]
          .map((one) => one.textContent)
          .filter((text) => /\\b(the|of|step|site|share|loss|Copy|Close)\\b/.test(text))"""
    )
    assert left == []
    page.keyboard.press("Escape")
    page.click("#lang")
    assert page.inner_text("#h-reproduce") == "How to reproduce"


def test_a_chinese_browser_gets_chinese_at_first(run: Path, opened: Opened) -> None:
    assert open_and_offline(opened, run, locale="zh-CN").inner_text("#h-summary") == "概要"


def test_dark_mode_follows_the_system_and_the_button_and_recolours_the_plots(run: Path, opened: Opened) -> None:
    page = open_and_offline(opened, run, color_scheme="dark")
    plot = "document.querySelector('#plot-loss .plot')"
    look = f"[getComputedStyle(document.body).backgroundColor, {plot}._fullLayout.font.color]"
    assert page.evaluate(look) == ["rgb(15, 19, 24)", "#e6e9ee"]
    page.click("#theme")
    assert page.evaluate(look) == ["rgb(255, 255, 255)", "#1b1f24"]
    assert page.inner_text("#theme") == "Dark"


def test_text_can_be_read_in_both_themes(run: Path, opened: Opened) -> None:
    """WCAG 2.2, 1.4.3: a contrast of at least 4.5."""
    page = open_and_offline(opened, run)
    for _ in range(2):
        contrasts = page.evaluate(
            """() => {
              const light = (text) => {
                const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
                const [r, g, b] = text.match(/\\w\\w/g).map((x) => linear(parseInt(x, 16) / 255));
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
              };
              const of = (a, b) => {
                const [x, y] = [light(css(a)), light(css(b))].sort((p, q) => p - q);
                return (y + 0.05) / (x + 0.05);
              };
              const texts = ["--text", "--soft", "--accent", "--bad", "--good"];
              return texts.flatMap((a) => ["--back", "--card"].map((b) => of(a, b)));
            }"""
        )
        assert min(contrasts) >= 4.5
        page.click("#theme")


@pytest.mark.parametrize("language", ["en-US", "zh-CN"])
def test_a_phone_shows_it_without_scrolling_sideways(run: Path, opened: Opened, language: str) -> None:
    page = open_and_offline(opened, run, width=390, height=844, has_touch=True, is_mobile=True, locale=language)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    for details in page.locator("#incidents-body > div > div > details").all():
        details.evaluate("(one) => { one.open = true; }")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.tap(f"#sites-table button[data-name='{SITE}']")
    page.wait_for_selector("#panel[open]")
    wide = "[document.documentElement.scrollWidth, document.querySelector('#panel').scrollWidth <= innerWidth]"
    assert page.evaluate(wide) == [390, True]


def test_several_runs_side_by_side(run: Path, tmp_path: Path, opened: Opened) -> None:
    other = make_run(tmp_path / "second", steps=200, done=100, policy="bf16", seed=5)
    page = open_and_offline(opened, run, other)
    assert page.inner_text("#title") == "first, second"
    assert page.locator("#summary-body thead th").count() == 3
    names = page.evaluate("document.querySelector('#plot-lr .plot').data.map((one) => one.name)")
    colours = page.evaluate(
        "document.querySelector('#plot-lr .plot').data.map((one) => one.line.color + one.line.dash)"
    )
    assert names == ["first", "second"]
    assert len(set(colours)) == 2
    assert page.locator("#config-body tbody tr").all_inner_texts() == ['policy\t"fp16"\t"bf16"', "train.seed\t0\t5"]
    page.select_option("#sites-controls select >> nth=0", "1")
    assert page.evaluate("document.querySelector('#sites-heat .heat').data[0].x.length") == 5
    page.click(f"#sites-table button[data-name='{SITE}']")
    assert sum(points(page, "#panel-history")) == 4 * 10 + 4 * 5


def test_an_incident_opens_from_its_mark_and_shows_the_rule(run: Path, opened: Opened) -> None:
    page = open_and_offline(opened, run)
    page.locator("#plot-loss").scroll_into_view_if_needed()
    mark = page.locator("#plot-loss .scatterlayer .trace").last.locator(".point").nth(1).bounding_box()
    assert mark is not None
    place = mark["x"] + mark["width"] / 2, mark["y"] + mark["height"] / 2
    page.mouse.move(*place)
    page.wait_for_timeout(150)
    page.mouse.click(*place)
    page.wait_for_selector("#incident-0-90-nonfinite[open]")
    text = page.inner_text("#incident-0-90-nonfinite")
    assert "'blocks.1.mlp.down:*=float32'" in text
    assert "blocks.2.mlp.down:fprop.a" in text
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
    page.evaluate("openIncident(0, '120-exception')")
    assert "MemoryError" in page.inner_text("#incident-0-120-exception")


def test_missing_parts_are_said_and_nothing_breaks(tmp_path: Path, opened: Opened) -> None:
    run = tmp_path / "old"
    run.mkdir()
    (run / "config.toml").write_text("[train]\nsteps = 4\n")
    page = open_and_offline(opened, run)
    assert "No step has been recorded yet." in page.inner_text("#curves")
    (run / "steps.jsonl").write_text(dump({"step": 1, "loss": 3.0}) + '\n{"step": 2, "lo')
    page = open_and_offline(opened, run)
    for section, says in (
        ("curves", "No held-out loss was recorded."),
        ("sites", "no measurements of its sites"),
        ("updates", "no measurements of its updates"),
        ("logits", "no measurements of its attention"),
        ("findings", "no measurements"),
        ("incidents", "No incident was recorded."),
        ("samples", "No text was sampled."),
        ("config", "Could not be read."),
        ("reproduce", "does not say what text"),
    ):
        assert says in page.inner_text(f"#{section}"), section
    assert "1 of 4 steps" in page.inner_text("#verdict")


def test_nothing_that_a_run_holds_runs_or_becomes_html(tmp_path: Path, opened: Opened) -> None:
    text = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
    run = make_run(tmp_path / "<img src=x onerror=window.hacked=3>", steps=100)
    with open(run / "steps.jsonl", "a") as file:
        file.write(
            dump({"step": 101, "loss": 2.0, "skipped": True, "loss_scale": 2.0, "site": text, "sample": text}) + "\n"
        )
    import random

    wrong = sample(110, random.Random(0))
    name = f"{text}<a href='http://evil.example'>x</a>:fprop.a"
    wrong["sites"][name] = wrong["sites"][SITE] | {"format": text}
    wrong["updates"][name] = wrong["updates"]["head.weight"]
    wrong["logits"][name] = 3.0
    wrong["findings"] = [{"kind": text, "site": name, "text": text}]
    with open(run / "sites.jsonl", "a") as file:
        file.write(dump(wrong) + "\n")
    (run / "config.toml").write_text((run / "config.toml").read_text() + f'\n[x]\n"{text}" = "{text}"\n')
    incident = run / "incidents" / "step-000050"
    incident.mkdir(parents=True)
    fields = dict.fromkeys(("kind", "what", "site", "rule", "policy", "traceback"), text)
    (incident / "incident.json").write_text(
        dump({"step": 50, "sites": {name: {"format": text}}, "rng": {text: text}, **fields})
    )
    other = make_run(tmp_path / "other", steps=20)
    page = open_and_offline(opened, run, other)
    page.evaluate("(name) => openPanel('site', name)", name)
    page.wait_for_selector("#panel[open]")
    assert page.inner_text("#panel-title") == name
    assert text in page.inner_text("#samples-body")
    page.wait_for_timeout(300)
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.querySelectorAll('img, [onerror], a[href^=http], svg a').length") == 0
    assert (
        page.evaluate("document.querySelectorAll('body script:not([nonce]):not([type=\"application/json\"])').length")
        == 0
    )
