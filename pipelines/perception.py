"""`headfoundry perception`: train a measurement network and a motion encoder on shards."""

from reconstructor.perception_training import PerceptionRun as CONFIG
from reconstructor.perception_training import train as main

__all__ = ["CONFIG", "main"]
