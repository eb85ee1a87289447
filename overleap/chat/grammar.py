"""What an answer must look like -> which tokens may come next, over llguidance.

A grammar covers the whole generated text: free reasoning up to its end token, then JSON of a
schema, a regular expression, or tool calls in the checkpoint's markup. Compiling may take long and
belongs into a thread; stepping is microseconds. Not here: rendering the request for it
(dialects.py). Read next: engine/request.py (`Constraint`, which this is without knowing it).
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from overleap.chat.tokenizer import DSML, END_THINK, Tokenizer
from overleap.errors import DialectError, RequestError

MAX_BYTES = 64 * 2**10  # of a schema, a pattern or all tool schemas
MAX_SHARED_BYTES = 4 * 2**20  # of definitions, written out for each parameter of a tool
KEPT = 256  # compiled grammars
_TEXT = "/(?s:.)*/"  # any text; special tokens are none
# A string parameter and the "</" of its closing tag. The library's lexer does not go back, so what
# begins with "<" is taken together, and the tag's own token shows what it was. "</｜" is only that.
_VALUE = "(/[^<]+/ | /<[<\\/]*[^<\\/｜]/ | /<+｜/)* /<([<\\/]*<)?\\//"
# In a parameter's schema: the name of that of all parameters, and where what they share is.
_ROOT, _SHARED = "all-parameters", ("#/$defs/", "#/definitions/")
# Of one step: what these forbid ends one answer with an error and lets the others go on.
_ITEMS, _FUEL, _STATES = 2000, 200_000, 50_000
# As the checkpoints' training data writes JSON, and no endless runs of blanks.
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Wanted:
    """What an answer must look like.

    kind       of `source`
    source     a JSON schema, a pattern, or the tools of Chat Completions as JSON
    reasoning  free reasoning comes first
    tools      the answer may be tool calls instead (kind json or regex); JSON, "" for none
    several    of tool calls; else one
    """

    kind: Literal["json", "regex", "tools"]
    source: str
    reasoning: bool = False
    tools: str = ""
    several: bool = True


class Grammars:
    """Compiles for one tokenizer, and keeps what it compiled. Threads may share it.

    vocab_size  ids of the model, where it has more than the tokenizer knows

    Making it takes 1.6 s for 129,280 tokens, and no other thread runs meanwhile: done when a server
    is put together, so that no request has to wait for it.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int | None = None) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size or tokenizer.vocab_size
        self._table = _table(tokenizer)
        self._kept: OrderedDict[Wanted, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, wanted: Wanted) -> "Grammar":
        """Raises DialectError with the library's sentence for what it cannot hold."""
        size = len(wanted.source.encode("utf-8", "replace")) + len(wanted.tools)
        if size > MAX_BYTES:
            raise DialectError(f"a grammar of {size} bytes is too large, {MAX_BYTES} are the most")
        with self._lock:
            if wanted in self._kept:
                self._kept.move_to_end(wanted)
                return self._kept[wanted]
        limits = LLParserLimits(
            max_items_in_row=_ITEMS, step_lexer_fuel=_FUEL, max_lexer_states=_STATES
        )
        matcher = LLMatcher(self._table, self._lark(wanted), log_level=0, limits=limits)
        if matcher.is_error():
            raise DialectError(f"the format cannot be held: {_first_line(matcher.get_error())}")
        grammar = Grammar(matcher, self._tokenizer.eos_id, self._vocab_size)
        with self._lock:
            self._kept[wanted] = grammar
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return grammar

    def _lark(self, wanted: Wanted) -> str:
        rules = []
        match wanted.kind:
            case "json":
                schema = _schema(wanted.source)
                rules.append(f"answer: %json {json.dumps(schema)}")
            case "regex":
                rules.append(f"answer: {_literal(wanted.source)}")
            case "tools":
                rules += self._tool_rules(json.loads(wanted.source), "answer", wanted.several)
        body = "answer"
        if wanted.tools:
            rules += self._tool_rules(json.loads(wanted.tools), "calls", wanted.several)
            body = f'(answer | "\\n\\n<" {self._special(DSML)} "tool_calls>\\n" calls)'
        if wanted.reasoning:
            body = f"{_TEXT} {self._special(END_THINK)} {body}"
        return "\n".join([f"start: {body}", *rules])

    def _tool_rules(
        self, tools: Sequence[Mapping[str, Any]], name: str, several: bool
    ) -> list[str]:
        """Calls of these tools, from the first `invoke` to the end of the block."""
        dsml = self._special(DSML)
        rules, calls = [], []
        for number, tool in enumerate(tools):
            function = tool["function"]
            call = f"{name}_{number}"
            calls.append(call)
            opening = _quoted(f"invoke name={json.dumps(function['name'], ensure_ascii=False)}>\n")
            parameters, more = _parameters(function.get("parameters"), call, dsml)
            rules.append(f'{call}: "<" {dsml} {opening} {parameters} "</" {dsml} "invoke>\\n"')
            rules += more
        one = " | ".join(calls)
        return [f'{name}: ({one}){"+" if several else ""} "</" {dsml} "tool_calls>"', *rules]

    def _special(self, token: str) -> str:
        return f"<[{self._tokenizer.id_of(token)}]>"


@dataclass(frozen=True)
class Grammar:
    """A compiled grammar. Holds no state of an answer (engine/request.py, `Constraint`)."""

    matcher: LLMatcher
    eos_id: int
    vocab_size: int

    def start(self) -> "GrammarWalk":
        """One answer from its beginning."""
        return GrammarWalk(self.matcher.deep_copy(), self.eos_id, self.vocab_size)


class GrammarWalk:
    """One answer on its way (engine/request.py, `Walk`)."""

    def __init__(self, matcher: LLMatcher, eos_id: int, vocab_size: int) -> None:
        self._matcher, self._eos_id, self._vocab_size = matcher, eos_id, vocab_size

    def allowed(self) -> bytes:
        """A bit for each token that may come next; the end of sequence once all is said."""
        size = -(-self._vocab_size // 8)
        if self._matcher.is_stopped() and not self._matcher.is_error():
            only = bytearray(size)
            only[self._eos_id // 8] = 1 << self._eos_id % 8
            return bytes(only)
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise RequestError(
                f"the format cannot be held: {_first_line(self._matcher.get_error())}",
                "a simpler schema or pattern will do",
            )
        return bytes(mask[:size]).ljust(size, b"\0")

    def accept(self, token: int) -> None:
        """This token was chosen."""
        self._matcher.consume_token(token)


class _Vocabulary:
    """A tokenizer as the library wants to see it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.special_token_ids = sorted(tokenizer.special_ids)
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace"))


def _table(tokenizer: Tokenizer) -> LLTokenizer:
    wrapped = TokenizerWrapper(_Vocabulary(tokenizer))
    return LLTokenizer(wrapped, n_vocab=tokenizer.vocab_size)


def _schema(source: str) -> dict[str, Any]:
    schema = json.loads(source) if source else {"type": "object"}
    if not isinstance(schema, dict):
        raise DialectError(f"the JSON schema is a {type(schema).__name__}, expected an object")
    return schema | {"x-guidance": _COMPACT}


def _parameters(schema: Any, call: str, dsml: str) -> tuple[str, list[str]]:
    """The rule body for a call's parameters, in the order of the schema, and further rules."""
    known = schema.get("properties") if isinstance(schema, Mapping) else None
    if not isinstance(known, Mapping) or not known:
        anything = f"{call}_any"
        name = '"parameter name=\\"" /[A-Za-z0-9_.-]+/'
        text = f'"\\" string=\\"true\\">" {_VALUE}'
        value = '"\\" string=\\"false\\">" %json {} "</"'
        closing = f'{dsml} "parameter>\\n"'
        rule = f'{anything}: "<" {dsml} {name} ({text} | {value}) {closing}'
        return f"{anything}*", [rule]
    required = schema.get("required")
    must = set(required) if isinstance(required, list) else set()
    moved = _moved(schema)
    shared = {key: moved[key] for key in ("$defs", "definitions") if key in schema}
    if moved != schema:
        defined = shared.get("$defs")
        shared["$defs"] = {**(defined if isinstance(defined, dict) else {}), _ROOT: moved}
    size = len(known) * len(json.dumps(shared))
    if size > MAX_SHARED_BYTES:
        raise DialectError(
            f"what the {len(known)} parameters of a tool refer to takes {size} bytes in all, "
            f"{MAX_SHARED_BYTES} are the most"
        )
    parts, rules = [], []
    for number, (name, inner) in enumerate(moved["properties"].items()):
        rule = f"{call}_{number}"
        parts.append(rule if name in must else f"{rule}?")
        rules.append(f"{rule}: {_parameter(name, inner, shared, dsml)}")
    return " ".join(parts), rules


def _moved(schema: Any) -> Any:
    """The schema of all parameters, its references to itself as they are from each one's schema."""
    if isinstance(schema, list):
        return [_moved(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {key: _moved(value) for key, value in schema.items()}
    to = moved.get("$ref")
    if isinstance(to, str) and to.startswith("#") and not to.startswith(_SHARED):
        moved["$ref"] = f"#/$defs/{_ROOT}{to[1:]}"
    return moved


def _parameter(name: str, schema: Any, shared: Mapping[str, Any], dsml: str) -> str:
    inner = schema if isinstance(schema, Mapping) else {}
    choices = inner.get("enum")
    string = inner.get("type") == "string"
    if string and isinstance(choices, list) and choices:
        value = " | ".join(_quoted(str(choice)) for choice in choices)
        value = f'({value}) "</"'
    elif string:
        value = _VALUE
    else:
        value = f'%json {json.dumps({**inner, **shared, "x-guidance": _COMPACT})} "</"'
    shown = json.dumps(name, ensure_ascii=False)
    opening = f'parameter name={shown} string="{"true" if string else "false"}">'
    return f'"<" {dsml} {_quoted(opening)} {value} {dsml} "parameter>\\n"'


def _quoted(text: str) -> str:
    """A string of the grammar language, which reads JSON's escapes."""
    return json.dumps(text, ensure_ascii=False)


def _literal(pattern: str) -> str:
    """A pattern of the grammar language: slashes and line ends escaped, once."""
    shown, escaped = [], False
    for character in pattern:
        if character == "/" and not escaped:
            shown.append("\\/")
        elif character == "\n":
            shown.append("n" if escaped else "\\n")
        else:
            shown.append(character)
        escaped = character == "\\" and not escaped
    if not pattern or escaped:
        raise DialectError(f"the pattern {pattern!r} is empty or ends in a lone backslash")
    return f"/{''.join(shown)}/"


def _first_line(message: str) -> str:
    return message.strip().splitlines()[0][:300] if message.strip() else "it is too complex"
