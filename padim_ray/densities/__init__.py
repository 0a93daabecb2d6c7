"""How likely an embedding is at a cell: densities by kind.

Nothing outside this room knows what a Gaussian is. A new density is a file here with a subclass of
`base.Density` named `DENSITY`, and a line in `DENSITIES`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from padim_ray.errors import ModelError
from padim_ray.storage.json_fields import mapping, show

if TYPE_CHECKING:
    from padim_ray.densities.base import Density

DENSITIES = {  # kind: module; loaded when first asked for, since options do without PyTorch
    "gaussian": "padim_ray.densities.gaussian",
    "shared": "padim_ray.densities.shared",
}
DEFAULT = "gaussian"
MIN_IMAGES = 2  # of a group: fewer have no spread
MIN_LEFT_OUT_OF = 3  # images of a group whose scores can be left out of it: two must remain


def check_kind(kind: str) -> None:
    """Raises: ModelError for an unknown kind."""
    if kind not in DENSITIES:
        raise ModelError(f"Unknown density {show(kind)}; known are {', '.join(DENSITIES)}")


def density_class(kind: str) -> "type[Density]":
    """Raises: ModelError for an unknown kind."""
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
    """A density's settings from model.json, which anybody may have written.

    Raises:
        ModelError: if they can't be one.
    """
    settings = dict(mapping(value, where))
    kind = settings.pop("kind", None)
    if not isinstance(kind, str):
        raise ModelError(f"{where} has no kind")
    return density_class(kind).of_json(settings, where)
