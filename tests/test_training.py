"""The training loop: pieces of a batch, several processes, kill and rerun, a loss that is not finite."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import train_toy
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from unirec.training.loop import FitConfig, fit
from unirec.training.step import shard, supervised

CLOCK = ("seconds", "samples_per_second", "tokens_per_second", "memory_mb")
STEPS = 18  # of an uninterrupted run: three epochs of six batches
SCRIPT = Path(train_toy.__file__)


def environment() -> dict:
    "This environment, one thread, and not already part of a group of processes."
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def run(command: list, attempts: dict) -> dict:
    "Run the script; how each attempt ended."
    done = subprocess.run(
        [*command, str(SCRIPT), json.dumps(attempts)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def without_clock(log: list) -> list:
    "The log but for what a clock or the machine's memory says."
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in log]


def result(out: Path, rank: int = 0) -> tuple[bytes, list]:
    "Weights as bytes, and the log without times."
    return Path(f"{out}.{rank}.safetensors").read_bytes(), without_clock(
        json.loads(Path(f"{out}.{rank}.json").read_text())
    )


# --- kill and rerun ---


def killed(folder: Path) -> dict:
    "All attempts of this section: name -> list of attempts; each run has a folder of its own."

    def runs(name, *attempts, **common):
        return {
            name: [
                {
                    "out": str(folder / name),
                    "state": str(folder / f"{name}_state" / "state.safetensors"),
                    "dropout": 0.2,
                    "save_every": 4,
                }
                | common
                | a
                for a in attempts
            ]
        }

    out = {
        name: [{"out": str(folder / name), "dropout": 0.2} | config]
        for name, config in {
            "plain": {},
            "plain_2": {"accumulate": 2},
            "plain_start": {"count_start": True},
        }.items()
    }
    for n in range(1, STEPS + 1):
        out |= runs(f"batch_{n}", {"kill_batch": n}, {})
    for n in (4, 7, 14):
        out |= runs(f"accumulated_{n}", {"kill_batch": n}, {}, accumulate=2, save_every=2)
    for n in (1, 3):
        out |= runs(f"written_{n}", {"kill_write": n}, {}) | runs(
            f"torn_{n}", {"kill_write": n, "torn": True}, {}
        )
    out |= runs("start", {"kill_batch": 10}, {}, count_start=True)
    return (
        out
        | runs("often", *[{"kill_batch": 6}] * 4, {})
        | runs("other_key", {"kill_batch": 10, "key": "before"}, {"key": "after"})
        | runs("in_place", {"kill_batch": 10})
    )


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> tuple[Path, dict]:
    "Every run, killed and rerun in real processes: the folder of results, and how each attempt ended."
    folder = tmp_path_factory.mktemp("killed")
    return folder, run([sys.executable], killed(folder))


def check(ended, name: str, uninterrupted: str = "plain", kills: int = 1) -> str:
    """Killed as planned, and in the end the same bytes, log and an empty folder as an uninterrupted run.

    Returns what the runs said.
    """
    folder, codes = ended
    assert codes[name] == [-9] * kills + [0]
    (weights, log), (expected, expected_log) = result(folder / name), result(folder / uninterrupted)
    assert weights == expected
    assert log == expected_log
    assert not list((folder / f"{name}_state").glob("*"))
    return Path(f"{folder / name}.err").read_text()


@pytest.mark.parametrize("batch", range(1, STEPS + 1))
def test_killed_at_any_step(ended, batch):
    "A state is written every four steps: at most that much is lost, and no bit differs."
    said, last = check(ended, f"batch_{batch}"), (batch - 1) // 4 * 4
    if last:
        assert f"goes on from state.safetensors, epoch {(last - 1) // 6}, step {last} of {STEPS}" in said
    else:
        assert "goes on" not in said


@pytest.mark.parametrize("batch", [4, 7, 14])
def test_killed_between_the_batches_of_a_step(ended, batch):
    "With accumulation a state stands between two steps, never within one."
    said = check(ended, f"accumulated_{batch}", "plain_2")
    last = (batch - 1) // 4 * 2
    assert (f"step {last} of {STEPS // 2}" in said) == (last > 0)


@pytest.mark.parametrize("name", ["written_1", "written_3", "torn_1", "torn_3"])
def test_killed_while_the_state_is_written(ended, name):
    "A whole or half a file under another name is left behind: the state before it counts."
    said = check(ended, name)
    assert ("step 8 of" in said) if name.endswith("3") else ("goes on" not in said)


def test_killed_again_and_again(ended):
    said = check(ended, "often", kills=4)
    assert [f"step {n} of" in said for n in (4, 8, 12, 16)] == [True] * 4


def test_killed_where_the_start_counts(ended):
    "The row of the weights it began with is in the state."
    check(ended, "start", "plain_start")
    log = result(ended[0] / "start")[1]
    assert [r["epoch"] for r in log] == [0, 1, 2, 3] and "grad_norm" not in log[0]


def test_another_key_starts_anew(ended):
    assert "state.safetensors is not used: it belongs to a run with other parameters, data or code" in check(
        ended, "other_key"
    )


def test_dropout_and_the_seed_matter(ended):
    "The comparison can fail: the same run without dropout ends elsewhere."
    weights = result(ended[0] / "plain")[0]
    other = train_toy.train("")[0]
    assert (
        any(
            not torch.equal(t, other.state_dict()[n])
            for n, t in load_file(f"{ended[0] / 'plain'}.0.safetensors").items()
        )
        and weights
    )


def test_what_a_state_holds(ended):
    """Weights, best weights, both moments of each parameter and random numbers.

    Readable without executing anything.
    """
    path = ended[0] / "in_place_state" / "state.safetensors"
    model = train_toy.build(0.0)
    trained = [n for n, p in model.named_parameters()]
    with safe_open(path, "pt") as f:
        names, header = set(f.keys()), f.metadata()
    assert {f"model.{n}" for n in model.state_dict()} | {f"best.{n}" for n in model.state_dict()} | {
        "rng.cpu"
    } <= names
    moments = [n for n in names if n.startswith("optimiser.")]
    # a parameter that no loss has reached yet has none
    assert 3 * (len(trained) - 3) <= len(moments) <= 3 * len(trained)
    assert header["key"] == "toy" and json.loads(header["run"])["step"] == 8
    assert [p.name for p in path.parent.iterdir()] == ["state.safetensors"]


def test_what_the_log_says(ended):
    "Each epoch's row, against what the batches and the optimiser's settings say."
    log = json.loads((ended[0] / "plain.0.json").read_text())
    for epoch, row in enumerate(log):
        present = [b["present"] for b in train_toy.epoch_batches(epoch)]
        assert row["padding_share"] == pytest.approx(
            1 - torch.cat([p.flatten() for p in present]).double().mean().item()
        )
        assert row["loss"] == pytest.approx(row["next_item"] + row["recon"], rel=1e-5)
        assert row["samples_per_second"] * row["seconds"] == pytest.approx(
            sum(supervised(b) for b in train_toy.epoch_batches(epoch))
        )
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(sum(int(p.sum()) for p in present))
        assert (
            0 < row["grad_norm"] <= row["grad_norm_max"]
            and 0 <= row["clipped"] <= 1
            and row["memory_mb"] > 50
        )
    assert [r["stopped"] for r in log] == ["", "", "epochs"] and sum(r["best"] for r in log) == 1
    assert any(r["padding_share"] > 0 for r in log)


# --- pieces of a batch ---


def furthest(model: torch.nn.Module, weights: dict) -> float:
    """Largest difference of weights.

    Left out are those whose gradient is 0 but for rounding, which Adam makes full steps of: biases of keys,
    and the one that batch norm takes out.
    """
    fresh = train_toy.build(0.0)
    sum(train_toy.loss(fresh, b)["loss"] for b in train_toy.epoch_batches(0)).backward()
    sure = {n: p.grad.abs() > 3e-5 for n, p in fresh.named_parameters() if p.grad is not None}
    assert sum(int(s.sum()) for s in sure.values()) > 0.9 * sum(p.numel() for p in fresh.parameters())
    return max(
        float(((model.get_parameter(n).detach() - weights[n])[s]).abs().max())
        for n, s in sure.items()
        if s.any()
    )


@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 6), st.randoms())
def test_shards_cover_every_row_once(rows, world, positions, random):
    "All tensors of a row go to the same process, once; a process without a row gets one without positions."
    batch = {
        "items": torch.arange(rows * 3).view(rows, 3),
        "ids": torch.arange(rows),
        "all_items": torch.arange(rows + 1),
        "positions": torch.tensor(
            [[random.choice([-1, 0, 2]) for _ in range(positions)] for _ in range(rows)]
        ),
        "events": torch.tensor(-7),
    }
    parts = [shard(batch, r, world) for r in range(world)]
    real = [p for r, p in enumerate(parts) if r < rows]
    order = torch.cat([p["ids"] for p in real])
    assert order.sort().values.tolist() == list(range(rows))
    for key in ("items", "positions"):
        assert torch.equal(torch.cat([p[key] for p in real]), batch[key][order])
    assert all(torch.equal(p["all_items"], batch["all_items"]) for p in parts)
    assert all(
        len(p["items"]) == 1 and (p["positions"] == -1).all() and p["events"] == 0 for p in parts[rows:]
    )
    assert sum(p["events"] for p in parts) == supervised(batch) == int((batch["positions"] >= 0).sum())
    assert max(len(p["ids"]) for p in parts) - min(len(p["ids"]) for p in parts) <= 1


@pytest.mark.parametrize("pieces", [2, 4])
def test_micro_batches_are_one_large_batch(pieces):
    "Rows of a batch as micro-batches of a step, unequal in positions, give the step of the whole batch."

    def large(e):
        return train_toy.epoch_batches(e, size=9)[:4]

    def small(e):
        return [shard(b, r, pieces) | {"tokens": 0} for b in large(e) for r in range(pieces)]

    assert len({supervised(b) for b in small(0)}) > 1
    # one epoch: batch norm's running means see every micro-batch, so valid may prefer another epoch, and
    # other weights would be compared
    (one, log), (cut, cut_log) = (
        train_toy.train("", batches=large, epochs=1),
        train_toy.train("", batches=small, accumulate=pieces, epochs=1),
    )
    plain = train_toy.train("", batches=small, epochs=1)[0]
    assert furthest(one, cut.state_dict()) < 2e-5 < 1e-3 < furthest(one, plain.state_dict())
    for key in ("loss", "next_item", "recon", "grad_norm", "lr"):
        np.testing.assert_allclose([r[key] for r in cut_log], [r[key] for r in log], rtol=1e-4)


# --- several processes ---


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> tuple[Path, dict]:
    """Two processes on this CPU, by `accelerate launch`: plain, with accumulation, stopped and rerun, and
    with a bad row."""
    folder = tmp_path_factory.mktemp("launched")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def out(name):
        return {"out": str(folder / name)}

    stopped = out("stopped") | {"dropout": 0.2, "state": str(folder / "state.safetensors"), "save_every": 4}
    attempts = {
        "two": [out("two")],
        "two_accumulated": [out("two_accumulated") | {"accumulate": 2}],
        "noisy": [out("noisy") | {"dropout": 0.2}],
        "stopped": [stopped | {"stop_batch": 11}, stopped],
        "bad": [out("bad") | {"bad": 301}],
    }
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        str(port),
    ]
    return folder, run(command, attempts)


@pytest.mark.parametrize("name", ["two", "two_accumulated"])
def test_two_processes_train_as_one(launched, name):
    "The same loss curve, valid metrics and weights as one process at the same global batch, within rounding."
    folder, _ = launched
    one, log = train_toy.train("", accumulate=2 if name.endswith("accumulated") else 1)
    weights, log_two = load_file(f"{folder / name}.0.safetensors"), result(folder / name)[1]
    assert result(folder / name, 0) == result(folder / name, 1), (
        "both processes hold the same weights and log"
    )
    assert len(log_two) == len(log) == 3
    for key in ("loss", "next_item", "recon", "grad_norm", "mrr"):
        np.testing.assert_allclose([r[key] for r in log_two], [r[key] for r in log], rtol=1e-4, err_msg=key)
    assert furthest(one, weights) < 2e-5


def test_two_processes_go_on_where_they_stopped(launched):
    "Only the first one writes, both read; random numbers are those of the step, in each process."
    folder, codes = launched
    assert codes["stopped"] == [2, 0]
    for rank in (0, 1):
        assert result(folder / "stopped", rank) == result(folder / "noisy", rank)
    assert result(folder / "noisy")[0] != result(folder / "two")[0]
    assert not (folder / "state.safetensors").exists()


def test_two_processes_name_the_bad_row(launched):
    "The row is in one process only; both stop, with the same message."
    said = [Path(f"{launched[0] / 'bad'}.{rank}.error").read_text() for rank in (0, 1)]
    assert said[0] == said[1] and "in epoch 0, batch 3 (ids 300, 301, 302" in said[0]


# --- a loss that is not finite ---


def test_nan_names_epoch_batch_and_rows():
    """The first bad batch of the run is named, though the loop looks at the end of an epoch only.

    Then every later loss is NaN too.
    """
    with pytest.raises(FloatingPointError, match=r"in epoch 0, batch 3 \(ids 300, 301, 302"):
        train_toy.train("", bad=301)


def test_nan_in_a_later_epoch():
    calls = iter(range(100))

    def poisoned(m, b):
        return (m(b["x"]) ** 2).mean() * (float("nan") if next(calls) == 5 else 1.0)

    def batches(e):
        return [{"x": torch.ones(20, 1), "ids": torch.arange(20) + 1000 * e + 100 * i} for i in range(4)]

    with pytest.raises(
        FloatingPointError,
        match=r"in epoch 1, batch 1 \(ids 1100, 1101, 1102, 1103, 1104, 1105, 1106, 1107 and 12 more\)",
    ):
        fit(torch.nn.Linear(1, 1), batches, poisoned, lambda m: {"mrr": 0.1}, FitConfig(epochs=3))
