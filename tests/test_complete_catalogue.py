"""A shop that keeps its data well: every item has every attribute, and all stages run to the page."""

import json

import numpy as np
import pandas as pd
import pytest

from unirec.data.prepare import prepare
from unirec.data.schema import SetSpec
from unirec.encoders.catalogue import load, load_test
from unirec.encoders.modalities import register_encoder, unregister_encoder
from unirec.evaluation.breakdowns import by_group, target_groups
from unirec.pipeline.evaluate import evaluate
from unirec.pipeline.stages import embed, finetune, pretrain, toy_params
from unirec.report.page import build_page

ITEMS, USERS, EVENTS = 24, 30, 7
TITLE = {"type": "text", "source": "title"}
BRAND = {"type": "category", "source": "brand"}
PRICE = {"type": "number", "source": "price"}
GAPS = {"type": "text", "source": "gaps"}
EMPTY = {"type": "text", "source": "empty"}
PHOTO = {"type": "image", "source": "photo"}
CLIP = {"type": "clip", "source": "clip"}


def shop(root, schema):
    "A shop in two csv files, prepared; returns its specification and the parameters of a toy run."
    raw = root / "raw"
    raw.mkdir()
    numbers = range(ITEMS)
    pd.DataFrame(
        {
            "item_id": [f"i{i}" for i in numbers],
            "title": [f"Soap number {i}" for i in numbers],
            "brand": [f"Brand {i % 4}" for i in numbers],
            "price": [1.5 + i for i in numbers],
            "gaps": [None if i % 3 == 0 else f"Soap {i}" for i in numbers],
            "empty": [None] * ITEMS,
            "photo": [f"images/{i}.png" for i in numbers],
            "clip": [f"clips/{i}.wav" for i in numbers],
        }
    ).to_csv(raw / "items.csv", index=False)
    pd.DataFrame(
        [
            (f"u{u}", f"i{(u + k) % ITEMS}", 4, 1_600_000_000 + 86_400 * (u + k))
            for u in range(USERS)
            for k in range(EVENTS)
        ],
        columns=["user_id", "item_id", "rating", "timestamp"],
    ).to_csv(raw / "interactions.csv", index=False)
    params = toy_params()
    params["encode"]["cache"] = None
    params["pretrain"]["fit"]["epochs"] = 1
    params["sets"] = {
        "shop": {
            "format": "table",
            "source": str(raw),
            "files": "items",
            "schema": schema,
            "k_core_users": 3,
            "k_core_items": 1,
        }
    }
    spec = SetSpec.from_params("shop", params["sets"]["shop"])
    prepare(raw, spec, root / "prepared", 5, 0)
    return spec, params


def embedded(root, schema):
    "The shop's data as training sees them, and its parameters."
    spec, params = shop(root, schema)
    embed(root / "prepared", root / "raw", spec, params["encode"], root / "embeddings")
    return load(root / "prepared", root / "embeddings", spec), params


@pytest.mark.parametrize(
    "schema, lacking",
    [
        ({"title": TITLE, "brand": BRAND, "price": PRICE}, []),
        ({"brand": BRAND}, []),
        ({"price": PRICE}, []),
        ({"title": GAPS, "brand": BRAND}, ["no title"]),
        ({"title": GAPS}, ["no title", "no text at all"]),
    ],
    ids=["three complete", "a category", "a number", "one with gaps", "gaps alone"],
)
def test_targets_are_grouped_by_what_some_items_lack_and_some_have(tmp_path, schema, lacking):
    data, _ = embedded(tmp_path, schema)
    histories, targets, _, _ = load_test(tmp_path / "prepared", data)
    groups = target_groups(data.train, histories, targets, data.catalogue)
    assert list(groups) == ["target", "popularity", "history", *lacking]
    assert len(groups) == USERS and not groups.isna().any(axis=None)
    for column in lacking:
        assert groups[column].tolist() == (targets % 3 == 0).tolist()
    table = by_group(np.ones(USERS), groups, draws=10)
    assert (table.groupby("group").users.sum() == USERS).all()


def test_a_catalogue_in_which_nothing_is_lacking_runs_to_the_page(tmp_path):
    data, params = embedded(tmp_path, {"title": TITLE})
    models, results, predictions = tmp_path / "models", tmp_path / "results", tmp_path / "predictions"
    pretrain(data, params, models / "pretrain")
    finetune(data, params, models / "pretrain", models / "finetune")
    evaluate(
        data,
        tmp_path / "prepared",
        models,
        tmp_path / "raw",
        params,
        results / "shop",
        predictions / "shop",
    )
    found = pd.read_csv(results / "shop" / "breakdowns.csv")
    assert set(found.group) == {"target", "popularity", "history"}
    # one modality alone: there is no other one that an item's text could find
    assert pd.read_csv(results / "shop" / "retrieval.csv").empty
    (results / "shop" / "run_evaluate.json").write_text(json.dumps({"stage": "evaluate", "seconds": 1.0}))
    page = build_page(
        results, predictions, tmp_path / "page.html", sets=params["sets"], budget="toy", audience="local"
    )
    assert page["datasets"] == ["shop"] and (tmp_path / "page.html").stat().st_size == page["bytes"]


def test_a_catalogue_in_which_everything_is_lacking_stops_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"shop: no item has a value of any attribute \(title\)"):
        embedded(tmp_path, {"title": EMPTY})


def count_bytes(contents):
    "A made-up encoder of files: (n, 1)."
    return np.array([[len(content)] for content in contents], np.float32)


def test_files_of_which_none_is_read_stop_the_stage(tmp_path):
    register_encoder("clip", "sound", lambda encode: count_bytes, files=True)
    try:
        with pytest.raises(ValueError, match=r"shop: attribute 'clip' names 24 files .*`images/`"):
            embedded(tmp_path, {"title": TITLE, "clip": CLIP})
        (tmp_path / "read").mkdir()
        spec, params = shop(tmp_path / "read", {"clip": CLIP})
        folder = tmp_path / "read" / "raw" / "clips"
        folder.mkdir()
        for i in range(ITEMS):
            (folder / f"{i}.wav").write_bytes(b"sound")
        embed(tmp_path / "read/prepared", folder.parent, spec, params["encode"], tmp_path / "read/embeddings")
    finally:
        unregister_encoder("clip")


@pytest.mark.parametrize(
    "schema", [{"title": TITLE, "photo": PHOTO}, {"photo": PHOTO}], ids=["title", "none"]
)
def test_pictures_that_were_not_brought_are_reported(tmp_path, capsys, schema):
    spec, params = shop(tmp_path, schema)
    folders = tmp_path / "prepared", tmp_path / "raw"
    if "title" in schema:
        embed(*folders, spec, params["encode"], tmp_path / "embeddings")
        assert "warning: shop: attribute 'photo' names 24 files" in capsys.readouterr().out
        (tmp_path / "raw" / "images").mkdir()
        (tmp_path / "raw" / "images" / "other.png").write_bytes(b"of another item")
    with pytest.raises(ValueError, match="shop: attribute 'photo' names 24 files"):
        embed(*folders, spec, params["encode"], tmp_path / "embeddings")
