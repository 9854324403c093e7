"""How often XLA has compiled in this process. After warm-up the number must not change; a test and a metric watch it."""

import functools

import jax


@functools.cache
def _counter() -> list[int]:
    """Registered once per process: JAX has no public way to remove a listener."""
    count = [0]

    def on_event(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        if event == "/jax/core/compile/backend_compile_duration":
            count[0] += 1

    jax.monitoring.register_event_duration_secs_listener(on_event)
    return count


def count_compiles() -> int:
    """Compilations (and loads from the persistent cache) since the first call."""
    return _counter()[0]
