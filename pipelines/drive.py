"""`headfoundry drive`: animate one picture with a sequence of motions."""

from reconstructor.drive import DriveRun as CONFIG
from reconstructor.drive import drive as main

__all__ = ["CONFIG", "main"]
