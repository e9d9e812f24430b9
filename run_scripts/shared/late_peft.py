"""Import this before transformers' TrainingArguments: it then loads without peft, which takes more than half its time.

transformers.trainer_utils, which TrainingArguments needs, imports peft for one question: whether a model is a
`PeftModel`. Here the import waits for that question, which `Trainer` is the first to ask. A script that prints its help
or refuses a flag ends before.
"""

import sys

from transformers import utils


def _import_trainer_utils() -> None:
    is_peft_available = utils.is_peft_available
    utils.is_peft_available = lambda *args, **kwargs: False
    try:
        from transformers import trainer_utils
    finally:
        utils.is_peft_available = is_peft_available

    def with_peft() -> bool:
        """What `trainer_utils` calls before it asks for the class of a model."""
        from peft import PeftMixedModel, PeftModel

        trainer_utils.PeftMixedModel, trainer_utils.PeftModel = PeftMixedModel, PeftModel
        trainer_utils.is_peft_available = is_peft_available
        return True

    trainer_utils.is_peft_available = with_peft


if "transformers.trainer_utils" not in sys.modules and utils.is_peft_available():
    _import_trainer_utils()
