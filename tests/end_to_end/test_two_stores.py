"""One job with images on a web server, and its model and results on S3."""

import secrets

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import padim_ray
from padim_ray.storage.location import Location
from tests.helpers.web import serve_files

pytestmark = pytest.mark.usefixtures("ray_cluster")

TOKEN = secrets.token_hex(16)
HEADERS = {"Authorization": f"Bearer {TOKEN}"}


def test_each_store_gets_its_own_options(archive, weights, s3, tmp_path):
    for bucket in ("models-of-web-images", "results-of-web-images"):
        s3.upload(bucket)
    model, out = "s3a://models-of-web-images/m", "s3://results-of-web-images/out"
    with serve_files(archive, HEADERS) as server:

        def listed(folder):
            files = sorted(archive.glob(f"bolt/{folder}/*.png"))
            uris = [f"http://{server.address}/{file.relative_to(archive)}" for file in files]
            path = tmp_path / "manifest.parquet"
            pq.write_table(pa.table({"uri": uris, "group": ["bolt"] * len(uris)}), path)
            return str(path)

        options = {"storage_options": {"s3": s3.options, "http": {"headers": HEADERS}}}
        padim_ray.fit(
            manifest=listed("train/good"),
            model=model,
            weights=weights,
            image_size=64,
            n_features=20,
            precision="float32",
            **options,
        )
        summary = padim_ray.score(
            manifest=listed("test/spot"), model=model.replace("s3a", "s3"), out=out, **options
        )
        assert summary.failed_by_cause == {}
        report = Location.of(f"{out}/report.html", s3.options).read().decode()
        assert report.count("data:image/webp") >= 5
        with pytest.raises(padim_ray.PadimError, match="--storage-options"):
            padim_ray.score(
                manifest=listed("test/spot"),
                model=model,
                out=f"{out}-2",
                storage_options=s3.options | {"headers": HEADERS},
            )
    for file in s3.root.rglob("*-of-web-images/**/*"):
        assert file.is_dir() or TOKEN.encode() not in file.read_bytes()
