"""The configuration of Franca: a vision backbone, the nesting sizes, and how clusters are learned."""

import math

import transformers

if int(transformers.__version__.partition(".")[0]) < 5:  # before a name is imported that older versions do not have
    raise ImportError(
        f"Franca models need transformers 5 or newer, not {transformers.__version__}; upgrade transformers"
    )

from transformers import AutoConfig, PreTrainedConfig

HEAD_INPUTS = ("slice", "projection")
HEAD_OUTPUTS = ("unit", "gelu")
KOLEO_REDUCTIONS = ("mean", "sum")


class FrancaConfig(PreTrainedConfig):
    """Configuration of `FrancaModel` and `FrancaForPretraining`.

    Args:
        backbone_config (PreTrainedConfig | dict | None): a vision transformer of transformers; default: Dinov2.
        nesting_sizes (list[int] | None): prefixes of the embedding that get a clustering head; the largest must be the
            hidden size D. Default: D/16, D/8, D/4, D/2, D. `[D]` is flat clustering.
        head_input (str): `slice`: the head of size m sees the first m dimensions (the paper's nesting); `projection`:
            it sees a linear map from all D dimensions to m, as in the released code, so prefixes are not trained.
        head_output (str): `unit`: a head's MLP ends in a unit vector; `gelu`: it ends in a GELU, without normalisation,
            as in the released code.
        num_prototypes (int): of size D; size m gets round(num_prototypes * m / D).
        head_num_layers (int): layers of each head's MLP.
        head_hidden_size (int): dimensions between the layers of each head's MLP.
        head_bottleneck_size (int): output dimensions of each head's MLP.
        student_temperature (float): divides the student's logits.
        teacher_temperature (float): divides the teacher's logits after the warm-up.
        initial_teacher_temperature (float): divides the teacher's logits at the first step; the temperature then rises
            linearly.
        teacher_temperature_warmup (float): length of this warm-up, as a fraction of all steps.
        momentum (float): of the teacher at the first step.
        final_momentum (float): of the teacher at the last step; a cosine leads from `momentum` to it.
        sinkhorn_iterations (int): of the teacher's assignments.
        patch_weight (float): factor of the loss at masked patches; with 0, no head is built for them.
        koleo_weight (float): factor of the KoLeo regulariser.
        koleo_reduction (str): over the global crops: `mean`, or `sum` as in the released code.
        rasa (bool): whether a `RasaProjector` is folded into the `FrancaModel`.
        kwargs: those of `PreTrainedConfig`.

    Raises:
        ValueError: fields are out of range; the message names all of them.
    """

    model_type = "franca"
    sub_configs = {"backbone_config": AutoConfig}

    def __init__(
        self,
        backbone_config=None,
        nesting_sizes=None,
        head_input="slice",
        head_output="unit",
        num_prototypes=65536,
        head_num_layers=3,
        head_hidden_size=2048,
        head_bottleneck_size=256,
        student_temperature=0.1,
        teacher_temperature=0.07,
        initial_teacher_temperature=0.04,
        teacher_temperature_warmup=0.3,
        momentum=0.992,
        final_momentum=1.0,
        sinkhorn_iterations=3,
        patch_weight=1.0,
        koleo_weight=0.1,
        koleo_reduction="mean",
        rasa=False,
        **kwargs,
    ):
        if backbone_config is None:
            backbone_config = AutoConfig.for_model("dinov2")
        elif isinstance(backbone_config, dict):
            backbone_config = AutoConfig.for_model(**backbone_config)
        if not hasattr(backbone_config, "hidden_size") or not hasattr(backbone_config, "patch_size"):
            raise ValueError(
                f"backbone_config: {backbone_config.model_type} is not a vision transformer; use dinov2, dinov3_vit or "
                "vit"
            )
        width = backbone_config.hidden_size
        if nesting_sizes is None:
            nesting_sizes = [width // part for part in (16, 8, 4, 2, 1) if width % part == 0]
        self.backbone_config = backbone_config
        self.nesting_sizes = sorted(nesting_sizes)
        self.head_input = head_input
        self.head_output = head_output
        self.num_prototypes = num_prototypes
        self.head_num_layers = head_num_layers
        self.head_hidden_size = head_hidden_size
        self.head_bottleneck_size = head_bottleneck_size
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.initial_teacher_temperature = initial_teacher_temperature
        self.teacher_temperature_warmup = teacher_temperature_warmup
        self.momentum = momentum
        self.final_momentum = final_momentum
        self.sinkhorn_iterations = sinkhorn_iterations
        self.patch_weight = patch_weight
        self.koleo_weight = koleo_weight
        self.koleo_reduction = koleo_reduction
        self.rasa = rasa
        problems = [*self._size_problems(), *self._number_problems()]
        if problems:
            raise ValueError("; ".join(problems))
        kwargs.pop("hidden_size", None)
        super().__init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Dimensions D of the embedding."""
        return self.backbone_config.hidden_size

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        size = self.backbone_config.patch_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def level_prototypes(self) -> list[int]:
        """Prototypes of each nesting size, in proportion to it."""
        return [round(self.num_prototypes * size / self.hidden_size) for size in self.nesting_sizes]

    def teacher_temperature_at(self, progress: float) -> float:
        """The teacher's temperature when a fraction `progress` of all steps is done.

        >>> config = FrancaConfig(teacher_temperature_warmup=0.5)
        >>> [round(config.teacher_temperature_at(done), 3) for done in (0, 0.25, 0.5, 1)]
        [0.04, 0.055, 0.07, 0.07]
        """
        rise = min(1.0, progress / self.teacher_temperature_warmup) if self.teacher_temperature_warmup else 1.0
        start = self.initial_teacher_temperature
        return start + (self.teacher_temperature - start) * rise

    def momentum_at(self, progress: float) -> float:
        """The teacher's momentum when a fraction `progress` of all steps is done.

        >>> config = FrancaConfig(momentum=0.9)
        >>> [round(config.momentum_at(done), 3) for done in (0, 0.5, 1)]
        [0.9, 0.95, 1.0]
        """
        left = (1 + math.cos(math.pi * progress)) / 2
        return self.final_momentum + (self.momentum - self.final_momentum) * left

    def _size_problems(self) -> list[str]:
        sizes, width = self.nesting_sizes, self.hidden_size
        choices = {"head_input": HEAD_INPUTS, "head_output": HEAD_OUTPUTS, "koleo_reduction": KOLEO_REDUCTIONS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                return [f"{name}: {getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}"]
        wrong = [size for size in sizes if not isinstance(size, int) or not 1 <= size <= width]
        if wrong or not sizes or len(set(sizes)) < len(sizes):
            return [f"nesting_sizes: {sizes} is not allowed; name each size once, whole numbers from 1 to {width}"]
        if sizes[-1] != width:
            return [f"nesting_sizes: {sizes} leaves dimensions untrained; the largest must be the hidden size {width}"]
        few = [(size, count) for size, count in zip(sizes, self.level_prototypes, strict=True) if count < 2]
        if few:
            return [
                f"num_prototypes: {self.num_prototypes} leaves {few[0][1]} for size {few[0][0]} of {width}; use at "
                f"least {math.ceil(2 * width / few[0][0])}"
            ]
        return []

    def _number_problems(self) -> list[str]:
        checks = {
            "above 0": (
                lambda value: value > 0,
                ("student_temperature", "teacher_temperature", "initial_teacher_temperature"),
            ),
            "from 0 to 1": (
                lambda value: 0 <= value <= 1,
                ("momentum", "final_momentum", "teacher_temperature_warmup"),
            ),
            "of at least 0": (lambda value: value >= 0, ("patch_weight", "koleo_weight")),
            "of at least 1": (
                lambda value: value >= 1,
                ("head_num_layers", "head_hidden_size", "head_bottleneck_size", "sinkhorn_iterations"),
            ),
        }
        return [
            f"{name}: {getattr(self, name)} is not allowed; use a number {allowed}"
            for allowed, (is_allowed, names) in checks.items()
            for name in names
            if not is_allowed(getattr(self, name))
        ]


FrancaConfig.register_for_auto_class()

__all__ = ["FrancaConfig"]
