"""Errors that a user can fix. A message is one line: what, where, what to type instead."""


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
