"""How many files a process may have open. Each connection is one, and many systems give a process 1,024 unless it asks."""

import contextlib

_WANTED = 1 << 16


def raise_limit() -> None:
    """Ask for as many as there may be, or enough for a server and for whoever puts load on it."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # not on Windows

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = min(hard, _WANTED) if hard > 0 else _WANTED
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
