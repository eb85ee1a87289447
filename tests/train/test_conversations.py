"""Of a conversation, what the assistant said is learned, and nothing that is the prompt's."""

from pathlib import Path
from typing import Any

import pytest

from overleap.chat.profiles import profile_named
from overleap.chat.tokenizer import Tokenizer
from overleap.errors import TrainingError
from overleap.train.conversations import conversations, spoken

MINI = Path(__file__).parents[2] / "overleap" / "bundled" / "mini"
EOS = "<｜end▁of▁sentence｜>"
TOOLS = [{"type": "function", "function": {"name": "look", "description": "", "parameters": {}}}]


def user(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **fields}


def said(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(MINI)


def learned(tokenizer: Tokenizer, *messages: dict[str, Any], tools: Any = None) -> list[str]:
    """The stretches of a conversation that are learned, in order."""
    talk = {"messages": list(messages), "tools": tools}
    ids, learn = spoken(talk, tokenizer, profile_named("v4-flash"))
    found, stretch = list[str](), list[int]()
    assert len(ids) == len(learn) and not learn[-1]
    for token, known in zip(ids[1:], learn, strict=False):
        if known:
            stretch.append(token)
        if stretch and (not known or token == ids[-1]):
            found.append(tokenizer.decode(stretch, control=True))
            stretch = []
    return found


def test_replies_are_learned_with_their_end(tokenizer: Tokenizer) -> None:
    messages = user("one"), said("two"), user("three"), said("four")
    assert learned(tokenizer, *messages) == ["two" + EOS, "four" + EOS]


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_is_learned_by_either_name(tokenizer: Tokenizer, name: str) -> None:
    thought = said("42", **{name: "so"})
    assert learned(tokenizer, user("one"), thought) == ["so</think>42" + EOS]
    # What is left out of the prompt does not make the last answer one without a thought.
    later = user("one"), thought, user("more"), said("43")
    assert learned(tokenizer, *later) == ["42" + EOS, "43" + EOS]
    kept = learned(tokenizer, *later, tools=TOOLS)
    assert kept == ["so</think>42" + EOS, "43" + EOS], "nor is an empty thought learned"


@pytest.mark.parametrize("task", ["action", "query", "authority", "domain", "read_url"])
def test_the_reply_to_a_task_is_learned(tokenizer: Tokenizer, task: str) -> None:
    assert learned(tokenizer, user("one", task=task), said("yes")) == ["yes" + EOS]


def test_the_title_of_an_answer_is_learned(tokenizer: Tokenizer) -> None:
    found = learned(tokenizer, user("one"), said("two", task="title"), said("Of two"))
    assert found == ["two" + EOS, "Of two" + EOS]


def test_masked_messages_are_read_and_not_learned(tokenizer: Tokenizer) -> None:
    messages = user("one"), said("two", mask=0), user("three"), said("four", mask=1)
    assert learned(tokenizer, *messages) == ["four" + EOS]
    with pytest.raises(TrainingError, match="every assistant message is masked"):
        learned(tokenizer, user("one"), said("two", mask=False))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"messages": [], "tools": 3}', "line 1 has `tools` that are no list"),
        ('{"messages": {}}', "line 1 has no list `messages`"),
        ("[1]", "line 1 has no list `messages`"),
        ("{", "line 1 is not JSON"),
        ("", "holds no conversation"),
    ],
)
def test_other_lines_are_refused(tmp_path: Path, line: str, sentence: str) -> None:
    path = tmp_path / "talk.jsonl"
    path.write_text(line)
    with pytest.raises(TrainingError, match=sentence):
        conversations(str(path))


def test_messages_that_are_none_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(TrainingError, match="cannot be written: message 0 is a int"):
        spoken({"messages": [3]}, tokenizer, profile_named("v4-flash"))
