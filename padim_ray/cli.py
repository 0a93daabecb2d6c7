"""The command line `padim-ray`, and the scripts in jobs/.

Commands import their jobs when they run: --help needs neither Ray nor torch.
"""

import json
import logging
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import yaml
from cyclopts import App, Parameter

from padim_ray import __version__
from padim_ray.errors import NoImages, PadimError, TooManyFailed
from padim_ray.redaction import redact
from padim_ray.runs.options.common import IMAGES, RUN, ReportImages, StorageOptions
from padim_ray.runs.options.compare import CompareOptions
from padim_ray.runs.options.convert import ConvertOptions
from padim_ray.runs.options.evaluate import EvaluateOptions
from padim_ray.runs.options.fit import FitOptions, VersionOptions
from padim_ray.runs.options.merge import MergeOptions
from padim_ray.runs.options.plan import PlanOptions
from padim_ray.runs.options.score import ScoreOptions
from padim_ray.runs.stopping import StopSignal
from padim_ray.storage.credentials import RedactingFilter, Secrets, hidden_credentials
from padim_ray.storage.location import Location

CONTINUE = "what is done is kept. Repeat the command to continue"
SUCCESS, BUG, MISTAKE = 0, 1, 2
EXIT_CODES: dict[type[Exception], int] = {TooManyFailed: 3, NoImages: 4}
"""Exit codes of errors that a scheduler may handle; all others have `MISTAKE`."""


def fit(options: FitOptions) -> int:
    """Fit a model to good images, one per group: what is normal at every position.

    padim-ray fit --images 's3://archive/{group}/train/good/*.png' --model s3://models/line7
    """
    from padim_ray.pipeline.jobs.fit import run_fit

    run_fit(options)
    return SUCCESS


def update(options: VersionOptions) -> int:
    """Add images to a model. The result is the model that fitting to all of them would give.

    Images that are in the model already are skipped.

    padim-ray update --images 's3://archive/{group}/train/good/*.png' --model s3://models/line7
    """
    from padim_ray.pipeline.jobs.update_and_forget import run_update

    run_update(options)
    return SUCCESS


def forget(options: VersionOptions) -> int:
    """Remove images from a model. The result is the model that fitting without them would give.

    The images must still be readable, and unchanged.

    padim-ray forget --manifest mistakes.parquet --model s3://models/line7
    """
    from padim_ray.pipeline.jobs.update_and_forget import run_forget

    run_forget(options)
    return SUCCESS


def merge(*models: str, options: MergeOptions) -> int:
    """Merge models. The result is the model that fitting to all of their images would give.

    padim-ray merge s3://hamburg/line7 s3://lyon/line7@3 --model s3://models/line7

    Parameters
    ----------
    models
        Two or more models with the same trunk, channels, preprocessing and precision. @3 selects a
        version.
    """
    from padim_ray.pipeline.jobs.merge import run_merge

    run_merge(models, options)
    return SUCCESS


def convert(model: str, /, *, options: ConvertOptions) -> int:
    """Fit another kind of density to a model, without reading its images.

    padim-ray convert s3://models/line7 --density shared

    Parameters
    ----------
    model
        The model. @3 selects a version; the result is the model's next version.
    """
    from padim_ray.pipeline.jobs.convert import run_convert

    run_convert(model, options)
    return SUCCESS


def score(options: ScoreOptions) -> int:
    """Score images with a fitted model, and write results as Parquet, heatmaps and a report.

    padim-ray score --images 's3://archive/{group}/test/{defect}/*.png'
    --model s3://models/line7 --out s3://results/2026-11-20
    """
    from padim_ray.pipeline.jobs.score import run_score

    run_score(options)
    return SUCCESS


def evaluate(options: EvaluateOptions) -> int:
    """Score images whose defects are known, and measure how well the model finds them.

    padim-ray evaluate --images 'ROOT/{group}/test/{defect}/{name}.png'
    --masks 'ROOT/{group}/ground_truth/{defect}/{name}_mask.png' --model models/line7 --out results
    """
    from padim_ray.pipeline.jobs.evaluate import run_evaluate

    run_evaluate(options)
    return SUCCESS


def plan(
    options: PlanOptions | None = None,
    *,
    json: bool = False,  # the option's name
) -> int:
    """Estimate the time, memory and traffic of fit and score, before they cost money.

    Reads a few images on this machine to measure speed, and writes nothing.

    padim-ray plan --images 's3://archive/{group}/train/good/*.png' --gpus 8 --cpus 128 --rate 2500

    Parameters
    ----------
    json
        Print JSON for programs.
    """
    from padim_ray import console
    from padim_ray.planning.plan import make_plan

    made = make_plan(options or PlanOptions())
    console.print_json(made.to_json()) if json else console.print_plan(made)
    return SUCCESS


def compare(before: str, after: str, /, *, options: CompareOptions) -> int:
    """Score images with two models, or two versions of one, and show where they disagree.

    padim-ray compare s3://models/line7@3 s3://models/line7@4
    --images 's3://archive/{group}/2026-11/*.png' --out s3://results/3-and-4

    Parameters
    ----------
    before
        A model, such as s3://models/line7, or one of its versions: s3://models/line7@3.
    after
        The model or version to compare it with.
    """
    from padim_ray.pipeline.jobs.compare import run_compare

    run_compare(before, after, options)
    return SUCCESS


def report(
    out: str,
    /,
    *,
    images: Annotated[list[str] | None, Parameter(group=IMAGES, negative="")] = None,
    report_images: ReportImages = ScoreOptions.report_images,
    storage_options: StorageOptions = None,
) -> int:
    """Write the report of a scoring run again, from the results in its directory.

    padim-ray report s3://results/2026-11-20 --images 's3://archive/{group}/test/{defect}/*.png'

    Parameters
    ----------
    out
        Directory of the results: a path or a URI.
    images
        The run's --images, or a directory. Only original images from there are shown, because
        results could name any file that you may read. Without it there are only heatmaps.
    """
    from padim_ray.images.template import directory_of
    from padim_ray.report import write_report

    with hidden_credentials(storage_options):
        location = write_report(
            Location.of(out, storage_options),
            images=report_images,
            storage_options=storage_options,
            places=[directory_of(each, storage_options) for each in images or ()],
        )
    print(location.uri)
    return SUCCESS


def info(
    model: str,
    /,
    *,
    version: int | None = None,
    json: bool = False,  # the option's name
    storage_options: StorageOptions = None,
) -> int:
    """Show a model's versions, settings and groups.

    Parameters
    ----------
    model
        Directory of the model: a path, or a URI such as s3://models/line7.
    version
        The version to show in detail. Default: the current one.
    json
        Print JSON for programs.
    """
    from padim_ray import console
    from padim_ray.model.history import inspect
    from padim_ray.model.layout import split_name

    with hidden_credentials(storage_options):
        uri, number = split_name(model)
        found = inspect(Location.of(uri, storage_options), number if version is None else version)
    console.print_json(found.to_json()) if json else console.print_info(found)
    return SUCCESS


def rollback(model: str, version: int, /, *, storage_options: StorageOptions = None) -> int:
    """Make an earlier version of a model the current one again. Later versions are kept.

    Parameters
    ----------
    model
        Directory of the model: a path, or a URI such as s3://models/line7.
    version
        The version to make current.
    """
    from padim_ray.model.history import roll_back

    with hidden_credentials(storage_options):
        roll_back(Location.of(model, storage_options), version)
    return SUCCESS


def prune(model: str, /, *, keep: int, storage_options: StorageOptions = None) -> int:
    """Delete old versions of a model, except those that running jobs read.

    Parameters
    ----------
    model
        Directory of the model: a path, or a URI such as s3://models/line7.
    keep
        Number of latest versions to keep. The current version is always kept.
    """
    from padim_ray.model import history

    with hidden_credentials(storage_options):
        history.prune(Location.of(model, storage_options), keep)
    return SUCCESS


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `padim-ray` and exit.

    Exit codes: 0 (success), 1 (a bug), 2 (a user's mistake), 3 (too many images failed,
    or some couldn't be fetched), 4 (there are no images), 130 (Ctrl-C), 143 (SIGTERM).
    """
    app = _app("padim-ray", help="PaDiM anomaly detection for image archives, on Ray.")
    for command in (
        *(plan, fit, update, forget, merge, convert, score, evaluate, compare),
        *(report, info, rollback, prune),
    ):
        app.command(command)
    _run(app, arguments)


def job_main(command: Callable[..., int], arguments: Sequence[str] | None = None) -> None:
    """Run one command as a script, for `ray job submit -- python jobs/fit.py …`, and exit."""
    app = _app(f"jobs/{command.__name__}.py")
    app.default(command)
    _run(app, arguments)


def _app(name: str, **settings: Any) -> App:
    return App(
        name=name,
        version=__version__,
        result_action="return_value",
        exit_on_error=False,
        print_error=False,
        **settings,
    )


def _run(app: App, arguments: Sequence[str] | None) -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("padim_ray").setLevel(logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.addFilter(RedactingFilter(Secrets.of(None)))

    for each in (app, app.meta):  # StopSignal stops a job by an interrupt
        each.suppress_keyboard_interrupt = False

    @app.meta.default
    def meta(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        config: Annotated[
            Path | None,
            Parameter(group=RUN, help="YAML file with options. Options on the command line win."),
        ] = None,
    ) -> int:
        if config is not None:
            app.config = _read_config(config)
        return app(tokens)

    stop = StopSignal()
    signal.signal(signal.SIGTERM, stop)
    try:
        code = app.meta(arguments)
    except KeyboardInterrupt:
        print(f"Stopped by {stop.name}: {CONTINUE}", file=sys.stderr)
        code = stop.exit_code
    except (PadimError, cyclopts.CycloptsError) as error:
        print(f"Error: {redact(str(error))}", file=sys.stderr)
        code = EXIT_CODES.get(type(error), MISTAKE)
    except Exception:  # a bug of ours; Python's own traceback could disclose a secret
        print(Secrets.of(None).redact(traceback.format_exc()), file=sys.stderr)
        code = BUG
    sys.exit(code if isinstance(code, int) else SUCCESS)


def _read_config(path: Path) -> cyclopts.config.Dict:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise PadimError(f"The configuration {path} can't be read: {error}") from error
    except yaml.YAMLError as error:
        raise PadimError(f"The configuration {path} is not YAML: {_problem(error)}") from None
    if not isinstance(content, dict):
        raise PadimError(f"The configuration {path} must map options to values")
    if not isinstance(content.get("storage_options", {}), dict | str | None):
        raise PadimError(f"storage_options in {path} must map names to values")
    # on the command line a mapping is given as JSON; in the file it may be YAML
    options = {
        str(name).replace("_", "-"): json.dumps(value, default=str)
        if isinstance(value, dict)
        else value
        for name, value in content.items()
    }
    return cyclopts.config.Dict(options, use_commands_as_keys=False, source=str(path))


def _problem(error: yaml.YAMLError) -> str:
    """Describe the error and its place, without the line, which may hold a secret."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return "it holds a character that YAML doesn't allow"
    mark = error.problem_mark
    return f"{error.problem} in line {mark.line + 1}, column {mark.column + 1}"
