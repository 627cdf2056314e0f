"""Subscribes with redis-py and writes down each message: its channel and its payload.

    listen.py LOG ADDRESS CHANNEL...
"""

import sys

import redis

log, address, channels = sys.argv[1], sys.argv[2], sys.argv[3:]
host, port = address.split(":")
pubsub = redis.Redis(host=host, port=int(port)).pubsub()
for channel in channels:
    (pubsub.psubscribe if "*" in channel else pubsub.subscribe)(channel)
confirmed = 0
with open(log, "w") as out:
    for message in pubsub.listen():
        if message["type"] in ("subscribe", "psubscribe"):
            confirmed += 1
            if confirmed == len(channels):
                print("listening", file=sys.stderr, flush=True)
        elif message["type"] in ("message", "pmessage"):
            out.write(message["channel"].decode() + " " + message["data"].decode() + "\n")
            out.flush()
