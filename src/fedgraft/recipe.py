"""A recipe: one run, one YAML file. Every layer defines its own section; here they are composed, read, checked and written."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any, get_args

from pydantic import ConfigDict, Field, ValidationError, validate_call

from fedgraft import files, plugins
from fedgraft.address import everything
from fedgraft.aggregation.merges import MEANS
from fedgraft.aggregation.settings import FederationSettings
from fedgraft.data.settings import DataSettings
from fedgraft.engine.settings import EngineSettings, InProcessSettings
from fedgraft.evaluation.cross import check_cross
from fedgraft.evaluation.settings import EvaluationSettings
from fedgraft.grafts.lora import LoraSettings
from fedgraft.grafts.side_expert import GraftSettings
from fedgraft.methods.method import Method
from fedgraft.moe.settings import EMBEDDED, ModelSettings
from fedgraft.report.settings import RecordSettings
from fedgraft.selection.settings import SelectionSettings
from fedgraft.settings import Section
from fedgraft.training.settings import TrainingSettings
from fedgraft.transforms.attack import AttackSettings, NoAttack
from fedgraft.transforms.checks import check_transforms
from fedgraft.transforms.compression import CompressionSettings, NoCompression
from fedgraft.transforms.privacy import NoPrivacy, PrivacySettings
from fedgraft.transforms.secure_aggregation.settings import NoSecureAggregation, SecureAggregationSettings
from fedgraft.yaml_text import read_value, read_yaml

METHOD_SECTIONS = frozenset({"lora", "graft", "selection"})
TASKS = ("tasks", "lm_eval")
"""Keys of the evaluation that may hold paths."""
SWEEP_SECTIONS = ("grid", "variants", "per_method")
"""What a sweep file holds beside a recipe."""


class MethodSettings(Section):
    """The method by name, and its own options as further keys."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: str = "flex"
    """A file in the methods folder; `fedgraft list methods` shows them."""


class Recipe(Section):
    """Everything that decides a run."""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    method: MethodSettings = MethodSettings()
    graft: GraftSettings = GraftSettings()
    lora: LoraSettings = LoraSettings()
    selection: SelectionSettings = SelectionSettings()
    federation: FederationSettings = FederationSettings()
    training: TrainingSettings = TrainingSettings()
    privacy: PrivacySettings = NoPrivacy()
    compression: CompressionSettings = NoCompression()
    attack: AttackSettings = NoAttack()
    secure_aggregation: SecureAggregationSettings = NoSecureAggregation()
    evaluation: EvaluationSettings = EvaluationSettings()
    engine: EngineSettings = InProcessSettings()
    record: RecordSettings = RecordSettings()
    seed: int = Field(default=0, ge=0)
    """Every random stream derives from it."""

    def build_method(self, unused_allowed: bool = False) -> Method:
        """The method with its options.

        Args:
            unused_allowed: let sections pass that are set but that the method doesn't use.

        Raises:
            ValueError: unknown method, option, dataset or criterion, or a section set that the method doesn't use.
        """
        options = dict(self.method.__pydantic_extra__ or {})
        build = plugins.load("method", self.method.name).build
        known = list(inspect.signature(build).parameters)
        for option in options:
            if option not in known:
                listed, others = ", ".join(known) or "none", ", ".join(methods_with(option))
                raise ValueError(
                    f"method.{option}: {self.method.name!r} has no such option{plugins.nearest(option, known)}; its options: {listed}"
                    + (f"; methods with that option: {others}" if others else "")
                )
        try:
            method = validate_call(build)(**options)
        except ValidationError as error:
            raise ValueError(explain(error, "method.")) from None
        assert isinstance(method, Method)
        method = self._with_merge(method)
        check_transforms(self, method, self.method.name)
        for key in ("dropout", "deadline", "join") if method.pooled else ():
            if getattr(self.federation, key) != FederationSettings.model_fields[key].default:
                raise ValueError(f"federation.{key}: method {self.method.name!r} pools the rows, so no client can be missing; remove it")
        plugins.load("dataset", self.data.dataset)
        check_cross(self.evaluation, self.engine.name)
        for recorder in self.record.to:
            plugins.load("recorder", recorder)
        if "selection" in method.sections:
            plugins.load("criterion", self.selection.criterion)
        for target in sorted(method.targets - set(self.lora.targets)):
            raise ValueError(f"lora.targets: method {self.method.name!r} with these options needs {target!r} there; add it")
        unused = set() if unused_allowed else (self.model_fields_set & METHOD_SECTIONS) - method.sections
        for section in sorted(unused):
            raise ValueError(
                f"{section}: set in the recipe, but method {self.method.name!r} doesn't use it; remove it, or --set {section}=null"
            )
        return method

    def _with_merge(self, method: Method) -> Method:
        """`federation.merge` in the place of the method's mean, and whether the method sends what `norm_limit` is about."""
        unseen = not method.merges_changes or method.personal is everything or self.secure_aggregation.name != "none"
        if self.federation.norm_limit is not None and unseen:
            raise ValueError(f"federation.norm_limit: with method {self.method.name!r}, or sums alone, no change is seen; remove it")
        rule = self.federation.merge
        merge = rule.merge(method.merge)
        if merge is method.merge:
            return method
        own = "" if method.merge in MEANS else "has a merge of its own"
        nothing = "shares nothing" if method.personal is everything else ""
        if why := method.needs_mean or nothing or own:
            raise ValueError(f"federation.merge: {rule.rule!r} can't be used, since method {self.method.name!r} {why}; set it to mean")
        return dataclasses.replace(method, merge=merge)

    def complete(self) -> dict[str, Any]:
        """The recipe with every default filled in, without sections that the method doesn't use."""
        unused = METHOD_SECTIONS - self.build_method().sections
        values = self.model_dump(mode="json", exclude=set(unused))
        options = inspect.signature(plugins.load("method", self.method.name).build).parameters
        values["method"] = {"name": self.method.name, **{name: option.default for name, option in options.items()}} | values["method"]
        return values

    def absolute(self) -> Recipe:
        """The recipe with local paths made absolute, so that it can be resumed from anywhere."""
        data, chosen = self.data, self.selection
        parts: dict[str, Any] = {"data": data.model_copy(update={"path": _resolved(data.path)})} if data.path else {}
        parts |= {"selection": chosen.model_copy(update={"file": _resolved(chosen.file)})} if chosen.file else {}
        own = {
            key: tuple(_resolved(name) if Path(name).expanduser().is_file() else name for name in getattr(self.evaluation, key))
            for key in TASKS
        }
        if own != {key: getattr(self.evaluation, key) for key in TASKS}:
            parts["evaluation"] = self.evaluation.model_copy(update=own)
        parts |= {"lora": self.lora.model_copy(update={"init": _resolved(self.lora.init)})} if self.lora.init else {}
        if self.model.name != EMBEDDED and Path(self.model.name).expanduser().is_dir():
            parts["model"] = self.model.model_copy(update={"name": _resolved(self.model.name)})
        return self.model_copy(update=parts)


def methods_with(option: str) -> list[str]:
    """The methods that have an option of this name."""
    return [name for name in plugins.names("method") if option in inspect.signature(plugins.load("method", name).build).parameters]


def _resolved(path: str) -> str:
    return str(Path(path).expanduser().resolve())


def load_recipe(source: str | Path | dict[str, Any] | Recipe | None = None, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply `a.b=c` overrides.

    Args:
        source: a YAML file, the name of a shipped recipe, a dict, a `Recipe`, or None for the embedded demo.
        overrides: assignments whose right side is YAML, as given to `--set`.

    Raises:
        ValueError: no such file, broken YAML, unknown key or bad value; names file and key.
    """
    if isinstance(source, Recipe) and not overrides:
        return source
    where, values = read_values(source, overrides)
    recipe = check_values(values, where)
    try:
        recipe.build_method()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return recipe


def read_values(source: str | Path | dict[str, Any] | Recipe | None, overrides: list[str] | None = None) -> tuple[str, dict[str, Any]]:
    """What a recipe says, not checked yet, with overrides applied; and where it comes from, for messages.

    Raises:
        ValueError: no such file, broken YAML, an override that is none.
    """
    where = "recipe"
    if isinstance(source, Recipe):
        values = source.model_dump(mode="json", exclude_unset=True)
    elif isinstance(source, dict):
        values = source
    else:
        path = find_recipe(source)
        where, values = str(path), read_yaml(files.read_text(path), str(path))
    values = dict(values or {})
    values.pop("schema", None)  # a run's own recipe.yaml carries one
    for override in overrides or []:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {override}: write section.key=value")
        values = assign(values, key, read_value(text, f"--set {override}"))
    return where, values


def check_values(values: dict[str, Any], where: str) -> Recipe:
    """The recipe of these values; whether the method fits is not checked yet.

    Raises:
        ValueError: unknown key or bad value.
    """
    if found := [section for section in SWEEP_SECTIONS if section in values]:
        raise ValueError(f"{where}: {found[0]}: this is a sweep, many runs from one file; start it with: fedgraft sweep {where}")
    lora = values.get("lora")
    if isinstance(lora, dict) and isinstance(lora.get("rank"), (list, dict)):
        listed = ", ".join(methods_with("ranks"))
        raise ValueError(
            f"{where}: lora.rank: one number for all clients; a rank for each is method.ranks, which these methods have: {listed}"
        )
    try:
        return Recipe.model_validate({section: value for section, value in values.items() if value is not None})
    except ValidationError as error:
        raise ValueError(f"{where}: {explain(error)}") from None


def shipped() -> Path:
    """The folder of the shipped recipes."""
    return Path(__file__).parent / "assets" / "recipes"


def shipped_names() -> list[str]:
    """The names of the shipped recipes; those in subfolders as `folder/name`."""
    return sorted(path.relative_to(shipped()).with_suffix("").as_posix() for path in shipped().rglob("*.yaml"))


def about(name: str) -> str:
    """What a shipped recipe is for: the first line of its file."""
    return files.read_text(shipped() / f"{name}.yaml").partition("\n")[0].removeprefix("# ")


def find_recipe(source: str | Path | None) -> Path:
    """The file of a recipe given by path or by the name of a shipped one; None is the demo.

    Raises:
        ValueError: neither.
    """
    if source is None:
        return shipped() / "demo.yaml"
    path = Path(source)
    if path.is_file():
        return path
    known = shipped_names()
    if str(source) in known:
        return shipped() / f"{source}.yaml"
    raise ValueError(f"{source}: no such recipe file{plugins.nearest(str(source), known)}; shipped recipes: {', '.join(known)}")


def assign(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of nested `values` in which the dotted `key` is `value`."""
    *sections, last = key.split(".")
    result = place = dict(values)
    for section in sections:
        inner = place.get(section)
        place[section] = dict(inner) if isinstance(inner, dict) else {}
        place = place[section]
    place[last] = value
    return result


def explain(error: ValidationError, place: str = "", root: type[Section] | None = None) -> str:
    """One line per problem: the key (`place` stands before it), the nearest known one (of `root`, else a recipe), the allowed values."""
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = _known_keys(tuple(problem["loc"][:-1]), root or Recipe)
            lines.append(f"unknown key {key!r}{plugins.nearest(str(problem['loc'][-1]), known)}; there are: {', '.join(known)}")
        elif problem["type"] == "union_tag_invalid":
            tag, expected = problem["ctx"]["discriminator"].strip("'"), problem["ctx"]["expected_tags"]
            lines.append(f"{place}{key}.{tag}: there is no {problem['ctx']['tag']!r}; choose one of {expected}")
        else:
            lines.append(f"{place}{key}: {problem['msg']} (got {problem['input']!r})")
    return "\n".join(lines)


def _known_keys(sections: tuple[Any, ...], root: type[Section]) -> list[str]:
    model: Any = root
    for section in sections:
        choices = _kinds(model)
        model = choices[section] if choices else model.model_fields[section].annotation
    return list(model.model_fields)


def _kinds(model: Any) -> dict[str, Any]:
    """The kinds of a section that comes in kinds, by the value of their first key, which tells them apart."""
    return {next(iter(kind.model_fields.values())).default: kind for kind in get_args(model)}
