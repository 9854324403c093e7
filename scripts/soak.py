#!/usr/bin/env python3
"""Hours of a server's life in minutes: good and bad callers together, ended by a signal and started again under load.

    python scripts/soak.py --minutes 10 --callers 16 --restarts 1

Laws: every accepted request ends in exactly one way; equal questions have equal answers; nobody gets in without a key; a
signal cuts nothing without a word; memory is flat; at rest no request and no KV block is left. The last line is a record in
JSON; the exit code is 1 if a law was broken.
"""

import argparse
import asyncio
import collections
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]  # this checkout, whatever is installed

from soaking.callers import CALLS, PROMPTS, Caller  # noqa: E402
from soaking.server import KEYS, Server, free_port  # noqa: E402

_SAMPLE_S = 2.0


class Soak:
    """One run."""

    def __init__(self, server: Server, seed: int):
        self.server = server
        self.rng = random.Random(seed)
        self.ends = collections.defaultdict[str, collections.Counter[str]](collections.Counter)  # by call
        self.broken = list[str]()
        self.memory = list[list[tuple[float, float, int, int]]]()  # of each life: (s, MiB, files, threads)
        self._known = dict[str, str]()
        self._is_over = False

    async def run(self, seconds: float, num_callers: int, restarts: int) -> None:
        """Until the time is over and the server at rest."""
        await self._start()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=num_callers)
        async with httpx.AsyncClient(timeout=120, limits=limits, trust_env=False) as client:
            for prompt in PROMPTS:  # what is right, before there is a crowd
                asked = {"prompt": prompt, "max_tokens": 24, "temperature": 0}
                caller = Caller(self.server, client, self.rng, self._known)
                answer = await caller.post("/v1/completions", asked)
                self._known[prompt] = answer.json()["choices"][0]["text"]
            callers = [asyncio.create_task(self._calls(client)) for _ in range(num_callers)]
            sampling = asyncio.create_task(self._samples())
            # The first life is the shortest: memory is judged in the last one.
            for _ in range(restarts):
                await asyncio.sleep(seconds * 0.3 / restarts)
                await self.server.end()
                await self._start()
            await asyncio.sleep(seconds * (0.7 if restarts else 1.0))
            self._is_over = True
            await asyncio.gather(*callers)
            sampling.cancel()
            self.final = await self.server.rest()
        self._judge()
        await self.server.end()

    async def _start(self) -> None:
        self.memory.append([])
        await self.server.start()

    async def _calls(self, client: httpx.AsyncClient) -> None:
        names, weights = list(CALLS), list(CALLS.values())
        while not self._is_over:
            (call,) = self.rng.choices(names, weights)
            name, was_going = getattr(call, "__name__", ""), self.server.is_going
            try:
                end = await call(Caller(self.server, client, self.rng, self._known))
            except (httpx.TransportError, OSError, TimeoutError) as error:
                if was_going or self.server.is_going:
                    end = "nobody there"
                    await asyncio.sleep(0.2)
                else:
                    end = "broken"
                    self.broken.append(f"{name}: {error!r}")
            except AssertionError as error:
                end = "broken"
                self.broken.append(f"{name}: {error}")
            self.ends[name][end] += 1
            if end == "503":  # as it says: a little later
                await asyncio.sleep(0.3)

    async def _samples(self) -> None:
        while True:
            if not self.server.is_going:
                self.memory[-1].append((time.monotonic(), *self.server.memory()))
            await asyncio.sleep(_SAMPLE_S)

    def _judge(self) -> None:
        """Laws about the whole."""
        for name in ("jaxserve:failed_steps_total", "jaxserve:compiles_after_ready_total"):
            if self.final.get(name):
                self.broken.append(f"{name} is {self.final[name]:g}")
        said = self.server.log()
        for secret in (*KEYS.values(), *PROMPTS):
            if secret.strip() in said:
                self.broken.append("the log holds a key or a prompt")
        if "Traceback" in said:
            self.broken.append("the log holds a traceback")
        rss = [mib for _, mib, _, _ in self.memory[-1]]
        if len(rss) >= 40:  # too little says nothing
            middle, end = (
                statistics.median(part) for part in (rss[len(rss) // 3 : len(rss) // 2], rss[-len(rss) // 6 :])
            )
            if end > middle * 1.05 + 10:
                self.broken.append(f"memory grew from {middle:.0f} to {end:.0f} MiB")

    def record(self, seconds: float) -> dict[str, Any]:
        """What has happened."""
        last = self.memory[-1]
        marks = [last[len(last) * tenth // 10] for tenth in range(10)] + last[-1:] if last else []
        return {
            "seconds": round(seconds),
            "requests": sum(sum(counts.values()) for counts in self.ends.values()),
            "lives": len(self.memory),
            "broken": len(self.broken),
            "ends": {name: dict(sorted(counts.items())) for name, counts in sorted(self.ends.items())},
            "rss_mib": [round(mib) for _, mib, _, _ in marks],
            "files": [files for _, _, files, _ in marks],
            "threads": [threads for _, _, _, threads in marks],
            "engine_ends": self.final.get("vllm:request_success_total"),
            "answer_tokens": self.final.get("vllm:generation_tokens_total"),
        }


async def soak(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), free_port())
        run = Soak(server, args.seed)
        try:
            await run.run(args.minutes * 60, args.callers, args.restarts)
        except BaseException:
            print(server.log()[-3000:], file=sys.stderr)
            raise
        finally:
            await server.kill()
    for what in collections.Counter(run.broken).most_common(20):
        print(f"broken {what[1]} times: {what[0]:.400}")
    print(json.dumps(run.record(time.monotonic() - begun)))
    return 1 if run.broken else 0


def main(argv: list[str] | None = None) -> int:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--callers", type=int, default=16, help="at the same time")
    parser.add_argument("--restarts", type=int, default=1, help="ends by SIGTERM under load, within the first third")
    parser.add_argument("--seed", type=int, default=0)
    return asyncio.run(soak(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
