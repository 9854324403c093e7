"""The server under test, as a process of its own, and what can be seen of it from outside."""

import asyncio
import re
import signal
import socket
import sys
from pathlib import Path

import httpx
import psutil

KEYS = {"ada": "sk-soak-ada", "bob": "sk-soak-bob", "eve": "sk-soak-eve"}
MAX_BODY_BYTES = 200_000
STALL_S = 3
DRAIN_S = 8
OPTIONS = {
    "max-num-seqs": 16,
    "max-requests": 48,
    "max-body-bytes": MAX_BODY_BYTES,
    "max-concurrency-per-client": 40,
    "stall-timeout": STALL_S,
    "header-timeout": STALL_S,
    "request-timeout": 60,
    "drain-timeout": DRAIN_S,
}


class Server:
    """Started, ended by a signal, started again."""

    def __init__(self, folder: Path, port: int):
        self.url = f"http://127.0.0.1:{port}"
        self.is_going = False  # it was told to end, or is not there yet: callers may find nobody
        self._port = port
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None
        (folder / "keys").write_text("".join(f"{client}: {key}\n" for client, key in KEYS.items()))

    async def start(self) -> None:
        """Returns when it is ready."""
        options = [f"--{name}={value}" for name, value in OPTIONS.items()]
        options += [f"--port={self._port}", f"--api-key-file={self._folder / 'keys'}", "--isolate-clients"]
        options += [f"--files-dir={self._folder / 'files'}", "--enforce-deadlines", "--no-progress"]
        with open(self._folder / "server.log", "ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "jaxserve", "serve", "tiny", *options), stderr=log
            )
        async with httpx.AsyncClient() as client:
            while True:
                await asyncio.sleep(0.2)
                assert self._process.returncode is None, "the server has not started"
                try:
                    if (await client.get(f"{self.url}/ready")).status_code == 200:
                        break
                except httpx.TransportError:
                    pass
        self.is_going = False

    async def end(self) -> None:
        """As Kubernetes does it."""
        assert self._process is not None
        self.is_going = True
        self._process.send_signal(signal.SIGTERM)
        code = await asyncio.wait_for(self._process.wait(), DRAIN_S + 30)
        assert code == 0, f"it ended with {code}"

    async def kill(self) -> None:
        """However the test ends."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    def memory(self) -> tuple[float, int, int]:
        """Resident MiB, open files and threads."""
        assert self._process is not None
        process = psutil.Process(self._process.pid)
        return process.memory_info().rss / (1 << 20), process.num_fds(), process.num_threads()

    async def metrics(self) -> dict[str, float]:
        """Sums over labels, by name."""
        async with httpx.AsyncClient(timeout=30) as client:
            text = (await client.get(f"{self.url}/metrics", headers=bearer("ada"))).text
        found = dict[str, float]()
        for name, value in re.findall(r"^([\w:]+)(?:\{.*\})? (\S+)$", text, re.MULTILINE):
            found[name] = found.get(name, 0.0) + float(value)
        return found

    async def rest(self) -> dict[str, float]:
        """Wait until nothing is under way, and return the metrics.

        Raises:
          AssertionError: something stays.
        """
        for _ in range(200):
            found = await self.metrics()
            left = {name: found[name] for name in _BUSY if found[name]}
            if not left and found["jaxserve:http_requests_open"] <= 1:  # the one that asks
                return found
            await asyncio.sleep(0.1)
        raise AssertionError(f"the engine does not come to rest: {left}")

    def log(self) -> str:
        """All that it has said."""
        return (self._folder / "server.log").read_text()


_BUSY = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",  # blocks that somebody holds
    "jaxserve:http_streams_open",
)


def bearer(client: str) -> dict[str, str]:
    """Headers with a client's key."""
    return {"Authorization": f"Bearer {KEYS[client]}"}


def free_port() -> int:
    """One that nobody listens on now; the server comes back to it after each end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
