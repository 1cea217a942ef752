"The baselines as one family: they learn what is there, they repeat themselves, and they judge by one rule."

import numpy as np
import pandas as pd
import pytest
import torch

from unirec.baselines.bpr import BPRConfig, bpr
from unirec.baselines.classic import itemknn, markov, mean_vectors, popularity
from unirec.baselines.sequential import GRU4RecConfig, SASRecConfig, gru4rec, sasrec
from unirec.data.histories import Histories
from unirec.evaluation.metrics import full_ranks, summarise, validation_figures
from unirec.training.loop import FitConfig

N_USERS, N_GROUPS, SIZE, LENGTH = 120, 5, 12, 12
N_ITEMS = N_GROUPS * SIZE + 3  # the last three are in nobody's history
SMALL = {"width": 16, "length": 12, "batch": 32, "steps": 8}
BRIEF = FitConfig(epochs=8, lr=1e-2, patience=4)
TRAINED = {
    "sasrec": lambda *data, fit, vectors: sasrec(*data, SASRecConfig(**SMALL), fit),
    "sasrec_vectors": lambda *data, fit, vectors: sasrec(
        *data, SASRecConfig(**SMALL, source="vectors"), fit, vectors
    ),
    "sasrec_both": lambda *data, fit, vectors: sasrec(
        *data, SASRecConfig(**SMALL, source="both"), fit, vectors
    ),
    "gru4rec": lambda *data, fit, vectors: gru4rec(*data, GRU4RecConfig(**SMALL, hidden=24), fit),
    "bpr": lambda *data, fit, vectors: bpr(*data, BPRConfig(width=16, batch=128, steps=8), fit),
}
COUNTED = {
    "markov": lambda train, vectors: markov(train),
    "itemknn": lambda train, vectors: itemknn(train),
    "mean_vectors": lambda train, vectors: mean_vectors(vectors),
}


def histories(events: np.ndarray) -> Histories:
    "From a table of items, one row a user, oldest first."
    users, length = events.shape
    return Histories.from_frame(
        pd.DataFrame(
            {
                "user": np.repeat(np.arange(users), length),
                "item": events.ravel(),
                "timestamp": np.tile(np.arange(length), users),
                "rating": np.float32("nan"),
            }
        ),
        users,
        N_ITEMS,
    )


@pytest.fixture(scope="module")
def world() -> dict:
    "Walks in a circle of one's own two groups of items; a vector says group and place."
    rng = np.random.default_rng(0)
    walks = np.zeros((N_USERS, LENGTH), np.int64)
    for user in range(N_USERS):
        own = rng.choice(N_GROUPS, 2, replace=False)
        group, place = rng.choice(own), rng.integers(SIZE)
        for step in range(LENGTH):
            if rng.random() < 0.2:
                group, place = rng.choice(own), rng.integers(SIZE)
            walks[user, step] = group * SIZE + place
            place = (place + 1) % SIZE
    angle = 2 * np.pi * (np.arange(N_ITEMS) % SIZE) / SIZE
    vectors = np.concatenate(
        [np.eye(N_GROUPS + 1)[np.arange(N_ITEMS) // SIZE], np.stack([np.cos(angle), np.sin(angle)], 1)], 1
    )
    train = histories(walks[:, :-2])
    return {
        "train": train,
        "valid": walks[:, -2],
        "histories": train.append(histories(walks[:, -2:-1])),
        "test": walks[:, -1],
        "vectors": vectors,
    }


@pytest.fixture(scope="module")
def trained(world) -> dict:
    "Every trained baseline, once."
    return {
        name: learn(world["train"], world["valid"], fit=BRIEF, vectors=world["vectors"])
        for name, learn in TRAINED.items()
    }


def mrr(scorer, world) -> float:
    "Over the whole catalogue, on the test events."
    return summarise(full_ranks(scorer, world["histories"], world["test"]))["mrr"]


def weights(scorer) -> dict[str, torch.Tensor]:
    "A copy of a scorer's weights."
    return {name: value.clone() for name, value in scorer.model.state_dict().items()}


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_baseline_beats_popularity(world, trained, name):
    assert mrr(trained[name], world) > 1.5 * mrr(popularity(world["train"]), world)


@pytest.mark.parametrize("name", COUNTED)
def test_a_counted_baseline_beats_popularity(world, name):
    assert mrr(COUNTED[name](world["train"], world["vectors"]), world) > 1.5 * mrr(
        popularity(world["train"]), world
    )


@pytest.mark.parametrize("name", TRAINED)
def test_the_best_epoch_is_kept(world, trained, name):
    scorer = trained[name]
    found = validation_figures(scorer, world["train"], world["valid"])["mrr"]
    assert found == pytest.approx(max(row["mrr"] for row in scorer.log), abs=1e-6)
    assert not scorer.model.training


@pytest.mark.parametrize("name", TRAINED)
def test_a_seed_gives_the_same_weights_and_another_seed_gives_others(world, name):
    def learn(seed):
        return weights(
            TRAINED[name](
                world["train"],
                world["valid"],
                fit=FitConfig(epochs=1, lr=1e-2, seed=seed),
                vectors=world["vectors"],
            )
        )

    torch.manual_seed(99)
    first = learn(3)
    torch.rand(7)  # what was drawn before does not matter
    second, other = learn(3), learn(4)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", TRAINED)
def test_the_valid_targets_choose_the_epoch_and_touch_no_weight(world, name):
    def learn(targets):
        return TRAINED[name](
            world["train"], targets, fit=FitConfig(epochs=1, lr=1e-2), vectors=world["vectors"]
        )

    one, other = learn(world["valid"]), learn(np.roll(world["valid"], 1))
    assert all(torch.equal(a, b) for a, b in zip(weights(one).values(), weights(other).values(), strict=True))
    assert one.log[0]["mrr"] != other.log[0]["mrr"]


@pytest.mark.parametrize("name", TRAINED)
def test_scores_of_a_user_do_not_depend_on_the_batch(world, trained, name):
    together = trained[name](world["histories"], np.arange(N_USERS))
    one_by_one = torch.cat(
        [trained[name](world["histories"], np.array([user])) for user in (0, 17, N_USERS - 1)]
    )
    assert together.shape == (N_USERS, N_ITEMS) and together.dtype == torch.float32
    torch.testing.assert_close(one_by_one, together[[0, 17, N_USERS - 1]], rtol=1e-4, atol=1e-4)


def test_bpr_alone_does_not_read_the_history(world, trained):
    everybody = np.arange(N_USERS)
    for name, scorer in trained.items():
        same = torch.equal(scorer(world["train"], everybody), scorer(world["histories"], everybody))
        assert same == (name == "bpr"), name


@pytest.mark.parametrize("source", ["vectors", "both"])
@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda v: v[:-1], rf"got shape \({N_ITEMS - 1}, 8\)"),
        (lambda v: v[:, 0], rf"got shape \({N_ITEMS},\)"),
        (lambda v: None, "got none"),
        (lambda v: np.where(np.arange(N_ITEMS)[:, None] == 1, np.inf, v), "not finite"),
    ],
)
def test_vectors_that_do_not_fit_raise_one_clear_error(world, source, spoil, said):
    with pytest.raises(
        ValueError, match=rf"source '{source}' needs vectors of shape \({N_ITEMS}, D\).*{said}"
    ):
        sasrec(
            world["train"],
            world["valid"],
            SASRecConfig(**SMALL, source=source),
            BRIEF,
            spoil(world["vectors"]),
        )


def test_ids_do_not_read_the_vectors(world):
    brief = FitConfig(epochs=1, lr=1e-2)
    without, given = (
        sasrec(world["train"], world["valid"], SASRecConfig(**SMALL), brief, vectors)
        for vectors in (None, world["vectors"])
    )
    assert all(
        torch.equal(a, b) for a, b in zip(weights(without).values(), weights(given).values(), strict=True)
    )


def test_the_frozen_vectors_stay_frozen(world, trained):
    table = trained["sasrec_vectors"].model.items
    centred = world["vectors"] - world["vectors"].mean(0)
    expected = torch.tensor(centred / np.sqrt((centred**2).sum(1).mean()), dtype=torch.float32)
    torch.testing.assert_close(table.vectors, expected, rtol=1e-5, atol=1e-6)
    assert "items.vectors" not in dict(trained["sasrec_vectors"].model.named_parameters())


def test_only_vectors_tell_items_apart_that_train_never_saw(world, trained):
    "A new item with the vector of a known one is scored like it."
    vectors = world["vectors"].copy()
    vectors[-1] = vectors[4]
    twin = sasrec(world["train"], world["valid"], SASRecConfig(**SMALL, source="vectors"), BRIEF, vectors)
    scores = twin(world["histories"], np.arange(N_USERS))
    torch.testing.assert_close(scores[:, -1], scores[:, 4])
    of_ids = trained["sasrec"](world["histories"], np.arange(N_USERS))
    assert (of_ids[:, -1] - of_ids[:, 4]).abs().max() > 1
