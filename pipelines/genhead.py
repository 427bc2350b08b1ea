"""`headfoundry genhead`: train the head generator on portraits."""

from genhead.train import GenHeadRun as CONFIG
from genhead.train import train as main

__all__ = ["CONFIG", "main"]
