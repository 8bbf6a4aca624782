"""Errors that a user can fix. A message is one line: what, where, what to type instead.

`counted`, `duration_words` and `brief` word numbers, times and long values in messages and reports.
"""


class SaexpError(Exception):
    """Base of every user-facing error. The command line prints its message and exits with 1."""


class ConfigError(SaexpError):
    """A key, an option or a value that does not exist or does not fit the others."""


class DataError(SaexpError):
    """A data set, a text or a row that cannot be used; the message contains file and line."""


class ModelError(SaexpError):
    """A language model that cannot be loaded, or a hookpoint it does not have."""


class SAEError(SaexpError):
    """A sparse autoencoder that cannot be loaded, or does not fit the model or the hookpoint."""


class StoreError(SaexpError):
    """An activation store that cannot be read or written: permissions, damage, full disk."""


class InterventionError(SaexpError):
    """An intervention that cannot be carried out as requested."""


def counted(n: int, one: str, many: str | None = None) -> str:
    """A number and its noun: "1 row", "3 rows"; `many` is a plural other than `one` with an s."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def duration_words(seconds: float) -> str:
    """A duration in its own unit: "40 s", "25 min", "3.5 h"."""
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def brief(text: str, length: int) -> str:
    """The text as one line of at most `length` characters, cut between words."""
    line = " ".join(text.split())
    if len(line) <= length:
        return line
    return line[: length - 1].rpartition(" ")[0].rstrip(".,;:") + " …"
