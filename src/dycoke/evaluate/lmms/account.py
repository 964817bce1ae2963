"""What was compressed in an evaluation, over all of its generations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from dycoke.compressor import Compressor, apply
from dycoke.errors import UnsupportedError
from dycoke.report import Report


class Account:
    """Sums over the reports of an evaluation.

    Parameters
    ----------
    compressor : what compresses.
    log : a logger; gets the summary as info, and at once what should not be missed as a warning.
    record : called with `summary` when a list of requests is through.
    """

    def __init__(
        self, compressor: Compressor, log: Any, record: Callable[[dict[str, float]], object]
    ) -> None:
        self.compressor, self._log, self._record = compressor, log, record
        self.generations = self.engaged = self.failed = self.samples = 0
        self._retention = self._final = 0.0
        self._refusal: UnsupportedError | None = None
        self._reason: str | None = None

    def add(self, report: Report) -> None:
        """Take in one generation."""
        self.generations += 1
        self.samples += len(report.samples)
        if report.engaged:
            self.engaged += 1
            self._retention += report.retention
            self._final += report.final_retention
        elif self._reason is None:
            self._reason = report.reason
            self._log.warning(f"dycoke did not engage: {report.reason}")

    def fail(self, error: Exception) -> None:
        """Take in a generation that raised; many models of lmms-eval go on with an empty answer."""
        self.failed += 1
        if isinstance(error, UnsupportedError) and self._refusal is None:
            self._refusal = error

    def summary(self) -> dict[str, float]:
        """Counts, and means over the generations that were compressed."""
        return {
            "generations": self.generations,
            "engaged": self.engaged,
            "failed": self.failed,
            "retention": self._retention / self.engaged if self.engaged else 1.0,
            "final_retention": self._final / self.engaged if self.engaged else 1.0,
        }

    def __str__(self) -> str:
        sums = self.summary()
        return (
            f"dycoke compressed {self.engaged} of {self.generations} generations "
            f"({self.failed} failed): kept {sums['retention']:.2%}, attended "
            f"{sums['final_retention']:.2%} of the visual tokens; {self.compressor!r}"
        )

    def close(self, missing: int = 0) -> None:
        """Tell the sums, and refuse scores that would not be this method's.

        Parameters
        ----------
        missing : requests that were answered without the compressed model.

        Raises
        ------
        UnsupportedError
            Where a generation was refused, or none at all was compressed.
        """
        self._log.info(str(self))
        self._record(self.summary())
        if missing > 0:
            self._log.warning(
                f"{missing} answers are not of the compressed model: its generation failed "
                f"({self.failed} so far), or something else answered"
            )
        if self._refusal is not None:
            raise self._refusal
        if self.generations and not self.engaged and not self.compressor.idle:
            raise UnsupportedError(
                f"none of {self.generations} generations was compressed, so these would be the "
                f"full model's scores: {self._reason}"
            )


def compress(lm: Any, account: Account, frame_source: str | None = None) -> None:
    """Compress what an lmms-eval model generates, from now on.

    Parameters
    ----------
    lm : an instance; its ``model`` (or ``_model``) is a transformers model.
    frame_source : as in `Compressor.__call__`.

    Raises
    ------
    UnsupportedError
        Where there is no such model, or it cannot be compressed.
    """
    model: Any = getattr(lm, "model", None) or getattr(lm, "_model", None)
    if not hasattr(model, "generate") or not hasattr(model, "get_decoder"):
        raise UnsupportedError(
            f"{type(lm).__name__} runs no transformers model in this process; name a base that "
            "does, such as qwen2_5_vl, or none"
        )
    run = apply(model, account.compressor, frame_source=frame_source)
    inner = model.generate

    @functools.wraps(inner)
    def generate(*args: Any, **kwargs: Any) -> Any:
        try:
            output = inner(*args, **kwargs)
        except Exception as error:
            account.fail(error)
            raise
        account.add(run.reports[-1])
        return output

    def closing(answer: Callable[[Any], Any]) -> Callable[[Any], Any]:
        @functools.wraps(answer)
        def answers(requests: Any) -> Any:
            before = account.samples
            results = answer(requests)
            account.close(len(requests) - (account.samples - before))
            return results

        return answers

    model.generate = generate
    lm.generate_until = closing(lm.generate_until)
    lm.generate_until_multi_round = closing(lm.generate_until_multi_round)
    lm.loglikelihood = refuse_likelihoods


def refuse_likelihoods(requests: Any) -> Any:
    """Nothing is generated for them, and so nothing is compressed."""
    raise UnsupportedError(
        "this task compares likelihoods, which are not compressed; take its generate_until form"
    )
