"""Devices, their names and defaults, and why CUDA is not usable; a fake CuPy plays the GPU."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gradengine import get_num_threads
from gradengine.__main__ import main
from gradengine.devices import (
    Device,
    _initial_default,
    array_module,
    check_same_device,
    cuda_is_available,
    cuda_unavailable_reason,
    default_device,
    device,
    device_count,
    device_of,
    in_memory_order,
    resolve,
    set_default_device,
    synchronize,
    to_device,
)

MODULE = sys.modules["gradengine.devices"]


@pytest.fixture(autouse=True)
def _tensors_on_the_cpu() -> None:
    """Leave the default device to each test here."""


class FakeArray:
    """A "GPU" array: it knows its device and its values, and NumPy cannot read it by accident."""

    __array__ = None

    def __init__(self, values: np.ndarray, index: int) -> None:
        self.values = values
        self.device = SimpleNamespace(id=index)
        self.ndim, self.strides = values.ndim, values.strides

    def transpose(self, axes: list[int]) -> FakeArray:
        return FakeArray(self.values.transpose(axes), self.device.id)

    def __add__(self, other: FakeArray) -> FakeArray:
        return FakeArray(self.values + other.values, self.device.id)


class CUDARuntimeError(RuntimeError):
    pass


class OutOfMemoryError(MemoryError):
    pass


class FakeCupy(ModuleType):
    """The part of CuPy that gradengine.devices uses, with two GPUs and copies in C order."""

    ndarray = FakeArray

    def __init__(self, driver: int = 12090, count: int = 2) -> None:
        super().__init__("cupy")
        self.current = [0]
        self.synchronized: list[int] = []
        self.copies = 0
        runtime = SimpleNamespace(
            driverGetVersion=lambda: driver,
            runtimeGetVersion=lambda: 12090,
            getDeviceCount=lambda: count,
            CUDARuntimeError=CUDARuntimeError,
        )
        memory = SimpleNamespace(OutOfMemoryError=OutOfMemoryError)
        self.cuda: Any = SimpleNamespace(runtime=runtime, memory=memory, Device=self._device)

    def _device(self, index: int) -> FakeDevice:
        return FakeDevice(self, index)

    def asarray(self, array: np.ndarray | FakeArray) -> FakeArray:
        self.copies += 1
        values = array.values if isinstance(array, FakeArray) else array
        return FakeArray(np.array(values, order="C"), self.current[-1])

    def asnumpy(self, array: FakeArray) -> np.ndarray:
        assert array.device.id == self.current[-1], "a copy must run on the array's own device"
        self.copies += 1
        return np.array(array.values, order="C")


class FakeDevice:
    def __init__(self, cupy: FakeCupy, index: int) -> None:
        self.cupy, self.index = cupy, index

    def __enter__(self) -> None:
        self.cupy.current.append(self.index)

    def __exit__(self, *exception: object) -> None:
        self.cupy.current.pop()

    def synchronize(self) -> None:
        self.cupy.synchronized.append(self.index)


def forget() -> None:
    for answer in (cuda_unavailable_reason, device_count, _initial_default):
        answer.cache_clear()
    set_default_device(None)


@pytest.fixture(autouse=True)
def fresh_answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let each test probe anew, and let no answer of a fake outlive its test."""
    monkeypatch.delenv("GRADENGINE_DEVICE", raising=False)
    forget()
    yield
    monkeypatch.undo()
    forget()


@pytest.fixture
def fake_cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    return fake


@pytest.fixture
def no_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise ModuleNotFoundError("No module named 'cupy'", name="cupy")

    monkeypatch.setattr(MODULE, "import_cupy", missing)


def install_fake(monkeypatch: pytest.MonkeyPatch, fake: ModuleType) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake)


class TestNames:
    @pytest.mark.parametrize(
        ("arguments", "text", "representation"),
        [
            (("cpu",), "cpu", "device(type='cpu')"),
            (("cuda",), "cuda:0", "device(type='cuda', index=0)"),
            (("cuda:3",), "cuda:3", "device(type='cuda', index=3)"),
            (("cuda", 1), "cuda:1", "device(type='cuda', index=1)"),
            ((2,), "cuda:2", "device(type='cuda', index=2)"),
            ((Device("cpu"),), "cpu", "device(type='cpu')"),
        ],
    )
    def test_names_a_device(self, arguments: Any, text: str, representation: str) -> None:
        found = device(*arguments)
        assert (str(found), repr(found)) == (text, representation)
        assert eval(representation) == found

    @pytest.mark.parametrize(
        "spec",
        ["", "CPU", "tpu", "cpu:0", "cuda:", "cuda:-1", "cuda:one", "cuda: 1", -1, True, None, 1.0],
    )
    def test_refuses_other_names(self, spec: Any) -> None:
        with pytest.raises(ValueError, match=r"^device: a device is named by .*; got type="):
            device(spec)

    @pytest.mark.parametrize("arguments", [("cpu", 0), ("cuda:1", 1), ("cuda", -1), (0, 1)])
    def test_refuses_an_index_that_does_not_fit(self, arguments: Any) -> None:
        with pytest.raises(ValueError, match=r"; got type=.*, index="):
            device(*arguments)

    def test_compares_and_hashes_by_value(self) -> None:
        assert Device("cuda", 1) == device("cuda:1")
        assert hash(Device("cuda", 1)) == hash(device("cuda:1"))
        assert device("cuda:1") != device("cuda:0")
        assert device("cpu") != "cpu"

    @pytest.mark.parametrize("name", ["cpu", "cuda:1"])
    def test_survives_copy_and_pickle(self, name: str) -> None:
        original = device(name)
        assert copy.deepcopy(original) == original
        assert pickle.loads(pickle.dumps(original)) == original


class TestProbe:
    @pytest.mark.usefixtures("no_cupy")
    def test_cupy_not_installed(self) -> None:
        expected = "CuPy is not installed (pip install 'gradengine[cuda12]')"
        assert cuda_unavailable_reason() == expected
        assert not cuda_is_available()
        assert device_count() == 0

    @pytest.mark.parametrize(
        "error",
        [
            ImportError("libcudart.so.12: cannot open\nand much more"),
            ModuleNotFoundError("libcudart.so.12: cannot open", name="fastrlock"),
            OSError("libcudart.so.12: cannot open"),
        ],
    )
    def test_import_fails(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        def broken() -> Any:
            raise error

        monkeypatch.setattr(MODULE, "import_cupy", broken)
        assert cuda_unavailable_reason() == (
            "CuPy could not be imported: libcudart.so.12: cannot open "
            "(reinstall it: pip install 'gradengine[cuda12]')"
        )

    def test_no_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install_fake(monkeypatch, FakeCupy(driver=0))
        reason = cuda_unavailable_reason()
        assert reason is not None
        assert reason.startswith("no NVIDIA driver is loaded (")

    def test_no_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install_fake(monkeypatch, FakeCupy(count=0))
        reason = cuda_unavailable_reason()
        assert reason is not None
        assert reason.startswith("the NVIDIA driver sees no GPU (")

    @pytest.mark.parametrize(
        ("driver", "error", "start"),
        [
            (12090, "cudaErrorNoDevice: no CUDA-capable device", "the NVIDIA driver sees no GPU"),
            (
                11080,
                "cudaErrorInsufficientDriver: too old",
                "the NVIDIA driver knows CUDA 11.8 but CuPy needs CUDA 12.9 (update",
            ),
            (12090, "cudaErrorUnknown: broken", "the CUDA runtime failed: cudaErrorUnknown: brok"),
        ],
    )
    def test_counting_fails(
        self, monkeypatch: pytest.MonkeyPatch, driver: int, error: str, start: str
    ) -> None:
        def count() -> int:
            raise CUDARuntimeError(error)

        fake = FakeCupy(driver=driver)
        fake.cuda.runtime.getDeviceCount = count
        install_fake(monkeypatch, fake)
        reason = cuda_unavailable_reason()
        assert reason is not None
        assert reason.startswith(start)

    @pytest.mark.parametrize(
        ("error", "start"),
        [
            (
                OutOfMemoryError("Out of memory allocating 512 bytes"),
                "GPU 0 has no memory left: Ou",
            ),
            (RuntimeError("Failure finding libnvrtc.so"), "a first computation on GPU 0 failed: F"),
        ],
    )
    def test_first_computation_fails(
        self, monkeypatch: pytest.MonkeyPatch, error: Exception, start: str
    ) -> None:
        def asarray(array: np.ndarray) -> FakeArray:
            raise error

        fake = FakeCupy()
        monkeypatch.setattr(fake, "asarray", asarray)
        install_fake(monkeypatch, fake)
        reason = cuda_unavailable_reason()
        assert reason is not None
        assert reason.startswith(start)

    def test_first_computation_is_wrong(
        self, monkeypatch: pytest.MonkeyPatch, fake_cupy: FakeCupy
    ) -> None:
        monkeypatch.setattr(fake_cupy, "asnumpy", lambda array: np.zeros(4, np.float32))
        reason = cuda_unavailable_reason()
        assert reason is not None
        assert reason.startswith("a first computation on GPU 0 gave wrong numbers (")

    def test_usable_and_probed_once(self, fake_cupy: FakeCupy) -> None:
        assert cuda_unavailable_reason() is None
        assert cuda_is_available()
        assert device_count() == 2
        assert fake_cupy.copies == 2  # there and back, one time


class TestDefault:
    @pytest.mark.usefixtures("no_cupy")
    def test_is_the_cpu_without_cuda(self) -> None:
        assert default_device() == device("cpu")

    @pytest.mark.usefixtures("fake_cupy")
    def test_is_the_first_gpu_with_cuda(self) -> None:
        assert default_device() == device("cuda:0")

    @pytest.mark.usefixtures("fake_cupy")
    @pytest.mark.parametrize("name", ["cpu", "cuda:1"])
    def test_environment_variable(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        monkeypatch.setenv("GRADENGINE_DEVICE", name)
        assert default_device() == device(name)

    def test_bad_environment_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GRADENGINE_DEVICE", "tpu")
        with pytest.raises(ValueError, match=r"^GRADENGINE_DEVICE=tpu: device: a device is named"):
            default_device()

    @pytest.mark.usefixtures("no_cupy")
    def test_environment_variable_asks_for_unusable_cuda(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("GRADENGINE_DEVICE", "cuda")
        with pytest.raises(RuntimeError, match=r"^GRADENGINE_DEVICE=cuda: .*CuPy is not installed"):
            default_device()

    @pytest.mark.usefixtures("fake_cupy")
    def test_choice_comes_before_the_environment_and_can_be_taken_back(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("GRADENGINE_DEVICE", "cuda:1")
        set_default_device("cpu")
        assert default_device() == device("cpu")
        set_default_device(None)
        assert default_device() == device("cuda:1")

    @pytest.mark.usefixtures("no_cupy")
    def test_an_unusable_choice_changes_nothing(self) -> None:
        with pytest.raises(RuntimeError, match=r"^device: CUDA is not usable: CuPy is not inst"):
            set_default_device("cuda")
        assert default_device() == device("cpu")


class TestResolve:
    @pytest.mark.usefixtures("no_cupy")
    def test_without_cuda(self) -> None:
        assert resolve(None) == resolve("cpu") == device("cpu")
        with pytest.raises(
            RuntimeError, match=r"^device: CUDA is not usable: CuPy is not installed \(pip"
        ):
            resolve("cuda")

    @pytest.mark.usefixtures("fake_cupy")
    def test_index_out_of_range(self) -> None:
        assert resolve(1) == device("cuda:1")
        with pytest.raises(RuntimeError, match=r"^device: .*got index=2, device_count\(\)=2"):
            resolve("cuda:2")


class TestArrays:
    def test_numpy(self) -> None:
        assert array_module(np.zeros(3)) is np
        assert array_module(np.float32(1)) is np
        assert device_of(np.zeros(3)) is device("cpu")

    def test_fake_cupy(self, fake_cupy: FakeCupy) -> None:
        array = FakeArray(np.zeros(3), 1)
        assert array_module(array) is fake_cupy
        assert array_module(np.zeros(3)) is np
        assert device_of(array) == device("cuda:1")

    @pytest.mark.parametrize("value", [1.0, [1.0], None])
    def test_refuses_what_is_no_array(self, value: Any) -> None:
        with pytest.raises(TypeError, match=r"^array_module: .*; got array of type"):
            array_module(value)

    def test_no_copy_where_it_is_already(self, fake_cupy: FakeCupy) -> None:
        host, gpu = np.zeros(3), FakeArray(np.zeros(3), 1)
        assert to_device(host, "cpu") is host
        assert to_device(gpu, "cuda:1") is gpu

    def test_copies_there_across_and_back(self, fake_cupy: FakeCupy) -> None:
        host = np.arange(120.0).reshape(2, 4, 5, 3).transpose(0, 3, 1, 2)  # channels last
        first = to_device(host, "cuda:0")
        second = to_device(first, "cuda:1")
        back = to_device(second, "cpu")
        assert [device_of(array) for array in (first, second)] == [device(0), device(1)]
        np.testing.assert_array_equal(back, host)
        assert first.strides == second.strides == back.strides == host.strides
        assert not np.shares_memory(back, host)

    def test_scalar_array(self, fake_cupy: FakeCupy) -> None:
        assert to_device(to_device(np.array(2.5), "cuda"), "cpu") == 2.5

    @pytest.mark.usefixtures("no_cupy")
    def test_to_unusable_cuda(self) -> None:
        with pytest.raises(RuntimeError, match=r"^device: CUDA is not usable: "):
            to_device(np.zeros(3), "cuda")

    def test_same_device(self, fake_cupy: FakeCupy) -> None:
        host, first, second = np.zeros(1), FakeArray(np.zeros(1), 0), FakeArray(np.zeros(1), 1)
        check_same_device("add")
        check_same_device("add", host, host)
        check_same_device("add", second, second)
        with pytest.raises(
            TypeError, match=r"^add: all tensors must be on one device; got cpu and cuda:0 "
        ):
            check_same_device("add", host, first, host)
        with pytest.raises(TypeError, match=r"got cuda:1 and cuda:0 "):
            check_same_device("add", second, first)

    def test_synchronize(self, fake_cupy: FakeCupy) -> None:
        synchronize("cpu")
        assert fake_cupy.synchronized == []
        synchronize("cuda:1")
        synchronize()
        assert fake_cupy.synchronized == [1, 0]


@pytest.mark.gpu
class TestRealGpu:
    def test_default_and_count(self) -> None:
        assert default_device() == device("cuda:0")
        assert device_count() >= 1

    def test_index_out_of_range(self) -> None:
        with pytest.raises(RuntimeError, match=r"device_count\(\)="):
            resolve(device_count())

    def test_there_and_back_keeps_values_and_strides(self) -> None:
        host = np.arange(120.0).reshape(2, 4, 5, 3).transpose(0, 3, 1, 2)
        gpu = to_device(host, "cuda")
        synchronize("cuda")
        back = to_device(gpu, "cpu")
        assert array_module(gpu).__name__ == "cupy"
        assert device_of(gpu) == device("cuda:0")
        np.testing.assert_array_equal(back, host)
        assert gpu.strides == back.strides == host.strides

    def test_mixing_devices(self) -> None:
        host = np.zeros(1)
        with pytest.raises(TypeError, match=r"got cpu and cuda:0"):
            check_same_device("add", host, to_device(host, "cuda"))


def test_importing_asks_nothing_of_the_machine() -> None:
    code = "import sys, gradengine.devices; print('cupy' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "False"


class TestCommands:
    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "gradengine", *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def test_reports_every_part(self) -> None:
        result = self.run("doctor")
        assert result.returncode == 0, result.stderr
        found = dict(line.split(":", maxsplit=1) for line in result.stdout.splitlines())
        expected = {"python", "gradengine", "numpy", "numba", "cupy", "cuda", "default device"}
        assert expected | {"pillow", "scipy", "cpu kernel cache", "weights cache"} <= found.keys()
        assert [name for name, text in found.items() if text.strip().startswith("failed:")] == []
        assert np.__version__ in found["numpy"]
        assert found["numba"].endswith(f", {get_num_threads()} threads")

    def test_compiling_for_a_gpu_without_cupy(self, no_cupy: None, capsys: Any) -> None:
        with pytest.raises(SystemExit, match="2"):
            main(["compile", "--cuda", "sm_90a"])
        line = "compile: CuPy is not installed (pip install 'gradengine[cuda12]')\n"
        assert capsys.readouterr().err == line

    @pytest.mark.parametrize("arguments", [(), ("unknown",)])
    def test_usage(self, arguments: tuple[str, ...]) -> None:
        result = self.run(*arguments)
        assert result.returncode == 2
        assert result.stderr.startswith("usage: python -m gradengine")


def test_results_lie_in_memory_as_the_inputs_do() -> None:
    """CuPy's elementwise functions give C order; a function of NumPy's arrays does so here."""
    x = np.arange(120.0).reshape(2, 4, 5, 3).transpose(0, 3, 1, 2)  # channels-last
    vector = np.arange(5.0)

    def add(a: np.ndarray, b: np.ndarray, factor: float = 1.0) -> np.ndarray:
        return np.ascontiguousarray(a + factor * b)

    for other in (x + 1, np.ones((2, 3, 4, 5)), vector, vector[:, None][:4], np.float64(2.0)):
        for pair in ((x, other), (other, x)):
            out = in_memory_order(add, *pair, factor=3.0)
            np.testing.assert_array_equal(out, pair[0] + 3 * pair[1])
            assert out.strides == x.strides
    assert in_memory_order(add, vector, vector).shape == (5,)
