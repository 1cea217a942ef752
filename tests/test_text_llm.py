"""Recommenders that read titles: packed is exact, padding and the future change nothing, adapters off is
the frozen model, probe and batches are what they say."""

import numpy as np
import pytest
import torch
from torch import nn

from unirec.baselines.official_code import Released, ReleasedConfig, released_batches, released_loss
from unirec.baselines.titles import (
    TextLLM,
    TextLLMConfig,
    TitleScorer,
    by_length,
    lay_out,
    probe,
    some_users,
    text_loss,
    title_batches,
    title_tokens,
)
from unirec.data.histories import Histories
from unirec.encoders.catalogue import toy_catalogue
from unirec.model.llm import LLMConfig, load_llm

LLM = {"layers": 1, "dropout": 0.0, "dtype": "float32"}  # exact to rounding, which bfloat16 is not
NAMES = [
    f"{colour} {thing}"
    for colour in ("red", "blue", "green")
    for thing in ("shirt", "a pair of wooden shoes", "lamp")
] + [""]


def histories(lengths, seed: int = 0) -> Histories:
    "Random events of users with so many each."
    n, rng = sum(lengths), np.random.default_rng(seed)
    return Histories(
        np.concatenate([[0], np.cumsum(lengths)]),
        rng.integers(len(NAMES), size=n),
        np.arange(n),
        np.full(n, np.nan, np.float32),
        np.full(n, -1),
        len(NAMES),
    )


def shaken(model: nn.Module) -> nn.Module:
    "The model with adapters that do something, as if trained."
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.05)
    return model.eval()


@pytest.fixture(scope="module")
def vectors():
    return np.random.default_rng(0).normal(size=(len(NAMES), 8))


@pytest.fixture(scope="module")
def text(vectors):
    torch.manual_seed(0)
    return shaken(TextLLM(NAMES, vectors, TextLLMConfig(llm=LLM, history=6, out=16)))


@pytest.fixture(scope="module")
def old(vectors):
    torch.manual_seed(0)
    return shaken(
        Released(
            NAMES,
            vectors,
            toy_catalogue(len(NAMES)),
            ReleasedConfig(llm=LLM, history=6, kept=3, width=16, layers=1, out=16),
        )
    )


@torch.no_grad()
def test_packed_is_one_prefix_at_a_time(text):
    items = np.array([[1, 9, 4, 0, 7, 7], [3, 8, 2, -1, -1, -1]])  # an empty title and a repeated one too
    packed = text(text.prompts(items))
    for row, n in ((0, 6), (1, 3)):
        for t in range(1, n + 1):
            torch.testing.assert_close(
                packed[row, t - 1], text.query(items[row : row + 1, :t])[0], atol=1e-5, rtol=0
            )


@torch.no_grad()
@pytest.mark.parametrize("kind", ["text", "old"])
def test_padding_changes_nothing(kind, request):
    model = request.getfixturevalue(kind)
    short, long = np.array([[3, 9, 2]]), np.array([[1, 4, 7, 1, 4, 7]])
    both = np.concatenate([np.pad(short, ((0, 0), (0, 3)), constant_values=-1), long])
    torch.testing.assert_close(model.query(both)[:1], model.query(short), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.query(both)[1:], model.query(long), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_future_changes_no_past_query(text):
    one, other = (text(text.prompts(np.array([[1, 5, 2, *rest]])))[0] for rest in ((3, 4, 8), (8, 0, 1)))
    torch.testing.assert_close(one[:3], other[:3], atol=1e-5, rtol=0)
    assert (one[3:] - other[3:]).abs().max() > 1e-3


@torch.no_grad()
def test_adapters_off_is_the_frozen_model(text):
    frozen, x = load_llm(LLMConfig(**LLM))[0], text.words[text.titles.tokens[:7]][None]
    plain = frozen(
        inputs_embeds=torch.cat([text.prompt[None], x], 1).to(next(frozen.parameters()).dtype)
    ).last_hidden_state.float()
    with text.body.disable_adapter():
        off = text.states(x)
    torch.testing.assert_close(off, plain, atol=1e-5, rtol=0)
    assert (text.states(x) - plain).abs().max() > 1e-3


def test_batches_have_each_position_once_and_follow_the_seed(text):
    train = histories([1, 9, 4, 7])
    config = TextLLMConfig(llm=LLM, history=6, batch_tokens=40)

    def once(seed, epoch):
        return title_batches(train, text.titles, config, seed)(epoch)

    assert sum(b["events"] for b in once(0, 0)) == sum(n - 1 for n in train.lengths)
    same, other = once(0, 0), once(0, 1)
    assert all(torch.equal(a["words"], b["words"]) for a, b in zip(same, once(0, 0), strict=True))
    assert len(same) != len(other) or any(
        a["words"].shape != b["words"].shape or not torch.equal(a["words"], b["words"])
        for a, b in zip(same, other)
    )
    small = title_batches(train, text.titles, TextLLMConfig(llm=LLM, history=6, epoch_tokens=60), 0)(0)
    assert sum(b["tokens"] for b in small) <= 60


def test_the_probe_lowers_the_loss_and_leaves_the_adapters(vectors):
    torch.manual_seed(0)
    model = TextLLM(NAMES, vectors, TextLLMConfig(llm=LLM, history=6, out=16)).eval()
    batches = title_batches(histories([9, 8, 7]), model.titles, model.config, 0)(0)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n.startswith("body.")}
    with torch.no_grad():
        first = sum(float(text_loss(model, b)) for b in batches)
    probe(model, batches, 30, 3e-3, 32)
    with torch.no_grad():
        last = sum(float(text_loss(model, b)) for b in batches)
    assert last < first
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_the_released_way_reads_the_oldest_and_predicts_the_last(old):
    train = histories([12, 3, 1])
    items = train.items[:12]
    assert old.history(train, np.array([0])).tolist() == [items[6:9].tolist()]  # of the last 6 the oldest 3
    batches = released_batches(train, old, 0)(0)
    rows = [(i[i >= 0].tolist(), int(c[0])) for b in batches for i, c in zip(b["items"], b["candidates"])]
    assert sorted(rows) == sorted(
        [(items[5:8].tolist(), int(items[11])), (train.items[12:14].tolist(), int(train.items[14]))]
    )
    assert np.isfinite(float(released_loss(old, batches[0]).detach()))


@torch.no_grad()
def test_item_tokens_reach_the_query(old):
    before = old.query(np.array([[1, 2, 3]])).clone()
    old.item.weight.neg_()
    after = old.query(np.array([[1, 2, 3]]))
    old.item.weight.neg_()
    assert (after - before).abs().max() > 1e-3


def test_the_scorer_keeps_the_order_of_users(text):
    h, scorer = histories([2, 6, 1, 4]), TitleScorer(text, tokens=20)
    all_at_once = scorer(h, np.arange(4))
    assert all_at_once.shape == (4, len(NAMES))
    for user in range(4):
        torch.testing.assert_close(all_at_once[user], scorer(h, np.array([user]))[0], atol=1e-5, rtol=0)


def test_users_and_words():
    h = histories([3, 0, 5, 2])
    known, users = some_users(h, 2, 0)
    assert len(users) == 2 and 1 not in users
    for row, user in enumerate(users):
        assert (
            known.items[known.offsets[row] : known.offsets[row + 1]].tolist()
            == h.items[h.offsets[user] : h.offsets[user + 1]].tolist()
        )
    config = LLMConfig(**LLM)
    _, prompt, _, weights, _ = load_llm(config)
    titles = title_tokens(config.uri, weights, [config.prompt, "x"], 99)
    torch.testing.assert_close(titles.words[titles.tokens[: len(prompt)]], prompt.float())
    assert lay_out(titles, np.array([[1, -1]]))["ends"].tolist() == [[titles.lengths[1] - 1, -1]]
    assert sorted(np.concatenate(by_length(np.array([3, 9, 1, 4, 4]), 6))) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="title 0 is nan"):
        title_tokens(config.uri, weights, [float("nan")], 9)
