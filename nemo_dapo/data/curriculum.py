"""What the model made of each problem so far: attempts and right answers, and whether it may be skipped."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemo_dapo.files import replacing
from nemo_dapo.types import Prompt

MIN_HISTORY = 4  # visits remembered, at least


@dataclass
class SolveStatistics:
    """Of one problem. An attempt is a response with a verdict: errors of the verifier are not among them."""

    attempts: int = 0
    correct: int = 0
    visits: int = 0
    recent: list[tuple[int, int]] = field(default_factory=list)  # (correct, attempts), newest last

    @property
    def pass_rate(self) -> float:
        return self.correct / self.attempts if self.attempts else 0.0


class Curriculum:
    """Solve statistics by problem uid. With `skip_solved_visits` k > 0, a problem answered all right in its last k visits
    counts as solved; 0 never. `solved` holds those, and `reopened` counts how often one has left it."""

    def __init__(self, skip_solved_visits: int = 0) -> None:
        if skip_solved_visits < 0:
            raise ValueError(f"data.skip_solved_visits={skip_solved_visits} must be 0 (never skip) or more")
        self.skip_solved_visits = skip_solved_visits
        self.statistics: dict[str, SolveStatistics] = {}
        self.solved: set[str] = set()
        self.reopened = 0

    def record(self, uid: str, correct: int, attempts: int) -> None:
        """One visit: `correct` of `attempts` responses with a verdict were right. No attempt says nothing."""
        if not 0 <= correct <= attempts:
            raise ValueError(f"problem {uid}: correct={correct} must lie between 0 and attempts={attempts}")
        if attempts == 0:
            return
        stats = self.statistics.setdefault(uid, SolveStatistics())
        stats.attempts += attempts
        stats.correct += correct
        stats.visits += 1
        history = max(MIN_HISTORY, self.skip_solved_visits)
        stats.recent = [*stats.recent, (correct, attempts)][-history:]
        if self._is_solved(stats):
            self.solved.add(uid)
        elif uid in self.solved:
            self.solved.remove(uid)
            self.reopened += 1

    def _is_solved(self, stats: SolveStatistics) -> bool:
        k = self.skip_solved_visits
        return 0 < k <= len(stats.recent) and all(correct == attempts for correct, attempts in stats.recent[-k:])

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and numbers: JSON holds it."""
        return {
            uid: [stats.attempts, stats.correct, stats.visits, [list(visit) for visit in stats.recent]]
            for uid, stats in self.statistics.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.statistics = {
            uid: SolveStatistics(attempts, correct, visits, [(c, a) for c, a in recent])
            for uid, (attempts, correct, visits, recent) in state.items()
        }
        self.solved = {uid for uid, stats in self.statistics.items() if self._is_solved(stats)}
        self.reopened += 1

    def export(self, path: Path, prompts: Iterable[Prompt] = ()) -> None:
        """One row a visited problem to `path` (.jsonl or .parquet), whole or not at all; `prompts` add text and source."""
        texts = {prompt.uid: (prompt.source, prompt.problem) for prompt in prompts}
        rows = [_row(uid, stats, *texts.get(uid, ("", ""))) for uid, stats in self.statistics.items()]
        if path.suffix not in (".jsonl", ".parquet"):
            raise ValueError(
                f"cannot export solve statistics to {str(path)!r}: the name must end in .jsonl or .parquet"
            )
        with replacing(path) as temporary:
            if path.suffix == ".parquet":
                _write_parquet(rows, temporary)
            else:
                lines = (json.dumps(row) + "\n" for row in rows)
                temporary.write_text("".join(lines), encoding="utf-8")


def _row(uid: str, stats: SolveStatistics, source: str, problem: str) -> dict[str, Any]:
    recent = [correct / attempts for correct, attempts in stats.recent]
    numbers = asdict(stats) | {"recent": recent, "pass_rate": stats.pass_rate}
    return {"uid": uid, "source": source, "problem": problem, **numbers}


def _write_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [(name, pa.string()) for name in ("uid", "source", "problem")]
        + [(name, pa.int64()) for name in ("attempts", "correct", "visits")]
        + [("recent", pa.list_(pa.float64())), ("pass_rate", pa.float64())]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema), path)
