from statistics import fmean

import pytest
import yaml

from reproduce.comparison import METRICS, PUBLISHED, read_published

CATEGORIES = [
    "bottle",
    "cable",
    "capsule",
    "carpet",
    "grid",
    "hazelnut",
    "leather",
    "metal_nut",
    "pill",
    "screw",
    "tile",
    "toothbrush",
    "transistor",
    "wood",
    "zipper",
]
READ = read_published()
RESULTS = {result.name: result for result in READ.results}
WITH_CATEGORIES = [
    (name, metric)
    for name, result in RESULTS.items()
    for metric, values in result.categories.items()
    if values
]


def test_every_category_of_mvtec_ad_has_values():
    assert sorted(READ.categories) == CATEGORIES
    assert {name: set(RESULTS[name].averages) for name in RESULTS} == {
        "anomalib R18": {"image_auroc", "pixel_auroc", "image_f1_best"},
        "anomalib WR50": {"image_auroc", "pixel_auroc", "image_f1_best"},
        "xiahaifeng R18": {"image_auroc", "pixel_auroc"},
        "xiahaifeng WR50": {"image_auroc", "pixel_auroc"},
        "paper R18": {"pixel_auroc", "pixel_aupro"},
        "paper WR50": {"image_auroc", "pixel_auroc", "pixel_aupro"},
    }
    assert len(WITH_CATEGORIES) == 10
    for name, metric in WITH_CATEGORIES:
        assert sorted(RESULTS[name].categories[metric]) == CATEGORIES


def test_every_value_is_a_fraction_with_the_three_decimals_of_its_source():
    for result in READ.results:
        assert set(result.averages) <= set(METRICS)
        values = [*result.averages.values()]
        values += [value for each in result.categories.values() for value in each.values()]
        for value in values:
            assert 0.7 < value <= 1
            assert value == round(value, 3)


@pytest.mark.parametrize(("name", "metric"), WITH_CATEGORIES)
def test_published_averages_are_the_rounded_means_of_the_categories(name, metric):
    result = RESULTS[name]
    mean = fmean(result.categories[metric].values())
    assert result.averages[metric] == pytest.approx(mean, abs=0.0005 + 1e-9)


def test_every_source_has_an_address_and_is_used():
    content = yaml.safe_load(PUBLISHED.read_text())
    assert {entry["source"] for entry in content["results"]} == set(content["sources"])
    assert all(source["url"].startswith("https://") for source in content["sources"].values())


def test_figures_match_the_readmes():
    # one cell of each table, copied by hand
    cells = {
        ("anomalib R18", "image_auroc", "hazelnut"): 0.750,
        ("anomalib WR50", "image_auroc", "cable"): 0.878,
        ("anomalib R18", "pixel_auroc", "grid"): 0.918,
        ("anomalib WR50", "pixel_auroc", "zipper"): 0.986,
        ("anomalib R18", "image_f1_best", "transistor"): 0.796,
        ("anomalib WR50", "image_f1_best", "metal_nut"): 0.978,
        ("xiahaifeng R18", "image_auroc", "zipper"): 0.741,
        ("xiahaifeng WR50", "image_auroc", "capsule"): 0.915,
        ("xiahaifeng R18", "pixel_auroc", "tile"): 0.917,
        ("xiahaifeng WR50", "pixel_auroc", "wood"): 0.941,
    }
    for (name, metric, category), value in cells.items():
        assert RESULTS[name].categories[metric][category] == value
    assert RESULTS["paper R18"].averages == {"pixel_auroc": 0.967, "pixel_aupro": 0.901}
