"""Scoring that goes on while the next images are sampled: one event loop in one background thread."""

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Self

from PIL import Image

from rewards.base import Reward, Scores, score_all
from rewards.isolation import own_directory


class ScoreQueue:
    """`submit` whole groups as they are sampled, then `gather` all their scores in order of submission."""

    def __init__(self, rewards: Sequence[Reward], group_size: int = 1):
        self.rewards = rewards
        self.group_size = group_size
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._work, daemon=True, name="scores")
        self._thread.start()
        self._jobs: list[Future[Scores]] = []
        self._spans: dict[Future[Scores], list[float]] = {}
        """When each job that was not gathered yet was submitted and, if it is done, when it ended."""

    def _work(self) -> None:
        own_directory()  # an async reward runs here
        self._loop.run_forever()

    def submit(
        self, images: Sequence[Image.Image], prompts: Sequence[str], columns: dict[str, Any] | None = None
    ) -> None:
        began = time.perf_counter()
        work = score_all(self.rewards, images, prompts, columns, self.group_size)
        job = asyncio.run_coroutine_threadsafe(work, self._loop)
        span = self._spans[job] = [began]
        job.add_done_callback(lambda _: span.append(time.perf_counter()))  # called in the loop's thread
        self._jobs.append(job)

    def hand_over(self) -> list[Future[Scores]]:
        """What was submitted since the last gather, for a later `gather` or one in another thread, while more is
        submitted. `drop` does not forget it."""
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
            spans = [self._spans.pop(job) for job in jobs]
        now = time.perf_counter()
        scores.waited_seconds = now - start
        # A job that ended just now may not have said so yet.
        scores.scoring_seconds = _covered([(span[0], span[1] if len(span) > 1 else now) for span in spans])
        return scores

    def drop(self) -> None:
        """Forget what was submitted and not gathered."""
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.cancel()
            del self._spans[job]

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


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """The length of the union of some (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
