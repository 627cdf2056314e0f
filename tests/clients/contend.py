"""Clients that contend for locks or the slots of semaphores, with nothing but redis-py.

    contend.py LOG ADDRESS[,ADDRESS] KIND LIMIT OBJECTS CLIENTS GRANTS TTL NAME [SHARD]

KIND is LOCK or SEM; each of CLIENTS takes one of OBJECTS at random until it had GRANTS of them. Now and then one holds longer
than the TTL in milliseconds. Writes a line for each time in which a client surely held an object, in monotonic microseconds:
"asked from to let-go fence object client". It surely held it from the answer to its claim until it sent its release, but no longer
than the TTL after it asked. With SHARD the release is one that does not compare the token: it takes whoever holds the object out
of the shard there, and more of them hold too long. Goes on through every error by connecting anew, to another address.
"""

import random
import sys
import threading
import time

import redis

path, addresses, kind, limit, objects, clients, grants, ttl, name = sys.argv[1:10]
shard = sys.argv[10] if len(sys.argv) > 10 else None
addresses, objects, grants, ttl = addresses.split(","), int(objects), int(grants), int(ttl)
overheld = 0.2 if shard else 0.03
log = open(path, "w", buffering=1)


def micros():
    return time.monotonic_ns() // 1000


def link(address):
    host, port = address.split(":")
    return redis.Redis(host=host, port=int(port), socket_timeout=20, retry=None)


def let_go_of_whoever_holds(what):
    server, key = link(shard), "goflow:{!%s}:%s" % (kind.lower(), what)
    server.set(key, server.getrange(key, 0, 8))  # the fence, and whether somebody waits
    server.publish("goflow:wake", ("!" if kind == "LOCK" else "?") + what)


def contend(number):
    client, had = None, 0
    while had < grants:
        what = "contended-%d" % random.randrange(objects)
        try:
            client = client or link(random.choice(addresses))
            words = [] if kind == "LOCK" else [limit]
            asked = micros()
            answer = client.execute_command("GOFLOW." + kind, "ACQUIRE", what, *words, ttl, "WAIT", 2000)
            held_from = micros()
            if answer is None:
                continue
            token, fence = answer if kind == "LOCK" else (answer, 0)
            time.sleep(random.random() * 0.002 if random.random() > overheld else ttl / 1000 * 1.3)
            let_go = micros()
            had += 1
            surely = min(let_go, asked + ttl * 1000 - 2000)
            if surely > held_from:
                log.write(f"{asked} {held_from} {surely} {let_go} {fence} {what} {name}-{number}\n")
            if shard:
                let_go_of_whoever_holds(what)
            else:
                client.execute_command("GOFLOW." + kind, "RELEASE", what, token)
        except (redis.exceptions.RedisError, OSError):
            if client is not None:
                client.close()
            client = None
            time.sleep(0.05)


threads = [threading.Thread(target=contend, args=(number,)) for number in range(int(clients))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("done", flush=True)
