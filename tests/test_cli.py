"""The command line, in a process of its own and in this one, on miniature tables."""

import importlib
import json
import os
import subprocess
import sys
import tomllib

import numpy as np
import pandas as pd
import pytest
import yaml

from unirec import cli
from unirec.core.params import write_params
from unirec.data.schema import PRESETS, Schema, SetSpec, read_schema
from unirec.pipeline import commands

ITEMS, USERS, LENGTH, DAY = 12, 8, 6, 86_400
THINGS = pd.DataFrame(
    {
        "item_id": [f"t{i}" for i in range(ITEMS)],
        "name": [f"thing number {i} of a made-up shop" for i in range(ITEMS)],
        "kind": ["cup", "pot", "jug"] * 4,
        "price": [1.5 * i + 1 for i in range(ITEMS)],
    }
)
VISITS = pd.DataFrame(
    [
        (f"c{u}", f"t{(u + k) % ITEMS}", 1_600_000_000 + DAY * (10 * k + u), 4)
        for u in range(USERS)
        for k in range(LENGTH)
    ],
    columns=["user_id", "item_id", "timestamp", "rating"],
)
WRITE = {
    "csv": lambda t, p: t.to_csv(p, index=False),
    "jsonl": lambda t, p: t.to_json(p, orient="records", lines=True),
    "parquet": lambda t, p: t.to_parquet(p),
}


@pytest.fixture
def shop(tmp_path):
    "A folder with a table of things and one of visits, and a schema beside it."
    raw = tmp_path / "shop"
    raw.mkdir()
    WRITE["csv"](THINGS, raw / "items.csv"), WRITE["csv"](VISITS, raw / "interactions.csv")
    (tmp_path / "schema.yaml").write_text(
        "name: {type: text}\nkind: {type: category}\nprice: {type: number}\nrating_number: {type: number,"
        " source: 'train:count', scale: log}\n"
    )
    return tmp_path


def options(folder, *more, out="prepared"):
    "The words of `unirec prepare` for the miniature shop."
    return [
        str(w)
        for w in (
            "prepare",
            "--format",
            "table",
            "--raw",
            folder / "shop",
            "--out",
            folder / out,
            "--schema",
            folder / "schema.yaml",
            "--k-core-items",
            1,
            "--negatives",
            3,
            *more,
        )
    ]


def run(root, *words):
    "`unirec` in a process of its own."
    return subprocess.run(
        [sys.executable, "-m", "unirec.cli", *map(str, words)],
        text=True,
        capture_output=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(root)},
        cwd=root.parent,
    )


def test_the_console_script_is_the_command(root):
    scripts = tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["unirec"].partition(":")
    assert getattr(importlib.import_module(module), name) is cli.main


def test_a_draft_is_written_and_used_in_processes_of_their_own(root, shop):
    made = run(root, "schema", "propose", shop / "shop" / "items.csv")
    assert made.returncode == 0 and not made.stderr
    (shop / "schema.yaml").write_text(made.stdout)
    assert [(a.name, a.type) for a in read_schema(shop / "schema.yaml")] == [
        ("name", "text"),
        ("kind", "category"),
        ("price", "number"),
    ]
    done = run(root, *options(shop))
    assert done.returncode == 0, done.stderr
    assert "rows read" in done.stdout and "Split: leave_one_out" in done.stdout
    items = pd.read_parquet(shop / "prepared" / "items.parquet")
    assert (
        items.kind.map(list).tolist() == [[k] for k in THINGS.kind]
        and items.price.tolist() == THINGS.price.tolist()
    )
    assert json.loads((shop / "prepared" / "quality.json").read_text())["rows_read"] == len(VISITS)


@pytest.mark.parametrize(
    "words, message",
    [
        (["schema", "propose", "nowhere.csv"], "nowhere.csv: there is no such file"),
        (
            ["prepare", "--format", "table", "--raw", ".", "--out", "x"],
            "no schema: give --schema FILE or --preset NAME",
        ),
        (["prepare", "--format", "fax", "--raw", ".", "--out", "x"], "invalid choice: 'fax'"),
        (["fly"], "invalid choice: 'fly'"),
        ([], "COMMAND"),
    ],
)
def test_bad_input_ends_with_two_and_no_traceback(root, words, message):
    done = run(root, *words)
    assert (
        done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr and not done.stdout
    )
    assert done.stderr.splitlines()[-1].startswith("unirec") and "error: " in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["schema", "propose", "--help"],
        ["schema", "preset", "--help"],
        *([name, "--help"] for name in cli.COMMANDS),
    ],
)
def test_help_says_what_every_option_is(words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 0 and "usage: unirec" in capsys.readouterr().out
    here = cli.parser(words[0])
    for word in words[:-1]:
        here = next(a for a in here._actions if getattr(a, "choices", None) and word in a.choices).choices[
            word
        ]
    assert all(a.help or a.choices for a in here._actions), "an option without a word of help"


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_printed_as_a_schema(name, capsys):
    assert cli.main(["schema", "preset", name]) == 0
    assert Schema.from_params(yaml.safe_load(capsys.readouterr().out)) == PRESETS[name].schema


@pytest.mark.parametrize("suffix", WRITE)
def test_all_kinds_of_tables_give_the_same(suffix, shop, capsys):
    assert cli.main(options(shop)) == 0
    for path in (shop / "shop").iterdir():
        path.unlink()
    (
        WRITE[suffix](THINGS, shop / "shop" / f"items.{suffix}"),
        WRITE[suffix](VISITS, shop / "shop" / f"interactions.{suffix}"),
    )
    assert cli.main(options(shop, out="again")) == 0
    for name in ("items", "users", "train", "valid", "test"):
        pd.testing.assert_frame_equal(
            pd.read_parquet(shop / "prepared" / f"{name}.parquet"),
            pd.read_parquet(shop / "again" / f"{name}.parquet"),
        )
    first, second = capsys.readouterr().out.split("rows read")[1:]
    assert first == second


def test_other_formats_find_their_files(tmp_path, capsys):
    atomic, amazon = tmp_path / "atomic", tmp_path / "amazon"
    atomic.mkdir(), amazon.mkdir()
    typed = {
        "user_id": "user_id:token",
        "item_id": "item_id:token",
        "timestamp": "timestamp:float",
        "rating": "rating:float",
        "name": "name:token_seq",
        "kind": "kind:token",
        "price": "price:float",
    }
    for table, suffix in ((THINGS, "item"), (VISITS, "inter")):
        table.rename(columns=typed).to_csv(atomic / f"mini.{suffix}", sep="\t", index=False)
    THINGS.rename(columns={"item_id": "parent_asin", "name": "title"}).to_json(
        amazon / "meta_Mini.jsonl", orient="records", lines=True
    )
    VISITS.assign(timestamp=VISITS.timestamp * 1000).rename(columns={"item_id": "parent_asin"}).to_json(
        amazon / "Mini.jsonl", orient="records", lines=True
    )
    (tmp_path / "schema.yaml").write_text("name: {type: text}\n")
    core = ["--k-core-items", "1", "--negatives", "3"]
    assert (
        cli.main(
            [
                "prepare",
                "--format",
                "recbole",
                "--raw",
                str(atomic),
                "--out",
                str(tmp_path / "a"),
                "--schema",
                str(tmp_path / "schema.yaml"),
                *core,
            ]
        )
        == 0
    )
    assert (
        cli.main(
            [
                "prepare",
                "--format",
                "amazon2023",
                "--raw",
                str(amazon),
                "--out",
                str(tmp_path / "b"),
                "--preset",
                "beauty",
                *core,
            ]
        )
        == 0
    )
    assert (
        json.loads((tmp_path / "a" / "spec.json").read_text())["files"] == "mini"
        and json.loads((tmp_path / "b" / "spec.json").read_text())["files"] == "Mini"
    )
    one, two = (pd.read_parquet(tmp_path / f / "train.parquet") for f in "ab")
    assert one[["user", "item", "timestamp"]].equals(two[["user", "item", "timestamp"]])
    assert list(pd.read_parquet(tmp_path / "b" / "items.parquet").columns) == [
        "item_id",
        *PRESETS["beauty"].schema.names,
    ]
    (amazon / "meta_Other.jsonl").write_text("")
    assert (
        cli.main(
            [
                "prepare",
                "--format",
                "amazon2023",
                "--raw",
                str(amazon),
                "--out",
                str(tmp_path / "b"),
                "--preset",
                "beauty",
                *core,
            ]
        )
        == 2
    )
    assert "found Mini, Other; name it with --files" in capsys.readouterr().err


def test_options_reach_the_tables(shop, capsys):
    def prepared(*more):
        assert cli.main(options(shop, *more)) == 0
        frames = {p.stem: pd.read_parquet(p) for p in (shop / "prepared").glob("*.parquet")}
        return (
            frames,
            np.load(shop / "prepared" / "candidates.npy"),
            json.loads((shop / "prepared" / "quality.json").read_text()),
        )

    plain, drawn, _ = prepared()
    assert len(plain["test"]) == USERS and drawn.shape == (USERS, 4) and "left_out" not in plain
    _, other, _ = prepared("--seed", 1)
    assert not np.array_equal(drawn, other) and np.array_equal(drawn[:, 0], other[:, 0])
    last, drawn, quality = prepared("--split", "last_k", "--k", 2)
    assert len(last["test"]) == 2 * USERS == len(drawn) and quality["split"] == "last_k"
    touched = VISITS.groupby("user_id").item_id.agg(set)
    for user, row in zip(last["test"].user, drawn):
        assert not set(last["items"].item_id[row[1:]]) & touched[last["users"].user_id[user]]
    timed, _, quality = prepared("--split", "by_time", "--cuts", "2020-10-13", "2020-10-28")
    assert timed["train"].timestamp.max() < pd.Timestamp("2020-10-13").timestamp() * 1000 <= timed[
        "valid"
    ].timestamp.min() and sum(
        map(len, (timed["train"], timed["valid"], timed["test"], timed["left_out"]))
    ) == len(VISITS)
    assert quality["test_users"] == timed["test"].user.nunique() and quality["split_options"] == {
        "cuts": ["2020-10-13", "2020-10-28"]
    }
    assert "left_out" not in prepared()[0], "what another rule wrote is gone"
    again = pd.concat([VISITS, VISITS.head(3).assign(timestamp=VISITS.timestamp + 5)])
    WRITE["csv"](again, shop / "shop" / "interactions.csv")
    assert prepared("--repeats", "first")[2]["dropped"] == {"event of a repeated pair": 3} and prepared()[2][
        "rows_kept"
    ] == len(again)
    WRITE["csv"](VISITS.assign(timestamp=VISITS.timestamp * 1000), shop / "shop" / "interactions.csv")
    assert prepared("--time-unit", "ms")[0]["train"].equals(plain["train"])
    WRITE["csv"](VISITS.assign(timestamp=7), shop / "shop" / "interactions.csv")
    shuffled = prepared("--ties", "shuffled")
    assert (
        not shuffled[0]["test"].equals(prepared()[0]["test"])
        and shuffled[2]["ties"] == "shuffled"
        and shuffled[2]["tied_events"] == len(VISITS)
    )
    capsys.readouterr()


def test_what_was_prepared_can_stand_in_params(shop, capsys):
    assert cli.main(options(shop)) == 0
    spec = SetSpec.from_params("shop", json.loads((shop / "prepared" / "spec.json").read_text()))
    assert (
        spec.schema == read_schema(shop / "schema.yaml") and spec.k_core_items == 1 and spec.files == "items"
    )


@pytest.mark.parametrize(
    "more, message",
    [
        (["--split", "random"], "split 'random' is unknown"),
        (["--split", "last_k", "--cuts", "1", "2"], "--cuts belongs to --split by_time, not to last_k"),
        (["--cuts", "soon", "later", "--split", "by_time"], "'soon' is no moment"),
        (["--k-core-users", "99"], "no event is left after the k-core"),
        (["--negatives", "99"], "lower evaluate.negatives (--negatives"),
        (["--schema", "no.yaml"], "no.yaml"),
        (["--raw", "nowhere"], "nowhere: there is no such folder"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(shop, more, message, capsys):
    assert cli.main(options(shop, *more)) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and err.startswith("unirec: error: ")


def test_the_raw_folder_is_never_written_into(shop, capsys):
    words = options(shop)
    words[words.index("--out") + 1] = str(shop / "shop" / ".." / "shop")
    before = {p.name: p.read_bytes() for p in (shop / "shop").iterdir()}
    assert cli.main(words) == 2 and "the raw folder itself" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in (shop / "shop").iterdir()} == before


def test_two_tables_of_one_kind_are_refused(shop, capsys):
    WRITE["jsonl"](THINGS, shop / "shop" / "items.jsonl")
    assert (
        cli.main(options(shop)) == 2 and "items.jsonl and items.csv are both there" in capsys.readouterr().err
    )


def test_a_draft_reads_the_cells_as_prepare_does(shop, capsys):
    WRITE["csv"](THINGS.assign(brand=["Acme", "NA", "None", "null"] * 3), shop / "shop" / "items.csv")
    assert cli.main(["schema", "propose", str(shop / "shop" / "items.csv")]) == 0
    out = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("brand"))
    assert "4 different values" in out, out


def test_a_review_that_is_a_list_names_its_row(shop, capsys):
    WRITE["parquet"](
        VISITS.assign(review=[["good", "bad"]] * len(VISITS)), shop / "shop" / "interactions.parquet"
    )
    (shop / "shop" / "interactions.csv").unlink()
    assert (
        cli.main(options(shop)) == 2
        and "interactions.parquet, row 1: review ['good', 'bad'] is not a text" in capsys.readouterr().err
    )


def test_a_broken_schema_names_its_file_and_row(shop, capsys):
    (shop / "schema.yaml").write_text("name: {type: text}\nkind: {type: category\n")
    assert cli.main(options(shop)) == 2 and "schema.yaml, row 3: not YAML" in capsys.readouterr().err
    (shop / "schema.yaml").write_text("name: {type: words}\n")
    assert (
        cli.main(options(shop)) == 2
        and "schema.yaml: attribute 'name': type 'words' is unknown" in capsys.readouterr().err
    )


@pytest.fixture(scope="module")
def project(toy_project, tmp_path_factory):
    "A project's folder with the toy's artefacts and a params.yaml, as `unirec recommend` wants it."
    made, params = toy_project
    folder = tmp_path_factory.mktemp("project")
    for name in ("prepared", "embeddings", "models", "predictions"):
        (folder / name).symlink_to(made / name)
    write_params(folder, params)
    return folder


def recommended(project, capsys, *words):
    "What `unirec recommend` prints on the toy."
    assert cli.main(["recommend", "--dataset", "toy", "--root", str(project), *map(str, words)]) == 0
    return capsys.readouterr().out


def test_a_user_gets_a_list_with_reasons(project, capsys):
    user = pd.read_parquet(project / "prepared/toy/users.parquet").user_id.iloc[3]
    out = recommended(project, capsys, "--user", user, "--top", 40)
    lines = out.splitlines()
    assert lines[0].split() == ["place", "item_id", "title", "score", "kind", "nearest", "attention", "hit"]
    ranks = (
        pd.read_parquet(project / "predictions/toy/ranks.parquet")
        .query("model == 'unirec' and user == 3")
        .full
    )
    assert f"its rank is {ranks.iloc[0]:g}." in out and all("%" in line for line in lines[1:20])
    marked = [line for line in lines[1:] if line.rstrip().endswith("*")]
    assert [line.split()[0] for line in marked] in ([f"{ranks.iloc[0]:g}"], []), "the mark stands at the rank"
    assert "score" in recommended(project, capsys, "--user", user, "--model", "popularity", "--top", 1)


def test_new_people_and_new_things(project, capsys, tmp_path):
    items = pd.read_parquet(project / "prepared/toy/items.parquet").item_id.tolist()
    out = recommended(project, capsys, "--history", *items[:3], "--top", 5)
    assert len(out.splitlines()) == 6 and not any(i in out for i in items[:3])
    (tmp_path / "mug.yaml").write_text("title: Blue mug\nbrand: Okomiya\n")
    out = recommended(
        project, capsys, "--item", tmp_path / "mug.yaml", "--attribute", "price=9.5", "--top", 2
    )
    assert (
        "The new item read as: " in out
        and "price" in out.splitlines()[0]
        and out.splitlines()[-3].split() == ["place", "user_id", "rank", "score", "nearest"]
    )
    out = recommended(project, capsys, "--attribute", "title=Blue mug", "--history", *items[:3])
    assert "(this history)" in out.splitlines()[-1]


def test_a_mistyped_model_does_not_wait_for_torch(project):
    script = (
        "import sys, unirec.cli\n"
        "code = unirec.cli.main(sys.argv[1:])\n"
        "print(code, sorted({'torch', 'pandas', 'papermill'} & set(sys.modules)))"
    )
    words = ["recommend", "--dataset", "toy", "--user", "1", "--model", "unirek", "--root", str(project)]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    assert done.stdout == "2 []\n" and "did you mean unirec" in done.stderr


@pytest.mark.parametrize(
    "words, message",
    [
        (["--user", "nobody"], "user 'nobody' is unknown"),
        (["--history", "nothing"], "item 'nothing' is unknown"),
        (["--user", "1", "--model", "sasrec"], "model 'sasrec' is unknown"),
        ([], "for whom?"),
        (["--attribute", "colour"], "expected NAME=VALUE"),
        (["--attribute", "colour=red"], "attribute 'colour' is unknown"),
        (["--item", "nowhere.yaml"], "nowhere.yaml"),
        (["--attribute", "picture=nowhere.png"], "nowhere.png"),
        (["--user", "1", "--dataset", "tyo"], "data set 'tyo' is unknown (1 are known); did you mean toy?"),
        (["--attribute", "title=x", "--model", "markov"], "knows items by their events only"),
    ],
)
def test_a_bad_question_is_one_line(words, message, project, capsys):
    assert cli.main(["recommend", "--dataset", "toy", "--root", str(project), *words]) == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert message in last and last.startswith("unirec: error: ") and not out


def test_the_command_runs_in_a_process_of_its_own(root, project):
    user = pd.read_parquet(project / "prepared/toy/users.parquet").user_id.iloc[0]
    done = run(root, "recommend", "--dataset", "toy", "--user", user, "--top", 3, "--root", project)
    assert (
        done.returncode == 0 and done.stdout.split()[0] == "place" and len(done.stdout.splitlines()) == 6
    ), done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr


def test_words_for_the_terminal_cannot_move_the_cursor():
    table = pd.DataFrame(
        {"place": [1], "title": ["red \x1b[31m alert\nnext line" + "x" * 100], "hit": [True]}
    )
    text = commands.table_text(table)
    assert "\x1b" not in text and len(text.splitlines()) == 2 and "…" in text and text.rstrip().endswith("*")
