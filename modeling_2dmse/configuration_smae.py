"""The configuration of SMAE pre-training: an elastic encoder and the shape of its masked-language head."""

from transformers import PreTrainedConfig

from .configuration_2dmse import TwoDMSEConfig


class StarbucksConfig(PreTrainedConfig):
    r"""
    Configuration of a [`StarbucksForMaskedAutoencoding`].

    Args:
        encoder_config (`TwoDMSEConfig` or `dict`): the elastic encoder; its `sizes` are the ones that are trained.
        head (`dict`, *optional*): settings of [`MaskedLanguageHead`] but `hidden_size`: BERT's when left out.
    """

    model_type = "starbucks-smae"
    sub_configs = {"encoder_config": TwoDMSEConfig}

    def __init__(self, encoder_config=None, head=None, **kwargs):
        if not isinstance(encoder_config, TwoDMSEConfig):
            encoder_config = TwoDMSEConfig(**(encoder_config or {}))
        backbone = encoder_config.backbone_config
        self.encoder_config = encoder_config
        self.head = dict(head or {"width": backbone.hidden_size, "vocab_size": backbone.vocab_size})
        kwargs.pop("hidden_size", None)
        kwargs.pop("num_hidden_layers", None)
        kwargs["tie_word_embeddings"] = False  # the head borrows the word embeddings, no parameter is tied
        super().__init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        return self.encoder_config.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return self.encoder_config.num_layers


StarbucksConfig.register_for_auto_class()

__all__ = ["StarbucksConfig"]
