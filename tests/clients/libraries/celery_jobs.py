"""Celery: `celery_jobs.py produce PORT FROM TO LOG`, or `celery_jobs.py work PORT`: the stock worker.

A job appends its number to LOG as one line. The environment's KEYPREFIX is Celery's `global_keyprefix`.
"""

import os
import sys

import celery

app = celery.Celery("jobs", broker=f"redis://127.0.0.1:{sys.argv[2]}/0", backend=f"redis://127.0.0.1:{sys.argv[2]}/0")
prefix = os.environ.get("KEYPREFIX", "")
app.conf.update(
    broker_transport_options={"global_keyprefix": prefix},
    result_backend_transport_options={"global_keyprefix": prefix},
    task_acks_late=True,
    broker_connection_retry_on_startup=True,
)


@app.task(name="note")
def note(path, number):
    with open(path, "a") as log:
        log.write(f"{number}\n")
    return number


if __name__ == "__main__":
    if sys.argv[1] == "produce":
        first, last, log = int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
        results = [note.delay(log, number) for number in range(first, last)]
        # The results come back, too, by pub/sub.
        for number, result in zip(range(first, last), results):
            assert result.get(timeout=600) == number
    else:
        app.worker_main(["worker", "--pool=threads", "--concurrency=4", "--loglevel=WARNING", "--without-mingle"])
