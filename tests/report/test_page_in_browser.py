from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from playwright.sync_api import Locator, Page, expect

from padim_ray.report import write_report
from padim_ray.storage.location import Location
from tests.report.conftest import SCRIPT
from tests.report.run_directory import write_part, write_run

CONTROLS = {"button", "link", "checkbox", "slider", "combobox", "searchbox", "disclosure triangle"}


def images(page: Page) -> Locator:
    return page.locator(".card:visible")


def ranks(page: Page) -> list[int]:
    return [int(card.get_attribute("data-rank")) for card in images(page).all()]


def control(page: Page, name: str) -> Locator:
    roles = {
        "search": "searchbox",
        "opacity": "slider",
        "heat": "checkbox",
        "boxes": "checkbox",
    }
    role = roles.get(name, "combobox")
    return page.locator(".toolbar").get_by_role(role, name=name, exact=True)


def heat_opacity(page: Page, card: int = 0) -> float:
    heat = page.locator(".gallery .heat").nth(card)
    return float(heat.evaluate("element => getComputedStyle(element).opacity"))


def test_all_pictures_are_shown_from_a_file(open_page, evaluated_run: Path):
    page = open_page(evaluated_run)
    expect(images(page)).to_have_count(12)
    page.wait_for_function("[...document.images].every(image => image.complete)")
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    expect(page.locator(".gallery .missing")).to_have_text(
        [
            "No heatmap was drawn",
            "Image can’t be shown: fetch: not found",
            "No heatmap was drawn",
        ]
    )


def test_names_and_values_are_text(open_page, evaluated_run: Path):
    page = open_page(evaluated_run)
    card = page.locator(".card").first
    assert card.locator(".title").get_attribute("title").endswith(f"/images/{SCRIPT}.png")
    card.locator(".open").click()
    expect(page.get_by_role("dialog").locator("h3")).to_contain_text(f"/images/{SCRIPT}.png")
    page.keyboard.press("Escape")
    expect(control(page, "group").locator("option").nth(1)).to_have_text(f"{SCRIPT} (4)")
    expect(page.locator("#failed")).to_contain_text(f"/gone/{SCRIPT}.png fetch: {SCRIPT}")
    expect(page.get_by_role("heading", name=SCRIPT, exact=True)).to_be_visible()
    assert page.locator("script").count() == 1


def test_filters_narrow_the_gallery_together(open_page, evaluated_run: Path):
    page = open_page(evaluated_run)
    control(page, "group").select_option(label="nut (4)")
    assert ranks(page) == [1, 4, 7, 10]
    control(page, "defect").select_option(label="crack (3)")
    assert ranks(page) == [1]
    control(page, "defect").select_option(label="(empty) (3)")
    assert ranks(page) == [7]
    expect(page.get_by_role("status")).to_have_text("1 of 12 images")
    control(page, "defect").select_option(label="all")
    control(page, "verdict").select_option(label="not flagged (4)")
    assert ranks(page) == [10]
    control(page, "search").fill("no such name")
    expect(images(page)).to_have_count(0)
    page.get_by_role("button", name="Show all").click()
    assert ranks(page) == list(range(12))
    expect(control(page, "search")).to_be_focused()
    control(page, "search").fill("gRÖßE 钢")
    assert ranks(page) == [2]


def test_images_are_sorted_by_score_and_p_value(open_page, evaluated_run: Path):
    page = open_page(evaluated_run)
    assert ranks(page) == list(range(12))
    control(page, "sort by").select_option(label="score")
    assert ranks(page) == [1, 4, 7, 10, 0, 3, 6, 9, 2, 5, 8, 11]
    control(page, "sort by").select_option(label="p-value")
    assert ranks(page) == list(range(12))
    control(page, "sort by").select_option(label="score ÷ threshold")
    assert ranks(page) == list(range(12))


def test_the_slider_fades_the_heat_to_the_original(open_page, evaluated_run: Path):
    page = open_page(evaluated_run)
    assert heat_opacity(page) == 1
    control(page, "opacity").fill("40")
    assert heat_opacity(page) == pytest.approx(0.4)
    control(page, "heat").uncheck()
    assert heat_opacity(page) == 0
    control(page, "heat").check()
    assert heat_opacity(page) == pytest.approx(0.4)
    below = page.locator(".gallery .heat").first.locator("xpath=preceding-sibling::img")
    original = page.locator(".card").first.locator(".frame").first.locator("img")
    assert below.get_attribute("src") == original.get_attribute("src")


def test_boxes_lie_where_the_regions_are(open_page, evaluated_run: Path):
    page = open_page(evaluated_run)
    boxes = page.locator(".card").first.locator(".boxes").first
    expect(boxes).to_be_visible()
    picture = page.locator(".card").first.locator(".thumbnail").bounding_box()
    left, top, width, height = boxes.locator("path").last.evaluate(
        "path => { const b = path.getBBox(), m = path.getScreenCTM();"
        "return [m.a * b.x + m.e, m.d * b.y + m.f, m.a * b.width, m.d * b.height]; }"
    )
    scale = picture["width"] / 96
    assert left - picture["x"] == pytest.approx(10 * scale, abs=0.1)
    assert top - picture["y"] == pytest.approx(12 * scale, abs=0.1)
    assert width == pytest.approx((60 + 9 - 10) * scale, abs=0.1)
    assert height == pytest.approx((40 + 9 - 12) * scale, abs=0.1)
    control(page, "boxes").uncheck()
    expect(boxes).to_be_hidden()


def test_the_large_view_goes_through_the_chosen_images(open_page, evaluated_run: Path):
    page = open_page(evaluated_run)
    control(page, "group").select_option(label="bolt (4)")
    images(page).nth(1).locator(".open").click()
    dialog = page.get_by_role("dialog")
    position = dialog.locator("[data-position]")
    expect(position).to_have_text("2 of 4")
    page.keyboard.press("ArrowRight")
    expect(position).to_have_text("3 of 4")
    expect(dialog).to_contain_text("serial 6")
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    expect(position).to_have_text("4 of 4")
    dialog.get_by_role("button", name="Next image").click()
    expect(position).to_have_text("1 of 4")
    dialog.get_by_role("button", name="Previous image").click()
    expect(position).to_have_text("4 of 4")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(images(page).nth(3).locator(".open")).to_be_focused()


def test_the_large_view_s_controls_are_the_toolbar_s(open_page, evaluated_run: Path):
    page = open_page(evaluated_run)
    images(page).first.locator(".open").click()
    dialog = page.get_by_role("dialog")
    slider = dialog.get_by_label("opacity")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    expect(dialog.locator("[data-position]")).to_have_text("1 of 12")  # the slider takes the key
    expect(slider).to_have_value("95")
    dialog.get_by_label("boxes").uncheck()
    dialog.get_by_role("button", name="Close").click()
    expect(dialog).to_be_hidden()
    expect(control(page, "opacity")).to_have_value("95")
    expect(control(page, "boxes")).not_to_be_checked()


def test_everything_works_from_the_keyboard(open_page, evaluated_run: Path):
    page = open_page(evaluated_run)

    def tab_to(target: Locator) -> None:
        for _ in range(80):
            page.keyboard.press("Tab")
            if target.evaluate("element => element === document.activeElement"):
                break
        outline = "element => getComputedStyle(element).outlineStyle"
        assert target.evaluate(outline) == "solid"

    tab_to(control(page, "search"))
    page.keyboard.type("quotes")
    assert ranks(page) == [1]
    page.keyboard.press("Control+A")
    page.keyboard.press("Delete")
    tab_to(control(page, "group"))
    page.keyboard.type("bolt")
    assert ranks(page) == [0, 3, 6, 9]
    tab_to(control(page, "heat"))
    page.keyboard.press("Space")
    assert heat_opacity(page) == 0
    tab_to(images(page).first.locator(".open"))
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    page.keyboard.press("ArrowRight")
    tab_to(dialog.get_by_role("button", name="Close"))
    page.keyboard.press("Enter")
    expect(images(page).nth(1).locator(".open")).to_be_focused()


def test_links_to_heatmaps_lead_to_files(open_page, evaluated_run: Path):
    page = open_page(evaluated_run)
    links = page.locator(".gallery").get_by_role("link", name="full heatmap")
    expect(links).to_have_count(10)
    for link in links.all():
        address = urlparse(link.evaluate("element => element.href"))
        assert address.scheme == "file" and Path(unquote(address.path)).is_file()


@pytest.mark.parametrize("large", [False, True], ids=["page", "large view"])
def test_every_control_has_a_name(open_page, evaluated_run: Path, large: bool):
    page = open_page(evaluated_run)
    if large:
        page.locator(".open").first.click()
    session = page.context.new_cdp_session(page)
    for _ in range(100):  # the browser builds its accessibility tree asynchronously
        tree = session.send("Accessibility.getFullAXTree")
        nodes = [node for node in tree["nodes"] if not node["ignored"]]
        controls = [node for node in nodes if node["role"]["value"].lower() in CONTROLS]
        if len(controls) > (6 if large else 20):
            break
        page.wait_for_timeout(100)
    assert len(controls) > (6 if large else 20)
    assert [node for node in controls if not node["name"]["value"].strip()] == []
    pictures = [node for node in nodes if node["role"]["value"] == "image"]
    assert [node for node in pictures if not node["name"]["value"].strip()] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 375, 768, 1280, 2560])
def test_no_width_scrolls_sideways(open_page, evaluated_run: Path, scheme: str, width: int):
    page = open_page(evaluated_run, color_scheme=scheme, viewport={"width": width, "height": 800})
    for details in page.locator("details").all():
        details.evaluate("element => { element.open = true; }")
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(overflow) <= 0
    page.locator(".open").first.click()
    body = page.locator(".large-body")
    assert body.evaluate("element => element.scrollWidth - element.clientWidth") <= 0


CONTRAST = """
() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (color) => {
    const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = color.map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = (element) => {
    for (; element; element = element.parentElement) {
      const color = rgb(getComputedStyle(element).backgroundColor);
      if (color[3] === 255) return color;
    }
    return [255, 255, 255, 255];
  };
  const faint = [];
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!text || !element.checkVisibility() || element.closest("svg, option, script")) continue;
    const [a, b] = [rgb(getComputedStyle(element).color), background(element)].map(luminance);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) faint.push([element.outerHTML.slice(0, 80), ratio]);
  }
  return faint;
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(open_page, evaluated_run: Path, scheme: str):
    page = open_page(evaluated_run, color_scheme=scheme)
    assert page.evaluate(CONTRAST) == []


def test_light_and_dark_differ(open_page, evaluated_run: Path):
    colors = [
        open_page(evaluated_run, color_scheme=scheme).evaluate(
            "[getComputedStyle(document.body).backgroundColor, "
            "getComputedStyle(document.querySelector('.chart text')).fill]"
        )
        for scheme in ("light", "dark")
    ]
    assert colors[0][0] != colors[1][0] and colors[0][1] != colors[1][1]


def test_reduced_motion_disables_transitions(open_page, evaluated_run: Path):
    duration = "getComputedStyle(document.querySelector('.gallery .heat')).transitionDuration"
    assert open_page(evaluated_run, reduced_motion="reduce").evaluate(duration) == "0s"
    assert open_page(evaluated_run, reduced_motion="no-preference").evaluate(duration) != "0s"


def test_without_scripts_the_page_still_shows_everything(open_page, evaluated_run: Path):
    page = open_page(evaluated_run, java_script_enabled=False)
    expect(images(page)).to_have_count(12)
    expect(page.locator(".toolbar")).to_be_hidden()


def test_an_empty_run_is_a_page_too(open_page, tmp_path):
    write_part(tmp_path, 0, [])
    write_run(tmp_path)
    write_report(Location.of(str(tmp_path)))
    expect(open_page(tmp_path).get_by_role("heading", level=1)).to_contain_text("100 images scored")
