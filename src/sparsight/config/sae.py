"""Sparse autoencoders and ReSAE chains."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from sparsight.common import sites
from sparsight.common.digests import FREE
from sparsight.common.errors import SparsightError
from sparsight.common.tokens import Tokens
from sparsight.config.bounds import Bounds, Count, CountOrZero, NotNegative, Positive, PositiveShare
from sparsight.config.checks import Section, only_if
from sparsight.config.foreign import FORMATS, Name

SHARDS = 8
"""Logical shards of an SAE over several processes. They are fixed, so that results do not depend on the processes."""

SPLIT_KINDS = ("topk", "batchtopk", "matryoshka", "switch")
"""Kinds of SAEs that can be split over processes: those that select latents."""

Frozen = Literal["none", "decoder", "soft-decoder", "encoder"]
"""What of an SAE stays as it was drawn, see ``Sae.frozen``."""
Control = Literal["frozen-decoder", "soft-frozen", "frozen-encoder", "random-weights"]
"""A control of a section, see ``Sae.controls``."""
Metrics = Literal["all", "reconstruction"]
"""How much of an SAE is measured, see ``Sae.metrics``."""

OF_WEIGHTS = ("backbone", "site", "tokens", "seeds", "weights", "format", "normalized", "judge", "metrics")
"""The settings that a section with ``weights`` can have."""
_HUB = "hf:"


@dataclass(frozen=True)
class Evaluation(Section):
    """How an SAE is evaluated, a part of its section."""

    metrics: Metrics = "all"
    """See ``Sae.metrics``."""


@dataclass(frozen=True)
class Sae(Section):
    """A sparse autoencoder and its training, once per seed."""

    backbone: str
    """Name of the backbone whose activations the SAE is trained on."""
    site: str | None = None
    """One of activations.sites, for a single SAE. Give either this or ``sites``."""
    sites: tuple[str, ...] = ()
    """Two or more of activations.sites, in the order of the model: a ReSAE chain, one SAE per site (docs/sae.md)."""
    tokens: Tokens | None = None
    """Tokens of the site that the SAE is trained and evaluated on: ``cls``, ``registers``, ``patches`` or ``mean`` of
    a site that stores ``all``, ``mean`` of one that stores ``patches``. null takes what the site stores."""
    affine: Literal["full", "diagonal", "identity", "zero"] = "full"
    """Only for ``sites``: the affine map that predicts a site from the previous one; the SAE learns the residual.
    Controls: a ``diagonal`` matrix, the ``identity`` (only the mean shifts), or ``zero`` (no map: plain SAEs)."""
    ridge: NotNegative = 1e-3
    """Only for a ``full`` or ``diagonal`` map: ridge penalty in its fit, relative to the mean eigenvalue of
    the earlier site's covariance."""
    loss: Literal["local", "e2e", "e2e-downstream"] = "local"
    """What training minimises besides the variant's own terms: the ``local`` reconstruction error; end to end (``e2e``)
    the KL divergence of the model's output with the reconstruction in place of the activation; or this and the error of
    the activations in later blocks (``e2e-downstream``). The last two take an SAE of one ``site``, blocks.<i>.input or
    .output, that stores tokens ``all``, and a backbone with a classifier or prompts (docs/sae.md)."""
    kind: str = "topk"
    """Name of the variant: a file in src/sparsight/sae/variants."""
    d_sae: Count = 768
    """Number of latents."""
    k: Count = 16
    """Active latents per activation."""
    seeds: tuple[CountOrZero, ...] = (0, 1, 2)
    """One SAE is trained per seed, named <name>-s<seed>."""
    epochs: Count = 50
    """Passes over the stored train split."""
    train_images: Count | None = None
    """Train on so many images of the stored train split: the first, which are in random order, so that smaller numbers
    are part of larger ones. null takes all. Means, scales and affine maps are always those of all."""
    batch_size: Count = 256
    """Activations per step. With a ``loss`` other than ``local`` they are of whole images, so this is rounded down to a
    multiple of the tokens that the SAE reads of an image."""
    memory_mb: Count = 1024
    """Memory for activations during training, in MB. A store that fits is shuffled as a whole in every epoch. A larger
    store is shuffled in pools of half this size."""
    lr: Positive | None = None
    """Peak learning rate of Adam on activations scaled to unit variance, with linear decay over the last fifth of
    training. null uses 2e-4 / sqrt(d_sae / 2^14)."""
    aux_k: CountOrZero = 64
    """Not for relu, gated and jumprelu: number of dead latents that the AuxK loss revives at a time; 0 turns it off."""
    aux_coefficient: NotNegative = 1 / 32
    """Weight of the AuxK loss, if there is one."""
    dead_after: Count = 20_000
    """In training, a latent counts as dead after this many activations on which it does not fire."""
    bf16: bool = False
    """Run the matrix products of training's forward pass in bfloat16; weights stay fp32."""
    prototype_weight: NotNegative = 0.0
    """PASS: weight of the squared distance between codes and the mean code of their class (arXiv 2506.01247: 0.8).
    Values above 0 use the labels of the train split."""
    mutual: NotNegative = 0.0
    """Weight of the penalty that makes the decoders of the section's seeds alike while they train together (MFR, arXiv
    2411.01220). Values above 0 take two or more seeds in one process."""
    experts: Count | None = None
    """Only for kind ``switch``: number of experts. With the d_sae of a TopK SAE it is width-matched, with ``experts``
    times that d_sae compute-matched."""
    routing: Literal["learned", "random", "hash"] = "learned"
    """Only for kind ``switch``: what chooses the expert of an activation. Controls of the ``learned`` router: a
    ``hash`` of the activation, or in training a ``random`` expert at every step (docs/sae.md)."""
    candidates: Annotated[int, Bounds(1, 512)] = 256
    """Only for kind ``archetypal``: number of centroids of training activations that decoder rows are mixtures of."""
    delta: NotNegative = 1.0
    """Only for kind ``archetypal``: largest distance of a decoder row from the convex hull of the candidates, before
    the SAE's one scale, in standard deviations of a dimension. 0 keeps all rows in the hull."""
    prefixes: tuple[PositiveShare, ...] | None = None
    """Only for kind ``matryoshka``: shares of d_sae that must each reconstruct alone, rising to 1."""

    frozen: Frozen = "none"
    """What is not trained: the ``decoder`` keeps its random rows, the ``encoder`` its random columns; with
    ``soft-decoder`` every decoder row keeps a cosine of at least 0.8 to its random direction (docs/sae.md). Not for
    kind archetypal."""
    controls: tuple[Control, ...] = field(default=(), metadata=FREE)
    """Controls beside the section (docs/evaluation.md). Each is another section, named <name>-<control>, with the same
    settings but one: ``frozen`` is decoder (``frozen-decoder``), soft-decoder (``soft-frozen``) or encoder
    (``frozen-encoder``), or the backbone has random weights (``random-weights``)."""
    control_of: str | None = None
    """The section that this one is a control of; set by ``controls`` alone."""
    judge: str | None = field(default=None, metadata=FREE)
    """Name of another backbone: monosemanticity is also computed with its stored ``embedding`` of the same images.
    Controls inherit it."""
    metrics: Metrics = field(default="all", metadata=FREE)
    """What the evaluation measures: ``all``, or for sweeps over millions of activations the ``reconstruction`` alone:
    errors, active and dead latents, beside PCA; of a chain also its effect in the model (docs/evaluation.md)."""
    weights: str | None = None
    """The SAE is not trained here, but of another tool: the path of its weights, or hf:<owner>/<repository>/<file> on
    the Hugging Face Hub. Settings of training do not apply, and there is one seed (docs/sae.md)."""
    format: Name | None = None
    """Only for ``weights``: the tool that wrote them. The settings that it keeps beside them are read, too."""
    normalized: bool = False
    """Only for ``weights``: the tool trained on (x - mean) / s, and the file does not hold these numbers, as with saev
    0.1.0 and visaebench. They are taken from the train split, s as the tool takes it, and folded into the weights."""

    processes: Count = 1
    """Number of processes that train the section, each on ``compute.threads`` CPU threads, or a GPU of its own. They
    deal out its SAEs (seeds times sites) if these are at least as many, which changes no SAE. Otherwise every SAE is
    split over its latents, which takes 2, 4 or 8 processes; weights then differ from those of one process by rounding
    (docs/sae.md)."""

    @property
    def split(self) -> bool:
        """Whether every SAE is split over all processes, because there are fewer SAEs than processes."""
        return len(self.seeds) * len(self.places) < self.processes

    @property
    def places(self) -> tuple[str, ...]:
        """The SAE's site, or the sites of the chain."""
        return self.sites if self.site is None else (self.site,)

    @property
    def evaluation(self) -> Evaluation:
        """The settings of its evaluation."""
        return Evaluation(self.metrics)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The variants of which its SAEs can be: of weights of other tools, all that the format has."""
        return (self.kind,) if self.format is None else FORMATS[self.format].kinds

    @property
    def in_hub(self) -> tuple[str, str] | None:
        """Repository and file of ``weights`` in the Hugging Face Hub, if they are there."""
        if self.weights is None or not self.weights.startswith(_HUB):
            return None
        owner, _, rest = self.weights.removeprefix(_HUB).partition("/")
        name, _, file = rest.partition("/")
        return f"{owner}/{name}", file

    @property
    def files(self) -> list[str]:
        """The local files of ``weights``: these, and the tool's settings beside them."""
        if self.weights is None or self.format is None or self.in_hub:
            return []
        beside = (Path(self.weights).with_name(name) for name in FORMATS[self.format].beside)
        return [self.weights, *(str(path) for path in beside if path.is_file())]

    @classmethod
    def recorded(cls, training: Mapping[str, Any]) -> "Sae":
        """The section of an SAE, from ``training`` in its config.json. With ``weights`` it has their kind and sizes."""
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in training.items()
        }
        found = {key: values.pop(key) for key in ("kind", "d_sae", "k")} if values.get("weights") else {}
        section = cls(**values)
        for key, value in found.items():
            object.__setattr__(section, key, value)
        return section

    def options(self) -> dict[str, Any]:
        """Arguments of ``sae.create`` other than kind, sizes and seed."""
        own = {"switch": ["routing"], "archetypal": ["candidates", "delta"]}.get(self.kind, [])
        names = ("aux_k", "aux_coefficient", "experts", "prefixes", *own)
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_weights()
        if (self.site is None) == (not self.sites):
            raise SparsightError("site: give either site (one SAE) or sites (a ReSAE chain)")
        _check_chain(self.sites)
        only_if(self.site is None, "a chain (sites)", self, "affine", "ridge")
        only_if(self.affine in ("full", "diagonal"), "a fit of affine maps (full, diagonal)", self, "ridge")
        only_if(self.aux_k > 0, "the AuxK loss (aux_k above 0)", self, "aux_coefficient")
        only_if(self.kind == "switch", "kind switch", self, "experts", "routing")
        only_if(self.kind == "archetypal", "kind archetypal", self, "candidates", "delta")
        only_if(self.kind == "matryoshka", "kind matryoshka", self, "prefixes")
        if self.k > self.d_sae:
            raise SparsightError(
                f"k: {self.k} active latents are more than d_sae = {self.d_sae}; lower k or raise d_sae"
            )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise SparsightError("seeds: name at least one seed, each once")
        if self.mutual and len(self.seeds) < 2:
            raise SparsightError("mutual: makes the seeds of a section alike, and this one has one; name two or more")
        if self.mutual and self.processes > 1:
            raise SparsightError("mutual: compares the seeds after every step, in one process; set processes to 1")
        if len(set(self.controls)) != len(self.controls):
            raise SparsightError("controls: name each once")
        if self.frozen != "none":
            self._check_frozen()
        if self.split:
            self._check_split()
        if self.loss != "local":
            self._check_end_to_end()

    def _check_frozen(self) -> None:
        if self.controls:
            raise SparsightError("controls: are of a section that is trained, and this one is frozen; leave them out")
        if self.kind == "archetypal":
            raise SparsightError("frozen: the rows of archetypal begin at data, not at random; choose another kind")
        if self.mutual and self.frozen == "decoder":
            raise SparsightError("frozen: mutual makes decoders alike, and these do not move; set mutual to 0")

    def _check_weights(self) -> None:
        if self.weights is None:
            only_if(False, "an SAE of another tool (weights)", self, "format", "normalized")
            return
        trained = [field.name for field in fields(self) if field.name not in OF_WEIGHTS]
        only_if(False, "training (a section without weights)", self, *trained)
        if self.format is None:
            raise SparsightError(f"format: say which tool wrote the weights: {', '.join(FORMATS)}")
        if self.in_hub and not all((*self.in_hub[0].split("/"), self.in_hub[1])):
            raise SparsightError(f"weights: expected hf:<owner>/<repository>/<file>, got {self.weights!r}")
        if self.seeds == type(self).seeds:
            object.__setattr__(self, "seeds", (0,))
        if len(self.seeds) != 1:
            raise SparsightError("seeds: weights are one SAE; leave seeds out, or name one")

    def check_files(self) -> None:
        """Raise SparsightError if local ``weights`` are not there."""
        for path in self.files[:1]:
            if not Path(path).is_file():
                raise SparsightError(
                    f"weights: there is no file {path!r}; give a path or hf:<owner>/<repository>/<file>"
                )

    def _check_split(self) -> None:
        n = len(self.seeds) * len(self.places)
        few = f"processes: {self.processes} for {n} SAE{'s' if n > 1 else ''} split each over its latents, "
        or_deal = f"or set processes to at most {n}"
        if SHARDS % self.processes:
            raise SparsightError(f"{few}which takes 2, 4 or 8 processes; set one of these, {or_deal}")
        if self.sites:
            raise SparsightError(f"{few}which is not possible in a chain (sites); set processes to at most {n}")
        if self.kind not in SPLIT_KINDS:
            raise SparsightError(f"{few}which is possible for {', '.join(SPLIT_KINDS)}; choose one of these, {or_deal}")
        if self.d_sae % SHARDS:
            raise SparsightError(f"{few}which takes a d_sae that is a multiple of {SHARDS}; round it, {or_deal}")
        if self.kind == "switch" and (self.experts or 1) % SHARDS:
            raise SparsightError(f"{few}which takes a multiple of {SHARDS} experts; set experts to one, {or_deal}")

    def _check_end_to_end(self) -> None:
        if self.sites:
            raise SparsightError(f"loss: {self.loss} is of an SAE of one site, not of a chain (sites); use local")
        if sites.parse(str(self.site))[1] not in ("input", "output"):
            raise SparsightError(
                f"loss: {self.loss} replaces the residual stream, blocks.<i>.input or .output, not {self.site}; choose "
                "such a site, or use local"
            )
        if self.tokens == "mean":
            raise SparsightError(f"loss: {self.loss} replaces tokens, and the mean is none; read cls, patches or all")
        if self.split:
            raise SparsightError(
                f"loss: {self.loss} cannot split an SAE over processes; set processes to at most {len(self.seeds)}"
            )

    def check_rest(self, stored: str, depth: int | None, classifies: bool) -> None:
        """Check that the rest of the model can be run, as a loss other than ``local`` needs.

        Args:
            stored: the tokens that the site stores.
            depth: number of the model's blocks; None if it is not known yet.
            classifies: whether the model has a classifier or prompts.

        Raises:
            SparsightError: a site or model that does not have what the loss needs.
        """
        if self.loss == "local":
            return
        if stored != "all":
            raise SparsightError(
                f"loss: {self.loss} runs the rest of the model on all tokens, but {self.site} stores {stored}; store "
                f"{{site: {self.site}, tokens: all}} (activations.sites), or use local"
            )
        if not classifies:
            raise SparsightError(
                f"loss: {self.loss} compares outputs, and {self.backbone} has neither classifier nor prompts; train or "
                "probe one, or use local"
            )
        if self.loss == "e2e-downstream" and depth is not None and self.site == f"blocks.{depth - 1}.output":
            raise SparsightError(f"loss: no block comes after {self.site}; use e2e, which compares the output alone")


def _check_chain(chain: tuple[str, ...]) -> None:
    if chain and (len(chain) < 2 or any(sites.depth(a) >= sites.depth(b) for a, b in itertools.pairwise(chain))):
        raise SparsightError(f"sites: a chain needs two or more sites in the order of the model, got {list(chain)}")
