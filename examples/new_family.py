"""Add a model family: say where the tokens of a video stand in its prompts.

Runs in seconds on a tiny random model, without network: ``python examples/new_family.py``.
"""

import torch
from transformers import LlamaConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

from dycoke import DyCoke
from dycoke.models import Family, Prompt, VideoSpan

# A model that dycoke does not know: Video-LLaVA has 8 frames of 4 x 4 patches and a class token here.
# In its prompts a video is one run of placeholders.
VIDEO, FRAMES, SIDE = 99, 8, 4
