"""A request of a chat API made ready for the engine: checked, rendered, encoded, constrained.

Everything here may take long and runs in a thread. Not here: who may ask (access.py), what becomes
of it (running.py, writers.py). Read next: running.py.
"""

import asyncio
import json
import math
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import deepseek_recipe as recipe
from pydantic import ValidationError
from pydantic_core import from_json

from overleap.chat.dialects import Api, Prompt, answer_format, render_body, wants_any_tool
from overleap.chat.grammar import Grammar, Grammars, Wanted
from overleap.chat.profiles import Profile
from overleap.chat.replay import Replay
from overleap.chat.tokenizer import Tokenizer
from overleap.engine.request import Sampling
from overleap.errors import DialectError, RequestError
from overleap.server.auth import Customer
from overleap.server.isolation import Isolation, Realm
from overleap.server.limits import Limits
from overleap.server.refusals import Refusal
from overleap.server.schema import Body, ChatBody, MessagesBody, ResponsesBody
from overleap.server.settings import Settings

_Result = TypeVar("_Result")
COMPILE_S = 2.0
# Of a Responses request; what Messages calls metadata is never shown.
_REPEATED = (
    "metadata", "truncation", "max_tool_calls", "prompt_cache_key", "safety_identifier",
)  # fmt: skip
_BODIES: dict[Api, type[Body]] = {
    "chat": ChatBody,
    "responses": ResponsesBody,
    "messages": MessagesBody,
}
_PREFIXES = {"chat": "chatcmpl-", "responses": "resp_", "messages": "msg_"}
# The library answers these itself, or in a way that clients do not expect.
_OWN = (
    "n", "seed", "logprobs", "top_logprobs", "max_completion_tokens", "temperature", "top_p",
    "frequency_penalty", "presence_penalty", "logit_bias",
)  # fmt: skip
_LIBRARY_TOKENS = 393_216  # its own bound on a request's max_tokens


@dataclass(frozen=True)
class Model:
    """What the text side knows of the model.

    context_tokens  of a request: what the model has positions for and the cache has pages for
    created         seconds since 1970; fingerprint: names weights and engine
    vocab_size      ids of the model, where it has more than the tokenizer knows
    """

    tokenizer: Tokenizer
    profile: Profile
    context_tokens: int
    created: int
    fingerprint: str
    vocab_size: int | None = None


@dataclass(frozen=True)
class Turn:
    """A request, ready for the engine.

    read      the library's request: makes the event streams of its API
    echo      what a Responses answer repeats of its request; repeated: and the library leaves out
    realm     whose cache it may share
    n         answers wanted
    progress  tell how far the prompt is read; choices: what the indexer chose at the end
    branches  prompt lengths after which later prompts may go on differently
    bounded   the client said how long the answer may be
    """

    api: Api
    id: str
    model: str
    created: int
    prompt: Prompt
    read: recipe.ConversationRequest
    ids: tuple[int, ...]
    realm: Realm
    sampling: Sampling
    n: int
    stream: bool
    include_usage: bool
    progress: bool
    choices: bool
    branches: tuple[int, ...] = ()
    bounded: bool = True
    echo: recipe.ResponsesEcho | None = None
    repeated: Mapping[str, Any] = field(default_factory=dict)
    grammar: Grammar | None = None


def parsed(kind: type[Any], raw: bytes) -> tuple[Any, dict[str, Any]]:
    """A body, checked against its schema, and the same as plain values. Raises Refusal (400)."""
    try:
        value = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Refusal(400, f"the body is a {type(value).__name__}, expected an object")
    try:
        return kind.model_validate(value, strict=True), value
    except ValidationError as error:
        raise _invalid(error) from None


def _invalid(error: ValidationError) -> Refusal:
    """The first complaint; of alternatives, the one that got furthest."""
    found = max(error.errors(include_url=False), key=lambda one: len(one["loc"]))
    place = ".".join(str(part) for part in found["loc"] if not _is_branch(part))
    return Refusal(400, f"{place}: {found['msg']}" if place else found["msg"], param=place or None)


def _is_branch(part: Any) -> bool:
    """Whether a part of a location names an alternative of a type and no field."""
    return isinstance(part, str) and ("[" in part or part in ("str", "literal"))


class Turns:
    """Makes requests ready."""

    def __init__(self, model: Model, settings: Settings, isolation: Isolation) -> None:
        self.model, self.settings, self.isolation = model, settings, isolation
        self.replay = Replay(model.tokenizer)
        self._grammars = Grammars(model.tokenizer, model.vocab_size)
        # Two threads: a grammar that takes forever keeps one, and the next is refused in time.
        self._compilers = ThreadPoolExecutor(2, thread_name_prefix="grammar")
        # Long texts wait for each other, and nothing else for them.
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="text")
        self._limits = Limits()
        tokenizer = model.tokenizer
        self._token_bytes = max(map(len, map(tokenizer.token_bytes, range(tokenizer.vocab_size))))

    async def aside(self, work: Callable[..., _Result], *arguments: Any) -> _Result:
        """Do what takes a text's length in a thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, work, *arguments)

    async def read(
        self,
        customer: Customer,
        running: int | None,
        work: Callable[..., _Result],
        *arguments: Any,
    ) -> _Result:
        """As `aside`, in the customer's turn. running: as `Limits.reading` is told.

        Raises RateError before anything is read, and what the work raises.
        """
        async with self._limits.reading(customer, running):
            return await self.aside(work, *arguments)

    async def prepare(self, api: Api, raw: bytes, customer: Customer, running: int) -> Turn:
        """Read a body. Raises Refusal, RateError, RequestError, DialectError."""
        turn, wanted = await self.read(customer, running, self._prepare, api, raw, customer)
        return turn if wanted is None else replace(turn, grammar=await self.compile(wanted))

    async def compile(self, wanted: Wanted) -> Grammar:
        """Compile a grammar beside everything else, for as long as that may take."""
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._compilers, self._grammars.compile, wanted)
        try:
            return await asyncio.wait_for(work, COMPILE_S)
        except TimeoutError:
            raise Refusal(
                400,
                f"the format took more than {COMPILE_S:.0f} s to compile",
                "grammar_too_complex",
            ) from None

    def check_model(self, name: str) -> None:
        """Raises Refusal (404) for a model that is not served here."""
        if name not in self.settings.names:
            served = ", ".join(self.settings.names)
            raise Refusal(
                404,
                f"the model {name!r} is not served here; it is {served}",
                "model_not_found",
                "model",
            )

    def context_of(self, customer: Customer) -> int:
        """Tokens of a request at most."""
        tier = customer.tier.context_tokens
        return self.model.context_tokens if tier is None else min(tier, self.model.context_tokens)

    def check_size(self, text: str, customer: Customer, param: str) -> None:
        """Raises Refusal (400) for a text that is too long whatever its tokens are.

        Cheap beside finding them: a token is no longer than the longest of the vocabulary.
        """
        context, size = self.context_of(customer), len(text.encode("utf-8", "surrogatepass"))
        if size > context * self._token_bytes:
            raise Refusal(
                400,
                f"the prompt has {size} bytes and so at least {-(-size // self._token_bytes)} "
                f"tokens, the context is {context}",
                "context_length_exceeded",
                param,
            )

    def render(
        self, api: Api, value: Mapping[str, Any]
    ) -> tuple[Prompt, recipe.ConversationRequest]:
        """The prompt of a body. Raises DialectError."""
        body = {key: item for key, item in value.items() if key not in _OWN}
        if api == "chat" and value.get("max_completion_tokens") is not None:
            body["max_tokens"] = value["max_completion_tokens"]
        for key in ("max_tokens", "max_output_tokens"):
            if isinstance(body.get(key), int):
                body[key] = min(body[key], _LIBRARY_TOKENS)
        return render_body(api, body, profile=self.model.profile)

    def _prepare(self, api: Api, raw: bytes, customer: Customer) -> tuple[Turn, Wanted | None]:
        body, value = parsed(_BODIES[api], raw)
        self.check_model(body.model)
        prompt, read = self.render(api, value)
        self.check_size(prompt.text, customer, "messages")
        user_id = user_id_of(value)
        tenant = self.isolation.salt(customer, user_id)
        ids = self.replay.encode(prompt, read.conversation.messages, tenant)
        # From here on only what this API has, so only what was checked.
        value = {name: item for name, item in value.items() if name in type(body).model_fields}
        echo = recipe.ResponsesRequest(value).echo() if api == "responses" else None
        asked = next(
            (value[k] for k in ("max_completion_tokens", "max_output_tokens", "max_tokens")
             if value.get(k) is not None),
            None,
        )  # fmt: skip
        turn = Turn(
            api=api,
            id=_PREFIXES[api] + uuid.uuid4().hex,
            model=body.model,
            created=int(time.time()),
            prompt=prompt,
            read=read,
            ids=tuple(ids),
            realm=self.isolation.realm(customer, ids, user_id),
            sampling=sampling_of(value, self.max_tokens(len(ids), asked, read, customer)),
            n=value.get("n") or 1,
            stream=bool(value.get("stream")),
            include_usage=bool((value.get("stream_options") or {}).get("include_usage")),
            progress=bool(value.get("return_progress")),
            choices=bool(value.get("return_choices")),
            branches=self._branches(prompt, ids),
            bounded=asked is not None,
            echo=echo,
            repeated={name: value[name] for name in _REPEATED if value.get(name) is not None},
        )
        return turn, _wanted(api, read, prompt, value)

    def max_tokens(
        self, prompt_tokens: int, asked: int | None, read: Any, customer: Customer
    ) -> int:
        """Tokens of the answer. Raises Refusal where prompt and answer are too long together."""
        context = self.context_of(customer)
        left = context - prompt_tokens
        if left < 1 or (asked is not None and asked > left):
            more = "" if asked is None else f" and {asked} for the answer"
            raise Refusal(
                400,
                f"the prompt has {prompt_tokens} tokens{more}, the context is {context}",
                "context_length_exceeded",
                "messages",
            )
        if asked is not None:
            return asked
        return int(read.resolve_max_tokens(prompt_tokens, context)) if read else min(16, left)

    def _branches(self, prompt: Prompt, ids: list[int]) -> tuple[int, ...]:
        """Where the last message begins: what stands before it is likely to come again."""
        user = next((i for i in range(len(ids) - 1, -1, -1) if ids[i] == self._user), 0)
        return (user,) if user else ()

    @property
    def _user(self) -> int:
        return self.model.tokenizer.id_of("<｜User｜>")


def sampling_of(value: Mapping[str, Any], max_tokens: int) -> Sampling:
    """How to sample, from the fields that both completions share. Raises RequestError."""

    def given(name: str, otherwise: Any) -> Any:
        found = value.get(name)
        return otherwise if found is None else found

    logprobs = value.get("top_logprobs") or 0 if value.get("logprobs") is True else None
    if logprobs is None and value.get("top_logprobs"):
        raise RequestError("top_logprobs is given and logprobs is not true")
    top_k = given("top_k", 0)
    seed = value.get("seed")
    temperature = float(given("temperature", 1.0))
    if not math.isfinite(temperature):
        raise RequestError("temperature is not a number")
    return Sampling(
        temperature=temperature,
        top_p=float(given("top_p", 1.0)),
        top_k=top_k if top_k > 0 else None,
        min_p=float(given("min_p", 0.0)),
        seed=seed,
        logprobs=logprobs,
        max_tokens=max_tokens,
        frequency_penalty=float(given("frequency_penalty", 0.0)),
        presence_penalty=float(given("presence_penalty", 0.0)),
        logit_bias=tuple((int(token), value) for token, value in given("logit_bias", {}).items()),
    )


def _wanted(
    api: Api, read: recipe.ConversationRequest, prompt: Prompt, value: Mapping[str, Any]
) -> Wanted | None:
    """The grammar of an answer, None where anything goes."""
    constraint = read.inference_options.output_constraint
    if wants_any_tool(api, value):
        every = [_definition(tool) for tool in read.conversation.tools]
        kind, source = "tool_call_required", json.dumps(every)
    elif constraint is None or constraint.kind == "tool_call":
        # Beside tools that may be called, the library names no format; nor that of Messages.
        kind, source = _held(answer_format(api, read.conversation, value))
    else:
        kind, source = constraint.kind, constraint.schema
    if not kind:
        return None
    reasoning = prompt.reply.begins in ("reasoning", "reasoning continued")
    if prompt.reply.begins == "content continued":
        raise DialectError("a format cannot be held in an answer that is only continued")
    several = _may_call_several(value)
    if kind == "tool_call_required":
        name = _named_tool(value.get("tool_choice"))
        chosen = [tool for tool in json.loads(source) if name in (None, tool["function"]["name"])]
        if not chosen:
            raise DialectError(f"tool_choice names {name!r}, which is not among the tools")
        return Wanted("tools", json.dumps(chosen), several=several)
    tools = ""
    if prompt.reply.tools:
        tools = json.dumps([_definition(tool) for tool in read.conversation.tools])
    return Wanted("regex" if kind == "regex" else "json", source, reasoning, tools, several)


def _held(format: Mapping[str, Any]) -> tuple[str, str]:
    """The kind of grammar that holds a format, and its source; "" for none."""
    match format:
        case {"response_schema": schema}:
            return "json", json.dumps(schema)
        case {"response_regex": str(pattern)}:
            return "regex", pattern
        case {"response_format": _}:
            return "json", ""
    return "", ""


def _definition(tool: recipe.ToolDefinition) -> dict[str, Any]:
    return {"function": {"name": tool.name, "parameters": tool.parameters}}


def _named_tool(choice: Any) -> str | None:
    """The tool that a choice names, in any API's way."""
    match choice:
        case {"function": {"name": str(name)}} | {"name": str(name)}:
            return name
    return None


def _may_call_several(value: Mapping[str, Any]) -> bool:
    """What any of the APIs says of several tool calls in one answer."""
    choice = value.get("tool_choice")
    alone = isinstance(choice, Mapping) and choice.get("disable_parallel_tool_use") is True
    return not alone and value.get("parallel_tool_calls") is not False


def user_id_of(value: Mapping[str, Any]) -> str:
    """The customer's own user, as any of the APIs names it; it divides the customer's cache."""
    metadata = value.get("metadata")
    inner = metadata.get("user_id") if isinstance(metadata, Mapping) else None
    for found in (value.get("user_id"), value.get("user"), inner):
        if isinstance(found, str):
            return found[:512]
    return ""
