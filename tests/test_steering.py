"""steer(): the one-liner, over one dispatcher for each namespace of the process."""

import socket
import threading

import pytest
import support

import pyskl


def _listener(family=socket.AF_INET):
    return socket.create_server(("", 0), family=family)


def test_a_listener_serves_prefixes_and_ports_as_long_as_the_with(netns):
    with netns.entered(), _listener() as listener:
        with pyskl.steer(listener, "192.0.2.0/25", "198.51.100.7", ports=[80, "8000-8999"]) as registration:
            assert registration.cookie == pyskl.socket_cookie(listener)
            for destination in (("192.0.2.1", 80), ("192.0.2.127", 8999), ("198.51.100.7", 8000)):
                with socket.create_connection(destination, 5), listener.accept()[0] as accepted:
                    assert accepted.getsockname() == destination
            for refused in (("192.0.2.128", 80), ("192.0.2.1", 81)):
                with pytest.raises(ConnectionRefusedError):
                    socket.create_connection(refused, 5)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("192.0.2.1", 80), 5)
        assert pyskl.query() == ()


def test_udp_and_ipv6(netns):
    with netns.entered(), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as server:
        server.bind(("::1", 0))
        server.settimeout(5)
        with pyskl.steer(server, "2001:db8::/64"), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as client:
            client.sendto(b"hello", ("2001:db8::1:2", 9))
            assert server.recv(99) == b"hello"


def test_one_dispatcher_for_a_namespace_however_many_use_it(netns):
    with netns.entered(), _listener() as first, _listener() as second:
        with pyskl.steer(first, "192.0.2.1"):
            with pyskl.steer(second, "192.0.2.2", netns=netns):
                assert len(pyskl.query()) == 1
                for listener, host in ((first, "192.0.2.1"), (second, "192.0.2.2")):
                    with socket.create_connection((host, 80), 5), listener.accept()[0] as accepted:
                        assert accepted.getsockname() == (host, 80)
            assert len(pyskl.query()) == 1
        assert pyskl.query() == ()


def test_two_sockets_for_the_same_are_a_conflict_and_nothing_is_left_of_the_second(netns):
    with netns.entered(), _listener() as first, _listener() as second, pyskl.steer(first, "192.0.2.0/24", ports=80):
        with pytest.raises(pyskl.BindingConflict, match=r"192\.0\.2\.0/24 80"):
            with pyskl.steer(second, "198.51.100.0/24", "192.0.2.0/24", ports=80):
                pass
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("198.51.100.1", 80), 5)
        with socket.create_connection(("192.0.2.9", 80), 5), first.accept()[0]:
            pass


@pytest.mark.parametrize(
    ("arguments", "error"),
    [((), ValueError), (("192.0.2.1/24",), ValueError), ((5,), TypeError), (("192.0.2.0/24", "x"), ValueError)],
)
def test_bad_prefixes_leave_nothing(netns, arguments, error):
    with netns.entered(), _listener() as listener:
        with pytest.raises(error):
            with pyskl.steer(listener, *arguments):
                pass
        assert pyskl.query() == ()


def test_a_socket_that_does_not_listen(netns):
    with netns.entered(), socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        with pytest.raises(pyskl.BadSocket, match="listen") as caught:
            with pyskl.steer(sock, "192.0.2.0/24"):
                pass
        assert "listen" in caught.value.reason
        assert pyskl.query() == ()


def test_threads_come_and_go(netns):
    failed = []

    def use(number):
        try:
            with netns.entered(), _listener() as listener:
                for _ in range(20):
                    with pyskl.steer(listener, f"192.0.2.{number}"):
                        with socket.create_connection((f"192.0.2.{number}", 7), 5), listener.accept()[0]:
                            pass
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    with netns.entered():
        assert support.eventually(lambda: pyskl.query() == ())
