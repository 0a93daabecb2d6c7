from io import StringIO

import pytest
from rich.console import Console

from reproduce.__main__ import show
from reproduce.comparison import METRICS, Published, Result, compare, read_published, to_markdown

TWO_OF_THREE = Published(
    categories=("carpet", "grid", "screw"),
    results=(
        Result(
            "first R18",
            "its settings",
            averages={"image_auroc": 0.8},
            categories={"image_auroc": {"carpet": 0.9, "grid": 0.7, "screw": 0.8}},
        ),
        Result("paper", "", averages={"image_auroc": 0.95}, categories={"image_auroc": {}}),
    ),
    sources={"first": "a README"},
)


def metrics_json(groups):
    """An evaluation's metrics.json with image AUROCs by group and no other metrics."""
    return {
        "normal": "good",
        "aupro_limit": 0.3,
        "average": {"image_auroc": 0.123, "pixel_aupro": None},
        "groups": {
            group: {
                "metrics": {
                    "image_auroc": {"value": value, "low": None, "high": None},
                    "pixel_aupro": {"value": None, "low": None, "high": None},
                },
                "defects": {},
            }
            for group, value in groups.items()
        },
    }


def test_our_column_comes_first_and_averages_come_before_categories():
    (table,) = compare(metrics_json({"screw": 0.5, "grid": 0.75, "carpet": 1.0}), TWO_OF_THREE)
    assert table.title == "Image AUROC"
    assert table.columns == ("ours", "first R18", "paper")
    assert table.rows == (
        ("average of 3", (0.75, 0.8, 0.95)),
        ("carpet", (1.0, 0.9, None)),
        ("grid", (0.75, 0.7, None)),
        ("screw", (0.5, 0.8, None)),
    )
    assert not table.note


def test_fewer_categories_are_compared_with_the_published_average_over_the_same():
    (table,) = compare(metrics_json({"grid": 0.5, "screw": 1.0}), TWO_OF_THREE)
    assert table.rows == (
        ("average of 3", (None, 0.8, 0.95)),
        ("average of 2*", (0.75, pytest.approx(0.75), None)),
        ("grid", (0.5, 0.7, None)),
        ("screw", (1.0, 0.8, None)),
    )
    assert table.note.startswith("*")


def test_a_category_without_a_value_is_shown_and_not_averaged():
    (table,) = compare(metrics_json({"carpet": None, "grid": 0.5, "screw": 1.0}), TWO_OF_THREE)
    assert table.rows[1] == ("average of 2*", (0.75, pytest.approx(0.75), None))
    assert table.rows[2] == ("carpet", (None, 0.9, None))


def test_other_groups_have_a_table_of_their_own():
    tables = compare(metrics_json({"tile": 0.5, "grid": 0.75, "line 7": 1.0}), TWO_OF_THREE)
    assert [row[0] for row in tables[0].rows] == ["average of 3", "average of 1*", "grid"]
    assert tables[1].rows == (
        ("line 7", (1.0, None, None, None)),
        ("tile", (0.5, None, None, None)),
    )
    assert len(compare(metrics_json({"line 7": 1.0}), TWO_OF_THREE)) == 1


def test_markdown_escapes_names_and_lists_settings_and_sources():
    tables = compare(metrics_json({"a|b": 0.1234, "grid": 0.75}), TWO_OF_THREE)
    lines = to_markdown(tables, "resnet18, a|b.pth", TWO_OF_THREE).splitlines()
    assert r"| a\|b | 0.123 | – | – | – |" in lines
    assert r"| average of 1\* | 0.750 | 0.700 | – |" in lines
    assert r"- **ours**: resnet18, a\|b.pth" in lines
    assert "- **first R18**: its settings" in lines
    assert "- **first**: a README" in lines


def test_tables_fit_into_80_columns_with_brackets_in_names():
    published = read_published()
    value = {"value": 0.5, "low": 0.4, "high": 0.6}
    group = {"metrics": dict.fromkeys(METRICS, value)}
    groups = dict.fromkeys([*published.categories, "[bold]"], group)
    text = StringIO()
    tables = compare({"groups": groups}, published)
    show(tables, "resnet18", published, Console(file=text, width=80))
    lines = text.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines[lines.index("Image AUROC") :])
    assert "…" not in text.getvalue()
    assert any(line.startswith("[bold]") for line in lines)
    (row,) = (line for line in lines if line.split()[:1] == ["zipper"] and "0.979" in line)
    assert row.split()[1:] == ["0.500", "0.979", "0.986", "0.976", "0.984", "–", "–"]
