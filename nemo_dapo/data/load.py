"""Data sets by their configuration: rows to problems to prompts, with an account of every row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from nemo_dapo.config import DataConfig, DataSetConfig
from nemo_dapo.data import formats
from nemo_dapo.data.filters import Tally, drop_held_out, drop_long, select, text_key
from nemo_dapo.data.problem import LoadReport, Problem, content_hash
from nemo_dapo.data.template import PromptRenderer
from nemo_dapo.types import Prompt


@dataclass(frozen=True)
class PromptSet:
    """One data set, ready to be asked. `weight` is its share of the draws in a mixture."""

    name: str
    prompts: tuple[Prompt, ...]
    report: LoadReport
    weight: float = 1.0


@dataclass(frozen=True)
class RunData:
    """The training sets and the evaluation sets of a run, and the fingerprint of how they are asked."""

    train: tuple[PromptSet, ...]
    eval: tuple[PromptSet, ...]
    rendering: dict[str, str] = field(default_factory=dict)

    @property
    def reports(self) -> list[LoadReport]:
        return [chosen.report for chosen in (*self.train, *self.eval)]

    def scarcity(self, attempts: int) -> str:
        """One line where a step that samples up to `attempts` prompts must ask a problem twice, else ""."""
        problems = sum(len(chosen.prompts) for chosen in self.train)
        if problems >= attempts:
            return ""
        return (
            f"data: {problems:,} training problems, but one step samples up to {attempts:,} "
            "(algorithm.prompts_per_step * max_attempts): problems then come up several times within a step"
        )


def load_problems(name: str, config: DataSetConfig) -> tuple[list[Problem], LoadReport]:
    """The problems of one set in file order, without repeats. Raises ValueError when it cannot be read or ends up empty."""
    tally = Tally()
    problems = select(_progress(name, config), tally, max_problems=config.max_problems)
    return problems, _report(name, tally, [problem.uid for problem in problems])


def load_prompt_set(
    name: str,
    config: DataSetConfig,
    renderer: PromptRenderer,
    max_prompt_length: int,
    held_out: AbstractSet[str] = frozenset(),
) -> PromptSet:
    """One set, templated and tokenised; problems in `held_out` and prompts over `max_prompt_length` tokens are dropped.

    Raises ValueError when the set cannot be read or ends up empty.
    """
    tally = Tally()
    problems = select(_progress(name, config), tally, max_problems=config.max_problems)
    prompts = drop_long((renderer.prompt(problem) for problem in problems), tally, max_prompt_length)
    prompts = drop_held_out(prompts, tally, held_out)
    report = _report(name, tally, [prompt.uid for prompt in prompts])
    return PromptSet(name, tuple(prompts), report, config.weight)


def load_run_data(config: DataConfig, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int) -> RunData:
    """Every set of a run. With `exclude_eval`, training problems that an evaluation set holds are dropped and counted."""
    renderer = PromptRenderer.from_config(config, tokenizer)
    evaluation = _load_all(config.eval, renderer, max_prompt_length, frozenset())
    held_out = {text_key(prompt.problem) for chosen in evaluation for prompt in chosen.prompts}
    train = _load_all(config.train, renderer, max_prompt_length, held_out if config.exclude_eval else frozenset())
    return RunData(_with_overlaps(train), evaluation, renderer.fingerprint())


def _load_all(
    sets: Mapping[str, DataSetConfig], renderer: PromptRenderer, max_prompt_length: int, held_out: AbstractSet[str]
) -> tuple[PromptSet, ...]:
    return tuple(load_prompt_set(name, sets[name], renderer, max_prompt_length, held_out) for name in sets)


def _with_overlaps(sets: tuple[PromptSet, ...]) -> tuple[PromptSet, ...]:
    """`sets`, whose reports count the problems that an earlier one holds too. They stay: weights are shares of draws, and
    what a set is given is its user's choice."""
    keys = {chosen.name: {text_key(prompt.problem) for prompt in chosen.prompts} for chosen in sets}
    counted = []
    for index, chosen in enumerate(sets):
        shared = {earlier.name: len(keys[chosen.name] & keys[earlier.name]) for earlier in sets[:index]}
        found = {name: count for name, count in shared.items() if count}
        counted.append(replace(chosen, report=replace(chosen.report, overlaps=found)))
    return tuple(counted)


def _progress(name: str, config: DataSetConfig) -> Iterable[Problem]:
    """The set's rows; on a terminal, a load that takes long shows how far it is."""
    rows = formats.problems(config)
    return tqdm(rows, desc=f"data {name}", unit=" rows", delay=5, leave=False, disable=None)


def _report(name: str, tally: Tally, uids: Iterable[str]) -> LoadReport:
    uids = sorted(uids)
    report = LoadReport(
        name, tally.rows_read, tally.repeats_removed, dict(tally.dropped), len(uids), content_hash(uids)
    )
    if not uids:
        raise ValueError(f"no problem is left to use; {report}: check the path, the columns and the limits")
    return report
