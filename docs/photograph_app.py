"""Photographs the page for docs/app.md: `python docs/photograph_app.py` starts `mivpg app` and opens it in Chromium.

Takes the extras app and dev, and `chromium` on the path.
"""

import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

IMAGES = Path(__file__).parent / "images"
DESKTOP, PHONE = 1280, 390
"""Widths of the screens, in pixels."""


def main() -> None:
    """Writes app_desktop.png, 900 pixels wide, and the top of app_phone.png."""
    command = [sys.executable, "-m", "mivpg.cli", "app"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as playwright:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip()
            chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            desktop = photograph(chromium, address, DESKTOP)
            phone = photograph(chromium, address, PHONE)
            chromium.close()
        finally:
            server.terminate()
    save(
        desktop.resize((900, round(desktop.height * 900 / desktop.width)), Image.Resampling.LANCZOS), "app_desktop.png"
    )
    save(phone.crop((0, 0, phone.width, 1500)), "app_phone.png")


def photograph(chromium: Browser, address: str, width: int) -> Image.Image:
    """The whole page with the product that it opens with, captioned, and its third photo left out."""
    page = chromium.new_page(viewport={"width": width, "height": 900})
    page.set_default_timeout(120_000)
    page.goto(address)
    page.locator("#photos li").first.wait_for()
    page.get_by_role("button", name="Write the caption").click()
    page.locator("#photos .bar").first.wait_for()
    page.get_by_role("checkbox", name="3. ").check()
    page.get_by_role("button", name="Compare without them").click()
    page.locator("#comparison table").wait_for()
    page.locator("#json textarea").filter(has_text="left_out").wait_for()
    page.mouse.move(0, 0)
    page.evaluate("() => { document.activeElement.blur(); scrollTo(0, 0); }")
    page.wait_for_timeout(1000)  # what moves comes to rest
    picture = page.screenshot(full_page=True)
    page.close()
    return Image.open(BytesIO(picture)).convert("RGB")


def save(picture: Image.Image, name: str) -> None:
    """With a palette, which is a third of the size."""
    picture.quantize(128).save(IMAGES / name, optimize=True)


if __name__ == "__main__":
    main()
