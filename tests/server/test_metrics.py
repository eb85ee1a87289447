"""Metrics: what is counted under which name, and what is no label."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from overleap.cache.store import DiskStats
from overleap.engine.request import Speculation, Stats
from overleap.server.metrics import Metrics
from overleap.server.usage import Usage

STATS = Stats(
    waiting=3, running=2, finished=10, read_tokens=1000, hit_tokens=500, generated_tokens=70,
    prefill_s=1.5, decode_s=2.5, pages=64, pages_free=60, cache_bytes=4096, peak_cache_bytes=8192,
    allocated_bytes=65536, peak_process_bytes=None,
    speculation=Speculation(state="on", checked=(10, 8), accepted=(8, 4), gain=1.2),
    disk=DiskStats(folder=Path("."), space_bytes=100, bytes=77, hit_tokens=128),
)  # fmt: skip


def values(metrics: Metrics) -> dict[str, float]:
    """Every sample, as name{value,...}, in the order of the labels' names."""
    found: dict[str, float] = {}
    for family in parse(metrics.render().decode()):
        for sample in family.samples:
            labels = ",".join(str(value) for _, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def a_day(metrics: Metrics) -> None:
    metrics.rejected(429, "rate")
    metrics.rejected(429, "rate")
    metrics.rejected(401, "auth")
    metrics.admitted("free", 500)
    metrics.started("free", 0.02)
    metrics.first_token("free", 0.2)
    metrics.next_token("free", 0.003)
    usage = Usage(cache_hit_tokens=400, cache_miss_tokens=100, output_tokens=7, machine_s=0.5)
    metrics.admitted("pro", 1)
    metrics.finished("chat", "free", "stop", usage, 1.0)
    metrics.engine(STATS)


def test_what_is_counted() -> None:
    metrics = Metrics()
    a_day(metrics)
    found = values(metrics)
    expected = {
        "overleap_rejections_total{rate,429}": 2,
        "overleap_rejections_total{auth,401}": 1,
        "overleap_requests_open{free}": 0,
        "overleap_requests_open{pro}": 1,
        "overleap_requests_total{chat,stop,free}": 1,
        "overleap_tokens_total{cache_hit,free}": 400,
        "overleap_tokens_total{cache_miss,free}": 100,
        "overleap_tokens_total{output,free}": 7,
        "overleap_machine_seconds_total{free}": 0.5,
        "overleap_time_to_first_token_seconds_sum{free}": 0.2,
        "overleap_inter_token_seconds_count{free}": 1,
        "overleap_queue_seconds_count{free}": 1,
        "overleap_request_seconds_count{free}": 1,
        "overleap_prompt_tokens_sum{free}": 500,
        "overleap_draining": 0,
        "overleap_queue_length": 3,
        "overleap_running": 2,
        "overleap_kv_pages": 64,
        "overleap_kv_pages_free": 60,
        "overleap_prefix_hit_tokens_total{memory}": 372,
        "overleap_prefix_hit_tokens_total{disk}": 128,
        "overleap_draft_checked_total": 18,
        "overleap_draft_accepted_total": 12,
        "overleap_generated_tokens_total": 70,
        "overleap_step_seconds_total{decode}": 2.5,
        "overleap_disk_bytes": 77,
    }
    assert {name: found.get(name) for name in expected} == expected
    metrics.draining(True)
    assert values(metrics)["overleap_draining"] == 1


def test_two_servers_in_a_process_are_apart() -> None:
    one, other = Metrics(), Metrics()
    one.rejected(503, "overload")
    assert "overleap_rejections_total{overload,503}" in values(one)
    assert "overleap_rejections_total{overload,503}" not in values(other)


def test_an_engine_not_seen_yet_says_nothing() -> None:
    assert "overleap_running" not in values(Metrics())


def test_labels_are_few() -> None:
    """No label could hold a key, a user or a text."""
    metrics = Metrics()
    a_day(metrics)
    names = {label for family in parse(metrics.render().decode()) for s in family.samples
             for label in s.labels}  # fmt: skip
    assert names == {"dialect", "tier", "reason", "status", "kind", "storage", "le"}
    assert re.match(r"text/plain; version=", metrics.content_type)


def test_promtool_finds_nothing_wrong() -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    metrics = Metrics()
    a_day(metrics)
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=metrics.render(), capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr.decode()
