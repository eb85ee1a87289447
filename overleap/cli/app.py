"""The command's frame: the app, options that several commands share, and how errors end.

Not here: commands. Read next: talk.py.
"""

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from overleap.cli import screen
from overleap.errors import OverleapError, RequestError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Run, check and train DeepSeek-V4-architecture models on the hardware that is there.",
)
models = typer.Typer(no_args_is_help=True, help="Look at, verify and convert checkpoints.")
app.add_typer(models, name="models")

Model = Annotated[
    str, typer.Option("--model", "-m", help="Folder, hub id org/name, or `mini` (bundled).")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
MaxTokens = Annotated[int, typer.Option(help="Tokens of an answer at most.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same answer; drawn when not given.")]
Effort = Annotated[
    str | None, typer.Option(help="Effort of thinking, as the checkpoint names its levels.")
]
Thinking = Annotated[
    bool | None, typer.Option("--thinking/--no-thinking", help="Think aloud, where it can.")
]
Memory = Annotated[
    str | None,
    typer.Option(help="Limit for the whole process, or of --device, like 8GiB; else what is free."),
]
Device = Annotated[
    str,
    typer.Option(help="`cpu`, a kind of accelerator (`overleap doctor` lists them), or `auto`."),
]
Threads = Annotated[  # torch ends without a word where the system has no room for so many
    int | None, typer.Option(help="CPU threads; torch's choice else.", min=1, max=1024)
]
CacheKind = Annotated[
    str,
    typer.Option("--cache", help="`release` (packed FP8/FP4) or `wide` (float32, no rounding)."),
]
Keep = Annotated[
    bool, typer.Option("--keep/--no-keep", help="Keep what is read on disk, for later questions.")
]
CacheDir = Annotated[
    Path | None, typer.Option(help="Where that is kept; else the user's cache folder.")
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify", help="Compute each answer again from scratch; stop if it comes out otherwise."
    ),
]
CacheSpace = Annotated[str, typer.Option(help="Disk space that it may take.")]

CACHE_SPACE = "4GiB"
BEGUN_AGAIN = "OVERLEAP_BEGUN_AGAIN"  # some systems take GLIBC_TUNABLES away from a program


def main() -> None:
    """Entry point: errors meant for people end with status 1, not with a trace."""
    if sys.argv[1:2] == ["train"]:
        _take_large_pages()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except OverleapError as error:
        screen.show_error(error)
        sys.exit(1)
    except BrokenPipeError:
        _give_up_output()
        sys.exit(141)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        _give_up_output()
        screen.show_error(OverleapError(f"what was found cannot be written: {error.strerror}"))
        sys.exit(1)


def _take_large_pages() -> None:
    """Begin again with large pages for large tensors: the C library asks only when it starts."""
    if sys.platform != "linux" or {"GLIBC_TUNABLES", BEGUN_AGAIN} & os.environ.keys():
        return
    os.environ |= {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", BEGUN_AGAIN: "1"}
    with suppress(OSError):  # then without
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _give_up_output() -> None:
    """Else Python writes what is left of it once more when it ends, and complains."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def cache_format_of(name: str) -> Any:
    from overleap.cache.layout import CacheFormat

    if name not in list(CacheFormat):
        raise RequestError(f"--cache is {name!r}", "it is `release` or `wide`")
    return CacheFormat(name)


def text_of(name: str) -> str:
    """A file's text, or standard input for `-`."""
    try:
        raw = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return raw.decode("utf-8")
    except OSError as error:
        raise RequestError(f"{name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{name} is not UTF-8 text: byte {error.start} of {len(error.object)}",
            "convert it first, for example with iconv or pdftotext",
        ) from None
