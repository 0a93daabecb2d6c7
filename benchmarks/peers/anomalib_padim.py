"""Run anomalib's PaDiM on a directory of images, in its own environment (`make bench-peers`).

Prints JSON: seconds of fitting and scoring, without imports, and the process's peak memory.
"""

import argparse
import json
import logging
import resource
import tempfile
import time
import warnings

import numpy as np
import torch
from anomalib.data import Folder, ImageBatch, PredictDataset
from anomalib.engine import Engine
from anomalib.models import Padim
from torch.utils.data import DataLoader

BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True, help="directory of good images")
    parser.add_argument("--test", required=True, help="directory of images to score")
    parser.add_argument("--weights", required=True, help="state dict of resnet18")
    parser.add_argument("--channels", required=True, help="JSON list of the channels to keep")
    parser.add_argument("--workers", type=int, required=True, help="processes that read images")
    parser.add_argument("--maps", help="write the anomaly maps to this .npy file")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    model = padim(arguments.weights, json.loads(arguments.channels))
    with tempfile.TemporaryDirectory() as directory:
        engine = Engine(
            accelerator="cpu",
            default_root_dir=directory,
            enable_progress_bar=False,
            limit_val_batches=0,
        )
        started = time.perf_counter()
        engine.fit(model, datamodule=good_images(arguments.train, arguments.workers))
        fitted = time.perf_counter()
        test = DataLoader(
            PredictDataset(arguments.test),
            batch_size=BATCH,
            num_workers=arguments.workers,
            collate_fn=ImageBatch.collate,
        )
        predictions = engine.predict(model, dataloaders=test)
        scored = time.perf_counter()
    if arguments.maps:
        np.save(arguments.maps, torch.cat([batch.anomaly_map for batch in predictions]).numpy())
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(json.dumps({"fit": fitted - started, "score": scored - fitted, "megabytes": usage}))


def padim(weights: str, channels: list[int]) -> Padim:
    """Build the model with our weights and channels, without visualisation or evaluation."""
    model = Padim(
        backbone="resnet18",
        layers=["layer1", "layer2", "layer3"],
        pre_trained=False,
        n_features=len(channels),
        post_processor=False,
        evaluator=False,
        visualizer=False,
    )
    extractor = model.model.feature_extractor.feature_extractor
    state = torch.load(weights, weights_only=True)
    missing = extractor.load_state_dict(
        {name: state[name] for name in extractor.state_dict() if name in state}, strict=False
    ).missing_keys
    assert all(name.endswith("num_batches_tracked") for name in missing), missing
    model.model.idx = torch.tensor(channels)
    return model


def good_images(directory: str, workers: int) -> Folder:
    return Folder(
        name="bench",
        normal_dir=directory,
        train_batch_size=BATCH,
        num_workers=workers,
        test_split_mode="none",
        val_split_mode="none",
    )


if __name__ == "__main__":
    main()
