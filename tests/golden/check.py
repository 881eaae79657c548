"""Check every golden file of a directory: ``python3 run.py golden DIR [--allow-unsupported] [--details] [--json FILE]``.

One row a file: its name, its kind, how many tensors were compared, the worst error beside its tolerance, and the verdict.
Exit status 0 when everything holds, 1 on a miss, an unreadable file or (without ``--allow-unsupported``) a kind that this
version cannot check, 2 on wrong arguments. What a file is follows from its metadata; see ``golden_files.py``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))
if "sana_video_core" not in sys.modules:  # by its place: the repository's root must not enter sys.path
    _package = ROOT / "sana_video_core"
    _spec = importlib.util.spec_from_file_location(
        "sana_video_core", _package / "__init__.py", submodule_search_locations=[str(_package)])
    sys.modules["sana_video_core"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["sana_video_core"])

import golden_causal  # noqa: E402
import golden_model  # noqa: E402
import golden_vae_text  # noqa: E402
import torch  # noqa: E402
from golden_files import NOT_YET, Golden, GoldenError, Report, Unsupported, Weights  # noqa: E402

from sana_video_core.errors import SanaVideoError  # noqa: E402

CHECKERS = {
    "forward": golden_model.check_forward,
    "sampler": golden_model.check_sampler,
    "schedules": golden_model.check_schedules,
    "weights": golden_model.check_weights,
    "chunked forward": golden_causal.check_chunked,
    "chunked modules": golden_causal.check_modules,
    "sampling": golden_causal.check_sampling,
    "interactive": golden_causal.check_interactive,
    "level tables": golden_causal.check_tables,
    "block times": golden_causal.check_block_times,
    "wan vae": golden_vae_text.check_wan,
    "gemma": golden_vae_text.check_gemma,
}
PASS, FAIL, UNSUPPORTED = "pass", "FAIL", "unsupported"


class Row:
    """The verdict on one file."""

    def __init__(self, name: str, kind: str, verdict: str, report: Report | None = None, reason: str = ""):
        self.name, self.kind, self.verdict, self.report, self.reason = name, kind, verdict, report or Report(), reason

    @property
    def cells(self) -> tuple[str, ...]:
        checks = self.report.checks
        worst = max(checks, key=lambda c: c.strain) if checks else None
        figures = (f"{worst.error:.1e}", f"{worst.tolerance:.0e}") if worst else ("-", "-")
        notes = "; ".join([n for n in (self.reason, *self.report.notes) if n])
        return self.name, self.kind, str(len(checks)), *figures, self.verdict, notes

    @property
    def strain(self) -> float:
        return max((c.strain for c in self.report.checks), default=math.inf)

    @property
    def record(self) -> dict:
        """What a program may want to know of it."""
        return {"kind": self.kind, "verdict": self.verdict, "reason": self.reason, "misses": self.misses,
                "notes": self.report.notes}

    @property
    def misses(self) -> list[str]:
        """One line for every comparison that failed, the worst first."""
        failed = sorted((c for c in self.report.checks if not c.holds), key=lambda c: -c.strain)
        return [f"{c.name}: error {c.error:.2e}, tolerance {c.tolerance:.0e}" for c in failed]


def check_file(golden: Golden, weights: Weights) -> Row:
    """Compare everything in one file; whatever goes wrong becomes its verdict."""
    kind = golden.kind
    if kind in NOT_YET:
        return Row(golden.name, kind, UNSUPPORTED)
    rows = [_checked(golden, kind, choice) for choice in weights.alternatives(golden)]
    return min(rows, key=lambda row: (row.verdict != PASS, row.strain))


def _checked(golden: Golden, kind: str, weights: Weights) -> Row:
    report = Report()
    try:
        with torch.no_grad():
            CHECKERS[kind](golden, weights, report)
    except Unsupported as e:
        return Row(golden.name, kind, UNSUPPORTED, report, str(e))
    except (GoldenError, SanaVideoError, KeyError, ValueError, TypeError, RuntimeError, IndexError) as e:
        return Row(golden.name, kind, FAIL, report, f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}")
    if unread := golden.tensors.unread():
        report.notes.append(f"{len(unread)} tensors not used: {', '.join(unread[:3])}")
    if not report.checks:
        return Row(golden.name, kind, FAIL, report, "nothing to compare in it")
    return Row(golden.name, kind, PASS if all(c.holds for c in report.checks) else FAIL, report)


def check_directory(folder: Path) -> list[Row]:
    """A row for every safetensors file in ``folder``, in the order of the names."""
    rows, files = [], []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            files.append(Golden(path))
        except GoldenError as e:
            rows.append(Row(path.stem, "unreadable", FAIL, reason=str(e)))
    weights = Weights([f for f in files if f.kind == "weights"])
    return sorted(rows + [check_file(f, weights) for f in files], key=lambda row: row.name)


def show(rows: list[Row], details: bool = False) -> None:
    """Print the table, misses below their row; with ``details`` every comparison."""
    table = [("file", "kind", "tensors", "worst", "tolerance", "verdict", "remarks"), *(row.cells for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(6)]
    for line, row in zip(table, [None, *rows]):
        print("  ".join([*(cell.ljust(width) for cell, width in zip(line, widths)), line[6]]).rstrip())
        for check in row.report.checks if row and details else ():
            print(f"    {check.name}: {check.error:.2e} of {check.tolerance:.0e}")
        misses = row.misses if row and not details else []
        for miss in misses[:5]:
            print(f"    {miss}")
        if len(misses) > 5:
            print(f"    and {len(misses) - 5} more")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="run.py golden", description="Check every golden file in a directory.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--allow-unsupported", action="store_true", help="kinds that cannot be checked yet are no failure")
    parser.add_argument("--details", action="store_true", help="print every comparison")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the verdicts there as well")
    options = parser.parse_args(arguments)
    if not options.directory.is_dir():
        print(f"{options.directory} is not a directory", file=sys.stderr)
        return 2
    torch.set_num_threads(2)  # as the official runs: another number sums in another order
    rows = check_directory(options.directory)
    if not rows:
        print(f"{options.directory} holds no .safetensors files", file=sys.stderr)
        return 2
    show(rows, options.details)
    if options.json:
        options.json.write_text(json.dumps({row.name: row.record for row in rows}), encoding="utf-8")
    count = {verdict: sum(row.verdict == verdict for row in rows) for verdict in (PASS, FAIL, UNSUPPORTED)}
    print(f"{len(rows)} files: {count[PASS]} pass, {count[FAIL]} fail, {count[UNSUPPORTED]} unsupported")
    return int(bool(count[FAIL] or (count[UNSUPPORTED] and not options.allow_unsupported)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
