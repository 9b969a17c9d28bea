"""The recipe: everything that decides what a run produces, and the few settings that only decide how it runs.

A recipe is a YAML file with the sections below; unknown keys are refused with the nearest known one. It is saved with
the run, defaults filled in, so that the run can be repeated (`dtr.recipe.reading`). No torch in here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from dtr.recipe.yaml_values import dump_yaml

NAMES = ("source", "path", "subset", "mix")
"""Settings that may name files: a longer name than a file can have is told here, not by whoever looks for it first."""
MAX_NAME_BYTES = 255
"""Between two slashes, as on most file systems."""
MAY_BE_EMPTY = ("prompt",)
"""Text settings that mean something when they are empty; as a name, "" would stand for the current folder."""


class Section(BaseModel):
    """A frozen group of settings that refuses what it does not know, and values of another type than it names."""

    # Strict: true is no number and "2024" none either. Whole numbers stand for floats all the same.
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _named(cls, value: Any, info: ValidationInfo) -> Any:
        inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
        if info.field_name not in MAY_BE_EMPTY and any(isinstance(one, str) and not one for one in inner):
            raise ValueError("text that is not empty")
        if info.field_name in NAMES and any(_is_too_long(one) for one in inner if isinstance(one, str)):
            raise ValueError(f"a name, at most {MAX_NAME_BYTES} bytes between slashes")
        return value


def _is_too_long(name: str) -> bool:
    return len(name) > 4000 or any(len(part.encode()) > MAX_NAME_BYTES for part in name.split("/"))


def _each_once(layers: list[int] | None) -> list[int] | None:
    """Layer numbers, none of them twice."""
    if layers is not None and (len(set(layers)) < len(layers) or min(layers) < 0):
        raise ValueError("numbers of layers from 0, each once")
    return layers


def _form(value: Any) -> str:
    """Which of two forms of a setting is meant, so that a wrong value gets one message and not one for each form."""
    return "several" if isinstance(value, list) else "one"


class TeacherSection(Section):
    source: str
    """Hub name, local folder, GGUF file, or `smollm2-demo` (downloaded once, checked, cached)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights in memory; auto is bfloat16 on a GPU and on CPUs that multiply it in hardware, else float32."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Never needed for the supported families."""


class WritingSection(Section):
    """How the teacher writes text itself, where `teacher` is among the sources of text."""

    num_tokens: int = Field(default=1_000_000, ge=1, le=10**12)
    """Tokens to write, once per teacher and settings: they are kept in the cache."""
    temperature: float = Field(default=1.0, ge=0.01, le=100)
    """Divides the logits."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Draw from the likeliest tokens that have this probability together; 1 draws from all."""
    batch_size: int = Field(default=64, ge=1, le=2**16)
    """Texts written at a time, each of distill.seq_len_tokens tokens."""


class TextSection(Section):
    source: Annotated[Annotated[str, Tag("one")] | Annotated[list[str], Tag("several")], Discriminator(_form)] = (
        "python-docs"
    )
    """Text files (.txt, .md, .jsonl, .parquet, .xz and .gz of them), folders, or `python-docs`: the documentation
    and docstrings that come with every Python. `teacher` is text that the teacher writes itself, `task` the prompts and
    answers of the task's train split. With streaming also `hf:NAME`, `hf:NAME:CONFIG:SPLIT`: a dataset of the Hugging
    Face hub."""
    mix: dict[str, Annotated[float, Field(gt=0, lt=1)]] = Field(default_factory=dict)
    """Further sources, each with its share of the training tokens, as {task: 0.3}; `source` gives the rest, and all
    that is measured on."""
    streaming: bool = False
    """Read, shuffle and tokenize while training goes on, for text that does not fit into memory."""
    whole_starts: bool = False
    """Begin every training block with a document, as prompts do, and drop what of its last document does not fit: it
    costs text where documents are longer than distill.seq_len_tokens."""
    num_held_out_tokens: int = Field(default=16_384, ge=512, le=10**9)
    """Tokens set aside to measure the error of each layer; never trained on."""
    writing: WritingSection = WritingSection()
    """How the source `teacher` is written."""

    @field_validator("mix")
    @classmethod
    def _leaves_a_rest(cls, mix: dict[str, float]) -> dict[str, float]:
        if sum(mix.values()) >= 1:
            raise ValueError("shares that leave some for text.source, so less than 1 together")
        return mix


class MixerEntry(Section):
    """One of several kinds in a bank."""

    kind: str
    options: dict[str, Any] = Field(default_factory=dict)
    layers: list[int] | None = Field(default=None, min_length=1)
    """Layers that get one; all of distill.layers when left out."""

    _layers_once = field_validator("layers")(_each_once)


class MixerSection(Section):
    kind: Annotated[
        Annotated[str, Tag("one")] | Annotated[list[MixerEntry], Field(min_length=1), Tag("several")],
        Discriminator(_form),
    ] = "gated_deltanet"
    """A mixer by name: gated_deltanet, jet_block, gated_linear_attention, kimi_delta_attention, retention (fixed
    decay), hedgehog (learned features, a state twice as large); for export mamba2 and qwen35_gated_deltanet;
    sliding_window, which is attention on a window and the first tokens. Or a list of them, `[gated_deltanet,
    {kind: sliding_window, options: {window: 64}}]`: every layer gets one mixer of each, or only
    the `layers` that an entry names, and search chooses layer by layer."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of that mixer; in a list each has its own."""

    @field_validator("kind", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return [{"kind": one} if isinstance(one, str) else one for one in value] if isinstance(value, list) else value

    @property
    def names(self) -> list[str]:
        """The kinds, in order."""
        return [self.kind] if isinstance(self.kind, str) else [one.kind for one in self.kind]

    @model_validator(mode="after")
    def _own_options(self) -> MixerSection:
        if isinstance(self.kind, list) and self.options:
            raise ValueError("no mixer.options beside a list of kinds: give each its own, {kind: ..., options: {...}}")
        return self


class DistillSection(Section):
    num_tokens: int = Field(default=10_000_000, ge=1, le=10**13)
    """Token budget; every token trains every layer. The text is repeated in a new order when it is shorter."""
    seq_len_tokens: int = Field(default=512, ge=8, le=2**20)
    """Length of a training sequence."""
    batch_size: int = Field(default=8, ge=1, le=2**16)
    """Sequences per optimizer step."""
    segment_tokens: int | None = Field(default=None, ge=8, le=2**20)
    """Mixers learn on segments of so many tokens, each from an empty state, of sequences that the teacher reads whole;
    it divides seq_len_tokens. Left out, they learn on whole sequences."""
    short_fraction: float = Field(default=0.5, ge=0, le=1)
    """With segments: share of the steps in which the teacher too reads each segment alone, as a short text."""
    learning_rate: float = Field(default=6e-3, gt=0, le=100)
    """Peak rate of AdamW; linear warm-up, then cosine decay."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps spent on warm-up."""
    final_lr_fraction: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end, as a share of the peak."""
    weight_decay: float = Field(default=0.0, ge=0, le=100)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e12)
    """Gradient norm limit of each layer on its own."""
    refit_tokens: int = Field(default=0, ge=0, le=10**12)
    """Tokens on which the output projections are solved for in closed form after training; 0 leaves it out."""
    layers: list[int] | None = Field(default=None, min_length=1)
    """Layers to distil; all when left out."""
    checkpoint_every_steps: int | None = Field(default=None, ge=1, le=10**12)
    """An interrupted run loses at most this many steps; about a minute of work when left out."""

    _layers_once = field_validator("layers")(_each_once)


class TaskSection(Section):
    source: str = "recall"
    """`recall`, `needle` or `variables` (built in), a folder with validation.jsonl and test.jsonl (also .parquet, .csv,
    .arrow), a folder from `save_to_disk`, `datasets:NAME` of the hub, `lm_eval:NAME` of lm-evaluation-harness, or
    `perplexity` with `path`."""
    kind: Literal[
        "auto", "multiple_choice", "classification", "generation", "perplexity", "recall", "needle", "variables"
    ] = "auto"
    """What an item asks for; auto decides by the fields of the first row."""
    path: str | None = None
    """Data of a task whose source is a kind: a folder or a file; for lm_eval a folder with YAML files of your own."""
    subset: str | None = None
    """Configuration of a hub data set, as ARC-Easy of `datasets:allenai/ai2_arc`."""
    fields: dict[
        str, Annotated[Annotated[str, Tag("one")] | Annotated[list[str], Tag("several")], Discriminator(_form)]
    ] = Field(default_factory=dict)
    """The task's fields by those of the data set: a field (`choices.text`), a template (`{premise} so`) or a list."""
    metric: str = "auto"
    """auto, acc, acc_norm, exact_match, f1, rouge_l, pass_at_1, perplexity, or a function as `mypackage.scores:f`; must
    fit the kind."""
    prompt: str | None = None
    """Template of the context, with the row's fields in braces, as 'Question: {question}\\nAnswer:'."""
    target: str | None = None
    """Template of what follows the prompt, as ' {choice}'."""
    chat_template: bool = False
    """Wrap the prompt as a user turn in the tokenizer's chat template."""
    validation: str = "validation"
    """Split, or rows of a split as `test[0:250]`, that search may look at."""
    test: str = "test"
    """Split, or rows of a split, that is scored once at the end."""
    num_validation: int | None = Field(default=None, ge=1, le=10**6)
    """Use this many validation items (a seeded draw); all when left out."""
    num_test: int | None = Field(default=None, ge=1, le=10**6)
    """Use this many test items (a seeded draw); all when left out."""
    cut_validation: float | None = Field(default=None, gt=0, lt=1)
    """Permission to draw this share of the only split for validation, where the validation or test split is missing."""
    group: str | None = Field(default=None, min_length=1)
    """A field whose value items of one passage share: they err together, so search draws and tests them as one. Windows
    of one document are a group by themselves."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the task kind."""


class GuardSection(Section):
    """A task that must keep a floor while the search looks at another."""

    task: TaskSection
    """As the recipe's own `task`; only its validation split is used."""
    p_min: float = Field(default=0.9, gt=0, le=1e9)
    """The floor: how much of the teacher's score on that task must be kept."""
    p_min_kind: Literal["relative", "absolute"] = "relative"
    """relative: a share of the teacher's score; absolute: a value of that task's metric."""


GONE_STRATEGIES = ("lazy", "restore")


class SearchSection(Section):
    strategy: Literal["auto", "exact", "uniform", "random", "lowest_mse", "one_shot", "kl", "impact"] = "auto"
    """How to find the layers. auto: ranks them by a continuous signal and cuts by the metric; exact: Algorithm 1, every
    layer at every step, ten times the work; the others are baselines that follow a fixed order."""
    p_min: float = Field(default=0.95, gt=0, le=1e9)
    """How much of the score must be kept."""
    p_min_kind: Literal["relative", "absolute"] = "relative"
    """relative: a share of the teacher's score; absolute: a value of the metric itself."""
    p_min_confidence: float | None = Field(default=0.95, gt=0.5, lt=1)
    """Commit only what validation items that selection never saw certify at this confidence. null: the plain comparison
    with p_min on all items, whose hybrid is truly below p_min about every second time."""
    confirmation_share: float = Field(default=0.8, gt=0, lt=1)
    """Share of the validation items kept for that certificate; nothing is kept without p_min_confidence."""
    guards: list[GuardSection] = Field(default_factory=list)
    """Other tasks with a floor; a swap that breaks one is refused."""
    hold_each: str | None = Field(default=None, min_length=1)
    """A field of the rows, as length_tokens of needle: the limit must hold over the items of each of its values."""
    max_linear_layers: int | None = Field(default=None, ge=1, le=10**6)
    """Stop once so many layers are linear."""
    max_cache_bytes: int | None = Field(default=None, ge=1, le=10**15)
    """Stop once the cache of one sequence of cache_context_tokens tokens fits into this."""
    cache_context_tokens: int = Field(default=2048, ge=1, le=10**9)
    """Context length for max_cache_bytes."""
    max_seconds: float | None = Field(default=None, gt=0, le=10**9)
    """Stop the search after this time; where it strikes depends on the machine."""
    run_to_end: bool = False
    """Go on below p_min until every layer is linear, to draw the whole curve; M_opt is not affected."""
    test_curve: bool = False
    """After the search, score every step of its path on test as well, for the report's curve."""

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_gone(cls, values: Any) -> Any:
        """Recipes of older versions: what changes nothing is passed over, what would is refused with what to write."""
        if not isinstance(values, dict):
            return values
        if values.get("strategy") in GONE_STRATEGIES:
            raise ValueError(f"no '{values['strategy']}' any more, which auto surpassed: write strategy: auto")
        if values.get("safety"):
            raise ValueError("no safety any more, which did not keep its word: write p_min_confidence: 0.95")
        return {key: value for key, value in values.items() if key != "safety"}


class RealignSection(Section):
    """An optional stage after search, not part of the paper's method and reported apart: the swapped layers are
    distilled once more, on the hidden states of the hybrid that they make together."""

    num_tokens: int = Field(default=0, ge=0, le=10**13)
    """Token budget; 0 leaves the stage out."""
    learning_rate: float = Field(default=5e-4, gt=0, le=100)
    """Peak rate; the rest is as in distill."""


class RuntimeSection(Section):
    """How to run; nothing in here is part of what a run is."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    backend: Literal["auto", "torch", "triton", "fla", "amx"] = "auto"
    """Kernels of the mixers; auto takes what is present and right on this machine."""
    eval_batch_tokens: int = Field(default=16_384, ge=1, le=2**26)
    """Padded tokens per evaluation batch."""
    cache_bytes: int = Field(default=4_000_000_000, ge=0, le=10**15)
    """Memory for hidden states that search reuses; 0 turns reuse off."""
    parallel: Literal["data", "layers"] = "data"
    """What several processes started by torchrun share out while distilling: sequences of a batch, or layers."""
    shard_teacher: bool = False
    """Spread the teacher's weights over the processes that torchrun started (FSDP2), for one larger than a GPU; for
    `dtr distill`."""
    num_threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads; torch's own default when left out."""


class Recipe(Section):
    """A whole run. `teacher` is the only section without a default."""

    teacher: TeacherSection
    text: TextSection = TextSection()
    mixer: MixerSection = MixerSection()
    distill: DistillSection = DistillSection()
    task: TaskSection = TaskSection()
    search: SearchSection = SearchSection()
    realign: RealignSection = RealignSection()
    runtime: RuntimeSection = RuntimeSection()
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides the order of the text, the draw of items and every tie that likelihood leaves."""
    _path: str | None = PrivateAttr(default=None)

    @property
    def path(self) -> str | None:
        """The file that it was read from, which no run may delete; no part of what a recipe says."""
        return self._path

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    def to_yaml(self) -> str:
        return dump_yaml(self.model_dump())

    def identity(self) -> dict[str, Any]:
        """The recipe without `runtime`: two runs with equal identity make the same thing."""
        return self.model_dump(exclude={"runtime"})
