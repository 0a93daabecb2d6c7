"""The documentation: links lead somewhere, files exist, the site builds, the example is right."""

import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import torch

from padim_ray.densities.gaussian.leave_one_out import leave_one_out_squared_distances
from padim_ray.densities.gaussian.moments import (
    Moments,
    accumulate_,
    empty_moments,
    merge,
    subtract,
)
from padim_ray.densities.gaussian.regularization import Regularization, pool
from padim_ray.densities.gaussian.whitening import factorise, squared_distances
from padim_ray.scoring.calibration import Calibration

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
README_BYTES = 14_000
FOLDERS = ("padim_ray", "tests", "docs", "infra", "jobs", "benchmarks", "demo", "reproduce", ".ci")
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def anchors(page: Path) -> set[str]:
    """A page's anchors as a code host makes them of its headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return {
        re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", text, re.M)
    }


def test_the_readme_can_be_read_in_one_go():
    assert len((ROOT / "README.md").read_bytes()) <= README_BYTES


@by_page
def test_every_relative_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        target, _, anchor = link.partition("#")
        if urlsplit(target).scheme:
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.is_file(), link
        assert not anchor or anchor in anchors(path), link


@by_page
def test_every_file_that_is_named_exists(page):
    for code in re.findall(r"`([^`\n]+)`", page.read_text()):
        for word in code.split():
            if word.split("/")[0] in FOLDERS and "/" in word:
                assert (ROOT / word).exists(), word


def test_the_picture_of_the_rooms_shows_all_of_them():
    (picture,) = re.findall(
        r"^```\npadim_ray/\n(.*?)^```", (DOCS / "architecture.md").read_text(), re.M | re.S
    )
    shown, rooms = set(), {path.parent for path in ROOT.glob("padim_ray/*/__init__.py")}
    parent = Path()
    for indent, name in re.findall(r"^( {2,4})(\w+)/", picture, re.M):
        parent = ROOT / "padim_ray" if len(indent) == 2 else parent
        shown.add(parent / name)
        assert (parent / name).is_dir(), name
        parent = parent / name if len(indent) == 2 else parent
    assert rooms <= shown


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site; a warning is an error."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", out / "trees"]
    done = subprocess.run(
        [*command, DOCS, out / "html"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return out / "html"


class Links(HTMLParser):
    """Collects what a page of the site refers to, and where it can be referred to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors = {""}
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        """An element's id, and its link, script or picture."""
        for name, value in attrs:
            if name == "id":
                self.anchors.add(value)
            elif name in ("href", "src"):
                self.targets.append(value)


def test_every_link_on_the_site_leads_somewhere(site):
    pages = {page: Links(page) for page in site.glob("*.html")}
    assert {"index.html", "api.html", "mathematics.html"} <= {page.name for page in pages}
    for page, links in pages.items():
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            path = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert path.is_file(), f"{page.name}: {target}"
            if path in pages:
                assert unquote(parts.fragment) in pages[path].anchors, f"{page.name}: {target}"


def test_the_site_needs_no_other_server(site):
    for page in site.glob("*.html"):
        assert not re.findall(r'<(?:script|img)[^>]+src="(?:https?:)?//', page.read_text()), page


def test_every_job_s_options_are_on_the_site(site):
    text = (site / "commands.html").read_text()
    sections = dict(re.findall(r'<section id="(\w+)">(.*?)</section>', text, re.S))
    for job in (ROOT / "jobs").glob("*.py"):
        assert "--storage-options" in sections[job.stem]


# The example of docs/mathematics.md: two levels, 2×2 cells over one, three images.
FINE = np.array([[1, 4, 4], [2, 2, 5], [6, 3, 3], [3, 1, 5]], float)
COARSE = np.array([[1, 2, 6]], float)
RULE = Regularization()


def patches(images: slice | list[int] = slice(None)) -> list[torch.Tensor]:
    """Some of the images, per level (P_ℓ, 1, B)."""
    return [torch.from_numpy(level[:, None, images]) for level in (FINE, COARSE)]


def moments_of(images: slice | list[int] = slice(None)) -> Moments:
    return accumulate_(empty_moments((4, 1), (1, 1), dtype=torch.float64), patches(images))


def gaussian_of(moments: Moments):
    scale, offset = RULE.scale(moments.count), RULE.offset(pool(moments))
    return factorise(moments, scale, offset, dtype=torch.float64)


def at_a(moments: Moments) -> list[float]:
    """Means, and the scatter's three different entries, at cell a."""
    (fine, cross), (coarse,) = moments.scatters
    tensors = [*moments.means, fine, cross, coarse]
    return [float(tensor[0].squeeze()) for tensor in tensors]


@pytest.fixture(scope="module")
def says():
    """Asserts that the page has some text, however it is laid out."""
    page = " ".join((DOCS / "mathematics.md").read_text().split())

    def assert_says(*texts: str) -> None:
        for text in texts:
            assert text in page, text

    return assert_says


def numbers(values, digits=4) -> str:
    return ", ".join(f"{float(value):.{digits}f}" for value in values)


def row(values) -> str:
    return " | ".join(f"{float(value):g}".replace("-", "−") for value in values)


def test_the_example_has_these_images_and_moments(says):
    for name, fine, coarse in zip("ABC", FINE.T, COARSE.T, strict=True):
        says(f"| image {name} | {row([*fine, *coarse])} |")
    moments = moments_of()
    (fine, cross), (coarse,) = moments.scatters
    says(f"| **mean μ** | {row([*moments.means[0], *moments.means[1]])} |")
    says(f"| fine × fine | every fine cell | {row(fine.flatten())} |")
    says(f"| fine × coarse | every fine cell | {row(cross.flatten())} |")
    says(f"| coarse × coarse | the coarse cell, once | {row(coarse.flatten())} |")


def test_nested_blocks_have_as_many_numbers_as_it_says(says):
    moments = empty_moments((64 * 64, 32 * 32, 16 * 16), (64, 128, 256), device="meta")
    nested = sum(block.numel() for blocks in moments.scatters for block in blocks)
    dense = 64 * 64 * 448**2
    says(f"{dense:,} numbers", f"= {nested:,}", f"which is {100 * nested / dense:.0f} % of that")


def test_merging_and_subtracting_in_the_example(says):
    both, third = moments_of([0, 1]), moments_of([2])
    assert at_a(both) == [2.5, 1.5, 4.5, 1.5, 0.5]
    assert at_a(third) == [4, 6, 0, 0, 0]
    assert at_a(merge(both, third)) == pytest.approx([3, 3, 6, 6, 14])
    assert at_a(subtract(moments_of(), third)) == pytest.approx(at_a(both))
    says("n = 2 μ = (2.5, 1.5) S = [4.5 1.5 ; 1.5 0.5]", "n = 1 μ = (4, 6) S = 0")
    says("= [6 6 ; 6 14]", "+ ((3, 3) − (4, 6))/2 = (2.5, 1.5)")


def test_regularisation_and_whitening_in_the_example(says):
    moments = moments_of()
    (fine, cross), (coarse,) = RULE.offset(pool(moments))
    says(f"a = 0.9/2 = {RULE.scale(3):g}", f"= {float(fine):g} fine × coarse")
    says(f"= {float(cross):g} coarse × coarse", f"= {float(coarse):g} ```")
    gaussian = gaussian_of(moments)
    (fine, cross), (coarse,) = gaussian.whitening
    covariance = np.linalg.inv(whitening_at_a(gaussian).T @ whitening_at_a(gaussian))
    says(
        f"= [{covariance[0, 0]:g} {covariance[0, 1]:g} ; {covariance[1, 0]:g} {covariance[1, 1]:g}]"
    )
    says(f"= {float(coarse):.4f}", f"1/√s = {float(fine[0]):.4f}", f"{1 / float(fine[0]) ** 2:.4f}")
    says(f"= {float(cross[0]):.4f}".replace("-", "−"))


def whitening_at_a(gaussian) -> np.ndarray:
    """W of cell a for vectors (fine, coarse)."""
    (fine, cross), (coarse,) = gaussian.whitening
    return np.array([[float(fine[0]), float(cross[0])], [0, float(coarse)]])


def test_distances_in_the_example(says):
    new = [torch.tensor(level, dtype=torch.float64) for level in ([6, 2, 4, 3], [5])]
    gaussian = gaussian_of(moments_of())
    squared = squared_distances(gaussian, [level[:, None, None] for level in new])[:, 0]
    z = whitening_at_a(gaussian) @ [3, 2]
    says(f"= {z[1]:.4f} z₀", f"= {z[0]:.4f} M²", f"= {squared[0]:.4f} M = {squared[0].sqrt():.4f}")
    says(f"are {numbers(squared.sqrt())}.")


def test_leave_one_out_in_the_example(says):
    gaussian = gaussian_of(moments_of())
    exact = leave_one_out_squared_distances(gaussian, patches(), 3, RULE, tolerance=0)
    refitted = squared_distances(gaussian_of(moments_of([1, 2])), patches([0]))
    torch.testing.assert_close(exact[:, :1], refitted)
    says(f"= {exact[0, 0]:.3f} ```", f"M² = {exact[0, 0]:.3f}: the same number")
    own = squared_distances(gaussian, patches())[0, 0]
    says(f"in the model, M² was {own:.3f}.")
    others = moments_of([1, 2])
    offset = RULE.offset(pool(others))
    pooled = [float(block) / len(others.means[level]) for level, block in pooled_blocks(others)]
    assert pooled == [3.125, 3.5, 8]
    without = [
        RULE.scale(2) * scatter + float(block)
        for scatter, block in zip(at_a(others)[2:], [*offset[0], *offset[1]], strict=True)
    ]
    assert without == pytest.approx([0.34375, 0.35, 8.08])
    says("scatter [0 0 ; 0 8], the averaged scatter 3.125, 3.5 and 8")
    says("Σ₋ = [0.34375 0.35 ; 0.35 8.08]")


def pooled_blocks(moments: Moments):
    """Each pooled block, with the level on whose grid it varies."""
    for level, blocks in enumerate(pool(moments).sums):
        for block in blocks:
            yield level, block


def test_the_formula_by_hand_gives_the_same(says):
    """Conjugate gradients in two dimensions: exact after two steps."""
    d, c, scale = np.array([-2.0, -2]), 3 / 2, 0.9
    offsets = np.stack([FINE[:, 0] - FINE.mean(1), np.full(4, -2.0)])
    share = c * offsets @ offsets.T / 4
    correction = RULE.shrinkage * share + RULE.ridge * np.diag(share.diagonal())
    assert share[[0, 0, 1], [0, 1, 1]] == pytest.approx([3.375, 0.75, 6])
    assert correction[[0, 0, 1], [0, 1, 1]] == pytest.approx([0.37125, 0.075, 0.66])
    whitening = whitening_at_a(gaussian_of(moments_of()))
    inverse = whitening.T @ whitening / 2
    matrix = np.linalg.inv(inverse) - correction
    assert matrix[[0, 0, 1], [0, 1, 1]] == pytest.approx([5.74375, 5.75, 13.48])

    def squared(q: float) -> float:
        return c**2 * q / (1 - scale * c * q)

    q = d @ np.linalg.solve(matrix, d)
    says(f"= {q:.4f} M² = 2.25·{q:.4f} / (1 − 1.35·{q:.4f}) = {squared(q):.3f}")
    says(f"| 0: E neglected | {squared(d @ inverse @ d):.3f} |")
    residual, solution = d.copy(), np.zeros(2)
    direction = conditioned = inverse @ residual
    for step in (1, 2):
        length = residual @ conditioned / (direction @ matrix @ direction)
        solution = solution + length * direction
        says(f"| {step} | {squared(d @ solution):.3f} |")
        before = residual @ conditioned
        residual = residual - length * matrix @ direction
        conditioned = inverse @ residual
        direction = conditioned + residual @ conditioned / before * direction


def test_the_conformal_threshold_of_the_example(says):
    scores = np.array([1.1, 1.2, 1.3, 1.5, 1.6, 1.8, 2.0, 2.3, 3.1])
    calibration = Calibration(scores, np.zeros(0))
    rank = math.ceil(round((len(scores) + 1) * 0.8, 9))
    (p_value,) = calibration.p_values(np.array([2.1]))
    says(", ".join(map(str, scores)), f"⌈10·0.8⌉ = {rank}")
    says(f"threshold is {calibration.threshold(0.2):.1f}.", f"= {p_value:.1f}.")


def test_one_gaussian_for_all_cells_of_the_example(says):
    terms = np.stack([FINE.ravel(), np.tile(COARSE[0], 4)])
    moments, mean = moments_of(), terms.mean(1)
    (fine, cross), (coarse,) = moments.scatters
    offsets = np.stack([moments.means[0][:, 0], moments.means[1][0].expand(4)]) - mean[:, None]
    within = [[fine.sum(), cross.sum()], [cross.sum(), 4 * coarse.sum()]]
    total = np.array(within, float) + 3 * offsets @ offsets.T
    np.testing.assert_allclose(total / 11, np.cov(terms))
    says(f"m = ({mean[0]:g}, {mean[1]:g})")
    for entry in ((0, 0), (0, 1), (1, 1)):
        says(f"= {total[entry]:g} /11 = {total[entry] / 11:.4f}")
    without = np.delete(terms, [0, 3, 6, 9], axis=1)
    left = np.cov(without)
    says(f"with mean ({without[0].mean():g}, {without[1].mean():g}) and covariance")
    says(f"[{left[0, 0]:.4f} {left[0, 1]:g} ; {left[1, 0]:g} {left[1, 1]:.4f}].")
