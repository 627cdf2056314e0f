"""A producer or a worker of the loss test, with nothing but redis-py.

    loss.py produce LOG ADDRESS[,ADDRESS] QUEUE COUNT NAME
    loss.py work    LOG ADDRESS[,ADDRESS] QUEUE - NAME

Writes what it was told, one line each, with a monotonic time in microseconds: "E time id" an enqueue was acknowledged,
"D time id receipt until" a job was delivered, "S time id receipt" an ack is about to be sent, "A time id receipt count"
it was answered. Goes on through every error by connecting anew, to the next address.
"""

import sys
import time

import redis


def micros():
    return time.monotonic_ns() // 1000


class Client:
    def __init__(self, addresses):
        self.addresses = addresses
        self.at = hash(sys.argv[6]) % len(addresses)
        self.connection = None

    def call(self, *words):
        """The reply, or None when it is not known what happened."""
        try:
            if self.connection is None:
                host, port = self.addresses[self.at % len(self.addresses)].split(":")
                self.connection = redis.Redis(host=host, port=int(port), socket_timeout=15, retry=None)
            return self.connection.execute_command(*words)
        except redis.exceptions.ResponseError as error:
            time.sleep(0.02)
            return error
        except (redis.exceptions.RedisError, OSError):
            if self.connection is not None:
                self.connection.close()
            self.connection = None
            self.at += 1
            time.sleep(0.02)
            return None


def produce(client, log, queue, count, name):
    for number in range(count):
        chosen = number % 4 == 0
        while True:
            words = ["GOFLOW.ENQUEUE", queue, f"{name}:{number}"]
            if chosen:
                words += ["ID", f"{name}-{number}"]
            reply = client.call(*words)
            if isinstance(reply, (bytes, str)):
                job = reply.decode() if isinstance(reply, bytes) else reply
                log.write(f"E {micros()} {job}\n")
                break


def work(client, log, queue, name):
    idle = 0
    while True:
        reply = client.call("GOFLOW.DEQUEUE", queue, "BLOCK", "2000", "LEASE", "4000", "WORKER", name)
        if reply is None or isinstance(reply, Exception):
            continue
        job = reply if isinstance(reply, dict) else dict(zip(reply[::2], reply[1::2]))
        job = {k.decode() if isinstance(k, bytes) else k: v for k, v in job.items()}
        job_id, receipt = job["id"].decode(), job["receipt"].decode()
        log.write(f"D {micros()} {job_id} {receipt} {job['lease_until']}\n")
        log.write(f"S {micros()} {job_id} {receipt}\n")
        log.flush()
        count = client.call("GOFLOW.ACK", queue, receipt)
        while not isinstance(count, int):
            # The same receipt again is safe: the answer is the same.
            count = client.call("GOFLOW.ACK", queue, receipt)
        log.write(f"A {micros()} {job_id} {receipt} {count}\n")
        log.flush()


def main():
    role, path, addresses, queue, count, name = sys.argv[1:7]
    with open(path, "w") as log:
        client = Client(addresses.split(","))
        if role == "produce":
            produce(client, log, queue, int(count), name)
        else:
            work(client, log, queue, name)


main()
