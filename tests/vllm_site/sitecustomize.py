"""For a real vLLM server on a CPU, when this folder is on PYTHONPATH: its workers' devices and NCCL are stand-ins."""

import sys

if "nemo_dapo.rollout.probe" not in sys.orig_argv:
    from nemo_dapo.rollout.weights.incoming import Incoming
    from tests.stand_in_devices import GlooNCCL, open_on_host

    Incoming.__init__.__defaults__ = (GlooNCCL, open_on_host)
