"""`headfoundry datagen`: produce labelled multi-view shards with a trained generator."""

from datagen.generate import DatagenRun as CONFIG
from datagen.generate import generate as main

__all__ = ["CONFIG", "main"]
