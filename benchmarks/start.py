"""How long a start takes: `serve` until /ready answers 200, `generate` until it has written one token and ended.

    python benchmarks/start.py tiny
    python benchmarks/start.py ./Qwen3-0.6B --commands serve --starts 3 -- --load-format dummy --max-num-seqs 8

The first start has an empty folder of compiled programs and C++ kernels, the others have what it left. JAX's own cache is
not used. What follows `--` goes to each command.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from record import append_line, machine, spread

RESULTS = Path(__file__).resolve().parent / "results" / "start.jsonl"
POLL_S = 0.1
LIMIT_S = 1800.0


def start(command: str, model: str, options: Sequence[str], cache: str) -> tuple[float, float]:
    """Seconds until it is of use, and CPU seconds of the process until then."""
    port = _free_port()
    words = [sys.executable, "-m", "jaxserve", command, model]
    words += ["--port", str(port)] if command == "serve" else ["def add(a, b):", "--max-tokens", "1"]
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    began_s = time.perf_counter()
    process = subprocess.Popen(
        [*words, *options], env=env | {"JAXSERVE_CACHE": cache}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    if command == "serve":
        _wait_until_ready(process, port, began_s)
        process.kill()
    _, status, usage = os.wait4(process.pid, 0)
    if command != "serve" and status:
        raise SystemExit(f"{' '.join(words)} failed; run it by hand")
    return time.perf_counter() - began_s, usage.ru_utime + usage.ru_stime


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, began_s: float) -> None:
    while time.perf_counter() - began_s < LIMIT_S:
        if process.poll() is not None:
            raise SystemExit("the server has ended; run it by hand")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=LIMIT_S):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(POLL_S)
    raise SystemExit(f"the server is not ready after {LIMIT_S:g} s")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("options", nargs="*", help="for the commands, after --")
    parser.add_argument("--commands", default="serve,generate")
    parser.add_argument("--starts", type=int, default=5, help="with what an earlier start has left")
    parser.add_argument("--note", default="")
    args = parser.parse_args()
    for command in args.commands.split(","):
        with tempfile.TemporaryDirectory() as cache:
            runs = [start(command, args.model, args.options, cache) for _ in range(args.starts + 1)]
        for cached, some in (("empty", runs[:1]), ("warm", runs[1:])):
            facts = {"case": f"{command} {Path(args.model).name}", "cache": cached, "metric": "start", "unit": "s"}
            facts |= spread([wall for wall, _ in some]) | {"cpu_s": spread([cpu for _, cpu in some])["median"]}
            facts |= {"load_average": round(os.getloadavg()[0], 1), "note": args.note, "machine": machine()}
            append_line(RESULTS, facts)
            print(f"{facts['case']}, {cached}: {facts['median']} s ({facts['cpu_s']} s of CPU), n={facts['n']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
