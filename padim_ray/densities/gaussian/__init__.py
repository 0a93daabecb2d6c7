"""One Gaussian per cell: moments, whitening, distances, leave-one-out.

Other densities may use the names exported here; the modules are private to this package.
"""

from padim_ray.densities.gaussian.density import GaussianDensity
from padim_ray.densities.gaussian.moments import Moments
from padim_ray.densities.gaussian.regularization import Regularization

DENSITY = GaussianDensity

__all__ = ["DENSITY", "GaussianDensity", "Moments", "Regularization"]
