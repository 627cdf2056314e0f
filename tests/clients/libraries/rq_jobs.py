"""RQ: `rq_jobs.py produce PORT FROM TO LOG`, or `rq_jobs.py work PORT`: the stock worker of the `rq` program, without forking.

A job appends its number to LOG as one line.
"""

import os
import sys


def note(path, number):
    with open(path, "a") as log:
        log.write(f"{number}\n")


if __name__ == "__main__":
    # Jobs are named by module, so that the worker finds them.
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import redis
    import rq
    import rq_jobs

    server = redis.Redis(port=int(sys.argv[2]))
    queue = rq.Queue(connection=server)
    if sys.argv[1] == "produce":
        first, last, log = int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
        for number in range(first, last):
            queue.enqueue(rq_jobs.note, log, number)
    else:
        rq.SimpleWorker([queue], connection=server).work(with_scheduler=False)
