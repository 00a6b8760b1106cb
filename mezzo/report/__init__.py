"""L5: runs as one self-contained HTML page, and the same page following a running job."""

from mezzo.report.data import Reader, read_runs
from mezzo.report.page import render, write

__all__ = ["Reader", "read_runs", "render", "write"]
