"""Programs in processes of their own: what they answer, how they fail, and what the record says."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from overleap.cache.layout import CacheFormat
from overleap.cli import app
from overleap.errors import OverleapError, RequestError
from overleap.eval import record as records
from overleap.eval.cost import decode_bytes, prefill_flops
from overleap.eval.peers import versus as module
from overleap.eval.peers.versus import Cell, Comparison, Contender, answers, versus
from overleap.kernels.conformance.ceilings import Ceilings, Rate
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.peers.installed import needs


@pytest.fixture
def folder(seed: int, tmp_path: Path) -> Path:
    # A head of 64 makes llama.cpp divide by zero.
    shape = {"hc_mult": 4, "head_dim": 40, "qk_rope_head_dim": 16, "index_head_dim": 64}
    config = tiny_config(seed, "release", **shape, num_nextn_predict_layers=0)
    return write_checkpoint(tmp_path / "model", config, random_tensors(config, seed))


@pytest.mark.parametrize("peer", needs("llama.cpp"))
def test_the_command_compares_and_records(peer: str, folder: Path, tmp_path: Path) -> None:
    arguments = ["bench", folder, "--versus", f"{peer}:130", "--depth", 130, "--depth", 9]
    arguments += ["--depth", 200, "--decode", 3, "--rounds", 2, "--threads", 1]
    arguments += ["--backend", "torch", "--results", tmp_path]
    shown = CliRunner(env={"COLUMNS": "160"}).invoke(
        app, list(map(str, arguments)), catch_exceptions=False
    )
    [record] = records.read(tmp_path / "versus.jsonl")
    asked = [(row["program"], row["depth_tokens"]) for row in record.numbers]
    ours = "overleap torch"
    assert asked == [(ours, 9), (peer, 9), (ours, 130), (peer, 130), (ours, 200)]
    for row in record.numbers:
        assert row["prefills"] == 2 and row["peak_process_bytes"] >= row["base_bytes"] > 0
        assert ("prefill_factor" in row) == (row["program"] == peer)
        assert ("together_factor" in row) == (row["program"] == ours and row["depth_tokens"] == 9)
    # FP8 is not Q8_0: how near they are is for test_agreement.py, without rounding.
    assert 0 <= record.settings[f"same_best_{peer}"] <= 1
    assert record.settings[f"log_probability_off_{peer}"] > 0
    assert "xllamacpp wheel" in str(record.settings[f"version_of_{peer}"])
    assert record.settings["rounds"] == 2 and "8 at once" in shown.stdout


def test_rows_are_medians_and_factors(seed: int) -> None:
    config = tiny_config(seed)
    cells = {
        ("ours", 10): Cell([1.0, 3.0, 2.0], [0.1, 0.4, 0.2], 5, 7, [0.4, 0.4]),
        ("other", 10): Cell([8.0], [0.8], 5, 9),
        ("broken", 10): Cell(error="out of memory"),
        ("stopped", 10): Cell(error="stopped after 9 s", stopped_s=9.0),
    }
    flops, read = prefill_flops(config, 10), decode_bytes(config, 10, CacheFormat.RELEASE)
    limits = Ceilings("cpu", 1, Rate(read * 10.0, ""), Rate(1.0, ""), Rate(flops * 2.0, ""), None)
    ours, other, broken, stopped = Comparison(config, cells, {}, {}, {}, limits).rows()
    # A step of 0.2 s where reading takes 0.1 s; a text in 2 s where products take half a second.
    assert ours["decode_floor_share"] == pytest.approx(0.5)
    assert ours["prefill_bf16_share"] == pytest.approx(0.25)
    assert ours["prefill_tokens_per_s"] == 5 and ours["decode_tokens_per_s"] == 5
    assert ours["decode_slowest_s"] == 0.4 and "prefill_factor" not in ours
    assert ours["prefill_flop_per_s"] == prefill_flops(config, 10) / 2
    assert ours["together_tokens_per_s"] == pytest.approx(20)
    assert ours["together_factor"] == pytest.approx(4)
    assert other["prefill_factor"] == 4 and other["decode_factor"] == pytest.approx(4)
    assert broken == {"program": "broken", "depth_tokens": 10, "error": "out of memory"}
    assert stopped["prefill_factor_at_least"] == 4.5 and "error" in stopped


def test_a_reading_that_takes_too_long_is_stopped(folder: Path) -> None:
    """The same program again, with a thousandth of the time."""
    contenders = [Contender("ours", "overleap"), Contender("again", "overleap")]
    ran = versus(folder, contenders, [5], threads=1, rounds=1, decode_tokens=200, patience=1e-3)
    assert ran.cells["ours", 5].error is None
    stopped = ran.cells["again", 5]
    assert stopped.stopped_s is not None and stopped.error is not None
    assert stopped.stopped_s == pytest.approx(1e-3 * ran.cells["ours", 5].prefill_s[0])
    assert stopped.error.startswith("stopped after")


class Idle:
    """Stands where a process does that runs a program; `ask` is the test's."""

    def __init__(self, task: Any, log: Path) -> None:
        self.program, self.facts = task.program, {"version": "1", "manner": "none"}
        self.ended = False

    def start(self) -> None: ...

    def close(self) -> None: ...


def test_a_long_reading_is_made_once(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    asked: list[tuple[str, int]] = []

    class Pretended(Idle):
        def ask(self, request: dict[str, Any], limit_s: float | None = None) -> dict[str, Any]:
            if request["what"] != "measure":
                return {"steps_s": [0.1]}
            depth = len(request["ids"])
            asked.append((self.program, depth))
            if self.program == "transformers" and depth == 7:
                raise OverleapError("out of memory")
            return {
                "prefill_s": 30.0 if depth == 7 else 1.0,
                "steps_s": [0.1],
                "base_bytes": 1,
                "peak_bytes": None,
            }

    monkeypatch.setattr(module, "_Process", Pretended)
    monkeypatch.setattr(module, "_answers", lambda *_: {"ours": module.np.zeros((1, 2))})
    contenders = [Contender("ours", "overleap"), Contender.peer("transformers")]
    found = versus(folder, contenders, [7, 5], threads=1, rounds=3)
    one_round = [("overleap", 5), ("transformers", 5)]
    assert asked == [*one_round, ("overleap", 7), ("transformers", 7), *one_round, *one_round]
    assert found.cells["transformers", 7].error == "out of memory"
    assert len(found.cells["ours", 5].prefill_s) == 3


def test_what_a_program_did_before_it_died_is_kept(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """Theirs dies in the second round at 7 tokens, ours while it continues eight texts at once."""
    asked: list[tuple[str, int]] = []

    class Pretended(Idle):
        def ask(self, request: dict[str, Any], limit_s: float | None = None) -> dict[str, Any]:
            assert not self.ended
            asked.append((self.program, len(request["ids"])))
            again = self.program == "transformers" and asked.count(("transformers", 7)) == 2
            self.ended = again or request["what"] == "together"
            if self.ended:
                raise OverleapError("the process ended with -9: no word")
            return {"prefill_s": 1.0, "steps_s": [0.1], "base_bytes": 1, "peak_bytes": None}

    monkeypatch.setattr(module, "_Process", Pretended)
    monkeypatch.setattr(module, "_answers", lambda *_: {"ours": module.np.zeros((1, 2))})
    contenders = [Contender("ours", "overleap"), Contender.peer("transformers")]
    told: list[str] = []
    found = versus(folder, contenders, [5, 7, 9], threads=1, rounds=3, told=told.append)
    theirs = [depth for program, depth in asked if program == "transformers"]
    assert theirs == [5, 7, 9, 5, 7]
    rows = {(row["program"], row["depth_tokens"]): row for row in found.rows()}
    assert not any("error" in row for row in rows.values())
    assert [rows["transformers", d]["prefills"] for d in (5, 7, 9)] == [2, 1, 1]
    assert "together_tokens_per_s" not in rows["ours", 5]
    assert [line for line in told if "process ended" in line] == [
        "transformers at 7 tokens: the process ended with -9: no word",
        "ours, 8 at once: the process ended with -9: no word",
    ]


def test_a_stopped_program_is_not_asked_for_more(folder: Path) -> None:
    contenders = [Contender("ours", "overleap"), Contender("again", "overleap")]
    ran = versus(folder, contenders, [5, 6], threads=1, rounds=1, decode_tokens=200, patience=1e-3)
    assert ran.cells["again", 6].error == "not asked, after it failed at 5 tokens"
    assert ran.cells["again", 6].stopped_s is None
    assert ran.cells["ours", 6].error is None


@pytest.mark.parametrize("text", ["vllm", "llama.cpp:", "llama.cpp:many", "transformers:-1"])
def test_other_names_are_refused(text: str) -> None:
    if text == "llama.cpp:":
        assert Contender.peer(text).deepest is None
        return
    with pytest.raises(RequestError, match="names no program"):
        Contender.peer(text)


def test_a_program_that_cannot_start_says_why(folder: Path) -> None:
    with pytest.raises(OverleapError, match="no kernel backend is called 'none'"):
        answers(folder, [Contender("ours", "overleap", backend="none")], [1, 2], [1])


def test_a_process_that_dies_tells_its_last_words(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(OverleapError):
        answers(folder, [Contender("ours", "overleap")], [1, 2], [1])
    monkeypatch.setattr(module, "MEMORY_SHARE", 0.0)
    with pytest.raises(OverleapError):
        answers(folder, [Contender("ours", "overleap")], [1, 2], [1])
