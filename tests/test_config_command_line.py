"""What a command line may ask for beside a run, and keys that are new to a dict of the schema."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nemo_dapo import config as schema
from nemo_dapo import entry

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf" / "config.yaml"


@pytest.fixture(autouse=True)
def _schema() -> None:
    schema.register()


def printed(*arguments: str) -> str:
    text = schema.asked_to_print(CONF, list(arguments))
    assert text is not None
    return text


def test_cfg_job_prints_what_a_run_would_be_given() -> None:
    arguments = ["experiment=demo", "name=mine", "model.path=m", "algorithm.group_size=4"]
    options = yaml.safe_load(printed("--cfg", "job", *arguments))
    assert options["output_dir"] == "runs/mine"
    run = entry.composed(CONF, arguments)
    assert run is not None
    assert (run.output_dir, run.algorithm.group_size) == (options["output_dir"], options["algorithm"]["group_size"])
    assert options["optimizer"] == {**vars(run.optimizer), "decay_style": run.optimizer.decay_style.value}
    assert "${" not in printed("--cfg", "job")  # nothing is left to resolve, also without a model


def test_cfg_job_prints_a_part_and_refuses_what_is_no_part() -> None:
    assert yaml.safe_load(printed("--cfg", "job", "--package", "checkpoint", "checkpoint.keep=7"))["keep"] == 7
    for name in ("nix", "seed"):
        with pytest.raises(ValueError, match=f"--package {name} must name a group of options"):
            printed("--cfg", "job", "--package", name)


def test_help_lists_every_group_with_its_choices() -> None:
    text = printed("--help")
    for file in (ROOT / "conf").glob("*/*.yaml"):
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [file.parent.name]]
        assert file.stem in line


def test_a_multirun_is_refused_in_one_line() -> None:
    for flag in ("-m", "--multirun"):
        with pytest.raises(ValueError, match="one command for each run") as caught:
            printed(flag, "seed=1,2")
        assert "\n" not in str(caught.value)


def test_a_misspelt_key_is_named_by_cfg_job_too() -> None:
    with pytest.raises(ValueError, match="did you mean group_size"):
        printed("--cfg", "job", "algorithm.group_sise=1")


@pytest.mark.slow
def test_a_script_prints_without_importing_an_engine() -> None:
    code = f"""
import runpy, sys
sys.argv = ["train_dapo.py", "--cfg", "job", "experiment=demo"]
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path("examples/train_dapo.py", run_name="__main__")
print([name for name in ("torch", "nemo", "transformers", "megatron", "vllm") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *options, imported = done.stdout.splitlines()
    assert yaml.safe_load("\n".join(options))["name"] == "demo"
    assert imported == "[]"


@pytest.mark.parametrize("plus", ["", "+"])
def test_new_keys_of_a_dict_need_no_plus_but_may_have_one(plus: str) -> None:
    run = entry.composed(
        CONF,
        [
            "model.path=m",
            f"{plus}rollout.vllm.max_num_seqs=3",
            f"{plus}model.megatron.recompute_granularity=full",
            f"{plus}data.chat_template_options.enable_thinking=false",
            f"{plus}data.train.mine={{format: columns, path: mine.parquet}}",
            f"{plus}data.eval.held.format=gsm8k",
            f"{plus}reward.extra.style.function=module:name",
            f"{plus}reward.extra.style.weight=-0.5",
        ],
    )
    assert run is not None
    assert run.rollout.vllm == {"max_num_seqs": 3}
    assert run.model.megatron == {"recompute_granularity": "full"}
    assert run.data.chat_template_options == {"enable_thinking": False}
    assert run.data.train["mine"] == schema.DataSetConfig("columns", "mine.parquet")
    assert run.data.eval["held"] == schema.DataSetConfig("gsm8k")
    assert run.reward.extra["style"] == schema.RewardTermConfig("module:name", -0.5)
