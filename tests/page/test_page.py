"""Every function of the page, in a browser, against a real service."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from captionserve import CaptionClient, GenerationOptions
from captionserve_server.core.options import OPTIONS

from tests.conftest import DEMO_FOLDER
from tests.page.conftest import PHONE, Visitor

Visit = Callable[..., Visitor]

IMAGES = DEMO_FOLDER / "images"
CAPTIONS: dict[str, str] = json.loads((IMAGES / "captions.json").read_text())
SAMPLES = Path(__file__).parents[2] / "server_tools/src/captionserve_server/playground/samples"
# What the page asks for at first, of a checkpoint that has beams of its own.
ASKED = GenerationOptions(
    num_return_sequences=4,
    output_attentions=True,
    output_beams=True,
    output_stages=True,
    output_grounding=True,
)
# A picture from a file, as a browser hands it over when it is dropped or pasted.
HANDED_OVER = """
([kind, name, content]) => {
  const bytes = Uint8Array.from(atob(content), (each) => each.charCodeAt(0));
  const carried = new DataTransfer();
  carried.items.add(new File([bytes], name, { type: "image/jpeg" }));
  window.begun = performance.now();
  window.texts = [];
  new MutationObserver(() => {
    const text = document.getElementById("caption").textContent;
    if (text && !window.texts.length) window.first = performance.now() - window.begun;
    if (text && text !== window.texts.at(-1)) window.texts.push(text);
  }).observe(document.getElementById("caption"), { childList: true, subtree: true });
  document.dispatchEvent(kind === "drop"
    ? new DragEvent("drop", { dataTransfer: carried, bubbles: true, cancelable: true })
    : new ClipboardEvent("paste", { clipboardData: carried, bubbles: true }));
}
"""


def hand_over(visitor: Visitor, kind: str, name: str) -> None:
    content = base64.b64encode((IMAGES / name).read_bytes()).decode()
    visitor.page.evaluate(HANDED_OVER, [kind, name, content])
    visitor.page.wait_for_selector(".word")


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_a_picture_that_is_dropped_or_pasted_is_captioned(visit: Visit, kind: str) -> None:
    visitor = visit()
    hand_over(visitor, kind, "penguin.jpg")
    assert visitor.caption == CAPTIONS["penguin.jpg"]
    assert visitor.page.inner_text("#status").startswith(f"Caption: {CAPTIONS['penguin.jpg']}")
    assert visitor.page.locator("#image").evaluate("each => each.naturalWidth") == 640


def test_words_appear_as_they_become_certain(visit: Visit, capsys: Any) -> None:
    visitor = visit()
    visitor.set_option("num_beams", "1")
    visitor.set_option("num_return_sequences", "")
    times = []
    for name in ("elephant.jpg", "penguin.jpg", "sunflower.jpg", "penguin.jpg", "elephant.jpg"):
        hand_over(visitor, "drop", name)
        texts = visitor.page.evaluate("window.texts")
        times.append(visitor.page.evaluate("window.first"))
        assert texts[-1] == CAPTIONS[name]
        growing = [text for text in texts if text and CAPTIONS[name].startswith(text)]
        # Word by word, though some may come together; and nothing is taken back.
        assert len(set(growing)) >= 3
        assert growing == sorted(growing, key=len)
        visitor.page.reload()
        visitor.page.wait_for_selector("html[data-ready]")
        visitor.set_option("num_beams", "1")
        visitor.set_option("num_return_sequences", "")
    with capsys.disabled():
        median = sorted(times)[len(times) // 2]
        sys.stdout.write(
            f"\n[page] from drop to first words: {median:.0f} ms (median of {len(times)})\n"
        )


def test_what_is_dragged_over_the_page_shows_where_it_falls(visit: Visit) -> None:
    visitor = visit()
    drag = "kind => document.dispatchEvent(new DragEvent(kind, { cancelable: true }))"
    visitor.page.evaluate(drag, "dragenter")
    assert visitor.page.locator("#stage.dragging").count() == 1
    visitor.page.evaluate(drag, "dragleave")
    assert visitor.page.locator("#stage.dragging").count() == 0


def test_several_chosen_pictures_are_captioned_one_after_the_other(visit: Visit) -> None:
    visitor = visit()
    visitor.page.set_input_files("#file", [str(IMAGES / name) for name in CAPTIONS])
    expected = sorted(CAPTIONS.items())
    visitor.page.locator(".entry.done").nth(len(CAPTIONS) - 1).wait_for()
    entries = visitor.page.locator(".entry")
    labels = [entries.nth(at).get_attribute("aria-label") for at in range(len(CAPTIONS))]
    assert sorted(labels) == [f"{name}: {caption}" for name, caption in expected]
    # Looking back does not ask again.
    visitor.page.get_by_role("button", name="book.webp:").click()
    assert visitor.caption == CAPTIONS["book.webp"]


@pytest.mark.parametrize("name", sorted(CAPTIONS))
def test_samples_are_captioned_as_the_demos_images(visit: Visit, name: str) -> None:
    visitor = visit()
    visitor.take_sample(Path(name).stem)
    assert visitor.caption == CAPTIONS[name]


def test_captions_come_best_first_with_their_figures(visit: Visit, client: CaptionClient) -> None:
    visitor = visit()
    visitor.take_sample("penguin")
    expected = client.caption(SAMPLES / "penguin.webp", ASKED)
    rows = visitor.page.locator(".choice")
    assert rows.count() == len(expected.captions) == 4
    for at, caption in enumerate(expected.captions):
        text = rows.nth(at).inner_text()
        assert caption.text in text
        assert f"score {shown_number(caption.score, 3)}" in text
    rows.nth(1).click()
    assert visitor.caption == expected.captions[1].text
    assert rows.nth(1).get_attribute("aria-pressed") == "true"


def test_a_word_shows_where_it_looked_and_what_else_was_likely(
    visit: Visit, client: CaptionClient
) -> None:
    visitor = visit()
    visitor.take_sample("penguin")
    best = client.caption(SAMPLES / "penguin.webp", ASKED)
    assert best.beams is not None
    word = visitor.page.locator(".word", has_text="penguin")
    heat = visitor.page.locator("#heat")
    assert not heat.is_visible()
    word.click()
    assert word.get_attribute("aria-pressed") == "true"
    assert heat.is_visible()
    token = best.captions[0].token_texts.index(" penguin")
    likeliest = best.beams.paths[0].likeliest[token]
    shown = visitor.page.locator("#word .bars li")
    assert shown.count() == len(likeliest)
    for at, each in enumerate(likeliest):
        row = shown.nth(at)
        assert row.locator(".token").inner_text() == each.token_text.strip()
        percent = 100 * math.exp(each.token_logprob)
        figure = row.locator(".figure").inner_text()
        assert ("<" in figure) == (percent < 0.1)
    assert "chosen" in shown.nth(0).inner_text()
    # The brightest place of the picture is where the attention is highest.
    darkness = heat.evaluate(
        """canvas => {
          const { width, height } = canvas;
          const data = canvas.getContext("2d").getImageData(0, 0, width, height).data;
          let least = [256, 0, 0];
          for (let y = 2; y < height; y += 4) for (let x = 2; x < width; x += 4) {
            const alpha = data[4 * (y * width + x) + 3];
            if (alpha < least[0]) least = [alpha, x / width, y / height];
          }
          return least;
        }"""
    )
    attention = best.captions[0].attention
    assert attention is not None
    grid = attention.grid(token)
    highest = max(max(row) for row in grid)
    row, col = next(
        (y, x) for y, row in enumerate(grid) for x, each in enumerate(row) if each == highest
    )
    assert darkness[0] < 30
    assert abs(darkness[1] - (col + 0.5) / attention.cols) < 1.5 / attention.cols
    assert abs(darkness[2] - (row + 0.5) / attention.rows) < 1.5 / attention.rows
    word.click()
    assert not heat.is_visible()


def test_captions_and_words_say_what_they_rest_on(visit: Visit, client: CaptionClient) -> None:
    visitor = visit()
    visitor.set_option("min_confidence", "0.5")
    visitor.take_sample("penguin")
    expected = client.caption(
        SAMPLES / "penguin.webp", dataclasses.replace(ASKED, min_confidence=0.5)
    )
    for at, caption in enumerate(expected.captions):
        text = visitor.page.locator(".choice").nth(at).inner_text()
        assert caption.grounding is not None
        assert f"grounding {shown_number(caption.grounding, 2)}" in text
        assert ("look at it: low confidence" in text) is caption.needs_review
    # The first is sure, and the others are doubted.
    assert [caption.needs_review for caption in expected.captions] == [False, True, True, True]
    visitor.page.locator(".word", has_text="penguin").click()
    word = next(each for each in expected.captions[0].words if each.text == "penguin")
    assert word.grounding is not None
    facts = visitor.page.locator("#word .facts").inner_text()
    assert f"{shown_number(word.grounding, 2)} nats" in facts
    assert "Confidence" in facts


def shown_number(value: float, digits: int) -> str:
    """A number as the page shows it."""
    text = f"{value:.{digits}f}"
    zero = f"{0:.{digits}f}"
    return zero if text == f"-{zero}" else text.replace("-", "\N{MINUS SIGN}")


def test_the_search_is_a_tree_and_a_table(visit: Visit, client: CaptionClient) -> None:
    visitor = visit()
    visitor.take_sample("crown")
    beams = client.caption(SAMPLES / "crown.webp", ASKED).beams
    assert beams is not None
    fates = [each.fate.value for step in beams.steps for each in step]
    page = visitor.page
    for fate in ("kept", "finished"):
        assert page.locator(f".tree .node.{fate}").count() == fates.count(fate)
    assert page.locator(".tree .node.dropped").count() == 0
    assert page.locator(".tree .node.own").count() == len(beams.paths[0].continuations)
    page.get_by_label("also what was dropped").check()
    assert page.locator(".tree .node.dropped").count() == fates.count("dropped")
    assert page.evaluate("document.activeElement.id") == "beam-dropped"
    page.get_by_label("Steps shown").fill("2")
    assert page.locator(".tree .node").count() == sum(len(step) for step in beams.steps[:2])
    page.get_by_label("Steps shown").fill(str(len(beams.steps)))
    page.get_by_text("As a table").click()
    rows = page.locator("#beams tbody tr")
    assert rows.count() == len(fates)
    first = beams.steps[0][0]
    cells = rows.nth(0).locator("td").all_inner_texts()
    assert cells[0] == "1"
    assert cells[2] == first.token_text.strip()
    # Another caption has another way through the tree.
    before = page.locator(".tree svg").inner_html()
    page.locator(".choice").nth(2).click()
    assert page.locator(".tree svg").inner_html() != before


def test_the_tree_grows_while_the_search_goes_on(visit: Visit, client: CaptionClient) -> None:
    visitor = visit()
    beams = client.caption(SAMPLES / "crown.webp", ASKED).beams
    assert beams is not None
    page = visitor.page
    visitor.hold(0)
    page.get_by_role("button", name="Sample crown").click()
    page.wait_for_selector("#stage[data-state='working']")
    assert page.locator("#beams").count() == 0
    for lines in range(1, len(beams.steps) + 1):
        visitor.let(lines)
        # Each step is a column with its number.
        page.locator(".tree .step").nth(lines - 1).wait_for()
        told = beams.steps[:lines]
        fates = [each.fate.value for step in told for each in step]
        assert page.locator(".tree .step").count() == lines
        assert page.locator(".tree .node").count() == len(fates) - fates.count("dropped")
        assert page.locator(".tree .node.finished").count() == fates.count("finished")
        likeliest = math.exp(told[-1][0].token_logprob)
        last = page.locator(".tree .node.new title").first.text_content()
        assert last.startswith(f"{told[-1][0].token_text.strip() or '(end)'}: ")
        assert (" 100 %" in last) == (likeliest > 0.9995)
        note = page.inner_text("#beams .spread .quiet")
        assert note.endswith(f" {fates.count('dropped')} dropped")
        # There is no result yet, and so no way through the tree, and no slider.
        assert page.locator("#stage[data-state='working']").count() == 1
        assert page.locator(".tree .node.own, #beam-steps, #captions").count() == 0
    visitor.let(math.inf)
    visitor.wait()
    assert page.locator(".tree .node.own").count() == len(beams.paths[0].continuations)
    assert page.locator(".tree .node.new").count() == 0
    page.get_by_label("Steps shown").fill("2")
    assert page.locator(".tree .step").count() == 2


def test_who_looks_at_the_tree_while_it_grows_goes_on_doing_so(visit: Visit) -> None:
    visitor = visit(PHONE)
    page = visitor.page
    visitor.hold(2)
    page.get_by_role("button", name="Sample penguin").click()
    page.locator(".tree .step").nth(1).wait_for()
    page.get_by_label("also what was dropped").check()
    assert page.locator(".tree .node.dropped").count() > 0
    page.locator(".tree").focus()
    visitor.let(5)
    page.locator(".tree .step").nth(4).wait_for()
    assert page.evaluate("document.activeElement.id") == "beam-tree"
    # The newest step is in sight, until somebody scrolls back.
    scrolled = "() => document.getElementById('beam-tree').scrollLeft"
    assert page.evaluate(scrolled) > 0
    page.evaluate("document.getElementById('beam-tree').scrollLeft = 0")
    visitor.let(6)
    page.locator(".tree .step").nth(5).wait_for()
    assert page.evaluate(scrolled) == 0
    visitor.let(math.inf)
    visitor.wait()
    assert page.evaluate("document.activeElement.id") == "beam-tree"
    assert page.get_by_label("also what was dropped").is_checked()


def test_what_was_put_off_to_the_next_frame_does_not_undo_the_result(visit: Visit) -> None:
    visitor = visit()
    page = visitor.page
    # The next frame comes when it is told to.
    page.evaluate(
        """() => {
          window.put_off = [];
          window.requestAnimationFrame = (draw) => window.put_off.push(draw);
        }"""
    )
    page.get_by_role("button", name="Sample penguin").click()
    visitor.wait()
    assert page.evaluate("window.put_off.length") == 1
    page.evaluate("window.put_off.forEach((draw) => draw())")
    assert page.locator(".tree .node.own").count() > 0
    assert page.locator("#beam-steps").count() == 1


def test_a_search_that_is_stopped_leaves_what_is_known_of_it(visit: Visit) -> None:
    visitor = visit()
    page = visitor.page
    visitor.hold(3)
    page.get_by_role("button", name="Sample penguin").click()
    page.locator(".tree .step").nth(2).wait_for()
    page.get_by_role("button", name="Stop").click()
    page.wait_for_selector("#stage[data-state='stopped']")
    assert page.locator(".tree .step").count() == 3
    visitor.let(math.inf)
    visitor.again()
    assert visitor.caption == CAPTIONS["penguin.jpg"]


def test_stages_are_told_and_make_the_whole(visit: Visit) -> None:
    visitor = visit()
    visitor.take_sample("rabbit")
    names = visitor.page.locator("#timing dt").all_inner_texts()
    assert {"Image", "Encoder", "Steps"} <= set(names)
    figures = visitor.page.locator("#timing dd").all_inner_texts()

    def value(text: str) -> float:
        number, unit = text.split()
        return float(number) * (1000 if unit == "s" else 1)

    whole = value(visitor.page.locator("#timing .quiet").first.inner_text())
    assert sum(map(value, figures)) == pytest.approx(whole, rel=0.1, abs=3)


def shown_regions(visitor: Visitor) -> list[tuple[str, str]]:
    """Each region's box and caption, as the page lists them."""
    rows = visitor.page.locator("#region-captions .region")
    return [
        (
            rows.nth(at).locator(".figures").inner_text().split(" \N{MIDDLE DOT} ")[0],
            rows.nth(at).locator(".said").inner_text(),
        )
        for at in range(rows.count())
    ]


def test_regions_are_drawn_with_the_mouse(visit: Visit, client: CaptionClient) -> None:
    visitor = visit()
    visitor.take_sample("book")
    page = visitor.page
    page.get_by_role("button", name="Mark regions").click()
    frame = page.locator("#image").bounding_box()
    natural = page.locator("#image").evaluate("each => each.naturalWidth")
    for left, top, right, bottom in ((0.1, 0.2, 0.5, 0.9), (0.95, 0.9, 0.55, 0.1)):
        page.mouse.move(frame["x"] + left * frame["width"], frame["y"] + top * frame["height"])
        page.mouse.down()
        page.mouse.move(frame["x"] + right * frame["width"], frame["y"] + bottom * frame["height"])
        page.mouse.up()
    boxes = [
        tuple(int(page.locator(f"#region-{at}-{side}").input_value()) for side in range(4))
        for at in range(2)
    ]
    assert boxes[0] == pytest.approx([round(natural * x) for x in (0.1, 0.2, 0.5, 0.9)], abs=2)
    assert boxes[1] == pytest.approx([round(natural * x) for x in (0.55, 0.1, 0.95, 0.9)], abs=2)
    visitor.again()
    assert visitor.caption == CAPTIONS["book.webp"]
    expected = client.caption(SAMPLES / "book.webp", ASKED, regions=boxes).regions
    assert shown_regions(visitor) == [
        (", ".join(map(str, each.box)), each.text) for each in expected
    ]
    page.get_by_role("button", name="Remove region 1").click()
    visitor.again()
    assert [box for box, _ in shown_regions(visitor)] == [", ".join(map(str, boxes[1]))]


def test_regions_and_tiles_are_written_by_keyboard(visit: Visit, client: CaptionClient) -> None:
    visitor = visit()
    visitor.take_sample("crown")
    page = visitor.page
    page.get_by_role("button", name="Mark regions").focus()
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Add a region").focus()
    page.keyboard.press("Enter")
    # The focus is on the first number of the new region.
    for number in (3, 7, 200, 190):
        page.keyboard.press("ControlOrMeta+a")
        page.keyboard.type(str(number))
        page.keyboard.press("Tab")
    page.get_by_label("rows").fill("1")
    page.get_by_label("columns of tiles").fill("2")
    page.get_by_label("columns of tiles").press("Tab")
    page.get_by_label("resize").select_option("letterbox")
    visitor.again()
    expected = client.caption(
        SAMPLES / "crown.webp", ASKED, regions=[(3, 7, 200, 190)], tiles=(1, 2), resize="letterbox"
    )
    assert visitor.caption == expected.text
    assert shown_regions(visitor) == [
        (", ".join(map(str, each.box)), each.text) for each in expected.regions
    ]
    asked = json.loads(code(visitor, "JSON"))
    assert asked["regions"] == [[3, 7, 200, 190]]
    assert (asked["tiles"], asked["resize"]) == ([1, 2], "letterbox")
    for form in ("Python", "Shell"):
        again = done_again(visitor, form)
        assert again.splitlines()[0] == expected.text or f": {expected.text} (" in again


def test_an_alt_text_keeps_to_its_budget_and_warns(visit: Visit, client: CaptionClient) -> None:
    visitor = visit()
    visitor.take_sample("penguin")
    result = client.caption(SAMPLES / "penguin.webp", ASKED)
    draft = visitor.page.locator("#alt-draft")
    used = visitor.page.locator("#alt-used")
    whole = result.alt_text(file_name="penguin.webp").text
    used.get_by_text(f"{len(whole)} of 125 characters").wait_for()
    assert draft.inner_text() == whole
    visitor.page.get_by_label("at most").fill("12")
    used.get_by_text("of 12 characters").wait_for()
    assert draft.inner_text() == result.alt_text(12, file_name="penguin.webp").text
    assert len(draft.inner_text()) <= 12
    assert "Cut to fit." in visitor.page.inner_text("#alt .notes")
    visitor.page.get_by_label("at most").fill("125")
    visitor.page.get_by_label("text beside the picture").fill(result.text)
    visitor.page.locator("#alt .notes").get_by_text("repeats nearby text").wait_for()
    # Another caption has a draft of its own.
    visitor.page.locator(".choice").nth(1).click()
    visitor.page.locator("#alt-draft").get_by_text(
        result.captions[1].text.removeprefix("a "), exact=False
    ).wait_for()


def test_every_option_has_a_control_with_its_documentation(visit: Visit) -> None:
    visitor = visit()
    visitor.page.locator("#options-panel > summary").click()
    for name, option in OPTIONS.items():
        control = visitor.page.get_by_label(name, exact=True)
        described_by = control.get_attribute("aria-describedby")
        text = visitor.page.inner_text(f"#{described_by}")
        assert option.help in text
        assert option.range() in text
        assert "Default: " in text


def test_options_are_obeyed_and_can_be_given_back(visit: Visit) -> None:
    visitor = visit()
    visitor.set_option("prefix", "a red")
    visitor.set_option("bad_words", "penguin\nbird")
    visitor.set_option("early_stopping", "never")
    visitor.set_option("length_penalty", "0.5")
    visitor.take_sample("penguin")
    assert visitor.caption.startswith("a red")
    assert "penguin" not in visitor.caption
    asked = json.loads(code(visitor, "JSON"))["options"]
    assert asked["bad_words"] == ["penguin", "bird"]
    assert (asked["early_stopping"], asked["length_penalty"]) == ("never", 0.5)
    visitor.page.get_by_role("button", name="Back to the checkpoint's own").click()
    visitor.again()
    assert visitor.caption == CAPTIONS["penguin.jpg"]
    assert json.loads(code(visitor, "JSON"))["options"] == {}
    # What was not asked for is not shown.
    assert visitor.page.locator("#beams, #timing").count() == 0


def test_options_at_fault_are_named_where_they_are_set(visit: Visit) -> None:
    visitor = visit()
    visitor.set_option("num_beams", "99")
    visitor.take_sample("penguin")
    control = visitor.page.get_by_label("num_beams", exact=True)
    assert "No caption." in visitor.page.inner_text("#error")
    assert visitor.page.inner_text("#status").startswith("No caption: ")
    assert control.get_attribute("aria-invalid") == "true"
    assert "1 to 16" in visitor.page.inner_text("#option-num_beams-help .fault")
    visitor.set_option("num_beams", "4")
    visitor.again()
    assert visitor.caption == CAPTIONS["penguin.jpg"]
    assert (
        visitor.page.get_by_label("num_beams", exact=True).get_attribute("aria-invalid") == "false"
    )


def test_a_file_that_is_no_picture_is_an_error_in_a_sentence(visit: Visit, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    visitor = visit()
    visitor.page.set_input_files("#file", str(bad))
    visitor.page.wait_for_selector("#error:not([hidden])")
    assert "UNSUPPORTED_IMAGE_FORMAT" in visitor.page.inner_text("#error")
    assert "cannot show" in visitor.page.inner_text("#invitation")


def test_too_large_a_file_is_not_even_sent(visit: Visit, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(33 * 2**20)
    visitor = visit()
    sent: list[str] = []
    visitor.page.on("request", lambda request: sent.append(request.url))
    visitor.page.set_input_files("#file", str(large))
    visitor.page.wait_for_selector("#error:not([hidden])")
    assert "32 MiB" in visitor.page.inner_text("#error")
    assert not any("/api/caption" in url for url in sent)


def test_a_server_that_is_gone_is_said_in_a_sentence(visit: Visit) -> None:
    visitor = visit()
    visitor.page.route("**/api/caption", lambda route: route.abort())
    visitor.take_sample("penguin")
    assert "does not answer" in visitor.page.inner_text("#error")
    # A browser says itself that it could not ask.
    assert all("net::ERR_FAILED" in text for text in visitor.complaints)
    visitor.complaints.clear()


def test_work_can_be_stopped(visit: Visit) -> None:
    visitor = visit()
    visitor.page.route("**/api/caption", lambda route: None)
    visitor.page.get_by_role("button", name="Sample penguin").click()
    visitor.page.get_by_role("button", name="Stop").click()
    assert visitor.page.inner_text("#doing") == "Stopped."
    assert visitor.page.inner_text("#status") == "Stopped"
    visitor.page.unroute("**/api/caption")
    visitor.again()
    assert visitor.caption == CAPTIONS["penguin.jpg"]


def code(visitor: Visitor, form: str) -> str:
    """What the page gives to copy."""
    visitor.page.get_by_role("button", name=form, exact=True).click()
    text: str = visitor.page.inner_text("#code pre")
    return text


def done_again(visitor: Visitor, form: str) -> str:
    """What the code of the page prints, where the picture lies."""
    text = code(visitor, form)
    if form == "Shell":
        command = f"{sys.executable} -m captionserve_server.cli.main "
        arguments = ["bash", "-c", text.replace("captionserve ", command, 1)]
    else:
        arguments = [sys.executable, "-c", text]
    done = subprocess.run(
        arguments, cwd=SAMPLES, capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout


def test_what_was_done_can_be_done_again_in_python_and_in_a_shell(visit: Visit) -> None:
    visitor = visit()
    visitor.set_option("prefix", "a 'big'")
    visitor.set_option("early_stopping", "never")
    visitor.set_option("bad_words", "penguin")
    visitor.take_sample("penguin")
    expected = visitor.caption
    assert done_again(visitor, "Python").strip() == expected
    assert done_again(visitor, "Shell").startswith(f"penguin.webp: {expected} (")


def test_code_can_be_copied(visit: Visit) -> None:
    visitor = visit(permissions=["clipboard-read", "clipboard-write"])
    visitor.take_sample("penguin")
    text = code(visitor, "Python")
    visitor.page.locator("#code").get_by_role("button", name="Copy").click()
    visitor.page.get_by_role("button", name="Copied").wait_for()
    assert visitor.page.evaluate("navigator.clipboard.readText()") == text


def exported(visitor: Visitor, name: str) -> str:
    with visitor.page.expect_download() as download:
        visitor.page.get_by_role("button", name=name).click()
    return Path(download.value.path()).read_text()


def test_the_visit_is_exported_as_csv_and_json_lines(visit: Visit, tmp_path: Path) -> None:
    bad = tmp_path / 'b,a"d.png'
    bad.write_text("no picture")
    visitor = visit()
    visitor.take_sample("penguin")
    visitor.page.set_input_files("#file", str(bad))
    visitor.page.wait_for_selector("#error:not([hidden])")
    lines = [json.loads(line) for line in exported(visitor, "JSON lines").splitlines()]
    rows = list(csv.DictReader(io.StringIO(exported(visitor, "CSV"))))
    assert [each["image"] for each in lines] == [bad.name, "penguin.webp"]
    assert [each["image"] for each in rows] == [bad.name, "penguin.webp"]
    for failed, captioned in (lines, rows):
        assert failed["error_reason"] == "UNSUPPORTED_IMAGE_FORMAT"
        assert captioned["caption"] == CAPTIONS["penguin.jpg"]
        assert float(captioned["confidence"]) > 0.5
    assert json.loads(rows[1]["captions"]) == lines[1]["captions"]
    assert len(lines[1]["captions"]) == 4


def test_nothing_of_a_visit_is_there_in_the_next(visit: Visit) -> None:
    visitor = visit()
    visitor.take_sample("penguin")
    assert visitor.page.context.cookies() == []
    assert visitor.page.evaluate("localStorage.length + sessionStorage.length") == 0
    visitor.page.reload()
    visitor.page.wait_for_selector("html[data-ready]")
    assert not visitor.page.locator("#visit").is_visible()


def test_the_model_is_named(visit: Visit, client: CaptionClient) -> None:
    model = client.models().models[0]
    text = visit().page.inner_text("#model")
    assert f"version {model.version}" in text
    assert model.precision in text
    assert f"{model.image_size[1]} × {model.image_size[0]}" in text  # noqa: RUF001


def test_a_phone_scrolls_one_way_only(visit: Visit) -> None:
    visitor = visit(PHONE)
    visitor.take_sample("penguin")
    visitor.page.locator(".word").nth(1).click()
    visitor.page.locator("#options-panel > summary").click()
    visitor.page.get_by_role("button", name="Mark regions").click()
    width = visitor.page.evaluate("document.scrollingElement.scrollWidth")
    assert width <= PHONE["width"]
