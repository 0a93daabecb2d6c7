"""Decode images in a child process, so that no image can end a job.

On a broken file a library may crash, hang, or take so much memory that the kernel kills the
process. Here this happens to a child process (`child.py`): one image fails and the job goes on.
The child has given up its privileges (`sandbox.py`), in case an image takes it over.

Encoded images and pixels go through slots (`slots.py`), which requests and answers use in turn. A
request is `REQUEST` and JSON that says what to make of the image in the slot. An answer is
`ANSWER`; then the slot holds the pixels, or an error in JSON.

Answers come in the order of requests, so if the child ends, the first image without an answer is
the cause. That image is tried again, alone and in a fresh child, because the true cause may have
been another image that used up memory or damaged the heap.
"""

import json
import logging
import os
import select
import signal
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from typing import BinaryIO

import numpy as np

from padim_ray.errors import ImageError
from padim_ray.images.limits import MAX_IMAGE_BYTES
from padim_ray.images.preprocessing import GreyRange, Preprocessing
from padim_ray.images.sandbox import memory_for
from padim_ray.images.slots import open_slot, read_slot, write_slot
from padim_ray.storage.fail_points import VARIABLE

log = logging.getLogger("padim_ray")
HUNG_AFTER = 60.0  # seconds without an answer; 100 million pixels take two
ATTEMPTS = 3  # to decode an image at which the child ends
REQUEST = struct.Struct("<IQ")  # bytes of JSON, bytes of the image
ANSWER = struct.Struct("<Q5I")  # bytes, upright width and height, shape of pixels; 0s if it failed
READY = b"ready"  # the child's first message; behind it, the protections that it lacks
_IN_FLIGHT = 4  # images sent ahead, so that the child needn't wait for the next one
_BYTES_IN_FLIGHT = 64 * 2**20  # no further image is sent while more are in flight
_KEPT_BYTES = 4 * 2**20  # per slot; a larger slot is emptied after use
_INHERITED = ("LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "PYTHONHOME", VARIABLE)
"""Variables that Python may need to start, and that of fail points. No credentials."""
_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",  # the default is one thread per core
    # glibc keeps an image's memory for the next one, which saves a quarter of a JPEG's time
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20),
}


@dataclass(frozen=True)
class ModelInput:
    """Request for a model's input, (H, W, 3) uint8."""

    preprocessing: Preprocessing
    max_pixels: int


@dataclass(frozen=True)
class UprightImage:
    """Request for a whole image, (h, w, 3) uint8, shrunk to `longest_side` if that is given.

    `grey_range`: see `Preprocessing`.
    """

    max_pixels: int
    longest_side: int | None = None
    grey_range: GreyRange | None = None


@dataclass(frozen=True)
class Mask:
    """Request for a ground-truth mask at the anomaly map's size, (H, W) bool."""

    preprocessing: Preprocessing
    max_pixels: int


Request = ModelInput | UprightImage | Mask


def stage_of(request: Request) -> str:
    """The stage that an image's error names if the request fails."""
    return "mask" if isinstance(request, Mask) else "decode"


@dataclass(frozen=True)
class Decoded:
    """The requested pixels, and the full-size upright image's width and height."""

    pixels: np.ndarray
    width: int
    height: int


def decode_all(
    contents: Iterable[bytes | ImageError],
    request: Request,
    hung_after: float = HUNG_AFTER,
    out: Iterable[np.ndarray] = (),
) -> Iterator[Decoded | ImageError]:
    """Decode images in a child of this process, which is kept for the next call.

    Args:
        contents: encoded images. An error in place of an image is passed through.
        request: what to make of each image.
        hung_after: seconds to wait for an answer before the child is killed.
        out: one contiguous array per image to decode into; by default new arrays.

    Yields:
        For each image, in order, the pixels or an error.

    Raises:
        RuntimeError: if no child can be started.
    """
    stage = stage_of(request)
    message = json.dumps({"kind": type(request).__name__, **asdict(request)}).encode()
    source, places = iter(contents), iter(out)
    waiting: deque[bytes | ImageError] = deque()  # the next images, not yet answered
    sent = ended = 0  # how many of these were sent; how many children ended at the first one
    decoder = _take_idle(request.max_pixels)
    try:
        while True:
            waiting.extend(islice(source, _IN_FLIGHT - len(waiting)))
            if not waiting:
                return
            if not ended:
                place = next(places, None)
            answer: Decoded | ImageError
            if isinstance(waiting[0], ImageError):
                answer = waiting[0]
            else:
                if decoder and not sent and len(waiting[0]) > decoder.max_bytes:
                    decoder.close()
                    decoder = None
                if not decoder:
                    most = max(MAX_IMAGE_BYTES, len(waiting[0]))
                    decoder = Decoder(request.max_pixels, most)
                for content in islice(waiting, sent, 1 if ended else _IN_FLIGHT):
                    if not isinstance(content, ImageError):
                        if decoder.is_full or len(content) > decoder.max_bytes:
                            break
                        decoder.send(message, content)
                    sent += 1
                try:
                    answer = decoder.receive(hung_after, place)
                except (EOFError, TimeoutError) as error:
                    exit_code = decoder.close()
                    decoder, sent, ended = None, 0, ended + 1
                    if ended < ATTEMPTS:
                        continue
                    if isinstance(error, TimeoutError):
                        answer = ImageError(stage, "the decoder hung", f"for {hung_after:g} s")
                    else:
                        answer = ImageError(stage, "the decoder crashed", _explain(exit_code))
            waiting.popleft()
            sent, ended = max(0, sent - 1), 0
            yield answer
    finally:
        if decoder and sent:  # the caller stopped early, and answers are still to come
            decoder.close()
        elif decoder:
            _idle.append(decoder)


class Decoder:
    """A child process that decodes images one after the other.

    Args:
        max_pixels: of an image. This and `max_bytes` limit the memory that the child may take.
        max_bytes: of an encoded image.

    Raises:
        RuntimeError: if it doesn't start.
    """

    def __init__(self, max_pixels: int, max_bytes: int) -> None:
        self.max_pixels, self.max_bytes = max_pixels, max_bytes
        child_reads, requests = os.pipe()
        answers, child_writes = os.pipe()
        self._requests, self._answers = os.fdopen(requests, "wb", 0), os.fdopen(answers, "rb", 0)
        self._slots = deque(open_slot() for _ in range(_IN_FLIGHT))  # free ones, the next first
        self._sent: deque[tuple[BinaryIO, int]] = deque()  # slots in use, and their images' bytes
        inherited = (child_reads, child_writes, *(slot.fileno() for slot in self._slots))
        arguments = [str(number) for number in (memory_for(max_pixels, max_bytes), *inherited)]
        environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "padim_ray.images.child", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=2,  # libraries' prints go to stderr
                pass_fds=inherited,
                env={**environment, **_ENVIRONMENT, "PYTHONPATH": _python_path()},
                process_group=0,  # so that Ctrl-C reaches only the parent
            )
        finally:
            os.close(child_reads)
            os.close(child_writes)
        try:
            missing = self._read(1000, HUNG_AFTER).removeprefix(READY).decode()
        except (EOFError, TimeoutError) as error:
            raise RuntimeError(
                "The process that decodes images doesn't start; its error output says why "
                f"({_explain(self.close())})"
            ) from error
        if missing:
            _tell_once(missing)

    @property
    def is_full(self) -> bool:
        """Whether an answer must be received before the next image is sent."""
        return not self._slots or sum(size for _, size in self._sent) > _BYTES_IN_FLIGHT

    def send(self, message: bytes, content: bytes) -> None:
        """Send the child an image, with the request as JSON."""
        slot = self._slots.popleft()
        self._sent.append((slot, len(content)))
        write_slot(slot.fileno(), content)
        try:
            self._requests.write(REQUEST.pack(len(message), len(content)) + message)
        except BrokenPipeError:
            return  # the child has ended; its last answers can still be read

    def receive(self, hung_after: float, out: np.ndarray | None = None) -> Decoded | ImageError:
        """Receive the next answer.

        Args:
            hung_after: seconds to wait for it.
            out: where to put the pixels; by default a new array.

        Raises:
            EOFError: if the child has ended.
            TimeoutError: if the child doesn't answer in time.
        """
        header = ANSWER.unpack(self._read(ANSWER.size, hung_after))
        size, width, height, rows, columns, channels = header
        slot, sent = self._sent.popleft()
        self._slots.append(slot)
        answer: Decoded | ImageError
        if width:
            is_mask = not channels
            shape = (rows, columns) if is_mask else (rows, columns, channels)
            pixels = np.empty(shape, bool if is_mask else np.uint8) if out is None else out
            read_slot(slot.fileno(), pixels.data.cast("B"))
            answer = Decoded(pixels, width, height)
        else:
            read_slot(slot.fileno(), memoryview(error := bytearray(size)))
            answer = ImageError(*json.loads(error))
        if max(sent, size) > _KEPT_BYTES:
            os.ftruncate(slot.fileno(), 0)
        return answer

    def close(self) -> int:
        """Kill the child. Returns its exit code, a negative one for a signal."""
        self.process.kill()
        for file in (
            self._requests,
            self._answers,
            *self._slots,
            *(slot for slot, _ in self._sent),
        ):
            file.close()
        return self.process.wait()

    def _read(self, size: int, timeout: float) -> bytes:
        poll = select.poll()
        poll.register(self._answers, select.POLLIN)
        if not poll.poll(timeout * 1000):
            raise TimeoutError
        content = self._answers.read(size)  # few bytes, written at once, so they come whole
        if not content:
            raise EOFError
        return content


_idle: list[Decoder] = []  # each thread, and each of nested iterations, takes one
os.register_at_fork(after_in_child=_idle.clear)  # these children answer to the parent


def _take_idle(max_pixels: int) -> Decoder | None:
    while True:
        try:
            decoder = _idle.pop()
        except IndexError:
            return None
        if decoder.process.poll() is None and decoder.max_pixels == max_pixels:
            return decoder
        decoder.close()  # it has other limits, or ended while idle, which is no image's fault


@cache
def _tell_once(missing: str) -> None:
    log.info("Images are decoded without %s", missing)


def _python_path() -> str:
    """This process's module path, because a Ray worker finds ours in the job's own directory."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path)


def _explain(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit code {exit_code}"
    hint = ": perhaps out of memory" if -exit_code == signal.SIGKILL else ""
    return f"signal {-exit_code}, {signal.strsignal(-exit_code)}{hint}"
