import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from padim_ray.images import slots
from padim_ray.images.slots import open_slot, read_slot, write_slot


def read(slot, size):
    buffer = bytearray(size)
    read_slot(slot.fileno(), memoryview(buffer))
    return bytes(buffer)


@given(st.lists(st.binary(max_size=100), min_size=1))
def test_a_slot_holds_what_was_written_last(contents):
    with open_slot() as slot:
        for content in contents:
            write_slot(slot.fileno(), content)
            assert read(slot, len(content)) == content


def test_megabytes_pass_through_a_slot():
    content = bytes(range(256)) * 2**16
    with open_slot() as slot:
        write_slot(slot.fileno(), memoryview(content))
        assert read(slot, len(content)) == content


def test_a_slot_is_read_and_written_in_small_steps_if_the_system_wants_that(monkeypatch):
    pwrite, preadv = slots.os.pwrite, slots.os.preadv
    monkeypatch.setattr(slots.os, "pwrite", lambda file, data, at: pwrite(file, data[:7], at))
    monkeypatch.setattr(slots.os, "preadv", lambda file, data, at: preadv(file, [data[0][:5]], at))
    content = bytes(range(100))
    with open_slot() as slot:
        write_slot(slot.fileno(), content)
        assert read(slot, 100) == content


def test_a_slot_with_too_little_in_it_is_at_its_end():
    with open_slot() as slot:
        write_slot(slot.fileno(), b"abc")
        with pytest.raises(EOFError):
            read(slot, 4)


def test_without_memory_files_a_slot_is_on_disk(monkeypatch, tmp_path):
    monkeypatch.delattr(slots.os, "memfd_create", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with open_slot() as slot:
        write_slot(slot.fileno(), b"abc")
        assert read(slot, 3) == b"abc"
        assert not list(tmp_path.iterdir())  # it has no name that could be left behind
