"""The health of the GPUs that train, step by step, through NVML (pip install 'posttrain[gpu]').

| health/... | what it is |
|---|---|
| sm_activity | share of the streaming multiprocessors that were busy, a mean since the step before; Hopper and later |
| busy | share of the last moment (up to a second) in which any kernel ran |
| memory_gib | in use on the GPU, by all processes |
| power_w, temperature_c | at the end of the step |
| pcie_replays | transfers that had to be repeated, since the run began |
| ecc_corrected, ecc_uncorrected | memory errors since the run began |

Of several GPUs the worst value counts: the least of the first two, the most of the others. What NVML does not know, or
fails to return, is missing, never 0.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

SHARES = ("health/sm_activity", "health/busy")
"""Of these the least value is the worst."""


def worst(parts: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Over GPUs; those without a value are left out, and None is left where no GPU has one."""
    known: dict[str, list[float]] = {}
    for part in parts:
        for name, value in part.items():
            known.setdefault(name, [])
            if value is not None:
                known[name].append(value)
    metrics: dict[str, float | None] = {}
    for name, values in known.items():
        metrics[name] = (min if name in SHARES else max)(values, default=None)
    return metrics


def watch(device: torch.device, say: Callable[[str], None]) -> Health | None:
    """None where there is no GPU, or no NVML, which `say` is told."""
    if device.type != "cuda":
        return None
    if importlib.util.find_spec("pynvml") is None:
        say("the GPUs' health is not measured: pip install nvidia-ml-py")
        return None
    nvml = importlib.import_module("pynvml")
    try:
        return Health(nvml, f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except nvml.NVMLError as error:
        say(f"the GPUs' health is not measured: {error}")
        return None


class Health:
    """One GPU."""

    def __init__(self, nvml: Any, uuid: str):
        """`nvml` is the module; its error is raised if there is no such GPU."""
        nvml.nvmlInit()
        # By UUID: CUDA_VISIBLE_DEVICES renumbers devices for torch, and not for NVML.
        self._nvml, self._device = nvml, nvml.nvmlDeviceGetHandleByUUID(uuid)
        self._begun: dict[str, int] = {}
        self._samples: list[Any] = []
        self._try(self._begin_samples)
        self.read()  # counters are reported from here on

    def read(self) -> dict[str, float | None]:
        """The metrics of one step, which ends now."""
        nvml, device = self._nvml, self._device
        corrected, uncorrected = nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
        asked: dict[str, Callable[[], float | None]] = {
            "sm_activity": self._sm_activity,
            "busy": lambda: nvml.nvmlDeviceGetUtilizationRates(device).gpu / 100,
            "memory_gib": lambda: nvml.nvmlDeviceGetMemoryInfo(device).used / 2**30,
            "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(device) / 1e3,
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU),
            "pcie_replays": lambda: self._since("replays", nvml.nvmlDeviceGetPcieReplayCounter(device)),
            "ecc_corrected": lambda: self._since("corrected", self._errors(corrected)),
            "ecc_uncorrected": lambda: self._since("uncorrected", self._errors(uncorrected)),
        }
        return {f"health/{name}": self._try(ask) for name, ask in asked.items()}

    def _try(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except self._nvml.NVMLError:  # a metric that this GPU or driver does not have is missing, never 0
            return None

    def _errors(self, kind: int) -> int:
        return self._nvml.nvmlDeviceGetTotalEccErrors(self._device, kind, self._nvml.NVML_VOLATILE_ECC)

    def _since(self, name: str, count: int) -> int:
        return count - self._begun.setdefault(name, count)

    def _begin_samples(self) -> None:
        nvml = self._nvml
        if nvml.nvmlGpmQueryDeviceSupport(self._device).isSupportedDevice:
            samples = [nvml.nvmlGpmSampleAlloc() for _ in range(2)]
            nvml.nvmlGpmSampleGet(self._device, samples[0])
            self._samples = samples

    def _sm_activity(self) -> float | None:
        if not self._samples:  # before Hopper
            return None
        nvml, (before, now) = self._nvml, self._samples
        nvml.nvmlGpmSampleGet(self._device, now)
        self._samples = [now, before]  # the older is written over next time
        asked = nvml.c_nvmlGpmMetricsGet_t()
        asked.version, asked.numMetrics = nvml.NVML_GPM_METRICS_GET_VERSION, 1
        asked.sample1, asked.sample2 = before, now
        asked.metrics[0].metricId = nvml.NVML_GPM_METRIC_SM_UTIL
        nvml.nvmlGpmMetricsGet(asked)
        return asked.metrics[0].value / 100 if asked.metrics[0].nvmlReturn == nvml.NVML_SUCCESS else None
