import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from padim_ray.errors import ImageError
from padim_ray.images import decode_in_child
from padim_ray.images.decode_in_child import (
    ATTEMPTS,
    Decoded,
    Decoder,
    Mask,
    ModelInput,
    UprightImage,
    decode_all,
)
from padim_ray.images.limits import MAX_IMAGE_BYTES
from padim_ray.images.masks import fit_mask
from padim_ray.images.preprocessing import Preprocessing
from padim_ray.images.resize import model_input
from padim_ray.images.sandbox import memory_for
from padim_ray.storage.fail_points import VARIABLE
from tests.helpers.conversions import encode
from tests.helpers.corpus import bombs, mutated_files
from tests.helpers.encoders import png, png_chunk

MAX_PIXELS = 100_000_000
WHOLE = UprightImage(MAX_PIXELS)
SCRIPT = """
import sys, time
from padim_ray.images.decode_in_child import UprightImage, _idle, decode_all
list(decode_all([b"nothing"], UprightImage(1000)))
print(_idle[0].process.pid, flush=True)
list(decode_all([sys.stdin.buffer.read()], UprightImage(1000)))
time.sleep(60)
"""


@pytest.fixture
def fresh(monkeypatch):
    """No idle child, so that the next one starts with this test's environment."""
    monkeypatch.setattr(decode_in_child, "_idle", children := [])
    yield children
    for child in children:
        child.close()


def counted(starts):
    """`Decoder`, which adds every child to `starts`."""
    return lambda *limits: starts.append(Decoder(*limits)) or starts[-1]


def picture(shade, height=6, width=9):
    return np.full((height, width, 3), shade, np.uint8)


def deadly(what):
    text = png_chunk(b"tEXt", b"Comment\0padim-ray-test:" + what.encode())
    return png(picture(0), before=text)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def own_children():
    """This process's children: by process ID, whether it is a zombie."""
    tasks = Path("/proc/self/task").iterdir()
    pids = [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
    return {pid: not is_running(pid) for pid in pids}


def test_answers_come_in_the_images_order():
    gone = ImageError("fetch", "not found")
    contents = [gone, gone] + [
        gone if shade % 5 == 0 else b"?" if shade % 7 == 0 else png(picture(shade))
        for shade in range(40)
    ]
    answers = list(decode_all(iter(contents), WHOLE))
    assert answers[:2] == [gone, gone]
    for shade, answer in enumerate(answers[2:]):
        if shade % 5 == 0:
            assert answer is gone
        elif shade % 7 == 0:
            assert str(answer).startswith("decode: not a PNG")
        else:
            np.testing.assert_array_equal(answer.pixels, picture(shade))


def test_an_image_comes_as_requested():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (60, 90, 3), np.uint8)
    preprocessing = Preprocessing((16, 32), (16, 16))

    def decode(wanted, samples):
        (decoded,) = decode_all([png(samples)], wanted)
        assert (decoded.width, decoded.height) == (90, 60)
        return decoded.pixels

    expected = model_input(image, preprocessing)
    seen = decode(ModelInput(preprocessing, MAX_PIXELS), image)
    np.testing.assert_array_equal(seen, expected)
    np.testing.assert_array_equal(decode(WHOLE, image), image)
    grey = np.broadcast_to(image[..., :1], image.shape)
    np.testing.assert_array_equal(decode(WHOLE, image[..., 0]), grey)
    assert decode(UprightImage(MAX_PIXELS, longest_side=45), image).shape == (30, 45, 3)
    defective = np.zeros((60, 90), np.uint8)
    defective[:, 30:] = 1
    mask = decode(Mask(preprocessing, MAX_PIXELS), defective)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, fit_mask(defective == 1, preprocessing))


def test_large_images_go_both_ways_and_leave_nothing_in_memory(fresh, monkeypatch):
    monkeypatch.setattr(decode_in_child, "_BYTES_IN_FLIGHT", 10_000_000)
    starts = []
    monkeypatch.setattr(decode_in_child, "Decoder", counted(starts))
    noise = np.random.default_rng(0).integers(0, 256, (6, 1500, 1500, 3), np.uint8)
    answers = decode_all([encode(image, "BMP") for image in noise], WHOLE)
    np.testing.assert_array_equal(next(answers).pixels, noise[0])
    (child,) = starts
    assert len(child._sent) == 1  # with 7 MB each, the third image had to wait
    np.testing.assert_array_equal([answer.pixels for answer in answers], noise[1:])
    assert {os.fstat(slot.fileno()).st_size for slot in child._slots} == {0}


def test_pixels_are_put_into_given_arrays():
    contents = [png(picture(shade)) for shade in range(1, 9)]
    contents[2:4] = [ImageError("fetch", "not found"), b"?"]
    pixels = np.zeros((8, 6, 9, 3), np.uint8)
    answers = list(decode_all(contents, WHOLE, out=pixels))
    for row, answer in enumerate(answers):
        if row in (2, 3):
            assert isinstance(answer, ImageError) and not pixels[row].any()
        else:
            assert np.shares_memory(answer.pixels, pixels[row])
            np.testing.assert_array_equal(pixels[row], picture(row + 1))
    with pytest.raises(TypeError, match="contiguous"):
        list(decode_all(contents, WHOLE, out=pixels[:, :, ::2]))


def test_an_image_that_takes_too_much_memory_fails_alone(fresh, monkeypatch):
    monkeypatch.setenv(VARIABLE, "decoder")
    starts = []
    monkeypatch.setattr(decode_in_child, "Decoder", counted(starts))
    contents = [png(picture(1)), deadly("memory"), png(picture(3))]
    first, hungry, last = decode_all(contents, WHOLE)
    assert (first.pixels.max(), last.pixels.max()) == (1, 3)
    limit = memory_for(MAX_PIXELS, MAX_IMAGE_BYTES)
    assert str(hungry) == f"decode: too much memory (more than {limit} bytes)"
    (mask,) = decode_all([deadly("memory")], Mask(Preprocessing((8, 8)), MAX_PIXELS))
    assert str(mask).startswith("mask: too much memory")
    assert len(starts) == 1


def test_a_child_s_limits_suit_its_images(fresh, monkeypatch):
    monkeypatch.setattr(decode_in_child, "MAX_IMAGE_BYTES", 1000)
    starts = []
    monkeypatch.setattr(decode_in_child, "Decoder", counted(starts))
    gone = ImageError("fetch", "not found")
    contents = [png(picture(1)), gone, png(picture(2)), encode(picture(3, 100, 100), "BMP"), gone]
    contents += [png(picture(4)), encode(picture(5, 200, 200), "BMP")]
    answers = list(decode_all(contents, WHOLE))
    shades = [None if answer is gone else answer.pixels.max() for answer in answers]
    assert shades == [1, None, 2, 3, None, 4, 5]
    assert [child.max_bytes for child in starts] == [1000, 30_054, 120_054]
    (answer,) = decode_all([png(picture(6))], UprightImage(1_000_000))
    assert answer.pixels.max() == 6
    assert len(starts) == 4 and len(fresh) == 1


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("segfault", "the decoder crashed (signal 11, Segmentation fault)"),
        ("oom-kill", "the decoder crashed (signal 9, Killed: perhaps out of memory)"),
        ("hang", "the decoder hung (for 2 s)"),
    ],
)
def test_an_image_that_ends_the_child_fails_alone(what, error, fresh, monkeypatch):
    monkeypatch.setenv(VARIABLE, "decoder")
    starts = []
    monkeypatch.setattr(decode_in_child, "Decoder", counted(starts))
    before = set(own_children())
    started = time.monotonic()
    contents = [png(picture(shade)) for shade in range(20)]
    contents[9] = deadly(what)
    pixels = np.zeros((20, 6, 9, 3), np.uint8)
    answers = list(decode_all(contents, WHOLE, hung_after=2, out=pixels))
    assert str(answers.pop(9)) == f"decode: {error}"
    shades = [answer.pixels.max() for answer in answers]
    assert [shade for shade in pixels.max((1, 2, 3)) if shade] == shades[1:]
    assert shades == [shade for shade in range(20) if shade != 9]
    assert len(starts) == ATTEMPTS + 1  # the last child decodes the other images
    (left,) = set(own_children()) - before
    assert left == fresh[0].process.pid and not own_children()[left]
    if what == "hang":
        assert time.monotonic() - started > 2 * ATTEMPTS
    (mask,) = decode_all([deadly(what)], Mask(Preprocessing((8, 8)), 1000), hung_after=2)
    assert str(mask) == f"mask: {error}"


def test_without_the_fail_point_nothing_is_deadly():
    (answer,) = decode_all([deadly("segfault")], WHOLE)
    np.testing.assert_array_equal(answer.pixels, picture(0))


def test_a_child_that_another_process_kills_costs_no_image(fresh, monkeypatch):
    starts = []
    monkeypatch.setattr(decode_in_child, "Decoder", counted(starts))
    answers = decode_all([png(picture(shade)) for shade in range(20)], WHOLE)
    assert next(answers).pixels.max() == 0
    os.kill(starts[0].process.pid, signal.SIGKILL)
    assert [answer.pixels.max() for answer in answers] == list(range(1, 20))
    assert len(starts) == 2
    fresh[0].process.kill()
    (answer,) = decode_all([png(picture(7))], WHOLE)
    assert answer.pixels.max() == 7


def test_the_child_is_kept_for_the_next_call(fresh):
    pids = []
    for _ in range(3):
        list(decode_all([png(picture(1))], WHOLE))
        pids += [child.process.pid for child in fresh]
    assert len(set(pids)) == 1


def test_answers_of_an_abandoned_call_don_t_come_later():
    contents = [png(picture(shade)) for shade in range(20)]
    assert len(list(islice(decode_all(contents, WHOLE), 3))) == 3
    (answer,) = decode_all([png(picture(99))], WHOLE)
    assert answer.pixels.max() == 99


def test_threads_have_children_of_their_own():
    def decode(shade):
        return [answer.pixels.max() for answer in decode_all([png(picture(shade))] * 30, WHOLE)]

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(decode, range(6))) == [[shade] * 30 for shade in range(6)]


def test_a_forked_process_has_children_of_its_own():
    list(decode_all([png(picture(1))], WHOLE))
    if not (pid := os.fork()):
        (answer,) = decode_all([png(picture(5))], WHOLE)
        os._exit(answer.pixels.max())
    (answer,) = decode_all([png(picture(7))], WHOLE)
    assert answer.pixels.max() == 7
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5


@pytest.mark.parametrize("what", ["hang", "nothing"])
def test_the_child_ends_with_its_parent(what):
    parent = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, VARIABLE: "decoder"},
    )
    pid = int(parent.stdout.readline())
    parent.stdin.write(deadly(what))
    parent.stdin.close()
    time.sleep(1)
    assert is_running(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_child_that_can_t_be_started_ends_the_job(fresh, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match=r"decodes images doesn't start.*exit code 1"):
        list(decode_all([png(picture(1))], WHOLE))
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(decode_all([png(picture(1))], WHOLE))


def test_prints_of_libraries_stay_out_of_the_answers(fresh, monkeypatch, tmp_path):
    noise = "import builtins; print('a' * 100, flush=True)\nimport json; loads = json.loads\n"
    noise += "json.loads = lambda text: (print('b' * 100, flush=True), loads(text))[1]\n"
    (tmp_path / "sitecustomize.py").write_text(noise)
    monkeypatch.syspath_prepend(tmp_path)
    answers = list(decode_all([png(picture(shade)) for shade in range(9)], WHOLE))
    assert [answer.pixels.max() for answer in answers] == list(range(9))


def test_the_kernel_kills_the_child_first_when_memory_runs_out(fresh):
    list(decode_all([png(picture(1))], WHOLE))
    assert Path(f"/proc/{fresh[0].process.pid}/oom_score_adj").read_text() == "1000\n"


def test_the_child_imports_no_more_than_it_needs():
    heavy = "{'torch', 'ray', 'pyarrow', 'fsspec', 'scipy', 'matplotlib', 'cyclopts'}"
    script = f"import sys, padim_ray.images.child; print({heavy} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert run.stdout == b"set()\n"


def test_bombs_take_little_memory(fresh):
    def peak_memory():
        status = Path(f"/proc/{fresh[0].process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    list(decode_all([png(picture(1))], WHOLE))
    before = peak_memory()
    for kind in bombs():
        list(decode_all(kind.files, WHOLE))
    assert peak_memory() - before < 50 * 2**20


@settings(max_examples=15)
@given(files=st.lists(mutated_files(), min_size=5, max_size=20))
def test_mutated_files_don_t_end_the_child(files):
    for answer in decode_all(files, UprightImage(1_000_000)):
        assert isinstance(answer, Decoded) or "the decoder" not in str(answer)
