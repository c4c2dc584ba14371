"""Every preset's shards, built by Megatron-core without memory: parameters, and the fullest GPU's memory by kind.

    python benchmarks/presets.py [--table FILE] [PRESET ...]

What one layer needs while it is computed, the sleeping servers and NCCL's buffers come on top. The last line is JSON.
Ends with 1 when a preset's shards are not Hugging Face's model.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.tables import write_table
from tests import presets

KINDS = ("weights", "gradients", "optimizer", "layer inputs")
HEAD = f"| preset | layout | GPUs a server | parameters | {' | '.join(KINDS)} | GiB a GPU | s |"


def row(result: dict[str, Any]) -> str:
    sizes = result["memory"]
    cells = [result["preset"], result["layout"] or "data parallel", result["server"], f"{result['parameters']:,}"]
    cells += [f"{size:.1f}" for size in (*(sizes[kind] for kind in KINDS), sum(sizes.values()), result["seconds"])]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset", nargs="*", default=presets.PRESETS)
    parser.add_argument("--table", type=Path, help="write the table to this file, between its markers")
    options = parser.parse_args()
    from nemo_dapo.megatron import cpu

    cpu.install()
    results = []
    print(HEAD)
    for preset in options.preset:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            result = presets.of_all_ranks(preset, Path(folder))
        results.append(result | {"seconds": time.monotonic() - started})
        print(row(results[-1]), flush=True)
    if options.table:
        lines = [HEAD, "|---" * HEAD.count(" | ") + "|---|", *map(row, results)]
        write_table(options.table, "presets", "\n".join(lines))
    print(json.dumps(results))
    sys.exit(any(result["parameters"] != result["published"] for result in results))


if __name__ == "__main__":
    main()
