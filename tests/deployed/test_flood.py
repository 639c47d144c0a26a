"""What somebody without a node key can do to the coordinator: take a place in a queue, and not its memory."""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import numpy as np
import psutil
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from gramfuse_deployment.nginx import ADDRESS_AT_ONCE, ALL_AT_ONCE, BODY_BYTES, HEADER_SECONDS, STALL_SECONDS
from gramfuse_deployment.processes import CHUNK_BYTES

MB = 2**20
PATH = "/v1/fleet/push-object"


def secured(deployment: Any, address: str = "127.0.0.1") -> ssl.SSLSocket:
    """Connect to the proxy from one of this machine's loopback addresses."""
    context = ssl.create_default_context(cafile=deployment.ca)
    plain = socket.create_connection(("127.0.0.1", deployment.port), 60, (address, 0))
    return context.wrap_socket(plain, server_hostname="localhost")


def post(deployment: Any, body: bytes, address: str = "127.0.0.1") -> int:
    """Send a body as a silo sends a piece, but for the signature; return the status."""
    connection = http.client.HTTPConnection("localhost", deployment.port)
    connection.sock = secured(deployment, address)
    with closing(connection):
        try:
            connection.request("POST", PATH, body, {"content-type": PROTOBUF_MEDIA_TYPE, "accept": PROTOBUF_MEDIA_TYPE})
        except (BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):  # it answers before it has read all
            return 413
        return connection.getresponse().status


def head(length: int) -> bytes:
    kind = f"Content-Type: {PROTOBUF_MEDIA_TYPE}\r\n"
    return f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\n{kind}Content-Length: {length}\r\n\r\n".encode()


def cut_off(connection: ssl.SSLSocket) -> bool:
    """Whether the proxy has hung up, with or without a last word."""
    try:
        return b"408" in (answer := connection.recv(4096)) or not answer
    except TimeoutError:
        return False
    except OSError:
        return True


@pytest.fixture
def superlink(coordinator: Any) -> psutil.Process:
    (started,) = coordinator.started
    process: psutil.Process = started.one("flower-superlink")
    return process


@contextmanager
def watched(process: psutil.Process) -> Iterator[Callable[[], int]]:
    """Yield a function that tells by how many bytes a process has grown at most since then."""
    before, seen, over = process.memory_info().rss, [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            seen.append(process.memory_info().rss - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: max(seen)
    finally:
        over.set()
        thread.join()


def passed_on(deployment: Any) -> int:
    """How many connections the proxy has to the SuperLink, in use or kept for the next request."""
    (started,), port = deployment.started, deployment.server_port()
    nginx = [process for process in started.processes() if "nginx" in process.name()]
    assert len(nginx) > 1
    found = [connection for process in nginx for connection in process.net_connections("tcp")]
    return len({connection.laddr for connection in found if connection.raddr and connection.raddr.port == port})


def together(*calls: Callable[[], int]) -> Counter[int]:
    """Make calls at the same time; count what they return."""
    answers: Counter[int] = Counter()
    threads = [threading.Thread(target=lambda call=call: answers.update([call()])) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_ten_big_posts_of_a_stranger_cost_no_memory(coordinator: Any, superlink: psutil.Process) -> None:
    # The SuperLink has a request in memory before it asks who sent it: ten of 62 MB took 0.8 to 1.4 GB.
    body = bytes(62 * MB)
    with watched(superlink) as grown:
        assert together(*[lambda: post(coordinator, body)] * 10) == {413: 10}
    assert grown() < 16 * MB


def test_a_silos_largest_request_passes_and_little_more() -> None:
    array = Array(np.random.default_rng(0).integers(0, 2**63, 2 * CHUNK_BYTES // 8, np.uint64))
    objects = get_all_nested_objects(RecordDict({"arrays": ArrayRecord({"buffer": array})}))
    largest = max(len(thing.deflate()) for thing in objects.values())
    request = PushObjectRequest(run_id=2**63, object_id="0" * 64, object_content=bytes(largest), session_id="0" * 64)
    assert CHUNK_BYTES < request.ByteSize() < BODY_BYTES < 1.25 * CHUNK_BYTES


def test_posts_that_just_fit_from_many_addresses_are_bounded_and_the_next_silo_is_served(
    coordinator: Any, superlink: psutil.Process
) -> None:
    # The stranger has eight addresses and sends what is allowed, again and again, all at the same time.
    body, over = bytes(BODY_BYTES), time.monotonic() + 5
    waits: list[float] = []

    def flood(address: str) -> int:
        while time.monotonic() < over:
            assert post(coordinator, body, address) in (400, 502, 503)
        return 0

    def silo() -> int:
        while time.monotonic() < over:
            begin = time.monotonic()
            assert post(coordinator, b"", "127.0.0.100") in (401, 502)  # 401: the SuperLink asks for a signature
            waits.append(time.monotonic() - begin)
        return 0

    strangers = [lambda address=f"127.0.0.{n}": flood(address) for n in range(2, 10) for _ in range(5)]
    with watched(superlink) as grown:
        together(silo, *strangers)
    print(f"\nthe SuperLink grew by {grown() / MB:.0f} MB; a silo waited {max(waits):.1f} s at most")
    assert grown() < 3 * ALL_AT_ONCE * BODY_BYTES
    assert max(waits) < 25  # seconds, while forty threads send all they can on the same cores


def test_a_slow_loris_is_cut_off_and_never_reaches_the_superlink(coordinator: Any) -> None:
    # It begins as many requests as it can and does not go on: a header without an end, a body without one.
    begin = time.monotonic()
    with ExitStack() as stack:
        headers = [stack.enter_context(secured(coordinator, "127.0.0.2")) for _ in range(40)]
        bodies = [stack.enter_context(secured(coordinator, "127.0.0.3")) for _ in range(ADDRESS_AT_ONCE)]
        for connection in headers:
            connection.sendall(head(100)[:-2])
        for connection in bodies:
            connection.sendall(head(BODY_BYTES) + bytes(MB))
        over = begin + HEADER_SECONDS - 1
        while passed_on(coordinator) and time.monotonic() < over:  # somebody else's last request is still open
            time.sleep(0.5)
        assert passed_on(coordinator) == 0
        assert post(coordinator, b"", "127.0.0.3") == 503  # its own address has no place left
        assert post(coordinator, b"", "127.0.0.4") == 401  # and any other has

        # A header has so long as a whole: a byte now and then helps it no further.
        while time.monotonic() < begin + HEADER_SECONDS + 2:
            for connection in headers[:5]:
                try:
                    connection.sendall(b"X")
                except OSError:
                    break
            time.sleep(1)
        for connection in headers:
            connection.settimeout(1)
        assert all(cut_off(connection) for connection in headers)
        for connection in bodies:
            connection.settimeout(STALL_SECONDS)
        assert all(cut_off(connection) for connection in bodies)
    assert time.monotonic() < begin + HEADER_SECONDS + STALL_SECONDS + 15
    assert post(coordinator, b"", "127.0.0.3") == 401


def test_a_body_that_drips_takes_its_own_addresss_places_only(coordinator: Any, superlink: psutil.Process) -> None:
    # The patient one sends a byte in time, for hours if need be; it never gets more than its address's places.
    with ExitStack() as stack, watched(superlink) as grown:
        dripping = [stack.enter_context(secured(coordinator, "127.0.0.5")) for _ in range(ADDRESS_AT_ONCE)]
        for connection in dripping:
            connection.sendall(head(BODY_BYTES))
        for _ in range(5):
            for connection in dripping:
                connection.sendall(b"\0")
            assert post(coordinator, b"", "127.0.0.5") == 503
            begin = time.monotonic()
            assert post(coordinator, b"", "127.0.0.6") == 401
            assert time.monotonic() - begin < 5
            time.sleep(0.5)
    assert grown() < 16 * MB


def test_a_line_of_2_megabytes_a_second_that_stops_for_a_while_is_served(coordinator: Any) -> None:
    # What the loris pretends to be: a chunk in small parts, 2 MB/s at most, and a line that is dead for 12 s.
    part = MB // 4
    with secured(coordinator, "127.0.0.8") as connection:
        connection.sendall(head(BODY_BYTES))
        for number in range(BODY_BYTES // part):
            connection.sendall(bytes(part))
            time.sleep(0.6 * STALL_SECONDS if number == 10 else part / 2e6)
        assert connection.recv(64).startswith(b"HTTP/1.1 400 ")  # it came whole, and zeros are no message


def test_many_calls_of_one_address_wait_for_their_turn(coordinator: Any) -> None:
    # A silo that uploads fast is slowed down and not refused; so nothing of it is lost.
    begin = time.monotonic()
    answers = together(*[lambda: post(coordinator, b"", "127.0.0.7")] * ADDRESS_AT_ONCE)
    assert answers == {401: ADDRESS_AT_ONCE}
    assert time.monotonic() - begin < 20
