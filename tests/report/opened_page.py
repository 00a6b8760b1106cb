"""The type of the fixture `opened`."""

from __future__ import annotations

from collections.abc import Callable

from playwright.sync_api import Page

Opened = Callable[..., Page]
