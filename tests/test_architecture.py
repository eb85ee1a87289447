"""The rules of the house, held by reading the source: ranks, sizes, borders, banned calls.

Not about what the code computes. Each check is a function from source to complaints, and each is
fed a bad sample here, so that none can pass by being blind. Read next: CONTRIBUTING.md.
"""

import ast
import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "overleap"

# A room imports lower ranks only. The longest name that fits a module decides.
RANKS = {
    "overleap.errors": 0,
    "overleap.config": 0,
    "overleap.machine": 0,
    "overleap.devices": 0,
    "overleap.cache.layout": 0,
    "overleap.kernels": 1,
    "overleap.plan": 1,
    "overleap.cache": 2,
    "overleap.model": 3,
    "overleap.checkpoint": 4,
    "overleap.parallel": 4,
    "overleap.engine": 5,
    "overleap.chat": 5,
    "overleap.server": 6,
    "overleap.train": 6,
    "overleap.eval": 6,
    "overleap.cli": 7,
    "overleap.__main__": 8,
}
# Rooms of equal rank do not know each other, except these.
SIDEWAYS = {
    ("overleap.config", "overleap.errors"),
    ("overleap.devices", "overleap.errors"),
    ("overleap.devices", "overleap.machine"),
    ("overleap.cache.layout", "overleap.errors"),
    ("overleap.cache.layout", "overleap.config"),
    ("overleap.checkpoint", "overleap.parallel"),  # loading cuts weights
    ("overleap.train", "overleap.eval"),  # trains on the planted facts it is judged by
}
# Downward, and still not allowed: who -> what, by prefix.
BORDERS = {
    "overleap.kernels": ("overleap.config",),  # an op knows shapes, never the model's config
    "overleap.engine.scheduler": ("torch", "numpy"),  # counts pages and tokens, sees no tensors
    "overleap.server": ("torch", "numpy", "overleap.model", "overleap.kernels"),
}
TORCH_FREE = [
    "overleap.machine",
    "overleap.devices",
    "overleap",
    "overleap.errors",
    "overleap.config",
    "overleap.plan",
    "overleap.cache.layout",
    "overleap.chat.profiles",
]
HEAVY = ("torch", "transformers", "numpy", "tokenizers", "safetensors", "huggingface_hub")
PUBLIC = {"Engine", "ModelConfig", "Request", "Sampling", "__version__", "load"}

FILE_SOFT_LINES, FILE_HARD_LINES, FUNCTION_LINES = 400, 600, 60
# "file:function" -> why it may be longer. An entry that is no longer needed fails the test.
LONG_FUNCTIONS: dict[str, str] = {
    "overleap/cli/serve.py:serve": "half of it are the options of the command",
}

BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
BANNED_CALLS = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "hasattr": "give the thing a type",
    "torch.load": "unpickles",
    "torch.save": "pickles",
    "yaml.load": "can build any object",
    "yaml.unsafe_load": "can build any object",
}
# Written with character classes so that this file does not contain what it looks for.
FOREIGN_WORDS = re.compile(
    r"(?<![\w.])/(?:w[o]rk|r[o]ot|f[a]rm|opt/pyp[i])(?:/|\b)"
    r"|\bcl[a]ude (?:code|session)|\bthis sess[i]on\b|\bas an A[I]\b|\bAI assist[a]nt\b"
    r"|\bissue #?\d{1,2}\b|\bpyp[i]\.org\b|\bfiles\.pythonh[o]sted\b",
    re.IGNORECASE,
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {path: path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = {module_name(path): path for path in SOURCES}
Check = Callable[[str, str], Iterator[str]]


def hold(check: Check) -> None:
    """Run one check over every file of the package; fail with one complaint a line."""
    found = [
        f"{path.relative_to(ROOT)}: {text}"
        for path, source in SOURCES.items()
        for text in check(module_name(path), source)
    ]
    assert not found, "\n" + "\n".join(found)


def tracked_files() -> list[Path]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    return [
        p for name in listed.stdout.decode().split("\0") if name and (p := ROOT / name).is_file()
    ]


def imports(module: str, source: str) -> Iterator[tuple[int, str]]:
    """Every module that the source imports, at any depth, as (line, absolute name)."""
    is_package = module in MODULES and MODULES[module].name == "__init__.py"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                home = parts[: len(parts) - node.level + is_package]
                base = ".".join([*home, base] if base else home)
            full = {f"{base}.{alias.name}" for alias in node.names} - {"overleap.__version__"}
            targets = {name if name in MODULES or base == "overleap" else base for name in full}
            yield from ((node.lineno, target) for target in sorted(targets))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            for name in node.args[:1]:
                if isinstance(name, ast.Constant) and isinstance(name.value, str):
                    yield node.lineno, name.value


def within(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def room_of(module: str) -> str | None:
    return max((room for room in RANKS if within(module, room)), key=len, default=None)


def rank_complaints(module: str, source: str) -> Iterator[str]:
    if module == "overleap":
        return  # the public face names every room and imports none until asked
    here = room_of(module)
    if here is None:
        yield f"{module} has no rank: add its room to RANKS"
        return
    for line, target in imports(module, source):
        if not within(target, "overleap"):
            continue
        there = room_of(target)
        if there is None:
            yield f"line {line}: imports {target}: name the room it lives in, not the public face"
        elif RANKS[there] > RANKS[here]:
            yield f"line {line}: rank {RANKS[here]} imports {target} of rank {RANKS[there]}"
        elif RANKS[there] == RANKS[here] and there != here and (here, there) not in SIDEWAYS:
            yield f"line {line}: imports {target} of its own rank"


def border_complaints(module: str, source: str) -> Iterator[str]:
    for room, foreign in BORDERS.items():
        if within(module, room):
            for line, target in imports(module, source):
                if any(within(target, name) for name in foreign):
                    yield f"line {line}: {room} must not know {target}"


def test_a_room_imports_lower_ranks_only() -> None:
    hold(rank_complaints)


def test_borders_hold() -> None:
    hold(border_complaints)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("overleap.model.attention", "from overleap.engine.request import Request"),
        ("overleap.model.attention", "def f():\n    import overleap.engine.engine"),
        ("overleap.model.attention", "from ..engine import request"),
        ("overleap.cache.pool", "importlib.import_module('overleap.model.layers')"),
        ("overleap.cache.layout", "from overleap.cache.pool import Pool"),
        ("overleap.plan", "from overleap.kernels import spec"),
        ("overleap.parallel", "from overleap import checkpoint"),
        ("overleap.engine.engine", "from overleap.chat import dialects"),
        ("overleap.eval.needle", "from overleap import Engine"),
        ("overleap.utils", ""),
    ],
)
def test_rank_check_sees(module: str, source: str) -> None:
    assert list(rank_complaints(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("overleap.checkpoint", "from overleap.parallel import cut"),
        ("overleap.cache.layout", "from overleap.config import ModelConfig"),
        ("overleap.kernels.spec", "from overleap.cache.layout import PAGE_TOKENS"),
        ("overleap.cache.pool", "from . import layout\nfrom overleap.cache import state"),
        ("overleap.cli", "from overleap import __version__\nimport torch"),
    ],
)
def test_rank_check_allows(module: str, source: str) -> None:
    assert list(rank_complaints(module, source)) == []


def test_border_check_sees() -> None:
    assert list(border_complaints("overleap.kernels.torch.moe", "import overleap.config"))
    assert list(border_complaints("overleap.engine.scheduler", "from torch import Tensor"))
    assert not list(border_complaints("overleap.engine.runner", "import torch"))


def heavy_imports(statement: str) -> list[str]:
    """Which heavy packages a fresh interpreter holds after the statement."""
    probe = f"import sys\n{statement}\nprint(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("module", [name for name in TORCH_FREE if name in MODULES])
def test_light_rooms_import_nothing_heavy(module: str) -> None:
    assert heavy_imports(f"import {module}") == []


def test_heavy_import_check_sees() -> None:
    assert heavy_imports("import numpy") == ["numpy"]


def size_complaints(source: str) -> Iterator[str]:
    lines = source.count("\n")
    if lines > FILE_HARD_LINES:
        yield f"{lines} lines, over {FILE_HARD_LINES}: split it"


def long_functions(source: str) -> Iterator[tuple[str, int]]:
    """Functions over the limit and their lines, the docstring not counted."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            if lines > FUNCTION_LINES:
                yield node.name, lines


def test_no_file_is_too_long() -> None:
    texts = {p: p.read_text("utf-8") for p in tracked_files() if p.suffix in (".py", ".cpp", ".h")}
    for path, text in texts.items():
        if text.count("\n") > FILE_SOFT_LINES:
            name = path.relative_to(ROOT)
            print(f"\nover {FILE_SOFT_LINES} lines: {name} has {text.count(chr(10))}")
    assert [
        f"{p.relative_to(ROOT)}: {c}" for p, t in texts.items() for c in size_complaints(t)
    ] == []


def test_no_function_is_too_long() -> None:
    found = {
        f"{path.relative_to(ROOT)}:{name}": lines
        for path, source in SOURCES.items()
        for name, lines in long_functions(source)
    }
    assert {key: n for key, n in found.items() if key not in LONG_FUNCTIONS} == {}
    assert set(LONG_FUNCTIONS) <= set(found), "an entry of LONG_FUNCTIONS is no longer needed"
    assert all(len(reason) > 20 for reason in LONG_FUNCTIONS.values()), "a reason is a sentence"


def test_size_checks_see() -> None:
    assert not list(size_complaints("\n" * FILE_HARD_LINES))
    assert list(size_complaints("\n" * (FILE_HARD_LINES + 1)))
    documented = 'def f():\n    """One.\n' + "\n" * 90 + '    """\n' + "    x = 1\n"
    assert not list(long_functions(documented + "    x = 1\n" * (FUNCTION_LINES - 2)))
    assert list(long_functions(documented + "    x = 1\n" * (FUNCTION_LINES - 1)))
    assert list(long_functions("class A:\n    async def f():\n" + "        x = 1\n" * 60))


def environment_complaints(module: str, source: str) -> Iterator[str]:
    if within(module, "overleap.cli"):
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            names = {node.attr}
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
        else:
            continue
        if found := names & {"environ", "environb", "getenv"}:
            yield f"line {node.lineno}: {found}: only overleap.cli reads the environment"


def banned_complaints(module: str, source: str) -> Iterator[str]:
    for line, target in imports(module, source):
        if target.split(".")[0] in BANNED_MODULES:
            yield f"line {line}: {target} can run code from a file"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in BANNED_CALLS:
                yield f"line {node.lineno}: {name}() {BANNED_CALLS[name]}"
            if any(word.arg == "allow_pickle" for word in node.keywords):
                yield f"line {node.lineno}: allow_pickle"
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if f"{node.module}.{alias.name}" in BANNED_CALLS:
                    yield f"line {node.lineno}: {node.module}.{alias.name}"
        elif isinstance(node, ast.Global):
            yield f"line {node.lineno}: a module global that changes; pass it instead"


def docstring_complaints(module: str, source: str) -> Iterator[str]:
    if not ast.get_docstring(ast.parse(source)):
        yield f"{module} does not say what it is, what it is not, what to read next"


def foreign_complaints(text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if found := FOREIGN_WORDS.search(line):
            yield f"line {number}: {found.group()!r}"


def test_only_the_command_line_reads_the_environment() -> None:
    hold(environment_complaints)


def test_nothing_unpickles_or_runs_text() -> None:
    hold(banned_complaints)


def test_every_file_says_what_it_is() -> None:
    hold(docstring_complaints)


def test_tracked_files_speak_of_the_project_alone() -> None:
    found = []
    for path in tracked_files():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # weights and pictures
        found += [f"{path.relative_to(ROOT)}: {c}" for c in foreign_complaints(text)]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("check", "source"),
    [
        (environment_complaints, "import os\nx = os.environ['A']"),
        (environment_complaints, "import os as o\ndef f():\n    return o.getenv('A')"),
        (environment_complaints, "from os import environ as e"),
        (banned_complaints, "import pickle"),
        (banned_complaints, "def f():\n    from marshal import loads"),
        (banned_complaints, "import torch\ntorch.load('x')"),
        (banned_complaints, "from torch import load"),
        (banned_complaints, "eval('1')"),
        (banned_complaints, "exec('1')"),
        (banned_complaints, "import yaml\nyaml.load(x)"),
        (banned_complaints, "numpy.load(x, allow_pickle=True)"),
        (banned_complaints, "hasattr(x, 'y')"),
        (banned_complaints, "def f():\n    global x\n    x = 1"),
        (docstring_complaints, "import os\n'late'"),
    ],
)
def test_source_checks_see(check: Check, source: str) -> None:
    assert list(check("overleap.model.sample", source))


def test_source_checks_allow() -> None:
    assert not list(banned_complaints("overleap.model.sample", "model.eval()\nnumpy.load(x)"))
    assert not list(environment_complaints("overleap.cli", "import os\nos.environ.get('A')"))


@pytest.mark.parametrize("word", ["wo-rk/x", "ro-ot/.cache", "opt/py-pi"])
def test_foreign_word_check_sees(word: str) -> None:
    assert list(foreign_complaints(f"see /{word.replace('-', '')}"))
    assert not list(foreign_complaints(f"see a/{word.replace('-', '')}"))


def test_public_names() -> None:
    overleap = importlib.import_module("overleap")
    assert set(overleap.__all__) == PUBLIC
    assert set(dir(overleap)) >= PUBLIC
    for name in PUBLIC - {"__version__"}:
        if overleap._HOMES[name] in MODULES:
            assert getattr(overleap, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = overleap.no_such_name
