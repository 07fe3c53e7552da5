"""The errors that are not plain ValueError or TypeError. A leaf: anyone may import it."""

from __future__ import annotations

__all__ = ["BackendUnavailable", "NoLayersMatched", "QuantizationFormatError"]


class BackendUnavailable(RuntimeError):
    """What is needed for this device or this job is not installed; the message names what to install."""


class QuantizationFormatError(ValueError):
    """A file, or a stored state, is not what the format says; the message names the file and the tensor."""


class NoLayersMatched(ValueError):
    """A pattern, or a whole call, matches no layer; the message lists near misses."""
