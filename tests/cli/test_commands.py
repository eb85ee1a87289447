"""Every command as a person runs it, on the bundled model: output, exit status, bad input."""

import inspect
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from overleap.checkpoint import locate
from overleap.checkpoint.files import staged
from overleap.cli import app, screen
from overleap.cli.demo import demo
from overleap.config import ModelConfig
from overleap.errors import CheckpointError, OverleapError
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint


def run(*arguments: object, text: str | None = None) -> Result:
    """The command in this process; errors for people are raised, as main() would show them."""
    return CliRunner().invoke(app, [str(a) for a in arguments], input=text, catch_exceptions=False)


def json_of(*arguments: object) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


VOCABULARY = ModelConfig.from_checkpoint(locate("mini")).vocab_size
FACTS = "The color of Alice is green.\nThe city is quiet.\nThe metal of Oscar is copper.\n"


def test_ask_reads_files_and_answers(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("import os\n" * 40, "utf-8")
    (tmp_path / "b.txt").write_text(FACTS, "utf-8")
    said = json_of("ask", tmp_path / "a.txt", tmp_path / "b.txt", "What is the metal of Oscar?")
    assert said["reply"]["content"].strip() == "copper"
    assert said["usage"]["prompt_tokens"] > 100
    shown = run("ask", "-", "What is the color of Alice?", text=FACTS)
    assert shown.exit_code == 0
    assert shown.stdout.strip() == "green"
    for words in ("tokens read", "B a token", "decode", "peak memory", "proposals"):
        assert words in shown.stderr


def test_ask_refuses_what_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "picture").write_bytes(b"\x89PNG\xff")
    with pytest.raises(OverleapError, match=r"not UTF-8 text: byte 0 of 5"):
        run("ask", tmp_path / "picture", "What?")
    with pytest.raises(OverleapError, match="No such file"):
        run("ask", tmp_path / "nothing", "What?")


def test_chat_remembers_and_starts_over() -> None:
    asked = [f"{' '.join(FACTS.split())} What is the color of Alice?"]
    lines = "\n".join([*asked, "What is the metal of Oscar?", "/new", ""])
    result = run("chat", "--temperature", 0, "--max-tokens", 4, text=lines)
    assert result.exit_code == 0
    first, second = result.stdout.split("\n")[:2]
    assert (first.strip(), second.strip()) == ("green", "copper")


def test_generate_is_repeatable_by_seed(seed: int) -> None:
    said = [json_of("generate", "def main(", "--max-tokens", 12, "--seed", seed) for _ in range(2)]
    assert said[0]["text"] == said[1]["text"]
    again = json_of("generate", "def main(", "--max-tokens", 12)
    assert again["seed"] != seed
    assert again["usage"]["generated_tokens"] == 12 or again["reason"] == "stop"


def test_logits_of_every_position_whatever_the_chunk(tmp_path: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, 4000, (300,), generator=generator).tolist()
    (tmp_path / "ids.json").write_text(json.dumps(ids), "utf-8")
    found = []
    for chunk in (300, 77):
        out = tmp_path / f"{chunk}.safetensors"
        assert run(
            "logits", "mini", tmp_path / "ids.json", out, "--cache", "wide", "--chunk", chunk
        ).exit_code == 0  # fmt: skip
        found.append(load_file(out)["logits"])
    assert found[0].shape == (300, VOCABULARY)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("[1, 2", "is not JSON"), ("{}", "not a JSON array"), ("[1, -2]", "token 1 is -2"),
     ("[]", "at least one id"), ("[true]", "token 0 is True"),
     (f"[{VOCABULARY}]", f"ids are 0 to {VOCABULARY - 1}")],
)  # fmt: skip
def test_logits_refuses_other_ids(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "ids.json").write_text(content, "utf-8")
    with pytest.raises(OverleapError, match=sentence.replace("[", r"\[")):
        run("logits", "mini", tmp_path / "ids.json", tmp_path / "out.safetensors")


def test_demo_shows_its_table(seed: int) -> None:
    said = json_of("demo", "--tokens", 1024, "--facts", 3, "--seed", seed)
    assert len(said["answers"]) == said["facts"] == 3
    assert said["right"] == sum(answer["right"] for answer in said["answers"])
    assert said["tokens"] <= 1024
    assert said["measured_bytes_per_token"] == said["formula_bytes_per_token"]
    assert said["previous_generation_bytes_per_token"] > 4 * said["formula_bytes_per_token"]
    shown = run("demo", "--tokens", 600, "--facts", 2)
    assert "of 2 right" in shown.stdout
    assert re.search(
        r"cache per token: measured [\d.]+ B, formula [\d.]+ B, a V3.2-style cache of this "
        r"geometry [\d,]+ B \([\d.]+ times\)",
        shown.stdout,
    )
    assert "predicted peak memory" in shown.stdout
    with pytest.raises(OverleapError, match="too few for 20 facts"):
        run("demo", "--tokens", 256, "--facts", 20)


def test_make_demo_reads_what_the_command_reads() -> None:
    makefile = (Path(__file__).resolve().parents[2] / "Makefile").read_text("utf-8")
    default = inspect.signature(demo).parameters["tokens"].default
    assert re.findall(r"^TOKENS +\?= (\d+)$", makefile, re.MULTILINE) == [str(default)]
    assert default == 131072


def test_models_show_verify_convert(tmp_path: Path) -> None:
    facts = json_of("models", "show", "mini")
    assert facts["layers"]["csa"] and facts["layers"]["hca"] and facts["layers"]["sliding"]
    assert facts["layers"]["mtp"] == 1
    target = tmp_path / "wide"
    assert run("models", "convert", "mini", target, "--form", "f32").exit_code == 0
    assert json_of("models", "verify", target)["ok"]
    path = next(target.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes(data)
    damaged = run("models", "verify", target)
    assert damaged.exit_code == 1
    assert path.name in damaged.stdout
    with pytest.raises(OverleapError, match="no form is called 'int4'"):
        run("models", "convert", "mini", tmp_path / "x", "--form", "int4")


@pytest.mark.parametrize("form", ["release", "bf16"])
def test_a_converted_checkpoint_is_talked_to_as_its_source(
    form: str, seed: int, tmp_path: Path
) -> None:
    """What only the name of the source or its form has told stands in the target's own files."""
    config = tiny_config(seed, "bf16")
    for name, profile in (("DeepSeek-V4-Flash-0731", "v4-flash-0731"), ("v4-pro-base",) * 2):
        source, target = tmp_path / name, tmp_path / f"small {profile[-4:]}"
        write_checkpoint(source, config, random_tensors(config, seed))
        assert run("models", "convert", source, target, "--form", form).exit_code == 0
        facts = [json_of("models", "show", folder) for folder in (source, target)]
        assert facts[0]["chat_profile"] == facts[1]["chat_profile"] == profile


def test_the_bundled_model_is_sound_and_small() -> None:
    assert json_of("models", "verify", "mini")["ok"]
    folder = locate("mini")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 20 * 2**20
    assert (folder / "MODEL_CARD.md").exists()


def test_conform_one_op() -> None:
    said = json_of("conform", "--op", "hadamard")
    assert said["verdicts"]
    assert all(verdict["passed"] for verdict in said["verdicts"])


def test_errors_end_with_status_1_and_a_hint() -> None:
    command = [
        sys.executable,
        "-m",
        "overleap.cli",
        "ask",
        "README.md",
        "x",
        "--model",
        "no/such/thing",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["ask", "chat", "generate", "logits", "demo", "conform"])
def test_every_help_has_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Example: " in result.stdout


def test_help_answers_without_torch() -> None:
    code = "import sys, overleap.cli as c; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, path], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert len(path.read_text("utf-8").splitlines()) < 40


def test_what_is_shown_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets, backslashes and colons are text: no markup, no pictures."""
    strange = r"\[/x] [b]d[/b] [:b:] \[a-z]+"
    screen.put_table(strange, ("cell",), [(strange,)])
    shown = capsys.readouterr().out
    assert shown.count(strange) == 2
    screen.show_error(OverleapError(strange, strange))
    screen.note(strange)


def test_a_folder_that_may_not_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", refuse)
    with (
        pytest.raises(CheckpointError, match="closed cannot be looked at: Permission denied"),
        staged(tmp_path / "closed"),
    ):
        pass


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("width", [20, 40, 60, 200])
def test_no_figure_of_a_table_is_lost_or_split(
    width: int, terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console = partial(Console, width=width, force_terminal=terminal, color_system=None)
    monkeypatch.setattr(screen, "Console", console)
    columns = ("key", "user", "tokens", "", "cost")
    rows = [("abcdefgh", "someone", "12,345,678", "1.000001", f"{row}.000002") for row in range(3)]
    screen.put_table("money in USD", columns, rows)
    shown = capsys.readouterr().out
    for cell in (*columns, *rows[0], *rows[2]):
        assert cell in shown, cell
    if terminal and width > 20:
        assert max(map(len, shown.splitlines())) <= width


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("models", "verify", "{}", "--write-manifest"), "does not exist"),
        (("logits", "mini", "{}/ids.json", "{}/none/out.safetensors"), "cannot be written"),
        (("logits", "mini", "{}/ids.json", "{}"), "cannot be written"),
        (("plan", "compare", "--context", "1", "--no-windows"), "nothing to compare"),
        (("eval", "tasks", "mini", "--kind", "values", "--size", "21"), "20 are the most"),
        (("eval", "tasks", "mini", "--plot", "{}/none/map.png"), "cannot be written"),
        (("train", "examples", "{}/ids.json"), "no run can be in .*ids.json: File exists"),
    ],
)
def test_what_cannot_be_done_is_said(
    arguments: tuple[str, ...], sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "ids.json").write_text("[5, 6]", "utf-8")
    with pytest.raises(OverleapError, match=sentence):
        run(*(one.format(tmp_path) for one in arguments))
    assert [path.name for path in tmp_path.iterdir()] == ["ids.json"]


def test_what_cannot_be_drawn_is_said_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overleap.eval.reader.Reader.open", None)
    with pytest.raises(OverleapError, match="cannot be written"):
        run("eval", "tasks", "mini", "--plot", tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(OverleapError, match="needs matplotlib"):
        run("eval", "tasks", "mini", "--plot", tmp_path / "map.png")


def test_a_folder_without_a_config_was_not_checked(tmp_path: Path) -> None:
    verified = run("models", "verify", tmp_path)
    assert verified.exit_code == 1
    assert "no tensor that could be checked" in verified.stderr
    assert "were checked" not in verified.stderr


@pytest.mark.parametrize("command", [("conform", "--op", "hc_post"), ("bench", "random")])
def test_a_seed_beyond_every_generator_is_refused(command: tuple[str, ...]) -> None:
    refused = run(*command, "--seed", "9" * 20)
    assert refused.exit_code == 2 and "--seed" in refused.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("command", [("plan", "chips", "--json"), ("version",)])
def test_a_full_disk_is_a_sentence(command: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "overleap.cli", *command],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "error: what was found cannot be written: No space left on device\n"
