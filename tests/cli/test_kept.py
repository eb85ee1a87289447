"""What ask, chat and demo keep on disk, and the commands that look after it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from overleap.checkpoint import locate
from overleap.checkpoint.manifest import MANIFEST
from overleap.cli import app
from overleap.cli.kept import default_folder
from overleap.errors import CapacityError


def run(*arguments: object, text: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], input=text, catch_exceptions=False)


def json_of(*arguments: object) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "document.txt"
    facts = "The color of Alice is green.\nThe metal of Oscar is copper.\n"
    path.write_text(facts + "".join(f"Line {n} says nothing.\n" for n in range(90)), "utf-8")
    return path


def ask(document: Path, question: str, *options: object) -> tuple[str, int, int]:
    """The reply, and how many tokens of the prompt were known, of how many."""
    said = json_of("ask", document, question, "--max-tokens", 6, *options)
    usage = said["usage"]
    return said["reply"]["content"], usage["cached_tokens"], usage["prompt_tokens"]


def test_a_second_question_reads_only_the_question(document: Path, tmp_path: Path) -> None:
    where = ("--cache-dir", tmp_path / "kept")
    first, cached, total = ask(document, "What is the metal of Oscar?", *where)
    assert cached == 0 and total > 600
    _, cached, total = ask(document, "And what, in a word, is the color of Alice?", *where)
    assert total - cached < 128 + 32, "all of the document but its last page was known"
    again, cached, total = ask(document, "What is the metal of Oscar?", *where)
    assert total - cached <= 128 and again == first
    plain, cached, _ = ask(document, "What is the metal of Oscar?", "--no-keep")
    assert cached == 0 and plain == first


def test_a_second_process_goes_on(document: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "overleap.cli", "ask", str(document), "--max-tokens", "4"]
    command += ["--cache-dir", str(tmp_path / "kept"), "--json"]
    used = []
    for question in ("What is the color of Alice?", "What is the metal of Oscar?"):
        done = subprocess.run([*command, question], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        used.append(json.loads(done.stdout)["usage"])
    assert used[0]["cached_tokens"] == 0 and used[1]["cached_tokens"] >= 512


def test_cache_formats_are_kept_apart(document: Path, tmp_path: Path) -> None:
    where = ("--cache-dir", tmp_path / "kept")
    for form in ("release", "wide"):
        assert ask(document, "What is the color of Alice?", "--cache", form, *where)[1] == 0
        assert ask(document, "What is the color of Alice?", "--cache", form, *where)[1] > 500


def test_chat_goes_on_where_it_was(document: Path, tmp_path: Path) -> None:
    lines = " ".join(document.read_text("utf-8").split()) + " What is the color of Alice?\n"
    options = ("--temperature", 0, "--max-tokens", 4, "--cache-dir", tmp_path / "kept")
    one = run("chat", *options, text=lines)
    two = run("chat", *options, text=lines)
    assert one.exit_code == two.exit_code == 0 and one.stdout == two.stdout
    assert "cached" in two.stderr and "cached" not in one.stderr


def test_demo_keeps_nothing_unless_asked(tmp_path: Path) -> None:
    where = tmp_path / "kept"
    demo = ("demo", "--tokens", 600, "--facts", 1, "--seed", 3, "--cache-dir", where)
    json_of(*demo)
    assert not where.exists()
    json_of(*demo, "--keep")
    assert json_of("cache", "stats", "--cache-dir", where)["tokens"] >= 512


def test_stats_verify_clear(document: Path, tmp_path: Path) -> None:
    where = ("--cache-dir", tmp_path / "kept")
    assert json_of("cache", "stats", *where)["units"] == 0
    assert run("cache", "clear", *where).stdout == "0 B removed\n"
    assert not (tmp_path / "kept").exists(), "looking does not make a folder"
    ask(document, "What is the color of Alice?", *where)
    stats = json_of("cache", "stats", *where)
    paths = sorted((tmp_path / "kept").glob("*.safetensors"))
    assert stats["units"] == len(paths) > 0
    assert stats["bytes"] == sum(path.stat().st_size for path in paths)
    assert stats["tokens"] >= 512 and stats["texts"] >= 1
    shown = run("cache", "stats", *where).stdout
    assert "tokens" in shown and "free on disk" in shown
    assert json_of("cache", "verify", *where)["removed"] == []
    data = bytearray(paths[0].read_bytes())
    data[len(data) // 2] ^= 1
    paths[0].write_bytes(data)
    result = run("cache", "verify", *where)
    assert result.exit_code == 1 and "does not have the bytes that were written" in result.stdout
    assert run("cache", "verify", *where).exit_code == 0
    assert "removed" in run("cache", "clear", *where).stdout
    assert json_of("cache", "stats", *where)["bytes"] == 0
    assert list((tmp_path / "kept").glob("*.safetensors")) == []


def test_the_default_folder(document: Path) -> None:
    assert default_folder().parts[-2:] == ("overleap", "prefix")
    ask(document, "What is the color of Alice?")
    assert json_of("cache", "stats")["folder"] == str(default_folder())
    assert json_of("cache", "stats")["tokens"] >= 512
    assert run("cache", "clear").exit_code == 0


def test_without_a_manifest_nothing_is_kept(document: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(locate("mini"), model)
    (model / MANIFEST).unlink()
    where = ("--model", model, "--cache-dir", tmp_path / "kept")
    result = run("ask", document, "What?", "--max-tokens", 2, *where)
    assert result.exit_code == 0 and "no manifest names these weights" in result.stderr
    assert not (tmp_path / "kept").exists()


def test_a_folder_that_cannot_be_used(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for, it is an error; the default one is only talked about."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(CapacityError, match="holds other things"):
        run("ask", document, "What?", "--cache-dir", tmp_path / "mine")
    with pytest.raises(CapacityError, match="no amount of memory"):
        run("ask", document, "What?", "--cache-space", "much")
    monkeypatch.setattr("overleap.cli.kept.default_folder", lambda: tmp_path / "mine")
    result = run("ask", document, "What?", "--max-tokens", 2)
    assert result.exit_code == 0 and "holds other things" in result.stderr


def test_what_does_not_fit_is_said(document: Path, tmp_path: Path) -> None:
    where = ("--cache-dir", tmp_path / "kept", "--cache-space", "1KiB")
    result = run("ask", document, "What?", "--max-tokens", 2, *where)
    assert result.exit_code == 0 and "not everything was kept: 0 B of 1.0 KiB" in result.stderr


@pytest.mark.parametrize("command", ["stats", "verify", "clear"])
def test_looking_after_it_needs_no_torch(command: str, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom overleap.cli import app\n"
        f"CliRunner().invoke(app, ['cache', '{command}', '--cache-dir', r'{tmp_path}/kept'],"
        " catch_exceptions=False)\nprint('torch' in sys.modules)"
    )
    (tmp_path / "kept").mkdir()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stdout + done.stderr
