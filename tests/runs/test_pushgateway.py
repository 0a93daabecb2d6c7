"""A run's outcome reaches Prometheus through a real Pushgateway."""

import http.server
import threading
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from padim_ray.runs.pushgateway import VARIABLE, push_outcome
from padim_ray.runs.summary import Summary
from tests.faults.cluster import free_port
from tests.helpers.pushgateway import outcomes, serve_pushgateway

RUN = Summary(
    job="score",
    listed=100,
    failed_by_cause={"fetch: not found": 3, "decode: empty file": 1},
    groups={"bolt": 100},
    before=0,
    seconds=12.5,
    stages={},
    places={},
    finished_at=datetime(2026, 11, 26, 5, 1, tzinfo=UTC),
)


@pytest.fixture(scope="module")
def gateway():
    with serve_pushgateway() as address:
        yield address


def test_the_outcome_of_a_run_stays_at_the_gateway(gateway, monkeypatch):
    monkeypatch.setenv(VARIABLE, gateway)
    push_outcome(RUN, "s3://models/line7")
    assert outcomes(gateway)["score", "s3://models/line7"] == {
        "timestamp_seconds": datetime(2026, 11, 26, 5, 1, tzinfo=UTC).timestamp(),
        "images": 100,
        "failed_images": 4,
        "flagged_images": 0,
        "duration_seconds": 12.5,
    }


def test_each_command_and_model_has_its_latest_outcome(gateway, monkeypatch):
    monkeypatch.setenv(VARIABLE, f"http://{gateway}/")
    for model in ("s3://models/Schräge 7", "s3://models/line8"):
        push_outcome(RUN, model)
        push_outcome(replace(RUN, job="fit"), model)
    push_outcome(replace(RUN, listed=7), "s3://models/line8")
    found = outcomes(gateway)
    assert found["score", "s3://models/line8"]["images"] == 7
    assert found["fit", "s3://models/line8"]["images"] == 100
    assert found["score", "s3://models/Schräge 7"]["images"] == 100


def test_the_model_is_named_without_credentials(gateway, monkeypatch):
    monkeypatch.setenv(VARIABLE, gateway)
    push_outcome(RUN, "https://ann:pa55word@host/model")
    assert ("score", "https://***@host/model") in outcomes(gateway)


@contextmanager
def refusing():
    """A server that answers every request with 503."""

    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_PUT(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_error(503)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_gateway_that_fails_is_logged_and_the_run_goes_on(monkeypatch, caplog):
    with refusing() as unavailable:
        for address, reason in (
            (unavailable, "503"),
            (f"127.0.0.1:{free_port()}", "refused"),
            ("http://host:port", "port"),
            ("http://ann:pa55word@127.0.0.1:9", "***@127.0.0.1:9"),
        ):
            caplog.clear()
            monkeypatch.setenv(VARIABLE, address)
            push_outcome(RUN, "s3://models/line7")
            (line,) = caplog.messages
            assert VARIABLE in line and reason in line
            assert "pa55word" not in line


@pytest.mark.parametrize("nothing", [None, ""])
def test_without_a_gateway_nothing_is_pushed(gateway, nothing, monkeypatch, caplog):
    if nothing is None:
        monkeypatch.delenv(VARIABLE, raising=False)
    else:
        monkeypatch.setenv(VARIABLE, nothing)
    push_outcome(RUN, "s3://models/nobody")
    assert ("score", "s3://models/nobody") not in outcomes(gateway)
    assert not caplog.messages
