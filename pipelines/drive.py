"""`headfoundry drive`: animate one picture with a sequence of motions."""

from reconstructor.avatar import DriveRun as CONFIG
from reconstructor.avatar import drive as main

__all__ = ["CONFIG", "main"]
