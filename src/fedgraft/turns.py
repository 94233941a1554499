"""Work in a thread of its own that runs only while somebody waits for it, so that many pieces of ordinary code go on in step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

Said = TypeVar("Said")
Heard = TypeVar("Heard")
Result = TypeVar("Result")


class Abandoned(BaseException):
    """The work is given up; raised where it waits."""


class Turns(Generic[Said, Heard, Result]):
    """One piece of work. It gets a function that hands a value over and returns, on its next turn, what was answered."""

    def __init__(self, work: Callable[[Callable[[Said], Heard]], Result], name: str) -> None:
        """Prepare it; `name` is the thread's."""
        self.said: Said | None = None
        """What it has handed over and waits for an answer to; None before its first turn and after its end."""
        self.error: BaseException | None = None
        self._work = work
        self._answers, self._words = SimpleQueue[tuple[Heard] | None](), SimpleQueue[tuple[Said] | None]()
        self._running = self._begun = self._ended = False
        self._result: list[Result] = []
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def go_on(self, heard: Heard) -> None:
        """Let it run with the answer (on its first turn it is not read) until it hands over again or ends.

        Raises:
            BaseException: whatever it raised.
        """
        self._hand_over((heard,))
        if self.error is not None:
            raise self.error

    def result(self) -> Result:
        """What it returned; it has ended."""
        return self._result[0]

    def leave(self) -> None:
        """End the thread, wherever it is."""
        if self._running:  # the caller was interrupted while it waited
            self._listen()
        while not self._ended:
            self._hand_over(None)
        self._thread.join()

    def _hand_over(self, answer: tuple[Heard] | None) -> None:
        self._running = True
        self.said = None
        self._answers.put(answer)
        self._listen()

    def _listen(self) -> None:
        word = self._words.get()
        self._running, self._ended = False, word is None
        self.said = None if word is None else word[0]

    def _run(self) -> None:
        try:
            self._wait()
            self._result.append(self._work(self._say))
        except BaseException as error:
            self.error = error
        self._words.put(None)

    def _say(self, word: Said) -> Heard:
        self._words.put((word,))
        del word  # what it holds may be large, and belongs to who listens
        return self._wait()

    def _wait(self) -> Heard:
        answer = self._answers.get()
        if answer is None:
            raise Abandoned
        return answer[0]
