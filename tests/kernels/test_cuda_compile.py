"""Every CUDA kernel compiles for every architecture and keeps its values in registers.

Needs NVRTC and no GPU. To be done in minutes, each kernel is compiled for one architecture here, in
turn, so that each architecture gets kernels of each source; `machine_code.py` is a command that
compiles all for all. With -v the registers are printed.
"""

import pytest

from gradengine.__main__ import main
from gradengine.kernels.cuda.compiler import FOLDER, compiling_processes, shipped_kernels
from tests.kernels.machine_code import (
    ARCHITECTURES,
    compile_kernels,
    known_architectures,
    table,
)

pytestmark = pytest.mark.nvrtc

CASES = [
    (source, architecture)
    for source in sorted(path.name for path in FOLDER.glob("*.cu"))
    for architecture in ARCHITECTURES
]
NAMES = ["-".join(case) for case in CASES]


def share(source, architecture):
    """Return the kernels of a source that are compiled for an architecture: each one once."""
    names, known = shipped_kernels()[source], known_architectures()
    # Neighbours in the list are alike. Fewer kernels than architectures: some are compiled again.
    first = known.index(architecture)
    return names[first :: len(known)] or names[first % len(names) :][:1]


@pytest.fixture(scope="module")
def reports(request):
    """Compile the chosen cases, as many at a time as there are cores; give each one's future report."""
    chosen = {item.name for item in request.session.items}
    pool = compiling_processes()
    jobs = {
        case: pool.submit(compile_kernels, case[0], share(*case), case[1])
        for case, name in zip(CASES, NAMES, strict=True)
        if case[1] in known_architectures()
        and f"{test_values_stay_in_registers.__name__}[{name}]" in chosen
    }
    yield jobs
    pool.shutdown(cancel_futures=True)
    done = [job.result() for job in jobs.values() if not (job.cancelled() or job.exception())]
    if request.config.get_verbosity() > 0:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print("\n" + table([kernel for report in done for kernel in report.kernels]))


@pytest.mark.parametrize(("source", "architecture"), CASES, ids=NAMES)
def test_values_stay_in_registers(source, architecture, reports):
    if architecture not in known_architectures():
        pytest.skip(f"the installed NVRTC does not compile for {architecture}")
    report = reports[source, architecture].result()
    found = {kernel.name for kernel in report.kernels}
    assert found == {f"{source}: {name}" for name in share(source, architecture)}
    assert not report.faults()


def test_every_kernel_has_its_turn():
    for source, names in shipped_kernels().items():
        shares = [share(source, architecture) for architecture in known_architectures()]
        assert {name for part in shares for name in part} == set(names)
        assert all(shares)


@pytest.mark.parametrize("architecture", ["sm_42", "sm_90ab", "90a", "H100"])
def test_an_unknown_architecture_is_one_line(architecture, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["compile", "--cuda", architecture])
    out, errors = capsys.readouterr()
    assert errors.startswith("compile: architecture must be one that the installed NVRTC")
    assert f"got architecture='{architecture}'" in errors
    assert errors.count("\n") == 1
    assert not out


def test_a_kernel_that_spills_is_found(tmp_path):
    source = tmp_path / "spills.cu"
    source.write_text(
        """
        __global__ void __launch_bounds__(1024, 2) spills(const float* x, float* y) {
            float kept[96];
            for (int pass = 0; pass < 2; ++pass)
        #pragma unroll
                for (int i = 0; i < 96; ++i)
                    kept[i] = pass ? kept[i] * x[threadIdx.x] + kept[95 - i] : x[96 * threadIdx.x + i];
        #pragma unroll
            for (int i = 0; i < 96; ++i) y[96 * threadIdx.x + i] = kept[i];
        }
        __global__ void indexed(const float* x, float* y, int at) {
            float kept[32];
            for (int i = 0; i < 32; ++i) kept[i] = x[i];
            kept[at] = 0;
            for (int i = 0; i < 32; ++i) y[i] = kept[(i + at) % 32];
        }
        __global__ void warns(float* y) { if (threadIdx.x >= 0) y[threadIdx.x] = 0; }
        """
    )
    report = compile_kernels(str(source), ["spills", "indexed", "warns"], "sm_90")
    assert [bool(k.spill_bytes) for k in report.kernels] == [
        k.name.endswith("spills") for k in report.kernels
    ]
    assert len(report.faults()) == 3
    assert any("comparison" in warning for warning in report.warnings)
