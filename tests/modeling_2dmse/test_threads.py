"""A model and an index that threads share give each of them what they give a single one, to the bit."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import FAMILIES, SENTENCES

from modeling_2dmse.running import inference_twin
from retrieval import FunnelIndex

THREADS, CALLS = 16, 96
TEXTS = [f"{sentence} {word}" for sentence in SENTENCES for word in ("rain", "stage", "")]
KINDS = list(itertools.product([1, 2, 4], [8, 32], [None, 3], ["float32", "binary"]))


def at_once(calls):
    """The results of functions that threads call, all of them starting together."""
    barrier = threading.Barrier(THREADS, timeout=60)

    def run(number):
        if number < THREADS:
            barrier.wait()
        return calls[number]()

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(len(calls))))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_encode(tiny_model, family, training):
    model = tiny_model(family)
    # Fewer calls than texts differ: each thread has its own texts, size, batches and precision.
    work = [(TEXTS[i % 20 :: 1 + i % 3], *KINDS[i % len(KINDS)]) for i in range(CALLS)]
    encode = lambda texts, n, d, batch, precision: model.encode(texts, n, d, batch_size=batch, precision=precision)
    expected = [encode(*item) for item in work]
    model.train(training)
    model.backbone.get_input_embeddings().eval()  # modules of different modes
    modes = [module.training for module in model.modules()]
    found = at_once([lambda item=item: encode(*item) for item in work])
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))
    assert [module.training for module in model.modules()] == modes


def test_encode_while_another_thread_changes_the_mode(tiny_model):
    model = tiny_model()
    expected, stop = model.encode(TEXTS), threading.Event()

    def toggle():
        while not stop.is_set():
            model.train(), model.eval()

    thread = threading.Thread(target=toggle)
    model.train()
    try:
        twin = inference_twin(model)
        thread.start()
        for _ in range(20):
            assert np.array_equal(twin.encode(TEXTS), expected)
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_twin_shares_every_tensor_and_gives_the_same(tiny_model, family):
    model = tiny_model(family, projected=True).eval()
    expected = model.encode(SENTENCES)
    assert inference_twin(model) is model
    model.train()
    twin = inference_twin(model)
    assert not any(module.training for module in twin.modules())
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert [name for name, _ in model.named_modules()] == [name for name, _ in twin.named_modules()]
    assert np.array_equal(model.encode(SENTENCES), expected)
    assert model.training


def test_search(tmp_path):
    pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(3000, 32)).astype(np.float32)
    for spec in ("HNSW8", "IVF16,Flat"):
        prefixes = [8, (16, "int8"), (32, "binary")]
        path = tmp_path / spec[:3]
        FunnelIndex.build(vectors, path, prefixes, ids=[f"n{i}" for i in range(3000)], approximate=(8, spec))
        firsts = [(8, 60), (16, 90, "int8"), (32, 40, "binary"), (8, 12, "approximate"), (8, 150, "approximate")]
        work = []
        for number in range(CALLS):
            queries = rng.normal(size=(1 + number % 3, 32)).astype(np.float32)
            work.append((queries, 3 + number % 8, [firsts[number % len(firsts)], (32, 10)]))
        index = FunnelIndex.open(path)
        expected = [index.search(*item) for item in work]
        shared = FunnelIndex.open(path)  # its graph is not read yet
        found = at_once([lambda item=item, index=shared: index.search(*item) for item in work])
        for one, other in zip(expected, found, strict=True):
            assert np.array_equal(one[0], other[0])
            assert one[1].tolist() == other[1].tolist()
