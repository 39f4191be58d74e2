"""The two ends of a model, the model, and an architecture."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from llmexport.export.spec.axis import BATCH, PAST, SEQUENCE
from llmexport.export.spec.block import INPUT_IDS, POSITION_IDS, STEP_MASK, TOKEN_TYPE_IDS, Block, Dim, Port, hidden
from llmexport.export.spec.context import (
    DynamicScaling,
    Keys,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    YarnScaling,
)
from llmexport.export.spec.feed_forward import Activation
from llmexport.export.spec.graph import Graph, Step
from llmexport.export.spec.layer import Sublayer
from llmexport.export.spec.mixer import Norm
from llmexport.export.spec.proportional import ProportionalScaling
from llmexport.export.spec.splice import Splice
from llmexport.export.spec.storage import Storage

if TYPE_CHECKING:
    from llmexport.export.config import Config


@dataclass(frozen=True)
class Embedding(Block):
    """Token embedding, times `scale` rounded to the model's dtype (modeling_gemma.py).

    It adds one for each of `types` of tokens and one for each of `positions`, then norms the sum (modeling_bert.py).
    0 and None: there are none. Positions count from 0 whatever is padding; or, with an `offset`, they are position_ids
    and the rows of the table begin that much earlier (modeling_opt.py). A table of words with `inner` numbers a row,
    if that is not 0, has a matrix without bias that makes hidden states of them (project_in there). `masked`: those of
    padding are zero (modeling_deberta.py). `axes` are those of rows and of tokens.
    """

    vocabulary: int
    hidden: int
    scale: float = 1.0
    types: int = 0
    positions: int = 0
    norm: Norm | None = None
    offset: int | None = None
    inner: int = 0
    masked: bool = False
    axes: tuple[Dim, Dim] = (BATCH, SEQUENCE)

    @property
    def inputs(self) -> tuple[Port, ...]:
        types, positions = (TOKEN_TYPE_IDS,) * bool(self.types), (POSITION_IDS,) * bool(self.placed)
        ports = (INPUT_IDS, *types, *positions, *(STEP_MASK,) * self.masked)
        return tuple(dataclasses.replace(p, shape=self.axes) for p in ports)

    @property
    def placed(self) -> int:
        """How many position_ids there are; 0 where it reads none."""
        return self.positions - self.offset if self.positions and self.offset is not None else 0

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (hidden("hidden", self.hidden, self.axes),)

    @property
    def parts(self) -> Mapping[str, tuple[Block, str]]:
        return {"norm": (self.norm, "norm.")} if self.norm else {}

    @property
    def most(self) -> Mapping[str, int]:
        if self.placed:
            return {SEQUENCE: self.placed, PAST: self.placed - 1}
        return {SEQUENCE: self.positions} if self.positions else {}


@dataclass(frozen=True)
class Head(Block):
    """Final norm and the projection to the vocabulary, times `scale` (modeling_cohere.py).

    `softcap` > 0 bounds the logits (modeling_gemma2.py). A head for masked tokens has a dense layer with this
    activation, `transform`, before the norm, and a `bias` of the projection (modeling_bert.py). `normed`: each row of
    the projection is divided by its L2 norm (NormHead, Baichuan 2's modeling_baichuan.py). `last`: it gives the logits
    of the last token of each row alone. Without a norm it reads hidden states of the size `hidden`. If `inner` is not
    0, a matrix without bias makes so many numbers of them for the projection (modeling_opt.py, project_out).
    """

    norm: Norm | None
    vocabulary: int
    softcap: float = 0.0
    scale: float = 1.0
    transform: Activation | None = None
    bias: bool = False
    last: bool = False
    normed: bool = False
    hidden: int = 0
    inner: int = 0

    @property
    def size(self) -> int:
        """How many numbers hidden states have."""
        return self.norm.size if self.norm else self.hidden

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (hidden("hidden", self.size),)

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (Port("logits", (BATCH, 1 if self.last else SEQUENCE, self.vocabulary), use="logits"),)

    @property
    def parts(self) -> Mapping[str, tuple[Block, str]]:
        return {"norm": (self.norm, "norm.")} if self.norm else {}


@dataclass(frozen=True)
class Model:
    """Graphs, in the order they run; one reads an earlier one's outputs by their names.

    `ties` maps the path of a parameter to that of the one whose weights it shares.
    """

    graphs: tuple[Graph, ...]
    ties: Mapping[str, str]

    def __post_init__(self) -> None:
        for what in ([g.name for g in self.graphs], [p.name for g in self.graphs for p in g.assembly.outputs]):
            if twice := sorted(n for n, times in Counter(what).items() if times > 1):
                raise ValueError(f"two graphs of a model are called, or give, {', '.join(twice)}")

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps of all graphs."""
        return tuple(s for g in self.graphs for s in g.assembly.steps)


@dataclass(frozen=True)
class Tower:
    """What of a multimodal checkpoint sees: a graph of pictures to features.

    `build` makes the graph, and what puts features into the text, of the config at `config_key`, of the keys beside it
    and of the width of the text model. `names` are as an Arch's, of paths that start with `vision.`; `other_names` maps
    the starts of such names to those of other releases. `tiny` are the keys beside the text model's config in the
    built-in one. `words` are special words of its tokenizer and their ids, `beside` what else lies there, by file:
    text, or a JSON object.
    """

    build: Callable[[Config, Config, int], tuple[Graph, Splice]]
    names: Mapping[str, str]
    tiny: Mapping[str, Any]
    words: Mapping[str, int]
    beside: Mapping[str, Any]
    config_key: str = "vision_config"
    other_names: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True)
class Multimodal:
    """A published checkpoint that holds the text model beside other parts, as multimodal ones do.

    `config_key` is where its config.json has the text model's config; `harmless` are keys beside it that do not
    concern the text model. `flat`: there may be no such place, and the text model's keys stand beside the harmless
    ones. `text_types` are what the text model's config says it is, where that is none of the architecture's own types;
    `defaults` are what it means where it says nothing, if the architecture takes that otherwise. `sections`: its RoPE
    has those of mRoPE, which say nothing as long as the three positions of a token are one; `absent` are keys of the
    architecture that its text model does not know. `names` maps the starts of
    the text model's names to those of this checkpoint's, and `other_names` to those of other releases.
    `left_out` are patterns of the tensors that the text model leaves, and `tower` is what is made of them, if anything
    is; `ignore` are those that nobody needs.
    """

    model_type: str
    architecture: str
    names: Mapping[str, str]
    harmless: tuple[str, ...]
    left_out: tuple[str, ...]
    ignore: tuple[str, ...] = ()
    config_key: str = "text_config"
    tower: Tower | None = None
    flat: bool = False
    sections: bool = False
    absent: tuple[str, ...] = ()
    text_types: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    other_names: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True)
class Reference:
    """The class of transformers that says what is right; `outputs` maps our ports to the attributes of its output.

    Unless it is `cached`, it keeps nothing of a step for the next one, as our graph does: a row is run whole each time.
    `recast`: it makes some parameters in float32 whatever type is asked for, and runs once they are cast.
    `attention` is which of its implementations does.
    `state` is what a class that keeps no cache calls what it carries, in its call and in its output: it knows nothing
    of padding, and is right for one row alone.
    Where transformers has no class of the checkpoint's layout, or a wrong one, `made_by` is the module of
    `validate/references/` that makes a model of its tensors; `model_class` is then what configs call it, and `aliases`
    what others call it. `copies` are classes that others published by names of their own, all else being the same.
    `joined`: it has the `stacks` of its Arch in one tensor each only, transposed.
    """

    model_class: str
    outputs: Mapping[str, str]
    cached: bool = True
    recast: bool = False
    attention: str = "eager"
    state: str = ""
    made_by: str = ""
    aliases: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    joined: bool = False


def causal_lm(model_class: str, attention: str = "eager", **others: Any) -> Reference:
    """The reference of a model whose logits are those of the next token."""
    return Reference(model_class, MappingProxyType({"logits": "logits"}), attention=attention, **others)


@dataclass(frozen=True)
class Arch:
    """One architecture: how its `config.json` reads, and what its checkpoint calls things.

    `names` maps the start of a parameter's path in our model (`embedding.`, `layers.{i}.`, `head.norm.`) to the
    start of its name in the checkpoint; the longest start that fits is taken. `stacks` maps the checkpoint's name of
    a stacked parameter to the names, with {e}, of the matrices of each expert that a checkpoint may have in its
    place; `in_parts`: published ones have. `apart` is the key by which a config says so, where the matrices of a stack
    are the transposes of those. `older` maps how a name ends to how it ends in the files of old releases.
    `ignore` are patterns (fnmatch) of tensors that a checkpoint may hold and the model does not need. `ahead` are names
    of a module that guesses the token after the next and follows the layers, of which there are {layers}: it is known
    by the first, and the model needs neither them nor the module's own layer, which has the tensors of the last one.
    `tiny` is the built-in config. `multimodal` are the kinds of checkpoint that the model is published in beside its
    own. A base model's checkpoint, which has no head, leaves `base` out where a name starts with it.
    `overflows_float16` says, where published checkpoints are known to overflow float16, which do and how it shows.
    `told_by` is a key that its configs have, and those of another architecture of the same model type have not.
    `rope_keys` are what its configs call RoPE's keys beside `rope_parameters`, where that is not what others call them.
    `adds` says in a few words what its blocks have that Llama's have not, and `system` what the documents that this
    project began with call it, if they name it.
    """

    model_types: tuple[str, ...]
    reference: Reference
    build: Callable[[Config], Model]
    names: Mapping[str, str]
    tiny: Mapping[str, Any]
    ignore: tuple[str, ...] = ()
    ahead: tuple[str, ...] = ()
    stacks: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    in_parts: bool = False
    apart: str = ""
    older: Mapping[str, str] = dataclasses.field(default_factory=dict)
    multimodal: tuple[Multimodal, ...] = ()
    base: str = "model."
    overflows_float16: str = ""
    told_by: str = ""
    rope_keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    adds: str = ""
    system: str = ""
    name: str = ""  # of its data file


def to_data(value: Any) -> Any:
    """A spec as JSON data, for the manifest and for cache keys."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: to_data(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"is": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {k: to_data(v) for k, v in value.items()}
    return [to_data(v) for v in value] if isinstance(value, tuple) else value


def from_data(data: Any) -> Any:
    """The spec that `to_data` wrote. Raises KeyError on a class that this version does not know."""
    if isinstance(data, dict):
        values = {k: from_data(v) for k, v in data.items() if k != "is"}
        return _class(data["is"])(**values) if "is" in data else values
    return tuple(from_data(v) for v in data) if isinstance(data, list) else data


def _class(name: str) -> Any:
    # Asked of the base classes when it is called: a module with further ones may be imported later.
    scalings = (DynamicScaling, Llama3Scaling, LinearScaling, LongScaling, ProportionalScaling, YarnScaling)
    others = (Keys, Port, Reference, Sublayer)
    return {c.__name__: c for c in (*Block.kinds.values(), *Storage.__subclasses__(), *scalings, *others)}[name]
