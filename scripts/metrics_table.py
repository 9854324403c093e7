#!/usr/bin/env python3
"""The table of all metrics of the server, from the list that it serves them by.

python scripts/metrics_table.py            # prints docs/metrics.md
python scripts/metrics_table.py --write    # writes it
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed

from jaxserve.server.catalogue import ENGINE, TRAFFIC, Entry, Kind  # noqa: E402

PATH = ROOT / "docs" / "metrics.md"
HEAD = """# Metrics

`GET /metrics` answers in Prometheus' text form. This file is made by `scripts/metrics_table.py --write` from the list by
which the server answers, and a test compares them. [grafana.json](grafana.json) is a dashboard for them.

- Names that begin with `vllm:` are those of vLLM's server, with its labels and buckets, so its dashboards, routers and
  autoscalers read them. What it counts and this engine has not (adapters, speculation, transfers) is left out.
- All of the engine's have the labels `model_name` and `engine` (always `0`: one engine drives all replicas of the weights).
- A histogram `x` comes as `x_bucket` (with the label `le`), `x_sum` and `x_count`.
- Times of requests are of those that came to their end; who was aborted is counted in `vllm:request_success_total` only.
- At most 100 clients have names of their own. When there are more, the one with the fewest tokens is added to the client
  `other`; who gives no name is `none`.
- Prompts and answers are in none of them; neither are paths, but for the routes that exist.
"""
PROCESS = """
On Linux there are also those of every Prometheus client: `process_resident_memory_bytes`, `process_virtual_memory_bytes`,
`process_cpu_seconds_total`, `process_open_fds`, `process_max_fds`, `process_start_time_seconds`.
"""


def document() -> str:
    """The whole file."""
    ours = [entry for entry in ENGINE if entry.name.startswith("jaxserve:")]
    vllms = [entry for entry in ENGINE if not entry.name.startswith("jaxserve:")]
    parts = [HEAD, "## The engine, by vLLM's names\n", _table(vllms), "## The engine, by ours\n", _table(ours)]
    return "\n".join([*parts, "## The server\n", _table(TRAFFIC)]) + PROCESS


def _table(entries: Iterable[Entry[Any]]) -> str:
    lines = ["| name | kind | labels | what |", "|---|---|---|---|"]
    lines += [
        f"| `{entry.name}` | {Kind(entry.kind)} | {', '.join(f'`{each}`' for each in entry.labels)} | {entry.text} |"
        for entry in entries
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {PATH.relative_to(ROOT)}")
    if parser.parse_args(argv).write:
        PATH.write_text(document())
    else:
        print(document(), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
