"""The stored form of a calibration: what was measured on which machine with which engine, the model fitted to it and
how well it predicts steps it has not seen. Reading trusts nothing: bounded, typed, and every number checked.

    measured steps --fit_best--> Calibration --store--> file --load--> Calibration --site--> simulate
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from headrace.core.config import EngineSettings
from headrace.core.ports import Capacity
from headrace.core.shape import ModelShape
from headrace.core.types import HeadraceError
from headrace.sim.cost.batch import Batch, CostModel, Spans
from headrace.sim.cost.fit import FEATURES, BadSamples, Errors, Range, Sample, cross_validate
from headrace.sim.cost.linear import Linear, Regimes, fit_linear, fit_regimes
from headrace.sim.cost.table import Table
from headrace.sim.cost.tiled import Sizes, Tiled, fit_tiled
from headrace.sim.measure import Measured
from headrace.sim.run import Site

FORMAT = 1
MOST_BYTES = 16 << 20
_FOLDS = 10
_MOST = 1e15  # of any number in the file
_MOST_S = 1e6


class BadCalibration(HeadraceError):
    """A file that is not a calibration, or one that was damaged; the message says what is wrong with it."""


class Origin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a calibration comes from."""

    model: str
    shape: ModelShape
    dtype: str
    device: str
    threads: int
    cpu: str
    versions: dict[str, str]  # of headrace, python and the libraries that computed
    at: str  # ISO 8601, UTC


class Point(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One measured step, as sums over its rows; see `sim.cost.batch`."""

    rows: int
    tokens: float
    sampled: int
    decodes: float
    prefill_reach: float
    pairs: float
    prefill_context: float
    decode_context: float
    longest: float
    seconds: float
    repeats: int
    spread: float  # half of what the middle half of the repeats covers, relative to its mean

    @classmethod
    def of(cls, measured: Measured) -> Point:
        batch, full = measured.sample.batch, measured.sample.batch.full
        return cls(
            *batch[:5],
            full.pairs,
            full.prefill_context,
            full.decode_context,
            batch.longest,
            measured.sample.seconds,
            measured.repeats,
            measured.spread,
        )

    @property
    def sample(self) -> Sample:
        full = Spans(self.pairs, self.prefill_context, self.decode_context, growing=round(self.decodes))
        batch = Batch(self.rows, self.tokens, self.sampled, self.decodes, self.prefill_reach, full, (), self.longest)
        return Sample(batch, self.seconds)


class Fitted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model and its coefficients; a table has none but the points themselves."""

    kind: str
    coefficients: tuple[float, ...]


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything a simulation needs of one machine, one model and one engine."""

    format: int
    origin: Origin
    capacity: Capacity
    token_budget: int
    settings: EngineSettings
    row_sizes: tuple[int, ...]  # that the engine's kernels are called with; empty: any
    host_s: float  # of every step, from its end to the next plan; part of the points' seconds
    points: tuple[Point, ...]
    fitted: Fitted
    errors: dict[str, Errors]  # cross-validated, of every model that was tried

    @property
    def samples(self) -> list[Sample]:
        return [point.sample for point in self.points]

    def cost(self, *, strict: bool = False) -> CostModel:
        """Outside the calibrated range an estimate is marked `extrapolated`, with `strict` refused (Extrapolated)."""
        return _restored(self.fitted, self.samples, self.row_sizes, strict)

    def range(self) -> Mapping[str, tuple[float, float]]:
        """What was measured, by name of the feature."""
        measured = Range.of(self.samples)
        return dict(zip(FEATURES[1:], list(zip(measured.low, measured.high, strict=True))[1:], strict=True))

    def site(self, *, strict: bool = False, replicas: int = 1) -> Site:
        """The calibrated engine, to be simulated."""
        capacity = replace(self.capacity, host_blocks=0)  # what copies cost was not measured
        return Site(self.settings, capacity, self.cost(strict=strict), self.token_budget, replicas)


# -- fitting -----------------------------------------------------------------------------------------------------------

Fit = Callable[[Sequence[Sample]], CostModel]


def fit_best(samples: Sequence[Sample], row_sizes: tuple[int, ...]) -> tuple[Fitted, dict[str, Errors]]:
    """The model with the least cross-validated mean error, and those of all. Raises BadSamples when there are too few
    for any."""
    sizes = Sizes(row_sizes)
    fits: dict[str, Fit] = {
        "linear": fit_linear,
        "regimes": fit_regimes,
        "table": Table,
        "tiled": lambda some: fit_tiled(some, sizes),
    }
    errors = {}
    for kind, fit in fits.items():
        try:
            errors[kind] = cross_validate(fit, samples, min(_FOLDS, len(samples)))
        except BadSamples:
            continue
    if not errors:
        raise BadSamples(f"{len(samples)} measured steps are too few for any model; measure more.")
    best = min(errors, key=lambda kind: errors[kind].mean)
    return Fitted(best, _coefficients(fits[best](samples))), errors


def _coefficients(model: CostModel) -> tuple[float, ...]:
    if isinstance(model, Linear):
        return (model.step_s, model.token_s, model.reach_s, model.context_s, model.sampled_s)
    if isinstance(model, Regimes):
        return _coefficients(model.decode) + _coefficients(model.mixed)
    return model.coefficients if isinstance(model, Tiled) else ()


def _restored(fitted: Fitted, samples: Sequence[Sample], row_sizes: tuple[int, ...], strict: bool) -> CostModel:
    """Raises BadCalibration unless there are as many coefficients as the model has."""
    kind, numbers, sizes = fitted.kind, fitted.coefficients, Sizes(row_sizes)
    measured, five = Range.of(samples), len(FEATURES)
    counts = {"linear": (five,), "regimes": (five, 2 * five), "table": (0,), "tiled": (len(sizes.terms),)}
    if len(numbers) not in counts.get(kind, ()):
        raise BadCalibration(f"{len(numbers)} coefficients are not those of the model {kind!r:.40}")
    if kind == "tiled":
        return Tiled(sizes, numbers, measured, strict)
    if kind == "table":
        return Table(samples, strict=strict)
    models = [
        Linear(step_s, token_s, reach_s, context_s, sampled_s, measured=measured, strict=strict)
        for step_s, token_s, reach_s, context_s, sampled_s in zip(*[iter(numbers)] * five, strict=True)
    ]
    return Regimes(*models) if len(models) == 2 else models[0]


# -- the file ----------------------------------------------------------------------------------------------------------


def store(calibration: Calibration, path: Path) -> None:
    """Write it as JSON that a person can read. Raises BadCalibration when the path cannot be written."""
    text = msgspec.json.format(msgspec.json.encode(calibration), indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text + b"\n")
    except OSError as error:
        raise BadCalibration(f"cannot write the calibration {path}: {error.strerror}") from error


def load(path: Path) -> Calibration:
    """Read and check a calibration. Raises BadCalibration, whatever the file holds."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise BadCalibration(f"cannot read the calibration {path}: {error.strerror}; run headrace calibrate") from error
    if len(content) > MOST_BYTES:
        raise BadCalibration(f"{path} is larger than {MOST_BYTES >> 20} MiB: no calibration is")
    try:
        _check_format(content)
        calibration = msgspec.json.decode(content, type=Calibration)
        _check(calibration)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, BadCalibration, BadSamples) as error:
        raise BadCalibration(f"{path} is not a calibration that can be used: {error}; calibrate again") from error
    return calibration


class _Format(msgspec.Struct):
    """The part that every format has."""

    format: int


def _check_format(content: bytes) -> None:
    found = msgspec.json.decode(content, type=_Format).format
    if found != FORMAT:
        raise BadCalibration(f"it has format {found} where this version of Headrace reads format {FORMAT}")


def _check(calibration: Calibration) -> None:
    """Raises BadCalibration or BadSamples for anything that would break a simulation later."""
    numbers = _numbers(msgspec.to_builtins(calibration))
    if not all(math.isfinite(number) and 0 <= number <= _MOST for number in numbers):
        raise BadCalibration("a number in it is negative, not finite or absurdly large")
    capacity, sizes = calibration.capacity, calibration.row_sizes
    if min(capacity.blocks, capacity.block_tokens, capacity.max_context_tokens, calibration.token_budget) < 1:
        raise BadCalibration("blocks, tokens of a block, longest context and token budget must be at least 1")
    if list(sizes) != sorted(set(sizes)) or (sizes and sizes[0] < 1):
        raise BadCalibration("the row sizes do not ascend from 1 or more")
    if not calibration.points:
        raise BadCalibration("it has no measured points")
    for point in calibration.points:
        if not (0 < point.seconds < _MOST_S and point.repeats >= 1 and point.rows >= 1 and point.decodes <= point.rows):
            raise BadCalibration("a measured point has no time, no repeats or no rows")
    cost = calibration.cost()
    if not all(0 < cost.estimate(sample.batch).seconds < _MOST_S for sample in calibration.samples):
        raise BadCalibration("with its coefficients a measured step would take no time, or days")


def _numbers(value: Any) -> list[float]:
    """Every number in a tree of built-in values."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [number for part in value for number in _numbers(part)]
    return [value] if isinstance(value, int | float) else []
