"""What a site says of itself in `site.yaml`: who it is, where its model and rows lie, and what may leave it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, ValidationError, field_validator

from fedgraft import files, plugins
from fedgraft.data.partition import SAFE_NAME
from fedgraft.data.settings import DataSettings
from fedgraft.deployment.place import FOLDER, WHAT, Place, beside, place_of
from fedgraft.moe.settings import EMBEDDED, ModelSettings
from fedgraft.recipe import explain
from fedgraft.settings import Section
from fedgraft.yaml_text import read_yaml

QUESTIONS = ("graft", "train", "finish", "evaluate", "evaluate_unseen")
FACTS = (
    "examples",
    "loss",
    "tokens",
    "seconds",
    "truncated",
    "experts",
    "errors",
    "calibration_tokens",
    "models",
    "expert_figures",
    "unseen",
    "masked_counts",
    "public_keys",
    "sealed_shares",
    "commitment",
    "opened_shares",
)
OWN_MODEL = frozenset({"name", "revision", "offline", "device", "device_map", "max_memory", "offload"})
OWN_DATA = frozenset({"dataset", "path", "partition", "clients", "categories", "alpha", "overlap"})
Names: TypeAlias = tuple[str, ...]
Count: TypeAlias = Annotated[int, Field(ge=1)]


class PrivacySettings(Section):
    """Protection that a run must have before this site takes part."""

    clip: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Largest norm that an update may be clipped to."""
    noise: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Smallest noise multiplier."""


class PolicySettings(Section):
    """What a coordinator may ask this site for. Everything is compared with what is really asked and what would really leave."""

    methods: Names | None = None
    """Methods that may be run (none: all that are installed). Those that pool rows are always refused, because rows never leave."""
    questions: Names = QUESTIONS
    """Questions of these methods that are answered: `graft` (choose experts), `train`, `finish`, `evaluate`, `evaluate_unseen`."""
    leaves: Names = ("layers.*.attention",)
    """Leaves that may leave, as heads of addresses; `*` stands for anything between two dots. What the method keeps on the client never
    leaves, whatever is written here."""
    trees: Names = ("shared", "masked", "control")
    """Sets of leaves that may leave: `shared`, the trained ones; `masked`, what secure aggregation makes of them; `control`, SCAFFOLD's
    mean gradients."""
    facts: Names = FACTS
    """Figures that may leave with a reply. A reply with another one is refused as a whole."""
    categories: bool = True
    """Tell how many training rows each category has, when the site introduces itself; off: only how many rows there are in all."""
    reply_bytes: Count | None = None
    """Most bytes of one reply."""
    total_bytes: Count | None = None
    """Most bytes of all replies of all runs together."""
    rounds: Count | None = None
    """Most training rounds of one run that are answered."""
    min_examples: Count = 1
    """Fewest rows that may stand behind a reply: training rows seen in a round, held-out rows behind a figure."""
    bases: Names | None = None
    """Digests of the base models that may be trained on (none: any); a run's `environment.json` and the site's log show them."""
    privacy: PrivacySettings = PrivacySettings()
    secure_aggregation: Literal["optional", "required"] = "optional"
    """`required`: take part in runs with secure aggregation alone, and send no leaves but masked ones."""
    reasons: bool = False
    """Tell the coordinator in full why something failed here, which may name files, fields or categories; off: only the site's log says."""

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, methods: Names | None) -> Names | None:
        return None if methods is None else _known(methods, plugins.names("method"))

    @field_validator("questions")
    @classmethod
    def _known_questions(cls, questions: Names) -> Names:
        return _known(questions, list(QUESTIONS))

    @field_validator("leaves")
    @classmethod
    def _dotted(cls, leaves: Names) -> Names:
        if any(not part for pattern in leaves for part in pattern.split(".")):
            raise ValueError("a pattern is parts with dots between them, as in layers.*.attention")
        return leaves


class SiteSettings(Section):
    """A site: one client of a federation, on its own machine."""

    name: str
    """Name of the client, as its rows' file or folder is called."""
    model: ModelSettings
    """Where the base model lies here. What the recipe and not the site should decide (`dtype`, `attention`, ...) stays out."""
    data: DataSettings
    """The rows of this site, which make one client. Which rows it has is the site's word alone; `template`, `max_length` and limits of rows
    that are not set here are the recipe's."""
    folder: str = FOLDER
    """Folder of the site's own: memories and the log. Relative paths start from this file's folder."""
    socket: str | None = None
    """Folder of the worker's socket, when it should not lie in `folder`; its path is to be short."""
    loopback: bool = False
    """Listen on 127.0.0.1 with a token instead of a Unix socket; always so on systems without them."""
    grace: float = Field(default=300.0, ge=0, allow_inf_nan=False)
    """Seconds that the question in hand is given to finish when the worker is told to stop."""
    question_bytes: Count = 4_000_000_000
    """Longest question that is read."""
    policy: PolicySettings = PolicySettings()

    @field_validator("name")
    @classmethod
    def _fit_for_a_folder(cls, name: str) -> str:
        if not SAFE_NAME.fullmatch(name):
            raise ValueError("use letters, digits, '.', '_' and '-', no '.' at either end")
        return name

    @property
    def own_model(self) -> dict[str, Any]:
        """Keys of the recipe's section `model` that this site decides: where it lies and computes, and what else is set."""
        return self.model.model_dump(include=set(OWN_MODEL | self.model.model_fields_set))

    @property
    def own_data(self) -> dict[str, Any]:
        """Keys of the recipe's section `data` that this site decides: which rows there are, and what else is set."""
        return self.data.model_dump(include=set(OWN_DATA | self.data.model_fields_set))


def load_site(file: Path) -> tuple[SiteSettings, Place]:
    """Read a site's settings.

    Returns:
        The settings with paths made absolute, and the folders they name.

    Raises:
        ValueError: broken YAML, unknown key or bad value; names file and key.
        OSError: there is no such file.
    """
    values = read_yaml(files.read_text(file), str(file), WHAT) or {}
    try:
        settings = SiteSettings.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{file}: {explain(error, root=SiteSettings)}") from None
    return _absolute(settings, file), place_of(file, values)


def _absolute(settings: SiteSettings, file: Path) -> SiteSettings:
    parts: dict[str, Any] = {}
    if settings.data.path:
        parts["data"] = settings.data.model_copy(update={"path": str(beside(file, settings.data.path))})
    model = beside(file, settings.model.name)
    if settings.model.name != EMBEDDED and model.is_dir():
        parts["model"] = settings.model.model_copy(update={"name": str(model)})
    return settings.model_copy(update=parts)


def _known(names: Names, known: list[str]) -> Names:
    for name in names:
        if name not in known:
            raise ValueError(f"unknown name {name!r}{plugins.nearest(name, known)}; there are: {', '.join(known)}")
    return names
