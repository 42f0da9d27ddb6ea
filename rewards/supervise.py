"""`python supervise.py COMMAND...` runs a command that must not outlive whoever holds the other end of stdin.

When that pipe closes (the server is stopped, or the parent died in whatever way), on SIGTERM, or when the
command ends, its whole process group ends with it: a server has children of its own, and they hold the GPUs.
To be started in a session of its own, which it kills, itself included.
"""

import os
import signal
import subprocess
import sys
import threading
import time

GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL


def main() -> None:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)

    def watch_parent() -> None:
        os.read(0, 1)  # nobody writes: this returns when the pipe closes
        stop.set()

    threading.Thread(target=watch_parent, daemon=True).start()
    while child.poll() is None and not stop.wait(0.1):
        pass
    if child.poll() is None:
        os.killpg(0, signal.SIGTERM)
        end = time.monotonic() + GRACE_SECONDS
        while child.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
    else:
        print(f"the server ended with exit code {child.returncode}", flush=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
