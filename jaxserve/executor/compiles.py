"""How often XLA has compiled in this process. After warm-up the number must not change; a test and a metric watch it."""

import functools
from collections import Counter

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"
_READ = "/jax/compilation_cache/cache_retrieval_time_sec"


@functools.cache
def _counter() -> Counter[str]:
    """Registered once per process: JAX has no public way to remove a listener."""
    counts = Counter[str]()

    def on_event(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        if event in (_COMPILED, _READ):
            counts[event] += 1

    jax.monitoring.register_event_duration_secs_listener(on_event)
    return counts


def count_compiles() -> int:
    """Compilations (and reads from JAX's cache of them) since the first call."""
    return _counter()[_COMPILED]


def count_reads() -> int:
    """Reads from JAX's cache of compilations since the first call."""
    return _counter()[_READ]
