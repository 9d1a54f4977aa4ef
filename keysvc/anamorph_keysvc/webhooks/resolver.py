"""The system's name service with a time limit, which it lacks."""

from __future__ import annotations

import queue
import socket
import threading

from anamorph_keysvc import deadline

_Answer = list[str] | OSError


class SystemResolver:
    """Looks names up within the deadline.

    The system's call cannot be interrupted, so each runs in a thread of its own, which
    the caller may leave behind; ``at_once`` bounds how many there are.

    Args:
        at_once: most look-ups under way.
        timeout_s: of one look-up, if the deadline is not earlier.
    """

    def __init__(self, *, at_once: int = 32, timeout_s: float = 5) -> None:
        self._room = threading.BoundedSemaphore(at_once)
        self._timeout_s = timeout_s

    def __call__(self, host: str, port: int) -> list[str]:
        """Addresses of a host, in the system's order.

        Raises:
            OSError: there are none, or they did not come in time.
            Unavailable: the deadline had passed before.
        """
        if not self._room.acquire(timeout=deadline.left(self._timeout_s)):
            raise TimeoutError("too many names are being looked up")
        answers: queue.Queue[_Answer] = queue.Queue(1)
        # A daemon: a name server that never answers must not keep the process from ending.
        threading.Thread(target=self._work, args=(host, port, answers), daemon=True).start()
        try:
            answer = answers.get(timeout=deadline.left(self._timeout_s))
        except queue.Empty:
            raise TimeoutError("the name service did not answer in time") from None
        if isinstance(answer, OSError):
            raise answer
        return answer

    def _work(self, host: str, port: int, answers: queue.Queue[_Answer]) -> None:
        try:
            answers.put(_look_up(host, port))
        finally:
            self._room.release()


def _look_up(host: str, port: int) -> _Answer:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:
        return OSError("not a name")
    except OSError as error:
        return error
    return [str(item[4][0]) for item in found]
