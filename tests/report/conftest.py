"""A made run, and a real browser if there is one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_runs import make_run
from opened_page import Opened
from playwright.sync_api import Browser, Page, sync_playwright

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "first")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser to look at the page with: none of {', '.join(names)} is on PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Browser) -> Iterator[Opened]:
    """opened(path or URL, width=…) → a page that has drawn; its errors and requests are checked when the test ends."""
    contexts, wrong, asked = [], [], []

    def open_page(
        where: Path | str, width: int = 1280, height: int = 900, expected: tuple[str, ...] = (), **more: Any
    ) -> Page:
        context = chromium.new_context(viewport={"width": width, "height": height}, **{"locale": "en-US", **more})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning")
                and not any(one in message.text for one in expected) else None)  # fmt: skip
        own = where if isinstance(where, str) else where.as_uri()
        page.on(
            "request",
            lambda request: asked.append(request.url) if not request.url.startswith((own, "data:", "blob:")) else None,
        )
        page.goto(own)
        page.wait_for_selector("#footer:not(:empty)", state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong, f"errors in the browser's console: {wrong}"
    assert not asked, f"requests left the page: {asked}"


@pytest.fixture(autouse=True)
def _outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
