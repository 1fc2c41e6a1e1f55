"""The page in a real browser: what somebody does with it by mouse and by keyboard, on a wide and on a narrow screen."""

import importlib.util
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from mivpg import MivpgForConditionalGeneration, MivpgProcessor, app
from mivpg.app_bags import generated_products
from mivpg.miniature import BASE_MODEL

CHROMIUM = shutil.which("chromium")
missing = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
if CHROMIUM is None:
    missing.append("chromium")
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)}: not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio.*"),
]

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
PATIENCE = 60_000
"""Milliseconds until something has to be there, also where other work has the processor."""
NAME = "<b>the</b> *miniature*"
"""Of the model, as the page is told it."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    """Five photos of a generated product."""
    folder = tmp_path_factory.mktemp("photos")
    product = next(product for product in generated_products(7).values() if len(product) >= 5)
    paths = [folder / f"{number}-{name}.png" for number, (name, _) in enumerate(product[:5], start=1)]
    for path, (_, picture) in zip(paths, product[:5], strict=True):
        picture.save(path)
    return paths


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    model = MivpgForConditionalGeneration.from_pretrained(BASE_MODEL)
    processor = MivpgProcessor.from_pretrained(BASE_MODEL)
    folder = str(tmp_path_factory.mktemp("uploads"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", folder)
        patch.setenv("GRADIO_EXAMPLES_CACHE", folder)
        page = app.build_page(model, processor, name=NAME, max_files=8, max_file_mb=1)
        try:
            yield app.launch(page, host="127.0.0.1", port=None, max_files=8, max_file_mb=1)
        finally:
            page.close(verbose=False)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, address):
    """A fresh visit; it may ask nobody but the page's own server."""
    context = browser.new_context(viewport=DESKTOP, permissions=["clipboard-read", "clipboard-write"])
    context.set_default_timeout(PATIENCE)
    visit = context.new_page()
    asked, errors = set(), []
    visit.on("request", lambda request: asked.add(urlsplit(request.url).netloc))
    visit.on("pageerror", lambda error: errors.append(str(error)))
    visit.goto(address)
    visit.locator("#photos li").first.wait_for()
    yield visit
    context.close()
    assert asked - {""} == {urlsplit(address).netloc}  # data: has no host
    assert errors == []


def upload(page, paths) -> None:
    page.locator("input[type=file]").set_input_files([str(path) for path in paths])


def wait_for_photos(page, photos) -> None:
    page.locator("#photos .name").get_by_text(photos[-1].name).wait_for()
    assert page.locator("#photos li").count() == len(photos)


def wait_for_caption(page) -> str:
    """Until the last of what comes with a caption is there, too."""
    for part in ("#caption .caption", "#beams table", "#photos .bar", "#attention img", "#json textarea"):
        page.locator(part).first.wait_for()
    return page.locator("#caption .caption").inner_text()


def wait_for_comparison(page) -> None:
    page.locator("#comparison table").wait_for()
    page.locator("#json textarea").filter(has_text="left_out").wait_for()


def json_of(page) -> dict:
    return json.loads(page.locator("#json textarea").input_value())


def overlaps(page) -> list[str]:
    """Controls, headings and pictures of which one covers a part of another, and what is wider than the screen."""
    return page.evaluate(
        """() => {
          const parts = [...document.querySelectorAll(
            'h1, h2, h3, button, input:not([type=file]), textarea, table, .photos li, #caption p, #refusal p, .scroll')]
            .filter(part => part.checkVisibility() && part.getBoundingClientRect().width > 1);
          const found = [];
          const name = part => `${part.tagName} ${(part.innerText || part.ariaLabel || part.value || '').slice(0, 30)}`;
          for (const [index, one] of parts.entries()) {
            const a = one.getBoundingClientRect();
            if (a.left < -1 || a.right > innerWidth + 1) found.push(`${name(one)} leaves the screen`);
            for (const other of parts.slice(index + 1)) {
              const b = other.getBoundingClientRect();
              if (one.contains(other) || other.contains(one)) continue;
              const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
              const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
              if (across > 1 && down > 1) found.push(`${name(one)} over ${name(other)}`);
            }
          }
          if (document.documentElement.scrollWidth > innerWidth) found.push('the page scrolls sideways');
          return found;
        }"""
    )


def unlabelled(page) -> list[str]:
    """What can be used and has no name that a screen reader could say, and pictures without words."""
    return page.evaluate(
        """() => [...document.querySelectorAll('button, input, textarea, select, [role=region], img')]
          .filter(part => part.checkVisibility() && part.type !== 'file')
          .filter(part => !(part.ariaLabel || part.alt || part.innerText || part.title
            || [...(part.labels || [])].some(label => label.innerText.trim())
            || (part.getAttribute('aria-labelledby') || '').split(' ').some(id => document.getElementById(id))))
          .map(part => part.outerHTML.slice(0, 200))"""
    )


def test_five_photos_a_caption_maps_and_one_photo_less(page, photos):
    upload(page, photos)
    wait_for_photos(page, photos)
    page.get_by_role("button", name="Write the caption").click()
    caption = wait_for_caption(page)
    said = json_of(page)
    assert caption == said["caption"]
    assert [photo["name"] for photo in said["photos"]] == [path.name for path in photos]
    assert page.locator("#beams tbody tr").count() == len(said["beams"]) == 5

    weights = [float(text) for text in re.findall(r"weight ([\d.]+)%", page.locator("#photos").inner_text())]
    assert weights == pytest.approx([100 * photo["weight"] for photo in said["photos"]], abs=0.051)
    assert sum(weights) == pytest.approx(100, abs=0.3)
    width = page.locator("#attention .scroll img").evaluate("picture => picture.naturalWidth")
    assert width > 1000

    page.get_by_role("checkbox", name="2. ").check()
    page.get_by_role("button", name="Compare without them").click()
    wait_for_comparison(page)
    assert "Without photo 2" in page.locator("#comparison").inner_text()
    rest = json_of(page)["left_out"]
    assert rest["photos"] == [photos[1].name]
    numbered = page.locator("#comparison .name").all_inner_texts()
    assert numbered == [f"{number}. {photos[number - 1].name}" for number in (1, 3, 4, 5)]
    rows = page.locator("#comparison tbody tr").all_inner_texts()
    assert caption in rows[0]
    assert rest["the_others"]["caption"] in rows[1]

    page.get_by_label("Prompt").fill("the underside is")
    page.get_by_role("button", name="Write the caption").click()
    page.locator("#json textarea").filter(has_text="the underside is").wait_for()
    assert json_of(page)["prompt"] == "the underside is"
    page.locator("#comparison table").wait_for(state="detached")  # it was about another prompt


@pytest.mark.slow
def test_wrong_file_gets_a_sentence_and_the_photos_stay(page, photos, tmp_path):
    wrong = tmp_path / "notes.txt"
    wrong.write_text("a red chair")
    upload(page, [photos[0], wrong, photos[1]])
    alert = page.get_by_role("alert").filter(has_text="notes.txt")
    alert.wait_for()
    wait_for_photos(page, photos[:2])
    assert re.fullmatch(r"notes\.txt is not a picture, expected one of .*\.", alert.inner_text())
    page.get_by_role("button", name="Write the caption").click()
    assert wait_for_caption(page)


def test_file_that_is_too_large_gets_a_sentence(page, tmp_path):
    large = tmp_path / "large.bmp"
    Image.new("RGB", (700, 700)).save(large)  # 1.5 MB
    upload(page, [large])
    page.get_by_text(re.compile("maximum allowed size|too large|exceeds", re.IGNORECASE)).first.wait_for()


def test_keyboard_alone_is_enough(page, photos):
    # Whoever waits for a file chooser asks for it without waiting for the answer, and Enter could come first; this asks
    # now, and what follows goes the same way and has answers.
    page.on("filechooser", lambda chooser: None)

    def tab_to(matches: str, limit: int = 60) -> None:
        """Presses Tab until the focus is on something; what is focused has to show it."""
        for _ in range(limit):
            page.keyboard.press("Tab")
            if page.evaluate(f"() => {{ const part = document.activeElement; return !!({matches}); }}"):
                return
        raise AssertionError(f"Tab never reached {matches}")

    tab_to("part.tagName === 'BUTTON' && /upload/i.test(part.ariaLabel || part.innerText)")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files([str(path) for path in photos])
    wait_for_photos(page, photos)

    tab_to("part.tagName === 'TEXTAREA' || (part.tagName === 'INPUT' && part.type === 'text' && part.maxLength > 0)")
    page.keyboard.press("Control+A")
    page.keyboard.type("a photo of a")
    tab_to("part.tagName === 'BUTTON' && /Write the caption/.test(part.innerText)")
    page.keyboard.press("Enter")
    wait_for_caption(page)
    assert json_of(page)["prompt"] == "a photo of a"

    tab_to("part.className === 'scroll'")
    tab_to("part.type === 'checkbox'")
    page.keyboard.press("Space")
    tab_to("part.tagName === 'BUTTON' && /Compare without/.test(part.innerText)")
    page.keyboard.press("Enter")
    wait_for_comparison(page)
    tab_to("part.ariaLabel === 'JSON'")
    tab_to("part.tagName === 'BUTTON' && /Copy the JSON/.test(part.innerText)")
    page.keyboard.press("Enter")
    page.wait_for_function("async () => (await navigator.clipboard.readText()).includes('left_out')")
    copied = json.loads(page.evaluate("() => navigator.clipboard.readText()"))
    assert copied["left_out"]["photos"] == [photos[0].name]


@pytest.mark.parametrize(
    "size", [pytest.param(DESKTOP, marks=pytest.mark.slow, id="desktop"), pytest.param(PHONE, id="phone")]
)
def test_nothing_overlaps_and_everything_has_a_name(page, size):
    page.set_viewport_size(size)
    heading = page.locator("#heading p").inner_text()
    assert heading == f"Drop photos of one thing, or one slide: at most 8 files of 1 MB. The model is {NAME}."
    assert overlaps(page) == []
    page.get_by_role("button", name="Write the caption").click()
    wait_for_caption(page)
    page.get_by_role("checkbox", name="1. ").check()
    page.get_by_role("button", name="Compare without them").click()
    wait_for_comparison(page)
    assert overlaps(page) == []
    assert unlabelled(page) == []
