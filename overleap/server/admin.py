"""Routes for who runs the server and for who pays: health, metrics, balance, usage, what it does.

Not answers of the model (openai.py). Read next: reports.py, metrics.py.
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from overleap import __version__
from overleap.server.auth import Access, Customer
from overleap.server.refusals import Refusal
from overleap.server.reports import Group, Query
from overleap.server.schema import Answer
from overleap.server.service import Service
from overleap.server.texts import json_response

_GROUPS: dict[str, Group] = {"api_key_id": "key", "user_id": "user", "tier": "tier"}


def routes(service: Service) -> Iterable[tuple[Any, ...]]:
    """(method, path, access, handler, what it gives) of all of them."""

    async def alive(http: HttpRequest, raw: bytes, customer: None) -> Response:
        if service.bridge.ended:  # for good: who watches over the process is to start it again
            return json_response({"status": "ended"}, 503)
        return json_response({"status": "ok"})

    async def ready(http: HttpRequest, raw: bytes, customer: None) -> Response:
        if service.bridge.stopping:
            return json_response({"status": "draining"}, 503)
        return json_response({"status": "ok"})

    async def version(http: HttpRequest, raw: bytes, customer: None) -> Response:
        return json_response({"version": __version__})

    async def metrics(http: HttpRequest, raw: bytes, customer: Customer) -> Response:
        service.metrics.engine(await service.bridge.ask(lambda engine: engine.stats()))
        service.metrics.draining(service.bridge.stopping)
        page = await asyncio.to_thread(service.metrics.render)
        return Response(page, media_type=service.metrics.content_type)

    async def balance(http: HttpRequest, raw: bytes, customer: Customer) -> Response:
        return json_response(await asyncio.to_thread(service.reports.balance, customer))

    async def status(http: HttpRequest, raw: bytes, customer: Customer) -> Response:
        return json_response(await _status(service, customer))

    def report(make: Callable[[Query], Any]) -> Callable[..., Any]:
        async def handle(http: HttpRequest, raw: bytes, customer: Customer) -> Response:
            return json_response(await asyncio.to_thread(make, query_of(http)))

        return handle

    usage, costs = service.reports.organization_usage, service.reports.organization_costs
    yield from (
        ("GET", "/health", Access.PUBLIC, ready, Answer),
        ("GET", "/healthz", Access.PUBLIC, ready, Answer),
        ("GET", "/readyz", Access.PUBLIC, ready, Answer),
        ("GET", "/livez", Access.PUBLIC, alive, Answer),
        ("GET", "/ping", Access.PUBLIC, alive, Answer),
        ("GET", "/version", Access.PUBLIC, version, Answer),
        ("GET", "/metrics", Access.ADMIN, metrics),
        ("GET", "/user/balance", Access.KEY, balance, Answer),
        ("GET", "/status", Access.KEY, status, Answer),
        ("GET", "/v1/organization/usage/completions", Access.ADMIN, report(usage), Answer),
        ("GET", "/v1/organization/costs", Access.ADMIN, report(costs), Answer),
    )


async def _status(service: Service, customer: Customer) -> dict[str, Any]:
    """What the page shows about server and key: load, cache, plan, prices, what is left."""
    stats = await service.bridge.ask(lambda engine: engine.stats())
    standing = await asyncio.to_thread(service.reports.standing, customer)
    tier = customer.tier
    return {
        "model": service.settings.model,
        "context_tokens": service.turns.context_of(customer),
        "thinks": service.turns.model.profile.thinks,
        "waiting": service.bridge.waiting,
        "running": service.bridge.running,
        "pages": stats.pages,
        "pages_free": stats.pages_free,
        "cache_bytes": stats.cache_bytes,
        "tier": tier.name,
        "price_nanos": {
            "cache_hit": tier.price.cache_hit,
            "cache_miss": tier.price.cache_miss,
            "output": tier.price.output,
        },
        "tokens_today": standing.tokens_today,
        "tokens_this_month": standing.tokens_this_month,
        "requests_this_minute": standing.requests_this_minute,
        "capacity": service.capacity.of(stats),
        # What a request costs is for who runs the machine; others see their prices.
        "cost": service.capacity.cost(stats) if tier.admin else None,
    }


def query_of(http: HttpRequest) -> Query:
    """The query of a usage report, as OpenAI's admin API asks it. Raises Refusal (400)."""
    given = http.query_params

    def whole(name: str) -> int | None:
        raw = given.get(name)
        if raw is None:
            return None
        if not raw.isascii() or not raw.isdigit() or len(raw) > 12:
            raise Refusal(400, f"{name} is {raw[:40]!r}, expected a whole number", param=name)
        return int(raw)

    start = whole("page") or whole("start_time")
    if start is None:
        raise Refusal(400, "start_time is missing", param="start_time")
    groups = [*given.getlist("group_by"), *given.getlist("group_by[]")]
    unknown = [name for name in groups if name not in _GROUPS]
    if unknown:
        raise Refusal(400, f"group_by is {unknown[0][:40]!r}, known: {', '.join(_GROUPS)}")
    return Query(
        start_s=start,
        end_s=whole("end_time"),
        width=given.get("bucket_width", "1d"),
        by=tuple(_GROUPS[name] for name in dict.fromkeys(groups)),
        key_ids=tuple([*given.getlist("api_key_ids"), *given.getlist("api_key_ids[]")][:100]),
        limit=whole("limit"),
    )
