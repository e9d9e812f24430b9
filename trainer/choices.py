"""The words that arguments of a training may have.

Imports no library, so that a script refuses another word before it loads those that it works with.
"""

from collections.abc import Mapping

# The keys of objectives.OBJECTIVES.
OBJECTIVES = ("2dmse", "starbucks", "matryoshka", "separate", "espresso")
ALIGNMENTS = ("none", "feature_kl", "score_kl", "query_kl")
FEATURE_KL_FORMS = ("raw", "raw_detached", "normalized", "normalized_detached")
TEACHERS = ("largest", "start", "embeddings")
PAIR_LOSSES = ("infonce",)
# They need a teacher's scores.
TEACHER_LOSSES = ("distill_kl", "margin_mse")
LOSSES = (*PAIR_LOSSES, *TEACHER_LOSSES, "cosent", "angle", "cosine_mse")
# modeling_2dmse.configuration_2dmse.SIMILARITIES.
SIMILARITIES = ("cosine", "dot")
# How the share of the initial weights differs between layers (averaging.py).
INITIAL_SHARES = ("linear", "step")
# What shared.sampling can do.
BATCH_SAMPLERS = ("random", "no_duplicates", "group_by_length")
MIXINGS = ("proportional", "round_robin")

# The arguments of `TwoDMSETrainer`.
CHOICES = {
    "objective": OBJECTIVES,
    "alignment": ALIGNMENTS,
    "feature_kl_form": FEATURE_KL_FORMS,
    "teacher": TEACHERS,
    "loss": LOSSES,
    "similarity": SIMILARITIES,
    "initial_share_by_layer": INITIAL_SHARES,
    "batch_sampler": BATCH_SAMPLERS,
    "mixing": MIXINGS,
}


def find_unknown(values: Mapping[str, str | None]) -> list[str]:
    """A message for each value, by the name of its argument, that is not among the choices of that argument."""
    return [
        f"{name}: {values[name]!r} is unknown; choose one of {', '.join(allowed)}"
        for name, allowed in CHOICES.items()
        if name in values and values[name] not in allowed
    ]
