#!/usr/bin/env python3
"""What forwarding costs: CPU time for each request, of GoFlow and of nutcracker, beside direct Redis.

    benches/forward.py GOFLOW [--rounds 3] [--requests 200000] [--shards 1,4] [--pipelines 1,16] [--commands LPUSH,RPOP,SET,GET]

Starts Redis servers, one nutcracker and one GoFlow with one thread each on free ports of 127.0.0.1, runs redis-benchmark (50
connections, 256 bytes) against one after the other in each round, and counts utime + stime of the proxy over a fixed
number of requests. So a machine that does other things changes little in the ratio, which is that of one round; the last
column is the median over the rounds. Latency and throughput are printed as seen, and worth something on a quiet
machine only. Needs redis-server, redis-benchmark, nutcracker (Debian packages).
"""

import argparse
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time

KEYS = 100_000
TICK_US = 1e6 / os.sysconf("SC_CLK_TCK")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port):
    for _ in range(500):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    sys.exit(f"nothing listens on {port}")


def cpu_us(pid):
    """User and system time that the process has used."""
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) * TICK_US, int(fields[12]) * TICK_US)


class Bed:
    """Servers and proxies, for as long as the context lasts."""

    def __init__(self, goflow, shards):
        self.dir = tempfile.TemporaryDirectory(prefix="goflow-bench-")
        self.processes = []
        redis = [free_port() for _ in range(shards)]
        for port in redis:
            self.start(["redis-server", "--port", str(port), "--save", "", "--dir", self.dir.name])
        for port in redis:
            wait_for(port)
        self.redis = redis[0]
        self.ports = {"goflow": free_port(), "nutcracker": free_port()}
        servers = "".join(f"    - 127.0.0.1:{port}:1 s{at}\n" for at, port in enumerate(redis))
        settings = os.path.join(self.dir.name, "nutcracker.yml")
        with open(settings, "w") as file:
            file.write(
                f"bench:\n  listen: 127.0.0.1:{self.ports['nutcracker']}\n  hash: fnv1a_64\n  distribution: ketama\n"
                f"  redis: true\n  preconnect: true\n  servers:\n{servers}"
            )
        stats = str(free_port())
        nutcracker = self.start(["nutcracker", "-c", settings, "-s", stats, "-a", "127.0.0.1", "-o", os.devnull])
        named = [word for at, port in enumerate(redis) for word in ("--shard", f"s{at}=redis://127.0.0.1:{port}")]
        listen = f"127.0.0.1:{self.ports['goflow']}"
        own = self.start([goflow, "serve", "--listen", listen, "--http", "off", "--threads", "1", *named])
        self.pids = {"goflow": own, "nutcracker": nutcracker}
        for port in self.ports.values():
            wait_for(port)

    def start(self, words):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": self.dir.name}
        self.processes.append(subprocess.Popen(words, **quiet))
        return self.processes[-1].pid

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in reversed(self.processes):
            process.kill()
            process.wait()
        self.dir.cleanup()


def benchmark(port, command, pipeline, requests):
    """Requests a second and the 99th percentile in milliseconds."""
    words = ["redis-benchmark", "-p", str(port), "-c", "50", "-d", "256", "-n", str(requests), "-r", str(KEYS), "-P", str(pipeline)]
    value = "x" * 256
    # Keys are drawn at random, so that every shard has its share.
    line = {
        "LPUSH": ["LPUSH", "list:__rand_int__", value],
        "RPOP": ["RPOP", "list:__rand_int__"],
        "SET": ["SET", "key:__rand_int__", value],
        "GET": ["GET", "key:__rand_int__"],
    }[command]
    output = subprocess.run([*words, *line], capture_output=True, text=True, check=True).stdout
    rate = re.search(r"throughput summary: ([\d.]+)", output) or re.search(r"([\d.]+) requests per second", output)
    summary = re.search(r"p99\s+max\s*\n\s*([\d.\s]+)", output)
    return float(rate.group(1)), float(summary.group(1).split()[4]) if summary else float("nan")


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("goflow")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--requests", type=int, default=200_000)
    arguments.add_argument("--shards", default="1,4")
    arguments.add_argument("--pipelines", default="1,16")
    arguments.add_argument("--commands", default="LPUSH,RPOP,SET,GET")
    given = arguments.parse_args()
    goflow = os.path.abspath(given.goflow)
    print("shards pipeline command   goflow us (user+sys)   nutcracker us (user+sys)  ratio   p99 ms goflow/nutcracker   k/s goflow/nutcracker/direct")
    for shards in map(int, given.shards.split(",")):
        with Bed(goflow, shards) as bed:
            for pipeline in map(int, given.pipelines.split(",")):
                requests = given.requests * (4 if pipeline > 1 else 1)
                ratios = {}
                for command in given.commands.split(","):
                    for number in range(given.rounds):
                        costs, rates, late = {}, {}, {}
                        # Who goes first changes with the round.
                        for name in sorted(bed.pids, reverse=number % 2 == 0):
                            before = cpu_us(bed.pids[name])
                            rates[name], late[name] = benchmark(bed.ports[name], command, pipeline, requests)
                            after = cpu_us(bed.pids[name])
                            costs[name] = [(b - a) / requests for a, b in zip(before, after)]
                        direct, _ = benchmark(bed.redis, command, pipeline, requests)
                        own, other = costs["goflow"], costs["nutcracker"]
                        ratio = sum(own) / max(sum(other), 1e-9)
                        ratios.setdefault(command, []).append(ratio)
                        print(
                            f"{shards:6} {pipeline:8} {command:8} {sum(own):6.2f} ({own[0]:.2f} + {own[1]:.2f})   {sum(other):10.2f} "
                            f"({other[0]:.2f} + {other[1]:.2f})   {ratio:8.2f}   {late['goflow']:10.2f} / {late['nutcracker']:.2f}   "
                            f"{rates['goflow'] / 1e3:14.0f} / {rates['nutcracker'] / 1e3:.0f} / {direct / 1e3:.0f}",
                            flush=True,
                        )
                medians = "  ".join(f"{command} {statistics.median(seen):.2f}" for command, seen in ratios.items())
                allowed = 0.9 if pipeline == 1 else 0.55
                print(f"{shards:6} {pipeline:8} median ratios: {medians}   (at most {allowed} is asked for)", flush=True)


if __name__ == "__main__":
    main()
