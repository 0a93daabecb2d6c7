"""GPUs that Ray counts but PyTorch doesn't find, as with the wrong PyTorch or driver."""

import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch has a GPU here"),
]

SCRIPT = """
import sys
import ray
from padim_ray.cli import main

ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False)
main(sys.argv[1:])
"""


@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_the_error_is_one_sentence(precision, archive, weights, tmp_path):
    options = ("--image-size", "64", "--n-features", "20", "--weights", weights)
    command = [
        *(sys.executable, "-c", SCRIPT, "fit", "--images", f"{archive}/{{group}}/train/good/*"),
        *("--model", str(tmp_path / "model"), *options, "--precision", precision),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "can't use it" in done.stderr
    assert "Traceback" not in done.stderr
