"""What the demo does, act by act, and what it checks in each.

The checks are made by things that are not pyambient: curl, an HTTP server that prints the address
of its client, tcpdump, ip, nft. What pyambient says of itself is used for its access log only.
"""

from __future__ import annotations

import secrets
import socket
from pathlib import Path
from typing import Any

from . import residue
from .account import Account
from .app import PORT, App
from .bed import BRIDGE, Bed, Pod
from .mesh import NAMESPACE, Mesh
from .wire import APPLICATION_DATA, Capture, Recorder, tls_records

_POLICY = Path(__file__).with_name("policy.yaml")
_HBONE_PORT = 15008
_DISCARD_PORT = 9
# What every log line has; the rest are the fields of an access-log line.
_LINE_HEAD = frozenset(("level", "time", "scope", "message"))


def tell(work: Path, cgroup: Path, backend: str) -> int:
    """Run all acts; 0 if every check held. Needs mount and network namespaces of its own."""
    account = Account()
    with account.act("Three network namespaces on a bridge"):
        bed = Bed(cgroup)
        for pod in bed.pods:
            account.say(f"{pod.name:<9} {pod.ipv4}  {pod.ipv6}")
    with App(bed.server, work) as app:
        story = Story(bed, app, account, work, cgroup)
        story.before_the_mesh()
        with Mesh(work, cgroup, _POLICY) as mesh:
            story.enrolment(mesh, backend)
            capture = story.the_same_request()
            story.the_wire(capture)
            story.the_access_log(mesh)
            story.the_outsider(mesh)
            story.un_enrolment(mesh)
        story.nothing_left()
    return account.verdict()


def _identity(pod: Pod) -> str:
    return f"spiffe://cluster.local/ns/{NAMESPACE}/sa/{pod.name}"


class Story:
    """The acts, in the order of `tell`."""

    def __init__(self, bed: Bed, app: App, account: Account, work: Path, cgroup: Path) -> None:
        self._bed = bed
        self._app = app
        self._account = account
        self._work = work
        # What each request asks for: text that must not be readable on the wire.
        self._secret = secrets.token_hex(8)
        self._cgroup = cgroup
        self._before = self._states()

    def before_the_mesh(self) -> None:
        with self._account.act("Before the mesh: everyone may ask, everyone may read"):
            capture = self._fetch_all("before", self._bed.client, self._bed.outsider)
            self._account.check(
                "the capture shows the request in plain text",
                capture.holds(self._secret),
                f"{len(capture.frames)} frames, GET /{self._secret} among them",
            )

    def enrolment(self, mesh: Mesh, backend: str) -> None:
        with self._account.act("pyambient up; client and server are enrolled, outsider is not"):
            for pod in (self._bed.client, self._bed.server):
                self._account.show(mesh.enrol(pod, backend))
            self._account.show(mesh.succeed("status"))
            changed = {
                where: residue.changes(self._before[where], state)
                for where, state in self._states().items()
            }
            self._account.check(
                "ip, nft and ss see the enrolment of client and server, and nothing in outsider",
                all(bool(what) is (where != "outsider") for where, what in changed.items()),
                "\n".join(f"{where}: {', '.join(what) or '-'}" for where, what in changed.items()),
            )

    def the_same_request(self) -> Capture:
        with self._account.act("The same request, through the mesh"):
            return self._fetch_all("mesh", self._bed.client)

    def the_wire(self, capture: Capture) -> None:
        client, server = ((pod.ipv4, pod.ipv6) for pod in (self._bed.client, self._bed.server))
        with self._account.act("What the wire shows (tcpdump on the bridge)"):
            segments = capture.between(client, server)
            ports = {min(s.source.port, s.destination.port) for s in segments}
            self._account.check(
                f"all TCP payload between the two pods is on port {_HBONE_PORT}",
                ports == {_HBONE_PORT},
                f"{len(segments)} segments with {sum(len(s.payload) for s in segments)} bytes"
                f" on {', '.join(map(str, sorted(ports))) or 'no port'}",
            )
            self._check_tls(capture, client + server)
            self._account.check(
                "no frame holds a word of the request in plain text",
                bool(capture.frames) and not capture.holds(self._secret),
                f"looked for {self._secret} in {len(capture.frames)} frames",
            )

    def _check_tls(self, capture: Capture, ips: tuple[str, ...]) -> None:
        """Both directions of a connection per family are TLS records, application data too."""
        seen = []
        problems = []
        for (source, destination), stream in capture.streams().items():
            if not {source.ip, destination.ip} <= set(ips):
                continue
            try:
                data = tls_records(stream).count(APPLICATION_DATA)
            except ValueError as error:
                problems.append(f"{source} -> {destination}: {error}")
                continue
            seen.append((source.ip, destination.ip) if data else None)
            problems += [] if data else [f"{source} -> {destination}: no application data"]
        self._account.check(
            "it is TLS records, in both directions, over IPv4 and IPv6",
            not problems and len({ends for ends in seen if ends}) == 4,
            "\n".join(problems) or f"{len(seen)} directions, each with application data",
        )

    def the_access_log(self, mesh: Mesh) -> None:
        client, server = self._bed.client, self._bed.server
        with self._account.act("Who talked to whom: the access log"):
            for direction in ("outbound", "inbound"):
                for ip in (server.ipv4, server.ipv6):
                    target = f"[{ip}]:{PORT}" if ":" in ip else f"{ip}:{PORT}"
                    lines = mesh.wait_for_log(1, direction=direction, dst_hbone_addr=target)
                    self._account.check(
                        f"{direction} to {target}: logged once, with both SPIFFE identities",
                        len(lines) == 1
                        and lines[0].get("src.identity") == _identity(client)
                        and lines[0].get("dst.identity") == _identity(server),
                        "\n".join(map(_told, lines)),
                    )

    def the_outsider(self, mesh: Mesh) -> None:
        outsider, server = self._bed.outsider, self._bed.server
        with self._account.act("The namespace outside the mesh, and a policy that lets client in"):
            for ip, own in ((server.ipv4, outsider.ipv4), (server.ipv6, outsider.ipv6)):
                seen = self._app.accepted()
                done = outsider.fetch(ip, PORT, f"/{self._secret}")
                self._account.check(
                    f"outsider's request to {ip} fails",
                    done.returncode != 0 and not done.stdout,
                    done.stderr or done.stdout,
                )
                source = f"[{own}]:" if ":" in own else f"{own}:"
                lines = mesh.wait_for_log(1, direction="inbound", src_addr=source)
                self._account.check(
                    "the refusal is logged, with its reason",
                    len(lines) == 1 and "policy" in str(lines[0].get("error", "")),
                    "\n".join(map(_told, lines)),
                )
                self._account.check(
                    "the application saw no connection", self._app.accepted() == seen
                )

    def un_enrolment(self, mesh: Mesh) -> None:
        with self._account.act("Un-enrolled; pyambient stopped"):
            for pod in (self._bed.client, self._bed.server):
                self._account.show(mesh.succeed("unenroll", pod.name))
            self._account.check("'pyambient up' ends cleanly", mesh.stop() == 0)

    def nothing_left(self) -> None:
        with self._account.act("Nothing is left behind"):
            for where, state in self._states().items():
                before = self._before[where]
                self._account.check(
                    f"{where}: {', '.join(state)} are as before",
                    not residue.changes(before, state),
                    residue.told(before, state),
                )
            capture = self._fetch_all("after", self._bed.client, self._bed.outsider)
            self._account.check(
                "requests go straight to the server again", capture.holds(self._secret)
            )

    def _states(self) -> dict[str, residue.State]:
        """What each pod and the node hold now."""
        pods = {pod.name: residue.of_pod(pod) for pod in self._bed.pods}
        return {**pods, "node": residue.of_node(self._cgroup)}

    def _fetch_all(self, name: str, *clients: Pod) -> Capture:
        """Fetch over IPv4 and IPv6 from each client while the bridge is recorded."""
        recorder = Recorder(BRIDGE, self._work / f"{name}.pcap")
        for client in clients:
            self._fetch(client, self._bed.server.ipv4, client.ipv4)
            self._fetch(client, self._bed.server.ipv6, client.ipv6)
        return recorder.stop(self._say_on_wire)

    def _fetch(self, client: Pod, ip: str, own: str) -> None:
        done = client.fetch(ip, PORT, f"/{self._secret}")
        self._account.check(
            f"{client.name} -> {ip}: answered, and the server saw {client.name}'s own {own}",
            done.stdout == f"hello {own}, you asked for /{self._secret}\n",
            done.stdout or done.stderr,
        )

    def _say_on_wire(self, text: str) -> None:
        """Put `text` into a datagram that crosses the bridge."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(text.encode(), (self._bed.outsider.ipv4, _DISCARD_PORT))


def _told(line: dict[str, Any]) -> str:
    """An access-log line's fields: the source's, the destination's, and those of neither."""
    groups: dict[str, list[str]] = {"src": [], "dst": [], "": []}
    for name, value in line.items():
        if name not in _LINE_HEAD:
            groups[name.split(".")[0] if "." in name else ""].append(f"{name}={value}")
    return "\n".join(map(" ".join, groups.values()))
