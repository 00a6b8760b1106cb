"""`mezzo report --live`: on this machine only, following a run, ending cleanly."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from made_runs import add_incident, dump, make_run
from opened_page import Opened
from playwright.sync_api import expect

from mezzo.errors import RunError
from mezzo.report.data import readers
from mezzo.report.live import HOST, listen, server
from mezzo.train.rundir import RunDir


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def runs(self) -> list[dict[str, Any]]:
        return list(json.loads(self.body)["runs"])


class Serving(NamedTuple):
    port: int
    stop: Callable[[], None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def get(self, path: str, **headers: str) -> Answer:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=10)
        try:
            connection.request("GET", path, headers={key.replace("_", "-"): value for key, value in headers.items()})
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Serving]]:
    """serve(run, …) → a server in a thread, stopped when the test ends."""
    stops = []

    def start(*runs: Path) -> Serving:
        listening, serving = listen(0), server(readers(runs))
        thread = threading.Thread(target=serving.run, kwargs={"sockets": [listening]})
        thread.start()

        def stop() -> None:
            serving.should_exit = True
            thread.join(20)
            listening.close()
            assert not thread.is_alive()

        stops.append(stop)
        deadline = time.monotonic() + 20
        while not serving.started and time.monotonic() < deadline:
            time.sleep(0.01)
        return Serving(listening.getsockname()[1], stop)

    yield start
    for stop in stops:
        stop()


Serve = Callable[..., Serving]


def append(run: Path, **record: Any) -> None:
    with open(run / "steps.jsonl", "a") as file:
        file.write(dump(record) + "\n")


def test_the_server_listens_on_this_machine_only() -> None:
    with listen(0) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"


def test_a_port_that_is_taken_is_an_error_with_the_remedy() -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=rf"cannot listen on 127\.0\.0\.1:{port}: .*leave --port out"):
            listen(port)


def test_the_data_follows_the_run_and_is_sent_only_when_it_changed(run: Path, serve: Serve) -> None:
    live = serve(run)
    first = live.get("/data.json")
    assert (first.status, first.runs[0]["last"]) == (200, 200)
    again = live.get("/data.json", If_None_Match=first.headers["etag"])
    assert (again.status, again.body) == (304, b"")
    append(run, step=201, loss=2.0)
    after = live.get("/data.json", If_None_Match=first.headers["etag"])
    assert (after.status, after.runs[0]["last"]) == (200, 201)
    assert after.headers["etag"] != first.headers["etag"]


def test_only_requests_that_name_this_machine_are_answered(run: Path, serve: Serve) -> None:
    live = serve(run)
    assert live.get("/data.json", Host="rebound.example").status == 400
    assert live.get("/", Host=f"rebound.example:{live.port}").status == 400
    assert live.get("/data.json", Host=f"localhost:{live.port}").status == 200
    assert "access-control-allow-origin" not in live.get("/data.json", Origin="http://evil.example").headers


def test_the_library_is_a_file_of_its_own_that_the_browser_keeps(run: Path, serve: Serve) -> None:
    live = serve(run)
    page, script = live.get("/"), live.get("/plotly.min.js")
    assert len(page.body) < 1_000_000 < len(script.body)
    assert "immutable" in script.headers["cache-control"]
    assert page.headers["cache-control"] == "no-store"
    assert b"connect-src 'self'" in page.body
    assert live.get("/config.toml").status == 404


def test_the_command_prints_its_address_and_ends_with_ctrl_c(run: Path) -> None:
    command = [sys.executable, "-c", "from mezzo.cli.main import main; main()", "report", str(run), "--live"]
    sys_argv = ["mezzo", *command[3:]]
    command[2] = f"import sys; sys.argv = {sys_argv!r}; {command[2]}"
    process = subprocess.Popen(command[:3], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("http://127.0.0.1:")
        port = int(line.split(":")[2].split("/")[0])
        assert Serving(port, lambda: None).get("/data.json").status == 200
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out, err) == (0, "ended\n", "")
    finally:
        process.kill()
        process.wait()


GONE = ("Failed to load resource",)  # what the browser writes when a server is gone


def test_the_open_page_follows_the_run_and_keeps_what_was_chosen(tmp_path: Path, serve: Serve, opened: Opened) -> None:
    run = make_run(tmp_path / "job", steps=400, done=100)
    with RunDir.open(run, lock=True):
        live = serve(run)
        page = opened(live.url, expected=GONE)
        assert "running" in page.inner_text("#verdict")
        assert "Following the run" in page.inner_text("#live")
        page.fill("#filter", "mlp.down")
        page.click("#theme")
        page.locator("#plot-loss").scroll_into_view_if_needed()
        box = page.locator("#plot-loss .plot .nsewdrag").first.bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + 100, box["y"] + 50)
        page.mouse.down()
        page.mouse.move(box["x"] + 300, box["y"] + 150, steps=5)
        page.mouse.up()
        shown = "document.querySelector('#plot-loss .plot')._fullLayout.xaxis.range"
        zoomed = page.evaluate(shown)
        assert zoomed[0] > 1
        assert zoomed[1] < 60
        page.click("#sites-table button[data-name='blocks.1.mlp.down:fprop.a']")
        for step in range(101, 151):
            append(run, step=step, loss=2.0, lr=0.001, tokens=1024 * step)
        add_incident(run, 140)
        expect(page.locator("#verdict")).to_contain_text("150 of 400", timeout=20_000)
        expect(page.locator("#incidents-body details[id]")).to_have_count(4)
        assert page.input_value("#filter") == "mlp.down"
        assert page.evaluate("document.querySelector('#panel').open")
        assert page.inner_text("#panel-title") == "blocks.1.mlp.down:fprop.a"
        assert page.get_attribute("html", "data-theme") == "dark"
        assert page.evaluate(shown) == zoomed
    expect(page.locator("#live")).to_contain_text("has ended", timeout=20_000)
    assert "stopped" in page.inner_text("#verdict")
    live.stop()
    expect(page.locator("#live")).to_contain_text("does not answer", timeout=20_000)


def test_a_run_without_a_record_can_be_opened_and_followed(tmp_path: Path, serve: Serve, opened: Opened) -> None:
    run = tmp_path / "new"
    run.mkdir()
    (run / "config.toml").write_text("[train]\nsteps = 2\n")
    page = opened(serve(run).url, expected=GONE)
    assert "Waiting for the first step" in page.inner_text("#live")
    append(run, step=1, loss=3.0)
    expect(page.locator("#verdict")).to_contain_text("1 of 2 steps", timeout=20_000)
    append(run, step=2, loss=2.5)
    expect(page.locator("#live")).to_contain_text("has ended", timeout=20_000)
    expect(page.locator("#verdict")).to_contain_text("finished")
