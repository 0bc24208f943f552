"""Claims about the page at `/`, in a real browser."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest

from minllama.server.run import HttpServer
from tests.server.browsing import chromium, findings, opened
from tests.server.running import running

KEY = "the-right-key"
TEXT = "A fine film 🌟, but it drags on and on"
SHAPES = ({"width": 320, "height": 640}, {"width": 1200, "height": 800})


@pytest.fixture(scope="module")
def classifier(long_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier by label words, on the tiny model."""
    from minllama.classification import LlamaZeroShotClassifier, load_classifier, save_classifier
    from minllama.model.llama import Llama
    from minllama.tokenizer.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("classifier")
    llama = Llama.from_pretrained(long_base, device="cpu", dtype="float32")
    tokenizer = Tokenizer.from_pretrained(long_base)
    made = LlamaZeroShotClassifier(llama, tokenizer, ["bad", "good", "so so"], "{text} It is")
    save_classifier(made, folder)
    load_classifier(folder, device="cpu")
    return folder


@pytest.fixture(scope="module")
def both(long_base: Path, classifier: Path) -> Iterator[HttpServer]:
    """The model `tiny` and the classifier `films`."""
    with running({"tiny": long_base, "films": classifier}) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def page(browser: Any, both: HttpServer) -> Iterator[Any]:
    with opened(browser, both.url) as found:
        loaded(found)
        yield found


def asked(page: Any, button: str, path: str) -> tuple[dict[str, Any], Any]:
    """The body that a button sends to a path, and its answer, read to its end."""
    with page.expect_response(f"**{path}") as caught:
        page.click(button)
    request = caught.value.request
    body = json.loads(request.post_data)
    if body.get("stream"):
        page.wait_for_selector("#write-form .stop", state="hidden")
        return body, None
    return body, caught.value.json()


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.01)


def says(page: Any, selector: str, words: str) -> None:
    """Wait until an element does (Playwright's own waiting needs what the policy forbids)."""
    until(lambda: words in page.locator(selector).inner_text())


def loaded(page: Any) -> None:
    says(page, "#state", "served")


def spelled(p: float) -> str:
    """A probability as the page writes it."""
    if 0 < p < 0.0005:
        return "< 0.001"
    return "> 0.999" if 0.9995 < p < 1 else f"{p:.3f}"


def rows(page: Any, table: str = "#decide-result table") -> list[list[str]]:
    """The names and numbers of a table, as they are read out."""
    found = page.locator(f"{table} >> tbody >> tr").all()
    return [row.locator("th, td:not([aria-hidden])").all_inner_texts() for row in found]


def test_the_page_is_one_answer_with_a_strict_policy(server: HttpServer) -> None:
    answer = httpx.get(server.url)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = dict(
        part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    for tag, source in (("script", "script-src"), ("style", "style-src")):
        (text,) = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(sha256(text.encode()).digest()).decode()
        assert policy[source] == f"'sha256-{digest}'"
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|[ :]url\(""", answer.text)
    assert "innerHTML" not in answer.text
    assert "{{" not in answer.text
    head = httpx.head(server.url)
    assert (head.status_code, head.content) == (200, b"")


def test_a_trained_classifier_decides(page: Any) -> None:
    assert page.locator("#decide-model-hint").inner_text() == "Labels: bad, good, so so"
    page.fill("#text", TEXT)
    body, answer = asked(page, "#decide-form .primary", "/classify")
    assert body == {"model": "films", "input": TEXT, "explain": True}
    (entry,) = answer["data"]
    page.wait_for_selector("#decide-result .answer")
    assert page.locator("#decide-result .answer").inner_text() == entry["label"]
    probabilities = dict(zip(["bad", "good", "so so"], entry["probs"], strict=True))
    expected = sorted(probabilities.items(), key=lambda each: -each[1])
    assert rows(page, "#decide-result > table") == [[name, spelled(p)] for name, p in expected]
    assert f"{100 * max(entry['probs']):.1f} %" in page.locator(".facts").inner_text()
    widths = page.evaluate(
        """[...document.querySelectorAll("#decide-result td.bar")].map(
        (cell) => cell.firstChild.getBoundingClientRect().width / cell.clientWidth)"""
    )
    assert widths == pytest.approx([p for _, p in expected], abs=0.02)


def test_words_are_explained_as_the_library_does(page: Any, classifier: Path) -> None:
    from minllama import explain, load_classifier

    page.fill("#text", TEXT)
    page.click("#decide-form .primary")
    page.wait_for_selector(".words")
    if page.locator("#unit option").count() > 1:
        page.select_option("#unit", "log_odds_effects")
    found = explain(load_classifier(classifier, device="cpu", dtype="float32"), TEXT)
    (target,) = found.targets
    page.click("text=The strongest words as a table")
    shown = rows(page, ".result details table")
    assert target.log_odds_effects is not None
    expected = sorted(
        zip(found.words, target.log_odds_effects, strict=True), key=lambda each: -abs(each[1] or 0)
    )
    assert [word for word, _ in shown] == [word for word, _ in expected][:10]
    numbers = [float(number.replace("−", "-")) for _, number in shown]
    assert numbers == pytest.approx([effect for _, effect in expected][:10], abs=2e-4)
    assert all(number[0] in "+−0" for _, number in shown)
    # The text is whole, and each colored word has a sign.
    colored = page.evaluate(
        """() => {
        const copy = document.querySelector(".words").cloneNode(true);
        const effects = [...copy.querySelectorAll("rt")];
        effects.forEach((effect) => effect.remove());
        return [copy.textContent, effects.map((effect) => effect.textContent)];
        }"""
    )
    assert colored[0] == TEXT
    assert colored[1]
    assert all(effect[0] in "+−0" for effect in colored[1])


def test_labels_decide_without_training(page: Any) -> None:
    page.click("label[for=by-labels]")
    page.fill("#text", TEXT)
    page.fill("#labels", "news\n\n  a story ")
    page.fill("#decide-prompt", "{text} That is")
    page.uncheck("#explain")
    body, answer = asked(page, "#decide-form .primary", "/classify")
    assert body == {
        "model": "tiny",
        "input": TEXT,
        "labels": ["news", "a story"],
        "prompt": "{text} That is",
    }
    page.wait_for_selector("#decide-result .answer")
    assert page.locator("#decide-result .answer").inner_text() == answer["data"][0]["label"]
    assert page.locator(".words").count() == 0


def test_questions_are_answered_in_order(page: Any) -> None:
    page.click("label[for=by-questions]")
    page.fill("#text", TEXT)
    for _ in range(2):
        page.click("#add-question")
    page.fill("#question-2-options", "film: moving pictures\nbook")
    body, answer = asked(page, "#decide-form .primary", "/v1/decisions")
    assert [question["type"] for question in body["questions"]] == ["predicate", "choice", "score"]
    assert body["questions"][1]["choices"] == [
        {"value": "film", "description": "moving pictures"},
        {"value": "book"},
    ]
    assert body["questions"][2]["levels"][0] == {"label": "not at all"}
    page.wait_for_selector("#decide-result h3")
    predicate, choice, score = answer["answers"]
    headlines = page.locator("#decide-result .answer").all_inner_texts()
    is_true = predicate["probability"] >= 0.5
    assert headlines == [
        "true" if is_true else "false",
        choice["choice"],
        f"{score['score']:.2f} of 2",
    ]
    facts = page.locator("#decide-result .facts").all_inner_texts()
    assert f"confidence {choice['confidence']:.3f}" in facts[1]
    page.click("text=Remove >> nth=0")
    assert page.locator(".question legend").all_inner_texts() == ["Question 1", "Question 2"]


def test_a_prompt_is_continued_as_the_route_does(page: Any, both: HttpServer) -> None:
    page.click("#tab-write")
    page.fill("#prompt", "Once upon a time")
    page.click("#options summary")
    page.fill("#max_tokens", "24")
    page.fill("#temperature", "0")
    page.fill("#stop", "never there\\n")
    body, _ = asked(page, "#write-form .primary", "/v1/completions")
    assert body["stop"] == ["never there\n"]
    assert body["stream"] is True
    whole = httpx.post(
        f"{both.url}/v1/completions",
        json={"model": "tiny", "prompt": "Once upon a time", "max_tokens": 24, "temperature": 0},
    ).json()
    expected = "Once upon a time" + whole["choices"][0]["text"]
    assert page.locator("#written").text_content() == expected
    speed = page.locator("#speed").inner_text()
    n_tokens = whole["usage"]["completion_tokens"]
    assert re.search(rf"{n_tokens} tokens · [\d.]+ tokens/s · first after [\d.]+ s$", speed)


def test_a_chat_goes_on(page: Any) -> None:
    page.click("#tab-write")
    page.click("label[for=form-chat]")
    page.click("#options summary")
    page.fill("#max_tokens", "8")
    page.fill("#system", "Be brief.")
    page.fill("#message", "Hello <b>you</b>")
    page.press("#message", "Enter")
    page.wait_for_selector("#clear-chat")
    reply = page.locator("#chat .message p").nth(1).text_content()
    assert page.locator("#message").input_value() == ""
    page.fill("#message", "And now?")
    body, _ = asked(page, "#write-form .primary", "/v1/chat/completions")
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello <b>you</b>"},
        {"role": "assistant", "content": reply},
        {"role": "user", "content": "And now?"},
    ]
    assert page.locator("#chat .message.user p").all_inner_texts() == [
        "Hello <b>you</b>",
        "And now?",
    ]
    page.click("#clear-chat")
    assert page.locator("#chat .message").count() == 0


def test_writing_is_stopped(browser: Any, long_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running({"tiny": long_base}) as server:
        engine = server.service.registry.get("tiny").engine
        forward = engine.forward

        def slowly(*args: Any, **options: Any) -> Any:
            time.sleep(0.02)
            return forward(*args, **options)

        monkeypatch.setattr(engine, "forward", slowly)
        with opened(browser, f"{server.url}/#write") as page:
            loaded(page)
            page.fill("#prompt", "Once upon a time")
            page.click("#options summary")
            page.fill("#max_tokens", "900")
            page.click("#write-form .primary")
            until(lambda: len(page.locator("#written").inner_text()) > 40)
            assert server.service.n_in_flight == 1
            page.click("#write-form .stop")
            page.wait_for_selector("#write-form .stop", state="hidden")
            until(lambda: not server.service.n_in_flight)
            assert page.locator("#speed").inner_text().startswith("stopped")
            assert len(page.locator("#written").inner_text()) > 40
            assert page.locator("#write-form .error").is_hidden()
            assert page.locator("#written").get_attribute("aria-busy") is None


def test_the_key_is_asked_for_and_kept_in_the_tab_only(browser: Any, long_base: Path) -> None:
    with running({"tiny": long_base}, keys=(KEY,)) as server, opened(browser, server.url) as page:
        page.wait_for_selector("#key")
        assert "needs an API key" in page.locator("#key-trouble").inner_text()
        assert page.evaluate("document.activeElement.id") == "key-value"
        for wrong, words in (("wrong", "does not accept"), ("ключ", "without spaces")):
            page.fill("#key-value", wrong)
            page.press("#key-value", "Enter")
            says(page, "#key-trouble", words)
        page.fill("#key-value", KEY)
        page.press("#key-value", "Enter")
        page.wait_for_selector("#key", state="hidden")
        kept = page.evaluate(
            "[JSON.stringify(sessionStorage), localStorage.length, document.cookie]"
        )
        assert KEY in kept[0]
        assert kept[1:] == [0, ""]
        page.click("#tab-write")
        page.fill("#prompt", "Once")
        asked(page, "#write-form .primary", "/v1/completions")
        assert page.locator("#write-form .error").is_hidden()
        page.click("#write-form .code summary")
        for kind in ("curl", "python"):
            page.click(f"label[for=write-{kind}]")
            code = page.locator("#write-form pre").inner_text()
            assert "MINLLAMA_API_KEY" in code
            assert KEY not in code
        assert KEY not in page.content()
        page.reload()
        page.wait_for_selector("#forget-key")
        page.click("#forget-key")
        page.wait_for_selector("#key")
        assert page.evaluate("sessionStorage.length") == 0


def streaming(body: str) -> Callable[[Any], None]:
    """Answers a request with a stream of these bytes."""
    return lambda route: route.fulfill(body=body, content_type="text/event-stream")


def test_errors_of_the_server_are_said_in_words(page: Any) -> None:
    page.click("#tab-write")
    page.click("#options summary")
    error = page.locator("#write-form .error")
    for value, words in (
        ("5", "The server says: temperature"),
        ("warm", "Temperature must be a number."),
    ):
        page.fill("#temperature", value)
        page.click("#write-form .primary")
        error.wait_for()
        says(page, "#write-form .error", words)
    assert page.locator("#temperature").get_attribute("aria-invalid") == "true"
    page.fill("#temperature", "")
    page.route("**/v1/completions", lambda route: route.abort())
    page.click("#write-form .primary")
    says(page, "#write-form .error", "cannot be reached")
    page.unroute("**/v1/completions")
    cut = 'data: {"choices": [{"text": "Half"}]}\n\n'
    ends = {
        "": "ended too early",
        'data: {"error": {"message": "out of memory"}}\n\n': "The server says: out of memory.",
        "data: {broken\n\n": "cut in the middle",
    }
    for end, words in ends.items():
        page.route("**/v1/completions", streaming(cut + end))
        page.click("#write-form .primary")
        says(page, "#write-form .error", words)
        assert page.locator("#written").inner_text().endswith("Half")
        page.unroute("**/v1/completions")
    page.fill("#max_tokens", "4")
    asked(page, "#write-form .primary", "/v1/completions")
    assert error.is_hidden()


def test_texts_are_never_html(page: Any) -> None:
    hostile = '<img src=x onerror="document.title=1"><script>document.title = 2</script>&amp;'
    page.click("label[for=by-labels]")
    page.fill("#text", hostile)
    page.fill("#labels", f"{hostile}\nother")
    asked(page, "#decide-form .primary", "/classify")
    page.wait_for_selector("#decide-result .answer")
    page.click("#decide-form .code summary")
    assert hostile in [name for name, _ in rows(page, "#decide-result > table")]
    page.click("#tab-write")
    page.fill("#prompt", hostile)
    asked(page, "#write-form .primary", "/v1/completions")
    assert page.locator("#written .given").inner_text() == hostile
    assert page.title() == "minllama"
    assert page.locator("main img, main script").count() == 0


@pytest.mark.parametrize("kind", ["curl", "python"])
def test_the_shown_code_runs(page: Any, kind: str) -> None:
    if kind == "curl" and shutil.which("curl") is None:
        pytest.skip("needs curl")

    def run(form: str) -> str:
        page.click(f"label[for={form}-{kind}]")
        code = page.locator(f"#{form}-form pre").inner_text()
        command = ["bash", "-c", code] if kind == "curl" else [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    environment = {**os.environ, "PYTHONPATH": "", "PYTHONIOENCODING": "utf-8"}
    text = "It's \"fine\" $HOME `ls` \\n 🌟\n'''"
    page.fill("#text", text)
    page.click("#decide-form .code summary")
    assert "good" in run("decide")
    page.click("label[for=by-questions]")
    page.click("#add-question")
    shown = run("decide")
    assert "predicate" in shown
    assert "choice" in shown
    page.click("#tab-write")
    page.fill("#prompt", text)
    page.click("#options summary")
    for name, value in (("max_tokens", "5"), ("temperature", "0"), ("top_k", "5")):
        page.fill(f"#{name}", value)
    page.fill("#stop", "it's\n\\n")
    page.click("#write-form .code summary")
    assert run("write")


@pytest.mark.parametrize("shape", SHAPES, ids=["phone", "desktop"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_is_accessible(
    browser: Any, both: HttpServer, shape: dict[str, int], scheme: str
) -> None:
    def check() -> None:
        assert page.evaluate("document.documentElement.scrollWidth") <= shape["width"]
        assert findings(page) == []

    with opened(browser, both.url, viewport=shape, color_scheme=scheme) as page:
        loaded(page)
        check()
        page.fill("#text", TEXT + " Donaudampfschifffahrtsgesellschaftskapitänsmützenabzeichen")
        asked(page, "#decide-form .primary", "/classify")
        page.wait_for_selector("#decide-result .answer")
        for summary in page.locator("#decide summary").all():
            summary.click()
        check()
        page.click("label[for=by-questions]")
        page.click("#add-question")
        page.click("#add-question")
        asked(page, "#decide-form .primary", "/v1/decisions")
        page.wait_for_selector("#decide-result h3")
        check()
        page.click("#tab-write")
        for summary in page.locator("#write summary").all():
            summary.click()
        page.fill("#max_tokens", "30")
        asked(page, "#write-form .primary", "/v1/completions")
        check()
        page.click("label[for=form-chat]")
        page.fill("#max_tokens", "wrong")
        page.click("#write-form .primary")
        page.wait_for_selector("#write-form .error")
        check()


def test_everything_is_done_by_keyboard(browser: Any, both: HttpServer) -> None:
    with opened(browser, both.url) as page:
        loaded(page)
        keyboard = page.keyboard

        def focused() -> str:
            return str(page.evaluate("document.activeElement.id"))

        def tab_to(*ids: str) -> None:
            for _ in range(30):
                keyboard.press("Tab")
                if focused() in ids:
                    return
            raise AssertionError(f"{ids} cannot be reached")

        tab_to("tab-decide")
        ring = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert ring == "solid"
        tab_to("by-classifier")
        keyboard.press("ArrowRight")
        assert focused() == "by-labels"
        tab_to("text")
        keyboard.press("Control+a")
        keyboard.type("Not bad")
        keyboard.press("Control+Enter")
        page.wait_for_selector("#decide-result .answer")
        page.focus("#tab-decide")
        keyboard.press("ArrowRight")
        assert focused() == "tab-write"
        assert page.locator("#decide").is_hidden()
        assert page.locator("#tab-write").get_attribute("aria-selected") == "true"
        tab_to("prompt")
        keyboard.press("Control+a")
        keyboard.type("Once")
        keyboard.press("Control+Enter")
        says(page, "#speed", "tokens/s")
        page.focus("#tab-write")
        keyboard.press("Home")
        assert focused() == "tab-decide"
