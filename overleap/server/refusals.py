"""A request that is not answered: its status, and its body in the shape of each API.

Not here: who refuses. Read next: app.py (where errors become responses).
"""

import json
import logging
from dataclasses import dataclass, field
from typing import Any

from deepseek_recipe import ConversionError

from overleap.chat.dialects import Api
from overleap.errors import (
    AccessError,
    AuthError,
    CapacityError,
    DialectError,
    LedgerError,
    OverleapError,
    QuotaError,
    RateError,
    RequestError,
)

log = logging.getLogger("overleap.server")

# Status -> type of an OpenAI error, type of an Anthropic error.
_TYPES = {
    400: ("invalid_request_error", "invalid_request_error"),
    415: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "authentication_error"),
    402: ("insufficient_balance", "billing_error"),
    403: ("permission_error", "permission_error"),
    404: ("invalid_request_error", "not_found_error"),
    405: ("invalid_request_error", "invalid_request_error"),
    408: ("timeout_error", "timeout_error"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_error"),
    500: ("server_error", "api_error"),
    503: ("overloaded_error", "overloaded_error"),
}
_CODES = {
    400: "invalid_request_error",
    401: "invalid_api_key",
    402: "insufficient_balance",
    403: "permission_denied",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
    500: "server_error",
    503: "overloaded",
}


@dataclass(eq=False)
class Refusal(Exception):
    """What a client is told instead of an answer.

    param          the field of the request that is at fault
    retry_after_s  when the same request may succeed
    """

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry_after_s: int | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    def body(self, api: Api, request_id: str) -> dict[str, Any]:
        """The error as this API writes it."""
        openai, anthropic = _TYPES.get(self.status, _TYPES[500 if self.status >= 500 else 400])
        if api == "messages":
            inner = {"type": anthropic, "message": self.message}
            return {"type": "error", "error": inner, "request_id": request_id}
        code = self.code or _CODES.get(self.status, openai)
        return {
            "error": {"message": self.message, "type": openai, "param": self.param, "code": code}
        }

    def all_headers(self) -> dict[str, str]:
        """Those of the response, besides its type."""
        extra = dict(self.headers)
        if self.retry_after_s is not None:
            extra["retry-after"] = str(self.retry_after_s)
        if self.status == 500:
            extra["x-should-retry"] = "false"
        return extra


def refusal_of(error: BaseException) -> Refusal:
    """Any error as a Refusal. What nobody foresaw is logged here and told to nobody."""
    match error:
        case Refusal():
            return error
        case AuthError():
            return Refusal(401, _text(error), headers={"www-authenticate": "Bearer"})
        case AccessError():
            return Refusal(403, _text(error))
        case QuotaError():
            return Refusal(402, _text(error))
        case RateError():
            return Refusal(429, _text(error), retry_after_s=error.retry_after_s)
        case LedgerError():
            log.error("the ledger cannot be used: %s", error.message)
            return Refusal(503, "the ledger cannot be used", "ledger_unavailable", retry_after_s=5)
        case CapacityError():
            return Refusal(400, _text(error), "context_length_exceeded")
        case RequestError() | DialectError():
            return Refusal(400, _text(error))
        case ConversionError():
            return Refusal(400, _message_of(error))
        case OverleapError():
            log.error("a request failed: %s", error.message)
            return Refusal(500, "the model could not answer", "model_error")
    log.error("an error of the server itself", exc_info=error)
    return Refusal(500, "an error of the server; its log has it")


def _text(error: OverleapError) -> str:
    return error.message if error.hint is None else f"{error.message} ({error.hint})"


def _message_of(error: ConversionError) -> str:
    try:
        return str(json.loads(error.body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return str(error)


def overloaded(why: str, retry_after_s: float) -> Refusal:
    """No room for this request now."""
    return Refusal(503, why, retry_after_s=max(1, min(120, round(retry_after_s))))
