"""A server under measurement: `jaxserve serve` with probes, told what to do by lines on its standard input.

`reset` begins a measurement, `facts` prints it as one line of JSON, `profile` and `report` do so for Python's profiler on
the thread of the event loop, `watch` starts the timer, which costs CPU itself. The probes: CPU time of the event loop's
thread, of the engine's, and of the whole process; how late a timer of the event loop is, and why; how long the collector of
garbage stops everything.

    python benchmarks/server/child.py OPTIONS_AS_JSON
"""

import asyncio
import cProfile
import gc
import io
import json
import os
import pstats
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from jaxserve.async_engine import AsyncEngine
from jaxserve.server.config import ServerConfig
from jaxserve.server.run import run_server

TICK_S = 0.002


class Probes:
    """What is measured between `reset` and `facts`."""

    def __init__(self, engine: AsyncEngine):
        self.engine = engine
        self.loop: asyncio.AbstractEventLoop | None = None
        self.late: list[tuple[float, float, float]] = []  # seconds late; of these on the CPU, and waiting for one
        self.stops: list[float] = []
        self.stops_cpu: list[float] = []  # the same on the CPU
        self._gc_began = self._gc_began_cpu = 0.0
        self._profiler = cProfile.Profile()
        self._starts: dict[str, float] = {}
        gc.callbacks.append(self._collected)
        engine.listeners.append(lambda stream: self._meet(stream.loop))

    def reset(self) -> None:
        """Begin."""
        self.late.clear()
        self.stops.clear()
        self.stops_cpu.clear()
        self._starts = self._clocks()

    def facts(self) -> dict[str, object]:
        """Seconds."""
        clocks = self._clocks()
        spent = {name: value - self._starts.get(name, 0.0) for name, value in clocks.items()}
        worst = sorted(self.late, reverse=True)[:5]
        delays = sorted(late for late, _, _ in self.late)
        return {
            **spent,
            "late_p50_s": delays[len(delays) // 2] if delays else 0.0,
            "late_p99_s": delays[int(0.99 * (len(delays) - 1))] if delays else 0.0,
            "late_max_s": delays[-1] if delays else 0.0,
            "on_cpu_max_s": max((cpu for _, cpu, _ in self.late), default=0.0),
            "ticks": len(delays),
            "worst": [{"late_s": late, "on_cpu_s": cpu, "for_cpu_s": queued} for late, cpu, queued in worst],
            "gc_max_s": max(self.stops, default=0.0),
            "gc_s": sum(self.stops),
            "gc_cpu_max_s": max(self.stops_cpu, default=0.0),
            "num_unfinished": self.engine.num_unfinished,
            "kv_blocks_held": self.engine.counts()["kv_blocks_held"],
        }

    def profile(self) -> None:
        """Profile the event loop from now on."""
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self._profiler.enable)

    def report(self) -> str:
        """What the profiler saw."""
        done = threading.Event()
        assert self.loop is not None
        self.loop.call_soon_threadsafe(lambda: (self._profiler.disable(), done.set()))
        done.wait()
        text = io.StringIO()
        pstats.Stats(self._profiler, stream=text).sort_stats("tottime").print_stats(45)
        return text.getvalue()

    def _clocks(self) -> dict[str, float]:
        clocks = {"wall_s": time.perf_counter(), "process_s": time.process_time()}
        for thread in threading.enumerate():
            name = {"jaxserve-engine": "engine_s", "MainThread": "loop_s"}.get(thread.name)
            if name and thread.ident is not None:
                clocks[name] = time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        return clocks

    def _collected(self, phase: str, info: dict[str, int]) -> None:
        now = time.perf_counter()
        if phase == "start":
            self._gc_began, self._gc_began_cpu = now, time.thread_time()
        else:
            self.stops.append(now - self._gc_began)
            self.stops_cpu.append(time.thread_time() - self._gc_began_cpu)

    def _meet(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop

    def watch(self) -> None:
        """Look how late the event loop is from now on."""
        assert self.loop is not None
        self._watching = asyncio.run_coroutine_threadsafe(self._watch(), self.loop)

    async def _watch(self) -> None:
        """Note by how much each timer is late. The scheduler of the system knows for how long we waited for a CPU."""
        clock, cpu, stat = (
            time.perf_counter,
            time.thread_time,
            Path(f"/proc/self/task/{threading.get_native_id()}/schedstat"),
        )
        while True:
            before, used, queued = clock(), cpu(), _queued_s(stat)
            await asyncio.sleep(TICK_S)
            late = clock() - before - TICK_S
            self.late.append((late, cpu() - used, _queued_s(stat) - queued))


def _queued_s(stat: Path) -> float:
    try:
        return int(stat.read_bytes().split()[1]) / 1e9
    except OSError:
        return 0.0


def main() -> None:
    """Serve until the standard input ends."""
    options = json.loads(sys.argv[1])
    model, made = options.pop("model"), list[Probes]()
    pace = {name: options.pop(name) for name in ("stream_interval", "stream_delay") if name in options}

    def load() -> AsyncEngine:
        engine = AsyncEngine(model, max_requests=4096, progress=False, **options)
        made.append(Probes(engine))
        return engine

    def obey() -> None:
        for line in sys.stdin:
            probes = made[0]
            match line.strip():
                case "reset":
                    probes.reset()
                    answer: object = "ok"
                case "facts":
                    answer = probes.facts()
                case "profile":
                    answer = probes.profile()
                case "watch":
                    answer = probes.watch()
                case _:
                    answer = probes.report()
            print(json.dumps(answer), flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=obey, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        run_server(ServerConfig(port=0, files_dir=folder, **pace), (model,), load)


if __name__ == "__main__":
    main()
