"""`headfoundry verify`: check a folder of shards and re-render samples from their recipes."""

from datagen.verify import VerifyRun as CONFIG
from datagen.verify import verify as main

__all__ = ["CONFIG", "main"]
