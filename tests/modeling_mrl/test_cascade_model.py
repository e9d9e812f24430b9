"""predict_cascade and fit_cascade: their results, and which layers and columns actually ran."""

import pytest
import torch
from conftest import FAMILIES
from datasets import Dataset
from tiny_classifiers import EXITS, image_classifier, one_leaves_at_each, text_classifier, token_batch
from transformers import DataCollatorWithPadding

from modeling_mrl import choose_sizes, confidences

LAYERS = {"distilbert": "transformer.layer", "modernbert": "layers", "qwen3": "layers", "llama": "layers"}


@pytest.mark.parametrize("head_type", ["separate", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_confident_samples_leave_and_the_others_are_not_affected(family, head_type, backbone_path):
    model = text_classifier(backbone_path(family), sizes=EXITS, head_type=head_type)
    batch = token_batch()
    confidence, labels = confidences(model(**batch).size_logits)
    model.config.thresholds = one_leaves_at_each(confidence)
    expected = choose_sizes(confidence, model.config.thresholds)
    ladder = model.config.ladder
    assert sorted(expected.tolist()) == [0, 1, 2, 4], "samples must leave at several exits"

    rows_run, hooks = [0] * 4, []
    for n, layer in enumerate(model.backbone.get_submodule(LAYERS.get(family, "encoder.layer"))):

        def count(module, args, kwargs, n=n):
            rows_run[n] += len(args[0] if args else kwargs["hidden_states"])

        hooks.append(layer.register_forward_pre_hook(count, with_kwargs=True))
    output = model.predict_cascade(batch)
    for hook in hooks:
        hook.remove()

    rows = torch.arange(4)
    assert output.sizes.tolist() == expected.tolist()
    assert output.labels.tolist() == labels[expected, rows].tolist()
    assert torch.allclose(output.confidences, confidence[expected, rows], atol=1e-5)
    assert output.dims.tolist() == [ladder[index].dim for index in expected]
    assert output.layers.tolist() == [ladder[index].num_layers for index in expected]
    assert output.layers.sum().item() == sum(rows_run) < 16
    assert output.mean_layers == sum(rows_run) / 4
    assert output.expected_dim == sum(ladder[index].dim for index in expected) / 4


def test_no_layer_runs_once_all_have_left(backbone_path):
    model = text_classifier(backbone_path("bert"), sizes=EXITS)
    batch, ran = token_batch(), []
    for n, layer in enumerate(model.backbone.encoder.layer, start=1):
        layer.register_forward_hook(lambda *args, n=n: ran.append(n))
    for threshold, layers, index in ((-0.1, [1], 0), (1.1, [1, 2, 3, 4], 4)):
        ran.clear()
        model.config.thresholds = [threshold] * 4
        output = model.predict_cascade(batch)
        assert ran == layers
        assert output.sizes.tolist() == [index] * 4
        assert output.mean_layers == len(layers)
        ran.clear()
        model(**batch)
        assert ran == [1, 2, 3, 4], "an ordinary pass after the cascade"


def test_a_tied_head_reads_each_column_once(backbone_path, monkeypatch):
    model = text_classifier(backbone_path("bert"), sizes=[4, 8, 32], head_type="tied")
    read = []
    widen = type(model.heads[0]).widen

    def spy(self, states, dim, narrower=None, previous=0):
        read.append((previous, dim, len(states)))
        return widen(self, states, dim, narrower, previous)

    monkeypatch.setattr(type(model.heads[0]), "widen", spy)
    confidence, _ = confidences(model(**token_batch()).size_logits)
    model.config.thresholds = one_leaves_at_each(confidence)
    read.clear()
    output = model.predict_cascade(token_batch())
    assert [columns[:2] for columns in read] == [(0, 4), (4, 8), (8, 32)][: len(read)]
    assert [rows for *_, rows in read] == [(output.sizes >= index).sum().item() for index in range(len(read))]
    assert output.layers is None
    assert output.mean_layers is None


def test_one_row_and_any_batch_give_the_same(backbone_path):
    model = text_classifier(backbone_path("bert"), sizes=EXITS)
    batch = token_batch()
    model.config.thresholds = one_leaves_at_each(confidences(model(**batch).size_logits)[0])
    together = model.predict_cascade({**batch, "labels": torch.zeros(4)})
    alone = [model.predict_cascade({name: value[[row]] for name, value in batch.items()}) for row in range(4)]
    assert together.sizes.tolist() == [output.sizes.item() for output in alone]
    assert together.layers.tolist() == [output.layers.item() for output in alone]


def test_images(tmp_path):
    model = image_classifier("vit", tmp_path, head_type="tied")
    pixels = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    confidence, labels = confidences(model(pixels).size_logits)
    model.config.thresholds = one_leaves_at_each(confidence)
    output = model.predict_cascade({"pixel_values": pixels})
    expected = choose_sizes(confidence, model.config.thresholds)
    assert len(set(expected.tolist())) > 1
    assert output.sizes.tolist() == expected.tolist()
    assert output.labels.tolist() == labels[expected, torch.arange(6)].tolist()


def rows(tokenizer, count: int, classes: int = 3) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 80, (3 + row % 4,), generator=generator).tolist() for row in range(count)]
    return Dataset.from_dict({"input_ids": ids, "label": [row % classes for row in range(count)]})


def test_fitted_thresholds_are_saved_with_the_model(backbone_path, tokenizer, tmp_path):
    model = text_classifier(backbone_path("bert"), sizes=EXITS)
    data, collator = rows(tokenizer, 40), DataCollatorWithPadding(tokenizer)
    model.train()
    thresholds = model.fit_cascade(data, collator, batch_size=7)
    assert model.training
    assert model.config.thresholds == thresholds
    assert len(thresholds) == 4
    # each pair, by hand, on logits of one padded batch
    batch = collator(list(data))
    labels = batch.pop("labels")
    confidence, predicted = confidences(model.eval()(**batch).size_logits)
    hits = predicted == labels

    def accuracy(pair, threshold):
        return torch.where(confidence[pair] > threshold, hits[pair], hits[pair + 1]).double().mean().item()

    for pair, threshold in enumerate(thresholds):
        best = max(accuracy(pair, level) for level in [0.0, *confidence[pair].tolist()])
        assert accuracy(pair, threshold) == pytest.approx(best, abs=1.1 / 40)  # a row's confidence may differ by 1e-7
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.thresholds == thresholds
    assert again.predict_cascade(batch).sizes.tolist() == model.predict_cascade(batch).sizes.tolist()
    assert model.truncate("2x4").config.thresholds is None


def test_an_offloaded_classifier_in_training_mode(backbone_path, tokenizer):
    import accelerate

    model, batch = text_classifier(backbone_path("bert"), sizes=EXITS), token_batch()
    data, collator = rows(tokenizer, 9), DataCollatorWithPadding(tokenizer)
    model.config.thresholds = one_leaves_at_each(confidences(model(**batch).size_logits)[0])
    expected, walked = model.collect_logits(data, collator)[0], model.predict_cascade(batch)
    accelerate.cpu_offload(model.train(), execution_device=torch.device("cpu"))
    assert torch.allclose(model.collect_logits(data, collator)[0], expected, atol=1e-5)
    again = model.predict_cascade(batch)
    assert (again.sizes.tolist(), again.layers.tolist()) == (walked.sizes.tolist(), walked.layers.tolist())
    forward = model.backbone.encoder.forward
    model.backbone.encoder.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with pytest.raises(ValueError, match=r"the forward of BertEncoder was replaced .*; call model.eval\(\) first"):
        model.collect_logits(data, collator)


def test_cascades_that_cannot_be_fitted_or_run(backbone_path, tokenizer):
    collator = DataCollatorWithPadding(tokenizer)
    model = text_classifier(backbone_path("bert"))
    with pytest.raises(ValueError, match="thresholds: this cascade is not fitted; call fit_cascade"):
        model.predict_cascade(token_batch())
    with pytest.raises(ValueError, match="dataset: all 10 rows are of class 0"):
        model.fit_cascade(rows(tokenizer, 10, classes=1), collator)
    with pytest.raises(ValueError, match="dataset: its rows have no labels"):
        model.fit_cascade(rows(tokenizer, 4).remove_columns("label"), collator)
    with pytest.raises(ValueError, match="dataset: there are no rows"):
        model.fit_cascade(rows(tokenizer, 4).select([]), collator)
    assert model.config.thresholds is None
    with pytest.raises(ValueError, match="sizes: a cascade needs at least two sizes, but there is only 8"):
        model.truncate(8).fit_cascade(rows(tokenizer, 10), collator)
    model.config.thresholds = [0.5]
    with pytest.raises(ValueError, match=r"thresholds: .* must be a list of 2 numbers"):
        model.predict_cascade(token_batch())
