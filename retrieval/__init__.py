"""Search in embeddings of several sizes: few dimensions for all vectors, more for those that are left."""

from .funnel import FunnelIndex
from .stages import Stage, parse_stages

__all__ = ["FunnelIndex", "Stage", "parse_stages"]
