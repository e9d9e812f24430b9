"""The settings of a run, as a model card shows them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers.trainer_utils import SchedulerType

from .losses import SCALES

if TYPE_CHECKING:
    from .trainer import TwoDMSETrainer


def describe_run(trainer: TwoDMSETrainer) -> dict[str, object]:
    """The settings of a trainer's run that a model card shows; those at their defaults only where they matter."""
    args, config = trainer.args, trainer.encoder.config
    return {
        "rows": len(trainer.train_dataset),
        "sizes": " ".join(map(str, trainer.ladder)),
        "loss": args.loss,
        "alignment": trainer.training_objective.kind,
        "batch size": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "steps": trainer.state.max_steps,
        "learning rate": f"{args.learning_rate:g}, {SchedulerType(args.lr_scheduler_type).value}",
        "max_length": args.max_length,
        "seed": args.seed,
    } | {
        name: value
        for name, value, default in (
            ("alignment weight", args.alignment_weight, None),
            ("feature_kl form", trainer.training_objective.kind == "feature_kl" and args.feature_kl_form, False),
            ("teacher", args.teacher, "largest"),
            ("cross size weight", args.cross_size_weight, 0),
            ("embedding weight", args.embedding_weight, 0),
            ("shallow steps", args.shallow_steps, 0),
            ("exit projections", args.exit_projections, False),
            ("exit gates", trainer.encoder.exit_gates is not None, False),
            ("refined projections", args.refine_projections, False),
            ("initial share", args.initial_share, 0),
            ("initial share by layer", args.initial_share_by_layer, "linear"),
            ("similarity", config.similarity, "cosine"),
            ("query prompt", config.prompts.get("query", ""), ""),
            ("document prompt", config.prompts.get("document", ""), ""),
            ("max_query_length", args.max_query_length, None),
            ("guide", trainer.guide and trainer.guide.name, None),
            ("loss scale", args.loss_scale, SCALES[config.similarity]),
            ("dropout", args.dropout, True),
            ("weight on unlabeled texts", trainer.training_objective.unlabeled_weight, 0),
        )
        if value != default
    }
