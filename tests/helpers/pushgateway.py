"""A Pushgateway for tests, and what Prometheus reads from it."""

import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.error import URLError

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.faults.cluster import free_port

PROGRAM = "prometheus-pushgateway"


@contextmanager
def serve_pushgateway() -> Iterator[str]:
    """Run a Pushgateway until the block ends; the value is its address."""
    program = shutil.which(PROGRAM)
    if program is None:
        pytest.skip(f"{PROGRAM} isn't on PATH (Debian: apt-get install {PROGRAM})")
    address = f"127.0.0.1:{free_port()}"
    command = [program, f"--web.listen-address={address}", "--persistence.file="]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(f"http://{address}/-/ready")
                break
            except URLError:
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait()


def scrape(address: str) -> list[Sample]:
    """The samples that an address exports, parsed as Prometheus does."""
    with urllib.request.urlopen(f"http://{address}/metrics") as answer:
        text = answer.read().decode()
    return [sample for each in text_string_to_metric_families(text) for sample in each.samples]


def outcomes(address: str) -> dict[tuple[str, str], dict[str, float]]:
    """Values of padim-ray's metrics, by command and model, then by name."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for sample in scrape(address):
        if sample.name.startswith("padim_"):
            of = sample.labels["command"], sample.labels["model"]
            found.setdefault(of, {})[sample.name.removeprefix("padim_last_success_")] = sample.value
    return found
