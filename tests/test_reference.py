"""The splits are those of the peer toolkit that the reference figures were measured with, byte for byte."""

import json
import os
from pathlib import Path

import pytest

from unirec.core.params import read_params
from unirec.data.prepare import prepare
from unirec.data.schema import SetSpec
from unirec.data.sources import download

ROOT = Path(__file__).resolve().parent.parent
PARAMS = read_params(ROOT)
REFERENCE = {  # set -> users, items, events, sha256 over the lines `user,test_item`
    "movielens": (943, 1349, 99287, "f699572d46c6163dab92a3356b076b2347094feea4b68b03cc7de9b1034f3875"),
    "all_beauty": (253, 356, 2535, "de2bbc1ab36e08f6b044e22b9d02aa77c8394ec4539f917ca92e7b7a7d7f8eb8"),
    "posters": (597, 1845, 56118, "335265dd6958a2ea85a9eeb1444e46ca88bcab5f4b44669d29b11a9f184c1f75"),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_split_is_the_reference_split(name, tmp_path):
    """Users, items, events and the fingerprint of the test list.

    Sets that are not passed on are skipped where they are absent.
    """
    spec = SetSpec.from_params(name, PARAMS["sets"][name])
    extra = os.environ.get("UNIREC_EXTRA_ROOT") or PARAMS["data"]["extra_root"]
    if spec.source.startswith("extra:") and not (
        extra and (Path(extra) / spec.source.partition(":")[2]).is_dir()
    ):
        pytest.skip(f"{name} may not be passed on: set UNIREC_EXTRA_ROOT to the folder that holds it")
    download(spec, tmp_path / "raw", extra)
    quality = prepare(tmp_path / "raw", spec, tmp_path / "prepared")
    assert (quality["users"], quality["items"], quality["events"], quality["test_split_sha256"]) == REFERENCE[
        name
    ]
    assert json.loads((tmp_path / "prepared" / "quality.json").read_text()) == quality


def test_committed_results_are_of_the_reference_splits():
    "The committed reference of every one of these sets was measured on this split."
    for name, (users, items, events, split) in REFERENCE.items():
        found = json.loads((ROOT / "results" / "reference" / f"{name}.json").read_text())
        assert found == {"users": users, "items": items, "events": events, "test_split_sha256": split}
