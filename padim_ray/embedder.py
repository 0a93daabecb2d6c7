"""What an actor does: images to embeddings by the trunk, and these to moments or distances."""

from dataclasses import replace

import numpy as np
import torch

from padim_ray.fused import TOGETHER
from padim_ray.gaussian import Gaussian, squared_distances
from padim_ray.leave_one_out import NEGLIGIBLE_FROM, leave_one_out_squared_distances
from padim_ray.moments import Moments, accumulate_
from padim_ray.patches import Embeddings
from padim_ray.spec import ModelSpec
from padim_ray.trunk import StateDict, Trunk

GPU_BATCH = 128  # images per pass through the trunk


class Embedder:
    """A trunk with its spec: images to embeddings, and these to moments or distances.

    Args:
        batch_size: images per pass through the trunk; default: as many as suit the device.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: StateDict,
        device: torch.device | str,
        batch_size: int | None = None,
    ) -> None:
        self.spec = spec
        self.device = torch.device(device)
        self.batch_size = batch_size or (TOGETHER if self.device.type == "cpu" else GPU_BATCH)
        self.trunk = Trunk(
            spec.backbone, spec.channels, weights, precision=spec.precision, device=device
        )

    @torch.inference_mode()
    def embed(self, images: torch.Tensor) -> Embeddings:
        """Images (B, 3, H, W), 0…255, to their features at all cells, on the device."""
        return Embeddings.join(
            [
                self.spec.grid.nest(self.trunk(part.to(self.device, non_blocking=True)))
                for part in images.split(self.batch_size)
            ]
        )

    @torch.inference_mode()
    def accumulate_(self, moments: Moments, embeddings: Embeddings) -> Moments:
        """Add a batch of images, in place in the tensors of `moments`."""
        for start, stop in embeddings.runs():
            accumulate_(moments.cells(start, stop), embeddings.patches(start, stop))
        return replace(moments, count=moments.count + len(embeddings))

    @torch.inference_mode()
    def distances(
        self, embeddings: Embeddings, group: Gaussian, *, left_out_of: int | None = None
    ) -> torch.Tensor:
        """Mahalanobis distances (B, H_0, W_0).

        Args:
            left_out_of: the number of images in the Gaussians, if these are some of them and their
                distances are to be those to the Gaussians without the image itself.
        """
        runs = embeddings.runs()
        if left_out_of and left_out_of < NEGLIGIBLE_FROM:  # what an image adds to R is of all cells
            runs = [(0, runs[-1][1])]

        def squared(run: tuple[int, int]) -> torch.Tensor:
            cells, patches = group.cells(*run), embeddings.patches(*run)
            if left_out_of:
                rule = self.spec.regularization
                return leave_one_out_squared_distances(cells, patches, left_out_of, rule)
            return squared_distances(cells, patches)

        return self.spec.grid.unnest(torch.cat(list(map(squared, runs)))).sqrt_()


def as_images(pixels: np.ndarray) -> torch.Tensor:
    """(n, H, W, 3) uint8 pixels as channels-last images (n, 3, H, W)."""
    writeable = pixels if pixels.flags.writeable else pixels.copy()  # tensors can't be read-only
    return torch.from_numpy(writeable).permute(0, 3, 1, 2)
