"""Loading asks no question: code of a folder is run if the caller has allowed it for the model, and not otherwise."""

import builtins
import json
import shutil
from pathlib import Path

import pytest
import transformers
from conftest import LADDER, SENTENCES, run_elsewhere
from tiny_vision import tiny_model as tiny_franca
from transformers import AutoModel, dynamic_module_utils

from modeling_2dmse import StarbucksForMaskedAutoencoding, TwoDMSEModel
from modeling_franca import FrancaForPretraining, FrancaModel
from modeling_m3 import MatryoshkaLlavaForConditionalGeneration
from modeling_mrl import MatryoshkaForSequenceClassification

CODE = """
from transformers import BertConfig, BitImageProcessor, PreTrainedTokenizerFast
class Own(PreTrainedTokenizerFast): pass
class OwnImages(BitImageProcessor): pass
class OwnConfig(BertConfig): model_type = "brand-new"
"""


@pytest.fixture(autouse=True)
def no_questions(monkeypatch):
    def asked(text):
        raise AssertionError(f"a load asks: {text}")

    monkeypatch.setattr(dynamic_module_utils, "TIME_OUT_REMOTE_CODE", 15)  # the scripts have set it to 0
    monkeypatch.setattr(builtins, "input", asked)


def change(path: Path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def with_own_tokenizer(folder) -> Path:
    (Path(folder) / "own.py").write_text(CODE)
    own = {"AutoTokenizer": ["own.Own", None]}
    change(Path(folder) / "tokenizer_config.json", tokenizer_class="Own", auto_map=own)
    return Path(folder)


def test_what_is_allowed_for_the_model_holds_for_its_tokenizer(tiny_model, backbone_path, tmp_path):
    tiny_model().save_pretrained(tmp_path / "elastic")
    shutil.copytree(backbone_path("bert"), tmp_path / "plain")
    elastic, plain = map(with_own_tokenizer, (tmp_path / "elastic", tmp_path / "plain"))
    for load, is_plain in (
        (lambda **word: TwoDMSEModel.from_pretrained(elastic, **word), False),
        (lambda **word: TwoDMSEModel.from_pretrained(elastic, **word).truncate(2), False),
        (lambda **word: AutoModel.from_pretrained(elastic, **word), False),
        (lambda **word: TwoDMSEModel.from_backbone(plain, **word), True),
        (lambda **word: StarbucksForMaskedAutoencoding.from_backbone(plain, sizes=LADDER, **word).encoder, True),
    ):
        for word in ({}, {"trust_remote_code": False}, {"trust_remote_code": None}):
            if is_plain:  # BERT has a tokenizer in transformers, which is then used
                assert type(load(**word).tokenizer).__name__ != "Own"
                continue
            with pytest.raises(ValueError, match="trust_remote_code"):
                load(**word).encode(SENTENCES[:1])
        model = load(trust_remote_code=True)
        assert type(model.tokenizer).__name__ == "Own"
        assert model.encode(SENTENCES[:1]).shape == (1, 32)


@pytest.mark.parametrize(
    "load",
    [
        TwoDMSEModel.from_backbone,
        StarbucksForMaskedAutoencoding.from_backbone,
        MatryoshkaForSequenceClassification.from_backbone,
        FrancaModel.from_backbone,
        FrancaForPretraining.from_backbone,
    ],
)
def test_a_backbone_of_unknown_kind_is_refused(load, tmp_path):
    (tmp_path / "own.py").write_text(CODE)
    names = {"AutoConfig": "own.OwnConfig"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "brand-new", "auto_map": names}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(tmp_path)


def test_what_is_allowed_for_the_model_holds_for_its_image_processor(tmp_path):
    tiny_franca().save_pretrained(tmp_path / "ours")
    tiny_franca().teacher.save_backbone(tmp_path / "plain")
    for name in ("ours", "plain"):
        (tmp_path / name / "own.py").write_text(CODE)
        own = {"AutoImageProcessor": "own.OwnImages"}
        change(tmp_path / name / "preprocessor_config.json", image_processor_type="OwnImages", auto_map=own)
    for load in (
        lambda **word: FrancaModel.from_pretrained(tmp_path / "ours", **word),
        lambda **word: FrancaForPretraining.from_pretrained(tmp_path / "ours", **word),
        lambda **word: FrancaModel.from_backbone(tmp_path / "plain", **word),
        lambda **word: FrancaForPretraining.from_backbone(tmp_path / "plain", **word),
    ):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load().image_processor  # noqa: B018
        assert type(load(trust_remote_code=True).image_processor).__name__ == "OwnImages"


class Unlisted(transformers.PreTrainedConfig):
    """A kind of model without a class that AutoModel knows, as a folder's code would have it."""

    model_type = "unlisted"


def test_code_of_a_part_of_a_model_is_never_run(llava_path):
    config = MatryoshkaLlavaForConditionalGeneration.config_class.from_pretrained(llava_path)
    config.text_config = Unlisted(hidden_size=8)
    config.text_config.auto_map = {"AutoModel": "own.OwnModel"}
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        MatryoshkaLlavaForConditionalGeneration(config)


IN_A_TERMINAL = """
import os, pty
child, terminal = pty.fork()
if child == 0:
    from transformers import AutoModel, AutoTokenizer, logging
    logging.set_verbosity_error()  # it warns that the configuration is of another kind
    print("tokens", AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)("a")["input_ids"], flush=True)
    logging.set_verbosity_warning()
    model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), "this process must not know the package"
    print("shape", model.encode(["a"]).shape, flush=True)
    os._exit(0)
screen = b""
while True:
    try:
        shown = os.read(terminal, 4096)
    except OSError:  # Linux: the other end is closed
        break
    if not shown:
        break
    screen += shown
_, status = os.waitpid(child, 0)
assert status == 0, screen.decode()
assert b"shape (1, 32)" in screen
assert b"tokens [2, " in screen
for unwanted in (b"y/N", b"custom code", b"of type", b"arning"):
    assert unwanted not in screen, screen.decode()
"""


def test_the_first_snippet_in_a_terminal(tiny_model, tmp_path):
    """`AutoModel.from_pretrained(folder, trust_remote_code=True).encode(["a"])` where this package is not installed,
    and the tokenizer alone, which reads config.json first and asks unless it is told not to trust its code."""
    tiny_model().save_pretrained(tmp_path / "model")
    run_elsewhere(IN_A_TERMINAL, tmp_path, str(tmp_path / "model"))
