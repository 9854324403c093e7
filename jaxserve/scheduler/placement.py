"""Which replica a waiting sequence goes to.

All replicas run one step together, so a step costs what the fullest of them needs, and an uneven load is paid for by
all. A cached prefix is worth the tokens that need not be fed, and no more.
"""

from collections.abc import Sequence
from typing import NamedTuple

from jaxserve.scheduler.replica import Replica
from jaxserve.scheduler.sequence import Sequence as Waiting
from jaxserve.scheduler.sequence import State

# A replica is clearly fuller than another when it runs more sequences by over this share of its slots.
_CLEARLY = 1 / 4


class Offer(NamedTuple):
    """What a replica with a free slot has for one waiting sequence."""

    replica: int
    num_running: int  # sequences that run there
    num_ahead: int  # prompt tokens that are fed there before those of the sequence
    num_cached: int  # tokens of the sequence that need not be fed there


def rank(offers: Sequence[Offer], num_slots: int) -> list[Offer]:
    """Offers, best first.

    Where the most tokens are cached, unless that replica is clearly fuller: when the sequence would wait there for more
    prompt tokens of others than it is spared, or when more sequences run there by over a quarter of the slots. So a
    prefix that all requests share spreads to all replicas, one by one. Of equals the one with fewer sequences, then
    the first.
    """
    fewest = min(offer.num_running for offer in offers)

    def key(offer: Offer) -> tuple[bool, int, int, int]:
        is_fuller = offer.num_running - fewest > num_slots * _CLEARLY
        return is_fuller, offer.num_ahead - offer.num_cached, offer.num_running, offer.replica

    return sorted(offers, key=key)


def choices(replicas: Sequence[Replica], vacant: Sequence[Replica], sequence: Waiting) -> list[Replica]:
    """Which of the vacant replicas a waiting sequence may go to.

    Who was swapped out goes where its blocks are. Answers of one request go where the first of them runs, because the prompt
    is there. Only when all slots there are taken they go elsewhere, and then the first to come computes the prompt for
    those that follow.
    """
    if sequence.num_parked:
        return [replica for replica in vacant if replica.index == sequence.replica]
    parent = sequence.parent
    if parent is None or parent.state is not State.RUNNING or sequence.num_output:
        return list(vacant)
    home = replicas[parent.replica]
    if home.has_slot:
        return [replica for replica in vacant if replica is home]
    return [replica for replica in vacant if not replica.is_feeding(sequence.request)]


def ranked(candidates: list[Replica], sequence: Waiting, num_slots: int) -> list[Replica]:
    """Best first. This asks the prefix index: how much of the sequence each of the replicas holds."""
    if len(candidates) < 2:
        return candidates
    by_index = {replica.index: replica for replica in candidates}
    offers = [Offer(r.index, len(r.running), r.num_ahead, r.cached(sequence)) for r in candidates]
    return [by_index[offer.replica] for offer in rank(offers, num_slots)]
