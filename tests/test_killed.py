"""A writer that is killed at any moment leaves the state as it was before the call, or after it, and nothing else.

All of it: ``PYSKL_TEST_WHOLE=1 ./ci/test tests/test_killed.py``, 1,000 kills.
"""

import contextlib
import ipaddress
import json
import os
import random
import signal
import socket
import sys

import pytest
import support

import pyskl
from pyskl import Dispatcher

pytestmark = [support.needs("sk_lookup"), pytest.mark.slow]
KILLS = 1000 if "PYSKL_TEST_WHOLE" in os.environ else 25

LABELS = 8  # of which the writer uses three

# What it says before and after each call is the state as it must be then.
WRITER = """if True:
    import json, os, random, socket, sys
    from pyskl import Binding, Dispatcher, Policy
    path, rnd, known = sys.argv[1], random.Random(int(sys.argv[2])), json.loads(sys.argv[3])
    servers = [socket.socket(fileno=int(fd)) for fd in sys.argv[4].split(",")]
    d = Dispatcher.open(path, timeout=60)
    bindings = {tuple(key): label for key, label in known["bindings"]}
    policies = {label: tuple(policy) for label, policy in known["policies"].items()}
    slots = dict(known["slots"])

    def say(done):
        told = {"bindings": sorted([list(key), label] for key, label in bindings.items()), "policies": policies}
        print(json.dumps({"done": done, **told, "slots": slots}), flush=True)

    say(True)
    while True:
        label = rnd.choice(["web", "api", "é"])
        prefix = rnd.choice(["192.0.2.0/24", "192.0.2.1/32", "2001:db8::/64", "0.0.0.0/0"])
        what = rnd.choice(["bind", "unbind", "replace", "policy", "register", "unregister", "upgrade", "policies"])
        call = d.upgrade
        if what == "bind":
            ports = rnd.sample(range(1, 2000), rnd.randint(1, 30))
            call = lambda: d.bind(label, "tcp", prefix, ports, replace=True)
            bindings.update(((prefix, port), label) for port in ports)
        elif what == "unbind":
            mine = [(place, owner) for place, owner in bindings.items() if place[0] == prefix and owner == label]
            if not mine:
                continue
            ports = [port for (_, port), _ in rnd.sample(mine, min(len(mine), 20))]
            call = lambda: d.unbind(label, "tcp", prefix, ports)
            for port in ports:
                del bindings[prefix, port]
        elif what in ("replace", "policies"):
            bindings = {(prefix, port): label for port in rnd.sample(range(1, 3000), 200)}
            table = [Binding(label, "tcp", prefix, port) for _, port in bindings]
            if what == "policies":
                policies = {label: (rnd.choice(["hold", "fallthrough"]), rnd.choice([0, 30]))}
                given = {name: Policy(*policy) for name, policy in policies.items()}
                call = lambda: d.replace(table, given)
            else:
                call = lambda: d.replace(table)
        elif what == "policy":
            word, sticky = rnd.choice(["reset", "hold", "fallthrough"]), rnd.choice([0, 30])
            call = lambda: d.set_policy(label, on_missing=word, udp_sticky=sticky)
            policies.pop(label, None)
            if (word, sticky) != ("reset", 0):
                policies[label] = word, sticky
        elif what == "register":
            slot, server = rnd.randrange(3), rnd.randrange(len(servers))
            call = lambda: d.register(label, servers[server], slot=slot)
            slots[f"{label} {slot}"] = server
        elif what == "unregister":
            mine = [key for key in slots if key.startswith(label)]
            if not mine:
                continue
            key = rnd.choice(mine)
            call = lambda: d.unregister(label, slot=int(key.split()[1]))
            del slots[key]
        say(False)
        call()
        say(True)
"""


def _told(d, cookies):
    bindings = sorted([[str(each.prefix), each.ports], each.label] for each in d.bindings())
    policies = {label: [policy.on_missing, policy.udp_sticky] for label, policy in d.policies().items()}
    slots = {f"{each.label} {each.slot}": cookies.index(each.cookie) for each in d.sockets() if each.alive}
    return {"bindings": bindings, "policies": policies, "slots": slots}


def _owner(bindings, host, port):
    """The prefix and label of what an address and port are bound to: the longest prefix that has them."""
    networks = {prefix: ipaddress.ip_network(prefix) for prefix in {prefix for (prefix, _), _ in bindings}}
    address = ipaddress.ip_address(host)
    having = [
        (networks[prefix].prefixlen, prefix, label)
        for (prefix, bound), label in bindings
        if bound == port and address.version == networks[prefix].version and address in networks[prefix]
    ]
    return max(having)[1:]


def _held(d):
    """What the kernel may hold for a dispatcher: what is open, and what that refers to."""
    maps = {number for program in d._store.programs.values() for number in program.info.map_ids}
    flows = d.maps["flows"]
    maps.update(flows[place] for place in range(d.maps["flows"].info.max_entries) if place in flows)
    return support.bpf_ids_of(os.getpid()) | {("map", number) for number in maps}


def _leaked(before, d):
    return support.bpf_ids() - before - _held(d) - support.strangers()


def _less_done(state):
    return {key: value for key, value in state.items() if key != "done"}


def test_whoever_is_killed_leaves_the_state_before_or_after_the_call(netns, bpffs):
    path, rnd = bpffs / "edge", random.Random(os.environ.get("PYSKL_TEST_SEED", "1"))
    with contextlib.ExitStack() as stack:
        stack.enter_context(netns.entered())
        servers = [stack.enter_context(socket.create_server(("", 0))) for _ in range(4)]
        cookies = [pyskl.socket_cookie(server) for server in servers]
        others = support.bpf_ids()
        stack.enter_context(Dispatcher.create(path=path, max_labels=LABELS, max_sockets=16)).close()
        stack.callback(Dispatcher.remove, path)
        known = {"bindings": [], "policies": {}, "slots": {}}
        calls = interrupted = 0
        for number in range(KILLS):
            fds = ",".join(str(server.fileno()) for server in servers)
            writer = support.child(
                WRITER, path, number, json.dumps(known), fds, pass_fds=[server.fileno() for server in servers]
            )
            lines = [writer.stdout.readline()]
            for _ in range(rnd.randrange(1, 40)):
                lines.append(writer.stdout.readline())
            assert lines[-1], "the writer failed"
            support.readable(writer.stdout, timeout=rnd.random() * 0.01)
            os.kill(writer.pid, signal.SIGKILL)
            lines += writer.stdout.read().splitlines(keepends=True)
            support.kill(writer)
            said = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be cut off
            calls += sum(state["done"] for state in said)
            before = next(_less_done(state) for state in reversed(said) if state["done"])
            after = _less_done(said[-1])
            interrupted += not said[-1]["done"]
            with Dispatcher.open(path, timeout=1) as d:
                known = _told(d, cookies)
                assert known in (before, after), (number, known, before, after)
                for (prefix, port), _ in known["bindings"][:: max(1, len(known["bindings"]) // 20)]:
                    host = prefix.partition("/")[0]
                    decision = d.explain("tcp", (host, port))
                    assert decision.binding.ports == port
                    assert (str(decision.binding.prefix), decision.label) == _owner(known["bindings"], host, port)
                    reachable = {key for key in known["slots"] if key.split()[0] == decision.label}
                    if reachable and ":" not in host:
                        server = known["slots"][f"{decision.label} {decision.slot}"]
                        assert (decision.reason, decision.cookie) == ("selected", cookies[server])
                    else:
                        word, _ = known["policies"].get(decision.label, ("reset", 0))
                        assert (decision.reason, decision.cookie) == (word, 0)
                pins = {name for name in os.listdir(path) if not name.startswith("table_")}
                assert len([name for name in os.listdir(path) if name.startswith("table_")]) == 1
                assert not [name for name in pins if name.endswith("_new")]
                assert support.eventually(lambda: not _leaked(others, d)), _leaked(others, d)
            assert os.listdir(bpffs) == ["edge"]
            assert len(pyskl.query()) == 1
        with Dispatcher.open(path) as d:  # no number of a label, no group and no slot is lost
            d.replace([], {})
            for label in {each.label for each in d.sockets()}:
                d.unregister(label)
            for number in range(LABELS):
                d.bind(f"new {number}", "tcp", "192.0.2.0/24", number + 1)
                d.register(f"new {number}", servers[0])
            with pytest.raises(pyskl.LimitReached):
                d.bind("one too many", "tcp", "192.0.2.0/24", 80)
        assert calls > KILLS * 5
        print(f"{KILLS} kills, {interrupted} within a call, {calls} calls", file=sys.stderr)


MAKER = """if True:
    import sys
    from pyskl import Dispatcher
    while True:
        print("create", flush=True)
        d = Dispatcher.create(path=sys.argv[1], max_labels=8, max_sockets=8)
        d.bind("web", "tcp", "192.0.2.0/24", 80)
        print("unload", flush=True)
        d.unload()
"""


def test_whoever_is_killed_while_it_makes_or_removes_one(netns, bpffs):
    path, rnd, before = bpffs / "edge", random.Random(os.environ.get("PYSKL_TEST_SEED", "1")), support.bpf_ids()
    with netns.entered():
        for _ in range(KILLS):
            maker = support.child(MAKER, path)
            for _ in range(rnd.randrange(1, 4)):
                assert maker.stdout.readline()
            support.readable(maker.stdout, timeout=rnd.random() * 0.05)
            support.kill(maker)
            try:
                with Dispatcher.open(path) as d:
                    assert d.status().attached
                    assert len(d.bindings()) in (0, 1)
                    assert support.eventually(lambda: not _leaked(before, d)), _leaked(before, d)
                    d.unload()
            except pyskl.NotLoaded:
                pass
            assert os.listdir(bpffs) == []
            assert support.eventually(lambda: pyskl.query() == ())
            assert support.eventually(lambda: not support.bpf_ids() - before - support.strangers())
