"""Writes docs/reference/ from the code: the commands, the ops, the errors. Run by `make docs`.

Not a documentation tool: three pages, plain Markdown. tests/test_docs.py fails when one is stale.
"""

import ast
import inspect
from pathlib import Path

import click
import typer

import overleap.errors
from overleap.cli import app
from overleap.kernels import spec

REFERENCE = Path(__file__).parent / "reference"
NOTE = "<!-- written by docs/generate.py; change the code, then run `make docs` -->\n"


def commands() -> str:
    """Every command with its help, arguments and options."""
    out = [NOTE, "# Commands\n"]
    root = typer.main.get_command(app)
    for name, command in _walk("overleap", root):
        out.append(f"## `{name}`\n\n{inspect.cleandoc(command.help or '')}\n")
        rows = [_row(parameter) for parameter in command.params if parameter.name != "help"]
        if rows:
            out.append(
                "| name | default | meaning |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n"
            )
    return "\n".join(out)


def _walk(name: str, command: click.Command) -> list[tuple[str, click.Command]]:
    below = getattr(command, "commands", None)
    if below is None:
        return [(name, command)]
    return [item for key in below for item in _walk(f"{name} {key}", below[key])]


def _row(parameter: click.Parameter) -> str:
    names = [*parameter.opts, *parameter.secondary_opts]
    argument = parameter.param_type_name == "argument"
    shown = (parameter.metavar or parameter.name) if argument else ", ".join(names)
    unset = argument or parameter.default is None or parameter.default is False
    default = "" if unset else str(parameter.default)
    return f"| `{shown}` | {default} | {getattr(parameter, 'help', None) or ''} |"


def ops() -> str:
    """The contract of every op, as declared in kernels/spec.py."""
    tree = ast.parse(inspect.getsource(spec))
    protocol = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Ops")
    out = [NOTE, "# Ops\n", inspect.cleandoc(spec.Ops.__doc__ or "") + "\n"]
    for method in protocol.body:
        if isinstance(method, ast.FunctionDef):
            text = ast.get_docstring(method) or ""
            out.append(f"## `{method.name}`\n\n```\n{_signature(method)}\n\n{text}\n```\n")
    return "\n".join(out)


def _signature(method: ast.FunctionDef) -> str:
    arguments = [f"{a.arg}: {ast.unparse(a.annotation)}" for a in method.args.args if a.annotation]
    result = ast.unparse(method.returns) if method.returns else "None"
    return f"{method.name}({', '.join(arguments)}) -> {result}"


def errors() -> str:
    """The tree of errors."""
    return f"{NOTE}\n# Errors\n\n```\n{inspect.cleandoc(overleap.errors.__doc__ or '')}\n```\n"


PAGES = {"commands.md": commands, "ops.md": ops, "errors.md": errors}


if __name__ == "__main__":
    REFERENCE.mkdir(exist_ok=True)
    for page, render in PAGES.items():
        (REFERENCE / page).write_text(render(), "utf-8")
