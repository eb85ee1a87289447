"""Routes: who may call them, what they take and give, and how errors leave. The server's table.

Every route is a line of `_routes`, with the access it asks for; nothing else is reachable. Not
here: what a route does (openai.py, completions.py, texts.py), the wire (wire.py).
Read next: service.py, refusals.py.
"""

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, Response

from overleap import __version__
from overleap.chat.dialects import Api
from overleap.server import admin, completions, openai, schema, texts
from overleap.server.auth import Access, Customer
from overleap.server.bodies import Bodies
from overleap.server.front import Front
from overleap.server.ledger import patience
from overleap.server.refusals import Refusal, refusal_of
from overleap.server.service import Service

log = logging.getLogger("overleap.server")

Answer = Awaitable[Response]
END_S = 5.0  # that a server at its end waits for requests to leave
_ANTHROPIC = ("/v1/messages", "/anthropic/")
_CSP = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


@dataclass(frozen=True)
class Route:
    """A line of the table.

    takes   the body it reads, None for none
    gives   what it answers with
    handle  (request, body, customer or None on a public route) -> response
    """

    method: str
    path: str
    access: Access
    handle: Callable[[HttpRequest, bytes, Any], Answer]
    gives: type[BaseModel] | None = None
    takes: type[BaseModel] | None = None
    streams: bool = False
    parameters: tuple[dict[str, Any], ...] = ()
    queries: bool = False


def build(service: Service) -> FastAPI:
    """The application of one service."""
    app = FastAPI(
        title="Overleap",
        version=__version__,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        lifespan=partial(_lifespan, service),
        redirect_slashes=False,
    )
    table, bodies = _routes(service, app), Bodies(service.settings.body_bytes)
    for route in table:
        app.add_api_route(
            route.path,
            _endpoint(route, service, bodies),
            methods=[route.method],
            name=f"{route.method.lower()} {route.path}",
            operation_id=_operation(route),
            response_model=None,
            responses=_responses(route),
            openapi_extra=_extra(route),
        )
    app.add_exception_handler(HTTPException, partial(_failed, service))
    app.openapi = partial(_openapi, app.openapi, table, service.settings.names)  # type: ignore[method-assign]
    app.add_middleware(Front, settings=service.settings)
    return app


@asynccontextmanager
async def _lifespan(service: Service, app: FastAPI) -> AsyncIterator[None]:
    await service.bridge.start()
    try:
        yield
    finally:
        close = partial(asyncio.to_thread, service.ledger.close)
        for step in (partial(_send_away, service), service.bridge.stop, close):
            try:  # each of them, whatever became of the one before: a process that is to end ends
                await step()
            except Exception as error:
                log.error("a step of the server's end failed", exc_info=error)


async def _send_away(service: Service) -> None:
    """End what runs, and wait a little for its books."""
    service.everyone.cut()
    service.bridge.cancel_all()
    await asyncio.wait_for(service.everyone.wait(), END_S)


def _routes(service: Service, app: FastAPI) -> list[Route]:
    def chat_route(api: Api, path: str, takes: type[BaseModel], gives: type[BaseModel]) -> Route:
        def handle(http: HttpRequest, raw: bytes, customer: Customer) -> Answer:
            return openai.converse(api, http, raw, customer, service)

        return Route("POST", path, Access.KEY, handle, gives, takes, True)

    def completion(path: str) -> Route:
        def handle(http: HttpRequest, raw: bytes, customer: Customer) -> Answer:
            return completions.complete(http, raw, customer, service)

        takes, gives = schema.CompletionBody, schema.CompletionAnswer
        return Route("POST", path, Access.KEY, handle, gives, takes, True)

    def text(
        path: str,
        work: Callable[[bytes, Customer, Service], Answer],
        takes: type[BaseModel],
        gives: type[BaseModel],
    ) -> Route:
        async def handle(http: HttpRequest, raw: bytes, customer: Customer) -> Response:
            return await work(raw, customer, service)

        return Route("POST", path, Access.KEY, handle, gives, takes)

    async def page(http: HttpRequest, raw: bytes, customer: None) -> Response:
        return _page()

    async def description(http: HttpRequest, raw: bytes, customer: None) -> Response:
        return texts.json_response(app.openapi())

    chat = (schema.ChatBody, schema.ChatAnswer)
    messages = (schema.MessagesBody, schema.MessagesAnswer)
    count = (schema.CountBody, schema.CountAnswer)
    return [
        chat_route("chat", "/v1/chat/completions", *chat),
        chat_route("chat", "/chat/completions", *chat),
        chat_route("chat", "/beta/chat/completions", *chat),
        completion("/v1/completions"),
        completion("/completions"),
        completion("/beta/completions"),
        chat_route("responses", "/v1/responses", schema.ResponsesBody, schema.ResponsesAnswer),
        chat_route("messages", "/v1/messages", *messages),
        chat_route("messages", "/anthropic/v1/messages", *messages),
        text("/v1/messages/count_tokens", texts.count_tokens, *count),
        text("/anthropic/v1/messages/count_tokens", texts.count_tokens, *count),
        text("/tokenize", texts.tokenize, schema.TokenizeBody, schema.TokenizeAnswer),
        text("/detokenize", texts.detokenize, schema.DetokenizeBody, schema.DetokenizeAnswer),
        *_model_routes(service),
        Route("GET", "/", Access.PUBLIC, page),
        Route("GET", "/openapi.json", Access.PUBLIC, description, schema.Answer),
        *(
            replace(Route(*line), queries="/organization/" in line[1])
            for line in admin.routes(service)
        ),
    ]  # fmt: skip


def _model_routes(service: Service) -> list[Route]:
    async def models(http: HttpRequest, raw: bytes, customer: Customer) -> Response:
        return texts.models(service, customer)

    async def model(http: HttpRequest, raw: bytes, customer: Customer) -> Response:
        return texts.model(service, http.path_params["model"], customer)

    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    return [
        Route("GET", "/v1/models", Access.KEY, models, schema.ModelList),
        Route("GET", "/models", Access.KEY, models, schema.ModelList),
        Route("GET", "/v1/models/{model:path}", Access.KEY, model, schema.ModelCard,
              parameters=(name,)),
    ]  # fmt: skip


def _endpoint(route: Route, service: Service, bodies: Bodies) -> Callable[[HttpRequest], Answer]:
    async def answer(http: HttpRequest) -> Response:
        # The key first: nobody unknown makes the server read a body.
        authorization = http.headers.get("authorization") or http.headers.get("x-api-key")
        customer = None
        if route.access is not Access.PUBLIC:
            work = partial(service.auth.authorize, authorization, route.access)
            async with patience():
                customer = await asyncio.to_thread(work)
        if route.takes is None:
            return await route.handle(http, b"", customer)
        async with bodies.read(http, customer.key_id if customer else "") as raw:
            return await route.handle(http, raw, customer)

    async def endpoint(http: HttpRequest) -> Response:
        try:
            return await answer(http)
        except Exception as error:
            return await _failed(service, http, error)

    return endpoint


async def _failed(service: Service, http: HttpRequest, error: Exception) -> Response:
    """An error as a response, in the shape of the route's API."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)
    api: Api = "messages" if http.url.path.startswith(_ANTHROPIC) else "chat"
    refusal = _of_route(error) if isinstance(error, HTTPException) else refusal_of(error)
    request_id = f"req_{uuid.uuid4().hex}"
    body = refusal.body(api, request_id)
    reason = body["error"].get("code") or body["error"]["type"]
    service.metrics.rejected(refusal.status, reason)
    status = 529 if api == "messages" and refusal.status == 503 else refusal.status
    headers = refusal.all_headers() | {"x-request-id": request_id, "request-id": request_id}
    if refusal.status == 413:
        headers["connection"] = "close"
    response = texts.json_response(body, status)
    response.headers.update(headers)
    return response


def _of_route(error: HTTPException) -> Refusal:
    if error.status_code == 404:
        return Refusal(404, "there is nothing at this address")
    if error.status_code == 405:
        allowed = dict(error.headers or {})
        return Refusal(405, "this address does not take this method", headers=allowed)
    return Refusal(error.status_code, str(error.detail))


def _page() -> Response:
    nonce = uuid.uuid4().hex
    text = (Path(__file__).parent / "ui.html").read_text("utf-8").replace("{{nonce}}", nonce)
    return HTMLResponse(text, headers={"content-security-policy": _CSP.format(nonce=nonce)})


# -- the description of all this


def _operation(route: Route) -> str:
    words = route.path.strip("/").replace("{model:path}", "one").replace("/", "_")
    return f"{route.method.lower()}_{words or 'page'}"


def _responses(route: Route) -> dict[int | str, dict[str, Any]]:
    error = schema.MessagesErrorBody if route.path.startswith(_ANTHROPIC) else schema.ErrorBody
    statuses = [500]
    if route.access is not Access.PUBLIC:
        statuses += [401, 403, 503]
    if route.takes is not None:
        statuses += [400, 404, 413, 415]
    if route.parameters or route.queries:
        statuses += [400, 404]
    if route.streams:
        statuses += [402, 429, 529 if error is schema.MessagesErrorBody else 503]
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": error, "description": "Not answered."} for status in sorted(set(statuses))
    }
    if route.gives is not None:
        found[200] = {"model": route.gives, "description": "Answered."}
        if route.streams:
            found[200]["content"] = {"text/event-stream": {}}
    else:
        kind = "text/html" if route.path == "/" else "text/plain"
        found[200] = {"description": "A text.", "content": {kind: {"schema": {"type": "string"}}}}
    return found


def _extra(route: Route) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    if route.takes is not None:
        reference = {"$ref": f"#/components/schemas/{route.takes.__name__}"}
        content = {"application/json": {"schema": reference}}
        extra["requestBody"] = {"required": True, "content": content}
    if route.parameters:
        extra["parameters"] = list(route.parameters)
    if route.access is not Access.PUBLIC:
        extra["security"] = [{"key": []}]
    return extra


def _openapi(
    made: Callable[[], dict[str, Any]], table: list[Route], names: tuple[str, ...]
) -> dict[str, Any]:
    """FastAPI's description, with the bodies that the routes read themselves."""
    found = made()
    components = found.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for route in table:
        if route.takes is None or route.takes.__name__ in schemas:
            continue
        body = route.takes.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(body.pop("$defs", {}))
        if "model" in body["properties"]:
            body["properties"]["model"] = {"type": "string", "enum": list(names)}
        schemas[route.takes.__name__] = body
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return found
