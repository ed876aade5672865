"""A session never stands in for a certificate."""

from __future__ import annotations

import pytest
from OpenSSL import SSL

from pyambient.identity.context import server_context

from .tls import (
    CLIENT,
    SERVER,
    Library,
    Mint,
    Standard,
    join,
    lax_context,
    pem,
    show,
    standard_context,
)

MINT = Mint()
CERTIFICATE = MINT.issue(CLIENT)


def connect_twice(server: SSL.Context) -> tuple[Standard, Library]:
    """One client connects, and connects again with its session.

    The first server end is kept: OpenSSL drops the session of a connection that is freed open.
    """
    context = standard_context(MINT, CERTIFICATE)
    first, kept = Standard(context, server=False), Library(server, server=True)
    join(first, kept)
    session = first.object.session
    assert session is not None
    client, end = Standard(context, server=False, session=session), Library(server, server=True)
    join(client, end)
    assert kept.established
    return client, end


@pytest.mark.parametrize("option", [0, SSL.OP_NO_TICKET])
def test_a_lax_server_resumes(option: int) -> None:
    """The control: with either of two ways left open this very client does resume."""
    lax = lax_context(MINT.issue(SERVER), server=True)
    lax.set_options(option)
    client, _ = connect_twice(lax)
    assert client.object.session_reused


def test_our_server_does_a_full_handshake_each_time() -> None:
    """The session is not resumed, and the certificate is demanded and seen again."""
    client, server = connect_twice(server_context(MINT.issue(SERVER)))
    assert (client.error, server.error) == (None, None)
    assert not client.object.session_reused
    assert server.peer is not None
    assert pem(server.peer) == CERTIFICATE.chain[0]


def test_a_session_does_not_replace_the_certificate() -> None:
    """A client that comes back with its session and without its certificate is refused."""
    server, context = server_context(MINT.issue(SERVER)), lax_context(None)
    first = Library(context, server=False)
    show(first.connection, CERTIFICATE)
    join(first, Library(server, server=True))
    session = first.connection.get_session()
    assert session is not None
    client, end = Library(context, server=False), Library(server, server=True)
    client.connection.set_session(session)
    join(client, end)
    assert end.error == "peer did not return a certificate"
    assert not end.established
