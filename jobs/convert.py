"""The convert job as a script: ray job submit --working-dir . -- python jobs/convert.py --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also without an installed package

from padim_ray.cli import convert, job_main

if __name__ == "__main__":
    job_main(convert)
