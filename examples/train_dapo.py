"""Train a language model with DAPO.

    torchrun --nproc-per-node 8 examples/train_dapo.py experiment=<name> key=value …

Without torchrun the same script trains with one rank. `--cfg job` prints the resolved configuration; options and their
meaning are in nemo_dapo/config/schema.py, experiments in conf/experiment/.
"""

from __future__ import annotations

from nemo_dapo.launcher import end_with_launcher

end_with_launcher()  # before the slow imports: torchrun may die while they run

import asyncio
import json
import math
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from omegaconf import DictConfig

from nemo_dapo import config as schema
from nemo_dapo import entry
from nemo_dapo.config import Placement, RunConfig
from nemo_dapo.data.check import check_data
from nemo_dapo.ending import Ending
from nemo_dapo.entry import is_rank_zero
from nemo_dapo.garbage import spare_what_is_here
from nemo_dapo.redaction import redacted

CONFIG = Path(__file__).resolve().parents[1] / "conf" / "config.yaml"


def train(config: RunConfig, ending: Ending) -> None:
    """Build policy, engine, rewarder and data, hand them to the trainer and run it."""
    from nemo_dapo.collectives import gather_json
    from nemo_dapo.heartbeat import hosts_in_words
    from nemo_dapo.megatron import parallel
    from nemo_dapo.rollout import sharing
    from nemo_dapo.rollout.host import node_name
    from nemo_dapo.rollout.keeper import keep_agent
    from nemo_dapo.shared_folder import require_shared

    parallel.initialize(config.parallel, config.seed)
    import nemo_dapo.megatron.policy  # noqa: F401  # slow, and needed by `build_policy`: before servers start beside it
    from nemo_dapo.trainer import DAPOTrainer, find_checkpoint

    run_dir = Path(config.output_dir)
    group = parallel.control_group(config.parallel.timeout_minutes)
    watch_ranks(config, ending, group)
    hosts: list[str] = gather_json(node_name(), group)
    # Agents are left last: the engine, before, has told them to end.
    with ExitStack() as agents, ExitStack() as stack, ending.says_at_once():
        if len(set(hosts)) > 1:
            if is_rank_zero():  # later messages know ranks alone
                print(f"ranks by host: {hosts_in_words(hosts)}", flush=True)
            require_shared(run_dir, hosts, group)
        with ending.phase.enter("load"):
            resumed = find_checkpoint(config, run_dir, group)
        pending, door = start_controller(config, run_dir, stack, resumed, hosts) if is_rank_zero() else (None, None)
        if config.rollout.placement is Placement.colocated:
            keep_agent(gather_json(door, group)[0], run_dir, hosts, agents)
        if sharing.offloads(config):
            policy, controller = take_turns(config, pending, group)
        else:
            policy, controller = build_policy(config, None), wait_for(pending, group)
        ending.signals.saves_first = config.checkpoint.on_signal
        signalled = ending.signals.asked
        trainer = DAPOTrainer(
            config, run_dir, policy, controller, group, resumed=resumed, phase=ending.phase, stop=signalled
        )
        spare_what_is_here()
        trainer.fit()
        conclude(config, trainer, ending, stack)
    if ending.heartbeat:
        ending.heartbeat.stop()
    parallel.shut_down()
    if is_rank_zero():
        exported = f", the model is in {run_dir / 'trained'}" if config.checkpoint.export else ""
        print(f"done: {config.trainer.max_steps} steps{exported}", flush=True)


def watch_ranks(config: RunConfig, ending: Ending, group: Any) -> None:
    """From here on a rank that falls silent ends the job, by name."""
    from nemo_dapo.heartbeat import Heartbeat

    seconds = config.parallel.heartbeat_timeout
    if entry.world_size() > 1 and seconds:
        errors = Path(config.output_dir) / "errors"
        ending.heartbeat = Heartbeat(
            ending.phase, seconds, config.parallel.timeout_minutes * 60, errors, ending.end_job
        )
        ending.heartbeat.start(group)


def build_policy(config: RunConfig, servers: Any) -> Any:
    """`servers` is who takes turns with the policy at the GPUs; None where each has its own."""
    from nemo_dapo.megatron.policy import MegatronPolicy

    return MegatronPolicy(
        config.model,
        config.parallel,
        config.optimizer,
        tokens_per_microbatch=config.trainer.tokens_per_microbatch,
        temperature=config.rollout.temperature,
        with_reference=config.algorithm.kl_coeff > 0,
        offload=servers is not None,
        servers=servers,
    )


def take_turns(config: RunConfig, pending: Future[Any] | None, group: Any) -> tuple[Any, Any]:
    """Policy and controller where both need the same GPUs: servers measure what is free, so they start first."""
    from nemo_dapo.rollout import sharing
    from nemo_dapo.stages import put_to_sleep

    controller = wait_for(pending, group)
    weights = sharing.weight_bytes(config.rollout, Path(config.model.path), config.model.precision)
    servers = put_to_sleep(controller.engine if controller else None, weights, group)
    return build_policy(config, servers), controller


def conclude(config: RunConfig, trainer: Any, ending: Ending, stack: ExitStack) -> None:
    """The end of a run that was asked to stop before its last step, or the trained model's export."""
    from nemo_dapo.coordination import share_number
    from nemo_dapo.types import Stage

    steps = trainer.progress.rollout_steps
    if steps < config.trainer.max_steps:
        stack.close()
        ending.saved(share_number(steps, trainer.group))  # once rank 0 has ended its servers
    if config.checkpoint.export:
        with ending.phase.enter("export"):
            trainer.stages.enter(Stage.score)
            trainer.policy.save_hf(Path(config.output_dir) / "trained")


def wait_for(pending: Future[Any] | None, group: Any) -> Any:
    """The controller once its servers serve, on rank 0, which has it `pending`; the others wait with it."""
    from nemo_dapo.coordination import lead, never

    return lead(lambda: asyncio.wrap_future(pending) if pending else never(), group)


def start_controller(
    config: RunConfig, run_dir: Path, stack: ExitStack, resumed: int | None, hosts: list[str]
) -> tuple[Future[Any], Any]:
    """Rank 0's side; the servers start in a thread of their own, while the policy is built where it has other GPUs.

    Also where agents find it.
    """
    from transformers import AutoTokenizer

    from nemo_dapo.controller import Controller
    from nemo_dapo.data.curriculum import Curriculum
    from nemo_dapo.data.load import load_run_data
    from nemo_dapo.data.loader import PromptLoader
    from nemo_dapo.detokenizer import decoder_of
    from nemo_dapo.rewards.pool import RewardPool
    from nemo_dapo.rollout.command import with_the_head_of
    from nemo_dapo.rollout.engine import VLLMEngine
    from nemo_dapo.rollout.replay import ReplayEngine

    model_path = Path(config.model.path)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    data = load_run_data(config.data, tokenizer, config.rollout.max_prompt_length)
    for report in data.reports:
        print(report, flush=True)
    attempts = math.ceil(config.algorithm.prompts_per_step * config.algorithm.max_attempts)
    if scarce := data.scarcity(attempts):
        print(scarce, flush=True)
    curriculum = Curriculum(config.data.skip_solved_visits)
    accept = config.data.accept_changed
    loader = PromptLoader(data.train, config.seed, curriculum, rendering=data.rendering, accept_changed=accept)
    begin_records(config, run_dir, loader, data.reports, resumed)
    rewarder = stack.enter_context(RewardPool.from_config(config.reward, tokenizer, printed=run_dir / "rewards.log"))
    sinks = make_sinks(config, run_dir, resumed)
    stack.callback(sinks.close)
    eval_sets = {one.name: one.prompts for one in data.eval}
    # Another seed after a resume: the servers must not draw the samples of the first steps again.
    seed = config.seed + (resumed or 0)

    executor = ThreadPoolExecutor(1, thread_name_prefix="servers")
    stack.callback(executor.shutdown)
    engine: VLLMEngine | ReplayEngine
    if config.rollout.replay:
        print(f"no vLLM server: the rollouts of {config.rollout.replay} are played back", flush=True)
        engine = ReplayEngine(Path(config.rollout.replay))
    else:
        nodes = list(dict.fromkeys(hosts)) if config.rollout.placement is Placement.colocated else []
        rollout = with_the_head_of(config.model, config.rollout)
        engine = VLLMEngine.prepare(rollout, model_path, config.model.precision, run_dir, tokenizer, seed, nodes)
        print(f"starting {len(engine.servers)} vLLM server(s), logs in {run_dir / 'servers'}", flush=True)
    stack.callback(engine.close)  # ends the servers' start as well, before the executor waits for it

    def start() -> Controller:
        if isinstance(engine, VLLMEngine):
            engine.start_servers()
        controller = Controller(config, run_dir, engine, rewarder, loader, eval_sets, sinks, decoder_of(tokenizer))
        stack.callback(controller.close)  # before the engine that it asks
        return controller

    return executor.submit(start), engine.door if isinstance(engine, VLLMEngine) else None


def begin_records(config: RunConfig, run_dir: Path, loader: Any, reports: Any, resumed: int | None) -> None:
    """The options and the manifest of this start, in the run's directory.

    Raises ValueError where the run cannot go on from the checkpoint of step `resumed`: what lies there describes the run
    that it belongs to, and is left as it was.
    """
    from nemo_dapo import checkpoint, origin
    from nemo_dapo.telemetry.manifest import write_config, write_manifest
    from nemo_dapo.telemetry.sinks import start_anew

    if resumed is None:
        start_anew(run_dir)
    else:
        state = checkpoint.read_state_without_window(run_dir / "checkpoints", resumed)
        origin.require_same_model(state, config.model)
        if not checkpoint.has_weights_alone(state):
            loader.accepted_changes(state["loader"])
    write_config(run_dir / "config.yaml", config)
    write_manifest(run_dir / "manifest.json", config, reports)


def make_sinks(config: RunConfig, run_dir: Path, resumed: int | None) -> Any:
    """metrics.jsonl always; TensorBoard and Weights & Biases as configured."""
    from nemo_dapo.telemetry.sinks import MetricsJsonl, Sink, Sinks, TensorBoardSink, WandbSink

    sinks: list[Sink] = [MetricsJsonl(run_dir / "metrics.jsonl", resumed_step=resumed)]
    if config.logger.tensorboard:
        sinks.append(TensorBoardSink(run_dir / "tensorboard", resumed_step=resumed))
    if project := config.logger.wandb_project:
        options = redacted(json.loads(json.dumps(asdict(config), default=str)))
        sinks.append(WandbSink(project=project, name=config.name, directory=run_dir, config=options))
    return Sinks(sinks)


def check(config: RunConfig) -> None:
    """Raises ValueError for options that contradict each other, the model or the number of ranks."""
    schema.validate(config, entry.world_size())
    if is_rank_zero():  # which alone reads the data
        check_data(config.data)
    if config.algorithm.loss:
        from nemo_dapo.losses import load_loss_fn

        load_loss_fn(config.algorithm)  # a name that cannot be used is said before the servers start


def prepare(cfg: DictConfig) -> RunConfig:
    """Typed and checked options; the run's directory is there."""
    from nemo_dapo.rollout import sharing

    config = schema.typed(cfg)
    check(config)
    sharing.require_devices(config.rollout, os.environ)
    config.rollout = sharing.with_sleep(config)
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    return config


def finished(config: RunConfig) -> str | None:
    """The line for a run that has taken all its steps and written its model, so that a restart brings no servers up."""
    from nemo_dapo import checkpoint

    run_dir, steps = Path(config.output_dir), config.trainer.max_steps
    step = checkpoint.latest(run_dir / "checkpoints") if config.checkpoint.resume is schema.Resume.auto else None
    if step is None or step < steps or (config.checkpoint.export and not (run_dir / "trained").is_dir()):
        return None
    return f"nothing to do: {run_dir} is at step {step} of trainer.max_steps={steps}; raise it to go on from there"


def main(cfg: DictConfig, ending: Ending) -> None:
    """Train; a bad configuration, an error or a signal ends it as `Ending` says."""
    entry.quiet_libraries()
    with ending.ends_the_process():
        config = prepare(cfg)
        ending.output_dir = Path(config.output_dir)
        if (line := finished(config)) is None:
            train(config, ending)
        elif is_rank_zero():
            print(line, flush=True)


if __name__ == "__main__":
    entry.start(main, CONFIG, ("torch", "megatron.core", "megatron.bridge"), check)
