"""A worker that knows BRPOP alone, with nothing but redis-py.

    list.py ADDRESS LIST LOG [WORK-MS]

Takes an element, works on it for WORK-MS milliseconds (2), and writes it down as one line.
"""

import sys
import time

import redis

address, name, log = sys.argv[1:4]
work = float(sys.argv[4] if len(sys.argv) > 4 else 2) / 1000
host, port = address.split(":")
server = redis.Redis(host=host, port=int(port))
with open(log, "a") as done:
    while True:
        popped = server.brpop(name, timeout=1)
        if popped is not None:
            time.sleep(work)
            done.write(popped[1].decode() + "\n")
            done.flush()
