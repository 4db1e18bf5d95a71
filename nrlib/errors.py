"""The errors a user of nrlib can meet: each says what was given, what is allowed and what to do."""

from __future__ import annotations


class NrlibError(Exception):
    """Base class; the console command prints it as one paragraph, without a traceback."""


class ConfigError(NrlibError, ValueError):
    """A parameter has a value, type or name that is not allowed."""


class CorpusError(NrlibError):
    """A corpus cannot be had, read or used."""


class BackboneError(NrlibError):
    """A backbone cannot be loaded or is of the wrong kind."""


class WeightsError(NrlibError, RuntimeError):
    """Saved weights are of a format that is not loaded, or do not fit the model."""


class MemoryShortageError(NrlibError, MemoryError):
    """The machine, or its accelerator, has too little memory for what was asked."""


class RecordError(NrlibError):
    """A stored record cannot be used."""


class StorageError(NrlibError, OSError):
    """A result could not be written, for example because the disk is full."""


class ClusterError(NrlibError):
    """A scheduler or a worker cannot be used."""
