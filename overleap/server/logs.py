"""Logs as JSON, a line an event, with nothing in them that is somebody's secret.

Prompts and answers are left out, keys cut wherever they stand. Not metrics (metrics.py). Read next:
auth.py, how a key is written where others may read it.
"""

import datetime
import json
import logging
import re
import traceback
from typing import Any, TextIO

LOGGER = "overleap.server"
_BENEATH = ("uvicorn.error", "asyncio")  # loggers of what this server stands on
# A key of ours, a bearer of anybody's, and what other services call a secret key.
_SECRETS = (
    (re.compile(r"\bol-([a-z0-9]{12})-[A-Za-z0-9_-]+"), r"ol-\1-..."),
    (re.compile(r"(?i)\b(bearer|basic)\s+(?!ol-[a-z0-9]{12}-\.\.\.)[^\s\"',;]+"), r"\1 ..."),
    (re.compile(r"\bsk-[A-Za-z0-9_-]{8,}"), "sk-..."),
    (re.compile(r"(://[^/\s:@]*):[^/\s@]+@"), r"\1:...@"),
    # The values of a statement that failed, as SQLAlchemy's errors quote them.
    (re.compile(r"(?s)\[parameters: .*"), "[parameters: ...]"),
)
_HEADERS = {"authorization", "x-api-key", "cookie", "set-cookie", "proxy-authorization", "api_key"}
TEXTS = {"prompt", "messages", "input", "system", "content", "completion", "answer", "body"}
_PLAIN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_LONGEST = 4096  # characters of a field


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time, level, event, and the fields given as `extra`.

    Of fields that hold prompts and answers it says how long they are.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line. Newlines and control characters inside values are escaped by JSON."""
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": _cut(record.getMessage()),
        }
        for name, value in vars(record).items():
            if name not in _PLAIN:
                line[name] = self._field(name, value)
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = _cut(f"{type(record.exc_info[1]).__name__}: {record.exc_info[1]}")
            line["trace"] = [_cut(where) for where in _places(record.exc_info[1])]
        return json.dumps(line, ensure_ascii=True)

    def _field(self, name: str, value: Any) -> Any:
        lower = name.lower()
        if lower in _HEADERS:
            return "..."
        if lower in TEXTS:
            return f"({len(value) if isinstance(value, (str, bytes, list, tuple)) else 1} left out)"
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, dict):
            return {_cut(str(key)): self._field(str(key), item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._field(name, item) for item in value]
        return _cut(str(value))


def _places(error: BaseException) -> list[str]:
    """Where it went wrong: files and lines, without the values that a message might quote."""
    frames = traceback.extract_tb(error.__traceback__)
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]


def redacted(text: str) -> str:
    """The text with every key in it cut short."""
    for pattern, put in _SECRETS:
        text = pattern.sub(put, text)
    return text


def _cut(text: str) -> str:
    text = redacted(text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"


def configure(stream: TextIO, *, level: str = "INFO") -> logging.Logger:
    """The server's logger, writing to `stream` alone; earlier handlers of it are replaced.

    Warnings and errors of uvicorn and asyncio are written the same way, so that their tracebacks
    quote no values either.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    for name, lowest in [(LOGGER, level), *((beneath, "WARNING") for beneath in _BENEATH)]:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(lowest)
        logger.propagate = False
    return logging.getLogger(LOGGER)
