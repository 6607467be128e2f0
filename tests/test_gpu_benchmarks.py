"""The GPU benchmarks without a GPU: their arithmetic, what they keep of failures, and a rehearsal."""

from __future__ import annotations

import json
import re
import weakref
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import gpu, gpu_device, gpu_host, gpu_profile, gpu_report
from benchmarks.gpu_device import Memory, Rehearsal, Turn
from benchmarks.gpu_race import BudgetSpentError, Contestant, Row, measure
from gradengine.kernels import settings
from gradengine.kernels.cuda import conv2d, launch


def step_row(batch: int, peers: str = "eager", **medians: float) -> dict[str, Any]:
    contestants = {name.replace("_", " "): {"median": value} for name, value in medians.items()}
    beside = "" if peers == "eager" else f", beside {peers}"
    return {
        "group": "training",
        "name": f"batch {batch}{beside}",
        "kind": "step",
        "labels": {"batch": batch, "peers": peers},
        "flop": 1e9,
        "moved": 0.0,
        "contestants": contestants,
    }


def kernel_row(name: str, ours: float, theirs: float, **more: Any) -> dict[str, Any]:
    found = {"gradengine": {"median": ours}, "cuDNN nhwc": {"median": theirs}}
    return {"group": "convolutions", "name": name, "kind": "kernel", "contestants": found} | more


STEPS = [
    step_row(
        256,
        gradengine_tf32=0.020,
        gradengine_tf32_captured=0.016,
        gradengine_bf16=0.010,
        PyTorch_nchw_tf32=0.040,
        PyTorch_nhwc_tf32=0.032,
        PyTorch_nhwc_bf16=0.015,
    ),
    step_row(32, gradengine_bf16=0.002, PyTorch_nhwc_bf16=0.005),
    step_row(256, "compile", gradengine_bf16=0.010, PyTorch_nhwc_bf16_compile=0.012),
]
CONVOLUTION = {"precision": "bf16", "pass": "forward", "convolution": "3x3"}
KERNELS = [
    kernel_row("bf16 forward, 3x3", 1e-3, 5e-4, labels=CONVOLUTION, flop=4e11, moved=1e9),
    kernel_row(
        *("bf16 gradient by input, 3x3", 1e-3, 2e-3),
        labels=CONVOLUTION | {"pass": "gradient by input"},
        flop=4e11,
        moved=1e9,
    ),
]
LIMITS = [
    {
        "group": "limits",
        "name": name,
        "kind": "kernel",
        "labels": {"limit": limit},
        "flop": flop,
        "moved": moved,
        "contestants": {"CuPy": {"median": 1e-3}, "PyTorch": {"median": 2e-3}},
    }
    for name, limit, flop, moved in (("copy", "copy", 0, 3e9), ("cuBLAS", "bf16", 8e11, 0))
]
CONTENT = {
    "about": {"date": "2026-01-02", "device": "A GPU", "torch": "2.11"},
    "rows": [*LIMITS, *STEPS, *KERNELS],
    "not_measured": ["training, batch 8"],
}


# ---- the report ----------------------------------------------------------------------------------


def test_ratios_compare_the_best_of_each_precision():
    assert gpu_report.ratios(STEPS[0]) == pytest.approx({"tf32": 2.0, "bf16": 1.5})
    assert gpu_report.ratios(STEPS[1]) == pytest.approx({"bf16": 2.5})
    assert gpu_report.ratios(KERNELS[0]) == {"": 0.5}
    assert gpu_report.ratios(step_row(1, gradengine_tf32=1.0)) == {}


def test_limits_are_the_best_that_was_measured():
    known = gpu_report.limits(CONTENT["rows"])
    assert known == pytest.approx({"copy": 3e12, "bf16": 8e14})
    assert gpu_report.rate(KERNELS[0], 1e-3, known) == "400 TFLOP/s (50%)"
    assert gpu_report.rate(KERNELS[0] | {"flop": 0.0}, 1e-3, known) == "1000 GB/s (33%)"
    assert gpu_report.rate(KERNELS[0], 1e-3, {}) == "400 TFLOP/s"


def test_the_table_of_steps_has_contestants_down_and_batches_across():
    lines = gpu_report.step_table(CONTENT["rows"], "training").splitlines()
    assert lines[0] == "| ResNet-18 training step, 224 px | 256 | 32 |"
    assert "| gradengine bf16 | 10.0 ms | 2.00 ms |" in lines
    assert "| PyTorch nhwc bf16 compile | 12.0 ms |  |" in lines
    assert "| ratio, bf16 | **1.50** | **2.50** |" in lines
    assert "| ratio, bf16, beside compile | **1.20** |  |" in lines
    assert gpu_report.step_table(CONTENT["rows"], "forward") == ""


def test_the_table_of_convolutions_has_rates_and_ratios():
    assert gpu_report.convolution_table(KERNELS).splitlines() == [
        "| TFLOP/s (ratio to cuDNN's best) | bf16 forward | bf16 gradient by input |",
        "| --- | ---: | ---: |",
        "| 3x3 | 400 (0.50) | 400 (2.00) |",
    ]
    assert gpu_report.summaries(KERNELS + LIMITS) == pytest.approx(
        {"convolutions bf16 forward": 0.5, "convolutions bf16 gradient by input": 2.0}
    )


def test_what_failed_and_what_was_not_measured_is_said():
    failed = step_row(64) | {"contestants": {"gradengine bf16": {"error": "TypeError: no"}}}
    content = CONTENT | {"rows": [*CONTENT["rows"], failed]}
    text = gpu_report.text_tables(content)
    assert "failed 1 times: TypeError: no" in text
    assert "not measured (1 rows): training, batch 8" in text
    assert "- training, batch 64: gradengine bf16: TypeError: no" in gpu_report.document(content)
    assert "| gradengine bf16 | 10.0 ms | failed | 2.00 ms |" in gpu_report.document(content)


def test_runs_are_merged_row_by_row():
    again = step_row(256, gradengine_bf16=0.008, PyTorch_nhwc_bf16=0.015)
    late = step_row(8, gradengine_bf16=0.001)
    later = {"about": CONTENT["about"] | {"date": "2026-01-03"}, "rows": [again, late]}
    found = gpu_report.merged([CONTENT, later | {"not_measured": []}])
    assert [row["name"] for row in found["rows"]].count("batch 256") == 1
    assert again in found["rows"]
    assert found["about"]["date"] == "2026-01-03"
    assert found["not_measured"] == []
    other = later | {"about": {"device": "Another GPU"}, "not_measured": []}
    with pytest.raises(ValueError, match="must be of one device"):
        gpu_report.merged([CONTENT, other])


def test_a_file_becomes_tables_and_a_section_of_the_readme(tmp_path: Path, monkeypatch):
    readme, path = tmp_path / "README.md", tmp_path / "gpu-a.json"
    monkeypatch.setattr(gpu_report, "README", readme)
    start, end = gpu_report.MARKS
    readme.write_text(f"before\n{start}\nnot measured\n{end}\nafter\n")
    path.write_text(json.dumps(CONTENT))
    assert gpu_report.publish([path]) == path.with_suffix(".md")
    text = readme.read_text()
    assert text.startswith(f"before\n{start}\n2026-01-02, A GPU, 3000 GB/s copied")
    assert text.endswith(f"[All rows](benchmarks/results/gpu-a.md)\n{end}\nafter\n")
    assert "not measured" not in text
    assert "| ratio, tf32 | **2.00** |" in text
    assert "| ratio, tf32 | **2.00** |" in path.with_suffix(".md").read_text()
    with pytest.raises(ValueError, match="must hold the marks once"):
        gpu_report.with_section("no marks", "section")


# ---- a row ---------------------------------------------------------------------------------------


class Clock(Rehearsal):
    """Calls its runs; each contestant's turn takes the number of turns so far, in ms."""

    rounds = (3, 3)

    def __init__(self) -> None:
        super().__init__()
        self.turns: list[Any] = []

    def time(self, run: Any, count: int, inner: int = 1, ahead: float = 0.0) -> Turn:
        self.turns.append(run())
        return Turn([1e-3 * len(self.turns)] * 3, 1e-5)

    def watch_memory(self, make: Any) -> tuple[Any, float, Memory]:
        return make(), 0.5, Memory(1, 2)


def failing() -> Any:
    raise ValueError("no such kernel\nsecond line")


def test_contestants_take_turns_and_the_median_of_all_turns_counts():
    clock, log = Clock(), []
    contestants = [Contestant(name, lambda name=name: lambda: name) for name in "ab"]
    row = measure(clock, Row("group", "name", contestants, kind="step"), log.append)
    assert clock.turns == ["a", "a", "b", "b", "a", "b", "a", "b"]  # each begins with a pilot
    found = row["contestants"]["a"]
    assert found["rounds"] == pytest.approx([2e-3, 5e-3, 7e-3])
    assert found["median"] == pytest.approx(5e-3)
    assert found["min"] == pytest.approx(2e-3)
    assert (found["samples"], found["first"]) == (9, 0.5)
    assert json.loads(json.dumps(row)) == row
    assert log == []


@pytest.mark.parametrize("make", [failing, lambda: failing], ids=["made", "run"])
def test_what_fails_is_left_out_and_the_others_are_measured(make: Any):
    log: list[str] = []
    contestants = [Contestant("bad", make), Contestant("good", lambda: lambda: None)]
    row = measure(Clock(), Row("group", "name", contestants), log.append)
    assert row["contestants"]["bad"]["error"] == "ValueError: no such kernel"
    assert "median" not in row["contestants"]["bad"]
    assert row["contestants"]["good"]["samples"] == 9
    (text,) = log
    assert text.startswith("group, name: bad\n")
    assert "second line" in text


def test_a_check_adds_numbers_and_may_fail():
    contestant = Contestant("a", lambda: lambda: 3.0)
    row = Row("group", "name", [contestant], check=lambda runs: {"a": {"distance": runs["a"]()}})
    assert measure(Clock(), row, print)["contestants"]["a"]["distance"] == 3.0
    log: list[str] = []
    row = measure(
        Clock(), Row("group", "name", [contestant], check=lambda _: failing()), log.append
    )
    assert row["error"] == "ValueError: no such kernel"
    assert "median" in row["contestants"]["a"]
    assert len(log) == 1


def test_the_end_of_the_budget_cuts_a_row_short_and_keeps_its_turns():
    calls = []

    def run() -> None:
        calls.append(0)
        if len(calls) == 6:
            raise BudgetSpentError

    row = measure(Clock(), Row("group", "name", [Contestant("a", lambda: run)]), print)
    assert row["cut"]
    assert 0 < row["contestants"]["a"]["samples"] < 9


def test_the_budget_interrupts_what_takes_too_long(monkeypatch):
    handlers = []
    monkeypatch.setattr(gpu.signal, "signal", lambda number, handler: handlers.append(handler))
    monkeypatch.setattr(gpu.signal, "setitimer", lambda which, seconds: handlers.append(seconds))
    with gpu._budget(5.0):
        handlers[0](0, None)  # what the alarm calls: outside of a row it goes no further
        pytest.fail("it must not go on")
    assert handlers[1] == 5.0
    assert handlers[2] == 0


# ---- the device and the profile ------------------------------------------------------------------


def test_arrays_of_bfloat16_are_shared_with_pytorch():
    torch = pytest.importorskip("torch")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    device = Rehearsal(torch)
    array = device.random_nhwc((2, 3, 4, 5), ml_dtypes.bfloat16)
    tensor = device.to_torch(array)
    assert tensor.dtype == torch.bfloat16
    assert tensor.is_contiguous(memory_format=torch.channels_last)
    assert tensor.data_ptr() == array.ctypes.data
    np.testing.assert_array_equal(tensor.float().numpy(), array.astype(np.float32))
    assert 0.5 < array.astype(np.float32).std() < 2
    assert device.distance(array, 2 * tensor.float()) == pytest.approx(0.5)


def test_random_numbers_repeat_only_after_a_million():
    array = Rehearsal().random((1001, 1001), np.float32)
    assert array.flat[0] != array.flat[1]
    assert array.flat[1_000_003 - 1] != array.flat[0]
    assert len(np.unique(array)) > 900_000


class FakeCupy:
    """A device whose runs take 1 ms, and whose host takes `queueing` seconds to queue one."""

    def __init__(self, queueing: float) -> None:
        self.queueing = queueing
        self.host = self.device = 0.0  # both clocks, in seconds
        self.spins: list[float] = []
        self.pool = SimpleNamespace(free_all_blocks=lambda: None)
        self.events_see_work = True
        event = type("Event", (), {"record": lambda event, stream: self.record(event)})
        self.cuda: Any = SimpleNamespace(
            Event=event,
            Stream=SimpleNamespace(null=None),
            get_elapsed_time=lambda first, last: 1e3 * (last.time - first.time),
            runtime=SimpleNamespace(
                deviceSynchronize=self.synchronize, memGetInfo=lambda: (1000 - self.live, 1000)
            ),
            MemoryHook=Hook,
        )
        self.live = 0

    def get_default_memory_pool(self) -> Any:
        return self.pool

    def record(self, event: Any) -> None:
        event.time = max(self.device, self.host) if self.events_see_work else 0.0

    def synchronize(self) -> None:
        self.host = max(self.host, self.device)

    def spin(self, grid: Any, block: Any, arguments: tuple[Any, ...]) -> None:
        self.spins.append(float(arguments[0]) / 1e9)
        self.device = self.host + self.spins[-1]

    def run(self) -> None:
        self.host += self.queueing
        self.device = max(self.device, self.host) + 1e-3


class Hook:
    """What the stand-in calls cupy.cuda.MemoryHook."""

    current: Any = None

    def __enter__(self) -> Hook:
        Hook.current = self
        return self

    def __exit__(self, *_: object) -> None:
        Hook.current = None


@pytest.fixture
def cuda(monkeypatch):
    """Give what makes a Cuda device of a stand-in."""

    def make(queueing: float) -> tuple[Any, FakeCupy]:
        fake = FakeCupy(queueing)
        device: Any = object.__new__(gpu_device.Cuda)
        device.xp, device.torch, device._spin, device._cycles = fake, None, fake.spin, 1e9
        monkeypatch.setattr(gpu_device.time, "perf_counter", lambda: fake.host)
        return device, fake

    return make


def test_a_step_is_timed_with_the_time_that_python_takes(cuda):
    device, fake = cuda(2e-3)
    turn = device.time(fake.run, 4)
    assert turn.seconds == pytest.approx(
        [3e-3, 2e-3, 2e-3, 2e-3]
    )  # the first one's run, then Python
    assert turn.queueing == pytest.approx(2e-3)
    assert fake.spins == []


def test_a_kernel_is_queued_ahead_of_the_device(cuda):
    device, fake = cuda(2e-3)
    turn = device.time(fake.run, 3, 2, 2e-3)
    assert turn.seconds == pytest.approx([1e-3] * 3)
    assert fake.spins == pytest.approx([0.0241])


def test_a_kernel_that_was_queued_too_late_is_timed_again(cuda):
    device, fake = cuda(2e-3)
    assert device.time(fake.run, 3, 1, 5e-4).seconds == pytest.approx([1e-3] * 3)
    assert fake.spins == pytest.approx([0.0031, 0.0062])


def test_work_that_events_do_not_see_is_timed_by_the_host(cuda):
    device, fake = cuda(1e-6)
    fake.events_see_work = False
    assert device.time(fake.run, 4).seconds == pytest.approx([1e-3] * 4, rel=0.01)


def test_memory_is_what_was_live_at_the_peak(cuda):
    device, fake = cuda(1e-6)

    def allocate(size: int) -> None:
        fake.live += size
        if size > 0:
            Hook.current.malloc_postprocess(mem_ptr=1, mem_size=size, device_id=0)
        else:
            Hook.current.free_postprocess(mem_ptr=1, mem_size=-size, device_id=0)

    def make() -> Any:
        allocate(100)
        return lambda: (allocate(50), allocate(30), allocate(-80), fake.run())

    run, first, memory = device.watch_memory(make)
    assert memory == (180, 100)
    assert first == pytest.approx(1e-3, rel=0.01)
    assert run is not None


def test_launches_are_timed_and_summed_by_kernel_and_grid(monkeypatch):
    ran, clock = [], iter(range(100))
    runtime = SimpleNamespace(
        device=lambda: 0,
        limits=lambda device: launch.Limits(90, 132, 1),
        load=lambda source, name: lambda *arguments: ran.append((source, name, *arguments)),
    )
    monkeypatch.setattr(launch, "runtime", runtime)
    launch.forget_kernels()
    array = np.zeros(1000, np.float32)
    with gpu_profile.timed_launches(lambda: next(clock)) as launches:
        for grid in ((1,), (1,), (2,)):
            launch.kernel("sgd.cu", "sgd<float>")(grid, (32,), (array, 3, None))
        assert launch.device_limits().multiprocessors == 132
    assert launch.runtime is runtime
    assert [one[:4] for one in ran] == [("sgd.cu", "sgd<float>", (n,), (32,)) for n in (1, 1, 2)]
    lines = gpu_profile.lines_of([(one, 1e-3 * (one.end - one.begin)) for one in launches])
    assert [(line.name, line.calls, line.moved) for line in lines] == [
        ("sgd<float> (1,) x (32,)", 2, 8000.0),
        ("sgd<float> (2,) x (32,)", 1, 4000.0),
    ]
    assert [line.seconds for line in lines] == pytest.approx([2e-3, 1e-3])
    text = gpu_profile.table(lines, 4e-3, longest=1)
    assert "    2   2.00 ms  50.0%       0 GB/s  sgd<float> (1,) x (32,)" in text
    assert "1 more: 1.00 ms" in text
    assert "not accounted for: 1.000 ms (25%)" in text
    launch.forget_kernels()


# ---- the whole program, rehearsed ----------------------------------------------------------------


def rehearsed(folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Run the program without a GPU; return its results and its log."""
    assert gpu.main(["--rehearse", "--out", str(folder), *arguments]) == 0
    (path,) = folder.glob("gpu-*.json")
    log = path.with_suffix(".log")
    return json.loads(path.read_text()), log.read_text() if log.exists() else ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("--only", "limits"),
        ("--only", "matmul"),
        ("--only", "convolutions", "--rows", "bf16.*(1x1|7x7)"),
        ("--only", "passes", "--rows", "SGD|pool|pixels|entropy|512"),
        ("--only", "passes", "--rows", "known statistics|gelu|softmax|layer norm"),
    ],
    ids=lambda arguments: " ".join(arguments[1::2]),
)
def test_rows_of_kernels_run(arguments: tuple[str, ...], tmp_path: Path, capsys):
    pytest.importorskip("torch")
    results, log = rehearsed(tmp_path, *arguments)
    assert results["rows"]
    assert log == ""
    for row in results["rows"]:
        assert all("median" in found for found in row["contestants"].values()), row["name"]
    assert gpu_report.document(results)
    assert "kept in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("group", "rows"),
    [
        ("convolutions", "bf16.*(1x1 stride 2, 64|7x7)"),
        ("passes", "bf16.*(pool|64 x 16|pixels|silu|softmax|norm, 512)"),
        ("matmul", "bf16 256"),
    ],
)
def test_our_kernels_in_rows_of_bfloat16_run_emulated(
    group: str, rows: str, emulated_cuda, monkeypatch, tmp_path: Path, capsys
):
    """The CPU has no such kernels, so that the rehearsal takes float32 in their place."""
    pytest.importorskip("torch")
    for name in ("dtype", "fast_matmul", "autocast"):
        monkeypatch.setattr(Rehearsal, name, getattr(gpu_device.Device, name))
    for name in ("conv_tf32", "float32_matmul_precision"):  # which the rows set
        monkeypatch.setattr(settings.cuda, name, getattr(settings.cuda, name))
    results, log = rehearsed(tmp_path, "--only", group, "--rows", rows)
    assert log == ""
    found = [row["contestants"]["gradengine"] for row in results["rows"]]
    assert len(found) >= 2
    assert all("median" in one for one in found)
    assert all(one["distance"] < 1e-2 for one in found if group != "passes")


def test_rows_of_tiles_run_emulated_in_each_tile(emulated_cuda, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Rehearsal, "dtype", gpu_device.Device.dtype)
    arguments = ("--only", "tiles", "--rows", "bf16.*1x1 stride 2, 64")
    results, log = rehearsed(tmp_path, *arguments)
    assert log == ""
    *rows, by_weight = results["rows"]
    assert len(rows) == 2
    for row in rows:
        assert len(row["contestants"]) == 1 + len(conv2d.TILES)
        assert "256x64 warpgroups 1.00 ms" in gpu_report.line(row)
    assert set(by_weight["contestants"]) == {"128x128 gathered", "64x64 gathered", "by the rule"}
    names = " ".join(name for _, source, name in launch._kernels if source == conv2d.SOURCE)
    for tile in conv2d.TILES:
        parameters = ", ".join(map(str, tile))
        assert f"conv2d_forward<bfloat16, {parameters}, false>" in names
        assert f"conv2d_grad_input<bfloat16, {parameters}>" in names
    assert not settings.cuda.benchmark


@pytest.mark.parametrize("group", ["training", "frozen", "forward"])
def test_rows_of_steps_run(group: str, tmp_path: Path, capsys):
    pytest.importorskip("torch")
    results, log = rehearsed(tmp_path, "--only", group, "--batches", "2", "--peers", "eager,nchw")
    (row,) = results["rows"]
    assert log == ""
    assert list(row["contestants"]) == [
        *("gradengine bf16 captured", "gradengine bf16"),
        *("gradengine tf32 captured", "gradengine tf32"),
        *("PyTorch nhwc bf16", "PyTorch nhwc tf32", "PyTorch nchw tf32"),
    ]
    if group == "forward":  # the same weights and images for all
        means = [found["result"] for found in row["contestants"].values()]
        assert means == pytest.approx([means[0]] * 7, rel=0.05, abs=1e-3)
    assert "ratio, bf16" in gpu_report.step_table(results["rows"], group)


def test_compiled_peers_have_rows_of_their_own():
    options = gpu.parse(["--batches", "256,32", "--peers", "eager,compile"])
    rows = list(gpu.GROUPS["training"](Rehearsal(SimpleNamespace()), options))
    assert [row.name for row in rows] == [
        *("batch 256", "batch 256, beside compile"),
        *("batch 32", "batch 32, beside compile"),
    ]
    rows.sort(key=lambda row: row.importance)
    assert [row.name for row in rows][:2] == ["batch 256", "batch 32"]


def test_what_the_budget_leaves_out_is_listed(tmp_path: Path, capsys):
    results, _ = rehearsed(tmp_path, "--only", "matmul", "--seconds", "0")
    assert results["rows"] == []
    assert len(results["not_measured"]) == 18


def test_an_earlier_file_is_not_overwritten(tmp_path: Path):
    about = {"device": "NVIDIA H100 80GB", "date": "2026-01-02"}
    first = gpu.Results(tmp_path, about)
    first.write()
    second = gpu.Results(tmp_path, about)
    assert first.path.name == "gpu-nvidia-h100-80gb-2026-01-02.json"
    assert second.path.name == "gpu-nvidia-h100-80gb-2026-01-02-2.json"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "trianing"], "no group is called"),
        (["--peers", "eager,jit"], "no peer is called"),
        (["--batches", "a"], "invalid"),
    ],
)
def test_a_wrong_name_is_refused(arguments: list[str], message: str, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main(arguments)
    assert message in capsys.readouterr().err


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "cuda_unavailable_reason", lambda: "no NVIDIA driver is loaded")
    assert gpu.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "gpu: CUDA is not usable: no NVIDIA driver is loaded; --rehearse runs without it"
    )


def test_the_profile_runs_a_step_and_prints_its_kernels(capsys):
    pytest.importorskip("torch")
    command = ["--rehearse", "--library", "torch", "--batch", "2", "--kind", "forward"]
    assert gpu_profile.main(command) == 0
    out = capsys.readouterr().out
    assert "PyTorch nhwc bf16, forward, batch 2: 1.00 ms a step" in out
    assert "conv" in out
    assert "ncu --clock-control none" in out


def test_the_profile_of_the_host_times_calls_and_prints_functions(capsys, monkeypatch):
    monkeypatch.setattr(gpu_host, "STEPS", 1)
    monkeypatch.setattr(gpu_host, "CALLS", 1)
    # So many that backward is among them where forward, and what that calls, took longer this time.
    assert gpu_profile.main(["--rehearse", "--host", "--batch", "2", "--longest", "60"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\d [nµm]s  array\.transpose\(0, 3, 1, 2\)", out)
    for precision in ("bf16", "tf32"):
        assert f"gradengine {precision}, batch 2: the host queues a step in" in out
    assert out.count("Ordered by: internal time") == out.count("Ordered by: cumulative time") == 2
    assert "(backward)" in out


def test_a_captured_step_of_pytorch_keeps_the_memory_that_its_graph_reads():
    """A graph holds addresses only: the step has to live as long as what replays it."""
    graph = SimpleNamespace(replay=lambda: None)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    cuda = SimpleNamespace(
        Stream=lambda: stream,
        current_stream=lambda: stream,
        stream=lambda one: nullcontext(),
        CUDAGraph=lambda: graph,
        graph=lambda one: nullcontext(),
    )
    device: Any = SimpleNamespace(torch=SimpleNamespace(cuda=cuda))
    images = np.ones(3)
    replay = gpu_device.Device.torch_capture(device, partial(np.sum, images))
    known = weakref.ref(images)
    del images
    replay()
    assert known() is not None


def test_the_profile_of_convolutions_lists_both_libraries_kernels(capsys):
    pytest.importorskip("torch")
    command = ["--rehearse", "--convolutions", "tf32 forward, 1x1 stride 2, 64"]
    assert gpu_profile.main(command) == 0
    out = capsys.readouterr().out
    assert "cuDNN nhwc: aten::conv2d" in out
    assert "--once --convolutions 'tf32 forward, 1x1 stride 2, 64'" in out
    assert gpu_profile.main([*command, "--once"]) == 0
    assert "aten" not in capsys.readouterr().out
