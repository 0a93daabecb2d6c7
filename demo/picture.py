"""The README's picture, from the demo's results: `python -m demo.picture` after `make demo`."""

from pathlib import Path

from PIL import Image

RUN = Path("demo-run")
SHOWN = [
    "board/test/misplaced",
    "board/test/bridge",
    "flange/test/crack",
    "flange/test/missing_screw",
]
SIDE, GAP = 240, 8


def main() -> None:
    """Put photographs above their heatmaps."""
    height = 2 * SIDE + GAP
    picture = Image.new("RGB", (len(SHOWN) * (SIDE + GAP) - GAP, height), "white")
    for column, folder in enumerate(SHOWN):
        photograph = sorted((RUN / "archive" / folder).iterdir())[2]
        heatmap = RUN / "results/heatmaps" / folder / f"{photograph.name}.png"
        for row, path in enumerate((photograph, heatmap)):
            tile = Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            picture.paste(tile, (column * (SIDE + GAP), row * (SIDE + GAP)))
    path = Path("docs/heatmaps.png")
    path.parent.mkdir(exist_ok=True)
    picture.quantize(256, method=Image.Quantize.FASTOCTREE).save(path, optimize=True)
    print(path)


if __name__ == "__main__":
    main()
