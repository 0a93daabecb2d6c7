"""Entrypoints, run through the same shells as on a cluster, are valid padim-ray commands."""

import json
import os
import shlex
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from padim_ray import cli
from padim_ray.images.template import UriTemplate
from padim_ray.runs import pushgateway
from padim_ray.runs.options.fit import FitOptions
from padim_ray.runs.options.score import ScoreOptions
from tests.infra.manifests import OVERLAYS, jobs, named

ZONES = ("Etc/UTC", "Europe/Berlin", "America/Los_Angeles", "Asia/Kolkata", "Pacific/Kiritimati")


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    """A folder with stand-ins for padim-ray and ray that print their arguments, one per line."""
    folder = tmp_path_factory.mktemp("programs")
    for name in ("padim-ray", "ray"):
        (folder / name).write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
        (folder / name).chmod(0o755)
    return folder


def shell(programs, command, environment):
    return subprocess.run(
        command,
        env={"PATH": f"{programs}:{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
        cwd=programs,
    )


def run(programs, job, site):
    """Run a job's entrypoint as KubeRay and Ray do."""
    # KubeRay pastes the entrypoint into its submitter's script (BuildJobSubmitCommand)
    script = f"ray job submit --no-wait -- {job.spec['entrypoint'].strip()} ;"
    submitted = shell(programs, ["bash", "-ce", "--", script], {"RAYJOB_NAME": job.name})
    assert submitted.returncode == 0, submitted.stderr
    words = submitted.stdout.removesuffix("\n").split("\n")
    # `ray job submit` quotes its arguments, and the head passes them to a shell
    entrypoint = shlex.join(words[words.index("--") + 1 :])
    head = job.ray_pods[0].environment
    return shell(programs, ["sh", "-c", entrypoint], {**site, **head})


def options_of(programs, job, site):
    """The options that padim-ray would parse from the entrypoint."""
    ran = run(programs, job, site)
    assert ran.returncode == 0, ran.stderr
    app = cli._app("padim-ray")
    app.command(cli.fit)
    app.command(cli.score)
    words = ran.stdout.removesuffix("\n").split("\n")
    _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    return bound.arguments["options"]


@pytest.fixture(scope="module")
def by_name(rendered):
    found = (*jobs(rendered("gpu")), *jobs(rendered("nightly")))
    return {job.name.rstrip("-0123456789"): job for job in found}


@pytest.fixture(scope="module")
def site(rendered):
    return named(rendered("nightly"), "ConfigMap")["padim-ray"]["data"]


def test_the_command_of_fit_is_valid(programs, by_name, site):
    options = options_of(programs, by_name["padim-fit"], site)
    assert isinstance(options, FitOptions)
    assert options.images == site["FIT_IMAGES"] == "s3://archive/{group}/train/good/*.png"
    assert (options.model, options.weights) == (site["MODEL"], site["WEIGHTS"])


def test_score_runs_for_the_day_of_the_settings(programs, by_name, site):
    options = options_of(programs, by_name["padim-score"], {**site, "DAY": "2026-02-28"})
    assert isinstance(options, ScoreOptions)
    assert options.images == "s3://archive/{group}/2026-02-28/*.png"
    assert (options.model, options.out) == (site["MODEL"], "s3://results/2026-02-28")
    assert options.decode_resource == "padim_decode"


def test_nightly_scores_the_day_before(programs, by_name, site):
    """Its name encodes the scheduled time, 2026-11-26 4:30."""
    options = options_of(programs, by_name["padim-nightly"], site)
    assert isinstance(options, ScoreOptions)
    assert options.images == "s3://archive/{group}/2026-11-25/*.png"
    assert (options.model, options.out) == (site["MODEL"], "s3://results/2026-11-25")
    assert options.decode_resource == "padim_decode"
    assert options.allow_empty


def test_templates_of_the_settings_capture_groups(programs, by_name, site):
    for name in ("padim-fit", "padim-score", "padim-nightly"):
        images = options_of(programs, by_name[name], site).images
        assert UriTemplate.parse(images).names == ("group",)


def test_jobs_ask_for_as_many_gpus_as_the_group_may_have(programs, rendered, site):
    for overlay in OVERLAYS:
        for job in jobs(rendered(overlay)):
            groups = {group["groupName"]: group for group in job.cluster["workerGroupSpecs"]}
            max_gpus = groups["gpu"]["maxReplicas"] if "gpu" in groups else 0
            options = options_of(programs, job, site)
            assert options.gpus == max_gpus
            assert options.decode_resource == "padim_decode"


zoneinfo = pytest.mark.skipif(
    not Path("/usr/share/zoneinfo/Europe/Berlin").is_file(),
    reason="`date` knows no time zones here",
)


@zoneinfo
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(night=datetime(2026, 3, 29, 4, 30), zone="Europe/Berlin")  # clocks went forward
@example(night=datetime(2026, 3, 30, 4, 30), zone="Europe/Berlin")
@example(night=datetime(2026, 10, 25, 4, 30), zone="Europe/Berlin")  # and back
@example(night=datetime(2026, 10, 26, 0, 30), zone="Europe/Berlin")
@example(night=datetime(2027, 1, 1, 4, 30), zone="America/Los_Angeles")
@example(night=datetime(2028, 3, 1, 4, 30), zone="Pacific/Kiritimati")
@given(night=st.datetimes(datetime(2026, 1, 1), datetime(2040, 1, 1)), zone=st.sampled_from(ZONES))
def test_nightly_scores_the_day_before_in_every_time_zone(programs, by_name, site, night, zone):
    scheduled = night.replace(second=0, microsecond=0, tzinfo=ZoneInfo(zone))
    job = by_name["padim-nightly"]
    name = f"padim-nightly-{int(scheduled.timestamp()) // 60}"  # as KubeRay does
    options = options_of(programs, type(job)(name, job.spec), {**site, "TZ": zone})
    # a local time that clock changes skip means the hour after it
    local = scheduled.astimezone(UTC).astimezone(ZoneInfo(zone))
    assert options.out == f"s3://results/{local.date() - timedelta(days=1)}"


@pytest.mark.parametrize("missing", ["MODEL", "SCORE_IMAGES", "RESULTS"])
def test_a_missing_setting_ends_the_job_before_anything_is_read(programs, by_name, site, missing):
    left = {name: value for name, value in site.items() if name != missing}
    for name in ("padim-score", "padim-nightly"):
        ran = run(programs, by_name[name], left)
        assert ran.returncode != 0 and not ran.stdout
        assert missing in ran.stderr


def test_a_name_without_a_time_ends_the_job_before_anything_is_read(programs, by_name, site):
    job = by_name["padim-nightly"]
    ran = run(programs, type(job)("padim-nightly-again", job.spec), site)
    assert ran.returncode != 0 and not ran.stdout


def test_the_schedule_and_the_days_share_a_time_zone(rendered, site):
    cron = named(rendered("nightly"), "RayCronJob")["padim-nightly"]["spec"]
    assert cron["timeZone"] == site["TZ"]
    assert "TZ" not in cron["schedule"]  # KubeRay refuses a zone in the schedule


def test_every_setting_is_used(by_name, site):
    used = json.dumps([job.spec["entrypoint"] for job in by_name.values()])
    # read by `date`, and by jobs
    assert {name for name in site if name not in used} == {"TZ", pushgateway.VARIABLE}
