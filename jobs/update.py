"""The update job as a script: ray job submit --working-dir . -- python jobs/update.py --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also without an installed package

from padim_ray.cli import job_main, update

if __name__ == "__main__":
    job_main(update)
