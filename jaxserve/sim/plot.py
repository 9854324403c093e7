"""The picture of a comparison: latency against rate, a line for each policy. Needs matplotlib (the extra `plot`)."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxserve.errors import ConfigError
from jaxserve.sim.report import Slo

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which people with any colour vision can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKERS = "osD^vPX*"
_GREY = "#666666"
_WIDE = 5  # times: beyond it the small ones are lost on an even scale

Report = Mapping[str, Any]


class _Panel(NamedTuple):
    title: str
    solid: Callable[[Report], float | None]
    dashed: Callable[[Report], float | None] | None = None  # the tail of the same
    limit: float | None = None
    unit: str = "s"


def check_matplotlib() -> None:
    """Whether pictures can be made.

    Raises:
      ConfigError: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("a picture needs matplotlib", remedy="pip install 'jaxserve[plot]'")


def plot(curves: Mapping[str, Sequence[Report]], path: Path, *, title: str = "", slo: Slo | None = None) -> None:
    """Draw reports, which say at which `rate` they were made, by policy. The form of the picture is that of the file's
    name.

    Raises:
      ConfigError: matplotlib is missing, or does not know that form.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    panels = _panels([report for reports in curves.values() for report in reports], slo)
    figure = Figure(figsize=(4.4 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, axis in zip(panels, axes, strict=True):
        _draw(axis, panel, curves)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(curves), 6), frameon=False)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    kinds = figure.canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in kinds:
        raise ConfigError(f"{path.name} is no name of a picture", remedy="End it with .png, .svg or .pdf")
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else {})


def _panels(reports: Sequence[Report], slo: Slo | None) -> list[_Panel]:
    limits = slo or Slo()
    panels = [_times("time to first token", "ttft_s", limits.ttft_s)]
    if any(report.get("program_s_per_token") for report in reports):
        panels.append(_times("program latency per answer token", "program_s_per_token", None))
    else:
        panels.append(_times("time per token after the first", "tpot_s", limits.tpot_s))
    if all("slo" in report for report in reports):
        panels.append(_Panel("calls within the SLO", lambda r: r["slo"]["share"], unit="%"))
    else:
        panels.append(_Panel("answer tokens per second", lambda r: r["output_tokens_per_s"], unit=""))
    return panels


def _times(title: str, key: str, limit: float | None) -> _Panel:
    return _Panel(title, lambda r: (r.get(key) or {}).get("p50"), lambda r: (r.get(key) or {}).get("p99"), limit)


def _draw(axis: "Axes", panel: _Panel, curves: Mapping[str, Sequence[Report]]) -> None:
    seen = list[float]()
    for number, (name, reports) in enumerate(curves.items()):
        ordered = sorted(reports, key=lambda report: report["rate"])
        for value, style, label in ((panel.solid, "-", name), (panel.dashed, "--", None)):
            points = [(report["rate"], y) for report in ordered if value and (y := value(report)) is not None]
            if points:
                xs, ys = zip(*points, strict=True)
                seen += ys
                axis.plot(
                    xs,
                    ys,
                    style,
                    color=_COLOURS[number % len(_COLOURS)],
                    marker=_MARKERS[number % len(_MARKERS)],
                    markersize=4,
                    linewidth=max(2.6 - 0.4 * number, 1.0),  # lines that lie on each other are all seen
                    alpha=0.55 if style == "--" else 1.0,
                    label=label,
                )
    if panel.limit is not None:
        axis.axhline(panel.limit, color=_GREY, linewidth=1, linestyle=":")
        place = {"xycoords": ("axes fraction", "data"), "xytext": (4, 3), "textcoords": "offset points"}
        axis.annotate("SLO", (0, panel.limit), color=_GREY, fontsize=8, **place)
        seen.append(panel.limit)
    _scale(axis, panel, seen)
    axis.set_title(panel.title + ("  (line: p50, dashes: p99)" if panel.dashed else ""), fontsize=9, loc="left")
    axis.set_xlabel("programs per second", fontsize=9)
    axis.set_xlim(left=0)
    axis.tick_params(labelsize=8)
    axis.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _scale(axis: "Axes", panel: _Panel, values: Sequence[float]) -> None:
    """From zero, where that shows all; times of several sizes by their logarithms."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, PercentFormatter

    if panel.unit == "%":
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.set_ylim(-0.03, 1.03)
        return
    axis.yaxis.set_major_formatter(EngFormatter(panel.unit, sep=" " if panel.unit else ""))
    if panel.unit == "s" and min(values, default=0.0) > 0 and max(values) > _WIDE * min(values):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(EngFormatter(panel.unit, sep=" "))
        axis.yaxis.set_minor_formatter(NullFormatter())
    else:
        axis.set_ylim(bottom=0)
