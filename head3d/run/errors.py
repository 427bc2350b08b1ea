"""Errors a user can act on. The command line prints them without a traceback and exits with status 2.

Each message says what went wrong, where, what was expected, what was found and what to do.
"""


class FoundryError(Exception):
    """Base of the errors that are the user's to mend, not a defect of this program."""


class ConfigError(FoundryError):
    """A setting is unknown, of the wrong type or out of range."""


class AssetError(FoundryError):
    """A head model, checkpoint or other input file is missing, malformed or unsafe."""


class DataError(FoundryError):
    """A portrait, label, shard or sample is missing, malformed or damaged."""
