"""train, export and eval as a person runs them, on a model that is trained in seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from overleap.chat.profiles import PROFILE_KEY, profile_for
from overleap.checkpoint import locate
from overleap.cli import app
from overleap.cli.app import BEGUN_AGAIN
from overleap.errors import OverleapError
from overleap.eval.needle import stdlib_sources


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def json_of(*arguments: object) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


RECIPE = """
from tests.train.small import small_recipe
def recipe():
    return small_recipe({seed}, 3)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in run/, and its release form in model/."""
    home: Path = tmp_path_factory.mktemp("home")
    (home / "text").mkdir()
    for number, text in enumerate(list(stdlib_sources().values())[:60]):
        (home / "text" / f"{number}.py").write_text(text)
    (home / "mine.py").write_text(RECIPE.format(seed=5))
    result = run("train", home / "mine.py", home / "run", "--text", home / "text")
    assert result.exit_code == 0, result.output
    assert "step 3 of 3" in result.stderr and "MFU" in result.stderr
    assert run("export", home / "run", home / "model").exit_code == 0
    return home


def test_the_same_line_or_resume_goes_on(home: Path) -> None:
    before = (home / "run" / "log.jsonl").read_text()
    assert run("train", home / "mine.py", home / "run", "--text", home / "text").exit_code == 0
    assert run("train", "resume", home / "run").exit_code == 0
    assert (home / "run" / "log.jsonl").read_text() == before
    with pytest.raises(OverleapError, match="keeps its text"):
        run("train", "resume", home / "run", "--text", home / "text")
    with pytest.raises(OverleapError, match="holds no training run"):
        run("train", "resume", home / "text")


def test_checkpoints_and_exports_are_models(home: Path) -> None:
    checkpoint = home / "run" / "checkpoints" / "step-000003"
    wide, small = (json_of("models", "show", folder) for folder in (checkpoint, home / "model"))
    settings = json.loads((home / "model" / "tokenizer_config.json").read_text("utf-8"))
    assert settings[PROFILE_KEY] == profile_for(checkpoint).name
    assert wide["parameters"] == small["parameters"]
    assert small["weight_bytes"]["total"] < wide["weight_bytes"]["total"] / 2
    assert run("models", "verify", home / "model").exit_code == 0
    said = run("generate", "import", "--model", checkpoint, "--max-tokens", 3, "--temperature", 0)
    assert said.exit_code == 0 and said.stdout.strip()
    with pytest.raises(OverleapError, match="no checkpoint"):
        run("export", home / "text", home / "other")


def test_eval_asks_counts_and_compares(home: Path, tmp_path: Path) -> None:
    found = json_of("eval", "tasks", "mini", "--tokens", 1024, "--plot", tmp_path / "map.png")
    assert len(found) == 8 and sum(one["right"] for one in found) >= 7
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    shown = run("eval", "tasks", "mini", "--kind", "values", "--tokens", 1024, "--planted", 2)
    assert shown.exit_code == 0 and "values: " in shown.stdout and "/2" in shown.stdout
    with pytest.raises(OverleapError, match="--kind is 'other'"):
        run("eval", "tasks", "mini", "--kind", "other")
    bits = json_of("eval", "bits", "mini", "--tokens", 600)
    assert 0 < bits["bits_per_byte"] < 8 and len(bits["by_depth"]) == 4
    assert "xz -9" in run("eval", "bits", "mini", "--tokens", 600).stdout
    checkpoint = home / "run" / "checkpoints" / "step-000003"
    apart = json_of("eval", "forms", checkpoint, home / "model", "--tokens", 300)
    assert apart["tokens"] == 300 and 0 <= apart["kl"] < 1 and abs(apart["loss"]) < 0.1
    assert "percentile" in run("eval", "forms", checkpoint, home / "model", "--tokens", 99).stdout


def test_a_run_begins_from_a_model(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "more.py"
    path.write_text(RECIPE.format(seed=6))
    result = run("train", path, tmp_path / "run", "--text", home / "text", "--base", home / "model")
    assert result.exit_code == 0, result.output
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert recipe["base"] == str(home / "model")
    tokenizers = [
        (folder / "tokenizer.json").read_bytes() for folder in (home / "model", tmp_path / "run")
    ]
    assert tokenizers[0] == tokenizers[1]


def test_bases_texts_and_conversations_are_found_from_anywhere(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe that a run keeps names whole paths; `mini` is one of the bases."""
    seen: list[Any] = []
    monkeypatch.setattr("overleap.train.loop.run", lambda recipe, *_, **__: seen.append(recipe))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "talks.py").write_text(
        "from dataclasses import replace\n"
        "from overleap.train.data import Chat\n"
        "from tests.train.small import small_recipe\n"
        "def recipe():\n"
        "    made = small_recipe(1, 3)\n"
        "    stages = tuple(replace(s, mixture=(Chat('said.jsonl'),)) for s in made.stages)\n"
        "    return replace(made, stages=stages, text=('words.txt',))\n"
    )
    assert run("train", "talks.py", "run", "--base", "mini").exit_code == 0
    (recipe,) = seen
    assert recipe.text == (str(tmp_path / "words.txt"),)
    assert {s.path for stage in recipe.stages for s in stage.mixture} == {
        str(tmp_path / "said.jsonl")
    }
    assert recipe.base == str(locate("mini").resolve()) and recipe.config.vocab_size == 8192
    with pytest.raises(OverleapError, match="takes text: give --text"):
        run("train", "mini", "run")


def test_what_is_asked_of_the_command_is_not_dropped(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OverleapError, match="no other to spread experts over"):
        run("train", "resume", home / "run", "--spread-experts")
    numbers = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (numbers | {"TORCHELASTIC_RUN_ID": "x"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OverleapError, match="2 ranks were asked for in one of 2 processes"):
        run("train", "resume", home / "run", "--ranks", 2)


def test_a_picture_that_cannot_be_drawn_is_said(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "run" / "losses.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "overleap[plots]" in run("train", "resume", home / "run").stderr
    monkeypatch.undo()
    assert "overleap[plots]" not in run("train", "resume", home / "run").stderr
    assert (home / "run" / "losses.png").exists()


TELLS = """
import os, sys
def recipe():
    print(os.environ.get("GLIBC_TUNABLES"))
    sys.exit(7)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked of Linux")
@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=0"}, "glibc.malloc.check=0"),
        ({BEGUN_AGAIN: "1"}, "None"),
    ],
)
def test_training_asks_for_large_pages(tmp_path: Path, given: dict[str, str], told: str) -> None:
    """Before anything is allocated, so by starting once more, and only once."""
    (tmp_path / "tells.py").write_text(TELLS)
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | given
    command = [sys.executable, "-m", "overleap.cli", "train", "tells.py", "run"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 7, done.stderr
    assert done.stdout == told + "\n"
