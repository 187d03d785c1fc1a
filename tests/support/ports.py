"""Ports for servers that start after their port was chosen."""

import contextlib
import random
import socket

# Above are the ports of ranks that a launcher starts (20,000 to 31,999), and those that the kernel gives to clients and
# to listeners without a port of their own: such a one takes a port from a test that does not listen at it yet.
_FIRST, _COUNT = 10_000, 10_000
_draw = random.SystemRandom()  # processes that share the tests draw apart, whatever seeds a test sets
_given: set[int] = set()


def free_port() -> int:
    """Return a port of this machine at which nobody listens, and that this process has not got before."""
    while True:
        port = _FIRST + _draw.randrange(_COUNT)
        with contextlib.closing(socket.socket()) as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            if port not in _given:
                _given.add(port)
                return port
