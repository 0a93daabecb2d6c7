"""Chromium, and pages opened in it as users open them: from disk, without a network."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from padim_ray.report import write_report
from padim_ray.storage.location import Location
from tests.report.run_directory import (
    AWKWARD_NAMES,
    draw_heat,
    draw_picture,
    drift,
    failed_row,
    group_summary,
    histogram,
    region,
    scored_row,
    write_metrics,
    write_part,
    write_run,
)

SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(scope="session")
def evaluated_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three groups with drift, failures, flags and hostile names, and its report.

    Of 12 images, image i has the (i + 1)-th highest ratio of score to threshold. The order by score
    is another one, since the groups' thresholds differ.
    """
    root = tmp_path_factory.mktemp("runs") / "2026-11-20 #1"
    names = ["bolt", "nut", SCRIPT]
    thresholds = [10.0, 100.0, 1.0]
    rows = []
    for index in range(12):
        name = AWKWARD_NAMES[index] if index < len(AWKWARD_NAMES) else f"{index:02d}.png"
        path = root.parent / "images" / name
        image = draw_picture(path, seed=index)
        threshold = thresholds[index % 3]
        score = threshold * (3 - index / 4)
        flagged = score > threshold
        rows.append(
            scored_row(
                str(path),
                score,
                threshold,
                group=names[index % 3],
                defect=["good", "crack", SCRIPT, ""][index % 4],
                camera=f"serial {index}",
                heatmap_uri=draw_heat(root, name, image, index) if index not in (1, 11) else None,
                regions=[region(10, 12, 30, 20), region(60, 40, 9, 9, 5)] if flagged else [],
            )
        )
    Path(rows[3]["uri"]).unlink()
    write_part(root, 0, rows[:5])
    write_part(root, 1, [*rows[5:], failed_row(f"/gone/{SCRIPT}.png", f"fetch: {SCRIPT}")])
    note = "40 training images can't reach alpha 0.01 (that takes 99)"
    groups = {
        "bolt": group_summary(4, flagged=2, drift=drift(changed=True)),
        "nut": group_summary(4, flagged=3, threshold=100.0, drift=None, threshold_note=note),
        SCRIPT: group_summary(4, listed=5, failed=1, threshold=1.0, histogram=histogram(2)),
    }
    write_run(root, groups, job="evaluate", failed_by_cause={f"fetch: {SCRIPT}": 1})
    write_metrics(root, names)
    write_report(Location.of(str(root)))
    return root


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    names = ["chromium", "chromium-browser", "google-chrome"]
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    quiet = "no-first-run", "disable-background-networking", "disable-component-update"
    flags = [f"--{flag}" for flag in (*quiet, "disable-sync", "no-sandbox", "disable-gpu")]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Browser) -> Iterator[Callable[..., Page]]:
    """A function that opens a run's report.

    At the end it checks that no page had a console message, an error or an alert, or requested
    anything else.
    """
    contexts, complaints = [], []

    def open_page(root: Path, **settings: Any) -> Page:
        context = chromium.new_context(offline=True, **{"reduced_motion": "reduce", **settings})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        address = (root / "report.html").as_uri()

        def on_request(request: Any) -> None:
            if request.url != address and not request.url.startswith("data:"):
                complaints.append(f"request: {request.url}")

        page.on("request", on_request)
        page.on("console", lambda message: complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (complaints.append("alert"), dialog.dismiss()))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
