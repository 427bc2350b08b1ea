"""`headfoundry evaluate`: measure a reconstructor on held-out identities."""

from reconstructor.evaluate import EvaluateRun as CONFIG
from reconstructor.evaluate import evaluate as main

__all__ = ["CONFIG", "main"]
