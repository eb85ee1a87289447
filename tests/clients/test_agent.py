"""An agent through the `openai` client: the cache is hit however the client writes history."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from overleap.cache.layout import PAGE_TOKENS
from tests.server.live import NAME, live, scripted

openai = pytest.importorskip("openai", reason="the openai client is not installed")

TURNS = 20
TOOL = {
    "type": "function",
    "function": {
        "name": "read",
        "description": "Read a file.",
        "parameters": {
            "type": "object",
            "properties": {"path": {"type": "string"}, "line": {"type": "integer"}},
            "required": ["path"],
        },
    },
}


def script(prompt: str) -> str:
    turn = prompt.count("<tool_result>")
    thought = f"So far I have read {turn} files, and I am not done with reading them.</think>"
    if turn == TURNS - 1:
        return f"{thought}All read."
    return (
        f"{thought}\n\n<｜DSML｜tool_calls>\n"
        '<｜DSML｜invoke name="read">\n'
        f'<｜DSML｜parameter name="path" string="true">src/file{turn}.py</｜DSML｜parameter>\n'
        f'<｜DSML｜parameter name="line" string="false">{turn}</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    )


def returned(message: Any, way: str) -> dict[str, Any]:
    """An answer as a client sends it back."""
    calls = [call.model_dump() for call in message.tool_calls or ()]
    if way != "as it came":
        for call in calls:
            arguments = json.loads(call["function"]["arguments"])
            turned = dict(reversed(arguments.items()))
            call["function"]["arguments"] = json.dumps(turned, indent=2)
    again = {"role": "assistant", "content": message.content, "tool_calls": calls}
    if way != "without reasoning":
        again["reasoning_content"] = message.reasoning_content
    return again


@pytest.mark.parametrize("way", ["as it came", "written anew", "without reasoning"])
def test_twenty_turns_hit_the_cache(tmp_path: Path, way: str, seed: int) -> None:
    words = random.Random(seed).choices("alpha beta gamma delta import def return".split(), k=900)
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "You read files. " + " ".join(words)},
        {"role": "user", "content": "Read them all."},
    ]
    hits = total = before = 0
    with live(tmp_path, scripted(script)) as server:
        client = server.client(openai.OpenAI, base_url=f"{server.url}/v1", api_key="none")
        for turn in range(TURNS):
            answer = client.chat.completions.create(
                model=NAME, messages=messages, tools=[TOOL], max_tokens=300
            )
            message, usage = answer.choices[0].message, answer.usage
            if turn:  # the first prompt is new, whatever one does
                hits += usage.prompt_tokens_details.cached_tokens
                total += usage.prompt_tokens
                found = usage.prompt_tokens_details.cached_tokens
                assert found >= before - PAGE_TOKENS, f"turn {turn}: {found} of {before} were known"
            before = usage.total_tokens
            messages.append(returned(message, way))
            for call in message.tool_calls or ():
                result = f"line {turn} of the file"
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    assert message.content == "All read."
    assert hits / total >= 0.95, f"{hits} of {total} prompt tokens came from the cache"
    print(
        f"{way}: {hits / total:.1%} of {total} prompt tokens of turns 2 to {TURNS} from the cache"
    )
