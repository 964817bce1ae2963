"""A model for lmms-eval: ``lmms_eval --model dycoke --model_args pretrained=...,method=dycoke``.

lmms-eval finds it by the entry point in pyproject.toml; see docs/lmms-eval.md.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval asks a plug-in for: where its model classes are."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="dycoke",
        simple_class_path="dycoke.evaluate.lmms.model.DycokeSimple",
        chat_class_path="dycoke.evaluate.lmms.model.Dycoke",
    )
