"""A job of real ranks, heartbeat, leading and signals, without model and servers; test_faults.py starts it by torchrun.

    small_job.py FOLDER PHASE [stuck] [save]

In step 2 it stays in PHASE for good: both ranks wait for each other again and again. `stuck`: rank 1 stands still in `sync`
while rank 0 waits for it there. `save`: a signal ends the job after the step it is in.
"""

from nemo_dapo.launcher import end_with_launcher

end_with_launcher()

import asyncio
import datetime
import sys
import time
from pathlib import Path

import torch.distributed as dist

from nemo_dapo.coordination import StoppedError, is_true_anywhere, lead, share_number
from nemo_dapo.ending import Ending
from nemo_dapo.heartbeat import Heartbeat

FOLDER, HELD, OPTIONS = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
GROUP_TIMEOUT = 15.0 if "stuck" in OPTIONS else 600.0  # seconds; otherwise the heartbeat is to be the first to notice
HEARTBEAT_TIMEOUT = 3.0


async def sample() -> str:
    await asyncio.sleep(600)
    return "never"


async def sample_quickly() -> str:
    return "samples"


def step(number: int, ending: Ending, group: dist.ProcessGroup) -> None:
    for name in ("rollout", "update", "save"):
        with ending.phase.enter(name):
            if number < 2 or name != HELD:
                continue
            say_where_we_are(ending)
            if name == "rollout":
                lead(sample, group, ending.signals.asked)
            if "stuck" in OPTIONS and dist.get_rank() == 1:
                with ending.phase.enter("sync"):
                    time.sleep(600)
            # All agree on having seen the file, or one would wait in the barrier and the other for one more round.
            while not is_true_anywhere((FOLDER / "go_on").exists(), group):
                time.sleep(0.01)
            dist.barrier(group=group)


def say_where_we_are(ending: Ending) -> None:
    """Returns once the heartbeat has told the others."""
    assert ending.heartbeat is not None
    count = ending.heartbeat.count
    while ending.heartbeat.count < count + 2:
        time.sleep(0.05)
    (FOLDER / f"held_{dist.get_rank()}").touch()


def run(ending: Ending) -> None:
    timeout = datetime.timedelta(seconds=GROUP_TIMEOUT)
    dist.init_process_group("gloo", timeout=timeout)
    group = dist.new_group(backend="gloo", timeout=timeout, group_desc="the test's group")
    ending.output_dir = FOLDER
    ending.heartbeat = Heartbeat(ending.phase, HEARTBEAT_TIMEOUT, GROUP_TIMEOUT, FOLDER / "errors", ending.end_job)
    ending.heartbeat.start(group)
    ending.signals.saves_first = "save" in OPTIONS
    for number in (1, 2, 3):
        ending.phase.step = number
        if share_number(int(ending.signals.asked.is_set()), group):
            ending.saved(number - 1)
        try:
            lead(sample_quickly, group, ending.signals.asked)
            step(number, ending, group)
        except StoppedError:
            ending.saved(number - 1)
    ending.heartbeat.stop()


if __name__ == "__main__":
    ending = Ending()
    with ending.ends_the_process():
        run(ending)
