"""One self-contained HTML file from a ledger."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assay.errors import AssayError, InputError
from assay.store.files import write_atomic

if TYPE_CHECKING:
    from assay.report.contents import Contents
    from assay.store import Ledger

__all__ = ["write"]

_TEMPLATES = Path(__file__).parent / "templates"


def write(ledger: Ledger, path: str | Path | None = None, title: str | None = None) -> Path:
    """Write the report of a run as one HTML file.

    The file needs no network: script, style and figures lie inside, and its Content-Security-Policy forbids
    the browser to load anything. Everything that comes from the data is escaped. Samples are aggregated, so
    that the page of a million samples is as quick as that of a thousand; of the samples themselves only those
    at both ends are embedded.

    Args:
        ledger: Ledger of a run, finished or not.
        path: The file, or a folder in which it becomes `report.html`; the run's own folder by default, or the
            current one if the run was kept in memory.
        title: Heading of the page.

    Returns:
        Path of the file.

    Raises:
        AssayError: The extra `report` (plotly, jinja2) is not installed.
        InputError: The ledger has no target.
        StoreError: The file cannot be written.

    Example:
        >>> import tempfile, numpy as np
        >>> from assay.store import RunWriter
        >>> writer = RunWriter(None, targets=["code"])
        >>> writer.add_values(0, 0, ["a", "b"], np.array([[0.5], [-0.25]]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write(writer.ledger, folder).name
        'report.html'
    """
    try:
        import jinja2  # noqa: F401
        import plotly  # noqa: F401
    except ImportError as error:
        raise AssayError(f"the report needs {error.name}: pip install 'assay[report]'") from error
    from assay.report.contents import read

    out = _destination(ledger, path)
    page = _render(read(ledger), title or "What every example was worth")
    write_atomic(out, page.encode())
    return out


def _destination(ledger: Ledger, path: str | Path | None) -> Path:
    if path is None:
        path = ledger.path or Path()
    path = Path(path).expanduser()
    out = path / "report.html" if path.is_dir() else path
    if not out.parent.is_dir():
        raise InputError(f"no folder {out.parent} for the report: make it first")
    return out


def _render(contents: Contents, title: str) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    import assay

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scripts = {
        "plotly": get_plotlyjs(),
        "script": (_TEMPLATES / "script.js").read_text(encoding="utf-8"),
    }
    return environment.get_template("report.html.jinja").render(
        page=contents,
        title=title,
        version=assay.__version__,
        style=Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8")),
        figures=Markup(_data_block(contents.figures)),
        script_hashes=Markup(" ".join(_hash(text) for text in scripts.values())),
        **{name: Markup(text) for name, text in scripts.items()},
    )


def _hash(script: str) -> str:
    """How a Content-Security-Policy names the one inline script that it lets run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _data_block(figures: dict[str, Any]) -> str:
    """Figures as JSON that no text in them can end: `<`, `>` and `&` are written as JSON escapes."""
    text = "{" + ",".join(f"{json.dumps(key)}:{figure.to_json()}" for key, figure in figures.items()) + "}"
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
