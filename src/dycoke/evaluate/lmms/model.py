"""The model classes that lmms-eval loads; this file alone needs it installed."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models import get_model
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.utils import simple_parse_args_string
from loguru import logger
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from dycoke import nano
from dycoke.assistant import Assistant, best_device
from dycoke.errors import UnsupportedError
from dycoke.evaluate.lmms.account import Account, compress, refuse_likelihoods
from dycoke.evaluate.lmms.prompts import generation, video_and_question
from dycoke.evaluate.lmms.settings import Settings, argument_names, settings_of
from dycoke.precision import choose_format
from dycoke.video import read


class Dycoke(lmms):
    """Our own pipeline: one video, one question, any image-text checkpoint that takes videos.

    Parameters
    ----------
    settings : of the method.
    pretrained : directory or hub id; "nano" is the embedded model.
    max_frames_num : frames sampled from a video, evenly, first and last among them.
    device, dtype, attn_implementation : as in `Assistant.load`.
    device_map : such as "auto", for a model on several devices; goes without ``device``.
    batch_size : 1.
    """

    is_simple = False

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> Any:
        """Our own model, or the one that ``base=`` names, compressed."""
        given = {k: v for k, v in (additional_config or {}).items() if v is not None}
        settings = settings_of(simple_parse_args_string(arg_string) | given)
        if settings.base is None:
            settings.check_rest("dycoke", argument_names(Dycoke) - {"settings"})
            return Dycoke(settings, **settings.rest)
        base = get_model(settings.base, cls.is_simple)
        settings.check_rest(settings.base, argument_names(base))
        lm = base(**settings.rest)
        if settings.compressor is not None:
            try:
                compress(lm, _account(settings), settings.frame_source)
            except UnsupportedError as error:
                raise UnsupportedError(f"base={settings.base}: {error}") from None
        return lm

    def __init__(
        self,
        settings: Settings,
        pretrained: str = "",
        max_frames_num: int = 32,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str | None = None,
        attn_implementation: str | None = None,
        batch_size: int | str = 1,
    ) -> None:
        super().__init__()
        if not pretrained:
            raise ValueError('pretrained= is missing: a directory, a hub id, or "nano"')
        if int(batch_size) != 1:
            raise ValueError(f"batch_size must be 1 without a base=, got {batch_size!r}")
        self.accelerator = Accelerator()
        self._rank = self.accelerator.local_process_index
        self._world_size = self.accelerator.num_processes
        if self._world_size > 1 and device is None and device_map is None:
            device = str(self.accelerator.device)
        source = nano.path() if pretrained == "nano" else pretrained
        if device_map is None:
            self._assistant = Assistant.load(source, device, dtype, attn_implementation)
        else:
            model = AutoModelForImageTextToText.from_pretrained(
                source,
                dtype=dtype or choose_format(best_device(), None, nano.is_at(source)).dtype,
                attn_implementation=attn_implementation,
                device_map=device_map,
            )
            self._assistant = Assistant(model.eval(), AutoProcessor.from_pretrained(source))
        self._settings = settings
        # Many benchmarks ask several questions about a video, one after another.
        self._read = functools.lru_cache(1)(functools.partial(read, frames=max_frames_num))
        self.batch_size_per_gpu = 1

    @property
    def device(self) -> Any:
        return self._assistant.model.device

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        asked = []
        for _, messages, settings, doc, task, split in (request.args for request in requests):
            prompt = video_and_question(messages(self.task_dict[task][split][doc]))
            asked.append((*prompt, generation(settings)))
        compressor = self._settings.compressor
        account = None if compressor is None else _account(self._settings)
        results, seconds, made = [], 0.0, 0
        for video, question, how in tqdm(asked, disable=self.rank != 0, desc="Model Responding"):
            answer = self._assistant.ask(self._read(video), question, compressor, **how)
            if account is not None and answer.report is not None:
                account.add(answer.report)
            seconds += answer.timings.total_s
            made += len(answer.tokens)
            counts = TokenCounts(output_tokens=len(answer.tokens))
            results.append(GenerationResult(text=answer.text, token_counts=counts))
        log_metrics(seconds, made, made / seconds if seconds else 0.0)
        if account is not None:
            account.close()
        return results

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        raise UnsupportedError("several rounds need a base= that can hold them")

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        refuse_likelihoods(requests)
        return []


class DycokeSimple(Dycoke):
    """What ``--force_simple`` asks for: the simple one of the classes of ``base=``."""

    is_simple = True


def _account(settings: Settings) -> Account:
    assert settings.compressor is not None
    return Account(settings.compressor, logger, _record)


def _record(summary: Mapping[str, float]) -> None:
    """Put the sums into the results file, beside the speed."""
    log_metrics(0.0, 0, 0.0, {f"dycoke_{name}": value for name, value in summary.items()})
