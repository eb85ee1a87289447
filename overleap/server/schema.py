"""Bodies of requests: which fields there are, how large each may be, and which are refused.

The meaning is the vendor's (chat/dialects.py); this holds the caps, and what the API documents.
Read next: turns.py, completions.py.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

MAX_MESSAGES, MAX_TOOLS, MAX_STOPS, MAX_N, MAX_PROMPTS = 10_000, 256, 16, 16, 64
MAX_TOP_LOGPROBS, MAX_BIASED = 20, 1024
MAX_TOKENS = 2**24  # of any count of tokens: above every context
MAX_SCHEMA_BYTES = 64 * 2**10
SEED_LIMIT = 2**63

Object = dict[str, Any]
Temperature = Annotated[float, Field(ge=0, le=2)]
Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Seed = Annotated[int, Field(ge=-SEED_LIMIT, lt=SEED_LIMIT)]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]
Stops = Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
User = Annotated[str, Field(max_length=512)]
MetadataKey = Annotated[str, Field(max_length=64)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
BiasedId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Text = Annotated[str, Field(max_length=32 * 2**20)]
Ids = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS, fail_fast=True)]
Blocks = Annotated[list[Object], Field(max_length=MAX_MESSAGES, fail_fast=True)]
Messages = Annotated[list[Object], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
Tools = Annotated[list[Object], Field(max_length=MAX_TOOLS, fail_fast=True)]


def _at_most(most: int) -> tuple[BeforeValidator, Any]:
    """How many fields an object may have: checked before they are, for each would be complained of.

    Lists are read with `fail_fast` for the same reason: a body of millions of faults has one.
    """

    def checked(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise PydanticCustomError(
                "too_long",
                "{count} fields, {most} are the most",
                {"count": len(value), "most": most},
            )
        return value

    return BeforeValidator(checked), Field(max_length=most)


def _only(why: str) -> WrapValidator:
    """Refuse, with this sentence, what a field's type does not let through.

    For fields of other servers that would change an answer and mean nothing here: their type is
    what makes no difference, null among it.
    """

    def checked(value: Any, inner: ValidatorFunctionWrapHandler) -> Any:
        try:
            return inner(value)
        except ValidationError:
            raise PydanticCustomError("not_offered", why) from None

    return WrapValidator(checked)


_FORMAT = _only("a format is asked for with response_format (json_schema or regex)")
_TOOLS = _only("functions are given in tools, and chosen with tool_choice")
_TEXT = _only("this model answers in text only")
_STORED = _only("nothing is stored here: give the whole conversation in input")


class Body(BaseModel):
    """A request. Unknown fields are let through: clients send many that change nothing here."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: Name


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")

    include_usage: bool | None = None


class Sampled(Body):
    """What both completions share."""

    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**20)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    seed: Seed | None = None
    stop: Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[BiasedId, Bias], *_at_most(MAX_BIASED)] | None = None
    user: User | None = None
    return_progress: bool | None = None
    structured_outputs: Annotated[None, _FORMAT] = None
    guided_json: Annotated[None, _FORMAT] = None
    guided_regex: Annotated[None, _FORMAT] = None
    guided_choice: Annotated[None, _FORMAT] = None
    guided_grammar: Annotated[None, _FORMAT] = None
    repetition_penalty: Annotated[
        Annotated[float, Field(ge=1, le=1)] | None,
        _only("repetition is made rarer with frequency_penalty and presence_penalty"),
    ] = None


class Thinking(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: Literal["enabled", "disabled", "adaptive"]


class ChatBody(Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[
        list[Object],
        Field(
            min_length=1,
            max_length=MAX_MESSAGES,
            examples=[[{"role": "user", "content": "What is the color of Alice?"}]],
        ),
    ]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Tools | None = None
    tool_choice: Literal["auto", "none", "required"] | Object | None = None
    parallel_tool_calls: bool | None = None
    response_format: Object | None = None
    reasoning_effort: Annotated[str, Field(max_length=16)] | None = None
    thinking: Thinking | None = None
    return_choices: bool | None = None
    chat_template: Annotated[None, _only("the model's own chat format is used, and no other")] = (
        None
    )
    chat_template_kwargs: Annotated[
        Annotated[Object, Field(max_length=0)] | None,
        _only('the chat format takes no arguments; thinking is set with thinking: {"type": ...}'),
    ] = None
    functions: Annotated[
        Annotated[list[Object], Field(max_length=0, fail_fast=True)] | None, _TOOLS
    ] = None
    function_call: Annotated[Literal["auto", "none"] | None, _TOOLS] = None
    modalities: Annotated[
        Annotated[list[Literal["text"]], Field(max_length=8, fail_fast=True)] | None, _TEXT
    ] = None
    audio: Annotated[None, _TEXT] = None


class CompletionBody(Sampled):
    """POST /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    suffix: Text | None = None
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    response_format: Object | None = None


class ResponsesBody(Body):
    """POST /v1/responses. Nothing is stored, whatever `store` says."""

    input: Text | Messages
    instructions: Text | None = None
    max_output_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    stream: bool | None = None
    tools: Tools | None = None
    tool_choice: Literal["auto", "none", "required"] | Object | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Object | None = None
    text: Object | None = None
    user: User | None = None
    store: bool | None = None
    metadata: Annotated[dict[MetadataKey, User], *_at_most(16)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    max_tool_calls: Annotated[int, Field(ge=1, le=2**20)] | None = None
    prompt_cache_key: User | None = None
    safety_identifier: User | None = None
    previous_response_id: Annotated[None, _STORED] = None
    conversation: Annotated[None, _STORED] = None
    prompt: Annotated[None, _only("no prompts are stored here: give the text in input")] = None
    background: Annotated[
        Literal[False] | None,
        _only("nothing runs in the background here: wait for the answer, or have it streamed"),
    ] = None


class MessagesBody(Body):
    """POST /v1/messages."""

    max_tokens: Count
    messages: Messages
    system: Text | Blocks | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=0, le=2**20)] | None = None
    stop_sequences: Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stream: bool | None = None
    tools: Tools | None = None
    tool_choice: Object | None = None
    thinking: Object | None = None
    output_config: Object | None = None
    output_format: Object | None = None
    metadata: Object | None = None


class CountBody(Body):
    """POST /v1/messages/count_tokens."""

    messages: Messages
    system: Text | Blocks | None = None
    tools: Tools | None = None
    tool_choice: Object | None = None
    thinking: Object | None = None


class TokenizeBody(BaseModel):
    """POST /tokenize: a text, or the messages of a chat with what else its prompt is made of."""

    model_config = ConfigDict(extra="allow")

    model: Name | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    tool_choice: Literal["auto", "none", "required"] | Object | None = None
    response_format: Object | None = None
    reasoning_effort: Annotated[str, Field(max_length=16)] | None = None
    thinking: Thinking | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeBody(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(extra="allow")

    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS, fail_fast=True)]


class ErrorBody(BaseModel):
    """An error, as OpenAI's API writes it."""

    class Inner(BaseModel):
        message: str
        type: str
        param: str | None = None
        code: str | None = None

    error: Inner


class MessagesErrorBody(BaseModel):
    """An error, as Anthropic's API writes it."""

    class Inner(BaseModel):
        type: str
        message: str

    type: Literal["error"]
    error: Inner
    request_id: str | None = None


class Answer(BaseModel):
    """An answer: the fields every client reads; the dialect has more."""

    model_config = ConfigDict(extra="allow")


class ChatAnswer(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Object]
    usage: Object


class CompletionAnswer(Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Object]
    usage: Object


class ResponsesAnswer(Answer):
    id: str
    object: Literal["response"]
    status: str
    output: list[Object]
    usage: Object | None


class MessagesAnswer(Answer):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    content: list[Object]
    usage: Object


class CountAnswer(BaseModel):
    input_tokens: int


class TokenizeAnswer(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class DetokenizeAnswer(BaseModel):
    prompt: str


class ModelCard(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    context_length: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]
