"""Fixtures of the fault suite: a cluster, a proxy, an archive behind it, the table at the end."""

from collections.abc import Iterator

import pytest

from tests.faults.cluster import Cluster
from tests.faults.proxy import FaultProxy
from tests.faults.report import Ledger
from tests.faults.stage import Stage, draw_archive

LEDGER = pytest.StashKey[Ledger]()


@pytest.fixture(scope="package")
def whole_cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(whole_cluster: Cluster) -> Cluster:
    """The suite's cluster; nodes that died are replaced."""
    whole_cluster.restore()
    return whole_cluster


@pytest.fixture(scope="package")
def whole_proxy(s3) -> Iterator[FaultProxy]:
    with FaultProxy(s3) as proxy:
        yield proxy


@pytest.fixture
def proxy(whole_proxy: FaultProxy) -> FaultProxy:
    """The suite's proxy, with its counts reset."""
    whole_proxy.injected.clear()
    whole_proxy.requests = 0
    return whole_proxy


@pytest.fixture(scope="package")
def whole_stage(
    whole_cluster: Cluster,
    whole_proxy: FaultProxy,
    weights: str,
    draw_image,
    tmp_path_factory: pytest.TempPathFactory,
) -> Stage:
    directory = tmp_path_factory.mktemp("faults")
    draw_archive(directory / "archive", draw_image)
    whole_proxy.server.upload("faults", directory / "archive")
    whole_proxy.server.upload("faults-out")
    return Stage(whole_cluster, whole_proxy, weights, directory / "logs")


@pytest.fixture
def stage(whole_stage: Stage, cluster: Cluster, proxy: FaultProxy) -> Stage:
    """The suite's stage, with all nodes up and the undisturbed runs made."""
    whole_stage.reference_place("fit")
    whole_stage.reference_place("score")
    return whole_stage


@pytest.fixture(scope="package")
def ledger(pytestconfig: pytest.Config) -> Ledger:
    return pytestconfig.stash.setdefault(LEDGER, Ledger())


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the table."""
    ledger = config.stash.get(LEDGER, None)
    if ledger and ledger.lines:
        terminalreporter.section("faults")
        for line in ledger.render():
            terminalreporter.line(line)
