"""Names under which a model is served."""

from collections.abc import Sequence

from jaxserve.openai.errors import ApiError


def served_name(name: str | None, served: Sequence[str]) -> str:
    """The name that an answer carries; the first if none is asked for.

    Raises:
      ApiError: 404, for a model that is not served.
    """
    if name is None or name in served:
        return name or served[0]
    known = ", ".join(map(repr, served))
    raise ApiError(
        f"model {name[:100]!r} is not served here; there is {known}. --served-model-name adds a name",
        status=404,
        code="model_not_found",
        param="model",
    )
