"""The child process that decodes images: takes them from slots and puts their pixels there.

`decode_in_child` starts it. It imports little, starts in a fifth of a second, and ends when its
parent does, even if that is killed.
"""

import ctypes
import json
import os
import signal
import sys
from itertools import cycle
from typing import Any

import numpy as np
from PIL import Image, ImageCms, MpoImagePlugin, TiffImagePlugin, WebPImagePlugin

from padim_ray.errors import ImageError
from padim_ray.images import sandbox
from padim_ray.images.decode import as_rgb, decode, decode_scaled
from padim_ray.images.decode_in_child import (
    ANSWER,
    READY,
    REQUEST,
    Decoded,
    Mask,
    ModelInput,
    Request,
    UprightImage,
    stage_of,
)
from padim_ray.images.masks import decode_mask, fit_mask
from padim_ray.images.preprocessing import Preprocessing
from padim_ray.images.resize import model_input
from padim_ray.images.slots import read_slot, write_slot
from padim_ray.storage.fail_points import is_on

# Pillow would import these when an image needs them, and then files can't be opened any more
PRELOADED = (ImageCms, MpoImagePlugin, TiffImagePlugin, WebPImagePlugin)


def main() -> None:
    """Answer requests until there are no more."""
    memory, requests, answers, *slots = map(int, sys.argv[1:])
    incoming = os.fdopen(requests, "rb")
    has_fail_point = is_on("decoder")
    Image.preinit()
    missing = sandbox.enter(memory) if sys.platform == "linux" else []
    os.write(answers, READY + "; ".join(missing).encode())
    for slot in cycle(slots):
        if len(header := incoming.read(REQUEST.size)) < REQUEST.size:
            return
        message_size, size = REQUEST.unpack(header)
        request = _parse(json.loads(incoming.read(message_size)))
        read_slot(slot, memoryview(buffer := bytearray(size)))
        content = bytes(buffer)
        answer: bytes | memoryview
        try:
            if has_fail_point:
                _fail(content)
            decoded = fulfil(request, content)
        except (ImageError, MemoryError) as error:
            if isinstance(error, MemoryError):
                stage = stage_of(request)
                error = ImageError(stage, "too much memory", f"more than {memory} bytes")
            answer = json.dumps(error.args).encode()
            header = ANSWER.pack(len(answer), 0, 0, 0, 0, 0)
        else:
            pixels = np.ascontiguousarray(decoded.pixels)
            answer = pixels.data.cast("B")
            shape = (*pixels.shape, 0)[:3]  # a mask has no channels
            header = ANSWER.pack(pixels.nbytes, decoded.width, decoded.height, *shape)
        write_slot(slot, answer)
        os.write(answers, header)


def fulfil(request: Request, content: bytes) -> Decoded:
    """Make what is requested of one encoded image.

    Raises:
        ImageError: if the image can't be decoded.
    """
    if isinstance(request, Mask):
        mask = decode_mask(content, request.max_pixels)
        return Decoded(fit_mask(mask, request.preprocessing), mask.shape[1], mask.shape[0])
    if isinstance(request, ModelInput):
        seen = request.preprocessing
        if seen.scaled_jpeg:
            image, (width, height) = decode_scaled(
                content, request.max_pixels, seen.resize, seen.grey_range
            )
        else:
            image = decode(content, request.max_pixels, seen.grey_range)
            height, width = image.shape[:2]
        return Decoded(model_input(image, seen), width, height)
    image = decode(content, request.max_pixels, request.grey_range)
    height, width = image.shape[:2]
    picture = as_rgb(image)
    if request.longest_side is not None:
        smaller = Image.fromarray(picture)
        smaller.thumbnail((request.longest_side,) * 2, Image.Resampling.LANCZOS)
        picture = np.asarray(smaller)
    return Decoded(picture, width, height)


def _parse(message: dict[str, Any]) -> Request:
    kind = {kind.__name__: kind for kind in (ModelInput, UprightImage, Mask)}[message.pop("kind")]
    if "preprocessing" in message:
        message["preprocessing"] = Preprocessing(**_with_tuples(message["preprocessing"]))
    return kind(**_with_tuples(message))


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where the requests have tuples."""
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }


def _fail(content: bytes) -> None:
    """Fail as the fail point `decoder` promises."""
    if b"padim-ray-test:segfault" in content:
        ctypes.string_at(0)
    if b"padim-ray-test:hang" in content:
        ctypes.PyDLL(None).sleep(10**6)  # holds the interpreter's lock, so other threads stop, too
    if b"padim-ray-test:oom-kill" in content:
        signal.raise_signal(signal.SIGKILL)
    if b"padim-ray-test:memory" in content:
        bytearray(8 * 2**30)


if __name__ == "__main__":
    main()
