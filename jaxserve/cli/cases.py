"""What `jaxserve simulate` compares: policies and routers on layouts of devices."""

import argparse
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxserve.cli.flags import given, json_object
from jaxserve.cli.replicas import HERE, replica_specs
from jaxserve.cluster.router import ROUTERS, make_router
from jaxserve.config import SCHEDULING_POLICIES, EngineConfig, reject_unknown
from jaxserve.errors import ConfigError
from jaxserve.model_source import config_of
from jaxserve.pallas_kernels.chips import CHIPS
from jaxserve.scheduler.make import make_policy
from jaxserve.sim.replica import ReplicaSpec


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One line of a comparison: a policy and a router on a layout of devices."""

    name: str
    policy: str
    options: Mapping[str, Any]
    router: str
    router_options: Mapping[str, Any]
    specs: list[ReplicaSpec]
    price_per_h: float | None


def make_cases(args: argparse.Namespace) -> list[Case]:
    """All policies on all layouts."""
    config = EngineConfig(**given(args, EngineConfig))
    cfg = config_of(args.model)
    prices = dict(_prices(args.price))
    policies = [_named("--policy", text, SCHEDULING_POLICIES) for text in args.policy or ["fcfs"]]
    routers = [_named("--router", text, ROUTERS) for text in args.router or ["least_loaded"]]
    for router in routers:
        make_router(router.name, router.options)
    layouts = [(chip, replicas) for chip in args.chip or [HERE] for replicas in args.replicas or [1]]
    cases = list[Case]()
    for chip, replicas in layouts:
        specs = replica_specs(
            cfg,
            config,
            chip=chip,
            num_devices=args.devices,
            num_replicas=replicas,
            cost_file=args.cost_file,
            compiles=args.compiles,
        )
        price = prices[chip] * args.devices if chip in prices else None
        where = f"{replicas} x {specs[0].engine_type}" if len(layouts) > 1 else ""
        for policy in policies:
            _try(policy, specs[0])
        for policy, router in itertools.product(policies, routers):
            told = [policy.text] * (len(policies) > 1) + [router.text] * (len(routers) > 1)
            name = " ".join(filter(None, (*told, where))) or policy.text
            cases.append(Case(name, policy.name, policy.options, router.name, router.options, specs, price))
    return cases


class _Named(NamedTuple):
    text: str
    name: str
    options: dict[str, Any]


def _named(flag: str, text: str, known: Sequence[str]) -> _Named:
    """`dlpm:{"quantum": 5000}` -> its name and options."""
    name, _, options = text.partition(":")
    reject_unknown([name], known, what=flag.lstrip("-"))
    try:
        return _Named(text, name, json_object((str, Any))(options) if options else {})
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{flag} {text}: {error}") from None


def _prices(texts: Sequence[str]) -> Iterator[tuple[str, float]]:
    for text in texts:
        chip, _, amount = text.partition("=")
        reject_unknown([chip], [*CHIPS, HERE], what="chip")
        try:
            price = float(amount)
        except ValueError:
            price = -1.0
        if not 0 <= price < 1e9:
            raise ConfigError(f"--price {text} must be like {chip}=1.2, what a device costs for an hour")
        yield chip, price


def _try(policy: _Named, spec: ReplicaSpec) -> None:
    """A mistake in a policy's options is told before anything runs."""
    capacity = spec.capacity
    make_policy(policy.name, policy.options, cost=spec.cost, capacity=capacity, rungs=capacity.token_rungs)
