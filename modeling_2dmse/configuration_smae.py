"""The configuration of SMAE pre-training: an elastic encoder and the shape of its masked-language head."""

from transformers import PreTrainedConfig

from .configuration_2dmse import TwoDMSEConfig


class StarbucksConfig(PreTrainedConfig):
    """Configuration of a `StarbucksForMaskedAutoencoding`.

    Args:
        encoder_config (TwoDMSEConfig | dict | None): the elastic encoder; its `sizes` are the ones that are trained.
        head (dict | None): settings of `MaskedLanguageHead` except for `hidden_size`; default: those of BERT.
        kwargs: those of `PreTrainedConfig`.
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
        kwargs["tie_word_embeddings"] = False  # the head is passed the word embeddings; no parameter is tied
        super().__init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Dimensions of the encoder's states."""
        return self.encoder_config.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the encoder."""
        return self.encoder_config.num_layers


StarbucksConfig.register_for_auto_class()

__all__ = ["StarbucksConfig"]
