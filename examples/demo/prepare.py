"""The demo's language model: a small Qwen2, or Qwen3-MoE, with its own tokenizer, warm-started on imperfect solutions.

    python examples/demo/prepare.py --output runs/demo/model --seed 0
    python examples/demo/prepare.py --output runs/demo_moe/model --experiment demo_moe

It learns the procedure of column addition from a learner who often forgets the carry, so that it starts DAPO right about
half of the time. The result is cached: the second run with the same recipe and seed does nothing.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import trange
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from nemo_dapo.data.formats import arithmetic
from nemo_dapo.data.formats.arithmetic import Sum, generate, imperfect_solution

EXPERIMENT = Path(__file__).parents[2] / "conf" / "experiment" / "demo.yaml"  # the other demos' problems are its
EXPERTS = {"demo": 0, "demo_lora": 0, "demo_moe": 4}
MANIFEST = "warm_start.json"
PAD, EOS = 0, 1
IGNORED = -100  # cross_entropy's mark for positions without a target
Model = Qwen2ForCausalLM | Qwen3MoeForCausalLM
Row = tuple[list[int], list[int]]  # a prompt, and its response with the closing <eos>
MERGED_WORD = "Answer"  # one token instead of six


@dataclass(frozen=True)
class Recipe:
    """Everything that the weights depend on. `steps` updates of `batch` solutions; rates are probabilities."""

    template: str
    max_digits: int
    seed: int = 0
    hidden: int = 128
    intermediate: int = 384  # of all experts that a token goes to
    experts: int = 0  # of each layer; 0 = dense
    experts_per_token: int = 2
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 264  # 263 tokens, rounded up so that 2, 4 or 8 tensor-parallel ranks share it
    max_positions: int = 512
    # Not the usual 10,000: solutions are short, and a reader that assumes the usual value fails on this model at once.
    rope_theta: float = 100.0
    # The usual 0.02 suits widths of thousands; at width 128 it costs most of the minute.
    initializer_range: float = 0.06
    steps: int = 800
    batch: int = 32
    lr: float = 3e-3
    warmup: int = 20
    problems: int = 16384
    forget_carry: float = 0.6
    miscount: float = 0.01
    pass_tokens: int = 4096  # that go through the model at once, padding included
    max_response: int = 64  # tokens of a sampled response

    def response(self, one: Sum, rng: random.Random) -> str:
        """What the model learns to write to `one`: another task overrides it, and names its own file in `sources`."""
        return imperfect_solution(one.a, one.b, rng, forget_carry=self.forget_carry, miscount=self.miscount)

    @property
    def stages(self) -> list[Recipe]:
        """What it is trained by, one after the other."""
        return [self]

    @property
    def sources(self) -> list[str]:
        """The code that the weights depend on."""
        return [arithmetic.__file__, __file__]

    @property
    def fingerprint(self) -> str:
        """Changes with any field and with the generator's code, so that a cached model is never out of date."""
        code = b"".join(Path(file).read_bytes() for file in self.sources)
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode() + code).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo/model"))
    parser.add_argument("--experiment", choices=EXPERTS, default="demo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prepare(arguments.output, recipe_of(arguments.experiment, arguments.seed))


def recipe_of(experiment: str, seed: int) -> Recipe:
    """The recipe for the prompts that conf/experiment/demo.yaml and those made from it train on."""
    data = OmegaConf.load(EXPERIMENT).data
    digits = data.train.arithmetic.max_digits
    return Recipe(template=data.template, max_digits=digits, seed=seed, experts=EXPERTS[experiment])


def prepare(output: Path, recipe: Recipe) -> bool:
    """Write the warm-started model and its tokenizer to `output`; False when they are already there."""
    if is_cached(output, recipe):
        print(f"{output}: this warm start is already there")
        return False
    # Built aside and renamed: an interrupted warm start leaves no half a model behind.
    building = output.with_name(output.name + ".part")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    save_tokenizer(building)
    tokenizer = AutoTokenizer.from_pretrained(save_config(building, recipe))
    model = build_model(recipe)
    for stage in recipe.stages:
        train(model, tokenizer, stage)
    report_accuracy(model, tokenizer, recipe)
    model.save_pretrained(building)
    (building / MANIFEST).write_text(json.dumps({"fingerprint": recipe.fingerprint} | asdict(recipe), indent=2) + "\n")
    shutil.rmtree(output, ignore_errors=True)
    building.rename(output)
    return True


def is_cached(output: Path, recipe: Recipe) -> bool:
    manifest = output / MANIFEST
    return manifest.exists() and json.loads(manifest.read_text())["fingerprint"] == recipe.fingerprint


def save_tokenizer(path: Path) -> None:
    """Write a byte-level tokenizer: one token a byte, except MERGED_WORD.

    `AutoTokenizer` ignores the pre-tokenizer of tokenizer.json for `qwen2` and builds the family's own. That one is
    byte-level too and does not cut inside a word, so both give the same tokens.
    """
    vocabulary = {"<pad>": PAD, "<eos>": EOS}
    prefixes = [MERGED_WORD[:n] for n in range(2, len(MERGED_WORD) + 1)]
    for token in [*sorted(pre_tokenizers.ByteLevel.alphabet()), *prefixes]:
        vocabulary[token] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[(prefix[:-1], prefix[-1]) for prefix in prefixes]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(path)


def model_config(recipe: Recipe) -> Qwen2Config | Qwen3MoeConfig:
    sizes: dict[str, Any] = {
        "vocab_size": recipe.vocab,
        "hidden_size": recipe.hidden,
        "intermediate_size": recipe.intermediate,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.kv_heads,
        "max_position_embeddings": recipe.max_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": recipe.rope_theta},
        "initializer_range": recipe.initializer_range,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    if not recipe.experts:
        return Qwen2Config(**sizes)
    sizes |= {
        "head_dim": recipe.hidden // recipe.heads,
        "num_experts": recipe.experts,
        "num_experts_per_tok": recipe.experts_per_token,
        "moe_intermediate_size": recipe.intermediate // recipe.experts_per_token,
    }
    return Qwen3MoeConfig(**sizes, norm_topk_prob=True)


def save_config(path: Path, recipe: Recipe) -> Path:
    """Write config.json, from which `AutoTokenizer` learns the family; returns `path`."""
    model_config(recipe).save_pretrained(path)
    return path


def build_model(recipe: Recipe) -> Model:
    torch.manual_seed(recipe.seed)
    config = model_config(recipe)
    if not isinstance(config, Qwen3MoeConfig):
        return Qwen2ForCausalLM(config)
    # One expert after another: transformers' batched products take fifty times as long on a CPU.
    model: Model = AutoModelForCausalLM.from_config(config, experts_implementation="eager", dtype=torch.float32)
    return model


def train(model: Model, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Cross-entropy on imperfect solutions of problems in the train split, linear decay to zero."""
    rng = random.Random(recipe.seed)
    problems = generate(recipe.problems, recipe.seed, recipe.max_digits, "train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / recipe.warmup, 1.0) * (1 - step / recipe.steps)
    )
    model.train()
    progress = trange(recipe.steps, desc="warm start", unit="step")
    for _ in progress:
        optimizer.zero_grad()
        rows = training_rows(rng.choices(problems, k=recipe.batch), tokenizer, recipe, rng)
        loss = backward(model, rows, recipe.pass_tokens)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss:.3f}", refresh=False)


def backward(model: Model, rows: list[Row], limit: int) -> float:
    """Adds the gradient of the mean cross-entropy over all response tokens of `rows`; returns that mean.

    At most `limit` tokens go through the model at once.
    """
    tokens = sum(len(response) for _, response in rows)
    total = 0.0
    for part in passes(rows, limit):
        inputs, targets = padded(part)
        logits = model(input_ids=inputs).logits  # [B, T, V]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        share = sum(len(response) for _, response in part) / tokens
        (loss * share).backward()
        total += loss.item() * share
    return total


def passes(rows: list[Row], limit: int) -> list[list[Row]]:
    """`rows` in parts of at most `limit` tokens, padding included; where it takes several, like lengths go together."""
    if len(rows) * max(map(_length, rows)) <= limit:
        return [rows]
    parts: list[list[Row]] = [[]]
    for row in sorted(rows, key=_length):
        if parts[-1] and (len(parts[-1]) + 1) * _length(row) > limit:
            parts.append([])
        parts[-1].append(row)
    return parts


def _length(row: Row) -> int:
    return len(row[0]) + len(row[1])


def training_rows(
    problems: list[Sum], tokenizer: PreTrainedTokenizerBase, recipe: Recipe, rng: random.Random
) -> list[Row]:
    return [
        (prompt_ids(one, tokenizer, recipe), [*tokenizer.encode(recipe.response(one, rng)), EOS]) for one in problems
    ]


def padded(rows: list[Row]) -> tuple[Tensor, Tensor]:
    """Inputs and targets [B, T] int64, padded on the right; only response tokens, the closing <eos> too, are targets."""
    width = max(map(_length, rows))
    inputs = torch.full((len(rows), width), PAD)
    targets = torch.full((len(rows), width), IGNORED)
    for i, (prompt, tokens) in enumerate(rows):
        inputs[i, : len(prompt) + len(tokens)] = torch.tensor(prompt + tokens)
        targets[i, len(prompt) - 1 : len(prompt) + len(tokens) - 1] = torch.tensor(tokens)
    return inputs, targets


def prompt_ids(one: Sum, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> list[int]:
    return list(tokenizer.encode(recipe.template.replace("{problem}", one.problem)))


@torch.no_grad()
def sample(model: Model, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """One response a prompt at temperature 1, without its <eos>."""
    width = max(map(len, prompts))
    # Prompts are padded on the left, so that every row's next token is the last column.
    tokens = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    model.eval()
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=max_tokens, eos_token_id=EOS, pad_token_id=PAD)
    output: Any = model.generate(tokens, attention_mask=mask, generation_config=config)  # type: ignore[misc]
    responses = output[:, width:].tolist()
    return [row[: row.index(EOS)] if EOS in row else row for row in responses]


def report_accuracy(model: Model, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, count: int = 64) -> float:
    """Print two responses and the share of right ones on `count` held-out problems."""
    problems = generate(count, recipe.seed, recipe.max_digits, "eval")
    responses = sample(model, [prompt_ids(one, tokenizer, recipe) for one in problems], recipe.max_response)
    texts = [str(tokenizer.decode(ids)) for ids in responses]
    right = [text.endswith(f"Answer: {one.answer}") for text, one in zip(texts, problems, strict=True)]
    for text, one in list(zip(texts, problems, strict=True))[:2]:
        print(f"{one.problem} {text.splitlines()} expected {one.answer}")
    accuracy = sum(right) / count
    print(f"accuracy on {count} held-out problems, sampled at temperature 1: {accuracy:.2f}")
    return accuracy


if __name__ == "__main__":
    main()
