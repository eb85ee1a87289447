"""Small answers: models, tokenize and detokenize, counting, health. No engine work.

Read next: app.py.
"""

from typing import Any

from starlette.responses import Response

from overleap.server import sse
from overleap.server.auth import Customer
from overleap.server.refusals import Refusal
from overleap.server.schema import CountBody, DetokenizeBody, TokenizeBody
from overleap.server.service import Service
from overleap.server.turns import Turns, parsed


def json_response(value: Any, status: int = 200) -> Response:
    return Response(sse.encode(value), status, media_type="application/json")


def card(service: Service, name: str, customer: Customer) -> dict[str, Any]:
    """What is known of a model by one of its names."""
    turns = service.turns
    context = turns.context_of(customer)
    return {
        "id": name,
        "object": "model",
        "created": turns.model.created,
        "owned_by": "overleap",
        "root": service.settings.model,
        "max_model_len": context,
        "context_length": context,
    }


def models(service: Service, customer: Customer) -> Response:
    cards = [card(service, name, customer) for name in service.settings.names]
    return json_response({"object": "list", "data": cards})


def model(service: Service, name: str, customer: Customer) -> Response:
    service.turns.check_model(name)
    return json_response(card(service, name, customer))


async def tokenize(raw: bytes, customer: Customer, service: Service) -> Response:
    return await service.turns.read(customer, None, _tokenize, raw, customer, service.turns)


def _tokenize(raw: bytes, customer: Customer, turns: Turns) -> Response:
    body, value = parsed(TokenizeBody, raw)
    if body.model is not None:
        turns.check_model(body.model)
    tokenizer = turns.model.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise Refusal(400, "either prompt or messages is given")
    if body.prompt is not None:
        turns.check_size(body.prompt, customer, "prompt")
        ids = tokenizer.encode(body.prompt)
        ids = [tokenizer.bos_id, *ids] if body.add_special_tokens else ids
    else:
        prompt, _ = turns.render("chat", value)
        turns.check_size(prompt.text, customer, "messages")
        ids = tokenizer.encode_prompt(prompt)
    found: dict[str, Any] = {
        "tokens": ids,
        "count": len(ids),
        "max_model_len": turns.context_of(customer),
    }
    if body.return_token_strs:
        found["token_strs"] = [tokenizer.token_bytes(i).decode("utf-8", "replace") for i in ids]
    return json_response(found)


async def detokenize(raw: bytes, customer: Customer, service: Service) -> Response:
    return await service.turns.read(customer, None, _detokenize, raw, customer, service.turns)


def _detokenize(raw: bytes, customer: Customer, turns: Turns) -> Response:
    body, _ = parsed(DetokenizeBody, raw)
    if body.model is not None:
        turns.check_model(body.model)
    most = turns.context_of(customer)
    if len(body.tokens) > most:
        raise Refusal(400, f"{len(body.tokens)} tokens, the context is {most}", param="tokens")
    return json_response({"prompt": turns.model.tokenizer.decode(body.tokens, control=True)})


async def count_tokens(raw: bytes, customer: Customer, service: Service) -> Response:
    return await service.turns.read(customer, None, _count, raw, customer, service.turns)


def _count(raw: bytes, customer: Customer, turns: Turns) -> Response:
    body, value = parsed(CountBody, raw)
    turns.check_model(body.model)
    prompt, _ = turns.render("messages", {**value, "max_tokens": 1})
    turns.check_size(prompt.text, customer, "messages")
    return json_response({"input_tokens": len(turns.model.tokenizer.encode_prompt(prompt))})
