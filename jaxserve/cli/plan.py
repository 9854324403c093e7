"""Tell whether a model fits some devices, and what each of them would hold, before anything is loaded or rented.

Only config.json is read. Without parallel sizes the command chooses some, and says why. The exit code is 0 if the model fits
and 1 if it does not.

examples:
  jaxserve plan tiny                                              on this machine
  jaxserve plan llama-3.1-8b --chip v5e --devices 8               a published shape; `jaxserve models` lists them
  jaxserve plan ./Llama-3.1-8B --chip v5e --devices 8
  jaxserve plan meta-llama/Llama-3.3-70B --chip h100 --devices 8 --tensor-parallel-size 8 --max-num-seqs 256
  jaxserve plan ./some/config.json --memory 24GiB --kv-cache-dtype fp8 --json
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jaxserve.cli.flags import add_dataclass_flags, given
from jaxserve.cli.options import ROOM_OPTIONS
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.memory import room
from jaxserve.memory.room import Room, size_text
from jaxserve.model_source import config_of
from jaxserve.pallas_kernels.chips import CHIPS

if TYPE_CHECKING:
    from jaxserve.memory.plan import Plan

USAGE = "jaxserve plan MODEL [--chip CHIP | --memory SIZE] [--devices N] [options]"
CONTEXTS = (2048, 8192, 32_768, 131_072)
SIZES = tuple(f"{axis}_parallel_size" for axis in ("tensor", "data", "sequence", "expert"))
OPTIONS = (*ROOM_OPTIONS, "num_redundant_experts", *SIZES)
_MOST_SHOWN = 8  # other sizes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="bundled or published name, folder, hub id, or a config.json")
    parser.add_argument("--chip", choices=tuple(CHIPS), help="plan for this chip (default: this machine)")
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="memory of each device, as 24GiB: for a chip that is not listed, or a variant of one",
    )
    parser.add_argument("--devices", type=int, metavar="N", help="how many (default: what the parallel sizes ask for)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    add_dataclass_flags(parser, EngineConfig, "engine options that take memory", only=OPTIONS)


def run(args: argparse.Namespace) -> int:
    config = EngineConfig(**given(args, EngineConfig))
    where = _room(args, config)
    cfg = config_of(args.model)
    # Not at the top: these import jax.
    from jaxserve.memory.axes import closest, fitting, with_more_devices
    from jaxserve.memory.plan import lay_out

    is_asked = any(hasattr(args, name) for name in SIZES) or where.num_devices == 1
    plan = lay_out(config, cfg, where) if is_asked else None
    others = [] if plan and not plan.problem else fitting(config, cfg, where)
    plan = plan or next(iter(others), None) or closest(config, cfg, where)
    others = [other for other in others if other.parallel != plan.parallel]
    more = with_more_devices(config, cfg, where) if plan.problem and not others else None
    if args.json:
        facts = _facts(plan) | {"others": [_facts(other) for other in others], "more_devices": more and _facts(more)}
        print(json.dumps(facts))
    else:
        print("\n".join(_lines(args.model, plan, others, more, is_asked, cfg.max_position)))
    return 1 if plan.problem else 0


def _room(args: argparse.Namespace, config: EngineConfig) -> Room:
    """The devices to plan for."""
    if args.devices is not None and not 1 <= args.devices <= 1 << 16:
        raise ConfigError(f"--devices {args.devices} must be a positive whole number of at most {1 << 16}")
    size = None if args.memory is None else room.parse_size(args.memory)
    if args.chip is None and size is None:
        here = room.of_this_machine()
        return dataclasses.replace(here, num_devices=args.devices or here.num_devices)
    asked = 1
    for name in SIZES:
        asked *= getattr(config, name)
    num_devices = args.devices or asked
    return room.of_chip(args.chip, num_devices, size) if args.chip else room.of_size(size or 0, num_devices)


def _lines(
    model: str, plan: "Plan", others: list["Plan"], more: "Plan | None", is_asked: bool, max_position: int
) -> Iterator[str]:
    from jaxserve.memory.axes import options_of, reason

    where, sizes = plan.room, plan.parallel
    count = f"{where.num_devices} devices" if where.num_devices > 1 else "one device"
    each = "free, of which half is left to others" if where.is_host else "each"
    memory = f"{size_text(where.device_bytes)} {each}"
    yield f"{model}: {plan.cfg.architecture} in {plan.dtype} on {count} ({where.kind}, {memory})"
    if where.platform == "gpu" and where.kind in {chip.name for chip in CHIPS.values()}:
        yield "  that is what JAX takes of a GPU for a process; XLA_CLIENT_MEM_FRACTION=0.95 raises it from 75 %"
    if is_asked:
        idle = where.num_devices - sizes.num_devices
        yield f"sizes: {sizes}" + (f"; {idle} devices are idle" if idle else "")
    elif plan.problem:
        yield f"sizes: none fit; {options_of(sizes)} comes closest"
    else:
        yield f"sizes: {options_of(sizes)} (chosen: {reason(plan)})"
    yield ""
    yield "on each device"
    for name, value, remark in _rows(plan):
        yield f"  {name:<14}{size_text(value):>10}  {remark}".rstrip()
    if not plan.problem:
        if plan.max_model_len < max_position:
            yield f"\nmax_model_len is {plan.max_model_len:,}; the model's own is {max_position:,}"
        yield from _table(plan)
    else:
        yield f"\ndoes not fit: {plan.problem}"
    if others:
        yield f"\n{'sizes that fit' if plan.problem else 'others that fit'}, the best first:"
        width = max(len(options_of(other.parallel)) for other in others[:_MOST_SHOWN])
        yield from (f"  {options_of(other.parallel):<{width}}  {reason(other)}" for other in others[:_MOST_SHOWN])
        if len(others) > _MOST_SHOWN:
            yield f"  and {len(others) - _MOST_SHOWN} more (--json lists all)"
    elif more:
        yield f"\n{more.room.num_devices} such devices are enough: {options_of(more.parallel)} ({reason(more)})"
    elif plan.problem:
        yield f"\n{plan.remedy}."


def _rows(plan: "Plan") -> Iterator[tuple[str, int, str]]:
    yield "weights", plan.needs.weights, ""
    yield "sampler state", plan.needs.sampler, f"{plan.max_num_seqs:,} sequences"
    yield "activations", plan.needs.activations, f"at most, of a step of {plan.step_tokens:,} tokens"
    held = f"{plan.num_blocks:,} blocks of {plan.block_size}: {plan.num_blocks * plan.block_size:,} tokens"
    yield "KV pool", plan.pool_bytes, held + (" of each replica" if plan.parallel.data > 1 else "")
    yield "left", plan.free_bytes - plan.pool_bytes, f"of {size_text(plan.usable_bytes)} that may be used"


def _table(plan: "Plan") -> Iterator[str]:
    """How many sequences fit, by their length."""
    rows = _sequences(plan)
    if not rows:
        return
    yield "\nthe most sequences that fit at once, by their length in tokens (set max_num_seqs to as many)"
    yield "  length        " + "".join(f"{length:>10,}" for length, _ in rows)
    replicas = plan.parallel.data
    yield f"  {'each replica' if replicas > 1 else 'sequences':<14}" + "".join(f"{most:>10,}" for _, most in rows)
    if replicas > 1:
        yield f"  {'all replicas':<14}" + "".join(f"{most * replicas:>10,}" for _, most in rows)


def _sequences(plan: "Plan") -> list[tuple[int, int]]:
    lengths = sorted({length for length in CONTEXTS if length < plan.max_model_len} | {plan.max_model_len})
    return [(length, plan.most_sequences(length)) for length in lengths]


def _facts(plan: "Plan") -> dict[str, Any]:
    return {
        "fits": not plan.problem,
        "problem": plan.problem,
        "device": plan.room.kind,
        "num_devices": plan.room.num_devices,
        "device_bytes": plan.room.device_bytes,
        "sizes": {name: getattr(plan.parallel, name.removesuffix("_parallel_size")) for name in SIZES},
        "dtype": str(plan.dtype),
        "kv_cache_dtype": str(plan.kv_dtype),
        "max_model_len": plan.max_model_len,
        "max_num_batched_tokens": plan.token_budget,
        "usable_bytes": plan.usable_bytes,
        "weight_bytes": plan.needs.weights,
        "sampler_bytes": plan.needs.sampler,
        "activation_bytes": plan.needs.activations,
        "kv_pool_bytes": plan.pool_bytes,
        "num_kv_blocks": plan.num_blocks,
        "block_size": plan.block_size,
        "left_bytes": plan.free_bytes - plan.pool_bytes,
        "most_tokens": plan.most_tokens,
        "sequences": {} if plan.problem else {str(length): most for length, most in _sequences(plan)},
    }
