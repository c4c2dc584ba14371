"""No record of a run holds a secret; what is no secret stays readable."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from nemo_dapo.redaction import redacted, redacted_command, secrets_in

OPTIONS: dict[str, Any] = {
    "rollout": {
        "api_key": "s3cret",
        "vllm": {"hf_token": "hf_s3cret", "max_num_seqs": 3},
        "api_key_file": "/keys/mine",
    },
    "reward": {
        "function": "https://me:s3cret@judge.example/score?token=s3cret&model=7b",
        "extra": {"style": {"function": "http://judge.example/style", "weight": 0.5}},
    },
    "trainer": {"tokens_per_microbatch": 22528},
    "model": {"megatron": {"password": ["s3cret"], "token": True}},
}


def test_secrets_are_gone_wherever_they_stand_and_the_rest_is_kept() -> None:
    before = copy.deepcopy(OPTIONS)
    clean = redacted(OPTIONS)
    assert "s3cret" not in repr(clean)
    assert before == OPTIONS, "the options themselves are still needed"
    assert clean["rollout"] == {
        "api_key": "",
        "vllm": {"hf_token": "", "max_num_seqs": 3},
        "api_key_file": "/keys/mine",
    }
    assert clean["reward"]["function"] == "https://…@judge.example/score?token=…&model=7b"
    assert clean["reward"]["extra"] == OPTIONS["reward"]["extra"]
    assert clean["trainer"] == OPTIONS["trainer"]
    assert clean["model"]["megatron"] == {"password": [""], "token": True}


@pytest.mark.parametrize(
    ("argument", "kept"),
    [
        ("rollout.api_key=s3cret", "rollout.api_key=…"),
        ("+rollout.vllm.hf_token=s3cret", "+rollout.vllm.hf_token=…"),
        ("+rollout.vllm={hf_token: s3cret, max_num_seqs: 3}", "+rollout.vllm={hf_token: …, max_num_seqs: 3}"),
        ("reward.function=https://me:s3cret@judge.example", "reward.function=https://…@judge.example"),
        ("trainer.tokens_per_microbatch=4096", "trainer.tokens_per_microbatch=4096"),
        ("rollout.api_key_file=/keys/mine", "rollout.api_key_file=/keys/mine"),
        ("rollout.api_key=", "rollout.api_key="),
        ("--config-dir", "--config-dir"),
    ],
)
def test_a_recorded_command_has_its_secrets_cut_out(argument: str, kept: str) -> None:
    assert redacted_command(["train.py", argument]) == ["train.py", kept]


def test_secrets_among_arguments_are_named() -> None:
    arguments = [
        "rollout.api_key=x",
        "+rollout.vllm.hf_token=y",
        "rollout.api_key=",
        "name=token",
        "rollout.api_key_file=f",
    ]
    assert secrets_in(arguments) == ["rollout.api_key", "rollout.vllm.hf_token"]
