"""Every preset's shards, built by Megatron-core without memory: parameters, and the fullest GPU's memory by kind.

    python benchmarks/presets.py [PRESET ...]

Activations, the sleeping servers and NCCL's buffers come on top. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests import presets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset", nargs="*", default=presets.PRESETS)
    from nemo_dapo.megatron import cpu

    cpu.install()
    results = []
    print(f"{'preset':<28} {'parameters':>16} {'weights':>8} {'grads':>8} {'optimizer':>9} {'GiB a GPU':>10} {'s':>6}")
    for preset in parser.parse_args().preset:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            result = presets.of_all_ranks(preset, Path(folder))
        results.append(result | {"seconds": time.monotonic() - started})
        sizes = result["memory"]
        print(
            f"{preset:<28} {result['parameters']:>16,} {sizes['weights']:>8.1f} {sizes['gradients']:>8.1f} "
            f"{sizes['optimizer']:>9.1f} {sum(sizes.values()):>10.1f} {results[-1]['seconds']:>6.1f}",
            flush=True,
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
