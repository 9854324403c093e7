"""Ids: names that nobody can guess."""

import os

_MANY = 256
_pool: list[str] = []
os.register_at_fork(after_in_child=_pool.clear)  # or parent and child would give the same ones


def new_id(prefix: str) -> str:
    """A name of this prefix and 128 random bits, in 32 hexadecimal digits.

    The system is asked for many at once: each call of it lets go of Python's lock, and to get that back from the engine's
    thread takes the event loop 0.1 to 0.3 ms.
    """
    while True:
        try:
            return prefix + _pool.pop()
        except IndexError:
            digits = os.urandom(16 * _MANY).hex()
            _pool.extend(digits[start : start + 32] for start in range(0, len(digits), 32))
