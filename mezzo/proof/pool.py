"""Runs side by side in processes of their own, ended by one signal without losing what they trained."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mezzo.errors import MezzoError
from mezzo.proof.run import Job, run

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _alone() -> None:
    """Of a worker: a terminal's Ctrl-C is the parent's, which tells each run once; between runs nothing ends.

    While a run trains, its Session listens to signals itself.
    """
    os.setpgrp()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _passed_on(stopped: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM are remembered, and passed on to the runs."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        stopped.set()
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def side_by_side(jobs: list[Job], count: int) -> Iterator[dict[str, Any]]:
    """Results as they come, `count` runs at a time; after a signal {"interrupted": True} last, and no run is begun.

    raises    MezzoError if a process died
    """
    waiting, stopped = list(jobs), threading.Event()
    context = multiprocessing.get_context("spawn")
    with _passed_on(stopped), ProcessPoolExecutor(count, mp_context=context, initializer=_alone) as pool:
        running: set[Future[dict[str, Any]]] = set()
        while (waiting and not stopped.is_set()) or running:
            while waiting and len(running) < count and not stopped.is_set():
                running.add(pool.submit(run, waiting.pop(0)))
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for one in finished:
                try:
                    result = one.result()
                except BrokenProcessPool:
                    raise MezzoError(
                        "the process of a run died, killed perhaps for want of memory; the same command goes on, and "
                        "with fewer --jobs it needs less"
                    ) from None
                if not result.get("interrupted"):
                    yield result
    if stopped.is_set():
        yield {"interrupted": True}
