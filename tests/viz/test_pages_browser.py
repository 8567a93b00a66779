"""The viewer and the playground in a real browser: no errors, no requests, fast, narrow, and controls do what they say."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from attnsteer.play import PlayServer, player
from attnsteer.viz import view, viewer
from tests.results import browser
from tests.viz.captures import captured, causal, take, text
from tests.viz.test_viewer import HOSTILE, image_maps

pytestmark = pytest.mark.skipif(browser.program() is None, reason="no Chromium on this machine")

SHOWN = "document.documentElement.dataset.shown || ''"
ANSWERS = "+(document.documentElement.dataset.answers || 0)"
WHERE = "document.getElementById('where').textContent"
SAID = "document.getElementById('said').textContent"
WORDS = ["<s>", "a", "small", "red", "star", "?", "answer"]


@pytest.fixture(scope="module")
def page() -> Iterator[browser.Browser]:
    with browser.Browser() as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: Any) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("pages")
    image = Image.new("RGB", (32, 32), "red")
    return {
        "text": view(text(0), base / "text.html", after=text(1), tokens=WORDS, title="a text"),
        "image": view(image_maps(), base / "image.html", tokens=["<s>", "red", "fox"], image=image, title="a picture"),
        "seen": view(
            captured(take(causal(4, n=20))), base / "seen.html", image=image, image_tokens=(1, 17), title="a question"
        ),
        "row": view(captured(take(causal(4)[:, :, -1:], rows=[6])), base / "row.html", title="one row"),
    }


def until(page: browser.Browser, code: str, patience: float = 15.0) -> Any:
    """Wait for an expression to be true."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        found = page.js(code)
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"{code} stayed {found!r}; errors: {page.errors}")


def opened(page: browser.Browser, path: Any, *size: Any, **more: Any) -> None:
    page.open(path, *size, **more)
    until(page, SHOWN)


def press(page: browser.Browser, selector: str) -> None:
    page.js(f"document.querySelector({json.dumps(selector)}).click()")


def pixels(page: browser.Browser, canvas: str) -> str:
    return page.js(f"document.getElementById({json.dumps(canvas)}).toDataURL()")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (420, "dark")])
@pytest.mark.parametrize("name", ["text", "image", "seen", "row"])
def test_a_page_loads_without_an_error_or_a_request(
    page: browser.Browser, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    opened(page, pages[name], width, scheme=scheme)
    assert page.errors == []
    assert [r for r in page.requests if not r.startswith("data:")] == [pages[name].resolve().as_uri()]
    assert page.js("document.documentElement.scrollWidth") <= width
    # Nothing is cut: no card is narrower than what is in it.
    assert page.js("[...document.querySelectorAll('.card')].every(n => n.scrollWidth <= n.clientWidth + 1)")
    bright = page.js("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
    assert bright > 200 if scheme == "light" else bright < 60


def test_heads_by_pointer_and_by_key(page: browser.Browser, pages: dict[str, Path]) -> None:
    opened(page, pages["text"])
    page.js(
        "(() => { const g = document.getElementById('grid'), b = g.getBoundingClientRect();"
        "g.dispatchEvent(new MouseEvent('click', {clientX: b.right - 5, clientY: b.bottom - 5, bubbles: true})) })()"
    )
    assert page.js(WHERE) == "Layer 1, head 2"
    page.js("document.getElementById('grid').focus()")
    for key, head in (
        ("ArrowLeft", "Layer 1, head 1"),
        ("ArrowUp", "Layer 0, head 1"),
        ("ArrowDown", "Layer 1, head 1"),
    ):
        page.key(key)
        assert page.js(WHERE) == head
    press(page, "#next")
    press(page, "#next")
    assert page.js(WHERE) == "Layer 0, head 0" and page.errors == []


def test_what_is_said_is_in_the_capture(page: browser.Browser, pages: dict[str, Path]) -> None:
    opened(page, pages["text"])
    page.js(
        "(() => { const s = document.getElementById('site'); s.value = '1'; s.dispatchEvent(new Event('change')) })()"
    )
    page.js(
        "(() => { const s = document.getElementById('head-number'); s.value = '2'; s.dispatchEvent(new Event('change')) })()"
    )
    until(page, f"({SHOWN}) === '1.2.0'")
    page.js("document.querySelector('#strip [data-i=\"4\"]').click()")
    before, after = (x.get(1, "map", sample=0)[2, 4] for x in (text(0), text(1)))
    best = int(before.argmax())
    said = page.js(SAID)
    assert said.startswith(f"“star” → “{WORDS[best]}”")
    shares = [float(part.strip(" %")) / 100 for part in said.split("”")[-1].replace("≈ 0", "0 %").split("→")]
    assert shares == pytest.approx([float(before[best]), float(after[best])], abs=0.012)
    # The other way round: who looks at it.
    press(page, "#ways button[data-way=col]")
    column = text(0).get(1, "map", sample=0)[2, :, 4]
    assert page.js(SAID).startswith(f"“{WORDS[int(column.argmax())]}” → “star”")


def test_before_and_after(page: browser.Browser, pages: dict[str, Path]) -> None:
    opened(page, pages["text"])
    shown = {}
    for arm in ("0", "1", "change"):
        press(page, f"#arms button[data-arm='{arm}']")
        until(page, f"({SHOWN}).endsWith('.{arm}')")
        shown[arm] = (pixels(page, "map"), pixels(page, "grid"))
        assert page.js("[...document.querySelectorAll('#arms [aria-pressed=true]')].map(n => n.dataset.arm)") == [arm]
    assert len({m for m, _ in shown.values()}) == len({g for _, g in shown.values()}) == 3
    # Colours by a reading, and back.
    plain = pixels(page, "grid")
    press(page, "#readings tbody button")
    assert page.js("document.getElementById('colour').value") == "these maps/change" and pixels(page, "grid") != plain
    assert page.js("document.getElementById('plane-card').hidden") is False and page.errors == []


def test_words_over_a_picture(page: browser.Browser, pages: dict[str, Path]) -> None:
    opened(page, pages["image"])
    assert page.js("document.querySelector('#ways [aria-pressed=true]').dataset.way") == "col"
    one = pixels(page, "heat")
    page.js("document.querySelector('#other [data-i=\"1\"]').click()")
    assert pixels(page, "heat") != one and "“red”" in page.js("document.getElementById('heat-legend').textContent")
    two = pixels(page, "heat")
    page.js(
        "(() => { const f = document.getElementById('frame'); f.value = '0'; f.dispatchEvent(new Event('input')) })()"
    )
    until(page, "document.getElementById('frame-name').textContent === '0'")
    time.sleep(0.1)
    assert pixels(page, "heat") != two and page.errors == []


def test_text_of_a_capture_does_not_run(page: browser.Browser, tmp_path: Path) -> None:
    profile = {"readings": {HOSTILE: HOSTILE}, "heads": [{"layer": 0, "head": 0, HOSTILE: 1.0}]}
    path = view(
        text(0), tmp_path / "page.html", after=text(1), labels=(HOSTILE, HOSTILE), tokens=[HOSTILE] * 7, title=HOSTILE,
        facts={HOSTILE: HOSTILE}, profile=profile,
    )  # fmt: skip
    opened(page, path, 420)
    assert page.js("document.title") == HOSTILE and page.errors == [] and len(page.requests) == 1
    assert page.js("document.querySelectorAll('img:not([id])').length") == 0
    # Nor does it turn the figures behind it: marks of direction end with the text that has them.
    marked = "[...document.querySelectorAll('.facts b, .said b, .tops .w > :first-child')]"
    assert set(page.js(f"{marked}.map(n => getComputedStyle(n).unicodeBidi)")) == {"isolate"}
    assert page.js("document.documentElement.scrollWidth") <= 420


def test_a_large_model_is_there_in_two_seconds(page: browser.Browser, tmp_path: Path, monkeypatch: Any) -> None:
    """24 x 24 heads over 1,024 tokens: one layer's bytes, as `collect` makes them, stand for all layers'."""
    n, heads, layers = 1024, 24, 24
    monkeypatch.setattr(viewer, "WHOLE", 0)
    keep = viewer.KEPT // (layers * heads * n)
    monkeypatch.setattr(viewer, "KEPT", keep * n)
    found = viewer.collect(captured(take(causal(0, heads=1, n=n, sharp=3.0))), title="large")
    site = found.data["sites"][0] | {"heads": list(range(heads))}
    found.data["sites"] = [site | {"label": str(i), "layer": i, "path": f"layers.{i}"} for i in range(layers)]
    for reading in found.data["readings"]:
        reading["values"] = [[reading["values"][0][0] * heads] * layers]
    layer = zlib.compress(zlib.decompress(found.later["m-0-0-0"]) * heads, 1)
    found.first["t-0-0"] *= heads * layers
    found.later = {f"m-0-0-{i}": layer for i in range(layers)}
    path = tmp_path / "large.html"
    path.write_text(found.html(), encoding="utf-8")
    assert found.data["kept"]["keys"] == keep and path.stat().st_size > 10 * 2**20
    for _ in range(3):
        # A machine that does something else at the same time says nothing of the page.
        opened(page, path)
        painted = page.js("performance.getEntriesByName('overview')[0].startTime")
        if painted < 2000:
            break
    assert painted < 2000 and page.errors == []
    press(page, "#next")
    until(page, f"({SHOWN}) === '0.1.0'")


# ------------------------------------------------------------------------------------------------ the playground


@pytest.fixture(scope="module")
def playing() -> Iterator[PlayServer]:
    with PlayServer(player("shapes-lm")) as server:
        yield server


def slide(page: browser.Browser, at: int) -> None:
    page.js(
        f"(() => {{ const v = document.getElementById('value'); v.value = {at}; v.dispatchEvent(new Event('input')) }})()"
    )


def answered(page: browser.Browser, at: int) -> float:
    """Milliseconds of the processor from the slider to the answer on the page; docs/viewer.md has the clock's, in which another
    program's time counts too.
    """
    before, begun = page.js(ANSWERS), time.process_time()
    slide(page, at)
    until(page, f"({ANSWERS}) > {before}")
    assert int(page.js("document.documentElement.dataset.took")) > 0
    return 1000 * (time.process_time() - begun)


def mark(page: browser.Browser, *tokens: int) -> None:
    for i in tokens:
        before = page.js(ANSWERS)
        page.js(f"document.querySelector('#strip [data-i=\"{i}\"]').focus()")
        page.key("Enter")
        until(page, f"({ANSWERS}) > {before}")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (420, "dark")])
def test_the_playground_talks_to_its_own_server_alone(
    page: browser.Browser, playing: PlayServer, width: int, scheme: str
) -> None:
    page.open(playing.address, width, scheme=scheme)
    until(page, ANSWERS)
    mark(page, 3, 4)
    assert page.errors == [] and all(r.startswith((playing.address, "data:")) for r in page.requests)
    assert page.js("document.documentElement.scrollWidth") <= width
    assert page.js("[...document.querySelectorAll('.card')].every(n => n.scrollWidth <= n.clientWidth + 1)")


def test_from_the_slider_to_the_answer(page: browser.Browser, playing: PlayServer) -> None:
    page.open(playing.address)
    until(page, ANSWERS)
    mark(page, 1, 2, 3, 4)
    took, seen = [], set()
    for at in (300, 600, 900, 450, 750):
        took.append(answered(page, at))
        seen.add(page.js("document.getElementById('answers').textContent"))
        assert page.js("document.getElementById('code').textContent").startswith("SpotLight(")
    assert len(seen) > 1 and min(took) < 300, took
    # Heads by the keyboard.
    page.js("document.getElementById('grid').focus()")
    before = page.js(ANSWERS)
    page.key("ArrowRight")
    page.key("Enter")
    until(page, f"({ANSWERS}) > {before}")
    assert "1 of 48 heads chosen" in page.js("document.getElementById('grid-said').textContent")
    press(page, "#off")
    until(page, "document.getElementById('code').textContent === ''")
    assert page.errors == []


def test_from_the_slider_to_the_answer_about_a_picture(page: browser.Browser) -> None:
    with PlayServer(player("shapes-lvlm")) as server:
        page.open(server.address)
        until(page, ANSWERS)
        mark(page, *range(70, 72))
        took = []
        for at in (300, 600, 900, 450, 750):
            took.append(answered(page, at))
    assert min(took) < 300 and page.errors == [], took


def set_field(page: browser.Browser, name: str, value: int) -> None:
    page.js(f"(() => {{ const f = document.getElementById('{name}'); f.value = {value}; }})()")


@pytest.mark.parametrize("name", ["shapes-sd", pytest.param("shapes-mmdit", marks=pytest.mark.long)])
def test_from_the_slider_to_the_preview_and_the_picture(page: browser.Browser, name: str) -> None:
    """A dial that moves gives up the picture that is drawn, and shows what one step takes the picture to be."""
    data = lambda key: page.js(f"+(document.documentElement.dataset.{key} || 0)")  # noqa: E731
    tags = "[...document.querySelectorAll('.pictures .tag')].filter(n => !n.hidden).map(n => n.textContent)"
    sources = "[...document.querySelectorAll('.pictures img')].map(n => n.src)"
    with PlayServer(player(name)) as server:
        page.open(server.address, 420)
        set_field(page, "seeds", 1)
        set_field(page, "steps", 10)
        press(page, "#draw")
        until(page, ANSWERS, 120)
        whole = page.js(sources)
        took = []
        for at in (300, 600, 900, 450, 750):
            before, begun = data("previews"), time.process_time()
            slide(page, at)
            until(page, f"+(document.documentElement.dataset.previews || 0) > {before}")
            # Of the processor, so that a machine that does something else says nothing of it; docs/viewer.md has the clock's.
            took.append(1000 * (time.process_time() - begun))
            assert data("took") > 0
            if at == 300:
                assert page.js(tags) == ["preview 8/10"] * 2
                assert page.js(sources)[0] not in whole and len(set(page.js(sources))) == 2
            if at == 600:
                # The picture is begun, and given up by the next move.
                until(page, "document.getElementById('state').textContent.startsWith('drawing')")
        drawn = page.js(ANSWERS)
        until(page, f"({ANSWERS}) > {drawn}", 120)
        assert page.js(tags) == [] and page.js(sources)[0] == whole[0] and page.js(sources)[1] != whole[1]
        assert page.js("document.documentElement.scrollWidth") <= 420
        press(page, "#off")
        until(page, f"({ANSWERS}) > {drawn} + 1", 120)
        assert len(set(page.js(sources))) == 1
    assert min(took) < 300 and page.errors == [], took


def test_a_wrong_prompt_and_a_lost_server_are_told(page: browser.Browser, playing: PlayServer) -> None:
    with PlayServer(playing.player) as server:
        page.open(server.address)
        until(page, ANSWERS)
        page.js(
            "(() => { const p = document.getElementById('prompt'); p.value = 'red '.repeat(600);"
            "p.dispatchEvent(new Event('input')) })()"
        )
        until(page, "document.getElementById('problem').textContent.includes('this model and page take 512')")
    slide(page, 900)
    until(page, "document.getElementById('problem').textContent.includes('still running')")
