"""Other people's programs against a server: `llm`, `llm-comply`, `lm-eval`, the openai Node client.

They live in build/clients, outside the project's own environment; each test skips with a reason
where its program is missing (`make clients` installs them). What is expected to fail is listed with
why.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.live import MINI, NAME, Live, bundled, live, scripted

CLIENTS = Path(__file__).parents[2] / "build" / "clients"
PROGRAMS = CLIENTS / "venv" / "bin"

# Cases of llm-comply that this server is not to pass: what each complaint then says, and why.
IMAGE = "HTTP 400 (expected [200])"  # the model reads text only
EVENT = "unknown SSE event type: response.reasoning_text."  # OpenAI's; the tool's table lacks it
EXPECTED_FAILURES = {
    "chat-image-input": IMAGE,
    "image-input": IMAGE,
    "anth-image-input": IMAGE,
    "streaming-response": EVENT,
    "streaming-usage": EVENT,
}


def program(name: str) -> str:
    if not (PROGRAMS / name).exists():
        pytest.skip(f"{name} is not installed in build/clients/venv")
    return str(PROGRAMS / name)


def run(command: list[str], folder: Path, timeout: float = 200, **more: str) -> str:
    environment = {**os.environ, "HOME": str(folder), "NO_COLOR": "1", **more}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr[-2000:]
    return done.stdout if done.returncode == 0 else done.stdout + done.stderr


OPENED = "\n\n<｜DSML｜tool_calls>\n"  # by the prompt, where a call is demanded
CALL = (
    '<｜DSML｜invoke name="get_weather">\n'
    '<｜DSML｜parameter name="location" string="true">San Francisco</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)


def script(prompt: str) -> str:
    calls = "get_weather" in prompt and "<tool_result>" not in prompt
    if prompt.endswith(OPENED):
        return CALL
    said = OPENED + CALL if calls else "Hello, world!"
    return said if prompt.endswith("</think>") else f"I think.</think>{said}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tmp_path_factory.mktemp("scripted"), scripted(script)) as running:
        yield running


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tmp_path_factory.mktemp("bundled"), bundled(), profile="mini") as running:
        yield running


def test_the_llm_command(server: Live, tmp_path: Path) -> None:
    llm = program("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: here\n  model_name: {NAME}\n  api_base: {server.url}/v1\n"
    )
    out = run([llm, "-m", "here", "--key", "x", "Say hello"], tmp_path, LLM_USER_PATH=str(tmp_path))
    assert "Hello, world!" in out, out


@pytest.mark.parametrize(
    ("form", "cases"), [("openai-chat", 9), ("open-responses", 13), ("anthropic", 9)]
)
def test_llm_comply(server: Live, tmp_path: Path, form: str, cases: int) -> None:
    command = [program("llm-comply"), "-u", f"{server.url}/v1", "-k", "x", "-m", NAME,
               "--format", form, "--json"]  # fmt: skip
    out = run(command, tmp_path)
    results = json.loads(out[out.index("{") : out.rindex("}") + 1])["results"]
    assert len(results) >= cases
    surprises = {
        case["id"]: case["errors"]
        for case in results
        if case["status"] == "failed" and not _expected(case["id"], case["errors"])
    }
    assert surprises == {}
    passed = sum(case["status"] == "passed" for case in results)
    print(f"llm-comply {form}: {passed} of {len(results)} passed")
    assert passed >= len(results) - 4, "one is skipped for every model but the vendor's own"


def _expected(case: str, errors: list[str]) -> bool:
    """Whether a case failed as it should. Of a refusal the rest follows: it is no answer."""
    wanted = EXPECTED_FAILURES.get(case, "nothing")
    told = errors[:1] if wanted == IMAGE else errors
    return bool(told) and all(wanted in error for error in told)


TASK = """
task: overleap_words
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["{{{{one}}}}", "{{{{two}}}}"]
doc_to_target: 0
metric_list:
  - metric: acc
"""


def test_lm_eval_with_token_ids_and_prompt_logprobs(trained: Live, tmp_path: Path) -> None:
    if not list(CLIENTS.glob("venv/lib/python*/site-packages/transformers")):
        pytest.skip("lm-eval has no transformers beside it in build/clients/venv")
    rows = [
        {"text": f"The color of {name} is {color}.\\nThe color of {name} is", "one": f" {color}",
         "two": " os"}
        for name, color in [("Alice", "green"), ("Bob", "red"), ("Carol", "blue")]
    ]  # fmt: skip
    data = tmp_path / "words.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "words.yaml").write_text(TASK.format(data=data))
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    shutil.copy(MINI / "tokenizer.json", tokenizer)
    (tokenizer / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<｜end▁of▁sentence｜>"}
        )
    )
    arguments = (
        f"base_url={trained.url}/v1/completions,model={NAME},tokenizer={tokenizer},"
        "tokenizer_backend=huggingface,tokenized_requests=True,num_concurrent=2,max_length=4096"
    )
    command = [program("lm-eval"), "run", "--model", "local-completions", "--model_args", arguments,
               "--tasks", "overleap_words", "--include_path", str(tmp_path),
               "--output_path", str(tmp_path / "out")]  # fmt: skip
    out = run(command, tmp_path, OPENAI_API_KEY="x", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    written = list((tmp_path / "out").rglob("results*.json"))
    assert written, out[-3000:]
    result = json.loads(written[0].read_text())["results"]["overleap_words"]
    assert result["acc,none"] >= 0.6, result


NODE = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "x", maxRetries: 0 });
const messages = [{ role: "user", content: "hi" }];
const whole = await client.chat.completions.create({ model: process.argv[3], messages });
const body = { model: process.argv[3], messages };
const stream = await client.chat.completions.create({ ...body, stream: true });
let text = "";
for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
const response = await client.responses.create({ model: process.argv[3], input: "hi" });
let status = 0;
try { await client.chat.completions.create({ model: "other", messages }); }
catch (e) { status = e.status; }
const texts = [whole.choices[0].message.content, text, response.output_text];
console.log(JSON.stringify([...texts, status]));
"""


def test_the_node_client(server: Live, tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None or not (CLIENTS / "node_modules" / "openai").exists():
        pytest.skip("node or the openai package for it is not installed")
    (tmp_path / "client.mjs").write_text(NODE)
    (tmp_path / "node_modules").symlink_to(CLIENTS / "node_modules")
    out = run([node, "client.mjs", server.url, NAME], tmp_path)
    assert json.loads(out) == ["Hello, world!"] * 3 + [404]
