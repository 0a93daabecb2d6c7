"""Fixtures: the overlays as rendered."""

import pytest

from tests.infra.manifests import KUBERAY, OVERLAYS, Job, jobs, render


@pytest.fixture(scope="session")
def rendered():
    """A function that gives an overlay's documents."""
    return {name: render(KUBERAY / "overlays" / name) for name in OVERLAYS}.__getitem__


@pytest.fixture(scope="session", params=OVERLAYS)
def documents(request, rendered):
    """One overlay's documents, after the other's."""
    return rendered(request.param)


@pytest.fixture(scope="session")
def all_jobs(rendered) -> list[Job]:
    return [job for name in OVERLAYS for job in jobs(rendered(name))]
