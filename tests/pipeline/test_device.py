import pytest
import torch

from padim_ray.errors import PadimError
from padim_ray.pipeline.cluster.device import FAKE_GPUS, Device
from padim_ray.planning.resources import Node, plan_resources

WITH_GPUS = plan_resources([Node(4, 1)])

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch has a GPU here")


def test_on_cpus_there_is_no_problem():
    Device.of(plan_resources([Node(4)])).check()


@without_cuda
def test_a_gpu_that_ray_has_and_pytorch_does_not_find_is_reported(monkeypatch):
    monkeypatch.delenv(FAKE_GPUS, raising=False)
    device = Device.of(WITH_GPUS)
    assert device.name == "cpu"
    with pytest.raises(PadimError, match=r"PyTorch .* can't use it.*--gpus 0"):
        device.check()


@without_cuda
def test_a_variable_lets_tests_compute_on_cpus_instead_of_gpus(monkeypatch):
    monkeypatch.setenv(FAKE_GPUS, "1")
    Device.of(WITH_GPUS).check()
