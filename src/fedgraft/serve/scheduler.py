"""One thread that owns the model: requests wait in a queue, join the batch between its steps, and hear of their answers' texts."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fedgraft.serve.limits import Limits
from fedgraft.serve.metrics import Metrics
from fedgraft.serve.refusal import Refusal
from fedgraft.use.answer import Answer, Wish
from fedgraft.use.batch import Batch
from fedgraft.use.loaded import Loaded


@dataclass(frozen=True)
class Told:
    """What the asker of an answer hears: text that is new, at the end the answer, or that it failed."""

    text: str = ""
    answer: Answer | None = None
    failure: Refusal | None = None


@dataclass(eq=False)
class Job:
    """One answer that somebody waits for."""

    wish: Wish
    tell: Callable[[Told], None]
    """Called by the scheduler's thread."""
    streams: bool = False
    """Whether it hears of text before the end."""
    gone: bool = False
    """Set when nobody waits any more."""
    asked: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.answer = Answer(self.wish)


class Scheduler:
    """The queue and the batch. All methods may be called from any thread."""

    def __init__(self, loaded: Loaded, limits: Limits, metrics: Metrics) -> None:
        """Needs `start`. A forward shows here, and not once requests have come, whether the model runs."""
        self.loaded, self.limits, self.metrics = loaded, limits, metrics
        self._batch = Batch(loaded, limits.batch)
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Job] = {}
        self._changed = threading.Condition()
        self._closing = self._aborting = False
        self._thread = threading.Thread(target=self._work, name="fedgraft-scheduler", daemon=True)
        metrics.watch("waiting", lambda: len(self._waiting))
        metrics.watch("running", lambda: len(self._running))

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._closing

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs of a request, all of them or none.

        Raises:
            Refusal: 429, the queue is full; 503, the server is stopping.
        """
        with self._changed:
            if not self.alive:
                raise Refusal(503, "The server is stopping.", "stopping")
            if len(self._waiting) + len(jobs) > self.limits.queue:
                self._waiting = deque(job for job in self._waiting if not job.gone)
            if len(self._waiting) + len(jobs) > self.limits.queue:
                raise Refusal(429, f"The queue is full ({self.limits.queue} requests); come back later.", "queue_full")
            self._waiting.extend(jobs)
            self._changed.notify()

    def close(self) -> None:
        """Take nothing more; what waits is refused, what is being written goes on to its end, and then the thread ends."""
        with self._changed:
            self._closing = True
            refused = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        _fail(refused, Refusal(503, "The server is stopping.", "stopping"))

    def abort(self) -> None:
        """As `close`, and give up what is being written."""
        self._aborting = True
        self.close()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread has ended."""
        self._thread.join(timeout)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._running or self._closing)
                if self._aborting or (self._closing and not self._running):
                    break
                joining = self._next()
                self._running |= {id(job.answer): job for job in joining}
            self._advance(joining)
        _fail(list(self._running.values()), Refusal(503, "The server has stopped.", "stopping"))
        self._running.clear()

    def _advance(self, joining: Sequence[Job]) -> None:
        """Read prompts or write one token each; then tell whoever waits."""
        batch = self._batch
        try:
            if joining:
                batch.join([job.answer for job in joining])
                for job in joining:
                    self.metrics.add("prompt_tokens_total", len(job.wish.prompt), model=job.wish.client)
                    self.metrics.add("waiting_seconds_total", time.monotonic() - job.asked)
            elif batch.answers:
                batch.step()
        except Exception:  # whatever it is, those who wait must hear of it, and the next batch may do
            logging.getLogger(__name__).exception("a batch of %d answers failed", len(self._running))
            _fail(list(self._running.values()), Refusal(500, "The server failed in the middle of this answer.", "failed"))
            batch.leave(batch.answers)
            self._running.clear()
            return
        moved = joining or list(self._running.values())
        self.metrics.add("forwards_total")
        self.metrics.add("forward_rows_total", len(moved))
        for job in moved:
            self._tell(job)
        leaving = [job for job in self._running.values() if job.gone or job.answer.reason]
        batch.leave([job.answer for job in leaving])
        for job in leaving:
            del self._running[id(job.answer)]

    def _tell(self, job: Job) -> None:
        answer, model = job.answer, job.wish.client
        self.metrics.add("answer_tokens_total", model=model)
        if job.gone:
            return
        news = answer.news(self.loaded) if job.streams else ""
        if answer.reason:
            self.metrics.add("answers_total", model=model, reason=answer.reason)
            self.metrics.add("answer_seconds_total", time.monotonic() - job.asked)
            job.tell(Told(news, answer))
        elif news:
            job.tell(Told(news))

    def _next(self) -> list[Job]:
        """Those that join now, first come first served: as many as there is room for, of one model where models can't be mixed."""
        found: list[Job] = []
        models = {job.wish.client for job in self._running.values()}
        longest = 0
        while self._waiting and len(found) < self._batch.room:
            job = self._waiting[0]
            longest = max(longest, len(job.wish.prompt))
            if found and longest * (len(found) + 1) > self.limits.prefill_tokens:
                break
            if not job.gone and not self.loaded.mixes and models and job.wish.client not in models:
                break
            self._waiting.popleft()
            if not job.gone:
                found.append(job)
                models.add(job.wish.client)
        return found


def _fail(jobs: Sequence[Job], failure: Refusal) -> None:
    for job in jobs:
        job.tell(Told(failure=failure))
