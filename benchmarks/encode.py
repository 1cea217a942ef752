"""Encoding a catalogue: distinct values in batches against one value at a time, for texts and pictures.

It also times what a picture's parts take on one thread (decoding, resizing, the tower), an unchanged rerun,
and how time and memory grow with the number of items (a stand-in tower).
"""

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.side_by_side import ROOT, Table, arguments, folder, memory, say, spread
from unirec.core.device import keep_memory
from unirec.core.params import read_params
from unirec.data.schema import Schema, SetSpec
from unirec.encoders.cache import hashes
from unirec.encoders.image_towers import ImageEncoder, lite0_trunk, open_picture, read_picture
from unirec.encoders.modalities import Contents, Files
from unirec.encoders.store import build_store, distinct, slots
from unirec.encoders.towers import TextEncoder, fetch_weights

PADDED = 512  # tokens of every text of the straight way
# values that the straight way is timed on: its seconds a value do not depend on their number
STRAIGHT = {"text": 24, "image": 48}
SIZES = (1_000, 10_000, 100_000)
RERUN, LARGE = 20_000, 1_000_000
PAUSE = 2e-4  # seconds a value of a tower as fast as a large GPU
WIDTH = 384  # of the stand-in tower, as the mini profile's
MADE_UP = Schema.from_params(
    {
        "title": {"type": "text"},
        "description": {"type": "text"},
        **{f"category {i}": {"type": "category"} for i in range(7)},
        **{f"number {i}": {"type": "number"} for i in range(5)},
    }
)


class Worker:
    """A process of its own that builds one side and runs it when asked: what one side does to its process
    does not help the other."""

    def __init__(self, build: Callable[..., Callable[[], object]], *arguments: object):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, build, arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.seconds()  # warm-up

    def seconds(self) -> float:
        "Of one run."
        self.pipe.send("run")
        answer = self.pipe.recv()
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        "End the process."
        self.pipe.send("end")
        self.process.join()


def _serve(pipe, build: Callable, arguments: tuple) -> None:
    "In the child."
    try:
        step = build(*arguments)
        while pipe.recv() == "run":
            start = time.perf_counter()
            step()
            pipe.send(time.perf_counter() - start)
    except Exception as error:
        pipe.send(f"{build.__name__}: {type(error).__name__}: {error}")


def where(name: str, params: dict) -> tuple[Path, Path, SetSpec]:
    "A prepared set's items, its raw folder and its specification."
    first, cache = ROOT / "prepared" / name, ROOT / "experiments" / "cache"
    raw = ROOT / "data" / name if (ROOT / "data" / name).exists() else cache / "raw" / name
    return (
        (first if first.exists() else cache / "prepared" / name) / "items.parquet",
        raw,
        SetSpec.from_params(name, params["sets"][name]),
    )


def values(items: Path, raw: Path, spec: SetSpec, kind: str) -> list:
    "The value of every triplet of a kind, in order, repeated as the catalogue repeats them."
    table = slots(pd.read_parquet(items), spec.schema)
    found = table.value[table.encoder == kind].tolist()
    return list(Contents(Files(raw), found)) if kind == "image" else [str(v) for v in found]


def straight_text(encode: dict, texts: list[str]) -> Callable[[], None]:
    "One at a time, padded to 512, float32."
    encoder = TextEncoder(encode["text"], "float32", encode["max_length"])

    def run() -> None:
        for text in texts:
            batch = encoder.tokenizer(
                [text], padding="max_length", truncation=True, max_length=PADDED, return_tensors="pt"
            )
            with torch.inference_mode():
                states, mask = encoder.model(**batch).last_hidden_state, batch["attention_mask"][..., None]
            torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).numpy()

    return run


def batched_text(encode: dict, texts: list[str]) -> Callable[[], None]:
    "The distinct ones, batches of like length, the machine's best precision."
    keep_memory()
    encoder = TextEncoder(encode["text"], encode["dtype"], encode["max_length"], encode["token_budget"])
    return lambda: encoder(distinct(texts)[0])


def plain_tower(encode: dict) -> torch.nn.Module:
    "timm's network as it is, nothing folded."
    path = fetch_weights(encode["image"]).path
    return lite0_trunk(path / "model.safetensors" if path.is_dir() else path)


def plain_input(picture: bytes) -> torch.Tensor:  # (1, 3, 224, 224)
    "One picture, decoded whole and standardised."
    pixels = open_picture(picture).resize((224, 224), Image.Resampling.BICUBIC)
    x = np.asarray(pixels, np.float32).transpose(2, 0, 1) / 255
    return torch.from_numpy((x - 0.498) / 0.502)[None]


def straight_image(encode: dict, pictures: list[bytes]) -> Callable[[], None]:
    "One at a time, float32, memory laid out as it comes."
    model = plain_tower(encode)

    def run() -> None:
        for picture in pictures:
            with torch.inference_mode():
                model(plain_input(picture)).numpy()

    return run


def batched_image(encode: dict, pictures: list[bytes]) -> Callable[[], None]:
    "The distinct ones in batches, a batch on each core, the machine's best precision."
    keep_memory()
    encoder = ImageEncoder(encode["image"], encode["dtype"])

    def run() -> None:
        names = hashes(pictures)
        encoder([pictures[i] for i in np.unique(names, return_index=True)[1]])

    return run


def decode_alone(encode: dict, pictures: list[bytes]) -> Callable[[], object]:
    "Decoding, on one thread."
    return lambda: [open_picture(picture, enough=448) for picture in pictures]


def resize_alone(encode: dict, pictures: list[bytes]) -> Callable[[], object]:
    "Resizing decoded pictures, on one thread."
    opened = [open_picture(picture, enough=448) for picture in pictures]
    return lambda: [np.array(picture.resize((224, 224), Image.Resampling.BICUBIC)) for picture in opened]


def straight_tower(encode: dict, pictures: list[bytes]) -> Callable[[], object]:
    "The plain network alone, one picture at a time, on one thread."
    torch.set_num_threads(1)
    model, inputs = plain_tower(encode), [plain_input(picture) for picture in pictures]
    return torch.inference_mode()(lambda: [model(x) for x in inputs])


def batched_tower(encode: dict, pictures: list[bytes]) -> Callable[[], object]:
    "The package's network alone, in its batches, on one thread."
    keep_memory()
    torch.set_num_threads(1)
    encoder = ImageEncoder(encode["image"], encode["dtype"])
    whole = encoder.standardise(torch.stack([torch.as_tensor(read_picture(p)) for p in pictures]))
    batches = [
        x.to(getattr(torch, encoder.dtype)).contiguous(memory_format=torch.channels_last)
        for x in whole.split(encoder.batch)
    ]
    return torch.inference_mode()(lambda: [encoder.model(x) for x in batches])


COMPONENTS = {
    "decode": decode_alone,
    "resize": resize_alone,
    "tower, one at a time": straight_tower,
    "tower, batches": batched_tower,
}


def components(table: Table, name: str, encode: dict, pictures: list[bytes], pairs: int) -> None:
    "One row a part of the way of a picture: milliseconds a picture on one thread, run in turn."
    sides = {kind: Worker(build, encode, pictures) for kind, build in COMPONENTS.items()}
    rows = {kind: [] for kind in sides}
    for pair in range(pairs):
        for kind in list(sides) if pair % 2 == 0 else list(sides)[::-1]:
            rows[kind].append(sides[kind].seconds() / len(pictures) * 1e3)
    for kind, side in sides.items():
        side.close()
        ms = float(np.median(rows[kind]))
        table.add(
            {
                "part": "components",
                "dataset": name,
                "kind": kind,
                "values": len(pictures),
                "pairs": pairs,
                "ms": ms,
                "all": " ".join(f"{t:.3f}" for t in rows[kind]),
            }
        )
        say(f"{name:11s} {kind:22s} {ms:7.2f} ms a picture on one thread")


SIDES = {"text": (straight_text, batched_text), "image": (straight_image, batched_image)}


def towers(table: Table, name: str, kind: str, encode: dict, found: list, pairs: int, most: int) -> None:
    "One row: seconds of a whole catalogue both ways, medians of pairs run in turn."
    drawn = [
        found[i] for i in np.random.default_rng(0).choice(len(found), min(most, len(found)), replace=False)
    ]
    sides = [Worker(build, encode, some) for build, some in zip(SIDES[kind], (drawn, found))]
    rows = []
    for pair in range(pairs):
        order = sides if pair % 2 == 0 else sides[::-1]
        seconds = {id(side): side.seconds() for side in order}
        rows.append((seconds[id(sides[0])] / len(drawn) * len(found), seconds[id(sides[1])]))
    for side in sides:
        side.close()
    ratio = [a / b for a, b in rows]
    table.add(
        {
            "part": "towers",
            "dataset": name,
            "kind": kind,
            "items": None,
            "values": len(found),
            "distinct": len(set(found)),
            "pairs": pairs,
            "straight_s": float(np.median([a for a, _ in rows])),
            "batched_s": float(np.median([b for _, b in rows])),
            "ratio": float(np.median(ratio)),
            "least": min(ratio),
            "most": max(ratio),
            "all": " ".join(f"{a:.3f}/{b:.3f}" for a, b in rows),
        }
    )
    say(
        f"{name:11s} {kind:6s} {len(found):6d} values, {len(set(found)):5d} distinct: straight"
        f" {np.median([a for a, _ in rows]):7.1f} s, batched {np.median([b for _, b in rows]):6.2f} s,"
        f" {spread(ratio)} times"
    )


class StandIn:
    "A tower whose vectors are a text's hash, so that all but the model is real; it counts what it is asked."

    key, width, chunk, asked = {"encoder": "stand-in"}, WIDTH, 65_536, 0

    def __init__(self, pause: float = 0.0):
        self.pause = pause

    def __call__(self, texts):
        StandIn.asked += len(texts)
        time.sleep(self.pause * len(texts))
        return np.tile(hashes(texts).view(np.uint8).reshape(-1, 32), WIDTH // 32).astype(np.float32) / 128 - 1


def catalogue(n: int, seed: int = 0) -> pd.DataFrame:
    """Made-up items with 14 attributes: own titles, a description for every second one, seven categories
    of 50 values, five numbers in cents."""
    rng = np.random.default_rng(seed)

    def number():
        return np.round(rng.lognormal(3, 1, n), 2)

    return pd.DataFrame(
        {
            "item_id": np.arange(n).astype(str),
            "title": [f"product {i} of the made-up catalogue" for i in range(n)],
            "description": [
                f"a description of some length for product {i}" if i % 2 else None for i in range(n)
            ],
            **{f"category {c}": [[f"value {v}"] for v in rng.integers(50, size=n)] for c in range(7)},
            **{f"number {c}": number() for c in range(5)},
        }
    )


def store(items: pd.DataFrame, top: Path, pause: float = 0.0) -> tuple[float, int]:
    "Seconds of building a store with a cache, and how many values the tower was asked."
    before, start = StandIn.asked, time.perf_counter()
    build_store(
        items,
        np.ones(len(items), bool),
        MADE_UP,
        [],
        {"text": StandIn(pause)},
        None,
        top / "store",
        top / "cache",
    )
    return time.perf_counter() - start, StandIn.asked - before


def grow(table: Table, sizes: tuple, pairs: int) -> None:
    """A fresh build of each size, in turn, with a tower that takes no time and with one as fast as a large
    GPU; a row a size and tower."""
    made = {n: catalogue(n) for n in sizes}
    for kind, pause in {"no model time": 0.0, f"{PAUSE * 1e3:g} ms a value": PAUSE}.items():
        seconds = {n: [] for n in sizes}
        with tempfile.TemporaryDirectory() as scratch:
            store(made[sizes[0]], Path(scratch))
        for pair in range(pairs):
            for n in sizes if pair % 2 == 0 else sizes[::-1]:
                with tempfile.TemporaryDirectory() as scratch:
                    seconds[n].append(store(made[n], Path(scratch), pause)[0])
        for n in sizes:
            each = [s / n * 1e6 for s in seconds[n]]
            table.add(
                {
                    "part": "growth",
                    "kind": kind,
                    "items": n,
                    "pairs": pairs,
                    "seconds": float(np.median(seconds[n])),
                    "us_per_item": float(np.median(each)),
                    "all": " ".join(f"{s:.3f}" for s in seconds[n]),
                }
            )
            say(
                f"growth, {kind}: {n:8d} items {np.median(seconds[n]):8.2f} s, {spread(each)} microseconds an"
                " item"
            )


def rerun(table: Table, n: int, pairs: int) -> None:
    "An unchanged catalogue again, and with one item changed."
    items, found = catalogue(n), {"again": [], "one changed": []}
    with tempfile.TemporaryDirectory() as scratch:
        store(items, Path(scratch))
        for pair in range(pairs):
            found["again"].append(store(items, Path(scratch)))
            changed = items.copy()
            changed.loc[pair, "title"] = f"another name, {pair}"
            found["one changed"].append(store(changed, Path(scratch)))
    for kind, runs in found.items():
        seconds, asked = zip(*runs)
        table.add(
            {
                "part": "rerun",
                "kind": kind,
                "items": n,
                "pairs": pairs,
                "seconds": float(np.median(seconds)),
                "asked": max(asked),
                "all": " ".join(f"{s:.3f}" for s in seconds),
            }
        )
        say(f"rerun {kind}: {n} items, {spread(seconds)} s, the tower was asked {max(asked)} values")


def large(n: int, top: str) -> Callable[[], None]:
    """For the measurement of memory: a fresh build of a large catalogue in a process of its own, its items
    included."""
    items = catalogue(n)
    return lambda: store(items, Path(top))


def others(path: Path | None, parts: list[str]) -> list[dict]:
    "Rows of parts that are not measured now, as they were measured before."
    before = pd.read_csv(path) if path and path.exists() else pd.DataFrame({"part": []})
    return before[~before.part.isin(parts)].to_dict("records")


def main() -> None:
    "Command line."
    parser = arguments(__doc__)
    parser.add_argument(
        "--parts",
        nargs="+",
        default=["towers", "components", "rerun", "growth", "large"],
        help="which of towers, components, rerun, growth, large",
    )
    args = parser.parse_args()
    params = read_params(ROOT)
    sizes, again, most = ((200, 400), 400, 3_000) if args.quick else (SIZES, RERUN, LARGE)
    pairs = args.pairs or (2 if args.quick else 5)
    table = Table(
        "encode",
        folder(args),
        quick=args.quick,
        padded=PADDED,
        straight_values=STRAIGHT,
        data=(
            "towers: the catalogues' own values; the rest synthetic, 14 attributes, stand-in tower of"
            " width 384"
        ),
        what=(
            "towers: one value at a time in float32, texts padded to 512, nothing de-duplicated (timed on a"
            " draw of values, scaled to all) against distinct values in batches at the machine's precision;"
            " each side in a process of its own, models loaded, run in turn; components: of a"
            " picture, alone and on one thread; rerun and growth: all but the model is real; memory in"
            " a fresh process, above the imports, items included"
        ),
    )
    if kept := others(table.path, args.parts):
        table.add(*kept)
    if "towers" in args.parts:
        for name, kinds in {
            "sample": ("text", "image"),
            "all_beauty": ("text",),
            "posters": ("image",),
        }.items():
            items, raw, spec = where(name, params)
            if not items.exists():
                say(f"{name}: not measured, {items.relative_to(ROOT)} is not there")
                continue
            for kind in kinds:
                found = values(items, raw, spec, kind)
                towers(
                    table,
                    name,
                    kind,
                    params["encode"],
                    found[:20] if args.quick else found,
                    pairs,
                    3 if args.quick else STRAIGHT[kind],
                )
    if "components" in args.parts:
        for name in ("sample", "posters"):
            items, raw, spec = where(name, params)
            if items.exists():
                drawn = values(items, raw, spec, "image")[: 3 if args.quick else STRAIGHT["image"]]
                components(table, name, params["encode"], drawn, pairs)
    if "rerun" in args.parts:
        rerun(table, again, pairs)
    if "growth" in args.parts:
        grow(table, sizes, pairs)
    if "large" in args.parts:
        with tempfile.TemporaryDirectory() as scratch:
            start = time.perf_counter()
            used = memory(large, most, scratch, runs=1)
            table.add(
                {
                    "part": "large",
                    "kind": "fresh",
                    "items": most,
                    "pairs": 1,
                    "seconds": time.perf_counter() - start,
                    **used,
                }
            )
            say(
                f"large: {most} items, {used['memory_mb']:.0f} MB with the items, {used['step_mb']:.0f} MB"
                " without"
            )


if __name__ == "__main__":
    main()
