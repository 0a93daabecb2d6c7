"""The image for real: built, and run as the nightly manifests run it, with its head killed once.

Kubernetes, KubeRay and the autoscaler have stand-ins: each pod is a container of podman's with an
address of its own and the pod's user, limits, volumes and security context; head, worker and
submitter run KubeRay's commands. `make image-test` runs this.
"""

import os
import secrets
import shutil
from dataclasses import dataclass

import pytest

import padim_ray
from padim_ray.planning.batches import MIN_SHARD_IMAGES
from tests.cluster.conftest import GROUPS, MODEL, draw_archive
from tests.cluster.network import network
from tests.conftest import serve_s3
from tests.faults.processes import wait_until
from tests.faults.proxy import FaultProxy
from tests.faults.report import Differences, compare_results, read_results
from tests.infra.containers.image import build
from tests.infra.containers.pods import Containers, start_ray, submit
from tests.infra.manifests import KUBERAY, jobs, named, render

pytestmark = [pytest.mark.image, pytest.mark.slow]

DAY = "2026-11-25"  # that the job padim-nightly-29927790 scores
PATIENCE = 240
ATTEMPTS = 4  # backoffLimit of the RayJob, and the first


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    if os.geteuid():
        pytest.skip("building and running containers needs root")
    return build(tmp_path_factory.mktemp("context"))


@pytest.fixture(scope="module")
def net():
    try:
        with network() as found:
            yield found
    except OSError as error:
        pytest.skip(f"needs the right to make network namespaces, and iproute2: {error}")


@pytest.fixture(scope="module")
def nightly(tmp_path_factory):
    """The nightly documents of a site with MinIO and without GPUs, and their job."""
    folder = tmp_path_factory.mktemp("kuberay")
    shutil.copytree(KUBERAY, folder, dirs_exist_ok=True)
    for name, old, new in (
        ("overlays/nightly", "- ../../components/gpu\n", ""),
        ("site", "components: []", "components: [../components/minio]"),
    ):
        file = folder / name / "kustomization.yaml"
        changed = file.read_text().replace(old, new)
        assert changed != file.read_text()
        file.write_text(changed)
    documents = render(folder / "overlays/nightly")
    (job,) = jobs(documents)
    return documents, job


@dataclass
class Site:
    """A store with images and a model, the proxy in front of it, and results of one node."""

    store: object
    proxy: FaultProxy
    expected: list


@pytest.fixture(scope="module")
def site(net, nightly, ray_cluster, weights, draw_image, tmp_path_factory):
    """A bucket for each location of settings.env."""
    settings = named(nightly[0], "ConfigMap")["padim-ray"]["data"]
    images = tmp_path_factory.mktemp("archive")
    draw_archive(images, draw_image, **{"train/good": 12, DAY: MIN_SHARD_IMAGES})
    with (
        serve_s3(tmp_path_factory.mktemp("store")) as store,
        FaultProxy(store, host=net.outside.address) as proxy,
    ):
        store.upload("archive", images)
        for bucket in ("models", "results", "elsewhere"):
            store.upload(bucket)
        shared = {"model": settings["MODEL"], "storage_options": store.options}
        padim_ray.fit(images=settings["FIT_IMAGES"], weights=weights, **MODEL, **shared)
        listed = settings["SCORE_IMAGES"].replace("YYYY-MM-DD", DAY)
        padim_ray.score(images=listed, out="s3://elsewhere/run", **shared)
        yield Site(store, proxy, read_results(store.root / "elsewhere/run"))


@pytest.fixture
def containers(image, net, nightly, site, tmp_path):
    """A function that starts a job's cluster, and returns it with its head's and its submitter's
    names."""
    documents, job = nightly
    settings = {
        **named(documents, "ConfigMap")["padim-ray"]["data"],
        **site.store.environment,
        "AWS_ENDPOINT_URL": site.proxy.endpoint,
    }
    head, worker, submitter = job.pods

    def start(cluster):
        """Start a cluster and its job. Ray gives up a node that a busy machine starts slowly."""
        for _ in range(ATTEMPTS):
            cluster.remove()
            cluster.token = secrets.token_hex(32)
            where, there = net.add_machine(), net.add_machine()
            command, address = start_ray(worker, where.address), f"{where.address}:6379"
            first = cluster.start(head, where, start_ray(head), RAY_ADDRESS="127.0.0.1:6379")
            if not started(cluster, first):
                continue
            second = cluster.start(worker, there, command, RAY_ADDRESS=address)
            if started(cluster, first, second):
                command = submit(job, f"http://{where.address}:8265", job.name)
                there = net.add_machine()
                return first, cluster.start(submitter, there, command, RAYJOB_NAME=job.name)
        raise RuntimeError(f"Ray doesn't start:\n{cluster.logs(first)}")

    def started(cluster, *names):
        """Wait until all nodes are started or one has ended; return whether all are there."""

        def all_running():
            return all(map(cluster.is_running, names))

        def all_started():
            return all("Ray runtime started" in cluster.logs(name) for name in names)

        wait_until(lambda: all_started() or not all_running(), PATIENCE)
        return all_started() and all_running()

    with Containers(image, job, settings, tmp_path) as cluster:
        yield cluster, lambda: start(cluster)


def test_a_night_whose_head_is_lost_is_completed_by_the_next_attempt(containers, site):
    cluster, start = containers
    results = site.store.root / f"results/{DAY}"
    with site.proxy.holding(f"/{GROUPS[-1]}/{DAY}/") as last_group:
        head, submitter = start()
        is_restricted(cluster, head)
        needs_the_token(cluster, head)
        wait_until(
            lambda: any(results.glob("results/part-*.parquet")) or not cluster.is_running(head),
            PATIENCE,
        )
        assert any(results.glob("results/part-*.parquet")), cluster.logs(submitter)
        cluster.kill(head)
        cluster.remove()
        last_group.release()
    assert not (results / "_SUCCESS").exists()

    head, submitter = start()  # KubeRay's retry: a new cluster, the same command
    assert cluster.wait(submitter) == 0, cluster.logs(submitter)
    log = cluster.logs(submitter)
    asked = ("ray", "job", "status", "--address", "http://127.0.0.1:8265", cluster.job.name)
    assert f"'{cluster.job.name}' succeeded" in cluster.execute(head, *asked).stdout, log
    assert "images are done already" in log
    assert f"{len(GROUPS) * MIN_SHARD_IMAGES} images listed" in log
    assert (results / "_SUCCESS").exists()
    assert compare_results(site.expected, read_results(results)) == Differences()


def is_restricted(cluster, name):
    """Whether a container has what the restricted pod security standard leaves."""
    status = cluster.execute(name, "cat", "/proc/1/status").stdout
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split("\t")[0] == "1000"
    assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")
    for place, writable in (("/opt/padim-ray", False), ("/home/ray", False), ("/tmp", True)):
        done = cluster.execute(name, "touch", f"{place}/file")
        assert (done.returncode == 0) == writable, done.stderr


def needs_the_token(cluster, head):
    asked = ("ray", "job", "list", "--address", "http://127.0.0.1:8265")
    assert cluster.execute(head, *asked).returncode == 0
    refused = cluster.execute(head, "env", "RAY_AUTH_TOKEN=" + "0" * 64, *asked)
    assert refused.returncode != 0
