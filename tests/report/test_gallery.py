import base64
import io
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

from padim_ray.report import gallery as report_gallery
from padim_ray.report.gallery import MAX_REGIONS, Picture, build_gallery, relative_link
from padim_ray.storage.location import Location
from tests.report.run_directory import (
    AWKWARD_NAMES,
    draw_heat,
    draw_picture,
    noisy_picture,
    region,
    scored_row,
)


def encoded_bytes(picture: Picture) -> bytes:
    return base64.b64decode(picture.src.removeprefix("data:image/webp;base64,"))


@pytest.mark.parametrize("name", AWKWARD_NAMES)
def test_images_with_awkward_names_are_shown_and_linked(tmp_path, name: str):
    root = Location.of(str(tmp_path / "out"))
    image = draw_picture(tmp_path / "images" / name)
    row = scored_row(str(tmp_path / "images" / name), 20.0)
    row["heatmap_uri"] = draw_heat(Path(root.uri), name, image)
    (shown,) = build_gallery([row], root, {})
    assert shown.thumbnail and shown.heat
    assert (shown.thumbnail.width, shown.thumbnail.height) == (96, 72)
    assert (Path(root.uri) / unquote(shown.heatmap_link)).is_file()


def test_pictures_show_the_image_upright_at_a_reduced_size(tmp_path):
    path = tmp_path / "turned.jpg"
    picture = Image.new("RGB", (1600, 800), "white")
    picture.paste("red", (0, 0, 400, 800))
    exif = Image.Exif()
    exif[0x0112] = 6  # the left side is shown on top
    picture.save(path, exif=exif)
    (shown,) = build_gallery([scored_row(str(path), 20.0)], Location.of(str(tmp_path)), {})
    with Image.open(io.BytesIO(encoded_bytes(shown.thumbnail))) as thumbnail:
        assert thumbnail.size == (320, 640)
        assert thumbnail.convert("RGB").getpixel((160, 40))[1] < 60  # red
        assert thumbnail.convert("RGB").getpixel((160, 600))[1] > 200  # white


def test_many_noisy_images_get_smaller_until_all_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(report_gallery, "PICTURE_BYTES", 2**20)
    noise = str(tmp_path / "noise.png")
    noisy_picture(tmp_path / "noise.png")
    rows = [scored_row(noise, 20.0, heatmap_uri=noise)] * 15
    root = Location.of(str(tmp_path))
    few = build_gallery(rows[:1], root, {})
    many = build_gallery(rows, root, {})
    assert few[0].thumbnail.width == 640 > many[0].thumbnail.width
    pictures = [picture for image in many for picture in (image.thumbnail, image.heat)]
    assert all(pictures)
    assert 2**19 < sum(len(encoded_bytes(p)) for p in pictures) <= 2**20


def test_pictures_that_can_t_be_made_small_enough_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(report_gallery, "PICTURE_BYTES", 100)
    noisy_picture(tmp_path / "noise.png", side=90)
    row = scored_row(str(tmp_path / "noise.png"), 20.0)
    (shown,) = build_gallery([row], Location.of(str(tmp_path)), {})
    assert shown.thumbnail is None
    assert shown.problem == "left out: the page would be too large"


@pytest.mark.parametrize(
    ("uri", "content", "cause"),
    [
        ("gone.png", None, "fetch: not found"),
        ("empty.png", b"", "decode: empty file"),
        ("text.png", b"no image", "decode: not a"),
    ],
)
def test_an_image_that_can_t_be_shown_keeps_its_row_with_the_cause(tmp_path, uri, content, cause):
    if content is not None:
        (tmp_path / uri).write_bytes(content)
    image = draw_picture(tmp_path / "other.png")
    heatmap = draw_heat(tmp_path, uri, image)
    rows = [
        scored_row(str(tmp_path / uri), 30.0, heatmap_uri=heatmap),
        scored_row(str(tmp_path / "other.png"), 20.0, heatmap_uri=str(tmp_path / "no.png")),
    ]
    broken, other = build_gallery(rows, Location.of(str(tmp_path)), {})
    assert broken.thumbnail is None and broken.problem.startswith(cause) and broken.heat
    assert other.thumbnail and other.problem is None
    assert other.heat is None and other.heat_problem == "fetch: not found"


def test_one_unusable_store_doesn_t_hide_the_images_of_others(tmp_path):
    draw_picture(tmp_path / "a.png")
    rows = [scored_row("nowhere://bucket/a.png", 20.0), scored_row(str(tmp_path / "a.png"), 10.0)]
    lost, found = build_gallery(rows, Location.of(str(tmp_path)), {})
    assert "nowhere" in lost.problem
    assert found.thumbnail is not None


def test_images_come_from_s3(s3, tmp_path):
    image = draw_picture(tmp_path / "archive/a #1.png")
    draw_heat(tmp_path / "archive/out", "a", image)
    s3.upload("gallery", tmp_path / "archive")
    row = scored_row("s3://gallery/a #1.png", 3.0, heatmap_uri="s3://gallery/out/heatmaps/a.png")
    root = Location.of("s3://gallery/out", s3.options)
    (shown,) = build_gallery([row], root, s3.options)
    assert shown.thumbnail and shown.heat
    assert shown.heatmap_link == "heatmaps/a.png"


def test_the_regions_with_the_highest_peaks_are_kept(tmp_path):
    regions = [region(0, 0, 2, 2, float(peak)) for peak in range(100)]
    row = scored_row(str(tmp_path / "gone.png"), 99.0, regions=regions)
    (shown,) = build_gallery([row], Location.of(str(tmp_path)), {})
    assert shown.region_count == 100
    assert [r["peak"] for r in shown.regions] == list(range(99, 99 - MAX_REGIONS, -1))


def test_links_lead_only_to_files_below_the_run_s_directory():
    root = Location.of("/out/run 1")
    assert relative_link("/out/run 1/heatmaps/a%20#?.png", root) == "heatmaps/a%2520%23%3F.png"
    assert relative_link("/out/run 10/heatmaps/a.png", root) is None
    assert relative_link("javascript:alert(1)", root) is None
    assert relative_link(None, root) is None
