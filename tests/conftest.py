"""Fixtures: random weights, small archives, Ray in this process, an S3 server over TCP."""

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from padim_ray.storage.location import Location
from tests.faults.machine import LOCALHOST, Machine

if not torch.cuda.is_available():  # must be set before torchvision imports Triton
    os.environ["TRITON_INTERPRET"] = "1"

import torchvision

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

STARTS_RAY = ("end_to_end", "cluster", "faults")  # directories


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that start Ray, which `make check` leaves out."""
    directories = [Path(__file__).parent / name for name in STARTS_RAY]
    for item in items:
        in_directory = any(item.path.is_relative_to(directory) for directory in directories)
        if in_directory or "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker("ray")


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A seeded random ResNet-18 whose batch norms are not the identity."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, 0, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(model.state_dict(), path)
    return str(path)


@pytest.fixture(scope="session")
def draw_image() -> Callable[..., Image.Image]:
    """A function that draws a structured, noisy image, with a bright square if defective."""

    def draw(
        seed: int, *, size: int = 64, defective: bool = False, shade: float = 0
    ) -> Image.Image:
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[:size, :size] / size
        pixels = 110 + 60 * np.sin(12 * x + shade) * np.cos(9 * y) + rng.normal(0, 12, (size, size))
        if defective:
            top, left = rng.integers(size // 8, size // 2, 2)
            pixels[top : top + size // 4, left : left + size // 4] += 110
        tint = np.array([1.0, 0.9, 0.8])
        return Image.fromarray((pixels[..., None] * tint).clip(0, 255).astype(np.uint8))

    return draw


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory, draw_image) -> Path:
    """Two groups, PNG and JPEG: 24 and 15 images to train, 6 good and 5 defective to test."""
    root = tmp_path_factory.mktemp("archive")
    for shade, (group, train, suffix) in enumerate([("bolt", 24, "png"), ("nut", 15, "jpg")]):
        for folder, count, defective in (
            ("train/good", train, False),
            ("test/good", 6, False),
            ("test/spot", 5, True),
        ):
            directory = root / group / folder
            directory.mkdir(parents=True)
            for index in range(count):
                seed = len(folder) * 1000 + 100 * shade + index
                image = draw_image(seed, defective=defective, shade=shade)
                image.save(directory / f"{index:03d}.{suffix}")
    return root


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Ray started in this process as the jobs start it, shared by all tests."""
    from padim_ray.pipeline.cluster.session import ray_session

    with ray_session("local"):
        yield


class S3Server:
    """`rclone serve s3` on a local directory, whose folders are the buckets."""

    def __init__(self, root: Path, address: str, key: str, secret: str) -> None:
        self.root, self.key, self.secret = root, key, secret
        self.endpoint = f"http://{address}"

    @property
    def options(self) -> dict[str, Any]:
        """Storage options for fsspec."""
        return {"key": self.key, "secret": self.secret, "endpoint_url": self.endpoint}

    def upload(self, bucket: str, directory: Path | None = None) -> None:
        """Create a bucket, with a directory's files if given.

        The upload goes through the server, because it caches listings for minutes and would not
        notice files written to disk.
        """
        fs = fsspec.filesystem("s3", **self.options)
        fs.mkdir(bucket)
        files = [path for path in directory.rglob("*") if path.is_file()] if directory else []
        keys = [f"{bucket}/{path.relative_to(directory)}" for path in files]
        fs.pipe({key: path.read_bytes() for key, path in zip(keys, files, strict=True)})

    @property
    def environment(self) -> dict[str, str]:
        """The same options as environment variables of a job."""
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL": self.endpoint,
        }


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server over TCP, with credentials of realistic length."""
    with serve_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@contextmanager
def serve_s3(root: Path, machine: Machine = LOCALHOST) -> Iterator[S3Server]:
    """Serve a directory's folders as buckets until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"{machine.address}:{probe.getsockname()[1]}"
    key, secret = f"AKIA{secrets.token_hex(8).upper()}", secrets.token_urlsafe(30)
    server = S3Server(root, address, key, secret)
    process = subprocess.Popen(
        [
            *(*machine.prefix, str(Path(sys.executable).with_name("rclone")), "serve", "s3"),
            *(str(root), "--addr", address),
            *("--auth-key", f"{server.key},{server.secret}", "--vfs-cache-mode", "off"),
            # otherwise it sometimes mistakes its own upload for a change and refuses to read it
            "--local-no-check-updated",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "RCLONE_CONFIG": "/dev/null"},
    )
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex((machine.address, int(address.rpartition(":")[2]))) == 0:
                    break
            time.sleep(0.1)
        else:
            raise RuntimeError(f"the S3 server didn't start (exit code {process.poll()})")
        yield server
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """An empty directory on local disk, then an empty bucket."""
    if request.param == "disk":
        return Location.of(str(tmp_path))
    server = request.getfixturevalue("s3")
    bucket = Location.of(f"s3://bucket-{secrets.token_hex(4)}", server.options)
    bucket.fs.mkdir(bucket.path)
    return bucket


@pytest.fixture
def disk(tmp_path):
    """A file system in memory whose size can be raised."""
    directory = tmp_path / "disk"
    directory.mkdir()

    def mount(size, *options):
        more = ",".join([f"size={size}", *options])
        command = ["mount", "-t", "tmpfs", "-o", more, "tmpfs", str(directory)]
        return subprocess.run(command, capture_output=True).returncode == 0

    if not mount("1m"):
        pytest.skip("needs the right to mount a file system")
    yield directory, lambda size: mount(size, "remount")
    subprocess.run(["umount", "--lazy", str(directory)], check=True)
