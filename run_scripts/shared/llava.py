"""Loading a LLaVA with its processor."""

from modeling_m3 import MatryoshkaLlavaConfig, MatryoshkaLlavaForConditionalGeneration, MatryoshkaLlavaProcessor
from run_scripts.shared import models

KINDS = ("llava", MatryoshkaLlavaConfig.model_type)


def load_llava(name_or_path: str, **kwargs) -> tuple[MatryoshkaLlavaForConditionalGeneration, MatryoshkaLlavaProcessor]:
    """
    Load a stock or nested LLaVA and its processor.

    Args:
        name_or_path: folder or Hub name.
        kwargs: passed to `from_pretrained`; may contain fields of the configuration.

    Raises:
        ValueError: it is another kind of model, or some of its weights are missing.
    """
    path = models.resolve_model(name_or_path)
    kind = models.read_config(path).model_type
    if kind not in KINDS:
        raise ValueError(f"model_name_or_path: {path} is a {kind} model; use one of type {' or '.join(KINDS)}")
    model, info = MatryoshkaLlavaForConditionalGeneration.from_pretrained(path, output_loading_info=True, **kwargs)
    missing = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if missing:
        raise ValueError(
            f"model_name_or_path: the weights of {path} lack {len(missing)} tensors, for example {missing[0]}"
        )
    return model, MatryoshkaLlavaProcessor.from_pretrained(path)
