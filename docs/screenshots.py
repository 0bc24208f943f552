"""Take the screenshots of docs/serving.md from a running server.

    minllama serve runs/demo-lora --alias smollm2=default
    python docs/screenshots.py http://127.0.0.1:8000

Needs Playwright and Debian's chromium. The server must have a classifier and a language model.
"""

import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

IMAGES = Path(__file__).parent / "images"
TEXT = "The lamp is lovely, but it came with a broken switch and nobody answers my mails."


def decide(page: Page) -> None:
    page.fill("#text", TEXT)
    page.click("#decide-form .primary")
    page.wait_for_selector(".words")


def ask(page: Page) -> None:
    page.click("label[for=by-questions]")
    page.fill("#text", TEXT)
    page.fill("#question-1-instructions", "The customer is satisfied.")
    page.click("#decide-form .primary")
    page.wait_for_selector("#decide-result .answer")
    page.evaluate("scrollTo(0, 0)")


def write(page: Page) -> None:
    page.click("#tab-write")
    page.click("label[for=form-chat]")
    page.click("#options summary")
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "60")
    page.fill("#message", "Why is the sky blue?")
    page.click("#write-form .primary")
    page.wait_for_selector("#write-form .stop", state="hidden", timeout=60_000)
    page.click("#options summary")
    page.click("#write-form .code summary")
    page.click("label[for=write-python]")
    page.evaluate("scrollTo(0, 0)")


SHOTS = {
    "serve-decide": (decide, "light", (1100, 720)),
    "serve-write": (write, "dark", (1100, 960)),
    "serve-phone": (ask, "light", (360, 1270)),
}


def main() -> None:
    """Open the page at the address of the command line, and write docs/images/*.png."""
    (url,) = sys.argv[1:]
    IMAGES.mkdir(exist_ok=True)
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=arguments
        )
        for name, (act, scheme, (width, height)) in SHOTS.items():
            page = browser.new_page(
                color_scheme=scheme,
                reduced_motion="reduce",
                viewport={"width": width, "height": height},
            )
            page.goto(url)
            page.locator("#state:not(:empty)").wait_for()
            act(page)
            page.screenshot(path=IMAGES / f"{name}.png")
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
