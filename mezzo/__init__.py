"""mezzo: train networks in the lowest precision that loses nothing, with the proof on the table."""

from mezzo._version import __version__

__all__ = ["__version__"]
