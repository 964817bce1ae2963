"""A method of your own: keep the tokens that are least like the mean of their video."""

from dataclasses import dataclass
from tempfile import TemporaryDirectory

from torch import Tensor

from dycoke import assistant, methods
from dycoke.nano import stories


@dataclass(frozen=True)
class Distinct(methods.ScoreBased):
    def score(self, features: Tensor, video: methods.VideoContext) -> Tensor:
        return (features - features.mean((0, 1))).square().sum(-1)  # (F, N, D) -> (F, N)


methods.register(methods.Entry("distinct", "what is least like the video's mean", Distinct))
story, method = stories.make("seen", 0), methods.create("distinct", retention=0.25)
question, truth = stories.questions(story)[0]
with TemporaryDirectory() as folder:
    clip = stories.write(story, f"{folder}/story.mp4")
    answer = assistant.Assistant.load(device="cpu").ask(clip, question, method, frames=24)
assert answer.report is not None and answer.report.engaged
print(f"{question} {answer.text} ({truth})\n{answer.report}")
