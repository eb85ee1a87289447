"""The planner as a person runs it: in under a second, without torch, true to the plan room."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from overleap.checkpoint import locate
from overleap.cli import app
from overleap.cli import plan as command
from overleap.config import ModelConfig
from overleap.errors import ConfigError, OverleapError, RequestError
from overleap.plan import chips

GIB = 2**30


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], catch_exceptions=False)


def json_of(*arguments: object) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    "arguments",
    [
        ["v4-flash", "--context", "1048576", "--memory", "8GiB"],
        ["v4-flash", "--context", "1048576", "--memory", "80GiB"],
        ["v4-pro", "--chip", "h200", "--count", "8"],
        ["compare"],
    ],
)
def test_a_second_and_no_torch(arguments: list[str]) -> None:
    """A fresh process, by its processor time: others may compute at the same time."""
    code = (
        "import sys, time; from overleap.cli import app\n"
        f"try: app(['plan', *{arguments!r}])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'numpy', 'tokenizers', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert time.process_time() < 1, time.process_time()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


def test_a_model_may_stand_without_a_command() -> None:
    assert json_of("v4-flash", "--memory", "80GiB") == json_of(
        "fit", "v4-flash", "--memory", "80GiB"
    )
    assert json_of("--memory", "80GiB")["model"] == "v4-flash"
    assert "Example" in run("--help").stdout or "Commands" in run("--help").stdout


def test_one_machine_for_people() -> None:
    shown = " ".join(run("v4-flash", "--memory", "80GiB").stdout.split())
    for words in (
        "284.33B parameters, 13.27B active",
        "does not fit: 72.9 GiB short; runs with its experts elsewhere: 48% in memory, 52% on disk",
        "largest context for 1 user: 1,048,576 tokens",
        "cost: unknown",
        "unknown, so not counted in these times: memory bandwidth",
    ):
        assert words in shown
    shown = " ".join(run("v4-flash", "--memory", "8GiB").stdout.split())
    assert "4.3 GiB short of what it takes with all experts elsewhere (12.3 GiB)" in shown
    shown = " ".join(run("v4-pro", "--chip", "h200", "--count", 8, "--users", 4).stdout.split())
    for words in ("fits, ", "attention over", "memory bandwidth", "USD a million", "and more"):
        assert words in shown


def test_json_says_everything() -> None:
    said = json_of("v4-flash", "--chip", "mi300x", "--context", 131072, "--users", 3)
    assert said["parameters"]["total"] == 284_332_240_471
    (found,) = said["plans"]
    assert said["machines"] == []
    assert found["fits"] and found["users"] == 3 and found["chip"] == "mi300x"
    assert found["memory"]["total"] + found["spare_bytes"] == found["have_bytes"] == 192 * GIB
    assert found["step"]["binding"] == "memory bandwidth"
    assert found["usd_per_million"]["output"]["depreciation"] is None
    assert found["usd_per_million"]["output"]["power"] > 0


def test_several_chips_stand_in_a_list() -> None:
    said = json_of("--chip", "h100", "--chip", "a100", "--memory", "200GiB")
    assert [found["chip"] for found in said["plans"]] == ["h100", "a100"]
    assert all(found["have_bytes"] == 200 * GIB and found["fits"] for found in said["plans"])
    shown = run("--chip", "h100", "--chip", "a100").stdout
    assert "1 x h100" in shown and "1 x a100" in shown


def test_without_a_machine_this_one_and_those_that_hold_it() -> None:
    said = json_of("v4-flash", "--context", 131072)
    assert said["plans"][0]["chip"] == "here"
    assert {"mi300x", "m3-ultra"} <= {each["chip"] for each in said["machines"]}
    assert "mi300x" in run("v4-flash").stdout


def test_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.machine, "free_bytes", lambda: None)
    with pytest.raises(RequestError, match="does not tell how much memory is free"):
        run("v4-flash")


def test_models_that_are_at_hand() -> None:
    folder = locate("mini")
    by_name, by_folder = (json_of(m, "--memory", "1GiB")["plans"] for m in ("mini", folder))
    assert by_name == by_folder and by_name[0]["fits"]
    with pytest.raises(ConfigError, match=r"'v5' is no folder and no preset") as caught:
        run("v5")
    assert "v4-flash" in str(caught.value.hint)


def test_the_chips_are_listed_with_their_sources() -> None:
    said = json_of("chips")
    assert [one["name"] for one in said] == list(chips())
    assert all(one["source"] for one in said)
    assert "unknown" in run("chips").stdout


def test_compare_prints_the_published_figures(tmp_path: Path) -> None:
    shown = run("compare", "--plot", tmp_path)
    for figure in ("27.0% 3.70x", "10.2% 9.84x", "10.48% 9.54x", "7.32% 13.67x", "2.02%", "2.00%"):
        assert figure in shown.stdout
    assert "10^6" in shown.stdout and "█" in shown.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["efficiency.png", "efficiency.svg"]


def test_compare_has_a_switch_for_every_assumption() -> None:
    said = json_of("compare", "--context", 2**20, "--bf16-cache", "--no-windows", "--count-bf16", 1)
    pro = said["rows"][1]
    assert f"{pro['cache_bytes'] / GIB:.3f}" == "9.617"
    assert any("BF16 linears 1," in line for line in said["assumptions"])
    raw = json_of("compare", "--count-bf16", 1, "--count-core", 1, "--count-fp4", 1)
    assert f"{raw['rows'][-2]['flops_of_v32']:.1%}" == "26.5%"


def test_prices_and_rates_are_options() -> None:
    def output(*arguments: object) -> Any:
        found = json_of("v4-flash", "--chip", "mi300x", *arguments)["plans"][0]
        return found["usd_per_million"]["output"]

    usual, dear = output("--price", 10000), output("--price", 20000, "--years", 2)
    assert dear["depreciation"] == pytest.approx(4 * usual["depreciation"])
    assert output("--power-price", 0.2)["power"] == pytest.approx(2 * usual["power"])
    assert output("--busy", 0.5, "--other", 3)["other"] > 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--count", 8],
        ["--price", 30000],
        ["--ram", "256GiB"],
        ["--memory", "80GiB", "--ram", "256GiB"],
    ],
)
def test_what_is_of_a_chip_needs_one(arguments: list[object]) -> None:
    with pytest.raises(RequestError, match="is of a chip, and none is named") as caught:
        run("v4-flash", *arguments)
    assert "--chip" in str(caught.value.hint)


def test_the_memory_of_a_host_is_only_beside_a_chip_that_has_one() -> None:
    with pytest.raises(RequestError, match=r"EPYC.* has one memory"):
        run("v4-pro", "--chip", "epyc-9755", "--ram", "1TB")
    found = json_of("v4-flash", "--chip", "rtx-4090", "--chip", "epyc-9755", "--ram", "256GiB")
    assert found["plans"][0]["experts"]["ram"] > 0.9


@pytest.mark.parametrize("kind", ["text", "bytes", "folder", "foreign"])
def test_a_folder_that_holds_something_else_is_a_note(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "speed.jsonl"
    if kind == "folder":
        path.mkdir()
    else:
        path.write_bytes({"text": b"hello\n", "bytes": b"\xff\xfe", "foreign": b"[]\n"}[kind])
    result = run("mini", "--results", tmp_path)
    assert result.exit_code == 0 and "fits" in result.stdout
    assert "planned without records" in result.stderr
    with pytest.raises(OverleapError, match=r"speed\.jsonl"):
        run("check", "--results", tmp_path)


def this_machines(
    folder: Path, model: str = "mini", threads: int | None = None, device: str = "cpu"
) -> None:
    """Two records in which this machine writes 100 and 110 tokens a second at any depth."""
    from overleap import devices, machine

    lines = []
    for date, rate in (("2026-01-01T00:00", 100.0), ("2026-01-02T00:00", 110.0)):
        row = {"depth_tokens": 1024, "interval_tokens_per_s": 1000.0, "decode_tokens_per_s": rate}
        row |= {"cache_bytes": 546176, "base_bytes": 300 * 2**20, "peak_process_bytes": 330 * 2**20}
        where = {"cpu": devices.cpu_name(), "cores": machine.cores(), "device": device}
        settings = {"model": model, "backend": "auto", "threads": threads or machine.cores()}
        settings |= {"cache": "release", "chunk_tokens": 512, "decode_steps": 16}
        settings["config"] = json.dumps(ModelConfig.from_checkpoint(locate(model)).to_dict())
        facts = {"date": date, "machine": where, "settings": settings, "numbers": [row]}
        lines.append(json.dumps({"format": "overleap.record/1"} | facts) + "\n")
    (folder / "speed.jsonl").write_text("".join(lines))


def test_check_holds_records_against_each_other(tmp_path: Path) -> None:
    this_machines(tmp_path)
    said = json_of("check", "--results", tmp_path, "--save")
    assert [round(run["decode_error"], 3) for run in said["runs"]] == [0.1, -0.091]
    assert said["errors"]["cache_worst"] == 0 and said["errors"]["peak_worst"] < 0.2
    assert (tmp_path / "plan.jsonl").exists()
    shown = run("check", "--results", tmp_path).stdout
    assert "exact" in shown and "median (worst) error" in shown
    with pytest.raises(RequestError, match="has no record of this machine"):
        run("check", "--results", tmp_path / "nothing")


def test_records_refine_what_is_said_of_this_machine(tmp_path: Path) -> None:
    this_machines(tmp_path)
    known = json_of("mini", "--context", 1024, "--results", tmp_path)["measured_here"]
    assert known["own"] and known["runs"] == 2
    assert 100 <= 1 / known["step_s"] <= 110
    assert "measurements here of this model" in run("mini", "--results", tmp_path).stdout
    assert json_of("mini", "--results", tmp_path / "nothing")["measured_here"] is None
    for other in (("--cache", "wide"), ("--precision", "bf16")):
        assert json_of("mini", *other, "--results", tmp_path)["measured_here"] is None, other


@pytest.mark.parametrize("told", [True, False])
def test_records_are_recognised_with_half_the_threads_and_without_a_name(
    told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch takes a thread a physical core; Arm and macOS do not name the processor."""
    monkeypatch.setattr("overleap.machine.cores", lambda: 16)
    if not told:
        monkeypatch.setattr("overleap.devices.cpu_info", dict)
    this_machines(tmp_path, threads=8)
    known = json_of("mini", "--context", 1024, "--results", tmp_path)["measured_here"]
    assert known is not None and known["runs"] == 2
    assert len(json_of("check", "--results", tmp_path)["runs"]) == 2


def test_records_of_an_accelerator_say_nothing_of_the_processor(tmp_path: Path) -> None:
    this_machines(tmp_path, device="NVIDIA H100")
    assert json_of("mini", "--results", tmp_path)["measured_here"] is None
    with pytest.raises(RequestError, match="has no record of this machine"):
        run("check", "--results", tmp_path)
    assert len(json_of("check", "--results", tmp_path, "--every")["runs"]) == 2
