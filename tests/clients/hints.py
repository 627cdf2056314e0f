"""Types into redis-cli on a terminal and looks for its hints.

    hints.py PORT

Completes "goflow.enq" with TAB, types a space, and waits for the arguments of the command to stand behind it, as
redis-cli shows them for what COMMAND DOCS tells it; then asks its HELP. Prints "done".
"""

import os
import pty
import select
import signal
import sys
import time


def read_until(screen, needles, seen):
    deadline = time.monotonic() + 20
    while not all(needle in seen for needle in needles):
        ready, _, _ = select.select([screen], [], [], max(0, deadline - time.monotonic()))
        if not ready:
            raise SystemExit(f"{needles} did not appear on the screen: {seen!r}")
        seen += os.read(screen, 65536)
    return seen


def main():
    child, screen = pty.fork()
    if child == 0:
        os.environ.update(TERM="xterm", COLUMNS="400", HOME="/nonexistent")
        os.execvp("redis-cli", ["redis-cli", "-p", sys.argv[1]])
    import fcntl
    import struct
    import termios

    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 400, 0, 0))
    read_until(screen, [b"> "], b"")
    os.write(screen, b"goflow.enq\t ")
    read_until(screen, [b"queue", b"payload", b"[PRIORITY", b"[META"], b"")
    os.write(screen, b"\x15GOFLOW.DLQ RETRY ")
    read_until(screen, [b"queue", b"id"], b"")
    os.write(screen, b"\x15help GOFLOW.ACK\r")
    read_until(screen, [b"summary:", b"receipt"], b"")
    # Not by "exit": a terminal that nobody reads any more may hold it up.
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("done")


main()
