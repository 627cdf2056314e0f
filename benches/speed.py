#!/usr/bin/env python3
"""What a job costs, as a table: `goflow bench` over one Redis shard and over the embedded one, beanstalkd beside them.

    make speed                          builds the release binary and runs this with its defaults
    benches/speed.py GOFLOW [RUNS] [JOBS]

Each figure is the median of RUNS (default 5) runs of JOBS (default 60,000) jobs of 256 bytes over 50 connections, the
kinds in turn, so that what else the machine does meets all of them. CPU is user and system time from /proc in
microseconds a job (enqueue, dequeue and ack), rates are jobs a second on this machine, which client, proxy and servers
share. Nothing is asserted here: a figure alone says little, a ratio within one run says more.
"""
import json
import os
import socket
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

TICK_US = 1e6 / os.sysconf("SC_CLK_TCK")
CONNECTIONS = 50
SHAPES = {"unpipelined": [], "pipeline 16": ["--pipeline", "16"], "batches of 100": ["--batch", "100"]}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def cpu_us(pid):
    fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) * TICK_US


def resident_bytes(pid):
    return int(open(f"/proc/{pid}/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Servers:
    """What one run starts, and ends: by name, so that each pid is known."""

    def __init__(self):
        self.directory = tempfile.TemporaryDirectory(prefix="goflow-speed-")
        self.running = []

    def start(self, command, port):
        process = subprocess.Popen(command, cwd=self.directory.name, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.running.append(process)
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                return process.pid
            except ConnectionRefusedError:
                if process.poll() is not None:
                    raise SystemExit(f"{command[0]} ended at once: {process.returncode}")
                time.sleep(0.01)

    def end(self):
        for process in reversed(self.running):
            process.terminate()
            process.wait()
        self.directory.cleanup()


def goflow_run(goflow, kind, words):
    """One run of the load generator against fresh servers: its phases, and the pids by name."""
    servers = Servers()
    try:
        port, pids, shard = free_port(), {}, "embedded:jobs"
        if kind == "redis":
            redis_port = free_port()
            command = ["redis-server", "--port", str(redis_port), "--save", "", "--bind", "127.0.0.1"]
            pids["redis"] = servers.start(command, redis_port)
            shard = f"redis://127.0.0.1:{redis_port}"
        serve = [goflow, "serve", "--listen", f"127.0.0.1:{port}", "--http", "off", "--shard", f"s1={shard}"]
        pids["goflow"] = servers.start(serve, port)
        before = {name: resident_bytes(pid) for name, pid in pids.items()}
        bench = [goflow, "bench", "--addr", f"127.0.0.1:{port}", "--json", *words]
        for pid in pids.values():
            bench += ["--pid", str(pid)]
        report = json.loads(subprocess.run(bench, check=True, capture_output=True, text=True).stdout)
        grown = {name: resident_bytes(pid) - before[name] for name, pid in pids.items()}
        return report["phases"], pids, grown
    finally:
        servers.end()


def costs(goflow, kind, jobs, words):
    phases, pids, _ = goflow_run(goflow, kind, ["--jobs", str(jobs), *words])
    found = {f"{phase['name']}/s": phase["jobs_per_s"] for phase in phases}
    for name, pid in pids.items():
        found[f"{name} us"] = sum(share["us"] for phase in phases for share in phase["cpu_us_per_job"] if share["pid"] == pid)
    return found


def latency(goflow, kind, jobs):
    words = ["--jobs", str(jobs), "--rate", "200", "--phases", "together", "--producers", "10", "--workers", "10"]
    phases, _, _ = goflow_run(goflow, kind, words)
    return {"p50 us": phases[0]["latency_us"]["p50"], "p99 us": phases[0]["latency_us"]["p99"]}


def memory(goflow, kind, jobs):
    """Of so many jobs that what the process needs for itself is little beside them."""
    _, _, grown = goflow_run(goflow, kind, ["--jobs", str(jobs), "--batch", "100", "--workers", "0"])
    return {f"{name} bytes a job": bytes_grown / jobs for name, bytes_grown in grown.items()}


def beanstalkd(jobs):
    """The same life of a job at beanstalkd, in memory, a thread for each connection."""
    servers = Servers()
    try:
        port = free_port()
        pid = servers.start(["beanstalkd", "-l", "127.0.0.1", "-p", str(port)], port)
        share = jobs // CONNECTIONS

        def put(stream):
            for _ in range(share):
                stream.write(b"put 0 0 120 256\r\n" + b"x" * 256 + b"\r\n")
                stream.flush()
                stream.readline()

        def drain(stream):
            for _ in range(share):
                stream.write(b"reserve\r\n")
                stream.flush()
                _, number, size = stream.readline().split()
                stream.read(int(size) + 2)
                stream.write(b"delete " + number + b"\r\n")
                stream.flush()
                stream.readline()

        found = {}
        for name, work in (("put", put), ("reserve + delete", drain)):
            streams = [socket.create_connection(("127.0.0.1", port)).makefile("rwb") for _ in range(CONNECTIONS)]
            before = cpu_us(pid)
            threads = [threading.Thread(target=work, args=(stream,)) for stream in streams]
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
            found[f"{name} us"] = (cpu_us(pid) - before) / (share * CONNECTIONS)
        return found
    finally:
        servers.end()


def main():
    goflow = os.path.abspath(sys.argv[1])
    runs, jobs = (int(word) for word in (sys.argv[2:4] + ["5", "60000"][len(sys.argv) - 2:]))
    kinds = ("redis", "embedded")
    measures = {(kind, shape): (lambda kind=kind, words=words: costs(goflow, kind, jobs, words))
                for shape, words in SHAPES.items() for kind in kinds}
    measures |= {(kind, "200 jobs/s"): (lambda kind=kind: latency(goflow, kind, 1_000)) for kind in kinds}
    measures |= {(kind, "waiting jobs"): (lambda kind=kind: memory(goflow, kind, 20 * jobs)) for kind in kinds}
    if shutil.which("beanstalkd"):
        measures[("beanstalkd", "unpipelined")] = lambda: beanstalkd(jobs // 3)
    found = {key: [] for key in measures}
    for _ in range(runs):
        for key, measure in measures.items():
            found[key].append(measure())
    for (kind, shape), results in found.items():
        middle = {name: statistics.median(result[name] for result in results) for name in results[0]}
        print(f"{kind:10} {shape:15} " + "  ".join(f"{name} {value:,.1f}" for name, value in middle.items()), flush=True)


main()
