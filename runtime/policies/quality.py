"""Predicts the PSNR of a reduction from the influence and tokens that it drops.

A least-squares fit a method over runs of an edit set: PSNR by the influence that is given up, the
tokens that are given up (both on a decimal log scale), and how far the edit spreads. It holds for
the model and the kind of edits that it was fitted on; `calibrate-auto` makes one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from ditrim.engines.json_file import (
    NotEmpty,
    Whole,
    check_header,
    parse_json,
    read_file,
    value_from,
)
from ditrim.plugins.errors import UsageError

FORMAT = "ditrim-quality-1"
_Name = Literal["coverage", "tokendrop"]
METHODS: tuple[str, ...] = get_args(_Name)
_LEAST_SHARE = 1e-3  # what is given up counts as at least this, so that its logarithm is finite
LEAST_RUNS = 12
CAP_DB = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """Regressors that are known of a reduction before it is used.

    Attributes:
        ratio: share of the reference tokens that it keeps.
        influence: share of the influence that those hold (ToPi Eq. 9).
        spread: see `residual.residual_spread`; none where there is no source on the same grid.
    """

    ratio: float
    influence: float
    spread: float | None = None

    def features(self) -> list[float]:
        """Return the regressors of the fit."""
        lost, dropped = 1 - self.influence, 1 - self.ratio
        return [
            1.0,
            -math.log10(max(lost, _LEAST_SHARE)),
            -math.log10(max(dropped, _LEAST_SHARE)),
            0.0 if self.spread is None else self.spread,
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityModel:
    """A fit for each method.

    Attributes:
        model: the engine set's model that was fitted on.
        identity: of that engine set.
        coefficients: method -> one number a term of `Outlook.features`.
        residual_db: method -> standard deviation of the fit's errors.
        num_runs: method -> how many runs it was fitted on.
    """

    model: str
    identity: str
    coefficients: Mapping[str, tuple[float, ...]]
    residual_db: Mapping[str, float]
    num_runs: Mapping[str, int]

    def predict(self, method: str, outlook: Outlook) -> float:
        """Expected PSNR in dB against the full context, less the fit's standard deviation."""
        if outlook.ratio >= 1.0:
            return CAP_DB
        terms = zip(self.coefficients[method], outlook.features(), strict=True)
        return sum(factor * term for factor, term in terms) - self.residual_db[method]

    @classmethod
    def fit(
        cls, model: str, identity: str, runs: Mapping[str, Sequence[tuple[Outlook, float]]]
    ) -> QualityModel:
        """Fit every method that there are runs of.

        Args:
            model, identity: of the engine set.
            runs: method -> what was known, and the PSNR in dB that came of it.

        Raises:
            UsageError: fewer than 12 runs of a method, or all of one outlook.
        """
        import numpy as np

        coefficients, residuals = {}, {}
        for method, pairs in runs.items():
            terms = np.array([outlook.features() for outlook, _ in pairs])
            values = np.array([min(psnr, CAP_DB) for _, psnr in pairs])
            if len(pairs) < LEAST_RUNS or not np.ptp(terms, axis=0).any():
                raise UsageError(
                    f"{len(pairs)} runs of {method} do not tell how quality depends on what is "
                    f"kept; give at least {LEAST_RUNS}, with different kept ratios"
                )
            solution = np.linalg.lstsq(terms, values, rcond=None)[0]
            coefficients[method] = tuple(float(value) for value in solution)
            residuals[method] = float(np.std(values - terms @ solution))
        counts = {method: len(pairs) for method, pairs in runs.items()}
        return cls(
            model=model,
            identity=identity,
            coefficients=coefficients,
            residual_db=residuals,
            num_runs=counts,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the model as JSON-ready values."""
        return {
            "format": FORMAT,
            "model": self.model,
            "engine_identity": self.identity,
            "terms": ["1", "-log10(influence given up)", "-log10(tokens given up)", "spread"],
            "methods": {
                method: {
                    "coefficients": [round(value, 4) for value in self.coefficients[method]],
                    "residual_db": round(self.residual_db[method], 4),
                    "num_runs": self.num_runs[method],
                }
                for method in self.coefficients
            },
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fit:
    coefficients: tuple[float, float, float, float]
    residual_db: float
    num_runs: Whole


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    model: str
    engine_identity: str
    methods: Annotated[dict[_Name, _Fit], NotEmpty]


def load_quality(path: str | Path) -> QualityModel:
    """Read what `calibrate-auto` wrote.

    Raises:
        UsageError: the file cannot be read, is damaged, or is of another kind.
    """
    remedy = "make one with calibrate-auto"
    return read_file(Path(path).expanduser(), _quality_from, what="predictor", remedy=remedy)


def _quality_from(text: str) -> QualityModel:
    content = check_header(parse_json(text), "quality prediction", {"format": FORMAT})
    found = value_from(_File, content, extra="ignore")
    return QualityModel(
        model=found.model,
        identity=found.engine_identity,
        coefficients={name: entry.coefficients for name, entry in found.methods.items()},
        residual_db={name: entry.residual_db for name, entry in found.methods.items()},
        num_runs={name: entry.num_runs for name, entry in found.methods.items()},
    )
