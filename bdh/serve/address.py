"""The address that a server listens on."""

import socket


def listen(host: str, port: int) -> socket.socket:
    """A socket that waits for connections.

    Raises:
        OSError: the address is taken, not of this machine, or not allowed.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=1024)
        # Its connections have it too. Without it an answer waits for the client to acknowledge its head: 40 ms.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
