"""The progress of a run: a bar in a terminal, a line now and then in a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

if TYPE_CHECKING:
    from assay.train import Progress

__all__ = ["follow", "make_console", "named_share", "percent"]

LINES = 20
"""How many lines a whole run leaves in a log."""


def make_console() -> Console:
    """The terminal, or a log wide enough for the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=110)


def percent(overhead: float | None) -> str:
    """An overhead for people: ``+12 %``, or a dash before it is known.

    Example:
        >>> percent(0.123), percent(None)
        ('+12 %', '–')
    """
    return "–" if overhead is None else f"{overhead:+.0%}".replace("%", " %")


def named_share(share: float | None) -> str:
    """A share for people, or a dash where there is none.

    Example:
        >>> named_share(0.123), named_share(float("nan"))
        ('12.3 %', '–')
    """
    return "–" if share is None or share != share else f"{100 * share:.1f} %"


@contextmanager
def follow(console: Console) -> Iterator[Callable[[Progress], None]]:
    """Show the progress of a run on a console, as long as the context is open.

    Args:
        console: where to.

    Yields:
        What to call after every step.
    """
    if not console.is_terminal:
        yield lambda at: _line(console, at)
        return
    columns = (
        TextColumn("training"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=False, expand=True) as bar:
        task = bar.add_task("", total=None, state="")
        yield lambda at: bar.update(task, completed=at.step, total=at.steps, state=_state(at))


def _state(at: Progress) -> str:
    state = f"loss {at.loss:.3f} · {at.tokens_per_second:,.0f} tokens/s · overhead {percent(at.overhead)}"
    return state if at.explained is None else f"{state} · explained {100 * at.explained:.0f} %"


def _line(console: Console, at: Progress) -> None:
    due = at.step * LINES // at.steps > (at.step - 1) * LINES // at.steps
    if due or at.step == 1:
        console.print(f"step {at.step}/{at.steps} · {_state(at)}", highlight=False, soft_wrap=True)
