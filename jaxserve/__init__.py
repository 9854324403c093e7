"""jaxserve: serve language models with JAX on TPU, GPU and CPU. Importing this loads no jax."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxserve.async_engine import AsyncEngine
    from jaxserve.config import EngineConfig
    from jaxserve.llm import LLM
    from jaxserve.request import SamplingParams
    from jaxserve.structured import StructuredOutputsParams

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncEngine", "EngineConfig", "SamplingParams", "StructuredOutputsParams", "__version__"]

_HOMES = {
    "LLM": "jaxserve.llm",
    "AsyncEngine": "jaxserve.async_engine",
    "EngineConfig": "jaxserve.config",
    "SamplingParams": "jaxserve.request",
    "StructuredOutputsParams": "jaxserve.structured",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
