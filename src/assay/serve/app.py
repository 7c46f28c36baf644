"""The web application: a page, and the JSON that it asks for."""

from __future__ import annotations

import io
import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import polars as pl
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import assay
from assay.errors import AssayError
from assay.serve.catalogue import Catalogue
from assay.serve.search import Searcher
from assay.store import Ledger

__all__ = ["make_app"]

_STATIC = Path(__file__).parent / "static"
_FILES = {
    "/": ("explorer.html", "text/html"),
    "/explorer.js": ("explorer.js", "text/javascript"),
    "/explorer.css": ("explorer.css", "text/css"),
}
MOST_TEXT = 100_000
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def make_app(
    ledger: Ledger,
    searcher: Searcher | None = None,
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]"),
) -> Starlette:
    """The explorer of one run.

    Args:
        ledger: of the run.
        searcher: ranks documents for a text; without it texts can only be looked for word by word.
        hosts: names under which a browser may ask, so that no other page can reach it under a name of its own.

    Example:
        >>> import numpy as np
        >>> from assay.store import RunWriter
        >>> writer = RunWriter(None, targets=["code"])
        >>> writer.add_values(0, 0, ["a", "b"], np.array([[0.5], [-0.25]]))
        >>> [route.path for route in make_app(writer.ledger).routes][:4]
        ['/', '/explorer.js', '/explorer.css', '/api/run']
    """
    catalogue = Catalogue(ledger)

    def run(request: Request) -> Any:
        return {
            "version": assay.__version__,
            "path": ledger.path.name if ledger.path is not None else "in memory",
            "targets": [{"name": name, "explained": catalogue.explained[name]} for name in catalogue.targets],
            "columns": {name: catalogue.groups(name)[:500] for name in catalogue.columns},
            "documents": max((frame.height for frame in catalogue.values.values()), default=0),
            "search": searcher is not None,
        }

    def documents(request: Request) -> Any:
        ask = request.query_params
        page = ask.get("page", "0")
        return catalogue.page(
            ask.get("target", ""), ask.get("words", ""), ask.get("column", ""), ask.get("group", ""),
            ask.get("order") == "worst", int(page[:15]) if page.isdecimal() else 0,  # of more digits: past the end too
        )  # fmt: skip

    def document(request: Request) -> Any:
        return catalogue.document(request.query_params.get("id", ""))

    def export(request: Request) -> Response:
        ask = request.query_params
        fields = [ask.get(name, "") for name in ("target", "words", "column", "group", "drop")]
        found = catalogue.selection(*fields)
        lines = io.BytesIO()
        found.write_ndjson(lines)
        headers = {"content-disposition": 'attachment; filename="selection.jsonl"'}
        return Response(lines.getvalue(), media_type="application/x-ndjson", headers=headers)

    def search(asked: Mapping[str, Any]) -> Any:
        text, target, column, group = (
            str(asked.get(name, "")) for name in ("text", "target", "column", "group")
        )
        if searcher is None:
            raise AssayError("there is no index of this run: start with assay serve RUN --build-index")
        ranked = searcher.search(text)
        kept = catalogue.filtered(target, "", column, group)
        ranked = ranked.join(kept, on="id", maintain_order="left")
        ends = ranked.tail(20).reverse() if asked.get("order") == "worst" else ranked.head(20)
        return {"rows": catalogue.rows(ends), "of": ranked.height}

    async def ask_search(request: Request) -> Response:
        body = await request.body()
        if (
            len(body) > MOST_TEXT
            or request.headers.get("content-type", "").split(";")[0] != "application/json"
        ):
            return _refusal("send JSON of at most 100,000 characters", 400)
        try:
            asked = json.loads(body)
        except ValueError:
            asked = None
        if not isinstance(asked, dict):
            return _refusal("this is no JSON object", 400)
        return await _in_thread(lambda: search(asked))

    routes = [Route(path, _file(*of), methods=["GET"]) for path, of in _FILES.items()]
    routes += [
        Route(f"/api/{name}", _json(endpoint), methods=["GET"])
        for name, endpoint in (
            ("run", run),
            ("documents", documents),
            ("document", document),
            ("export", export),
        )
    ]
    routes.append(Route("/api/search", ask_search, methods=["POST"]))
    return Starlette(
        routes=routes,
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts)), Middleware(_Guard)],
    )


class _Guard:
    """Puts the security headers on every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        await self.app(scope, receive, guarded if scope["type"] == "http" else send)


def _file(name: str, kind: str) -> Callable[[Request], Response]:
    content = (_STATIC / name).read_bytes()
    return lambda request: Response(content, media_type=kind)


def _json(endpoint: Callable[[Request], Any]) -> Callable[[Request], Response]:
    """Run a plain function in a worker thread, and say what went wrong in one line."""

    def answer(request: Request) -> Response:
        return _answered(lambda: endpoint(request))

    return answer


async def _in_thread(work: Callable[[], Any]) -> Response:
    from starlette.concurrency import run_in_threadpool

    return await run_in_threadpool(_answered, work)


def _answered(work: Callable[[], Any]) -> Response:
    try:
        found = work()
    except AssayError as error:
        return _refusal(str(error), 400)
    except pl.exceptions.PolarsError as error:
        return _refusal(str(error).splitlines()[0], 400)
    return found if isinstance(found, Response) else JSONResponse(found)


def _refusal(message: str, status: int) -> Response:
    return JSONResponse({"error": message}, status_code=status)
