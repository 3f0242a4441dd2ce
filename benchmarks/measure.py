"""The fresh process of one measurement: reads a job as JSON, prints the result as JSON."""

from __future__ import annotations

import json
import sys

from benchmarks.cell import Job, peak_mb
from paddle_medcls.core.errors import SetupError


def measure(job: Job) -> dict:
    """Returns `value` and `peak_mb`, or `not_measured`: the reason why the variant cannot be measured here."""
    if job.row == "machine":
        from paddle_medcls.core.paddle_setup import environment

        return environment("cpu")
    from benchmarks.networks import prepare
    from benchmarks.rows import ROWS

    try:
        value = prepare(job) if job.row == "prepare" else ROWS[job.row][job.variant](job)
    except SetupError as error:
        return {"not_measured": error.what}
    return {"value": value, "peak_mb": peak_mb()}


if __name__ == "__main__":
    print(json.dumps(measure(Job(**json.loads(sys.argv[1])))))
