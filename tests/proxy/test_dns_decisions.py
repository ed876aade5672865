"""Who may ask the forwarder, whom it asks, and who has to go when there is no room."""

from __future__ import annotations

import pytest

from pyambient.proxy.dns.budget import Budget
from pyambient.proxy.dns.resolver import may_ask, refusal

OWN = ("10.77.0.2", "fd77::2", "fe80::1%2")


@pytest.mark.parametrize(
    "ip", ["10.77.0.2", "fd77::2", "fe80::1%2", "127.0.0.1", "127.5.6.7", "::1"]
)
def test_the_pod_itself_may_ask(ip):
    assert may_ask(ip, OWN)


@pytest.mark.parametrize("ip", ["10.77.0.3", "fd77::3", "fe80::1%3", "fe80::1", "0.0.0.0"])
def test_nobody_else_may(ip):
    assert not may_ask(ip, OWN)


@pytest.mark.parametrize("ip", ["10.96.0.10", "169.254.20.10", "fd00::a", "fe80::53%2", "8.8.8.8"])
def test_resolvers_elsewhere_are_asked(ip):
    assert refusal(ip, OWN) == ""


@pytest.mark.parametrize(
    "ip", [*OWN, "127.0.0.53", "::1", "0.0.0.0", "::", "224.0.0.251", "ff02::fb", "255.255.255.255"]
)
def test_the_pod_itself_and_what_is_nobodys_are_not(ip):
    assert refusal(ip, OWN)


class Query:
    """A query that notes when it is given up."""

    def __init__(self, share):
        self.share = share
        self.admitted = share.admit(self)
        self.dropped = False

    def drop(self):
        self.dropped = True
        self.share.release(self)


@pytest.fixture
def budget():
    return Budget(4)


def test_one_pod_may_use_all_of_it_and_no_more(budget):
    share = budget.share()
    budget.share()
    assert [Query(share).admitted for _ in range(5)] == [True] * 4 + [False]
    assert (budget.in_flight, share.dropped) == (4, 1)


def test_a_pod_with_less_displaces_the_oldest_of_the_greediest(budget):
    greedy, modest = budget.share(), budget.share()
    queries = [Query(greedy) for _ in range(4)]
    assert Query(modest).admitted
    assert Query(modest).admitted
    assert [query.dropped for query in queries] == [True, True, False, False]
    assert not Query(modest).admitted
    assert not Query(greedy).admitted
    assert (len(greedy), len(modest), greedy.dropped, modest.dropped) == (2, 2, 3, 1)


def test_pods_that_have_one_query_each_displace_nobody(budget):
    """Else they would take it from each other for ever, and no answer could arrive in time."""
    shares = [budget.share() for _ in range(5)]
    queries = [Query(share) for share in shares]
    assert [query.admitted for query in queries] == [True] * 4 + [False]
    assert not any(query.dropped for query in queries)


def test_what_is_over_makes_room_once(budget):
    share = budget.share()
    query = Query(share)
    share.release(query)
    share.release(query)
    assert budget.in_flight == 0


def test_a_pod_that_ends_gives_everything_back(budget):
    share = budget.share()
    queries = [Query(share) for _ in range(3)]
    share.close()
    assert all(query.dropped for query in queries)
    assert budget.in_flight == 0
    assert "0 pods" in repr(budget)
