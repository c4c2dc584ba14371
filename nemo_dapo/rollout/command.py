"""What one vLLM server is started with: command line, port and key (environment.py says with which variables).

A server is `python -m vllm.entrypoints.openai.api_server`. (`vllm serve`, the console script, fails with the CPU wheel,
which is a distribution of another name.)
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import os
import secrets
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_dapo.config import ModelConfig, Precision, RolloutConfig

BACKEND = "nemo_dapo"  # the name under which vllm_weights registers our weight transfer

# What we set ourselves, and where the user says it instead.
RESERVED = {
    "model": "model.path",
    "dtype": "model.precision",
    "seed": "seed",
    "host": "rollout.host",
    "port": "rollout.port",
    "api_key": "rollout.api_key_file",
    "logprobs_mode": "nothing: the trainer needs processed_logprobs",
    "tokens_only": "nothing: the trainer sends token ids",
    "enable_return_routed_experts": "rollout.return_routes",
    "weight_transfer_config": "nothing: the trainer sends the weights",
    "disable_log_stats": "nothing: a server that hangs is known by its counts of tokens",
}
# vLLM on a CPU takes 92 % of the machine's memory for its cache by default, and compiles for minutes.
CPU_ENGINE_OPTIONS = {"enforce_eager": True, "kv_cache_memory_bytes": 2**30}
LOOPBACK = ("127.0.0.1", "::1", "localhost")
# A server binds its port later: the kernel takes those from 32768 on for outgoing connections, vLLM those from 20000 on for
# its own (environment.py).
FREE_PORTS, TRIES = range(10000, 20000), 100
DTYPES = {Precision.bf16: "bfloat16", Precision.fp32: "float32"}


def engine_arguments(options: Mapping[str, Any]) -> list[str]:
    """`rollout.vllm` as command-line arguments: `max_num_seqs: 64` -> `--max-num-seqs 64`, `enforce_eager: true` ->
    `--enforce-eager`, `false` -> `--no-…`, a mapping -> JSON, a list -> several values; None leaves vLLM's default."""
    arguments: list[str] = []
    for key, value in options.items():
        if key in RESERVED:
            raise ValueError(f"rollout.vllm.{key} is set by the trainer; change {RESERVED[key]}")
        flag = "--" + key.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            arguments.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, Mapping):
            arguments += [flag, json.dumps(dict(value))]
        elif isinstance(value, (list, tuple)):
            arguments += [flag, *(str(each) for each in value)]
        else:
            arguments += [flag, str(value)]
    return arguments


def server_command(
    config: RolloutConfig, model_path: Path, precision: Precision, port: int, seed: int, *, on_cpu: bool
) -> list[str]:
    """The command line of one server. The API key is not in it: command lines are public on a machine."""
    defaults: dict[str, Any] = {
        "max_model_len": config.max_prompt_length + config.max_response_length,
        "scheduling_policy": "priority",  # the engine numbers its requests: earlier groups go first
    }
    if on_cpu:
        defaults |= CPU_ENGINE_OPTIONS
    fixed = ["--model", str(model_path), "--host", config.host, "--port", str(port), "--seed", str(seed)]
    fixed += ["--dtype", DTYPES[precision], "--tokens-only", "--logprobs-mode", "processed_logprobs"]
    fixed += ["--weight-transfer-config", json.dumps({"backend": BACKEND})]
    if config.return_routes:
        fixed += ["--enable-return-routed-experts"]
    # vLLM guards only its public routes with the key; the middleware guards those that change weights as well.
    fixed += ["--middleware", "nemo_dapo.rollout.vllm_plugin.RequireKey", "--disable-uvicorn-access-log"]
    module = [config.python or sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    return module + fixed + engine_arguments({**defaults, **config.vllm})


def with_the_head_of(model: ModelConfig, config: RolloutConfig) -> RolloutConfig:
    """`config` for servers whose logits are as exact as the trainer's: `model.fp32_logits` holds for both.

    vLLM reads it from the model's configuration (`ModelConfig.head_dtype`, honoured by its LogitsProcessor).
    """
    if not model.fp32_logits:
        return config
    overrides = {**(config.vllm.get("hf_overrides") or {}), "head_dtype": "float32"}
    return dataclasses.replace(config, vllm={**config.vllm, "hf_overrides": overrides})


def choose_key(config: RolloutConfig) -> str:
    """The servers' key: as configured, from the file, from the environment, or a random one."""
    if config.api_key:
        return config.api_key
    if config.api_key_file:
        return Path(config.api_key_file).read_text().strip()
    return os.environ.get("NEMO_DAPO_API_KEY") or secrets.token_urlsafe(32)


def choose_ports(host: str, first: int, count: int) -> list[int]:
    """`first`, `first + 1`, …, or free ports where `first` is 0; raises ValueError where one is in use."""
    listeners: list[socket.socket] = []
    try:
        for index in range(count):
            wanted = [first + index] if first else secrets.SystemRandom().sample(FREE_PORTS, TRIES)
            try:
                listeners.append(listener_at(host, wanted))
            except OSError as problem:
                raise ValueError(
                    f"port {wanted[-1]} on {host} cannot be used for vLLM server {index} ({problem.strerror}); free it, "
                    f"or set rollout.port to {count} free ports in a row, or to 0 for any free ones"
                ) from problem
        return [listener.getsockname()[1] for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()


def listener_at(host: str, ports: Sequence[int]) -> socket.socket:
    """A socket that listens at the first of `ports` that is free; raises OSError where none is."""
    for port in ports:
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(1)  # with SO_REUSEADDR only listening shows that another one listens
            return listener
        except OSError:
            listener.close()
            if port == ports[-1]:
                raise
    raise AssertionError("no port was named")


def connect_host(host: str, address: str = "") -> str:
    """Where a server that listens on `host` is reached, ready for a URL; `address` is this machine's for others."""
    try:
        listens = ipaddress.ip_address(host)
    except ValueError:  # a name
        return host
    if listens.is_unspecified:
        return connect_host(address or ("127.0.0.1" if listens.version == 4 else "::1"))
    return host if listens.version == 4 else f"[{host}]"


def listen_host(host: str, address: str) -> str:
    """Where servers listen that other hosts ask too: on `host` where that is a choice of the user's, else on `address`."""
    return address if host in LOOPBACK else host
