"""The page for everybody: axe-core, the keyboard alone, what is announced, and no motion."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.page.conftest import PHONE, WIDE, Visitor

Visit = Callable[..., Visitor]

# Everything that can be operated.
CONTROLS = "a[href], button, input, select, textarea, summary, [tabindex='0']"


def axe() -> str:
    import axe_playwright_python

    return (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()


def violations(visitor: Visitor) -> list[str]:
    visitor.page.evaluate(axe())
    found = visitor.page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    return [
        f"{each['id']}: {node['html'][:200]} {node.get('failureSummary', '')}"
        for each in found["violations"]
        for node in each["nodes"]
    ]


def empty(visitor: Visitor) -> None:
    """The page as it begins."""


def done(visitor: Visitor) -> None:
    visitor.take_sample("penguin")
    visitor.page.locator(".word").nth(1).click()


def everything_open(visitor: Visitor) -> None:
    done(visitor)
    visitor.page.locator("#options-panel > summary").click()
    visitor.page.get_by_label("also what was dropped").check()
    visitor.page.get_by_text("As a table").click()
    visitor.page.get_by_role("button", name="Mark regions").click()
    visitor.page.get_by_role("button", name="Add a region").click()


def growing(visitor: Visitor) -> None:
    visitor.hold(4)
    visitor.page.get_by_role("button", name="Sample penguin").click()
    visitor.page.locator(".tree .step").nth(3).wait_for()
    visitor.page.get_by_label("also what was dropped").check()


def failed(visitor: Visitor) -> None:
    visitor.set_option("num_beams", "99")
    visitor.take_sample("penguin")


@pytest.mark.parametrize("state", [empty, growing, done, everything_open, failed])
@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["wide", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(
    visit: Visit, scheme: str, viewport: dict[str, int], state: Callable[[Visitor], None]
) -> None:
    visitor = visit(viewport, color_scheme=scheme, reduced_motion="reduce")
    state(visitor)
    assert violations(visitor) == []


def test_axe_would_find_something(visit: Visit) -> None:
    visitor = visit()
    visitor.page.evaluate("document.getElementById('image').removeAttribute('alt')")
    visitor.page.evaluate("document.getElementById('canvas').hidden = false")
    assert any("image-alt" in each for each in violations(visitor))


@pytest.mark.parametrize("state", [empty, everything_open])
def test_the_keyboard_reaches_every_control_and_leaves_it(
    visit: Visit, state: Callable[[Visitor], None]
) -> None:
    visitor = visit(reduced_motion="reduce")
    state(visitor)
    page = visitor.page
    wanted = page.evaluate(
        """selector => {
          const all = [...document.querySelectorAll(selector)].filter(
            (each) => !each.disabled && each.checkVisibility());
          all.forEach((each, place) => { each.dataset.place = place; });
          return all.length;
        }""",
        CONTROLS,
    )
    page.evaluate(
        """() => {
          document.body.tabIndex = -1;
          document.body.focus();
          document.body.removeAttribute("tabindex");
        }"""
    )
    reached: dict[str, Any] = {}
    for _ in range(3 * wanted):
        page.keyboard.press("Tab")
        at = page.evaluate(
            """() => {
              const each = document.activeElement;
              if (!each || each === document.body) return null;
              // The file input shows its focus on its label.
              const shown = each.id === "file" ? document.querySelector("label[for=file]") : each;
              const style = getComputedStyle(shown);
              const seen = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
              return [each.dataset.place, seen];
            }"""
        )
        if at is None:
            break
        assert at[0] not in reached, "the keyboard goes in circles"
        reached[at[0]] = at[1]
    assert len(reached) == wanted
    assert all(reached.values()), "focus that cannot be seen"


def test_a_caption_is_made_and_looked_at_without_a_mouse(visit: Visit) -> None:
    visitor = visit()
    page = visitor.page
    page.get_by_role("button", name="Sample penguin").focus()
    page.keyboard.press("Enter")
    visitor.wait()
    page.locator(".word").nth(1).focus()
    page.keyboard.press("Space")
    assert page.locator("#heat").is_visible()
    # The focus stays on what was pressed, though the page was drawn anew.
    assert page.evaluate("document.activeElement.textContent") == "penguin"
    page.locator(".choice").nth(1).focus()
    page.keyboard.press("Enter")
    assert page.locator(".choice").nth(1).get_attribute("aria-pressed") == "true"
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"


def test_the_end_is_announced_and_single_words_are_not(visit: Visit) -> None:
    visitor = visit()
    visitor.page.evaluate(
        """() => {
          window.said = [];
          const status = document.querySelector("[role=status]");
          new MutationObserver(() => window.said.push(status.textContent))
            .observe(status, { childList: true });
        }"""
    )
    visitor.hold(4)
    visitor.page.get_by_role("button", name="Sample penguin").click()
    visitor.page.locator(".tree .step").nth(3).wait_for()
    # A tree that grows is not read out.
    live = "[aria-live], [role=status], [role=alert], [role=log], output"
    assert visitor.page.evaluate(f"document.querySelector('.tree').closest('{live}')") is None
    assert visitor.page.evaluate("window.said") == ["Working"]
    visitor.let(math.inf)
    visitor.wait()
    said = visitor.page.evaluate("window.said")
    assert len(said) == 2
    assert said[0] == "Working"
    assert said[1].startswith("Caption: a penguin below a dog face")


@pytest.mark.parametrize(("motion", "moving"), [("no-preference", True), ("reduce", False)])
def test_nothing_moves_where_motion_is_unwanted(visit: Visit, motion: str, moving: bool) -> None:
    visitor = visit(PHONE, reduced_motion=motion)
    # Longer than anybody looks, so that what moves is seen to.
    visitor.page.evaluate(
        """() => {
          const slow = new CSSStyleSheet();
          slow.replaceSync(".tree .node.new { animation-duration: 60s; }");
          document.adoptedStyleSheets = [slow];
        }"""
    )
    visitor.hold(6)
    visitor.page.get_by_role("button", name="Sample penguin").click()
    visitor.page.locator(".tree .step").nth(5).wait_for()
    animations = "selector => document.querySelector(selector).getAnimations({ subtree: true })"
    for selector in ("#stage", ".tree"):
        count = visitor.page.evaluate(f"selector => ({animations})(selector).length", selector)
        assert (count > 0) is moving, selector
    scrolled = visitor.page.evaluate("document.getElementById('beam-tree').scrollLeft")
    assert (scrolled > 0) is moving
