"""Architecture name -> the functions that make a model, imported on demand."""

import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxserve.errors import CheckpointError
from jaxserve.models.config import ARCHITECTURES, ModelConfig, architecture_of, from_hf


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelFamily:
    """`abstract(cfg)` declares the weights; `forward(params, cfg, batch, kv, ...)` and `logits(params, hidden)` use them."""

    abstract: Callable[[ModelConfig], Any]
    forward: Callable[..., Any]
    logits: Callable[..., Any]


_MODULES = dict.fromkeys(ARCHITECTURES, "jaxserve.models.llama")


def family_of(cfg: ModelConfig) -> ModelFamily:
    """The model functions of an architecture."""
    module = importlib.import_module(_MODULES[cfg.architecture])
    return ModelFamily(abstract=module.abstract, forward=module.forward, logits=module.logits)


def read_config(path: Path) -> ModelConfig:
    """Parse and check the `config.json` of a model folder, or `path` itself if it is a file; eos ids come from
    `generation_config.json` beside it where that names them.

    Raises:
      CheckpointError: the file is missing, not JSON, or describes what is not implemented.
    """
    path = path if path.is_file() else path / "config.json"
    raw = read_json(path)
    architecture_of(raw)
    generation = path.with_name("generation_config.json")
    if generation.is_file():
        eos = read_json(generation).get("eos_token_id")
        raw = raw | ({} if eos is None else {"eos_token_id": eos})
    return from_hf(raw)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing from {path.parent}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} must hold a JSON object, not {type(value).__name__}")
    return value
