"""The decoder: a child process that decodes images, so that none of them can end a job.

A library that meets a broken file may crash, hang, or take so much memory that the kernel kills the
process. Here that costs one image its row, and the process that wanted it goes on.

A request is `REQUEST`, JSON that says what is wanted, and the encoded image; an answer is `ANSWER`
and pixels, or an error in JSON. Answers come in the order of requests, so when the child ends, it
was at work on the first image without one: the culprit is known without trying halves. That image
is tried again, alone and in a fresh child, because memory that ran out, or a heap that another
image broke, may have been the cause.
"""

import contextlib
import fcntl
import json
import os
import select
import signal
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice

import numpy as np

from padim_ray.errors import ImageError
from padim_ray.preprocessing import Preprocessing

HUNG_AFTER = 60.0  # seconds without a sign of life; 100 million pixels take two
ATTEMPTS = 3  # of an image at which the child ends
REQUEST = struct.Struct("<IQ")  # bytes of JSON, bytes of the image
ANSWER = struct.Struct("<Q5I")  # bytes, upright width and height, the pixels' shape; or 0s
READY = b"ready"  # what the child says first

_IN_FLIGHT = 4  # images that were sent and have no answer: the child needn't wait for the next one
_PIPE_BYTES = 2**20  # the most that everyone may have
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
    contents: Iterable[bytes | ImageError], wanted: Wanted, hung_after: float = HUNG_AFTER
) -> Iterator[Decoded | ImageError]:
    """Decode images in a child of this process, which is kept for the next call.

    Args:
        contents: encoded images; an error stands for one that couldn't be had, and stays.
        hung_after: seconds without a sign of life after which the child is ended.

    Yields:
        For each image, in order, what was wanted of it, or why that can't be had.

    Raises:
        RuntimeError: if no child can be started.
    """
    stage = "mask" if isinstance(wanted, Mask) else "decode"
    request = json.dumps({"wanted": type(wanted).__name__, **asdict(wanted)}).encode()
    source = iter(contents)
    waiting: deque[bytes | ImageError] = deque()  # the next images, without an answer yet
    sent = ended = 0  # how many of them were sent; how many children ended at the first one
    decoder = _take_idle()
    try:
        while True:
            waiting.extend(islice(source, _IN_FLIGHT - len(waiting)))
            if not waiting:
                return
            answer: Decoded | ImageError
            if isinstance(waiting[0], ImageError):
                answer = waiting[0]
            else:
                decoder = decoder or Decoder()
                for content in islice(waiting, sent, 1 if ended else _IN_FLIGHT):
                    sent += 1
                    if not isinstance(content, ImageError):
                        decoder.send(request, content)
                try:
                    answer = decoder.receive(hung_after)
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
        self._outgoing: deque[memoryview] = deque()
        try:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "padim_ray.decoder_process"),
                    *(str(child_reads), str(child_writes)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what libraries print
                pass_fds=(child_reads, child_writes),
                env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": _python_path()},
                process_group=0,  # Ctrl-C is for the parent
            )
        finally:
            os.close(child_reads)
            os.close(child_writes)
        for pipe in (self._requests, self._answers):
            os.set_blocking(pipe.fileno(), False)
            if sys.platform == "linux":
                # all pipes of a user have a limit together: beyond it, this one stays as it is
                with contextlib.suppress(PermissionError):
                    fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        try:
            self._read(len(READY), HUNG_AFTER)
        except (EOFError, TimeoutError) as error:
            raise RuntimeError(
                "The process that decodes images doesn't start; its error output says why "
                f"({_explain(self.close())})"
            ) from error

    def send(self, request: bytes, content: bytes) -> None:
        """Have an image sent, as soon as the child has room for it."""
        header = REQUEST.pack(len(request), len(content))
        self._outgoing += (memoryview(header + request), memoryview(content))

    def receive(self, hung_after: float) -> Decoded | ImageError:
        """The next answer.

        Raises:
            EOFError: if the child has ended.
            TimeoutError: if it has neither read nor written anything for so many seconds.
        """
        header = ANSWER.unpack(self._read(ANSWER.size, hung_after))
        size, width, height, rows, columns, channels = header
        content = self._read(size, hung_after)
        if not width:
            return ImageError(*json.loads(content.tobytes()))
        if not channels:  # a mask
            return Decoded(content.view(bool).reshape(rows, columns), width, height)
        return Decoded(content.reshape(rows, columns, channels), width, height)

    def close(self) -> int:
        """End the child, whatever it does; its exit code, as `subprocess` has it."""
        self.process.kill()
        self._requests.close()
        self._answers.close()
        return self.process.wait()  # no zombie stays

    def _read(self, size: int, hung_after: float) -> np.ndarray:
        """Read (size,) uint8, and write meanwhile: neither side waits for the other to read."""
        received = np.empty(size, np.uint8)
        rest = memoryview(received)
        while rest:
            try:
                count = os.readv(self._answers.fileno(), [rest])
            except BlockingIOError:
                self._wait(hung_after)
                continue
            if not count:
                raise EOFError
            rest = rest[count:]
        return received

    def _wait(self, hung_after: float) -> None:
        """Until there is something to read, or something was written."""
        requests = self._requests.fileno()
        poll = select.poll()
        poll.register(self._answers, select.POLLIN)
        if self._outgoing:
            poll.register(requests, select.POLLOUT)
        ready = dict(poll.poll(hung_after * 1000))
        if not ready:
            raise TimeoutError
        if requests not in ready:
            return
        try:
            count = os.writev(requests, self._outgoing)
        except BrokenPipeError:  # what it answered before its end is still to be read
            self._outgoing.clear()
            return
        while count:
            first = self._outgoing.popleft()
            if count < len(first):
                self._outgoing.appendleft(first[count:])
            count -= min(count, len(first))


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
