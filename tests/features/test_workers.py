import threading

import pytest
import torch

from padim_ray.features.workers import ONE_BY_ONE, Workers


@pytest.fixture
def three():
    """Three threads; PyTorch's own are limited to one meanwhile."""
    threads = torch.get_num_threads()
    yield Workers(3)
    torch.set_num_threads(threads)


def test_results_are_in_the_order_of_the_pieces(three):
    pieces = range(50)
    for workers in (ONE_BY_ONE, three):
        assert workers.map(lambda piece: piece**2, pieces) == [piece**2 for piece in pieces]


def test_pieces_are_processed_in_parallel(three):
    barrier = threading.Barrier(3, timeout=30)  # raises unless three threads wait for each other
    three.map(lambda _: barrier.wait(), range(3))


def test_threads_compute_in_inference_mode(three):
    assert three.map(lambda _: torch.is_inference_mode_enabled(), range(3)) == [True] * 3


def test_an_exception_in_a_thread_is_raised(three):
    with pytest.raises(ZeroDivisionError):
        three.map(lambda piece: 1 / piece, [1, 0, 2])


def test_pytorch_keeps_its_threads_unless_workers_have_some(three):
    assert torch.get_num_threads() == 1
    torch.set_num_threads(2)
    Workers()
    assert torch.get_num_threads() == 2
