"""The proxy itself."""

import time
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest
from aiohttp import ClientPayloadError
from botocore.exceptions import BotoCoreError

from tests.faults.proxy import Faults


@pytest.fixture
def bucket(s3, request):
    name = f"proxy-{abs(hash(request.node.name)):x}"
    s3.upload(name)
    return name


@pytest.fixture
def fs(proxy):
    """A client without retries."""
    once = {"read_timeout": 1, "connect_timeout": 1, "retries": {"max_attempts": 0}}
    fs = fsspec.filesystem(
        "s3",
        **proxy.options,
        config_kwargs=once,
        skip_instance_cache=True,
        use_listings_cache=False,
    )
    fs.retries = 1
    return fs


ERRORS = (OSError, BotoCoreError, ClientPayloadError)  # that a client may get from a fault


def persist(call, *arguments):
    while True:
        try:
            return call(*arguments)
        except ERRORS:
            time.sleep(0.05)


def test_written_data_is_read_back(fs, bucket, proxy):
    content = {
        f"{bucket}/a {size}.bin": bytes(size % 251 for _ in range(size)) for size in (0, 9**5)
    }
    fs.pipe(content)
    assert {path: fs.cat_file(path) for path in content} == content
    assert fs.find(bucket) == sorted(content)
    fs.rm_file(f"{bucket}/a 0.bin")
    assert not fs.exists(f"{bucket}/a 0.bin")
    assert proxy.requests > 5
    assert not proxy.injected


def test_an_object_is_created_once(fs, bucket):
    fs.pipe_file(f"{bucket}/claim", b"first", mode="create")
    with pytest.raises(FileExistsError):
        fs.pipe_file(f"{bucket}/claim", b"second", mode="create")
    assert fs.cat_file(f"{bucket}/claim") == b"first"
    fs.rm_file(f"{bucket}/claim")
    fs.pipe_file(f"{bucket}/claim", b"third", mode="create")


def test_of_concurrent_creations_of_an_object_one_succeeds(fs, bucket):
    def create(number):
        try:
            fs.pipe_file(f"{bucket}/claim", str(number).encode(), mode="create")
        except FileExistsError:
            return None
        return number

    with ThreadPoolExecutor(16) as pool:
        (winner,) = [number for number in pool.map(create, range(16)) if number is not None]
    assert fs.cat_file(f"{bucket}/claim") == str(winner).encode()


@pytest.mark.parametrize(
    "kind, faults",
    [("503", Faults(slow_down=1)), ("cut", Faults(cut=1)), ("hang", Faults(hang=1))],
)
def test_a_fault_reaches_the_client_and_is_counted(fs, bucket, proxy, kind, faults):
    fs.pipe_file(f"{bucket}/there", bytes(10_000))
    with proxy.injecting(faults):
        for attempt in range(1, 5):
            with pytest.raises(ERRORS):
                fs.cat_file(f"{bucket}/there")
            # aiohttp itself retries once if a kept connection is closed
            assert attempt <= proxy.injected[kind] <= 2 * attempt
    assert set(proxy.injected) == {kind}
    assert len(fs.cat_file(f"{bucket}/there")) == 10_000


def test_a_refused_write_has_no_effect_and_a_cut_one_may_have(fs, bucket, proxy):
    with proxy.injecting(Faults(slow_down=1)), pytest.raises(OSError):
        fs.pipe_file(f"{bucket}/refused", b"data")
    assert not fs.exists(f"{bucket}/refused")
    with proxy.injecting(Faults(cut=1)):
        for number in range(16):
            with pytest.raises(ERRORS):
                fs.pipe_file(f"{bucket}/cut-{number}", b"data")
    assert 0 < len(fs.find(bucket)) < 16
    assert set(fs.cat(fs.find(bucket)).values()) == {b"data"}


def test_clients_that_retry_succeed(fs, bucket, proxy):
    content = {f"{bucket}/{number}": str(number).encode() * 500 for number in range(60)}
    with proxy.injecting(Faults(slow_down=0.1, cut=0.1, hang=0.05)), ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda item: persist(fs.pipe_file, *item), content.items()))
        read = list(pool.map(lambda path: persist(fs.cat_file, path), content))
    assert read == list(content.values())
    assert set(proxy.injected) == {"503", "cut", "hang"}


def test_an_outage_breaks_connections_refuses_new_ones_and_ends(fs, bucket, proxy):
    fs.pipe_file(f"{bucket}/there", b"data")
    proxy.cut_off(1.5)
    since = time.monotonic()
    assert persist(fs.cat_file, f"{bucket}/there") == b"data"
    assert 1.4 < time.monotonic() - since < 4
    assert proxy.injected["outage"] == 1
    assert proxy.injected["refused connection"] > 1


def test_latency_is_added_to_every_request(fs, bucket, proxy):
    with proxy.injecting(Faults(latency=0.5)):
        since = time.monotonic()
        fs.pipe_file(f"{bucket}/late", b"data")
    assert time.monotonic() - since > 0.5
