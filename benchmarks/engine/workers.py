"""Starts workers, asks them for rows, watches their memory. See `peers/protocol.py` for what is spoken."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environments import PEERS, WORKERS, NotAvailableError


@dataclass(frozen=True, kw_only=True)
class Worker:
    """A running engine."""

    name: str
    process: subprocess.Popen[str]
    log: Path
    timeout_s: float
    start_s: float  # process start to loaded engine, imports and compilation at start included
    warm_up_s: float  # first short run of every row
    versions: dict[str, str]
    mode: dict[str, str]


def worker_environment(name: str, threads: int) -> dict[str, str]:
    """Environment of a worker: thread counts for every library that might read one, and no network."""
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "JAX_PLATFORMS": "cpu"}
    return os.environ | counts | quiet | PEERS[name].run_env


def read_answer(process: subprocess.Popen[str], timeout_s: float, log: Path) -> dict[str, Any]:
    """The next JSON line of a worker.

    Raises:
        NotAvailableError: it failed, ended or took too long; the text says which.
    """
    assert process.stdout is not None
    begin = time.monotonic()
    alarm = threading.Timer(timeout_s, process.kill)
    alarm.start()
    line = process.stdout.readline()
    alarm.cancel()
    if not line:
        if time.monotonic() - begin >= timeout_s:
            raise NotAvailableError(f"no answer within {timeout_s:.0f} s")
        last = [text for text in log.read_text(errors="replace").splitlines() if text.strip()][-1:]
        raise NotAvailableError(f"the worker ended (code {process.wait()}): {' '.join(last)[:200]}")
    answer = json.loads(line)
    if "failed" in answer:
        raise NotAvailableError(answer["failed"])
    return answer


def start(name: str, python: Path, workload: dict[str, Any], scratch: Path, timeout_s: float) -> Worker:
    """Starts a worker and waits until it is warm; converts the checkpoint first where the peer needs that."""
    file, log = scratch / f"{name}.json", scratch / f"{name}.log"
    file.write_text(json.dumps(workload))
    call = [str(python), str(WORKERS / PEERS[name].worker), str(file)]
    environment = worker_environment(name, workload["threads"])
    if PEERS[name].converts:
        with log.open("w") as errors:
            done = subprocess.run([*call, "--prepare"], env=environment, stdout=errors, stderr=errors, check=False)
        if done.returncode:
            last = [text for text in log.read_text(errors="replace").splitlines() if text.strip()][-1:]
            raise NotAvailableError(f"conversion failed: {' '.join(last)[:200]}")
    begin = time.perf_counter()
    with log.open("w") as errors:
        process = subprocess.Popen(
            call,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            process_group=0,
        )
    try:
        answer = read_answer(process, timeout_s, log)
    except NotAvailableError:
        process.kill()
        raise
    _signal(process, signal.SIGSTOP)
    warm_up_s = answer["ready"]["warm_up_s"]
    return Worker(
        name=name,
        process=process,
        log=log,
        timeout_s=timeout_s,
        start_s=time.perf_counter() - begin - warm_up_s,
        warm_up_s=warm_up_s,
        versions=answer["versions"],
        mode=answer["mode"],
    )


def ask(worker: Worker, row: str) -> dict[str, Any]:
    """Measures one row once: `{"value": tokens/s, "total_s": ..., "tokens": ...}`.

    Between its turns a worker and its children are stopped: threads of some engines go on spinning for a while, or for
    ever, and would slow down the next one.
    """
    assert worker.process.stdin is not None
    _signal(worker.process, signal.SIGCONT)
    worker.process.stdin.write(row + "\n")
    worker.process.stdin.flush()
    answer = read_answer(worker.process, worker.timeout_s, worker.log)
    _signal(worker.process, signal.SIGSTOP)
    return answer


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Signals a worker and its children, if it still runs."""
    if process.poll() is None:
        os.killpg(process.pid, number)


def stop(worker: Worker) -> None:
    """Ends a worker; by force if it does not go by itself."""
    assert worker.process.stdin is not None
    _signal(worker.process, signal.SIGCONT)
    worker.process.stdin.close()
    try:
        worker.process.wait(20)
    except subprocess.TimeoutExpired:
        worker.process.kill()
        worker.process.wait()


def peak_rss_bytes(worker: Worker) -> int | None:
    """Largest resident memory of the worker and its children so far (sum of their peaks); None without /proc.

    Files mapped into memory count, as they do for the kernel.
    """
    if sys.platform != "linux":
        return None
    pids, parents = {worker.process.pid}, {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
        except OSError:
            continue  # that process ended meanwhile
        parents[int(status.parent.name)] = (int(fields["PPid"]), int(fields.get("VmHWM", "0 kB").split()[0]))
    while more := {pid for pid, (parent, _) in parents.items() if parent in pids} - pids:
        pids |= more
    return sum(parents[pid][1] for pid in pids if pid in parents) * 1024
