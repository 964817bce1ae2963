"""Ask a checkpoint about a clip, with DyCoke under your own call of generate.

    python examples/quickstart.py llava-hf/llava-onevision-qwen2-7b-ov-hf clip.mp4

Without arguments the embedded nano model is asked about a story that is rendered first, so that
the example runs anywhere, with nothing fetched. The lines below `checkpoint, clip` are those of
the README.
"""

import sys
import tempfile

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from dycoke import DyCoke
from dycoke.video import read


def given() -> tuple[str, str]:
    """The checkpoint (a folder or a hub id) and the clip to ask about."""
    if len(sys.argv) == 3:
        return sys.argv[1], sys.argv[2]
    if len(sys.argv) != 1:
        sys.exit("usage: quickstart.py [CHECKPOINT CLIP]")
    from dycoke import nano
    from dycoke.nano import stories

    story = stories.make("seen", 0)
    print(f"truth: {stories.describe(story)}")
    return str(nano.path()), str(stories.write(story, f"{scratch.name}/story.mp4"))


scratch = tempfile.TemporaryDirectory()  # is gone when the example ends
checkpoint, clip = given()
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="auto").to(device)
processor = AutoProcessor.from_pretrained(checkpoint)

question = "Describe what happens in this video."
content = [{"type": "video"}, {"type": "text", "text": question}]
chat = [{"role": "user", "content": content}]
text = processor.apply_chat_template(chat, add_generation_prompt=True)
frames = read(clip, frames=32).frames
inputs = processor(text=text, videos=[frames], do_sample_frames=False, return_tensors="pt")
inputs = inputs.to(device, model.dtype)

with DyCoke()(model) as run:
    output = model.generate(**inputs, max_new_tokens=128)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(run.report)
