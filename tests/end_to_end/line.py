"""A production line on S3: an archive of two groups, and models of parts of it."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import padim_ray
from tests.densities.test_moments import assert_close

SMALL = {"image_size": 64, "n_features": 40, "precision": "float32", "calibration_images": 12}


class Line:
    def __init__(self, root, archive, weights):
        self.root, self.weights = root, weights
        self.files = {}
        for group, suffix in (("bolt", "png"), ("nut", "jpg")):
            for path in sorted((archive / group / "train/good").glob(f"*.{suffix}"))[:16]:
                self.put(group, path.name, path.read_bytes())

    def put(self, group, name, content):
        location = self.root / f"archive/{group}/{name}"
        location.write(content)
        self.files.setdefault(group, []).append(location.uri)

    def manifest(self, name, *uris):
        """A manifest of these images as they are now."""
        location = self.root / f"{name}.parquet"
        listed = {file.uri: file for file in (self.root / "archive").list_files()}
        infos = {uri: listed[uri].fs.info(listed[uri].path) for uri in uris}
        location.write_table(
            pa.table(
                {
                    "uri": uris,
                    "group": [uri.split("/")[-2] for uri in uris],
                    "size": [infos[uri]["size"] for uri in uris],
                    "version_tag": [infos[uri]["ETag"].strip('"') for uri in uris],
                }
            )
        )
        return location.uri

    def model(self, name):
        return self.root / f"models/{name}"

    def run(self, job, name, manifest, **options):
        return job(
            manifest=manifest,
            model=self.model(name).uri,
            storage_options=self.root.options,
            **options,
        )

    def fit(self, name, *uris):
        return self.run(
            padim_ray.fit, name, self.manifest(name, *uris), weights=self.weights, **SMALL
        )

    def change(self, job, name, *uris, **options):
        return self.run(job, name, self.manifest(f"{job.__name__}-{name}", *uris), **options)

    def scores(self, name, *uris):
        out = self.root / f"results/{name}"
        self.run(
            padim_ray.score,
            name,
            self.manifest("scored", *uris),
            out=out.uri,
            heatmaps="none",
            report_images=0,
        )
        tables = []
        for file in (out / "results").list_files():
            with file.as_local_file() as path:
                tables.append(pq.read_table(path))
        table = pa.concat_tables(tables).sort_by("uri")
        return table["score"].to_numpy()


def assert_same_model(version, other, accuracy):
    assert version.groups.keys() == other.groups.keys()
    for group, entry in version.groups.items():
        same = other.groups[group]
        assert (entry.images, entry.failed, entry.calibrated) == (
            *(same.images, same.failed),
            same.calibrated,
        )
        assert_close(version.load_statistics(group), other.load_statistics(group), accuracy)
        np.testing.assert_allclose(
            version.load_calibration(group).scores,
            other.load_calibration(group).scores,
            rtol=1e-3,
        )
    columns = ["uri", "group", "status", "error"]
    tables = [each.load_manifest().select(columns) for each in (version, other)]
    assert tables[0].equals(tables[1])
