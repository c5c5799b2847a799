import os
import socket

from dots1_local.devices.rpc_server import own_sockets


def test_looking_for_sockets_opens_nothing_for_good() -> None:
    """A worker does so every second, with other files open besides."""
    with socket.socket() as ours:
        before = set(os.listdir("/dev/fd"))
        found = {each.getsockname() for each in own_sockets()}
        assert ours.getsockname() in found
        assert set(os.listdir("/dev/fd")) == before
