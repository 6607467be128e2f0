"""The finetuning program: what it writes, that it survives being killed, and what it refuses."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gradengine as ge
from gradengine.devices import cuda_is_available
from gradengine.examples import finetune
from gradengine.models import resnet18

ROOT = Path(__file__).parents[2]
TINY = ("--image-size", "32", "--epochs", "3", "--batch-size", "4", "--device", "cpu")
RESULTS = ["curves.png", "history.json", "last.pth", "model.pth"]


@pytest.fixture(autouse=True)
def _default_device_is_put_back() -> Iterator[None]:
    yield
    ge.set_default_device(None)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder of three classes, of six images each."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label, name in enumerate(("ape", "bee", "cat")):
        (folder / name).mkdir()
        for number in range(6):
            pixels = rng.integers(0, 200, (40, 44, 3), dtype=np.uint8)
            pixels[..., label] += 55
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """Start the program. A test run in the background ignores Ctrl-C, but this must not inherit it."""
    code = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "runpy.run_module('gradengine.examples.finetune', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen[str], timeout: int = 100) -> tuple[str, str]:
    """Return what is left of the program's output and errors; one that takes too long is ended."""
    with process:  # closes its pipes, which a later test would be blamed for
        try:
            return process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def run(*arguments: str | Path) -> str:
    """Run the program to its end and return what it printed."""
    process = start(*arguments)
    output, errors = finish(process, timeout=280)
    # The first process on a machine says that it compiles.
    others = [line for line in errors.splitlines() if not line.startswith("gradengine: compiling")]
    assert (process.returncode, others) == (0, [])
    return output


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Give the folder of a run of both stages that nothing disturbed, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "new" / "run"
    return out, run("--data", images, *TINY, "--out", out)


def weights_in(folder: Path) -> dict[str, np.ndarray]:
    state = ge.load(folder / "model.pth")
    assert isinstance(state, dict)
    return {name: tensor.numpy() for name, tensor in state.items()}


def history_in(folder: Path) -> list[dict[str, float]]:
    """Read the history without what differs between equal runs."""
    history = json.loads((folder / "history.json").read_text())
    return [{k: v for k, v in entry.items() if k != "images_per_second"} for entry in history]


def moved(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> set[str]:
    return {name for name in before if before[name].tobytes() != after[name].tobytes()}


# ---- a run that nothing disturbs


def test_it_writes_its_results_and_nothing_else(finished: tuple[Path, str]) -> None:
    out, _ = finished
    assert sorted(path.name for path in out.iterdir()) == RESULTS
    with Image.open(out / "curves.png") as curves:
        assert curves.format == "PNG"


def test_weights_are_those_of_a_resnet18_with_the_new_classes(finished: tuple[Path, str]) -> None:
    model = resnet18(finished[0] / "model.pth")
    assert model.fc.weight.shape == (3, 512)


def test_history_has_each_epoch_of_both_stages(finished: tuple[Path, str]) -> None:
    history = history_in(finished[0])
    places = [(entry["stage"], entry["epoch"]) for entry in history]
    assert places == [(stage, epoch) for stage in ("backbone", "head") for epoch in range(4)]
    assert all(0 <= entry["accuracy"] <= 1 for entry in history)
    assert [entry["epoch"] for entry in history if "loss" not in entry] == [0, 0]


def test_it_says_what_it_measured(finished: tuple[Path, str]) -> None:
    out, printed = finished
    before, *_, after = (e["accuracy"] for e in history_in(out) if e["stage"] == "head")
    assert printed.splitlines()[0] == "backbone: all layers, from scratch, on classes ape, bee"
    assert "head: 1,539 parameters to train, on all 3 classes" in printed
    assert printed.splitlines()[-1] == (
        f"{before:.4f} of 6 held-out images right before finetuning, {after:.4f} after; "
        f"model.pth and curves.png are in {out}"
    )


@pytest.mark.parametrize(
    ("options", "trained"), [((), ("fc.",)), (("--unfreeze", "layer4"), ("layer4.", "fc."))]
)
def test_only_what_is_not_frozen_moves(
    finished: tuple[Path, str],
    images: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    trained: tuple[str, ...],
) -> None:
    start_from = finished[0] / "model.pth"
    command = ["--data", images, *TINY, *options, "--weights", start_from, "--out", tmp_path]
    assert finetune.main([str(word) for word in command]) == 0
    before = weights_in(finished[0])
    assert moved(before, weights_in(tmp_path)) == {
        name for name in before if name.startswith(trained)
    }
    assert [entry["stage"] for entry in history_in(tmp_path)] == ["head"] * 4


def test_default_run_learns_ten_digits_on_a_frozen_network_that_saw_five(tmp_path: Path) -> None:
    run("--out", tmp_path, "--device", "cpu")
    accuracy = [e["accuracy"] for e in history_in(tmp_path) if e["stage"] == "head"]
    assert accuracy[0] < 0.4
    assert accuracy[-1] > 0.9


# ---- interruption


@pytest.mark.parametrize(
    ("signal_number", "moment"),
    [(signal.SIGKILL, "backbone epoch 1"), (signal.SIGINT, "head epoch 1")],
    ids=["kill", "ctrl-c"],
)
def test_an_interrupted_run_ends_where_an_undisturbed_one_does(
    finished: tuple[Path, str],
    images: Path,
    tmp_path: Path,
    signal_number: signal.Signals,
    moment: str,
) -> None:
    out = tmp_path / "my run"
    process = start("--data", images, *TINY, "--out", out)
    assert process.stdout is not None
    while not process.stdout.readline().startswith(moment):
        assert process.poll() is None, process.communicate()
    process.send_signal(signal_number)
    _, errors = finish(process)
    resume = f"--resume --out {shlex.quote(str(out))} --device cpu"
    if signal_number == signal.SIGINT:
        command = f"python -m gradengine.examples.finetune {resume}"
        assert errors == f"finetune: interrupted; go on with: {command}\n"
        assert process.returncode == 130
    else:
        assert process.returncode == -signal_number
        (out / "last.pth.0123456789abcdef.partial").write_bytes(b"what a kill may leave")
    assert not (out / "model.pth").exists()

    printed = run(*shlex.split(resume))
    assert moment not in printed
    assert moved(weights_in(finished[0]), weights_in(out)) == set()
    assert history_in(out) == history_in(finished[0])
    assert sorted(path.name for path in out.iterdir()) == RESULTS


def test_ctrl_c_before_the_first_checkpoint_says_so(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "accuracy", interrupted)
    assert finetune.main(["--data", str(images), *TINY, "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "finetune: interrupted; nothing was saved yet\n"


def test_a_finished_run_can_be_resumed(finished: tuple[Path, str]) -> None:
    before = weights_in(finished[0])
    (finished[0] / "model.pth").unlink()
    assert finetune.main(["--resume", "--out", str(finished[0])]) == 0
    assert moved(before, weights_in(finished[0])) == set()


# ---- what is refused


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run what must be refused, and return the one line that it says."""
    try:
        status = finetune.main([str(word) for word in arguments])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    *_, line = printed.err.splitlines()
    assert line.startswith("finetune: ")
    assert printed.err == f"{line}\n"
    return line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--epochs", "0"], "argument --epochs: must be at least 1; got 0"),
        (["--epochs", "-3"], "argument --epochs: must be at least 1; got -3"),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--batch-size", "1"], "argument --batch-size: must be at least 2; got 1"),
        (["--lr", "-0.1"], "argument --lr: must be at least 1e-12; got -0.1"),
        (["--lr", "nan"], "argument --lr: must be at least 1e-12; got nan"),
        (["--lr", "inf"], "argument --lr: must be at least 1e-12; got inf"),
        (["--image-size", "8"], "argument --image-size: must be at least 32; got 8"),
        (["--seed", "-1"], "argument --seed: must be at least 0; got -1"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
        (["--device", "abacus"], "--device: device: a device is named by"),
        (["--unfreeze", "layer9"], "--unfreeze: LAYER must be one of conv1, bn1, layer1"),
        (["--unfreeze", "fc"], "--unfreeze: LAYER must be one of conv1, bn1, layer1"),
        (["--data", "/no/such/folder"], "there must be such a folder; got folder=/no/such/folder"),
        (["--weights", "/no/such/file"], "got weights='/no/such/file'"),
        (["--resume"], "--resume: there is no run to go on with; no file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert said in refusal(capsys, "--device", "cpu", "--out", out, *arguments)
    assert not out.exists()


def test_bad_input_ends_the_process_with_status_2(tmp_path: Path) -> None:
    process = start("--data", tmp_path / "nowhere", "--out", tmp_path / "out")
    output, errors = finish(process)
    assert (process.returncode, output) == (2, "")
    assert errors.count("\n") == 1


@pytest.mark.skipif(cuda_is_available(), reason="CUDA is usable")
def test_cuda_where_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "--device", "cuda", "--out", tmp_path / "out")
    assert "--device: device: CUDA is not usable: " in line


def test_folder_with_too_little_in_it(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    command = ("--data", folder, "--out", tmp_path / "out")
    assert "one folder of images a class; got none" in refusal(capsys, *command)
    (folder / "only").mkdir()
    assert "(count >= 2); got count=0" in refusal(capsys, *command)
    for name in ("0.png", "1.png"):
        assert f"got count={name[0]}" in refusal(capsys, *command)
        (folder / "only" / name).write_bytes((images / "ape" / name).read_bytes())
    assert "two classes at least; got ['only']" in refusal(capsys, *command)


def test_files_that_are_no_images_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data" / "notes").mkdir(parents=True)
    note = tmp_path / "data" / "notes" / "a.txt"
    note.write_text("no image")
    assert finetune.main(["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]) == 2
    named, line = capsys.readouterr().err.splitlines()
    assert f"left out {note}" in named
    assert "got count=0" in line


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no weights at all", "cannot be read as weights"),
        ({"fc.weight": np.zeros((3, 512), np.float32)}, "Missing key(s)"),
        ([1, 2], "weights must be the file of a state dict"),
    ],
    ids=["text", "too little", "list"],
)
def test_wrong_weights(
    content: object, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        ge.weights.write_pth(content, path)
    line = refusal(capsys, "--weights", path, "--out", tmp_path / "out")
    assert line.startswith("finetune: --weights: ")
    assert said in line


@pytest.mark.parametrize("content", [b"no checkpoint", {"model": {}}], ids=["text", "too little"])
def test_wrong_checkpoint(
    content: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "last.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        ge.weights.write_pth(content, path)
    before = path.read_bytes()
    assert f"--resume: {path}" in refusal(capsys, "--resume", "--out", tmp_path)
    assert path.read_bytes() == before


def test_out_below_a_file(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("kept")
    assert "file" in refusal(capsys, "--data", images, "--out", tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "kept"


def test_out_that_cannot_be_written_to(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # to root every folder is writable
    line = refusal(capsys, "--data", images, "--out", tmp_path)
    assert f"--out: this folder cannot be written to; got {tmp_path}" in line


@pytest.mark.parametrize("name", RESULTS)
def test_an_earlier_run_is_not_overwritten(
    name: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("precious")
    line = refusal(capsys, "--data", images, "--out", tmp_path)
    assert f"{tmp_path} holds an earlier run; --resume it or choose another --out" in line
    assert (tmp_path / name).read_text() == "precious"


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--epochs", "9", "the run began with epochs=3; got epochs=9"),
        ("--lr", "0.5", "the run began with lr=0.01; got lr=0.5"),
        ("--batch-size", "8", "the run began with batch_size=4; got batch_size=8"),
        ("--unfreeze", "layer4", "the run began with unfreeze=None; got unfreeze=layer4"),
        ("--weights", "DEFAULT", "the run began with weights=None; got weights=DEFAULT"),
        ("--data", "/elsewhere", "got data=/elsewhere"),
    ],
)
def test_resume_with_other_options(
    option: str,
    value: str,
    said: str,
    finished: tuple[Path, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = (finished[0] / "last.pth").read_bytes()
    assert said in refusal(capsys, "--resume", "--out", finished[0], option, value)
    assert (finished[0] / "last.pth").read_bytes() == before


def test_resume_with_other_images(
    finished: tuple[Path, str], images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    away = images / "ape" / "0.png"
    away.rename(images / "0.png")
    try:
        line = refusal(capsys, "--resume", "--out", finished[0])
    finally:
        (images / "0.png").rename(away)
    assert "--resume: the images are not those that the run began with" in line


@pytest.mark.parametrize("package", ["PIL", "matplotlib", "tqdm", "sklearn"])
def test_missing_package(
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(finetune, "find_spec", lambda name: None if name == package else name)
    line = refusal(capsys, "--out", tmp_path / "out")
    assert f"{package} is missing: pip install 'gradengine[examples]'" in line


@pytest.mark.parametrize("option", ["--data", "--weights", "--out"])
def test_empty_names_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        finetune.main([option, ""])
    assert capsys.readouterr().err == f"finetune: argument {option}: must not be empty\n"


def test_too_little_memory_is_one_line(
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(finetune, "train_epoch", fail)
    assert finetune.main(["--data", str(images), *TINY, "--out", str(tmp_path / "run")]) == 2
    assert "out of memory; lower --batch-size" in capsys.readouterr().err


def test_out_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file"
    path.touch()
    assert finetune.main(["--out", str(path)]) == 2
    assert capsys.readouterr().err == f"finetune: --out: this is not a folder; got {path}\n"
