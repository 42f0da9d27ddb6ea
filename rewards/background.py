"""Scoring that goes on while the next images are sampled: one event loop in one background thread."""

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Self

from PIL import Image

from rewards.base import Reward, Scores, score_all


class ScoreQueue:
    """`submit` whole groups as they are sampled, then `gather` all their scores in order of submission."""

    def __init__(self, rewards: Sequence[Reward], group_size: int = 1):
        self.rewards = rewards
        self.group_size = group_size
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="scores")
        self._thread.start()
        self._jobs: list[Future[Scores]] = []
        self._lock = threading.Lock()
        self._running = 0
        self._since = 0.0
        self._busy = 0.0

    def submit(
        self, images: Sequence[Image.Image], prompts: Sequence[str], columns: dict[str, Any] | None = None
    ) -> None:
        with self._lock:  # `_finished` is called in the loop's thread
            if self._running == 0:
                self._since = time.perf_counter()
            self._running += 1
        work = score_all(self.rewards, images, prompts, columns, self.group_size)
        job = asyncio.run_coroutine_threadsafe(work, self._loop)
        job.add_done_callback(self._finished)
        self._jobs.append(job)

    def _finished(self, _: Future[Scores]) -> None:
        with self._lock:
            self._running -= 1
            if self._running == 0:
                self._busy += time.perf_counter() - self._since

    def hand_over(self) -> list[Future[Scores]]:
        """What was submitted since the last gather, for `gather` in another thread, while more is submitted."""
        jobs, self._jobs = self._jobs, []
        return jobs

    def gather(self, jobs: list[Future[Scores]] | None = None) -> Scores:
        """All scores since the last gather, or of what was handed over, and how much of the scoring was waited for."""
        jobs = self.hand_over() if jobs is None else jobs
        if not jobs:
            raise ValueError("nothing was submitted since the last gather")
        start = time.perf_counter()
        try:
            scores = Scores.concat([job.result() for job in jobs])
        finally:
            for job in jobs:  # where one has failed, nobody waits for the others
                job.cancel()
        scores.waited_seconds = time.perf_counter() - start
        with self._lock:
            scores.scoring_seconds, self._busy = self._busy, 0.0
        return scores

    def drop(self) -> None:
        """Forget what was submitted and not gathered."""
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.cancel()

    def close(self) -> None:
        async def cancel() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            # A loop that is closed over pending tasks complains about each.
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(cancel(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
