"""The jobs end on few and on many CPUs; a pool that took all of them would wait forever."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
import ray
import padim_ray

archive, weights, directory, cpus = sys.argv[1:]
ray.init(address="local", num_cpus=int(cpus), include_dashboard=False)
small = {"image_size": 64, "n_features": 20, "weights": weights}
fitted = padim_ray.fit(
    images=archive + "/{group}/train/good/*", model=directory + "/model", **small
)
scored = padim_ray.score(
    images=archive + "/{group}/test/{defect}/*", model=directory + "/model", out=directory + "/out"
)
print(fitted.done, scored.done)
"""


@pytest.mark.parametrize("cpus", [1, 24])
def test_the_jobs_end_with_any_number_of_cpus(cpus, archive, weights, tmp_path):
    command = [sys.executable, "-c", SCRIPT, *map(str, (archive, weights, tmp_path, cpus))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1:] == ["39 22"], done.stdout + done.stderr
