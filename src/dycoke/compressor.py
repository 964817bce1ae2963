"""What a method and a model come to: ``with method(model) as run: model.generate(...)``.

A compressor is settings and formulas only. It holds no state: the same object serves any number of
models and videos, in turn or at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from dycoke.core.engine import Engine, engine_of
from dycoke.core.method import Method
from dycoke.core.steps import OnStep, Trace
from dycoke.errors import check_between, check_count, check_listener
from dycoke.models import Layout
from dycoke.models.locate import FrameSource
from dycoke.report import Report
from dycoke.vision.scores import Vision


class Run:
    """A model under compression, and what happened so far."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def reports(self) -> list[Report]:
        """Reports of the last 100 generations, in the order in which they began."""
        return [record.report() for record in list(self._engine.records.listed)]

    @property
    def report(self) -> Report | None:
        """The report of the last generation; None before the first.

        A generation that runs inside another one, as contrastive decoding and ``guidance_scale``
        run a second prompt between the steps, is in `reports` alone.
        """
        record = self._engine.records.last
        return None if record is None else record.report()

    @property
    def vision(self) -> Vision | None:
        """What reads the vision encoder's attention; None where the method does without."""
        return self._engine.vision

    @property
    def trace(self) -> Trace | None:
        """What the last generation kept and attended to; None unless ``trace=True``."""
        record = self._engine.records.last
        return None if record is None else record.trace

    @property
    def on_step(self) -> OnStep | None:
        """What is called after each forward with a `Step`; None where nobody listens.

        Assign a function to listen from now on. Attention of methods that select nothing while
        decoding is looked at only where ``on_step`` was given to the method itself.

        Raises
        ------
        TypeError
            For what cannot be called.
        ValueError
            Where the settings remove nothing, and the run began with nobody listening.
        """
        return self._engine.on_step

    @on_step.setter
    def on_step(self, on_step: OnStep | None) -> None:
        check_listener(on_step)
        engine = self._engine
        if on_step is not None and engine.method.idle and not engine.watched:
            raise ValueError(
                "these settings remove nothing, so this run leaves the model alone and has no "
                "steps; give on_step= to the method itself to watch it all the same"
            )
        engine.on_step, engine.watched = on_step, engine.watched or on_step is not None


@dataclass(frozen=True)
class Compressor(Method):
    """A method that can be put on a model; the base of all of them.

    What it may do, and when, is `Method`'s. A subclass is a frozen dataclass, too, and its fields
    are its settings: ``@dataclass(frozen=True)`` stands above every one.

    Parameters
    ----------
    echo : float in [0, 1]
        Share of the decoder's layers, from the first on, in which the frames of a prompt still see
        what was merged away, as keys and values alone (`dycoke.core.echo`). Nothing of it is
        cached, and a decode step reads nothing of it. 0, the default, is every paper's method as
        it was published.
    echo_exact : int, at least 0
        The first of these layers in which it is computed in full, not guessed.
    """

    echo: float = field(default=0.0, kw_only=True)
    echo_exact: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the only way into a frozen dataclass
        set_field(self, "echo", check_between("echo", self.echo, 0, 1))
        set_field(self, "echo_exact", check_count("echo_exact", self.echo_exact, 0))
        name = type(self).__name__
        if self.echo_exact and not self.echo:
            raise ValueError(
                f"echo_exact={self.echo_exact} computes what echo=0 leaves out; set echo above 0, "
                "or echo_exact=0"
            )
        if self.echo and type(self).merge_tokens is Method.merge_tokens:
            raise ValueError(
                f"echo={self.echo:g} shows what was merged before the LLM, and {name} merges "
                "nothing there; use echo=0"
            )
        if self.echo and self.positions != "original":
            raise ValueError(
                f"echo={self.echo:g} needs the positions of what was merged, which "
                f"positions={self.positions!r} closes up; use positions='original'"
            )

    def __call__(
        self,
        model: Any,
        trace: bool = False,
        layout: Layout | None = None,
        frame_source: FrameSource | None = None,
        on_step: OnStep | None = None,
    ) -> AbstractContextManager[Run]:
        """Compress what ``model`` generates inside a ``with`` block.

        Parameters
        ----------
        model : a transformers model of a known family.
        trace : keep masks, active sets and attention of the last generation in ``run.trace``.
        layout : finds the videos of a prompt, for a family that is not known here.
        frame_source : where the frames of a video are. None or "videos": in the processor's
            videos; images are never merged. "images": all images of a prompt are frames of one
            video, too. A list such as [8, 8]: a prompt's images are videos of so many images each,
            in order.
        on_step : called after each forward of what is compressed, with a `Step`: the masks of the
            prompt first, then what each token attended to. It runs in the thread of ``generate``,
            which waits for it; what it raises ends that ``generate``, and nothing else.

        Raises
        ------
        UnsupportedError
            Where this cannot work on this model, with the way out.
        ValueError
            For a ``frame_source`` that is none of these, or together with ``layout``.
        TypeError
            For an ``on_step`` that cannot be called.
        """
        return _applied(model, self, trace, layout, frame_source, on_step)

    def to_dict(self) -> dict[str, Any]:
        """The settings, ready for JSON; `dycoke.methods.to_dict` adds the method's name."""
        self.setting_names()
        values = asdict(self)
        # The base's own come last, though dataclasses have them first.
        last = {name: values.pop(name) for name in ("echo", "echo_exact")}
        return {**values, **last}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; settings left out take their defaults."""
        known = cls.setting_names()
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no setting {', '.join(map(repr, unknown))}; "
                f"it has {', '.join(sorted(known))}"
            )
        return cls(**settings)

    @classmethod
    def setting_names(cls) -> set[str]:
        """The names of the settings.

        Raises
        ------
        TypeError
            For a subclass that is no dataclass, since its own settings would be left out.
        """
        if "__dataclass_fields__" not in vars(cls):
            raise TypeError(f"{cls.__name__} must be declared with @dataclass(frozen=True)")
        return {field.name for field in fields(cls)}

    @classmethod
    def at_retention(cls, retention: float, **settings: Any) -> Self:
        """The method where it keeps a share of the visual tokens, in (0, 1].

        Raises
        ------
        TypeError
            For a method that says in no setting how many tokens stay.
        """
        raise TypeError(f"{cls.__name__} has no setting for a retention")


@contextmanager
def _applied(
    model: Any,
    compressor: Compressor,
    trace: bool,
    layout: Layout | None,
    frame_source: FrameSource | None,
    on_step: OnStep | None,
) -> Iterator[Run]:
    run = apply(model, compressor, trace, layout, frame_source, on_step)
    try:
        yield run
    finally:
        run._engine.remove()


def apply(
    model: Any,
    compressor: Compressor,
    trace: bool = False,
    layout: Layout | None = None,
    frame_source: FrameSource | None = None,
    on_step: OnStep | None = None,
) -> Run:
    """Compress what ``model`` generates from now on, until `remove`. See `Compressor.__call__`.

    Raises
    ------
    UnsupportedError
        Where this cannot work on this model, or it is compressed already.
    """
    check_listener(on_step)
    engine = Engine(model, compressor, trace, layout, frame_source, on_step)
    engine.install()
    return Run(engine)


def remove(model: Any) -> None:
    """Restore a model that `apply` changed; does nothing to another one."""
    engine = engine_of(model)
    if engine is not None:
        engine.remove()
