"""Steps captured as CUDA graphs: training as without, what is refused, what is captured anew.

A stand-in on NumPy arrays records and replays; the same on a GPU is at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gradengine as ge
from gradengine import devices, nn, optim
from gradengine.kernels.cuda import capture, matmul
from tests import numpy_gpu


class CountedGraphs(capture.CupyGraphs):
    """Graphs of a GPU; `captured` and `launched` count."""

    captured = launched = 0

    def capture(self, work: Callable[[], Any]) -> Any:
        self.captured += 1
        return super().capture(work)

    def launch(self, graph: Any) -> None:
        self.launched += 1
        super().launch(graph)


@pytest.fixture(params=["stand-in", pytest.param("cupy", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Make new tensors on the stand-in or on a GPU; gives the graphs that were made."""
    made: list[Any] = []
    kind = CountedGraphs if request.param == "cupy" else numpy_gpu.FakeGraphs

    def make_graphs(device: int) -> Any:
        made.append(kind(device))
        return made[-1]

    if request.param == "stand-in":
        request.getfixturevalue("emulated_cuda")
        numpy_gpu.stand_in(monkeypatch)
    # Steps without a graph multiply by the same kernels as those with one
    monkeypatch.setattr(matmul, "in_step", lambda: True)
    monkeypatch.setattr(capture, "make_graphs", make_graphs)
    ge.set_default_device("cuda")
    return made


class Training:
    """A small model, its optimizer, and the step that trains it."""

    def __init__(self, kind: Any = optim.SGD, dropout: bool = False, **options: Any) -> None:
        ge.manual_seed(5)
        layers = [nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU()]
        layers += [nn.Dropout(0.4)] if dropout else []
        self.model = nn.Sequential(*layers, nn.Linear(5, 3))
        self.optimizer = kind(self.model.parameters(), **{"lr": 0.1} | options)

    def step(self, x: Any, target: Any) -> Any:
        self.optimizer.zero_grad()
        scores = self.model(x)
        loss = ge.cross_entropy(scores, target)
        loss.backward()
        self.optimizer.step()
        return loss, {"scores": scores}

    def state(self) -> dict[str, Any]:
        found = {name: tensor.tolist() for name, tensor in self.model.state_dict().items()}
        found |= {f"{name}.grad": p.grad.tolist() for name, p in self.model.named_parameters()}
        for place, kept in self.optimizer.state_dict()["state"].items():
            for name, value in kept.items():
                found[f"{place}.{name}"] = value.tolist() if hasattr(value, "tolist") else value
        return found


def batches(count: int, size: int = 6) -> list[Any]:
    generator = np.random.default_rng(1)
    return [
        (generator.standard_normal((size, 4), np.float32), generator.integers(0, 3, size))
        for _ in range(count)
    ]


def on_gpu(batch: Any) -> Any:
    return tuple(map(ge.tensor, batch))


OPTIMIZERS = [
    (optim.SGD, {}),
    (optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (optim.SGD, {"momentum": 0.9, "dampening": 0.3, "maximize": True}),
    (optim.Adam, {"weight_decay": 0.1}),
    (optim.AdamW, {"betas": (0.8, 0.9)}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_training_is_as_without_a_graph(kind: Any, options: Any, gpu: Any) -> None:
    eager, captured = Training(kind, **options), Training(kind, **options)
    step = ge.cuda.graph(captured.step, warmup=2)
    for number, batch in enumerate(batches(6)):
        for training in (eager, captured):
            training.optimizer.param_groups[0]["lr"] = 0.1 / (1 + number)
        expected, (loss, more) = eager.step(*on_gpu(batch)), step(*on_gpu(batch))
        assert loss.item() == expected[0].item()
        assert more["scores"].tolist() == expected[1]["scores"].tolist()
        assert not loss.requires_grad
        assert captured.state() == eager.state()
        assert captured.optimizer.step_count == number + 1
    (graphs,) = gpu
    assert graphs.captured == 1
    assert graphs.launched == 4


@pytest.mark.parametrize("schedule_first", [False, True])
def test_a_schedule_inside_the_step_goes_on(schedule_first: bool, gpu: Any) -> None:
    trainings = []
    for _ in range(2):
        training = Training(momentum=0.9)
        schedule = optim.LambdaLR(training.optimizer, lambda epoch: 1 / (1 + epoch))

        def step(x: Any, target: Any, training: Any = training, schedule: Any = schedule) -> Any:
            if schedule_first and training.optimizer.step_count:
                schedule.step()
            outputs = training.step(x, target)
            if not schedule_first:
                schedule.step()
            return outputs

        trainings.append((training, schedule, step))
    (eager, schedule, step), (captured, captured_schedule, captured_step) = trainings
    replayed = ge.cuda.graph(captured_step, warmup=1)
    for batch in batches(4):
        step(*on_gpu(batch))
        replayed(*on_gpu(batch))
        assert captured_schedule.get_last_lr() == schedule.get_last_lr()
        assert captured.state() == eager.state()


def test_random_numbers_are_those_of_the_stream(gpu: Any) -> None:
    eager, captured = Training(dropout=True), Training(dropout=True)
    step = ge.cuda.graph(captured.step, warmup=1)
    for number, batch in enumerate(batches(4)):
        ge.manual_seed(number)
        eager.step(*on_gpu(batch))
        after = ge.get_rng_state().tolist()
        ge.manual_seed(number)
        step(*on_gpu(batch))
        assert ge.get_rng_state().tolist() == after
        assert captured.state() == eager.state()
    assert gpu[0].launched == 3


def test_a_captured_step_draws_on_the_gpu(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = ge.Generator()

    def step(x: Any) -> Any:
        own = ge.randn(3, 2, generator=generator), ge.randn(3, dtype=ge.float64)
        return ge.dropout(x, 0.4), ge.rand(5, 7), *own, ge.randint(-4, 9, (6,)), ge.randperm(9)

    captured = ge.cuda.graph(step, warmup=1)
    x = ge.ones(8, 9)
    captured(x)
    captured(x)
    sizes = []
    copy = capture.copy_from_host
    monkeypatch.setattr(
        capture, "copy_from_host", lambda *given: (sizes.append(given[0].nbytes), copy(*given))
    )
    seen = set()
    for number in range(3):
        found = []
        for run in (captured, step):
            ge.manual_seed(number)
            generator.manual_seed(-number)
            found.append([tensor.tolist() for tensor in run(x)])
            found[-1].append(ge.get_rng_state().tolist())
            found[-1].append(generator.get_state().tolist())
        assert found[0] == found[1]
        seen.add(str(found[0]))
    assert len(seen) == 3
    assert gpu[0].captured == 1
    # Copied were, before each replay, seed and position of five draws, and an order of nine
    assert sorted(sizes) == sorted(3 * [*[16] * 5, 9 * 8])


def test_clipping_is_captured(gpu: Any) -> None:
    eager, captured = Training(), Training()

    def clipped(training: Training) -> Any:
        def step(x: Any, target: Any) -> Any:
            training.optimizer.zero_grad()
            loss = ge.cross_entropy(training.model(x), target)
            loss.backward()
            norm = nn.clip_grad_norm_(training.model.parameters(), 0.1)
            training.optimizer.step()
            return norm

        return step

    plain, replayed = clipped(eager), ge.cuda.graph(clipped(captured), warmup=1)
    for batch in batches(3):
        assert replayed(*on_gpu(batch)).item() == plain(*on_gpu(batch)).item() > 0.1
        assert captured.state() == eager.state()


def test_numbers_and_tables_of_operations_are_captured(gpu: Any) -> None:
    kept = ge.ones(2, 2)

    def step(x: Any) -> Any:
        kept.zero_()
        kept.fill_(2.0)
        chosen = ge.where(x[0, 0] > 0, x[0, 0], -1.0) + kept
        larger = nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
        return chosen, larger, x.masked_fill(x > 1, 0.5)

    captured = ge.cuda.graph(step, warmup=1)
    generator = np.random.default_rng(4)
    for _ in range(3):
        x = ge.tensor(generator.standard_normal((1, 1, 2, 2), np.float32))
        for found, expected in zip(captured(x), step(x), strict=True):
            assert found.tolist() == expected.tolist()
    assert gpu[0].captured == 1
    x = ge.ones(1, 2)
    other = ge.cuda.graph(lambda x: ge.zeros_like(x).fill_(x.shape[1]), warmup=1)
    assert [other(x).tolist() for _ in range(3)] == [[[2, 2]]] * 3


# ---- gradients -------------------------------------------------------------------------------------


def square(p: Any, x: Any) -> Any:
    loss = (p * p * x).sum()
    loss.backward()
    return loss


@pytest.mark.parametrize("inside", [True, False])
def test_gradients_replace_what_was_forgotten(inside: bool, gpu: Any) -> None:
    p = nn.Parameter(ge.tensor([1.0, 2.0]))

    def step(x: Any) -> Any:
        if inside:
            p.grad = None
        square(p, x)

    captured = ge.cuda.graph(step, warmup=1)
    found = set()
    for number in range(1, 5):
        if not inside:
            p.grad = None
        captured(ge.tensor([float(number), 0.0]))
        assert p.grad.tolist() == [2 * number, 0]
        if number > 1:
            found.add(id(p.grad))
    assert len(found) == 1
    assert gpu[0].captured == 1


def test_gradients_are_accumulated(gpu: Any) -> None:
    p = nn.Parameter(ge.tensor([1.0]))
    captured = ge.cuda.graph(lambda x: square(p, x), warmup=1)
    for number in range(1, 5):
        captured(ge.tensor([1.0]))
        assert p.grad.tolist() == [2 * number]
    assert gpu[0].captured == 1
    p.grad = None  # what the captured step adds to is gone
    for number in range(1, 4):
        captured(ge.tensor([1.0]))
        assert p.grad.tolist() == [2 * number]


def test_gradients_that_the_step_forgets_at_its_end(gpu: Any) -> None:
    p = nn.Parameter(ge.tensor([1.0]))
    optimizer = optim.SGD([p], lr=0.5)

    def step(x: Any) -> None:
        square(p, x)
        optimizer.step()
        optimizer.zero_grad()

    captured = ge.cuda.graph(step, warmup=1)
    for number in range(1, 4):
        captured(ge.tensor([0.5]))
        assert p.grad is None
        assert p.tolist() == [0.5**number]


# ---- what Python keeps -----------------------------------------------------------------------------


def test_a_replay_is_noticed_by_the_tape(gpu: Any) -> None:
    training = Training()
    step = ge.cuda.graph(training.step, warmup=1)
    batch = batches(1)[0]
    step(*on_gpu(batch))
    loss, _ = step(*on_gpu(batch))
    parameter = training.model[0].weight
    kept = [
        (parameter * parameter).sum(),
        (parameter * parameter.grad).sum(),
        (parameter * loss).sum(),
    ]
    step(*on_gpu(batch))
    for value in kept:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()


class Folded(nn.Module):
    """A convolution and a normalization that are folded together where nothing is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Any) -> Any:
        return nn.conv_norm(x, self.conv, self.norm)


def test_folded_weights_follow_training_by_replays_and_otherwise(gpu: Any) -> None:
    ge.manual_seed(3)
    model = Folded()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    x = ge.randn(2, 2, 3, 3)

    def train(x: Any) -> None:
        model.train()
        optimizer.zero_grad()
        (model(x) ** 2).sum().backward()
        optimizer.step()

    @ge.no_grad
    def evaluate(x: Any) -> Any:
        model.eval()
        return model(x)

    captured_train = ge.cuda.graph(train, warmup=1)
    captured_evaluate = ge.cuda.graph(evaluate, warmup=1)
    seen = []
    for train_now in (train, captured_train, captured_train, captured_train, train):
        train_now(x)
        for _ in range(3):
            seen.append(captured_evaluate(x).tolist())
            assert seen[-1] == evaluate(x).tolist()
    assert len(set(map(str, seen))) == 5
    evaluations, trainings = gpu
    assert evaluations.launched == 2 * 5  # the first of each folds
    assert trainings.launched == 2
    assert trainings.captured == 1


# ---- captured anew ---------------------------------------------------------------------------------


def test_a_loaded_state_is_taken_over(gpu: Any) -> None:
    eager, captured = Training(optim.Adam), Training(optim.Adam)
    step = ge.cuda.graph(captured.step, warmup=1)
    given = batches(6)
    for number, batch in enumerate(given):
        if number == 3:
            for training in (eager, captured):
                other = Training(optim.Adam)
                other.step(*on_gpu(given[0]))
                training.optimizer.load_state_dict(other.optimizer.state_dict())
        eager.step(*on_gpu(batch))
        step(*on_gpu(batch))
        assert captured.state() == eager.state()
    assert gpu[0].captured == 2


def test_replaced_parameters_and_changed_structure_are_taken_over(gpu: Any) -> None:
    eager, captured = Training(), Training()
    step = ge.cuda.graph(captured.step, warmup=1)
    for number, batch in enumerate(batches(9)):
        for training in (eager, captured):
            if number == 3:
                weight = training.model[0].weight
                weight.data = (weight * 2).detach()
            if number == 5:
                training.optimizer.param_groups[0]["momentum"] = 0.9
            if number == 7:
                training.optimizer.param_groups[0]["momentum"] = 0.5
        eager.step(*on_gpu(batch))
        step(*on_gpu(batch))
        assert captured.state() == eager.state()
    assert (
        gpu[0].captured == 4
    )  # at first, the weight, the momentum: put off once, as velocities start
    assert gpu[0].launched == 7


def test_what_only_new_memory_starts_is_put_off(gpu: Any) -> None:
    p, q = nn.Parameter(ge.tensor([1.0])), nn.Parameter(ge.tensor([1.0]))
    optimizer = optim.Adam([p, q], lr=0.5)
    train_both = [False]

    def step(x: Any) -> None:
        optimizer.zero_grad()
        ((p * q if train_both[0] else p) * x).sum().backward()
        optimizer.step()

    captured = ge.cuda.graph(step, warmup=2)
    for number in range(6):
        train_both[0] = number > 1  # q has no state when the capture begins
        captured(ge.tensor([1.0]))
        assert optimizer.state[p]["step"] == number + 1
        assert optimizer.state[q].get("step", 0) == max(0, number - 1)


def test_the_mode_of_gradients_is_part_of_the_capture(gpu: Any) -> None:
    p = nn.Parameter(ge.tensor([2.0]))
    recorded = []

    def step(x: Any) -> Any:
        y = p * x
        recorded.append(y.requires_grad)
        return y

    captured = ge.cuda.graph(step, warmup=1)
    for grad in (True, True, False, False, True):
        with ge.set_grad_enabled(grad):
            assert captured(ge.tensor([3.0])).tolist() == [6]
    assert recorded == [True, True, False, True]


def test_autocast_and_settings_around_are_part_of_the_capture(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = nn.Parameter(ge.tensor([[1 + 2**-8, 3.0]]))

    def step(x: Any) -> Any:
        return nn.functional.linear(x, p)

    captured = ge.cuda.graph(step, warmup=1)
    found = []
    with ge.autocast("cuda", dtype="bfloat16"):
        for number in range(4):
            found.append(captured(ge.tensor([[1.0, float(number)]])))
            found[-1] = found[-1].dtype.name, found[-1].tolist()
            if number:  # p is the same when the capture begins
                with ge.no_grad():
                    p += 1
    assert found == [("bfloat16", [[value]]) for value in (1, 4, 10, 18)]
    assert captured(ge.tensor([[1.0, 0.0]])).tolist() == [[4 + 2**-8]]
    for precision in ("high", "high", "highest"):
        monkeypatch.setattr(ge.backends.cuda, "float32_matmul_precision", precision)
        captured(ge.tensor([[1.0, 0.0]]))
    assert gpu[0].captured == 4


def test_an_optimizer_of_ones_own_is_captured_with_its_numbers(gpu: Any) -> None:
    class Sign(optim.Optimizer):
        def check_options(self, options: Any) -> None:
            pass

        def update(self, values: Any, grad: Any, state: Any, options: Any) -> None:
            values -= options["lr"] * (grad > 0)

    p = nn.Parameter(ge.tensor([1.0]))
    optimizer = Sign([p], {"lr": 0.5})

    def step(x: Any) -> None:
        optimizer.zero_grad()
        (p * x).sum().backward()
        optimizer.step()

    captured = ge.cuda.graph(step, warmup=1)
    expected = 1.0
    for lr in (0.5, 0.5, 0.5, 0.25, 0.25):
        optimizer.param_groups[0]["lr"] = lr
        captured(ge.tensor([1.0]))
        expected -= lr
        assert p.item() == expected
    assert gpu[0].captured == 2


# ---- inputs and outputs ----------------------------------------------------------------------------


def test_inputs_may_be_nested_and_lie_anywhere(gpu: Any) -> None:
    def step(pair: Any, named: Any, factor: Any) -> Any:
        assert all(x.is_cuda for x in (*pair, named["z"]))
        return [pair[0] + pair[1] * factor, {"z": named["z"]}, "text"]

    captured = ge.cuda.graph(step, warmup=1)
    for number in range(1, 4):
        x, y = np.full((2, 3), float(number)), ge.full((2, 3), 2.0, dtype="float64", device="cpu")
        z = ge.full((2,), number)
        out, named, text = captured((x, y), {"z": z}, 10)
        assert out.tolist() == [[number + 20.0] * 3] * 2
        assert named["z"].tolist() == [number] * 2
        assert text == "text"


def test_copying_inputs_is_noticed_by_the_tape(gpu: Any) -> None:
    captured = ge.cuda.graph(lambda x: x, warmup=2)
    p = nn.Parameter(ge.tensor([1.0]))
    for _ in range(4):
        kept = (p * captured(ge.tensor([2.0]))).sum()
        captured(ge.tensor([3.0]))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            kept.backward()


def test_inputs_keep_their_memory_order_and_are_copied(gpu: Any) -> None:
    strides = []

    def step(x: Any) -> Any:
        strides.append(x.array.strides)
        return x * 2

    captured = ge.cuda.graph(step, warmup=1)
    whole = np.arange(24.0, dtype=np.float32).reshape(1, 2, 3, 4)
    for given in (whole.transpose(0, 3, 1, 2), np.ones((1, 4, 2, 3), np.float32)):
        for x in (given, ge.from_numpy(given).to("cuda")):
            assert captured(x).tolist() == (2 * given).tolist()
    assert set(strides) == {whole.transpose(0, 3, 1, 2).strides}


@pytest.mark.parametrize(
    ("other", "got"),
    [
        ((np.zeros((3, 2)), 1), r"got \(float64\[3, 2\], 1\)"),
        ((np.zeros((2, 2), np.float32), 1), r"got \(float32\[2, 2\], 1\)"),
        ((np.zeros((2, 2)), 2), r"got \(float64\[2, 2\], 2\)"),
        (([np.zeros((2, 2))], 1), r"got \(\[float64\[2, 2\]\], 1\)"),
        ((np.zeros((2, 2)),), r"got \(float64\[2, 2\],\)"),
    ],
)
def test_inputs_unlike_the_first_are_refused(other: Any, got: str, gpu: Any) -> None:
    captured = ge.cuda.graph(lambda x, factor: x * factor, warmup=1)
    for _ in range(3):
        captured(np.ones((2, 2)), 1)
        message = rf"graph: inputs must be like .*; expected \(float64\[2, 2\], 1\), {got}; make"
        with pytest.raises(ValueError, match=message):
            captured(*other)
    assert captured(np.ones((2, 2)), 1).tolist() == [[1, 1], [1, 1]]


def test_inputs_that_require_grad_are_refused(gpu: Any) -> None:
    captured = ge.cuda.graph(lambda x: x * 2)
    with pytest.raises(ValueError, match=r"no gradient reaches them; got .* shape=\(2,\)"):
        captured(ge.ones(2, requires_grad=True))


def test_a_step_must_run_before_it_is_captured() -> None:
    with pytest.raises(ValueError, match=r"\(warmup >= 1\); got warmup=0"):
        ge.cuda.graph(lambda: None, warmup=0)


# ---- what no graph can hold ------------------------------------------------------------------------


def waiting(x: Any, loss: Any) -> Any:
    return loss.item()


def copying_there(x: Any, loss: Any) -> Any:
    return x * ge.tensor([2.0])


def copying_here(x: Any, loss: Any) -> Any:
    return x.cpu()


def synchronizing(x: Any, loss: Any) -> Any:
    ge.synchronize("cuda")


def deciding(x: Any, loss: Any) -> Any:
    return x if loss > 0 else -x


@pytest.mark.parametrize(
    ("act", "line", "why"),
    [
        (waiting, "return loss.item()", "D2H transfers are disallowed"),
        (copying_there, r"return x \* ge.tensor\(\[2.0\]\)", "H2D transfers are disallowed"),
        (copying_here, r"return x.cpu\(\)", "D2H transfers are disallowed"),
        (synchronizing, r"ge.synchronize\(.cuda.\)", "not permitted when stream is capturing"),
        (deciding, "return x if loss > 0", "D2H transfers are disallowed"),
    ],
)
def test_waiting_and_copying_are_named(act: Any, line: str, why: str, gpu: Any) -> None:
    eager, training = Training(optim.Adam), Training(optim.Adam)
    refused = [True]

    def step(x: Any, target: Any) -> Any:
        loss, _ = training.step(x, target)
        if refused[0]:
            act(x, loss)
        return loss

    captured = ge.cuda.graph(step, warmup=1)
    first, second, third = batches(3)
    captured(*on_gpu(first))
    eager.step(*on_gpu(first))
    gradients = [parameter.grad for parameter in training.model.parameters()]
    for _ in range(2):
        message = (
            rf"must not wait for the GPU.*; got {line}.*\(test_cuda_graph.py, line \d+\): .*{why}"
        )
        with pytest.raises(RuntimeError, match=message):
            captured(*on_gpu(second))
        for parameter, grad in zip(training.model.parameters(), gradients, strict=True):
            assert parameter.grad is grad
        assert training.state() == eager.state()
        assert training.optimizer.step_count == 1
    assert capture.current() is None
    refused[0] = False
    for batch in (second, third):
        captured(*on_gpu(batch))
        eager.step(*on_gpu(batch))
        assert training.state() == eager.state()


def test_other_errors_pass(gpu: Any) -> None:
    calls = []

    def step(x: Any) -> Any:
        calls.append(x)
        if len(calls) == 2:
            raise KeyError("mine")
        return x + 1

    captured = ge.cuda.graph(step, warmup=1)
    captured(np.zeros(1))
    with pytest.raises(KeyError, match="mine"):
        captured(np.zeros(1))
    assert [captured(np.full(1, n)).item() for n in (1.0, 2.0)] == [2, 3]


def test_a_captured_step_in_another_is_refused(gpu: Any) -> None:
    inner = ge.cuda.graph(lambda x: x + 1, warmup=1)
    outer = ge.cuda.graph(lambda x: inner(x) * 2, warmup=2)
    x = np.zeros(1)
    assert outer(x).item() == outer(x).item() == 2
    with pytest.raises(RuntimeError, match="cannot be part of another captured step"):
        outer(x)
    assert inner(x).item() == 1


# ---- CuPy's part -----------------------------------------------------------------------------------


class LoggedCuda:
    """The part of cupy.cuda that `CupyGraphs` uses: notes the calls, and may run out of memory."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.left = 100
        self.ending: Exception | None = None
        self.runtime = SimpleNamespace(CUDARuntimeError=OutOfMemoryError, errorMemoryAllocation=2)
        self.outside = LoggedStream(self, "outside")

    def Stream(self, non_blocking: bool) -> Any:  # noqa: N802 - CuPy's names
        assert non_blocking  # else work on the default stream would be part of a capture
        return LoggedStream(self, "own")

    def Event(self, disable_timing: bool) -> str:  # noqa: N802
        return "event"

    def Device(self, index: int) -> Any:  # noqa: N802
        return Logged(self, f"device {index}")

    def get_current_stream(self) -> Any:
        return self.outside

    def using_allocator(self, allocator: Any) -> Any:
        self.allocator = allocator
        return Logged(self, "allocator")

    def Memory(self, size: int) -> int:  # noqa: N802
        if size > self.left:
            raise OutOfMemoryError
        self.left -= size
        return size

    def MemoryPointer(self, memory: int, offset: int) -> int:  # noqa: N802
        return memory

    def MemoryPool(self, allocator: Any = None) -> Any:  # noqa: N802
        return LoggedPool(self, allocator)


class OutOfMemoryError(RuntimeError):
    status = 2


class Logged:
    """Something current in a `with` statement."""

    def __init__(self, cuda: LoggedCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def __enter__(self) -> None:
        self.cuda.log.append(f"({self.name}")

    def __exit__(self, *_: object) -> None:
        self.cuda.log.append(f"{self.name})")


class LoggedStream(Logged):
    def record(self, event: str) -> str:
        self.cuda.log.append(f"{self.name} records")
        return event

    def wait_event(self, event: str) -> None:
        self.cuda.log.append(f"{self.name} waits")

    def begin_capture(self) -> None:
        self.cuda.log.append("begin")

    def end_capture(self) -> Any:
        self.cuda.log.append("end")
        if self.cuda.ending is not None:
            raise self.cuda.ending
        return SimpleNamespace(launch=lambda: self.cuda.log.append("launch"))


class LoggedPool:
    """Holds what it got; where there is no more, it gives back what is unused and tries again."""

    def __init__(self, cuda: LoggedCuda, allocator: Any) -> None:
        self.cuda, self.allocator = cuda, allocator
        self.bytes = self.unused = 0

    def malloc(self, size: int) -> int:
        try:
            self.allocator(size)
        except OutOfMemoryError:
            self.free_all_blocks()
            self.allocator(size)
        self.bytes += size
        return size

    def free_all_blocks(self) -> None:
        self.bytes -= self.unused
        self.cuda.left += self.unused
        self.unused = 0

    def total_bytes(self) -> int:
        return self.bytes


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> LoggedCuda:
    made = LoggedCuda()
    module = ModuleType("cupy")
    module.__dict__["cuda"] = made
    monkeypatch.setitem(sys.modules, "cupy", module)
    return made


WITHIN = ["(device 1", "(own", "(allocator"]
OUT = ["allocator)", "own)"]


def test_runs_before_a_capture_are_ordered_with_the_current_stream(cuda: LoggedCuda) -> None:
    graphs = capture.CupyGraphs(1)
    cuda.log.clear()
    assert graphs.run(lambda: cuda.allocator(60)) == 60
    expected = ["outside records", "own waits", *WITHIN[1:], *OUT, "own records", "outside waits"]
    assert cuda.log == ["(device 1", *expected, "device 1)"]
    with pytest.raises(KeyError):
        graphs.run(lambda: {}["x"])
    assert cuda.log[-3:] == ["own records", "outside waits", "device 1)"]
    assert cuda.log.count("(own") == cuda.log.count("own)") == 2


def test_a_capture_ends_whatever_happens(cuda: LoggedCuda) -> None:
    graphs = capture.CupyGraphs(1)
    cuda.log.clear()
    result, graph = graphs.capture(lambda: cuda.allocator(10))
    assert (result, cuda.log) == (10, [*WITHIN, "begin", "end", *OUT, "device 1)"])
    graphs.launch(graph)
    assert cuda.log[-3:] == ["(device 1", "launch", "device 1)"]
    cuda.ending = RuntimeError("cudaErrorStreamCaptureInvalidated")
    for work, error in ((lambda: {}["x"], KeyError), (lambda: None, RuntimeError)):
        cuda.log.clear()
        with pytest.raises(error):
            graphs.capture(work)
        assert cuda.log == [*WITHIN, "begin", "end", *OUT, "device 1)"]


def test_no_memory_that_a_capture_uses_is_given_back(cuda: LoggedCuda) -> None:
    graphs = capture.CupyGraphs(1)
    pool = graphs._pool
    graphs.run(lambda: cuda.allocator(60))
    pool.unused = 60
    assert graphs.run(lambda: cuda.allocator(70)) == 70  # an ordinary run may
    pool.unused = 70
    with pytest.raises(MemoryError, match="too little memory on the device to capture"):
        graphs.capture(lambda: cuda.allocator(60))
    assert pool.unused == 70
    with pytest.raises(MemoryError, match="too little memory on the device to capture"):
        graphs.capture(pool.free_all_blocks)  # as a limit of the pool's size makes it
    assert graphs.capture(lambda: cuda.allocator(60))[0] == 60


# ---- on another GPU than the current one -----------------------------------------------------------


@pytest.fixture
def second_gpu(gpu: Any) -> None:
    if devices.device_count() < 2:
        pytest.skip("there is one GPU")
    ge.set_default_device("cuda:1")


@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam])
def test_training_works_on_the_arrays_device(kind: Any, second_gpu: Any) -> None:
    training = Training(kind, dropout=True, weight_decay=0.1)
    step = ge.cuda.graph(training.step, warmup=2)
    for batch in batches(4):
        loss, _ = step(*on_gpu(batch))
        assert loss.device == ge.device("cuda:1")
    training.optimizer.zero_grad(set_to_none=False)
    nn.clip_grad_norm_(training.model.parameters(), 1.0)
    state = training.optimizer.state_dict()
    training.optimizer.load_state_dict(state)
    kept = [kept for each in training.optimizer.state.values() for kept in each.values()]
    assert {value.device for value in kept if hasattr(value, "device")} <= {ge.device("cuda:1")}


@pytest.mark.parametrize(
    "initialize",
    [
        *(nn.init.ones_, nn.init.uniform_, nn.init.normal_, nn.init.trunc_normal_),
        *(nn.init.xavier_normal_, nn.init.kaiming_uniform_),
    ],
)
def test_tensors_are_initialized_on_their_device(initialize: Any, second_gpu: Any) -> None:
    tensor = initialize(ge.zeros(20, 20))
    assert tensor.device == ge.device("cuda:1")
    ge.manual_seed(1)
    values = initialize(tensor).tolist()
    ge.manual_seed(1)
    assert initialize(ge.zeros(20, 20, device="cpu")).tolist() == values


# ---- on a GPU alone --------------------------------------------------------------------------------


class ImageTraining(Training):
    """ResNet-18 on small images."""

    def __init__(self) -> None:
        ge.manual_seed(7)
        self.model = ge.models.resnet18(num_classes=10)
        self.optimizer = optim.SGD(
            self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4
        )


def images(count: int) -> list[Any]:
    generator = np.random.default_rng(2)
    return [
        (generator.standard_normal((8, 3, 64, 64), np.float32), generator.integers(0, 10, 8))
        for _ in range(count)
    ]


def flat(model: Any) -> np.ndarray:
    tensors = model.state_dict().values()
    return np.concatenate([tensor.cpu().numpy().ravel() for tensor in tensors])


@pytest.mark.gpu
@pytest.mark.parametrize("gpu", ["cupy"], indirect=True)
def test_resnet18_trains_as_without_a_graph(gpu: Any) -> None:
    eager, captured = ImageTraining(), ImageTraining()
    step = ge.cuda.graph(captured.step)
    free = []
    for number, batch in enumerate(images(8)):
        for training in (eager, captured):
            training.optimizer.param_groups[0]["lr"] = 0.05 / (1 + number)
        expected, (loss, _) = eager.step(*on_gpu(batch)), step(*batch)
        assert loss.item() == pytest.approx(expected[0].item(), rel=1e-4)
        difference = np.linalg.norm(flat(captured.model) - flat(eager.model))
        assert difference < 1e-4 * np.linalg.norm(flat(eager.model))
    with pytest.raises(ValueError, match="graph: inputs must be like"):
        step(*images(1)[0][:1], np.zeros(4, np.int64))
    for batch in images(50):
        step(*batch)
        ge.cuda.synchronize()
        free.append(ge.cuda.mem_get_info()[0])
    assert free[0] == free[-1]
    assert (gpu[0].captured, gpu[0].launched) == (1, 5 + 50)


@pytest.mark.gpu
def test_time_and_memory_of_a_gpu() -> None:
    before = ge.cuda.memory_allocated()
    kept = ge.zeros(1 << 20, device="cuda")
    assert ge.cuda.memory_allocated() - before == kept.nbytes
    assert ge.cuda.memory_reserved() >= ge.cuda.memory_allocated()
    ge.cuda.empty_cache()
    free, total = ge.cuda.mem_get_info()
    assert 0 < free < total
    assert ge.cuda.get_device_name()
    start, end = (ge.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    kept = kept + 1
    end.record()
    end.synchronize()
    assert end.query()
    assert 0 < start.elapsed_time(end) < 1000


def test_only_a_gpu_has_them() -> None:
    for function in (ge.cuda.memory_allocated, ge.cuda.mem_get_info, ge.cuda.get_device_name):
        with pytest.raises(ValueError, match="the device must be a GPU; got device=cpu"):
            function("cpu")
