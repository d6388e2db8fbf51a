"""Pictures of the dashboards without a Grafana: each panel's own queries, asked of a Prometheus, drawn by matplotlib.

python -m dashboards.render http://127.0.0.1:9090 --namespace research --job opt-tiny --minutes 5

What is drawn is what the queries return, at the places and in the colours of the dashboards; it is not what Grafana
would draw to the pixel.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure

from dashboards.__main__ import FOLDER

matplotlib.use("Agg")
IMAGES = FOLDER.parents[2] / "docs" / "images"
COLUMN, CELL = 0.62, 0.36
"""Inches of a column and of a row of the grid."""
GREY = "#666666"
NAMED = {"text": "#222222", "green": "#1a7f37", "orange": "#d9730d", "red": "#c4162a", "blue": "#3274d9"}
CYCLE = ("#3274d9", "#e0752d", "#56a64b", "#a352cc", "#c4162a", "#8a6d3b", "#37a2b8", "#777777")
Series = tuple[str, list[float], list[float]]
"""Name, times, values."""


@dataclass(frozen=True)
class Source:
    """A Prometheus, the stretch of time that is drawn, and the dashboards' variables."""

    url: str
    begin: float
    end: float
    variables: dict[str, str]

    @property
    def step(self) -> float:
        """Seconds between two points."""
        return max(1.0, (self.end - self.begin) / 240)

    def expression(self, text: str) -> str:
        for name, value in self.variables.items():
            text = text.replace(f"${name}", value)
        return text

    def ask(self, target: dict[str, Any]) -> list[Series]:
        """One target of a panel; names are made as its legend says."""
        query = {"query": self.expression(target["expr"]), "start": self.begin, "end": self.end, "step": self.step}
        with urllib.request.urlopen(f"{self.url}/api/v1/query_range?{urllib.parse.urlencode(query)}") as answer:
            found = json.load(answer)["data"]["result"]
        made = []
        for series in found:
            labels = series["metric"]
            legend = target.get("legendFormat") or "value"
            name = re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda m, labels=labels: labels.get(m[1], ""), legend)
            points = [(float(at), float(value)) for at, value in series["values"]]
            made.append((name, *map(list, zip(*points, strict=True))))
        return sorted(made)  # type: ignore[return-value]


def days(seconds: float) -> float:
    """Unix seconds as matplotlib counts time."""
    return seconds / 86400


def text(value: float, unit: str) -> str:
    """A value for people, in one of the units that the dashboards use."""
    if math.isnan(value):
        return "–"
    if unit == "percentunit":
        return f"{value:.1%}"
    if unit == "s":
        for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
            if abs(value) >= 2 * size:
                return f"{value / size:.3g} {name}"
        return f"{value * 1000:.3g} ms" if 0 < abs(value) < 0.1 else f"{value:.3g} s"
    if unit == "kwatth":
        return f"{value:.3g} kWh" if value >= 0.1 else f"{value * 1000:.3g} Wh"
    signs = {"massg": "g", "watt": "W", "joule": "J", "reqps": "/s"}
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size and unit != "none"):
            return f"{value / size:.3g} {name}{signs.get(unit, '')}"
    if unit == "massg" and 0 < abs(value) < 0.1:
        return f"{value * 1000:.3g} mg"
    return f"{value:.4g} {signs.get(unit, '')}".strip()


def panel(axes: Axes, spec: dict[str, Any], source: Source) -> None:
    found = [series for target in spec["targets"] for series in source.ask(target)]
    axes.set_title(spec["title"], loc="left", fontsize=8, fontweight="bold", pad=4)
    draw = {"stat": _figure, "timeseries": _over_time, "state-timeline": _timeline, "bargauge": _bars}
    if spec["type"] == "table":
        _table(axes, spec, source)
    elif not found:
        _say(axes, "no data")
    else:
        draw[spec["type"]](axes, spec, found, source)


def _say(axes: Axes, words: str, size: int = 9, color: str = GREY) -> None:
    axes.axis("off")
    axes.text(0.5, 0.45, words, ha="center", va="center", fontsize=size, color=color, transform=axes.transAxes)


def _unit(spec: dict[str, Any]) -> str:
    return str(spec["fieldConfig"]["defaults"].get("unit", "none"))


def _colors(spec: dict[str, Any]) -> dict[str, str]:
    return {
        override["matcher"]["options"]: item["value"]["fixedColor"]
        for override in spec["fieldConfig"].get("overrides", [])
        for item in override["properties"]
        if item["id"] == "color"
    }


def _threshold(spec: dict[str, Any], value: float) -> str:
    color = "text"
    for step in spec["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", []):
        if step.get("value") is None or value >= step["value"]:
            color = step["color"]
    return NAMED.get(color, color)


def _figure(axes: Axes, spec: dict[str, Any], found: list[Series], source: Source) -> None:
    by_name = spec["options"].get("textMode") == "name"
    newest = max(found, key=lambda series: series[1][-1])
    value = newest[2][-1]
    if by_name:
        _say(axes, newest[0], 16, _colors(spec).get(newest[0], "#222222"))
    else:
        _say(axes, text(value, _unit(spec)), 15, _threshold(spec, value))


def _over_time(axes: Axes, spec: dict[str, Any], found: list[Series], source: Source) -> None:
    defaults, unit, colors = spec["fieldConfig"]["defaults"], _unit(spec), _colors(spec)
    custom = defaults.get("custom", {})
    order = {name: n for n, name in enumerate(colors)}
    found = sorted(found, key=lambda series: order.get(series[0], 99))
    shades = [colors.get(name, CYCLE[n % len(CYCLE)]) for n, (name, _, _) in enumerate(found)]
    if custom.get("stacking", {}).get("mode") == "normal":
        grid = sorted({at for _, times, _ in found for at in times})
        rows = [[dict(zip(times, values, strict=True)).get(at, 0.0) for at in grid] for _, times, values in found]
        names = [name for name, _, _ in found]
        axes.stackplot([days(at) for at in grid], rows, colors=shades, labels=names, linewidth=0)
    else:
        for (name, times, values), shade in zip(found, shades, strict=True):
            axes.plot([days(at) for at in times], values, color=shade, label=name, linewidth=1.3)
    if custom.get("scaleDistribution", {}).get("type") == "log":
        axes.set_yscale("log")
        axes.minorticks_off()
    axes.set_ylim(defaults.get("min"), defaults.get("max"))
    if defaults.get("min") == 0 and not any(value for _, _, values in found for value in values):
        axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda value, _: text(value, unit))
    _time_axis(axes, source)
    shown = [n for n, (_, _, values) in enumerate(found) if any(value for value in values)] or range(len(found))
    handles, labels = axes.get_legend_handles_labels()
    chosen = [(handles[n], labels[n]) for n in shown if n < len(handles)][:8]
    axes.legend(*zip(*chosen, strict=True), fontsize=6, ncol=4, loc="upper left", bbox_to_anchor=(0, -0.12),
                frameon=False, handlelength=1, columnspacing=1)  # fmt: skip


def _time_axis(axes: Axes, source: Source) -> None:
    axes.set_xlim(days(source.begin), days(source.end))
    locator = AutoDateLocator(minticks=3, maxticks=6)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator, show_offset=False))
    axes.tick_params(labelsize=6, length=2)
    axes.grid(axis="y", linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _timeline(axes: Axes, spec: dict[str, Any], found: list[Series], source: Source) -> None:
    colors = _colors(spec)
    order = [name for name in colors if name in {series[0] for series in found}]
    for name, times, _ in found:
        spans = [(days(at), days(source.step * 1.05)) for at in times]
        axes.broken_barh(spans, (order.index(name) - 0.4, 0.8), facecolors=colors[name], linewidth=0)
    axes.set_yticks(range(len(order)), order)
    axes.invert_yaxis()
    _time_axis(axes, source)
    axes.tick_params(axis="y", labelsize=7)


def _bars(axes: Axes, spec: dict[str, Any], found: list[Series], source: Source) -> None:
    unit = _unit(spec)
    names, values = [series[0] for series in found], [series[2][-1] for series in found]
    asked = [target.get("legendFormat") for target in spec["targets"]]
    if len(asked) > 1:  # in the order of the queries
        pairs = sorted(zip(names, values, strict=True), key=lambda pair: asked.index(pair[0]))
        names, values = [name for name, _ in pairs], [value for _, value in pairs]
    axes.barh(names, values, color=[_threshold(spec, value) for value in values], height=0.6)
    for row, value in enumerate(values):
        axes.text(value, row, f" {text(value, unit)}", va="center", fontsize=7)
    axes.set_ylim(max(len(values), 4) - 0.4, -0.6)
    top = spec["fieldConfig"]["defaults"].get("max") or max(*values, 1e-12) * 1.25
    axes.set_xlim(0, top)
    axes.set_xticks([])
    axes.tick_params(axis="y", labelsize=7, length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _table(axes: Axes, spec: dict[str, Any], source: Source) -> None:
    overrides = {o["matcher"]["options"]: o["properties"][0]["value"] for o in spec["fieldConfig"]["overrides"]}
    names = next(t for t in spec["transformations"] if t["id"] == "organize")["options"]["renameByName"]
    headings = [names[f"Value #{target['refId']}"] for target in spec["targets"]]
    rows: dict[str, dict[str, str]] = {}
    for heading, target in zip(headings, spec["targets"], strict=True):
        for name, _, values in source.ask({**target, "legendFormat": "{{namespace}}/{{job}}"}):
            rows.setdefault(name, {})[heading] = text(values[-1], overrides[heading])
    axes.axis("off")
    if not rows:
        _say(axes, "no data")
        return
    cells = [[name, *(row.get(heading, "–") for heading in headings)] for name, row in rows.items()]
    columns = ["job", *headings]
    made = axes.table(cellText=cells, colLabels=columns, loc="upper center", cellLoc="right", edges="horizontal")
    made.auto_set_font_size(False)
    made.set_fontsize(8)
    made.scale(1, 1.5)


def render(name: str, source: Source) -> Path:
    """One dashboard as a PNG."""
    board = json.loads((FOLDER / f"{name}.json").read_text())
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
    wide, tall = 24 * COLUMN, height * CELL + 0.6
    figure = Figure(figsize=(wide, tall), facecolor="white")
    job = source.variables["job"] if name == "job" else "all namespaces"
    figure.text(0.01, 1 - 0.35 / tall, f"{board['title']} · {job}", fontsize=13, fontweight="bold")
    figure.text(0.99, 1 - 0.35 / tall, "rendering of the panels' queries, not a Grafana screen", fontsize=7, ha="right",
                color=GREY)  # fmt: skip
    for spec in board["panels"]:
        at = spec["gridPos"]
        top = 1 - (0.6 + at["y"] * CELL) / tall
        if spec["type"] == "row":
            figure.text(0.01, top - 0.5 * CELL / tall, spec["title"], fontsize=10, color=GREY, va="center")
            continue
        small = spec["type"] == "stat"
        wide_names = spec["type"] in ("bargauge", "state-timeline")
        left, right = (0.2, 0.2) if small else (1.1 if wide_names else 0.6, 0.3)
        below, above = (0.1, 0.35) if small else (0.62, 0.35)
        box = (
            (at["x"] * COLUMN + left) / wide, top - (at["h"] * CELL - below) / tall,
            (at["w"] * COLUMN - left - right) / wide, (at["h"] * CELL - below - above) / tall,
        )  # fmt: skip
        panel(figure.add_axes(box), spec, source)
    IMAGES.mkdir(parents=True, exist_ok=True)
    path = IMAGES / f"dashboard-{name}-rendering.png"
    figure.savefig(path, dpi=72)
    return path


def pictures(url: str, namespace: str, job: str, minutes: float) -> None:
    now = time.time()
    for name in ("job", "fleet", "carbon"):
        variables = {"namespace": namespace if name == "job" else ".*", "job": job}
        path = render(name, Source(url, now - 60 * minutes, now, variables))
        print(f"{path} {path.stat().st_size / 1024:.0f} KiB")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dashboards.render", description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--namespace", required=True)
    parser.add_argument("--job", required=True)
    parser.add_argument("--minutes", type=float, default=180)
    given = parser.parse_args()
    pictures(given.url, given.namespace, given.job, given.minutes)


if __name__ == "__main__":
    main()
