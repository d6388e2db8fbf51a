"""The kinds of panels that Trireme's dashboards are made of, so that the same thing looks the same everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.models import common as looks
from grafana_foundation_sdk.models import dashboard as parts

SOURCE = parts.DataSourceRef(type_val="prometheus", uid="${datasource}")
WIDTH = 24
STEP = "15s"
"""Scrapes come that often; a finer resolution shows nothing."""
PHASES = {
    "Pending": "#8e8e8e", "Starting": "#8ab8ff", "Running": "#56a64b", "Recovering": "#e02f44",
    "Suspending": "#ffb357", "Suspended": "#b877d9", "Succeeded": "#19730e", "Failed": "#7a0000", "Invalid": "#3d3d3d",
}  # fmt: skip
STATES = {
    "queued": "#c7c7c7", "pulling": "#b3cde3", "starting": "#8ab8ff", "init": "#5794f2", "compile": "#3f6fb5",
    "data-wait": "#fade2a", "step": "#56a64b", "checkpoint-blocked": "#ff9830", "eval": "#96d98d",
    "recovering": "#ff7383", "lost": "#c4162a", "suspended": "#b877d9",
}  # fmt: skip
Query = tuple[str, str]
"""PromQL and how its series are named."""
Steps = Sequence[tuple[float | None, str]]
"""Colour from a value on; the first has None."""


def over_time(
    title: str, about: str, unit: str, *queries: Query, span: int = 8, stacked: bool = False,
    low: float | None = None, high: float | None = None, colors: dict[str, str] | None = None, log: bool = False,
) -> timeseries.Panel:  # fmt: skip
    """Lines, or areas on top of each other that make a whole."""
    panel = timeseries.Panel().title(title).description(about).unit(unit).datasource(SOURCE).span(span).height(8)
    panel = panel.line_width(1).fill_opacity(70 if stacked else 8).show_points(looks.VisibilityMode.NEVER)
    panel = panel.tooltip(common.VizTooltipOptions().mode(looks.TooltipDisplayMode.MULTI))
    panel = panel.legend(
        common.VizLegendOptions().display_mode(looks.LegendDisplayMode.LIST)
        .placement(looks.LegendPlacement.BOTTOM).show_legend(True)
    )  # fmt: skip
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(looks.StackingMode.NORMAL))
    if log:
        panel = panel.scale_distribution(
            common.ScaleDistributionConfig().type(looks.ScaleDistribution.LOG).log(10)
        )
    panel = panel if low is None else panel.min(low)
    panel = panel if high is None else panel.max(high)
    for name, color in (colors or {}).items():
        panel = panel.override_by_name(name, [_color(color)])
    return _asking(panel, queries)


def figure(
    title: str, about: str, unit: str, query: Query, *, span: int = 3, steps: Steps = ((None, "text"),),
    decimals: int | None = None, named: bool = False, graph: bool = True,
) -> stat.Panel:  # fmt: skip
    """One number, large; `named`: the series' name instead of the number."""
    panel = stat.Panel().title(title).description(about).unit(unit).datasource(SOURCE).span(span).height(4)
    panel = panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"])).no_value("–")
    panel = panel.color_mode(looks.BigValueColorMode.VALUE)
    graphs = looks.BigValueGraphMode
    panel = panel.graph_mode(graphs.AREA if graph and not named else graphs.NONE)
    texts = looks.BigValueTextMode
    panel = panel.text_mode(texts.NAME if named else texts.VALUE)
    if decimals is not None:
        panel = panel.decimals(decimals)
    if named:
        for name, color in PHASES.items():
            panel = panel.override_by_name(name, [_color(color)])
    return _asking(panel.thresholds(_thresholds(steps)), [query], instant=named)


def timeline(title: str, about: str, query: Query, *, colors: dict[str, str], span: int = WIDTH) -> Any:
    """A row for each series, filled while it is 1."""
    panel = statetimeline.Panel().title(title).description(about).datasource(SOURCE).span(span).height(6)
    panel = panel.show_value(looks.VisibilityMode.NEVER).row_height(0.9).line_width(0).fill_opacity(90)
    panel = panel.merge_values(True).legend(common.VizLegendOptions().show_legend(False))
    for name, color in colors.items():
        panel = panel.override_by_name(name, [_color(color)])
    return _asking(panel, [query])


def bars(
    title: str, about: str, unit: str, *queries: Query, span: int = 8, steps: Steps = ((None, "blue"),),
    low: float | None = 0, high: float | None = None,
) -> bargauge.Panel:  # fmt: skip
    """A bar for each series, of its newest value."""
    panel = bargauge.Panel().title(title).description(about).unit(unit).datasource(SOURCE).span(span).height(8)
    panel = panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"])).no_value("none")
    panel = panel.orientation(looks.VizOrientation.HORIZONTAL).display_mode(looks.BarGaugeDisplayMode.BASIC)
    panel = panel if low is None else panel.min(low)
    panel = panel if high is None else panel.max(high)
    return _asking(panel.thresholds(_thresholds(steps)), queries, instant=True)


def listing(title: str, about: str, columns: Sequence[tuple[str, str, str]], *, span: int = WIDTH) -> table.Panel:
    """A row for each job; columns are (heading, unit, PromQL by namespace and job)."""
    panel = table.Panel().title(title).description(about).datasource(SOURCE).span(span).height(9)
    names, hidden = {"namespace": "namespace", "job": "job"}, {"Time": True}
    for letter, (heading, unit, expression) in zip("ABCDEFGHIJ", columns, strict=False):
        query = prometheus.Dataquery().expr(expression).instant().format(prometheus_table()).ref_id(letter)
        panel = panel.with_target(query)
        names[f"Value #{letter}"] = heading
        panel = panel.override_by_name(heading, [parts.DynamicConfigValue(id_val="unit", value=unit)])
    merge = parts.DataTransformerConfig(id_val="merge", options={})
    tidy = parts.DataTransformerConfig(id_val="organize", options={"excludeByName": hidden, "renameByName": names})
    return panel.with_transformation(merge).with_transformation(tidy)


def prometheus_table() -> Any:
    from grafana_foundation_sdk.models.prometheus import PromQueryFormat

    return PromQueryFormat.TABLE


def row(title: str) -> dashboard.Row:
    return dashboard.Row(title)


def board(uid: str, title: str, about: str, hours: int) -> dashboard.Dashboard:
    """With the choice of data source; others follow by `choice`."""
    source = dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus")
    links = dashboard.DashboardLink("Trireme").type(parts.DashboardLinkType.DASHBOARDS).tags(["trireme"])
    return (
        dashboard.Dashboard(title).uid(uid).description(about).tags(["trireme"]).readonly().refresh("30s")
        .time(f"now-{hours}h", "now").timezone("browser").tooltip(parts.DashboardCursorSync.CROSSHAIR)
        .link(links.keep_time(True).as_dropdown(False)).with_variable(source)
    )  # fmt: skip


def choice(name: str, query: str, *, several: bool = False) -> dashboard.QueryVariable:
    made = dashboard.QueryVariable(name).label(name).query(query).datasource(SOURCE)
    made = made.refresh(parts.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(parts.VariableSort.ALPHABETICAL_ASC)
    return made.multi(True).include_all(True).all_value(".*") if several else made


def marks(name: str, expression: str, color: str) -> dashboard.AnnotationQuery:
    """Vertical lines in every panel where the query has a value."""
    return dashboard.AnnotationQuery().name(name).datasource(SOURCE).enable(True).icon_color(color).expr(expression)


def _asking(panel: Any, queries: Sequence[Query], *, instant: bool = False) -> Any:
    for letter, (expression, name) in zip("ABCDEFGHIJ", queries, strict=False):
        query = prometheus.Dataquery().expr(" ".join(expression.split())).legend_format(name).ref_id(letter)
        panel = panel.with_target(query.instant() if instant else query.range().interval(STEP))
    return panel


def _thresholds(steps: Steps) -> dashboard.ThresholdsConfig:
    made = [parts.Threshold(value=value, color=color) for value, color in steps]
    return dashboard.ThresholdsConfig().mode(parts.ThresholdsMode.ABSOLUTE).steps(made)


def _color(color: str) -> parts.DynamicConfigValue:
    return parts.DynamicConfigValue(id_val="color", value={"mode": "fixed", "fixedColor": color})
