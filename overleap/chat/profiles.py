"""What each released checkpoint means by its chat settings, and which checkpoint this one is.

Not the prompt format itself (dialects.py) and not the architecture (config.py); needs no torch.
Read next: profiles.toml, the table; dialects.py, which applies it.
"""

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

from overleap.errors import CheckpointError, ConfigError, DialectError

Preamble = Literal["none", "absolute", "beyond"]
Drafter = Literal["mtp", "dspark"]

# A checkpoint folder may say which profile it follows: this key of its tokenizer_config.json.
PROFILE_KEY = "chat_profile"
DEFAULT_PROFILE = "v4-flash"
RELEASED_VOCABULARY = 129280


@dataclass(frozen=True)
class Profile:
    """How one released checkpoint is talked to.

    name            key of profiles.toml
    size            "flash", "pro" or "mini"
    table           name of the effort table: "preview", "three-tier" or "none"
    efforts         effort level -> preamble; empty: the model does not think aloud
    default_effort  the level of a request that names none (the checkpoint's own encoder), or ""
    chat            False: a base model, which continues text only
    drafter         the drafter that its files carry: "mtp" or "dspark"
    notes           one sentence for people
    chosen_by       what made `profile_for` choose it
    """

    name: str
    size: str
    table: str
    efforts: Mapping[str, Preamble]
    default_effort: str
    chat: bool
    drafter: Drafter
    notes: str
    names: tuple[str, ...] = field(repr=False)
    chosen_by: str = "asked for by name"

    @property
    def thinks(self) -> bool:
        """Whether the model knows thinking mode; if so, it is on by default."""
        return bool(self.efforts)

    def preamble(self, effort: str | None) -> Preamble:
        """The text that an effort level stands for here; None means the default level.

        Raises DialectError for a level this checkpoint does not have.
        """
        level = self.default_effort if effort is None else effort
        if level not in self.efforts:
            known = ", ".join(self.efforts) or "none, it does not think aloud"
            raise DialectError(
                f"{self.name} has no effort level {level!r}", f"its levels are: {known}"
            )
        return self.efforts[level]


@cache
def profiles() -> Mapping[str, Profile]:
    """All profiles of profiles.toml by name, in its order."""
    raw = tomllib.loads((Path(__file__).parent / "profiles.toml").read_text("utf-8"))
    tables = {name: _table(name, levels) for name, levels in raw["efforts"].items()}
    found: dict[str, Profile] = {}
    for name, entry in raw["profiles"].items():
        efforts = tables[entry["efforts"]]
        default = entry.get("default_effort", "")
        assert not efforts or default in efforts, f"profiles.toml: {name} has no level {default!r}"
        found[name] = Profile(
            name=name,
            size=entry["size"],
            table=entry["efforts"],
            efforts=efforts,
            default_effort=default,
            chat=entry.get("chat", True),
            drafter=entry["drafter"],
            notes=entry["notes"],
            names=tuple(entry["names"]),
        )
    return MappingProxyType(found)


def _table(name: str, levels: Mapping[str, str]) -> Mapping[str, Preamble]:
    wrong = set(levels.values()) - set(get_args(Preamble))
    assert not wrong, f"profiles.toml: table {name} names unknown preambles {wrong}"
    return MappingProxyType(cast(dict[str, Preamble], dict(levels)))


def profile_named(name: str) -> Profile:
    """A profile by its exact name. Raises ConfigError with the list of names."""
    if name not in profiles():
        raise ConfigError(
            f"there is no chat profile {name!r}", f"the profiles are: {', '.join(profiles())}"
        )
    return profiles()[name]


def profile_for(source: str | Path | Mapping[str, Any], *, name: str | None = None) -> Profile:
    """The chat profile of a checkpoint: the first of these that says something.

    source  a checkpoint folder, a model name or hub id, or the contents of a config.json
    name    a profile asked for explicitly; it wins over everything

    1. `name`.
    2. `chat_profile` in the folder's tokenizer_config.json (what our own models carry).
    3. The name: of the folder, of the hub cache folder around it, or the hub id. The longest
       released name that it contains decides.
    4. The config: hidden_size tells Flash (4096) from Pro (7168); `dspark_*` keys mean the general
       release (the preview with a DSpark drafter says so in its name); another vocabulary than
       129,280 means a small model of ours.
    5. Nothing known: `v4-flash`, whose table puts no text into the prompt below its top level.

    After 3 to 5, the encoder that a checkpoint ships (encoding/encoding_dsv4.py, read as text,
    never run) corrects the effort table: REASONING_EFFORT_PROMPTS is three-tier, and
    REASONING_EFFORT_MAX alone is the preview. Folders get renamed; the encoder stays with the
    weights.

    `chosen_by` of the result says which rule it was. Raises ConfigError for an unknown profile name
    and CheckpointError for a JSON file that cannot be read.
    """
    if name is not None:
        return profile_named(name)
    folder = _folder(source)
    if folder is not None:
        declared = _json(folder / "tokenizer_config.json").get(PROFILE_KEY)
        if declared is not None:
            why = f"{PROFILE_KEY} in {folder / 'tokenizer_config.json'}"
            return replace(profile_named(str(declared)), chosen_by=why)
    config = _json(folder / "config.json") if folder is not None else _config(source)
    profile = (
        _by_name(source)
        or _by_config(config)
        or replace(profiles()[DEFAULT_PROFILE], chosen_by="nothing known about it: the default")
    )
    return profile if folder is None else _corrected(profile, folder)


def chatting(profile: Profile) -> Profile:
    """The profile, or that of the chat model of its size: for a base model that learns to chat."""
    return profile if profile.chat else _chat_profile(profile.size, "preview")


def _folder(source: str | Path | Mapping[str, Any]) -> Path | None:
    if isinstance(source, Mapping):
        return None
    path = Path(source)
    return path if path.is_dir() else None


def _config(source: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    return source if isinstance(source, Mapping) else {}


def _json(path: Path) -> Mapping[str, Any]:
    """An object from a JSON file; {} when there is no such file."""
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds a {type(raw).__name__}, expected an object")
    return raw


def _by_name(source: str | Path | Mapping[str, Any]) -> Profile | None:
    """The profile whose released name is the longest one contained in the source's name."""
    for candidate in _names_of(source):
        lowered = candidate.lower().replace("_", "-")
        matches = [
            (len(known), profile)
            for profile in profiles().values()
            for known in profile.names
            if re.search(rf"(?<![a-z0-9.]){re.escape(known)}(?![a-z0-9.])", lowered)
        ]
        if matches:
            _, best = max(matches, key=lambda match: match[0])
            return replace(best, chosen_by=f"the name {candidate}")
    return None


def _names_of(source: str | Path | Mapping[str, Any]) -> list[str]:
    """What a source is called, the likeliest first."""
    if isinstance(source, Mapping):
        return [str(source.get("_name_or_path", ""))]
    if not Path(source).is_dir():
        return [str(source)]
    # .../models--deepseek-ai--DeepSeek-V4-Pro/snapshots/<commit> is how the hub cache names it.
    path = Path(source).resolve()
    return [path.name, *(part for part in path.parts if part.startswith("models--"))]


def _by_config(config: Mapping[str, Any]) -> Profile | None:
    if not config:
        return None
    vocabulary = config.get("vocab_size")
    if isinstance(vocabulary, int) and vocabulary != RELEASED_VOCABULARY:
        return replace(
            profiles()["mini"],
            chosen_by=f"a vocabulary of {vocabulary} tokens, not {RELEASED_VOCABULARY}",
        )
    size = {4096: "flash", 7168: "pro"}.get(config.get("hidden_size", 0))
    if size is None:
        return None
    if config.get("expert_dtype") == "fp8":
        return replace(profiles()[f"v4-{size}-base"], chosen_by="experts in FP8, as a base model's")
    dspark = any(key.startswith("dspark_") for key in config)
    why = f"hidden_size {config['hidden_size']} {'and' if dspark else 'without'} dspark_* keys"
    return replace(_chat_profile(size, "three-tier" if dspark else "preview"), chosen_by=why)


def _chat_profile(size: str, table: str) -> Profile:
    """The first profile of this size that chats with this effort table."""
    return next(p for p in profiles().values() if p.size == size and p.table == table and p.chat)


def _corrected(profile: Profile, folder: Path) -> Profile:
    """The profile after a look at the encoder that the checkpoint ships."""
    encoder = folder / "encoding" / "encoding_dsv4.py"
    if profile.size == "mini" or not profile.chat or not encoder.is_file():
        return profile
    text = encoder.read_text("utf-8", "replace")
    if "REASONING_EFFORT_PROMPTS" in text:
        table = "three-tier"
    elif "REASONING_EFFORT_MAX" in text:
        table = "preview"
    else:
        return profile
    if table == profile.table:
        return profile
    why = f"the effort table of {encoder}, against {profile.chosen_by}"
    return replace(_chat_profile(profile.size, table), chosen_by=why)
