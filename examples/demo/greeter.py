"""The application in the server's pod: plain HTTP, knowing nothing of the mesh.

It answers with the address it sees as its client's, and prints a line for every connection it
accepts, so that "nothing reached the application" can be checked. Standard library only: it runs
as nobody under the system's python3.

    python3 greeter.py PORT
"""

from __future__ import annotations

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET6
from typing import Any


def _plain(ip: str) -> str:
    """An IPv4 client of this dual-stack socket without its `::ffff:`."""
    return ip.removeprefix("::ffff:")


class Greeter(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = f"hello {_plain(self.client_address[0])}, you asked for {self.path}\n".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing: `Server` has reported the connection."""


class Server(ThreadingHTTPServer):
    address_family = AF_INET6
    daemon_threads = True

    def verify_request(self, _request: Any, client_address: Any) -> bool:
        """Report the connection, whatever it goes on to send."""
        print(f"accepted {_plain(client_address[0])}", flush=True)
        return True


if __name__ == "__main__":
    with Server(("::", int(sys.argv[1])), Greeter) as server:
        print("listening", flush=True)
        server.serve_forever()
