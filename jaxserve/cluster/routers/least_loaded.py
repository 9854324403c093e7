"""The fewest sequences, running or waiting; of equals the most free blocks. The default."""

import dataclasses

from jaxserve.cluster.rule import Rule


@dataclasses.dataclass(slots=True)
class LeastLoaded(Rule):
    """Requests count alike, however long they are."""
