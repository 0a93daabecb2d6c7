"""Plan jobs over an archive: what they take, and what to know before they cost money."""

import os
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from padim_ray.densities import density_of_options
from padim_ray.features.trunk import native_precision
from padim_ray.features.trunks import choose_channels
from padim_ray.images.decode_in_child import ModelInput
from padim_ray.images.fetch import Fetcher
from padim_ray.model.spec import ModelSpec, preprocessing_of
from padim_ray.model.version import open_version
from padim_ray.planning.forecast import (
    ASSUMED_GPU_MEMORY,
    GIB,
    Archive,
    Forecast,
    Rates,
    State,
    forecast_fit,
    forecast_score,
)
from padim_ray.planning.resources import Node, Plan, plan_resources
from padim_ray.planning.speed import Sampled, measure_actor, read_sample
from padim_ray.planning.spilling import default_store, warn_of_spilling
from padim_ray.planning.survey import Survey, survey
from padim_ray.runs.options.model import FeatureOptions, ModelOptions
from padim_ray.runs.options.plan import PlanOptions
from padim_ray.storage.credentials import hidden_credentials
from padim_ray.storage.location import Location

MAX_SHOWN = 3  # names in a warning


@dataclass(frozen=True)
class PlanReport:
    """The result of `plan`.

    Attributes:
        images: number of images.
        groups: number of groups.
        bytes: total size of the images; None if unknown.
        manifest_bytes: size of the list of images in memory.
        features: the model's trunk, channels, input size and precision.
        state: bytes of one group's statistics and density.
        plan: how the cluster is divided.
        rates: speeds of single workers.
        fetch_rate: bytes/s at which this machine read the sample; None without images.
        gpu_memory: bytes of a GPU's memory.
        gpu_memory_source: where that figure comes from, in words.
        decode_cores_per_gpu: cores whose decoding keeps one GPU busy; None if unknown.
        jobs: forecasts of fit and score.
        warnings: sentences for the user.
    """

    images: int
    groups: int
    bytes: int | None
    manifest_bytes: int
    features: dict[str, Any]
    state: State
    plan: Plan
    rates: Rates
    fetch_rate: float | None
    gpu_memory: int
    gpu_memory_source: str
    decode_cores_per_gpu: float | None
    jobs: tuple[Forecast, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(options: PlanOptions) -> PlanReport:
    """Survey the archive, measure this machine briefly, and forecast the jobs.

    Raises:
        PadimError: for a mistake in the options, or if there are no images.
    """
    with hidden_credentials(options.storage_options):
        return _make_plan(options)


def _make_plan(options: PlanOptions) -> PlanReport:
    known: frozenset[str] | None = None
    if options.model is not None:
        version = open_version(Location.of(options.model, options.storage_options))
        spec, known = version.spec, frozenset(version.groups)
    else:
        spec = _spec(options)
    archive_survey = survey(options)
    sampled = read_sample(
        archive_survey.sample,
        ModelInput(spec.preprocessing, options.max_image_pixels),
        Fetcher(options.storage_options or {}, options.max_image_bytes),
    )
    cores = options.cpus or os.cpu_count() or 1
    plan = plan_resources([Node(cores, options.gpus)])
    rates = _rates(options, spec, plan, sampled)
    size = archive_survey.bytes / archive_survey.sized if archive_survey.sized else sampled.bytes
    images = sum(archive_survey.groups.values())
    archive = Archive(
        archive_survey.groups, round((size or 0) * images), archive_survey.manifest_bytes
    )
    jobs = (
        forecast_fit(
            *(archive, spec, plan, rates),
            *(options.calibration_images, options.round_images, options.embedding_memory),
        ),
        forecast_score(archive, spec, plan, rates),
    )
    memory, source = _gpu_memory(options)
    per_gpu = rates.score / rates.decode if rates.score and rates.decode and options.gpus else None
    return PlanReport(
        images=images,
        groups=len(archive_survey.groups),
        bytes=None if size is None else archive.bytes,
        manifest_bytes=archive_survey.manifest_bytes,
        features={
            "backbone": spec.backbone,
            "channels": sum(spec.grid.channels),
            "input": list(spec.preprocessing.size),
            "precision": spec.precision,
        },
        state=State.of(spec),
        plan=plan,
        rates=rates,
        fetch_rate=sampled.fetch_rate,
        gpu_memory=memory,
        gpu_memory_source=source,
        decode_cores_per_gpu=per_gpu,
        jobs=jobs,
        warnings=(
            *_warn_of_images(archive_survey, sampled, known),
            *(_warn_of_gpus(jobs, plan, memory, source, per_gpu) if options.gpus else ()),
            *((rates.source,) if rates.fit is None else ()),
            *(_warn_of_disk(jobs) if options.cpus is None and not options.gpus else ()),
        ),
    )


def _spec(options: PlanOptions) -> ModelSpec:
    """A model of these options without weights: sizes and times don't depend on them."""
    assert options.layers is not None  # the options have filled in the trunk's
    channels = choose_channels(options.backbone, options.layers, options.n_features, options.seed)
    precision = options.precision
    if precision == "auto":
        is_here = not options.gpus or torch.cuda.is_available()
        device = "cuda" if options.gpus else "cpu"
        precision = native_precision(device) if is_here else "bfloat16"
    return ModelSpec(
        backbone=options.backbone,
        weights="",
        weights_sha256="",
        channels=channels,
        preprocessing=preprocessing_of(options),
        density=density_of_options(_model_options(options)),
        precision=precision,
        sigma=4.0,
        stride=options.stride,
        neighbourhood=options.neighbourhood,
        score_share=0.0,
        search=0,
        search_maps=False,
    )


def _model_options(options: PlanOptions) -> ModelOptions:
    """The options that a plan has, and defaults for the others: sizes don't depend on these."""
    return ModelOptions(
        **{each.name: getattr(options, each.name) for each in fields(FeatureOptions)}
    )


def _rates(options: PlanOptions, spec: ModelSpec, plan: Plan, sampled: Sampled) -> Rates:
    """The rates that the user gives, else those measured on this machine if it has the device."""
    if options.rate is not None:
        return Rates(sampled.decode_rate, options.rate, options.rate, source="given by --rate")
    if plan.device == "cuda" and not torch.cuda.is_available():
        return Rates(
            sampled.decode_rate,
            source="Hours are unknown: this machine has no GPU to measure. Give --rate; "
            "`python -m benchmarks.gpu` measures it on a machine with a GPU",
        )
    threads = min(plan.threads, os.cpu_count() or 1)
    speed = measure_actor(spec, sampled.pixels, plan.device, threads)
    scale = plan.threads / threads
    return Rates(
        decode=sampled.decode_rate,
        fit=speed.fit * scale,
        score=speed.score * scale,
        factorise=speed.factorise,
        left_out=speed.left_out * scale,
        source="measured here"
        + (f" with {threads} of an actor's {plan.threads} threads" if scale > 1 else ""),
    )


def _gpu_memory(options: PlanOptions) -> tuple[int, str]:
    if options.gpu_memory is not None:
        return round(options.gpu_memory * GIB), "given by --gpu-memory"
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, "of this machine's GPU"
    return ASSUMED_GPU_MEMORY, "assumed; see --gpu-memory"


def _warn_of_images(found: Survey, sampled: Sampled, known: frozenset[str] | None) -> list[str]:
    warnings = []
    if sampled.failed:
        warnings.append(
            f"{len(sampled.failed)} of the {found.sample.num_rows} sampled images failed, the "
            f"first with: {sampled.failed[0]}"
        )
    if sampled.decode_rate is None:
        warnings.append("No sampled image could be decoded, so hours are unknown: see --sample")
    small = [group for group, images in found.groups.items() if images < 2]
    if small:
        warnings.append(f"A fit needs at least 2 images of each group; {_named(small)} have fewer")
    unknown = [group for group in found.groups if known is not None and group not in known]
    if unknown:
        warnings.append(f"The model has no group {_named(unknown)}: score would refuse the images")
    return warnings


def _warn_of_gpus(
    jobs: tuple[Forecast, ...], plan: Plan, memory: int, source: str, per_gpu: float | None
) -> list[str]:
    warnings = [
        f"{job.job} needs about {job.device_bytes / GIB:.1f} GiB of a GPU, which has "
        f"{memory / GIB:.1f} ({source}): choose fewer --n-features, or a smaller --image-size"
        for job in jobs
        if job.device_bytes > memory
    ]
    decoders = plan.fixed_decoders
    if per_gpu is not None and per_gpu * plan.actors > decoders:
        warnings.append(
            f"Decoding can't keep up: {per_gpu:.0f} cores are needed to decode for one GPU, and "
            f"there are {decoders / plan.actors:.1f} per GPU. Take more CPUs or fewer GPUs"
        )
    return warnings


def _warn_of_disk(jobs: tuple[Forecast, ...]) -> list[str]:
    """Warnings for jobs on this machine, with a Ray that they start themselves."""
    found = ((job.job, warn_of_spilling(job.object_store_at_once, default_store())) for job in jobs)
    return [f"{job} {warning}" for job, warning in found if warning]


def _named(groups: list[str]) -> str:
    more = len(groups) - MAX_SHOWN
    return ", ".join(map(repr, groups[:MAX_SHOWN])) + (f" and {more} more" if more > 0 else "")
