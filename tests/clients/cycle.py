"""The whole life of jobs through redis-py, with its defaults.

    cycle.py sync|asyncio PORT QUEUE [PROTOCOL]

Prints "done" when every answer was the expected one.
"""

import asyncio
import sys

import redis
import redis.asyncio


def plain(value):
    """Texts for bytes and a dict for the flat list of RESP2."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {plain(k): plain(v) for k, v in value.items()}
    if isinstance(value, list):
        value = [plain(item) for item in value]
        if len(value) > 2 and value[0] == "id":
            return dict(zip(value[::2], value[1::2]))
        return value
    return value


async def take(call, queue):
    # Waits shorter than the five seconds after which redis-py gives an answer up.
    while (job := await call("GOFLOW.DEQUEUE", queue, "BLOCK", 3000)) is None:
        pass
    return job


async def cycle(call, queue):
    job_id = await call("GOFLOW.ENQUEUE", queue, b"a\x00\r\nb")
    job = await take(call, queue)
    assert job["id"] == job_id and job["attempt"] == 1 and job["payload"] == "a\x00\r\nb", job
    assert await call("GOFLOW.ACK", queue, job["receipt"]) == 1
    assert await call("GOFLOW.ACK", queue, job["receipt"]) == 1
    job_id = await call("GOFLOW.ENQUEUE", queue, "bad", "ATTEMPTS", 2, "BACKOFF", 1)
    job = await take(call, queue)
    assert await call("GOFLOW.FAIL", queue, job["receipt"], "ERROR", "boom") == "scheduled"
    try:
        await call("GOFLOW.EXTEND", queue, job["receipt"], 1000)
        raise AssertionError("a lost lease was extended")
    except redis.exceptions.ResponseError as error:
        assert str(error).startswith("LEASELOST"), error
    job = await take(call, queue)
    assert job["attempt"] == 2 and job["payload"] == "bad", job
    assert await call("GOFLOW.FAIL", queue, job["receipt"], "ERROR", "boom") == "dead"
    assert await call("GOFLOW.DLQ", "LEN", queue) == 1
    dead = await call("GOFLOW.DLQ", "LIST", queue)
    assert dead[0]["id"] == job_id and dead[0]["error"] == "boom", dead
    assert await call("GOFLOW.DLQ", "RETRY", queue, job_id) == 1
    job = await take(call, queue)
    assert job["id"] == job_id and job["attempt"] == 1, job
    assert await call("GOFLOW.ACK", queue, job["receipt"]) == 1
    assert await call("GOFLOW.DEQUEUE", queue, "BLOCK", 20) is None


async def main():
    mode, port, queue = sys.argv[1:4]
    options = {"protocol": int(sys.argv[4])} if len(sys.argv) > 4 else {}
    if mode == "sync":
        client = redis.Redis(port=int(port), **options)

        async def call(*words):
            return plain(client.execute_command(*words))

        await cycle(call, queue)
        with client.pipeline(transaction=False) as pipeline:
            for number in range(100):
                pipeline.execute_command("GOFLOW.ENQUEUE", queue, number)
            assert len(set(pipeline.execute())) == 100
        assert client.info()["loading"] == 0
        client.close()
    else:
        client = redis.asyncio.Redis(port=int(port), **options)

        async def call(*words):
            return plain(await client.execute_command(*words))

        await cycle(call, queue)
        tasks = [asyncio.create_task(take(call, queue)) for _ in range(5)]
        for number in range(5):
            await call("GOFLOW.ENQUEUE", queue, number)
        jobs = await asyncio.gather(*tasks)
        assert len({job["id"] for job in jobs}) == 5, jobs
        await client.aclose()
    print("done")


asyncio.run(main())
