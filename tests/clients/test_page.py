"""The page at / in a real browser: chat, reasoning, progress, stop, quota, hostile text, access.

Chromium is Debian's, found by path; the test skips with a reason where it or a library is missing.
"""

import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from overleap.config import LayerKind, ModelConfig
from tests.server.live import MINI, Live, bundled, live, scripted

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed (Debian: apt-get install chromium)"
)
ROOT = Path(__file__).parents[2]
AXE = ROOT / "build" / "clients" / "node_modules" / "axe-core" / "axe.min.js"
ARTEFACTS = ROOT / "build" / "screenshots"
WAIT_MS = 30_000

TAGS = ("script", "img src=x onerror", "svg onload", "iframe srcdoc", "a href", "details ontoggle")
CALLS = ("alert(1)", "fetch('//evil.example')", "document.title='taken'", "parent.taken=1")
PAYLOADS = [
    template.format(tag=tag, name=tag.split()[0], call=call)
    for template in (
        "<{tag}={call}>", '<{tag}="{call}">', "<{name}>{call}</{name}>", '"><{tag}={call}>',
        "</div><{tag}={call} autofocus>",
    )
    for tag in TAGS
    for call in CALLS
][:100]  # fmt: skip
HOSTILE = ["\n".join(PAYLOADS[n : n + 25]) for n in range(0, 100, 25)]


def script(prompt: str) -> str:
    question = prompt.rsplit("<｜User｜>", 1)[1].split("<｜Assistant｜>")[0]
    said = "word " * 400 if question == "long" else "Hello from the model."
    said, thought = (question, question) if question in HOSTILE else (said, "A thought.")
    return said if prompt.endswith("</think>") else f"{thought}</think>{said}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tmp_path_factory.mktemp("page"), scripted(script)) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as tool:
        opened = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(server: Live, browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1200, "height": 800}, bypass_csp=False)
    opened = context.new_page()
    opened.foreign = []
    opened.on("request", lambda request: opened.foreign.append(request.url))
    opened.on("dialog", lambda dialog: pytest.fail(f"a dialog opened: {dialog.message}"))
    opened.goto(server.url)
    playwright.expect(opened.locator("#model")).to_contain_text("test-model")
    yield opened
    outside = [url for url in opened.foreign if not url.startswith((server.url, "data:"))]
    context.close()
    assert outside == [], "the page asked other servers"


def say(page: Any, text: str) -> None:
    page.fill("#ask", text)
    page.press("#ask", "Enter")


def ended(page: Any) -> None:
    playwright.expect(page.locator("#send")).to_be_enabled(timeout=WAIT_MS)


def a_day_of(tokens: int, folder: Path) -> Path:
    """Tiers that leave whoever asks so many tokens."""
    tiers = folder / "tiers.toml"
    tiers.write_text(
        'currency = "USD"\n'
        f"[tiers.admin]\nadmin = true\ntokens_per_day = {tokens}\n"
        "price_per_million = { cache_hit = 0, cache_miss = 0, output = 0 }\n"
    )
    return tiers


def keep(page: Any, name: str) -> None:
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=ARTEFACTS / f"{name}.png")


def test_a_chat_with_folded_reasoning_and_figures(page: Any) -> None:
    say(page, "hi")
    playwright.expect(page.locator("article.assistant .text")).to_have_text(
        "Hello from the model.", timeout=WAIT_MS
    )
    ended(page)
    assert page.locator("article.assistant details").get_attribute("open") is None
    assert page.locator(".reasoning").text_content() == "A thought."
    playwright.expect(page.locator("#answer")).to_contain_text("from the cache")
    say(page, "and again")
    playwright.expect(page.locator("article.assistant")).to_have_count(2)
    ended(page)
    keep(page, "chat")


def test_the_speed_is_that_of_tokens_and_not_of_chunks(page: Any) -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 501, "total_tokens": 510,
             "prompt_cache_hit_tokens": 0, "prompt_cache_miss_tokens": 9}  # fmt: skip
    page.evaluate(
        """usage => { const now = performance.now(); figures(usage, now - 3000, now - 2000); }""",
        usage,
    )
    shown = re.search(r"tokens a second([\d.]+)", page.locator("#answer").text_content())
    assert shown is not None and 200 < float(shown[1]) <= 250


def test_the_plan_of_the_model(page: Any) -> None:
    plan = page.locator("#plan")
    playwright.expect(plan).to_contain_text("users at full context")
    playwright.expect(plan).to_contain_text("1 of 8 at once")
    playwright.expect(plan).to_contain_text("MiB of")
    say(page, "hi")
    ended(page)
    playwright.expect(plan).to_contain_text("cost of a request so far")
    playwright.expect(plan).to_contain_text("USD")


def test_what_the_indexer_chose_is_shown_by_layer(browser: Any, tmp_path: Path) -> None:
    """Of the trained model: a picture with a row for each layer that chooses, and its words."""
    with live(tmp_path, bundled(), profile="mini") as server:
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.goto(server.url)
        playwright.expect(page.locator("#model")).to_contain_text("test-model")
        blank = page.evaluate("() => document.getElementById('chosen').toDataURL()")
        say(page, "The color of Alice is green. " * 600 + "What is the color of Alice?")
        ended(page)
        shown = page.locator("#chosen")
        playwright.expect(shown).to_have_attribute("aria-label", re.compile(r"layer \d+: \d+ of"))
        layers = re.findall(r"layer (\d+): (\d+) of (\d+)", shown.get_attribute("aria-label"))
        config = ModelConfig.from_checkpoint(MINI)
        choosing = [n for n, kind in enumerate(config.layer_kinds) if kind is LayerKind.CSA]
        assert [int(layer) for layer, _, _ in layers] == choosing
        for _, chosen, visible in layers:
            assert int(chosen) == config.index_topk < int(visible)
        assert page.evaluate("() => document.getElementById('chosen').toDataURL()") != blank
        assert page.evaluate("() => document.getElementById('context').value") > 0.05
        playwright.expect(page.locator("#server")).to_contain_text("cache in use")
        keep(page, "chosen")
        page.close()


def test_stopping_ends_the_request_in_the_engine(page: Any, server: Live) -> None:
    say(page, "long")
    playwright.expect(page.locator("article.assistant .text")).to_contain_text(
        "word", timeout=WAIT_MS
    )
    page.keyboard.press("Escape")
    playwright.expect(page.locator("article.assistant")).to_contain_text("(stopped)")
    ended(page)
    page.wait_for_timeout(500)
    assert server.service.bridge.running == 0


def test_a_question_that_got_no_answer_comes_back(page: Any) -> None:
    """Refused, or stopped before a word: it is neither shown as asked nor sent along later."""
    refusal = json.dumps({"error": {"message": "too much is waiting"}})
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=503, body=refusal))
    say(page, "a long document")
    ended(page)
    assert page.input_value("#ask") == "a long document"
    assert page.locator("article").count() == 0 and page.evaluate("() => messages.length") == 0
    playwright.expect(page.locator("#note")).to_have_text("too much is waiting")
    page.unroute("**/v1/chat/completions")
    page.press("#ask", "Enter")
    playwright.expect(page.locator("article.assistant .text")).to_have_text(
        "Hello from the model.", timeout=WAIT_MS
    )
    ended(page)
    assert page.evaluate("() => messages.length") == 2


def test_who_scrolled_back_stays_there(page: Any) -> None:
    say(page, "long")
    ended(page)
    say(page, "long")
    page.wait_for_function("() => $('talk').scrollTop > 200", timeout=WAIT_MS)
    page.evaluate("() => { $('talk').scrollTop = 0; }")
    ended(page)
    assert page.evaluate("() => $('talk').scrollTop") == 0
    assert page.locator("[aria-busy]").count() == 0


def test_only_text_is_attached(page: Any) -> None:
    def attach(raw: bytes) -> None:
        page.set_input_files("#file", {"name": "a.txt", "mimeType": "text/plain", "buffer": raw})

    attach("caf\u00e9".encode("latin-1"))
    playwright.expect(page.locator("#note")).to_contain_text("a.txt cannot be read, or is no UTF-8")
    assert page.input_value("#ask") == ""
    attach("caf\u00e9".encode())
    page.wait_for_function("() => $('ask').value.startsWith('caf\u00e9')", timeout=WAIT_MS)
    playwright.expect(page.locator("#note")).to_be_hidden()


def test_an_answer_that_was_cut_says_so(browser: Any, tmp_path: Path) -> None:
    with live(tmp_path, scripted(script), tiers=a_day_of(20, tmp_path)) as server:
        page = browser.new_page()
        page.goto(server.url)
        playwright.expect(page.locator("#server")).to_contain_text("20")
        say(page, "long")
        playwright.expect(page.locator("article.assistant")).to_contain_text("(cut: no more tokens")
        page.close()


def test_progress_of_a_long_prompt_is_shown(browser: Any, tmp_path: Path) -> None:
    """The test grants the steps, so the page stands still while a part of the prompt is read."""
    gate = threading.Semaphore(0)
    with live(tmp_path, scripted(script, gate=gate)) as server:
        page = browser.new_page()
        page.goto(server.url)
        playwright.expect(page.locator("#model")).to_contain_text("test-model")
        try:
            say(page, "attached " * 6000)
            gate.release()
            page.wait_for_function("() => $('bar').value > 0", timeout=WAIT_MS)
            playwright.expect(page.locator("#reading")).to_be_visible()
            label = page.locator("#barlabel").text_content()
            read, total = re.fullmatch(
                r"Reading: ([\d,]+) of ([\d,]+) tokens, 0 from the cache", label
            ).groups()
            done = int(read.replace(",", "")) / int(total.replace(",", ""))
            assert 0 < done < 1, label
            assert page.evaluate("() => $('bar').value") == pytest.approx(done)
        finally:
            gate.release(10**6)
        ended(page)
        playwright.expect(page.locator("#reading")).to_be_hidden()
        page.close()


def test_a_used_up_quota_is_told(browser: Any, tmp_path: Path) -> None:
    with live(tmp_path, scripted(script), tiers=a_day_of(5, tmp_path)) as server:
        page = browser.new_page()
        page.goto(server.url)
        playwright.expect(page.locator("#server")).to_contain_text("5")
        say(page, "hi")  # 5 tokens, which leave none to answer with
        playwright.expect(page.locator("#note")).to_be_visible(timeout=WAIT_MS)
        assert (
            "today" in page.locator("#note").text_content()
            or "day" in page.locator("#note").text_content()
        )
        keep(page, "quota")
        page.close()


def test_a_hundred_hostile_texts_do_nothing(page: Any) -> None:
    """Said by the user, thought and answered by the model, and in the server's complaint."""
    assert len(set(PAYLOADS)) == 100
    for turn, hostile in enumerate(HOSTILE, 1):
        say(page, hostile)
        ended(page)
        for place in ("article.user .text", "article.assistant .reasoning",
                      "article.assistant .text"):  # fmt: skip
            playwright.expect(page.locator(place)).to_have_count(turn)
            assert page.locator(place).last.text_content() == hostile
    known = page.evaluate("() => document.querySelectorAll('body *').length")
    refusal = json.dumps({"error": {"message": "\n".join(PAYLOADS)}})
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=400, body=refusal))
    say(page, "hi")
    ended(page)
    assert page.locator("#note").text_content() == "\n".join(PAYLOADS)
    found = page.evaluate(
        """() => ({title: document.title, taken: window.taken || null,
        inside: document.querySelectorAll('.text *, .reasoning *, #note *').length,
        talk: document.querySelectorAll('#talk *').length,
        all: document.querySelectorAll('body *').length})"""
    )
    # A turn is two elements of the user's and five of the model's; of the last nothing is left.
    whole = {"talk": 7 * len(HOSTILE), "all": known}
    assert found == {"title": "Overleap", "taken": None, "inside": 0, **whole}


def test_foreign_scripts_are_refused_by_policy(page: Any) -> None:
    page.evaluate(
        """() => { const made = document.createElement('script');
        made.textContent = 'window.taken = 1';
        document.body.append(made); document.body.insertAdjacentHTML('beforeend',
        '<img src="x" onerror="window.taken = 2">'); }"""
    )
    page.wait_for_timeout(200)
    assert page.evaluate("() => window.taken || null") is None


@pytest.mark.parametrize(
    ("scheme", "width"), [("light", 1200), ("dark", 1200), ("light", 390), ("dark", 390)]
)
def test_no_serious_finding_of_axe(browser: Any, server: Live, scheme: str, width: int) -> None:
    if not AXE.exists():
        pytest.skip("axe-core is not installed (npm install --prefix build/clients axe-core)")
    context = browser.new_context(
        color_scheme=scheme, viewport={"width": width, "height": 800}, bypass_csp=True
    )
    page = context.new_page()
    page.goto(server.url)
    playwright.expect(page.locator("#model")).to_contain_text("test-model")
    say(page, "hi")
    ended(page)
    page.evaluate(AXE.read_text("utf-8"))
    found = page.evaluate("() => axe.run()")
    keep(page, f"{scheme}-{width}")
    serious = [
        (one["id"], [node["target"] for node in one["nodes"]])
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]
    assert serious == []
    wide = page.evaluate("() => document.documentElement.scrollWidth > window.innerWidth")
    assert not wide, "the page scrolls sideways"
    context.close()
