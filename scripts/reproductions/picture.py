"""Pictures of reproductions: small PNG files that look alike."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Points = Sequence[tuple[float, float]]


def panels(count: int = 1) -> tuple[Any, Any]:
    """A figure, and its axes side by side in a list."""
    figure, axes = plt.subplots(1, count, figsize=(1.5 + 4.5 * count, 3.9), layout="constrained", squeeze=False)
    return figure, list(axes[0])


def curves(axis: Any, series: Mapping[str, Points], **labels: str) -> None:
    """A line for each name. `labels`: xlabel, ylabel, title, and whatever else axes can be set."""
    for number, (name, points) in enumerate(series.items()):
        axis.plot(*zip(*points, strict=True), "osD^vPX*"[number % 8] + "-", label=name, linewidth=1.2, markersize=4)
    axis.set(**labels)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def bars(axis: Any, values: Mapping[str, float], **labels: str) -> None:
    """A bar for each name, with its value on top."""
    drawn = axis.bar(list(values), list(values.values()), color=[f"C{number}" for number in range(len(values))])
    axis.bar_label(drawn, fmt="%.3g", fontsize=8)
    axis.set(**labels)
    axis.grid(alpha=0.3, axis="y")


def save(figure: Any, path: Path) -> str:
    """Write a PNG; returns its file name."""
    figure.savefig(path, dpi=90)
    plt.close(figure)
    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(64)  # colours: a third of the size
    few.save(path, optimize=True)
    return path.name
