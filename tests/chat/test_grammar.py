"""What a grammar lets through: token by token, in the tokenizer's own words."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from overleap.chat.grammar import MAX_BYTES, Grammar, Grammars, Wanted
from overleap.chat.tokenizer import Tokenizer
from overleap.errors import DialectError

TOKENIZER = Tokenizer.from_folder(Path(__file__).parents[2] / "overleap" / "bundled" / "mini")
GRAMMARS = Grammars(TOKENIZER)


def held(grammar: Grammar, text: str) -> str:
    """As much of a text as a grammar lets through; all of it, ended, is shown by a full stop."""
    walk, said = grammar.start(), b""
    for token in [*TOKENIZER.encode(text, special=True), TOKENIZER.eos_id]:
        mask = walk.allowed()
        if not mask[token // 8] >> token % 8 & 1:
            return said.decode()
        if token == TOKENIZER.eos_id:
            return said.decode() + "."
        walk.accept(token)
        said += TOKENIZER.token_bytes(token)
    raise AssertionError


def compiled(kind: Any, source: Any, **more: Any) -> Grammar:
    text = source if isinstance(source, str) else json.dumps(source)
    return GRAMMARS.compile(Wanted(kind, text, **more))


def tool(parameters: Any, name: str = "find") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def call(name: str, *parameters: tuple[str, bool, str]) -> str:
    inner = "".join(
        f'<｜DSML｜parameter name="{key}" string="{str(string).lower()}">{value}'
        "</｜DSML｜parameter>\n"
        for key, string, value in parameters
    )
    return f'<｜DSML｜invoke name="{name}">\n{inner}</｜DSML｜invoke>\n'


END = "</｜DSML｜tool_calls>"


def test_json_of_a_schema_and_nothing_beside_it() -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    grammar = compiled("json", schema)
    right = '{"name": "Ada", "age": 36}'
    assert held(grammar, right) == right + "."
    assert held(grammar, '{"name": "Ada", "age": "old"}') == '{"name": "Ada", "age":'
    assert not held(grammar, '{"name": "Ada"}').endswith(".")
    assert held(grammar, "Sure: {}") == ""
    assert held(compiled("json", ""), '{"any": [1, null]}') == '{"any": [1, null]}.'


def test_a_pattern_with_slashes_and_line_ends() -> None:
    grammar = compiled("regex", r"[0-9]{2}/[0-9]{2}" + "\n" + r"a\/b")
    assert held(grammar, "12/34\na/b") == "12/34\na/b."
    assert held(grammar, "12-34") == "12"


@pytest.mark.parametrize(
    "value",
    [
        *("San Francisco", "", "a < b", "<b>bold", "<<x", "two\nlines", "a<b<c>", "日本 <3 ok"),
        *("<b>hi</b>", "x </ y", "<</b>", "a</b></c>", "</", "<", "a/", "</<b", "<//x", "<｜x"),
    ],
)
def test_a_text_in_a_call_ends_with_its_tag(value: str) -> None:
    """The tokenizer writes the closing tag's "</" as one token, whatever stands before it."""
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    for parameters in (schema, {"type": "object"}):
        text = call("find", ("city", True, value)) + END
        grammar = compiled("tools", [tool(parameters)])
        assert held(grammar, text) == TOKENIZER.decode(
            TOKENIZER.encode(text, special=True), control=True
        ) + "."  # fmt: skip


def test_calls_name_known_tools_and_give_what_is_required() -> None:
    schema = {
        "type": "object",
        "properties": {
            "unit": {"type": "string", "enum": ["C", "F"]},
            "days": {"type": "integer"},
            "note": {"type": "string"},
        },
        "required": ["unit", "days"],
    }
    grammar = compiled("tools", [tool(schema, "weather"), tool({"type": "object"}, "time")])
    whole = call("weather", ("unit", True, "C"), ("days", False, "3")) + call("time") + END
    assert held(grammar, whole).endswith(f"{END}.")
    assert held(grammar, call("other")).endswith('invoke name="')
    assert not held(grammar, call("weather", ("unit", True, "K"))).endswith("K")
    missing = held(grammar, call("weather", ("unit", True, "C")) + END)
    assert "invoke>" not in missing
    assert held(grammar, END) == "", "no call at all is none"


def test_one_call_where_one_is_wanted() -> None:
    once = compiled("tools", [tool({"type": "object"})], several=False)
    more = compiled("tools", [tool({"type": "object"})])
    two = call("find") + call("find")
    assert held(more, two).startswith(two)
    assert held(once, call("find")).startswith(call("find"))
    assert not held(once, two).startswith(two)


def test_reasoning_comes_first_and_tools_may_come_instead() -> None:
    grammar = compiled("json", {"type": "boolean"}, reasoning=True, tools=json.dumps([tool({})]))
    assert held(grammar, "I think { so.</think>true").endswith("true.")
    opened = "hm</think>\n\n<｜DSML｜tool_calls>\n"
    assert held(grammar, opened + call("find") + END).endswith(f"{END}.")
    assert held(grammar, "no end") == "no end"
    assert held(compiled("json", {"type": "boolean"}), "hm</think>true") == ""


def test_walks_are_their_own(seed: int) -> None:
    draw, grammar = random.Random(seed), compiled("regex", "[ab]*c")
    texts = ["".join(draw.choices("ab", k=draw.randint(0, 9))) + "c" for _ in range(20)]
    walks = [grammar.start() for _ in texts]
    left = {n: list(TOKENIZER.encode(text)) for n, text in enumerate(texts)}
    while any(left.values()):
        n = draw.choice([n for n, ids in left.items() if ids])
        token = left[n].pop(0)
        assert walks[n].allowed()[token // 8] >> token % 8 & 1
        walks[n].accept(token)
    for walk in walks:
        assert walk.allowed()[TOKENIZER.eos_id // 8] >> TOKENIZER.eos_id % 8 & 1


def test_what_cannot_be_held_is_refused_in_a_sentence() -> None:
    for kind, source in (
        ("json", {"type": "nothing"}), ("regex", "(unclosed"), ("regex", ""), ("regex", "ends\\"),
        ("json", "[]"), ("regex", "a" * (MAX_BYTES + 1)),
    ):  # fmt: skip
        with pytest.raises(DialectError) as caught:
            compiled(kind, source)
        assert caught.value.message and "\n" not in caught.value.message


def test_the_first_compile_finds_the_table_of_tokens_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than a request may wait for its grammar, where the vocabulary is large."""
    grammars, made = Grammars(TOKENIZER), []
    monkeypatch.setattr("overleap.chat.grammar._table", made.append)
    assert held(grammars.compile(Wanted("regex", "a")), "a") == "a." and not made


def test_what_was_compiled_is_kept() -> None:
    assert compiled("regex", "kept+") is compiled("regex", "kept+")
    assert compiled("regex", "kept+") is not compiled("regex", "kept*")


def test_any_text_in_a_call_ends_with_its_tag(seed: int) -> None:
    draw = random.Random(seed)
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    grammar = compiled("tools", [tool(schema)])
    for _ in range(100):
        value = "".join(draw.choices(["<", "/", ">", "a", " ", "</", "<b>"], k=9))
        text = call("find", ("city", True, value)) + END
        assert held(grammar, text) == text + "."


def test_a_tag_that_is_only_spelled_does_not_end_a_text() -> None:
    grammar = compiled("tools", [tool({"type": "object"})])
    walk, said = grammar.start(), b""
    opened, closed = (
        call("find", ("city", True, "x")).split("</｜DSML｜parameter>")[0],
        "</｜DSML｜",
    )
    for token in [*TOKENIZER.encode(opened, special=True), *TOKENIZER.encode(closed)]:
        if not walk.allowed()[token // 8] >> token % 8 & 1:
            break
        walk.accept(token)
        said += TOKENIZER.token_bytes(token)
    assert "</｜DSML" not in said.decode("utf-8", "ignore") and said.split(b"x")[-1][:2] == b"</"


@pytest.mark.parametrize("ref", ["#", "#/properties/name", "#/$defs/name"])
def test_a_parameter_refers_to_the_schema_of_its_tool(ref: str) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"enum": ["leaf", "branch"]},
            "children": {"type": "array", "items": {"$ref": ref}},
        },
        "required": ["name", "children"],
        "additionalProperties": False,
        "$defs": {"name": {"$ref": "#/properties/name"}},
    }
    grammar = compiled("tools", [tool(schema)])
    child = '{"name": "branch", "children": [{"name": "leaf", "children": []}]}'
    child = child if ref == "#" else '"branch"'
    name = ("name", False, '"branch"')
    right = call("find", name, ("children", False, f"[{child}, {child}]")) + END
    assert held(grammar, right) == right + "."
    wrong = call("find", name, ("children", False, f"[{child}, []]")) + END
    assert held(grammar, wrong).endswith(f"[{child},")


@pytest.mark.parametrize("more", [0, 1, 7, 8, 500])
def test_a_model_may_have_more_ids_than_its_tokenizer(more: int) -> None:
    """The sampler takes a mask of the model's ids; none that the tokenizer lacks is chosen."""
    known = TOKENIZER.vocab_size
    grammar = Grammars(TOKENIZER, known + more).compile(Wanted("regex", "a"))
    walk = grammar.start()
    for token in TOKENIZER.encode("a"):
        mask = walk.allowed()
        assert len(mask) == -(-(known + more) // 8)
        assert int.from_bytes(mask, "little") < 2**known
        walk.accept(token)
    assert walk.allowed() == (1 << TOKENIZER.eos_id).to_bytes(len(mask), "little")


def test_what_parameters_refer_to_is_bounded() -> None:
    """It is written out for each of them."""
    properties: dict[str, Any] = {f"p{n}": {"type": "integer"} for n in range(900)}
    definitions = {f"d{n}": {"type": "string"} for n in range(300)}
    for schema in (
        {"properties": properties, "$defs": definitions},
        {"properties": properties | {"root": {"$ref": "#"}}},
        {"properties": properties | {"root": {"$ref": "#"}}, "$defs": 5},
    ):
        with pytest.raises(DialectError, match="bytes in all"):
            compiled("tools", [tool(schema)])
