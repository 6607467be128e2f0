"""From the rows of a run to tables, a plot and the table in README.md.

python -m benchmarks.report                    # draw and tabulate the newest results again
python -m benchmarks.report FILE.json  # those of a file
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import textwrap
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
MARKS = ("<!-- benchmarks: made by python -m benchmarks.report -->", "<!-- end of benchmarks -->")
OURS = "gradengine"
LIMITS, PEAK, COPY = "This machine", "float32 multiply-adds", "copy"
IN_README = ("ResNet-18", "A fresh process")
SECONDS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9))
PACKAGES = ("gradengine", "numpy", "numba", "torch", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Row:
    """The medians of one race by contestant, in seconds or MB; `flop` and `moved` are one run's."""

    group: str
    name: str
    medians: dict[str, float]
    unit: str = "s"
    flop: float = 0.0
    moved: float = 0.0  # bytes read and written, at the least

    @property
    def ours(self) -> float:
        return self.medians[OURS]

    @property
    def best_peer(self) -> tuple[str, float] | None:
        """The best peer that computes what we do: bfloat16 is measured for the record only."""
        peers = [item for item in self.medians.items() if item[0] != OURS and "bf16" not in item[0]]
        return min(peers, key=lambda item: item[1], default=None)

    @property
    def ratio(self) -> float | None:
        """How many times as long as we (or as much memory) the best peer takes."""
        return None if self.best_peer is None else self.best_peer[1] / self.ours


# ---- tables --------------------------------------------------------------------------------------


def table(rows: list[Row], limits: dict[str, float]) -> list[list[str]]:
    """Return the cells of one group's table, its heading first."""
    peers = list(dict.fromkeys(key for row in rows for key in row.medians if key != OURS))
    rated = any(row.flop or row.moved for row in rows)
    cells = [["", OURS, *peers, *(["ratio"] if peers else []), *(["rate"] if rated else [])]]
    for row in rows:
        line = [row.name, quantity(row.ours, row.unit)]
        line += [peer_cell(row, key) for key in peers]
        if peers:
            line.append("" if row.ratio is None else f"{row.ratio:.2f}")
        if rated:
            line.append(rate(row, limits))
        cells.append(line)
    return cells


def peer_cell(row: Row, peer: str) -> str:
    """Return a peer's median, and how many times ours it is, or nothing if it was not there."""
    if peer not in row.medians:
        return ""
    value = row.medians[peer]
    return f"{quantity(value, row.unit)} ({value / row.ours:.2f})"


def quantity(value: float, unit: str) -> str:
    """Return a value with three digits and a unit that fits."""
    if unit == "s":
        unit, size = next((s for s in SECONDS if value >= 0.9995 * s[1]), SECONDS[-1])
        value /= size
    return f"{value:.{max(0, 3 - len(str(int(value))))}f} {unit}"


def rate(row: Row, limits: dict[str, float]) -> str:
    """Return GFLOP/s or GB/s, and which share of this machine's limit that is, if measured."""
    amount, name, limit = (row.flop, "GFLOP/s", PEAK) if row.flop else (row.moved, "GB/s", COPY)
    if not amount:
        return ""
    found = amount / row.ours / 1e9
    share = f" ({found / limits[limit]:.0%})" if limits.get(limit) and row.group != LIMITS else ""
    return f"{found:.1f} {name}{share}" if found < 10 else f"{found:.0f} {name}{share}"


def measured_limits(rows: list[Row]) -> dict[str, float]:
    """Return the peak in GFLOP/s and the copy bandwidth in GB/s, as far as the run measured them."""
    return {
        row.name: (row.flop or row.moved) / row.ours / 1e9 for row in rows if row.group == LIMITS
    }


def by_group(rows: list[Row]) -> dict[str, list[Row]]:
    """Return the rows of each group, those of README.md first."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return dict(sorted(groups.items(), key=lambda item: item[0] not in IN_README))


def text_tables(rows: list[Row]) -> str:
    """Return all groups for a terminal."""
    limits = measured_limits(rows)
    parts = []
    for group, members in by_group(rows).items():
        cells = table(members, limits)
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        cells[0][0] = group
        widths[0] = max(widths[0], len(group))
        for line in cells:
            pairs = list(zip(line, widths, strict=True))
            parts.append(
                "  ".join([f"{line[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in pairs[1:])])
            )
        parts.append("")
    return "\n".join(parts)


def markdown_tables(rows: list[Row], groups: tuple[str, ...] | None = None) -> str:
    """Return the groups (all if None) as Markdown tables."""
    limits = measured_limits(rows)
    parts = []
    for group, members in by_group(rows).items():
        if groups is not None and group not in groups:
            continue
        cells = table(members, limits)
        cells[0][0] = group
        ruler = ["---", *["---:"] * (len(cells[0]) - 1)]
        parts += [f"| {' | '.join(line)} |" for line in (cells[0], ruler, *cells[1:])]
        parts.append("")
    return "\n".join(parts)


# ---- what is kept --------------------------------------------------------------------------------


def device() -> dict[str, Any]:
    """Return the processor, its cores, and the versions of all that takes part."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    model = re.search(r"model name\s*: (.*)", text)
    return {
        "processor": model[1] if model else platform.processor(),
        "vectors": "AVX-512" if "avx512f" in text else "AVX2" if "avx2" in text else "",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "commit": _commit(),
        **versions,
    }


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def keep(rows: list[Row]) -> Path:
    """Write the rows to the machine's file of the day, then draw and tabulate it; return the file.

    Rows that another run of the day left there stay, unless they were measured again.
    """
    about = {"date": date.today().isoformat(), **device()}
    name = re.sub(r"[^a-z0-9]+", "-", f"{about['processor']} {about['date']}".lower()).strip("-")
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    measured = {(row.group, row.name): asdict(row) for row in rows}
    if path.exists():
        kept = json.loads(path.read_text())["rows"]
        measured = {(row["group"], row["name"]): row for row in kept} | measured
    content = {"about": about, "rows": list(measured.values())}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    publish(path)
    return path


def publish(path: Path) -> None:
    """Write the tables and the plot beside a file of results, and the short table into README.md."""
    content = json.loads(path.read_text())
    rows = [Row(**row) for row in content["rows"]]
    path.with_suffix(".md").write_text(
        f"{headline(content['about'], rows)}\n\n{markdown_tables(rows)}"
    )
    draw(rows, headline(content["about"], rows), path.with_suffix(".svg"))
    README.write_text(with_table(README.read_text(), content["about"], rows, path))


def headline(about: dict[str, Any], rows: list[Row]) -> str:
    """Return one sentence on what was measured where, with what."""
    versions = ", ".join(f"{name} {about[name]}" for name in PACKAGES[1:] if name in about)
    text = f"{about['date']}, {about['cores']} cores of {about['processor']} {about['vectors']}"
    limits = measured_limits(rows)
    if PEAK in limits:
        text += f", {limits[PEAK]:.0f} GFLOP/s of float32 multiply-adds at most"
    if COPY in limits:
        text += f", {limits[COPY]:.0f} GB/s copied"
    return f"{text}; Python {about['python']}, {versions}."


def with_table(text: str, about: dict[str, Any], rows: list[Row], path: Path) -> str:
    """Return README's text with what stands between the marks replaced by these results."""
    start, end = MARKS
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"report: README.md must hold the marks once; expected {start} and {end}")
    place = f"benchmarks/results/{path.stem}"
    lines = [
        start,
        headline(about, rows),
        "",
        markdown_tables(rows, IN_README),
        f"[All rows]({place}.md)",
        "",
        f"![how many times as long as gradengine the best float32 peer takes]({place}.svg)",
        end,
    ]
    return pattern.sub(lambda _: "\n".join(lines), text)


def draw(rows: list[Row], title: str, path: Path) -> None:
    """Draw the ratio of every row that has a peer; right of the line, gradengine is the faster."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": OURS})
    compared = [row for row in rows if row.ratio is not None]
    figure = Figure(figsize=(9, 0.5 + 0.19 * (len(compared) + 2 * len(by_group(compared)))))
    axes = figure.add_subplot()
    heights, labels, height = [], [], 0
    for number, (group, members) in enumerate(by_group(compared).items()):
        axes.text(1.0, height, f" {group}", weight="bold", va="center", fontsize=8)
        for row in members:
            height += 1
            ratio = row.ratio or 1.0
            axes.barh(height, ratio - 1, left=1, color=f"C{number}", height=0.75)
            side = "left" if ratio >= 1 else "right"
            axes.text(ratio, height, f" {ratio:.2f} ", va="center", ha=side, fontsize=7)
            heights.append(height)
            labels.append(f"{row.name}  ({(row.best_peer or ('',))[0]})")
        height += 2
    axes.set(xscale="log", ylim=(height - 1, -1))
    axes.set_yticks(heights, labels, fontsize=7)
    about = ["the best float32 peer's time (or memory) / gradengine's", *textwrap.wrap(title, 100)]
    axes.set_xlabel("\n".join(about), fontsize=7)
    low, high = (pick([1.0, *(row.ratio or 1.0 for row in compared)]) for pick in (min, max))
    marks = [mark for mark in (0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20) if low / 2 < mark < high * 2]
    axes.set_xticks(marks, [f"{mark:g}" for mark in marks])
    axes.set_xticks([], minor=True)
    axes.grid(axis="x", linewidth=0.3)
    axes.axvline(1, color="black", linewidth=0.8)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    kept = [path for path in FOLDER.glob("*.json") if not path.name.startswith("gpu-")]
    newest = max(kept, key=os.path.getmtime, default=None)
    chosen = Path(sys.argv[1]) if len(sys.argv) > 1 else newest
    if chosen is None:
        sys.exit(f"no results in {FOLDER}: run python -m pytest benchmarks --report")
    publish(chosen)
