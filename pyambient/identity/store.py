"""Certificates of the identities in use, kept fresh.

General theory of operation
---------------------------
Each identity has an entry and a task of its own under `run()`: it asks the authority, hands the
outcome to everyone who waits, and sleeps until the certificate's half-life or, after a failure,
for a backoff. That one task is the single flight: however many connections ask, the authority is
asked once, and a caller that is cancelled takes nothing from the others.

A failed renewal changes nothing as long as the certificate at hand is valid. Without a valid one
`get` fails at once with the reason, rather than let every connection of a pod pile up behind an
authority that is down.

Deadlines are of two kinds. A backoff is a span, by trio's clock. A certificate's validity is a
date, by the wall clock, which jumps when it is set and goes on when a machine sleeps; so it is
looked at again every few minutes instead of being slept off in one piece.

Renewal does not touch tunnels: a certificate is a value, TLS contexts are made from it, and a
live connection keeps the context it was made with.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

import trio

from pyambient.errors import PyambientError
from pyambient.model.spiffe import SpiffeId
from pyambient.observe.logs import get_logger

from .certificate import Authority, Certificate, IdentityError

FIRST_BACKOFF = 1.0
LAST_BACKOFF = 150.0
JITTER = 0.2
SIGN_TIMEOUT = 10.0
MAX_SIGNING = 8

_CLOCK_CHECK = 300.0
# Below this a certificate too short-lived to have a half-life ahead would be renewed in a spin.
_RENEWAL_PAUSE = 1.0

_log = get_logger("identity")


def _wall_clock() -> datetime:
    return datetime.now(UTC)


@dataclass(slots=True, eq=False)
class _Entry:
    identity: SpiffeId
    certificate: Certificate | None = None
    error: IdentityError | None = None
    failures: int = 0
    wanted: trio.Event = field(default_factory=trio.Event)
    attempted: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class CertificateStore:
    """One certificate per identity; `now` tells the wall-clock time, aware and in UTC."""

    def __init__(self, authority: Authority, now: Callable[[], datetime] = _wall_clock) -> None:
        self._authority = authority
        self._now = now
        self._entries: dict[SpiffeId, _Entry] = {}
        self._signing = trio.CapacityLimiter(MAX_SIGNING)
        self._nursery: trio.Nursery | None = None
        self._renewed: list[Callable[[Certificate], None]] = []

    def current(self, identity: SpiffeId) -> Certificate | None:
        """The certificate at hand if it is valid now; no waiting, nothing is started."""
        entry = self._entries.get(identity)
        return None if entry is None else self._valid(entry)

    async def get(self, identity: SpiffeId) -> Certificate:
        """A valid certificate, waiting for an attempt if need be; IdentityError if there is none.

        Needs `run()`: what is asked for before it starts is fetched when it does.
        """
        entry = self._entries.get(identity) or self._adopt(identity)
        if self._valid(entry) is None and entry.error is None:
            entry.wanted.set()
            await entry.attempted.wait()
        certificate = self._valid(entry)
        if certificate is not None:
            return certificate
        # One exception object raised in many tasks would collect all their tracebacks.
        error = entry.error or _expired(identity)
        raise IdentityError(error.what, error.then)

    def forget(self, identity: SpiffeId) -> None:
        """Stop renewing an identity that no pod has any more; connections keep what they hold."""
        entry = self._entries.pop(identity, None)
        if entry is None:
            return
        entry.scope.cancel()
        if entry.certificate is None:
            entry.error = IdentityError(f"{identity} was given up", "enrol a pod that has it")
        entry.attempted.set()

    def on_renewed(self, callback: Callable[[Certificate], None]) -> None:
        """Call `callback` with each certificate that replaces one; it must not raise or block."""
        self._renewed.append(callback)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Fetch and renew until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                for entry in self._entries.values():
                    self._start(nursery, entry)
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def _adopt(self, identity: SpiffeId) -> _Entry:
        entry = self._entries[identity] = _Entry(identity)
        if self._nursery is not None:
            self._start(self._nursery, entry)
        return entry

    def _start(self, nursery: trio.Nursery, entry: _Entry) -> None:
        entry.scope = trio.CancelScope()
        nursery.start_soon(self._keep, entry)

    def _valid(self, entry: _Entry) -> Certificate | None:
        held = entry.certificate
        return held if held is not None and held.valid_at(self._now()) else None

    async def _keep(self, entry: _Entry) -> None:
        with entry.scope:
            while True:
                certificate = await self._attempt(entry)
                if certificate is None:
                    await trio.sleep(self._backoff(entry))
                else:
                    await self._until_half_life(entry, certificate)

    async def _attempt(self, entry: _Entry) -> Certificate | None:
        certificate = None
        try:
            certificate = await self._sign(entry.identity)
        except Exception as error:  # noqa: BLE001 - a fault here is one identity's, not the node's
            self._failed(entry, _as_identity_error(entry.identity, error))
        else:
            self._succeeded(entry, certificate)
        entry.attempted.set()
        entry.wanted, entry.attempted = trio.Event(), trio.Event()
        return certificate

    async def _sign(self, identity: SpiffeId) -> Certificate:
        async with self._signing:
            with trio.move_on_after(SIGN_TIMEOUT):
                return await self._authority.sign(identity)
        raise IdentityError(
            f"the authority did not answer for {identity} within {SIGN_TIMEOUT:g} s",
            "check that it runs and can be reached",
        )

    def _succeeded(self, entry: _Entry, certificate: Certificate) -> None:
        former = entry.certificate
        entry.certificate = certificate
        entry.error = None
        entry.failures = 0
        if former is not None:
            _log.info("certificate renewed", identity=entry.identity)
            for callback in self._renewed:
                callback(certificate)

    def _failed(self, entry: _Entry, error: IdentityError) -> None:
        entry.error = error
        entry.failures += 1
        _log.warning(
            "no certificate" if self._valid(entry) is None else "certificate not renewed",
            identity=entry.identity,
            failures=entry.failures,
            error=str(error),
        )

    def _backoff(self, entry: _Entry) -> float:
        doubled = FIRST_BACKOFF * 2.0 ** min(entry.failures - 1, 16)
        jitter = random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 - spreads load, guards nothing
        delay = min(doubled, LAST_BACKOFF) * jitter
        if entry.certificate is not None:
            left = (entry.certificate.not_after - self._now()).total_seconds()
            if left > 0:
                return min(delay, left)
        return delay

    async def _until_half_life(self, entry: _Entry, certificate: Certificate) -> None:
        """Sleep; a caller who finds the certificate expired, after a suspend, ends it at once."""
        await trio.sleep(_RENEWAL_PAUSE)
        while (left := (certificate.renew_at - self._now()).total_seconds()) > 0:
            with trio.move_on_after(min(left, _CLOCK_CHECK)):
                await entry.wanted.wait()
                return

    def __repr__(self) -> str:
        valid = sum(self._valid(entry) is not None for entry in self._entries.values())
        return f"<CertificateStore {len(self._entries)} identities, {valid} with a certificate>"


def _as_identity_error(identity: SpiffeId, error: Exception) -> IdentityError:
    if isinstance(error, IdentityError):
        return error
    if isinstance(error, PyambientError):
        return IdentityError(f"no certificate for {identity}: {error.what}", error.then)
    reason = f"{type(error).__name__}: {error}"
    return IdentityError(
        f"no certificate for {identity}: the authority failed ({reason})", "check its log"
    )


def _expired(identity: SpiffeId) -> IdentityError:
    return IdentityError(
        f"the certificate for {identity} has expired", "check the clock and the authority"
    )
