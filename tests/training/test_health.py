"""What NVML fails to say is missing. There is no GPU in tests: a fake of the module answers, or fails as it can."""

import types

import pytest
import torch

from posttrain.training import gpu_health


class Fault(Exception):
    pass


class Sample:
    def __init__(self):
        self.at = None


class NVML:
    """A GPU that works a little more each time it is asked; `broken` names calls that fail."""

    NVMLError = Fault
    NVML_SUCCESS, NVML_TEMPERATURE_GPU, NVML_VOLATILE_ECC, NVML_GPM_METRIC_SM_UTIL = 0, 0, 0, 2
    NVML_MEMORY_ERROR_TYPE_CORRECTED, NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_GPM_METRICS_GET_VERSION = 0, 1, 1

    def __init__(self, broken=(), supported=1):
        self.broken, self.supported, self.replays, self.errors, self.time, self.metric_return = (
            set(broken), supported, 40, [7, 2], 0, 0,
        )  # fmt: skip

    def __getattribute__(self, name):
        if name.startswith("nvml") and name in self.broken:
            raise_fault = lambda *_: (_ for _ in ()).throw(Fault(name))  # noqa: E731
            return raise_fault
        return object.__getattribute__(self, name)

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert uuid.startswith("GPU-")
        return "device"

    def nvmlDeviceGetUtilizationRates(self, device):
        return types.SimpleNamespace(gpu=97)

    def nvmlDeviceGetMemoryInfo(self, device):
        return types.SimpleNamespace(used=3 * 2**30)

    def nvmlDeviceGetPowerUsage(self, device):
        return 612_500  # milliwatts

    def nvmlDeviceGetTemperature(self, device, sensor):
        return 64

    def nvmlDeviceGetPcieReplayCounter(self, device):
        return self.replays

    def nvmlDeviceGetTotalEccErrors(self, device, kind, counter):
        return self.errors[kind]

    def nvmlGpmQueryDeviceSupport(self, device):
        return types.SimpleNamespace(isSupportedDevice=self.supported)

    def nvmlGpmSampleAlloc(self):
        return Sample()

    def nvmlGpmSampleGet(self, device, sample):
        self.time += 1
        sample.at = self.time

    def c_nvmlGpmMetricsGet_t(self):
        return types.SimpleNamespace(metrics=[types.SimpleNamespace(nvmlReturn=None, value=None)])

    def nvmlGpmMetricsGet(self, asked):
        assert asked.metrics[0].metricId == 2 and asked.sample2.at == asked.sample1.at + 1
        asked.metrics[0].value, asked.metrics[0].nvmlReturn = 80.0, self.metric_return


CALLS = {
    "nvmlGpmMetricsGet": ["sm_activity"],
    "nvmlGpmQueryDeviceSupport": ["sm_activity"],
    "nvmlDeviceGetUtilizationRates": ["busy"],
    "nvmlDeviceGetMemoryInfo": ["memory_gib"],
    "nvmlDeviceGetPowerUsage": ["power_w"],
    "nvmlDeviceGetTemperature": ["temperature_c"],
    "nvmlDeviceGetPcieReplayCounter": ["pcie_replays"],
    "nvmlDeviceGetTotalEccErrors": ["ecc_corrected", "ecc_uncorrected"],
}


def test_units_and_counters():
    nvml = NVML()
    gpu = gpu_health.Health(nvml, "GPU-1")
    nvml.replays, nvml.errors = 43, [7, 3]
    expected = {
        "sm_activity": 0.8, "busy": 0.97, "memory_gib": 3.0, "power_w": 612.5, "temperature_c": 64,
        "pcie_replays": 3, "ecc_corrected": 0, "ecc_uncorrected": 1,
    }  # fmt: skip
    assert gpu.read() == gpu.read() == {f"health/{name}": value for name, value in expected.items()}


@pytest.mark.parametrize("call", CALLS)
def test_a_failing_query_is_missing(call):
    values = gpu_health.Health(NVML([call]), "GPU-1").read()
    assert {name for name, value in values.items() if value is None} == {f"health/{name}" for name in CALLS[call]}


def test_a_query_that_fails_for_a_while():
    nvml = NVML()
    gpu = gpu_health.Health(nvml, "GPU-1")
    nvml.broken, nvml.replays, nvml.metric_return = {"nvmlDeviceGetPcieReplayCounter"}, 45, 3
    values = gpu.read()
    assert values["health/pcie_replays"] is None and values["health/sm_activity"] is None
    nvml.broken, nvml.metric_return = set(), 0
    values = gpu.read()
    assert values["health/pcie_replays"] == 5 and values["health/sm_activity"] == 0.8


def test_no_activity_before_hopper():
    assert gpu_health.Health(NVML(supported=0), "GPU-1").read()["health/sm_activity"] is None


def test_worst_of_several():
    parts = [{"health/busy": 0.9, "health/power_w": 500.0}, {"health/busy": 0.4, "health/power_w": None}]
    assert gpu_health.worst(parts) == {"health/busy": 0.4, "health/power_w": 500.0}
    assert gpu_health.worst([{"health/power_w": None}]) == {"health/power_w": None} and gpu_health.worst([{}, {}]) == {}


def test_without_a_gpu_nothing_is_said():
    said = []
    assert gpu_health.watch(torch.device("cpu"), said.append) is None and said == []


def test_a_missing_or_broken_library_is_told(monkeypatch):
    said = []
    found: dict[str, str | None] = {"pynvml": None}
    monkeypatch.setattr(gpu_health.importlib.util, "find_spec", lambda name: found[name])
    assert gpu_health.watch(torch.device("cuda"), said.append) is None and "pip install nvidia-ml-py" in said[0]
    found["pynvml"] = "there"
    monkeypatch.setattr(gpu_health.importlib, "import_module", lambda name: NVML(["nvmlInit"]))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="1"))
    assert gpu_health.watch(torch.device("cuda"), said.append) is None and "nvmlInit" in said[1]
