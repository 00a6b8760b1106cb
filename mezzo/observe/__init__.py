"""L4: what a run's sites lose and what goes wrong in it, written into its run directory."""

from mezzo.observe.incidents import Incident
from mezzo.observe.listener import RunObserver

__all__ = ["Incident", "RunObserver"]
