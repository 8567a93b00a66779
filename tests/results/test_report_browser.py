"""The report in a real browser: no errors, nothing asked for, and everything that a reader can press does what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attnsteer.results.reports import report
from tests.results import browser, folders

pytestmark = pytest.mark.skipif(browser.program() is None, reason="no Chromium on this machine")

# Ids of the cards that are shown, and what stands in them.
IDS = "[...document.querySelectorAll('#cards .id')].map(n => n.textContent)"
CHIPS = "[...document.querySelectorAll('#cards .chip')].map(n => n.className.split(' ')[1])"
FOUND = "document.getElementById('found').textContent"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: Any) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("pages")
    made = {
        "text": folders.text_run(base / "text"),
        "sweep": folders.text_run(base / "sweep", sweep=True),
        "existence": folders.existence_run(base / "existence"),
        "captions": folders.caption_run(base / "captions"),
        "images": folders.image_run(base / "images"),
        "tiny": folders.text_run(base / "tiny", tiny=True, state="interrupted"),
    }
    for name, kind in (("text", "lm"), ("captions", "vlm"), ("images", "image")):
        folders.add_attention(made[name], kind)
    return {name: report(path) for name, path in made.items()}


@pytest.fixture(scope="module")
def page() -> Iterator[browser.Browser]:
    with browser.Browser() as found:
        yield found


def press(page: browser.Browser, selector: str) -> None:
    page.js(f"document.querySelector({json.dumps(selector)}).click()")


def write(page: browser.Browser, selector: str, value: str, event: str = "input") -> None:
    page.js(
        f"(() => {{ const n = document.querySelector({json.dumps(selector)}); n.value = {json.dumps(value)}; "
        f"n.dispatchEvent(new Event('{event}')); }})()"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["text", "sweep", "existence", "captions", "images", "tiny"])
def test_it_loads_without_an_error_or_a_request(
    page: browser.Browser, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    page.open(pages[name], width, scheme=scheme)
    assert page.errors == []
    assert [r for r in page.requests if not r.startswith("data:")] == [pages[name].resolve().as_uri()]
    # Nothing sticks out: the page does not scroll sideways, and no text is wider than its box.
    assert page.js("document.documentElement.scrollWidth") <= width
    assert page.js("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    bright = page.js("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
    assert bright > 200 if scheme == "light" else bright < 60


def test_the_first_screen_tells_the_story(page: browser.Browser, pages: dict[str, Path]) -> None:
    for width, height in ((1280, 900), (390, 844)):
        page.open(pages["text"], width, height)
        bottom = "document.querySelector({}).getBoundingClientRect().bottom"
        for part in ("h1", ".big", ".sentence", ".strip"):
            assert page.js(bottom.format(json.dumps(part))) < height, part
    assert page.js("document.querySelector('h1').innerText.trim()") == "▲ Better"


def contrast(page: browser.Browser, selector: str) -> float:
    """The ratio of WCAG 2 between a text and the nearest ground behind it."""
    rgb = page.js(
        f"""(() => {{
          const node = document.querySelector({json.dumps(selector)});
          const parse = (c) => c.match(/[\\d.]+/g).map(Number);
          let at = node;
          while (at && (parse(getComputedStyle(at).backgroundColor)[3] === 0)) at = at.parentElement;
          return [parse(getComputedStyle(node).color), parse(getComputedStyle(at ?? document.body).backgroundColor)];
        }})()"""
    )

    def light(colour: list[float]) -> float:
        parts = [c / 255 for c in colour[:3]]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(light, rgb))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(page: browser.Browser, pages: dict[str, Path], scheme: str) -> None:
    page.open(pages["text"], scheme=scheme)
    for selector in (
        ".summary",
        ".sentence",
        ".under",
        ".big .to",
        ".gain-text",
        ".loss-text",
        ".chip.gained",
        ".lead",
    ):
        assert contrast(page, selector) >= 4.5, selector
    # Large text.
    assert contrast(page, ".big .from") >= 3


def test_filters_search_and_order(page: browser.Browser, pages: dict[str, Path]) -> None:
    page.open(pages["text"])
    data = json.loads(page.js("document.getElementById('data').textContent"))
    state = {s["id"]: s["outs"]["method"]["state"] for s in data["samples"]}
    # What changed is shown first.
    assert page.js(FOUND) == f"{sum(v != 'same' for v in state.values())} of 40 samples"
    for only in ("gained", "lost"):
        press(page, f"button[data-state={only}]")
        assert page.js(IDS) == [i for i, v in state.items() if v == only] and set(page.js(CHIPS)) == {only}
        assert page.js("[...document.querySelectorAll('button[data-state][aria-pressed=true]')].length") == 1
    press(page, "button[data-state=all]")
    assert page.js(FOUND) == "40 of 40 samples" and page.js(IDS) == list(state)[:10]
    write(page, "#search", "R17")
    assert page.js(IDS) == ["r17"]
    write(page, "#search", "no text has this")
    assert page.js(IDS) == [] and page.js("document.querySelector('.empty').innerText") == "No sample is like that."
    write(page, "#search", "")
    write(page, "#order", "change", "change")
    changed = sum(v in ("gained", "lost") for v in state.values())
    assert set(page.js(CHIPS)[: min(changed, 10)]) <= {"gained", "lost"}
    assert page.errors == []


def test_pages_and_the_keyboard(page: browser.Browser, pages: dict[str, Path]) -> None:
    page.open(pages["text"])
    press(page, "button[data-state=all]")
    assert page.js("document.getElementById('page').textContent") == "1 of 4"
    press(page, "#next")
    assert page.js(IDS)[0] == "r10"
    page.js("document.querySelector('button[data-state=all]').focus()")
    page.key("ArrowRight")
    assert page.js(IDS)[0] == "r20"
    page.key("ArrowLeft")
    page.key("ArrowLeft")
    assert page.js(IDS)[0] == "r0" and page.js("document.getElementById('back').disabled")
    # Tab reaches the next button, and space presses it.
    page.js("document.querySelector('button[data-state=all]').focus()")
    page.key("Tab")
    assert page.js("document.activeElement.dataset.state") == "changed"
    page.key(" ")
    assert page.js("document.querySelector('button[data-state=changed]').getAttribute('aria-pressed')") == "true"
    page.js("document.activeElement.blur()")
    page.key("Tab")
    # Arrow keys in the search are for its text.
    page.js("document.getElementById('search').focus()")
    before = page.js(IDS)
    page.key("ArrowRight")
    assert page.js(IDS) == before and page.errors == []


def test_long_prompts_open(page: browser.Browser, pages: dict[str, Path]) -> None:
    page.open(pages["text"])
    data = json.loads(page.js("document.getElementById('data').textContent"))
    first = page.js(IDS)[0]
    whole = next(s["prompt"] for s in data["samples"] if s["id"] == first)
    text = "document.querySelector('#cards .prompt').textContent"
    assert len(page.js(text)) < len(whole) and whole.endswith(page.js(text)[-100:])
    press(page, "#cards .prompt button")
    assert page.js(text) == whole


def test_choices_are_bars(page: browser.Browser, pages: dict[str, Path]) -> None:
    page.open(pages["text"])
    first = page.js(IDS)[0]
    data = json.loads(page.js("document.getElementById('data').textContent"))
    sample = next(s for s in data["samples"] if s["id"] == first)
    for kind, arm in (("b", "baseline"), ("m", "method")):
        widths = page.js(
            f"[...document.querySelector('#cards .choices').querySelectorAll('.{kind}')].map(n => parseFloat(n.style.width))"
        )
        assert widths == pytest.approx([100 * p for p in sample["outs"][arm]["p"]], abs=0.01)


def test_another_setting(page: browser.Browser, pages: dict[str, Path]) -> None:
    page.open(pages["sweep"])
    counts = {}
    for arm in page.js("[...document.getElementById('arm').options].map(o => o.value)"):
        write(page, "#arm", arm, "change")
        counts[arm] = page.js("document.querySelector('button[data-state=gained] .count').textContent")
    assert next(iter(counts)) == "method@1" and counts["method@1"] == "9" and counts["method@3"] == "0"
    assert page.js("document.querySelectorAll('svg.sweep .mark.method').length") == 4
    page.open(pages["text"])
    assert page.js("document.getElementById('arm-field').hidden")


def test_pictures_side_by_side_and_in_one_place(page: browser.Browser, pages: dict[str, Path]) -> None:
    page.open(pages["images"])
    data = json.loads(page.js("document.getElementById('data').textContent"))
    first = next(s for s in data["samples"] if s["id"] == page.js(IDS)[0])
    sources = "[...document.querySelector('#cards .pair').querySelectorAll('img')].map(n => n.src)"
    two = [data["images"][first["outs"][a]["image"]] for a in ("baseline", "method")]
    assert page.js(sources) == two
    rects = "document.querySelectorAll('#cards .pair rect').length"
    assert page.js(rects) > 0
    press(page, "#boxes")
    assert page.js(rects) == 0
    press(page, "#boxes")
    # One at a time: the button of all, and a click on one.
    press(page, "#flip")
    assert page.js(sources) == two[:1]
    press(page, "#swap")
    assert page.js(sources) == two[1:]
    press(page, "#cards .shot")
    assert page.js(sources) == two[:1]
    # Only that one, and the keyboard stays where it was.
    assert page.js("document.activeElement.className") == "shot"
    assert page.js("document.querySelectorAll('#cards figure.b').length") == 1
    page.key("Enter")
    assert page.js(sources) == two[1:]
    press(page, "#flip")
    assert page.js(sources) == two and page.errors == []


def test_texts_show_what_changed(page: browser.Browser, pages: dict[str, Path]) -> None:
    page.open(pages["captions"])
    data = json.loads(page.js("document.getElementById('data').textContent"))
    first = next(s for s in data["samples"] if s["id"] == page.js(IDS)[0])
    shown = page.js("[...document.querySelectorAll('#cards .sample:first-child .said dd')].map(n => n.textContent)")
    assert shown == [first["outs"][a]["text"] for a in ("baseline", "method")]
    assert page.js("document.querySelectorAll('#cards .said del').length") > 0
    assert page.js("document.querySelectorAll('#cards .said ins').length") > 0
    page.open(pages["existence"])
    assert page.js(
        "[...document.querySelectorAll('#cards .said dd')].every(n => /^(yes|no|maybe) [✓✗]$/.test(n.textContent))"
    )
    assert page.js("document.querySelectorAll('#cards .scene').length") == page.js(
        "document.querySelectorAll('#cards .sample').length"
    )


def test_the_printed_page(page: browser.Browser, pages: dict[str, Path]) -> None:
    page.open(pages["text"], scheme="dark")
    page.call("Emulation.setEmulatedMedia", media="print")
    visible = "getComputedStyle(document.querySelector('{}')).display"
    assert page.js(visible.format(".contents")) == page.js(visible.format(".tools")) == "none"
    assert page.js(visible.format(".hero")) == "grid"
    pdf = page.call("Page.printToPDF", printBackground=True)["data"]
    page.call("Emulation.setEmulatedMedia", media="")
    assert len(pdf) > 10_000


def test_text_of_a_run_does_not_run(page: browser.Browser, tmp_path: Path) -> None:
    hostile = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    run = folders.text_run(tmp_path / "run", changes={"summary": hostile})
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"prompt": hostile, "choices": [hostile, "b", "c", "d"]}
    folders.lines(run / "samples.jsonl", rows)
    page.open(report(run))
    press(page, "button[data-state=all]")
    assert page.js("document.title") == "Better: act/reading" and page.errors == []
    assert page.js("document.querySelectorAll('#cards img').length") == 0
    assert page.js("document.querySelector('#cards .prompt').textContent") == hostile
    assert len(page.requests) == 1


def test_the_driver_sees_errors_and_requests(page: browser.Browser, tmp_path: Path) -> None:
    """Or the tests above could not fail."""
    path = tmp_path / "page.html"
    path.write_text("<img src='missing.png'><script>console.error('one'); undefined.two</script>")
    page.open(path)
    assert len(page.requests) == 2 and page.requests[1].endswith("/missing.png")
    said = " ".join(page.errors)
    assert "one" in said and "two" in said and "ERR_FILE_NOT_FOUND" in said
    strict = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\">"
    path.write_text(f"{strict}<script>1</script>")
    page.open(path)
    assert "Content Security Policy" in " ".join(page.errors)
