"""Writes docs/reference/ from the code: the commands, the ops, the errors; and from the records of
`overleap conform` the support table. Run by `make docs`.

Not a documentation tool: four pages, plain Markdown. tests/test_docs.py fails when one is stale.
"""

import ast
import inspect
import math
from pathlib import Path

import click
import typer

import overleap.errors
from overleap.cli import app
from overleap.eval.record import Record, Scalar, read
from overleap.kernels import spans, spec
from overleap.kernels.conformance import RULES
from overleap.kernels.cost import COSTS

RECORDS = Path(__file__).parents[1] / "results" / "conform.jsonl"
REFERENCE = Path(__file__).parent / "reference"
Column = dict[str, tuple[Record, dict[str, Scalar]]]  # of every op the newest run, and its row
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
    """The contract of every op, as declared in kernels/spec.py and kernels/spans.py."""
    tree = ast.parse(inspect.getsource(spec))
    protocol = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Ops")
    out = [NOTE, "# Ops\n", inspect.cleandoc(spec.Ops.__doc__ or "") + "\n"]
    (letters,) = (p for p in (spec.__doc__ or "").split("\n\n") if p.startswith("Letters"))
    out.append(f"## What arguments are\n\n{letters.strip()}\n")
    for part in [*tree.body, *ast.parse(inspect.getsource(spans)).body]:
        text = ast.get_docstring(part) if isinstance(part, ast.ClassDef) else None
        if isinstance(part, ast.ClassDef) and part is not protocol and text:
            out.append(f"```\n{part.name}\n\n{text}\n```\n")
    for method in protocol.body:
        if isinstance(method, ast.FunctionDef):
            text = ast.get_docstring(method) or ""
            contract = f"```\n{_signature(method)}\n\n{text}\n```\n\n{_rule(method.name)}\n"
            out.append(f"## `{method.name}`\n\n{contract}")
    return "\n".join(out)


def _rule(name: str) -> str:
    """Error allowed, which of several near answers is right, what a call must move and count."""
    rule, counted = RULES[name], inspect.cleandoc(COSTS[name].__doc__ or "")
    sizes = (rule.float32, rule.bfloat16)
    if not any(sizes):
        allowed = "no bit may differ"
    else:
        f32, bf16 = (f"2^{math.log2(size):g}" for size in sizes)
        allowed = f"{f32} of the terms' sizes" + f", {bf16} from bf16 inputs" * (bf16 != f32)
    return f"- error: {allowed}\n- rule: {rule.law}\n- moved and counted: {counted}"


def _signature(method: ast.FunctionDef) -> str:
    arguments = [f"{a.arg}: {ast.unparse(a.annotation)}" for a in method.args.args if a.annotation]
    for at, default in enumerate(reversed(method.args.defaults), 1):
        arguments[-at] += f" = {ast.unparse(default)}"
    result = ast.unparse(method.returns) if method.returns else "None"
    return f"{method.name}({', '.join(arguments)}) -> {result}"


def errors() -> str:
    """The tree of errors."""
    return f"{NOTE}\n# Errors\n\n```\n{inspect.cleandoc(overleap.errors.__doc__ or '')}\n```\n"


def support() -> str:
    """What was proven, where and when: the newest record of every chip and backend."""
    columns: dict[tuple[str, str], Column] = {}
    for record in read(RECORDS):
        column = columns.setdefault((_chip(record), str(record.settings["backend"])), {})
        column |= {str(row["op"]): (record, row) for row in record.numbers}
    out = [NOTE, "# What was proven, on what, and when\n"]
    out.append(
        "Each column is a run of `overleap conform --record results` in `results/conform.jsonl`, "
        "the newest of its chip and backend; what is not here was not run. Where a newer run was "
        "of some ops only, it stands beside. A cell says who served "
        "the op, how many cases passed, and, where it was timed, the share of the machine's own "
        "ceiling that the fastest of them reached. How to add a column: "
        "[port a chip](../guides/port-a-chip.md).\n"
    )
    runs = sorted(columns.items())
    for (chip, backend), column in runs:
        out.append(f"- **{backend} on {chip}**: {_facts(column)}")
    names = [f"{backend} on {chip}" for (chip, backend), _ in runs]
    out.append("\n| op | " + " | ".join(names) + " |\n| --- |" + " --- |" * len(names))
    for op in spec.OP_NAMES:
        out.append(f"| `{op}` | " + " | ".join(_cell(op, column) for _, column in runs) + " |")
    return "\n".join(out) + "\n"


def _facts(column: Column) -> str:
    """The cases of all its ops, and the runs that they come from; the one of most ops first."""
    rows = [column[op] for op in spec.OP_NAMES if op in column]
    passed, cases = (sum(int(row[name] or 0) for _, row in rows) for name in ("passed", "cases"))
    ops: dict[int, list[str]] = {}
    for record, row in rows:
        ops.setdefault(id(record), []).append(f"`{row['op']}`")
    records = {id(record): record for record, _ in rows}
    first, *others = sorted(ops, key=lambda number: -len(ops[number]))
    said = [_run(records[first])]
    said += [f"{', '.join(ops[number])}: {_run(records[number])}" for number in others]
    return f"{passed} of {cases} cases passed ({'; '.join(said)})"


def _run(record: Record) -> str:
    commit = record.commit or "none"
    changed = " with changes" * commit.endswith("+")
    return (
        f"{record.date[:10]}, commit `{commit[:10]}`{changed}, torch "
        f"{record.versions['torch']}, {record.settings['threads']} threads"
    )


def _chip(record: Record) -> str:
    if record.machine.device != "cpu":
        return record.machine.device
    # On a CPU the Triton kernels run in Triton's interpreter, and no otherwise.
    interpreted = " (Triton's interpreter)" * (record.settings["backend"] == "triton")
    return record.machine.cpu + interpreted


def _cell(op: str, column: Column) -> str:
    if op not in column:
        return "not run"
    _, row = column[op]
    result = "" if row["passed"] == row["cases"] else "FAILED: "
    share = row["share"]
    speed = f", {100 * float(share):.0f} % of {row['ceiling']}" if share else ""
    return f"{result}{row['backend']}, {row['passed']} of {row['cases']}{speed}"


PAGES = {"commands.md": commands, "ops.md": ops, "errors.md": errors, "support.md": support}


if __name__ == "__main__":
    REFERENCE.mkdir(exist_ok=True)
    for page, render in PAGES.items():
        (REFERENCE / page).write_text(render(), "utf-8")
