"""The loss on images that are never trained on, with fixed times, noise and captions, beside that of the base.

| heldout/... | what it is |
|---|---|
| loss | mean squared error of the policy's velocity |
| gain | by what share that is below the base's: higher is better |
| drift | mean squared distance of the policy's velocity from the base's |

The base is what model.start has made of model.path, so gain and drift are 0 before the first step; with model.start_as:
continue it is the model below the adapter that is continued, whose own gain counts too.

Those that end in _t1 ... _t4 are of four equal parts of the times, the least noisy first. The times are those of
sampling's own shift, whatever `shift` the run trains with, so that runs with different shifts can be compared.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from posttrain.distributed.processes import Processes
from posttrain.model import flops, sampler
from posttrain.model.k2 import K2
from posttrain.sft.batches import Batch, Job, noised
from posttrain.sft.cache import EncodedImages
from posttrain.sft.losses import flow_loss

BINS = 4
LOSS = "heldout/loss"
Figures = dict[str, float | None]


class HeldOut:
    """Held-out entries, each with one time and one noise, and the base's velocities there."""

    def __init__(self, k2: K2, images: EncodedImages, measured: int, seed: int, procs: Processes, micro_batch: int):
        """The active role must be the base: where all weights are trained, the policy before a run that resumes has
        restored it, so that no copy of the base has to stay in memory. The velocities wait in RAM, 1 MB each at
        1024 x 1024.
        """
        self.k2, self.images, self.procs, self.micro_batch = k2, images, procs, micro_batch
        entries = np.random.default_rng(seed).permutation(images.heldout)[:measured]
        self._own = procs.local_indices_by_cost(flops.of_sizes(k2, images.size[entries].tolist()))
        self._jobs: list[Job] = []
        for i in self._own:
            # Times spread evenly over the distribution, so that few entries measure the loss at all noise levels.
            n = sampler.stratified_normal(seed, i, BINS)
            # The first caption, since a choice among several would be noise.
            self._jobs.append(Job(int(entries[i]), n, sampler.seed_for(seed, i, 1), 0.0, False))
        self._base: dict[int, Tensor] = {}
        for batch in self._batches():
            for j, v in zip(batch.jobs, self._velocity(batch).cpu()):
                self._base[j] = v.clone()  # a view would keep the whole batch in memory

    def __call__(self) -> tuple[Figures, Figures]:
        """Figures of the active role, with the loss of four parts of the times; and gain and drift of these parts."""
        by_job: dict[int, dict[str, float]] = {}
        for batch in self._batches():
            v, base = self._velocity(batch), torch.stack([self._base[j] for j in batch.jobs]).to(self.k2.device)
            losses = flow_loss(v, batch.target).tolist()
            base_losses = flow_loss(base, batch.target).tolist()
            drifts = flow_loss(v, base).tolist()
            for job, loss, base_loss, drift in zip(batch.jobs, losses, base_losses, drifts):
                by_job[job] = {"loss": loss, "base": base_loss, "drift": drift}
        # Batches are made by size, and processes share the entries; the parts below need all in their order.
        rows = self.procs.gather_in_order([by_job[j] for j in range(len(self._jobs))], self._own)
        whole = _figures(rows)
        overall, details = dict(whole), {}
        for part in range(BINS):
            own = rows[part::BINS]  # the i-th entry's time is in part i mod 4
            of_part = _figures(own) if own else dict.fromkeys(whole)
            overall[f"{LOSS}_t{part + 1}"] = of_part.pop(LOSS)
            for name, value in of_part.items():
                details[f"{name}_t{part + 1}"] = value
        return overall, details

    def _batches(self) -> list[Batch]:
        return noised(self.k2, self.images, self._jobs, self.micro_batch, 0.0, 1.0, 0.0)

    @torch.no_grad()
    def _velocity(self, batch: Batch) -> Tensor:
        return batch.velocity(self.k2)


def _figures(rows: list[dict[str, float]]) -> Figures:
    means: dict[str, float] = {}
    for name in rows[0]:
        means[name] = float(np.mean([row[name] for row in rows]))
    # A ratio of means: a mean of the images' own ratios would be led by those whose loss is near 0.
    gain = 1 - means["loss"] / means["base"]
    return {LOSS: means["loss"], "heldout/gain": gain, "heldout/drift": means["drift"]}
