"""One Gaussian per cell: moments, whitening, distances, leave-one-out.

Other densities may build on what is named here; the modules themselves are this package's own.
"""

from padim_ray.densities.gaussian.density import GaussianDensity
from padim_ray.densities.gaussian.moments import Moments
from padim_ray.densities.gaussian.regularization import Regularization

DENSITY = GaussianDensity

__all__ = ["DENSITY", "GaussianDensity", "Moments", "Regularization"]
