"""Search in embeddings of several sizes: few dimensions of all vectors, then more dimensions of the best ones."""

from .funnel import FunnelIndex
from .stages import Stage, parse_stages

__all__ = ["FunnelIndex", "Stage", "parse_stages"]
