"""The metrics that a run exports to Prometheus, and those that dashboard and alerts query."""

import json
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import promql_parser as promql
import pyarrow.parquet as pq
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from padim_ray.pipeline.cluster import prometheus
from tests.faults.cluster import Cluster, free_port
from tests.faults.machine import LOCALHOST
from tests.faults.processes import REPOSITORY, wait_until

GRAFANA = REPOSITORY / "infra/grafana"
JOBS = """
import sys
import padim_ray

archive, out, weights, address = sys.argv[1:]
shared = {"model": f"{out}/model", "address": address}
padim_ray.fit(
    images=f"{archive}/{{group}}/train/good/*", weights=weights, image_size=64, n_features=40,
    precision="float32", round_images=20, **shared,
)
padim_ray.score(images=f"{archive}/{{group}}/test/{{defect}}/*", out=f"{out}/run", **shared)
"""
STAGES = {"fetch", "decode", "sum", "merge", "factorise", "calibrate", "score", "write", "draw"}


@dataclass(frozen=True)
class Sample:
    name: str
    labels: dict
    value: float


def scrape(port):
    """The samples of a node's metrics port, parsed as Prometheus does."""
    with urllib.request.urlopen(f"http://{LOCALHOST.address}:{port}/metrics") as answer:
        text = answer.read().decode()
    return [
        Sample(sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]


class Scraper(threading.Thread):
    """Scrapes every second, as Prometheus does, and keeps the latest value of each series."""

    def __init__(self, *ports):
        super().__init__(daemon=True)
        self.ports, self.latest, self._stopped = ports, {}, threading.Event()

    def scrape(self):
        samples = [sample for port in self.ports for sample in scrape(port)]
        self.latest.update({(s.name, tuple(sorted(s.labels.items()))): s for s in samples})
        return samples

    def run(self):
        while not self._stopped.wait(1):
            self.scrape()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self._stopped.set()
        self.join()

    def stages(self):
        return {s.labels["stage"] for s in self.latest.values() if "_stage_seconds" in s.name}


@dataclass(frozen=True)
class Run:
    """`samples`: the latest value of each series; `at_end`: the series exported after the end."""

    samples: list
    at_end: list
    directory: Path

    def values(self, name, *labels, samples=None, **wanted):
        """Values by some of their labels, summed over the others."""
        found = {}
        for sample in samples or self.samples:
            if sample.name == f"ray_{name}" and wanted.items() <= sample.labels.items():
                key = tuple(sample.labels[label] for label in labels)
                found[key] = found.get(key, 0) + sample.value
        return found


@pytest.fixture(scope="module")
def run(archive, weights, tmp_path_factory):
    """The metrics of head and worker, after a fit and a score on a cluster of their own."""
    root = tmp_path_factory.mktemp("watched")
    shutil.copytree(archive, root / "archive")
    (root / "archive/nut").rename(root / "archive/Schräge")  # labels are ASCII only
    (root / "archive/bolt/train/good/empty.png").write_bytes(b"")
    (root / "archive/bolt/test/good/empty.png").write_bytes(b"")
    head, worker = free_port(), free_port()
    option = "--metrics-export-port={}".format
    with Cluster(workers=0, head_options=lambda address: [option(head)]) as cluster:
        cluster.add_node(LOCALHOST, option(worker))
        jobs = [JOBS, root / "archive", root, weights, cluster.address]
        with Scraper(head, worker) as scraper:
            driver = cluster.start_driver([sys.executable, "-c", *map(str, jobs)], root / "log")
            assert driver.wait() == 0, (root / "log").read_text()
            at_end = scraper.scrape()
            # workers that outlive their task export every 10 s
            wait_until(lambda: scraper.stages() >= STAGES, 30)
    return Run(list(scraper.latest.values()), at_end, root)


def test_images_are_counted_by_the_driver_and_shipped_when_it_ends(run):
    results = pq.read_table(run.directory / "run/results").to_pylist()
    scored = [row for row in results if row["status"] == "scored"]
    by_group = {
        (prometheus.label(group),): sum(row["group"] == group for row in scored)
        for group in ("bolt", "Schräge")
    }
    assert ("Schr\\xe4ge",) in by_group
    told = partial(run.values, samples=run.at_end)
    assert told("padim_images_scored_total", "group", command="score") == by_group
    flagged = sum(row["is_anomalous"] for row in scored)
    assert sum(told("padim_images_flagged_total", "group").values()) == flagged > 0
    assert told("padim_images_fitted_total", "command") == {("fit",): 39}
    assert told("padim_images_failed_total", "command", "stage", "cause") == {
        ("fit", "decode", "empty file"): 1,
        ("score", "decode", "empty file"): 1,
    }


def test_scores_are_a_histogram(run):
    results = pq.read_table(run.directory / "run/results").to_pylist()
    buckets = run.values("padim_score_bucket_total", "group", "le")
    for group in ("bolt", "Schräge"):
        scores = [r["score"] for r in results if r["group"] == group and r["score"] is not None]
        for edge in prometheus.SCORE_EDGES:
            key = prometheus.label(group), f"{edge:.6g}"
            assert buckets.get(key, 0) == (np.array(scores) <= edge).sum()
        assert buckets[prometheus.label(group), "+Inf"] == len(scores)
    told = run.values("padim_flagged_ratio", "group")
    for group in ("bolt", "Schräge"):
        flags = [row["is_anomalous"] for row in results if row["group"] == group and row["score"]]
        assert told[(prometheus.label(group),)] == pytest.approx(np.mean(flags))


def test_a_run_exports_its_model_and_its_progress(run):
    model = str(run.directory / "model")
    assert run.values("padim_model_info", "command", "model", "version") == {
        ("fit", model, "1"): 1,
        ("score", model, "1"): 1,
    }
    for command, listed in (("fit", 40), ("score", 23)):
        assert run.values("padim_run_listed_images", command=command) == {(): listed}
        assert run.values("padim_run_done_images", command=command) == {(): listed}
        assert run.values("padim_run_failed_images", command=command) == {(): 1}
        (bytes_,) = run.values("padim_run_manifest_bytes", command=command).values()
        assert listed * 50 < bytes_ < listed * 500


def test_stages_are_timed_where_they_run(run):
    seconds = run.values("padim_stage_seconds_total", "stage")
    images = run.values("padim_stage_images_total", "stage")
    assert {stage for (stage,) in seconds} == {stage for (stage,) in images} == STAGES
    assert all(value > 0 for value in seconds.values())
    assert run.values("padim_shard_seconds_count", "stage").keys() == seconds.keys()


def test_every_name_is_exported_and_no_other(run):
    exported = {s.name for s in run.samples if s.name.startswith("ray_padim_")}
    histogram = {f"padim_shard_seconds_{suffix}" for suffix in ("bucket", "count", "sum")}
    named = set(prometheus._NAMES) - {"padim_shard_seconds"} | histogram
    assert {name.removeprefix("ray_") for name in exported} == named


def vectors(expression):
    """The metrics that an expression selects with their labels, and its other labels."""
    selected, named = [], set()

    def walk(node):
        if isinstance(node, promql.VectorSelector):
            selected.append((node.name, {matcher.name for matcher in node.matchers.matchers}))
        modifier = getattr(node, "modifier", None)
        if isinstance(node, promql.AggregateExpr) and modifier is not None:
            named.update(modifier.labels)
        if isinstance(node, promql.BinaryExpr) and modifier is not None:
            matching = modifier.matching
            named.update(matching.labels if matching is not None else ())
        for name in ("lhs", "rhs", "expr", "vector_selector", "args"):
            child = getattr(node, name, None)
            for each in child if isinstance(child, list | tuple) else [child]:
                if each is not None:
                    walk(each)

    walk(promql.parse(expression))
    return selected, named


def queries():
    """All queries of the dashboard and of the alerts, with the labels that their legends show."""
    dashboard = json.loads((GRAFANA / "padim-ray.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            expression = re.sub(r"\$__(rate_interval|range)", "5m", target["expr"])
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            yield panel["title"], expression, shown
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            name, label = re.fullmatch(
                r"label_values\((\w+), (\w+)\)", variable["definition"]
            ).groups()
            yield variable["name"], f"sum by ({label}) ({name})", set()
    for group in yaml.safe_load((GRAFANA / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            shown = re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"]))
            yield rule["alert"], rule["expr"], set(shown)


OF_GPUS = {"ray_node_gpus_utilization": {"ip", "GpuIndex"}}
"""Metrics that only nodes with GPUs export, and their labels."""
PUSHED = {"padim_last_success_timestamp_seconds": {"command", "model"}}
"""Metrics of the Pushgateway, and their labels; see test_pushgateway.py."""


@pytest.mark.parametrize(
    ("title", "expression", "shown"), [pytest.param(*query, id=query[0]) for query in queries()]
)
def test_queries_select_exported_metrics(run, title, expression, shown):
    exported = {}
    for sample in run.samples:
        exported.setdefault(sample.name, set()).update(sample.labels)
    for name, labels in OF_GPUS.items():
        assert name.removeprefix("ray_") in METRICS_GAUGES
        exported.setdefault(name, labels)
    exported |= PUSHED
    selected, named = vectors(expression)
    assert selected
    known = set()
    for name, matched in selected:
        assert name in exported, f"nothing exports {name}"
        assert matched <= exported[name]
        known |= exported[name]
    assert named <= known
    kept = named if " by " in f" {expression}" else known
    assert shown <= kept


@pytest.mark.parametrize(
    ("action", "file"),
    [
        ("check", GRAFANA / "alerts.yaml"),
        ("test", REPOSITORY / "tests/grafana/alerts_test.yaml"),
    ],
)
def test_alerts_fire_when_they_should(action, file):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool isn't on PATH (Debian: apt-get install prometheus)")
    done = subprocess.run([promtool, action, "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_panels_do_not_overlap():
    panels = json.loads((GRAFANA / "padim-ray.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and max(x for x, _ in cells) < 24
        taken |= cells
