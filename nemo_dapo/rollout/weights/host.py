"""Carrier into the folder of a serving node on this very host."""

from __future__ import annotations

from pathlib import Path

import torch

from nemo_dapo.rollout.weights.deadline import Deadline
from nemo_dapo.rollout.weights.pack import Piece
from nemo_dapo.rollout.weights.store import WeightWriter
from nemo_dapo.rollout.weights.table import Table


class HostCarrier:
    """Copies pieces into the node's folder. Raises OSError where the host has no room, RuntimeError for a folder gone."""

    def __init__(self, folder: Path) -> None:
        self.writer = WeightWriter(folder)
        self.dropped: dict[str, str] = {}

    def begin(self, version: int, deadline: Deadline) -> None:
        self.writer.begin()

    def carry(self, piece: Piece) -> None:
        if not len(piece.data):
            return
        torch.frombuffer(self.writer.room(piece.offset, len(piece.data)), dtype=torch.uint8).copy_(piece.data)

    def commit(self, table: Table) -> None:
        self.writer.commit(table)

    def close(self) -> None:
        self.writer.close()
