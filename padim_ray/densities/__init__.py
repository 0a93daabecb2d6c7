"""Densities by kind: how likely an embedding is at a cell.

Nothing outside this package knows what a Gaussian is. To add a density, write a module here that
implements `base.Density`, name the class `DENSITY` in it, and add a line to `DENSITIES`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from padim_ray.errors import ModelError
from padim_ray.storage.json_fields import mapping, show

if TYPE_CHECKING:
    from padim_ray.densities.base import Density

DENSITIES = {  # kind: module, imported when first used: the options must not import PyTorch
    "gaussian": "padim_ray.densities.gaussian",
    "shared": "padim_ray.densities.shared",
}
DEFAULT = "gaussian"
MIN_IMAGES = 2  # per group: one image has no variance
MIN_LEFT_OUT_OF = 3  # images per group for leave-one-out scores: MIN_IMAGES must remain


def check_kind(kind: str) -> None:
    """Check that there is a density of this kind.

    Raises:
        ModelError: if it is unknown.
    """
    if kind not in DENSITIES:
        raise ModelError(f"Unknown density {show(kind)}; known are {', '.join(DENSITIES)}")


def density_class(kind: str) -> "type[Density]":
    """The class of densities of this kind.

    Raises:
        ModelError: if it is unknown.
    """
    check_kind(kind)
    return import_module(DENSITIES[kind]).DENSITY


def convert_density(density: "Density", kind: str) -> "Density":
    """Another kind of density that is fitted to the same statistics, with the same settings.

    Raises:
        ModelError: if it is unknown, or is fitted to other statistics or with other settings.
    """
    target = density_class(kind)
    if target.statistics_kind != density.statistics_kind:
        raise ModelError(
            f"A model with density {density.kind} can't be converted to {kind}: it has "
            f"{density.statistics_kind}, and {kind} is fitted to {target.statistics_kind}"
        )
    settings = {name: value for name, value in density.to_json().items() if name != "kind"}
    return target.of_json(settings, "density")


def density_of_options(options: Any) -> "Density":
    """The density that `ModelOptions` ask for."""
    return density_class(options.density).of_options(options)


def density_of_json(value: Any, where: str) -> "Density":
    """Read a density's settings from model.json, which anybody may have written.

    Args:
        value: the JSON object, with its `kind`.
        where: the object's place in the file, for errors.

    Raises:
        ModelError: if it isn't a valid density.
    """
    settings = dict(mapping(value, where))
    kind = settings.pop("kind", None)
    if not isinstance(kind, str):
        raise ModelError(f"{where} has no kind")
    return density_class(kind).of_json(settings, where)
