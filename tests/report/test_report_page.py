"""The page as a file: self-contained, safe against what a run holds, in two languages; and the verb that writes it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from made_runs import dump, make_run

from mezzo.cli.main import cli
from mezzo.errors import MissingExtraError, RunError
from mezzo.report import read_runs, render, write
from mezzo.report.page import SCRIPTS, embed, plotly_js, resource

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'><!--"


def own(page: str) -> str:
    """The page without the library."""
    return page.replace(plotly_js(), "")


def test_the_page_holds_everything_and_asks_for_nothing(run: Path) -> None:
    page = own(render(read_runs([run])))
    assert not re.search(r"<(script|img|iframe|link)[^>]*(src|href)=[\"'](?!data:,)", page)
    assert "@import" not in page
    assert "url(" not in page
    assert "connect-src 'none'" in page
    assert re.findall(r"https?://[^\s\"'<]+", page) == []


def test_what_a_run_holds_cannot_end_its_script(run: Path) -> None:
    with open(run / "steps.jsonl", "a") as file:
        file.write(dump({"step": 201, "loss": 2.0, "sample": HOSTILE}) + "\n")
    (run / "config.toml").write_text((run / "config.toml").read_text() + f'\n[x]\ny = "{HOSTILE}"\n')
    page = own(render(read_runs([run])))
    assert HOSTILE not in page
    assert "window.hacked = 1</script>" not in page
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert block is not None
    assert json.loads(block[1])["runs"][0]["samples"][-1]["text"] == HOSTILE


def test_a_runs_name_is_escaped_in_the_title(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<img src=x onerror=hacked()>", steps=5)
    page = own(render(read_runs([run])))
    assert "<img" not in page
    assert "<title>&lt;img src=x" in page


def test_the_scripts_word_is_not_one_that_the_data_can_hold(run: Path) -> None:
    page = own(render(read_runs([run])))
    words = set(re.findall(r'<script nonce="(\w+)"', page))
    (word,) = words
    assert f"script-src 'nonce-{word}'" in page
    assert "unsafe-inline'; img" in page  # of styles only
    assert page.count(word) == 3  # the policy, plotly.js, the page's own script


def test_embedded_json_reads_back() -> None:
    value = {"a": "</script>&<!--\u2028", "b": [1, None, "中文"]}
    text = embed(value)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == value


def test_the_same_runs_give_the_same_page(run: Path) -> None:
    assert render(read_runs([run])) == render(read_runs([run]))


def texts() -> dict[str, list[str]]:
    found: dict[str, list[str]] = json.loads(resource("texts.json"))
    return found


def test_every_text_is_in_both_languages_with_the_same_gaps() -> None:
    for key, both in texts().items():
        assert len(both) == 2, key
        assert all(both), key
        gaps = [sorted(re.findall(r"\{(\w+)\}", text)) for text in both]
        assert gaps[0] == gaps[1], key
        # A Chinese text is Chinese, but for what the field writes in Latin letters.
        assert re.search(r"[\u4e00-\u9fff]", both[1]) or both[1] in ("SQNR", "SQNR（dB）", "amax", "，"), key


def test_the_texts_are_those_that_the_page_uses() -> None:
    code = "\n".join(resource(name) for name in SCRIPTS)
    template = resource("report.html.j2")
    used = set(re.findall(r'\bt\("(\w+)"[,)]', code)) | set(re.findall(r"text\.(\w+)", template))
    used |= set(re.findall(r'section\("(\w+)"\)', template)) | set(re.findall(r'data-(?:t|label)="(\w+)"', template))
    missing = used - texts().keys()
    assert not missing
    prefixes = ("kind_", "summary_", "status_", "group_", "reproduce_")
    quoted = set(re.findall(r'"(\w+)"', code)) | set(re.findall(r"(\w+):", code))
    unused = [key for key in texts() if key not in used | quoted and not key.startswith(prefixes)]
    assert not unused


def test_the_first_language_can_be_chosen(run: Path) -> None:
    runs = read_runs([run])
    assert '<html lang="zh">' in render(runs, "zh")
    assert "如何复现</h2>" in render(runs, "zh")
    assert "How to reproduce</h2>" in render(runs, "en")


def test_a_page_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*; choose another --out"):
        write("", tmp_path / "file" / "report.html")


def test_a_missing_package_is_named_with_its_remedy(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = read_runs([run])
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(MissingExtraError, match=r"mezzo report needs the package 'plotly'.*pip install plotly"):
        render(runs)


def test_the_size_of_a_page_is_mostly_the_librarys(run: Path) -> None:
    assert len(own(render(read_runs([run])))) < 500_000


def test_the_report_imports_no_framework() -> None:
    code = "import sys, mezzo.report.live; print(*({'torch', 'jinja2', 'plotly', 'uvicorn'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def mezzo(*arguments: str) -> tuple[int, str, BaseException | None]:
    done = CliRunner().invoke(cli, ["report", *arguments])
    return done.exit_code, done.output, done.exception


def test_the_verb_writes_into_the_run_or_here_for_several(run: Path, tmp_path: Path) -> None:
    code, said, _ = mezzo("first")
    assert code == 0
    assert said.startswith("written to first/report.html (")
    assert (run / "report.html").stat().st_size > 4_000_000
    make_run(tmp_path / "second", steps=20)
    assert mezzo("first", "second")[0] == 0
    assert (tmp_path / "report.html").exists()
    assert mezzo("first", "--out", "there/page.html", "--lang", "zh")[0] == 0
    assert '<html lang="zh">' in (tmp_path / "there/page.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "nowhere is not a run: it has no config.toml"),
        (["first", "first"], "first is given more than once"),
        (["first", "--live", "--out", "x.html"], "give --live or --out, not both"),
        (["first", "--port", "8000"], "--port is for --live"),
    ],
)
def test_what_cannot_be_done_is_one_clear_error(run: Path, arguments: list[str], says: str) -> None:
    code, _, error = mezzo(*arguments)
    assert code == 1
    assert says in str(error)


def test_a_run_with_a_report_in_it_can_still_be_read(run: Path) -> None:
    assert mezzo("first")[0] == mezzo("first")[0] == 0
