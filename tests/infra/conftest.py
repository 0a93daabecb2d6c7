"""Fixtures: the rendered overlays."""

import pytest

from tests.infra.manifests import KUBERAY, OVERLAYS, Job, jobs, render


@pytest.fixture(scope="session")
def rendered():
    """A function that returns the documents of an overlay by name."""
    return {name: render(KUBERAY / "overlays" / name) for name in OVERLAYS}.__getitem__


@pytest.fixture(scope="session", params=OVERLAYS)
def documents(request, rendered):
    """The documents of each overlay in turn."""
    return rendered(request.param)


@pytest.fixture(scope="session")
def all_jobs(rendered) -> list[Job]:
    return [job for name in OVERLAYS for job in jobs(rendered(name))]
