"""Which checkpoint a folder holds, and what its effort levels mean."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from overleap.chat.profiles import PROFILE_KEY, profile_for, profile_named, profiles
from overleap.errors import CheckpointError, ConfigError, DialectError

PREVIEW_ENCODER = 'REASONING_EFFORT_MAX = (\n    "Reasoning Effort: ..."\n)\n'
LATER_ENCODER = (
    'DEFAULT_REASONING_EFFORT = "low"\nREASONING_EFFORT_PROMPTS = {"low": "", "max": ""}'
)


def folder(at: Path, name: str, encoder: str = "", **files: dict[str, Any]) -> Path:
    made = at / name
    (made / "encoding").mkdir(parents=True)
    for stem, raw in files.items():
        (made / f"{stem}.json").write_text(json.dumps(raw))
    if encoder:
        (made / "encoding" / "encoding_dsv4.py").write_text(encoder)
    return made


def test_the_table() -> None:
    assert list(profiles()) == [
        "v4-flash",
        "v4-pro",
        "v4-flash-dspark",
        "v4-pro-dspark",
        "v4-flash-0731",
        "v4-pro-0813",
        "v4-flash-base",
        "v4-pro-base",
        "mini",
    ]
    for name, profile in profiles().items():
        assert profile.name == name and profile.notes and profile.names
        assert profile.chat != name.endswith("-base")
        assert profile.thinks == (profile.chat and name != "mini")


@pytest.mark.parametrize("name", ["v4-flash", "v4-pro", "v4-flash-dspark", "v4-pro-dspark"])
def test_effort_in_the_preview(name: str) -> None:
    preview = profile_named(name)
    texts = {level: preview.preamble(level) for level in preview.efforts}
    below = dict.fromkeys(("minimal", "low", "medium", "high"), "none")
    assert texts == below | dict.fromkeys(("xhigh", "max", "ultra"), "absolute")
    assert preview.preamble(None) == "none"


@pytest.mark.parametrize("name", ["v4-flash-0731", "v4-pro-0813"])
def test_effort_in_the_general_release(name: str) -> None:
    later = profile_named(name)
    texts = {level: later.preamble(level) for level in later.efforts}
    expected = {"minimal": "none", "low": "none", "max": "beyond", "ultra": "beyond"}
    assert texts == expected | dict.fromkeys(("medium", "high", "xhigh"), "absolute")
    assert later.preamble(None) == "none"


def test_one_name_two_texts() -> None:
    """What users trip over: the level `max` of the preview is the level `high` after it."""
    assert profile_named("v4-flash").preamble("max") == "absolute"
    assert profile_named("v4-flash-0731").preamble("high") == "absolute"
    assert profile_named("v4-flash").preamble("high") != "absolute"


def test_unknown_levels_and_models_without_any() -> None:
    with pytest.raises(DialectError, match="no effort level 'extreme'") as caught:
        profile_named("v4-pro").preamble("extreme")
    assert caught.value.hint is not None and "xhigh" in caught.value.hint
    for name in ("mini", "v4-pro-base"):
        with pytest.raises(DialectError, match="no effort level"):
            profile_named(name).preamble("low")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deepseek-ai/DeepSeek-V4-Flash", "v4-flash"),
        ("deepseek-ai/DeepSeek-V4-Pro", "v4-pro"),
        ("deepseek-ai/DeepSeek-V4-Flash-0731", "v4-flash-0731"),
        ("deepseek-ai/DeepSeek-V4-Pro-0813", "v4-pro-0813"),
        ("deepseek-ai/DeepSeek-V4-Pro-DSpark", "v4-pro-dspark"),
        ("deepseek-ai/DeepSeek-V4-Flash-Base", "v4-flash-base"),
        ("someone/deepseek_v4_flash_0731-int8", "v4-flash-0731"),
        ("V4-PRO", "v4-pro"),
        ("overleap-mini", "mini"),
    ],
)
def test_names(name: str, expected: str, tmp_path: Path) -> None:
    assert profile_for(name).name == expected
    assert profile_for({"_name_or_path": name}).name == expected
    assert profile_for(folder(tmp_path, name.split("/")[-1])).name == expected


def test_the_hub_cache_is_read_by_its_folder_name(tmp_path: Path) -> None:
    inside = folder(tmp_path, "models--deepseek-ai--DeepSeek-V4-Pro-0813/snapshots/3f1c")
    assert profile_for(inside).name == "v4-pro-0813"


@pytest.mark.parametrize("name", ["DeepSeek-V4.1-Flash", "gemini-pro", "DeepSeek-V4-Flashy", ""])
def test_other_names_fall_to_the_documented_default(name: str) -> None:
    profile = profile_for(name)
    assert profile.name == "v4-flash" and "default" in profile.chosen_by
    assert profile_for({}).name == "v4-flash"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"hidden_size": 4096, "vocab_size": 129280}, "v4-flash"),
        ({"hidden_size": 7168, "vocab_size": 129280}, "v4-pro"),
        ({"hidden_size": 4096, "dspark_block_size": 5}, "v4-flash-0731"),
        ({"hidden_size": 7168, "dspark_block_size": 5}, "v4-pro-0813"),
        ({"hidden_size": 512, "vocab_size": 129280}, "v4-flash"),
        ({"hidden_size": 4096, "vocab_size": 6000}, "mini"),
        ({"hidden_size": 4096, "expert_dtype": "fp8"}, "v4-flash-base"),
        ({"hidden_size": 7168, "expert_dtype": "fp8"}, "v4-pro-base"),
    ],
)
def test_configs(config: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert profile_for(config).name == expected
    assert profile_for(folder(tmp_path, "weights", config=config)).name == expected


def test_the_shipped_encoder_corrects_the_name(tmp_path: Path) -> None:
    renamed = folder(tmp_path, "DeepSeek-V4-Pro", LATER_ENCODER)
    assert profile_for(renamed).name == "v4-pro-0813"
    assert "encoding_dsv4.py" in profile_for(renamed).chosen_by
    older = folder(tmp_path, "v4-flash-0731", PREVIEW_ENCODER)
    assert profile_for(older).name == "v4-flash"
    agreeing = folder(tmp_path, "v4-pro-dspark", PREVIEW_ENCODER)
    assert profile_for(agreeing).name == "v4-pro-dspark"
    unclear = folder(tmp_path, "v4-pro-0813", "# rewritten by somebody")
    assert profile_for(unclear).name == "v4-pro-0813"
    base = folder(tmp_path, "v4-pro-base", LATER_ENCODER)
    assert profile_for(base).name == "v4-pro-base"


def test_the_encoder_is_not_run(tmp_path: Path) -> None:
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')\n{LATER_ENCODER}"
    assert profile_for(folder(tmp_path, "v4-pro", trap)).name == "v4-pro-0813"
    assert not (tmp_path / "ran").exists()


def test_a_folder_can_say_it(tmp_path: Path) -> None:
    said = folder(
        tmp_path, "DeepSeek-V4-Pro", LATER_ENCODER, tokenizer_config={PROFILE_KEY: "mini"}
    )
    assert profile_for(said).name == "mini"
    assert PROFILE_KEY in profile_for(said).chosen_by
    assert profile_for(said, name="v4-flash").name == "v4-flash"
    silent = folder(tmp_path, "v4-pro", tokenizer_config={"bos_token": "x"})
    assert profile_for(silent).name == "v4-pro"


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no chat profile 'v5'") as caught:
        profile_for("anything", name="v5")
    assert caught.value.hint is not None and "v4-pro-0813" in caught.value.hint
    with pytest.raises(ConfigError, match="no chat profile 'v9'"):
        profile_for(folder(tmp_path, "a", tokenizer_config={PROFILE_KEY: "v9"}))
    broken = folder(tmp_path, "b")
    (broken / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        profile_for(broken)
    (broken / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected an object"):
        profile_for(broken)


def test_profiles_cost_no_tokenizer() -> None:
    code = (
        "import sys, overleap.chat.profiles as p; p.profile_for('x');"
        "print(sorted({'torch', 'tokenizers', 'deepseek_recipe', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
