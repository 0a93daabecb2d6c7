"""Tell the jobs on this cluster to end, and wait for them: what the head node does before it ends.

Ray's own end would kill a job at once. A job that gets SIGTERM lets go of its model or results, so
that whoever continues it needn't wait until it can be taken for dead. It is told by a signal and
not through Ray's jobs API, because a job that was stopped there counts as one that nobody wants any
more, and KubeRay wouldn't try it again. The node's grace period bounds the wait.
"""

import os
import signal
import sys
import time
from contextlib import suppress

from ray.job_submission import JobStatus, JobSubmissionClient


def stop_jobs(address: str) -> None:
    """Send SIGTERM to all submitted jobs' drivers, and return when the jobs have ended."""
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
