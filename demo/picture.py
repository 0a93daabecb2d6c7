"""Draw the README's pictures from the demo's results: `make demo`, then `python -m demo.picture`.

Chromium takes the screenshot of the report.
"""

import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

RUN = Path("demo-run")
DOCS = Path("docs")
SHOWN = [
    "board/test/misplaced",
    "board/test/bridge",
    "flange/test/crack",
    "flange/test/missing_screw",
]
SIDE, GAP = 240, 8
REPORT_SIZE = 1200, 1560


def main() -> None:
    """Draw both pictures."""
    DOCS.mkdir(exist_ok=True)
    for name, picture in (("heatmaps", heatmaps()), ("report", report())):
        path = DOCS / f"{name}.png"
        picture.quantize(256, method=Image.Quantize.FASTOCTREE).save(path, optimize=True)
        print(path)


def heatmaps() -> Image.Image:
    """Photographs above their heatmaps."""
    picture = Image.new("RGB", (len(SHOWN) * (SIDE + GAP) - GAP, 2 * SIDE + GAP), "white")
    for column, folder in enumerate(SHOWN):
        photograph = sorted((RUN / "archive" / folder).iterdir())[2]
        heatmap = RUN / "results/heatmaps" / folder / f"{photograph.name}.png"
        for row, path in enumerate((photograph, heatmap)):
            tile = Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            picture.paste(tile, (column * (SIDE + GAP), row * (SIDE + GAP)))
    return picture


def report() -> Image.Image:
    """A screenshot of the report: its top, the groups and the most anomalous images."""
    width, height = REPORT_SIZE
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": width, "height": height})
        page.goto((RUN / "results/report.html").resolve().as_uri())
        picture = page.screenshot()
        browser.close()
    return Image.open(io.BytesIO(picture)).convert("RGB")


if __name__ == "__main__":
    main()
