"""A visitor: Debian's chromium on the playground of a real service, and what it must never see."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from captionserve import CaptionClient
from captionserve_server.serving.ready import ReadyReport

from tests.conftest import DEMO

CHROMIUM = shutil.which("chromium")
WIDE = {"width": 1280, "height": 900}
PHONE = {"width": 360, "height": 740}
WAIT_MILLISECONDS = 30_000

# From now on the page reads so many lines of an answer, and no more until it is let.
HOLD = """
lines => {
  window.allowed = lines;
  const asked = window.fetch;
  window.fetch = async (path, question) => {
    const response = await asked(path, question);
    if (path !== "/api/caption") return response;
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    const encoder = new TextEncoder();
    let rest = "";
    let read = 0;
    const held = new ReadableStream({
      async pull(controller) {
        for (;;) {
          const end = rest.indexOf("\\n") + 1;
          if (end) {
            while (read >= window.allowed) {
              question.signal.throwIfAborted();
              await new Promise(requestAnimationFrame);
            }
            read += 1;
            controller.enqueue(encoder.encode(rest.slice(0, end)));
            rest = rest.slice(end);
            return;
          }
          const { done, value } = await reader.read();
          if (done) return controller.close();
          rest += value;
        }
      },
    });
    return new Response(held, { headers: response.headers });
  };
}
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Say where the pictures of the documentation go."""
    parser.addoption("--pictures", type=Path, help="folder for the pictures of docs/playground.md")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, in a run of its own: beside Playwright's event loop asyncio runs no other."""
    if not os.environ.get("TEST_PAGE"):
        pytest.skip("the page is tested by `make test-page`")
    from playwright.sync_api import sync_playwright

    assert CHROMIUM is not None, "apt-get install chromium"
    with sync_playwright() as playwright:
        # Root in a container has no sandbox to go to.
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@contextmanager
def playground(*arguments: str) -> Iterator[str]:
    """The command with these arguments on a port of its own; its address."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "captionserve_server.cli.main", "playground"),
            *(*arguments, "--listen", "127.0.0.1:0"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"http://\S+", line)
        assert found is not None, line + process.stderr.read()
        yield found.group()
    finally:
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 0


@pytest.fixture(scope="session")
def address(service: Callable[[str], ReadyReport]) -> Iterator[str]:
    """The playground of the demo's service."""
    with playground("--target", service(DEMO).grpc) as where:
        yield where


@pytest.fixture(scope="session")
def client(service: Callable[[str], ReadyReport]) -> Iterator[CaptionClient]:
    """A client of the same service, whose answers the page must show."""
    with CaptionClient(service(DEMO).grpc) as opened:
        yield opened


class Visitor:
    """One visit of the page.

    Attributes:
        page: Playwright's.
        complaints: what the browser's console said, and what the page raised.
        hosts: whom the page has asked.
    """

    def __init__(self, page: Any, address: str) -> None:
        """Open the page."""
        self.page = page
        self.complaints: list[str] = []
        self.hosts: set[str] = set()
        page.set_default_timeout(WAIT_MILLISECONDS)
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
        page.goto(address)
        page.wait_for_selector("html[data-ready]")

    def take_sample(self, name: str) -> None:
        """Caption one of the page's samples, and wait for its caption."""
        self.page.get_by_role("button", name=f"Sample {name}").click()
        self.wait()

    def wait(self) -> None:
        """Wait until nothing is in work."""
        self.page.wait_for_selector("#stage[data-state='done'], #stage[data-state='error']")

    def again(self) -> None:
        """Caption the shown picture again, and wait for it."""
        self.page.get_by_role("button", name="Caption again").click()
        self.wait()

    def hold(self, lines: int) -> None:
        """Let the page read so many lines of each answer; the rest once they are `let`."""
        self.page.evaluate(HOLD, lines)

    def let(self, lines: float) -> None:
        """Let the page read so many lines in all."""
        self.page.evaluate("lines => { window.allowed = lines; }", lines)

    @property
    def caption(self) -> str:
        """What the page shows as the caption."""
        text: str = self.page.inner_text("#caption")
        return " ".join(text.split())

    def set_option(self, name: str, value: str) -> None:
        """Fill in an option, whatever kind of control it has."""
        if not self.page.evaluate("document.getElementById('options-panel').open"):
            self.page.locator("#options-panel > summary").click()
        control = self.page.locator(f"#option-{name}")
        if control.evaluate("each => each.tagName") == "SELECT":
            control.select_option(label=value)
        else:
            control.fill(value)


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Callable[..., Visitor]]:
    """Opens the page; at the end the console must be empty, and only the own server asked."""
    visitors: list[Visitor] = []
    contexts: list[Any] = []

    def opened(viewport: dict[str, int] = WIDE, **more: Any) -> Visitor:
        contexts.append(browser.new_context(viewport=viewport, **more))
        visitors.append(Visitor(contexts[-1].new_page(), more.get("base_url", address)))
        return visitors[-1]

    yield opened
    for context in contexts:
        context.close()
    for visitor in visitors:
        assert visitor.complaints == []
        assert visitor.hosts <= {visitor.page.url.split("/")[2]}
