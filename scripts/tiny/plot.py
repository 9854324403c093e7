"""The training curve as a picture."""

from __future__ import annotations

import json
from pathlib import Path


def read_log(path: Path) -> list[dict]:
    """Lines of the log; where a run was resumed and steps came twice, the later line counts."""
    lines = {}
    for text in path.read_text().splitlines():
        line = json.loads(text)
        lines[line["step"]] = line
    return [lines[s] for s in sorted(lines)]


def draw(log: Path, picture: Path) -> None:
    """Loss per kind of token, and accuracy of the lookups per length, against tokens seen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_log(log)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    for kind in ("text", "recall", "needle", "sort", "sum", "chat"):
        points = [(v["tokens"] / 1e6, v[f"loss_{kind}"]) for v in lines if f"loss_{kind}" in v]
        if points:
            left.plot(*zip(*points, strict=True), label=kind, linewidth=1.2)
    left.set(xlabel="million tokens seen", ylabel="loss in nats per token", title="Training loss", ylim=(0, 6))
    for task, style in (("recall", "-"), ("needle", "--")):
        for n, length in enumerate((64, 256, 1024, 2048)):
            points = [(v["tokens"] / 1e6, 100 * v[f"{task}_{length}"]) for v in lines if f"{task}_{length}" in v]
            if points:
                right.plot(*zip(*points, strict=True), style, color=f"C{n}", label=f"{task}, {length} tokens")
    right.set(xlabel="million tokens seen", ylabel="exact answers in %", title="Lookups (held-out)", ylim=(-2, 102))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    plt.close(figure)
