"""RecBole 1.2.1's SASRec as it is shipped, in an environment of its own: positions a second of its training.

`benchmarks/training.py --recbole` calls `measure`, which makes the environment in a temporary folder (it sees
the packages of this one, torch among them), installs what RecBole's SASRec imports, and runs this file there.
"""

import json
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

PEER = "recbole==1.2.1"
# what its package imports on the way to SASRec, of the versions that it asks for; ray, which only its search
# for settings needs, has no wheel for this Python
IMPORTS = ("colorlog==4.7.2", "colorama==0.4.4", "scikit-learn", "tensorboard", "thop")
IMPORTS += ("tabulate", "plotly", "texttable", "psutil")
SETTINGS = {  # those of benchmarks/training.py; everything else as shipped
    "hidden_size": 64,
    "inner_size": 128,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dropout_prob": 0.3,
    "attn_dropout_prob": 0.3,
    "MAX_ITEM_LIST_LENGTH": 50,
    "loss_type": "CE",
    "train_neg_sample_args": None,
    "train_batch_size": 128,
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "use_gpu": False,
    "show_progress": False,
    "save_dataset": False,
    "save_dataloaders": False,
    "state": "ERROR",
}


def measure(
    users: list[int],  # of each event, in the order of time
    items: list[int],  # of each event
    steps: int,  # batches that are timed, after two that are not
) -> float:  # positions a second, on one thread
    "The rate of RecBole's training on these events."
    with tempfile.TemporaryDirectory(prefix="recbole-") as name:
        scratch = Path(name)
        venv.create(scratch / "venv", symlinks=True)
        python = scratch / "venv" / "bin" / "python"
        ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        inside = subprocess.check_output(ask, text=True).strip()
        (Path(inside) / "parent.pth").write_text(sysconfig.get_path("purelib"))
        install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*install, *IMPORTS], check=True)
        subprocess.run([*install, "--no-deps", PEER], check=True)
        rows = [f"{user}\t{item}\t{time}" for time, (user, item) in enumerate(zip(users, items, strict=True))]
        data = scratch / "made_up"
        data.mkdir()
        head = "user_id:token\titem_id:token\ttimestamp:float"
        (data / "made_up.inter").write_text("\n".join([head, *rows]) + "\n")
        done = subprocess.run(
            [str(python), str(Path(__file__).resolve()), str(steps)],
            cwd=scratch,
            text=True,
            capture_output=True,
        )
        if done.returncode:
            raise RuntimeError(f"{PEER} does not run: {done.stderr.strip().splitlines()[-1]}")
        return float(json.loads(done.stdout.strip().splitlines()[-1])["positions_per_second"])


def train(steps: int) -> float:  # positions a second
    "In the environment that `measure` made: the loop of RecBole's trainer on the first batches."
    import numpy as np
    import torch

    # names that NumPy 2 has no longer, and RecBole's configuration asks for
    np.float_, np.complex_, np.unicode_ = np.float64, np.complex128, np.str_  # type: ignore
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.sequential_recommender.sasrec import SASRec
    from recbole.utils import init_seed

    settings = SETTINGS | {"data_path": str(Path.cwd())}
    sys.argv = sys.argv[:1]  # it reads the words of the command line, too
    config = Config(model="SASRec", dataset="made_up", config_dict=settings)
    init_seed(config["seed"], config["reproducibility"])
    torch.set_num_threads(1)
    dataset = create_dataset(config)
    batches, *_ = data_preparation(config, dataset)
    model = SASRec(config, batches.dataset).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=config["learning_rate"])
    positions, start = 0, 0.0
    for step, batch in enumerate(batches):
        if step == 2:  # the first ones allocate
            positions, start = 0, time.perf_counter()
        if step == steps + 2:
            break
        optimiser.zero_grad()
        model.calculate_loss(batch).backward()
        optimiser.step()
        positions += len(batch)
    return positions / (time.perf_counter() - start)


if __name__ == "__main__":
    print(json.dumps({"positions_per_second": train(int(sys.argv[1]))}))
