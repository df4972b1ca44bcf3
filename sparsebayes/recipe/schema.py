"""What a recipe may say: every key, its type, its bounds and its default, in this file and those it imports.

A recipe is plain data: frozen, typed, without any tensor, and this module imports no torch, so that a recipe
is checked in a fraction of a second. `sparsebayes.recipe.loading` reads one from YAML; code that runs a
recipe reads its values from here and holds no defaults of its own.

    >>> recipe = Recipe(version=1, name="tiny", model=ModelSection(name="lenet5_caffe"))
    >>> recipe.train.cycles.count, recipe.prior.strength
    (12, 'auto')
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias, Union

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    JsonValue,
    PlainValidator,
    WithJsonSchema,
)

from sparsebayes.recipe.base import Epochs, Rate
from sparsebayes.recipe.base import Section as _Section
from sparsebayes.recipe.curvature import CurvatureSection
from sparsebayes.recipe.names import (
    DATA_NAMES,
    FOLDER,
    MODEL_NAMES,
    RULE_NAMES,
    RUN_NAME,
    check_data_name,
    check_model_name,
    check_rule,
    check_strength,
    list_rules,
)
from sparsebayes.recipe.posteriors import DropoutSection, GaussianSection, SamplingSection

__all__ = [
    "Budget",
    "CurvatureSection",
    "Cycles",
    "DataSection",
    "DropoutSection",
    "EvaluateSection",
    "ExportSection",
    "Finetune",
    "GaussianSection",
    "GroupRule",
    "ModelSection",
    "Pretrain",
    "PriorSection",
    "PruneSection",
    "Recipe",
    "SamplingSection",
    "TrainSection",
    "json_schema",
]

DataName: TypeAlias = Annotated[
    str, PlainValidator(check_data_name), WithJsonSchema({"type": "string", "examples": list(DATA_NAMES)})
]
ModelName: TypeAlias = Annotated[
    str, PlainValidator(check_model_name), WithJsonSchema({"type": "string", "examples": list(MODEL_NAMES)})
]
RuleName: TypeAlias = Annotated[
    str,
    PlainValidator(check_rule),
    WithJsonSchema({"type": "string", "examples": [*RULE_NAMES, "2:4", "blocks:4x4"]}),
]
Strength: TypeAlias = Annotated[
    Union[float, str],  # noqa: UP007 - pydantic evaluates this at run time, and Python 3.10 must manage
    PlainValidator(check_strength),
    WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "number", "exclusiveMinimum": 0}]}),
]
Patterns: TypeAlias = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)]
Folder: TypeAlias = Annotated[str, Field(pattern=FOLDER)]
BatchSize: TypeAlias = Annotated[int, Field(ge=1, le=1_000_000)]
Threads: TypeAlias = Annotated[int, Field(ge=1, le=1024)]


class DataSection(_Section):
    """Which images are learned from, how many are held out, and how they are fed."""

    name: DataName = Field(
        default="embedded_mnist",
        description=f"{', '.join(DATA_NAMES)}, or your own as 'package.module:function'.",
    )
    root: Folder | None = Field(
        default=None, description="Folder of the data; null: $SPARSEBAYES_DATA or the cache."
    )
    holdout: int = Field(
        default=1000,
        gt=0,
        le=10_000_000,
        description="Training images kept out of training, to choose the network by.",
    )
    batch_size: BatchSize = Field(default=128, description="Images of one training step.")
    augment: Literal["none", "shift", "shift1", "affine", "crop_flip", "crop_flip_cutout"] = Field(
        default="none", description="Random change of each training image."
    )


class ModelSection(_Section):
    """Which network is compressed."""

    name: ModelName = Field(
        description=f"{', '.join(MODEL_NAMES)}, torchvision:NAME for one of its classifiers with fresh weights, or "
        "your own as 'package.module:function'."
    )
    options: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="Keyword arguments of the model, such as {width: 0.5} for half the channels of vgg16.",
    )


class GroupRule(_Section):
    """One rule that divides parameters into groups, and the layers that it is applied to."""

    rule: RuleName = Field(description="A rule: units, features, filters, weights, 2:4, blocks:4x4, ...")
    include: Patterns = Field(
        default=("*",), min_length=1, description="Patterns of layer or parameter names, such as fc*."
    )
    exclude: Patterns = Field(default=(), description="Patterns of layers that are left alone.")


class PriorSection(_Section):
    """The hierarchical ARD prior, and what decides that a group is off."""

    scale: Literal["switches", "entries"] = Field(
        default="switches", description="What has a prior variance: the switch of a group, or its entries."
    )
    rule: Literal["evidence", "entropy"] = Field(
        default="evidence", description="When a group stays: evidence z^2 h > 1, or the paper's entropy rule."
    )
    joint: bool = Field(
        default=False,
        description="Judge groups that go together by what they do together (full curvature matrix of the switches) "
        "instead of one by one; for up to some ten thousand groups, scale: switches.",
    )
    strength: Strength = Field(
        default="auto",
        description="Nats of evidence that a group must be worth to stay; auto: the smallest network whose "
        "held-out loss is within one standard error of the best.",
    )
    price: Literal["none", "params", "macs", "budget"] = Field(
        default="none",
        description="What multiplies a group's strength: nothing, or what it costs against the mean group; budget: in "
        "the unit of the limit that the network exceeds most.",
    )


class Pretrain(_Section):
    """Training of the dense network, before anything is removed."""

    epochs: Epochs = Field(default=4, description="Passes over the training images.")
    lr: Rate | None = Field(default=None, description="Learning rate at the start; null: train.lr.")


class Cycles(_Section):
    """The cycles of estimating, removing and recovering, with a rising strength."""

    count: int = Field(default=12, ge=1, le=1000, description="Cycles at most.")
    epochs: Epochs = Field(default=1, description="Passes over the training images in each cycle, at least.")
    max_epochs: Epochs = Field(
        default=4,
        description="Passes at most: a cycle trains longer as the network gets cheaper, for as many "
        "multiply-accumulates as epochs passes of the dense one.",
    )
    lr: Rate | None = Field(default=None, description="Learning rate of the cycles; null: train.lr.")
    shrink: float = Field(
        default=0.25,
        gt=0,
        lt=1,
        description="Share of what is left that one cycle removes; the strength rises as far as that takes.",
    )


class Finetune(_Section):
    """Training of the small network, after the last removal."""

    epochs: Epochs = Field(default=10, description="Passes over the training images.")
    lr: Rate | None = Field(default=None, description="Learning rate at the start; null: train.lr.")


class TrainSection(_Section):
    """How the weights are learned: before, during and after the removal."""

    optimizer: Literal["sgd", "adam", "adamw"] = Field(default="sgd", description="Optimizer of all phases.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Momentum (sgd only).")
    weight_decay: float = Field(default=5e-4, ge=0, le=10, description="Weight decay of the optimizer.")
    lr: Rate = Field(default=0.05, description="Learning rate of each phase that names none.")
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="Share of a label that is spread over all classes."
    )
    distill: float = Field(
        default=0.0, ge=0, le=1, description="Weight of the dense network's soft targets in the loss."
    )
    distill_on: Literal["images", "augmented"] = Field(
        default="images",
        description="What the dense network sees: the images as they are, once for the whole run, or each batch as the "
        "small network sees it, which costs a forward pass of the dense network in every step.",
    )
    distill_temperature: float = Field(
        default=4.0, gt=0, le=1000, description="Temperature of the soft targets."
    )
    grad_clip: float | None = Field(
        default=None, gt=0, le=1e6, description="Largest norm of a gradient; null: any."
    )
    precision: Literal["float32", "bfloat16", "auto"] = Field(
        default="float32",
        description="Numbers of the training passes; bfloat16: autocast, weights stay float32; auto: bfloat16 on a "
        "CUDA device, else float32. Evaluation and curvature always use float32.",
    )
    compile: bool = Field(
        default=False,
        description="Compile the training passes by torch.compile; every smaller network is compiled anew, which pays "
        "off for long epochs only.",
    )
    pretrain: Pretrain = Field(default_factory=Pretrain, description="Training of the dense network.")
    cycles: Cycles = Field(default_factory=Cycles, description="The cycles of removal.")
    finetune: Finetune = Field(default_factory=Finetune, description="Training of the small network.")

    def rate(self, phase: Pretrain | Cycles | Finetune) -> float:
        """Learning rate at the start of `phase`: its own, else the one of all phases."""
        return self.lr if phase.lr is None else phase.lr


class Budget(_Section):
    """How large or how slow the chosen network may be: shares of the dense network, and a time; all must be met."""

    params: float | None = Field(default=None, gt=0, le=1, description="Share of the parameters.")
    macs: float | None = Field(default=None, gt=0, le=1, description="Share of the multiply-accumulates.")
    latency_ms: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="Milliseconds for one image in onnxruntime on one CPU thread of this machine, measured.",
    )


def _some_budget(value: Any) -> Any:
    """Refuse a budget that names no limit."""
    if isinstance(value, dict) and not value.keys() - Budget.model_fields.keys():
        if all(limit is None for limit in value.values()):
            raise ValueError(
                "expected at least one of params, macs and latency_ms, got none; write budget: null for none"
            )
    return value


class PruneSection(_Section):
    """What may go at once, what must stay, and what ranks the groups."""

    max_removal: float = Field(
        default=0.6, gt=0, le=1, description="Largest share of a layer's groups that one cycle removes."
    )
    min_keep: int = Field(
        default=1, ge=1, le=1_000_000, description="Groups that every layer keeps; branches are no layer."
    )
    round_to: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="Groups that a layer keeps are filled up to a multiple of this with the best of those that would "
        "go, where it has enough of them, since hardware likes such widths.",
    )
    reestimate: int = Field(
        default=2048,
        ge=0,
        le=10_000_000,
        description="Training images by which the statistics of batch norms are estimated anew after a removal; "
        "0: they stay as they are.",
    )
    budget: Annotated[Budget | None, BeforeValidator(_some_budget)] = Field(
        default=None,
        description="Size of the chosen network as a share of the dense one, its latency, or several of these; null: "
        "held-out loss decides. Where it cannot be met, the closest network is exported and the command's exit "
        "status is 3.",
    )
    score: Literal["evidence", "magnitude", "taylor", "random"] = Field(
        default="evidence",
        description="What ranks the groups; all but evidence are baselines, which only order them: "
        "they ignore prior.strength and prior.price, so give a budget.",
    )


class ExportSection(_Section):
    """Which files the small network is written to, besides its own."""

    onnx: bool = Field(default=True, description="Write model.onnx and dense.onnx, checked with onnxruntime.")
    legacy: bool = Field(default=False, description="Use the TorchScript-based ONNX exporter.")
    opset: int | None = Field(
        default=None, ge=9, le=30, description="ONNX operator set; null: the exporter's choice."
    )


class EvaluateSection(_Section):
    """How latency is measured."""

    latency: bool = Field(default=True, description="Measure dense and small networks side by side.")
    batch_sizes: Annotated[tuple[BatchSize, ...], Field(strict=False)] = Field(
        default=(1, 64), min_length=1, max_length=16, description="Images of one timed call, each measured."
    )
    threads: Threads = Field(default=1, description="CPU threads of the timed call.")


def _split_rules(rules: tuple[GroupRule, ...]) -> tuple[GroupRule, ...]:
    """Give each part of a stacked rule such as `units+features` an entry of its own."""
    return tuple(
        GroupRule(rule=part, include=rule.include, exclude=rule.exclude)
        for rule in rules
        for part in rule.rule.split("+")
    )


def _groups_schema() -> dict[str, Any]:
    """JSON Schema of every way to write `groups`; `list_rules` makes one of them."""
    name = {"type": "string", "examples": [*RULE_NAMES, "units+features", "2:4", "blocks:4x4"]}
    entry = {"anyOf": [name, {"$ref": "#/$defs/GroupRule"}]}
    return {"anyOf": [name, {"$ref": "#/$defs/GroupRule"}, {"type": "array", "items": entry, "minItems": 1}]}


class Recipe(_Section):
    """A whole run: what is compressed, how, and what is written."""

    version: Literal[1] = Field(description="Version of the recipe format.")
    name: str = Field(pattern=RUN_NAME, description="Name of the run; its folder's name begins with it.")
    task: Literal["compress"] = Field(
        default="compress", description="What the run does; a recipe of task: search has other sections."
    )
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="Seed of every random choice.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where it runs; auto: cuda if there is one."
    )
    threads: Threads | None = Field(default=None, description="CPU threads; null: as many as torch takes.")
    out: Folder = Field(default="runs", description="Folder that run folders are made in.")
    data: DataSection = Field(default_factory=DataSection, description="The images.")
    model: ModelSection = Field(description="The network.")
    groups: Annotated[
        tuple[GroupRule, ...],
        BeforeValidator(list_rules),
        Field(strict=False, min_length=1),
        AfterValidator(_split_rules),
    ] = Field(default=(GroupRule(rule="units"),), description="What may go: one rule, or several stacked.")
    posterior: Literal["laplace", "variational_dropout", "natural_gradient"] = Field(
        default="laplace", description="How the switches are inferred."
    )
    prior: PriorSection = Field(default_factory=PriorSection, description="What is believed of the switches.")
    curvature: CurvatureSection = Field(
        default_factory=CurvatureSection, description="How curved the loss is."
    )
    variational_dropout: DropoutSection = Field(
        default_factory=DropoutSection, description="Options of the posterior of that name."
    )
    natural_gradient: GaussianSection = Field(
        default_factory=GaussianSection, description="Options of the posterior of that name."
    )
    sampling: SamplingSection = Field(
        default_factory=SamplingSection, description="Sub-networks drawn from the posterior."
    )
    train: TrainSection = Field(default_factory=TrainSection, description="How the weights are learned.")
    prune: PruneSection = Field(default_factory=PruneSection, description="What goes.")
    export: ExportSection = Field(default_factory=ExportSection, description="What is written.")
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection, description="What is measured.")
    presets: dict[str, dict[str, JsonValue]] = Field(
        default_factory=dict, max_length=32, description="Named changes of this recipe: --preset NAME."
    )


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe of `task: compress`.

    Returns:
        The schema as plain data, ready for `json.dumps`.
    """
    schema = Recipe.model_json_schema(mode="validation")
    groups = schema["properties"]["groups"]
    schema["properties"]["groups"] = {
        "description": groups["description"],
        "default": "units",
        **_groups_schema(),
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "sparsebayes recipe",
    }
