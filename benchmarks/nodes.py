"""One job on many nodes, under a real Slurm of hosts that are made on this machine: trains, and is looked at from outside.

    python benchmarks/nodes.py [--only colocated:2 dedicated:3 …] [--no-faults]

Each layout trains a tiny model for 6 steps with a real vLLM server on each serving host. After each sync, every server's
greedy answer is scored with the policy's own weights, and the bytes of all servers' parameters are compared. What was
sampled is then played back on one host. Then hosts, agents and servers are killed, stopped and cut off (node_faults.py).
The last line is JSON. Needs root; installs Debian's Slurm.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from benchmarks.node_faults import all_cases, strike_all  # noqa: E402
from benchmarks.node_jobs import Layout, counted, install, submit  # noqa: E402
from tests.checkpoints import tensors  # noqa: E402
from tests.cluster import Cluster  # noqa: E402
from tests.cluster.small_run import GROUPS, SAMPLES, environment, options  # noqa: E402
from tests.tiny import save_tiny_model  # noqa: E402

STEPS = 6
LAYOUTS = (Layout(training=2), Layout(training=3), Layout(training=1, ranks=2, serving=2))
DIGESTS = "rollout.vllm.worker_extension_cls=benchmarks.digest_worker.Digest"
PATIENCE = 900.0  # seconds for one job, on two busy cores


@dataclass
class Findings:
    """Of one layout. `alike`: after each sync all servers have the same bytes for parameters, others than before it;
    `equal`: the same weights, bit for bit, when its rollouts are played back on one host."""

    layout: str
    hosts: int
    seconds: float
    worst_gap: float
    servers: int
    lost: int
    doubled: int
    orphans: int
    alike: bool
    equal: bool


def look(layout: Layout, folder: Path) -> Findings:
    """Train, look, play back."""
    save_tiny_model(folder / "model", hidden=128, heads=4)
    with Cluster(layout.hosts) as cluster:
        started = time.monotonic()
        job = submit(cluster, layout, folder, *options(folder, steps=STEPS), DIGESTS)
        if (state := job.wait(PATIENCE)) != "COMPLETED":
            raise SystemExit(f"{layout}: the job is {state}:\n{job.console[-6000:]}")
        seconds = time.monotonic() - started
        orphans = left(cluster)
        equal = played_back(cluster, layout, folder)
    gaps = [gap for step in range(STEPS + 1) for gap in server_gaps(folder, step).values()]
    lost, doubled = counted(folder / "run" / "rollouts", STEPS, GROUPS * SAMPLES)
    servers = len(server_gaps(folder, STEPS))
    alike = same_bytes(folder)
    return Findings(str(layout), layout.hosts, seconds, max(gaps), servers, lost, doubled, orphans, alike, equal)


def same_bytes(folder: Path) -> bool:
    """Whether all servers' parameters were one set of bytes after each sync, and never those of the sync before."""
    answers = [json.loads((folder / "syncs" / f"{step}.json").read_text()) for step in range(STEPS + 1)]
    digests = [{tuple(answer["digests"]) for answer in of_servers.values()} for of_servers in answers]
    return all(len(each) == 1 for each in digests) and len(set.union(*digests)) == len(digests)


def server_gaps(folder: Path, step: int) -> dict[str, float]:
    """Of each server, the largest difference (nats) of its greedy log-probabilities from those of the step's weights."""
    place = folder / "syncs" / str(step)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model.load_state_dict(load_file(place.with_suffix(".safetensors")), strict=False)
    model.tie_weights()
    found = {}
    for server, answer in json.loads(place.with_suffix(".json").read_text()).items():
        ids, said = answer["ids"], torch.tensor(answer["logprobs"])
        with torch.no_grad():
            logits = model(torch.tensor([[*range(20, 28), *ids]])).logits[0, 7:-1]
        scored = torch.log_softmax(logits, -1)
        assert torch.equal(scored.argmax(-1), torch.tensor(ids)), f"server {server} of step {step} is not greedy"
        found[server] = float((scored.max(-1).values - said).abs().max())
    return found


def left(cluster: Cluster) -> int:
    """Processes and files in host memory that the job has left on its hosts."""
    files = [name for host in cluster.hosts for name in host.run("ls", "/dev/shm").split()]
    processes = [line for host in cluster.hosts for line in cluster.left_on(host)]
    for one in (*files, *processes):
        print(f"left behind: {one}", flush=True)
    return len(files) + len(processes)


def played_back(cluster: Cluster, layout: Layout, folder: Path) -> bool:
    """Whether as many ranks on one host, with the recorded answers, arrive at the same weights and moments."""
    again = folder / "again"
    again.mkdir()
    env = environment(again, again / "run") | {"RANKS_PER_NODE": str(layout.training * layout.ranks)}
    replay = f"rollout.replay={folder / 'run' / 'rollouts'}"
    output = f"--output={again / 'console'}"
    file = "examples/slurm/colocated.sbatch"
    job = cluster.sbatch("--nodes=1", output, file, *options(folder, steps=STEPS), replay, env=env)
    if (state := job.wait(PATIENCE)) != "COMPLETED":
        raise SystemExit(f"{layout}: played back, the job is {state}:\n{job.console[-6000:]}")
    first, second = tensors(folder / "run", STEPS), tensors(again / "run", STEPS)
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], metavar="LAYOUT", help=" ".join(map(str, LAYOUTS)))
    parser.add_argument("--no-faults", action="store_true")
    arguments = parser.parse_args()
    install()
    found = []
    with tempfile.TemporaryDirectory(prefix="nodes_") as place:
        for layout in LAYOUTS:
            if arguments.only and str(layout) not in arguments.only:
                continue
            folder = Path(place) / str(layout).replace(":", "_")
            folder.mkdir()
            found.append(look(layout, folder))
            print(found[-1], flush=True)
    outcomes, lost, doubled = ([], 0, 0) if arguments.no_faults else strike_all(all_cases())
    said = {
        "hosts": max(one.hosts for one in found),
        "steps": STEPS,
        "worst_gap": max(one.worst_gap for one in found),
        "alike": all(one.alike for one in found),
        "equal": all(one.equal for one in found),
        "lost": sum(one.lost for one in found) + lost,
        "doubled": sum(one.doubled for one in found) + doubled,
        "orphans": sum(one.orphans for one in found) + sum(one.orphans for one in outcomes),
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main()
