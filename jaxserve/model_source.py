"""Where a model comes from: the bundled one, a folder, or the Hugging Face hub; or, without weights, a published shape."""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from jaxserve.errors import CheckpointError
from jaxserve.models.config import ModelConfig, from_hf
from jaxserve.models.published import MODELS
from jaxserve.models.registry import read_config

BUNDLED = {"tiny": "a small trained Llama that answers at once on any machine"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Never code, never pickles.
_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja")


def find_model(model: str | Path) -> Path:
    """The folder of a model named by bundled name, path or hub id (downloaded to the hub's own cache).

    Raises:
      CheckpointError: there is no such model, or it cannot be fetched.
    """
    if is_published(model):
        raise CheckpointError(
            f"of {str(model)!r} only the shape is known here, not the weights",
            remedy='Give a folder or a hub id, or choose load_format="dummy" for random weights',
        )
    return _find(str(model), _PATTERNS)


def is_published(model: str | Path) -> bool:
    """Whether this names a shape of `models.published`. A folder of that name goes first."""
    return str(model) in MODELS and not Path(str(model)).is_dir()


def find_folder(model: str | Path, load_format: str) -> Path | None:
    """Like `find_model`; None for a published shape whose weights are to be random.

    Raises:
      CheckpointError: there is no such model, it cannot be fetched, or it has no weights and needs them.
    """
    return None if load_format == "dummy" and is_published(model) else find_model(model)


def config_of(model: str | Path) -> ModelConfig:
    """The config of a model: bundled, in a folder, on the hub, or published; or in the config.json of that path.

    Raises:
      CheckpointError: there is no such model, it cannot be fetched, or is not implemented.
    """
    return from_hf(MODELS[str(model)]) if is_published(model) else read_config(find_config(model))


def _find(name: str, patterns: Sequence[str]) -> Path:
    if not name:
        raise CheckpointError("the model name is empty", remedy=_choices())
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise CheckpointError(f"{name} is a file", remedy="Give the folder that holds config.json and the weights")
    if name in BUNDLED:
        return bundled_folder(name)
    if _HUB_ID.fullmatch(name) and not name.startswith((".", "/", "~")):
        return _download(name, patterns)
    raise CheckpointError(f"there is no folder {name!r}, and it is no bundled model or hub id", remedy=_choices())


def find_config(model: str | Path) -> Path:
    """Like `find_model` where only the config is wanted: the path may be that of a config.json, and of a model on the hub
    nothing else is fetched.

    Raises:
      CheckpointError: there is no such model, or it cannot be fetched.
    """
    path = Path(str(model)).expanduser()
    return path if path.is_file() else _find(str(model), ("config.json", "generation_config.json"))


def bundled_folder(name: str) -> Path:
    """Where a bundled model lies inside the installed package."""
    folder = Path(__file__).parent / "assets" / name
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"the bundled model {name!r} is missing from this installation", remedy="Install again")
    return folder


def _download(hub_id: str, patterns: Sequence[str]) -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise CheckpointError(f"{hub_id} is no local folder", remedy="pip install huggingface-hub to download it")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"there is no folder {hub_id!r}, and the Hugging Face hub has no such model, or it needs a login"
        ) from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"there is no folder {hub_id!r}, and the Hugging Face hub cannot be reached to download it",
            remedy="Check the spelling and the network, or give a local folder",
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{hub_id} could not be downloaded from the Hugging Face hub: {error}") from None


def _choices() -> str:
    return (
        f"Bundled: {', '.join(BUNDLED)}; or a folder in Hugging Face format; or a hub id such as Qwen/Qwen3-0.6B; "
        f"shapes without weights: {', '.join(MODELS)}"
    )
