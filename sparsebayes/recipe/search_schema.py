"""What a recipe of `task: search` may say: the sections that only a search has, and the recipe made of them.

>>> recipe = SearchRecipe(version=1, name="tiny", task="search", search=SearchSection(space="nas_bench_201"))
>>> recipe.search.strength_for(num_images=50_000), recipe.retrain.epochs
(1.0, 10)
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias, Union

from pydantic import BeforeValidator, Field, JsonValue, PlainValidator, WithJsonSchema

from sparsebayes.errors import RecipeError, unknown
from sparsebayes.recipe.base import Epochs, Rate, Section
from sparsebayes.recipe.names import RUN_NAME, USER_CODE, list_rules, show_value
from sparsebayes.recipe.posteriors import (
    ArchitectureSamplingSection,
    LogitGaussianSection,
    OperationDropoutSection,
)
from sparsebayes.recipe.retraining import Depth, RetrainSection, Width
from sparsebayes.recipe.schema import (
    BatchSize,
    CurvatureSection,
    DataSection,
    EvaluateSection,
    ExportSection,
    Folder,
    GroupRule,
    ModelSection,
    PriorSection,
    PruneSection,
    Recipe,
    Threads,
    TrainSection,
    _split_rules,
)
from sparsebayes.recipe.schema import json_schema as compress_schema

__all__ = ["AnyRecipe", "CompressSection", "RetrainSection", "SearchRecipe", "SearchSection", "json_schema"]

SPACE_NAMES = (
    "chain",
    "darts",
    "nas_bench_1shot1_s1",
    "nas_bench_1shot1_s2",
    "nas_bench_1shot1_s3",
    "nas_bench_201",
    "tree",
)
# Repeated because that table imports torch; tests/recipe/test_search_schema.py holds the two together.


def _space(value: Any) -> Any:
    """Accept the name of a shipped space, of user code, or a section; the latter are checked when the run begins."""
    if isinstance(value, str) and value not in SPACE_NAMES and not USER_CODE.fullmatch(value):
        choices = ", or your own as 'package.module:function' or as a section"
        raise ValueError(unknown("search space", value, SPACE_NAMES) + choices)
    if not isinstance(value, (str, dict)):
        raise ValueError(
            f"expected the name of a search space or a section that says one, got {show_value(value)}"
        )
    return value


SpaceValue: TypeAlias = Annotated[
    Union[str, dict[str, Any]],  # noqa: UP007 - pydantic evaluates this at run time, and Python 3.10 must manage
    PlainValidator(_space),
    WithJsonSchema({"anyOf": [{"type": "string", "examples": list(SPACE_NAMES)}, {"type": "object"}]}),
]


class SearchSection(Section):
    """The supernet, how its switches are learned, and what decides that an operation stays."""

    space: SpaceValue = Field(
        description="A search space, or your own as 'package.module:function' or as a section."
    )
    baseline: Literal["none", "darts", "magnitude", "random"] = Field(
        default="none",
        description="What chooses instead of the posterior: softmax over operations (DARTS), the size of "
        "the switches, or random cells trained for the multiply-accumulates that the posterior's search would take.",
    )
    width: Width = Field(default=16, description="Channels of a node in the supernet's first stage.")
    depth: Depth = Field(default=2, description="Cells in each of the supernet's stages.")
    initial: float = Field(default=1.0, gt=0, le=10, description="Value that every switch begins with.")
    num_images: int | None = Field(
        default=None, ge=1, le=10_000_000, description="Training images that the search uses; null: all."
    )
    batch_size: BatchSize | None = Field(
        default=None, ge=2, description="Images of a step; null: data.batch_size."
    )
    warmup_epochs: Epochs = Field(
        default=0, description="Passes that train the weights alone, switches fixed."
    )
    epochs: Annotated[int, Field(ge=1, le=100_000)] = Field(
        default=1, description="Passes of each cycle, which train weights and switches; an update follows."
    )
    cycles: int = Field(default=1, ge=1, le=1000, description="Cycles of training and updating.")
    removal: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the operations left on an edge that each cycle but the last switches off, the weakest "
        "first, one at least; 0: only what the evidence switches off. The best of an edge stays until the decision. "
        "baseline: darts and posterior: natural_gradient, a softmax over an edge, switch nothing off.",
    )
    lr: Rate = Field(
        default=0.05, description="Learning rate of the weights at the start; falls to 0 (cosine)."
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Momentum of weights and switches.")
    weight_decay: float = Field(default=3e-4, ge=0, le=10, description="Weight decay of the weights.")
    switch_lr: Rate = Field(
        default=0.05, description="Learning rate of the switches at the start; falls alike."
    )
    grad_clip: float | None = Field(
        default=5.0, gt=0, le=1e6, description="Largest norm of a gradient; null: any."
    )
    strength: float = Field(
        default=1.0, gt=0, le=1e12, description="Nats of evidence that an operation must be worth to stay."
    )
    paper_lambda: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="The paper's weight of the penalty beside a mean loss; replaces strength by this times the number "
        "of training images.",
    )
    rule: Literal["evidence", "entropy"] = Field(
        default="evidence",
        description="When an operation stays: evidence z^2 h > 1, or the paper's entropy rule.",
    )
    joint: bool = Field(
        default=False,
        description="Judge operations by the full curvature matrix of their switches, one removed after the other.",
    )
    rescale: bool = Field(
        default=False,
        description="Evidence of an operation lets the others of its node rescale together, as batch norms do.",
    )
    norm_images: int = Field(
        default=0,
        ge=0,
        le=10_000_000,
        description="Plain images that batch norm is estimated anew on before curvature is measured; 0: as trained.",
    )
    second_order: bool = Field(
        default=False,
        description="Judge an architecture by weights that have followed it for one step (DARTS, section 2.3), where "
        "it learns from images of its own: posterior: natural_gradient and baseline: darts. Each of its steps then "
        "takes four passes instead of one.",
    )
    one_op_per_edge: bool | None = Field(
        default=None, description="Keep only the best operation of an edge; null: as the space says."
    )
    top_k_edges: int | None = Field(
        default=None, ge=1, le=100, description="Incoming edges that a node keeps; null: as the space says."
    )
    candidates: int = Field(default=4, ge=1, le=10_000, description="Cells that baseline: random tries.")
    save_memory: bool = Field(
        default=False, description="Compute activations again in the backward pass instead of keeping them."
    )

    def strength_for(self, num_images: int) -> float:
        """The temperature T: `strength`, or what `paper_lambda` stands for with so many images.

        The paper minimises mean loss + lambda_w sum omega |w| (eq. 16), and its code divides the mean loss's curvature
        by lambda_w: the loss of the whole data set then counts 1/T-fold with T = lambda_w N.
        """
        return self.strength if self.paper_lambda is None else self.paper_lambda * num_images


class CompressSection(Section):
    """What is removed from the network that was found: the sections of a recipe of `task: compress`."""

    groups: Annotated[
        tuple[GroupRule, ...], BeforeValidator(list_rules), Field(strict=False, min_length=1)
    ] = Field(default=(GroupRule(rule="units"),), description="What may go: one rule, or several stacked.")
    prior: PriorSection = Field(default_factory=PriorSection, description="What is believed of the switches.")
    train: TrainSection = Field(default_factory=TrainSection, description="How the weights are learned.")
    prune: PruneSection = Field(default_factory=PruneSection, description="What goes.")


class SearchRecipe(Section):
    """A whole search: the space, the network made of what was found, and what is written."""

    version: Literal[1] = Field(description="Version of the recipe format.")
    name: str = Field(pattern=RUN_NAME, description="Name of the run; its folder's name begins with it.")
    task: Literal["search"] = Field(description="What the run does.")
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="Seed of every random choice.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where it runs; auto: cuda if there is one."
    )
    threads: Threads | None = Field(default=None, description="CPU threads; null: as many as torch takes.")
    out: Folder = Field(default="runs", description="Folder that run folders are made in.")
    data: DataSection = Field(default_factory=DataSection, description="The images.")
    search: SearchSection = Field(description="The search.")
    posterior: Literal["laplace", "variational_dropout", "natural_gradient"] = Field(
        default="laplace", description="How the switches are inferred."
    )
    variational_dropout: OperationDropoutSection = Field(
        default_factory=OperationDropoutSection, description="Options of the posterior of that name."
    )
    natural_gradient: LogitGaussianSection = Field(
        default_factory=LogitGaussianSection, description="Options of the posterior of that name."
    )
    sampling: ArchitectureSamplingSection = Field(
        default_factory=ArchitectureSamplingSection,
        description="Architectures that are compared when the supernet is trained.",
    )
    curvature: CurvatureSection = Field(
        default_factory=CurvatureSection, description="How curved the loss is in the switches."
    )
    retrain: RetrainSection = Field(
        default_factory=RetrainSection, description="The network of the cells that were found."
    )
    compress: CompressSection | None = Field(
        default=None, description="Compress that network as well; null: deliver it as it is."
    )
    table: Folder | None = Field(
        default=None,
        description="Table of true accuracies to look the cell up in, at the end: embedded (nas_bench_201), or a file.",
    )
    export: ExportSection = Field(default_factory=ExportSection, description="What is written.")
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection, description="What is measured.")
    presets: dict[str, dict[str, JsonValue]] = Field(
        default_factory=dict, max_length=32, description="Named changes of this recipe: --preset NAME."
    )

    @property
    def num_draws(self) -> int:
        """Architectures to choose among when the search ends: `sampling.count`, or what the posterior's paper does.

        Baselines darts and random have one decision only.
        """
        if self.search.baseline in ("darts", "random"):
            return 1
        if self.sampling.count is not None:
            return self.sampling.count
        return 50 if self.posterior == "variational_dropout" and self.search.baseline == "none" else 1

    @property
    def judge(self) -> Literal["heldout", "proxies"]:
        """What compares architectures: as `sampling.judge` says, or what the posterior's paper does."""
        if self.sampling.judge != "auto":
            return self.sampling.judge
        by_proxies = self.posterior == "natural_gradient" and self.search.baseline == "none"
        return "proxies" if by_proxies else "heldout"

    @property
    def is_bilevel(self) -> bool:
        """Whether switches learn from images that the weights do not see; for `random`, whether the posterior's do."""
        if self.search.baseline in ("none", "random"):
            return self.posterior == "natural_gradient"
        return self.search.baseline == "darts"

    @property
    def network_size(self) -> tuple[int, int]:
        """Width and depth of the network that is built of what was found."""
        return self.retrain.width or self.search.width, self.retrain.depth or self.search.depth

    def check(self) -> None:
        """Refuse what a run would refuse, as far as that can be said without images and a space.

        Raises:
            RecipeError: an option that would be ignored, or that contradicts another.
        """
        section, retrain = self.search, self.retrain
        if section.joint and section.rule != "evidence":
            raise RecipeError(
                f"search.joint judges operations by evidence, but search.rule is {section.rule}; leave out one of them"
            )
        if section.second_order and not self.is_bilevel:
            raise RecipeError(
                "search.second_order is for switches that learn from images of their own (posterior natural_gradient, "
                f"baseline darts), but this is {self._method}; set it to false"
            )
        if section.paper_lambda is not None and section.strength != 1.0:
            raise RecipeError(
                f"search.paper_lambda replaces search.strength, but both are set; leave out the strength "
                f"{section.strength:g}, or set search.paper_lambda to null"
            )
        if self.table is not None and section.space in SPACE_NAMES and section.space != "nas_bench_201":
            raise RecipeError(
                f"a table of true accuracies is for the space nas_bench_201, not {section.space!r}; set table: null"
            )
        if self.table is not None and section.one_op_per_edge is False:
            raise RecipeError(
                "a table of true accuracies has cells of one operation per edge, but search.one_op_per_edge is false; "
                "set it to null, or table: null"
            )
        if retrain.inherit and self.network_size != (section.width, section.depth):
            raise RecipeError(
                "retrain.inherit takes the supernet's weights, so retrain.width and retrain.depth must be those of the "
                "search; leave them out, or set retrain.inherit to false"
            )
        if retrain.inherit and section.baseline in ("darts", "random"):
            raise RecipeError(
                f"retrain.inherit takes switches, which baseline {section.baseline} does not learn; set it to false"
            )
        if retrain.inherit and section.baseline == "none" and self.posterior == "natural_gradient":
            raise RecipeError(
                "retrain.inherit takes switches, which posterior natural_gradient does not learn; set it to false"
            )
        self._check_posterior()

    @property
    def _method(self) -> str:
        """What learns the switches, in words."""
        baseline = self.search.baseline
        return f"posterior {self.posterior}" if baseline == "none" else f"baseline {baseline}"

    def _check_posterior(self) -> None:
        """Refuse proxies where none are computed, and precisions that no Gaussian has."""
        sampling, default = self.sampling, type(self.sampling)()
        asked = (sampling.proxies, sampling.proxy_images) != (default.proxies, default.proxy_images)
        if asked and self.judge == "heldout" and self.search.baseline in ("none", "magnitude"):
            raise RecipeError(
                "sampling.proxies and sampling.proxy_images say how proxies judge architectures, but held-out loss "
                f"judges those of {self._method}; leave them out, or set sampling.judge to proxies"
            )
        if self.judge == "heldout" and self._method == "posterior natural_gradient":
            raise RecipeError(
                "sampling.judge is heldout, but the supernet of posterior natural_gradient mixes the operations of an "
                "edge, so that no cell has weights of its own; set it to proxies"
            )
        gaussian = self.natural_gradient
        if gaussian.initial_precision < gaussian.prior_precision:
            raise RecipeError(
                f"natural_gradient.initial_precision is {gaussian.initial_precision}, below prior_precision "
                f"{gaussian.prior_precision}; data only add precision: lower one or raise the other"
            )

    def compression(self, builder: str, options: dict[str, Any]) -> Recipe:
        """The recipe that compresses the network that was found.

        Args:
            builder: name of the network's builder.
            options: what it is called with.

        Raises:
            ValueError: the recipe has no section `compress`.
        """
        if self.compress is None:
            raise ValueError("expected a section compress")
        return Recipe(
            version=self.version,
            name=self.name,
            seed=self.seed,
            device=self.device,
            threads=self.threads,
            data=self.data,
            model=ModelSection(name=builder, options=options),
            groups=_split_rules(self.compress.groups),
            prior=self.compress.prior,
            curvature=self.curvature,
            train=self.compress.train,
            prune=self.compress.prune,
            export=self.export,
            evaluate=self.evaluate,
        )


AnyRecipe: TypeAlias = Union[Recipe, SearchRecipe]  # noqa: UP007 - as above
"""A recipe of either task."""


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe of either task, for editors that complete and check YAML.

    Returns:
        The schema as plain data, ready for `json.dumps`: which of two definitions holds is decided by the key `task`.
    """
    compress, search = compress_schema(), SearchRecipe.model_json_schema(mode="validation")
    dialect = compress.pop("$schema")
    definitions = {**search.pop("$defs"), **compress.pop("$defs"), "Recipe": compress, "SearchRecipe": search}
    # `groups` may be written in as many ways there as in a compression; its field knows the list alone.
    definitions["CompressSection"]["properties"]["groups"] = compress["properties"]["groups"]
    return {
        "$schema": dialect,
        "title": "sparsebayes recipe",
        "if": {"properties": {"task": {"const": "search"}}, "required": ["task"]},
        "then": {"$ref": "#/$defs/SearchRecipe"},
        "else": {"$ref": "#/$defs/Recipe"},
        "$defs": definitions,
    }
