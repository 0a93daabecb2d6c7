"""`make reproduce`: fit and evaluate MVTec AD, and compare the figures with published ones."""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import App, Parameter
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

import padim_ray
from padim_ray.errors import PadimError
from padim_ray.model.spec import ModelSpec
from padim_ray.model.version import open_version
from padim_ray.runs.options.common import IMAGES, RESULTS
from padim_ray.runs.options.model import ModelOptions
from padim_ray.storage.location import Location
from reproduce.comparison import (
    Published,
    Table,
    compare,
    describe,
    format_value,
    read_published,
    to_markdown,
)

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ReproduceOptions(ModelOptions):
    """Options of `python -m reproduce`."""

    data: Annotated[Path, Parameter(group=IMAGES)]
    """Folder of the categories, each laid out as in MVTec AD: train/good, test/DEFECT,
    ground_truth/DEFECT."""

    out: Annotated[Path, Parameter(group=RESULTS)] = Path("reproduce-run")
    """Folder for the model, the evaluation and comparison.md."""

    overwrite: Annotated[bool, Parameter(group=RESULTS, negative="", show_default=False)] = False
    """Replace existing results in the folder."""

    @property
    def model_options(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(ModelOptions)}


def reproduce(options: ReproduceOptions) -> None:
    """Fit and evaluate MVTec AD, and print a comparison with published figures.

    python -m reproduce --data mvtec_anomaly_detection --weights resnet18.pth
    """
    data, out = options.data.resolve(), options.out.resolve()
    if out.exists() and not options.overwrite:
        raise PadimError(f"{out} exists; choose another --out, or pass --overwrite")
    test_images = f"{data}/{{group}}/test/{{defect}}/{image_name(data)}"
    model = str(out / "model")
    padim_ray.fit(
        images=f"{data}/{{group}}/train/good/*",
        model=model,
        overwrite=options.overwrite,
        **options.model_options,
    )
    padim_ray.evaluate(
        images=test_images,
        masks=f"{data}/{{group}}/ground_truth/{{defect}}/{{name}}_mask.png",
        model=model,
        out=str(out / "evaluation"),
        overwrite=options.overwrite,
    )
    settings = describe_spec(open_version(Location.of(model)).spec)
    metrics = json.loads((out / "evaluation/metrics.json").read_text())
    published = read_published()
    tables = compare(metrics, published)
    show(tables, settings, published, Console())
    comparison = out / "comparison.md"
    comparison.write_text(to_markdown(tables, settings, published))
    print(f"Markdown: {comparison}")


def image_name(data: Path) -> str:
    """The template of test images' names: with their common suffix, or else with any.

    Raises:
        PadimError: if there are no images.
    """
    suffixes = {path.suffix for path in data.glob("*/test/*/*") if path.suffix.lower() in SUFFIXES}
    if not suffixes:
        raise PadimError(f"{data} has no images CATEGORY/test/DEFECT/IMAGE as in MVTec AD")
    return "{name}" + (suffixes.pop() if len(suffixes) == 1 else ".*")


def describe_spec(spec: ModelSpec) -> str:
    """Describe a fitted model's settings in one line."""
    line = describe(
        backbone=spec.backbone,
        n_features=sum(spec.grid.channels),
        image_size=spec.preprocessing.resize,
        crop=spec.preprocessing.crop,
        regularization=spec.density.describe().get("regularization", "none").partition(" ")[0],
    )
    return f"{line}, trunk in {spec.precision}, weights {spec.weights}"


def show(tables: Sequence[Table], settings: str, published: Published, console: Console) -> None:
    """Print the comparison in at most 80 columns."""
    for name, text in published.legend(settings).items():
        console.print(Text(f"{name}: {text}"), soft_wrap=True)
    for table in tables:
        console.print(Text(f"\n{table.title}", style="bold"))
        console.print(_rich(table))
        if table.note:
            console.print(Text(table.note))


def _rich(table: Table) -> RichTable:
    rich = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)
    rich.add_column("")
    for column in table.columns:
        rich.add_column(Text(column.replace(" ", "\n")), justify="right")
    for name, values in table.rows:
        rich.add_row(Text(name), *map(format_value, values))
    return rich


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m reproduce`; exit with code 2 after a user's mistake."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("padim_ray").setLevel(logging.INFO)
    app = App(
        name="python -m reproduce",
        result_action="return_value",
        exit_on_error=False,
        print_error=False,
    )
    app.default(reproduce)
    try:
        app(arguments)
    except (PadimError, cyclopts.CycloptsError) as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
