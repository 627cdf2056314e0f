"""arq: `arq_jobs.py produce PORT FROM TO LOG`, or `arq_jobs.py work PORT`: its stock worker.

A job appends its number to LOG as one line.
"""

import asyncio
import sys

from arq import create_pool
from arq.connections import RedisSettings
from arq.worker import run_worker

settings = RedisSettings(port=int(sys.argv[2]))


async def note(context, path, number):
    with open(path, "a") as log:
        log.write(f"{number}\n")


async def produce(first, last, log):
    pool = await create_pool(settings)
    for number in range(first, last):
        assert await pool.enqueue_job("note", log, number) is not None


class Worker:
    functions = [note]
    redis_settings = settings
    poll_delay = 0.1


if __name__ == "__main__":
    if sys.argv[1] == "produce":
        asyncio.run(produce(int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]))
    else:
        run_worker(Worker)
