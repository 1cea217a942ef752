"""What the recommender says is what the evaluation ranked: on the toy, and on real artefacts where the
pipeline has left them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from unirec import cli
from unirec.core.params import read_params, write_params
from unirec.evaluation.metrics import full_ranks
from unirec.model.forms import MODELS
from unirec.pipeline.artefacts import check_settings
from unirec.pipeline.recommend import Recommender, model_names
from unirec.pipeline.runner import stage_params


@pytest.fixture(scope="module", params=["unirec", "unirec_id"])
def toy(request, toy_project):
    root, params = toy_project
    return Recommender.load("toy", request.param, root, params), root


def test_ranks_are_those_of_the_evaluation(toy):
    r, root = toy
    written = pd.read_parquet(root / "predictions" / "toy" / "ranks.parquet")
    assert [r.rank(u) for u in r.users] == written[written.model == r.model].sort_values("user").full.tolist()


@pytest.mark.parametrize("model", [name for name in model_names() if name not in MODELS])
def test_opponents_rank_as_in_the_evaluation(model, toy_project):
    root, params = toy_project
    r, written = (
        Recommender.load("toy", model, root, params),
        pd.read_parquet(root / "predictions" / "toy" / "ranks.parquet"),
    )
    assert (
        full_ranks(r.scorer, r.histories, r.targets).tolist()
        == written[written.model == model].sort_values("user").full.tolist()
    )
    assert len(r.user(r.users[0], top=3)) == 3 and "attention" not in r.user(r.users[0])


def test_the_place_in_the_list_is_the_rank_and_the_history_is_left_out(toy):
    r, _ = toy
    places = 0
    for u, user in enumerate(r.users):
        table, seen = (
            r.user(user, top=len(r.data.items)),
            set(r.histories.items[r.histories.offsets[u] : r.histories.offsets[u + 1]].tolist()),
        )
        assert len(table) == len(r.data.items) - len(seen) and not set(table.item_id) & set(
            r.data.items.item_id.iloc[sorted(seen)]
        )
        assert table.hit.sum() == (r.targets[u] not in seen) and table.score.is_monotonic_decreasing
        if table.hit.any():
            assert table.place[table.hit].iloc[0] == r.rank(user)
            places += 1
    assert places > 10


def test_a_list_of_items_is_a_user(toy):
    """The same events, given as a list with times and ratings, give the same list (reviews are not asked
    for)."""
    r, _ = toy
    mute = replace(r, histories=replace(r.histories, reviews=np.full(len(r.histories.items), -1)))
    for u in (0, 7):
        part = slice(r.histories.offsets[u], r.histories.offsets[u + 1])
        known = mute.user(r.users[u]).drop(columns="hit")
        new = r.history(
            r.data.items.item_id.iloc[r.histories.items[part]].tolist(),
            times=r.histories.times[part].tolist(),
            ratings=r.histories.ratings[part].tolist(),
        )
        pd.testing.assert_frame_equal(known, new)


def test_a_new_item_ranks_as_if_it_were_in_the_catalogue(toy):
    """A cold item of the catalogue, given once more as attributes: its score is that of the old one, so it
    stands beside it."""
    r, root = toy
    cold = int(np.flatnonzero(~r.data.catalogue.in_train.numpy())[0])
    row = r.data.items.iloc[cold]
    given = {"title": row.title, "brand": list(row.brand)} | (
        {"price": row.price} if row.price == row.price else {}
    )
    # the given one has none
    r.data.catalogue.mask[
        cold, r.data.catalogue.attr[cold] == r.data.catalogue.attributes.index("picture")
    ] = False
    try:
        fresh = replace(r, scorer=r.net.scorer())
    finally:
        r.data.catalogue.mask[
            cold, r.data.catalogue.attr[cold] == r.data.catalogue.attributes.index("picture")
        ] = isinstance(row.picture, str)
    table = fresh.new_item(given, top=len(r.users)).set_index("user_id")
    assert len(table) == len(r.users) and table["rank"].is_monotonic_increasing
    for u in r.users[:5]:
        listed = fresh.user(u, top=len(r.data.items)).set_index("item_id")
        assert abs(listed.score[row.item_id] - table.score[u]) < 0.01
        # the old one's score is equal to rounding, which side it falls on is chance
        assert abs(fresh.new_item(given, user=u)["rank"][0] - table["rank"][u]) <= 1


@pytest.mark.parametrize(
    "ask, message",
    [
        (lambda r: r.user("nobody"), "user 'nobody' is unknown"),
        (lambda r: r.history(["x"]), "item 'x' is unknown"),
        (lambda r: r.history([]), "at least one item id"),
        (lambda r: r.history("abc"), "a list of at least one item id"),
        (lambda r: r.history(r.data.items.item_id[:2].tolist(), times=[1]), "1 times for 2 items"),
        (lambda r: r.history(r.data.items.item_id[:2].tolist(), times=[2, 1]), "not ordered"),
        (lambda r: r.user(r.users[0], top=0), "top 0"),
        (lambda r: r.new_item({"weight": 3}, top=-1), "top -1"),
        (
            lambda r: r.new_item({"price": 3}, user=r.users[0], items=r.data.items.item_id[:2].tolist()),
            "user and items: give one",
        ),
        (lambda r: r.similar(None, top=0), "top 0"),
        (lambda r: r.new_item({"weight": 3}), "attribute 'weight' is unknown"),
        (lambda r: r.new_item({}), "at least one attribute"),
        (lambda r: r.new_item({"price": "cheap"}), "'price': 'cheap' is no number"),
        (lambda r: r.new_item({"rating_number": 5}), "computed from events of train"),
        (lambda r: r.new_item({"price": ["1", "2"]}), "attribute 'price': 2 values, expected one number"),
        (lambda r: r.new_item({"title": {"x": 1}}), "attribute 'title': .* is no text"),
        (lambda r: r.new_item({"brand": "   "}), "at least one attribute"),
        (lambda r: r.new_item({"picture": ["a", "b"]}), "attribute 'picture': 2 values, expected one image"),
        (lambda r: r.new_item({"price": "1_000"}), "attribute 'price': '1_000' is no number"),
        (lambda r: r.new_item({"price": -5}), "attribute 'price': -5 is no number from 0"),
    ],
)
def test_bad_questions_get_one_clear_error(ask, message, toy):
    with pytest.raises(ValueError, match=message):
        ask(toy[0])


def test_missing_artefacts_name_their_stage(tmp_path, toy_project):
    root, params = toy_project
    for folder in ("prepared", "embeddings"):
        (tmp_path / folder).symlink_to(root / folder)
    with pytest.raises(
        FileNotFoundError, match="unirec.safetensors: not there yet; the stage finetune writes it"
    ):
        Recommender.load("toy", root=tmp_path, params=params)
    assert Recommender.load("toy", "popularity", tmp_path, params).user(
        Recommender.load("toy", "popularity", tmp_path, params).users[0]
    ).place.tolist() == list(range(1, 11))
    with pytest.raises(FileNotFoundError, match="params.yaml: there is no such file"):
        Recommender.load("toy", root=tmp_path)


@pytest.fixture
def project(toy_project, tmp_path) -> tuple[Path, dict]:
    "A project's folder with copies of the toy's artefacts, its params.yaml, and what the stages ran with."
    made, params = toy_project
    for name in ("prepared", "embeddings", "models"):
        shutil.copytree(made / name, tmp_path / name)
    (tmp_path / "reports" / "runs" / "toy").mkdir(parents=True)
    for stage in ("prepare", "embed", "pretrain", "finetune"):
        (tmp_path / "reports" / "runs" / "toy" / f"run_{stage}.json").write_text(
            json.dumps({"params": stage_params(params, stage, "toy")})
        )
    write_params(tmp_path, params)
    return tmp_path, params


def last_error(project: Path, capsys) -> str:
    "The one line that `unirec recommend` ends with."
    assert cli.main(["recommend", "--dataset", "toy", "--root", str(project), "--user", "x"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.splitlines()[-1].startswith("unirec: error: ")
    return err.splitlines()[-1]


@pytest.mark.parametrize(
    "path, value, expected",
    [
        (
            "llm.layers",
            3,
            "models/toy was trained with other settings (llm.layers: 2, now 3); run `dvc repro`",
        ),
        ("llm.prompt", "Once", "now Once); run"),
        ("llm.alpha", 16, "(llm.alpha: 8, now 16)"),
        ("sets.toy.schema.price.type", "text", "price.type: number, now text"),
        ("sets.toy.schema.price.scale", "linear", "price.scale: log, now linear"),
        ("sets.toy.title", "another name", "user 'x' is unknown"),
    ],
)
def test_a_model_of_other_settings_does_not_answer(path, value, expected, project, capsys):
    root, params = project
    changed = at = json.loads(json.dumps(params))
    *parents, last = path.split(".")
    for name in parents:
        at = at[name]
    at[last] = value
    write_params(root, changed)
    assert expected in last_error(root, capsys)


@pytest.mark.parametrize(
    "name, change, expected",
    [
        (
            "models/toy/finetune/unirec.safetensors",
            lambda p: p.write_bytes(b""),
            "unirec.safetensors: cut or damaged",
        ),
        ("embeddings/toy/manifest.json", lambda p: p.write_text("{"), "manifest.json: cut or damaged"),
        (
            "prepared/toy/test.parquet",
            lambda p: p.write_bytes(p.read_bytes()[:-9]),
            "test.parquet: cut or damaged",
        ),
        ("prepared/toy/train.parquet", lambda p: pd.read_parquet(p)[:-1].to_parquet(p), "train.parquet"),
        (
            "prepared/toy/train.parquet",
            lambda p: pd.read_parquet(p).drop(columns="timestamp").to_parquet(p),
            "train.parquet: column timestamp is missing",
        ),
        ("prepared/toy/users.parquet", lambda p: pd.read_parquet(p)[::-1].to_parquet(p), "users.parquet"),
        (
            "prepared/toy/test.parquet",
            lambda p: pd.read_parquet(p).sample(frac=1, random_state=0).to_parquet(p),
            "test.parquet: expected the users",
        ),
        ("params.yaml", lambda p: p.write_text(""), "params.yaml: expected a mapping"),
        ("params.yaml", lambda p: p.write_text("- a"), "params.yaml: expected a mapping"),
        ("params.yaml", lambda p: p.write_text("a: {"), "params.yaml, row 1: not YAML"),
        ("params.yaml", lambda p: p.write_text("seed: 0"), "params.yaml: the block 'encode' is missing"),
        ("params.yaml", lambda p: p.write_text("sets: {}"), "a data set is a file sets/<name>.yaml"),
        # which is not read
        ("prepared/toy/candidates.npy", lambda p: p.write_bytes(b""), "user 'x' is unknown"),
    ],
)
def test_damaged_artefacts_are_named_in_one_line(name, change, expected, project, capsys):
    root, _ = project
    change(root / name)
    assert expected in last_error(root, capsys)


@pytest.mark.parametrize("dataset", ["sample", "movielens"])
def test_ranks_of_the_real_runs(dataset, root):
    """Where `make repro` has run: the ranks it wrote, of some users.

    The artefacts have to be those of params.yaml.
    """
    made = root / "predictions" / dataset / "ranks.parquet"
    if not made.is_file() or not (root / "models" / dataset / "finetune").is_dir():
        pytest.skip("the pipeline has not run here")
    try:
        check_settings(Path(root), dataset, read_params(root))
    except ValueError as error:
        pytest.skip(f"params.yaml has changed since the pipeline ran: {error}")
    written = pd.read_parquet(made)
    for model in MODELS:
        r = Recommender.load(dataset, model, Path(root))
        chosen = np.random.default_rng(0).choice(len(r.users), 25, replace=False)
        wanted = written[written.model == model].sort_values("user").full.to_numpy()[chosen]
        assert [r.rank(r.users[u]) for u in chosen] == wanted.tolist()
