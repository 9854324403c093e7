"""Errors that callers see: what happened, why, and what to do about it, with the numbers.

`ValueError` is the common base for everything a caller can cause, so `except ValueError` in user code
keeps working. `InvariantError` is ours: it means a bug in jaxserve, never a bad request.
"""


class JaxserveError(ValueError):
    """Base of every error a caller can cause. `remedy` is one imperative sentence, or empty."""

    def __init__(self, message: str, *, remedy: str = ""):
        stop = "" if remedy.endswith("?") else "."
        super().__init__(f"{message}. {remedy}{stop}" if remedy else message)
        self.remedy = remedy


class ConfigError(JaxserveError):
    """An engine or sampling option that is unknown, out of range, or in conflict with another."""


class CheckpointError(JaxserveError):
    """A model folder that is missing, damaged, unsafe, or uses a feature this version does not implement."""


class RequestError(JaxserveError):
    """A prompt or message that cannot be served as it is."""


class CapacityError(RequestError):
    """A request, or a whole model, that can never fit the memory it was given."""


class ServerError(JaxserveError):
    """A server that we are a client of is not there, or refuses."""


class DeviceError(JaxserveError):
    """A step failed on the device, for want of memory or otherwise. Requests that had begun are lost, others go on."""


class UnavailableError(JaxserveError):
    """The engine takes no request now: too many wait, it is shutting down, or it has failed."""


class InvariantError(AssertionError):
    """A stateful part found its own books wrong. Always a bug in jaxserve; please report it."""
