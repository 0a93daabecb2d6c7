"""No secret that a job is given appears in its files, logs or output."""

import http.server
import json
import logging
import secrets
import threading
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

import padim_ray
from padim_ray.cli import main
from padim_ray.model.version import open_version
from padim_ray.storage.location import Location

pytestmark = pytest.mark.usefixtures("ray_cluster")

SMALL = {"image_size": 64, "n_features": 20, "precision": "float32"}
SIGNATURE, TOKEN = secrets.token_hex(32), f"IQoJb3JpZ2lu+{secrets.token_hex(12)}/=="
PASSWORD = secrets.token_urlsafe(15)
QUERY = f"X-Amz-Expires=60&X-Amz-Security-Token={quote(TOKEN, safe='')}&X-Amz-Signature={SIGNATURE}"


class ImageServer(http.server.ThreadingHTTPServer):
    """Serves an archive to requests with a signed query; its refusals repeat the query."""

    def __init__(self, root):
        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *arguments):
                super().__init__(*arguments, directory=str(root))

            def do_GET(self):
                if parse_qsl(self.path.partition("?")[2]) != parse_qsl(QUERY):
                    return self.send_error(403, f"{self.path} is refused")
                return super().do_GET()

            do_HEAD = do_GET

            def log_message(self, *_):
                """Log nothing."""

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture(scope="module")
def signed(archive):
    """A function that returns the presigned URI of an image."""
    with ImageServer(archive) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def sign(path, query=QUERY):
            where = f"ann:{PASSWORD}@127.0.0.1:{server.server_port}"
            return f"http://{where}/{path.relative_to(archive)}?{query}"

        yield sign
        server.shutdown()


def manifest_of(uris, path, **columns):
    groups = [uri.partition("?")[0].split("/")[3] for uri in uris]
    pq.write_table(pa.table({"uri": uris, "group": groups, **columns}), path)
    return str(path)


def find(values, *places):
    """The files that contain one of the values in name or content; Parquet is decoded."""
    spellings = {s for v in values for s in (v, quote(v), quote(v, safe=""), json.dumps(v)[1:-1])}
    found: set[str] = set()
    for file in (f for place in places for f in Path(place).rglob("*") if f.is_file()):
        texts = [file.read_bytes(), unquote(str(file)).encode()]
        if file.suffix == ".parquet":
            table = pq.read_table(file)
            texts.append(f"{table.schema.metadata} {table.to_pylist()}".encode())
        if any(spelling.encode() in text for text in texts for spelling in spellings):
            found.add(file.name)
    return sorted(found)


@pytest.fixture
def told(caplog, capfd):
    """A function that returns all that this test has logged and printed."""
    caplog.set_level(logging.DEBUG, "padim_ray")
    printed = []

    def read():
        printed.extend(capfd.readouterr())
        return caplog.text + "".join(printed)

    return read


def assert_untold(values, text):
    for value in values:
        assert (
            value not in text and quote(value, safe="") not in text and value not in unquote(text)
        )


CONFIGURATIONS = [
    "storage_options: {secret: '%s'\nmodel: [a",
    "storage_options: ['%s']",
    "storage_options: '%s'",
    "storage_options: {key: {nested: '%s'}}\nunknown: 1",
    "model: 'http://ann:%s@127.0.0.1:9/m'",
    "model: 'sftp://ann:%s@127.0.0.1:9/m'",
    "images: 'ftq://ann:%s@host/*.png'",
]


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_errors_do_not_repeat_a_wrong_configuration(configuration, tmp_path, told, monkeypatch):
    monkeypatch.setenv("PADIM_RAY_RETRY_SECONDS", "1")
    file = tmp_path / "job.yaml"
    file.write_text(configuration % PASSWORD)
    given = [
        f"--{name}=x" for name in ("model", "images", "out") if f"{name}:" not in configuration
    ]
    with pytest.raises(SystemExit) as exit_:
        main(["score", "--config", str(file), *given])
    assert exit_.value.code == 2
    assert_untold([PASSWORD], told())


@pytest.mark.parametrize("options", ['{"secret": "%s", x', '["%s"]', '"%s"', '{"secret": "%s"}'])
def test_errors_do_not_repeat_wrong_options(options, told):
    with pytest.raises(SystemExit) as exit_:
        main(["score", "--storage-options", options % PASSWORD, "--nonsense"])
    assert exit_.value.code == 2
    assert_untold([PASSWORD], told())


def ray_logs():
    return ray._private.worker._global_node.get_logs_dir_path()


def test_storage_options_appear_nowhere(archive, weights, s3, tmp_path, told):
    s3.upload("secret-archive", archive)
    s3.upload("secret-results")
    options = {"weights": weights, "storage_options": s3.options, **SMALL}
    padim_ray.fit(
        images="s3://secret-archive/{group}/train/good/*", model="s3://secret-results/m", **options
    )
    padim_ray.score(
        images="s3://secret-archive/{group}/test/{defect}/*",
        model="s3://secret-results/m",
        out="s3://secret-results/out",
        storage_options=s3.options,
        maps=True,
    )
    values = [s3.key, s3.secret]
    assert not find(values, s3.root / "secret-results", ray_logs())
    assert_untold(values, told())
    assert find(["secret-archive"], s3.root / "secret-results")  # the search works


@pytest.mark.parametrize("wrong", ["key", "secret"])
def test_refused_credentials_are_not_shown(wrong, weights, s3, tmp_path, told):
    options = s3.options | {wrong: f"WRONG{secrets.token_hex(12)}"}
    with pytest.raises(padim_ray.PadimError) as error:
        padim_ray.fit(
            images="s3://secret-archive/{group}/train/good/*",
            model=str(tmp_path / "m"),
            weights=weights,
            storage_options=options,
        )
    assert_untold([options["key"], options["secret"]], told() + repr(error.getrepr(style="long")))


@pytest.fixture(scope="module")
def presigned(archive, signed, weights, ray_cluster, tmp_path_factory):
    """A model and a run whose images have presigned URIs, one of them refused."""
    directory = tmp_path_factory.mktemp("presigned")
    train = sorted(archive.glob("bolt/train/good/*"))
    test = sorted(archive.glob("bolt/test/*/*"))
    uris = [signed(path) for path in train]
    padim_ray.fit(
        manifest=manifest_of(uris, directory / "train.parquet"),
        model=str(directory / "places/model"),
        weights=weights,
        **SMALL,
    )
    padim_ray.forget(
        manifest=manifest_of(uris[:3], directory / "mistakes.parquet"),
        model=str(directory / "places/model"),
    )
    uris = [signed(path) for path in test]
    uris[0] = signed(test[0], QUERY.replace("60", "61"))
    padim_ray.score(
        manifest=manifest_of(uris, directory / "test.parquet"),
        model=str(directory / "places/model"),
        out=str(directory / "places/out"),
        max_failed=1,
        heatmaps="all",
        maps=True,
    )
    return directory / "places"


def test_presigned_images_are_fetched(presigned):
    rows = pq.read_table(presigned / "out/results").to_pylist()
    assert [row["status"] for row in rows].count("scored") == 10
    (failed,) = (row for row in rows if row["status"] == "failed")
    assert failed["error"].startswith("fetch: ")
    assert all(row["heatmap_uri"] and row["map_uri"] for row in rows if row["score"])
    assert (presigned / "out/report.html").read_text().count("data:image/webp") >= 20


def test_presigned_images_are_forgotten(presigned):
    versions = [open_version(Location.of(str(presigned / "model")), number) for number in (1, 2)]
    counts = [sum(entry.images for entry in version.groups.values()) for version in versions]
    assert counts[1] == counts[0] - 3


def test_presigned_uris_are_in_no_file(presigned):
    assert not find([SIGNATURE, TOKEN, PASSWORD], presigned)


def test_presigned_uris_are_in_none_of_rays_logs(presigned):
    assert not find([SIGNATURE, TOKEN, PASSWORD], ray_logs())


def test_presigned_uris_are_not_shown(presigned, archive, signed, weights, tmp_path, told):
    uris = [signed(path, QUERY.replace("60", "62")) for path in archive.glob("bolt/test/*/*")]
    with pytest.raises(padim_ray.PadimError) as error:
        padim_ray.fit(
            manifest=manifest_of(uris, tmp_path / "train.parquet"),
            model=str(tmp_path / "m"),
            weights=weights,
            **SMALL,
        )
    values = [SIGNATURE, TOKEN, PASSWORD]
    assert_untold(values, told() + repr(error.getrepr(style="long")))
    assert not find(values, tmp_path / "m")
