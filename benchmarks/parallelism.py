"""Every parallel layout of up to four ranks against one rank, and the table in docs/parallelism.md.

    python benchmarks/parallelism.py [--pairwise] [--results FILE] [--table FILE]

Gradient, gradient norm, weights and log-probabilities after two steps, in float32, for dense models and mixtures of
experts, tied and untied, in one, several and many micro-batches. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.tables import write_table
from tests import parallel_matrix as matrix

QUANTITIES = ("gradient", "norm", "weights", "logprobs")


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: one row a layout, the worst of its models and budgets."""
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        layout = {name: size for name, size in result["layout"].items() if size is True or (size or 1) != 1}
        sizes = " × ".join(f"{name.upper()}{'' if size is True else size}" for name, size in layout.items())
        rows[f"{result['ranks']} | {sizes or 'data parallel only'}"].append(result)
    lines = [
        "| ranks | layout, the rest data parallel | combinations | gradient | norm | weights | log-probabilities, nats |",
        "|---|---|---|---|---|---|---|",
    ]
    for described, of_layout in rows.items():
        worst = " | ".join(f"{max(result[name] for result in of_layout):.1e}" for name in QUANTITIES)
        lines.append(f"| {described} | {len(of_layout)} | {worst} |")
    return "\n".join(lines)


def measured(wanted: list[matrix.Case], file: Path | None) -> Iterator[dict[str, Any]]:
    """One result a case; those that stand in `file`, of an earlier run that was cut, are taken from there."""
    results = [json.loads(line) for line in file.read_text().splitlines()] if file and file.exists() else []
    known = {matrix.case_of(result): result for result in results}
    yield from (known[case] for case in wanted if case in known)
    with tempfile.TemporaryDirectory() as folder:
        for result in matrix.run(Path(folder), [case for case in wanted if case not in known]):
            if file:
                with file.open("a") as lines:
                    lines.write(json.dumps(result) + "\n")
            yield result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairwise", action="store_true", help="a subset in which every two settings still meet")
    parser.add_argument("--results", type=Path, help="keep results here, and go on behind those of an earlier run")
    parser.add_argument("--table", type=Path, help="write the table to this file, between its markers")
    options = parser.parse_args()
    every = matrix.cases()
    wanted = matrix.pairwise(every) if options.pairwise else every
    print(f"{len(wanted)} of {len(every)} combinations", flush=True)
    results = []
    for result in measured(wanted, options.results):
        results.append(result)
        print(f"{len(results)}: {result}", flush=True)
    print(table(results))
    if options.table:
        write_table(options.table, "table", table(results))
    failed = [result for result in results if not matrix.is_equal(result)]
    for result in failed:
        print(f"differs: {result}")
    worst = max(max(result["gradient"], result["norm"], result["weights"]) for result in results)
    print(json.dumps({"combinations": len(results), "worst_relative": worst, "failed": len(failed)}))
    sys.exit(bool(failed) or len(results) < len(wanted))


if __name__ == "__main__":
    main()
