"""The page of `posttrain annotate` as a web application: Gradio around templates/annotate*.html, and its guard."""

from __future__ import annotations

import hmac
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastapi
import gradio as gr
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.datastructures import URL, Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from posttrain.annotate.answers import person
from posttrain.errors import UserError
from posttrain.log import log

if TYPE_CHECKING:
    from posttrain.annotate.serve import Desk

FILES = Path(__file__).parent
TEMPLATES = Environment(loader=FileSystemLoader(FILES / "templates"), autoescape=True, undefined=StrictUndefined)
BODY = {"preference": "annotate_pair.html", "artifact": "annotate_image.html"}
# The browser may load from no other server, whatever the page or a library asks for.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data: blob:; font-src 'self' data:; frame-ancestors 'none'"
)
Send = Callable[[MutableMapping[str, Any]], Any]


def page(desk: Desk, password: str | None, hosts: set[str], root_path: str = "") -> Guard:
    """An ASGI application. With a password everyone logs in; without one it answers only to the names in `hosts`."""
    # Gradio has a template syntax of its own (`{{value}}`, `${value}`), so the body is rendered before it gets it.
    with gr.Blocks(title="posttrain annotate", analytics_enabled=False, fill_width=True) as blocks:
        body = gr.HTML(
            {"login": password is not None},  # type: ignore[arg-type]
            html_template=TEMPLATES.get_template(BODY[desk.mode]).render(),
            js_on_load=(FILES / "annotate.js").read_text(),
            server_functions=[_answer(function) for function in (desk.start, desk.choose, desk.undo)],
            apply_default_css=False,
            elem_id="annotate",
        )
        if password is not None:
            blocks.load(_who, outputs=body, api_visibility="private", show_progress="hidden")

    def log_in(name: str, entered: str) -> bool:
        try:
            person(name)
        except UserError:
            return False
        # In constant time: how long a comparison takes must not tell how much of a password is right.
        return hmac.compare_digest(entered.encode(), (password or "").encode())

    app = fastapi.FastAPI(openapi_url=None)

    @app.get("/image/{name}.png")
    def image(name: str) -> Response:
        # Names are random; only a page that is logged in gets to know them.
        try:
            data = desk.png(name)
        except KeyError:
            return Response(status_code=404)
        except UserError as error:
            log.error(error)
            return Response(status_code=410)
        return Response(data, media_type="image/png", headers={"Cache-Control": "private, max-age=86400"})

    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        root_path=root_path or None,
        auth=log_in if password is not None else None,
        auth_message="Choose a name, and enter the password that you were given.",
        theme=gr.themes.Default(primary_hue="indigo"),
        css=(FILES / "annotate.css").read_text(),
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
    )
    return Guard(app, hosts if password is None else None, root_path)


class Guard:
    """Sets POLICY on every response; without a password it also refuses requests from other sites' pages. Takes the
    path that a proxy shows the page under away, where the proxy has not."""

    def __init__(self, app: Any, hosts: set[str] | None, root_path: str = ""):
        """`hosts`: the names of this server, so that no other name can be pointed at it; None: any name."""
        self._app, self._hosts, self._root = app, hosts, root_path

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Send) -> None:
        if self._root and scope.get("path") == self._root:  # addresses of images are relative to the slash at its end
            await RedirectResponse(f"{self._root}/")(scope, receive, send)
            return
        if self._root and scope.get("path", "").startswith(f"{self._root}/"):
            path = scope["path"].removeprefix(self._root)
            scope = {**scope, "path": path, "raw_path": scope["raw_path"].removeprefix(self._root.encode())}
        if scope["type"] == "http" and self._hosts is not None:
            headers = Headers(scope=scope)
            # Another site may have its name point here (then Host is that name), or post here from its own page (then
            # the browser adds its Origin).
            host, origin = headers.get("host", ""), headers.get("origin")
            if URL(f"http://{host}").hostname not in self._hosts or (origin and URL(origin).netloc != host):
                await PlainTextResponse("posttrain annotate: asked by another site\n", 403)(scope, receive, send)
                return

        async def send_with_policy(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY
                if "location" in headers:
                    headers["location"] = self._here(headers["location"])
            await send(message)

        await self._app(scope, receive, send_with_policy)

    def _here(self, location: str) -> str:
        """An address of this server without scheme and host, which a proxy need not pass on as the browser knows them;
        that of the page with a slash at its end."""
        url = URL(location)
        path = f"{self._root}/" if url.path in ("", self._root) else url.path
        return path + (f"?{url.query}" if url.query else "")


def _answer(function: Callable[[dict], dict]) -> Callable[[dict], dict]:
    def call(asked: dict) -> dict:
        try:
            return function(asked)
        except UserError as error:
            log.error(error)
            return {"error": str(error)}

    call.__name__ = function.__name__  # by which the page calls it
    return call


def _who(request: gr.Request) -> dict[str, Any]:
    return {"login": True, "name": request.username}
