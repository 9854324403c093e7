"""Which cached block goes first, as functions: the smallest key is evicted. No device, no store."""

from jaxserve.kv.prefix import Node


def least_recently_used(node: Node) -> tuple[float, ...]:
    """Oldest use first; of equally old blocks the deepest, so that a prompt is lost from its end."""
    return (node.last_used, -node.depth)


def least_frequently_used(node: Node) -> tuple[float, ...]:
    """Fewest uses first, then oldest."""
    return (node.num_uses, node.last_used, -node.depth)


ORDERS = {"lru": least_recently_used, "lfu": least_frequently_used}
