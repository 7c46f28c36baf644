"""Plotly figures of the page. Colours are names of CSS variables that the page's script resolves by theme."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from assay.report.aggregate import Histogram
from assay.report.format import Scale

__all__ = ["SERIES", "account", "cumulative", "curve", "distribution", "drop", "influence", "stages"]

SERIES = 8
"""Colours --series-0 … --series-7; the last one is grey, for what is left over."""

_DASHES = ("solid", "solid", "solid", "solid", "dash", "dash", "dash", "dot")


def _label(name: str) -> str:
    # Plotly reads a subset of HTML in every text: a name from the data must stay a name.
    return html.escape(name, quote=False)


def _line(index: int) -> dict[str, object]:
    index %= SERIES
    return {"color": f"var(--series-{index})", "dash": _DASHES[index], "width": 2}


def _figure(height: int, **layout: object) -> go.Figure:
    """Empty figure with the page's geometry and without a template: the script supplies one per theme."""
    figure = go.Figure()
    figure.update_layout(
        template=go.layout.Template(),
        height=height,
        margin={"l": 44, "r": 8, "t": 10, "b": 36},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        **({"showlegend": False} | layout),
    )
    figure.update_xaxes(title="step")
    return figure


def cumulative(frame: pl.DataFrame, order: Sequence[str], scale: Scale) -> go.Figure:
    """Running sum of the value of each group over the training steps.

    Args:
        frame: Columns step, group, value, cumulative.
        order: All groups of the page, so that a group has the same colour in every figure.
        scale: Scale of the value axis.
    """
    figure = _figure(240, hovermode="x unified")
    for index, group in enumerate(order):
        rows = frame.filter(pl.col("group") == group)
        figure.add_scatter(
            x=rows["step"].to_numpy(),
            y=(rows["cumulative"] * scale.factor).to_numpy(),
            name=_label(group),
            mode="lines",
            line=_line(index),
            hovertemplate="%{y:+.4~g}",
        )
    return figure


def stages(frame: pl.DataFrame, order: Sequence[str], scale: Scale) -> go.Figure:
    """What each group was worth in each stage of the training, stacked around zero; see `cumulative`."""
    figure = _figure(240, barmode="relative", bargap=0.1, hovermode="x unified")
    for index, group in enumerate(order):
        rows = frame.filter(pl.col("group") == group)
        figure.add_bar(
            x=rows["step"].to_numpy(),
            y=(rows["value"] * scale.factor).to_numpy(),
            name=_label(group),
            marker={"color": f"var(--series-{index % SERIES})", "line": {"width": 0}},
            hovertemplate="%{y:+.4~g}",
        )
    figure.update_xaxes(title="step (end of the stage)")
    return figure


def distribution(counts: Histogram, noun: str) -> go.Figure:
    """Histogram of the samples' values, harmful left of zero and helpful right of it.

    Args:
        counts: The histogram.
        noun: What a sample is called.
    """
    scale = Scale.of(counts.edges.tolist())
    edges = counts.edges * scale.factor
    centres, widths = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    hover = "%{customdata[0]:.3~g} to %{customdata[1]:.3~g}: %{y:,} " + f"{noun}s<extra></extra>"
    figure = _figure(240, bargap=0, barmode="overlay", showlegend=True)
    for name, side, colour in (
        ("raised the loss", centres < 0, "var(--negative)"),
        ("lowered the loss", centres > 0, "var(--positive)"),
    ):
        figure.add_bar(
            x=centres[side],
            y=counts.counts[side],
            width=widths[side],
            customdata=np.stack([edges[:-1][side], edges[1:][side]], axis=-1),
            name=name,
            marker={"color": colour, "line": {"color": "var(--surface)", "width": 0.5}},
            hovertemplate=hover,
        )
    figure.update_xaxes(title=f"value, {scale.unit}", zeroline=True)
    figure.update_yaxes(title=f"{noun}s")
    return figure


def account(frame: pl.DataFrame, scale: Scale) -> go.Figure:
    """Account of one target: running sums of its parts against the actual change, and the residual below.

    Args:
        frame: As `assay.report.aggregate.account` returns it.
        scale: Scale of both value axes.
    """
    step = frame["step"].to_numpy()
    figure = make_subplots(
        rows=2,
        cols=1,
        shared_xaxes=True,
        row_heights=[0.72, 0.28],
        vertical_spacing=0.07,
        figure=_figure(340, barmode="relative", bargap=0, hovermode="x unified"),
    )
    parts = (
        ("predicted", "values"),
        ("carried", "carried (momentum)"),
        ("decayed", "weight decay"),
    )
    bars = [
        (f"cumulative_{column}", name, f"var(--account-{i})", 1) for i, (column, name) in enumerate(parts)
    ]
    for column, name, colour, row in (*bars, ("residual", "residual", "var(--muted)", 2)):
        figure.add_bar(
            x=step,
            y=(frame[column] * scale.factor).to_numpy(),
            name=name,
            marker={"color": colour, "line": {"width": 0}},
            hovertemplate="%{y:+.4~g}",
            row=row,
            col=1,
        )
    figure.add_scatter(
        x=step,
        y=(frame["cumulative_actual"] * scale.factor).to_numpy(),
        name="actual drop",
        mode="lines",
        line={"color": "var(--ink)", "width": 2.5},
        hovertemplate="%{y:+.4~g}",
        row=1,
        col=1,
    )
    figure.update_xaxes(title="", row=1, col=1)
    figure.update_xaxes(title="step", row=2, col=1)
    return figure


def drop(accounts: Sequence[tuple[str, pl.DataFrame]], colours: Sequence[int]) -> go.Figure:
    """Actual drop of every target's loss since the start.

    Args:
        accounts: (target, binned account) in the order of the page.
        colours: Index of each target's colour.
    """
    figure = _figure(260, hovermode="x unified", showlegend=True)
    for (target, frame), index in zip(accounts, colours, strict=True):
        figure.add_scatter(
            x=frame["step"].to_numpy(),
            y=frame["cumulative_actual"].to_numpy(),
            name=_label(target),
            mode="lines",
            line=_line(index),
            hovertemplate="%{y:+.4~g}",
        )
    return figure


def curve(frame: pl.DataFrame, column: str) -> go.Figure:
    """One measured quantity of the training over its steps."""
    figure = _figure(260)
    figure.add_scatter(
        x=frame["step"].to_numpy(),
        y=frame[column].to_numpy(),
        mode="lines",
        line={"color": "var(--series-0)", "width": 1.5},
        hovertemplate="step %{x}: %{y:.4~g}<extra></extra>",
    )
    return figure


def influence(frame: pl.DataFrame, column: str) -> go.Figure:
    """The influence of each step's samples on every query, one line per query.

    Args:
        frame: Columns query, step and `column`.
        column: "magnitude", or "per_lr", the same over the learning rate.
    """
    figure = _figure(260, hovermode="x unified", showlegend=True)
    for index, (query,) in enumerate(frame.select("query").unique(maintain_order=True).iter_rows()):
        rows = frame.filter(pl.col("query") == query)
        figure.add_scatter(
            x=rows["step"].to_numpy(),
            y=rows[column].to_numpy(),
            name=_label(query),
            mode="lines",
            line=_line(index),
            hovertemplate="%{y:.3~g}",
        )
    return figure
