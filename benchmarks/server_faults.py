"""API server, engine process or guardian of a real vLLM server killed or stopped in each phase: seconds, words, leftovers.

    python benchmarks/server_faults.py [--only engine:STOP:sync …]

One engine over one server and a tiny model, no trainer. After each fault the engine is used as a run would use it until
it serves the newest weights again. A restart takes as long as a start of vLLM: about 20 minutes on two idle cores.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nemo_dapo.config import Precision, RolloutConfig  # noqa: E402
from nemo_dapo.rollout.engine import VLLMEngine  # noqa: E402
from nemo_dapo.telemetry.escape import printable  # noqa: E402
from nemo_dapo.types import Prompt, SamplingParams  # noqa: E402
from tests.tiny import save_tiny_model  # noqa: E402

VICTIMS, PHASES = ("api", "engine", "guardian"), ("rollout", "sync", "update", "evaluation")
FAULTS = {"KILL": signal.SIGKILL, "STOP": signal.SIGSTOP}
PROGRESS_TIMEOUT, SYNC_TIMEOUT = 15.0, 15.0  # seconds; the defaults of 300 and 600 are for models of other sizes
UPDATE_SECONDS = 12.0  # between two rollouts, for what nobody is asked for then
VLLM = {"enforce_eager": True, "kv_cache_memory_bytes": 256 << 20, "max_num_seqs": 256}
PROMPT = Prompt(uid="p", token_ids=(20, 21, 22, 23, 24), problem="", ground_truth="")
SHM = Path("/dev/shm")


@dataclass
class Outcome:
    victim: str
    fault: str
    phase: str
    noticed: float | None = None  # seconds from the fault to the line that says so
    serving: float | None = None  # seconds from the fault to samples under the newest weights
    said: str = ""
    orphans: int = 0
    shm: int = 0


class Words(logging.Handler):
    """The first line that speaks of a restart since `listen`, and when it came."""

    def __init__(self) -> None:
        super().__init__()
        self.listen()

    def listen(self) -> None:
        self.said, self.at = "", 0.0

    def emit(self, record: logging.LogRecord) -> None:
        if not self.said and "restarting" in record.getMessage():
            self.said, self.at = record.getMessage(), time.monotonic()


def family(engine: VLLMEngine) -> dict[str, psutil.Process]:
    """The processes of the only server by their roles."""
    guardian = psutil.Process(engine.servers.servers[0].pid)
    (api,) = guardian.children()
    engines = [p for p in api.children(recursive=True) if "EngineCore" in p.name()]
    return {"guardian": guardian, "api": api, "engine": engines[0]}


def in_host_memory(processes: Iterable[psutil.Process]) -> set[Path]:
    """What the processes have mapped of /dev/shm, and no other process of this machine can be blamed for."""
    return {Path(each.path) for p in processes for each in p.memory_maps() if each.path.startswith(f"{SHM}/")}


def sample(engine: VLLMEngine, groups: int) -> None:
    async def many() -> None:
        params = SamplingParams(max_tokens=256)
        await asyncio.gather(*(engine.generate(PROMPT, 8, params) for _ in range(groups)))

    asyncio.run(many())


def in_phase(engine: VLLMEngine, weights: list, phase: str, fault: Callable[[], None]) -> None:
    """Bring the engine into `phase`, call `fault` there, and go on as a run does."""
    if phase in ("rollout", "evaluation"):  # an evaluation is fewer requests on an engine that is otherwise the same
        timer = threading.Timer(1.0, fault)
        timer.start()
        sample(engine, 16 if phase == "rollout" else 2)
        timer.join()
    elif phase == "update":
        fault()
        time.sleep(UPDATE_SECONDS)
    else:
        fault()
    engine.update_weights(iter(weights), engine.version + 1)
    sample(engine, 2)


def trial(engine: VLLMEngine, weights: list, words: Words, outcome: Outcome) -> None:
    members = family(engine)
    before, mapped = list(members.values()), in_host_memory(members.values())
    struck = [0.0]

    def strike() -> None:
        words.listen()
        struck[0] = time.monotonic()
        members[outcome.victim].send_signal(FAULTS[outcome.fault])

    in_phase(engine, weights, outcome.phase, strike)
    outcome.serving = time.monotonic() - struck[0]
    outcome.noticed = words.at - struck[0] if words.said else None
    outcome.said = printable(words.said.splitlines()[0], 220) if words.said else ""
    restarted = outcome.noticed is not None
    outcome.orphans = len(psutil.wait_procs(before, timeout=3.0)[1]) if restarted else 0
    outcome.shm = sum(path.exists() for path in mapped) if restarted else 0
    if not restarted and outcome.fault == "STOP":
        members[outcome.victim].send_signal(signal.SIGCONT)


def show(outcomes: list[Outcome]) -> None:
    print("| what | fault | phase | noticed [s] | serves again [s] | orphans | /dev/shm | said |")
    print("|---|---|---|---|---|---|---|---|")
    for one in outcomes:
        noticed = "-" if one.noticed is None else f"{one.noticed:.1f}"
        serving = "-" if one.serving is None else f"{one.serving:.1f}"
        print(
            f"| {one.victim} | {one.fault} | {one.phase} | {noticed} | {serving} | {one.orphans} | {one.shm} | {one.said} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], metavar="VICTIM:FAULT:PHASE")
    only = [tuple(case.split(":")) for case in parser.parse_args().only]
    cases = only or [(v, f, p) for v in VICTIMS for f in FAULTS for p in PHASES]
    words = Words()
    logging.getLogger("nemo_dapo").addHandler(words)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        path = save_tiny_model(Path(folder) / "model", hidden=128)
        weights = list(AutoModelForCausalLM.from_pretrained(path).named_parameters())
        config = RolloutConfig(
            max_prompt_length=128,
            max_response_length=384,
            progress_timeout=PROGRESS_TIMEOUT,
            sync_timeout=SYNC_TIMEOUT,
            vllm=VLLM,
        )
        tokenizer = AutoTokenizer.from_pretrained(path)
        with VLLMEngine.start(config, path, Precision.fp32, Path(folder), tokenizer, seed=0) as engine:
            store = Path(engine.servers.places()[0].folder)
            engine.update_weights(iter(weights), 1)
            for victim, fault, phase in cases:
                outcomes.append(Outcome(victim, fault, phase))
                trial(engine, weights, words, outcomes[-1])
                print(outcomes[-1], file=sys.stderr, flush=True)
    show(outcomes)
    print(json.dumps({"cases": [asdict(one) for one in outcomes], "folder_left": store.exists()}))


if __name__ == "__main__":
    main()
