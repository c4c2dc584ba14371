"""Every parallel layout of up to four ranks against one rank, and the table in docs/parallelism.md.

    python benchmarks/parallelism.py [--pairwise] [--table FILE]

Gradient, gradient norm, weights and log-probabilities after two steps, in float32, for dense models and mixtures of
experts, tied and untied, in one, several and many micro-batches. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

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
    for layout, of_layout in rows.items():
        worst = " | ".join(f"{max(result[name] for result in of_layout):.1e}" for name in QUANTITIES)
        lines.append(f"| {layout} | {len(of_layout)} | {worst} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairwise", action="store_true", help="a subset in which every two settings still meet")
    parser.add_argument("--table", type=Path, help="write the table to this file, between its markers")
    options = parser.parse_args()
    every = matrix.cases()
    wanted = matrix.pairwise(every) if options.pairwise else every
    print(f"{len(wanted)} of {len(every)} combinations", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        results = []
        for result in matrix.run(Path(folder), wanted):
            results.append(result)
            print(f"{len(results)}: {result}", flush=True)
    print(table(results))
    if options.table:
        before, begin, rest = options.table.read_text().partition("<!-- table -->\n")
        _, end, after = rest.partition("<!-- end of table -->")
        options.table.write_text(f"{before}{begin}\n{table(results)}\n\n{end}{after}")
    failed = [result for result in results if not matrix.is_equal(result)]
    for result in failed:
        print(f"differs: {result}")
    worst = max(max(result["gradient"], result["norm"], result["weights"]) for result in results)
    print(json.dumps({"combinations": len(results), "worst_relative": worst, "failed": len(failed)}))
    sys.exit(bool(failed) or len(results) < len(wanted))


if __name__ == "__main__":
    main()
