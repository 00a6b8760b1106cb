"""`mezzo report`: runs as one HTML page."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import click


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(), metavar="RUN...")
@click.option("--out", metavar="FILE", type=click.Path(dir_okay=False),
              help="Where the page goes; RUN/report.html by default, ./report.html for several runs.")  # fmt: skip
@click.option("--live", is_flag=True, help="Serve the page on 127.0.0.1 and follow the runs; Ctrl-C ends it.")
@click.option("--port", default=0, show_default="a free one", type=click.IntRange(0, 65535), help="Port for --live.")
@click.option("--lang", type=click.Choice(["en", "zh", "auto"]), default="auto", show_default=True,
              help="Language at first; auto is the browser's.")  # fmt: skip
def report(runs: tuple[str, ...], out: str | None, live: bool, port: int, lang: str) -> None:
    """Show how training went, as one HTML page that needs no network.

    Losses, learning rate, loss scale, speed and memory; what every site lost to rounding, over time; incidents,
    samples, configuration, and how to train it again. Several runs are shown side by side.

    \b
    Examples:
      mezzo report runs/first
      mezzo report runs/bf16 runs/fp8 --out compare.html
      mezzo report runs/first --live --port 8000
    """
    from mezzo.errors import ConfigError
    from mezzo.report.data import readers

    if live and out is not None:
        raise ConfigError("--live serves the page and writes none: give --live or --out, not both")
    if port and not live:
        raise ConfigError("--port is for --live, which is not given")
    sources = readers(runs)
    if not live:
        from mezzo.report.page import render, write

        path = Path(out) if out is not None else Path(runs[0] if len(runs) == 1 else ".") / "report.html"
        page = render([source.read() for source in sources], lang)
        write(page, path)
        click.echo(f"written to {path} ({len(page.encode('utf-8', 'replace')) / 2**20:.1f} MiB); open it in a browser")
        return
    from mezzo.report.live import HOST, listen, server

    serving = server(sources, lang)
    with listen(port) as socket:
        click.echo(f"http://{HOST}:{socket.getsockname()[1]}/  (Ctrl-C ends it)")
        with suppress(KeyboardInterrupt):
            serving.run(sockets=[socket])
        click.echo("ended")
