"""Stop this cluster's jobs before the head node ends (preStop hook).

Without this hook Ray would kill the jobs at once. On SIGTERM a job releases its claim on its model
or results, so that its successor need not wait for the claim to expire. Jobs are not stopped
through Ray's jobs API, because KubeRay does not retry a job that was stopped there. The pod's grace
period bounds the wait.
"""

import os
import signal
import sys
import time
from contextlib import suppress

from ray.job_submission import JobStatus, JobSubmissionClient


def stop_jobs(address: str) -> None:
    """Send SIGTERM to the drivers of all submitted jobs and wait until the jobs have ended."""
    client = JobSubmissionClient(address)
    running = [
        job
        for job in client.list_jobs()
        if job.submission_id and job.driver_info and not JobStatus(job.status).is_terminal()
    ]
    for job in running:
        with suppress(ProcessLookupError):
            os.kill(int(job.driver_info.pid), signal.SIGTERM)
    while any(not client.get_job_status(job.submission_id).is_terminal() for job in running):
        time.sleep(0.5)


if __name__ == "__main__":
    stop_jobs(sys.argv[1])
