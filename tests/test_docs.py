"""What the documents name must exist: linked files, repository paths, make targets.

Not a check of prose. Read next: CONTRIBUTING.md.
"""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))

LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
CODE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"(?:overleap|tests|docs|examples|results)/[\w./-]*\w/?")
MAKE = re.compile(r"(?:^|[\s`])make ([a-z][a-z-]*)")


def dead_names(document: Path, text: str) -> Iterator[str]:
    """Links, paths in code marks and make targets that lead nowhere."""
    for target in LINK.findall(text):
        if "://" not in target and not (document.parent / target).exists():
            yield f"link to {target}"
    for code in CODE.findall(text):
        if PATH.fullmatch(code) and not (ROOT / code).exists():
            yield f"path {code}"
    blocks = re.findall(r"^(?:```.*?^```| {4}\S.*?$)", text, re.MULTILINE | re.DOTALL)
    for code in [*CODE.findall(text), *blocks]:
        yield from (f"make {name}" for name in MAKE.findall(code) if name not in TARGETS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_documents_name_what_exists(document: Path) -> None:
    found = list(dead_names(document, document.read_text("utf-8")))
    assert not found, "; ".join(found)


def test_dead_names_are_seen() -> None:
    here = ROOT / "sample.md"
    assert list(dead_names(here, "see [it](missing.md#part)")) == ["link to missing.md"]
    assert list(dead_names(here, "see `overleap/no_such_room/file.py`"))
    assert list(dead_names(here, "run `make nonsense`")) == ["make nonsense"]
    assert list(dead_names(here, "```\nmake test\nmake nonsense  # why\n```")) == ["make nonsense"]
    assert list(dead_names(here, "    make nonsense")) == ["make nonsense"]
    text = "We make sense. [m](Makefile) [w](https://example.invalid) `overleap/__init__.py`"
    assert list(dead_names(here, text)) == []


def test_reference_pages_are_fresh() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for page, render in generate.PAGES.items():
        written = (ROOT / "docs" / "reference" / page).read_text("utf-8")
        assert written == render(), f"{page} is stale: run `make docs`"
    assert {path.name for path in (ROOT / "docs" / "reference").glob("*.md")} == set(generate.PAGES)
