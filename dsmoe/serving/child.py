"""A server as a child process: waits until it answers, passes signals on, leaves nothing behind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from types import FrameType

from dsmoe.errors import UserError

_SECONDS_TO_STOP = 30.0
_SECONDS_TO_TERMINATE = 5.0
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def check_port(host: str, port: int) -> None:
    """Refuse an address that can't be listened at, before an engine has loaded a model for it.

    Raises:
        UserError: it is in use, or no address of this machine.
    """
    if not 1 <= port <= 65535:
        raise UserError(f"--port is {port}; it must be from 1 to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: can't listen there ({error}); give others") from None


def url_of(host: str, port: int) -> str:
    """How this machine reaches a server that listens at host and port."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"


def run_server(command: Sequence[str], url: str, when_ready: Callable[[], None]) -> int:
    """Run a server until it ends; SIGINT, SIGTERM and SIGHUP end it.

    The child leads a session of its own: a Ctrl-C reaches it once, from here, and whatever processes it has started
    can be ended with it.

    Args:
        command: the command line.
        url: of the server; /health there answers 200 when it is ready.
        when_ready: called once it is.

    Returns:
        Its exit status; 128 + n where signal n ended it.
    """
    child = subprocess.Popen(command, start_new_session=True)
    stop = threading.Event()

    def pass_on(_number: int, _frame: FrameType | None) -> None:
        if not stop.is_set():
            stop.set()
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGINT)

    # one that is ignored, as nohup does, stays so
    heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in heard}
    try:
        status = _wait(child, f"{url}/health", when_ready, stop)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _end_group(child.pid)
    return 128 - status if status < 0 else status


def _wait(child: subprocess.Popen, health: str, when_ready: Callable[[], None], stop: threading.Event) -> int:
    ready = False
    while not stop.is_set():
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(0.5)
        if not ready and _answers(health):
            ready = True
            when_ready()
            sys.stdout.flush()
    end = time.monotonic() + _SECONDS_TO_STOP
    with contextlib.suppress(subprocess.TimeoutExpired):
        return child.wait(max(0.0, end - time.monotonic()))
    child.kill()
    return child.wait()


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=2) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False


def _end_group(leader: int) -> None:
    """End what the child has left running (an engine's own processes, if it was killed)."""
    end = time.monotonic() + _SECONDS_TO_TERMINATE
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGTERM)
        while time.monotonic() < end:
            time.sleep(0.1)
            os.killpg(leader, 0)
        os.killpg(leader, signal.SIGKILL)
