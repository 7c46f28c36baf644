"""Everything that the page says, read from the ledger once: sections of each target, tables, figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

import polars as pl

from assay.errors import InputError
from assay.report import aggregate, figures, tables
from assay.report.documents import Document, describe, documents, has_text, sample_table
from assay.report.format import Scale, flat, percent, span

if TYPE_CHECKING:
    from assay.store import Ledger

__all__ = ["Contents", "read"]

KEPT_APART = 7  # groups with a colour of their own; the eighth is for the rest
EXTREMES = 10  # documents shown at each end
TABLE_ROWS = 1000  # rows of the table of samples
FINE, COARSE, CURVE = 200, 20, 600  # bins of steps: running sums, stages, training curves


@dataclass
class Target:
    """Section of one target."""

    name: str
    anchor: str
    scale: Scale
    sentence: str
    negative: float | None
    explained: float | None
    has_values: bool
    distribution_note: str
    composition: tuple[Scale, Scale] | None = None  # of the two figures over the steps; None without them
    helpful: Sequence[Document] = ()
    harmful: Sequence[Document] = ()
    account: pl.DataFrame | None = None  # binned; None where no step counts
    account_scale: Scale = field(default_factory=lambda: Scale(0, 0))
    totals: dict[str, float] = field(default_factory=dict)


@dataclass
class Contents:
    """The page, but for its looks.

    Attributes:
        noun: What a sample is called: "document" where texts are known.
        main_column: Metadata column that the figures and the matrix are split by, or None.
        targets: One section each.
        figures: Plotly figures by the key under which the template places them.
        matrix: Group × target tables by measure.
        groups: Table per other metadata column.
        samples: Table of the samples with the largest values.
        account_table: Totals of every account, if any was kept.
        statuses: Sentence on the steps that do not count.
        tiles: (label, value, note) of the opening.
        curves: Names of the training curves, in the order of their figures.
        groups_legend: Names of the groups of the figures, with the class of their colour.
        agreement: How well each method agrees with the exact adjoint, if that was taken.
        agreement_note: Which one to trust.
        coverage_note: Sentence on the share of the parameters that is covered.
        coverage: Side table of that name, if any.
        cost: What the run took, if it was recorded.
        settings: Configuration and versions.
    """

    noun: str
    main_column: str | None
    targets: list[Target]
    figures: dict[str, Any]
    matrix: dict[str, tables.Table]
    groups: dict[str, tables.Table]
    samples: tables.Table
    account_table: tables.Table | None
    statuses: str
    tiles: list[tuple[str, str, str]]
    curves: list[str]
    groups_legend: list[tuple[str, str]]
    agreement: tables.Table | None
    agreement_note: str
    coverage_note: str
    coverage: tables.Table | None
    cost: tables.Table | None
    settings: list[tables.Table]


class _Reader:
    """Reads a ledger section by section; what several sections need is asked for once."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.names = list(ledger.targets)
        if not self.names:
            raise InputError("this ledger has no target, so there is nothing to report: record at least one")
        self.info: dict[str, Any] = ledger.info
        self.values = {name: ledger.values(name) for name in self.names}
        metadata = ledger.metadata()
        self.metadata = metadata if metadata is not None and metadata.height else None
        self.columns = [] if self.metadata is None else aggregate.group_columns(self.metadata)
        self.main_column = self._main_column()
        self.noun = "document" if self.metadata is not None and has_text(self.metadata) else "sample"
        self.anchors = {name: f"target-{index}" for index, name in enumerate(self.names)}
        self.figures: dict[str, Any] = {}
        self.by: dict[str, dict[str, pl.DataFrame]] = {column: {} for column in self.columns}
        if self.metadata is not None:
            for name, values in self.values.items():
                for column, frame in aggregate.by_columns(values, self.metadata, self.columns).items():
                    self.by[column][name] = frame

    def _main_column(self) -> str | None:
        few = [c for c in self.columns if c == "domain" or self.metadata[c].n_unique() <= 40]  # type: ignore[index]
        return few[0] if few else None

    def order(self) -> tuple[list[str], str]:
        """Groups of the figures, and the name under which all others are summed."""
        if self.main_column is None:
            return [aggregate.EVERYTHING], ""
        kept, others = aggregate.prominent(self.by[self.main_column], self.main_column, KEPT_APART)
        return kept, f"{others:,} more" if others else ""

    def legend(self) -> list[tuple[str, str]]:
        """Names of the groups of the figures, with the class of their colour."""
        order, rest = self.order()
        names = [*order, rest] if rest else order
        return [(name, f"series-{index % figures.SERIES}") for index, name in enumerate(names)]

    def groups(self) -> pl.DataFrame | None:
        """Group of every sample: id, group."""
        if self.metadata is None or self.main_column is None:
            return None
        return self.metadata.select("id", pl.col(self.main_column).cast(pl.String).alias("group"))

    def read_targets(self) -> list[Target]:
        ends = {name: aggregate.extremes(frame, EXTREMES) for name, frame in self.values.items()}
        shown = pl.concat([part["id"] for pair in ends.values() for part in pair]).unique()
        described = describe(self.metadata, shown)
        values = {name: _lookup(frame, shown) for name, frame in self.values.items()}
        order, rest = self.order()
        groups = self.groups()
        sections = []
        for name in self.names:
            section = self._values_of(name)
            steps = self.ledger.steps(name)
            sums = aggregate.by_group(steps, groups, order, rest)
            if sums.height:
                self._composition(section, sums, [*order, rest] if rest else order)
            helpful, harmful = ends[name]
            for_list = (
                described,
                self.main_column,
                values,
                steps,
                section.scale,
                self._tokens(name, ends[name]),
            )
            section.helpful = documents(helpful, *for_list)
            section.harmful = documents(harmful, *for_list)
            self._account(section)
            sections.append(section)
        return sections

    def _tokens(
        self, target: str, ends: tuple[pl.DataFrame, pl.DataFrame]
    ) -> dict[object, list[float]] | None:
        """Values by position of the documents that are shown, where the run has them and knows their tokens."""
        if self.metadata is None or "pieces" not in self.metadata.columns:
            return None
        found: dict[object, list[float]] = {}
        for id_ in pl.concat([part["id"] for part in ends]):
            try:
                tokens = self.ledger.tokens(target, id=id_)
            except InputError:  # the run was not taken apart by token
                return None
            found[id_] = tokens.filter(pl.col("token").is_not_null())["value"].to_list()
        return found

    def _values_of(self, name: str) -> Target:
        finite = self.values[name]["value"].to_numpy()
        negative = float((finite < 0).mean()) if len(finite) else None
        counts = aggregate.histogram(finite)
        anchor = self.anchors[name]
        if len(finite):
            self.figures[f"distribution-{anchor}"] = figures.distribution(counts, self.noun)
        beyond = counts.below + counts.above
        outside = f"; {beyond:,} beyond the ends of the axis" if beyond else ""
        return Target(
            name=name,
            anchor=anchor,
            scale=Scale.of([finite.max(), finite.min()] if len(finite) else []),
            sentence="",
            negative=negative,
            explained=self.ledger.explained(name),
            has_values=bool(len(finite)),
            distribution_note=f"{percent(negative)} of {len(finite):,} {self.noun}s are negative{outside}",
        )

    def _composition(self, section: Target, sums: pl.DataFrame, order: list[str]) -> None:
        fine = aggregate.composition(sums, order, FINE)
        coarse = aggregate.composition(sums, order, COARSE)
        running, stage = Scale.of(fine["cumulative"].to_list()), Scale.of(coarse["value"].to_list())
        section.composition = running, stage
        self.figures[f"running-{section.anchor}"] = figures.cumulative(fine, order, running)
        self.figures[f"stages-{section.anchor}"] = figures.stages(coarse, order, stage)

    def _account(self, section: Target) -> None:
        account = self.ledger.account(section.name)
        steps, broken = aggregate.counted(account), account.filter(status="nan").height
        total = float(self.values[section.name]["value"].sum())
        scale = Scale.of([total])
        worth = f"Together, the {self.noun}s were worth {scale.signed(total)} {scale.unit}"
        if not steps.height:
            why = f"{broken:,} of {account.height:,} steps had a number that is not finite"
            why = why if broken else "The real loss drop was not measured"
            section.sentence = f"{worth}. {why}, so what they explain is unknown."
            return
        section.account = aggregate.account(steps, FINE)
        section.totals = dict(steps.select(pl.col(aggregate.ACCOUNT_COLUMNS).sum()).row(0, named=True))
        section.account_scale = Scale.of(section.account["cumulative_actual"].to_list())
        self.figures[f"account-{section.anchor}"] = figures.account(section.account, section.account_scale)
        section.sentence = f"{worth}. {_split(section.totals, self.noun)}"

    def statuses(self) -> str:
        """Sentence on the steps that are left out of the account."""
        account = pl.concat(
            [self.ledger.account(name).select("step", "status", "actual") for name in self.names]
        )
        if not account.height:
            return ""
        steps = account["step"].n_unique()
        parts = []
        for status, what in (
            ("nan", "had a number that is not finite"),
            ("skipped", "took no optimizer step"),
        ):
            count = account.filter(status=status)["step"].n_unique()
            if count:
                parts.append(f"{count:,} of {steps:,} steps {what}")
        return "; ".join(parts) + ": they are left out of these sums." if parts else ""

    def read_samples(self) -> tables.Table:
        largest = max(frame.height for frame in self.values.values())
        ends = max(1, TABLE_ROWS // (2 * len(self.names)))
        chosen = [
            f["id"] if largest <= TABLE_ROWS else pl.concat([f["id"].head(ends), f["id"].tail(ends)])
            for f in self.values.values()
        ]
        ids = pl.concat(chosen).unique(maintain_order=True)
        first = self.values[self.names[0]]
        seen = dict(first.join(ids.to_frame("id"), on="id", how="semi").select("id", "steps").iter_rows())
        caption = (
            f"All {largest:,} {self.noun}s"
            if len(ids) >= largest
            else f"The {len(ids):,} of {largest:,} {self.noun}s with the largest and smallest values; "
            "all others: ledger.values(target)"
        )
        values = {name: _lookup(frame, ids) for name, frame in self.values.items()}
        return sample_table(ids, seen, describe(self.metadata, ids), self.main_column, values, caption)

    def read_curves(self, targets: Sequence[Target]) -> list[str]:
        """Training curves, their figures, and the loss drop of the targets."""
        accounts = [(t.name, t.account) for t in targets if t.account is not None]
        if accounts:
            shades = {name: index for index, name in enumerate(self.order()[0])}
            named_alike = all(name in shades for name, _ in accounts)  # "law" is one colour, group or target
            colours = [shades[n] if named_alike else i for i, (n, _) in enumerate(accounts)]
            self.figures["drop"] = figures.drop(accounts, colours)
        influence = self.side("influence")
        if influence is not None:
            self.figures |= {
                f"influence-{column}": figures.influence(influence, column)
                for column in ("magnitude", "per_lr")
            }
        curve = self.side("curve")
        if curve is None or "step" not in curve.columns:
            return []
        curve = curve.with_columns(pl.col("step").cast(pl.Int64)).drop_nulls("step")  # logged as a float
        names = [c for c, dtype in curve.schema.items() if dtype.is_numeric() and c not in ("step", "micro")]
        names = sorted(names, key=lambda name: "loss" not in name)[:8]
        if names:
            frame = aggregate.binned(curve, names, CURVE)
            self.figures |= {f"curve-{i}": figures.curve(frame, name) for i, name in enumerate(names)}
        return names

    def side(self, name: str) -> pl.DataFrame | None:
        try:
            frame = self.ledger.table(name)
        except InputError:  # the run kept no such table
            return None
        return frame if frame.height else None

    def tiles(self, targets: Sequence[Target]) -> list[tuple[str, str, str]]:
        count = max(frame.height for frame in self.values.values())
        steps = self.ledger.account(self.names[0])["step"].n_unique()
        tiles = [(f"{self.noun.capitalize()}s", f"{count:,}", "")]
        tiles += [("Steps", f"{steps:,}", "")] if steps else []
        tiles += [("Targets", f"{len(targets)}", "")] if len(targets) > 1 else []
        by_target = ", by target" if len(targets) > 1 else ""
        tiles.append(("Negative", span(t.negative for t in targets), f"of the {self.noun}s{by_target}"))
        accounts = [t.totals for t in targets if t.totals.get("actual")]
        alone = span(totals["predicted"] / totals["actual"] for totals in accounts)
        note = f"{alone} by values alone" if accounts else ""
        tiles.append(("Loss drop explained", span(t.explained for t in targets), note))
        return [*tiles, *_quadrature_tile(self.side("quadrature"))]

    def settings(self) -> tuple[tables.Table | None, list[tables.Table]]:
        """Cost, and everything else that the run's info holds."""
        info = dict(self.info)
        summary, config, versions = (info.pop(key, None) for key in ("summary", "config", "versions"))
        cost = tables.quantities(_rows(summary), "What the run took") if summary else None
        rest = (("Configuration", config), ("Versions", versions), ("Run", info))
        return cost, [tables.settings(_rows(part), caption) for caption, part in rest if part]


def _quadrature_tile(quadrature: pl.DataFrame | None) -> list[tuple[str, str, str]]:
    """What the points between the ends of the steps cost, where a path took any."""
    if quadrature is None or quadrature["points"].max() == 2:
        return []
    points, missed = quadrature["points"].to_list(), quadrature.height - quadrature["met"].sum()
    note = f"at most {max(points)}; {missed} of {quadrature.height} steps missed the tolerance"
    if "seconds" in quadrature.columns:
        note += f"; {quadrature['seconds'].sum():.1f} s for those between the ends"
    return [("Gradients per step", f"{fmean(points):.1f}", note)]


def _rows(part: object) -> list[tuple[str, object]]:
    return flat(part) if isinstance(part, Mapping) else [("", part)]


def _split(totals: dict[str, float], noun: str) -> str:
    """Sentence on what a target's real loss drop is made up of."""
    actual = totals["actual"]
    scale = Scale.of([actual])
    amount = f"{scale.signed(abs(actual)).lstrip('+')} {scale.unit}"
    if actual <= 0:
        return f"The loss did not fall: it rose by {amount} over the run."
    values, carried, decayed = (
        percent(totals[name] / actual) for name in ("predicted", "carried", "decayed")
    )
    residual = totals["residual"] / actual
    rest = f"{percent(abs(residual))} {'stay unexplained' if residual >= 0 else 'too much in all'}"
    return (
        f"The loss really fell by {amount}: {values} of that are the values of the {noun}s, {carried} "
        f"momentum carried over from earlier steps, {decayed} weight decay; {rest}."
    )


def _coverage_note(coverage: pl.DataFrame | None) -> str:
    if coverage is None or not {"status", "entries"} <= set(coverage.columns):
        return ""
    shares = coverage.group_by("status").agg(pl.col("entries").sum()).sort("entries", descending=True)
    total = shares["entries"].sum() or 1
    return ", ".join(f"{status} {percent(entries / total)}" for status, entries in shares.iter_rows())


def _lookup(values: pl.DataFrame, ids: pl.Series) -> dict[object, float]:
    return dict(values.join(ids.to_frame("id"), on="id", how="semi").select("id", "value").iter_rows())


def read(ledger: Ledger) -> Contents:
    """Read everything that the page shows.

    Args:
        ledger: Ledger of a run, finished or not.

    Raises:
        InputError: The ledger has no target.
    """
    reader = _Reader(ledger)
    targets = reader.read_targets()
    accounts = [t for t in targets if t.account is not None]
    coverage, agreement = reader.side("coverage"), reader.side("agreement")
    cost, settings = reader.settings()
    return Contents(
        noun=reader.noun,
        main_column=reader.main_column,
        targets=targets,
        figures=reader.figures,
        matrix=tables.matrix(reader.by[reader.main_column], reader.main_column, reader.noun)
        if reader.main_column
        else {},
        groups={
            column: tables.group_table(frames, column, reader.noun)
            for column, frames in reader.by.items()
            if column != reader.main_column  # the matrix shows it already
        },
        samples=reader.read_samples(),
        account_table=tables.account_totals(
            {t.name: t.totals for t in accounts}, {t.name: t.explained for t in accounts}, reader.anchors
        )
        if accounts
        else None,
        statuses=reader.statuses(),
        tiles=reader.tiles(targets),
        curves=reader.read_curves(targets),
        groups_legend=reader.legend(),
        agreement=tables.agreement(agreement, reader.noun) if agreement is not None else None,
        agreement_note=tables.trusted(agreement, reader.noun),
        coverage_note=_coverage_note(coverage),
        coverage=tables.side_table(coverage, "Parameters of the model") if coverage is not None else None,
        cost=cost,
        settings=settings,
    )
