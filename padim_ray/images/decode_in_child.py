"""The decoder: a child process that decodes images, so that none of them can end a job.

A library that meets a broken file may crash, hang, or take so much memory that the kernel kills the
process. Here that costs one image its row, and the process that wanted it goes on.

Encoded images and pixels go through slots, files in memory that both processes have open: neither
waits for the other to read, as with megabytes in a pipe. Requests and answers take the slots in
turn. A request is `REQUEST` and JSON that says what is wanted of the image in the slot; an answer
is `ANSWER`, and pixels, or an error in JSON, are in the slot instead.

Answers come in the order of requests, so when the child ends, it was at work on the first image
without one: the culprit is known without trying halves. That image is tried again, alone and in a
fresh child, because memory that ran out, or a heap that another image broke, may have been the
cause.
"""

import json
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import BinaryIO

import numpy as np

from padim_ray.errors import ImageError
from padim_ray.images.preprocessing import Preprocessing

HUNG_AFTER = 60.0  # seconds without a sign of life; 100 million pixels take two
ATTEMPTS = 3  # of an image at which the child ends
REQUEST = struct.Struct("<IQ")  # bytes of JSON, bytes of the image
ANSWER = struct.Struct("<Q5I")  # bytes, upright width and height, the pixels' shape; or 0s
READY = b"ready"  # what the child says first
_IN_FLIGHT = 4  # images that were sent and have no answer: the child needn't wait for the next one
_BYTES_IN_FLIGHT = 64 * 2**20  # of them, beside a first one
_KEPT_BYTES = 4 * 2**20  # of a slot; what a larger image took is given back
_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",  # else it starts one per core
    # glibc keeps what an image took for the next one, which saves a quarter of a JPEG's time
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20),
}


@dataclass(frozen=True)
class ModelInput:
    """Wanted of an image: what the trunk sees, (H, W, 3) uint8."""

    preprocessing: Preprocessing
    max_pixels: int


@dataclass(frozen=True)
class UprightImage:
    """Wanted of an image: all of it, (h, w, 3) uint8; shrunk to `longest_side` if that is given."""

    max_pixels: int
    longest_side: int | None = None


@dataclass(frozen=True)
class Mask:
    """Wanted of a ground-truth mask: where the anomaly map is defective, (H, W) bool."""

    preprocessing: Preprocessing
    max_pixels: int


Wanted = ModelInput | UprightImage | Mask


@dataclass(frozen=True)
class Decoded:
    """What was wanted of an image, and the upright image's own size."""

    pixels: np.ndarray
    width: int
    height: int


def decode_all(
    contents: Iterable[bytes | ImageError],
    wanted: Wanted,
    hung_after: float = HUNG_AFTER,
    out: Iterable[np.ndarray] = (),
) -> Iterator[Decoded | ImageError]:
    """Decode images in a child of this process, which is kept for the next call.

    Args:
        contents: encoded images; an error stands for one that couldn't be had, and stays.
        hung_after: seconds without an answer after which the child is ended.
        out: where to put each image's pixels, contiguous and of their shape; without it, they come
            in arrays of their own.

    Yields:
        For each image, in order, what was wanted of it, or why that can't be had.

    Raises:
        RuntimeError: if no child can be started.
    """
    stage = "mask" if isinstance(wanted, Mask) else "decode"
    request = json.dumps({"wanted": type(wanted).__name__, **asdict(wanted)}).encode()
    source, places = iter(contents), iter(out)
    waiting: deque[bytes | ImageError] = deque()  # the next images, without an answer yet
    sent = ended = 0  # how many of them were sent; how many children ended at the first one
    decoder = _take_idle()
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
                decoder = decoder or Decoder()
                for content in islice(waiting, sent, 1 if ended else _IN_FLIGHT):
                    if not isinstance(content, ImageError):
                        if decoder.is_full:
                            break
                        decoder.send(request, content)
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
        if decoder and sent:  # given up halfway: answers that nobody wants are under way
            decoder.close()
        elif decoder:
            _idle.append(decoder)


class Decoder:
    """A child process that decodes images, one after the other.

    Raises:
        RuntimeError: if it doesn't come to life.
    """

    def __init__(self) -> None:
        child_reads, requests = os.pipe()
        answers, child_writes = os.pipe()
        self._requests, self._answers = os.fdopen(requests, "wb", 0), os.fdopen(answers, "rb", 0)
        self._slots = deque(_unnamed_file() for _ in range(_IN_FLIGHT))  # the next one first
        self._sent: deque[tuple[BinaryIO, int]] = deque()  # slots without an answer, and their size
        inherited = (child_reads, child_writes, *(slot.fileno() for slot in self._slots))
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "padim_ray.images.child", *map(str, inherited)],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what libraries print
                pass_fds=inherited,
                env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": _python_path()},
                process_group=0,  # Ctrl-C is for the parent
            )
        finally:
            os.close(child_reads)
            os.close(child_writes)
        try:
            self._read(len(READY), HUNG_AFTER)
        except (EOFError, TimeoutError) as error:
            raise RuntimeError(
                "The process that decodes images doesn't start; its error output says why "
                f"({_explain(self.close())})"
            ) from error

    @property
    def is_full(self) -> bool:
        """Whether an answer must be received before the next image is sent."""
        return not self._slots or sum(size for _, size in self._sent) > _BYTES_IN_FLIGHT

    def send(self, request: bytes, content: bytes) -> None:
        """Give the child an image."""
        slot = self._slots.popleft()
        self._sent.append((slot, len(content)))
        write_slot(slot.fileno(), content)
        try:
            self._requests.write(REQUEST.pack(len(request), len(content)) + request)
        except BrokenPipeError:
            return  # what it answered before its end is still to be read

    def receive(self, hung_after: float, out: np.ndarray | None = None) -> Decoded | ImageError:
        """The next answer; its pixels are put into `out`, if that is given.

        Raises:
            EOFError: if the child has ended.
            TimeoutError: if it doesn't answer for so many seconds.
        """
        header = ANSWER.unpack(self._read(ANSWER.size, hung_after))
        size, width, height, rows, columns, channels = header
        slot, sent = self._sent.popleft()
        self._slots.append(slot)
        answer: Decoded | ImageError
        if width:
            shape = (rows, columns, channels) if channels else (rows, columns)  # a mask
            pixels = np.empty(shape, np.uint8 if channels else bool) if out is None else out
            read_slot(slot.fileno(), memoryview(pixels).cast("B"))
            answer = Decoded(pixels, width, height)
        else:
            read_slot(slot.fileno(), memoryview(error := bytearray(size)))
            answer = ImageError(*json.loads(error))
        if max(sent, size) > _KEPT_BYTES:
            os.ftruncate(slot.fileno(), 0)
        return answer

    def close(self) -> int:
        """End the child, whatever it does; its exit code, as `subprocess` has it."""
        self.process.kill()
        for file in (
            self._requests,
            self._answers,
            *self._slots,
            *(slot for slot, _ in self._sent),
        ):
            file.close()
        return self.process.wait()  # no zombie stays

    def _read(self, size: int, timeout: float) -> bytes:
        """What the child writes at once: few bytes come whole."""
        poll = select.poll()
        poll.register(self._answers, select.POLLIN)
        if not poll.poll(timeout * 1000):
            raise TimeoutError
        content = self._answers.read(size)
        if not content:
            raise EOFError
        return content


def _unnamed_file() -> BinaryIO:
    """A file without a name, which vanishes with its last process; in memory on Linux."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("padim-ray-slot"), "r+b", 0)
    return tempfile.TemporaryFile(buffering=0)


def write_slot(slot: int, content: bytes | memoryview) -> None:
    """Write bytes to a slot's beginning."""
    rest, offset = memoryview(content), 0
    while rest:
        count = os.pwrite(slot, rest, offset)
        rest, offset = rest[count:], offset + count


def read_slot(slot: int, buffer: memoryview) -> None:
    """Fill a buffer of bytes with a slot's beginning.

    Raises:
        EOFError: if there is less in the slot.
    """
    offset = 0
    while buffer:
        count = os.preadv(slot, [buffer], offset)
        if not count:
            raise EOFError
        buffer, offset = buffer[count:], offset + count


# each thread, and each of nested iterations, takes one for itself
_idle: list[Decoder] = []
os.register_at_fork(after_in_child=_idle.clear)  # they answer to the parent


def _take_idle() -> Decoder | None:
    while True:
        try:
            decoder = _idle.pop()
        except IndexError:
            return None
        if decoder.process.poll() is None:
            return decoder
        decoder.close()  # it died at leisure: not the next image's fault


def _python_path() -> str:
    """Where this process finds modules: a Ray worker finds ours in the job's own directory."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path)


def _explain(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit code {exit_code}"
    hint = ": perhaps out of memory" if -exit_code == signal.SIGKILL else ""
    return f"signal {-exit_code}, {signal.strsignal(-exit_code)}{hint}"
