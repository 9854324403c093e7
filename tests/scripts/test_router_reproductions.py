"""Reproductions of routers, small: the directions that the papers claim."""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from reproductions import autellix_balancer, d2lpm, hexgen_dispatch, llumnix
from reproductions.replicas import reports, value

from jaxserve.sim.run import simulate
from jaxserve.workload.generate import generate


def test_d2lpm_finds_more_in_caches_than_round_robin_and_answers_quiet_clients_sooner():
    def workload(seed):
        return generate("tenants", count=150, rate=30.0, seed=seed, options=d2lpm.TENANTS)

    turns, routed = (
        reports(workload, [d2lpm.SPEC] * 4, 1, policy="dlpm", router=name, router_options=options)
        for name, options in (("round_robin", {}), ("d2lpm", {"quantum": 50_000.0}))
    )
    assert value(routed[0], "cached_share") > 1.5 * value(turns[0], "cached_share")
    assert d2lpm.quiet(turns, "mean") > 1.3 * d2lpm.quiet(routed, "mean")


def test_freeness_keeps_requests_from_waiting_for_room_that_others_have():
    def workload(seed):
        return generate("heavy-tail", count=200, rate=30.0, seed=seed, options={"most": 1500})

    small = llumnix.replica(4_000)
    turns, free = (reports(workload, [small] * 4, 2, router=name) for name in ("round_robin", "llumnix"))
    waits = [[value(each, "ttft_s.mean") for each in several] for several in (turns, free)]
    assert statistics.fmean(waits[0]) > 1.5 * statistics.fmean(waits[1])


def test_unequal_replicas_are_used_by_their_speed():
    specs = [hexgen_dispatch.replica(name) for name in hexgen_dispatch.DECODE_S]
    workload = generate("text-to-sql", count=12, rate=0.08, seed=0)
    seconds, shares = [], []
    for router in ("round_robin", "hexgen"):
        run = simulate(workload, specs, router=router)
        seconds.append(statistics.fmean(hexgen_dispatch.query_s(run)))
        shares.append(sum(record.replica == 0 for record in run.records) / len(run.records))
    assert seconds[0] > 1.1 * seconds[1]
    assert shares[1] > 0.4 > shares[0]


def test_long_calls_find_their_context():
    _, options, _ = next(iter(autellix_balancer.KINDS.values()))

    def workload(seed):
        return generate("agents", count=10, rate=2.0, seed=seed, options=options)

    turns, pinned = (
        reports(workload, [autellix_balancer.SPEC] * 4, 1, policy="plas", router=name)[0]
        for name in ("round_robin", "autellix")
    )
    assert value(pinned, "cached_share") > 1.2 * value(turns, "cached_share")
