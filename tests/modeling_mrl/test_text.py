"""MatryoshkaForSequenceClassification against its backbone and heads, run separately: sizes, loss, cuts, loading."""

import copy

import numpy as np
import pytest
import torch
from conftest import FAMILIES, LADDER, SENTENCES
from datasets import Dataset
from tiny_classifiers import EXITS, text_classifier, token_batch
from transformers import AutoModel, DataCollatorWithPadding, T5Config, T5EncoderModel, Trainer, TrainingArguments

from modeling_mrl import MatryoshkaForSequenceClassification, nested_loss


def by_hand(model, batch, n: int, dim: int) -> torch.Tensor:
    """Logits of one size from a backbone that has only n layers."""
    backbone = copy.deepcopy(model.backbone)
    backbone.encoder.layer = backbone.encoder.layer[:n]
    with torch.no_grad():
        state = backbone(**batch).last_hidden_state
    pooled = torch.stack(
        [row[: mask.sum()].mean(dim=0) for row, mask in zip(state, batch["attention_mask"], strict=True)]
    )
    head = model.heads[(model.config.exits or [4]).index(n)]
    linear = head.linear if head.head_type == "tied" else head.linears[head.dims.index(dim)]
    return pooled[:, :dim] @ linear.weight[:, :dim].T + linear.bias


@pytest.mark.parametrize("head_type", ["separate", "tied"])
@pytest.mark.parametrize("sizes", [[4, 8, 32], EXITS])
def test_logits_and_loss(backbone_path, head_type, sizes):
    weights = [1.0 + index for index in range(len(sizes))]
    settings = {"loss_weights": weights, "loss_reduction": "mean", "label_smoothing": 0.1}
    model = text_classifier(backbone_path("bert"), sizes=sizes, head_type=head_type, **settings)
    batch, labels = token_batch(), torch.tensor([0, 2, 1, 2])
    output = model(**batch, labels=labels)
    assert output.size_logits.shape == (len(sizes), 4, 3)
    for index, size in enumerate(model.config.ladder):
        expected = by_hand(model, batch, size.num_layers or 4, size.dim)
        assert torch.allclose(output.size_logits[index], expected, atol=1e-5)
        assert torch.equal(model(**batch, size=str(size)).logits, output.size_logits[index])
    assert torch.equal(output.logits, output.size_logits[-1])
    loss, losses = nested_loss(output.size_logits, labels, weights, "mean", 0.1)
    assert torch.allclose(output.loss, loss)
    assert torch.allclose(output.losses, losses)
    assert model(**batch).loss is None


def test_a_tied_head_between_its_sizes(backbone_path):
    model = text_classifier(backbone_path("bert"), sizes=["2x4", "2x16", "4x32"], head_type="tied")
    batch = token_batch()
    between = model(**batch, size="2x10").logits
    assert torch.allclose(between, by_hand(model, batch, 2, 10), atol=1e-5)
    assert torch.allclose(model.truncate("2x10")(**batch).logits, between, atol=1e-6)
    with pytest.raises(ValueError, match="size: 2x10 has no head,"):
        text_classifier(backbone_path("bert"), sizes=["2x4", "2x16"])(**batch, size="2x10")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_cuts_to_one_size(family, backbone_path, tmp_path):
    model = text_classifier(backbone_path(family), sizes=EXITS, id2label={0: "a", 1: "b", 2: "c"})
    batch = token_batch()
    logits = model(**batch).size_logits
    for index, size in enumerate(EXITS):
        small = model.truncate(size)
        assert torch.allclose(small(**batch).logits, logits[index], atol=1e-6)
    small = model.truncate("2x4")
    small.save_pretrained(tmp_path)
    again, info = MatryoshkaForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.allclose(again(**batch).logits, logits[2], atol=1e-6)
    assert (again.config.sizes, again.config.backbone_config.num_hidden_layers) == (["2x4"], 2)
    assert again.config.id2label[1] == "b"
    count = sum(parameter.numel() for parameter in again.parameters())
    assert count < 0.8 * sum(parameter.numel() for parameter in model.parameters())
    assert torch.allclose(model(**batch).size_logits, logits), "cutting has changed the model"


def test_layers_above_the_deepest_exit_are_dropped(backbone_path):
    model = text_classifier(backbone_path("bert"), sizes=["1x8", "3x32"])
    assert len(model.backbone.encoder.layer) == model.config.backbone_config.num_hidden_layers == 3
    whole = AutoModel.from_pretrained(backbone_path("bert"))
    assert torch.equal(model.backbone.encoder.layer[2].output.dense.weight, whole.encoder.layer[2].output.dense.weight)


def test_an_elastic_folder_gives_backbone_pooling_and_ladder(tiny_model, backbone_path, tmp_path):
    elastic = tiny_model(pooling="cls")
    elastic.save_pretrained(tmp_path)
    model = text_classifier(tmp_path, sizes=None)
    assert model.config.sizes == LADDER
    assert (model.config.pooling, model.config.backbone_config.model_type) == ("cls", "bert")
    batch = token_batch()
    states = elastic(**batch, layers=[1, 2, 4]).layer_embeddings
    expected = model.heads[1].logits(states[1], 16)
    assert torch.allclose(model(**batch, size="2x16").logits, expected, atol=1e-6)
    plain = text_classifier(backbone_path("bert"), sizes=LADDER, pooling="cls")
    assert torch.allclose(plain(**batch).size_logits, model(**batch).size_logits, atol=1e-6)


def test_heads_after_the_whole_backbone_need_no_elastic_backbone(tmp_path):
    from transformers import AlbertConfig

    shape = {"vocab_size": 160, "embedding_size": 8, "hidden_size": 32, "intermediate_size": 48}
    AutoModel.from_config(AlbertConfig(**shape, num_attention_heads=4, num_hidden_layers=2)).save_pretrained(tmp_path)
    assert text_classifier(tmp_path)(**token_batch()).size_logits.shape == (3, 4, 3)
    with pytest.raises(ValueError, match="backbone: AlbertModel cannot be made elastic"):
        text_classifier(tmp_path, sizes=["1x8", "2x32"])


def test_new_heads_are_drawn_by_the_seed(backbone_path):
    def heads(seed):
        torch.manual_seed(seed)
        return MatryoshkaForSequenceClassification.from_backbone(backbone_path("bert")).heads[0].linears[-1]

    assert torch.equal(heads(0).weight, heads(0).weight)
    assert not torch.equal(heads(0).weight, heads(1).weight)
    assert heads(0).weight.std().item() == pytest.approx(0.02, rel=0.5)
    assert (heads(0).bias == 0).all()


def test_the_requested_attention_is_kept(backbone_path):
    for wanted in ("sdpa", "eager"):
        model = text_classifier(backbone_path("bert"), sizes=EXITS, attn_implementation=wanted)
        assert model.backbone.config._attn_implementation == wanted
        assert model.truncate("2x4").backbone.config._attn_implementation == wanted


def test_wrong_folders_and_inputs(backbone_path, tmp_path):
    model = text_classifier(backbone_path("bert"))
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="pooling: 'pooler' does not work with MatryoshkaForSequenceClassification"):
        text_classifier(backbone_path("bert"), pooling="pooler")
    with pytest.raises(ValueError, match=r"a model of type bert is not a nested classifier; .*from_backbone puts"):
        MatryoshkaForSequenceClassification.from_pretrained(backbone_path("bert"))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a nested classifier already; load it with from_pretrained"):
        MatryoshkaForSequenceClassification.from_backbone(tmp_path)
    with pytest.raises(ValueError, match="size: 5 has no head,"):
        MatryoshkaForSequenceClassification.from_pretrained(tmp_path, size=5)
    assert MatryoshkaForSequenceClassification.from_pretrained(tmp_path, size=8).config.find_size().dim == 8


def test_backbones_that_are_offloaded_or_have_two_stacks(backbone_path, tmp_path):
    path, ids = backbone_path("bert"), torch.arange(12).reshape(2, 6) + 5
    expected = text_classifier(path, sizes=EXITS)(input_ids=ids).logits
    offloaded = text_classifier(path, sizes=EXITS, device_map={"": "disk"}, offload_folder=str(tmp_path / "off"))
    assert offloaded.device.type == "meta"
    assert torch.allclose(offloaded(input_ids=ids).logits, expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"device_map: .* is on the meta device, which keeps no values"):
        text_classifier(path, device_map={"": "meta"})
    T5EncoderModel(T5Config(vocab_size=50, d_model=16, num_layers=2, d_kv=8, num_heads=2, d_ff=16)).save_pretrained(
        tmp_path / "t5"
    )
    with pytest.raises(ValueError, match="T5Model has an encoder and a decoder, which is not supported"):
        text_classifier(tmp_path / "t5")


def test_decoders_and_left_padding(backbone_path):
    model = text_classifier(backbone_path("qwen3"), sizes=EXITS)
    assert model.config.pooling == "lasttoken"
    assert text_classifier(backbone_path("modernbert")).config.pooling == "mean"


def test_stock_trainer_and_metrics(backbone_path, tokenizer, tmp_path):
    """The unchanged Trainer: compute_metrics gets one array of logits, those of the chosen size."""
    rows = tokenizer(SENTENCES)["input_ids"]
    data = Dataset.from_dict({"input_ids": rows, "labels": [index % 3 for index in range(len(rows))]})
    model = text_classifier(backbone_path("bert"), sizes=EXITS, size="2x4")
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction.predictions.shape)
        return {"accuracy": float((np.argmax(prediction.predictions, axis=-1) == prediction.label_ids).mean())}

    def train(accumulation: int, batch: int) -> float:
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            per_device_eval_batch_size=8,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
        )
        trainer = Trainer(
            copy.deepcopy(model),
            arguments,
            DataCollatorWithPadding(tokenizer),
            train_dataset=data,
            eval_dataset=data,
            compute_metrics=compute_metrics,
        )
        trainer.train()
        metrics = trainer.evaluate()
        assert 0 <= metrics["eval_accuracy"] <= 1
        return trainer.state.log_history[0]["loss"]

    assert model.accepts_loss_kwargs is False  # accumulating must not multiply the loss
    assert train(2, 4) == pytest.approx(train(1, 8), rel=0.05)
    assert seen == [(20, 3), (20, 3)]
