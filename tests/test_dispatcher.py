"""A dispatcher in one process, on real traffic: bindings, sockets of every kind, slots, policies, limits."""

import contextlib
import gc
import json
import mmap
import os
import socket
import sys
import threading
import warnings
from collections import Counter

import pytest
import support
from support import TIMEOUT

import pyskl
from pyskl import Binding, Dispatcher

pytestmark = [support.needs("sk_lookup"), pytest.mark.slow]
WHOLE = "PYSKL_TEST_WHOLE" in os.environ


@pytest.fixture
def d(netns):
    with netns.entered(), Dispatcher.create() as dispatcher:
        yield dispatcher


@pytest.fixture
def keep():
    with contextlib.ExitStack() as stack:
        yield stack.enter_context


def listener(family=socket.AF_INET, **how):
    return socket.create_server(("", 0), family=family, **how)


def udp(family=socket.AF_INET, host=""):
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.bind((host, 0))
    sock.settimeout(TIMEOUT)
    return sock


def connect(host, port=80):
    return socket.create_connection((host, port), TIMEOUT)


def serves(sock, host, port=80):
    """Whether a listener gets a connection to an address."""
    with connect(host, port):
        if not support.readable(sock):
            return False
        with sock.accept()[0] as accepted:
            return accepted.getsockname()[1] == port


def state(d):
    return list(d.bindings()), d.policies(), d.sockets()


# -- bindings --------------------------------------------------------------------------------------------------------


def test_bind_gives_the_bindings_by_precedence_and_once_more_changes_nothing(d):
    made = d.bind("web", "tcp", "192.0.2.0/24", ["1-65535", 80, range(100, 200)])
    assert made == (
        Binding("web", "tcp", "192.0.2.0/24", 80),
        Binding("web", "tcp", "192.0.2.0/24", "100-199"),
        Binding("web", "tcp", "192.0.2.0/24", "1-65535"),
    )
    assert d.bind("web", "tcp", "192.0.2.0/24", 80) == made[:1]
    assert d.bindings() == made == tuple(d.bindings())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("web", "tcp", "192.0.2.1/24"), ValueError),
        (("web", "sctp", "192.0.2.0/24"), ValueError),
        (("", "tcp", "192.0.2.0/24"), ValueError),
        (("a\tb", "tcp", "192.0.2.0/24"), ValueError),
        (("x" * 256, "tcp", "192.0.2.0/24"), ValueError),
        ((5, "tcp", "192.0.2.0/24"), TypeError),
        (("web", "tcp", "192.0.2.0/24", [80, 65536]), ValueError),
        (("web", "tcp", "192.0.2.0/24", [80, "x"]), ValueError),
        (("web", "tcp", "192.0.2.0/24", [80, None, 0]), ValueError),
        (("web", "tcp", "192.0.2.0/24", [80, 81.5]), TypeError),
        (("web", "tcp", "192.0.2.0/24", []), ValueError),
        (("web", "tcp", "192.0.2.0/24", [7, "50-150"]), pyskl.BindingConflict),
        (("web", "tcp", "192.0.2.0/24", [7, "1-100"]), pyskl.BindingConflict),
        (("old", "tcp", "192.0.2.0/24", ["1-5", "5-9"]), pyskl.BindingConflict),
    ],
)
def test_a_bad_element_anywhere_in_bind_changes_nothing(d, arguments, error):
    d.bind("old", "tcp", "192.0.2.0/24", "1-100")
    before = state(d)
    with pytest.raises(error):
        d.bind(*arguments)
    assert state(d) == before


def test_a_conflict_names_both(d):
    d.bind("old", "tcp", "192.0.2.0/24", "1-100")
    with pytest.raises(pyskl.BindingConflict, match=r"new.*old|old.*new") as caught:
        d.bind("new", "tcp", "192.0.2.0/24", "50-150")
    assert set(caught.value.bindings) == {
        Binding("old", "tcp", "192.0.2.0/24", "1-100"),
        Binding("new", "tcp", "192.0.2.0/24", "50-150"),
    }


def test_what_another_label_has_moves_over_with_replace(d):
    d.bind("old", "tcp", "192.0.2.0/24", [80, 81])
    assert d.bind("new", "tcp", "192.0.2.0/24", 80, replace=True) == (Binding("new", "tcp", "192.0.2.0/24", 80),)
    assert set(d.bindings()) == {Binding("new", "tcp", "192.0.2.0/24", 80), Binding("old", "tcp", "192.0.2.0/24", 81)}


def test_unbind_says_whose_it_is(d):
    d.bind("web", "tcp", "192.0.2.0/24", [80, 81])
    with pytest.raises(KeyError, match="web"):
        d.unbind("api", "tcp", "192.0.2.0/24", 80)
    with pytest.raises(KeyError, match="not bound"):
        d.unbind("web", "tcp", "192.0.2.0/24", [80, 82])
    with pytest.raises(KeyError):
        d.unbind("web", "udp", "192.0.2.0/24", 80)
    assert len(d.bindings()) == 2
    d.unbind("web", "tcp", "192.0.2.0/24", [80, 81])
    assert d.bindings() == ()


@pytest.mark.parametrize("place", [0, 250, 500])
@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (None, TypeError),
        ("web tcp 192.0.2.0/24 80", TypeError),
        (Binding("b", "tcp", "192.0.2.7"), pyskl.BindingConflict),
        (Binding("a", "tcp", "192.0.2.7", "5-9"), None),
    ],
)
def test_a_bad_element_anywhere_in_replace_changes_nothing(d, place, bad, error):
    d.bind("old", "udp", "::/0")
    before = state(d)
    wanted = [Binding("a", "tcp", f"192.0.2.{n % 256}", None if n < 256 else 5000 + n) for n in range(500)]
    wanted.insert(place, bad)
    if error is None:
        assert d.diff(wanted).unchanged == 0
        assert state(d) == before
        assert d.replace(wanted).removed == before[0]
        return
    for call in (d.replace, d.diff):
        with pytest.raises(error, match=f"element {place} " if error is TypeError else None) as caught:
            call(wanted)
        if error is pyskl.BindingConflict:
            assert set(caught.value.bindings) == {bad, Binding("a", "tcp", "192.0.2.7")}
        assert state(d) == before


def test_replace_tells_what_it_changes_and_diff_what_it_would(d):
    kept, gone, new = (Binding("a", "tcp", "192.0.2.0/24", port) for port in (1, 2, 3))
    d.replace([kept, gone, kept])
    would = d.diff([new, kept])
    assert would == d.replace(iter([new, kept])) == ((new,), (gone,), 1)
    assert d.replace(d.bindings()) == ((), (), 2)


def test_policies_are_replaced_with_the_bindings_where_they_are_given(d):
    d.set_policy("a", on_missing="hold", udp_sticky=5)
    d.replace([Binding("a", "tcp", "::/0")])
    assert d.policies() == {"a": pyskl.Policy("hold", 5)}
    d.replace([Binding("a", "tcp", "::/0")], {"b": pyskl.Policy("fallthrough")})
    assert d.policies() == {"b": pyskl.Policy("fallthrough", 0)}
    with pytest.raises(ValueError):
        d.set_policy("a", on_missing="drop")
    for bad in (-1, 1 << 32):
        with pytest.raises(ValueError):
            d.set_policy("a", udp_sticky=bad)
    for bad in ({"udp_sticky": 1.5}, {"on_missing": 0}):
        with pytest.raises(TypeError):
            d.set_policy("a", **bad)
    assert d.policies() == {"b": pyskl.Policy("fallthrough", 0)}


# -- sockets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tcp", "udp"])
@pytest.mark.parametrize("family", ["v4", "v6", "dual"])
def test_every_good_socket(d, keep, kind, family):
    d.bind("a", kind, "192.0.2.0/24")
    d.bind("a", kind, "2001:db8::/64")
    of = socket.AF_INET if family == "v4" else socket.AF_INET6
    sock = keep(socket.socket(of, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM))
    if of == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, family == "v6")
    sock.bind(("", 0))
    if kind == "tcp":
        sock.listen()
    told = d.register("a", sock)
    assert told == ("a", pyskl.Protocol[kind.upper()], of, 0, pyskl.socket_cookie(sock), sock.getsockname(), True)
    assert d.sockets() == d.sockets("a") == (told,)
    for host, right in (("192.0.2.9", family != "v6"), ("2001:db8::9", family != "v4")):
        decision = d.explain(kind, (host, 443))
        assert (decision.cookie, decision.reason) == ((told.cookie, "selected") if right else (0, "reset"))
        if not right:
            continue
        if kind == "tcp":
            assert serves(sock, host, 443)
        else:
            with socket.socket(support.family_of(host), socket.SOCK_DGRAM) as client:
                client.sendto(b"?", (host, 443))
                sock.settimeout(TIMEOUT)
                assert sock.recv(9) == b"?"


def _not_listening(keep):
    sock = keep(socket.socket())
    sock.bind(("", 0))
    return sock


def _shut_down(keep):
    sock = keep(listener())
    sock.shutdown(socket.SHUT_RDWR)
    return sock


def _udp_shut_down(keep):
    sock = keep(udp())
    with contextlib.suppress(OSError):  # ENOTCONN, and done all the same
        sock.shutdown(socket.SHUT_RDWR)
    return sock


def _connected_udp(keep):
    sock = keep(udp())
    sock.connect(("127.0.0.1", 9))
    return sock


def _established(keep):
    server = keep(listener())
    return keep(connect("127.0.0.1", server.getsockname()[1]))


def _elsewhere(keep):
    with keep(pyskl.NetNS.create()).entered():
        return keep(listener())


def _mptcp(keep):
    try:
        sock = keep(socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262))
    except OSError:
        pytest.skip("mptcp: this kernel has none")
    sock.bind(("", 0))
    sock.listen()
    return sock


def _pipe(keep):
    ends = os.pipe()
    keep(contextlib.closing(open(ends[0], "rb")))
    keep(contextlib.closing(open(ends[1], "wb")))
    return ends[0]


def _closed(keep):
    sock = socket.socket()
    sock.close()
    return sock


BAD = {
    "a TCP socket that does not listen": (_not_listening, "listen"),
    "a listener that was shut down": (_shut_down, "shut down"),
    "a UDP socket that was shut down": (_udp_shut_down, "shut down"),
    "UDP that is not bound": (lambda keep: keep(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)), "not bound"),
    "UDP that is connected": (_connected_udp, "connected"),
    "established TCP": (_established, "listen"),
    "another namespace": (_elsewhere, "namespace"),
    "MPTCP": (_mptcp, "MPTCP"),
    "raw": (lambda keep: keep(socket.socket(socket.AF_INET, socket.SOCK_RAW, 253)), "raw"),
    "unix": (lambda keep: keep(socket.socketpair()[0]), "family"),
    "a pipe": (_pipe, "not a socket"),
    "closed": (_closed, "closed"),
    "fd -1": (lambda keep: -1, "closed"),
    "an fd that is not open": (lambda keep: 99999, "not open"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore:unclosed <socket.socket:ResourceWarning")
def test_every_bad_socket(d, keep, name):
    make, reason = BAD[name]
    before = state(d)
    with pytest.raises(pyskl.BadSocket, match=reason) as caught:
        d.register("a", make(keep))
    assert reason in caught.value.reason
    assert isinstance(caught.value, ValueError)
    assert state(d) == before


@pytest.mark.parametrize("slot", [-1, 64])
def test_a_slot_that_there_is_not(d, keep, slot):
    with pytest.raises(ValueError, match="slot"):
        d.register("a", keep(listener()), slot=slot)


def test_the_dead_are_told(d, keep):
    d.bind("a", "tcp", "192.0.2.0/24")
    closed, shut, alive = keep(listener()), keep(listener()), keep(listener())
    told = [d.register("a", sock, slot=slot) for slot, sock in enumerate((closed, shut, alive))]
    closed.close()
    shut.shutdown(socket.SHUT_RDWR)
    assert [each.alive for each in d.sockets()] == [False, False, True]
    assert [each.cookie for each in d.sockets()] == [each.cookie for each in told]
    assert (d.status().sockets, d.status().dead, d.status().unserved) == (1, 2, ())
    assert {d.explain("tcp", ("192.0.2.1", port)).slot for port in range(1, 200)} == {2}
    d.unregister("a", slot=2)
    assert d.status().unserved == ("a",)


@pytest.mark.parametrize(
    ("slot", "error"), [(64, ValueError), (-1, ValueError), (1.5, TypeError), ("1", TypeError), (None, TypeError)]
)
def test_what_is_no_slot_changes_nothing(d, keep, slot, error):
    with pytest.raises(error):
        d.register("a", keep(listener()), slot=slot)
    assert (d.sockets(), d.counters()) == ((), {})


def test_unregister_takes_what_is_named_and_nothing_else(d, keep):
    for slot in (0, 5):
        for sock in (listener(), listener(socket.AF_INET6), udp()):
            d.register("a", keep(sock), slot=slot)
    with pytest.raises(KeyError):
        d.unregister("b")
    with pytest.raises(KeyError):
        d.unregister("a", protocol="udp", family="ipv6")
    assert len(d.unregister("a", protocol="udp")) == 2
    assert len(d.unregister("a", family="ipv6", slot=5)) == 1
    assert {(each.family, each.slot) for each in d.sockets()} == {(2, 0), (2, 5), (10, 0)}
    assert len(d.unregister("a")) == 3
    assert d.sockets() == ()


def test_a_socket_in_the_place_of_another_loses_nobody(d, keep):
    d.bind("a", "tcp", "192.0.2.0/24")
    first = keep(listener())
    d.register("a", first)
    waiting = keep(connect("192.0.2.1"))
    second = keep(listener())
    d.register("a", second)
    assert serves(second, "192.0.2.2")
    with first.accept()[0] as accepted:
        waiting.send(b"x")
        assert accepted.recv(1) == b"x"


def test_a_socket_of_another_process_is_registered_as_it_is(d, netns):
    d.bind("a", "tcp", "192.0.2.0/24")
    code = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); input()"
    process = support.child(code, ns=netns)
    try:
        port = int(process.stdout.readline())
        told = d.register_pid("a", process.pid, "tcp", "127.0.0.1", port)
        assert told.alive
        assert told.address == ("127.0.0.1", port)
        with connect("192.0.2.1"):
            pass
        with pytest.raises(pyskl.BadSocket, match="no UDP socket"):
            d.register_pid("a", process.pid, "udp", "127.0.0.1", port)
    finally:
        support.kill(process)
    assert not d.sockets()[0].alive  # it was theirs alone
    with pytest.raises(ProcessLookupError):
        d.register_pid("a", process.pid, "tcp", "127.0.0.1", port)


# -- slots -----------------------------------------------------------------------------------------------------------


def _flows(d, count):
    """The slot of each of so many flows."""
    ask = d._store.program("explain").test_run  # as explain() does, less what it tells of it
    answer = d.maps["explained"]
    slots = []
    for number in range(count):
        ask("udp", ("192.0.2.1", 53), (f"198.51.100.{number % 200}", 1024 + number // 200))
        slots.append(int.from_bytes(answer[0][12:16], sys.byteorder, signed=True))
    return slots


@pytest.mark.parametrize("slots", [4, 64])
def test_flows_are_spread_evenly_and_only_a_share_moves(d, keep, slots):
    flows = 100_000 if WHOLE else 20_000
    d.bind("a", "udp", "192.0.2.0/24")
    socks = [keep(udp()) for _ in range(slots)]
    for slot, sock in enumerate(socks):
        d.register("a", sock, slot=slot)
    before = _flows(d, flows)
    counted = Counter(before)
    assert len(counted) == slots
    noise = 0 if WHOLE or slots == 4 else 0.15  # of so few flows for each
    assert max(counted.values()) <= (1.1 + noise) * flows / slots
    d.unregister("a", slot=1)
    after = _flows(d, flows)
    assert [new for old, new in zip(before, after, strict=True) if old != 1] == [old for old in before if old != 1]
    assert 1 not in after
    d.register("a", socks[1], slot=1)
    assert _flows(d, flows) == before
    moved = counted[1] / (flows / slots)
    assert abs(moved - 1) <= 0.1 + noise
    socks[1].close()  # as if it was unregistered
    assert _flows(d, flows // 8) == after[: flows // 8]


# -- SO_REUSEPORT ----------------------------------------------------------------------------------------------------


def _member(address=("127.0.0.1", 0)):
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(address)
    sock.listen()
    return sock


def test_a_reuseport_group_is_spread_over_and_outlives_its_member(d, keep):
    d.bind("a", "tcp", "192.0.2.0/24")
    first = keep(_member())
    others = [keep(_member(first.getsockname())) for _ in range(2)]
    d.register("a", first)
    assert d.explain("tcp", ("192.0.2.1", 80)).cookie == pyskl.socket_cookie(first)
    got = Counter()
    for number in range(60):
        with connect(f"192.0.2.{number}"):
            (ready,) = support.readable(first, *others)
            ready.accept()[0].close()
            got[ready] += 1
    assert len(got) == 3
    first.close()
    assert d.explain("tcp", ("192.0.2.1", 80)).reason == "sibling"
    for number in range(20):
        with connect(f"192.0.2.{number}"):
            (ready,) = support.readable(*others)
            ready.accept()[0].close()


def test_a_sibling_in_another_process(d, keep, netns):
    d.bind("a", "tcp", "192.0.2.0/24")
    first = keep(_member())
    code = """if True:
        import socket, sys
        s = socket.socket()
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        s.bind(("127.0.0.1", int(sys.argv[1])))
        s.listen()
        print("ready", flush=True)
        input()"""
    process = support.child(code, first.getsockname()[1], ns=netns)
    try:
        process.stdout.readline()
        d.register("a", first)
        first.close()
        for number in range(20):
            connect(f"192.0.2.{number}").close()
    finally:
        support.kill(process)
    with pytest.raises(ConnectionRefusedError):
        connect("192.0.2.1")


def test_who_is_replaced_takes_its_siblings_along(d, keep):
    d.bind("a", "tcp", "192.0.2.0/24")
    first = keep(_member())
    sibling = keep(_member(first.getsockname()))
    for _ in range(70):  # more often than a group has room for siblings
        d.register("a", first)
    d.register("a", sibling)
    sibling.close()
    assert d.explain("tcp", ("192.0.2.1", 80))[4:] == (pyskl.socket_cookie(first), "sibling")
    with socket.create_server(("", 0)) as other:
        d.register("a", other)
    assert d.explain("tcp", ("192.0.2.1", 80)).reason == "reset"
    with pytest.raises(ConnectionRefusedError):
        connect("192.0.2.1")


# -- policies --------------------------------------------------------------------------------------------------------


def test_reset_refuses_at_once_and_fallthrough_goes_on(d, keep):
    d.bind("a", "tcp", "192.0.2.0/24")
    ordinary = keep(socket.create_server(("", 8080)))
    with pytest.raises(ConnectionRefusedError):
        connect("192.0.2.1", 8080)
    d.set_policy("a", on_missing="fallthrough")
    assert serves(ordinary, "192.0.2.1", 8080)
    assert d.explain("tcp", ("192.0.2.1", 8080)).reason == "fallthrough"


@pytest.mark.parametrize(("host", "family"), [("192.0.2.1", socket.AF_INET), ("2001:db8::1", socket.AF_INET6)])
def test_hold_makes_clients_wait_until_there_is_a_socket(d, keep, host, family):
    d.bind("a", "tcp", "0.0.0.0/0" if family == socket.AF_INET else "::/0", 80)
    d.set_policy("a", on_missing="hold")
    assert d.status().keepers == 1
    assert d.explain("tcp", (host, 80)).reason == "hold"
    client = keep(socket.socket(family))
    client.setblocking(False)
    assert client.connect_ex((host, 80)) == 115  # EINPROGRESS
    assert support.eventually(lambda: d.counters()["a"].missed == 1)
    server = keep(listener(family))
    d.register("a", server)
    assert support.readable(server)  # the SYN that came again
    server.accept()[0].close()
    assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


# -- replace() under load --------------------------------------------------------------------------------------------


_ASKER = """if True:
    import collections, json, mmap, random, socket, struct, sys
    protocol, number, fd = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    shared = memoryview(mmap.mmap(fd, 64)).cast("Q")  # steps, whether to stop, and how many each asker has asked
    kind = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}[protocol]
    table, outcomes = 0, collections.Counter()  # the oldest table that, by all that was seen, can be in force
    while not shared[1]:
        table = max(table, shared[0] // 2)
        try:
            with socket.socket(socket.AF_INET, kind) as client:
                client.settimeout(5)
                address = f"192.0.2.{random.randrange(250)}", random.randrange(80, 100)
                if protocol == "tcp":  # closed by RST: no TIME_WAIT, which would use up the ports
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    client.connect(address)
                else:
                    client.sendto(b"?", address)
                answer = client.recv(9).decode()
        except OSError as error:
            answer = repr(error)
        outcomes[answer] += 1
        if answer in {"0", "1"}:
            table += (int(answer) - table) % 2
            if table > (shared[0] + 1) // 2:
                outcomes["of an older table than was seen before"] += 1
                table -= 2
        shared[number] += 1
    print(json.dumps(outcomes))"""


def test_nobody_sees_a_mixture_while_all_bindings_are_replaced(d, netns, keep):
    """Two tables of 10,000, in which every address leads to label 0, or every one to label 1.

    The number of a table's label is that of the table, modulo 2. Step 2n: table n is in force; 2n + 1: it is being
    replaced by the next one. Whoever asks knows from the steps before and after, and from all earlier answers, which
    tables can have answered: never an older one than before, nor one that was replaced, nor one that is still to come.
    """
    flips = 1000 if WHOLE else 30
    places = [(protocol, host, port) for protocol in ("tcp", "udp") for host in range(250) for port in range(80, 100)]
    tables = [[Binding(label, protocol, f"192.0.2.{host}", port) for protocol, host, port in places] for label in "01"]
    fd = os.memfd_create("steps")
    keep(contextlib.closing(open(fd, "wb", buffering=0))).truncate(64)
    shared = keep(keep(memoryview(keep(contextlib.closing(mmap.mmap(fd, 64))))).cast("Q"))
    for protocol in ("tcp", "udp"):
        for label in "01":
            sock = keep(support.server(netns, protocol, "0.0.0.0"))
            keep(support.answering(sock, label))
            d.register(label, sock)
    d.replace(tables[0])
    askers = []
    for number, protocol in enumerate(("tcp", "udp", "tcp"), 2):
        askers.append(support.child(_ASKER, protocol, number, fd, ns=netns, pass_fds=[fd]))
        keep(contextlib.ExitStack()).callback(support.kill, askers[-1])
    for flip in range(1, flips + 1):
        before = list(shared[2:5])
        assert support.eventually(lambda before=before: all(map(int.__lt__, before, shared[2:5])), 6 * TIMEOUT)
        shared[0] += 1
        assert d.replace(tables[flip % 2])[2] == 0
        shared[0] += 1
    shared[1] = 1
    for asker in askers:
        outcomes = json.loads(asker.communicate(timeout=60)[0])
        if WHOLE:
            print(asker.args[-3], outcomes)
        assert outcomes.keys() == {"0", "1"}, outcomes


# -- what it tells ---------------------------------------------------------------------------------------------------


def test_counters_count_each_look_up_once(d, keep):
    d.bind("a", "tcp", "192.0.2.0/24")
    with pytest.raises(ConnectionRefusedError):
        connect("192.0.2.1")
    server = keep(listener())
    d.register("a", server)
    for _ in range(5):
        assert serves(server, "192.0.2.1")
    d.explain("tcp", ("192.0.2.1", 80))
    counters = d.counters()["a"]
    assert (counters.selected, counters.missed) == (5, 1)
    assert counters.by[pyskl.Protocol.TCP, socket.AF_INET] == (5, 1)
    assert sum(map(sum, counters.by.values())) == 6


def test_explain_tells_the_binding_that_wins(d):
    wide = d.bind("a", "tcp", "192.0.2.0/24")[0]
    ports = d.bind("b", "tcp", "192.0.2.0/24", "1-100")[0]
    longer = d.bind("c", "tcp", "192.0.2.0/25", 7)[0]
    for (host, port), binding in {
        ("192.0.2.1", 7): longer,
        ("192.0.2.1", 8): ports,
        ("192.0.2.200", 7): ports,
        ("192.0.2.1", 101): wide,
        ("192.0.3.1", 7): None,
    }.items():
        decision = d.explain("tcp", (host, port))
        assert decision.binding == binding
        assert decision.label == (binding and binding.label)
        assert decision.reason == ("reset" if binding else "unbound")
        assert decision.verdict == (pyskl.Verdict.DROP if binding else pyskl.Verdict.PASS)
    assert d.explain("udp", ("192.0.2.1", 7)).binding is None
    with pytest.raises(ValueError):
        d.explain("tcp", ("192.0.2.1", 7), ("::1", 7))


def test_explain_tells_the_socket_that_a_flow_stays_with_and_makes_no_flow(d, keep):
    d.bind("a", "udp", "192.0.2.0/24")
    d.set_policy("a", udp_sticky=60)
    first, second = keep(udp()), keep(udp())
    d.register("a", first)
    client = keep(udp(host="192.0.2.7"))
    asked = ("192.0.2.1", 53), client.getsockname()
    assert d.explain("udp", *asked).reason == "selected"
    d.register("a", second)
    assert d.explain("udp", *asked)[3:] == (0, pyskl.socket_cookie(second), "selected")  # no flow was made
    client.sendto(b"?", asked[0])
    assert second.recv(9) == b"?"
    d.register("a", first)
    assert d.explain("udp", *asked)[3:] == (None, pyskl.socket_cookie(second), "sticky")
    assert d.explain("udp", asked[0], ("192.0.2.8", 9)).cookie == pyskl.socket_cookie(first)
    second.close()
    assert d.explain("udp", *asked)[3:] == (0, pyskl.socket_cookie(first), "selected")


def test_events_tell_who_was_sent_where_and_cost_nothing_afterwards(d, keep):
    d.bind("a", "tcp", "192.0.2.0/24")
    d.bind("b", "tcp", "198.51.100.0/24")
    server = keep(listener())
    d.register("a", server)
    with d.events() as every, d.events("b") as of_b:
        with connect("192.0.2.1") as client:
            event = next(every)
            assert (event.source, event.destination) == (client.getsockname(), ("192.0.2.1", 80))
            assert (event.label, event.slot, event.reason) == ("a", 0, "selected")
        with pytest.raises(ConnectionRefusedError):
            connect("198.51.100.1")
        assert [(each.label, each.reason) for each in of_b.read(TIMEOUT)] == [("b", "reset")]
        with pytest.raises(KeyError):
            d.events("c")
    assert d._store.state[5] == 0
    with pytest.raises(ValueError):
        every.read()


# -- limits, life ----------------------------------------------------------------------------------------------------


def test_the_label_table_is_full(netns):
    with netns.entered(), Dispatcher.create(max_labels=3) as d:
        for label in "abc":
            d.bind(label, "tcp", "192.0.2.0/24", ord(label))
        before = state(d)
        for call in (
            lambda: d.bind("d", "tcp", "192.0.2.0/24", 1),
            lambda: d.set_policy("d", on_missing="hold"),
            lambda: d.replace([Binding(label, "tcp", "::/0", ord(label)) for label in "abcd"]),
        ):
            with pytest.raises(pyskl.LimitReached, match="max_labels"):
                call()
            assert state(d) == before


def test_labels_that_come_and_go_use_nothing_up(netns):
    with netns.entered(), Dispatcher.create(max_labels=5, max_sockets=4) as d, listener() as sock:
        for number in range(60):
            label = f"label {number}"
            d.bind(label, "tcp", "192.0.2.0/24", 80)
            d.register(label, sock)
            assert d.explain("tcp", ("192.0.2.1", 80)).label == label
            assert d.counters()[label].missed == 0
            with pytest.raises(ConnectionRefusedError):
                connect("192.0.2.1", 81)
            d.unregister(label)
            d.unbind(label, "tcp", "192.0.2.0/24", 80)


def test_the_sockets_are_full_and_the_dead_make_room(netns, keep):
    with netns.entered(), Dispatcher.create(max_sockets=2) as d:
        first, second, third = (keep(listener()) for _ in range(3))
        d.register("a", first)
        d.register("b", second)
        before = state(d)
        for label, slot in (("a", 1), ("c", 0)):
            with pytest.raises(pyskl.LimitReached, match="max_sockets"):
                d.register(label, third, slot=slot)
            assert state(d)[2] == before[2]
        d.register("a", third)  # in the place of the first
        second.close()
        d.register("c", first)
        assert {(each.label, each.alive) for each in d.sockets()} == {("a", True), ("c", True)}


def test_threads_change_it_at_once(d):
    failed = []

    def work(number):
        try:
            for port in range(1, 40):
                d.bind(f"label {number}", "tcp", "192.0.2.0/24", number * 100 + port)
                if port % 3 == 0:
                    d.unbind(f"label {number}", "tcp", "192.0.2.0/24", number * 100 + port)
                assert d.explain("tcp", ("192.0.2.1", number * 100 + 1)).label == f"label {number}"
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(d.bindings()) == 4 * 26


def test_after_close_everything_is_a_value_error(netns):
    with netns.entered():
        d = Dispatcher.create()
    d.close()
    d.close()
    for call in (d.bindings, d.status, d.sockets, d.counters, d.policies, d.fileno, d.upgrade, d.unload, d.events):
        with pytest.raises(ValueError, match="closed"):
            call()
    for call in (d.bind, d.unbind):
        with pytest.raises(ValueError, match="closed"):
            call("a", "tcp", "::/0")
    for call in (d.replace, d.diff):
        with pytest.raises(ValueError, match="closed"):
            call([])
    for call in (d.set_policy, d.unregister):
        with pytest.raises(ValueError, match="closed"):
            call("a")
    with pytest.raises(ValueError, match="closed"):
        d.explain("tcp", ("192.0.2.1", 80))
    with listener() as sock, pytest.raises(ValueError, match="closed Dispatcher"):
        d.register("a", sock)
    for name in ("program", "link", "maps", "path"):
        with pytest.raises(ValueError, match="closed"):
            getattr(d, name)
    with netns.entered():
        assert pyskl.query() == ()


def test_one_that_is_forgotten_warns_and_goes(netns):
    with netns.entered():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Dispatcher.create()
            gc.collect()
        assert [each.category for each in caught] == [ResourceWarning]
        assert support.eventually(lambda: pyskl.query() == ())


def test_upgrade_under_traffic(d, keep):
    d.bind("a", "tcp", "192.0.2.0/24")
    server = keep(listener())
    d.register("a", server)
    before = d.program.info.id
    for _ in range(3):
        d.upgrade()
        assert serves(server, "192.0.2.1")
    assert d.program.info.id == d.link.info.prog_id != before
    assert d.explain("tcp", ("192.0.2.1", 80)).cookie == pyskl.socket_cookie(server)


def test_many_changes_leave_memory_and_fds_as_they_were(d):
    def held():
        gc.collect()
        with open("/proc/self/statm") as memory:
            return len(os.listdir("/proc/self/fd")), int(memory.read().split()[1])

    table = [Binding("a", "tcp", f"192.0.2.{n}", port) for n in range(100) for port in range(1, 11)]

    def change(times):
        for number in range(times):
            d.bind("b", "udp", f"198.51.100.{number % 250}", 1 + number % 60000)
            d.unbind("b", "udp", f"198.51.100.{number % 250}", 1 + number % 60000)
            if number % 100 == 0:
                d.replace(table)

    change(300)
    fds, pages = held()
    change(10_000 if WHOLE else 1_500)
    now, grown = held()
    assert now == fds
    assert grown - pages < 1024  # 4 MiB
