"""The chosen size is the best of those within the limits, checked against a loop over all sizes."""

import dataclasses
import random

import pytest

from retrieval.planning import Cell, Limits, choose, pareto, plan


def cells_of(rng: random.Random, scored: bool = True) -> list[Cell]:
    cells = []
    for n in range(1, 7):
        ms = n + rng.random()
        for dim in (32, 64, 128):
            score = round(rng.random(), 1) if scored else None
            cells.append(Cell(f"{n}x{dim}", ms, 1000 / ms, 10**6 * n, 4.0 * n, 4.0 * dim, score))
    return cells


@pytest.mark.parametrize("seed", range(30))
def test_the_choice_is_the_best_of_all_that_fit(seed):
    rng = random.Random(seed)
    cells = cells_of(rng)
    limits = Limits(rng.choice([None, 2.5, 5.0]), rng.choice([None, 130.0, 300.0]), rng.choice([None, None, 0.3, 0.6]))
    fitting = []
    for cell in cells:
        good = limits.max_ms_per_text is None or cell.ms_per_text <= limits.max_ms_per_text
        good = good and (limits.max_bytes_per_vector is None or cell.bytes_per_vector <= limits.max_bytes_per_vector)
        if good and (limits.min_score is None or cell.score >= limits.min_score):
            fitting.append(cell)
    if not fitting:
        with pytest.raises(ValueError, match="no size is within them; "):
            choose(cells, limits)
        return
    best, reason = choose(cells, limits)
    assert best in fitting
    if limits.min_score is None:
        assert best.score == max(cell.score for cell in fitting)
        same = [cell for cell in fitting if cell.score == best.score]
        assert best.ms_per_text == min(cell.ms_per_text for cell in same)
    else:
        assert best.ms_per_text == min(cell.ms_per_text for cell in fitting)
        same = [cell for cell in fitting if cell.ms_per_text == best.ms_per_text]
        assert best.bytes_per_vector == min(cell.bytes_per_vector for cell in same)
    assert f"of {len(fitting)} sizes" in reason


def test_without_scores_the_largest_is_chosen():
    cells = cells_of(random.Random(0), scored=False)
    assert choose(cells, Limits(max_ms_per_text=4.0, max_bytes_per_vector=300))[0].size == "3x64"
    with pytest.raises(ValueError, match="no size is within them; 1x32 has no score"):
        choose(cells, Limits(min_score=0.1))


@pytest.mark.parametrize("seed", range(5))
def test_the_front_has_the_sizes_that_no_other_beats(seed):
    cells = cells_of(random.Random(seed))
    front = pareto(cells)
    for cell in cells:
        beaten = False
        for other in cells:
            as_good = other.score >= cell.score and other.ms_per_text <= cell.ms_per_text
            as_good = as_good and other.bytes_per_vector <= cell.bytes_per_vector
            better = other.score > cell.score or other.ms_per_text < cell.ms_per_text
            better = better or other.bytes_per_vector < cell.bytes_per_vector
            beaten = beaten or (as_good and better)
        assert (cell in front) == (not beaten)


def test_a_plan_measures_every_size(tiny_model):
    model = tiny_model()
    sizes = [(1, 8), (2, 8), (4, 32)]
    cells = plan(model, sizes, ["a man plays the guitar"] * 9, {"1x8": 0.5, "4x32": 0.7}, precision="int8", runs=1)
    assert [cell.size for cell in cells] == ["1x8", "2x8", "4x32"]
    assert [cell.bytes_per_vector for cell in cells] == [8, 8, 32]
    assert [cell.score for cell in cells] == [0.5, None, 0.7]
    assert cells[0].parameters < cells[1].parameters < cells[2].parameters == sum(p.numel() for p in model.parameters())
    assert all(value > 0 for cell in cells for value in dataclasses.astuple(cell)[1:3])
    for arguments, message in (
        ({"precision": "int4"}, "precision: 'int4' is unknown"),
        ({"texts": []}, "texts: the list is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(model, sizes, **({"texts": ["a"]} | arguments))
    with pytest.raises(ValueError, match="max_ms_per_text: 0 is not allowed"):
        Limits(max_ms_per_text=0)
