"""Loading a LLaVA with its processor."""

from modeling_2dmse.loading import check_weights
from modeling_m3 import MatryoshkaLlavaConfig, MatryoshkaLlavaForConditionalGeneration, MatryoshkaLlavaProcessor
from run_scripts.shared import models, remote_code

KINDS = ("llava", MatryoshkaLlavaConfig.model_type)


def load_llava(
    name_or_path: str, trust_remote_code: bool = False, **kwargs
) -> tuple[MatryoshkaLlavaForConditionalGeneration, MatryoshkaLlavaProcessor]:
    """
    Load a stock or nested LLaVA and its processor.

    Args:
        name_or_path: folder or Hub name.
        trust_remote_code: whether code of the folder may be run, for the processor's tokenizer.
        kwargs: passed to `from_pretrained`; may contain fields of the configuration.

    Raises:
        ValueError: it is another kind of model, or some of its weights are missing.
    """
    path = models.resolve_model(name_or_path)
    kind = models.read_config(path, trust_remote_code=trust_remote_code).model_type
    if kind not in KINDS:
        raise ValueError(f"model_name_or_path: {path} is a {kind} model; use one of type {' or '.join(KINDS)}")
    with remote_code.named(path):
        model, info = MatryoshkaLlavaForConditionalGeneration.from_pretrained(path, output_loading_info=True, **kwargs)
        check_weights(model, path)
    missing = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if missing:
        raise ValueError(
            f"model_name_or_path: the weights of {path} lack {len(missing)} tensors, for example {missing[0]}"
        )
    with remote_code.named(path):
        return model, MatryoshkaLlavaProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
