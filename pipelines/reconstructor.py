"""`headfoundry reconstructor`: train the one-shot reconstructor on shards."""

from reconstructor.settings import ReconstructorRun as CONFIG
from reconstructor.train import train as main

__all__ = ["CONFIG", "main"]
