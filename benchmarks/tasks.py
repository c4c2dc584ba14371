"""What the contestants of versus_trl.py and staleness.py train on: a model, and the demo's experiment with other options.

`demo` is the demo: 0.8 M parameters, answers of 40 tokens. `tail` has answers of 20 to 1,000 tokens, see heavy_tail.py.
`30m` is the demo on its own model grown to 30 M parameters, see grown.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import grown, heavy_tail  # noqa: E402
from examples.demo import prepare  # noqa: E402

BUILD = ROOT / "build" / "tasks"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# glibc keeps what is freed. A virtual machine may take seconds to hand out a GiB anew, and a cache that grows by being
# copied, as transformers' does, would be measured by that: 2.5 times the seconds on ours.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
SCRIPT = "examples/train_dapo.py"
CAP = 2.0  # algorithm.importance_cap of who samples ahead
Record = dict[str, float]  # of a step: a line of metrics.jsonl


@dataclass(frozen=True)
class Task:
    """`write` puts the model into a folder unless it is there; `overrides` are of experiment=demo."""

    name: str
    write: Callable[[Path], Any]
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def experiment(self) -> Any:
        dots = [f"{name}={value}" for name, value in self.overrides.items()]
        return OmegaConf.merge(OmegaConf.load(prepare.EXPERIMENT), OmegaConf.from_dotlist(dots))

    @property
    def updates(self) -> int:
        """Optimizer steps on one step's samples."""
        algorithm = self.experiment.algorithm
        return int(algorithm.prompts_per_step * algorithm.group_size // algorithm.minibatch_size)

    @property
    def model(self) -> Path:
        return BUILD / self.name

    def prepare(self) -> None:
        """Makes the model, once, in a process of its own: what it leaves in memory is no contestant's."""
        run([sys.executable, "benchmarks/tasks.py", self.name], BUILD / f"{self.name}.log", threads=2)

    def train(self, folder: Path, steps: int, options: Mapping[str, Any], script: str = SCRIPT) -> list[Record]:
        """Two ranks and a server; the metrics of each step."""
        job = [*TORCHRUN, script, *self.arguments(steps, {"output_dir": folder} | dict(options))]
        run(job, folder / "log.txt", threads=1)
        return rows(folder / "metrics.jsonl")

    def arguments(self, steps: int, options: Mapping[str, Any]) -> list[str]:
        """Of `script`'s command line; `options` go before all others."""
        ramp = self.experiment.optimizer.warmup_steps  # which a run of few steps does not leave
        chosen = {
            "model.path": self.model,
            "trainer.max_steps": steps,
            "optimizer.decay_steps": max(steps * self.updates, ramp + 1),
            "evaluation.at_start": "false",
            "checkpoint.every": 0,
            "checkpoint.export": "false",
        }
        chosen |= {**self.overrides, **options}
        return ["experiment=demo", *(f"{name}={value}" for name, value in chosen.items())]


def sampling_ahead(staleness: int, *, corrected: bool = True) -> dict[str, Any]:
    """Options of a run with rollout.max_staleness, and with the importance correction that more than 0 asks for."""
    return {
        "rollout.max_staleness": staleness,
        "algorithm.importance_cap": CAP if corrected and staleness else 0.0,
    }


def rows(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(command: list[str], log: Path, threads: int) -> None:
    """Raises CalledProcessError, after the end of its log, for a command that fails."""
    offline = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    environment = os.environ | offline | KEEP_MEMORY
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
    if done.returncode:
        print(log.read_text()[-4000:], file=sys.stderr)
    done.check_returncode()


def write_demo(output: Path) -> None:
    prepare.prepare(output, prepare.recipe_of("demo", seed=0))


def write_tail(output: Path) -> None:
    prepare.prepare(output, heavy_tail.recipe())


def write_30m(output: Path) -> None:
    """From the demo's."""
    write_demo(BUILD / "demo")
    grown.save_grown(BUILD / "demo", prepare.recipe_of("demo", seed=0), output)


TAIL = {
    "rollout.max_response_length": 1024,
    "rollout.vllm.max_model_len": 1056,
    "rollout.vllm.kv_cache_memory_bytes": 2**30,  # 2 KiB a token, 256 answers of the longest are 0.5 GiB
    "reward.overlong.buffer": 0,
}
LARGE = {"rollout.vllm.kv_cache_memory_bytes": 2**30}  # 20 KiB a token
TASKS = {
    one.name: one for one in (Task("demo", write_demo), Task("tail", write_tail, TAIL), Task("30m", write_30m, LARGE))
}

if __name__ == "__main__":
    TASKS[sys.argv[1]].write(TASKS[sys.argv[1]].model)
