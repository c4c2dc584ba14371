"""What was exported, against what the served model has: every parameter once, in its shape and dtype."""

from __future__ import annotations

from nemo_dapo.hf_folder import ExpectedWeights, check_weights


class Checklist:
    """What was exported so far, against what the served model has; `dtype` is the run's precision."""

    def __init__(self, expected: ExpectedWeights, dtype: str, *, at_once: bool = False) -> None:
        """`at_once` refuses a tensor when it comes: its bytes would go straight into a server."""
        self.expected, self.dtype, self.at_once = expected, dtype, at_once
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}

    def add(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        """Raises ValueError for a name that comes a second time."""
        if name in self.shapes:
            raise ValueError(f"parameter {name} was exported twice; every parameter must be sent exactly once")
        self.shapes[name], self.dtypes[name] = shape, dtype
        if self.at_once:
            self._require_known(name)

    def finish(self) -> None:
        """Raise ValueError, which lists them, where parameters are missing, unexpected, or of another shape or dtype.

        A parameter is in the run's precision, or in what the model's folder has it in.
        """
        check_weights(self.shapes, self.expected)
        wrong = [
            f"{name} {dtype} instead of {self.dtype}"
            for name, dtype in sorted(self.dtypes.items())
            if not self._has_right_dtype(name)
        ]
        if wrong:
            raise ValueError(
                f"the exported weights are not those of the model folder ({len(wrong)} of the wrong dtype: "
                f"{', '.join(wrong[:8])}): nothing was replaced"
            )

    def _require_known(self, name: str) -> None:
        shape, expected = self.shapes[name], self.expected.shapes.get(name)
        is_known = shape == expected or (expected is None and name in self.expected.optional)
        if is_known and self._has_right_dtype(name):
            return
        raise ValueError(
            f"parameter {name} {shape} {self.dtypes[name]} was exported, the model folder has {expected or 'none'} "
            f"{self.expected.dtypes.get(name, self.dtype)}: no server goes on with this update"
        )

    def _has_right_dtype(self, name: str) -> bool:
        return self.dtypes[name] in (self.dtype, self.expected.dtypes.get(name))
