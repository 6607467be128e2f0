"""The package as users get it: what the wheel holds, where it imports, and what importing costs."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILED = {".pyc", ".nbc", ".nbi"}


def run(*command: str, folder: Path) -> str:
    """Run Python on the command in a folder; a failure shows all that it printed."""
    result = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


def build(target: str, source: Path, output: Path) -> Path:
    if find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed (pip install hatchling)")
    run("-m", "hatchling", "build", "-t", target, "-d", str(output), folder=source)
    (built,) = output.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


def package_files() -> set[str]:
    """Give the names under which the wheel must hold the files of gradengine/ and kernels/."""
    names = set()
    for folder, package in (("gradengine", "gradengine"), ("kernels", "gradengine/kernels")):
        for path in (ROOT / folder).rglob("*"):
            name = path.relative_to(ROOT / folder).as_posix()
            through_link = folder == "gradengine" and name.startswith("kernels/")
            if path.is_file() and path.suffix not in COMPILED and not through_link:
                names.add(f"{package}/{name}")
    return names


def files_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_wheel_holds_the_package_and_its_kernels_alone(wheel: Path) -> None:
    assert files_in(wheel) == package_files()


def test_sdist_gives_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    sdist = build("sdist", ROOT, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    again = build("wheel", tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path / "again")
    assert files_in(again) == files_in(wheel)


def test_wheel_imports_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    options = ("--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check")
    run("-m", "pip", "install", *options, "--target", str(site), str(wheel), folder=tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import gradengine, gradengine.kernels;"
        "print(gradengine.__file__); print(gradengine.kernels.__file__)"
    )
    places = run("-c", code, folder=tmp_path).splitlines()
    assert places == [
        str(site / "gradengine" / "__init__.py"),
        str(site / "gradengine" / "kernels" / "__init__.py"),
    ]


@pytest.mark.parametrize(
    "package",
    [
        *("numba", "cupy", "ml_dtypes", "PIL", "matplotlib"),
        *("sklearn", "tqdm", "safetensors", "scipy", "torch"),
    ],
)
def test_import_is_light(package: str, modules_of_import: set[str]) -> None:
    assert "numpy" in modules_of_import
    assert package not in modules_of_import


@pytest.fixture(scope="module")
def modules_of_import() -> set[str]:
    """Give the names of all modules that `import gradengine` imports in a new process."""
    return set(run("-c", "import sys, gradengine; print(*sys.modules)", folder=ROOT).split())
