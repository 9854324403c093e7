"""List what can be served, or describe one checkpoint: family, parameters, context, memory.
Whether it fits given devices, `jaxserve plan` tells.

examples:
  jaxserve models                     bundled, in the hub cache, and in folders below this one
  jaxserve models tiny
  jaxserve models ./Qwen2.5-0.5B --max-num-seqs 64
"""

import argparse
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxserve.config import EngineConfig
from jaxserve.errors import CheckpointError
from jaxserve.memory import room
from jaxserve.memory.room import size_text
from jaxserve.model_source import BUNDLED, config_of, find_folder
from jaxserve.models.config import ARCHITECTURES, ModelConfig
from jaxserve.models.published import MODELS
from jaxserve.models.registry import read_config, read_json

USAGE = "jaxserve models [MODEL] [options]"
DTYPE_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_BOUNDLESS = 1 << 60  # bytes of a device that everything fits
MAX_HEADER_BYTES = 100 << 20  # as the safetensors library: a longer header is damage or an attack


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="bundled name, folder, or hub id")
    parser.add_argument("--max-model-len", type=int, metavar="N", help="tokens of a sequence (default: the model's)")
    parser.add_argument("--max-num-seqs", type=int, metavar="N", default=1, help="sequences at once (default: 1)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    if args.model is None:
        facts = listing()
        print(json.dumps(facts) if args.json else "\n".join(listing_lines(facts)))
        return 0
    facts = describe(args.model, args.max_model_len, args.max_num_seqs)
    if args.json:
        print(json.dumps(facts))
    else:
        width = max(map(len, facts))
        print("\n".join(f"{name:<{width}}  {value}" for name, value in facts.items()))
    return 0


def listing() -> dict[str, list[str]]:
    """What `LLM(...)` would accept here, by where it is found."""
    return {
        "bundled": sorted(BUNDLED),
        "published shapes (to plan, to simulate, or for random weights)": sorted(MODELS),
        "hub cache": sorted(cached_hub_ids()),
        "folders here": sorted(str(path.parent) for path in Path().glob("*/config.json") if is_checkpoint(path.parent)),
        "architectures": list(ARCHITECTURES),
    }


def listing_lines(facts: dict[str, list[str]]) -> Iterator[str]:
    for title, names in facts.items():
        yield f"{title}:"
        yield from (f"  {name}" for name in names or ["(none)"])
    yield "\nDescribe one: jaxserve models MODEL. A hub id is fetched when it is first used."


def cached_hub_ids() -> list[str]:
    """Models of a supported kind that huggingface-hub has on disk already."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return []
    return [
        repo.repo_id
        for repo in repos
        if repo.repo_type == "model" and any(is_checkpoint(Path(revision.snapshot_path)) for revision in repo.revisions)
    ]


def is_checkpoint(folder: Path) -> bool:
    """A folder whose config names an architecture that we serve."""
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return bool(set(raw.get("architectures") or []) & set(ARCHITECTURES))
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def describe(model: str, max_model_len: int | None, max_num_seqs: int) -> dict[str, Any]:
    """The facts of a published shape, or of a checkpoint, read from its config and the headers of its weights; no tensor is
    loaded."""
    config = EngineConfig(max_model_len=max_model_len, max_num_seqs=max_num_seqs)
    folder = find_folder(model, "dummy")
    cfg = config_of(model) if folder is None else read_config(folder)
    files = [] if folder is None else sorted(folder.glob("*.safetensors"))
    tensors = [entry for path in files for entry in tensor_headers(path)]
    from jaxserve.memory.plan import lay_out  # not at the top: it imports jax

    plan = lay_out(config, cfg, room.of_size(_BOUNDLESS, num_devices=1))
    pool = f"{max_num_seqs} x {plan.max_model_len:,} tokens"
    facts: dict[str, Any] = {
        "folder": str(folder or "none: a published shape"),
        "architecture": cfg.architecture,
        "shape": shape_sentence(cfg),
        "vocabulary": f"{cfg.vocab_size:,} tokens",
        "context": f"{cfg.max_position:,} tokens",
        "KV cache": f"{size_text(plan.block_bytes / plan.block_size)} per token",
        "memory": f"{size_text(plan.needs.total + plan.pool_bytes)} for weights, a step, and {pool}, all on one device",
    }
    if folder is None or not tensors:
        return facts | {"weights": 'no *.safetensors here; only load_format="dummy" can run it'}
    dtypes = sorted({DTYPE_NAMES.get(dtype, dtype) for dtype, _ in tensors})
    return facts | {
        "parameters": f"{count(sum(size for _, size in tensors))} in {', '.join(dtypes)}",
        "weights": size_text(sum(DTYPE_BYTES.get(dtype, 4) * size for dtype, size in tensors)),
        "tokenizer": "yes" if (folder / "tokenizer.json").exists() else "no: token ids in and out",
        "chat template": "yes" if has_chat_template(folder) else "no",
    }


def shape_sentence(cfg: ModelConfig) -> str:
    windows = {window for window in cfg.windows if window}
    window = f", window {', '.join(map(str, sorted(windows)))}" if windows else ""
    return (
        f"{cfg.num_layers} layers, width {cfg.embed_size}, {cfg.num_heads} heads on {cfg.num_kv_heads} KV heads "
        f"of {cfg.head_size}{window}, rope {cfg.rope.kind}"
    )


def has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").exists():
        return True
    path = folder / "tokenizer_config.json"
    return path.exists() and bool(read_json(path).get("chat_template"))


def tensor_headers(path: Path) -> list[tuple[str, int]]:
    """(dtype, number of elements) of each tensor of a safetensors file."""
    with path.open("rb") as file:
        head = file.read(8)
        (length,) = struct.unpack("<Q", head) if len(head) == 8 else (MAX_HEADER_BYTES + 1,)
        raw = file.read(length) if length <= MAX_HEADER_BYTES else b""
    try:
        header = json.loads(raw)
        return [(entry["dtype"], math.prod(entry["shape"])) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path} is not a whole safetensors file") from None


def count(number: int) -> str:
    """3_120_000 -> '3.12 M'."""
    for limit, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return str(number)
