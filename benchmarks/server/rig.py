"""A server in a process of its own, load on it, and the same work offline."""

import asyncio
import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxserve.loadgen import dataset
from jaxserve.loadgen.client import COMPLETIONS, Client
from jaxserve.loadgen.http import Host
from jaxserve.loadgen.prompts import Prompts, load_vocabulary
from jaxserve.loadgen.run import Load, Result, run_load
from jaxserve.model_source import find_model

HERE = Path(__file__).resolve().parent
READY = re.compile(r"ready on (\S+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """So many requests of random tokens, all at once; `concurrency` of them under way."""

    num_prompts: int
    prompt: int
    answer: int
    concurrency: int
    seed: int = 0

    def load(self, model: str, **shared: Any) -> Load:
        """For the load generator."""
        lengths = dataset.Lengths(self.prompt, self.answer)
        workload = dataset.random_calls(self.num_prompts, lengths, [0.0] * self.num_prompts, self.seed)
        fields = {"model": model, "temperature": 0.0, "ignore_eos": True, "stream": True}
        return Load(
            workload=workload,
            prompts=Prompts(load_vocabulary(str(find_model(model))), self.seed, as_ids=True),
            endpoint=COMPLETIONS,
            shared=fields | {"stream_options": {"include_usage": True}} | shared,
            max_concurrency=self.concurrency,
        )

    def prompts(self, model: str) -> list[list[int]]:
        """The same prompts as token ids."""
        load = self.load(model)
        return [load.prompts.of(call, {}, {}) for call in load.workload.calls]  # pyright: ignore[reportReturnType]


class Server:
    """A running child; see `child.py`."""

    def __init__(self, process: subprocess.Popen[str], url: str):
        self._process, self.url = process, url

    def tell(self, command: str) -> Any:
        """Send a command; returns what it answers."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def measure(self, load: Load) -> tuple[Result, dict[str, Any]]:
        """Put load on it; returns what the client and what the server say."""
        self.tell("reset")
        result = (
            asyncio.run(_under_load(self.url, load)) if not _uvloop() else _uvloop().run(_under_load(self.url, load))
        )
        facts = self.tell("facts")
        bad = [answer for answer in result.answers.values() if answer.error]
        if bad:
            raise SystemExit(f"{len(bad)} requests failed: {bad[0].error}, {bad[0].error_text}")
        return result, facts


async def _under_load(url: str, load: Load) -> Result:
    client = Client(Host(url), headers={}, timeout_s=600)
    try:
        return await run_load(client, load)
    finally:
        await client.close()


def _uvloop() -> Any:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop


@contextmanager
def serving(**options: Any) -> Iterator[Server]:
    """A server with these engine options, ready."""
    command = [sys.executable, str(HERE / "child.py"), json.dumps(options)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None and process.stdin is not None
            for line in process.stderr:
                if found := READY.search(line):
                    break
                if "loading" not in line:
                    sys.stderr.write(line)
            else:
                raise SystemExit("the server did not start")
            threading.Thread(target=process.stderr.read, daemon=True).start()  # a log that nobody reads stops it
            yield Server(process, found[1])
            process.stdin.close()
            process.wait(timeout=60)
        finally:
            process.kill()


class Offline:
    """The same work through `LLM.generate`."""

    def __init__(self, model: str, **options: Any):
        from jaxserve.llm import LLM

        self._llm = LLM(model, progress=False, **options)

    def measure(self, model: str, work: Work) -> tuple[float, float, list[str]]:
        """Seconds, CPU seconds, texts."""
        from jaxserve.request import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=work.answer, ignore_eos=True)
        prompts = work.prompts(model)
        began, cpu = time.perf_counter(), time.process_time()
        outputs = self._llm.generate(prompts, params)
        spent = time.perf_counter() - began, time.process_time() - cpu
        return *spent, [output.outputs[0].text for output in outputs]


def load() -> dict[str, float]:
    """How many processes wanted to run in the last minute: beyond the number of cores, times are those of a crowd."""
    return {"load_average": round(os.getloadavg()[0], 1)}
